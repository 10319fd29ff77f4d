//! Weights from node to node: what others may have from here, and models that this node fetches from others to hold.
//!
//! Who has a model's manifest has the model: every node that is known is asked, and those that the DHT names. Files come
//! by hash from all of them at once, each MiB verified, and only under a card with an open licence. A model that came so is
//! imported like any other: what this release reads from its files must make the id that was wanted. It is held and given
//! on from then on; it is computed after the next start, where there is a device.
//!
//! - [`wants`]: which model is due, sans-IO; `fetch`: how one comes.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use kinoflock_protocol::id::{ModelId, NodeId};
use kinoflock_protocol::names::holding_key;

use self::fetch::{Fetch, who_holds};
use self::wants::Wants;
use super::{Daemon, Note};
use crate::admin::report::{ArchiveReport, HoldersReport};
use crate::models::shelf::{self, Shelf};
use crate::models::{Model, ModelStore};

mod fetch;
mod wants;

/// Models whose holders are counted at once.
const MAX_COUNTED: usize = 64;

/// What this node gives and wants.
#[derive(Debug)]
pub(super) struct Archive {
    shelf: Shelf,
    wants: Wants,
}

impl Archive {
    pub(super) fn new(shelf: Shelf, keep: &[String], now: Instant) -> Self {
        let mut wants = Wants::default();
        keep.iter().for_each(|model| wants.add(model, now));
        Self { shelf, wants }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.wants.poll_timeout()
    }

    pub(super) fn report(&self) -> Vec<ArchiveReport> {
        self.wants.report()
    }
}

impl Daemon {
    /// Puts the files of models under open licences where others get them, in the background.
    pub(super) fn put_on_shelf(&self, models: Vec<Arc<Model>>) {
        let shelf = self.archive.shelf.clone();
        let models: Vec<_> = models.into_iter().filter(|model| shelf::may_share(model)).collect();
        if !self.config.storage.share_models || models.is_empty() {
            return;
        }
        self.spawn(async move {
            let put = tokio::task::spawn_blocking(move || {
                for model in &models {
                    if let Err(error) = shelf.put(model) {
                        tracing::warn!(model = %model.name, %error, "the model is not given to others");
                    }
                }
                shelf.holds(models.iter().map(Arc::as_ref))
            });
            Note::Shelved { models: put.await.unwrap_or_default() }
        });
    }

    pub(super) fn handle_shelved(&self, models: Vec<ModelId>) {
        for model in models {
            tracing::info!(%model, "other nodes can have the model's files from here");
            let net = self.net.clone();
            tokio::spawn(async move {
                if let Err(error) = net.provide(holding_key(&model), true).await {
                    tracing::warn!(%model, %error, "this node could not be noted as a holder");
                }
            });
        }
    }

    /// Begins to fetch what is due.
    pub(super) fn fetch_models(&mut self) {
        while let Some((name, progress)) = self.archive.wants.next(Instant::now()) {
            let id = match self.resolve(&name) {
                Ok(id) => id,
                Err(reason) => {
                    self.archive.wants.done(&name, Err(reason), Instant::now());
                    continue;
                }
            };
            if self.models.contains_key(&id) {
                self.archive.wants.done(&name, Ok(id), Instant::now());
                continue;
            }
            let fetch = Fetch {
                net: self.net.clone(),
                network: self.network,
                folder: self.config.storage.models.clone(),
                limit: self.config.storage.models_limit,
                id,
                name: self.offered_name(&id).unwrap_or_else(|| name.clone()),
                candidates: self.candidates(&id),
                progress,
            };
            self.spawn(async move { Note::Fetched { name, result: fetch.run().await.map(Box::new) } });
        }
    }

    pub(super) fn handle_fetched(&mut self, name: &str, result: Result<Box<Model>, String>) {
        let now = Instant::now();
        match result {
            Ok(model) => {
                tracing::info!(model = %model.name, id = %model.id, "a model came from other nodes");
                let model = Arc::new(*model);
                self.archive.wants.done(name, Ok(model.id), now);
                self.models.insert(model.id, Arc::clone(&model));
                self.put_on_shelf(vec![model]);
            }
            Err(reason) => {
                tracing::warn!(model = name, reason, "a model could not be had from other nodes yet");
                self.archive.wants.done(name, Err(reason), now);
            }
        }
    }

    /// The operator wants a model from other nodes.
    pub(super) fn want(&mut self, model: &str) -> Result<(), String> {
        let model = model.trim();
        if model.is_empty() {
            return Err("a model's name or id is wanted".to_owned());
        }
        // Known in any case is said at once; what may still come is waited for.
        if let Ok(id) = self.resolve(model)
            && self.models.contains_key(&id)
        {
            return Err(format!("{model} is here already"));
        }
        if self.archive.wants.is_full() {
            return Err(format!("{} models are wanted, the most at once", wants::MAX_WANTS));
        }
        self.archive.wants.add(model, Instant::now());
        Ok(())
    }

    /// How many nodes are known to hold each model of this one, itself among them; answered when they were asked.
    pub(super) fn count_holders(&self, reply: tokio::sync::oneshot::Sender<Vec<HoldersReport>>) {
        let asked: Vec<_> =
            self.models.keys().take(MAX_COUNTED).map(|id| (*id, self.candidates(id))).collect();
        let net = self.net.clone();
        tokio::spawn(async move {
            let counts = asked.into_iter().map(|(id, candidates)| {
                let net = net.clone();
                async move {
                    let (others, _) = who_holds(&net, id, candidates).await;
                    HoldersReport { model: id.to_string(), holders: others.len() + 1 }
                }
            });
            // Who asked may have hung up meanwhile.
            drop(reply.send(futures::future::join_all(counts).await));
        });
    }

    /// Nodes that may hold a model, those that offer it first.
    fn candidates(&self, model: &ModelId) -> Vec<NodeId> {
        let own = self.identity.node_id();
        let live = self.adverts.live().filter(|(node, _)| *node != own);
        let (offering, others): (Vec<_>, Vec<_>) =
            live.partition(|(_, capacity)| capacity.offer(model).is_some());
        offering.into_iter().chain(others).map(|(node, _)| node).collect()
    }

    /// The name under which others offer a model.
    fn offered_name(&self, model: &ModelId) -> Option<String> {
        let offer = self.adverts.live().find_map(|(_, capacity)| capacity.offer(model));
        offer.map(|offer| offer.name.to_string())
    }

    /// The model that a name means: one of this node, or the only one that others offer under it.
    fn resolve(&self, name: &str) -> Result<ModelId, String> {
        if let Ok(id) = ModelId::from_str(name) {
            return Ok(id);
        }
        if let Some(model) = self.models.values().find(|model| model.name == name) {
            return Ok(model.id);
        }
        let mut offered: BTreeMap<ModelId, usize> = BTreeMap::new();
        for (_, capacity) in self.adverts.live() {
            for offer in capacity.models.iter().filter(|offer| offer.name.as_str() == name) {
                *offered.entry(offer.model).or_default() += 1;
            }
        }
        let mut ids = offered.keys();
        match (ids.next(), ids.next()) {
            (Some(only), None) => Ok(*only),
            (None, _) => Err("no node that is known offers a model of this name; give its id".to_owned()),
            (Some(_), Some(_)) => {
                let ids: Vec<_> = offered.keys().map(ToString::to_string).collect();
                Err(format!("several models have this name; give one's id: {}", ids.join(", ")))
            }
        }
    }
}

/// Opens the store of models; blocks on the disk.
fn store(folder: &std::path::Path, limit: Option<u64>) -> Result<ModelStore, String> {
    ModelStore::open(folder, limit).map_err(|error| error.to_string())
}

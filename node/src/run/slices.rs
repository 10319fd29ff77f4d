//! How much of a large network this node hears: adverts of everybody cost every node bytes in proportion to the network,
//! so beyond some number of nodes they stay in slices of it.
//!
//! [`Depth`] is sans-IO. A node tells its adverts in its slice, and hears that slice and the one twice as large, in which
//! those are that have not moved yet. A slice that has held too many for a while is left for its half, one that has held
//! too few for the whole; who comes anew begins where its neighbours are, if it knows members there. So what a node hears
//! is bounded by two slices, however large the network is.
//!
//! A model that is served in other slices only is found by the DHT: some of its nodes are noted there under the model's
//! key, and a node that is asked for it passes the question on to them, once. What they answer is signed by the nodes it
//! tells of.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kinoflock_net::slices::MAX_DEPTH;
use kinoflock_net::{Responder, Slice};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{ModelId, NodeId};
use kinoflock_protocol::limits::MAX_NODES;
use kinoflock_protocol::names::capacity_key;
use kinoflock_protocol::rpc::{FindNodes, Request, Response};

use super::{Daemon, Note};

/// How long a slice must have held too many before it is left for its half.
const CROWDED_FOR: Duration = Duration::from_secs(60);
/// How long a slice must have held too few before it is left for the whole.
const SPARSE_FOR: Duration = Duration::from_secs(120);
/// A slice holds too few when it holds less than this part of the most: two such halves make a whole that is half full.
const SPARSE_PART: usize = 4;
/// Who comes anew begins in a slice of which it knows this part of the most.
const KNOWN_PART: usize = 8;
/// Nodes of one model that are noted in the DHT, about.
const NOTED: f64 = 20.0;
/// With fewer adverts of a model than this the question is passed on.
const ENOUGH: usize = MAX_NODES / 2;
/// Nodes to which a question is passed on.
const ASKED: usize = 2;
/// How long each is waited for.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Questions that are passed on at once; further ones are answered from what is known here.
const AT_ONCE: usize = 16;
/// Models whose nodes are remembered; of more, those sought longest ago are sought anew.
const MAX_CONTACTS: usize = 64;
/// How long they are remembered.
const REMEMBERED: Duration = Duration::from_secs(600);

/// In how small a slice of the network this node tells its adverts.
#[derive(Debug)]
pub(super) struct Depth {
    own: NodeId,
    /// Most members of a slice.
    limit: usize,
    depth: u8,
    crowded: Option<Instant>,
    sparse: Option<Instant>,
}

impl Depth {
    pub(super) const fn new(own: NodeId, limit: usize) -> Self {
        Self { own, limit, depth: 0, crowded: None, sparse: None }
    }

    /// Where the own adverts go.
    pub(super) fn told(&self) -> Slice {
        Slice::of(&self.own, self.depth)
    }

    /// Whose adverts are heard.
    pub(super) fn heard(&self) -> BTreeSet<Slice> {
        let told = self.told();
        [Some(told), told.whole()].into_iter().flatten().collect()
    }

    /// Looks at how many members are known of a slice, and how deep the neighbours' slices are; says whether the own one
    /// has changed.
    pub(super) fn poll(&mut self, known: impl Fn(&Slice) -> usize, neighbours: &[u8], now: Instant) -> bool {
        let few = (self.limit / SPARSE_PART).max(1);
        let enough = (self.limit / KNOWN_PART).max(1);
        let before = self.depth;
        let usual = median(neighbours);
        if usual > self.depth && known(&Slice::of(&self.own, usual)) >= enough {
            self.depth = usual;
        }
        let members = known(&self.told());
        let due = |since: &mut Option<Instant>, holds: bool, after: Duration| {
            *since = holds.then_some(since.unwrap_or(now));
            since.is_some_and(|since| now.saturating_duration_since(since) >= after)
        };
        let is_crowded = members > self.limit && self.depth < MAX_DEPTH;
        let is_sparse = members < few && self.depth > 0;
        if due(&mut self.crowded, is_crowded, CROWDED_FOR) {
            self.depth += 1;
        } else if due(&mut self.sparse, is_sparse, SPARSE_FOR) {
            self.depth -= 1;
        }
        if self.depth != before {
            (self.crowded, self.sparse) = (None, None);
        }
        self.depth != before
    }

    /// Whether this node is one of those that are noted in the DHT for a model that so many of its slice serve.
    fn is_noted(&self, model: &ModelId, serving: usize) -> bool {
        if self.depth == 0 {
            return false;
        }
        let all = (serving + 1) as f64 * f64::from(1_u32 << self.depth);
        let drawn = blake3::hash(&[self.own.as_bytes().as_slice(), model.as_bytes()].concat());
        let drawn = drawn.as_bytes().first_chunk().copied().map_or(0, u32::from_be_bytes);
        f64::from(drawn) / f64::from(u32::MAX) <= NOTED / all
    }
}

/// The middle one, the lesser of two.
fn median(depths: &[u8]) -> u8 {
    let mut sorted = depths.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(0)
}

/// What this node knows and tells of models beyond its slice.
#[derive(Debug, Default)]
pub(super) struct Contacts {
    /// Nodes that serve a model, and when they were found.
    known: BTreeMap<ModelId, (Instant, Vec<NodeId>)>,
    /// Models for which this node is noted in the DHT.
    noted: BTreeSet<ModelId>,
    /// Questions that are under way.
    under_way: usize,
}

impl Contacts {
    fn of(&self, model: &ModelId, now: Instant) -> Vec<NodeId> {
        let fresh = self.known.get(model).filter(|(at, _)| now.saturating_duration_since(*at) < REMEMBERED);
        fresh.map(|(_, nodes)| nodes.clone()).unwrap_or_default()
    }

    fn keep(&mut self, model: ModelId, nodes: Vec<NodeId>, now: Instant) {
        if nodes.is_empty() {
            self.known.remove(&model);
            return;
        }
        while self.known.len() >= MAX_CONTACTS && !self.known.contains_key(&model) {
            let Some(oldest) = self.known.iter().min_by_key(|(_, (at, _))| *at).map(|(id, _)| *id) else {
                break;
            };
            self.known.remove(&oldest);
        }
        self.known.insert(model, (now, nodes));
    }
}

/// What came of a question that was passed on.
#[derive(Debug)]
pub(super) struct Sought {
    wanted: FindNodes,
    responder: Responder,
    model: ModelId,
    /// Who answered.
    nodes: Vec<NodeId>,
    adverts: Vec<Envelope>,
}

impl Daemon {
    /// Looks whether this node's slice still fits; asks first how deep those of its neighbours are.
    pub(super) fn look_at_slice(&self) {
        let net = self.net.clone();
        self.spawn(async move { Note::Depths { neighbours: net.depths().await.unwrap_or_default() } });
    }

    pub(super) fn handle_depths(&mut self, neighbours: &[u8]) {
        let now = Instant::now();
        let known = |slice: &Slice| self.adverts.live().filter(|(node, _)| slice.holds(node)).count();
        if self.depth.poll(known, neighbours, now) {
            let (told, heard) = (self.depth.told(), self.depth.heard());
            tracing::info!(slice = %told, "adverts stay in this slice of the network");
            let net = self.net.clone();
            tokio::spawn(async move {
                // An error means that the network has ended.
                let _ = net.set_slices(told, heard).await;
            });
            self.adverts.outdate();
        }
        self.note_models();
    }

    /// Is noted in the DHT for those models that it serves and that few others do.
    fn note_models(&mut self) {
        let serving = |model: &ModelId| {
            let slice = self.depth.told();
            let of_slice = self.adverts.live().filter(|(node, _)| slice.holds(node));
            of_slice.filter(|(_, capacity)| capacity.offer(model).is_some()).count()
        };
        let served = self.models.keys().filter(|model| self.passed(model).is_some());
        let noted: BTreeSet<ModelId> =
            served.filter(|model| self.depth.is_noted(model, serving(model))).copied().collect();
        let changes: Vec<(ModelId, bool)> = noted
            .symmetric_difference(&self.contacts.noted)
            .map(|model| (*model, noted.contains(model)))
            .collect();
        self.contacts.noted = noted;
        for (model, on) in changes {
            let net = self.net.clone();
            tokio::spawn(async move {
                if let Err(error) = net.provide(capacity_key(&model), on).await {
                    tracing::warn!(%model, %error, "this node could not be noted for the model");
                }
            });
        }
    }

    /// Answers from the adverts that are known; or passes the question on, where they are few and the network is large.
    pub(super) fn find_or_seek(&mut self, wanted: FindNodes, responder: Responder) {
        let response = self.find_nodes(&wanted);
        let known = if let Response::Nodes(nodes) = &response { nodes.len() } else { 0 };
        let is_sliced = self.depth.told() != Slice::ALL;
        let model = wanted.model.filter(|_| wanted.forward && is_sliced && known < ENOUGH);
        let Some(model) = model.filter(|_| self.contacts.under_way < AT_ONCE) else {
            return self.respond("find_nodes", responder, response);
        };
        self.contacts.under_way += 1;
        let (net, own) = (self.net.clone(), self.identity.node_id());
        let contacts = self.contacts.of(&model, Instant::now());
        self.spawn(async move {
            let question = FindNodes { forward: false, ..wanted };
            let (mut nodes, mut adverts) = (Vec::new(), Vec::new());
            let contacts = if contacts.is_empty() {
                net.providers(capacity_key(&model)).await.unwrap_or_default()
            } else {
                contacts
            };
            let asked =
                contacts.into_iter().filter(|node| *node != own).take(ASKED).map(|node| {
                    let net = &net;
                    async move {
                        (node, net.request_within(node, Request::FindNodes(question), ANSWER_WITHIN).await)
                    }
                });
            for (node, answer) in futures::future::join_all(asked).await {
                match answer {
                    Ok(Response::Nodes(told)) => {
                        nodes.push(node);
                        adverts.extend(told.iter().cloned());
                    }
                    other => tracing::debug!(peer = %node.short(), ?other, "a question was not answered"),
                }
            }
            Note::Sought(Box::new(Sought { wanted, responder, model, nodes, adverts }))
        });
    }

    pub(super) fn handle_sought(&mut self, sought: Sought) {
        let Sought { wanted, responder, model, nodes, adverts } = sought;
        self.contacts.under_way = self.contacts.under_way.saturating_sub(1);
        self.contacts.keep(model, nodes, Instant::now());
        adverts.iter().for_each(|advert| self.take_told(advert));
        let response = self.find_nodes(&wanted);
        self.respond("find_nodes", responder, response);
    }
}

#[cfg(test)]
mod tests;

//! How a model comes from other nodes.
//!
//! ```text
//! <models>/.fetch-<model id>/files/...   the published layout, as it fills; a broken fetch goes on from here
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kinoflock_net::{FetchOptions, FetchProgress, FileSink, NetHandle};
use kinoflock_protocol::card::{Card, Subject};
use kinoflock_protocol::id::{ModelId, NetworkId, NodeId};
use kinoflock_protocol::model::{ModelFile, ModelManifest};
use kinoflock_protocol::names::holding_key;
use kinoflock_protocol::rpc::{Request, Response};
use tokio::sync::watch;

use super::store;
use super::wants::Progress;
use crate::models::{CARD, Model, is_name, licence, manifest, pull};

/// Nodes that are asked whether they hold a model.
const MAX_ASKED: usize = 32;
/// How long each is waited for.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// How the name of a folder begins into which a model comes.
const FETCH: &str = ".fetch-";

/// What it takes to fetch a model.
pub(super) struct Fetch {
    pub(super) net: NetHandle,
    pub(super) network: NetworkId,
    /// The store.
    pub(super) folder: PathBuf,
    /// Its limit in bytes.
    pub(super) limit: Option<u64>,
    pub(super) id: ModelId,
    /// As the operator calls it.
    pub(super) name: String,
    /// Nodes that may hold it.
    pub(super) candidates: Vec<NodeId>,
    pub(super) progress: Arc<Progress>,
}

/// The nodes that have a model, and its manifest.
pub(super) async fn who_holds(
    net: &NetHandle,
    id: ModelId,
    mut candidates: Vec<NodeId>,
) -> (Vec<NodeId>, Option<ModelManifest>) {
    candidates.truncate(MAX_ASKED);
    let (known, provided) = tokio::join!(ask(net, id, &candidates), net.providers(holding_key(&id)));
    let asked: BTreeSet<_> = candidates.into_iter().chain([net.local_node()]).collect();
    let others: Vec<_> =
        provided.unwrap_or_default().into_iter().filter(|node| !asked.contains(node)).collect();
    let further = ask(net, id, &others).await;
    let mut found = None;
    let mut holders = Vec::new();
    for (node, manifest) in known.into_iter().chain(further) {
        holders.push(node);
        found = Some(manifest);
    }
    (holders, found)
}

async fn ask(net: &NetHandle, id: ModelId, nodes: &[NodeId]) -> Vec<(NodeId, ModelManifest)> {
    let answers = nodes.iter().map(|node| async move {
        match net.request_within(*node, Request::Manifest(id), ANSWER_WITHIN).await {
            Ok(Response::Manifest(bytes)) => {
                ModelManifest::decode(&bytes, &id).ok().map(|found| (*node, found))
            }
            _ => None,
        }
    });
    join_all(answers).await.into_iter().flatten().collect()
}

impl Fetch {
    pub(super) async fn run(self) -> Result<Model, String> {
        let (holders, found) = who_holds(&self.net, self.id, self.candidates.clone()).await;
        let found = found.ok_or("no node that is known holds it")?;
        let (holders, card) = self.licensed(&holders).await?;
        self.progress.begin(found.total_len());
        self.room(&found).await?;
        for file in &found.files {
            self.file(file, &holders).await?;
            self.progress.whole(file.len);
        }
        self.import(card).await
    }

    /// Holders by whose card everybody may have a copy, and the first such card.
    async fn licensed(&self, holders: &[NodeId]) -> Result<(Vec<NodeId>, Card), String> {
        let answers = holders.iter().map(|node| async move {
            (*node, self.net.request_within(*node, Request::Cards(self.id), ANSWER_WITHIN).await)
        });
        let (mut open, mut first, mut closed) = (Vec::new(), None, None);
        for (node, answer) in join_all(answers).await {
            let Ok(Response::Cards(cards)) = answer else { continue };
            let cards = cards.iter().filter_map(|card| card.open::<Card>(&self.network).ok());
            let about = cards.map(|card| card.value).filter(|card| card.subject == Subject::Model(self.id));
            for card in about.filter(|card| card.check().is_ok()) {
                if licence::is_open(&card.licence.name) {
                    open.push(node);
                    first.get_or_insert(card);
                } else {
                    closed.get_or_insert(card.licence.name);
                }
            }
        }
        match (first, closed) {
            (Some(card), _) => Ok((open, card)),
            (None, Some(licence)) => Err(format!(
                "its licence is {:?}: weights go from node to node under open licences only",
                licence.as_str()
            )),
            (None, None) => Err("nobody who holds it tells its licence".to_owned()),
        }
    }

    async fn room(&self, found: &ModelManifest) -> Result<(), String> {
        let (folder, limit, files) = (self.folder.clone(), self.limit, self.files());
        let sizes: Vec<_> = found.files.iter().map(|file| (file.path.to_string(), file.len)).collect();
        blocking(move || {
            let total = sizes.iter().map(|(_, len)| *len).fold(0, u64::saturating_add);
            let here = |path: &str| std::fs::metadata(files.join(path)).map_or(0, |found| found.len());
            let had = sizes.iter().map(|(path, len)| here(path).min(*len)).fold(0, u64::saturating_add);
            pull::room(&store(&folder, limit)?, total, total.saturating_sub(had))
                .map_err(|error| error.to_string())
        })
        .await
    }

    async fn file(&self, file: &ModelFile, holders: &[NodeId]) -> Result<(), String> {
        let path = self.files().join(file.path.as_str());
        let (there, wanted) = (path.clone(), (file.len, file.blake3));
        let is_here = blocking(move || {
            if let Some(folder) = there.parent() {
                std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
            }
            Ok(there.is_file() && manifest::hash_file(&there).is_ok_and(|found| found == wanted))
        });
        if is_here.await? {
            return Ok(());
        }
        let (tell, told) = watch::channel(FetchProgress::default());
        self.progress.file(told);
        let options = FetchOptions { max_len: file.len, progress: Some(tell), ..FetchOptions::default() };
        let fetched = self.net.fetch_blob(file.blake3, holders, FileSink::new(&path), options).await;
        let (_, report) = fetched.map_err(|error| format!("{}: {error}", file.path.as_str()))?;
        if report.len == file.len {
            Ok(())
        } else {
            Err(format!(
                "{} has {} bytes by its manifest, {} by its hash",
                file.path.as_str(),
                file.len,
                report.len
            ))
        }
    }

    async fn import(&self, card: Card) -> Result<Model, String> {
        let name = [self.name.as_str(), card.name.as_str()]
            .into_iter()
            .find(|name| is_name(name) && name.parse::<ModelId>().is_err())
            .map_or_else(|| self.id.short(), str::to_owned);
        let (folder, limit, files, id) = (self.folder.clone(), self.limit, self.files(), self.id);
        blocking(move || {
            let text = serde_json::to_vec_pretty(&card).expect("invariant: wire types always encode");
            std::fs::write(files.join(CARD), text).map_err(|error| error.to_string())?;
            let model =
                store(&folder, limit)?.import_as(&files, &name, &id).map_err(|error| error.to_string())?;
            // What is imported was linked or copied.
            let _gone = std::fs::remove_dir_all(work(&folder, &id));
            Ok(model)
        })
        .await
    }

    fn files(&self) -> PathBuf {
        work(&self.folder, &self.id).join("files")
    }
}

fn work(folder: &Path, id: &ModelId) -> PathBuf {
    folder.join(format!("{FETCH}{id}"))
}

/// Work on the disk, away from the daemon's loop.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}

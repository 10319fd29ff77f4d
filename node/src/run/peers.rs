//! Nodes that this one met: asked for the adverts they know as soon as they come, and remembered over restarts, so that
//! the network is found again though every configured address has changed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kinoflock_net::{Multiaddr, NetHandle, multiaddr::Protocol, peer};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::NodeId;
use kinoflock_protocol::limits::MAX_NODES;
use kinoflock_protocol::rpc::{FindNodes, Request, Response};
use serde::{Deserialize, Serialize};

use super::{Daemon, Note};

/// Name of the file in the state folder. It is a hint and may be removed at any time.
const FILE: &str = "peers.json";
/// Nodes that are remembered, those met last first.
const MAX_PEERS: usize = 64;
/// Addresses that are remembered of each.
const MAX_ADDRESSES: usize = 8;
/// How often a node is asked whom it knows.
const TRIES: u32 = 4;
/// A node that stays connected is asked no more often than this.
const MET_AGAIN: Duration = Duration::from_secs(10);
/// How long each question waits for its answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Greatest file that is read, bytes.
const MAX_BYTES: u64 = 256 * 1024;

/// A node in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Met {
    node: NodeId,
    addresses: Vec<Multiaddr>,
}

/// The addresses of nodes that were met in earlier runs, each with its `/p2p/` part.
pub(super) fn addresses(state: &Path) -> Vec<Multiaddr> {
    let named = |met: Met| {
        let own = Protocol::P2p(peer::peer_id(&met.node));
        met.addresses.into_iter().map(move |addr| match peer::node_of(&addr) {
            Some(_) => addr,
            None => addr.with(own.clone()),
        })
    };
    read(&state.join(FILE)).into_iter().flat_map(named).collect()
}

fn read(path: &Path) -> Vec<Met> {
    if std::fs::metadata(path).map_or(true, |data| data.len() > MAX_BYTES) {
        return Vec::new();
    }
    let kept = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    kept.unwrap_or_default()
}

/// Writes the file anew: those that are met now before those of earlier runs.
fn keep(path: &Path, met: Vec<Met>) -> std::io::Result<()> {
    let mut seen = BTreeSet::new();
    let all = met.into_iter().chain(read(path));
    let mut all: Vec<Met> = all.filter(|met| seen.insert(met.node) && !met.addresses.is_empty()).collect();
    all.truncate(MAX_PEERS);
    all.iter_mut().for_each(|met| met.addresses.truncate(MAX_ADDRESSES));
    let part = path.with_extension("part");
    std::fs::write(&part, serde_json::to_vec_pretty(&all).map_err(std::io::Error::other)?)?;
    std::fs::rename(&part, path)
}

impl Daemon {
    /// A node has come: it is remembered, and tells of the nodes that it knows.
    pub(super) fn handle_met(&mut self, node: NodeId) {
        // It identifies itself as often as it likes.
        let now = Instant::now();
        if self.met.get(&node).is_some_and(|at| now.saturating_duration_since(*at) < MET_AGAIN) {
            return;
        }
        self.met.insert(node, now);
        self.ask_for_lists(node);
        let net = self.net.clone();
        self.spawn(async move { Note::Told { adverts: whom_it_knows(&net, node).await } });
        self.adverts.outdate();
    }

    /// Adverts that another node knew; then there may be somebody new to remember.
    pub(super) fn handle_told(&mut self, adverts: &[Envelope]) {
        adverts.iter().for_each(|advert| self.take_told(advert));
        let (net, path, turn) =
            (self.net.clone(), self.config.storage.state.join(FILE), self.peers_file.clone());
        tokio::spawn(async move {
            if let Err(error) = remember(&net, path, turn).await {
                tracing::warn!(%error, "the nodes that were met could not be kept");
            }
        });
    }
}

/// The adverts that a node knows. It is asked again when it does not answer: the question may have gone to a connection
/// of its earlier life.
async fn whom_it_knows(net: &NetHandle, node: NodeId) -> Vec<Envelope> {
    let question = FindNodes { model: None, shape: None, limit: MAX_NODES as u32, forward: false };
    for _ in 0..TRIES {
        match net.request_within(node, Request::FindNodes(question), ANSWER_WITHIN).await {
            Ok(Response::Nodes(adverts)) => return adverts.iter().cloned().collect(),
            Ok(_) => return Vec::new(),
            Err(error) => {
                tracing::debug!(peer = %node.short(), %error, "a node did not tell whom it knows");
            }
        }
    }
    Vec::new()
}

async fn remember(net: &NetHandle, path: PathBuf, turn: super::Turn) -> std::io::Result<()> {
    let _one_writer = turn.lock().await;
    let known = net.known_nodes().await.map_err(std::io::Error::other)?;
    let met = known.into_iter().filter(|known| known.met);
    let met = met.map(|known| Met { node: known.node, addresses: known.addrs }).collect();
    tokio::task::spawn_blocking(move || keep(&path, met)).await.map_err(std::io::Error::other)?
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn met(number: u8) -> Met {
        let node = kinoflock_protocol::Keypair::from_seed(&[number; 32]).node_id();
        let addr = |port: u16| format!("/ip4/198.18.0.{number}/tcp/{port}").parse().unwrap();
        Met { node, addresses: (1..20).map(addr).collect() }
    }

    #[test]
    fn who_is_met_now_is_kept_before_the_others_and_the_file_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        assert!(addresses(folder.path()).is_empty());
        keep(&path, (1..=60).map(met).collect()).unwrap();
        keep(&path, vec![met(60), met(70), Met { addresses: Vec::new(), ..met(71) }]).unwrap();
        let kept = read(&path);
        assert_eq!((kept[0].node, kept[1].node, kept[2].node), (met(60).node, met(70).node, met(1).node));
        assert_eq!((kept.len(), kept[0].addresses.len()), (61, MAX_ADDRESSES));
        keep(&path, (100..=200).map(met).collect()).unwrap();
        assert_eq!(read(&path).len(), MAX_PEERS);
        let first = addresses(folder.path())[0].clone();
        assert_eq!(peer::node_of(&first), Some(met(100).node));
        std::fs::write(&path, b"{").unwrap();
        assert!(addresses(folder.path()).is_empty(), "a damaged file is no reason not to start");
    }
}

//! What is remembered about peers: addresses, identify record, round trip. Bounded, least recent first out.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use kinoflock_protocol::NodeId;
use libp2p::{Multiaddr, PeerId};

use crate::limits;
use crate::peer::{PeerInfo, node_id};
use crate::rejoin::KnownNode;

/// The peers that are remembered; at most [`limits::PEERS`] besides the connected ones.
#[derive(Debug, Default)]
pub(super) struct Book {
    peers: HashMap<PeerId, Known>,
    /// Counts touches; orders peers by recency.
    clock: u64,
}

#[derive(Debug, Default)]
struct Known {
    /// Newest first.
    addrs: VecDeque<Multiaddr>,
    /// The remote address of the newest connection.
    remote: Option<Multiaddr>,
    info: Option<PeerInfo>,
    connected: bool,
    /// Whether it is a node that was connected.
    met: bool,
    /// Which of its lives the peer said it is in, while it is connected.
    life: Option<String>,
    /// Whether it is to be met anew when its connections have ended.
    anew: bool,
    touched: u64,
}

impl Book {
    /// Remembers addresses at which a peer may be reached.
    pub(super) fn learn(&mut self, peer: PeerId, addrs: impl IntoIterator<Item = Multiaddr>) {
        let known = self.touch(peer);
        for addr in addrs {
            known.addrs.retain(|other| *other != addr);
            known.addrs.push_front(addr);
        }
        known.addrs.truncate(limits::ADDRESSES_PER_PEER);
    }

    pub(super) fn addresses(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.peers.get(peer).map(|known| known.addrs.iter().cloned().collect()).unwrap_or_default()
    }

    pub(super) fn connected(&mut self, peer: PeerId, remote: Multiaddr, dialed: bool) {
        if dialed {
            self.learn(peer, [remote.clone()]);
        }
        let known = self.touch(peer);
        known.connected = true;
        known.remote = Some(remote);
    }

    /// The last connection with a peer has ended. Says whether that was to meet it anew.
    pub(super) fn disconnected(&mut self, peer: &PeerId) -> bool {
        let Some(known) = self.peers.get_mut(peer) else { return false };
        known.connected = false;
        // It may come back as another version.
        (known.info, known.life) = (None, None);
        std::mem::take(&mut known.anew)
    }

    /// A peer told which of its lives it is in. Says whether it is known from another one that has not been seen to end.
    pub(super) fn lives(&mut self, peer: PeerId, life: Option<&str>) -> bool {
        let known = self.touch(peer);
        let before = std::mem::replace(&mut known.life, life.map(str::to_owned));
        known.anew = before.is_some() && before != known.life;
        known.anew
    }

    pub(super) fn remote(&self, peer: &PeerId) -> Option<&Multiaddr> {
        self.peers.get(peer).and_then(|known| known.remote.as_ref())
    }

    pub(super) fn identified(&mut self, peer: PeerId, mut info: PeerInfo) {
        let known = self.touch(peer);
        info.round_trip = known.info.as_ref().and_then(|old| old.round_trip);
        known.met |= info.is_node;
        known.info = Some(info);
    }

    pub(super) fn info(&self, peer: &PeerId) -> Option<&PeerInfo> {
        self.peers.get(peer).and_then(|known| known.info.as_ref())
    }

    pub(super) fn pinged(&mut self, peer: &PeerId, round_trip: Duration) {
        if let Some(info) = self.peers.get_mut(peer).and_then(|known| known.info.as_mut()) {
            info.round_trip = Some(round_trip);
        }
    }

    pub(super) fn connected_peers(&self) -> Vec<PeerInfo> {
        self.peers.values().filter(|known| known.connected).filter_map(|known| known.info.clone()).collect()
    }

    /// Nodes, connected ones and those met most recently first; then those that were only heard of. Of those connected
    /// whoever is no node is left out.
    pub(super) fn known_nodes(&self) -> Vec<KnownNode> {
        let heard = |known: &Known| !known.connected && known.info.is_none() && !known.addrs.is_empty();
        let nodes = self.peers.iter().filter(|(_, known)| known.met || heard(known));
        let mut nodes: Vec<_> = nodes.filter_map(|(peer, known)| Some((node_id(peer)?, known))).collect();
        nodes.sort_by_key(|(_, known)| std::cmp::Reverse((known.connected, known.met, known.touched)));
        nodes.truncate(limits::KNOWN_NODES);
        let told = |(node, known): (NodeId, &Known)| KnownNode {
            node,
            addrs: known.addrs.iter().cloned().collect(),
            connected: known.connected,
            met: known.met,
        };
        nodes.into_iter().map(told).collect()
    }

    fn touch(&mut self, peer: PeerId) -> &mut Known {
        self.clock += 1;
        if self.peers.len() >= limits::PEERS && !self.peers.contains_key(&peer) {
            self.forget_oldest();
        }
        let known = self.peers.entry(peer).or_default();
        known.touched = self.clock;
        known
    }

    fn forget_oldest(&mut self) {
        let oldest =
            self.peers.iter().filter(|(_, known)| !known.connected).min_by_key(|(_, known)| known.touched);
        if let Some(peer) = oldest.map(|(peer, _)| *peer) {
            self.peers.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_book_is_bounded_and_keeps_connected_peers() {
        let mut book = Book::default();
        let addr: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().expect("address");
        let kept = PeerId::random();
        book.connected(kept, addr.clone(), true);
        for _ in 0..2 * limits::PEERS {
            book.learn(PeerId::random(), [addr.clone()]);
        }
        assert!(book.peers.len() <= limits::PEERS);
        assert_eq!(book.addresses(&kept), vec![addr]);
        let many = (1..100).map(|port| format!("/ip4/127.0.0.1/tcp/{port}").parse().expect("address"));
        book.learn(kept, many.collect::<Vec<Multiaddr>>());
        assert_eq!(book.addresses(&kept).len(), limits::ADDRESSES_PER_PEER);
    }
}

//! Peers as the network sees them: the two names of one key, and what identify told.

use kinoflock_protocol::NodeId;
use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

/// The libp2p name of a node.
#[must_use]
pub fn peer_id(node: &NodeId) -> PeerId {
    PeerId::from_bytes(&node.to_peer_id_bytes()).expect("invariant: an inlined ed25519 key is a peer id")
}

/// The node behind a libp2p name; `None` if its key is not ed25519.
#[must_use]
pub fn node_id(peer: &PeerId) -> Option<NodeId> {
    NodeId::from_peer_id_bytes(&peer.to_bytes())
}

/// The node that an address names in its `/p2p/...` part.
#[must_use]
pub fn node_of(addr: &Multiaddr) -> Option<NodeId> {
    addr.iter().find_map(|part| match part {
        Protocol::P2p(peer) => node_id(&peer),
        _ => None,
    })
}

/// What identify told about a peer. All of it is the peer's own word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// The peer.
    pub node: NodeId,
    /// What it calls itself, `name/version`.
    pub agent: String,
    /// The protocol family and network that it names.
    pub protocol_version: String,
    /// Versions of our control protocol that it speaks on this network.
    pub versions: Vec<u8>,
    /// Whether it speaks our protocols, but for another network only.
    pub other_network: bool,
    /// The addresses on which it listens.
    pub listen_addrs: Vec<Multiaddr>,
    /// The address under which it sees us.
    pub observed_addr: Multiaddr,
    /// The last round trip by ping.
    pub round_trip: Option<std::time::Duration>,
}

//! Peers as the network sees them: the two names of one key, and what identify told.

use kinoflock_protocol::NodeId;
use libp2p::core::upgrade::NegotiationError;
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

/// The node that an address leads to, by its last `/p2p/...` part; a relay on the way there is not meant.
#[must_use]
pub fn node_of(addr: &Multiaddr) -> Option<NodeId> {
    addr.iter().fold(None, |named, part| match part {
        Protocol::P2p(peer) => node_id(&peer),
        Protocol::P2pCircuit => None,
        _ => named,
    })
}

/// Whether an address leads over a relay.
#[must_use]
pub fn is_relayed(addr: &Multiaddr) -> bool {
    addr.iter().any(|part| part == Protocol::P2pCircuit)
}

/// Whether a stream broke because the peer does not speak the protocol that was proposed, and spoken at once.
pub(crate) fn is_unspoken(error: &std::io::Error) -> bool {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<NegotiationError>());
    matches!(cause, Some(NegotiationError::Failed))
}

/// What identify tells of a swarm: what it calls itself, and which of its lives this is, drawn at each start.
pub(crate) fn agent_of_a_new_life(agent: &str) -> String {
    let drawn = PeerId::random().to_base58();
    format!("{agent}{LIFE}{}", &drawn[drawn.len() - LIFE_CHARS..])
}

/// What a peer calls itself, and which of its lives it says this is.
pub(crate) fn agent_and_life(told: &str) -> (&str, Option<&str>) {
    match told.split_once(LIFE) {
        Some((agent, life)) => (agent, life.get(..LIFE_CHARS)),
        None => (told, None),
    }
}

const LIFE: &str = " life/";
const LIFE_CHARS: usize = 12;

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
    /// Whether it is a node: it answers in the DHT, which clients do not.
    pub is_node: bool,
    /// The addresses on which it listens.
    pub listen_addrs: Vec<Multiaddr>,
    /// The address under which it sees us.
    pub observed_addr: Multiaddr,
    /// The last round trip by ping.
    pub round_trip: Option<std::time::Duration>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_start_is_a_life_of_its_own_and_agents_without_one_are_read_too() {
        let (first, second) = (agent_of_a_new_life("name/1"), agent_of_a_new_life("name/1"));
        assert_ne!(first, second);
        let (agent, life) = agent_and_life(&first);
        assert_eq!((agent, life.map(str::len)), ("name/1", Some(LIFE_CHARS)));
        assert_eq!(agent_and_life("other/2"), ("other/2", None));
        assert_eq!(agent_and_life("other/2 life/short"), ("other/2", None));
    }

    #[test]
    fn an_address_over_a_relay_names_the_node_behind_it() {
        let (relay, node) = (NodeId::from_bytes([1; 32]), NodeId::from_bytes([2; 32]));
        let (relay, behind) = (peer_id(&relay), peer_id(&node));
        for (addr, named) in [
            (format!("/ip4/198.18.0.1/tcp/1/p2p/{behind}"), Some(node)),
            (format!("/ip4/198.18.0.1/tcp/1/p2p/{relay}/p2p-circuit/p2p/{behind}"), Some(node)),
            (format!("/ip4/198.18.0.1/tcp/1/p2p/{relay}/p2p-circuit"), None),
            ("/ip4/198.18.0.1/tcp/1".to_owned(), None),
        ] {
            let addr: Multiaddr = addr.parse().unwrap();
            assert_eq!(node_of(&addr), named, "{addr}");
        }
    }
}

//! What the network tells its owner.

use kinoflock_protocol::{Envelope, NodeId, rpc};
use libp2p::Multiaddr;
use tokio::sync::mpsc;

use crate::discovery::Advert;
use crate::peer::PeerInfo;
use crate::progress::ProgressSink;
use crate::reach::Reachability;
use crate::rpc::Responder;

/// The events of one swarm. While it is full, news is dropped and whoever asks us something hears `Busy`;
/// when it is dropped, the same holds for good, so a client that serves nothing may drop it.
pub type NetEvents = mpsc::Receiver<NetEvent>;

/// Something that the network tells its owner.
#[derive(Debug)]
#[non_exhaustive]
pub enum NetEvent {
    /// We listen on a further address.
    Listening {
        /// The address, without `/p2p`.
        addr: Multiaddr,
    },
    /// We no longer listen on an address.
    NotListening {
        /// The address.
        addr: Multiaddr,
    },
    /// Something new is known about how others reach us; see also [`crate::NetHandle::open_addrs`].
    Reachability(Reachability),
    /// The first connection with a peer was made.
    Connected {
        /// The peer.
        node: NodeId,
        /// Its address as the connection shows it.
        addr: Multiaddr,
    },
    /// The last connection with a peer ended.
    Disconnected {
        /// The peer.
        node: NodeId,
    },
    /// A peer told what it is.
    Identified(Box<PeerInfo>),
    /// A peer speaks our protocol, but in no version that we speak.
    OtherVersion {
        /// The peer.
        node: NodeId,
        /// The versions that it speaks.
        speaks: Vec<u8>,
        /// The version that we speak.
        ours: u8,
    },
    /// A peer asks something. Answer through the responder; dropping it answers `Busy`.
    Request {
        /// Who asks.
        node: NodeId,
        /// The address it asks from, where known; its IP counts for fairness by prefix.
        addr: Option<Multiaddr>,
        /// What it asks.
        request: Box<rpc::Request>,
        /// Where the answer goes.
        responder: Responder,
    },
    /// A peer wants to follow a job. Accept or refuse through the sink; dropping it answers `Busy`.
    Progress {
        /// Who asks.
        node: NodeId,
        /// The signed question: which job. Not verified yet.
        query: Box<Envelope>,
        /// The first event wanted.
        from_seq: u64,
        /// Where the events go.
        sink: ProgressSink,
    },
    /// A gossiped advert waits for its verdict.
    Advert(Advert),
    /// mDNS found a node on the local network.
    Found {
        /// The node.
        node: NodeId,
        /// Where it listens.
        addr: Multiaddr,
    },
}

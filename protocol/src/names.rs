//! Names on the network: protocols, topics, and tickets, the lines of text by which people find each other.

use serde::{Deserialize, Serialize};

use crate::codec::{List, Text};
use crate::id::{BlobId, ModelId, NetworkId, NodeId};
use crate::limits::*;

pub use ticket::{CLIP_TICKET, ClipTicket, NODE_TICKET, NodeTicket, TicketError};

mod packed;
mod ticket;

/// Name of the public network.
pub const PUBLIC_NETWORK: &str = "kinoflock";

/// The names of a network's protocols.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protocols {
    /// Questions and answers.
    pub control: String,
    /// Streams of a job's events.
    pub progress: String,
    /// Streams of content.
    pub blobs: String,
    /// Kademlia.
    pub kad: String,
    /// Identify's protocol version.
    pub identify: String,
    /// Gossip topic of capacity adverts.
    pub capacity_topic: String,
}

impl Protocols {
    /// The names of this network in protocol version 1.
    pub fn of(network: &NetworkId) -> Self {
        let net = hex::encode(network.hint());
        let name = |what: &str| format!("/kinoflock/{net}/{what}/{PROTOCOL_VERSION}");
        Self {
            control: name("control"),
            progress: name("progress"),
            blobs: name("blobs"),
            kad: name("kad"),
            identify: name("id"),
            capacity_topic: name("capacity"),
        }
    }
}

/// Under what in the DHT some of the nodes are found that serve a model, where a network is so large that adverts do not
/// reach everybody.
#[must_use]
pub fn capacity_key(model: &ModelId) -> BlobId {
    BlobId::from_bytes(blake3::derive_key("kinoflock 1 nodes that serve a model", model.as_bytes()))
}

/// Under what in the DHT nodes are found that hold a model's files and give them to others.
#[must_use]
pub fn holding_key(model: &ModelId) -> BlobId {
    BlobId::from_bytes(blake3::derive_key("kinoflock 1 nodes that hold a model's files", model.as_bytes()))
}

/// A node and where it may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddress {
    /// Which node.
    pub id: NodeId,
    /// Multiaddresses, without the `/p2p/` part.
    pub addresses: List<Text<MAX_ADDRESS>, MAX_ADDRESSES>,
}

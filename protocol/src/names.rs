//! Names on the network: protocols, topics, and tickets, the lines of text by which people find each other.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError, List, Text, text_u64};
use crate::id::{BlobId, ClipId, CollectiveId, ModelId, NetworkId, NodeId, hash_parts};
use crate::limits::*;

/// Name of the public network.
pub const PUBLIC_NETWORK: &str = "kinoflock";
/// How the text of a node ticket begins.
pub const NODE_TICKET: &str = "kfnode1";
/// How the text of a clip ticket begins.
pub const CLIP_TICKET: &str = "kfclip1";
/// Bytes of a ticket's checksum.
const CHECK_BYTES: usize = 4;
/// Greatest ticket in bytes before it becomes text.
const MAX_TICKET: usize = 48 * 1024;

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

/// A node and where it may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddress {
    /// Which node.
    pub id: NodeId,
    /// Multiaddresses, without the `/p2p/` part.
    pub addresses: List<Text<MAX_ADDRESS>, MAX_ADDRESSES>,
}

/// A way into a network: `kfnode1...`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeTicket {
    /// Which network.
    pub network: NetworkId,
    /// Nodes to begin with.
    pub nodes: List<NodeAddress, MAX_NODES>,
    /// Collective that the ticket invites to.
    pub collective: Option<CollectiveId>,
}

/// A way to a clip: `kfclip1...`. Who has it may fetch the clip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipTicket {
    /// Which network.
    pub network: NetworkId,
    /// Which clip.
    pub clip: ClipId,
    /// Its length in bytes.
    #[serde(with = "text_u64")]
    pub len: u64,
    /// Nodes that hold it.
    pub holders: List<NodeAddress, MAX_NODES>,
}

/// Why a text is not a ticket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TicketError {
    /// Another text.
    #[error("not a {what}: it begins with \"{prefix}\"")]
    Prefix {
        /// `node ticket` or `clip ticket`.
        what: &'static str,
        /// How its text begins.
        prefix: &'static str,
    },
    /// Characters or a length that no ticket has.
    #[error("{what} is damaged: it holds characters that no ticket has, or too few")]
    Alphabet {
        /// `node ticket` or `clip ticket`.
        what: &'static str,
    },
    /// The checksum says that some characters are missing or wrong.
    #[error("{what} is damaged: copy all of it ({given} characters came)")]
    Checksum {
        /// `node ticket` or `clip ticket`.
        what: &'static str,
        /// Characters given.
        given: usize,
    },
    /// Too long.
    #[error("{what} of {given} characters exceeds the limit of {limit}")]
    TooLong {
        /// `node ticket` or `clip ticket`.
        what: &'static str,
        /// Most characters.
        limit: usize,
        /// Characters given.
        given: usize,
    },
    /// Of another version.
    #[error("cannot read the {what}: {error}; was it made by another version?")]
    Codec {
        /// `node ticket` or `clip ticket`.
        what: &'static str,
        /// Why.
        error: CodecError,
    },
}

impl TicketError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Prefix { .. } => "ticket_prefix",
            Self::Alphabet { .. } => "ticket_alphabet",
            Self::Checksum { .. } => "ticket_checksum",
            Self::TooLong { .. } => "ticket_too_long",
            Self::Codec { error, .. } => error.code(),
        }
    }
}

macro_rules! ticket_text {
    ($name:ident, $prefix:expr, $what:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&to_text($prefix, codec::encode(self)))
            }
        }

        impl FromStr for $name {
            type Err = TicketError;
            fn from_str(text: &str) -> Result<Self, TicketError> {
                let bytes = from_text($what, $prefix, text)?;
                codec::decode(&bytes, MAX_TICKET).map_err(|error| TicketError::Codec { what: $what, error })
            }
        }
    };
}
ticket_text!(NodeTicket, NODE_TICKET, "node ticket");
ticket_text!(ClipTicket, CLIP_TICKET, "clip ticket");

fn to_text(prefix: &str, mut bytes: Vec<u8>) -> String {
    let check = hash_parts(prefix, &[&bytes]);
    bytes.extend_from_slice(&check[..CHECK_BYTES]);
    let mut text = prefix.to_owned();
    data_encoding::BASE32_NOPAD.encode_append(&bytes, &mut text);
    text.make_ascii_lowercase();
    text
}

fn from_text(what: &'static str, prefix: &'static str, text: &str) -> Result<Vec<u8>, TicketError> {
    let text = text.trim();
    let digits = text.strip_prefix(prefix).ok_or(TicketError::Prefix { what, prefix })?;
    let limit = MAX_TICKET * 8 / 5;
    if digits.len() > limit {
        return Err(TicketError::TooLong { what, limit, given: digits.len() });
    }
    let damaged = TicketError::Checksum { what, given: text.len() };
    let mut bytes =
        data_encoding::BASE32_NOPAD.decode(digits.to_ascii_uppercase().as_bytes()).map_err(|e| {
            match e.kind {
                data_encoding::DecodeKind::Symbol => TicketError::Alphabet { what },
                _ => damaged.clone(),
            }
        })?;
    let body = bytes.len().checked_sub(CHECK_BYTES).ok_or(TicketError::Alphabet { what })?;
    let check = bytes.split_off(body);
    if check != hash_parts(prefix, &[&bytes])[..CHECK_BYTES] {
        return Err(damaged);
    }
    Ok(bytes)
}

//! Tickets: one line of text that leads to nodes or to a clip.
//!
//! Text is made of a prefix and lowercase base32 of the packed body and a checksum. The body is as short as it can be,
//! because people paste it: the public network is told by leaving it out, addresses are packed (see `packed`), and every
//! ticket has one form only.

use std::fmt;
use std::str::FromStr;

use super::NodeAddress;
use super::PUBLIC_NETWORK;
use super::packed::{Reader, Writer};
use crate::codec::List;
use crate::id::{ClipId, CollectiveId, NetworkId, hash_parts};
use crate::limits::MAX_NODES;

/// How the text of a node ticket begins.
pub const NODE_TICKET: &str = "kfnode1";
/// How the text of a clip ticket begins.
pub const CLIP_TICKET: &str = "kfclip1";
/// Bytes of a ticket's checksum.
const CHECK_BYTES: usize = 4;
/// Greatest ticket in bytes before it becomes text.
const MAX_TICKET: usize = 48 * 1024;
/// Bit of the first byte: the network's id follows, because it is not the public one.
const OTHER_NETWORK: u8 = 1;
/// Bit of the first byte: a collective's id follows.
const COLLECTIVE: u8 = 2;

/// A way into a network: `kfnode1...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeTicket {
    /// Which network.
    pub network: NetworkId,
    /// Nodes to begin with.
    pub nodes: List<NodeAddress, MAX_NODES>,
    /// Collective that the ticket invites to.
    pub collective: Option<CollectiveId>,
}

/// A way to a clip: `kfclip1...`. Who has it may fetch the clip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClipTicket {
    /// Which network.
    pub network: NetworkId,
    /// Which clip.
    pub clip: ClipId,
    /// Its length in bytes.
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
    #[error("cannot read the {what}: was it made by another version?")]
    Unreadable {
        /// `node ticket` or `clip ticket`.
        what: &'static str,
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
            Self::Unreadable { .. } => "ticket_unreadable",
        }
    }
}

impl NodeTicket {
    /// The packed form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(&self.network, self.collective.is_some());
        if let Some(collective) = &self.collective {
            out.bytes(collective.as_bytes());
        }
        out.nodes(&self.nodes);
        out.finish()
    }

    /// Reads the packed form.
    ///
    /// # Errors
    /// `Unreadable` for everything that [`NodeTicket::encode`] would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, TicketError> {
        let mut body = Reader::of(bytes);
        let read = |body: &mut Reader<'_>| {
            let (flags, network) = read_head(body)?;
            let collective = (flags & COLLECTIVE != 0).then(|| body.array().map(CollectiveId::from_bytes));
            let collective = collective.map_or(Some(None), |read| read.map(Some))?;
            Some(Self { network, nodes: body.nodes()?, collective })
        };
        let ticket = read(&mut body).filter(|ticket| ticket.encode() == bytes);
        ticket.ok_or(TicketError::Unreadable { what: "node ticket" })
    }
}

impl ClipTicket {
    /// The packed form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(&self.network, false);
        out.bytes(self.clip.as_bytes());
        out.number(self.len);
        out.nodes(&self.holders);
        out.finish()
    }

    /// Reads the packed form.
    ///
    /// # Errors
    /// `Unreadable` for everything that [`ClipTicket::encode`] would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, TicketError> {
        let mut body = Reader::of(bytes);
        let read = |body: &mut Reader<'_>| {
            let (_, network) = read_head(body)?;
            let clip = ClipId::from_bytes(body.array()?);
            Some(Self { network, clip, len: body.number()?, holders: body.nodes()? })
        };
        let ticket = read(&mut body).filter(|ticket| ticket.encode() == bytes);
        ticket.ok_or(TicketError::Unreadable { what: "clip ticket" })
    }
}

fn head(network: &NetworkId, collective: bool) -> Writer {
    let other = *network != NetworkId::named(PUBLIC_NETWORK);
    let mut out = Writer::default();
    out.byte(if other { OTHER_NETWORK } else { 0 } | if collective { COLLECTIVE } else { 0 });
    if other {
        out.bytes(network.as_bytes());
    }
    out
}

/// The flags and the network.
fn read_head(body: &mut Reader<'_>) -> Option<(u8, NetworkId)> {
    let flags = body.byte()?;
    let network = match flags & OTHER_NETWORK {
        0 => NetworkId::named(PUBLIC_NETWORK),
        _ => NetworkId::from_bytes(body.array()?),
    };
    Some((flags, network))
}

macro_rules! ticket_text {
    ($name:ident, $prefix:expr, $what:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&to_text($prefix, self.encode()))
            }
        }

        impl FromStr for $name {
            type Err = TicketError;
            fn from_str(text: &str) -> Result<Self, TicketError> {
                Self::decode(&from_text($what, $prefix, text)?)
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

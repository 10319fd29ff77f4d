//! Signed lists that anybody can publish and a user can subscribe to: nodes to begin with, and known models.
//!
//! A list is named by its publisher's key and its kind. Nodes that subscribe to one hand the newest on to whoever asks, so
//! that no server has to be asked. The project's own lists are only the first of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::codec::{List, Text, text_u64};
use crate::envelope::{Envelope, EnvelopeError, Kind, Message};
use crate::id::{IdError, ModelId, NetworkId, PublicKey, from_text, to_text};
use crate::job::check_issued;
use crate::limits::*;
use crate::names::NodeAddress;
use crate::units::{Millis, UnixMillis};

/// Nodes to begin with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeList {
    /// Name that the publisher gives it.
    pub name: Text<MAX_NAME>,
    /// Rises with every edition.
    #[serde(with = "text_u64")]
    pub sequence: u64,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// When it is no longer to be believed.
    pub expires_at: UnixMillis,
    /// The nodes.
    pub nodes: List<NodeAddress, MAX_LISTED_NODES>,
    /// Addresses whose nodes may change, such as `/dnsaddr/...`.
    pub addresses: List<Text<MAX_ADDRESS>, MAX_ADDRESSES>,
}

/// Models that somebody vouches for by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelList {
    /// Name that the publisher gives it.
    pub name: Text<MAX_NAME>,
    /// Rises with every edition.
    #[serde(with = "text_u64")]
    pub sequence: u64,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// When it is no longer to be believed.
    pub expires_at: UnixMillis,
    /// The models.
    pub models: List<ListedModel, MAX_LISTED_MODELS>,
}

/// A model on a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedModel {
    /// Which model.
    pub model: ModelId,
    /// Name by which people know it.
    pub name: Text<MAX_NAME>,
    /// Architecture, such as `ltx-video`.
    pub architecture: Text<MAX_NAME>,
    /// Licence of its weights.
    pub licence: Text<MAX_NAME>,
    /// Where its files come from.
    pub source: Text<MAX_ADDRESS>,
}

impl Message for NodeList {
    const KIND: Kind = Kind::NodeList;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = MAX_ENVELOPE_BODY;
}

impl Message for ModelList {
    const KIND: Kind = Kind::ModelList;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = MAX_ENVELOPE_BODY;
}

/// Which list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ListName {
    /// Who publishes it.
    pub publisher: PublicKey,
    /// Which sort.
    pub kind: ListKind,
}

/// Sort of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ListKind {
    /// A [`NodeList`].
    Nodes,
    /// A [`ModelList`].
    Models,
}

impl ListName {
    /// How the text form begins.
    pub const PREFIX: &'static str = "kflist1";
    /// Bytes of the text form's checksum.
    const CHECK: usize = 7;

    /// The list that a signed edition claims to be of; `None` if it is none.
    #[must_use]
    pub fn of(envelope: &Envelope) -> Option<Self> {
        let kinds = [(Kind::NodeList, ListKind::Nodes), (Kind::ModelList, ListKind::Models)];
        let (_, kind) = kinds.into_iter().find(|(kind, _)| *kind as u16 == envelope.kind)?;
        Some(Self { publisher: envelope.signer, kind })
    }
}

impl fmt::Display for ListName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [0; 33];
        bytes[0] = self.kind as u8;
        bytes[1..].copy_from_slice(self.publisher.as_bytes());
        f.write_str(&to_text::<{ Self::CHECK }>(Self::PREFIX, &bytes))
    }
}

impl FromStr for ListName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        const WHAT: &str = "list's name";
        let [kind, key @ ..] = from_text::<33, { Self::CHECK }>(WHAT, Self::PREFIX, text.trim())?;
        let kinds = [ListKind::Nodes, ListKind::Models];
        let kind = kinds.into_iter().find(|known| *known as u8 == kind);
        let kind = kind.ok_or(IdError::Alphabet { what: WHAT })?;
        Ok(Self { publisher: PublicKey::from_bytes(key), kind })
    }
}

/// A list of either sort, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edition {
    /// Nodes to begin with.
    Nodes(NodeList),
    /// Known models.
    Models(ModelList),
}

impl Edition {
    /// Reads an edition of this list: signed by its publisher, in time.
    ///
    /// # Errors
    /// See [`ListError`].
    pub fn read(
        envelope: &Envelope,
        network: &NetworkId,
        name: &ListName,
        now: UnixMillis,
    ) -> Result<Self, ListError> {
        match name.kind {
            ListKind::Nodes => read_nodes(envelope, network, &name.publisher, now).map(Self::Nodes),
            ListKind::Models => read_models(envelope, network, &name.publisher, now).map(Self::Models),
        }
    }

    /// Rises with every edition.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        match self {
            Self::Nodes(list) => list.sequence,
            Self::Models(list) => list.sequence,
        }
    }

    /// When it is no longer to be believed.
    #[must_use]
    pub fn expires_at(&self) -> UnixMillis {
        match self {
            Self::Nodes(list) => list.expires_at,
            Self::Models(list) => list.expires_at,
        }
    }

    /// Name that the publisher gives it.
    #[must_use]
    pub fn title(&self) -> &str {
        match self {
            Self::Nodes(list) => list.name.as_str(),
            Self::Models(list) => list.name.as_str(),
        }
    }
}

/// Why a list is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ListError {
    /// The signed envelope is refused.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// Signed by another than the publisher.
    #[error("list of {publisher} is signed by {signer}")]
    WrongSigner {
        /// Who was asked for.
        publisher: PublicKey,
        /// Who signed.
        signer: PublicKey,
    },
    /// Signed in the future.
    #[error(
        "list issued {skew} in the future, more than the limit of {limit}: one of the two clocks is wrong"
    )]
    ClockSkew {
        /// How far in the future.
        skew: Millis,
        /// How far it may be.
        limit: Millis,
    },
    /// No longer to be believed.
    #[error("list expired at {expired_at}, it is now {now}")]
    Expired {
        /// When it expired.
        expired_at: UnixMillis,
        /// The time here.
        now: UnixMillis,
    },
}

impl ListError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Envelope(error) => error.code(),
            Self::WrongSigner { .. } => "wrong_signer",
            Self::ClockSkew { .. } => "clock_skew",
            Self::Expired { .. } => "expired",
        }
    }
}

/// A list of nodes, checked: signed by the publisher, in time.
///
/// # Errors
/// See [`ListError`].
pub fn read_nodes(
    envelope: &Envelope,
    network: &NetworkId,
    publisher: &PublicKey,
    now: UnixMillis,
) -> Result<NodeList, ListError> {
    let opened = envelope.open::<NodeList>(network)?;
    check(publisher, opened.signer, opened.value.issued_at, opened.value.expires_at, now)?;
    Ok(opened.value)
}

/// A list of models, checked: signed by the publisher, in time.
///
/// # Errors
/// See [`ListError`].
pub fn read_models(
    envelope: &Envelope,
    network: &NetworkId,
    publisher: &PublicKey,
    now: UnixMillis,
) -> Result<ModelList, ListError> {
    let opened = envelope.open::<ModelList>(network)?;
    check(publisher, opened.signer, opened.value.issued_at, opened.value.expires_at, now)?;
    Ok(opened.value)
}

fn check(
    publisher: &PublicKey,
    signer: PublicKey,
    issued_at: UnixMillis,
    expired_at: UnixMillis,
    now: UnixMillis,
) -> Result<(), ListError> {
    if signer != *publisher {
        return Err(ListError::WrongSigner { publisher: *publisher, signer });
    }
    let limit = Millis(MAX_CLOCK_SKEW_MS);
    check_issued(issued_at, now).map_err(|skew| ListError::ClockSkew { skew, limit })?;
    if expired_at <= now { Err(ListError::Expired { expired_at, now }) } else { Ok(()) }
}

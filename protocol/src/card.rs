//! What people say about a model, an adapter or a dataset: authors, licence, training data, consent, credit.
//!
//! A card names an id, never the reverse, and may be revised. Who signed it is shown: a card is as good as its
//! signer. The fingerprint is what a node's self-test compares with.

use serde::{Deserialize, Serialize};

use crate::codec::{List, Text, text_u64};
use crate::envelope::{Envelope, Kind, Message};
use crate::id::{BlobId, CardId, ModelId, NetworkId, RequesterId};
use crate::job::Prompt;
use crate::limits::*;
use crate::units::{Micro, UnixMillis};

/// A signed, versioned statement about a model, adapter or dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// What it is about.
    pub subject: Subject,
    /// Name by which people know it.
    pub name: Text<MAX_NAME>,
    /// What it is and what it is for.
    pub summary: Text<MAX_PARAGRAPH>,
    /// Version of this card, from 1.
    pub version: u32,
    /// The card that it replaces.
    pub previous: Option<CardId>,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// Who made it.
    pub authors: List<Author, MAX_PARTIES>,
    /// Under which licence.
    pub licence: Licence,
    /// What it was trained on.
    pub training_data: TrainingData,
    /// Whether those whose work is in the training data agreed.
    pub consent: Consent,
    /// How credit is shared, in basis points; with the upstreams' shares it makes a whole.
    pub shares: List<CreditShare, MAX_PARTIES>,
    /// What it is built upon.
    pub upstreams: List<Upstream, MAX_PARTIES>,
    /// What the self-test compares with.
    pub fingerprint: Option<Fingerprint>,
}

/// What a card is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Subject {
    /// A model.
    Model(ModelId),
    /// An adapter, by its weights.
    Adapter(BlobId),
    /// A dataset, by its index file.
    Dataset(BlobId),
}

/// Somebody who made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Author {
    /// Name.
    pub name: Text<MAX_NAME>,
    /// Key, if known.
    pub key: Option<RequesterId>,
    /// What they did.
    pub role: Text<MAX_NAME>,
    /// How to reach them; empty if not said.
    pub contact: Text<MAX_LINE>,
}

/// A licence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Licence {
    /// SPDX expression, or a name of its own.
    pub name: Text<MAX_NAME>,
    /// Where it can be read; empty if not said.
    pub url: Text<MAX_LINE>,
    /// Conditions in a few words.
    pub conditions: Text<MAX_PARAGRAPH>,
}

/// What something was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingData {
    /// Whether it is told at all. If not, the interface says so loudly.
    pub disclosed: bool,
    /// In words.
    pub statement: Text<MAX_PARAGRAPH>,
    /// Source by source.
    pub sources: List<Source, MAX_PARTIES>,
}

/// A source of training data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Name.
    pub name: Text<MAX_NAME>,
    /// Where it is; empty if not said.
    pub url: Text<MAX_LINE>,
    /// Its licence; empty if not said.
    pub licence: Text<MAX_NAME>,
    /// Number of items; 0 if not said.
    #[serde(with = "text_u64")]
    pub items: u64,
    /// The dataset's index file, if it is to be had.
    pub dataset: Option<BlobId>,
}

/// Whether those whose work is in the training data agreed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consent {
    /// In one word.
    pub given: ConsentGiven,
    /// In words.
    pub statement: Text<MAX_PARAGRAPH>,
}

/// Consent in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsentGiven {
    /// Nobody else's work is in it.
    OwnWork,
    /// All agreed.
    All,
    /// By open licence or public domain.
    ByLicence,
    /// Some agreed.
    Some,
    /// None was asked.
    None,
    /// Not told.
    Unknown,
}

/// Somebody's share of the credit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreditShare {
    /// Name.
    pub name: Text<MAX_NAME>,
    /// Key, if known.
    pub key: Option<RequesterId>,
    /// What for.
    pub role: Text<MAX_NAME>,
    /// Share in basis points.
    pub bps: u16,
}

/// What something is built upon, and the share that goes there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// Which.
    pub subject: Subject,
    /// Name by which people know it.
    pub name: Text<MAX_NAME>,
    /// Share in basis points.
    pub bps: u16,
}

/// A fixed small job and what came of it on the signer's machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Prompt of the fixed job.
    pub prompt: Prompt,
    /// Seed.
    #[serde(with = "text_u64")]
    pub seed: u64,
    /// Number of frames.
    pub frames: u32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Frames per second.
    pub fps: Micro,
    /// Number of steps.
    pub steps: u32,
    /// Guidance scale.
    pub guidance: Micro,
    /// Mean of the final latents.
    pub mean: Micro,
    /// Standard deviation of the final latents.
    pub deviation: Micro,
    /// Number of values of the final latents.
    #[serde(with = "text_u64")]
    pub count: u64,
    /// Values at evenly spaced places: sample `i` of `n` is value `i * count / n`.
    pub samples: List<Micro, MAX_SAMPLES>,
    /// Greatest difference allowed in any sample.
    pub tolerance: Micro,
}

impl Message for Card {
    const KIND: Kind = Kind::Card;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 32 * 1024;
}

impl CardId {
    /// The id of a signed card.
    pub fn of(envelope: &Envelope, network: &NetworkId) -> Self {
        Self::from_bytes(envelope.content_hash("kinoflock/1/card-id", network))
    }
}

/// Why a card is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CardError {
    /// Shares that do not make a whole.
    #[error("credit shares make {given} basis points instead of {whole}")]
    Shares {
        /// What they must make.
        whole: u32,
        /// What they make.
        given: u32,
    },
    /// A version of zero, or a later one without a previous card.
    #[error("card version {given} {problem}")]
    Version {
        /// Version given.
        given: u32,
        /// What is wrong.
        problem: &'static str,
    },
    /// A thing built upon itself.
    #[error("card lists its own subject among its upstreams")]
    OwnUpstream,
}

impl CardError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Shares { .. } => "shares",
            Self::Version { .. } => "version",
            Self::OwnUpstream => "own_upstream",
        }
    }
}

impl Card {
    /// Checks shares, version and upstreams.
    pub fn check(&self) -> Result<(), CardError> {
        let own: u32 = self.shares.iter().map(|share| u32::from(share.bps)).sum();
        let given = own + self.upstreams.iter().map(|upstream| u32::from(upstream.bps)).sum::<u32>();
        let whole = u32::from(WHOLE_BPS);
        if given != whole {
            return Err(CardError::Shares { whole, given });
        }
        match (self.version, self.previous) {
            (0, _) => return Err(CardError::Version { given: 0, problem: "is below the first, 1" }),
            (1, Some(_)) => return Err(CardError::Version { given: 1, problem: "names a previous card" }),
            (2.., None) => {
                return Err(CardError::Version { given: self.version, problem: "names no previous card" });
            }
            _ => {}
        }
        if self.upstreams.iter().any(|upstream| upstream.subject == self.subject) {
            return Err(CardError::OwnUpstream);
        }
        Ok(())
    }
}

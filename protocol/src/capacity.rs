//! A node's signed, short-lived statement of what it can do, for whom, and on which terms.

use serde::{Deserialize, Serialize};

use crate::codec::{List, Text, text_u64};
use crate::envelope::{Kind, Message};
use crate::id::{CollectiveId, ModelId};
use crate::job::check_issued;
use crate::limits::*;
use crate::units::{Micro, Millis, UnixMillis};
use crate::work::Work;

/// What a node says about itself. The signer is the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// When it was signed, by the node's clock.
    pub issued_at: UnixMillis,
    /// Rises with every advert of this node.
    #[serde(with = "text_u64")]
    pub sequence: u64,
    /// Name that the operator gave the node.
    pub name: Text<MAX_NAME>,
    /// Addresses at which the node may be reached, as multiaddresses.
    pub addresses: List<Text<MAX_ADDRESS>, MAX_ADDRESSES>,
    /// Models that passed the self-test here.
    pub models: List<Offer, MAX_OFFERS>,
    /// Devices that compute.
    pub devices: List<Device, MAX_DEVICES>,
    /// Greatest jobs taken.
    pub limits: OfferLimits,
    /// How much waits.
    pub queue: QueueState,
    /// Whether new jobs are taken.
    pub state: NodeState,
    /// Whom it serves.
    pub serves: Serves,
    /// What it promises about what it sees.
    pub terms: Terms,
    /// Whether rules about content may refuse a job.
    pub content_rules: bool,
    /// Protocol versions that it speaks.
    pub protocol_versions: List<u8, MAX_VERSIONS>,
    /// Name and version of the engine.
    pub engine: Text<MAX_NAME>,
}

/// A model that a node serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Which model.
    pub model: ModelId,
    /// Name by which people know it.
    pub name: Text<MAX_NAME>,
    /// Architecture, such as `ltx-video`.
    pub architecture: Text<MAX_NAME>,
    /// Measured speed in work units (10^6 FLOP) a second, of the fastest device.
    #[serde(with = "text_u64")]
    pub speed: u64,
    /// Devices that serve it.
    pub devices: u32,
    /// Whether it is loaded now.
    pub loaded: bool,
    /// How the self-test went.
    pub self_test: SelfTest,
}

/// Result of a self-test that was passed; models that fail are not offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SelfTest {
    /// Within the tolerance of the fingerprint on the model's card.
    Passed {
        /// Greatest difference found.
        deviation: Micro,
        /// When.
        at: UnixMillis,
    },
    /// Frames are finite and not constant, but no card names a fingerprint.
    Unreferenced {
        /// When.
        at: UnixMillis,
    },
}

/// A device that computes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its sort.
    pub class: DeviceClass,
    /// Its name, such as `NVIDIA RTX 4090`.
    pub name: Text<MAX_NAME>,
    /// Its memory in bytes.
    #[serde(with = "text_u64")]
    pub memory: u64,
}

/// Sort of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DeviceClass {
    /// Processor cores.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU.
    Metal,
    /// Anything else.
    Other,
}

impl DeviceClass {
    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
            Self::Other => "other",
        }
    }
}

/// Greatest jobs that a node takes. Zero means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferLimits {
    /// Most frames.
    pub max_frames: u32,
    /// Greatest width in pixels.
    pub max_width: u32,
    /// Greatest height in pixels.
    pub max_height: u32,
    /// Most steps.
    pub max_steps: u32,
    /// Greatest work.
    pub max_work: Work,
    /// Most bytes of inputs.
    #[serde(with = "text_u64")]
    pub max_input_bytes: u64,
    /// Most waiting jobs.
    pub max_queue: u32,
}

/// How much waits at a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Jobs that wait or run.
    pub jobs: u32,
    /// Their work.
    pub work: Work,
    /// Time until a new job would begin.
    pub wait: Millis,
}

/// Whether a node takes jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeState {
    /// It does.
    #[default]
    Open,
    /// Its operator paused it.
    Paused,
    /// It is about to stop.
    Draining,
}

/// Whom a node serves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serves {
    /// Share of its time that anybody may have, in basis points.
    pub public_bps: u16,
    /// Collectives that it serves.
    pub collectives: List<CollectiveId, MAX_COLLECTIVES>,
    /// Whether an allow list names who else may.
    pub listed_only: bool,
}

/// What a node promises about what it sees: a promise, not a proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// How long it keeps prompts after the job.
    pub keeps_prompts: Millis,
    /// How long it keeps frames and clips after acknowledgement.
    pub keeps_clips: Millis,
    /// How long it keeps latents and checkpoints after acknowledgement.
    pub keeps_latents: Millis,
    /// How long it keeps anything that is never acknowledged.
    pub keeps_unacknowledged: Millis,
    /// Whether it trains on any of it.
    pub trains_on_them: bool,
    /// Whether it claims rights in any of it.
    pub claims_rights: bool,
    /// Further words of the operator.
    pub note: Text<MAX_LINE>,
}

impl Default for Terms {
    /// Deleted after acknowledgement, at the latest after 7 days; no training, no rights.
    fn default() -> Self {
        Self {
            keeps_prompts: Millis(0),
            keeps_clips: Millis(0),
            keeps_latents: Millis(0),
            keeps_unacknowledged: Millis(JOB_LIFE_MS),
            trains_on_them: false,
            claims_rights: false,
            note: Text::default(),
        }
    }
}

impl Message for Capacity {
    const KIND: Kind = Kind::Capacity;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = MAX_ADVERT - ENVELOPE_OVERHEAD;
}

/// Why an advert is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CapacityError {
    /// Issued too long ago, or too far in the future.
    #[error("advert issued {skew} {direction}, more than the limit of {limit}")]
    ClockSkew {
        /// How far.
        skew: Millis,
        /// `ago` or `in the future`.
        direction: &'static str,
        /// How far it may be.
        limit: Millis,
    },
    /// An older one, or the same again.
    #[error("advert has sequence {given}, sequence {stored} was seen before")]
    Stale {
        /// Sequence seen.
        stored: u64,
        /// Sequence given.
        given: u64,
    },
}

impl CapacityError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::ClockSkew { .. } => "clock_skew",
            Self::Stale { .. } => "stale",
        }
    }
}

impl Capacity {
    /// Whether to take this advert: issued within five minutes of `now`, and newer than the one stored.
    pub fn check(&self, now: UnixMillis, stored_sequence: Option<u64>) -> Result<(), CapacityError> {
        let limit = Millis(MAX_CLOCK_SKEW_MS);
        check_issued(self.issued_at, now).map_err(|skew| CapacityError::ClockSkew {
            skew,
            direction: "in the future",
            limit,
        })?;
        let age = now.since(self.issued_at);
        if age > limit {
            return Err(CapacityError::ClockSkew { skew: age, direction: "ago", limit });
        }
        match stored_sequence {
            Some(stored) if stored >= self.sequence => {
                Err(CapacityError::Stale { stored, given: self.sequence })
            }
            _ => Ok(()),
        }
    }

    /// How long to believe it from its arrival at `now`.
    pub fn lives_for(&self, now: UnixMillis) -> Millis {
        let end = self.issued_at.plus(Millis(ADVERT_LIFE_FROM_ISSUE_MS));
        Millis(ADVERT_LIFE_MS).min(end.since(now))
    }

    /// The offer of this model.
    pub fn offer(&self, model: &ModelId) -> Option<&Offer> {
        self.models.iter().find(|offer| offer.model == *model)
    }
}

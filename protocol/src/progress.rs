//! The events of a job as its requester sees them, and the checkpoints from which another node can go on.

use serde::{Deserialize, Serialize};

use crate::clip::BlobRef;
use crate::codec::{Bytes, List, Text, text_u64};
use crate::envelope::{Envelope, Kind, Message};
use crate::id::{BlobId, JobId, ModelId};
use crate::limits::*;
use crate::refusal::Refusal;
use crate::units::{Millis, UnixMillis};

/// One event of a job. Sequence numbers rise by one from 0; a stream that broke goes on after the last one seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Which job.
    pub job: JobId,
    /// Number of the event. A preview that a slow reader missed leaves a gap.
    #[serde(with = "text_u64")]
    pub seq: u64,
    /// What happened.
    pub event: JobEvent,
}

/// What happened to a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobEvent {
    /// Its inputs are being fetched from the submitter.
    AwaitingInputs {
        /// Inputs that are still missing.
        missing: List<BlobId, MAX_INPUTS>,
    },
    /// It waits.
    Queued {
        /// Jobs ahead.
        position: u32,
        /// Time until it is done.
        eta: Millis,
    },
    /// The model is being loaded.
    Loading,
    /// A step was done.
    Step {
        /// Steps done.
        done: u32,
        /// Steps in all.
        total: u32,
        /// Time until it is done.
        eta: Millis,
    },
    /// A small picture of how it looks so far.
    Preview {
        /// After how many steps.
        step: u32,
        /// PNG.
        png: Bytes<MAX_PREVIEW>,
    },
    /// A checkpoint can be fetched.
    Checkpoint {
        /// The signed [`Checkpoint`].
        checkpoint: Envelope,
    },
    /// The latents are being decoded and encoded to a file.
    Encoding,
    /// The clip is there.
    Done {
        /// The signed [`crate::receipt::Receipt`].
        receipt: Envelope,
    },
    /// It failed.
    Failed {
        /// Stable name of the cause.
        code: Text<MAX_NAME>,
        /// The cause for people.
        text: Text<MAX_LINE>,
        /// Whether another try, here or elsewhere, may succeed.
        retryable: bool,
    },
    /// It was stopped on the requester's word.
    Cancelled,
}

impl JobEvent {
    /// Whether no further event can follow.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Failed { .. } | Self::Cancelled)
    }

    /// Stable name of the event.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AwaitingInputs { .. } => "awaiting_inputs",
            Self::Queued { .. } => "queued",
            Self::Loading => "loading",
            Self::Step { .. } => "step",
            Self::Preview { .. } => "preview",
            Self::Checkpoint { .. } => "checkpoint",
            Self::Encoding => "encoding",
            Self::Done { .. } => "done",
            Self::Failed { .. } => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The first frame of a progress stream, from the requester.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressOpen {
    /// A signed [`crate::query::JobQuery`] with action progress or previews.
    pub query: Envelope,
    /// First sequence number wanted.
    #[serde(with = "text_u64")]
    pub from_seq: u64,
}

/// A frame of a progress stream, from the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProgressFrame {
    /// The query is accepted; events follow.
    Open,
    /// An event.
    Event(Progress),
    /// No events will come, for this reason.
    Refused(Refusal),
    /// Too many streams; ask again later.
    Busy {
        /// How much later.
        retry_after: Millis,
    },
}

/// A node's signed statement of where a running job stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Which job.
    pub job: JobId,
    /// With which model.
    pub model: ModelId,
    /// Steps done.
    pub step: u32,
    /// Steps in all.
    pub total: u32,
    /// Latents after that step and the sampler's state, one safetensors file, sealed if it leaves the node.
    pub state: BlobRef,
    /// Hash of the latents after that step.
    pub latents: BlobId,
    /// When it was made.
    pub made_at: UnixMillis,
}

impl Message for Checkpoint {
    const KIND: Kind = Kind::Checkpoint;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 512;
}

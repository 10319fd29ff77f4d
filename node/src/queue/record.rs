//! What is written of a job.

use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{ChainId, JobId, ModelId, Nonce, ReceiptId, RequesterId};
use kinoflock_protocol::units::UnixMillis;
use kinoflock_protocol::work::{JobShape, Work};
use serde::{Deserialize, Serialize};

use crate::memory::DeviceSet;
use crate::policy::{Class, Wanted};
use crate::scheduler::{Cause, NetPrefix, Origin, Outcome};

/// A job in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its id.
    pub id: JobId,
    /// Its place in the order of arrival, from the scheduler.
    pub seq: u64,
    /// Its nonce.
    pub nonce: Nonce,
    /// For whom and from where.
    pub origin: StoredOrigin,
    /// The model.
    pub model: ModelId,
    /// Frames, size, steps, guidance.
    pub shape: JobShape,
    /// What it costs.
    pub work: Work,
    /// The signed job.
    pub job: Envelope,
    /// The signed order.
    pub order: Envelope,
    /// When it was accepted.
    pub admitted_at: UnixMillis,
    /// When it is of no more use.
    pub deadline: Option<UnixMillis>,
    /// Whether inputs are still missing.
    pub needs_inputs: bool,
    /// When it last began to run.
    pub started_at: Option<UnixMillis>,
    /// Times that it was started.
    pub starts: u32,
    /// Where it stands.
    pub state: StoredState,
    /// The requester's answer to the receipt, and when it came.
    pub answer: Option<(Envelope, UnixMillis)>,
}

/// [`Origin`] as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredOrigin {
    /// The artist's key.
    pub requester: RequesterId,
    /// In whose favour.
    pub class: StoredClass,
    /// The network that it came from.
    pub prefix: NetPrefix,
}

/// [`Class`] as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredClass {
    /// The operator's own.
    Own,
    /// A collective's member.
    Collective,
    /// Everybody else.
    Public,
}

/// Where a stored job stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredState {
    /// It waits, for its inputs or for a device.
    Waiting,
    /// It runs; after a restart it waits again.
    Running,
    /// It is done; its receipt has this place in this chain.
    Done {
        /// When.
        at: UnixMillis,
        /// The chain.
        chain: ChainId,
        /// The place.
        sequence: u64,
    },
    /// It ended without a clip.
    Ended {
        /// When.
        at: UnixMillis,
        /// How.
        end: End,
    },
}

/// An end without a clip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// On the requester's word.
    Cancelled,
    /// It failed.
    Failed {
        /// Stable name of the cause.
        code: String,
        /// The cause for people.
        text: String,
        /// Whether another try may succeed.
        retryable: bool,
    },
}

/// A place in the chain of receipts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The chain.
    pub chain: ChainId,
    /// The place, from 0.
    pub sequence: u64,
    /// The receipt before it.
    pub previous: Option<ReceiptId>,
}

impl JobRecord {
    /// Whether the job is over, and when it was.
    #[must_use]
    pub const fn ended_at(&self) -> Option<UnixMillis> {
        match self.state {
            StoredState::Waiting | StoredState::Running => None,
            StoredState::Done { at, .. } | StoredState::Ended { at, .. } => Some(at),
        }
    }

    /// How it ended, in the scheduler's words.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        match &self.state {
            StoredState::Waiting | StoredState::Running => None,
            StoredState::Done { .. } => Some(Outcome::Done),
            StoredState::Ended { end, .. } => Some(end.clone().into()),
        }
    }

    /// What is asked, in the scheduler's words.
    #[must_use]
    pub const fn wanted(&self) -> Wanted {
        Wanted { model: self.model, shape: self.shape, work: self.work, unfit: DeviceSet::NONE }
    }
}

impl From<Origin> for StoredOrigin {
    fn from(origin: Origin) -> Self {
        let class = match origin.class {
            Class::Own => StoredClass::Own,
            Class::Collective => StoredClass::Collective,
            Class::Public => StoredClass::Public,
        };
        Self { requester: origin.requester, class, prefix: origin.prefix }
    }
}

impl From<StoredOrigin> for Origin {
    fn from(origin: StoredOrigin) -> Self {
        let class = match origin.class {
            StoredClass::Own => Class::Own,
            StoredClass::Collective => Class::Collective,
            StoredClass::Public => Class::Public,
        };
        Self { requester: origin.requester, class, prefix: origin.prefix }
    }
}

impl From<End> for Outcome {
    fn from(end: End) -> Self {
        match end {
            End::Cancelled => Self::Cancelled,
            End::Failed { code, text, retryable } => {
                Self::Failed(Cause { code, text, retryable, here: false })
            }
        }
    }
}

impl From<Outcome> for Option<End> {
    /// `None` for a job that is done, whose end is its receipt.
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => None,
            Outcome::Cancelled => Some(End::Cancelled),
            Outcome::Failed(Cause { code, text, retryable, .. }) => {
                Some(End::Failed { code, text, retryable })
            }
        }
    }
}

//! What was made for whom: the node's signed [`Receipt`], and the requester's signed [`ReceiptAnswer`].
//!
//! A receipt holds no prompt. Receipts of one node form a chain (chain id, sequence, previous), so that none can be
//! left out unseen.

use serde::{Deserialize, Serialize};

use crate::capacity::DeviceClass;
use crate::clip::BlobRef;
use crate::codec::{List, Text, text_u64};
use crate::envelope::{Envelope, EnvelopeError, Kind, Message};
use crate::id::{
    BlobId, CardId, ChainId, ClipId, CollectiveId, JobId, ModelId, NetworkId, NodeId, PublicKey, ReceiptId,
    RequesterId,
};
use crate::limits::*;
use crate::units::{Micro, UnixMillis};
use crate::work::Work;

/// A node's statement of what it made for whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Which job.
    pub job: JobId,
    /// For whom.
    pub requester: RequesterId,
    /// By which node: the signer.
    pub node: NodeId,
    /// In the name of which collective.
    pub collective: Option<CollectiveId>,
    /// With which model.
    pub model: ModelId,
    /// Cards of model and adapters that the node went by.
    pub cards: List<CardId, MAX_RECEIPT_CARDS>,
    /// With which adapters, and how strongly they acted.
    pub adapters: List<UsedAdapter, MAX_ADAPTERS>,
    /// The clip.
    pub clip: ClipId,
    /// Its length in bytes.
    #[serde(with = "text_u64")]
    pub clip_len: u64,
    /// The latents it was decoded from, if they were asked for.
    pub latents: Option<BlobRef>,
    /// Clips that it comes from.
    pub parents: List<ClipId, MAX_PARENTS>,
    /// Inputs that were used.
    pub inputs: List<BlobId, MAX_INPUTS>,
    /// Seed.
    #[serde(with = "text_u64")]
    pub seed: u64,
    /// Steps done, in all segments.
    pub steps: u32,
    /// Root over the hashes of each step's latents.
    pub step_root: Option<BlobId>,
    /// Who did which steps, if more than one node did.
    pub segments: List<Segment, MAX_SEGMENTS>,
    /// What the job cost, as everybody computes it.
    pub work: Work,
    /// Sort of the device.
    pub device: DeviceClass,
    /// Name and version of the engine.
    pub engine: Text<MAX_NAME>,
    /// When the job was accepted.
    pub accepted_at: UnixMillis,
    /// When it began to run.
    pub started_at: UnixMillis,
    /// When the clip was there.
    pub finished_at: UnixMillis,
    /// Energy in joules as the node claims it: nothing checks it.
    pub claimed_joules: Option<Joules>,
    /// The node's chain of receipts.
    pub chain: ChainId,
    /// Place in the chain, from 0.
    #[serde(with = "text_u64")]
    pub sequence: u64,
    /// The receipt before this one; none at the beginning of the chain.
    pub previous: Option<ReceiptId>,
}

/// Energy in joules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Joules(#[serde(with = "text_u64")] pub u64);

/// An adapter as it was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedAdapter {
    /// Its weights.
    pub weights: BlobId,
    /// How strongly it acted.
    pub scale: Micro,
}

/// Steps that one node did of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Which node.
    pub node: NodeId,
    /// First step, from 0.
    pub first_step: u32,
    /// Number of steps.
    pub steps: u32,
    /// The signed checkpoint that it ended with, as a blob; none for the last.
    pub checkpoint: Option<BlobId>,
}

impl Message for Receipt {
    const KIND: Kind = Kind::Receipt;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 16 * 1024;
}

/// A requester's answer to a receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptAnswer {
    /// Which receipt.
    pub receipt: ReceiptId,
    /// Which job.
    pub job: JobId,
    /// Accepted or disputed.
    pub verdict: Verdict,
    /// When it was signed.
    pub answered_at: UnixMillis,
}

/// Accepted or disputed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The clip came and is what was asked for.
    Accept,
    /// It is not.
    Dispute {
        /// Stable name of the cause.
        code: Text<MAX_NAME>,
        /// The cause for people.
        text: Text<MAX_LINE>,
    },
}

impl Message for ReceiptAnswer {
    const KIND: Kind = Kind::ReceiptAnswer;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 1024;
}

impl ReceiptId {
    /// The id of a signed receipt.
    pub fn of(envelope: &Envelope, network: &NetworkId) -> Self {
        Self::from_bytes(envelope.content_hash("kinoflock/1/receipt-id", network))
    }
}

/// Why a receipt is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiptError {
    /// The signed envelope is refused.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// Signed by another than the node that it names.
    #[error("receipt of node {node} is signed by {signer}")]
    WrongSigner {
        /// Node that it names.
        node: NodeId,
        /// Who signed.
        signer: PublicKey,
    },
    /// Times that run backwards.
    #[error(
        "receipt has times that run backwards: accepted {accepted_at}, started {started_at}, finished {finished_at}"
    )]
    Times {
        /// When the job was accepted.
        accepted_at: UnixMillis,
        /// When it began to run.
        started_at: UnixMillis,
        /// When the clip was there.
        finished_at: UnixMillis,
    },
    /// A first receipt with a previous one, or a later one without.
    #[error("receipt {sequence} of its chain {problem}")]
    Chain {
        /// Place in the chain.
        sequence: u64,
        /// What is wrong.
        problem: &'static str,
    },
}

impl ReceiptError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Envelope(error) => error.code(),
            Self::WrongSigner { .. } => "wrong_signer",
            Self::Times { .. } => "times",
            Self::Chain { .. } => "chain",
        }
    }
}

/// A receipt whose signature and inner consistency were checked; whether it fits a job, the requester knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidReceipt {
    id: ReceiptId,
    receipt: Receipt,
}

impl ValidReceipt {
    /// Checks a signed receipt.
    pub fn parse(envelope: &Envelope, network: &NetworkId) -> Result<Self, ReceiptError> {
        let opened = envelope.open::<Receipt>(network)?;
        let receipt = opened.value;
        if NodeId::from(opened.signer) != receipt.node {
            return Err(ReceiptError::WrongSigner { node: receipt.node, signer: opened.signer });
        }
        let Receipt { accepted_at, started_at, finished_at, sequence, previous, .. } = receipt;
        if accepted_at > started_at || started_at > finished_at {
            return Err(ReceiptError::Times { accepted_at, started_at, finished_at });
        }
        match (sequence, previous) {
            (0, Some(_)) => {
                Err(ReceiptError::Chain { sequence, problem: "is the first but names a previous one" })
            }
            (1.., None) => Err(ReceiptError::Chain { sequence, problem: "names no previous one" }),
            _ => Ok(Self { id: ReceiptId::of(envelope, network), receipt }),
        }
    }

    /// Its id.
    pub fn id(&self) -> ReceiptId {
        self.id
    }

    /// The receipt.
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }
}

//! A job that outlives its client and its node: custodians that watch it, and sealed copies of what was made.
//!
//! The requester hands the signed job to the custodians that the job names, with a signed [`Custody`] that says where it
//! runs. A custodian may ask how the job stands, keeps its newest sealed checkpoint, and hands it to another node when its
//! own is gone; it cannot change it. A custodian holds the signed job, so it could read the prompt.
//!
//! The node that made a clip asks others to hold it, sealed, with a signed [`Keep`]. A holder can verify and serve the
//! bytes, and cannot see them. Whoever signed the job asks any of them what they hold for it ([`Held`]), and may tell them
//! to forget it.
//!
//! A requester whom the maker reaches over a relay only, which carries no large blob, has the job's inputs held the same way
//! and tells the maker where ([`MirroredInputs`]).

use serde::{Deserialize, Serialize};

use crate::clip::BlobRef;
use crate::codec::{Bytes, List, Text};
use crate::envelope::{Envelope, Kind, Message};
use crate::id::{BlobId, JobId, NetworkId, NodeId, RequesterId};
use crate::job::ValidJob;
use crate::limits::*;
use crate::names::NodeAddress;
use crate::order::{OrderError, QuoteRequest, check_times};
use crate::units::{Millis, UnixMillis};

/// A requester's word to a custodian: watch this job, which runs there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Custody {
    /// Which job.
    pub job: JobId,
    /// Which custodian.
    pub custodian: NodeId,
    /// Where the job runs now.
    pub runs_at: NodeAddress,
    /// When it was signed.
    pub issued_at: UnixMillis,
}

impl Message for Custody {
    const KIND: Kind = Kind::Custody;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 4 * 1024;
}

/// A custody that was checked with its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidCustody {
    custody: Custody,
}

impl ValidCustody {
    /// Checks a signed custody beside its job: signed by the job's requester, for `here`, which the job names.
    ///
    /// # Errors
    /// See [`OrderError`].
    pub fn parse(
        envelope: &Envelope,
        network: &NetworkId,
        now: UnixMillis,
        here: &NodeId,
        job: &ValidJob,
    ) -> Result<Self, OrderError> {
        let opened = envelope.open::<Custody>(network)?;
        let custody = opened.value;
        if RequesterId::from(opened.signer) != job.requester() {
            return Err(OrderError::WrongSigner { signer: opened.signer });
        }
        if custody.custodian != *here || !job.spec().custodians.contains(here) {
            return Err(OrderError::OrderForAnotherNode { addressed: custody.custodian, here: *here });
        }
        if custody.job != job.id() {
            return Err(OrderError::WrongJob { ordered: custody.job, given: job.id() });
        }
        let expires_at = custody.issued_at.plus(Millis(ORDER_LIFE_MS + MAX_CLOCK_SKEW_MS));
        check_times("custody", custody.issued_at, expires_at, now)?;
        Ok(Self { custody })
    }

    /// What was signed.
    pub fn custody(&self) -> &Custody {
        &self.custody
    }
}

/// What a sealed blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Content {
    /// A finished clip; its statement is the receipt.
    Clip,
    /// The latents of a finished clip; its statement is the receipt.
    Latents,
    /// The state of a running job; its statement is the checkpoint.
    Checkpoint,
    /// An input of a job that is to be made, the first, the second and so on; it has no statement.
    Input(u8),
}

impl Content {
    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clip => "clip",
            Self::Latents => "latents",
            Self::Checkpoint => "checkpoint",
            Self::Input(_) => "input",
        }
    }

    /// A number that no other content of the same job has, as long as inputs are numbered below 253.
    pub fn number(self) -> u8 {
        match self {
            Self::Clip => 0,
            Self::Latents => 1,
            Self::Checkpoint => 2,
            Self::Input(index) => index.saturating_add(3),
        }
    }
}

/// A word to a node: hold this sealed blob for its requester. A node says it of what it made, a requester of its inputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Of which job.
    pub job: JobId,
    /// For whom.
    pub requester: RequesterId,
    /// Which node is to hold it.
    pub holder: NodeId,
    /// What it is.
    pub content: Content,
    /// The sealed blob, which the holder fetches from whoever sends this.
    pub sealed: BlobRef,
    /// The signed statement that belongs to it, sealed too: it names the clip.
    pub statement: Bytes<MAX_STATEMENT>,
    /// How long it is wanted, at most.
    pub until: UnixMillis,
    /// When it was signed.
    pub issued_at: UnixMillis,
}

impl Message for Keep {
    const KIND: Kind = Kind::Keep;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = MAX_STATEMENT + 512;
}

/// A keep that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidKeep {
    /// Who asks for it.
    pub signer: NodeId,
    /// What is asked.
    pub keep: Keep,
}

impl ValidKeep {
    /// Checks a signed keep for `here`.
    ///
    /// # Errors
    /// See [`OrderError`].
    pub fn parse(
        envelope: &Envelope,
        network: &NetworkId,
        now: UnixMillis,
        here: &NodeId,
    ) -> Result<Self, OrderError> {
        let opened = envelope.open::<Keep>(network)?;
        let keep = opened.value;
        if keep.holder != *here {
            return Err(OrderError::OrderForAnotherNode { addressed: keep.holder, here: *here });
        }
        let expires_at = keep.issued_at.plus(Millis(ORDER_LIFE_MS + MAX_CLOCK_SKEW_MS));
        check_times("keep", keep.issued_at, expires_at.min(keep.until), now)?;
        Ok(Self { signer: opened.signer.into(), keep })
    }
}

/// Where a job's large inputs lie sealed, because no direct connection with its requester comes about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirroredInputs {
    /// Which node holds them.
    pub holder: NodeAddress,
    /// What it holds.
    pub inputs: List<SealedInput, MAX_HELD>,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedInput {
    /// The input.
    pub input: BlobId,
    /// What it is sealed, with the job's key. A state to go on from is sealed anyway: both are one then.
    pub sealed: BlobRef,
}

/// What a node holds for a job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Sealed blobs with their statements.
    pub items: List<HeldItem, MAX_HELD>,
    /// Where the job runs or ran, as far as this custodian knows.
    pub runs_at: Option<NodeAddress>,
}

/// A sealed blob that a node holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldItem {
    /// What it is.
    pub content: Content,
    /// The sealed blob.
    pub sealed: BlobRef,
    /// The sealed statement.
    pub statement: Bytes<MAX_STATEMENT>,
}

/// "Connect to me anew, as a stranger would, and ask for this quote." Only addresses are tried from which the question
/// itself may have come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// Where the one who asks believes to be reachable.
    pub addresses: List<Text<MAX_ADDRESS>, MAX_ADDRESSES>,
    /// The quote that is to be asked for, if it serves any model.
    pub quote: Option<QuoteRequest>,
}

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Whether a new connection came about.
    pub reached: bool,
    /// Whether a quote came.
    pub quoted: bool,
    /// What went wrong, for the operator; empty if nothing did.
    pub text: Text<MAX_LINE>,
}

//! The audit by another node: the requester orders it ([`AuditOrder`]), the auditor looks at one step, and signs what it
//! found ([`AuditVerdict`]).
//!
//! A grant is for one audit: the auditor draws one step for it, and gives the same answer however often it is asked. So
//! nobody who gets hold of a grant can make the auditor draw again until it likes what is drawn.

use serde::{Deserialize, Serialize};

use super::AuditGrant;
use crate::codec::Text;
use crate::envelope::{Envelope, EnvelopeError, Kind, Message};
use crate::id::{BlobId, JobId, NetworkId, NodeId, PublicKey, ReceiptId, RequesterId};
use crate::job::{JobError, ValidJob};
use crate::limits::{AUDIT_GRANT_LIFE_MS, MAX_LINE};
use crate::names::NodeAddress;
use crate::order::{OrderError, check_times};
use crate::receipt::{Receipt, ReceiptError, ValidReceipt};
use crate::units::{Micro, Millis, UnixMillis};

/// "Audit this job." Whoever gets it sees the prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditOrder {
    /// The signed [`crate::job::JobSpec`].
    pub job: Envelope,
    /// The maker's signed [`Receipt`].
    pub receipt: Envelope,
    /// The requester's signed [`AuditGrant`].
    pub grant: Envelope,
    /// Where the maker is reached, should the auditor not know it better.
    pub maker: NodeAddress,
}

/// Why an order for an audit is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// The job.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The receipt.
    #[error(transparent)]
    Receipt(#[from] ReceiptError),
    /// The grant or the verdict.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// The grant is over, or from the future.
    #[error(transparent)]
    Times(#[from] OrderError),
    /// Two of the three do not belong together.
    #[error("{what} {given} does not belong to {expected}")]
    Mismatch {
        /// Which part.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        given: String,
    },
    /// The grant names another auditor.
    #[error("grant is for auditor {named}, this is {here}")]
    AnotherAuditor {
        /// Whom it names.
        named: PublicKey,
        /// Who was asked.
        here: NodeId,
    },
    /// The grant is signed by another than the job.
    #[error("grant is signed by {signer}, not by the requester of the job")]
    WrongSigner {
        /// Who signed.
        signer: PublicKey,
    },
    /// A grant that holds too long.
    #[error("grant holds for {given}, more than the limit of {limit}")]
    GrantTooLong {
        /// How long it may.
        limit: Millis,
        /// How long it does.
        given: Millis,
    },
    /// The job did not ask for a commitment to its steps, or the node made none.
    #[error("receipt holds no commitment to the job's steps")]
    NoCommitment,
}

impl AuditError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Job(error) => error.code(),
            Self::Receipt(error) => error.code(),
            Self::Envelope(error) => error.code(),
            Self::Times(error) => error.code(),
            Self::Mismatch { .. } => "mismatch",
            Self::AnotherAuditor { .. } => "another_auditor",
            Self::WrongSigner { .. } => "wrong_signer",
            Self::GrantTooLong { .. } => "grant_too_long",
            Self::NoCommitment => "no_commitment",
        }
    }
}

/// An order for an audit that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidAuditOrder {
    /// The job.
    pub job: ValidJob,
    /// What its maker says.
    pub receipt: ValidReceipt,
    /// Root over the maker's states.
    pub root: BlobId,
    /// What names this audit: one for each grant.
    pub id: AuditId,
}

/// What names an audit: its grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AuditId(pub BlobId);

impl AuditId {
    /// The audit that a grant is for.
    pub fn of(grant: &Envelope) -> Self {
        Self(BlobId::of(&grant.encode()))
    }
}

impl ValidAuditOrder {
    /// Checks an order to the auditor `here`: job and grant by the requester, the receipt by its maker, each for the same
    /// job; a grant that names `here` and holds at `now`.
    ///
    /// # Errors
    /// See [`AuditError`].
    pub fn parse(
        order: &AuditOrder,
        network: &NetworkId,
        now: UnixMillis,
        here: &NodeId,
    ) -> Result<Self, AuditError> {
        let job = ValidJob::parse_stored(&order.job, network)?;
        let receipt = ValidReceipt::parse(&order.receipt, network)?;
        let granted = order.grant.open::<AuditGrant>(network)?;
        let grant = granted.value;
        if RequesterId::from(granted.signer) != job.requester() {
            return Err(AuditError::WrongSigner { signer: granted.signer });
        }
        if NodeId::from(grant.auditor) != *here {
            return Err(AuditError::AnotherAuditor { named: grant.auditor, here: *here });
        }
        let made = receipt.receipt();
        belongs("receipt for job", &job.id(), &made.job)?;
        belongs("receipt for requester", &job.requester(), &made.requester)?;
        belongs("receipt for model", &job.spec().model, &made.model)?;
        belongs("grant for job", &job.id(), &grant.job)?;
        belongs("grant for receipt", &receipt.id(), &grant.receipt)?;
        belongs("address of node", &made.node, &order.maker.id)?;
        check_times("audit grant", grant.issued_at, grant.expires_at, now)?;
        let (limit, given) = (Millis(AUDIT_GRANT_LIFE_MS), grant.expires_at.since(grant.issued_at));
        if given > limit {
            return Err(AuditError::GrantTooLong { limit, given });
        }
        let root = made.step_root.ok_or(AuditError::NoCommitment)?;
        Ok(Self { job, root, id: AuditId::of(&order.grant), receipt })
    }
}

fn belongs<T: PartialEq + std::fmt::Display>(
    what: &'static str,
    expected: &T,
    given: &T,
) -> Result<(), AuditError> {
    if expected == given {
        return Ok(());
    }
    Err(AuditError::Mismatch { what, expected: expected.to_string(), given: given.to_string() })
}

/// The steps that the node of a receipt did itself, and can show: first, and how many.
pub fn own_steps(receipt: &Receipt) -> (u32, u32) {
    let own = receipt.segments.iter().rfind(|segment| segment.node == receipt.node);
    own.map_or((0, receipt.steps), |segment| (segment.first_step, segment.steps))
}

/// How an ordered audit stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuditState {
    /// It waits, for the maker's states or for a free device.
    Waiting,
    /// The step is being computed.
    Looking,
    /// It is over: the signed [`AuditVerdict`].
    Done(Envelope),
}

/// What an auditor found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditVerdict {
    /// Which job.
    pub job: JobId,
    /// Which receipt.
    pub receipt: ReceiptId,
    /// Whose work was looked at.
    pub maker: NodeId,
    /// Who looked: the signer.
    pub auditor: NodeId,
    /// The step that was drawn, from 0.
    pub step: u32,
    /// What was found.
    pub outcome: AuditOutcome,
    /// How far the recovered model output of that step is from the one computed by the auditor, relative; or, where the
    /// frames differ, their root mean square difference, of 255. 0 where nothing was computed.
    pub deviation: Micro,
    /// How far it may be.
    pub tolerance: Micro,
    /// In which numbers the two computed.
    pub precision: AuditPrecision,
    /// When it was found.
    pub looked_at: UnixMillis,
}

/// What an audit found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuditOutcome {
    /// Everything that was looked at is as it should be.
    Honest,
    /// The maker did not compute what it signed.
    Differs(AuditDifference),
    /// Nothing can be said.
    CouldNotLook {
        /// What stood in the way.
        obstacle: AuditObstacle,
        /// The cause for people.
        why: Text<MAX_LINE>,
    },
}

impl AuditOutcome {
    /// Stable name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Honest => "honest",
            Self::Differs(_) => "differs",
            Self::CouldNotLook { .. } => "could_not_look",
        }
    }
}

/// What does not match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuditDifference {
    /// A state that was shown is not one that was committed to.
    Opening,
    /// The first state is not what the seed, or the given latents, make.
    Start,
    /// The step leads elsewhere.
    Step,
    /// The last state decodes to other frames than the clip's.
    Frames,
}

impl AuditDifference {
    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Start => "start",
            Self::Step => "step",
            Self::Frames => "frames",
        }
    }

    /// What it means, for people.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Opening => "what it showed is not what it had committed to",
            Self::Start => "it did not begin with the noise of the job's seed, or with the given latents",
            Self::Step => "the step does not lead where the model leads",
            Self::Frames => "the clip is not what its last latents decode to",
        }
    }
}

/// Why an audit could not look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuditObstacle {
    /// The maker answered, and did not show what it had committed to.
    Withheld,
    /// The maker, or who holds the clip, could not be reached.
    Unreachable,
    /// The auditor itself could not compute.
    Auditor,
}

impl AuditObstacle {
    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Withheld => "withheld",
            Self::Unreachable => "unreachable",
            Self::Auditor => "auditor",
        }
    }
}

/// In which numbers maker and auditor computed; the coarser of both decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuditPrecision {
    /// f32 on both sides, on CPUs.
    Full,
    /// 16 bits on either side, or a device whose rounding is not measured.
    Half,
}

impl AuditPrecision {
    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Half => "half",
        }
    }
}

impl Message for AuditVerdict {
    const KIND: Kind = Kind::AuditVerdict;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 1024;
}

impl AuditVerdict {
    /// Checks a signed verdict: by the auditor that was asked, about that job and receipt.
    ///
    /// # Errors
    /// See [`AuditError`].
    pub fn parse(
        envelope: &Envelope,
        network: &NetworkId,
        auditor: &NodeId,
        receipt: &ValidReceipt,
    ) -> Result<Self, AuditError> {
        let opened = envelope.open::<Self>(network)?;
        let verdict = opened.value;
        belongs("verdict of auditor", auditor, &NodeId::from(opened.signer))?;
        belongs("verdict of auditor", auditor, &verdict.auditor)?;
        belongs("verdict on job", &receipt.receipt().job, &verdict.job)?;
        belongs("verdict on receipt", &receipt.id(), &verdict.receipt)?;
        belongs("verdict on node", &receipt.receipt().node, &verdict.maker)?;
        Ok(verdict)
    }
}

//! From a question to an order: [`QuoteRequest`], [`Quote`], [`Order`].
//!
//! A quote is asked without prompt or inputs and holds a place for some seconds (a lease). The order hands a signed
//! job to one node under that lease, so a copy of it is worth nothing to another node or after its time.

use serde::{Deserialize, Serialize};

use crate::clip::BlobRef;
use crate::codec::{List, text_u64};
use crate::envelope::{Envelope, EnvelopeError, Kind, Message};
use crate::id::{
    BlobId, BodyHash, CollectiveId, JobId, LeaseId, ModelId, NetworkId, NodeId, Nonce, PublicKey, RequesterId,
};
use crate::job::{Audience, JobSpec, ValidJob, check_issued};
use crate::limits::*;
use crate::units::{Millis, UnixMillis};
use crate::work::{JobShape, Work};

/// "Could you, and when?" Without prompt and inputs, unsigned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuoteRequest {
    /// Random: binds the quote to this question.
    pub nonce: Nonce,
    /// Who asks.
    pub requester: RequesterId,
    /// Which model.
    pub model: ModelId,
    /// Whether an adapter is to be trained.
    pub train: bool,
    /// Which adapters.
    pub adapters: List<BlobId, MAX_ADAPTERS>,
    /// Frames, size, steps, guidance.
    pub shape: JobShape,
    /// What the requester computed that it costs.
    pub work: Work,
    /// Bytes of inputs that the node will have to fetch.
    #[serde(with = "text_u64")]
    pub input_bytes: u64,
    /// Collective whose member the requester says to be.
    pub collective: Option<CollectiveId>,
    /// Whom the job will be addressed to.
    pub addressed_to: Audience,
    /// When the result is of no more use.
    pub deadline: Option<UnixMillis>,
}

impl QuoteRequest {
    /// The question that belongs to a job.
    pub fn for_job(spec: &JobSpec, requester: RequesterId, nonce: Nonce, work: Work) -> Self {
        Self {
            nonce,
            requester,
            model: spec.model,
            train: matches!(spec.kind, crate::job::JobKind::Train(_)),
            adapters: List::first_of(spec.adapter_ids()),
            shape: spec.shape(),
            work,
            input_bytes: spec.inputs().iter().map(|blob| blob.len).sum(),
            collective: spec.membership.as_ref().map(|m| m.collective),
            addressed_to: spec.addressed_to,
            deadline: spec.deadline,
        }
    }

    /// Hash that a quote answers.
    pub fn hash(&self) -> BodyHash {
        BodyHash::of(&crate::codec::encode(self))
    }
}

/// A node's signed answer: a place held for some seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quote {
    /// The question that it answers.
    pub request: BodyHash,
    /// Whom it is for.
    pub requester: RequesterId,
    /// The place.
    pub lease: LeaseId,
    /// The node's time, from which the requester learns how far their clocks differ.
    pub issued_at: UnixMillis,
    /// When the place is given away.
    pub expires_at: UnixMillis,
    /// Jobs ahead.
    pub position: u32,
    /// Time until the clip would be done.
    pub eta: Millis,
    /// What the node computed that the job costs.
    pub work: Work,
    /// The node's measured speed with this model, in work units (10^6 FLOP) a second.
    #[serde(with = "text_u64")]
    pub speed: u64,
    /// How many bytes of inputs the node would fetch.
    #[serde(with = "text_u64")]
    pub max_input_bytes: u64,
}

impl Message for Quote {
    const KIND: Kind = Kind::Quote;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 1024;
}

/// The submission of one job to one node under one lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Which job.
    pub job: JobId,
    /// Which node.
    pub node: NodeId,
    /// Under which lease.
    pub lease: LeaseId,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// Where to go on, if another node began.
    pub resume: Option<Resume>,
}

/// Where another node left a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The signed [`crate::progress::Checkpoint`], as a blob of its envelope.
    pub checkpoint: BlobRef,
    /// Steps done by then.
    pub step: u32,
}

impl Message for Order {
    const KIND: Kind = Kind::Order;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 1024;
}

/// Why an order or a quote is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OrderError {
    /// The signed envelope is refused.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// An order for another node.
    #[error("order is for node {addressed}, this is {here}")]
    OrderForAnotherNode {
        /// Whom it is for.
        addressed: NodeId,
        /// This node.
        here: NodeId,
    },
    /// An order for another job than the one beside it.
    #[error("order is for job {ordered}, the job beside it is {given}")]
    WrongJob {
        /// Job that the order names.
        ordered: JobId,
        /// Job that came with it.
        given: JobId,
    },
    /// Neither the job's requester nor one of its custodians.
    #[error("order is signed by {signer}, neither the requester of the job nor one of its custodians")]
    WrongSigner {
        /// Who signed.
        signer: PublicKey,
    },
    /// Too long on its way.
    #[error("{what} expired at {expired_at}, it is now {now}")]
    Expired {
        /// `order` or `quote`.
        what: &'static str,
        /// When it expired.
        expired_at: UnixMillis,
        /// The time here.
        now: UnixMillis,
    },
    /// Signed in the future.
    #[error(
        "{what} issued {skew} in the future, more than the limit of {limit}: one of the two clocks is wrong"
    )]
    ClockSkew {
        /// `order` or `quote`.
        what: &'static str,
        /// How far in the future.
        skew: Millis,
        /// How far it may be.
        limit: Millis,
    },
    /// A quote of another node than the one that was asked.
    #[error("quote is signed by {signer}, node {asked} was asked")]
    QuoteFromAnotherNode {
        /// Who signed.
        signer: PublicKey,
        /// Who was asked.
        asked: NodeId,
    },
    /// A quote that answers another question.
    #[error("quote answers another request")]
    QuoteForAnotherRequest,
    /// A quote that claims to hold longer than any may.
    #[error("lease of {given} exceeds the limit of {limit}")]
    LeaseTooLong {
        /// Longest lease.
        limit: Millis,
        /// Lease given.
        given: Millis,
    },
}

impl OrderError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Envelope(error) => error.code(),
            Self::OrderForAnotherNode { .. } => "order_for_another_node",
            Self::WrongJob { .. } => "wrong_job",
            Self::WrongSigner { .. } => "wrong_signer",
            Self::Expired { .. } => "expired",
            Self::ClockSkew { .. } => "clock_skew",
            Self::QuoteFromAnotherNode { .. } => "quote_from_another_node",
            Self::QuoteForAnotherRequest => "quote_for_another_request",
            Self::LeaseTooLong { .. } => "lease_too_long",
        }
    }
}

/// An order that was checked against its job, its node and the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidOrder {
    signer: PublicKey,
    order: Order,
}

impl ValidOrder {
    /// Checks a signed order. `now` is the node's clock.
    pub fn parse(
        envelope: &Envelope,
        network: &NetworkId,
        now: UnixMillis,
        node: &NodeId,
        job: &ValidJob,
    ) -> Result<Self, OrderError> {
        let opened = envelope.open::<Order>(network)?;
        let (signer, order) = (opened.signer, opened.value);
        if order.node != *node {
            return Err(OrderError::OrderForAnotherNode { addressed: order.node, here: *node });
        }
        if order.job != job.id() {
            return Err(OrderError::WrongJob { ordered: order.job, given: job.id() });
        }
        let of_requester = signer == PublicKey::from(job.requester());
        if !of_requester && !job.spec().custodians.contains(&NodeId::from(signer)) {
            return Err(OrderError::WrongSigner { signer });
        }
        check_times(
            "order",
            order.issued_at,
            order.issued_at.plus(Millis(ORDER_LIFE_MS + MAX_CLOCK_SKEW_MS)),
            now,
        )?;
        Ok(Self { signer, order })
    }

    /// Who ordered: the requester or a custodian.
    pub fn signer(&self) -> PublicKey {
        self.signer
    }

    /// The order.
    pub fn order(&self) -> &Order {
        &self.order
    }
}

/// A quote that was checked against the question and the node that was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidQuote {
    node: NodeId,
    quote: Quote,
}

impl ValidQuote {
    /// Checks a signed quote. How far clocks differ is not checked: see [`ValidQuote::skew`].
    pub fn parse(
        envelope: &Envelope,
        network: &NetworkId,
        asked: &NodeId,
        request: &QuoteRequest,
    ) -> Result<Self, OrderError> {
        let opened = envelope.open::<Quote>(network)?;
        let quote = opened.value;
        if NodeId::from(opened.signer) != *asked {
            return Err(OrderError::QuoteFromAnotherNode { signer: opened.signer, asked: *asked });
        }
        if quote.request != request.hash() || quote.requester != request.requester {
            return Err(OrderError::QuoteForAnotherRequest);
        }
        let given = quote.expires_at.since(quote.issued_at);
        if given.0 > MAX_LEASE_MS {
            return Err(OrderError::LeaseTooLong { limit: Millis(MAX_LEASE_MS), given });
        }
        Ok(Self { node: *asked, quote })
    }

    /// The node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The quote.
    pub fn quote(&self) -> &Quote {
        &self.quote
    }

    /// How long the place is held, from when the answer came: free of any clock difference.
    pub fn held_for(&self) -> Millis {
        self.quote.expires_at.since(self.quote.issued_at)
    }

    /// How far the node's clock is ahead of `now` in milliseconds; negative if it is behind.
    pub fn skew(&self, now: UnixMillis) -> i64 {
        let difference = i128::from(self.quote.issued_at.0) - i128::from(now.0);
        difference.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
    }
}

/// Refuses what is from the future or past its time.
pub(crate) fn check_times(
    what: &'static str,
    issued_at: UnixMillis,
    expires_at: UnixMillis,
    now: UnixMillis,
) -> Result<(), OrderError> {
    check_issued(issued_at, now).map_err(|skew| OrderError::ClockSkew {
        what,
        skew,
        limit: Millis(MAX_CLOCK_SKEW_MS),
    })?;
    if expires_at <= now {
        return Err(OrderError::Expired { what, expired_at: expires_at, now });
    }
    Ok(())
}

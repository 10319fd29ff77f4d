//! A no with its reason: which rule, its limit, what was given, and what to do instead.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::Text;
use crate::limits::{MAX_LINE, MAX_NAME};

/// Why a node says no. Every text is for people; the reason is for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The reason.
    pub reason: Reason,
    /// The rule, in the operator's or the protocol's words, such as `max_frames`.
    pub rule: Text<MAX_NAME>,
    /// The rule's limit; empty if it has none.
    pub limit: Text<MAX_LINE>,
    /// The value given; empty if there is none.
    pub given: Text<MAX_LINE>,
    /// What to do instead; empty if nothing helps.
    pub advice: Text<MAX_LINE>,
}

impl Refusal {
    /// A refusal by this rule. Overlong texts are cut.
    pub fn new(reason: Reason, rule: &str) -> Self {
        Self {
            reason,
            rule: Text::truncated(rule),
            limit: Text::default(),
            given: Text::default(),
            advice: Text::default(),
        }
    }

    /// Adds the limit and the value that passed it.
    #[must_use]
    pub fn limit(mut self, limit: impl fmt::Display, given: impl fmt::Display) -> Self {
        self.limit = Text::truncated(&limit.to_string());
        self.given = Text::truncated(&given.to_string());
        self
    }

    /// Adds the value alone.
    #[must_use]
    pub fn given(mut self, given: impl fmt::Display) -> Self {
        self.given = Text::truncated(&given.to_string());
        self
    }

    /// Adds what to do instead.
    #[must_use]
    pub fn advice(mut self, advice: &str) -> Self {
        self.advice = Text::truncated(advice);
        self
    }

    /// Stable name of the reason.
    pub fn code(&self) -> &'static str {
        self.reason.code()
    }
}

impl fmt::Display for Refusal {
    /// One sentence: "too many frames or too large (rule max_frames): 161 is beyond the limit of 97; ask for fewer".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.sentence())?;
        if !self.rule.is_empty() {
            write!(f, " (rule {})", &*self.rule)?;
        }
        let is_number = self.limit.starts_with(|first: char| first.is_ascii_digit());
        match (self.given.is_empty(), self.limit.is_empty()) {
            (false, false) if is_number => {
                write!(f, ": {} is beyond the limit of {}", &*self.given, &*self.limit)?;
            }
            (false, false) => write!(f, ": {} (allowed: {})", &*self.given, &*self.limit)?,
            (false, true) => write!(f, ": {}", &*self.given)?,
            (true, false) => write!(f, ": the limit is {}", &*self.limit)?,
            (true, true) => {}
        }
        if !self.advice.is_empty() {
            write!(f, "; {}", &*self.advice)?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident $code:literal $sentence:literal,)*) => {
        /// Why a node says no.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Stable name for the wire and for metrics.
            pub fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// What it means, for people.
            pub fn sentence(self) -> &'static str {
                match self { $(Self::$name => $sentence,)* }
            }
        }
    };
}

// The order is the wire's: new reasons go to the end.
reasons! {
    /// The model is not served here.
    ModelNotServed "model_not_served" "this node does not serve that model",
    /// The adapter is not served here.
    AdapterNotServed "adapter_not_served" "this node does not serve that adapter",
    /// The model cannot make such a clip.
    Impossible "impossible" "the model cannot make that",
    /// Beyond the operator's limits.
    TooLarge "too_large" "larger than this node takes",
    /// The prompt has more tokens than the model reads.
    PromptTooLong "prompt_too_long" "the prompt is longer than the model reads",
    /// An operation that this node does not know.
    UnknownOperation "unknown_operation" "this node does not know that operation",
    /// The requester has used up what this node gives.
    QuotaExceeded "quota_exceeded" "your share of this node is used up for now",
    /// The queue is full.
    QueueFull "queue_full" "this node's queue is full",
    /// The clip store is full.
    StoreFull "store_full" "this node has no room for another clip",
    /// Too much at once.
    Busy "busy" "this node is busy",
    /// The operator paused it.
    Paused "paused" "this node is paused by its operator",
    /// It is about to stop.
    Draining "draining" "this node is about to stop and takes no new jobs",
    /// The requester is on the operator's deny list.
    Denied "denied" "this node's operator does not serve this key",
    /// The operator serves others only.
    NotAllowed "not_allowed" "this node serves only those whom its operator listed",
    /// A rule about content or an operator's hook.
    ContentRule "content_rule" "a rule of this node's operator refuses it",
    /// A job with this nonce came before with another body.
    DuplicateNonce "duplicate_nonce" "another job with the same nonce came before",
    /// No such lease.
    LeaseUnknown "lease_unknown" "this node holds no such lease",
    /// The lease is over.
    LeaseExpired "lease_expired" "the lease is over",
    /// The order asks for more than the lease holds.
    LeaseMismatch "lease_mismatch" "the order differs from what the lease was given for",
    /// Too many leases at once.
    TooManyLeases "too_many_leases" "too many leases are held for you",
    /// No such job.
    JobUnknown "job_unknown" "this node knows no such job",
    /// Not the job's requester.
    NotYours "not_yours" "only the one who signed the job may ask that",
    /// Not well formed, badly signed, expired or addressed to another.
    Invalid "invalid" "the message is not valid",
    /// The clock of one of the two is wrong.
    ClockSkew "clock_skew" "the two clocks differ too much",
    /// The deadline cannot be met.
    DeadlineTooSoon "deadline_too_soon" "this node cannot be done by the deadline",
    /// No such blob, or none for you.
    BlobUnknown "blob_unknown" "this node has no such content",
    /// Inputs beyond the limit.
    InputsTooLarge "inputs_too_large" "the inputs are larger than this node takes",
    /// A fault of this node.
    Internal "internal" "this node has a fault",
    /// Not served by this release.
    NotSupported "not_supported" "this node's release cannot do that",
    /// Its copy of the content is not what it was.
    BlobDamaged "blob_damaged" "this node's copy of that content is damaged",
}

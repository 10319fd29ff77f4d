//! The rules that can refuse a job here, each with its reason on the wire and what to do instead.

use std::fmt;

use kinoflock_protocol::refusal::{Reason, Refusal};

macro_rules! rules {
    ($($name:ident $code:literal $reason:ident $advice:literal,)*) => {
        /// A rule that can refuse a job.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[expect(missing_docs, reason = "each is explained by its code, reason and advice in the table below")]
        pub enum Rule { $($name,)* }

        impl Rule {
            /// Every rule.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its stable name, on the wire and in metrics: the key of the configuration where there is one.
            #[must_use]
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// The reason that clients route by.
            #[must_use]
            pub const fn reason(self) -> Reason {
                match self { $(Self::$name => Reason::$reason,)* }
            }

            const fn advice(self) -> &'static str {
                match self { $(Self::$name => $advice,)* }
            }
        }
    };
}

rules! {
    PublicNotServed "serve.public" NotAllowed "ask another node",
    RequesterDenied "policy.deny" Denied "ask another node",
    RequesterNotAllowed "policy.allow" NotAllowed "ask another node",
    Model "policy.models" ModelNotServed "ask another node",
    NoDevice "device.models" ModelNotServed "ask another node",
    Width "max_width" TooLarge "ask for less width",
    Height "max_height" TooLarge "ask for less height",
    Frames "max_frames" TooLarge "ask for fewer frames",
    Steps "max_steps" TooLarge "ask for fewer steps",
    Memory "device.memory_limit" TooLarge "ask another node, or for a smaller or shorter clip",
    Work "max_work" TooLarge "ask for a smaller or shorter clip",
    Adapters "policy.adapter_bytes" AdapterNotServed "bring smaller or fewer adapters, or ask another node",
    QueuedJobs "policy.queued_jobs" QuotaExceeded "wait for one of your jobs here",
    WorkPerDay "policy.work_per_day" QuotaExceeded "ask another node, or tomorrow",
    Unacknowledged "policy.unacknowledged" QuotaExceeded "fetch your finished clips from this node first",
    StoreFull "storage.clips_limit" StoreFull "ask another node, or later",
    QueueFull "queue.jobs" QueueFull "ask another node, or later",
    QueuePrefix "queue.jobs_per_prefix" QueueFull "ask another node, or later",
    LeasesPerRequester "queue.leases_per_requester" TooManyLeases "use or release the quotes that you have",
    LeasesPerPrefix "queue.leases_per_prefix" TooManyLeases "ask again in some seconds",
    Leases "queue.leases" Busy "ask again in some seconds",
    LeaseUnknown "lease" LeaseUnknown "ask for a new quote",
    LeaseExpired "queue.lease" LeaseExpired "ask for a new quote",
    LeaseOther "lease.requester" LeaseMismatch "ask for a quote with the key that signs the job",
    LeaseShape "lease.job" LeaseMismatch "ask for a quote for this very job",
    NonceReused "job.nonce" DuplicateNonce "sign the job again with a new nonce",
    Deadline "job.deadline" DeadlineTooSoon "ask another node, or for a later deadline",
    Draining "drain" Draining "ask another node",
    Paused "pause" Paused "ask another node, or later",
    Hook "policy.hook" ContentRule "ask another node",
}

impl Rule {
    /// The refusal by this rule: what it allows, and what was given.
    #[must_use]
    pub fn refuse(self, limit: impl fmt::Display, given: impl fmt::Display) -> Refusal {
        Refusal::new(self.reason(), self.code()).limit(limit, given).advice(self.advice())
    }
}

/// Says a refusal's rule without its values: for metrics, whose labels are bounded.
#[must_use]
pub fn rule_of(refusal: &Refusal) -> Option<Rule> {
    Rule::ALL.iter().copied().find(|rule| rule.code() == &*refusal.rule)
}

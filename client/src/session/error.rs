//! What can go wrong between a prompt and a clip.

use kinoflock_net::{FetchError, NetError};
use kinoflock_protocol::audit::AuditError;
use kinoflock_protocol::list::ListError;
use kinoflock_protocol::{ClipId, EnvelopeError, JobId, Millis, NodeId, Refusal};

use crate::ask::AskError;
use crate::route::Declined;
use crate::route::advice::{self, Change, ReasonRecord};
use crate::store::StoreError;
use crate::verify::VerifyError;

/// Why a session could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The network failed.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What was asked cannot become a job.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// A statement could not be signed or was refused.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// An edition of a list was refused.
    #[error(transparent)]
    List(#[from] ListError),
    /// The system gave no random bytes.
    #[error("no random bytes from the system: {0}")]
    Random(getrandom::Error),
    /// Nobody to ask.
    #[error(
        "no node found; paste a ticket: kinoflock join TICKET, or use this machine: kinoflockd try{}",
        tried(reasons)
    )]
    NoNode {
        /// Each way that was tried, and why it led nowhere.
        reasons: Vec<(String, String)>,
    },
    /// No model at all is offered.
    #[error("no node that was found serves a model now:{}", lines(reasons))]
    NoModel {
        /// Each node.
        reasons: Vec<Declined>,
    },
    /// A model that nobody offers.
    #[error("unknown model {given:?}; {}{}{}", offered(known), did_you_mean(nearest), each(reasons))]
    UnknownModel {
        /// What was asked for.
        given: String,
        /// Names of those offered.
        known: Vec<String>,
        /// The nearest of them, if any is near.
        nearest: Option<String>,
        /// Each node, and what it serves instead.
        reasons: Vec<Declined>,
    },
    /// No model was named and several are offered.
    #[error("several models are offered, name one with --model: {}", known.join(", "))]
    SeveralModels {
        /// Names of those offered.
        known: Vec<String>,
    },
    /// A model's manifest could not be had.
    #[error("no node gave the manifest of model {model}: {reason}")]
    NoManifest {
        /// Which model.
        model: String,
        /// Why.
        reason: String,
    },
    /// Nobody takes the job.
    #[error("no node takes this job with model {model}:{}{}", lines(reasons), possible(reasons))]
    NoTaker {
        /// Name of the model.
        model: String,
        /// Each node and its reason.
        reasons: Vec<Declined>,
    },
    /// The node said no.
    #[error("node ...{}: {refusal}", node.short())]
    Refused {
        /// Which node.
        node: NodeId,
        /// Why.
        refusal: Box<Refusal>,
    },
    /// The node answered something else than was asked.
    #[error("node ...{} answered {given} to {asked}", node.short())]
    Unexpected {
        /// Which node.
        node: NodeId,
        /// The question.
        asked: &'static str,
        /// The answer.
        given: String,
    },
    /// The job failed at the node.
    #[error("job {} failed at its node{}: {text}{}", job.short(), named(code), again(*retryable))]
    Failed {
        /// Which job.
        job: JobId,
        /// Stable name of the cause.
        code: String,
        /// The cause for people.
        text: String,
        /// Whether another try may succeed.
        retryable: bool,
    },
    /// The job was stopped.
    #[error("job {} was cancelled", job.short())]
    Cancelled {
        /// Which job.
        job: JobId,
    },
    /// The node no longer knows the job.
    #[error("node ...{} knows no job {} any more; order it again", node.short(), job.short())]
    Lost {
        /// Which job.
        job: JobId,
        /// Which node.
        node: NodeId,
    },
    /// The node answers, but the job stands still.
    #[error("job {} stood still at node ...{} for {still}", job.short(), node.short())]
    Stalled {
        /// Which job.
        job: JobId,
        /// Which node.
        node: NodeId,
        /// How long.
        still: Millis,
    },
    /// The node stayed out of reach.
    #[error("node ...{} was out of reach for {waited}: {reason}; the job is kept, go on with: kinoflock wait {}", node.short(), job.short())]
    OutOfReach {
        /// Which job.
        job: JobId,
        /// Which node.
        node: NodeId,
        /// How long.
        waited: Millis,
        /// The last cause.
        reason: String,
    },
    /// What came is not what was asked for.
    #[error("{error}; the node was told so, do not use this clip")]
    Disputed {
        /// What is wrong.
        error: VerifyError,
    },
    /// There is nothing to audit.
    #[error("job {} cannot be audited: {}", job.short(), not_committed(*asked))]
    NotCommitted {
        /// Which job.
        job: JobId,
        /// Whether its node was asked to commit to its steps, and did not.
        asked: bool,
    },
    /// Nobody audited the job.
    #[error("no node audited job {}{}", job.short(), unaudited(reasons))]
    NotAudited {
        /// Which job.
        job: JobId,
        /// Each node that was asked, and why it did not.
        reasons: Vec<(String, String)>,
    },
    /// A verdict that is none.
    #[error("the auditor's verdict is refused: {0}")]
    Verdict(#[from] AuditError),
    /// A clip could not be fetched.
    #[error("clip {} could not be fetched: {error}", clip.short())]
    Fetch {
        /// Which clip.
        clip: ClipId,
        /// Why.
        error: FetchError,
    },
}

impl SessionError {
    /// Stable name for `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Net(error) => error.code(),
            Self::Store(error) => error.code(),
            Self::Ask(error) => error.code(),
            Self::Envelope(error) => error.code(),
            Self::List(error) => error.code(),
            Self::Random(_) => "random",
            Self::NoNode { .. } => "no_node",
            Self::NoModel { .. } => "no_model",
            Self::UnknownModel { .. } => "unknown_model",
            Self::SeveralModels { .. } => "several_models",
            Self::NoManifest { .. } => "no_manifest",
            Self::NoTaker { .. } => "no_taker",
            Self::Refused { refusal, .. } => refusal.code(),
            Self::Unexpected { .. } => "unexpected_answer",
            Self::Failed { .. } => "job_failed",
            Self::Cancelled { .. } => "job_cancelled",
            Self::Lost { .. } => "job_lost",
            Self::Stalled { .. } => "job_stalled",
            Self::OutOfReach { .. } => "out_of_reach",
            Self::Disputed { error } => error.code(),
            Self::NotCommitted { .. } => "not_committed",
            Self::NotAudited { .. } => "not_audited",
            Self::Verdict(error) => error.code(),
            Self::Fetch { .. } => "fetch",
        }
    }

    /// Each node's reason, if this is about nodes that declined.
    #[must_use]
    pub fn reasons(&self) -> Vec<ReasonRecord> {
        match self {
            Self::NoTaker { reasons, .. }
            | Self::NoModel { reasons }
            | Self::UnknownModel { reasons, .. } => reasons.iter().map(ReasonRecord::of).collect(),
            _ => Vec::new(),
        }
    }

    /// What change would make the job possible.
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        match self {
            Self::NoTaker { reasons, .. } => advice::changes(reasons),
            _ => Vec::new(),
        }
    }
}

fn tried(reasons: &[(String, String)]) -> String {
    reasons.iter().map(|(way, why)| format!("\n  tried {way}: {why}")).collect()
}

/// One node on the same line, several by their reasons.
fn lines(reasons: &[Declined]) -> String {
    if let [only] = reasons {
        return format!(" {only}");
    }
    advice::grouped(reasons).iter().map(|group| format!("\n  {group}")).collect()
}

/// What change would make it possible. A single node's reason says that itself, unless it knows nothing of it.
fn possible(reasons: &[Declined]) -> String {
    let changes = advice::changes(reasons);
    if reasons.len() > 1 {
        let lines: String = changes.iter().map(|change| format!("\n  - {change}")).collect();
        return if lines.is_empty() { lines } else { format!("\nwhat would help:{lines}") };
    }
    let untold = |change: &&Change| matches!(change, Change::Listed { .. } | Change::WithoutTerms { .. });
    changes.iter().filter(untold).map(|change| format!("; {change}")).collect()
}

fn not_committed(asked: bool) -> &'static str {
    if asked {
        "its node was asked to commit to its steps and did not"
    } else {
        "its node was not asked to commit to its steps; set audit_share above 0 before a job is made"
    }
}

fn unaudited(reasons: &[(String, String)]) -> String {
    if reasons.is_empty() {
        return "; no other node was found that serves its model".to_owned();
    }
    let reasons: Vec<_> = reasons.iter().map(|(node, why)| format!("{node}: {why}")).collect();
    format!(": {}", reasons.join("; "))
}

fn offered(known: &[String]) -> String {
    if known.is_empty() {
        "no node that was found serves a model now".to_owned()
    } else {
        format!("name one that is served with --model: {}", known.join(", "))
    }
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or_else(String::new, |name| format!("; did you mean {name:?}?"))
}

/// Nothing of a single node, whose models are told already.
fn each(reasons: &[Declined]) -> String {
    if reasons.len() > 1 { lines(reasons) } else { String::new() }
}

/// The cause's name, unless only the failure itself is known.
fn named(code: &str) -> String {
    if code.is_empty() || code == "failed" { String::new() } else { format!(" ({code})") }
}

fn again(retryable: bool) -> &'static str {
    if retryable { "; another try may succeed" } else { "" }
}

//! What the store remembers of a job and of a clip.

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::{ClipId, Envelope, JobId, Millis, ModelId, NetworkId, NodeId, UnixMillis};
use serde::{Deserialize, Serialize};

/// A job as the artist's machine knows it. Whatever is signed is kept as it was signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Which job.
    pub job: JobId,
    /// In which network.
    pub network: NetworkId,
    /// The signed job, with its prompt.
    pub envelope: Envelope,
    /// The signed order.
    pub order: Option<Envelope>,
    /// The node that has it.
    pub node: NodeId,
    /// The name that the node gave itself.
    pub node_name: String,
    /// Where the node was reached.
    pub addresses: Vec<String>,
    /// With which model.
    pub model: ModelId,
    /// The name by which the node offered it.
    pub model_name: String,
    /// When the record was made, by this machine's clock.
    pub created_at: UnixMillis,
    /// When it was last changed, by this machine's clock.
    pub updated_at: UnixMillis,
    /// How far the node's clock is ahead of this machine's, in milliseconds.
    pub clock_skew_ms: i64,
    /// How long the node said that it would take, when it took it.
    #[serde(default)]
    pub told: Option<Millis>,
    /// How it stands.
    pub state: RecordState,
    /// Sequence number of the next event wanted.
    pub next_seq: u64,
    /// Why it failed.
    pub error: Option<RecordError>,
    /// The node's signed receipt.
    pub receipt: Option<Envelope>,
    /// The clip of the receipt.
    pub clip: Option<BlobRef>,
    /// The latents of the receipt.
    pub latents: Option<BlobRef>,
    /// The artist's signed answer to the receipt.
    pub answer: Option<Envelope>,
    /// Whether the node heard the answer.
    pub answered: bool,
    /// Whether only nodes may have it that neither train on what they see nor claim rights.
    #[serde(default)]
    pub require_terms: bool,
    /// Whether only the nodes that were named for it may have it.
    #[serde(default)]
    pub pinned: bool,
    /// Nodes that had it before, or may have it, and are not to do it any more.
    #[serde(default)]
    pub former: Vec<Former>,
    /// The newest signed checkpoint whose state is in the store.
    #[serde(default)]
    pub checkpoint: Option<Envelope>,
    /// Nodes that hold the signed job and watch it while this machine is away.
    #[serde(default)]
    pub custodians: Vec<Custodian>,
    /// Nodes that hold sealed copies of the clip.
    #[serde(default)]
    pub holders: Vec<Holder>,
    /// By what a batch finds it again, if it came from one.
    #[serde(default)]
    pub batch: Option<BatchKey>,
    /// Who may audit it, and what came of that.
    #[serde(default)]
    pub audits: Audits,
}

/// Most verdicts that are kept of one job; the oldest make room.
pub const MAX_VERDICTS: usize = 8;

/// Audits of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audits {
    /// Percent of such jobs that are audited.
    pub share: u8,
    /// Nodes of which the artist was told that they may.
    pub auditors: Vec<Auditor>,
    /// Whether this one was drawn; not known before its clip is here.
    pub drawn: Option<bool>,
    /// The signed verdicts, the newest last.
    pub verdicts: Vec<Envelope>,
}

/// A node that may audit a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Auditor {
    /// Which node.
    pub node: NodeId,
    /// The name that it gave itself.
    pub name: String,
    /// Where it was reached.
    pub addresses: Vec<String>,
}

/// What names one line of a batch file whatever process reads it: the file, what the line says, and which of several
/// equal lines it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BatchKey(String);

impl BatchKey {
    /// The key of a line.
    #[must_use]
    pub fn of(file: &std::path::Path, line: &str, number_of_its_like: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("kinoflock/1/batch-line");
        for part in [file.as_os_str().as_encoded_bytes(), line.as_bytes()] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.update(&number_of_its_like.to_le_bytes());
        Self(hasher.finalize().to_hex().to_string())
    }
}

/// A node that watches a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Custodian {
    /// Which node.
    pub node: NodeId,
    /// The name that it gave itself.
    pub name: String,
    /// Where it was reached.
    pub addresses: Vec<String>,
    /// Whether it has said that it holds the job, where it runs now.
    pub told: bool,
}

/// A node that holds a sealed copy of a clip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Which node.
    pub node: NodeId,
    /// The sealed clip; not known before the node was asked.
    pub sealed: Option<BlobRef>,
}

/// A node from which a job was taken away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Former {
    /// Which node.
    pub node: NodeId,
    /// Where it was reached.
    pub addresses: Vec<String>,
    /// How far its clock is ahead, in milliseconds.
    pub clock_skew_ms: i64,
    /// Stable name of the cause.
    pub why: String,
    /// Whether it heard that it need not go on.
    pub cancelled: bool,
}

impl Former {
    /// The node that has this job now, from which it is taken.
    #[must_use]
    pub fn of(record: &JobRecord, why: &str) -> Self {
        let JobRecord { node, addresses, clock_skew_ms, .. } = record;
        let (addresses, why) = (addresses.clone(), why.to_owned());
        Self { node: *node, addresses, clock_skew_ms: *clock_skew_ms, why, cancelled: false }
    }
}

/// How a job stands, as far as this machine knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordState {
    /// Signed; whether the node took it is not known.
    Sent,
    /// The node has it in its queue.
    Queued,
    /// The node computes.
    Running,
    /// The node is done; the clip is not here yet.
    Made,
    /// The clip is here and what was asked for.
    Done,
    /// The clip is not what was asked for; the node was told so.
    Disputed,
    /// It failed at the node.
    Failed,
    /// It was stopped.
    Cancelled,
}

impl RecordState {
    /// Whether nothing more is to be done.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Disputed | Self::Failed | Self::Cancelled)
    }

    /// Stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Made => "made",
            Self::Done => "done",
            Self::Disputed => "disputed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordError {
    /// Stable name of the cause.
    pub code: String,
    /// The cause for people.
    pub text: String,
    /// Whether another node may succeed.
    #[serde(default)]
    pub retryable: bool,
}

/// A clip that came by a ticket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipRecord {
    /// Which clip.
    pub clip: ClipId,
    /// Its length in bytes.
    pub len: u64,
    /// When it came, by this machine's clock.
    pub got_at: UnixMillis,
    /// The ticket that it came by.
    pub ticket: String,
}

//! The control protocol: one question, one answer. And the first words on a blob stream.
//!
//! Every frame begins with the protocol version, so that a peer of another version hears "speaks 1, you sent 2" and
//! never a decode error: [`encode_request`], [`decode_request`], [`encode_response`], [`decode_response`]. The
//! answer [`Response::UnsupportedVersion`] itself has a form that all versions keep: the bytes `0, speaks, sent`.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::audit::{AuditOrder, AuditReply, AuditState};
use crate::clip::{BlobRef, Outline};
use crate::codec::{self, Bytes, CodecError, List, Text, text_u64};
use crate::custody::{Held, Look, MirroredInputs, Seen};
use crate::envelope::Envelope;
use crate::id::{BlobId, JobId, LeaseId, ModelId};
use crate::limits::*;
use crate::list::ListName;
use crate::order::QuoteRequest;
use crate::progress::{ProgressFrame, ProgressOpen};
use crate::refusal::Refusal;
use crate::units::{Millis, UnixMillis};
use crate::work::JobShape;

/// A question to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Your own advert?
    Capacity,
    /// Whose adverts do you know that match?
    FindNodes(FindNodes),
    /// Could you, and when?
    Quote(QuoteRequest),
    /// Do this job.
    Submit {
        /// The signed [`crate::order::Order`].
        order: Envelope,
        /// The signed [`crate::job::JobSpec`].
        job: Envelope,
        /// Where large inputs lie, if this node cannot have them from the sender.
        mirrored: Option<Box<MirroredInputs>>,
    },
    /// How does the job stand? A signed [`crate::query::JobQuery`].
    Status(Envelope),
    /// Stop the job. A signed [`crate::query::JobQuery`].
    Cancel(Envelope),
    /// Here is the answer to your receipt. A signed [`crate::receipt::ReceiptAnswer`].
    Answer(Envelope),
    /// I do not need the place that you hold.
    Release {
        /// Which lease.
        lease: LeaseId,
        /// Why, for the node's own figures.
        reason: ReleaseReason,
    },
    /// The manifest of this model?
    Manifest(ModelId),
    /// Cards about this model?
    Cards(ModelId),
    /// Watch this job while its client is away.
    Custody {
        /// The signed [`crate::custody::Custody`].
        custody: Envelope,
        /// The signed [`crate::job::JobSpec`].
        job: Envelope,
    },
    /// Hold this sealed blob. A signed [`crate::custody::Keep`].
    Keep(Envelope),
    /// What do you hold for the job? A signed [`crate::query::JobQuery`].
    Held(Envelope),
    /// Forget the job. A signed [`crate::query::JobQuery`].
    Forget(Envelope),
    /// Can you see me, as a stranger would?
    Look(Look),
    /// The newest edition of this list that you know?
    List(ListName),
    /// Show me this step of a finished job.
    Audit {
        /// The signed [`crate::audit::AuditRequest`].
        request: Envelope,
        /// The requester's signed [`crate::audit::AuditGrant`], where another asks.
        grant: Option<Envelope>,
    },
    /// Here is an edition of a list that you may hold. A signed [`crate::list::NodeList`] or [`crate::list::ModelList`].
    Publish(Envelope),
    /// Audit this finished job of another node; and, asked again, how does that stand?
    OrderAudit(Box<AuditOrder>),
}

impl Request {
    /// Stable name for metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Capacity => "capacity",
            Self::FindNodes(_) => "find_nodes",
            Self::Quote(_) => "quote",
            Self::Submit { .. } => "submit",
            Self::Status(_) => "status",
            Self::Cancel(_) => "cancel",
            Self::Answer(_) => "answer",
            Self::Release { .. } => "release",
            Self::Manifest(_) => "manifest",
            Self::Cards(_) => "cards",
            Self::Custody { .. } => "custody",
            Self::Keep(_) => "keep",
            Self::Held(_) => "held",
            Self::Forget(_) => "forget",
            Self::Look(_) => "look",
            Self::List(_) => "list",
            Self::Audit { .. } => "audit",
            Self::Publish(_) => "publish",
            Self::OrderAudit(_) => "order_audit",
        }
    }
}

/// Which adverts are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindNodes {
    /// Of nodes that serve this model; any if none is given.
    pub model: Option<ModelId>,
    /// Of nodes that take jobs of this shape; any if none is given.
    pub shape: Option<JobShape>,
    /// At most so many, and never more than [`MAX_NODES`].
    pub limit: u32,
    /// Whether whoever is asked may ask others where it knows few itself. False in what is passed on.
    pub forward: bool,
}

/// Why a place is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReleaseReason {
    /// Another node was chosen.
    ChoseAnother,
    /// The artist changed their mind.
    Cancelled,
    /// Another was expected to be done so much sooner.
    Sooner(Millis),
    /// Another answered sooner.
    Latency,
    /// Another's jobs have ended well more often.
    Reliability,
}

impl ReleaseReason {
    /// Stable name for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::ChoseAnother => "chose_another",
            Self::Cancelled => "cancelled",
            Self::Sooner(_) => "sooner",
            Self::Latency => "latency",
            Self::Reliability => "reliability",
        }
    }
}

/// A node's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// Its signed [`crate::capacity::Capacity`].
    Capacity(Envelope),
    /// Signed adverts that it knows.
    Nodes(List<Envelope, MAX_NODES>),
    /// A signed [`crate::order::Quote`].
    Quote(Envelope),
    /// The job is durably in the queue.
    Accepted {
        /// Which job.
        job: JobId,
        /// Jobs ahead.
        position: u32,
        /// Time until it is done.
        eta: Millis,
    },
    /// How the job stands.
    Status(JobStatus),
    /// The job is stopped, or will be within a step.
    Cancelled {
        /// Which job.
        job: JobId,
    },
    /// Heard.
    Acknowledged,
    /// The encoded [`crate::model::ModelManifest`].
    Manifest(Bytes<MAX_MANIFEST>),
    /// Signed [`crate::card::Card`]s.
    Cards(List<Envelope, MAX_CARDS>),
    /// No, and why.
    Refused(Refusal),
    /// Ask again later.
    Busy {
        /// How much later.
        retry_after: Millis,
    },
    /// The question is of a version that this node does not speak.
    UnsupportedVersion {
        /// Version that it speaks.
        speaks: u8,
        /// Version that was sent.
        sent: u8,
    },
    /// A fault, of the question or of the node.
    Error {
        /// Stable name.
        code: Text<MAX_NAME>,
        /// For people.
        text: Text<MAX_LINE>,
    },
    /// The sealed blob is on disk here.
    Kept {
        /// How long it stays, at most.
        until: UnixMillis,
    },
    /// What is held here for a job.
    Held(Held),
    /// Nothing of the job is here any more but its receipt.
    Forgotten {
        /// Which job.
        job: JobId,
    },
    /// What was seen.
    Seen(Seen),
    /// The signed list.
    List(Envelope),
    /// Some states of a finished job.
    Audit(AuditReply),
    /// How an ordered audit stands.
    AuditState(AuditState),
}

impl Response {
    /// Stable name for metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Capacity(_) => "capacity",
            Self::Nodes(_) => "nodes",
            Self::Quote(_) => "quote",
            Self::Accepted { .. } => "accepted",
            Self::Status(_) => "status",
            Self::Cancelled { .. } => "cancelled",
            Self::Acknowledged => "acknowledged",
            Self::Manifest(_) => "manifest",
            Self::Cards(_) => "cards",
            Self::Refused(_) => "refused",
            Self::Busy { .. } => "busy",
            Self::UnsupportedVersion { .. } => "unsupported_version",
            Self::Error { .. } => "error",
            Self::Kept { .. } => "kept",
            Self::Held(_) => "held",
            Self::Forgotten { .. } => "forgotten",
            Self::Seen(_) => "seen",
            Self::List(_) => "list",
            Self::Audit(_) => "audit",
            Self::AuditState(_) => "audit_state",
        }
    }

    /// An error answer. Overlong texts are cut.
    pub fn error(code: &str, text: &str) -> Self {
        Self::Error { code: Text::truncated(code), text: Text::truncated(text) }
    }
}

/// How a job stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobStatus {
    /// Which job.
    pub job: JobId,
    /// State.
    pub state: JobState,
    /// Sequence number of its newest event.
    #[serde(with = "text_u64")]
    pub seq: u64,
    /// Jobs ahead.
    pub position: u32,
    /// Time until it is done.
    pub eta: Millis,
    /// The signed [`crate::receipt::Receipt`], when it is done.
    pub receipt: Option<Envelope>,
    /// Nodes that hold sealed copies of the clip.
    pub replicas: List<crate::id::NodeId, MAX_NODES>,
    /// Why, when it failed.
    pub error: Option<JobFailure>,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFailure {
    /// Stable name of the cause.
    pub code: Text<MAX_NAME>,
    /// The cause for people.
    pub text: Text<MAX_LINE>,
    /// Whether another node may succeed.
    pub retryable: bool,
}

/// State of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum JobState {
    /// Its inputs are being fetched.
    AwaitingInputs,
    /// It waits.
    Queued,
    /// It runs.
    Running,
    /// The clip is there.
    Done,
    /// It failed.
    Failed,
    /// It was stopped on the requester's word.
    Cancelled,
}

impl JobState {
    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::AwaitingInputs => "awaiting_inputs",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The first frame of a blob stream, from the one who fetches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRequest {
    /// Which blob.
    pub id: BlobId,
    /// Whether the outline is to come first.
    pub outline: bool,
    /// First chunk wanted, from 0.
    #[serde(with = "text_u64")]
    pub first_chunk: u64,
    /// Number of chunks wanted; 0 for the outline alone.
    #[serde(with = "text_u64")]
    pub chunks: u64,
}

/// The first frame of a blob stream, from the holder. If the outline was asked for, it is in here; after it come
/// the chunks, each a frame of its raw bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlobReply {
    /// Chunks follow.
    Found {
        /// The blob and its length.
        blob: BlobRef,
        /// Its outline, if it was asked for.
        outline: Option<Outline>,
    },
    /// No such blob here, or none for you.
    NotFound,
    /// Too many streams; ask again later.
    Busy {
        /// How much later.
        retry_after: Millis,
    },
    /// No, and why.
    Refused(Refusal),
}

/// Why a frame is no question or answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RpcError {
    /// A peer of another protocol version.
    #[error("speaks protocol version {speaks}, you sent {sent}")]
    UnsupportedVersion {
        /// Version spoken.
        speaks: u8,
        /// Version sent.
        sent: u8,
    },
    /// A frame without a version byte.
    #[error("empty frame: not even a protocol version")]
    Empty,
    /// Not the bytes of a message.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

impl RpcError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnsupportedVersion { .. } => "unsupported_version",
            Self::Empty => "empty",
            Self::Codec(error) => error.code(),
        }
    }
}

/// Version byte and question.
pub fn encode_request(request: &Request) -> Vec<u8> {
    encode(request)
}

/// A question from the content of a frame.
pub fn decode_request(frame: &[u8]) -> Result<Request, RpcError> {
    decode(frame, MAX_CONTROL_FRAME)
}

/// Version byte and answer; the answer to an unknown version in the form that all versions read.
pub fn encode_response(response: &Response) -> Vec<u8> {
    match response {
        Response::UnsupportedVersion { speaks, sent } => vec![0, *speaks, *sent],
        other => encode(other),
    }
}

/// An answer from the content of a frame.
pub fn decode_response(frame: &[u8]) -> Result<Response, RpcError> {
    if let [0, speaks, sent] = *frame {
        return Ok(Response::UnsupportedVersion { speaks, sent });
    }
    let response = decode(frame, MAX_CONTROL_FRAME)?;
    if matches!(response, Response::UnsupportedVersion { .. }) {
        return Err(CodecError::NotCanonical.into());
    }
    Ok(response)
}

/// A message of a progress or blob stream: [`ProgressOpen`], [`ProgressFrame`], [`BlobRequest`], [`BlobReply`].
pub trait StreamMessage: Serialize + DeserializeOwned {
    /// Greatest frame in bytes, without the length prefix.
    const MAX_FRAME: usize;
}

impl StreamMessage for ProgressOpen {
    const MAX_FRAME: usize = MAX_OPEN_FRAME;
}
impl StreamMessage for ProgressFrame {
    const MAX_FRAME: usize = MAX_PROGRESS_FRAME;
}
impl StreamMessage for BlobRequest {
    const MAX_FRAME: usize = MAX_OPEN_FRAME;
}
impl StreamMessage for BlobReply {
    const MAX_FRAME: usize = MAX_OUTLINE_FRAME;
}

/// Version byte and stream message.
pub fn encode_stream<T: StreamMessage>(message: &T) -> Vec<u8> {
    encode(message)
}

/// A stream message from the content of a frame.
pub fn decode_stream<T: StreamMessage>(frame: &[u8]) -> Result<T, RpcError> {
    decode(frame, T::MAX_FRAME)
}

/// The frame that answers a stream of an unknown version, in the form that all versions read.
pub fn unsupported_version(sent: u8) -> [u8; 3] {
    [0, PROTOCOL_VERSION, sent]
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut frame = vec![PROTOCOL_VERSION];
    frame.extend_from_slice(&codec::encode(value));
    frame
}

fn decode<T: DeserializeOwned>(frame: &[u8], max: usize) -> Result<T, RpcError> {
    if let [0, speaks, sent] = *frame {
        return Err(RpcError::UnsupportedVersion { speaks, sent });
    }
    let (sent, body) = frame.split_first().ok_or(RpcError::Empty)?;
    if !SPOKEN_VERSIONS.contains(sent) {
        return Err(RpcError::UnsupportedVersion { speaks: PROTOCOL_VERSION, sent: *sent });
    }
    Ok(codec::decode(body, max - 1)?)
}

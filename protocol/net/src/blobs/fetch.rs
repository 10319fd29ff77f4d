//! The fetching side: one plan, several holders, every chunk verified before the sink sees it.
//!
//! Each holder is one worker. It opens a stream, learns the blob's length, and brings an outline if none that
//! merges to the id is there yet. Then it claims runs of missing chunks, as long as there are any; what a
//! worker had claimed when it failed goes back to the plan and to the others.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use kinoflock_protocol::clip::{Outline, chunk_count, chunk_len};
use kinoflock_protocol::limits::MAX_BLOB_BYTES;
use kinoflock_protocol::{BlobId, NodeId, Reason, Refusal};
use tokio::sync::watch;

use super::BlobSink;
use crate::error::NetError;
use crate::handle::NetHandle;
use crate::limits;

mod worker;

/// How a blob is fetched.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// Greatest blob that is wanted, bytes. A holder that tells more is dropped before anything is read.
    pub max_len: u64,
    /// A holder that sends nothing for this long is dropped.
    pub stall: Duration,
    /// A holder that needs longer for one chunk is dropped.
    pub chunk_timeout: Duration,
    /// A large blob whose holder is reached over a relay only waits so long for a direct connection.
    pub direct_wait: Duration,
    /// Told after every chunk.
    pub progress: Option<watch::Sender<FetchProgress>>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            max_len: MAX_BLOB_BYTES,
            stall: limits::BLOB_STALL,
            chunk_timeout: limits::BLOB_CHUNK_TIMEOUT,
            direct_wait: limits::DIRECT_WAIT,
            progress: None,
        }
    }
}

/// How far a fetch has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FetchProgress {
    /// Length of the blob in bytes; 0 until a holder has told.
    pub len: u64,
    /// Verified bytes, those included that the sink had.
    pub done: u64,
}

/// How a fetch went.
#[derive(Debug, Clone)]
pub struct FetchReport {
    /// Length of the blob in bytes.
    pub len: u64,
    /// Bytes that the sink had before.
    pub had: u64,
    /// What each holder that was asked gave.
    pub holders: Vec<HolderReport>,
}

/// What one holder gave.
#[derive(Debug, Clone)]
pub struct HolderReport {
    /// The holder.
    pub node: NodeId,
    /// Verified bytes that came from it.
    pub bytes: u64,
    /// Why it was dropped, if it was.
    pub fault: Option<HolderFault>,
}

/// Why a holder was dropped.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum HolderFault {
    /// It could not be reached, or its connection or stream broke.
    #[error(transparent)]
    Net(#[from] NetError),
    /// It does not have the blob.
    #[error("does not have it")]
    NotFound,
    /// It is at a limit of its own, and stayed there.
    #[error("is busy")]
    Busy,
    /// It will not serve it.
    #[error("refused: {0}")]
    Refused(Box<Refusal>),
    /// By its word, the blob is too large.
    #[error("says that it has {given} bytes, at most {limit} are wanted")]
    TooLarge {
        /// The limit, bytes.
        limit: u64,
        /// What it says, bytes.
        given: u64,
    },
    /// Its chaining values do not merge to the id, or its length is another than theirs.
    #[error("told of another blob: {why}")]
    WrongOutline {
        /// What was wrong.
        why: String,
    },
    /// It sent a chunk with a wrong byte.
    #[error("sent wrong bytes in chunk {index}")]
    WrongChunk {
        /// The chunk.
        index: u64,
    },
    /// It sent nothing for too long.
    #[error("sent nothing for {limit_ms} ms")]
    Stalled {
        /// The limit, milliseconds.
        limit_ms: u64,
    },
    /// It was too slow.
    #[error("needed more than {limit_ms} ms for a chunk")]
    TooSlow {
        /// The limit, milliseconds.
        limit_ms: u64,
    },
}

impl HolderFault {
    /// A short name for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Net(error) => error.code(),
            Self::NotFound => "holder_not_found",
            Self::Busy => "holder_busy",
            Self::Refused(_) => "holder_refused",
            Self::TooLarge { .. } => "holder_too_large",
            Self::WrongOutline { .. } => "holder_wrong_outline",
            Self::WrongChunk { .. } => "holder_wrong_chunk",
            Self::Stalled { .. } => "holder_stalled",
            Self::TooSlow { .. } => "holder_too_slow",
        }
    }

    /// Whether it is a lie, as opposed to a weakness.
    #[must_use]
    pub fn is_lie(&self) -> bool {
        matches!(self, Self::WrongOutline { .. } | Self::WrongChunk { .. })
    }

    /// Whether the holder itself found that its copy is not what it was.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.reason == Reason::BlobDamaged)
    }
}

/// Why a blob was not fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Nobody to ask.
    #[error("no holder of {id} is known")]
    NoHolders {
        /// The blob.
        id: BlobId,
    },
    /// Every holder failed.
    #[error("no holder gave {id}: {}", told(.holders))]
    AllFailed {
        /// The blob.
        id: BlobId,
        /// Each holder with its fault.
        holders: Vec<HolderReport>,
    },
    /// The blob is larger than wanted, by the word of those who have it.
    #[error("{id} has {given} bytes, at most {limit} are wanted")]
    TooLarge {
        /// The blob.
        id: BlobId,
        /// The limit, bytes.
        limit: u64,
        /// What the last holder said, bytes.
        given: u64,
    },
    /// The sink failed.
    #[error("cannot write {id}: {error}")]
    Sink {
        /// The blob.
        id: BlobId,
        /// What it met.
        error: io::Error,
    },
}

impl FetchError {
    /// A short name for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoHolders { .. } => "fetch_no_holders",
            Self::AllFailed { .. } => "fetch_all_failed",
            Self::TooLarge { .. } => "fetch_too_large",
            Self::Sink { .. } => "fetch_sink",
        }
    }
}

fn told(holders: &[HolderReport]) -> String {
    let one = |report: &HolderReport| match &report.fault {
        Some(fault) => format!("{} {fault}", report.node),
        None => format!("{} gave {} bytes", report.node, report.bytes),
    };
    holders.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// What the workers of one fetch share.
struct Shared<S> {
    handle: NetHandle,
    id: BlobId,
    options: FetchOptions,
    holders: usize,
    plan: Mutex<Plan>,
    /// Held while one worker installs its outline and the sink begins.
    installing: tokio::sync::Mutex<()>,
    /// Counts changes that waiting workers want to hear of.
    changed: watch::Sender<u64>,
    sink: Arc<Mutex<S>>,
}

#[derive(Default)]
struct Plan {
    outline: Option<Arc<Outline>>,
    missing: BTreeSet<u64>,
    claimed: BTreeSet<u64>,
    had: u64,
    done: u64,
    bytes_of: BTreeMap<NodeId, u64>,
    /// The sink's error: the fetch is over.
    broken: Option<io::Error>,
}

impl Plan {
    fn is_complete(&self) -> bool {
        self.outline.is_some() && self.missing.is_empty() && self.claimed.is_empty()
    }

    /// Takes the next run of missing chunks, at most `most`.
    fn claim(&mut self, most: u64) -> Option<std::ops::Range<u64>> {
        let first = *self.missing.first()?;
        let mut end = first;
        while end - first < most && self.missing.remove(&end) {
            self.claimed.insert(end);
            end += 1;
        }
        Some(first..end)
    }
}

/// Fetches a blob; see [`NetHandle::fetch_blob`].
pub(crate) async fn fetch<S: BlobSink>(
    handle: &NetHandle,
    id: BlobId,
    holders: &[NodeId],
    sink: S,
    options: FetchOptions,
) -> Result<(S, FetchReport), FetchError> {
    let mut distinct = BTreeSet::new();
    let mut waiting = holders.iter().copied().filter(|node| distinct.insert(*node)).collect::<Vec<_>>();
    waiting.retain(|node| *node != handle.local_node());
    waiting.reverse();
    if waiting.is_empty() {
        return Err(FetchError::NoHolders { id });
    }
    let shared = Shared {
        handle: handle.clone(),
        id,
        options,
        holders: waiting.len().min(limits::BLOB_HOLDERS),
        plan: Mutex::new(Plan::default()),
        installing: tokio::sync::Mutex::new(()),
        changed: watch::channel(0).0,
        sink: Arc::new(Mutex::new(sink)),
    };
    let mut faults = BTreeMap::new();
    let mut asked = Vec::new();
    let mut working = FuturesUnordered::new();
    while !shared.is_over() {
        while working.len() < limits::BLOB_HOLDERS
            && let Some(node) = waiting.pop()
        {
            asked.push(node);
            let work = shared.work(node);
            working.push(async move { (node, work.await) });
        }
        match working.next().await {
            Some((_, Ok(()))) => {}
            Some((node, Err(fault))) => {
                tracing::info!(blob = %id, peer = %node, %fault, code = fault.code(), "holder_dropped");
                faults.insert(node, fault);
            }
            None => break,
        }
    }
    drop(working);
    conclude(shared, asked, faults).await
}

/// What came of it: the sink is finished only when every chunk is there.
async fn conclude<S: BlobSink>(
    shared: Shared<S>,
    asked: Vec<NodeId>,
    mut faults: BTreeMap<NodeId, HolderFault>,
) -> Result<(S, FetchReport), FetchError> {
    let Shared { id, plan, sink, .. } = shared;
    let plan = plan.into_inner().expect("invariant: no panic while the lock is held");
    if let Some(error) = plan.broken {
        return Err(FetchError::Sink { id, error });
    }
    let report = |node: NodeId| HolderReport {
        node,
        bytes: plan.bytes_of.get(&node).copied().unwrap_or_default(),
        fault: faults.remove(&node),
    };
    let holders: Vec<HolderReport> = asked.into_iter().map(report).collect();
    let outline = match &plan.outline {
        Some(outline) if plan.missing.is_empty() && plan.claimed.is_empty() => Arc::clone(outline),
        _ => return Err(all_failed(id, holders)),
    };
    let finishing = Arc::clone(&sink);
    with_sink(finishing, |sink| sink.finish()).await.map_err(|error| FetchError::Sink { id, error })?;
    let sink = Arc::into_inner(sink).expect("invariant: every worker has ended");
    let sink = sink.into_inner().expect("invariant: no panic while the lock is held");
    Ok((sink, FetchReport { len: outline.len, had: plan.had, holders }))
}

fn all_failed(id: BlobId, holders: Vec<HolderReport>) -> FetchError {
    let too_large = holders.iter().rev().find_map(|report| match report.fault {
        Some(HolderFault::TooLarge { limit, given }) => Some((limit, given)),
        _ => None,
    });
    match too_large {
        Some((limit, given)) => FetchError::TooLarge { id, limit, given },
        None => FetchError::AllFailed { id, holders },
    }
}

/// Runs a sink's operation on the blocking pool.
async fn with_sink<S: BlobSink, T: Send + 'static>(
    sink: Arc<Mutex<S>>,
    work: impl FnOnce(&mut S) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let work = move || {
        let mut sink = sink.lock().map_err(|_| io::Error::other("the sink has panicked"))?;
        let outcome = work(&mut sink);
        drop(sink);
        outcome
    };
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

impl<S: BlobSink> Shared<S> {
    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().expect("invariant: no panic while the lock is held")
    }

    fn is_over(&self) -> bool {
        let plan = self.plan();
        plan.broken.is_some() || plan.is_complete()
    }

    fn outline(&self) -> Option<Arc<Outline>> {
        self.plan().outline.clone()
    }

    /// Makes a checked outline the plan's, unless there is one, and lets the sink begin.
    async fn install(&self, outline: Arc<Outline>) -> Arc<Outline> {
        let _one = self.installing.lock().await;
        if let Some(installed) = self.outline() {
            return installed;
        }
        let begun = Arc::clone(&outline);
        let kept = with_sink(Arc::clone(&self.sink), move |sink| sink.begin(&begun)).await;
        let mut plan = self.plan();
        match kept {
            Ok(kept) => {
                plan.missing = (0..chunk_count(outline.len)).collect();
                for index in kept {
                    if plan.missing.remove(&index) {
                        plan.had += chunk_len(index, outline.len).unwrap_or_default() as u64;
                    }
                }
                plan.done = plan.had;
            }
            Err(error) => plan.broken = Some(error),
        }
        plan.outline = Some(Arc::clone(&outline));
        self.tell(&plan);
        outline
    }

    fn claim(&self) -> Option<std::ops::Range<u64>> {
        let mut plan = self.plan();
        let fair = plan.missing.len() as u64 / (2 * self.holders as u64);
        plan.claim(fair.clamp(1, limits::BLOB_RUN))
    }

    fn unclaim(&self, indexes: impl IntoIterator<Item = u64>) {
        let mut plan = self.plan();
        for index in indexes {
            if plan.claimed.remove(&index) {
                plan.missing.insert(index);
            }
        }
        self.tell(&plan);
    }

    fn written(&self, node: NodeId, index: u64, outcome: io::Result<u64>) {
        let mut plan = self.plan();
        match outcome {
            Ok(bytes) => {
                plan.claimed.remove(&index);
                plan.done += bytes;
                *plan.bytes_of.entry(node).or_default() += bytes;
            }
            Err(error) => plan.broken = Some(error),
        }
        self.tell(&plan);
    }

    fn tell(&self, plan: &Plan) {
        if let (Some(progress), Some(outline)) = (&self.options.progress, &plan.outline) {
            progress.send_replace(FetchProgress { len: outline.len, done: plan.done });
        }
        self.changed.send_modify(|count| *count += 1);
    }
}

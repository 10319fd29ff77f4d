//! The durable side of jobs: what was accepted, how it ended, and the chain of receipts. redb, one writer thread.
//!
//! - Every write is whole or not at all, and synced before its future resolves: answer `Accepted` after
//!   [`Queue::admit`]. Writes that wait together share a commit.
//! - The order of writes is the order of calls, whichever task makes them.
//! - [`Queue::finish`] writes a job's end and its receipt in one commit; the receipt's sequence and previous id come
//!   from the store, so a receipt never leaves before its number is taken.
//! - Reads ([`Queue::find`], [`Queue::restore`], ...) see the last commit and touch the disk: call them from blocking
//!   code, or accept some hundred microseconds.
//! - A second daemon on one store, and a store written by a newer release, are refused when it is opened.
//!
//! For the glue: after [`Queue::open`] hand [`Queue::restore`] to the scheduler, [`Queue::start`] before a job is given
//! to a worker, [`Queue::finish`] or [`Queue::end`] when it is over, [`Queue::sweep`] now and then.

use std::path::Path;
use std::sync::Arc;

use kinoflock_protocol::codec::CodecError;
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{ChainId, JobId, ReceiptId, RequesterId};
use kinoflock_protocol::units::UnixMillis;
use tokio::sync::oneshot;

pub use self::record::{End, JobRecord, Link, StoredClass, StoredOrigin, StoredState};
use self::writer::{Command, Writer};
use crate::disk::{Store, StoreError};

mod record;
mod tables;
mod writer;

/// Version of the tables. A store of a higher one is refused.
pub const SCHEMA: u64 = 1;

/// Name of the store in the state folder.
pub const FILE_NAME: &str = "queue.redb";

/// Most writes that wait for the disk. When they are full, callers wait: nobody is told `Accepted` faster than the
/// disk goes.
const MAX_PENDING_WRITES: usize = 256;

/// Why the store refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The store cannot be opened, read or written; a failed write changed nothing.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no thread for the writer.
    #[error("no thread for the job store: {0}")]
    Thread(std::io::Error),
    /// A record that this release cannot read.
    #[error("a stored {what} cannot be read: {source}")]
    Record {
        /// What it is.
        what: &'static str,
        /// Why not.
        source: CodecError,
    },
    /// Another job of the requester has this nonce.
    #[error("nonce was used by job {holder} before")]
    NonceUsed {
        /// The other job.
        holder: JobId,
    },
    /// There is no such job.
    #[error("no job {job} in the store")]
    Unknown {
        /// The job.
        job: JobId,
    },
    /// The job is over already.
    #[error("job {job} is over already")]
    Over {
        /// The job.
        job: JobId,
    },
    /// The job is not over yet.
    #[error("job {job} is not over yet")]
    Live {
        /// The job.
        job: JobId,
    },
    /// The receipt could not be made.
    #[error("the receipt could not be signed: {0}")]
    Receipt(String),
    /// The writer has stopped.
    #[error("the job store is closed")]
    Closed,
}

impl QueueError {
    /// A short stable name for metrics and `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Store(error) => error.code(),
            Self::Thread(_) => "thread",
            Self::Record { .. } => "store_record",
            Self::NonceUsed { .. } => "nonce_used",
            Self::Unknown { .. } => "job_unknown",
            Self::Over { .. } => "job_over",
            Self::Live { .. } => "job_live",
            Self::Receipt(_) => "receipt",
            Self::Closed => "store_closed",
        }
    }
}

/// Makes the signed receipt for a place in the chain.
pub type MakeReceipt = Box<dyn FnOnce(Link) -> Result<(ReceiptId, Envelope), String> + Send>;

/// The store. Clones share it; the writer ends with the last of them.
#[derive(Debug, Clone)]
pub struct Queue {
    store: Arc<Store>,
    writer: Arc<Writer>,
}

impl Queue {
    /// Opens or makes the store in `dir` for the receipt chain of this node.
    ///
    /// # Errors
    /// When it is in use, newer, damaged, or the disk refuses.
    pub fn open(dir: &Path, chain: ChainId) -> Result<Self, QueueError> {
        let store = Arc::new(tables::open(&dir.join(FILE_NAME))?);
        let writer = Arc::new(Writer::spawn(Arc::clone(&store), chain, MAX_PENDING_WRITES)?);
        Ok(Self { store, writer })
    }

    /// Writes an admitted job. When this returns, the job survives a power cut.
    ///
    /// # Errors
    /// When the nonce is another job's, or the disk refuses. The same job again is no error and changes nothing.
    pub async fn admit(&self, record: JobRecord) -> Result<(), QueueError> {
        self.send(|reply| Command::Admit(Box::new(record), reply)).await
    }

    /// Records that a job is started: its attempts go up by one.
    ///
    /// # Errors
    /// When there is no such live job, or the disk refuses.
    pub async fn start(&self, job: JobId, now: UnixMillis) -> Result<u32, QueueError> {
        self.send(|reply| Command::Start(job, now, reply)).await
    }

    /// Records that a job waits again. `counts`: whether its start stays counted (a failure) or not (a drain).
    ///
    /// # Errors
    /// When there is no such live job, or the disk refuses.
    pub async fn requeue(&self, job: JobId, counts: bool) -> Result<(), QueueError> {
        self.send(|reply| Command::Requeue(job, counts, reply)).await
    }

    /// Records that a job's inputs are all here.
    ///
    /// # Errors
    /// When there is no such live job, or the disk refuses.
    pub async fn inputs_ready(&self, job: JobId) -> Result<(), QueueError> {
        self.send(|reply| Command::InputsReady(job, reply)).await
    }

    /// Records the end of a job that has no receipt: cancelled or failed.
    ///
    /// # Errors
    /// When there is no such live job, or the disk refuses.
    pub async fn end(&self, job: JobId, end: End, now: UnixMillis) -> Result<(), QueueError> {
        self.send(|reply| Command::End(job, end, now, reply)).await
    }

    /// Records that a job is done, with the receipt that `make` signs for the next place in the chain. Job and receipt
    /// are one commit.
    ///
    /// # Errors
    /// When there is no such live job, `make` fails, or the disk refuses; the place in the chain is not used then.
    pub async fn finish(
        &self,
        job: JobId,
        now: UnixMillis,
        make: MakeReceipt,
    ) -> Result<Envelope, QueueError> {
        self.send(|reply| Command::Finish(job, now, make, reply)).await
    }

    /// Records the requester's answer to the job's receipt.
    ///
    /// # Errors
    /// When there is no such job, or the disk refuses.
    pub async fn acknowledge(&self, job: JobId, answer: Envelope, now: UnixMillis) -> Result<(), QueueError> {
        self.send(|reply| Command::Acknowledge(job, Box::new(answer), now, reply)).await
    }

    /// Erases prompts, orders and records of jobs whose retention is over: ended before `acknowledged_before` and
    /// acknowledged, or ended before `ended_before`. Receipts stay. Gives back the erased jobs.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn sweep(
        &self,
        acknowledged_before: UnixMillis,
        ended_before: UnixMillis,
    ) -> Result<Vec<JobId>, QueueError> {
        self.send(|reply| Command::Sweep { acknowledged_before, ended_before, reply }).await
    }

    /// Erases an ended job's prompt, order and record. Its receipt stays.
    ///
    /// # Errors
    /// When there is no such job, it is not over, or the disk refuses.
    pub async fn forget(&self, job: JobId) -> Result<(), QueueError> {
        self.send(|reply| Command::Forget(job, reply)).await
    }

    /// A job's record, live or ended.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn find(&self, job: &JobId) -> Result<Option<JobRecord>, QueueError> {
        tables::find(&self.store, job)
    }

    /// Every job in the store, the live ones in their order of arrival.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn restore(&self) -> Result<Vec<JobRecord>, QueueError> {
        tables::all(&self.store)
    }

    /// The job that used a nonce.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn nonce_holder(
        &self,
        requester: &RequesterId,
        nonce: &kinoflock_protocol::id::Nonce,
    ) -> Result<Option<JobId>, QueueError> {
        tables::nonce_holder(&self.store, requester, nonce)
    }

    /// The receipt at a place in the present chain.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn receipt(&self, sequence: u64) -> Result<Option<Envelope>, QueueError> {
        tables::receipt(&self.store, self.writer.chain(), sequence)
    }

    /// The receipt at a place in a chain, the present one or one from before a restore.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn receipt_in(&self, chain: ChainId, sequence: u64) -> Result<Option<Envelope>, QueueError> {
        tables::receipt(&self.store, chain, sequence)
    }

    /// The place that the next receipt will have.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn next_link(&self) -> Result<Link, QueueError> {
        tables::next_link(&self.store, self.writer.chain())
    }

    async fn send<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, QueueError>>) -> Command,
    ) -> Result<T, QueueError> {
        let (reply, answer) = oneshot::channel();
        self.writer.send(command(reply)).await?;
        answer.await.map_err(|_| QueueError::Closed)?
    }
}

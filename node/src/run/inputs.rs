//! The inputs of a job: pulled from whoever submitted it, each MiB checked before it is written.

use std::path::PathBuf;

use kinoflock_net::{FetchOptions, FileSink, NetHandle};
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::List;
use kinoflock_protocol::id::{JobId, NetworkId, NodeId};
use kinoflock_protocol::job::ValidJob;
use kinoflock_protocol::limits::MAX_ENVELOPE;
use kinoflock_protocol::order::Resume;
use kinoflock_protocol::seal::SealKey;

use super::checkpoints::{Received, Segments};
use super::{Daemon, Note};
use crate::queue::Queue;
use crate::scheduler::Cause;

/// Bytes of inputs that a job may bring.
pub(super) const MAX_INPUT_BYTES: u64 = 256 << 20;
/// Name of the initial latents in a job's folder.
pub(super) const LATENTS: &str = "initial-latents.safetensors";

impl Daemon {
    /// Fetches what is missing; the job keeps its place meanwhile, for as long as the scheduler grants.
    pub(super) fn fetch_inputs(&mut self, job: &JobId) {
        let Some(live) = self.live.get(job) else { return };
        let Some(submitter) = live.submitter else { return };
        let (latents, resume) = (live.job.spec().initial_latents, live.checkpoints.resume.clone());
        let blobs = [latents, resume.as_ref().map(|resume| resume.checkpoint)];
        let missing = List::first_of(blobs.into_iter().flatten().map(|blob| blob.id));
        self.boards.tell(job, kinoflock_protocol::progress::JobEvent::AwaitingInputs { missing });
        let fetch = Fetch {
            net: self.net.clone(),
            queue: self.queue.clone(),
            network: self.network,
            submitter,
            job: live.job.clone(),
            folder: self.work_folder(job),
            checkpoints: self.checkpoints_folder(job),
        };
        let job = *job;
        self.spawn(async move { Note::Inputs { job, result: fetch.all(latents, resume).await } });
    }

    pub(super) fn handle_inputs(&mut self, job: JobId, result: Result<Segments, String>) {
        let now = std::time::Instant::now();
        match result {
            Ok(segments) => {
                if let Some(live) = self.live.get_mut(&job) {
                    live.checkpoints.segments = segments;
                }
                self.scheduler.handle_inputs(&job, now);
                let queue = self.queue.clone();
                tokio::spawn(async move {
                    if let Err(error) = queue.inputs_ready(job).await {
                        tracing::error!(job = %job.short(), %error, "after a restart the job's inputs will be missed");
                    }
                });
            }
            Err(text) => {
                tracing::warn!(job = %job.short(), reason = text, "inputs could not be had");
                let cause = Cause { code: "inputs".to_owned(), text, retryable: true };
                self.scheduler.handle_inputs_failed(&job, cause, now);
            }
        }
    }
}

/// What it takes to fetch a job's inputs.
struct Fetch {
    net: NetHandle,
    queue: Queue,
    network: NetworkId,
    submitter: NodeId,
    job: ValidJob,
    folder: PathBuf,
    checkpoints: PathBuf,
}

impl Fetch {
    /// Fetches everything; gives who did the steps so far.
    async fn all(self, latents: Option<BlobRef>, resume: Option<Resume>) -> Result<Segments, String> {
        std::fs::create_dir_all(&self.checkpoints).map_err(|error| error.to_string())?;
        if let Some(latents) = latents {
            self.blob(latents, MAX_INPUT_BYTES, self.folder.join(LATENTS)).await?;
        }
        match resume {
            Some(resume) => self.checkpoint(resume).await,
            None => Ok(Segments::default()),
        }
    }

    async fn blob(&self, blob: BlobRef, limit: u64, to: PathBuf) -> Result<(), String> {
        if blob.len > limit {
            return Err(format!("input of {} bytes exceeds the limit of {limit} bytes", blob.len));
        }
        let options = FetchOptions { max_len: blob.len, ..FetchOptions::default() };
        let fetched = self.net.fetch_blob(blob.id, &[self.submitter], FileSink::new(to), options).await;
        fetched.map(drop).map_err(|error| error.to_string())
    }

    async fn checkpoint(self, resume: Resume) -> Result<Segments, String> {
        let statement = self.checkpoints.join("received.checkpoint");
        self.blob(resume.checkpoint, MAX_ENVELOPE as u64, statement.clone()).await?;
        let statement = std::fs::read(statement).map_err(|error| error.to_string())?;
        let received = Received {
            network: self.network,
            job: self.job.clone(),
            resume,
            folder: self.checkpoints.clone(),
        };
        let stated = received.check(&statement)?;
        self.blob(stated.state(), MAX_INPUT_BYTES, received.sealed_path()).await?;
        let record = self.queue.find(&self.job.id()).map_err(|error| error.to_string())?;
        let key = SealKey::of_job(&record.ok_or("the job is not here any more")?.job);
        tokio::task::spawn_blocking(move || received.accept(&key, &stated))
            .await
            .map_err(|error| error.to_string())?
    }
}

//! The inputs of a job: pulled from whoever submitted it, each MiB checked before it is written.
//!
//! A submitter who is reached over a relay only, which carries no large blob, says which node holds them sealed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kinoflock_net::discovery::is_global;
use kinoflock_net::peer::is_relayed;
use kinoflock_net::sealed::open_file;
use kinoflock_net::{FetchOptions, FileSink, Multiaddr, NetHandle};
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::List;
use kinoflock_protocol::custody::{MirroredInputs, SealedInput};
use kinoflock_protocol::id::{JobId, NetworkId, NodeId};
use kinoflock_protocol::job::{JobSpec, ValidJob};
use kinoflock_protocol::limits::MAX_ENVELOPE;
use kinoflock_protocol::order::Resume;
use kinoflock_protocol::seal::{SealKey, sealed_len};

use super::adapters::{Kept, is_one, most_of};
use super::checkpoints::{Received, Segments};
use super::{Daemon, Note};
use crate::engine::wire::input_name;
use crate::queue::Queue;
use crate::scheduler::Cause;
use crate::telemetry::{Metrics, ResultLabels};

/// Bytes of inputs that a job may bring, adapters aside.
pub(super) const MAX_INPUT_BYTES: u64 = 256 << 20;
/// Time to see whether there is a direct connection with the submitter.
const DIRECT_LOOK: Duration = Duration::from_secs(1);
/// Pause before a mirror that does not have an input yet is asked again.
const MIRROR_PAUSE: Duration = Duration::from_millis(500);
/// Name of the initial latents in a job's folder.
pub(super) const LATENTS: &str = "initial-latents.safetensors";

impl Daemon {
    /// Fetches what is missing; the job keeps its place meanwhile, for as long as the scheduler grants.
    pub(super) fn fetch_inputs(&mut self, job: &JobId) {
        let Some(live) = self.live.get(job) else { return };
        let Some(submitter) = live.submitter else { return };
        let (inputs, resume) = (files(live.job.spec()), live.checkpoints.resume.clone());
        let blobs = inputs.iter().map(|(blob, _)| *blob);
        let blobs = blobs.chain(resume.as_ref().map(|resume| resume.checkpoint));
        let missing = List::first_of(blobs.map(|blob| blob.id));
        self.boards.tell(job, kinoflock_protocol::progress::JobEvent::AwaitingInputs { missing });
        let fetch = Fetch {
            net: self.net.clone(),
            queue: self.queue.clone(),
            network: self.network,
            submitter,
            mirrored: live.mirrored.clone(),
            within: self.config.queue.input_wait,
            adapter_bytes: self.config.policy.adapter_bytes,
            kept: self.adapters.clone(),
            metrics: self.metrics.clone(),
            job: live.job.clone(),
            folder: self.work_folder(job),
            checkpoints: self.checkpoints_folder(job),
        };
        let job = *job;
        self.spawn(async move { Note::Inputs { job, result: fetch.all(inputs, resume).await } });
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
                let cause = Cause { code: "inputs".to_owned(), text, retryable: true, here: false };
                self.scheduler.handle_inputs_failed(&job, cause, now);
            }
        }
    }
}

impl Daemon {
    /// Most bytes that a job may bring, adapters among them.
    pub(super) fn most_input_bytes(&self) -> u64 {
        MAX_INPUT_BYTES.saturating_add(self.config.policy.adapter_bytes)
    }
}

/// A job's pictures and the clip that it goes on from.
pub(super) fn pictures(spec: &JobSpec) -> impl Iterator<Item = BlobRef> {
    let ends = [spec.start_image, spec.end_image, spec.extend];
    ends.into_iter().flatten().chain(spec.keyframes.iter().map(|keyframe| keyframe.image))
}

/// What a job brings, each once, with its file's name in the job's folder.
fn files(spec: &JobSpec) -> Vec<(BlobRef, String)> {
    let mut files: Vec<_> = pictures(spec).map(|blob| (blob, input_name(&blob.id))).collect();
    files.extend(spec.adapters.iter().map(|adapter| (adapter.weights, input_name(&adapter.weights.id))));
    files.extend(spec.initial_latents.map(|latents| (latents, LATENTS.to_owned())));
    files.sort_unstable();
    files.dedup();
    files
}

/// What it takes to fetch a job's inputs.
struct Fetch {
    net: NetHandle,
    queue: Queue,
    network: NetworkId,
    submitter: NodeId,
    mirrored: Option<Box<MirroredInputs>>,
    /// How long the job keeps its place.
    within: Duration,
    /// Most bytes of an adapter.
    adapter_bytes: u64,
    kept: Kept,
    metrics: Metrics,
    job: ValidJob,
    folder: PathBuf,
    checkpoints: PathBuf,
}

impl Fetch {
    /// Fetches everything; gives who did the steps so far.
    async fn all(self, inputs: Vec<(BlobRef, String)>, resume: Option<Resume>) -> Result<Segments, String> {
        std::fs::create_dir_all(&self.checkpoints).map_err(|error| error.to_string())?;
        for (blob, name) in inputs {
            let limit = most_of(self.adapter_bytes, self.job.spec(), &blob);
            let to = self.folder.join(name);
            if is_one(self.job.spec(), &blob) {
                self.adapter(blob, limit, to).await?;
            } else {
                self.blob(blob, limit, to).await?;
            }
        }
        match resume {
            Some(resume) => self.checkpoint(resume).await,
            None => Ok(Segments::default()),
        }
    }

    /// Fetches an adapter that the requester's jobs did not bring here before.
    async fn adapter(&self, blob: BlobRef, limit: u64, to: PathBuf) -> Result<(), String> {
        let requester = self.job.requester();
        let _turn = self.kept.turn(requester, blob.id).await;
        let (kept, place) = (self.kept.clone(), to.clone());
        let taken = blob.len <= limit
            && tokio::task::spawn_blocking(move || kept.take(requester, blob, &place))
                .await
                .map_err(|error| error.to_string())?;
        let result = if taken { "kept" } else { "fetched" };
        if !taken {
            self.blob(blob, limit, to.clone()).await?;
            let kept = self.kept.clone();
            tokio::task::spawn_blocking(move || kept.keep(requester, blob, &to))
                .await
                .map_err(|error| error.to_string())?;
        }
        self.metrics.adapters.get_or_create(&ResultLabels { result }).inc();
        Ok(())
    }

    async fn blob(&self, blob: BlobRef, limit: u64, to: PathBuf) -> Result<(), String> {
        if blob.len > limit {
            return Err(format!("input of {} bytes exceeds the limit of {limit} bytes", blob.len));
        }
        if let Some((mirrored, sealed)) = self.sealed(&blob)
            && !self.net.direct(self.submitter, DIRECT_LOOK).await.map_err(|error| error.to_string())?
        {
            return self.over_mirror(mirrored, sealed, blob, to).await;
        }
        let options = FetchOptions { max_len: blob.len, ..FetchOptions::default() };
        let fetched = self.net.fetch_blob(blob.id, &[self.submitter], FileSink::new(to), options).await;
        fetched.map(drop).map_err(|error| error.to_string())
    }

    /// By the submitter's word, where this input lies sealed.
    fn sealed(&self, blob: &BlobRef) -> Option<(&MirroredInputs, BlobRef)> {
        let mirrored = self.mirrored.as_deref()?;
        let of = |input: &&SealedInput| input.input == blob.id;
        Some((mirrored, mirrored.inputs.iter().find(of)?.sealed))
    }

    /// Fetches an input from the node that holds it sealed, and opens it. That node may be fetching it itself just now.
    async fn over_mirror(
        &self,
        mirrored: &MirroredInputs,
        sealed: BlobRef,
        blob: BlobRef,
        to: PathBuf,
    ) -> Result<(), String> {
        let is_state = sealed == blob;
        if !is_state && sealed.len != sealed_len(blob.len) {
            let (limit, given) = (sealed_len(blob.len), sealed.len);
            return Err(format!("a sealed input has {given} bytes, sealed it would have {limit}"));
        }
        let holder = mirrored.holder.id;
        // By a stranger's word this node dials public addresses only.
        let given = mirrored.holder.addresses.iter().filter_map(|addr| addr.parse::<Multiaddr>().ok());
        let addresses = given.filter(|addr| is_global(addr) && !is_relayed(addr)).collect();
        self.net.connect(holder, addresses).await.map_err(|error| error.to_string())?;
        let file = if is_state { to.clone() } else { to.with_extension("sealed") };
        let until = Instant::now() + self.within;
        loop {
            let options = FetchOptions { max_len: sealed.len, ..FetchOptions::default() };
            match self.net.fetch_blob(sealed.id, &[holder], FileSink::new(&file), options).await {
                Ok(_) => break,
                Err(error) if Instant::now() + MIRROR_PAUSE > until => return Err(error.to_string()),
                Err(_) => tokio::time::sleep(MIRROR_PAUSE).await,
            }
        }
        tracing::debug!(job = %self.job.id().short(), node = %holder.short(), "an input came sealed over another node");
        if is_state { Ok(()) } else { self.open(blob, file, to).await }
    }

    async fn open(&self, blob: BlobRef, file: PathBuf, to: PathBuf) -> Result<(), String> {
        let key = self.key()?;
        let opened = tokio::task::spawn_blocking(move || {
            let opened = open_file(&key, &blob.id, &file, &to);
            // Opened or not, what is sealed is of no more use.
            let _ = std::fs::remove_file(&file);
            opened
        });
        opened.await.map_err(|error| error.to_string())?.map(drop).map_err(|error| error.to_string())
    }

    fn key(&self) -> Result<SealKey, String> {
        let record = self.queue.find(&self.job.id()).map_err(|error| error.to_string())?;
        Ok(SealKey::of_job(&record.ok_or("the job is not here any more")?.job))
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
        let key = self.key()?;
        tokio::task::spawn_blocking(move || received.accept(&key, &stated))
            .await
            .map_err(|error| error.to_string())?
    }
}

//! From a worker's files to a receipt: the clip into the store, its receipt into the chain, then the news to the artist.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kinoflock_protocol::capacity::DeviceClass;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{BlobId, ClipId, JobId, Keypair, NetworkId, ReceiptId};
use kinoflock_protocol::ops::reaching_in;
use kinoflock_protocol::progress::JobEvent;
use kinoflock_protocol::receipt::Receipt;
use kinoflock_protocol::units::UnixMillis;
use kinoflock_protocol::work::work;

use super::audits::{self, Audits};
use super::checkpoints::all_segments;
use super::{Daemon, Note, adapters, jobs, unix_now};
use crate::clips::{Clips, ClipsError, Owner};
use crate::engine::wire::{DoneReport, Failure, FileReport, WorkerInfo};
use crate::queue::{Link, Queue, QueueError};
use crate::scheduler::{Cause, DeviceId, Measured};
use crate::telemetry::ResultLabels;

/// What is left to tell of a finished job.
#[derive(Debug)]
pub(super) struct Finished {
    receipt: Envelope,
    report: DoneReport,
}

/// Why a finished clip could not be kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum FinishError {
    /// The store refused.
    #[error(transparent)]
    Clips(#[from] ClipsError),
    /// The receipt was not written.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The worker's file is not what it reported.
    #[error("the worker reported {what} {reported}, its file is {found}")]
    Changed {
        /// Clip or latents.
        what: &'static str,
        /// As reported.
        reported: BlobId,
        /// As stored.
        found: BlobId,
    },
    /// A task of ours failed.
    #[error("the task that stores clips failed: {0}")]
    Task(String),
}

impl FinishError {
    fn code(&self) -> &'static str {
        match self {
            Self::Clips(error) => error.code(),
            Self::Queue(error) => error.code(),
            Self::Changed { .. } => "worker_file_changed",
            Self::Task(_) => "internal",
        }
    }
}

/// All but its place in the chain.
struct Draft {
    receipt: Receipt,
    /// Where the states of all steps lie, if the job asked for a commitment to them.
    states: Option<PathBuf>,
    audits: Audits,
    keypair: Keypair,
    network: NetworkId,
}

impl Daemon {
    /// Stores the clip and signs the receipt, away from the daemon's loop.
    pub(super) fn finish(&mut self, device: DeviceId, report: DoneReport) {
        if self.test_done(device, &report) {
            return;
        }
        let job = report.job;
        let Some((draft, owner)) = self.draft(device, &report) else {
            let failure = Failure::new("internal", "the job is not here any more", true);
            return self.failed(device, &job, &failure);
        };
        let (queue, clips) = (self.queue.clone(), self.clips.clone());
        self.spawn(async move {
            let result = store(queue, clips, owner, draft, report).await.map(Box::new);
            Note::Finished { device, job, result }
        });
    }

    fn draft(&self, device: DeviceId, report: &DoneReport) -> Option<(Draft, Owner)> {
        let live = self.live.get(&report.job)?;
        let spec = live.job.spec();
        let model = self.models.get(&spec.model)?;
        let at = self.devices.get(&device)?;
        let worker = at.worker.as_ref();
        let card = self.card_id(model);
        let clip = blob(&report.clip);
        let began_at = live.checkpoints.began_at;
        let done = began_at + report.steps_done;
        // Where a run begins within its steps, or computes none, the job is told by what was asked for.
        let is_whole = model.manifest.work.counts_by_steps() && reaching_in(spec).is_none();
        let steps = if is_whole { done } else { spec.steps };
        let receipt = Receipt {
            job: report.job,
            requester: live.job.requester(),
            node: self.identity.node_id(),
            collective: None,
            model: spec.model,
            cards: List::first_of(card.into_iter().chain(adapters::cards(spec))),
            adapters: adapters::used(spec),
            clip: ClipId::from(clip.id),
            clip_len: clip.len,
            latents: report.latents.as_ref().map(blob),
            parents: spec.parents.clone(),
            inputs: List::first_of(spec.inputs().iter().map(|blob| blob.id)),
            seed: spec.seed,
            steps,
            step_root: report.step_root.filter(|_| spec.returns.step_root),
            segments: all_segments(&live.checkpoints.segments, self.identity.node_id(), steps),
            work: work(&model.manifest.work, &spec.shape()),
            device: worker.map_or(DeviceClass::Other, |worker| class_of(&worker.device)),
            engine: Text::truncated(&worker.map_or_else(String::new, |w| engine_of(w, &at.dtype))),
            accepted_at: live.accepted_at,
            started_at: live.started_at.unwrap_or(live.accepted_at).max(live.accepted_at),
            finished_at: UnixMillis(0),
            claimed_joules: None,
            chain: self.identity.chain(),
            sequence: 0,
            previous: None,
        };
        let owner =
            Owner { job: report.job, requester: live.job.requester(), class: live.origin.class.into() };
        let states = spec.returns.step_root.then(|| self.work_folder(&report.job).join(audits::STATES));
        let (keypair, audits) = (self.identity.keypair().clone(), self.audits.clone());
        Some((Draft { receipt, states, audits, keypair, network: self.network }, owner))
    }

    pub(super) fn handle_finished(
        &mut self,
        device: DeviceId,
        job: JobId,
        result: Result<Box<Finished>, FinishError>,
    ) {
        match result {
            Ok(finished) => {
                if let Err(error) = jobs::remove_folder(&self.work_folder(&job)) {
                    tracing::warn!(job = %job.short(), %error, "a finished job's files could not be removed");
                }
                self.metrics.receipts.get_or_create(&ResultLabels { result: "signed" }).inc();
                self.metrics.frames.inc_by(u64::from(finished.report.frames));
                let took = finished.report.timings;
                let phases = [
                    ("text", took.text),
                    ("denoise", took.steps),
                    ("vae", took.decode),
                    ("encode", took.encode),
                ];
                for (phase, seconds) in phases {
                    self.phase_took(phase, seconds);
                }
                let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
                let compute = self.compute_seconds(&job, &finished.report);
                let measured = Measured { load: seconds(took.load), compute: seconds(compute) };
                if let Some((live, record)) = self.live.get(&job).zip(self.queue.find(&job).ok().flatten()) {
                    let (valid, submitter) = (live.job.clone(), live.submitter);
                    self.replicate(&valid, &record.job, &finished.receipt, submitter);
                }
                self.boards.tell(&job, JobEvent::Done { receipt: finished.receipt });
                self.scheduler.handle_done(device, &job, measured, Instant::now());
            }
            Err(error) => {
                let full =
                    matches!(error, FinishError::Clips(ClipsError::StoreFull { .. } | ClipsError::DiskFull));
                let (code, text) = (error.code().to_owned(), error.to_string());
                // Elsewhere there may be room; here a second run would end the same way. Its files stay for that.
                let cause = Cause { code, text, retryable: true, here: !full };
                self.scheduler.handle_failed(device, &job, cause, Instant::now());
            }
        }
    }
}

impl Daemon {
    /// What the whole job takes here, with the steps before a checkpoint or a start within the run: measured speed is of
    /// whole jobs. 0 for a job that tells nothing of others: it computes no step, or other blocks than the model's.
    fn compute_seconds(&self, job: &JobId, report: &DoneReport) -> f64 {
        let Some(live) = self.live.get(job) else { return report.timings.compute() };
        let spec = live.job.spec();
        let is_other = |name: &str| matches!(name, "decode_only" | "layers.skip" | "layers.repeat");
        if spec.ops.iter().any(|op| is_other(op.name.as_str())) {
            return 0.0;
        }
        let before = match reaching_in(spec) {
            Some(_) => spec.steps.saturating_sub(report.steps_done),
            None => live.checkpoints.began_at,
        };
        let saved = report.timings.steps * f64::from(before) / f64::from(report.steps_done.max(1));
        report.timings.compute() + saved
    }
}

async fn store(
    queue: Queue,
    clips: Clips,
    owner: Owner,
    mut draft: Draft,
    report: DoneReport,
) -> Result<Finished, FinishError> {
    let now = unix_now();
    let files = [Some(("clip", report.clip.clone())), report.latents.clone().map(|file| ("latents", file))];
    let stored = tokio::task::spawn_blocking(move || {
        for (what, file) in files.into_iter().flatten() {
            let found = clips.put_file(Path::new(file.path.as_str()), owner, now)?.id;
            if found != file.blake3 {
                return Err(FinishError::Changed { what, reported: file.blake3, found });
            }
        }
        Ok(())
    });
    stored.await.map_err(|error| FinishError::Task(error.to_string()))??;
    let job = draft.receipt.job;
    let (audits, states, network) = (draft.audits.clone(), draft.states.take(), draft.network);
    // A clock that was set back meanwhile must not make a receipt that contradicts itself.
    draft.receipt.finished_at = unix_now().max(draft.receipt.started_at);
    let receipt =
        queue.finish(job, draft.receipt.finished_at, Box::new(move |link| sign(draft, link))).await?;
    if let Some(states) = states {
        audits.keep(&queue, &receipt, &states, owner, &network).await;
    }
    Ok(Finished { receipt, report })
}

fn sign(mut draft: Draft, link: Link) -> Result<(ReceiptId, Envelope), String> {
    draft.receipt.chain = link.chain;
    draft.receipt.sequence = link.sequence;
    draft.receipt.previous = link.previous;
    let envelope =
        Envelope::seal(&draft.keypair, &draft.network, &draft.receipt).map_err(|error| error.to_string())?;
    Ok((ReceiptId::of(&envelope, &draft.network), envelope))
}

fn blob(file: &FileReport) -> BlobRef {
    BlobRef { id: file.blake3, len: file.len }
}

/// Name and version of an engine, and in which numbers it computed: what an auditor has to know.
fn engine_of(worker: &WorkerInfo, dtype: &str) -> String {
    format!("{}/{} {dtype}", worker.engine, worker.version).trim_end().to_owned()
}

/// The sort of a device by its name in the configuration.
pub(super) fn class_of(device: &str) -> DeviceClass {
    match device.split(':').next() {
        Some("cpu") => DeviceClass::Cpu,
        Some("cuda") => DeviceClass::Cuda,
        Some("metal") => DeviceClass::Metal,
        _ => DeviceClass::Other,
    }
}

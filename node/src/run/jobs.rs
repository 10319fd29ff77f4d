//! From a decision of the scheduler to work of a worker, and back.

use std::time::{Duration, Instant};

use kinoflock_protocol::Millis;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::id::JobId;
use kinoflock_protocol::job::JobSpec;
use kinoflock_protocol::progress::JobEvent;

use super::{Daemon, Note, unix_now};
use crate::engine::supervisor::EngineEvent;
use crate::engine::wire::{Failure, LoadRequest, Output, Phase, Picture, RunRequest, StepReport, WirePath};
use crate::models::Model;
use crate::queue::{End, QueueError};
use crate::scheduler::{Cause, DeviceId, Event, Outcome};
use crate::telemetry::{DeviceLabels, OutcomeLabels};

/// A preview after every so many steps, where they are wanted.
const PREVIEW_EVERY: u32 = 2;
/// How often the end of a job is written again while the disk is full; then it runs again after a restart.
const END_TRIES: u32 = 720;
/// Pause before it is written again.
const END_PAUSE: Duration = Duration::from_secs(5);
/// Part of a job's thousandths that its steps are; the rest is decoding and encoding.
const STEPS_SHARE: u64 = 900;

impl Daemon {
    pub(super) fn handle_event(&mut self, event: Event) {
        match event {
            Event::Start { device, job, attempt } => self.start(device, job, attempt),
            Event::Cancel { device, job } => {
                if let Some(device) = self.devices.get(&device)
                    && let Err(error) = device.engine.cancel(job)
                {
                    tracing::warn!(job = %job.short(), %error, "a cancel did not reach the worker; killing it");
                    let _ = device.engine.kill();
                }
            }
            Event::Queued { job, position, eta } => {
                let eta = eta.map(|times| times.finishes.saturating_duration_since(Instant::now()));
                let eta = eta.map_or(Millis(u64::MAX), Millis::from);
                self.boards.tell(&job, JobEvent::Queued { position, eta });
            }
            Event::Requeued { job, cause } => {
                if let Some(cause) = &cause {
                    tracing::warn!(job = %job.short(), code = cause.code, "a job failed and is tried once more");
                }
                let queue = self.queue.clone();
                tokio::spawn(async move {
                    if let Err(error) = queue.requeue(job, cause.is_some()).await {
                        tracing::error!(job = %job.short(), %error, "a job's return to the queue could not be written");
                    }
                });
            }
            Event::Ended { job, outcome } => self.ended(job, outcome),
            Event::LeaseExpired { lease, .. } => {
                self.interest.expired(Instant::now());
                tracing::debug!(%lease, "a lease ended unused");
            }
            Event::Drained { device } => tracing::info!(device = device.0, "drained"),
        }
    }

    /// Records the start; the worker gets the job when that is on disk.
    fn start(&mut self, device: DeviceId, job: JobId, attempt: u32) {
        tracing::info!(job = %job.short(), device = device.0, attempt, "starting");
        let queue = self.queue.clone();
        self.spawn(async move {
            let result = queue.start(job, unix_now()).await;
            Note::Started { device, job, result }
        });
    }

    pub(super) fn handle_started(&mut self, device: DeviceId, job: JobId, result: Result<u32, QueueError>) {
        if self.scheduler.is_cancelled(device, &job) {
            // No worker has heard of it yet, so none would stop.
            return self.scheduler.handle_stopped(device, &job, Instant::now());
        }
        let run =
            result.map_err(|error| Failure::new(error.code(), &error.to_string(), true)).and_then(|_| {
                let request = self.run_request(&job)?;
                let began_at = self.newest_state(&job).map_or(0, |(step, _)| step);
                if let Some(live) = self.live.get_mut(&job) {
                    live.checkpoints.began_at = began_at;
                }
                let engine =
                    &self.devices.get(&device).expect("invariant: the scheduler knows these devices").engine;
                engine.run(request).map_err(|error| Failure::new(error.code(), &error.to_string(), true))
            });
        match run {
            Ok(()) => {
                let now = Instant::now();
                if let Some(live) = self.live.get_mut(&job) {
                    live.started_at = Some(unix_now());
                    self.metrics.queue_wait.observe(now.duration_since(live.admitted).as_secs_f64());
                }
            }
            Err(failure) => self.failed(device, &job, &failure),
        }
    }

    fn run_request(&self, job: &JobId) -> Result<RunRequest, Failure> {
        let internal = |text: String| Failure::new("internal", &text, true);
        let live = self.live.get(job).ok_or_else(|| internal("the job is not here any more".to_owned()))?;
        let spec = live.job.spec();
        let model = self.models.get(&spec.model).ok_or_else(|| {
            Failure::new("model_not_served", "this node does not have the job's model any more", true)
        })?;
        let folder = self.work_folder(job);
        std::fs::create_dir_all(&folder)
            .map_err(|error| internal(format!("cannot make a folder for it: {error}")))?;
        let path = |name: &str| wire_path(&folder.join(name)).map_err(&internal);
        let mut run = plain_run(*job, load_request(model).map_err(internal)?, spec).map_err(internal)?;
        if spec.initial_latents.is_some() {
            run.extra.initial_latents = Some(path(super::inputs::LATENTS)?);
        }
        if super::inputs::pictures(spec).next().is_some() {
            run.extra.inputs = Some(wire_path(&folder).map_err(internal)?);
            run.extra.pictures = List::first_of(shown(spec));
            run.extra.extend = spec.extend.map(|clip| clip.id);
        }
        if !spec.adapters.is_empty() {
            run.extra.inputs = Some(wire_path(&folder).map_err(internal)?);
            run.extra.adapters = super::adapters::to_use(spec);
        }
        run.extra.resume = self.newest_state(job).map(|(_, state)| state);
        run.output = Output {
            clip: path("clip.mp4")?,
            latents: if spec.returns.latents { Some(path("latents.safetensors")?) } else { None },
            checkpoint: Some(wire_path(&self.checkpoints_folder(job)).map_err(internal)?),
            states: if spec.returns.step_root { Some(path(super::audits::STATES)?) } else { None },
        };
        run.checkpoint_every = self.checkpoint_every(spec);
        run.preview_every = if spec.returns.previews { PREVIEW_EVERY } else { 0 };
        Ok(run)
    }

    pub(super) fn handle_engine(&mut self, device: DeviceId, event: EngineEvent) {
        let now = Instant::now();
        match event {
            EngineEvent::Ready(info) => self.worker_ready(device, info),
            EngineEvent::Loaded(report) => {
                self.scheduler.handle_loaded(device, report.model);
                if let Some(device) = self.devices.get_mut(&device) {
                    device.dtype = report.dtype.to_string();
                }
                // A model that was there already is no load.
                if report.seconds > 0.0 {
                    self.phase_took("load", report.seconds);
                }
            }
            EngineEvent::Phase { job: Some(job), phase } => match phase {
                Phase::Load => self.boards.tell(&job, JobEvent::Loading),
                Phase::Encode => self.boards.tell(&job, JobEvent::Encoding),
                Phase::Text | Phase::Step | Phase::Decode => {}
            },
            EngineEvent::Phase { job: None, .. } => {}
            EngineEvent::Checkpoint { job, step, file, latents } => self.checkpoint(job, step, file, latents),
            EngineEvent::Step(report) => self.step(device, &report, now),
            EngineEvent::Preview { job, step, png } => {
                self.boards.tell(&job, JobEvent::Preview { step, png })
            }
            EngineEvent::Done(report) => self.finish(device, *report),
            EngineEvent::Audited(report) => self.audited(device, &report),
            EngineEvent::Failed { job: Some(job), failure } => self.failed(device, &job, &failure),
            EngineEvent::Failed { job: None, failure } | EngineEvent::Lost(failure) => {
                self.worker_lost(device, &failure);
            }
            EngineEvent::Cancelled { job, .. } => {
                self.scheduler.handle_stopped(device, &job, now);
            }
        }
    }

    fn step(&mut self, device: DeviceId, report: &StepReport, now: Instant) {
        let done = u64::from(report.done) * STEPS_SHARE / u64::from(report.total.max(1));
        self.scheduler.handle_progress(device, &report.job, done.min(STEPS_SHARE) as u16, now);
        if let Some(live) = self.live.get_mut(&report.job) {
            (live.steps_done, live.steps_total) = (report.done, Some(report.total));
        }
        if let Some(device) = self.devices.get(&device) {
            let labels = DeviceLabels { device: device.name.clone() };
            self.metrics.denoise_step.get_or_create(&labels).observe(report.seconds);
        }
        let (_, eta) = self.standing(&report.job);
        self.boards.tell(&report.job, JobEvent::Step { done: report.done, total: report.total, eta });
    }

    /// A job failed on its device, or a self-test or an audit did.
    pub(super) fn failed(&mut self, device: DeviceId, job: &JobId, failure: &Failure) {
        if self.test_failed(device, job, failure) || self.audit_failed(device, job, failure) {
            return;
        }
        let mut cause = cause(failure);
        let states_discarded = self.discard_states(job, failure);
        (cause.retryable, cause.here) = (cause.retryable || states_discarded, cause.here || states_discarded);
        self.scheduler.handle_failed(device, job, cause, Instant::now());
    }

    /// A job is over: its end goes to disk, then to whoever follows it. What is done was written before.
    fn ended(&mut self, job: JobId, outcome: Outcome) {
        let live = self.live.remove(&job);
        if let (Some(live), Outcome::Done | Outcome::Cancelled) = (&live, &outcome) {
            self.release_checkpoints(&job, &live.checkpoints);
        }
        let label = match &outcome {
            Outcome::Done => "done",
            Outcome::Cancelled => "cancelled",
            Outcome::Failed(_) => "failed",
        };
        match &outcome {
            Outcome::Done => self.counts.done += 1,
            Outcome::Cancelled => self.counts.cancelled += 1,
            Outcome::Failed(_) => self.counts.failed += 1,
        }
        let model =
            live.and_then(|live| self.models.get(&live.job.spec().model).map(|model| model.name.clone()));
        let labels = OutcomeLabels { outcome: label, model: model.unwrap_or_default() };
        self.metrics.jobs.get_or_create(&labels).inc();
        let code = if let Outcome::Failed(cause) = &outcome { cause.code.as_str() } else { "" };
        tracing::info!(job = %job.short(), outcome = label, code, "over");
        let event = match &outcome {
            // The receipt is told by whoever signed it.
            Outcome::Done => return,
            Outcome::Cancelled => JobEvent::Cancelled,
            Outcome::Failed(cause) => failed_event(cause),
        };
        if let Err(error) = remove_folder(&self.work_folder(&job)) {
            tracing::warn!(job = %job.short(), %error, "a job's files could not be removed");
        }
        self.boards.tell(&job, event);
        let end: Option<End> = outcome.into();
        let Some(end) = end else { return };
        let queue = self.queue.clone();
        self.spawn(async move {
            let mut tries = 0;
            let result = loop {
                tries += 1;
                let result = queue.end(job, end.clone(), unix_now()).await;
                let is_full = result.as_ref().is_err_and(|error| error.code() == "disk_full");
                if !is_full || tries == END_TRIES {
                    break result;
                }
                tokio::time::sleep(END_PAUSE).await;
            };
            Note::Ended { job, result }
        });
    }

    pub(super) fn handle_ended(&self, job: JobId, result: Result<(), QueueError>) {
        if let Err(error) = result {
            tracing::error!(job = %job.short(), %error, "the end of a job could not be written; after a restart it runs again");
        }
    }

    pub(super) fn phase_took(&self, phase: &'static str, seconds: f64) {
        let labels = crate::telemetry::PhaseLabels { phase };
        self.metrics.job_duration.get_or_create(&labels).observe(seconds);
    }

    /// Where a job's files lie while it runs.
    pub(super) fn work_folder(&self, job: &JobId) -> std::path::PathBuf {
        self.config.storage.state.join("work").join(job.to_string())
    }
}

/// A run of this job as its numbers and words say, without inputs and outputs.
pub(super) fn plain_run(job: JobId, model: LoadRequest, spec: &JobSpec) -> Result<RunRequest, String> {
    Ok(RunRequest {
        job,
        model,
        prompt: Text::truncated(spec.prompt.as_str()),
        negative: Text::truncated(spec.negative_prompt.as_str()),
        seed: spec.seed,
        frames: spec.frames,
        width: spec.width,
        height: spec.height,
        fps: spec.fps.to_f64(),
        steps: spec.steps,
        guidance: spec.guidance.to_f64(),
        extra: super::ops::extra(spec).map_err(|fault| fault.to_string())?,
        output: Output { clip: WirePath::default(), latents: None, checkpoint: None, states: None },
        checkpoint_every: 0,
        preview_every: 0,
    })
}

/// The pictures that a job's frames are to show.
fn shown(spec: &JobSpec) -> impl Iterator<Item = Picture> {
    let fully = |image: BlobRef, frame: u32| Picture { image: image.id, frame, strength: 1.0 };
    let between = spec.keyframes.iter().map(|keyframe| Picture {
        image: keyframe.image.id,
        frame: keyframe.frame,
        strength: keyframe.strength.to_f64(),
    });
    let begin = spec.start_image.map(|image| fully(image, 0));
    let end = spec.end_image.map(|image| fully(image, spec.frames.saturating_sub(1)));
    begin.into_iter().chain(between).chain(end)
}

/// What is told of a failed job.
pub(super) fn failed_event(cause: &Cause) -> JobEvent {
    JobEvent::Failed {
        code: Text::truncated(&cause.code),
        text: Text::truncated(&cause.text),
        retryable: cause.retryable,
    }
}

fn cause(failure: &Failure) -> Cause {
    let retryable = failure.retryable;
    Cause { code: failure.code.to_string(), text: failure.text.to_string(), retryable, here: retryable }
}

/// The model as a worker is told of it.
pub(super) fn load_request(model: &Model) -> Result<LoadRequest, String> {
    Ok(LoadRequest { model: model.id, dir: wire_path(&model.dir)? })
}

pub(super) fn wire_path(path: &std::path::Path) -> Result<WirePath, String> {
    let text = path.to_str().ok_or_else(|| format!("the path {} is not UTF-8", path.display()))?;
    WirePath::new(text).map_err(|error| error.to_string())
}

pub(super) fn remove_folder(folder: &std::path::Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

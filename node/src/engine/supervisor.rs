//! The daemon's side of a worker: starts it, watches it work, cancels, kills, and starts it again.
//!
//! One task per device. Its commands never wait ([`EngineHandle`] refuses when its queue is full); its events wait for
//! the reader, except previews, which are dropped when the reader is slow. While events wait no deadline runs out: a
//! slow reader costs nobody a worker.
//!
//! A worker that dies is started again by the next load or run, not before: a worker that dies at its start cannot
//! make a loop.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kinoflock_protocol::codec::Bytes;
use kinoflock_protocol::id::{BlobId, JobId, ModelId};
use kinoflock_protocol::limits::MAX_PREVIEW;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::process::Worker;
use super::deadline::{Deadlines, Size, Watch};
use super::wire::{
    AuditReport, AuditRun, DoneReport, Failure, FileReport, FromWorker, LoadRequest, LoadedReport,
    OpenRequest, Phase, RunRequest, StepReport, ToWorker, WorkerInfo,
};

mod process;

/// Commands that wait for the supervisor; one more is refused.
pub const MAX_COMMANDS: usize = 16;
/// Events that wait for the reader; the supervisor then waits too, and drops previews.
pub const MAX_EVENTS: usize = 64;

/// How a worker is started.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// The device's name in logs.
    pub name: String,
    /// The worker program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// What it is told about the device.
    pub open: OpenRequest,
    /// Limits on its time.
    pub deadlines: Deadlines,
}

impl WorkerConfig {
    /// This very binary as worker on the CPU, with all cores.
    ///
    /// # Errors
    /// When the system does not say where this binary is.
    pub fn this_binary() -> std::io::Result<Self> {
        Ok(Self::program(std::env::current_exe()?, &["worker"]))
    }

    /// A program as worker on the CPU, with all cores.
    #[must_use]
    pub fn program(program: PathBuf, args: &[&str]) -> Self {
        Self {
            name: "cpu".to_owned(),
            program,
            args: args.iter().map(OsString::from).collect(),
            open: OpenRequest {
                device: super::wire::Name::truncated("cpu"),
                dtype: super::wire::Name::truncated("auto"),
                merge_adapters: false,
                threads: 0,
                memory_limit: 0,
                memory: 0,
                offload: super::wire::Name::truncated("auto"),
            },
            deadlines: Deadlines::default(),
        }
    }

    /// The worker of a configured device.
    ///
    /// # Errors
    /// When the device names no program and the system does not say where this binary is.
    pub fn of_device(
        device: &crate::config::DeviceConfig,
        engine: &crate::config::EngineConfig,
    ) -> std::io::Result<Self> {
        use super::wire::Name;
        let program = match &device.worker {
            Some(program) => program.clone(),
            None => std::env::current_exe()?,
        };
        Ok(Self {
            name: device.name.clone(),
            program,
            args: device.worker_args.iter().map(OsString::from).collect(),
            open: OpenRequest {
                device: Name::truncated(&device.kind.to_string()),
                dtype: Name::truncated(&device.dtype.to_string()),
                merge_adapters: device.merge_adapters,
                threads: device.threads.unwrap_or(0),
                memory_limit: match device.memory_limit {
                    crate::config::MemoryLimit::At(size) => size.0,
                    _ => 0,
                },
                memory: crate::memory::limit(device).unwrap_or(0),
                offload: Name::truncated(&device.offload.to_string()),
            },
            deadlines: Deadlines {
                shortest: engine.phase_deadline,
                factor: f64::from(engine.phase_factor),
                ..Deadlines::default()
            },
        })
    }
}

/// What happens at a device.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum EngineEvent {
    /// The worker runs and has its device.
    Ready(WorkerInfo),
    /// A model is loaded.
    Loaded(LoadedReport),
    /// A phase of a job begins.
    Phase {
        /// Which job; `None` for a load without one.
        job: Option<JobId>,
        /// What begins.
        phase: Phase,
    },
    /// A step is done.
    Step(StepReport),
    /// A small picture of how the clip looks so far.
    Preview {
        /// Which job.
        job: JobId,
        /// Steps done.
        step: u32,
        /// PNG.
        png: Bytes<MAX_PREVIEW>,
    },
    /// A checkpoint is on disk.
    Checkpoint {
        /// Which job.
        job: JobId,
        /// Steps done.
        step: u32,
        /// The file.
        file: FileReport,
        /// Hash of the latents after that step.
        latents: BlobId,
    },
    /// The clip is on disk. Ends the job.
    Done(Box<DoneReport>),
    /// A step of another node's clip was looked at. Ends the audit.
    Audited(Box<AuditReport>),
    /// The job failed, or a load without a job. Ends the job.
    Failed {
        /// Which job; `None` for a load.
        job: Option<JobId>,
        /// Why.
        failure: Failure,
    },
    /// The job was stopped as asked. Ends the job.
    Cancelled {
        /// Which job.
        job: JobId,
        /// Steps that were done.
        steps_done: u32,
    },
    /// The worker could not be started, or died without work to do. The next load or run starts another.
    Lost(Failure),
}

/// Why a command was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The supervisor is busy, with starting or killing a worker.
    #[error("the engine has {MAX_COMMANDS} commands waiting, the limit is {MAX_COMMANDS}: try again later")]
    Busy,
    /// The supervisor has ended.
    #[error("the engine has stopped")]
    Stopped,
}

impl EngineError {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Busy => "engine_busy",
            Self::Stopped => "engine_stopped",
        }
    }
}

/// Commands to a device. Dropping every handle ends the worker.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    stop: CancellationToken,
}

#[derive(Debug)]
enum Command {
    Load(LoadRequest),
    Run(Box<RunRequest>),
    Audit(Box<AuditRun>),
    Cancel(JobId),
    Kill,
}

impl EngineHandle {
    /// Loads a model ahead of the first job. [`EngineEvent::Loaded`] or [`EngineEvent::Failed`] without a job follows.
    ///
    /// # Errors
    /// When the engine is stopped or its queue is full.
    pub fn load(&self, load: LoadRequest) -> Result<(), EngineError> {
        self.send(Command::Load(load))
    }

    /// Starts a job. One of [`EngineEvent::Done`], [`EngineEvent::Failed`] and [`EngineEvent::Cancelled`] ends it.
    ///
    /// # Errors
    /// When the engine is stopped or its queue is full.
    pub fn run(&self, run: RunRequest) -> Result<(), EngineError> {
        self.send(Command::Run(Box::new(run)))
    }

    /// Starts an audit. One of [`EngineEvent::Audited`] and [`EngineEvent::Failed`] ends it.
    ///
    /// # Errors
    /// When the engine is stopped or its queue is full.
    pub fn audit(&self, audit: AuditRun) -> Result<(), EngineError> {
        self.send(Command::Audit(Box::new(audit)))
    }

    /// Stops a job within a step; a worker that does not confirm it in time is killed. Another job is left alone.
    ///
    /// # Errors
    /// When the engine is stopped or its queue is full.
    pub fn cancel(&self, job: JobId) -> Result<(), EngineError> {
        self.send(Command::Cancel(job))
    }

    /// Kills the worker at once; a running job fails and may be tried again.
    ///
    /// # Errors
    /// When the engine is stopped or its queue is full.
    pub fn kill(&self) -> Result<(), EngineError> {
        self.send(Command::Kill)
    }

    /// Ends the worker and the supervisor, and waits for it. A running job ends with the worker.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.commands.closed().await;
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => EngineError::Busy,
            mpsc::error::TrySendError::Closed(_) => EngineError::Stopped,
        })
    }
}

/// Starts a device's worker and the task that watches it. The first event is `Ready` or `Lost`. Call it within tokio.
#[must_use]
pub fn spawn(config: WorkerConfig) -> (EngineHandle, mpsc::Receiver<EngineEvent>) {
    let (commands, inbox) = mpsc::channel(MAX_COMMANDS);
    let (events, outbox) = mpsc::channel(MAX_EVENTS);
    let stop = CancellationToken::new();
    let supervisor = Supervisor {
        watch: Watch::new(config.deadlines),
        stop: stop.clone(),
        config,
        events,
        worker: None,
        loaded: None,
        busy: None,
    };
    tokio::spawn(supervisor.run(inbox));
    (EngineHandle { commands, stop }, outbox)
}

struct Supervisor {
    config: WorkerConfig,
    watch: Watch,
    stop: CancellationToken,
    events: mpsc::Sender<EngineEvent>,
    worker: Option<Worker>,
    loaded: Option<ModelId>,
    busy: Option<Busy>,
}

/// What the worker was told to do.
#[derive(Debug, Clone, Copy)]
struct Busy {
    job: Option<JobId>,
    /// Under which its phases are measured: those of an audit are no measure of a job's.
    measured_as: ModelId,
    size: Size,
    steps_done: u32,
    /// When a cancelled job's worker is killed.
    kill_at: Option<Instant>,
}

/// The reader of events is gone, or the end was asked for.
struct Unheard;

impl Supervisor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        // Either way it is over.
        let (Ok(()) | Err(Unheard)) = self.serve(&mut inbox).await;
        if let Some(worker) = self.worker.take() {
            worker.end(self.config.deadlines.shutdown).await;
        }
    }

    /// Until the handles are gone, the reader is gone, or the end is asked for.
    async fn serve(&mut self, inbox: &mut mpsc::Receiver<Command>) -> Result<(), Unheard> {
        if let Err(failure) = self.start().await {
            self.send(EngineEvent::Lost(failure)).await?;
        }
        loop {
            let wake = self.wake();
            tokio::select! {
                command = inbox.recv() => match command {
                    None => return Ok(()),
                    Some(command) => self.handle_command(command).await?,
                },
                message = next(&mut self.worker) => self.handle_message(message).await?,
                () = self.stop.cancelled() => return Ok(()),
                () = tokio::time::sleep_until(wake.into()) => self.handle_timeout().await?,
            }
        }
    }

    async fn handle_command(&mut self, command: Command) -> Result<(), Unheard> {
        match command {
            Command::Load(load) => self.begin(None, load.model, None, ToWorker::Load(load)).await,
            Command::Run(run) => {
                let size = Size::of(run.frames, run.width, run.height);
                self.begin(Some(run.job), run.model.model, Some(size), ToWorker::Run(run)).await
            }
            Command::Audit(audit) => {
                let run = &audit.run;
                let size = Size::of(run.frames, run.width, run.height);
                self.begin(Some(run.job), run.model.model, Some(size), ToWorker::Audit(audit)).await
            }
            Command::Cancel(job) => self.cancel(job).await,
            Command::Kill => self.lose(process::killed("the daemon was told to stop it")).await,
        }
    }

    async fn begin(
        &mut self,
        job: Option<JobId>,
        model: ModelId,
        size: Option<Size>,
        message: ToWorker,
    ) -> Result<(), Unheard> {
        if self.busy.is_some() {
            let failure = Failure::new("engine_busy", "the device is at work on another job", true);
            return self.send(EngineEvent::Failed { job, failure }).await;
        }
        if self.worker.is_none()
            && let Err(failure) = self.start().await
        {
            return self.send(EngineEvent::Failed { job, failure }).await;
        }
        match (&self.worker, &message) {
            (Some(worker), ToWorker::Run(run)) => worker.hide(run),
            (Some(worker), ToWorker::Audit(audit)) => worker.hide(&audit.run),
            _ => {}
        }
        let size = size.unwrap_or(Size { pixels: 0.0 });
        let phase = if self.loaded == Some(model) && job.is_some() { Phase::Text } else { Phase::Load };
        let measured_as = if matches!(message, ToWorker::Audit(_)) { audits_of(model) } else { model };
        self.watch.begin(measured_as, phase, size, Instant::now());
        self.busy = Some(Busy { job, measured_as, size, steps_done: 0, kill_at: None });
        self.tell(&message).await
    }

    async fn cancel(&mut self, job: JobId) -> Result<(), Unheard> {
        let grace = self.watch.cancel_grace();
        match &mut self.busy {
            Some(busy) if busy.job == Some(job) => {
                busy.kill_at.get_or_insert(Instant::now() + grace);
                self.tell(&ToWorker::Cancel(job)).await
            }
            _ => Ok(()),
        }
    }

    async fn tell(&mut self, message: &ToWorker) -> Result<(), Unheard> {
        let Some(worker) = &mut self.worker else { return Ok(()) };
        match worker.send(message, self.config.deadlines.greeting).await {
            Ok(()) => Ok(()),
            Err(_) => self.died().await,
        }
    }

    async fn handle_message(&mut self, message: Option<FromWorker>) -> Result<(), Unheard> {
        let Some(message) = message else { return self.died().await };
        let now = Instant::now();
        let busy = self.busy;
        match message {
            FromWorker::Ready(info) => self.send(EngineEvent::Ready(info)).await,
            FromWorker::Loaded(report) => {
                self.loaded = Some(report.model);
                if busy.is_some_and(|busy| busy.job.is_none()) {
                    self.finish(true, now);
                }
                self.send(EngineEvent::Loaded(report)).await
            }
            FromWorker::Phase { job, phase } => {
                if phase == Phase::Load {
                    self.loaded = None;
                }
                if let Some(busy) = busy {
                    self.watch.begin(busy.measured_as, phase, busy.size, now);
                }
                self.send(EngineEvent::Phase { job, phase }).await
            }
            FromWorker::Step(report) => {
                self.watch.step(now);
                if let Some(busy) = &mut self.busy {
                    busy.steps_done = report.done;
                }
                self.send(EngineEvent::Step(report)).await
            }
            FromWorker::Preview { job, step, png } => {
                match self.events.try_send(EngineEvent::Preview { job, step, png }) {
                    Err(mpsc::error::TrySendError::Closed(_)) => Err(Unheard),
                    Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
                }
            }
            FromWorker::Checkpoint { job, step, file, latents } => {
                self.send(EngineEvent::Checkpoint { job, step, file, latents }).await
            }
            FromWorker::Done(report) => {
                self.finish(true, now);
                self.send(EngineEvent::Done(report)).await
            }
            FromWorker::Audited(report) => {
                self.finish(true, now);
                self.send(EngineEvent::Audited(report)).await
            }
            FromWorker::Failed { job, failure } => {
                self.finish(false, now);
                tracing::warn!(device = self.config.name, code = %failure.code, "job failed in the worker");
                self.send(EngineEvent::Failed { job, failure }).await
            }
            FromWorker::Cancelled { job, steps_done } => {
                self.finish(false, now);
                self.send(EngineEvent::Cancelled { job, steps_done }).await
            }
        }
    }

    async fn handle_timeout(&mut self) -> Result<(), Unheard> {
        let now = Instant::now();
        if self.busy.and_then(|busy| busy.kill_at).is_some_and(|at| at <= now) {
            return self.lose(process::killed("it did not stop when it was told to")).await;
        }
        match (self.watch.poll_timeout(), self.watch.current()) {
            (Some(at), Some((phase, limit))) if at <= now => {
                let limit = limit.as_secs_f64();
                let why = format!("phase {} took more than its limit of {limit:.1} s", phase.name());
                self.lose(process::deadline(&why)).await
            }
            _ => Ok(()),
        }
    }

    /// The worker is gone by itself.
    async fn died(&mut self) -> Result<(), Unheard> {
        let failure = match self.worker.take() {
            Some(worker) => worker.cause_of_death().await,
            None => return Ok(()),
        };
        self.mourn(failure).await
    }

    /// The worker must go.
    async fn lose(&mut self, failure: Failure) -> Result<(), Unheard> {
        if let Some(worker) = self.worker.take() {
            worker.kill().await;
        }
        self.mourn(failure).await
    }

    async fn mourn(&mut self, failure: Failure) -> Result<(), Unheard> {
        self.loaded = None;
        let busy = self.busy;
        self.finish(false, Instant::now());
        tracing::warn!(device = self.config.name, code = %failure.code, reason = %failure.text, "worker lost");
        self.send(match busy {
            Some(Busy { job: Some(job), kill_at: Some(_), steps_done, .. }) => {
                EngineEvent::Cancelled { job, steps_done }
            }
            Some(Busy { job, .. }) => EngineEvent::Failed { job, failure },
            None => EngineEvent::Lost(failure),
        })
        .await
    }

    async fn start(&mut self) -> Result<(), Failure> {
        let (worker, info) = Worker::start(&self.config).await.inspect_err(|failure| {
            tracing::error!(device = self.config.name, code = %failure.code, reason = %failure.text, "worker not started");
        })?;
        tracing::info!(device = self.config.name, pid = info.pid, engine = %info.engine, version = %info.version, "worker ready");
        self.worker = Some(worker);
        self.loaded = None;
        // A closed channel ends the loop at the next event.
        let _unheard = self.send(EngineEvent::Ready(info)).await;
        Ok(())
    }

    fn finish(&mut self, well: bool, now: Instant) {
        self.watch.end(well, now);
        self.busy = None;
    }

    fn wake(&self) -> Instant {
        let far = Instant::now() + Duration::from_secs(3600);
        let kill = self.busy.and_then(|busy| busy.kill_at);
        self.watch.poll_timeout().into_iter().chain(kill).min().unwrap_or(far)
    }

    async fn send(&mut self, event: EngineEvent) -> Result<(), Unheard> {
        let waits = Instant::now();
        tokio::select! {
            sent = self.events.send(event) => sent.map_err(|_| Unheard)?,
            () = self.stop.cancelled() => return Err(Unheard),
        }
        self.watch.pause(waits.elapsed());
        Ok(())
    }
}

/// Stands for the audits of a model where times are measured.
fn audits_of(model: ModelId) -> ModelId {
    ModelId::from_bytes(model.as_bytes().map(|byte| !byte))
}

async fn next(worker: &mut Option<Worker>) -> Option<FromWorker> {
    match worker {
        Some(worker) => worker.next().await,
        None => std::future::pending().await,
    }
}

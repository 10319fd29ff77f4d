//! The worker process: owns a device, makes one clip after the other, and dies alone.
//!
//! Two threads, and a third while frames are encoded. The watch thread reads stdin: it hands orders to the main thread,
//! notes cancels, and ends the process at the end of stdin, even in the middle of a step, so that no worker outlives its
//! daemon. The main thread computes; only it writes messages. There is no async runtime here.
//!
//! Messages go to a duplicate of fd 1; fd 1 itself then points to stderr, so that a library's stray print is a line in
//! the log and not a broken frame.
//!
//! [`main`] is what `kinoflockd worker` runs: [`serve`] with the engine that has the models. Another [`Engine`] makes
//! another worker program with the same manners.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Read;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kinoflock_inference::{Commitment, RgbFrames};
use kinoflock_protocol::codec::Bytes;
use kinoflock_protocol::id::{BlobId, JobId, ModelId};
use kinoflock_protocol::limits::MAX_PREVIEW;

use self::encoding::Encoding;
use super::frames;
use super::wire::{
    self, AuditReport, AuditRun, Failure, FromWorker, Greeting, LoadRequest, LoadedReport, OpenRequest,
    Phase, RunRequest, StepReport, Timings, ToWorker, WireError, WorkerInfo,
};

mod adapters;
mod encoding;
pub mod local;
mod output;
mod pictures;
mod touch;

/// Orders that wait for the main thread. The daemon gives one at a time; cancels do not wait.
const MAX_ORDERS: usize = 4;
/// Checkpoints of a run that stay on disk: the daemon may still be reading the one before the newest.
const KEPT_CHECKPOINTS: usize = 2;
/// How long the exit handlers of libraries may take before the process is ended without them.
const EXIT_WITHIN: Duration = Duration::from_secs(1);
/// Exit codes of a worker.
const EXIT_LANGUAGE: u8 = 3;
const EXIT_PIPE: u8 = 4;

/// What computes in a worker.
pub trait Engine {
    /// Takes the device.
    ///
    /// # Errors
    /// When it is not there or its numbers are not known.
    fn open(&mut self, request: &OpenRequest) -> Result<WorkerInfo, Failure>;

    /// Reads a model's weights; returns at once if they are loaded.
    ///
    /// # Errors
    /// When they cannot be read.
    fn load(&mut self, request: &LoadRequest) -> Result<LoadedModel, Failure>;

    /// Reads a model's weights as a run needs them; returns at once if they are loaded so.
    ///
    /// # Errors
    /// As [`Engine::load`].
    fn prepare(&mut self, run: &RunRequest) -> Result<LoadedModel, Failure> {
        self.load(&run.model)
    }

    /// Whether a run can be made at all, before its model is loaded.
    ///
    /// # Errors
    /// Why not.
    fn check(&mut self, _request: &RunRequest) -> Result<(), Failure> {
        Ok(())
    }

    /// Makes frames with the loaded model.
    ///
    /// # Errors
    /// [`Stop::Cancelled`] when [`Context::cancelled`] said so, or what went wrong.
    fn run(&mut self, request: &RunRequest, context: &mut Context<'_>) -> Result<Made, Stop>;

    /// Looks at a step that another node computed, with the loaded model.
    ///
    /// # Errors
    /// When what was shown cannot be read, or what the device reports.
    fn audit(&mut self, audit: &AuditRun, context: &mut Context<'_>) -> Result<AuditReport, Failure>;

    /// Forgets everything that a panic may have left half done.
    fn reset(&mut self);
}

/// What is known of a loaded model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedModel {
    /// The architecture that runs it.
    pub architecture: String,
    /// In which numbers.
    pub dtype: String,
    /// Whether it was there before.
    pub cached: bool,
}

/// What a run made beside the frames, which [`Context::frames`] has.
#[derive(Debug)]
pub struct Made {
    /// The latents' values.
    pub latents: Vec<f32>,
    /// Their shape.
    pub latents_shape: Vec<usize>,
    /// What comes back beside them, with its shape.
    pub kept: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// blake3 of the latents before the first step and after each, those before a checkpoint included.
    pub state_hashes: Vec<[u8; 32]>,
    /// What the run commits to beside them.
    pub commitment: Commitment,
    /// Steps computed in this run.
    pub steps_done: u32,
}

/// Why a run ended without a clip.
#[derive(Debug)]
pub enum Stop {
    /// As asked.
    Cancelled,
    /// It failed.
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// What a run tells and asks while it goes on.
pub struct Context<'a> {
    out: &'a mut File,
    cancelled: &'a Cancelled,
    request: &'a RunRequest,
    timings: Timings,
    phase: Option<(Phase, Instant)>,
    step_since: Instant,
    steps_done: u32,
    /// Checkpoints of this run that are on disk, oldest first.
    checkpoints: VecDeque<PathBuf>,
    /// The clip, from its first frames on.
    encoding: Option<Encoding>,
}

impl<'a> Context<'a> {
    fn new(out: &'a mut File, cancelled: &'a Cancelled, request: &'a RunRequest) -> Self {
        Self {
            out,
            cancelled,
            request,
            timings: Timings::default(),
            phase: None,
            step_since: Instant::now(),
            steps_done: 0,
            checkpoints: VecDeque::new(),
            encoding: None,
        }
    }
}

impl Context<'_> {
    /// A phase begins; the one before is over.
    pub fn phase(&mut self, phase: Phase) {
        self.close_phase();
        let now = Instant::now();
        self.phase = Some((phase, now));
        self.step_since = now;
        self.tell(&FromWorker::Phase { job: Some(self.request.job), phase });
    }

    /// A step is done: so many of so many.
    pub fn step(&mut self, done: u32, total: u32) {
        let seconds = self.step_since.elapsed().as_secs_f64();
        self.step_since = Instant::now();
        self.steps_done = done;
        self.tell(&FromWorker::Step(StepReport { job: self.request.job, done, total, seconds }));
    }

    /// Shows rough frames of what the clip becomes.
    pub fn preview(&mut self, rough: &RgbFrames) {
        let png = frames::preview_png(rough, MAX_PREVIEW).and_then(|png| Bytes::new(png).ok());
        if let Some(png) = png {
            self.tell(&FromWorker::Preview { job: self.request.job, step: self.steps_done, png });
        }
    }

    /// Takes the clip's next finished frames: they are encoded while others are still made.
    ///
    /// # Errors
    /// When no encoder can be started, or it failed at frames before these.
    pub fn frames(&mut self, frames: RgbFrames) -> Result<(), Failure> {
        let encoding = match self.encoding.take() {
            Some(encoding) => encoding,
            None => {
                let size = (self.request.width as usize, self.request.height as usize);
                Encoding::new(size, self.request.fps)?
            }
        };
        if !encoding.push(frames) {
            let nothing = || Failure::new("encoder", "the encoder ended before the clip", true);
            return Err(encoding.finish().err().unwrap_or_else(nothing));
        }
        self.encoding = Some(encoding);
        Ok(())
    }

    /// Leaves a state from which the job can go on, if the daemon wants checkpoints. `latents` is the hash of the
    /// latents after the last step. A checkpoint that cannot be written is no reason to fail the job.
    pub fn checkpoint(&mut self, state: &[u8], latents: [u8; 32]) {
        let Some(folder) = &self.request.output.checkpoint else { return };
        let path = Path::new(folder.as_str()).join(wire::checkpoint_name(self.steps_done));
        let written = std::fs::create_dir_all(folder.as_str())
            .map_err(|error| Failure::new("write", &error.to_string(), true))
            .and_then(|()| output::write(&path, state));
        let file = match written {
            Ok(file) => file,
            Err(failure) => return say(&format!("checkpoint not written: {}", failure.code)),
        };
        self.checkpoints.push_back(path);
        if self.checkpoints.len() > KEPT_CHECKPOINTS
            && let Some(oldest) = self.checkpoints.pop_front()
            && let Err(error) = std::fs::remove_file(&oldest)
        {
            say(&format!("an old checkpoint not removed: {error}"));
        }
        let latents = BlobId::from_bytes(latents);
        self.tell(&FromWorker::Checkpoint { job: self.request.job, step: self.steps_done, file, latents });
    }

    /// Keeps a state of the latents for audits, packed `[1, tokens, C]`, if the daemon wants them. One that cannot be
    /// written is no reason to fail the job.
    pub fn state(&mut self, index: usize, shape: &[usize], values: &[f32]) {
        let Some(folder) = &self.request.output.states else { return };
        let path = Path::new(folder.as_str()).join(wire::state_name(index));
        let written = output::latents_file(&[(output::LATENTS, shape, values)]).and_then(|bytes| {
            std::fs::create_dir_all(folder.as_str())
                .and_then(|()| std::fs::write(&path, bytes))
                .map_err(|error| Failure::new("write", &error.to_string(), true))
        });
        if let Err(failure) = written {
            say(&format!("a state for audits not written: {}", failure.code));
        }
    }

    /// Whether states are wanted: reading them back from a device costs time.
    #[must_use]
    pub fn wants_states(&self) -> bool {
        self.request.output.states.is_some()
    }

    /// Whether the job is to stop.
    #[must_use]
    pub fn cancelled(&self) -> bool {
        self.cancelled.is(self.request.job)
    }

    fn close_phase(&mut self) {
        let Some((phase, since)) = self.phase.take() else { return };
        let seconds = since.elapsed().as_secs_f64();
        match phase {
            Phase::Load => self.timings.load += seconds,
            Phase::Text => self.timings.text += seconds,
            Phase::Step => self.timings.steps += seconds,
            Phase::Decode => self.timings.decode += seconds,
            Phase::Encode => self.timings.encode += seconds,
        }
    }

    fn tell(&mut self, message: &FromWorker) {
        tell(self.out, message);
    }
}

/// The worker of `kinoflockd worker`.
pub fn main() -> ExitCode {
    serve(local::LocalEngine::default())
}

/// Runs a worker with this engine until its stdin ends.
pub fn serve(mut engine: impl Engine) -> ExitCode {
    let mut out = match claim_stdout() {
        Ok(out) => out,
        Err(error) => {
            say(&format!("worker cannot take its stdout: {error}"));
            return ExitCode::from(EXIT_PIPE);
        }
    };
    if std::io::Write::write_all(&mut out, &Greeting::OURS.to_bytes()).is_err() {
        return ExitCode::from(EXIT_PIPE);
    }
    let cancelled = Cancelled::default();
    let (orders, inbox) = sync_channel(MAX_ORDERS);
    let noted = cancelled.clone();
    let watch =
        std::thread::Builder::new().name("watch".to_owned()).spawn(move || watch_stdin(&orders, &noted));
    if let Err(error) = watch {
        say(&format!("worker cannot start its watch thread: {error}"));
        return ExitCode::from(EXIT_PIPE);
    }
    obey(&mut engine, &inbox, &mut out, &cancelled);
    ExitCode::SUCCESS
}

/// The job that is to stop.
#[derive(Debug, Clone, Default)]
struct Cancelled(Arc<Mutex<Option<JobId>>>);

impl Cancelled {
    fn set(&self, job: JobId) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
    }

    fn is(&self, job: JobId) -> bool {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) == Some(job)
    }
}

fn claim_stdout() -> std::io::Result<File> {
    let out = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
    Ok(File::from(out))
}

fn watch_stdin(orders: &SyncSender<ToWorker>, cancelled: &Cancelled) {
    let mut stdin = std::io::stdin().lock();
    let mut greeting = [0; Greeting::LEN];
    if stdin.read_exact(&mut greeting).is_err() {
        exit(0);
    }
    if let Err(error) = Greeting::check(greeting) {
        say(&error.to_string());
        exit(EXIT_LANGUAGE);
    }
    loop {
        match wire::read_message(&mut stdin) {
            Ok(Some(ToWorker::Cancel(job))) => cancelled.set(job),
            // Waiting for room here would hide the end of stdin.
            Ok(Some(order)) => match orders.try_send(order) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => {
                    say(&format!("daemon gave more than {MAX_ORDERS} orders at once"));
                    exit(EXIT_LANGUAGE);
                }
                Err(TrySendError::Disconnected(_)) => exit(0),
            },
            Ok(None) => exit(0),
            Err(error) => {
                say(&error.to_string());
                exit(if matches!(error, WireError::Io(_)) { 0 } else { EXIT_LANGUAGE });
            }
        }
    }
}

fn obey(engine: &mut impl Engine, inbox: &Receiver<ToWorker>, out: &mut File, cancelled: &Cancelled) {
    while let Ok(order) = inbox.recv() {
        match order {
            ToWorker::Open(request) => {
                if request.memory_limit > 0 && request.device.as_str() == "cpu" {
                    limit_memory(request.memory_limit);
                }
                let message = match guarded(engine, |engine| engine.open(&request)) {
                    Ok(info) => FromWorker::Ready(info),
                    Err(failure) => FromWorker::Failed { job: None, failure },
                };
                tell(out, &message);
            }
            ToWorker::Load(request) => {
                if let Err(failure) = load(engine, out, None, request.model, |engine| engine.load(&request)) {
                    tell(out, &FromWorker::Failed { job: None, failure });
                }
            }
            ToWorker::Run(request) => {
                let message = run(engine, out, cancelled, &request);
                tell(out, &message);
            }
            ToWorker::Audit(audit) => {
                let message = look(engine, out, cancelled, &audit);
                tell(out, &message);
            }
            ToWorker::Shutdown => return,
            // Noted by the watch thread.
            ToWorker::Cancel(_) => {}
        }
    }
}

/// Loads a model if it is not loaded, and answers the seconds that it took.
fn load<E: Engine>(
    engine: &mut E,
    out: &mut File,
    job: Option<JobId>,
    model: ModelId,
    read: impl FnOnce(&mut E) -> Result<LoadedModel, Failure>,
) -> Result<f64, Failure> {
    let since = Instant::now();
    tell(out, &FromWorker::Phase { job, phase: Phase::Load });
    let loaded = guarded(engine, read)?;
    let seconds = if loaded.cached { 0.0 } else { since.elapsed().as_secs_f64() };
    tell(
        out,
        &FromWorker::Loaded(LoadedReport {
            job,
            model,
            seconds,
            architecture: wire::Name::truncated(&loaded.architecture),
            dtype: wire::Name::truncated(&loaded.dtype),
        }),
    );
    Ok(seconds)
}

fn run(engine: &mut impl Engine, out: &mut File, cancelled: &Cancelled, request: &RunRequest) -> FromWorker {
    let job = request.job;
    if let Err(failure) = guarded(engine, |engine| engine.check(request)) {
        return FromWorker::Failed { job: Some(job), failure };
    }
    let load = match load(engine, out, Some(job), request.model.model, |engine| engine.prepare(request)) {
        Ok(seconds) => seconds,
        Err(failure) => return FromWorker::Failed { job: Some(job), failure },
    };
    if cancelled.is(job) {
        return FromWorker::Cancelled { job, steps_done: 0 };
    }
    let mut context = Context::new(out, cancelled, request);
    context.timings.load = load;
    let ended = guarded_run(engine, &mut context).and_then(|made| output::finish(&made, &mut context));
    match ended {
        Ok(report) => FromWorker::Done(Box::new(report)),
        Err(Stop::Cancelled) => FromWorker::Cancelled { job, steps_done: context.steps_done },
        Err(Stop::Failed(failure)) => FromWorker::Failed { job: Some(job), failure },
    }
}

fn look(engine: &mut impl Engine, out: &mut File, cancelled: &Cancelled, audit: &AuditRun) -> FromWorker {
    let job = audit.run.job;
    let read = load(engine, out, Some(job), audit.run.model.model, |engine| engine.prepare(&audit.run));
    let found = read.and_then(|_| {
        let mut context = Context::new(out, cancelled, &audit.run);
        guarded(engine, |engine| engine.audit(audit, &mut context))
    });
    match found {
        Ok(report) => FromWorker::Audited(Box::new(report)),
        Err(failure) => FromWorker::Failed { job: Some(job), failure },
    }
}

fn guarded<E: Engine, T>(engine: &mut E, f: impl FnOnce(&mut E) -> Result<T, Failure>) -> Result<T, Failure> {
    std::panic::catch_unwind(AssertUnwindSafe(|| f(engine))).unwrap_or_else(|_| {
        engine.reset();
        Err(panicked())
    })
}

fn guarded_run(engine: &mut impl Engine, context: &mut Context<'_>) -> Result<Made, Stop> {
    let request = context.request;
    std::panic::catch_unwind(AssertUnwindSafe(|| engine.run(request, context))).unwrap_or_else(|_| {
        engine.reset();
        Err(panicked().into())
    })
}

fn panicked() -> Failure {
    Failure::new(
        "worker_panic",
        "the engine failed at a place where it never should: please report it with the node's log",
        true,
    )
}

/// A limit that cannot be set is said and not fatal: it protects the operator's machine, not the job.
fn limit_memory(bytes: u64) {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    if let Err(error) = setrlimit(Resource::Data, limit) {
        say(&format!("memory limit of {bytes} bytes not set: {error}"));
    }
}

/// Without a daemon to hear it there is nothing left to do.
fn tell(out: &mut File, message: &FromWorker) {
    if let Err(error) = wire::write_message(out, message) {
        say(&format!("daemon does not hear: {error}"));
        exit(EXIT_PIPE);
    }
}

/// Ends the process, exit handlers of libraries or not.
fn exit(code: u8) -> ! {
    let _no_thread = std::thread::Builder::new().spawn(|| {
        std::thread::sleep(EXIT_WITHIN);
        std::process::abort();
    });
    std::process::exit(code.into())
}

/// A line for the daemon's log.
#[expect(clippy::print_stderr, reason = "stderr is a worker's log: the daemon reads it line by line")]
fn say(line: &str) {
    eprintln!("{line}");
}

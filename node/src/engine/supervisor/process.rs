//! A worker process as the supervisor holds it: its pipes, its start, and what it died of.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use kinoflock_protocol::frame::FrameReader;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::WorkerConfig;
use crate::engine::stderr::{self, Printed};
use crate::engine::wire::{self, Failure, FromWorker, Greeting, RunRequest, ToWorker, WireError, WorkerInfo};

/// What the Rust runtime prints when an allocation fails, before it aborts.
const ALLOCATION_FAILED: &str = "memory allocation of";
/// How long the system may take to end a killed process.
const REAP: Duration = Duration::from_secs(10);
/// How long the last printed lines may take to arrive after the end of the process.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A running worker. Dropping it kills the process.
pub(super) struct Worker {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    frames: FrameReader,
    printed: Printed,
    printing: JoinHandle<()>,
    /// Why its messages cannot be read any more.
    fault: Option<WireError>,
}

impl Worker {
    /// Starts the program, greets, and waits until it has its device.
    pub(super) async fn start(config: &WorkerConfig) -> Result<(Self, WorkerInfo), Failure> {
        let mut worker = Self::launch(config)?;
        let opened = timeout(config.deadlines.greeting, worker.open(config)).await;
        match opened {
            Ok(Ok(info)) => Ok((worker, info)),
            // The worker itself says why.
            Ok(Err(Opening::Refused(failure))) => {
                worker.kill().await;
                Err(failure)
            }
            Ok(Err(Opening::Wire(error @ (WireError::Version { .. } | WireError::NotAWorker { .. })))) => {
                worker.kill().await;
                Err(Failure::new(error.code(), &error.to_string(), false))
            }
            Ok(Err(Opening::Wire(_) | Opening::Ended)) => Err(worker.cause_of_death().await),
            Err(_) => {
                worker.kill().await;
                let limit = config.deadlines.greeting.as_secs_f64();
                Err(deadline(&format!("it did not report its device within {limit:.1} s of its start")))
            }
        }
    }

    fn launch(config: &WorkerConfig) -> Result<Self, Failure> {
        let mut command = Command::new(&config.program);
        command.args(&config.args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: Ctrl-C on the daemon's terminal is for the daemon, which then drains.
        command.process_group(0).kill_on_drop(true);
        if config.open.threads > 0 {
            command.env("RAYON_NUM_THREADS", config.open.threads.to_string());
        }
        let mut child = command.spawn().map_err(|error| {
            let text = format!(
                "worker program {} cannot be started: {error}; see engine.worker",
                config.program.display()
            );
            Failure::new("worker_program", &text, false)
        })?;
        let stdin = child.stdin.take().expect("invariant: stdin is piped");
        let stdout = child.stdout.take().expect("invariant: stdout is piped");
        let stderr = child.stderr.take().expect("invariant: stderr is piped");
        let printed = Printed::default();
        let printing = tokio::spawn(stderr::read(stderr, config.name.clone(), printed.clone()));
        let frames = FrameReader::new(wire::MAX_FRAME);
        Ok(Self { child, stdin, stdout, frames, printed, printing, fault: None })
    }

    async fn open(&mut self, config: &WorkerConfig) -> Result<WorkerInfo, Opening> {
        // A program that is no worker may end before it reads: its first bytes say more than the broken pipe.
        let _greeted = self.stdin.write_all(&Greeting::OURS.to_bytes()).await;
        let mut greeting = [0; Greeting::LEN];
        if self.stdout.read_exact(&mut greeting).await.is_err() {
            return Err(Opening::Ended);
        }
        Greeting::check(greeting)?;
        self.stdin
            .write_all(&wire::to_frame(&ToWorker::Open(config.open.clone()))?)
            .await
            .map_err(WireError::from)?;
        match self.next().await {
            Some(FromWorker::Ready(info)) => Ok(info),
            Some(FromWorker::Failed { failure, .. }) => Err(Opening::Refused(failure)),
            _ => Err(Opening::Ended),
        }
    }

    /// From now on the words of this job must not be logged.
    pub(super) fn hide(&self, run: &RunRequest) {
        self.printed.hide(&[&run.prompt, &run.negative]);
    }

    /// Sends a message. A worker that does not read is as good as dead after `limit`.
    pub(super) async fn send(&mut self, message: &ToWorker, limit: Duration) -> Result<(), WireError> {
        let frame = wire::to_frame(message)?;
        match timeout(limit, self.stdin.write_all(&frame)).await {
            Ok(written) => Ok(written?),
            Err(late) => Err(std::io::Error::from(late).into()),
        }
    }

    /// The next message; `None` when there will be no more. May be dropped while it waits without losing anything.
    pub(super) async fn next(&mut self) -> Option<FromWorker> {
        match self.read().await {
            Ok(message) => message,
            Err(error) => {
                self.fault = Some(error);
                None
            }
        }
    }

    async fn read(&mut self) -> Result<Option<FromWorker>, WireError> {
        let mut buffer = [0; 16 * 1024];
        loop {
            if let Some(content) = self.frames.next_frame()? {
                return Ok(Some(wire::decode(&content)?));
            }
            match self.stdout.read(&mut buffer).await? {
                0 => return Ok(None),
                read => self.frames.push(&buffer[..read]),
            }
        }
    }

    /// Closes its stdin, at which it ends, and kills it if it does not.
    pub(super) async fn end(self, limit: Duration) {
        let Self { mut child, stdin, .. } = self;
        drop(stdin);
        if timeout(limit, child.wait()).await.is_err() {
            reap(&mut child).await;
        }
    }

    /// Kills it.
    pub(super) async fn kill(mut self) {
        reap(&mut self.child).await;
    }

    /// What it died of. Kills it if it is not dead, since nobody understands it any more.
    pub(super) async fn cause_of_death(mut self) -> Failure {
        // Its stdout is closed: either it is about to be gone, or it is beyond understanding.
        let status = match timeout(LAST_WORDS * 2, self.child.wait()).await {
            Ok(Ok(status)) => Some(status),
            _ => None,
        };
        if status.is_none() {
            reap(&mut self.child).await;
        }
        let _last_words = timeout(LAST_WORDS, &mut self.printing).await;
        match (status, self.fault) {
            (_, Some(error @ (WireError::Codec(_) | WireError::Frame(_)))) => Failure::new(
                "worker_pipe",
                &format!("the worker sent what nobody understands: {error}"),
                true,
            ),
            (Some(status), _) => of_status(status, self.printed.tail_contains(ALLOCATION_FAILED)),
            (None, _) => killed("it closed its messages and went on"),
        }
    }
}

enum Opening {
    Wire(WireError),
    Refused(Failure),
    Ended,
}

impl From<WireError> for Opening {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

async fn reap(child: &mut Child) {
    // An error means that it is dead already. SIGKILL ends a stopped process too.
    let _dead_already = child.start_kill();
    if timeout(REAP, child.wait()).await.is_err() {
        tracing::error!(pid = child.id(), "worker does not die of SIGKILL: a driver holds it");
    }
}

/// The failure of a job whose worker was killed by the daemon.
pub(super) fn killed(why: &str) -> Failure {
    Failure::new("worker_killed", &format!("the worker was killed: {why}"), true)
}

/// The failure of a job whose worker took too long.
pub(super) fn deadline(why: &str) -> Failure {
    Failure::new("worker_deadline", &format!("the worker was killed: {why}"), true)
}

fn of_status(status: ExitStatus, allocation_failed: bool) -> Failure {
    use std::os::unix::process::ExitStatusExt;
    let less = "ask for fewer frames, a smaller size or a tiled decode";
    match (status.signal(), status.code()) {
        _ if allocation_failed => {
            let text = format!("the worker ran out of memory: an allocation failed; {less}");
            Failure::new("out_of_memory", &text, true)
        }
        (Some(9), _) => {
            let text =
                format!("the worker was killed (signal 9), as the system does when memory runs out; {less}");
            Failure::new("out_of_memory", &text, true)
        }
        (Some(signal), _) => {
            let name = match signal {
                6 => " (abort)",
                7 => " (bus error: a weight file may have been cut while it was used)",
                11 => " (segmentation fault)",
                15 => " (terminated)",
                _ => "",
            };
            Failure::new("worker_crashed", &format!("the worker died of signal {signal}{name}"), true)
        }
        (None, code) => {
            let code = code.unwrap_or_default();
            Failure::new("worker_crashed", &format!("the worker ended by itself with code {code}"), true)
        }
    }
}

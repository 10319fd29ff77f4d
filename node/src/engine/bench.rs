//! Measured speed: what a worker makes of a job, in work units a second.
//!
//! Work is computed by everyone alike from the model's figures ([`kinoflock_protocol::work`]); seconds are measured by
//! the worker, without loading.

use kinoflock_protocol::id::JobId;
use kinoflock_protocol::units::Millis;
use kinoflock_protocol::work::{JobShape, Work, WorkModel, work};
use tokio::sync::mpsc::Receiver;

use super::supervisor::{EngineEvent, EngineHandle};
use super::wire::{DoneReport, Failure, RunRequest};

/// What a job cost and how fast it went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// The job's work.
    pub work: Work,
    /// Seconds that it took, without loading.
    pub seconds: f64,
    /// Work units a second.
    pub per_second: u64,
}

/// The speed at which a job was made.
#[must_use]
pub fn speed(model: &WorkModel, request: &RunRequest, report: &DoneReport) -> Speed {
    let shape = JobShape {
        frames: request.frames,
        width: request.width,
        height: request.height,
        // Not those of the report: a model that works in stages has more of them than a job.
        steps: request.steps,
        guided: request.guidance > 1.0,
    };
    let work = work(model, &shape);
    let seconds = report.timings.compute();
    let took = Millis((seconds * 1000.0).round().max(1.0) as u64);
    Speed { work, seconds, per_second: work.speed(took) }
}

/// Runs a job on an idle engine to its end, and passes on every event meanwhile.
///
/// # Errors
/// What the worker failed of; `engine_stopped` if the engine ended, `cancelled` if somebody cancelled the job.
pub async fn run_to_end(
    engine: &EngineHandle,
    events: &mut Receiver<EngineEvent>,
    request: RunRequest,
    mut seen: impl FnMut(&EngineEvent),
) -> Result<DoneReport, Failure> {
    let wanted: JobId = request.job;
    engine.run(request).map_err(|error| Failure::new(error.code(), &error.to_string(), true))?;
    while let Some(event) = events.recv().await {
        seen(&event);
        match event {
            EngineEvent::Done(report) if report.job == wanted => return Ok(*report),
            EngineEvent::Failed { job, failure } if job == Some(wanted) => return Err(failure),
            EngineEvent::Cancelled { job, .. } if job == wanted => {
                return Err(Failure::new("cancelled", "the job was cancelled", true));
            }
            _ => {}
        }
    }
    Err(Failure::new("engine_stopped", "the engine has stopped", true))
}

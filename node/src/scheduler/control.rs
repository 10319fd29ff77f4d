//! What devices report and what operators and requesters command.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kinoflock_protocol::id::{JobId, ModelId, RequesterId};
use kinoflock_protocol::refusal::{Reason, Refusal};

use super::device::{DeviceId, DeviceMode, Measured, Running};
use super::{Cause, Event, MAX_FAILURES, MAX_STARTS, Outcome, Scheduler, Stage, too_many_starts};

/// What a cancel did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancelled {
    /// The job waited and is over.
    Removed,
    /// The job runs; the device was told to stop.
    Stopping,
    /// The job was over before.
    Ended(Outcome),
}

impl Scheduler {
    /// A device has loaded a model.
    pub fn handle_loaded(&mut self, device: DeviceId, model: ModelId) {
        if let Some(device) = self.devices.get_mut(&device) {
            device.loaded = Some(model);
        }
    }

    /// A running job has got on: how much of it is done, in thousandths.
    pub fn handle_progress(&mut self, device: DeviceId, job: &JobId, done: u16, now: Instant) {
        let running = self.devices.get_mut(&device).and_then(|device| device.running.as_mut());
        if let Some(running) = running.filter(|running| running.job == *job) {
            running.progress(done, now);
        }
        self.settle(now);
    }

    /// A job's results are stored and its receipt is written.
    pub fn handle_done(&mut self, device: DeviceId, job: &JobId, measured: Measured, now: Instant) {
        let running = self.devices.get(&device).and_then(|device| device.running.as_ref());
        let took = running.map_or(Duration::ZERO, |running| now.saturating_duration_since(running.since));
        if self.release_device(device, job).is_some() {
            let ended = self.end(*job, Outcome::Done);
            if let (Some(ended), Some(device)) = (ended, self.devices.get_mut(&device)) {
                device.loaded = Some(ended.wanted.model);
                device.learn(&ended.wanted, &measured, took);
            }
        }
        self.settle(now);
    }

    /// A worker failed a job, or died with it. It is started once more unless trying again cannot help.
    pub fn handle_failed(&mut self, device: DeviceId, job: &JobId, cause: Cause, now: Instant) {
        let Some(cancelled) = self.release_device(device, job) else { return };
        if let Some(device) = self.devices.get_mut(&device) {
            // Whatever it had loaded, a failed worker is started anew.
            device.loaded = None;
        }
        let Some(entry) = self.jobs.live.get_mut(job) else { return };
        entry.failures += 1;
        if cancelled {
            self.end(*job, Outcome::Cancelled);
        } else if !cause.here || entry.failures >= MAX_FAILURES {
            self.end(*job, Outcome::Failed(cause));
        } else if entry.starts >= MAX_STARTS {
            let starts = entry.starts;
            self.end(*job, Outcome::Failed(too_many_starts(starts)));
        } else {
            entry.avoid = Some(device);
            // The second start is charged anew. A job that fails for good stays charged: it used the device.
            self.refund(job, 1000);
            self.requeue(job, Some(cause));
        }
        self.settle(now);
    }

    /// A job was stopped, on a cancel or because the daemon stops. A cancelled one is over; the other waits again and
    /// the stop does not count against it.
    pub fn handle_stopped(&mut self, device: DeviceId, job: &JobId, now: Instant) {
        let done =
            self.devices.get(&device).and_then(|device| device.running.as_ref()).map_or(0, Running::done);
        let Some(cancelled) = self.release_device(device, job) else { return };
        self.refund(job, 1000 - done);
        if cancelled {
            self.end(*job, Outcome::Cancelled);
        } else {
            if let Some(entry) = self.jobs.live.get_mut(job) {
                entry.starts = entry.starts.saturating_sub(1);
            }
            self.requeue(job, None);
        }
        self.settle(now);
    }

    /// The requester wants no more of a job.
    ///
    /// # Errors
    /// When there is no such job, or it is another's.
    pub fn handle_cancel(
        &mut self,
        job: &JobId,
        by: &RequesterId,
        now: Instant,
    ) -> Result<Cancelled, Refusal> {
        if let Some(outcome) = self.jobs.ended(job) {
            return Ok(Cancelled::Ended(outcome.clone()));
        }
        let entry = self.jobs.live.get(job).ok_or_else(|| Refusal::new(Reason::JobUnknown, "").given(job))?;
        if entry.origin.requester != *by {
            return Err(Refusal::new(Reason::NotYours, "").limit(entry.origin.requester, by));
        }
        let cancelled = match entry.stage {
            Stage::Running { device } => {
                let running = self.devices.get_mut(&device).and_then(|device| device.running.as_mut());
                if let Some(running) = running.filter(|running| !running.cancelled) {
                    running.cancelled = true;
                    self.events.push_back(Event::Cancel { device, job: *job });
                }
                Cancelled::Stopping
            }
            Stage::Committing | Stage::AwaitingInputs { .. } | Stage::Queued => {
                let (requester, starts) = (entry.origin.requester, entry.starts);
                self.end(*job, Outcome::Cancelled);
                if starts == 0 {
                    self.jobs.unspend(&requester, job);
                }
                Cancelled::Removed
            }
        };
        self.settle(now);
        Ok(cancelled)
    }

    /// Whether a job that was put on this device was cancelled since.
    #[must_use]
    pub fn is_cancelled(&self, device: DeviceId, job: &JobId) -> bool {
        let running = self.devices.get(&device).and_then(|device| device.running.as_ref());
        running.is_some_and(|running| running.job == *job && running.cancelled)
    }

    /// Pauses one device or all: running jobs go on, no others start. With an end, jobs are still taken for later.
    pub fn pause(&mut self, device: Option<DeviceId>, until: Option<Instant>, now: Instant) {
        self.set_mode(device, DeviceMode::Paused { until }, now);
    }

    /// Lets one device or all start jobs again.
    pub fn resume(&mut self, device: Option<DeviceId>, now: Instant) {
        self.set_mode(device, DeviceMode::Open, now);
    }

    /// Drains one device or all: running jobs go on, no others start, none are taken. [`Event::Drained`] follows.
    pub fn drain(&mut self, device: Option<DeviceId>, until: Option<Instant>, now: Instant) {
        self.set_mode(device, DeviceMode::Draining { until }, now);
        let empty = self
            .devices
            .iter()
            .filter(|(id, entry)| device.is_none_or(|of| of == **id) && entry.running.is_none());
        let drained: Vec<_> = empty.map(|(id, _)| Event::Drained { device: *id }).collect();
        self.events.extend(drained);
    }

    /// A device's worker cannot be started, or can again.
    pub fn set_up(&mut self, device: DeviceId, up: bool, now: Instant) {
        let mode = self.devices.get(&device).map(|device| device.mode);
        match (mode, up) {
            (Some(DeviceMode::Down), true) => self.set_mode(Some(device), DeviceMode::Open, now),
            (Some(DeviceMode::Open), false) => self.set_mode(Some(device), DeviceMode::Down, now),
            // What the operator said stands: a worker that returns does not resume a paused device.
            _ => {}
        }
    }

    /// Replaces the models of a device, with their measured speed in work units a second where there is one.
    pub fn set_models(&mut self, device: DeviceId, models: BTreeMap<ModelId, Option<u64>>, now: Instant) {
        if let Some(device) = self.devices.get_mut(&device) {
            device.set_models(models);
        }
        self.settle(now);
    }

    fn set_mode(&mut self, of: Option<DeviceId>, mode: DeviceMode, now: Instant) {
        for (id, device) in &mut self.devices {
            if of.is_none_or(|of| of == *id) {
                device.mode = mode;
            }
        }
        self.settle(now);
    }

    /// Takes the job off the device; says whether it was cancelled, or `None` when the device does not run it (a late
    /// report about a job that the device has lost).
    fn release_device(&mut self, device: DeviceId, job: &JobId) -> Option<bool> {
        let entry = self.devices.get_mut(&device)?;
        let running = entry.running.take_if(|running| running.job == *job)?;
        if matches!(entry.mode, DeviceMode::Draining { .. }) {
            self.events.push_back(Event::Drained { device });
        }
        Some(running.cancelled)
    }

    fn refund(&mut self, job: &JobId, undone: u16) {
        if let Some(entry) = self.jobs.live.get(job) {
            let work = u128::from(entry.wanted.work.0) * u128::from(undone) / 1000;
            self.fairness.refund(&entry.origin, u64::try_from(work).unwrap_or(u64::MAX));
        }
    }

    fn requeue(&mut self, job: &JobId, cause: Option<Cause>) {
        if let Some(entry) = self.jobs.live.get_mut(job) {
            entry.stage = Stage::Queued;
            entry.told = None;
            self.events.push_back(Event::Requeued { job: *job, cause });
        }
    }
}

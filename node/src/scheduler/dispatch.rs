//! Starting jobs, and telling the waiting ones where they stand.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kinoflock_protocol::id::{JobId, ModelId};

use super::device::{DeviceId, DeviceMode, Running};
use super::fair::{Picker, Waiting, WaitingFlows};
use super::jobs::Job;
use super::plan::{Candidate, Planned, plan};
use super::{Eta, Event, Origin, Scheduler, Stage, Times, invariants};
use crate::policy::Wanted;

/// An expected finish is told again when it moved by more than this and by more than a tenth of what was left.
const ETA_GRAIN: Duration = Duration::from_secs(2);

/// The number of arrival of a job that does not exist yet: after all others.
const NOT_YET: u64 = u64::MAX;

/// Leases come after the jobs that are here, in the order in which they were opened.
const LEASED: u64 = u64::MAX / 2;

/// What a plan is made of, beside the jobs that are here.
#[derive(Clone, Copy)]
enum Scope<'a> {
    /// What can start now.
    Start,
    /// Every job that waits.
    Waiting,
    /// Also the jobs that open leases will become: who asks now comes after who asked before.
    Coming(Option<(JobId, &'a Origin, &'a Wanted)>),
}

/// A device as `/status` shows it.
#[derive(Debug, Clone)]
pub struct DeviceStatus {
    /// Which.
    pub id: DeviceId,
    /// Its name.
    pub name: String,
    /// Whether it may start jobs.
    pub mode: DeviceMode,
    /// The model in its memory.
    pub loaded: Option<ModelId>,
    /// Its job.
    pub running: Option<JobId>,
    /// How much of it is done, in thousandths.
    pub done: u16,
    /// How long until it is free.
    pub busy_for: Duration,
    /// Measured speeds in work units a second.
    pub speeds: BTreeMap<ModelId, Option<u64>>,
}

/// The queue as `/status` and the advert show it.
#[derive(Debug, Clone)]
pub struct QueueStatus {
    /// Jobs that wait.
    pub waiting: u32,
    /// Jobs that run.
    pub running: u32,
    /// Work units of both.
    pub work: u64,
    /// Open leases.
    pub leases: u32,
    /// How long until the first device is free for a new job, open leases counted as jobs; `None` when none is open.
    pub wait: Option<Duration>,
}

impl Scheduler {
    /// Every device.
    #[must_use]
    pub fn devices(&self, now: Instant) -> Vec<DeviceStatus> {
        let status = |(id, device): (&DeviceId, &super::Device)| DeviceStatus {
            id: *id,
            name: device.name.clone(),
            mode: device.mode,
            loaded: device.loaded,
            running: device.running.as_ref().map(|running| running.job),
            done: device.running.as_ref().map_or(0, Running::done),
            busy_for: device.busy_for(now),
            speeds: device
                .models
                .iter()
                .map(|(model, speed)| (*model, speed.rate.map(|rate| rate as u64)))
                .collect(),
        };
        self.devices.iter().map(status).collect()
    }

    /// The queue in figures.
    #[must_use]
    pub fn queue(&self, now: Instant) -> QueueStatus {
        let waiting = self.jobs.waiting_count(|_| true);
        let planned = self.plan(Scope::Coming(None), now);
        let free_at = |id: &DeviceId, device: &super::Device| {
            let own = device.opens_at(now)?.max(now + device.busy_for(now));
            let last =
                planned.iter().filter(|planned| planned.device == *id).map(|planned| planned.finishes).max();
            Some(last.map_or(own, |last| last.max(own)))
        };
        let wait = self.devices.iter().filter_map(|(id, device)| free_at(id, device)).min();
        QueueStatus {
            waiting,
            running: u32::try_from(self.jobs.live.len()).unwrap_or(u32::MAX) - waiting,
            work: self.jobs.live.values().fold(0_u64, |sum, job| sum.saturating_add(job.wanted.work.0)),
            leases: u32::try_from(self.leases.len()).unwrap_or(u32::MAX),
            wait: wait.map(|at| at.saturating_duration_since(now)),
        }
    }

    /// Where a waiting job stands: jobs before it and expected times.
    #[must_use]
    pub fn standing(&self, job: &JobId, now: Instant) -> Option<(u32, Eta)> {
        let entry = self.jobs.live.get(job).filter(|entry| entry.waits())?;
        let planned = self.plan(Scope::Waiting, now);
        match planned.iter().position(|planned| planned.job == *job) {
            Some(index) => Some((index_to_position(index), Some(planned[index].times()))),
            None => Some((self.jobs.waiting_count(|other| other.seq < entry.seq), None)),
        }
    }

    /// What follows from any change: starts, told positions.
    pub(super) fn settle(&mut self, now: Instant) {
        self.start_what_can(now);
        self.tell_positions(now);
        invariants::debug_check(self);
    }

    /// Where a job that does not exist yet would stand, if every open lease became a job: two that ask at once must not
    /// both be promised the same free device.
    pub(super) fn forecast(&self, origin: &Origin, wanted: &Wanted, now: Instant) -> (u32, Eta) {
        let id = JobId::from_bytes([0; 32]);
        let planned = self.plan(Scope::Coming(Some((id, origin, wanted))), now);
        match planned.iter().position(|planned| planned.job == id) {
            Some(index) => (index_to_position(index), Some(planned[index].times())),
            None => (self.jobs.waiting_count(|_| true), None),
        }
    }

    fn plan(&self, scope: Scope<'_>, now: Instant) -> Vec<Planned> {
        let for_start = matches!(scope, Scope::Start);
        let mut waiting = Vec::new();
        for (id, job) in self.jobs.live.iter().filter(|(_, job)| self.is_planned(job, for_start)) {
            let candidate = Candidate { wanted: job.wanted, bypassed: job.bypassed, avoid: job.avoid };
            let work = job.wanted.work.0;
            let (origin, seq, came) = (job.origin, job.seq, job.came);
            waiting.push(Waiting { job: *id, origin, seq, work, came, candidate });
        }
        if let Scope::Coming(extra) = scope {
            let coming = |job: JobId, origin: &Origin, wanted: &Wanted, seq: u64| {
                let candidate = Candidate { wanted: *wanted, bypassed: 0, avoid: None };
                let came = self.fairness.present(origin);
                Waiting { job, origin: *origin, seq, work: wanted.work.0, came, candidate }
            };
            let leased = self.leases.iter().filter(|(_, lease)| self.is_reachable(&lease.wanted));
            waiting.extend(
                leased.map(|(_, l)| coming(lease_job(l.number), &l.origin, &l.wanted, LEASED + l.number)),
            );
            waiting.extend(extra.map(|(id, origin, wanted)| coming(id, origin, wanted, NOT_YET)));
        }
        let picker = Picker::new(&self.fairness, waiting.into_iter());
        plan(&self.devices, picker, now, for_start)
    }

    /// For starting, only what can start counts; for telling, a job that waits for inputs or disk keeps its place.
    fn is_planned(&self, job: &Job, for_start: bool) -> bool {
        let ready = job.stage == Stage::Queued || (!for_start && job.waits());
        ready && self.is_reachable(&job.wanted)
    }

    /// Whether some device will run it at a known time.
    fn is_reachable(&self, wanted: &Wanted) -> bool {
        let reachable = |device: &super::Device| {
            !matches!(
                device.mode,
                DeviceMode::Down | DeviceMode::Paused { until: None } | DeviceMode::Draining { until: None }
            ) && device.fits(wanted).is_ok()
        };
        self.devices.values().any(reachable)
    }

    fn start_what_can(&mut self, now: Instant) {
        let idle = |device: &super::Device| device.is_idle() && device.mode == DeviceMode::Open;
        while self.devices.values().any(idle) {
            let planned = self.plan(Scope::Start, now);
            let idle_device = |id: &DeviceId| self.devices.get(id).is_some_and(idle);
            let next = planned.iter().find(|planned| planned.starts <= now && idle_device(&planned.device));
            let Some(next) = next.copied() else { break };
            self.start(&next, now);
        }
    }

    fn start(&mut self, planned: &Planned, now: Instant) {
        if let Some(passed) = planned.bypassed.and_then(|job| self.jobs.live.get_mut(&job)) {
            passed.bypassed += 1;
        }
        let Some(job) = self.jobs.live.get_mut(&planned.job) else { return };
        job.stage = Stage::Running { device: planned.device };
        job.starts += 1;
        job.told = None;
        let (origin, wanted, attempt, came) = (job.origin, job.wanted, job.starts, job.came);
        let public =
            |job: &Job| job.origin.class == crate::policy::Class::Public && job.stage == Stage::Queued;
        let others = self.jobs.live.values().filter(|job| job.waits()).map(|job| job.origin);
        let waiting: BTreeSet<_> = others.clone().map(|other| (other.class, other.group())).collect();
        let members = others.filter(|other| (other.class, other.group()) == (origin.class, origin.group()));
        let flows = WaitingFlows {
            groups: waiting.iter().filter(|(class, _)| *class == origin.class).count(),
            members: members.map(|other| other.requester).collect::<BTreeSet<_>>().len(),
            public: self.jobs.waiting_count(public) > 0,
        };
        self.fairness.charge(&origin, came, wanted.work.0, flows);
        self.fairness.forget_idle(&waiting);
        if let Some(device) = self.devices.get_mut(&planned.device) {
            let expected = device.estimate(&wanted, device.loaded);
            device.running =
                Some(Running { job: planned.job, since: now, expected, marks: None, cancelled: false });
            device.loaded = Some(wanted.model);
        }
        self.events.push_back(Event::Start { device: planned.device, job: planned.job, attempt });
    }

    fn tell_positions(&mut self, now: Instant) {
        if self.jobs.waiting_count(|job| job.stage == Stage::Queued) == 0 {
            return;
        }
        let planned = self.plan(Scope::Waiting, now);
        let places: BTreeMap<JobId, (u32, Times)> =
            (0..).zip(&planned).map(|(index, planned)| (planned.job, (index, planned.times()))).collect();
        let behind = u32::try_from(planned.len()).unwrap_or(u32::MAX);
        for (id, job) in self.jobs.live.iter_mut().filter(|(_, job)| job.stage == Stage::Queued) {
            let (position, eta) = match places.get(id) {
                Some((position, times)) => (*position, Some(*times)),
                None => (behind, None),
            };
            let finishes = eta.map(|times| times.finishes);
            if !job.is_told(position, finishes, now) {
                job.told = Some((position, finishes));
                self.events.push_back(Event::Queued { job: *id, position, eta });
            }
        }
    }
}

impl Planned {
    fn times(&self) -> Times {
        Times { starts: self.starts, finishes: self.finishes }
    }
}

impl Job {
    fn is_told(&self, position: u32, finishes: Option<Instant>, now: Instant) -> bool {
        let Some((told_position, told_finish)) = self.told else { return false };
        if told_position != position {
            return false;
        }
        match (told_finish, finishes) {
            (Some(told), Some(finish)) => {
                let moved = if told > finish { told - finish } else { finish - told };
                moved <= ETA_GRAIN.max(told.saturating_duration_since(now) / 10)
            }
            (told, finishes) => told == finishes,
        }
    }
}

/// Stands for the job that a lease will become; no hash of a job begins with so many zeros.
fn lease_job(number: u64) -> JobId {
    let mut id = [0; 32];
    id[24..].copy_from_slice(&number.to_be_bytes());
    JobId::from_bytes(id)
}

fn index_to_position(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

//! Which job runs where and when: admission, leases, fairness, positions, ETAs. Sans-IO, with an injected clock.
//!
//! The way of a job through here, with what the glue does between:
//!
//! 1. [`Scheduler::handle_quote`] gives a [`Promise`] (lease, position, ETA) or a refusal.
//! 2. [`Scheduler::handle_order`] admits under that lease: [`Admission::Store`]. The glue writes the job to the queue's
//!    store, then calls [`Scheduler::handle_stored`] (and only then answers `Accepted`) or
//!    [`Scheduler::handle_store_failed`]. The same order again gives [`Admission::Live`] or [`Admission::Ended`].
//! 3. With inputs to fetch, the job keeps its place until [`Scheduler::handle_inputs`], for a bounded time.
//! 4. [`Event::Start`] hands it to a device. The glue records the start, then reports [`Scheduler::handle_loaded`],
//!    [`Scheduler::handle_progress`], and exactly one of [`Scheduler::handle_done`], [`Scheduler::handle_failed`],
//!    [`Scheduler::handle_stopped`]. A failed job is started once more, elsewhere if it can be.
//! 5. [`Event::Ended`] says that a job is over, however it came to be.
//!
//! Call [`Scheduler::handle_timeout`] at [`Scheduler::poll_timeout`], and drain [`Scheduler::poll_event`] after every
//! call. Everything iterated is ordered, so the same calls give the same events. [`invariants`] says what always holds.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use kinoflock_protocol::id::{JobId, LeaseId, ModelId, Nonce, RequesterId};
use kinoflock_protocol::refusal::Refusal;

pub use self::control::Cancelled;
use self::device::Device;
pub use self::device::{ASSUMED_SPEED, DeviceId, DeviceMode, DeviceSetup, Measured};
pub use self::dispatch::{DeviceStatus, QueueStatus};
use self::fair::Fairness;
pub use self::jobs::{Cause, Outcome, Stage};
use self::jobs::{Job, Jobs};
use self::lease::Leases;
pub use self::origin::{NetPrefix, Origin};
use crate::config::QueueConfig;
use crate::policy::{Ask, Class, Policy, Rule, Usage, Wanted};

mod aside;
mod control;
mod device;
mod dispatch;
mod fair;
pub mod invariants;
mod jobs;
mod lease;
mod origin;
mod plan;

/// Times that a worker may fail a job before the job has failed.
pub const MAX_FAILURES: u32 = 2;

/// Times that a job is started in all, restarts of the daemon included, before it is taken for the cause of them.
pub const MAX_STARTS: u32 = 5;

/// One part in this many of the queue is kept for own keys and collectives.
const RESERVED_PART: u32 = 4;

/// What the scheduler is made of.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Bounds of the queue and of leases.
    pub limits: QueueConfig,
    /// The operator's rules.
    pub policy: Policy,
    /// In the order of the configuration; [`DeviceId`] counts them.
    pub devices: Vec<DeviceSetup>,
    /// Random: makes lease ids unguessable.
    pub secret: [u8; 32],
}

/// What the clip store has room for, asked by the glue before a quote and an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes that can be had, acknowledged clips evicted.
    pub available: u64,
    /// Bytes that this job's results are expected to need.
    pub needed: u64,
    /// Bytes of this requester's unacknowledged clips.
    pub unacknowledged: u64,
}

/// A quote's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promise {
    /// The lease.
    pub lease: LeaseId,
    /// When it ends.
    pub expires: Instant,
    /// Jobs that would start before it.
    pub position: u32,
    /// When it would start and be done.
    pub eta: Eta,
    /// Measured speed with this model on the device it would run on, work units a second.
    pub speed: u64,
}

/// When a job is expected to run; `None` while no device that could run it is open.
pub type Eta = Option<Times>;

/// Expected times of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// When it would start.
    pub starts: Instant,
    /// When it would be done.
    pub finishes: Instant,
}

/// A job with its order, both checked.
#[derive(Debug, Clone, Copy)]
pub struct NewJob {
    /// The job.
    pub job: JobId,
    /// Its nonce.
    pub nonce: Nonce,
    /// For whom and from where.
    pub origin: Origin,
    /// What is asked.
    pub wanted: Wanted,
    /// The lease that the order names.
    pub lease: LeaseId,
    /// When the job is of no more use.
    pub deadline: Option<Instant>,
    /// Whether inputs must be fetched first.
    pub needs_inputs: bool,
}

/// What becomes of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Admitted as this number: write it, then call `handle_stored`.
    Store {
        /// Its place in the order of arrival.
        seq: u64,
    },
    /// It is here already.
    Live(Stage),
    /// It was here and is over.
    Ended(Outcome),
}

/// A job found in the store at the start of the daemon.
#[derive(Debug, Clone)]
pub struct RestoredJob {
    /// The job.
    pub job: JobId,
    /// Its nonce.
    pub nonce: Nonce,
    /// For whom and from where.
    pub origin: Origin,
    /// What is asked.
    pub wanted: Wanted,
    /// Its place in the order of arrival.
    pub seq: u64,
    /// Starts recorded.
    pub starts: u32,
    /// When it was admitted, on this run's clock; the clock's beginning if that is further back.
    pub admitted: Instant,
    /// When the job is of no more use.
    pub deadline: Option<Instant>,
    /// Whether inputs are still missing.
    pub needs_inputs: bool,
    /// How it ended, if it did.
    pub ended: Option<Outcome>,
}

/// What the glue has to do or to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Record the start, then run the job on the device.
    Start {
        /// Where.
        device: DeviceId,
        /// What.
        job: JobId,
        /// Which start this is, from 1.
        attempt: u32,
    },
    /// Stop the job on the device; answer with `handle_stopped`.
    Cancel {
        /// Where.
        device: DeviceId,
        /// What.
        job: JobId,
    },
    /// A waiting job's position or expected time changed.
    Queued {
        /// Which.
        job: JobId,
        /// Jobs that start before it.
        position: u32,
        /// When.
        eta: Eta,
    },
    /// A failed or interrupted job waits again.
    Requeued {
        /// Which.
        job: JobId,
        /// Why, if it failed.
        cause: Option<Cause>,
    },
    /// A job is over.
    Ended {
        /// Which.
        job: JobId,
        /// How.
        outcome: Outcome,
    },
    /// A lease ended unused.
    LeaseExpired {
        /// Which.
        lease: LeaseId,
        /// Whose.
        requester: RequesterId,
    },
    /// A draining device has nothing left to run.
    Drained {
        /// Which.
        device: DeviceId,
    },
}

/// The scheduler. See the module's description.
#[derive(Debug)]
pub struct Scheduler {
    limits: QueueConfig,
    policy: Policy,
    devices: BTreeMap<DeviceId, Device>,
    leases: Leases,
    jobs: Jobs,
    fairness: Fairness,
    events: VecDeque<Event>,
}

impl Scheduler {
    /// A scheduler with nothing to do.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let ids = (0..=u16::MAX).map(DeviceId);
        Self {
            limits: setup.limits,
            fairness: Fairness::new(setup.policy.public_share()),
            policy: setup.policy,
            devices: ids.zip(setup.devices).map(|(id, device)| (id, Device::new(id, device))).collect(),
            leases: Leases::new(setup.secret),
            jobs: Jobs::default(),
            events: VecDeque::new(),
        }
    }

    /// Takes back what the store holds, in any order, before anything else is handled. A job that was running starts
    /// again, unless it was started [`MAX_STARTS`] times.
    pub fn restore(&mut self, jobs: Vec<RestoredJob>, now: Instant) {
        for restored in jobs {
            if now.saturating_duration_since(restored.admitted) < jobs::DAY {
                self.jobs.spend(
                    restored.origin.requester,
                    restored.job,
                    restored.wanted.work.0,
                    restored.admitted,
                );
            }
            if let Some(outcome) = restored.ended {
                self.jobs.remember_ended(restored.job, restored.origin.requester, restored.nonce, outcome);
                continue;
            }
            let stage = if restored.needs_inputs {
                Stage::AwaitingInputs { until: now + self.limits.input_wait }
            } else {
                Stage::Queued
            };
            let mut job = Job::new(restored.origin, restored.wanted, restored.nonce, stage);
            job.deadline = restored.deadline;
            job.needs_inputs = restored.needs_inputs;
            job.starts = restored.starts;
            job.restored = true;
            self.jobs.insert(restored.job, job, Some(restored.seq));
            if restored.starts >= MAX_STARTS {
                self.end(restored.job, Outcome::Failed(too_many_starts(restored.starts)));
            }
        }
        self.settle(now);
    }

    /// Could this node make that, and when?
    ///
    /// # Errors
    /// The refusal that the artist is told.
    pub fn handle_quote(
        &mut self,
        origin: Origin,
        wanted: Wanted,
        room: Room,
        now: Instant,
    ) -> Result<Promise, Refusal> {
        self.expire_leases(now);
        self.check(&origin, &wanted, &room, now)?;
        let (position, times) = self.forecast(&origin, &wanted, now);
        let lease = self.leases.open(origin, wanted, &self.limits, now)?;
        let speed = self.speed(&wanted.model).unwrap_or(ASSUMED_SPEED);
        invariants::debug_check(self);
        Ok(Promise { lease, expires: now + self.limits.lease, position, eta: times, speed })
    }

    /// The requester does not need the lease. Only who knows its id can say so.
    pub fn handle_release(&mut self, lease: &LeaseId) -> bool {
        self.leases.release(lease)
    }

    /// Takes an order.
    ///
    /// # Errors
    /// The refusal that the artist is told. Nothing has changed then, but that its lease may be used up.
    pub fn handle_order(&mut self, new: &NewJob, room: Room, now: Instant) -> Result<Admission, Refusal> {
        self.expire_leases(now);
        if let Some(job) = self.jobs.live.get(&new.job) {
            return Ok(Admission::Live(job.stage));
        }
        if let Some(outcome) = self.jobs.ended(&new.job) {
            return Ok(Admission::Ended(outcome.clone()));
        }
        if let Some(holder) = self.jobs.nonce_holder(&new.origin.requester, &new.nonce, &new.job) {
            return Err(Rule::NonceReused.refuse(holder, new.job));
        }
        if new.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Rule::Deadline.refuse("a time to come", "a time gone by"));
        }
        self.leases.take(&new.lease, &new.origin, &new.wanted, now)?;
        self.check(&new.origin, &new.wanted, &room, now)?;
        let mut job = Job::new(new.origin, new.wanted, new.nonce, Stage::Committing);
        job.came = self.fairness.present(&new.origin);
        job.deadline = new.deadline;
        job.needs_inputs = new.needs_inputs;
        let seq = self.jobs.insert(new.job, job, None);
        self.jobs.spend(new.origin.requester, new.job, new.wanted.work.0, now);
        invariants::debug_check(self);
        Ok(Admission::Store { seq })
    }

    /// The admitted job is on disk. From here on it waits, for its inputs or for a device.
    pub fn handle_stored(&mut self, job: &JobId, now: Instant) -> Option<Stage> {
        let until = now + self.limits.input_wait;
        let entry = self.jobs.live.get_mut(job).filter(|entry| entry.stage == Stage::Committing)?;
        entry.stage = if entry.needs_inputs { Stage::AwaitingInputs { until } } else { Stage::Queued };
        self.settle(now);
        self.stage(job)
    }

    /// The admitted job could not be written: it was never here.
    pub fn handle_store_failed(&mut self, job: &JobId, now: Instant) {
        if self.stage(job) == Some(Stage::Committing) {
            self.jobs.undo(job);
        }
        self.settle(now);
    }

    /// All inputs of a job are here and checked.
    pub fn handle_inputs(&mut self, job: &JobId, now: Instant) {
        if let Some(entry) = self.jobs.live.get_mut(job) {
            entry.needs_inputs = false;
            if matches!(entry.stage, Stage::AwaitingInputs { .. }) {
                entry.stage = Stage::Queued;
            }
        }
        self.settle(now);
    }

    /// An input cannot be had or is not what it claims to be.
    pub fn handle_inputs_failed(&mut self, job: &JobId, cause: Cause, now: Instant) {
        if matches!(self.stage(job), Some(Stage::AwaitingInputs { .. })) {
            self.end(*job, Outcome::Failed(cause));
        }
        self.settle(now);
    }

    /// Where a live job stands.
    #[must_use]
    pub fn stage(&self, job: &JobId) -> Option<Stage> {
        self.jobs.live.get(job).map(|entry| entry.stage)
    }

    /// How a remembered job ended.
    #[must_use]
    pub fn outcome(&self, job: &JobId) -> Option<&Outcome> {
        self.jobs.ended(job)
    }

    /// Forgets an ended job, when its retention is over.
    pub fn forget(&mut self, job: &JobId) {
        self.jobs.forget(job);
    }

    /// What a requester uses here, but for the clip store.
    pub fn usage(&mut self, requester: &RequesterId, now: Instant) -> Usage {
        Usage {
            live_jobs: self.jobs.live_of(requester),
            work_today: self.jobs.spent_since_yesterday(requester, now),
            unacknowledged: 0,
        }
    }

    /// The rules.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The rules, to resolve their model names again.
    pub const fn policy_mut(&mut self) -> &mut Policy {
        &mut self.policy
    }

    /// The next thing to do.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) next, if nothing else happens.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let of_jobs = self.jobs.live.values().flat_map(|job| {
            let inputs = if let Stage::AwaitingInputs { until } = job.stage { Some(until) } else { None };
            [inputs, job.deadline.filter(|_| job.waits() && job.stage != Stage::Committing)]
        });
        let of_devices = self.devices.values().map(|device| device.mode.until());
        of_jobs.chain(of_devices).chain([self.leases.next_expiry()]).flatten().min()
    }

    /// Ends what is over: leases, waits for inputs, deadlines, pauses.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.expire_leases(now);
        let over: Vec<_> =
            self.jobs.live.iter().filter_map(|(id, job)| Some((*id, job.over(now)?))).collect();
        for (id, cause) in over {
            self.end(id, Outcome::Failed(cause));
        }
        for device in self.devices.values_mut() {
            if let DeviceMode::Paused { until: Some(until) } | DeviceMode::Draining { until: Some(until) } =
                device.mode
                && until <= now
            {
                device.mode = DeviceMode::Open;
            }
        }
        self.settle(now);
    }

    fn check(&mut self, origin: &Origin, wanted: &Wanted, room: &Room, now: Instant) -> Result<(), Refusal> {
        let mut usage = self.usage(&origin.requester, now);
        usage.unacknowledged = room.unacknowledged;
        let ask = Ask { requester: origin.requester, class: origin.class, wanted: *wanted };
        self.policy.check(&ask, &usage)?;
        self.check_devices(wanted)?;
        if room.needed > room.available {
            let bytes = |count: u64| format!("{count} bytes");
            return Err(Rule::StoreFull.refuse(bytes(room.available), bytes(room.needed)));
        }
        self.check_queue(origin)
    }

    fn check_devices(&self, wanted: &Wanted) -> Result<(), Refusal> {
        let mut fitting = Vec::new();
        let mut refusal = Rule::NoDevice.refuse("models that passed their self-test here", wanted.model);
        for device in self.devices.values() {
            match device.fits(wanted) {
                Ok(()) => fitting.push(device.mode),
                // A device that has the model says more than one that does not.
                Err(other) if device.models.contains_key(&wanted.model) => refusal = other,
                Err(_) => {}
            }
        }
        if fitting.is_empty() {
            return Err(refusal);
        }
        if fitting.iter().any(|mode| mode.takes_jobs()) {
            return Ok(());
        }
        let draining = fitting.iter().all(|mode| matches!(mode, DeviceMode::Draining { .. }));
        Err(if draining { Rule::Draining } else { Rule::Paused }
            .refuse("an open device", "no device is open for this model"))
    }

    fn check_queue(&self, origin: &Origin) -> Result<(), Refusal> {
        let limit = self.limits.jobs;
        let waiting = self.jobs.waiting_count(|_| true);
        if origin.class != Class::Public {
            return if waiting < limit { Ok(()) } else { Err(Rule::QueueFull.refuse(limit, waiting + 1)) };
        }
        let for_public = limit - limit / RESERVED_PART;
        let public = self.jobs.waiting_count(|job| job.origin.class == Class::Public);
        if waiting >= limit || public >= for_public {
            return Err(Rule::QueueFull.refuse(for_public, public + 1));
        }
        let per_prefix = self.limits.jobs_per_prefix;
        let here = |job: &Job| job.origin.class == Class::Public && job.origin.prefix == origin.prefix;
        let of_prefix = self.jobs.waiting_count(here);
        if of_prefix >= per_prefix {
            Err(Rule::QueuePrefix.refuse(per_prefix, of_prefix + 1))
        } else {
            Ok(())
        }
    }

    fn expire_leases(&mut self, now: Instant) {
        for (lease, origin) in self.leases.expire(now) {
            self.events.push_back(Event::LeaseExpired { lease, requester: origin.requester });
        }
    }

    fn end(&mut self, job: JobId, outcome: Outcome) -> Option<Job> {
        let ended = self.jobs.end(job, outcome.clone())?;
        self.events.push_back(Event::Ended { job, outcome });
        Some(ended)
    }

    fn speed(&self, model: &ModelId) -> Option<u64> {
        let rates = self.devices.values().filter_map(|device| device.models.get(model)?.rate);
        rates.map(|rate| rate as u64).max()
    }
}

impl Job {
    fn new(origin: Origin, wanted: Wanted, nonce: Nonce, stage: Stage) -> Self {
        Self {
            origin,
            wanted,
            nonce,
            seq: 0,
            deadline: None,
            needs_inputs: false,
            stage,
            starts: 0,
            failures: 0,
            restored: false,
            bypassed: 0,
            came: fair::Came::default(),
            avoid: None,
            told: None,
        }
    }

    fn over(&self, now: Instant) -> Option<Cause> {
        let cause = |code: &str, text: &str| Cause {
            code: code.to_owned(),
            text: text.to_owned(),
            retryable: true,
            here: false,
        };
        match self.stage {
            Stage::AwaitingInputs { until } if until <= now => {
                Some(cause("inputs_missing", "the job's inputs did not arrive in time"))
            }
            Stage::AwaitingInputs { .. } | Stage::Queued
                if self.deadline.is_some_and(|deadline| deadline <= now) =>
            {
                Some(cause("deadline", "the job's deadline passed while it waited"))
            }
            _ => None,
        }
    }
}

fn too_many_starts(starts: u32) -> Cause {
    Cause {
        code: "interrupted".to_owned(),
        text: format!("the job was interrupted {starts} times, the limit is {MAX_STARTS}"),
        retryable: true,
        here: false,
    }
}

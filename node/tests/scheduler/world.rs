//! A scheduler with a clock that the test moves, and short names for what tests do.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kinoflock_node::config::{Limits, PolicyConfig, QueueConfig, Serve};
use kinoflock_node::memory::DeviceSet;
use kinoflock_node::policy::{Class, Policy, Rule, Wanted, rule_of};
use kinoflock_node::scheduler::{
    Admission, Cause, DeviceId, DeviceSetup, Event, Measured, NetPrefix, NewJob, Origin, Promise, Room,
    Scheduler, Setup,
};
use kinoflock_protocol::id::{JobId, LeaseId, ModelId, Nonce, RequesterId};
use kinoflock_protocol::refusal::Refusal;
use kinoflock_protocol::work::{JobShape, Work};

/// Work units a second of every device: a job of work 10 takes 10 s.
pub(crate) const RATE: u64 = 1;

/// The operator's rule by which something was refused; a refusal tells limit and given value.
pub(crate) fn rule(result: Result<impl std::fmt::Debug, Refusal>) -> Rule {
    let refusal = result.unwrap_err();
    assert!(!refusal.limit.is_empty() && !refusal.given.is_empty(), "limit and given value: {refusal}");
    rule_of(&refusal).unwrap()
}

pub(crate) struct World {
    pub(crate) scheduler: Scheduler,
    pub(crate) now: Instant,
    pub(crate) room: Room,
    pub(crate) running: BTreeMap<DeviceId, JobId>,
    pub(crate) started: Vec<(DeviceId, JobId)>,
    pub(crate) ended: BTreeMap<JobId, kinoflock_node::scheduler::Outcome>,
    pub(crate) positions: BTreeMap<JobId, u32>,
    pub(crate) others: Vec<Event>,
    next: u64,
}

pub(crate) fn limits() -> QueueConfig {
    QueueConfig {
        jobs: 64,
        jobs_per_prefix: 16,
        lease: Duration::from_secs(15),
        leases: 32,
        leases_per_prefix: 8,
        leases_per_requester: 2,
        input_wait: Duration::from_secs(600),
    }
}

pub(crate) fn lavish() -> QueueConfig {
    QueueConfig { jobs: 4_000, jobs_per_prefix: 4_000, leases: 4_000, leases_per_prefix: 4_000, ..limits() }
}

pub(crate) fn model(number: u8) -> ModelId {
    ModelId::from_bytes([number; 32])
}

pub(crate) fn device(name: &str, models: &[u8]) -> DeviceSetup {
    let models = models.iter().map(|number| (model(*number), Some(RATE))).collect();
    DeviceSetup { name: name.to_owned(), limits: Limits::default(), models }
}

pub(crate) fn serve() -> Serve {
    Serve { own_keys: BTreeSet::new(), collectives: BTreeSet::new(), public: true, public_share: 25 }
}

pub(crate) fn requester(number: u64) -> RequesterId {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    RequesterId::from_bytes(bytes)
}

/// A requester of the public at 10.0.`net`.0/24.
pub(crate) fn public(key: u64, net: u8) -> Origin {
    Origin { requester: requester(key), class: Class::Public, prefix: NetPrefix::V4([10, 0, net]) }
}

pub(crate) fn of_class(class: Class, key: u64) -> Origin {
    Origin { requester: requester(key), class, prefix: NetPrefix::V4([10, 9, 9]) }
}

pub(crate) fn wanted(work: u64) -> Wanted {
    with_model(1, work)
}

pub(crate) fn with_model(number: u8, work: u64) -> Wanted {
    let shape = JobShape { frames: 17, width: 64, height: 64, steps: 8, guided: false };
    Wanted { model: model(number), shape, work: Work(work), unfit: DeviceSet::NONE }
}

pub(crate) fn cause(retryable: bool) -> Cause {
    Cause { code: "test".to_owned(), text: "the test said so".to_owned(), retryable, here: retryable }
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(limits(), PolicyConfig::default(), serve(), vec![device("cpu", &[1, 2])])
    }

    pub(crate) fn with(
        limits: QueueConfig,
        rules: PolicyConfig,
        serve: Serve,
        devices: Vec<DeviceSetup>,
    ) -> Self {
        let setup = Setup { limits, policy: Policy::new(rules, serve), devices, secret: [7; 32] };
        Self {
            scheduler: Scheduler::new(setup),
            now: Instant::now(),
            room: Room { available: 1 << 30, needed: 1 << 20, unacknowledged: 0 },
            running: BTreeMap::new(),
            started: Vec::new(),
            ended: BTreeMap::new(),
            positions: BTreeMap::new(),
            others: Vec::new(),
            next: 0,
        }
    }

    pub(crate) fn devices(devices: Vec<DeviceSetup>) -> Self {
        Self::with(limits(), PolicyConfig::default(), serve(), devices)
    }

    pub(crate) fn quote(&mut self, origin: Origin, wanted: Wanted) -> Result<Promise, Refusal> {
        let promise = self.scheduler.handle_quote(origin, wanted, self.room, self.now);
        self.drain();
        promise
    }

    pub(crate) fn new_job(&mut self, origin: Origin, wanted: Wanted, lease: LeaseId) -> NewJob {
        self.next += 1;
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&self.next.to_be_bytes());
        let mut job = [1; 32];
        job[..8].copy_from_slice(&self.next.to_be_bytes());
        NewJob {
            job: JobId::from_bytes(job),
            nonce: Nonce::from_bytes(nonce),
            origin,
            wanted,
            lease,
            deadline: None,
            needs_inputs: false,
        }
    }

    pub(crate) fn order(&mut self, new: &NewJob) -> Result<Admission, Refusal> {
        let admission = self.scheduler.handle_order(new, self.room, self.now);
        self.drain();
        admission
    }

    pub(crate) fn store(&mut self, job: &JobId) {
        self.scheduler.handle_stored(job, self.now);
        self.drain();
    }

    /// Quote, order and store in one.
    pub(crate) fn submit(&mut self, origin: Origin, wanted: Wanted) -> Result<JobId, Refusal> {
        let lease = self.quote(origin, wanted)?.lease;
        let new = self.new_job(origin, wanted, lease);
        self.order(&new)?;
        self.store(&new.job);
        Ok(new.job)
    }

    /// The running job of a device takes its time and is done.
    pub(crate) fn finish(&mut self, device: u16) -> JobId {
        let device = DeviceId(device);
        let job = self.running.remove(&device).expect("a running job");
        let busy = self.scheduler.devices(self.now)[usize::from(device.0)].busy_for;
        self.now += busy;
        let measured = Measured { load: Duration::ZERO, compute: busy };
        self.scheduler.handle_done(device, &job, measured, self.now);
        self.drain();
        job
    }

    pub(crate) fn fail(&mut self, device: u16, retryable: bool) -> JobId {
        let device = DeviceId(device);
        let job = self.running.remove(&device).expect("a running job");
        self.scheduler.handle_failed(device, &job, cause(retryable), self.now);
        self.drain();
        job
    }

    pub(crate) fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.scheduler.handle_timeout(self.now);
        self.drain();
    }

    pub(crate) fn running_on(&self, device: u16) -> Option<JobId> {
        self.running.get(&DeviceId(device)).copied()
    }

    pub(crate) fn drain(&mut self) {
        while let Some(event) = self.scheduler.poll_event() {
            match event {
                Event::Start { device, job, .. } => {
                    assert_eq!(self.running.insert(device, job), None, "one job a device");
                    self.started.push((device, job));
                }
                Event::Ended { job, outcome } => {
                    assert_eq!(self.ended.insert(job, outcome), None, "a job ends once");
                }
                Event::Queued { job, position, .. } => {
                    self.positions.insert(job, position);
                }
                other => self.others.push(other),
            }
        }
    }
}

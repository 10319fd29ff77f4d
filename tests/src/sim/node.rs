//! A simulated node: the real scheduler, and a device whose truth it does not know.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kinoflock_node::config::{Limits, PolicyConfig, QueueConfig, Serve};
use kinoflock_node::policy::Policy;
use kinoflock_node::scheduler::{
    Admission, DeviceId, DeviceSetup, Event, Measured, NewJob, Room, Scheduler, Setup,
};
use kinoflock_protocol::capacity::{Capacity, QueueState};
use kinoflock_protocol::{JobId, Millis, ModelId, Work};

use super::dice::Dice;
use super::scene::Scene;
use super::sizes;

/// Seconds of each job of the usual length that are neither loading nor computing.
const OVERHEAD: f64 = 0.4;
/// By how much a node that overstates its speed does so.
const OVERSTATED: f64 = 4.0;
/// Everything that a clip store is asked.
pub const ROOM: Room = Room { available: 1 << 40, needed: 1 << 20, unacknowledged: 0 };

/// What a node does beside the truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// It says that it is faster than it is.
    Overstates,
    /// It takes jobs and does nothing.
    NeverDone,
}

/// A simulated node.
#[derive(Debug)]
pub struct SimNode {
    /// The scheduler of the real daemon.
    pub scheduler: Scheduler,
    /// The model that it serves.
    pub model: ModelId,
    /// Work units a second, in truth.
    pub speed: f64,
    /// Seconds of each job that are neither loading nor computing.
    pub overhead: f64,
    /// Work units a second, as measured by its self-test.
    pub measured: u64,
    /// Whether it lies.
    pub lie: Option<Lie>,
    /// Whether it is there.
    pub is_up: bool,
    /// Its newest advert, and when it was made.
    pub advert: Option<(Instant, Capacity)>,
    /// Works of the jobs that it has.
    pub works: BTreeMap<JobId, f64>,
    /// Starts so far, those before it left included.
    pub starts: u64,
    /// When its timer is due.
    pub timer: Option<Instant>,
}

/// A start on the device: which job, which start, and for how many seconds.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    /// Which job.
    pub job: JobId,
    /// Which start of this node.
    pub start: u64,
    /// Seconds until it is done; `None` if never.
    pub takes: Option<f64>,
}

impl SimNode {
    /// A node that is up and has its model loaded.
    #[must_use]
    pub fn new(model: ModelId, lie: Option<Lie>, scene: &Scene, dice: &mut Dice) -> Self {
        let (error, overhead) = (scene.speed_error, OVERHEAD * scene.length);
        let speed = 1e6 * dice.between(0.5, 2.0);
        let measured = (speed * dice.between(1.0 - error, 1.0 + error)) as u64;
        let scheduler = scheduler(model, measured);
        let (advert, works) = (None, BTreeMap::new());
        Self {
            scheduler,
            model,
            speed,
            overhead,
            measured,
            lie,
            is_up: true,
            advert,
            works,
            starts: 0,
            timer: None,
        }
    }

    /// It is gone with all that it had.
    pub fn leave(&mut self) {
        self.is_up = false;
        self.works.clear();
        self.starts += 1;
        self.timer = None;
    }

    /// It is back with nothing.
    pub fn join(&mut self) {
        self.is_up = true;
        self.scheduler = scheduler(self.model, self.measured);
    }

    /// What its times are worth when it has said them.
    #[must_use]
    pub fn said(&self, eta: Millis) -> Millis {
        if self.lie == Some(Lie::Overstates) { Millis((eta.0 as f64 / OVERSTATED) as u64) } else { eta }
    }

    /// Makes a new advert.
    pub fn advertise(&mut self, now: Instant) {
        let queue = self.scheduler.queue(now);
        let wait = self.said(Millis::from(queue.wait.unwrap_or_default()));
        let queue = QueueState { jobs: queue.waiting + queue.running, work: Work(queue.work), wait };
        let factor = if self.lie == Some(Lie::Overstates) { OVERSTATED } else { 1.0 };
        let advert = sizes::advert(self.model, (self.measured as f64 * factor) as u64, queue);
        self.advert = Some((now, advert));
    }

    /// Admits a job and says until when, or gives no.
    ///
    /// # Errors
    /// The scheduler's refusal.
    pub fn order(
        &mut self,
        new: &NewJob,
        now: Instant,
    ) -> Result<Option<Instant>, kinoflock_protocol::Refusal> {
        if let Admission::Store { .. } = self.scheduler.handle_order(new, ROOM, now)? {
            self.works.insert(new.job, new.wanted.work.0 as f64);
            self.scheduler.handle_stored(&new.job, now);
        }
        if let Some((_, eta)) = self.scheduler.standing(&new.job, now) {
            return Ok(eta.map(|times| times.finishes));
        }
        let devices = self.scheduler.devices(now);
        let running = devices.iter().find(|device| device.running == Some(new.job));
        Ok(running.map(|device| now + device.busy_for))
    }

    /// What the scheduler wants done.
    pub fn drain(&mut self, dice: &mut Dice, now: Instant) -> Vec<Started> {
        let mut started = Vec::new();
        while let Some(event) = self.scheduler.poll_event() {
            match event {
                Event::Start { job, .. } => {
                    self.starts += 1;
                    let work = self.works.get(&job).copied().unwrap_or_default();
                    let takes = work / self.speed * dice.between(0.93, 1.07) + self.overhead;
                    let takes = (self.lie != Some(Lie::NeverDone)).then_some(takes);
                    started.push(Started { job, start: self.starts, takes });
                }
                Event::Cancel { job, device } => {
                    self.starts += 1;
                    self.scheduler.handle_stopped(device, &job, now);
                }
                _ => {}
            }
        }
        started
    }

    /// Its device has done a job.
    pub fn finish(&mut self, job: &JobId, took: f64, now: Instant) {
        let compute = Duration::from_secs_f64((took - self.overhead).max(0.0));
        let measured = Measured { load: Duration::ZERO, compute };
        self.scheduler.handle_done(DeviceId(0), job, measured, now);
        self.works.remove(job);
    }
}

fn scheduler(model: ModelId, measured: u64) -> Scheduler {
    let limits = QueueConfig {
        jobs: 64,
        jobs_per_prefix: 16,
        lease: Duration::from_secs(15),
        leases: 256,
        leases_per_prefix: 8,
        leases_per_requester: 2,
        input_wait: Duration::from_secs(600),
    };
    let serve = Serve {
        own_keys: Default::default(),
        collectives: Default::default(),
        public: true,
        public_share: 25,
    };
    let models = BTreeMap::from([(model, Some(measured))]);
    let device = DeviceSetup { name: "gpu".to_owned(), limits: Limits::default(), models };
    let policy = Policy::new(PolicyConfig::default(), serve);
    let mut scheduler = Scheduler::new(Setup { limits, policy, devices: vec![device], secret: [1; 32] });
    scheduler.handle_loaded(DeviceId(0), model);
    scheduler
}

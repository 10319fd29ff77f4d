//! The scheduler beside a reference model: whatever is done to it, no job is lost or doubled, every job ends once, and
//! nobody is starved.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use kinoflock_node::config::{PolicyConfig, QueueConfig};
use kinoflock_node::policy::Class;
use kinoflock_node::scheduler::{Admission, DeviceId, NewJob, Outcome, Stage, invariants};
use kinoflock_protocol::id::JobId;
use proptest::prelude::*;

#[path = "scheduler/world.rs"]
mod world;
use world::*;

/// What can happen.
#[derive(Debug, Clone)]
enum Op {
    Submit { class: u8, key: u8, net: u8, model: u8, work: u8, inputs: bool },
    Resubmit { pick: u8 },
    Stored { pick: u8, well: bool },
    Inputs { pick: u8 },
    Done { device: u8 },
    Failed { device: u8, retryable: bool },
    Stopped { device: u8 },
    Cancel { pick: u8, own: bool },
    Progress { device: u8, done: u16 },
    Mode { device: u8, mode: u8 },
    Pass { seconds: u16 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..8_u8, 0..4_u8, 0..3_u8, 1..4_u8, 1..50_u8, any::<bool>()).prop_map(|(class, key, net, model, work, inputs)| {
            Op::Submit { class, key, net, model, work, inputs: inputs && work % 4 == 0 }
        }),
        1 => any::<u8>().prop_map(|pick| Op::Resubmit { pick }),
        6 => (any::<u8>(), 0..8_u8).prop_map(|(pick, well)| Op::Stored { pick, well: well > 0 }),
        2 => any::<u8>().prop_map(|pick| Op::Inputs { pick }),
        4 => (0..2_u8).prop_map(|device| Op::Done { device }),
        2 => (0..2_u8, any::<bool>()).prop_map(|(device, retryable)| Op::Failed { device, retryable }),
        1 => (0..2_u8).prop_map(|device| Op::Stopped { device }),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(pick, own)| Op::Cancel { pick, own }),
        1 => (0..2_u8, 0..1_200_u16).prop_map(|(device, done)| Op::Progress { device, done }),
        1 => (0..2_u8, 0..5_u8).prop_map(|(device, mode)| Op::Mode { device, mode }),
        2 => (0..400_u16).prop_map(|seconds| Op::Pass { seconds }),
    ]
}

/// What must be true of a job, as the simplest thing that could know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Committing,
    Live,
    Undone,
}

struct Model {
    world: World,
    orders: Vec<NewJob>,
    known: BTreeMap<JobId, Known>,
}

impl Model {
    fn new() -> Self {
        let limits = QueueConfig { jobs: 24, jobs_per_prefix: 8, ..limits() };
        let rules = PolicyConfig { queued_jobs: Some(6), ..PolicyConfig::default() };
        let devices = vec![device("a", &[1, 2]), device("b", &[2, 3])];
        Self {
            world: World::with(limits, rules, serve(), devices),
            orders: Vec::new(),
            known: BTreeMap::new(),
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Submit { class, key, net, model, work, inputs } => {
                self.submit(class, key, net, with_model(model, work.into()), inputs);
            }
            Op::Resubmit { pick } => self.resubmit(pick),
            Op::Stored { pick, well } => self.stored(pick, well),
            Op::Inputs { pick } => {
                if let Some(new) = self.pick(pick) {
                    let now = self.world.now;
                    self.world.scheduler.handle_inputs(&new.job, now);
                }
            }
            Op::Done { device } => {
                if self.world.running_on(device.into()).is_some() {
                    self.world.finish(device.into());
                }
            }
            Op::Failed { device, retryable } => {
                if self.world.running_on(device.into()).is_some() {
                    self.world.fail(device.into(), retryable);
                }
            }
            Op::Stopped { device } => self.stopped(device),
            Op::Cancel { pick, own } => self.cancel(pick, own),
            Op::Progress { device, done } => {
                if let Some(job) = self.world.running_on(device.into()) {
                    let now = self.world.now;
                    self.world.scheduler.handle_progress(DeviceId(device.into()), &job, done, now);
                }
            }
            Op::Mode { device, mode } => self.mode(device, mode),
            Op::Pass { seconds } => self.world.pass(seconds.into()),
        }
        self.world.drain();
        self.check();
    }

    fn submit(&mut self, class: u8, key: u8, net: u8, wanted: kinoflock_node::policy::Wanted, inputs: bool) {
        let origin = match class {
            0 => of_class(Class::Own, 900),
            1 => of_class(Class::Collective, 800 + u64::from(key)),
            _ => public(u64::from(net) * 10 + u64::from(key), net),
        };
        let Ok(promise) = self.world.quote(origin, wanted) else { return };
        let mut new = self.world.new_job(origin, wanted, promise.lease);
        new.needs_inputs = inputs;
        if self.world.order(&new).is_ok() {
            self.orders.push(new);
            self.known.insert(new.job, Known::Committing);
        }
    }

    fn resubmit(&mut self, pick: u8) {
        let Some(new) = self.pick(pick) else { return };
        let again = self.world.order(&new);
        match (self.known[&new.job], self.world.ended.get(&new.job)) {
            (_, Some(outcome)) => assert_eq!(again, Ok(Admission::Ended(outcome.clone()))),
            (Known::Undone, None) => assert!(again.is_err(), "its lease is used up"),
            (_, None) => assert!(matches!(again, Ok(Admission::Live(_))), "{again:?}"),
        }
    }

    fn stored(&mut self, pick: u8, well: bool) {
        let committing: Vec<_> = self
            .known
            .iter()
            .filter(|(_, known)| **known == Known::Committing)
            .map(|(job, _)| *job)
            .collect();
        if committing.is_empty() {
            return;
        }
        let job = committing[usize::from(pick) % committing.len()];
        if well {
            self.known.insert(job, Known::Live);
            self.world.store(&job);
        } else if !self.world.ended.contains_key(&job) {
            let now = self.world.now;
            self.world.scheduler.handle_store_failed(&job, now);
            self.known.insert(job, Known::Undone);
        }
    }

    fn stopped(&mut self, device: u8) {
        if let Some(job) = self.world.running.remove(&DeviceId(device.into())) {
            let now = self.world.now;
            self.world.scheduler.handle_stopped(DeviceId(device.into()), &job, now);
        }
    }

    fn cancel(&mut self, pick: u8, own: bool) {
        let Some(new) = self.pick(pick) else { return };
        let by = if own { new.origin.requester } else { requester(77_777) };
        let now = self.world.now;
        let result = self.world.scheduler.handle_cancel(&new.job, &by, now);
        let over = self.world.ended.contains_key(&new.job);
        assert_eq!(result.is_ok(), over || (own && self.known[&new.job] != Known::Undone), "{result:?}");
    }

    fn mode(&mut self, device: u8, mode: u8) {
        let (id, now) = (DeviceId(device.into()), self.world.now);
        let scheduler = &mut self.world.scheduler;
        match mode {
            0 => scheduler.pause(Some(id), None, now),
            1 => scheduler.pause(Some(id), Some(now + Duration::from_secs(100)), now),
            2 => scheduler.drain(Some(id), None, now),
            _ => scheduler.resume(Some(id), now),
        }
    }

    fn pick(&self, pick: u8) -> Option<NewJob> {
        (!self.orders.is_empty()).then(|| self.orders[usize::from(pick) % self.orders.len()])
    }

    /// Every admitted job is live, undone, or ended: never two of these, never none.
    fn check(&self) {
        assert_eq!(invariants::violations(&self.world.scheduler), Vec::<String>::new());
        for (job, known) in &self.known {
            let stage = self.world.scheduler.stage(job);
            let ended = self.world.ended.contains_key(job);
            match known {
                Known::Undone => assert!(stage.is_none() && !ended),
                Known::Committing => assert!(ended != (stage == Some(Stage::Committing)), "{stage:?}"),
                Known::Live => assert!(ended != stage.is_some(), "{job}: {stage:?}"),
            }
        }
    }

    /// With devices open and everything stored, all that waits comes to its end.
    fn run_dry(&mut self) {
        let now = self.world.now;
        self.world.scheduler.resume(None, now);
        for pick in 0..self.orders.len() {
            let job = self.orders[pick].job;
            if self.known[&job] == Known::Committing {
                self.known.insert(job, Known::Live);
                self.world.store(&job);
            }
            self.world.scheduler.handle_inputs(&job, now);
            self.world.drain();
        }
        for _ in 0..2 * self.orders.len() + 2 {
            for device in 0..2 {
                if self.world.running_on(device).is_some() {
                    self.world.finish(device);
                }
            }
        }
        self.check();
        for (job, known) in &self.known {
            assert!(*known == Known::Undone || self.world.ended.contains_key(job), "{job} is starved");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn no_job_is_lost_doubled_or_starved(ops in proptest::collection::vec(op(), 1..120)) {
        let mut model = Model::new();
        for op in &ops {
            model.apply(op);
        }
        model.run_dry();
    }

    /// Two networks with jobs waiting all the time get the same work done, up to one job each.
    #[test]
    fn backlogged_networks_get_equal_work(works in proptest::collection::vec((1..100_u64, 1..100_u64), 8..24)) {
        let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
        world.submit(public(9, 9), wanted(1)).unwrap();
        let mut works_of = BTreeMap::new();
        for (key, (a, b)) in (0..).zip(&works) {
            works_of.insert(world.submit(public(key, 1), wanted(*a)).unwrap(), (0, *a));
            works_of.insert(world.submit(public(1_000, 2), wanted(*b)).unwrap(), (1, *b));
        }
        world.finish(0);
        let total = |of: usize| works_of.values().filter(|(net, _)| *net == of).map(|(_, work)| work).sum::<u64>();
        let (mut done, totals) = ([0_u64; 2], [total(0), total(1)]);
        while done[0] < totals[0] && done[1] < totals[1] {
            let (net, work) = works_of[&world.finish(0)];
            done[net] += work;
            prop_assert!(done[0].abs_diff(done[1]) <= 200, "{done:?}");
        }
    }

    /// The work that a requester gets while others wait does not grow with the number of keys it brings.
    #[test]
    fn more_keys_of_one_network_get_no_more(keys in 1..40_u64) {
        let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
        world.submit(public(9, 9), wanted(10)).unwrap();
        for index in 0..40 {
            world.submit(public(index % keys, 1), wanted(10)).unwrap();
        }
        let honest: Vec<_> = (0..5).map(|_| world.submit(public(500, 2), wanted(10)).unwrap()).collect();
        world.finish(0);
        let first: Vec<_> = (0..10).map(|_| world.finish(0)).collect();
        prop_assert_eq!(first.iter().filter(|job| honest.contains(job)).count(), 5);
        prop_assert!(honest.iter().all(|job| world.ended[job] == Outcome::Done));
    }
}

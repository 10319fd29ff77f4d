//! A device: what it serves, how fast it was measured to be, and what it does now.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use kinoflock_protocol::id::{JobId, ModelId};
use kinoflock_protocol::refusal::Refusal;

use crate::config::Limits;
use crate::policy::{Rule, Wanted, check_limits};

/// How much the newest measurement counts against all earlier ones, once there are some.
const NEWEST_COUNTS: f64 = 0.3;

/// Assumed until something was measured: 100 GFLOP a second, a processor of some years ago. Work units a second.
pub const ASSUMED_SPEED: u64 = 100_000;

/// The pace of a job counts by this much of the share over which it was seen: wholly from a fifth of the job on.
const PACE_COUNTS: f64 = 5.0;

/// A job that runs over its estimate is expected to need this share of the estimate more.
const OVERDUE_SHARE: u32 = 10;

/// Number of a device, in the order of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u16);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A device as the glue introduces it.
#[derive(Debug, Clone)]
pub struct DeviceSetup {
    /// Its name in the configuration.
    pub name: String,
    /// Largest clip here.
    pub limits: Limits,
    /// Models that passed their self-test here, with measured speed in work units a second where there is one.
    pub models: BTreeMap<ModelId, Option<u64>>,
}

/// Whether a device may start jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceMode {
    /// It may.
    Open,
    /// The operator paused it. Its job goes on; with an end, jobs are still taken for later.
    Paused {
        /// When it resumes by itself.
        until: Option<Instant>,
    },
    /// It takes no new jobs and starts none.
    Draining {
        /// When it resumes by itself.
        until: Option<Instant>,
    },
    /// Its worker cannot be started.
    Down,
}

impl DeviceMode {
    /// Whether jobs are taken for it, to be started now or at a known time.
    #[must_use]
    pub const fn takes_jobs(self) -> bool {
        matches!(self, Self::Open | Self::Paused { until: Some(_) })
    }

    /// When it opens again by itself.
    #[must_use]
    pub const fn until(self) -> Option<Instant> {
        match self {
            Self::Paused { until } | Self::Draining { until } => until,
            Self::Open | Self::Down => None,
        }
    }
}

/// What was measured on a finished job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Measured {
    /// Time to load the model; zero if it was loaded.
    pub load: Duration,
    /// Time from loaded to finished; zero if it tells nothing of other jobs.
    pub compute: Duration,
}

#[derive(Debug, Clone)]
pub(super) struct Running {
    pub(super) job: JobId,
    pub(super) since: Instant,
    pub(super) expected: Duration,
    pub(super) marks: Option<Marks>,
    pub(super) cancelled: bool,
}

/// When a job first told how far it was, and when it last did. What lies before the first is loading as much as work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    first: Mark,
    last: Mark,
}

/// How much was done when, in thousandths.
#[derive(Debug, Clone, Copy)]
struct Mark {
    done: u16,
    at: Instant,
}

#[derive(Debug, Clone)]
pub(super) struct Device {
    pub(super) id: DeviceId,
    pub(super) name: String,
    pub(super) limits: Limits,
    pub(super) models: BTreeMap<ModelId, Speed>,
    pub(super) loaded: Option<ModelId>,
    pub(super) mode: DeviceMode,
    pub(super) running: Option<Running>,
    /// Since when, and for about how long, it does what is no job.
    pub(super) aside: Option<(Instant, Duration)>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Speed {
    /// Work units a second.
    pub(super) rate: Option<f64>,
    /// Seconds to load.
    load: Option<f64>,
    /// Seconds of a job's time on the device that are neither: starting it, storing and signing its results.
    overhead: Option<f64>,
    /// Jobs from which the rate was learnt.
    jobs: u32,
}

impl Device {
    pub(super) fn new(id: DeviceId, setup: DeviceSetup) -> Self {
        let mut device = Self {
            id,
            name: setup.name,
            limits: setup.limits,
            models: BTreeMap::new(),
            loaded: None,
            mode: DeviceMode::Open,
            running: None,
            aside: None,
        };
        device.set_models(setup.models);
        device
    }

    /// Replaces the models; what was measured of those that stay is kept.
    pub(super) fn set_models(&mut self, models: BTreeMap<ModelId, Option<u64>>) {
        let old = std::mem::take(&mut self.models);
        self.models = models
            .into_iter()
            .map(|(model, measured)| {
                let fresh = Speed { rate: measured.map(|rate| rate as f64), ..Speed::default() };
                (model, old.get(&model).copied().filter(|speed| speed.rate.is_some()).unwrap_or(fresh))
            })
            .collect();
    }

    /// Whether it could run this, whatever it does now.
    pub(super) fn fits(&self, wanted: &Wanted) -> Result<(), Refusal> {
        if !self.models.contains_key(&wanted.model) {
            return Err(Rule::NoDevice.refuse("models that passed their self-test here", wanted.model));
        }
        check_limits(&self.limits, &wanted.shape)?;
        if wanted.unfit.has(self.id.0) {
            return Err(Rule::Memory.refuse("what fits its memory", "more"));
        }
        Ok(())
    }

    /// When it could start something next, as far as the operator is concerned; `None` for no known time.
    pub(super) fn opens_at(&self, now: Instant) -> Option<Instant> {
        match self.mode {
            DeviceMode::Open => Some(now),
            DeviceMode::Paused { until } | DeviceMode::Draining { until } => {
                until.map(|until| until.max(now))
            }
            DeviceMode::Down => None,
        }
    }

    /// How long this work would take, loading included if `loaded` is another model.
    pub(super) fn estimate(&self, wanted: &Wanted, loaded: Option<ModelId>) -> Duration {
        let speed = self.models.get(&wanted.model).copied().unwrap_or_default();
        let load = if loaded == Some(wanted.model) { 0.0 } else { speed.load.unwrap_or(0.0) };
        let compute = wanted.work.0 as f64 / speed.rate.unwrap_or(ASSUMED_SPEED as f64);
        let overhead = speed.overhead.unwrap_or(0.0);
        Duration::try_from_secs_f64(load + compute + overhead).unwrap_or(Duration::MAX)
    }

    /// How long until it is free.
    pub(super) fn busy_for(&self, now: Instant) -> Duration {
        if let Some((since, expected)) = self.aside {
            return expected.saturating_sub(now.saturating_duration_since(since));
        }
        self.running.as_ref().map_or(Duration::ZERO, |running| running.remaining(now))
    }

    /// Whether it does nothing.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_none() && self.aside.is_none()
    }

    /// Learns from a job that is done; `took` is the time that it had the device.
    pub(super) fn learn(&mut self, wanted: &Wanted, measured: &Measured, took: Duration) {
        let Some(speed) = self.models.get_mut(&wanted.model) else { return };
        // The self-test is short and weighs no more than one job, so the first few count as in an average.
        speed.jobs = speed.jobs.saturating_add(1);
        let counts = (1.0 / f64::from(speed.jobs.saturating_add(1))).max(NEWEST_COUNTS);
        let blend = |old: Option<f64>, new: f64| old.map_or(new, |old| old + counts * (new - old));
        let seconds = measured.compute.as_secs_f64();
        if seconds > 0.0 && wanted.work.0 > 0 {
            speed.rate = Some(blend(speed.rate, wanted.work.0 as f64 / seconds));
        }
        if !measured.load.is_zero() {
            speed.load = Some(blend(speed.load, measured.load.as_secs_f64()));
        }
        if seconds > 0.0 {
            let overhead = took.saturating_sub(measured.load + measured.compute);
            speed.overhead = Some(blend(speed.overhead, overhead.as_secs_f64()));
        }
    }
}

impl Running {
    /// How much is done, in thousandths.
    pub(super) fn done(&self) -> u16 {
        self.marks.map_or(0, |marks| marks.last.done)
    }

    /// It told how much is done, in thousandths.
    pub(super) fn progress(&mut self, done: u16, now: Instant) {
        let mark = Mark { done: done.min(1000), at: now };
        let first = self.marks.map_or(mark, |marks| marks.first);
        self.marks = Some(Marks { first, last: mark });
    }

    pub(super) fn remaining(&self, now: Instant) -> Duration {
        let (left, since) = match self.marks {
            None => (self.expected, self.since),
            Some(marks) => (marks.left(self.expected), marks.last.at),
        };
        let elapsed = now.saturating_duration_since(since);
        left.checked_sub(elapsed).filter(|left| !left.is_zero()).unwrap_or(left / OVERDUE_SHARE)
    }
}

impl Marks {
    /// What was left at the last mark: the estimate of the rest, corrected by the pace between the marks the more of the
    /// job that pace was seen over.
    fn left(&self, expected: Duration) -> Duration {
        let rest = f64::from(1000 - self.last.done) / 1000.0;
        let by_estimate = expected.as_secs_f64() * rest;
        let seen = f64::from(self.last.done.saturating_sub(self.first.done)) / 1000.0;
        if seen <= 0.0 {
            return Duration::try_from_secs_f64(by_estimate).unwrap_or(Duration::MAX);
        }
        let by_pace = self.last.at.saturating_duration_since(self.first.at).as_secs_f64() / seen * rest;
        let trust = (seen * PACE_COUNTS).min(1.0);
        let left = by_pace * trust + by_estimate * (1.0 - trust);
        Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kinoflock_protocol::work::{JobShape, Work};

    use super::*;
    use crate::memory::DeviceSet;

    fn wanted(work: u64) -> Wanted {
        let shape = JobShape { frames: 1, width: 8, height: 8, steps: 1, guided: false };
        Wanted { model: ModelId::from_bytes([1; 32]), shape, work: Work(work), unfit: DeviceSet::NONE }
    }

    fn device(rate: Option<u64>) -> Device {
        let models = BTreeMap::from([(wanted(1).model, rate)]);
        Device::new(DeviceId(0), DeviceSetup { name: "cpu".to_owned(), limits: Limits::default(), models })
    }

    #[test]
    fn the_estimate_follows_what_was_measured() {
        let mut device = device(Some(100));
        let loaded = Some(wanted(1).model);
        assert_eq!(device.estimate(&wanted(1_000), loaded), Duration::from_secs(10));
        for _ in 0..40 {
            device.learn(
                &wanted(1_000),
                &Measured { load: Duration::from_secs(4), compute: Duration::from_secs(2) },
                Duration::ZERO,
            );
        }
        let estimate = device.estimate(&wanted(1_000), loaded).as_secs_f64();
        assert!((estimate - 2.0).abs() < 0.01, "{estimate}");
        let cold = device.estimate(&wanted(1_000), None).as_secs_f64();
        assert!((cold - 6.0).abs() < 0.01, "{cold}");
    }

    #[test]
    fn one_outlier_moves_the_estimate_by_less_than_half() {
        let mut device = device(Some(100));
        device.learn(
            &wanted(1_000),
            &Measured { load: Duration::ZERO, compute: Duration::from_secs(100) },
            Duration::ZERO,
        );
        let rate = device.models[&wanted(1).model].rate.unwrap();
        assert!((50.0..100.0).contains(&rate), "{rate}");
    }

    #[test]
    fn remaining_time_comes_from_the_pace_once_enough_of_the_job_was_seen() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut running = Running {
            job: JobId::from_bytes([0; 32]),
            since: start,
            expected: Duration::from_secs(10),
            marks: None,
            cancelled: false,
        };
        assert_eq!(running.remaining(at(4)), Duration::from_secs(6));
        assert_eq!(running.remaining(at(40)), Duration::from_secs(1), "overdue");
        // Loading took 40 s: it says nothing about the steps.
        running.progress(100, at(40));
        assert_eq!(running.remaining(at(41)), Duration::from_secs(8));
        running.progress(300, at(48));
        assert_eq!(running.remaining(at(50)), Duration::from_secs(26), "four seconds a tenth");
    }

    #[test]
    fn what_a_job_takes_beside_its_computing_is_counted_too() {
        let mut device = device(Some(100));
        let loaded = Some(wanted(1).model);
        let measured = Measured { load: Duration::ZERO, compute: Duration::from_secs(10) };
        device.learn(&wanted(1_000), &measured, Duration::from_secs(13));
        assert_eq!(device.estimate(&wanted(1_000), loaded), Duration::from_secs(13));
    }

    #[test]
    fn reloading_the_models_keeps_what_was_measured() {
        let mut device = device(None);
        device.learn(
            &wanted(1_000),
            &Measured { load: Duration::ZERO, compute: Duration::from_secs(1) },
            Duration::ZERO,
        );
        device.set_models(BTreeMap::from([(wanted(1).model, Some(5))]));
        assert_eq!(device.models[&wanted(1).model].rate, Some(1_000.0));
    }
}

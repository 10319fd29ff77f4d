//! How long a phase may take: liveness is work, not a heartbeat. Sans-IO: time is an argument.
//!
//! A phase that was measured may take `factor` times as long as it took before, scaled up for larger jobs, and never
//! less than `shortest`. A phase that was not measured yet may take `first`. Every step is a phase of its own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kinoflock_protocol::id::ModelId;

use super::wire::Phase;

/// Most models whose times are remembered; beyond it the one least in the order of ids is forgotten.
const MAX_MODELS: usize = 256;
/// How much longer a job may be thought to take than one that was measured: attention grows with the square.
const MAX_GROWTH: f64 = 1e6;

/// Limits on a worker's time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Deadlines {
    /// Shortest deadline of a phase.
    pub shortest: Duration,
    /// Times the measured duration.
    pub factor: f64,
    /// A phase that was never measured.
    pub first: Duration,
    /// From the start of the process to its greeting.
    pub greeting: Duration,
    /// From a cancel to its confirmation, unless steps take longer; then the worker is killed.
    pub cancel: Duration,
    /// From the order to end to the end.
    pub shutdown: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            shortest: Duration::from_secs(30),
            factor: 5.0,
            first: Duration::from_secs(900),
            greeting: Duration::from_secs(30),
            cancel: Duration::from_secs(10),
            shutdown: Duration::from_secs(5),
        }
    }
}

/// The size of a job, from which the duration of its phases follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Size {
    /// Pixels of all frames.
    pub pixels: f64,
}

impl Size {
    /// The size of a clip.
    #[must_use]
    pub fn of(frames: u32, width: u32, height: u32) -> Self {
        Self { pixels: f64::from(frames) * f64::from(width) * f64::from(height) }
    }
}

/// Watches the phases of one worker.
#[derive(Debug)]
pub struct Watch {
    deadlines: Deadlines,
    measured: BTreeMap<ModelId, BTreeMap<Phase, (Duration, f64)>>,
    current: Option<Current>,
}

#[derive(Debug, Clone, Copy)]
struct Current {
    model: ModelId,
    phase: Phase,
    size: Size,
    since: Instant,
}

impl Watch {
    /// Watches with these limits.
    #[must_use]
    pub fn new(deadlines: Deadlines) -> Self {
        Self { deadlines, measured: BTreeMap::new(), current: None }
    }

    /// A phase begins; the one before it, if there was one, is over and measured.
    pub fn begin(&mut self, model: ModelId, phase: Phase, size: Size, now: Instant) {
        match self.current {
            // The supervisor begins a phase when it gives the order, the worker says so again when it gets there.
            Some(before) if (before.model, before.phase) == (model, phase) => return,
            // From the last step to the decode there is nothing of a step left to measure.
            Some(before) if before.phase != Phase::Step => self.measure(before, now),
            _ => {}
        }
        self.current = Some(Current { model, phase, size, since: now });
    }

    /// A step is done; the next one begins.
    pub fn step(&mut self, now: Instant) {
        if let Some(current) = self.current {
            self.measure(current, now);
            self.current = Some(Current { since: now, ..current });
        }
    }

    /// The work is over. What `finished` well is measured.
    pub fn end(&mut self, finished: bool, now: Instant) {
        if let Some(current) = self.current.take().filter(|current| finished && current.phase != Phase::Step)
        {
            self.measure(current, now);
        }
    }

    /// The daemon itself was busy for so long: the worker is not to blame.
    pub fn pause(&mut self, waited: Duration) {
        if let Some(current) = &mut self.current {
            current.since += waited;
        }
    }

    /// The phase that is under way and how long it may take.
    #[must_use]
    pub fn current(&self) -> Option<(Phase, Duration)> {
        self.current.map(|current| (current.phase, self.limit(&current)))
    }

    /// When the worker is to be killed, unless something happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.current.map(|current| current.since + self.limit(&current))
    }

    /// How long a cancelled job may still take to confirm it.
    #[must_use]
    pub fn cancel_grace(&self) -> Duration {
        let step = self.current.and_then(|current| self.expected(&current)).unwrap_or_default();
        self.deadlines.cancel.max(step.saturating_mul(2))
    }

    fn limit(&self, current: &Current) -> Duration {
        match self.expected(current) {
            Some(expected) => {
                let scaled = expected.as_secs_f64() * self.deadlines.factor;
                Duration::try_from_secs_f64(scaled).unwrap_or(Duration::MAX / 4).max(self.deadlines.shortest)
            }
            None => self.deadlines.first.max(self.deadlines.shortest),
        }
    }

    fn expected(&self, current: &Current) -> Option<Duration> {
        let (took, pixels) = *self.measured.get(&current.model)?.get(&current.phase)?;
        let growth = match current.phase {
            Phase::Load | Phase::Text => 1.0,
            Phase::Step => (current.size.pixels / pixels.max(1.0)).max(1.0).powi(2),
            Phase::Decode | Phase::Encode => (current.size.pixels / pixels.max(1.0)).max(1.0),
        };
        Duration::try_from_secs_f64(took.as_secs_f64() * growth.min(MAX_GROWTH)).ok()
    }

    fn measure(&mut self, done: Current, now: Instant) {
        let took = now.saturating_duration_since(done.since);
        if self.measured.len() >= MAX_MODELS && !self.measured.contains_key(&done.model) {
            self.measured.pop_first();
        }
        let phases = self.measured.entry(done.model).or_default();
        // Weights in the page cache load much faster than from a cold disk: the slowest load counts.
        let slowest =
            phases.get(&Phase::Load).map(|(before, _)| *before).filter(|_| done.phase == Phase::Load);
        phases.insert(done.phase, (took.max(slowest.unwrap_or_default()), done.size.pixels));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MODEL: ModelId = ModelId::from_bytes([1; 32]);
    const SMALL: Size = Size { pixels: 1000.0 };

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    fn watch() -> Watch {
        Watch::new(Deadlines::default())
    }

    #[test]
    fn a_measured_phase_may_take_five_times_as_long_and_never_less_than_thirty_seconds() {
        let (mut watch, start) = (watch(), Instant::now());
        watch.begin(MODEL, Phase::Text, SMALL, start);
        assert_eq!(watch.current(), Some((Phase::Text, seconds(900))));
        watch.begin(MODEL, Phase::Step, SMALL, start + seconds(1));
        watch.step(start + seconds(21));
        assert_eq!(watch.current(), Some((Phase::Step, seconds(100))));
        assert_eq!(watch.poll_timeout(), Some(start + seconds(121)));
        watch.end(true, start + seconds(30));
        assert_eq!(watch.poll_timeout(), None);
        watch.begin(MODEL, Phase::Text, SMALL, start);
        assert_eq!(watch.current(), Some((Phase::Text, seconds(30))));
    }

    #[test]
    fn a_larger_job_gets_more_time_and_a_smaller_one_not_less() {
        let (mut watch, start) = (watch(), Instant::now());
        watch.begin(MODEL, Phase::Step, SMALL, start);
        watch.step(start + seconds(10));
        watch.end(true, start + seconds(10));
        watch.begin(MODEL, Phase::Step, Size { pixels: 2000.0 }, start);
        assert_eq!(watch.current().unwrap().1, seconds(200));
        watch.end(false, start);
        watch.begin(MODEL, Phase::Step, Size { pixels: 10.0 }, start);
        assert_eq!(watch.current().unwrap().1, seconds(50));
    }

    #[test]
    fn what_failed_is_not_measured() {
        let (mut watch, start) = (watch(), Instant::now());
        watch.begin(MODEL, Phase::Load, SMALL, start);
        watch.end(false, start + seconds(1));
        watch.begin(MODEL, Phase::Load, SMALL, start);
        assert_eq!(watch.current(), Some((Phase::Load, seconds(900))));
    }

    #[test]
    fn a_slow_step_gets_two_of_itself_to_confirm_a_cancel() {
        let (mut watch, start) = (watch(), Instant::now());
        assert_eq!(watch.cancel_grace(), seconds(10));
        watch.begin(MODEL, Phase::Step, SMALL, start);
        watch.step(start + seconds(60));
        assert_eq!(watch.cancel_grace(), seconds(120));
    }
}

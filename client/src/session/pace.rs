//! How long a job may stand still before its node is taken for dead: work is the sign of life, not a connection.
//!
//! Each phase has a time in which something must happen, from what was seen of this job: a step may take five times the
//! longest one so far. A node has deadlines of its own for its worker, which are shorter; these here catch the node that
//! looks alive and does nothing.

use std::time::{Duration, Instant};

use kinoflock_protocol::Millis;
use kinoflock_protocol::progress::JobEvent;

/// Silence after which a node is asked how the job stands.
const QUIET: Duration = Duration::from_secs(5);
/// Least time for anything to happen.
const LEAST: Duration = Duration::from_secs(30);
/// Least time for a waiting job to move.
const WAITING: Duration = Duration::from_secs(120);
/// Time for loading: large models come from slow disks.
const LOADING: Duration = Duration::from_secs(600);
/// A step may take so many times the longest one.
const SLOWER: u32 = 5;

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Loading,
    Running,
    Encoding,
}

/// Watches one job at one node.
#[derive(Debug)]
pub(super) struct Watch {
    phase: Phase,
    /// When something happened last.
    moved: Instant,
    /// When it began to run.
    ran: Option<Instant>,
    longest: Duration,
    /// Time until it is done, as the node said last.
    eta: Duration,
}

impl Watch {
    pub(super) fn new(now: Instant) -> Self {
        let (phase, longest, eta) = (Phase::Waiting, Duration::ZERO, Duration::ZERO);
        Self { phase, moved: now, ran: None, longest, eta }
    }

    /// Something happened to the job.
    pub(super) fn saw(&mut self, event: &JobEvent, now: Instant) {
        let since = now.saturating_duration_since(self.moved);
        match event {
            JobEvent::Queued { eta, .. } => self.enter(Phase::Waiting, *eta),
            JobEvent::AwaitingInputs { .. } => self.enter(Phase::Waiting, Millis(0)),
            JobEvent::Loading => self.enter(Phase::Loading, Millis(0)),
            JobEvent::Step { eta, .. } => {
                if self.phase == Phase::Running {
                    self.longest = self.longest.max(since);
                }
                self.ran.get_or_insert(now);
                self.enter(Phase::Running, *eta);
            }
            JobEvent::Encoding => self.enter(Phase::Encoding, Millis(0)),
            // No step forward by themselves: whoever sends these alone does nothing.
            JobEvent::Preview { .. } | JobEvent::Checkpoint { .. } => return,
            JobEvent::Done { .. } | JobEvent::Failed { .. } | JobEvent::Cancelled => {}
        }
        self.moved = now;
    }

    /// Silence after which the node is asked how the job stands.
    pub(super) fn quiet(&self) -> Duration {
        QUIET.max(self.longest * 2)
    }

    /// For how long nothing happened, if that is too long.
    pub(super) fn stalled(&self, now: Instant) -> Option<Duration> {
        let still = now.saturating_duration_since(self.moved);
        (still > self.allowed(now)).then_some(still)
    }

    fn allowed(&self, now: Instant) -> Duration {
        match self.phase {
            Phase::Waiting => WAITING.max(self.eta * 2),
            Phase::Loading => LOADING,
            Phase::Running if self.longest == Duration::ZERO => LEAST.max(self.eta),
            Phase::Running => LEAST.max(self.longest * SLOWER),
            Phase::Encoding => {
                let ran = self.ran.map_or(Duration::ZERO, |ran| now.saturating_duration_since(ran));
                LOADING.min((LEAST * 2).max(ran))
            }
        }
    }

    fn enter(&mut self, phase: Phase, eta: Millis) {
        self.phase = phase;
        self.eta = eta.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(done: u32, eta: u64) -> JobEvent {
        JobEvent::Step { done, total: 30, eta: Millis(eta) }
    }

    #[test]
    fn a_step_may_take_five_times_the_longest_before_its_node_is_given_up() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut watch = Watch::new(start);
        watch.saw(&step(1, 60_000), at(1));
        assert_eq!(watch.stalled(at(60)), None, "the node said that it takes a minute");
        watch.saw(&step(2, 50_000), at(21));
        assert_eq!(watch.stalled(at(21 + 100)), None);
        assert_eq!(watch.stalled(at(21 + 101)), Some(Duration::from_secs(101)));
        assert_eq!(watch.quiet(), Duration::from_secs(40));
    }

    #[test]
    fn previews_are_no_sign_of_life() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        watch.saw(&step(1, 0), start);
        let late = start + Duration::from_secs(31);
        watch.saw(&JobEvent::Preview { step: 1, png: Default::default() }, late);
        assert!(watch.stalled(late).is_some());
    }

    #[test]
    fn a_waiting_job_is_given_twice_the_time_that_its_node_said() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        watch.saw(&JobEvent::Queued { position: 3, eta: Millis(600_000) }, start);
        assert_eq!(watch.stalled(start + Duration::from_secs(1200)), None);
        assert!(watch.stalled(start + Duration::from_secs(1201)).is_some());
    }
}

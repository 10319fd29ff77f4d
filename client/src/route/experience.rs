//! What this artist's machine has seen of a node: whether its jobs end well, and how true the times are that it tells.
//!
//! Both fade, so that a node that was mended is tried again. Nothing here comes from others: it cannot be forged, and it
//! is told to nobody.

use kinoflock_protocol::{Millis, UnixMillis};
use serde::{Deserialize, Serialize};

/// Time in which what was seen loses half of its weight.
const HALF_LIFE_MS: f64 = 6.0 * 3600.0 * 1000.0;
/// Jobs that are assumed of a node of which nothing is known: it is given the benefit of the doubt, but not preferred
/// to one that has done well.
const ASSUMED_DONE: f64 = 4.0;
/// Faults that are assumed of it.
const ASSUMED_FAULTS: f64 = 0.5;
/// Times told that are assumed to have been true.
const ASSUMED_TRUE: f64 = 2.0;
/// Within this factor a node's times are corrected; beyond it they are worth nothing anyway.
const GREATEST_FACTOR: f64 = 8.0;
/// Shortest time for which a node is passed over after a fault; it doubles with each further one.
const AVOID_MS: f64 = 5_000.0;
/// Time for which a node is passed over that something befell.
const SET_ASIDE_MS: u64 = 60_000;
/// Longest time for which a node is passed over.
const AVOID_AT_MOST_MS: f64 = 3_600_000.0;
/// Time for which a node is passed over that was caught cheating: a day.
const AVOID_CHEAT_MS: f64 = 24.0 * 3_600_000.0;
/// A time that was told is compared with at least this one: below it both are noise.
const SHORTEST_MS: f64 = 500.0;

/// What a node can do wrong, as far as its artist can tell. What befalls a node (its disk, its card, its operator's
/// pause) is told by the node as a refusal, and is no fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// The job failed there.
    Failed,
    /// It could not be reached although it had the job.
    OutOfReach,
    /// It answered, and did nothing for the job.
    Stalled,
    /// It did not know the job that it had accepted.
    Forgot,
    /// It delivered something else than was asked for, or signed something else than it delivered.
    WrongClip,
    /// It did not show the steps that it had committed to, or did not commit to them.
    Withheld,
    /// An auditor found that it did not compute what it signed.
    Cheated,
}

impl Fault {
    fn weight(self) -> f64 {
        match self {
            Self::Failed | Self::OutOfReach | Self::Stalled => 1.0,
            Self::Forgot => 2.0,
            Self::Withheld => 4.0,
            Self::WrongClip => 8.0,
            Self::Cheated => 16.0,
        }
    }
}

/// What was seen of one node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Experience {
    /// Jobs that ended well, faded.
    done: f64,
    /// Faults by their weight, faded.
    faults: f64,
    /// Sum of the logarithms of time taken over time told, faded.
    late: f64,
    /// How many of these, faded.
    told: f64,
    /// When it was last brought up to date.
    at: UnixMillis,
    /// Until when it is passed over.
    avoid_until: UnixMillis,
}

impl Experience {
    /// Whether any job of ours was ever seen to its end there.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.done == 0.0 && self.faults == 0.0
    }

    /// A job ended well, `took` after the node had told that it would take `told`.
    pub fn done(&mut self, told: Millis, took: Millis, now: UnixMillis) {
        self.fade(now);
        self.done += 1.0;
        let ratio = (took.0 as f64).max(SHORTEST_MS) / (told.0 as f64).max(SHORTEST_MS);
        self.late += ratio.clamp(1.0 / GREATEST_FACTOR, GREATEST_FACTOR).ln();
        self.told += 1.0;
    }

    /// An auditor found its work as it should be.
    pub fn vouched(&mut self, now: UnixMillis) {
        self.fade(now);
        self.done += 1.0;
    }

    /// It did something wrong.
    pub fn fault(&mut self, fault: Fault, now: UnixMillis) {
        self.fade(now);
        self.faults += fault.weight();
        let avoid = (AVOID_MS * self.faults.exp2()).min(AVOID_AT_MOST_MS);
        // An audit that catches somebody is rare luck: it is not forgotten within the hour.
        let avoid = if fault == Fault::Cheated { AVOID_CHEAT_MS } else { avoid };
        self.avoid_until = self.avoid_until.max(now.plus(Millis(avoid as u64)));
    }

    /// Something befell it: it is passed over for a moment, and nothing is held against it.
    pub fn set_aside(&mut self, now: UnixMillis) {
        self.fade(now);
        self.avoid_until = self.avoid_until.max(now.plus(Millis(SET_ASIDE_MS)));
    }

    /// Chance that a job ends well there, above 0 and below 1.
    #[must_use]
    pub fn reliability(&self, now: UnixMillis) -> f64 {
        let now = self.faded(now);
        (ASSUMED_DONE + now.done) / (ASSUMED_DONE + ASSUMED_FAULTS + now.done + now.faults)
    }

    /// Jobs from which that is known, those of old counting for less.
    #[must_use]
    pub fn jobs(&self, now: UnixMillis) -> f64 {
        let now = self.faded(now);
        now.done + now.faults
    }

    /// What its times are to be multiplied by.
    #[must_use]
    pub fn time_factor(&self, now: UnixMillis) -> f64 {
        let now = self.faded(now);
        (now.late / (ASSUMED_TRUE + now.told)).exp()
    }

    /// Whether it is passed over while there are others.
    #[must_use]
    pub fn is_avoided(&self, now: UnixMillis) -> bool {
        now < self.avoid_until
    }

    fn fade(&mut self, now: UnixMillis) {
        *self = self.faded(now);
    }

    fn faded(&self, now: UnixMillis) -> Self {
        let kept = (-(now.since(self.at).0 as f64) / HALF_LIFE_MS).exp2();
        Self {
            done: self.done * kept,
            faults: self.faults * kept,
            late: self.late * kept,
            told: self.told * kept,
            at: self.at.max(now),
            avoid_until: self.avoid_until,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: UnixMillis = UnixMillis(1_000_000_000);

    fn later(ms: f64) -> UnixMillis {
        START.plus(Millis(ms as u64))
    }

    #[test]
    fn jobs_that_end_well_raise_reliability_and_faults_lower_it_by_their_weight() {
        let nobody = Experience::default();
        let (mut good, mut failed, mut liar) = (nobody, nobody, nobody);
        good.done(Millis(1000), Millis(1000), START);
        failed.fault(Fault::Failed, START);
        liar.fault(Fault::WrongClip, START);
        let order = [good, nobody, failed, liar].map(|seen| seen.reliability(START));
        assert!(order.is_sorted_by(|a, b| a > b), "{order:?}");
        assert!(order[0] < 1.0 && order[3] > 0.0);
        assert!(nobody.is_new() && !good.is_new() && !failed.is_new());
    }

    #[test]
    fn what_was_seen_fades_by_half_in_each_half_life() {
        let mut seen = Experience::default();
        seen.fault(Fault::WrongClip, START);
        let times = [0.0, HALF_LIFE_MS, 20.0 * HALF_LIFE_MS].map(|ms| seen.reliability(later(ms)));
        assert!(times.is_sorted_by(|a, b| a < b), "{times:?}");
        assert!((times[1] - 4.0 / 8.5).abs() < 1e-9, "8 faded to 4: {times:?}");
        assert!((times[2] - Experience::default().reliability(START)).abs() < 1e-4);
    }

    #[test]
    fn the_pause_after_a_fault_doubles_and_ends() {
        let mut seen = Experience::default();
        seen.fault(Fault::Failed, START);
        assert!(seen.is_avoided(later(2.0 * AVOID_MS - 1.0)) && !seen.is_avoided(later(2.0 * AVOID_MS)));
        seen.fault(Fault::Failed, START);
        assert!(seen.is_avoided(later(4.0 * AVOID_MS - 1.0)) && !seen.is_avoided(later(4.0 * AVOID_MS)));
        for _ in 0..40 {
            seen.fault(Fault::WrongClip, START);
        }
        assert!(!seen.is_avoided(later(AVOID_AT_MOST_MS)), "an hour at most");
    }

    #[test]
    fn what_befalls_a_node_is_not_held_against_it() {
        let mut seen = Experience::default();
        seen.set_aside(START);
        assert!(seen.is_avoided(later(1_000.0)) && !seen.is_avoided(START.plus(Millis(SET_ASIDE_MS))));
        assert_eq!(seen.reliability(START), Experience::default().reliability(START));
    }

    #[test]
    fn who_was_caught_cheating_is_passed_over_for_a_day_and_less_is_not_taken_for_pardon() {
        let mut seen = Experience::default();
        seen.fault(Fault::Cheated, START);
        seen.fault(Fault::Failed, later(1000.0));
        assert!(seen.is_avoided(later(AVOID_CHEAT_MS - 1.0)) && !seen.is_avoided(later(AVOID_CHEAT_MS)));
        let mut vouched = Experience::default();
        vouched.vouched(START);
        assert!(vouched.reliability(START) > Experience::default().reliability(START));
        assert!((vouched.time_factor(START) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn times_that_were_always_half_of_the_truth_come_to_be_doubled() {
        let mut seen = Experience::default();
        assert!((seen.time_factor(START) - 1.0).abs() < 1e-9);
        for _ in 0..60 {
            seen.done(Millis(10_000), Millis(20_000), START);
        }
        let factor = seen.time_factor(START);
        assert!((1.9..2.0).contains(&factor), "{factor}");
        let mut wild = Experience::default();
        (0..100).for_each(|_| wild.done(Millis(1), Millis(u64::MAX), START));
        assert!(wild.time_factor(START) <= GREATEST_FACTOR);
    }

    #[test]
    fn a_clock_that_was_set_back_harms_nothing() {
        let mut seen = Experience::default();
        seen.done(Millis(1000), Millis(1000), later(HALF_LIFE_MS));
        assert_eq!(seen.reliability(START), seen.reliability(later(HALF_LIFE_MS)));
    }
}

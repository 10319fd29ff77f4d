//! Why this node is idle, or is not: who asked for quotes in the last day, what came of them, and what was sought here and
//! is not served. Counts alone: no key and no prompt.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use kinoflock_protocol::id::ModelId;
use kinoflock_protocol::refusal::Reason;
use kinoflock_protocol::rpc::ReleaseReason;

use crate::admin::report::{Counted, QuotesReport};

/// How far back is counted, in hours.
const HOURS: usize = 24;
/// Span of one bucket.
const HOUR: Duration = Duration::from_secs(3600);
/// Models that were sought in one hour and are counted; further ones are counted together.
const MAX_MODELS: usize = 32;
/// How many of what was sought are told.
const TOLD: usize = 8;

/// What came of the quotes of the last day.
#[derive(Debug)]
pub(super) struct Interest {
    began: Instant,
    hours: VecDeque<(u64, Counts)>,
}

#[derive(Debug, Default, Clone)]
struct Counts {
    asked: u64,
    offered: u64,
    won: u64,
    expired: u64,
    /// By how much others were sooner, in milliseconds, summed.
    sooner_ms: u64,
    lost: BTreeMap<&'static str, u64>,
    refused: BTreeMap<&'static str, u64>,
    unserved: BTreeMap<ModelId, u64>,
}

impl Interest {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, hours: VecDeque::new() }
    }

    /// A quote was given.
    pub(super) fn offered(&mut self, now: Instant) {
        let counts = self.at(now);
        counts.asked += 1;
        counts.offered += 1;
    }

    /// A quote was refused.
    pub(super) fn refused(&mut self, reason: Reason, model: &ModelId, now: Instant) {
        let counts = self.at(now);
        counts.asked += 1;
        *counts.refused.entry(reason.code()).or_default() += 1;
        let known = counts.unserved.contains_key(model) || counts.unserved.len() < MAX_MODELS;
        if reason == Reason::ModelNotServed && known {
            *counts.unserved.entry(*model).or_default() += 1;
        }
    }

    /// A place was ordered.
    pub(super) fn won(&mut self, now: Instant) {
        self.at(now).won += 1;
    }

    /// A place was given back.
    pub(super) fn released(&mut self, reason: ReleaseReason, now: Instant) {
        let counts = self.at(now);
        *counts.lost.entry(reason.name()).or_default() += 1;
        if let ReleaseReason::Sooner(by) = reason {
            counts.sooner_ms = counts.sooner_ms.saturating_add(by.0);
        }
    }

    /// A place ran out unused.
    pub(super) fn expired(&mut self, now: Instant) {
        self.at(now).expired += 1;
    }

    /// The last day, `name` telling how a model is called here, if it is known.
    pub(super) fn report(&self, now: Instant, name: impl Fn(&ModelId) -> Option<String>) -> QuotesReport {
        let oldest = self.hour(now).saturating_sub(HOURS as u64 - 1);
        let mut all = Counts::default();
        for (_, counts) in self.hours.iter().filter(|(hour, _)| *hour >= oldest) {
            all.add(counts);
        }
        let sooner = all.lost.get("sooner").copied().unwrap_or_default();
        let named = |(model, count): (&ModelId, &u64)| Counted {
            what: name(model).unwrap_or_else(|| model.to_string()),
            count: *count,
        };
        QuotesReport {
            hours: HOURS as u64,
            asked: all.asked,
            offered: all.offered,
            won: all.won,
            expired: all.expired,
            lost: counted(&all.lost),
            sooner_by_seconds: (sooner > 0).then(|| all.sooner_ms as f64 / sooner as f64 / 1e3),
            refused: counted(&all.refused),
            unserved: most(all.unserved.iter().map(named).collect()),
        }
    }

    fn hour(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_secs() / HOUR.as_secs()
    }

    fn at(&mut self, now: Instant) -> &mut Counts {
        let hour = self.hour(now);
        if self.hours.back().is_none_or(|(last, _)| *last < hour) {
            self.hours.push_back((hour, Counts::default()));
            if self.hours.len() > HOURS {
                self.hours.pop_front();
            }
        }
        &mut self.hours.back_mut().expect("invariant: just looked at").1
    }
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.asked += other.asked;
        self.offered += other.offered;
        self.won += other.won;
        self.expired += other.expired;
        self.sooner_ms = self.sooner_ms.saturating_add(other.sooner_ms);
        for (reason, count) in &other.lost {
            *self.lost.entry(reason).or_default() += count;
        }
        for (reason, count) in &other.refused {
            *self.refused.entry(reason).or_default() += count;
        }
        for (model, count) in &other.unserved {
            *self.unserved.entry(*model).or_default() += count;
        }
    }
}

fn counted(counts: &BTreeMap<&'static str, u64>) -> Vec<Counted> {
    most(counts.iter().map(|(what, count)| Counted { what: (*what).to_owned(), count: *count }).collect())
}

fn most(mut counts: Vec<Counted>) -> Vec<Counted> {
    counts.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.what.cmp(&b.what)));
    counts.truncate(TOLD);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use kinoflock_protocol::units::Millis;

    const MODEL: ModelId = ModelId::from_bytes([1; 32]);

    #[test]
    fn what_came_of_quotes_is_counted_for_a_day_and_then_forgotten() {
        let start = Instant::now();
        let mut interest = Interest::new(start);
        interest.offered(start);
        interest.offered(start);
        interest.won(start);
        interest.released(ReleaseReason::Sooner(Millis(40_000)), start);
        interest.refused(Reason::ModelNotServed, &MODEL, start);
        interest.refused(Reason::QueueFull, &MODEL, start + HOUR);
        let report = interest.report(start + HOUR, |_| Some("wan".to_owned()));
        assert_eq!((report.asked, report.offered, report.won), (4, 2, 1));
        assert_eq!(report.sooner_by_seconds, Some(40.0));
        assert_eq!(report.lost, [Counted { what: "sooner".to_owned(), count: 1 }]);
        assert_eq!(report.unserved, [Counted { what: "wan".to_owned(), count: 1 }]);
        let later = interest.report(start + HOUR * 24, |_| None);
        assert_eq!(later.asked, 1, "the first hour is a day ago");
        assert_eq!(interest.report(start + HOUR * 30, |_| None).asked, 0);
    }

    #[test]
    fn models_that_nobody_has_cannot_fill_the_memory() {
        let start = Instant::now();
        let mut interest = Interest::new(start);
        for index in 0..1000u32 {
            let mut id = [0; 32];
            id[..4].copy_from_slice(&index.to_le_bytes());
            interest.refused(Reason::ModelNotServed, &ModelId::from_bytes(id), start);
        }
        assert_eq!(interest.hours[0].1.unserved.len(), MAX_MODELS);
        assert_eq!(interest.report(start, |_| None).asked, 1000);
    }
}

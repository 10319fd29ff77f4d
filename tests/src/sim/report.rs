//! What a run came to, and the best that it could have come to.
//!
//! # Times told by liars
//!
//! A node that says that it is four times as fast as it is looks best to everybody, so it gets far more than its share
//! of the jobs, and the times told for them are wrong. An artist finds out by the first job there and is not fooled
//! again, but in a large network each of the liars has an artist to fool once. With a tenth of the nodes lying, times
//! told are right within 25 % for 80 to 91 % of all jobs, and for 93 % or more of those at nodes that do not lie (the
//! last two columns of the table; `cargo test --workspace --test sim -- --nocapture`). A promise that is too good cannot
//! be told from a fast card before it was tried once; if artists told each other, that would be the liars' tool too.

use std::fmt;

/// What became of one job.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fate {
    /// Seconds from its arrival to its acceptance.
    pub routed: f64,
    /// Seconds from its first acceptance to its end, as told then.
    pub told: f64,
    /// As it came.
    pub took: f64,
    /// When it was done, in seconds of the run.
    pub done_at: Option<f64>,
    /// Whether it was stopped by its artist.
    pub cancelled: bool,
    /// Times that it was handed to another node after acceptance.
    pub moved: u32,
    /// Messages that its client sent and got, until acceptance.
    pub messages: u32,
    /// Bytes that its client sent and got, until acceptance.
    pub bytes: usize,
    /// Round trips one after another until acceptance.
    pub trips: u32,
    /// Whether the node that told its time was one that lies.
    pub lied_to: bool,
}

/// What a run came to.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Nodes.
    pub nodes: usize,
    /// Every job.
    pub jobs: Vec<Fate>,
    /// Bytes a second that a node sends for adverts.
    pub advert_bytes: f64,
    /// The same, if every advert went to every node.
    pub advert_bytes_to_all: f64,
    /// Nodes of one slice.
    pub slice: usize,
    /// Slowest finish over the best assignment's, where all came at once.
    pub over_best: f64,
}

impl Report {
    /// Share of the jobs that were not cancelled that are done.
    #[must_use]
    pub fn done(&self) -> f64 {
        let wanted: Vec<_> = self.jobs.iter().filter(|job| !job.cancelled).collect();
        wanted.iter().filter(|job| job.done_at.is_some()).count() as f64 / wanted.len().max(1) as f64
    }

    /// Share of the jobs whose time was told within `tolerance`; those that were moved or cancelled are left out.
    #[must_use]
    pub fn honest(&self, tolerance: f64) -> f64 {
        share_within(self.errors(), tolerance)
    }

    /// The same of the jobs whose node did not lie.
    #[must_use]
    pub fn honest_of_honest(&self, tolerance: f64) -> f64 {
        share_within(self.ended().filter(|job| !job.lied_to).map(error).collect(), tolerance)
    }

    /// Time told over time taken, less 1.
    #[must_use]
    pub fn errors(&self) -> Vec<f64> {
        self.ended().map(error).collect()
    }

    fn ended(&self) -> impl Iterator<Item = &Fate> {
        self.jobs.iter().filter(|job| job.done_at.is_some() && job.moved == 0 && !job.cancelled)
    }

    /// The value that this share of the jobs does not exceed.
    #[must_use]
    pub fn quantile(&self, share: f64, of: impl Fn(&Fate) -> f64) -> f64 {
        let mut values: Vec<f64> = self.jobs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        let at = (values.len().saturating_sub(1)) as f64 * share;
        values.get(at as usize).copied().unwrap_or_default()
    }

    /// The heading of the rows that [`Display`](fmt::Display) gives.
    #[must_use]
    pub fn heading() -> &'static str {
        "| nodes | jobs | route p50 ms | p99 ms | messages | trips p99 | client bytes p99 | advert B/s/node | to all B/s | slice | done % | finish/best | eta in 25 % | of honest |"
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let routed = |share| self.quantile(share, |job| job.routed * 1000.0);
        write!(
            f,
            "| {} | {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {} | {:.1} | {:.2} | {:.1} | {:.1} |",
            self.nodes,
            self.jobs.len(),
            routed(0.5),
            routed(0.99),
            self.quantile(0.5, |job| job.messages.into()),
            self.quantile(0.99, |job| job.trips.into()),
            self.quantile(0.99, |job| job.bytes as f64),
            self.advert_bytes,
            self.advert_bytes_to_all,
            self.slice,
            self.done() * 100.0,
            self.over_best,
            self.honest(0.25) * 100.0,
            self.honest_of_honest(0.25) * 100.0,
        )
    }
}

fn error(job: &Fate) -> f64 {
    job.told / job.took - 1.0
}

fn share_within(errors: Vec<f64>, tolerance: f64) -> f64 {
    errors.iter().filter(|error| error.abs() <= tolerance).count() as f64 / errors.len().max(1) as f64
}

/// Slowest finish in seconds when jobs of these costs are given, the longest first, each to the node that is done with
/// it first (LPT; Gonzalez, Ibarra, Sahni 1977). A node is its seconds before it begins, its work a second, and its
/// seconds beside the work of each job.
#[must_use]
pub fn best(mut works: Vec<f64>, nodes: &[(f64, f64, f64)]) -> f64 {
    works.sort_by(|a, b| b.total_cmp(a));
    let mut free: Vec<f64> = nodes.iter().map(|(start, ..)| *start).collect();
    let mut slowest = 0.0_f64;
    for work in works {
        let finish = |index: usize| free[index] + work / nodes[index].1 + nodes[index].2;
        let Some(index) = (0..nodes.len()).min_by(|a, b| finish(*a).total_cmp(&finish(*b))) else { break };
        free[index] = finish(index);
        slowest = slowest.max(free[index]);
    }
    slowest
}

//! Which nodes could make a clip, when, and at what work, without giving the job to any: nodes are found and ranked as for
//! a job, the best are asked for quotes, which hold neither prompt nor files, and every place is given back at once.

use kinoflock_protocol::rpc::ReleaseReason;
use kinoflock_protocol::{JobShape, Millis, NodeId, Work};

use super::find::{Found, Model};
use super::place::Offered;
use super::{Client, Events, SessionError};
use crate::ask::Ask;
use crate::route::{self, Candidate, Declined};
use crate::ticket::Way;

/// Nodes that are asked for a quote at most.
pub const SURVEYED: usize = 16;

/// What the nodes answered.
#[derive(Debug, Clone)]
pub struct Survey {
    /// The model.
    pub model: Model,
    /// Frames, size, steps, guidance.
    pub shape: JobShape,
    /// What the clip costs.
    pub work: Work,
    /// Who could, the one that would be chosen first.
    pub could: Vec<Could>,
    /// Who could not, and why.
    pub declined: Vec<Declined>,
    /// Nodes that may be able to and were not asked, because [`SURVEYED`] better ones were.
    pub not_asked: usize,
}

/// A node that could make it.
#[derive(Debug, Clone, PartialEq)]
pub struct Could {
    /// Which node.
    pub node: NodeId,
    /// The name that it gave itself.
    pub name: String,
    /// Jobs ahead.
    pub position: u32,
    /// Time until the clip would be done, by the node's word.
    pub told: Millis,
    /// The same, corrected by how true its times were for this artist.
    pub expected: Millis,
    /// Time that it computes.
    pub compute: Millis,
    /// Its measured speed with this model, in work units (10^6 FLOP) a second.
    pub speed: u64,
    /// Round trip, if it was measured.
    pub round_trip: Option<Millis>,
    /// Chance that a job ends well there, above 0 and below 1, by what this artist saw.
    pub reliability: f64,
    /// From how many jobs that is known; older ones count for less.
    pub jobs: f64,
    /// Whether no job of this artist was ever seen to its end there.
    pub is_new: bool,
    /// Whether it did wrong a moment ago, and would only be taken if there were no other.
    pub is_avoided: bool,
}

impl Client {
    /// Asks who could make a clip. Nobody gets the prompt or a file, and no place stays held.
    ///
    /// # Errors
    /// As [`Client::submit`]; `NoTaker` tells every node's reason.
    pub async fn survey(&self, ask: &Ask, ways: &[Way], events: &Events) -> Result<Survey, SessionError> {
        ask.check()?;
        let found = self.find_for(ask, ways, events).await?;
        let placing = self.prepare(ask, &found).await?;
        let candidates: Vec<Candidate> = found.iter().map(|found| found.candidate.clone()).collect();
        let (ranked, mut declined) = self.rank(&candidates, &placing.needs());
        let asked: Vec<&Found> = ranked.iter().take(SURVEYED).map(|ranked| &found[ranked.index]).collect();
        let (mut offers, refused) = self.quotes(&asked, &placing).await;
        declined.extend(refused);
        let worth = |offer: &Offered<'_>| {
            route::cost(&offer.found.candidate.seen, offer.quote.quote().eta, crate::now())
        };
        offers.sort_by_key(|offer| (worth(offer), offer.quote.node()));
        let could: Vec<Could> = offers.iter().map(|offer| Could::of(offer, placing.work)).collect();
        self.release(offers.into_iter().map(|offer| (offer, ReleaseReason::Cancelled)).collect()).await;
        if could.is_empty() {
            return Err(SessionError::NoTaker { model: placing.model.name, reasons: declined });
        }
        let (shape, work, model) = (placing.spec.shape(), placing.work, placing.model);
        Ok(Survey { model, shape, work, could, declined, not_asked: ranked.len().saturating_sub(SURVEYED) })
    }
}

impl Could {
    fn of(offer: &Offered<'_>, work: Work) -> Self {
        let Candidate { node, capacity, round_trip, seen } = &offer.found.candidate;
        let (quote, now) = (offer.quote.quote(), crate::now());
        Self {
            node: *node,
            name: capacity.name.to_string(),
            position: quote.position,
            told: quote.eta,
            expected: Millis((quote.eta.0 as f64 * seen.time_factor(now)) as u64),
            compute: work.millis_at(quote.speed),
            speed: quote.speed,
            round_trip: *round_trip,
            reliability: seen.reliability(now),
            jobs: seen.jobs(now),
            is_new: seen.is_new(),
            is_avoided: seen.is_avoided(now),
        }
    }
}

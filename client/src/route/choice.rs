//! Which of those who offered a place has the job, and why the others' places are given back.

use kinoflock_protocol::rpc::ReleaseReason;
use kinoflock_protocol::{Millis, NodeId, UnixMillis};

use super::{Candidate, Needs, cost, transfer};

/// From this much on, a place is given back because another node is expected to be done sooner.
const SOONER_MS: u64 = 1_000;

/// A node's promise, and what it is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quoted {
    /// Place in the list of candidates.
    pub index: usize,
    /// Which node.
    pub node: NodeId,
    /// When the clip would be there, by the node's word, inputs and the way included.
    pub finish: Millis,
    /// The same, corrected by what was seen of the node; see [`cost`].
    pub cost: u64,
    /// Round trip, if it was measured.
    pub round_trip: Option<Millis>,
    /// Jobs that came there since its advert, and places that others hold there now.
    pub came: u32,
    /// Whether it did wrong a moment ago.
    pub is_avoided: bool,
    /// Whether it serves the artist's own collective, if such are to be asked first.
    pub is_own: bool,
}

impl Quoted {
    /// What a candidate's promise is worth: of `eta`, with `position` jobs and held places before.
    #[must_use]
    pub fn new(
        index: usize,
        candidate: &Candidate,
        (position, eta): (u32, Millis),
        needs: &Needs,
        now: UnixMillis,
    ) -> Self {
        let round_trip = candidate.round_trip.unwrap_or_default();
        let finish = Millis(eta.0.max(transfer(needs).0).saturating_add(round_trip.0));
        let (is_avoided, cost) = cost(&candidate.seen, finish, now);
        let (node, round_trip) = (candidate.node, candidate.round_trip);
        let came = position.saturating_sub(candidate.capacity.queue.jobs);
        Self { index, node, finish, cost, round_trip, came, is_avoided, is_own: false }
    }
}

/// The promises in the order in which they are to be tried, and for each but the first why it is given back once the
/// first has taken the job.
#[must_use]
pub fn choose(mut quotes: Vec<Quoted>) -> Vec<(Quoted, Option<ReleaseReason>)> {
    quotes.sort_by_key(|quote| (quote.is_avoided, !quote.is_own, quote.cost, quote.node));
    let first = quotes.first().copied();
    let reason = |quote: Quoted| {
        let chosen = first.filter(|chosen| chosen.node != quote.node);
        (quote, chosen.map(|chosen| why_not(&quote, &chosen)))
    };
    quotes.into_iter().map(reason).collect()
}

/// Why this one's place is given back for the chosen one's.
#[must_use]
pub fn why_not(other: &Quoted, chosen: &Quoted) -> ReleaseReason {
    let sooner = other.finish.0.saturating_sub(chosen.finish.0);
    if sooner >= SOONER_MS {
        return ReleaseReason::Sooner(Millis(sooner));
    }
    let is_worse = (other.is_avoided, other.cost) > (chosen.is_avoided, chosen.cost);
    if is_worse && other.finish <= chosen.finish {
        return ReleaseReason::Reliability;
    }
    if other.round_trip > chosen.round_trip { ReleaseReason::Latency } else { ReleaseReason::ChoseAnother }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quoted(number: u8, finish: u64, cost: u64) -> Quoted {
        let (node, finish) = (NodeId::from_bytes([number; 32]), Millis(finish));
        let (index, round_trip) = (number.into(), Some(Millis(10)));
        Quoted { index, node, finish, cost, round_trip, came: 0, is_avoided: false, is_own: false }
    }

    #[test]
    fn the_first_to_be_done_is_tried_first_and_the_others_hear_why() {
        let slow = quoted(1, 50_000, 50_000);
        let unreliable = quoted(2, 9_000, 40_000);
        let far = Quoted { round_trip: Some(Millis(300)), ..quoted(3, 10_200, 10_200) };
        let equal = quoted(4, 10_000, 10_000);
        let best = quoted(0, 10_000, 10_000);
        let chosen = choose(vec![slow, unreliable, far, equal, best]);
        let told: Vec<_> = chosen.iter().map(|(quote, reason)| (quote.index, *reason)).collect();
        let reasons = [
            (0, None),
            (4, Some(ReleaseReason::ChoseAnother)),
            (3, Some(ReleaseReason::Latency)),
            (2, Some(ReleaseReason::Reliability)),
            (1, Some(ReleaseReason::Sooner(Millis(40_000)))),
        ];
        assert_eq!(told, reasons);
    }

    #[test]
    fn own_nodes_come_first_but_not_after_a_fault() {
        let other = quoted(1, 10, 10);
        let own = Quoted { is_own: true, ..quoted(2, 90, 90) };
        assert_eq!(choose(vec![other, own])[0].0.index, 2);
        let failed = Quoted { is_avoided: true, ..own };
        assert_eq!(choose(vec![other, failed])[0].0.index, 1);
    }
}

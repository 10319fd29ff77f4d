//! From ranked nodes to the one that has the job: whom to ask, when to ask more, when to order, when to try again. Sans-IO.
//!
//! Call [`Routing::poll`] until it gives [`Step::Idle`]; carry out what it says and report every answer with
//! [`handle_quote`](Routing::handle_quote) or [`handle_no`](Routing::handle_no), and of an order with
//! [`handle_taken`](Routing::handle_taken) or [`handle_no`](Routing::handle_no).
//!
//! The first few are asked at once, and the best promise has the order. That is the whole of it in ordinary load, however
//! far the promise is behind the adverts: some jobs have come since, and asking again costs a round trip to win little.
//! But when many jobs and places stand before this one that the advert of some seconds ago did not know, a crowd has come
//! at once: each holds places at several nodes, and what nodes promise is the noise of that. Then all places are given
//! back, and others are asked after a drawn pause, by which the many are spread. When all said no, and one of them only
//! for the moment, all are asked again after a pause that grows.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use kinoflock_protocol::rpc::ReleaseReason;

use super::choice::{Quoted, choose};
use super::{Ranked, turn};

/// Nodes that are asked for a quote at once.
pub const QUOTES_AT_ONCE: usize = 3;
/// Rounds of questions before the best of those who offered has the order.
const ROUNDS: u32 = 3;
/// The pause before the next round is drawn below this part of the best promise.
const SPREAD_PART: u64 = 10;
/// Longest pause before the next round, in milliseconds.
const SPREAD_MS: u64 = 5_000;
/// A crowd has come when so many jobs and held places that its advert did not know are before us at the best node.
const CROWD: u32 = 4;
/// The best promise is far behind when it takes so many times as long as the best advert says.
const FAR_BEHIND: f64 = 1.5;
/// And when it takes so much longer at least: a round trip is not worth less.
const FAR_BEHIND_MS: u64 = 2_000;
/// Shortest pause before all are asked again.
const PAUSE: Duration = Duration::from_millis(300);
/// Longest pause before all are asked again.
const PAUSE_AT_MOST: Duration = Duration::from_secs(5);
/// How long nodes that said no for the moment are asked again.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Ask these for quotes, all at once.
    Ask(Vec<Ranked>),
    /// Give these places back.
    Release(Vec<(Quoted, ReleaseReason)>),
    /// Send the order to this one.
    Order(Quoted),
    /// Poll again then.
    Wait(Instant),
    /// Answers are on their way.
    Idle,
    /// Nobody takes it.
    GiveUp,
}

/// The state of one job's search for a node.
#[derive(Debug, Clone)]
pub struct Routing {
    ranked: Vec<Ranked>,
    seed: u64,
    asked: usize,
    rounds: u32,
    outstanding: BTreeSet<usize>,
    quotes: Vec<Quoted>,
    is_momentary: bool,
    pause: Duration,
    again_at: Option<Instant>,
    until: Instant,
}

impl Routing {
    /// Begins with nodes as [`super::rank`] or [`super::own_first`] gave them. The same seed asks the same nodes.
    #[must_use]
    pub fn new(ranked: Vec<Ranked>, seed: u64, now: Instant) -> Self {
        Self {
            ranked: turn::in_turn(ranked, QUOTES_AT_ONCE, seed),
            seed,
            asked: 0,
            rounds: 0,
            outstanding: BTreeSet::new(),
            quotes: Vec::new(),
            is_momentary: false,
            pause: PAUSE,
            again_at: None,
            until: now + PATIENCE,
        }
    }

    /// A node that was asked offers a place.
    pub fn handle_quote(&mut self, mut quote: Quoted) {
        if self.outstanding.remove(&quote.index) {
            quote.is_own = self.ranked.iter().any(|node| node.index == quote.index && node.is_own);
            self.quotes.push(quote);
        }
    }

    /// A node said no, to a question or to the order, or could not be asked. `is_momentary`: it may say yes soon.
    pub fn handle_no(&mut self, index: usize, is_momentary: bool) {
        self.outstanding.remove(&index);
        self.quotes.retain(|quote| quote.index != index);
        self.is_momentary |= is_momentary;
    }

    /// A node has taken the job: the places to give back, each with its reason.
    pub fn handle_taken(&mut self, index: usize) -> Vec<(Quoted, ReleaseReason)> {
        self.outstanding.clear();
        let Some(at) = self.quotes.iter().position(|quote| quote.index == index) else { return Vec::new() };
        let taken = self.quotes.swap_remove(at);
        let others = std::mem::take(&mut self.quotes);
        others.into_iter().map(|other| (other, super::choice::why_not(&other, &taken))).collect()
    }

    /// What to do next.
    pub fn poll(&mut self, now: Instant) -> Step {
        if let Some(at) = self.again_at {
            if now < at {
                return Step::Wait(at);
            }
            (self.again_at, self.asked, self.is_momentary) = (None, 0, false);
        }
        if !self.outstanding.is_empty() {
            return Step::Idle;
        }
        let best = choose(self.quotes.clone()).first().map(|(best, _)| *best);
        match best {
            Some(best) if self.is_enough(&best) => {
                self.outstanding.insert(best.index);
                Step::Order(best)
            }
            Some(best) => self.spread(&best, now),
            None if self.asked < self.ranked.len() => self.ask(),
            None => self.later(now),
        }
    }

    fn ask(&mut self) -> Step {
        let few: Vec<Ranked> = self.ranked.iter().skip(self.asked).take(QUOTES_AT_ONCE).copied().collect();
        self.asked += few.len();
        self.outstanding.extend(few.iter().map(|node| node.index));
        Step::Ask(few)
    }

    fn spread(&mut self, best: &Quoted, now: Instant) -> Step {
        self.rounds += 1;
        self.seed = self.seed.wrapping_add(1);
        let pause = turn::pause(self.seed, (best.cost / SPREAD_PART).min(SPREAD_MS));
        self.again_at = Some(now + Duration::from_millis(pause));
        self.ranked.sort_by_key(|node| (node.is_avoided, !node.is_own, node.cost, node.node));
        self.ranked = turn::in_turn(std::mem::take(&mut self.ranked), QUOTES_AT_ONCE, self.seed);
        let given_back = std::mem::take(&mut self.quotes);
        Step::Release(given_back.into_iter().map(|quote| (quote, ReleaseReason::ChoseAnother)).collect())
    }

    fn later(&mut self, now: Instant) -> Step {
        let at = now + self.pause;
        if !self.is_momentary || at > self.until {
            return Step::GiveUp;
        }
        self.pause = (self.pause * 2).min(PAUSE_AT_MOST);
        self.again_at = Some(at);
        Step::Wait(at)
    }

    fn is_enough(&self, best: &Quoted) -> bool {
        let others = self.ranked.iter().filter(|node| !node.is_avoided);
        let promised = others.filter(|node| node.is_own >= best.is_own).map(|node| node.cost).min();
        let is_behind = |promised: u64| {
            best.cost as f64 > promised as f64 * FAR_BEHIND && best.cost - promised > FAR_BEHIND_MS
        };
        self.rounds >= ROUNDS || best.came < CROWD || !promised.is_some_and(is_behind)
    }
}

#[cfg(test)]
mod tests {
    use kinoflock_protocol::{Millis, NodeId};

    use super::*;

    fn ranked(count: u8, cost: u64) -> Vec<Ranked> {
        let node = |n: u8| Ranked {
            index: n.into(),
            node: NodeId::from_bytes([n; 32]),
            finish: Millis(cost),
            cost,
            is_new: false,
            is_avoided: false,
            is_own: false,
        };
        (0..count).map(node).collect()
    }

    fn quoted(node: &Ranked, cost: u64) -> Quoted {
        let (is_avoided, is_own) = (false, false);
        let Ranked { index, node, .. } = *node;
        Quoted { index, node, finish: Millis(cost), cost, round_trip: None, came: 0, is_avoided, is_own }
    }

    fn crowded(node: &Ranked, cost: u64) -> Quoted {
        Quoted { came: CROWD, ..quoted(node, cost) }
    }

    fn asked(step: Step) -> Vec<Ranked> {
        match step {
            Step::Ask(nodes) => nodes,
            other => panic!("asks, not {other:?}"),
        }
    }

    #[test]
    fn promises_that_hold_what_adverts_say_are_ordered_from_at_once() {
        let now = Instant::now();
        let mut routing = Routing::new(ranked(10, 10_000), 1, now);
        let few = asked(routing.poll(now));
        assert_eq!((few.len(), routing.poll(now)), (3, Step::Idle));
        for (node, cost) in few.iter().zip([14_000, 12_000, 13_000]) {
            routing.handle_quote(quoted(node, cost));
        }
        let best = quoted(&few[1], 12_000);
        assert_eq!(routing.poll(now), Step::Order(best));
        assert_eq!(routing.poll(now), Step::Idle);
        let released = routing.handle_taken(best.index);
        assert_eq!(released.len(), 2);
        assert!(released.contains(&(quoted(&few[0], 14_000), ReleaseReason::Sooner(Millis(2_000)))));
    }

    #[test]
    fn promises_far_behind_the_adverts_are_ordered_from_at_once_where_no_crowd_came() {
        let now = Instant::now();
        let mut routing = Routing::new(ranked(20, 10_000), 1, now);
        for node in asked(routing.poll(now)) {
            routing.handle_quote(Quoted { came: CROWD - 1, ..quoted(&node, 90_000) });
        }
        assert!(matches!(routing.poll(now), Step::Order(_)));
    }

    #[test]
    fn places_are_given_back_while_a_crowd_is_before_us_but_not_for_ever() {
        let mut now = Instant::now();
        let mut routing = Routing::new(ranked(20, 10_000), 1, now);
        for _ in 0..ROUNDS {
            for node in asked(routing.poll(now)) {
                routing.handle_quote(crowded(&node, 40_000));
            }
            let Step::Release(places) = routing.poll(now) else { panic!("gives places back") };
            assert_eq!(places.len(), QUOTES_AT_ONCE);
            now += Duration::from_secs(4);
        }
        for node in asked(routing.poll(now)) {
            routing.handle_quote(crowded(&node, 40_000));
        }
        assert!(matches!(routing.poll(now), Step::Order(_)));
    }

    #[test]
    fn a_refused_order_goes_to_the_next_and_all_are_asked_again_if_one_may_say_yes_soon() {
        let mut now = Instant::now();
        let mut routing = Routing::new(ranked(2, 10_000), 1, now);
        let few = asked(routing.poll(now));
        routing.handle_quote(quoted(&few[0], 10_000));
        routing.handle_quote(quoted(&few[1], 11_000));
        assert_eq!(routing.poll(now), Step::Order(quoted(&few[0], 10_000)));
        routing.handle_no(few[0].index, true);
        assert_eq!(routing.poll(now), Step::Order(quoted(&few[1], 11_000)));
        routing.handle_no(few[1].index, false);
        let Step::Wait(at) = routing.poll(now) else { panic!("waits") };
        assert_eq!(routing.poll(now), Step::Wait(at));
        now = at;
        for node in asked(routing.poll(now)) {
            routing.handle_no(node.index, false);
        }
        assert_eq!(routing.poll(now), Step::GiveUp, "none of them for the moment only");
    }
}

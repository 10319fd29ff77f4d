//! In which turn the nodes that could take a job are asked for quotes.
//!
//! The best is always among the first few. The others of the first few are drawn, likelier the better they are: clients
//! that come at once and know the same would else all ask the same nodes. Now and then one of them is a node that was
//! never tried, or newcomers would never get to show what they can.

use super::Ranked;

/// One time in so many, a newcomer is among the first few.
const EXPLORE_EVERY: u64 = 8;

/// The same nodes in the order in which they are to be asked, `few` at a time. The same seed gives the same order.
#[must_use]
pub fn in_turn(mut ranked: Vec<Ranked>, few: usize, seed: u64) -> Vec<Ranked> {
    if ranked.len() <= few || few < 2 {
        return ranked;
    }
    let mut dice = Dice::new(seed);
    let mut first = vec![ranked.remove(0)];
    let newcomers = ranked.iter().filter(|node| node.is_new && !node.is_avoided).count();
    if newcomers > 0 && dice.draw(EXPLORE_EVERY) == 0 {
        let wanted = dice.draw(newcomers as u64) as usize;
        let of_new = ranked.iter().enumerate().filter(|(_, node)| node.is_new && !node.is_avoided);
        let index = of_new.map(|(index, _)| index).nth(wanted).expect("invariant: drawn among them");
        first.push(ranked.remove(index));
    }
    while first.len() < few {
        let index = dice.weighted(&ranked);
        first.push(ranked.remove(index));
    }
    first.append(&mut ranked);
    first
}

/// A pause below `bound` milliseconds, drawn from a seed.
pub(super) fn pause(seed: u64, bound: u64) -> u64 {
    Dice::new(!seed).draw(bound)
}

/// Draws from a seed.
struct Dice(blake3::OutputReader);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(blake3::Hasher::new_derive_key("kinoflock/1/turn").update(&seed.to_le_bytes()).finalize_xof())
    }

    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// A number below `bound`; the bias is below one in 2^32 for the bounds here.
    fn draw(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// An index, each in proportion to how soon its node would be done; those to be passed over only if all are.
    fn weighted(&mut self, ranked: &[Ranked]) -> usize {
        let all_avoided = ranked.iter().all(|node| node.is_avoided);
        let own = ranked.iter().any(|node| node.is_own && !node.is_avoided);
        let weight = |node: &Ranked| {
            let passed_over = (node.is_avoided && !all_avoided) || (own && !node.is_own);
            if passed_over { 0.0 } else { 1.0 / (node.cost.max(1) as f64) }
        };
        let total: f64 = ranked.iter().map(weight).sum();
        let mut left = total * (self.next() as f64 / u64::MAX as f64);
        for (index, node) in ranked.iter().enumerate() {
            left -= weight(node);
            if left <= 0.0 && weight(node) > 0.0 {
                return index;
            }
        }
        // Rounding left a crumb over.
        ranked.iter().rposition(|node| weight(node) > 0.0).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kinoflock_protocol::{Millis, NodeId};

    use super::*;

    fn node(number: u8, cost: u64) -> Ranked {
        let node = NodeId::from_bytes([number; 32]);
        Ranked {
            index: number.into(),
            node,
            finish: Millis(cost),
            cost,
            is_new: false,
            is_avoided: false,
            is_own: false,
        }
    }

    fn indices(ranked: &[Ranked]) -> Vec<usize> {
        ranked.iter().map(|ranked| ranked.index).collect()
    }

    /// How often each node is among the first three, over many seeds.
    fn asked_first(ranked: &[Ranked]) -> BTreeMap<usize, u32> {
        let mut counts = BTreeMap::new();
        for seed in 0..4000 {
            for node in &in_turn(ranked.to_vec(), 3, seed)[..3] {
                *counts.entry(node.index).or_default() += 1;
            }
        }
        counts
    }

    #[test]
    fn every_node_has_one_turn_and_the_best_is_the_first() {
        let ranked: Vec<_> = (0..20).map(|n| node(n, 100 + u64::from(n))).collect();
        for seed in 0..200 {
            let mut turn = indices(&in_turn(ranked.clone(), 3, seed));
            assert_eq!(turn[0], 0);
            turn.sort_unstable();
            assert_eq!(turn, (0..20).collect::<Vec<_>>());
        }
    }

    #[test]
    fn one_seed_gives_one_order_and_seeds_differ() {
        let ranked: Vec<_> = (0..20).map(|n| node(n, 100)).collect();
        let turn = |seed| indices(&in_turn(ranked.clone(), 3, seed));
        assert_eq!(turn(7), turn(7));
        assert!((0..20).any(|seed| turn(seed) != turn(seed + 1)));
    }

    #[test]
    fn few_nodes_are_asked_as_they_are_ranked() {
        let ranked: Vec<_> = (0..3).map(|n| node(n, 100)).collect();
        assert_eq!(indices(&in_turn(ranked, 3, 9)), [0, 1, 2]);
    }

    #[test]
    fn a_node_that_is_done_in_half_the_time_is_asked_about_twice_as_often() {
        let mut ranked = vec![node(0, 1)];
        ranked.extend((1..=10).map(|n| node(n, 1000)));
        ranked.extend((11..=20).map(|n| node(n, 2000)));
        let counts = asked_first(&ranked);
        let sum = |range: std::ops::RangeInclusive<usize>| -> u32 {
            range.map(|n| counts.get(&n).copied().unwrap_or(0)).sum()
        };
        let ratio = f64::from(sum(1..=10)) / f64::from(sum(11..=20));
        assert!((1.7..2.2).contains(&ratio), "{ratio}");
        assert!((1..=20).all(|n| counts.contains_key(&n)), "everybody gets a turn: {counts:?}");
    }

    #[test]
    fn a_newcomer_that_looks_slow_is_tried_now_and_then() {
        let mut ranked: Vec<_> = (0..10).map(|n| node(n, 10)).collect();
        ranked.push(Ranked { is_new: true, ..node(10, 1_000_000) });
        let share = f64::from(asked_first(&ranked)[&10]) / 4000.0;
        assert!((share - 1.0 / EXPLORE_EVERY as f64).abs() < 0.03, "{share}");
    }

    #[test]
    fn who_did_wrong_is_not_among_the_first_while_there_are_others() {
        let mut ranked: Vec<_> = (0..10).map(|n| node(n, 10)).collect();
        ranked.push(Ranked { is_avoided: true, is_new: true, ..node(10, 1) });
        assert!(!asked_first(&ranked).contains_key(&10));
    }
}

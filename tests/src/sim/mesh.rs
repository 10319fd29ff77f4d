//! What gossip costs: adverts flooded through a mesh as gossipsub builds it, counted message by message.

use std::collections::BTreeSet;
use std::collections::VecDeque;

use super::dice::Dice;

/// Neighbours in the mesh that a node looks for.
const DEGREE: usize = 8;
/// Most neighbours that it accepts.
const DEGREE_AT_MOST: usize = 12;
/// Neighbours beyond the mesh that hear in each second which messages there are.
const LAZY: usize = 6;
/// Seconds for which a message is named to them.
const NAMED_FOR: f64 = 3.0;
/// Bytes of a message's name and its frame, in that naming.
const NAME_BYTES: f64 = 44.0;

/// Copies of one message that a node of a mesh of `members` sends on average, counted on a random mesh.
#[must_use]
pub fn copies(members: usize, seed: u64) -> f64 {
    if members < 2 {
        return 0.0;
    }
    let mut dice = Dice::new(seed);
    let mut mesh = vec![BTreeSet::new(); members];
    for node in 0..members {
        for _ in 0..DEGREE * 4 {
            let other = dice.below(members);
            if mesh[node].len() >= DEGREE.min(members - 1) {
                break;
            }
            if other != node && mesh[other].len() < DEGREE_AT_MOST {
                mesh[node].insert(other);
                mesh[other].insert(node);
            }
        }
    }
    let (mut seen, mut sent) = (vec![false; members], 0_u64);
    let mut queue = VecDeque::from([(0, usize::MAX)]);
    seen[0] = true;
    while let Some((node, from)) = queue.pop_front() {
        for &other in mesh[node].iter().filter(|other| **other != from) {
            sent += 1;
            if !std::mem::replace(&mut seen[other], true) {
                queue.push_back((other, node));
            }
        }
    }
    sent as f64 / members as f64
}

/// Bytes that a node sends in a second for adverts of `bytes`, of which each member publishes one in `every` seconds.
#[must_use]
pub fn bytes_per_second(members: usize, bytes: usize, every: f64, seed: u64) -> f64 {
    let messages = members as f64 / every;
    let lazy = LAZY.min(members.saturating_sub(1)) as f64;
    messages * (copies(members, seed) * bytes as f64 + lazy * NAMED_FOR * NAME_BYTES)
}

//! Slices of the network: with many nodes, adverts go to a part of them only.
//!
//! A slice holds the nodes whose key in the DHT begins with the same bits. So the DHT's walk to one's own key meets the
//! members of one's own slice, and nobody has to name them. The slice of no bits holds everybody.

use std::fmt;

use kinoflock_protocol::NodeId;
use libp2p::kad::KBucketKey;

use crate::peer;

/// Bits of a slice at most: a million nodes and more in slices of some dozens.
pub const MAX_DEPTH: u8 = 16;

/// The nodes whose key begins with the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slice {
    depth: u8,
    /// The bits, the last one lowest.
    prefix: u16,
}

impl Slice {
    /// Everybody.
    pub const ALL: Self = Self { depth: 0, prefix: 0 };

    /// A node's slice of so many bits, at most [`MAX_DEPTH`].
    #[must_use]
    pub fn of(node: &NodeId, depth: u8) -> Self {
        let depth = depth.min(MAX_DEPTH);
        let key = KBucketKey::from(peer::peer_id(node));
        let first = key.hashed_bytes().first_chunk().copied().map_or(0, u16::from_be_bytes);
        Self { depth, prefix: u32::from(first).checked_shr((16 - depth).into()).unwrap_or(0) as u16 }
    }

    /// How many bits its members have in common.
    #[must_use]
    pub const fn depth(&self) -> u8 {
        self.depth
    }

    /// Whether a node belongs to it.
    #[must_use]
    pub fn holds(&self, node: &NodeId) -> bool {
        Self::of(node, self.depth) == *self
    }

    /// The slice of one bit less, of which this one is a half.
    #[must_use]
    pub fn whole(&self) -> Option<Self> {
        Some(Self { depth: self.depth.checked_sub(1)?, prefix: self.prefix >> 1 })
    }

    /// The end of its topic's name, as `/3/101`; nothing for the slice of everybody.
    #[must_use]
    pub(crate) fn suffix(&self) -> String {
        if self.depth == 0 { String::new() } else { format!("/{self}") }
    }

    /// The slice whose topic's name has this end.
    #[must_use]
    pub(crate) fn of_suffix(suffix: &str) -> Option<Self> {
        if suffix.is_empty() {
            return Some(Self::ALL);
        }
        let (depth, bits) = suffix.strip_prefix('/')?.split_once('/')?;
        let slice = Self { depth: depth.parse().ok()?, prefix: u16::from_str_radix(bits, 2).ok()? };
        let fits = slice.depth <= MAX_DEPTH && u32::from(slice.prefix) >> slice.depth == 0;
        (fits && slice.suffix() == suffix).then_some(slice)
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.depth {
            0 => f.write_str("all"),
            depth => write!(f, "{depth}/{:0width$b}", self.prefix, width = usize::from(depth)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u8) -> NodeId {
        kinoflock_protocol::Keypair::from_seed(&[number; 32]).node_id()
    }

    #[test]
    fn every_node_is_in_one_slice_of_each_depth_and_each_is_a_half_of_the_one_above() {
        for number in 0..50 {
            let node = node(number);
            assert_eq!(Slice::of(&node, 0), Slice::ALL);
            for depth in 1..=MAX_DEPTH {
                let slice = Slice::of(&node, depth);
                assert!(slice.holds(&node));
                assert_eq!((slice.depth(), slice.whole()), (depth, Some(Slice::of(&node, depth - 1))));
                assert_eq!(Slice::of_suffix(&slice.suffix()), Some(slice));
            }
            assert_eq!(Slice::of(&node, 200).depth(), MAX_DEPTH);
        }
        let halves = (0..50).filter(|number| Slice::of(&node(*number), 1).prefix == 0).count();
        assert!((15..=35).contains(&halves), "{halves} of 50 nodes are in one half");
    }

    #[test]
    fn names_of_no_slice_are_not_taken_for_one() {
        for suffix in
            ["/", "/0/", "/3/10", "/3/1010", "/3/102", "/17/00000000000000000", "/03/101", "3/101", "/3/+11"]
        {
            assert_eq!(Slice::of_suffix(suffix), None, "{suffix}");
        }
    }
}

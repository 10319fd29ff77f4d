//! Nodes that a client met: ways back into a network whose configured ways lead nowhere any more.

use std::collections::BTreeSet;

use kinoflock_protocol::{NetworkId, NodeId, UnixMillis};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, read_json};

/// Nodes that are remembered, those met last first; all networks together.
pub const MAX_MET: usize = 64;
/// Addresses that are remembered of each.
const MAX_ADDRESSES: usize = 8;
/// Name of the file.
const FILE: &str = "met.json";

/// A node that was met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetNode {
    /// In which network.
    pub network: NetworkId,
    /// The node.
    pub node: NodeId,
    /// Where it was, or said that it is, reached.
    pub addresses: Vec<String>,
    /// When.
    pub at: UnixMillis,
}

impl Store {
    /// The nodes that were met in a network, those met last first. A damaged file holds none.
    #[must_use]
    pub fn met(&self, network: &NetworkId) -> Vec<MetNode> {
        let mut met = self.all_met();
        met.retain(|met| met.network == *network);
        met
    }

    /// Remembers nodes, best first, before those met earlier.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn keep_met(&self, new: impl IntoIterator<Item = MetNode>) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let (before, mut seen) = (self.all_met(), BTreeSet::new());
        let all = new.into_iter().filter(|met| !met.addresses.is_empty()).chain(before.iter().cloned());
        let mut all: Vec<_> = all.filter(|met| seen.insert((met.network, met.node))).collect();
        all.truncate(MAX_MET);
        all.iter_mut().for_each(|met| met.addresses.truncate(MAX_ADDRESSES));
        let same = |(new, old): (&MetNode, &MetNode)| new.node == old.node && new.addresses == old.addresses;
        if all.len() == before.len() && all.iter().zip(&before).all(same) {
            return Ok(());
        }
        self.write_json(&self.root.join(FILE), &all)
    }

    fn all_met(&self) -> Vec<MetNode> {
        read_json(&self.root.join(FILE)).ok().flatten().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn met(number: u8, network: &str) -> MetNode {
        let addresses = (1..20).map(|port| format!("/ip4/198.18.0.{number}/tcp/{port}")).collect();
        let node = NodeId::from_bytes([number; 32]);
        MetNode { network: NetworkId::named(network), node, addresses, at: UnixMillis(number.into()) }
    }

    #[test]
    fn the_newest_come_first_and_the_number_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let here = NetworkId::named("here");
        assert!(store.met(&here).is_empty());
        store.keep_met((1..=60).map(|number| met(number, "here"))).unwrap();
        store.keep_met([met(60, "here"), met(70, "here"), met(1, "there")]).unwrap();
        let kept: Vec<_> = store.met(&here).into_iter().map(|met| met.node).collect();
        assert_eq!(kept[..3], [60, 70, 1].map(|number| met(number, "here").node));
        assert_eq!((kept.len(), store.met(&NetworkId::named("there")).len()), (61, 1));
        assert_eq!(store.met(&here)[0].addresses.len(), MAX_ADDRESSES);
        store.keep_met((100..=200).map(|number| met(number, "here"))).unwrap();
        assert_eq!(store.met(&here).len(), MAX_MET);
        std::fs::write(folder.path().join(FILE), b"[").unwrap();
        assert!(store.met(&here).is_empty());
        store.keep_met([met(1, "here")]).unwrap();
        assert_eq!(store.met(&here).len(), 1);
    }
}

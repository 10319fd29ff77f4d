//! The adverts of others: of each node the newest, for as long as it lives, and its number for some time after that.
//!
//! Sans-IO. An advert that was heard late, replayed, or kept by somebody until its node had gone cannot bring the node
//! back: the number of the last one is remembered longer than any advert is taken.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kinoflock_net::Multiaddr;
use kinoflock_protocol::capacity::{Capacity, CapacityError};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{NetworkId, NodeId};
use kinoflock_protocol::limits::ADVERT_MEMORY_MS;
use kinoflock_protocol::units::UnixMillis;

/// Nodes whose adverts are kept; more are not listened to until some have run out.
const MAX_KNOWN: usize = 4096;
/// How long the number of an advert that ran out is remembered.
const REMEMBERED: Duration = Duration::from_millis(ADVERT_MEMORY_MS);
/// Adverts taken of one node in [`WINDOW`]; an honest one sends one each 30 s and some when it changes.
const MAX_IN_WINDOW: u32 = 30;
/// The time over which a node's adverts are counted.
const WINDOW: Duration = Duration::from_secs(60);

/// Why an advert was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// It is not what it says: whoever passed it on should have seen that.
    #[error("forged: {0}")]
    Forged(String),
    /// Its time or number does not fit.
    #[error(transparent)]
    Untimely(#[from] CapacityError),
    /// Its node tells too often.
    #[error("{given} adverts within {} s, at most {limit} are taken", WINDOW.as_secs())]
    TooOften {
        /// The limit.
        limit: u32,
        /// How many came.
        given: u32,
    },
    /// There is no room for another node.
    #[error("the adverts of {limit} nodes are known, which is the limit")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// Our own, come back.
    #[error("it is our own")]
    Own,
}

/// An advert that was taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) node: NodeId,
    /// Where it says that it is reached.
    pub(super) addresses: Vec<Multiaddr>,
}

/// The adverts that are known.
#[derive(Debug, Default)]
pub(super) struct Table {
    known: BTreeMap<NodeId, Known>,
}

#[derive(Debug)]
struct Known {
    envelope: Envelope,
    capacity: Capacity,
    until: Instant,
    /// When the window began, and how many adverts came in it.
    window: (Instant, u32),
}

impl Table {
    /// Takes an advert, if it is new and true. Gossip names a publisher, who must be the signer. `now` is the time on
    /// the own clock that only goes on, and on the one that people set.
    pub(super) fn take(
        &mut self,
        envelope: Envelope,
        publisher: Option<NodeId>,
        network: &NetworkId,
        own: NodeId,
        (now, wall): (Instant, UnixMillis),
    ) -> Result<Taken, Refused> {
        let opened =
            envelope.open::<Capacity>(network).map_err(|error| Refused::Forged(error.to_string()))?;
        let node = NodeId::from(opened.signer);
        if let Some(publisher) = publisher.filter(|publisher| *publisher != node) {
            return Err(Refused::Forged(format!("signed by {node}, published by {publisher}")));
        }
        if node == own {
            return Err(Refused::Own);
        }
        let capacity = opened.value;
        let before = self.known.get(&node);
        capacity.check(wall, before.map(|known| known.capacity.sequence))?;
        let window = match before.map(|known| known.window) {
            Some((began, count)) if now < began + WINDOW => (began, count + 1),
            _ => (now, 1),
        };
        if window.1 > MAX_IN_WINDOW {
            return Err(Refused::TooOften { limit: MAX_IN_WINDOW, given: window.1 });
        }
        if before.is_none() && self.known.len() >= MAX_KNOWN {
            self.known.retain(|_, known| now < known.until + REMEMBERED);
            if self.known.len() >= MAX_KNOWN {
                return Err(Refused::Full { limit: MAX_KNOWN });
            }
        }
        let addresses = capacity.addresses.iter().filter_map(|addr| addr.parse().ok()).collect();
        let until = now + Duration::from_millis(capacity.lives_for(wall).0);
        self.known.insert(node, Known { envelope, capacity, until, window });
        Ok(Taken { node, addresses })
    }

    /// The nodes whose adverts live.
    pub(super) fn live(&self, now: Instant) -> impl Iterator<Item = (NodeId, &Capacity)> {
        let live = self.known.iter().filter(move |(_, known)| now < known.until);
        live.map(|(node, known)| (*node, &known.capacity))
    }

    /// The adverts that live, by node.
    pub(super) fn fresh(&self, now: Instant) -> impl Iterator<Item = (&Capacity, &Envelope)> {
        let fresh = self.known.values().filter(move |known| now < known.until);
        fresh.map(|known| (&known.capacity, &known.envelope))
    }
}

#[cfg(test)]
mod tests;

//! Places per peer: a semaphore for each, made when first needed and forgotten when idle.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Idle peers are forgotten when this many are known.
const SWEEP_AT: usize = 1024;

/// A limit that holds for each peer by itself.
#[derive(Debug)]
pub(crate) struct PeerSlots<P> {
    limit: usize,
    peers: Mutex<HashMap<P, Arc<Semaphore>>>,
}

impl<P: Eq + Hash + Clone> PeerSlots<P> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, peers: Mutex::new(HashMap::new()) }
    }

    /// A place for this peer, if one is free now.
    pub(crate) fn try_take(&self, peer: &P) -> Option<OwnedSemaphorePermit> {
        self.of(peer).try_acquire_owned().ok()
    }

    /// A place for this peer, as soon as one is free.
    pub(crate) async fn take(&self, peer: &P) -> OwnedSemaphorePermit {
        self.of(peer).acquire_owned().await.expect("invariant: no slot semaphore is ever closed")
    }

    fn of(&self, peer: &P) -> Arc<Semaphore> {
        let mut peers = self.peers.lock().expect("invariant: no panic while the lock is held");
        if peers.len() >= SWEEP_AT && !peers.contains_key(peer) {
            // Held by a permit or a waiter means in use; what is left is bounded by the connections.
            peers.retain(|_, slots| Arc::strong_count(slots) > 1);
        }
        let slots = peers.entry(peer.clone()).or_insert_with(|| Arc::new(Semaphore::new(self.limit)));
        Arc::clone(slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_does_not_take_anothers_places_and_idle_peers_are_forgotten() {
        let slots = PeerSlots::new(1);
        let held = slots.try_take(&0_usize).expect("a first place");
        assert!(slots.try_take(&0).is_none());
        for peer in 1..2 * SWEEP_AT {
            assert!(slots.try_take(&peer).is_some());
        }
        assert!(slots.try_take(&0).is_none(), "a held place outlives the sweep");
        assert!(slots.peers.lock().expect("lock").len() <= SWEEP_AT);
        drop(held);
        assert!(slots.try_take(&0).is_some());
    }
}

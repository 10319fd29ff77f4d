//! How this process is reached from outside, and at which relays it keeps a place while nobody reaches it directly.
//!
//! Sans-IO: the driver tells what AutoNAT, the router and the relays said, and carries out what [`Places::due`] asks.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use libp2p::core::transport::ListenerId;
use libp2p::{Multiaddr, PeerId};

use crate::discovery::is_global;
use crate::limits;
use crate::peer::is_relayed;

/// Whether others can dial this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reachability {
    /// Nobody has tried yet.
    #[default]
    Unknown,
    /// At one address at least.
    Public,
    /// Others tried, and none of our addresses let them in.
    Private,
}

/// What is known of our own addresses.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    /// Addresses that the owner vouches for.
    vouched: BTreeSet<Multiaddr>,
    /// Addresses at which somebody got in.
    confirmed: BTreeSet<Multiaddr>,
    /// Addresses at which somebody did not.
    failed: BTreeSet<Multiaddr>,
}

impl Addresses {
    pub(crate) fn vouch(&mut self, addr: Multiaddr) {
        self.vouched.insert(addr);
    }

    /// Somebody got in at an address of ours. One that means another machine elsewhere proves nothing.
    pub(crate) fn confirm(&mut self, addr: Multiaddr) {
        self.failed.remove(&addr);
        remember(&mut self.confirmed, addr);
    }

    /// An address of ours no longer holds.
    pub(crate) fn expire(&mut self, addr: &Multiaddr) {
        self.confirmed.remove(addr);
    }

    /// Somebody could not get in.
    pub(crate) fn fail(&mut self, addr: Multiaddr) {
        if !self.confirmed.contains(&addr) {
            remember(&mut self.failed, addr);
        }
    }

    pub(crate) fn reachability(&self) -> Reachability {
        if !self.vouched.is_empty() || !self.confirmed.is_empty() {
            Reachability::Public
        } else if !self.failed.is_empty() {
            Reachability::Private
        } else {
            Reachability::Unknown
        }
    }

    /// The addresses at which others get in, as far as is known.
    pub(crate) fn open(&self) -> Vec<Multiaddr> {
        self.vouched.union(&self.confirmed).cloned().collect()
    }
}

fn remember(set: &mut BTreeSet<Multiaddr>, addr: Multiaddr) {
    if set.len() < limits::TESTED_ADDRESSES && is_global(&addr) && !is_relayed(&addr) {
        set.insert(addr);
    }
}

/// The relays that are known, and our places at some of them.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// At most [`limits::RELAYS_KNOWN`].
    relays: BTreeMap<PeerId, Relay>,
    wanted: bool,
}

#[derive(Debug)]
struct Relay {
    addr: Multiaddr,
    /// The listener of our place there, asked for or held.
    place: Option<ListenerId>,
    failures: u32,
    not_before: Option<Instant>,
}

impl Places {
    /// A peer carries others' connections, and is dialed here.
    pub(crate) fn learn(&mut self, peer: PeerId, addr: Multiaddr) {
        if let Some(relay) = self.relays.get_mut(&peer) {
            relay.addr = addr;
        } else if self.relays.len() < limits::RELAYS_KNOWN {
            let relay = Relay { addr, place: None, failures: 0, not_before: None };
            self.relays.insert(peer, relay);
        }
    }

    /// A peer carries nobody any more.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        if self.relays.get(peer).is_some_and(|relay| relay.place.is_none()) {
            self.relays.remove(peer);
        }
    }

    /// Whether places are wanted. Gives back those that no longer are.
    pub(crate) fn want(&mut self, wanted: bool) -> Vec<ListenerId> {
        self.wanted = wanted;
        if wanted {
            return Vec::new();
        }
        self.relays.values_mut().filter_map(|relay| relay.place.take()).collect()
    }

    /// The relays to be asked for a place now, those that failed least first.
    pub(crate) fn due(&self, now: Instant) -> Vec<(PeerId, Multiaddr)> {
        let held = self.relays.values().filter(|relay| relay.place.is_some()).count();
        if !self.wanted || held >= limits::RELAYS_HELD {
            return Vec::new();
        }
        let mut free: Vec<_> = self.relays.iter().filter(|(_, relay)| relay.is_due(now)).collect();
        free.sort_by_key(|(_, relay)| relay.failures);
        let chosen = free.into_iter().take(limits::RELAYS_HELD - held);
        chosen.map(|(peer, relay)| (*peer, relay.addr.clone())).collect()
    }

    /// When [`Places::due`] may have something again, if nothing happens before.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let held = self.relays.values().filter(|relay| relay.place.is_some()).count();
        if !self.wanted || held >= limits::RELAYS_HELD {
            return None;
        }
        self.relays.values().filter(|relay| relay.place.is_none()).filter_map(|relay| relay.not_before).min()
    }

    /// A relay was asked; `None` if it could not even be asked.
    pub(crate) fn asked(&mut self, peer: &PeerId, place: Option<ListenerId>, now: Instant) {
        match (self.relays.get_mut(peer), place) {
            (Some(relay), Some(place)) => relay.place = Some(place),
            (Some(relay), None) => relay.failed(now),
            (None, _) => {}
        }
    }

    /// A place is ours; says whether it is one that was asked for.
    pub(crate) fn held(&mut self, place: ListenerId) -> bool {
        let relay = self.relays.values_mut().find(|relay| relay.place == Some(place));
        relay.is_some_and(|relay| {
            relay.failures = 0;
            true
        })
    }

    /// A place is lost, or was not given; says whether it was one of ours.
    pub(crate) fn lost(&mut self, place: ListenerId, now: Instant) -> bool {
        let relay = self.relays.values_mut().find(|relay| relay.place == Some(place));
        relay.is_some_and(|relay| {
            relay.place = None;
            relay.failed(now);
            true
        })
    }
}

impl Relay {
    fn is_due(&self, now: Instant) -> bool {
        self.place.is_none() && self.not_before.is_none_or(|not_before| not_before <= now)
    }

    fn failed(&mut self, now: Instant) {
        let doubled = limits::RELAY_PAUSE * 2_u32.pow(self.failures.min(16));
        let pause: Duration = doubled.min(limits::RELAY_PAUSE_MAX);
        self.failures += 1;
        self.not_before = Some(now + pause);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn addr(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_that_lets_somebody_in_makes_public_and_only_failures_make_private() {
        let mut addresses = Addresses::default();
        assert_eq!(addresses.reachability(), Reachability::Unknown);
        addresses.fail(addr("/ip4/192.168.1.2/tcp/1"));
        addresses.confirm(addr("/ip4/127.0.0.1/tcp/1"));
        addresses.confirm(addr("/ip4/198.18.0.1/tcp/1/p2p-circuit"));
        assert_eq!(addresses.reachability(), Reachability::Unknown, "none of these mean us to others");
        let outer = addr("/ip4/198.18.0.1/tcp/1");
        addresses.fail(outer.clone());
        assert_eq!(addresses.reachability(), Reachability::Private);
        addresses.confirm(outer.clone());
        assert_eq!((addresses.reachability(), addresses.open()), (Reachability::Public, vec![outer.clone()]));
        addresses.fail(addr("/ip4/198.18.0.1/tcp/2"));
        assert_eq!(addresses.reachability(), Reachability::Public);
        addresses.expire(&outer);
        assert_eq!(addresses.reachability(), Reachability::Private);
        addresses.vouch(outer);
        assert_eq!(addresses.reachability(), Reachability::Public);
    }

    #[test]
    fn places_are_kept_at_so_many_relays_and_asked_for_again_with_growing_pauses() {
        let (mut places, mut now) = (Places::default(), Instant::now());
        let relays: Vec<PeerId> = (0..3).map(|_| PeerId::random()).collect();
        for relay in &relays {
            places.learn(*relay, addr("/ip4/198.18.0.1/tcp/1"));
        }
        assert!(places.due(now).is_empty(), "who is reached needs no place");
        places.want(true);
        let due = places.due(now);
        assert_eq!(due.len(), limits::RELAYS_HELD);
        let listeners = [ListenerId::next(), ListenerId::next()];
        for ((peer, _), listener) in due.iter().zip(listeners) {
            places.asked(peer, Some(listener), now);
        }
        assert!(places.due(now).is_empty() && places.poll_timeout().is_none());
        assert!(places.held(listeners[0]) && !places.held(ListenerId::next()));
        assert!(places.lost(listeners[1], now) && !places.lost(listeners[1], now));
        // The one that was never asked comes first, the one that failed after its pause.
        let (third, _) = places.due(now).remove(0);
        assert!(due.iter().all(|(peer, _)| *peer != third));
        let mut pauses = Vec::new();
        places.asked(&third, None, now);
        for _ in 0..9 {
            let wake = places.poll_timeout().unwrap();
            assert!(places.due(wake - Duration::from_millis(1)).is_empty());
            pauses.push(wake - now);
            now = wake;
            for (peer, _) in places.due(now) {
                places.asked(&peer, None, now);
            }
        }
        assert!(pauses.iter().all(|pause| *pause <= limits::RELAY_PAUSE_MAX), "{pauses:?}");
        assert!(pauses.last() > pauses.first(), "{pauses:?}");
        places.learn(relays[0], addr("/ip4/198.18.0.1/tcp/2"));
        assert_eq!(places.want(false), vec![listeners[0]]);
    }
}

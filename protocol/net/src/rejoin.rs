//! Staying in company: while this process is connected with fewer nodes than it should be, those that it was told of or
//! once met are dialed again, each with a growing pause.
//!
//! [`Ways`] is sans-IO and says whom to dial when; [`stay`] is the task that asks the driver who is there and dials.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Weak;
use std::time::{Duration, Instant};

use kinoflock_protocol::NodeId;
use libp2p::Multiaddr;
use tokio::time::MissedTickBehavior;

use crate::handle::{Inner, NetHandle};
use crate::limits;
use crate::peer;

/// A node that was met or heard of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownNode {
    /// The node.
    pub node: NodeId,
    /// Where it may be reached, newest first.
    pub addrs: Vec<Multiaddr>,
    /// Whether it is connected now.
    pub connected: bool,
    /// Whether it was connected since the start of this process.
    pub met: bool,
}

/// Whom to dial: a node, or whoever answers at an address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    Node(NodeId),
    Address(Multiaddr),
}

/// Everybody who may be dialed, and when.
#[derive(Debug)]
pub(crate) struct Ways {
    wanted: usize,
    /// At most [`limits::WAYS`]; those that the owner named are never forgotten.
    ways: BTreeMap<Way, Attempts>,
}

#[derive(Debug, Default)]
struct Attempts {
    addrs: Vec<Multiaddr>,
    named: bool,
    /// Who answered last at an address.
    answered: Option<NodeId>,
    failures: u32,
    not_before: Option<Instant>,
    under_way: bool,
}

impl Ways {
    /// Ways to the nodes that the owner named, until so many nodes are connected.
    pub(crate) fn new(wanted: usize, named: &[Multiaddr]) -> Self {
        let mut ways: BTreeMap<Way, Attempts> = BTreeMap::new();
        for addr in named {
            let way = peer::node_of(addr).map_or_else(|| Way::Address(addr.clone()), Way::Node);
            let attempts = ways.entry(way).or_default();
            attempts.named = true;
            attempts.addrs.push(addr.clone());
        }
        Self { wanted, ways }
    }

    /// Who is there, who is known, and what time it is: gives those to be dialed now.
    pub(crate) fn due(&mut self, known: &[KnownNode], now: Instant) -> Vec<(Way, Vec<Multiaddr>)> {
        for node in known.iter().filter(|node| !node.connected) {
            let room = self.ways.len() < limits::WAYS || self.forget_worst();
            let way = Way::Node(node.node);
            if room || self.ways.contains_key(&way) {
                let attempts = self.ways.entry(way).or_default();
                attempts.addrs.retain(|addr| attempts.named && !node.addrs.contains(addr));
                attempts.addrs.extend(node.addrs.iter().cloned());
            }
        }
        let there: BTreeSet<NodeId> =
            known.iter().filter(|node| node.connected).map(|node| node.node).collect();
        for node in &there {
            if let Some(attempts) = self.ways.get_mut(&Way::Node(*node)) {
                (attempts.failures, attempts.not_before) = (0, None);
            }
        }
        if there.len() >= self.wanted {
            return Vec::new();
        }
        let absent = |way: &Way, attempts: &Attempts| {
            let node = if let Way::Node(node) = way { Some(*node) } else { attempts.answered };
            node.is_none_or(|node| !there.contains(&node))
        };
        let ways = self.ways.iter_mut();
        let mut due: Vec<_> =
            ways.filter(|(way, attempts)| absent(way, attempts) && attempts.is_due(now)).collect();
        due.sort_by_key(|(_, attempts)| (!attempts.named, attempts.failures));
        due.truncate(limits::REJOIN_AT_ONCE);
        let begun = due.into_iter().map(|(way, attempts)| {
            attempts.under_way = true;
            (way.clone(), attempts.addrs.clone())
        });
        begun.collect()
    }

    /// A dial came to its end.
    pub(crate) fn dialed(&mut self, way: &Way, reached: Option<NodeId>, now: Instant) {
        let Some(attempts) = self.ways.get_mut(way) else { return };
        attempts.under_way = false;
        if reached.is_some() {
            // Whether it is a node that counts shows when it has told what it is.
            attempts.answered = reached;
            attempts.failures = 0;
            attempts.not_before = Some(now + limits::REJOIN_PAUSE_NAMED);
            return;
        }
        let longest = if attempts.named { limits::REJOIN_PAUSE_NAMED } else { limits::REJOIN_PAUSE_MAX };
        let pause: Duration = (limits::REJOIN_EVERY * 2_u32.pow(attempts.failures.min(16))).min(longest);
        attempts.failures += 1;
        attempts.not_before = Some(now + pause);
    }

    /// Makes room by forgetting the way that failed most; says whether it could.
    fn forget_worst(&mut self) -> bool {
        let worst = self.ways.iter().filter(|(_, attempts)| !attempts.named && !attempts.under_way);
        let worst = worst.max_by_key(|(_, attempts)| attempts.failures).map(|(way, _)| way.clone());
        worst.is_some_and(|way| self.ways.remove(&way).is_some())
    }
}

impl Attempts {
    fn is_due(&self, now: Instant) -> bool {
        !self.under_way && !self.addrs.is_empty() && self.not_before.is_none_or(|moment| moment <= now)
    }
}

/// Looks every [`limits::REJOIN_EVERY`] whether there is company enough, until the swarm ends, which this does not keep
/// alive.
pub(crate) async fn stay(swarm: Weak<Inner>, own: NodeId, mut ways: Ways) {
    ways.ways.remove(&Way::Node(own));
    let mut look = tokio::time::interval(limits::REJOIN_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // As many as there are ways: each has one dial at a time.
    let (ended, mut ends) = tokio::sync::mpsc::channel(limits::WAYS);
    let mut alone = true;
    loop {
        tokio::select! {
            Some((way, reached)) = ends.recv() => ways.dialed(&way, reached, Instant::now()),
            _ = look.tick() => {
                let Some(inner) = swarm.upgrade() else { return };
                let handle = NetHandle { inner };
                let Ok(known) = handle.known_nodes().await else { return };
                let known: Vec<_> = known.into_iter().filter(|known| known.node != own).collect();
                if alone && known.iter().any(|known| known.connected) {
                    alone = false;
                    // Without the role there is no table to refresh.
                    let _ = handle.bootstrap().await;
                }
                for (way, addrs) in ways.due(&known, Instant::now()) {
                    let (handle, ended) = (handle.clone(), ended.clone());
                    tokio::spawn(async move {
                        let reached = dial(&handle, &way, addrs).await;
                        // Only the end of the swarm closes it.
                        let _ = ended.send((way, reached)).await;
                    });
                }
            }
        }
    }
}

async fn dial(handle: &NetHandle, way: &Way, addrs: Vec<Multiaddr>) -> Option<NodeId> {
    let dialed = match way {
        Way::Node(node) => handle.connect(*node, addrs).await,
        Way::Address(addr) => handle.dial(addr.clone()).await,
    };
    match &dialed {
        Ok(node) => tracing::debug!(%node, "rejoined"),
        Err(error) => tracing::debug!(?way, %error, "rejoin_failed"),
    }
    dialed.ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn addr(port: u16) -> Multiaddr {
        format!("/ip4/198.18.0.1/tcp/{port}").parse().unwrap()
    }

    fn node(number: u8) -> NodeId {
        kinoflock_protocol::Keypair::from_seed(&[number; 32]).node_id()
    }

    fn known(number: u8, connected: bool) -> KnownNode {
        KnownNode { node: node(number), addrs: vec![addr(number.into())], connected, met: true }
    }

    fn named(number: u8) -> Multiaddr {
        let peer = peer::peer_id(&node(number));
        addr(number.into()).with(libp2p::multiaddr::Protocol::P2p(peer))
    }

    #[test]
    fn who_was_named_is_dialed_until_enough_are_there_and_again_when_they_have_gone() {
        let now = Instant::now();
        let mut ways = Ways::new(2, &[named(1), named(2), addr(9)]);
        let due = ways.due(&[], now);
        assert_eq!(due.len(), 3);
        assert!(ways.due(&[], now).is_empty(), "each is dialed once at a time");
        for (way, _) in &due {
            let answers = match way {
                Way::Node(at) if *at == node(2) => None,
                Way::Node(at) => Some(*at),
                Way::Address(_) => Some(node(1)),
            };
            ways.dialed(way, answers, now);
        }
        assert!(ways.due(&[known(1, true), known(3, true)], now).is_empty());
        let later = now + limits::REJOIN_PAUSE_NAMED;
        let due: Vec<_> = ways.due(&[known(1, true), known(3, false)], later).into_iter().collect();
        assert_eq!(due[0].0, Way::Node(node(2)), "who was named comes first");
        assert_eq!(due[1..], [(Way::Node(node(3)), vec![addr(3)])], "who is there is dialed again");
    }

    #[test]
    fn pauses_grow_to_their_bound_and_those_for_named_nodes_stay_short() {
        let mut ways = Ways::new(1, &[named(1)]);
        let mut now = Instant::now();
        for _ in 0..10 {
            let due = ways.due(&[known(2, false)], now);
            due.iter().for_each(|(way, _)| ways.dialed(way, None, now));
            now += limits::REJOIN_EVERY;
        }
        let pause = |number: u8| {
            let attempts = &ways.ways[&Way::Node(node(number))];
            attempts.not_before.unwrap().saturating_duration_since(now)
        };
        assert!(pause(1) <= limits::REJOIN_PAUSE_NAMED && pause(2) <= limits::REJOIN_PAUSE_MAX);
        assert!(pause(2) > Duration::ZERO);
    }

    #[test]
    fn ways_are_bounded_and_named_ones_stay() {
        let mut ways = Ways::new(1, &[named(1)]);
        let many: Vec<_> = (2..=255).map(|number| known(number, false)).collect();
        let now = Instant::now();
        ways.due(&many, now);
        assert!(ways.ways.len() <= limits::WAYS);
        assert!(ways.ways.contains_key(&Way::Node(node(1))));
    }
}

//! The driver's part in being reached: addresses that others tried, places at relays, direct connections.

use std::time::Instant;

use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId, autonat, dcutr, identify, relay, upnp};

use super::{Driver, Reply, make_room};
use crate::config::{RelayRole, Reserve};
use crate::discovery::is_global;
use crate::event::NetEvent;
use crate::peer::{self, is_relayed};
use crate::reach::{Addresses, Places, Reachability};

/// What the driver knows about how we are reached.
#[derive(Debug, Default)]
pub(super) struct Reached {
    role: RelayRole,
    reserve: Reserve,
    addresses: Addresses,
    pub(super) places: Places,
    told: Reachability,
}

impl Reached {
    pub(super) fn new(role: RelayRole, reserve: Reserve, external: &[Multiaddr]) -> Self {
        let mut addresses = Addresses::default();
        external.iter().for_each(|addr| addresses.vouch(addr.clone()));
        Self { role, reserve, addresses, ..Self::default() }
    }
}

impl Driver {
    /// Once all listeners have told their addresses: a relay by its owner's word vouches for them, if no others were
    /// named.
    pub(super) fn all_listen(&mut self) {
        if self.reached.role == RelayRole::On && self.reached.addresses.open().is_empty() {
            let all = self.channels.listening.borrow().addrs.clone();
            let (far, near): (Vec<_>, Vec<_>) = all.into_iter().partition(is_global);
            for addr in if far.is_empty() { near } else { far } {
                self.swarm.add_external_address(addr.clone());
                self.reached.addresses.vouch(addr);
            }
        }
        self.reconsider();
    }

    pub(super) fn on_own_address(&mut self, addr: Multiaddr, holds: bool) {
        if holds {
            self.reached.addresses.confirm(addr);
        } else {
            self.reached.addresses.expire(&addr);
        }
        self.reconsider();
    }

    pub(super) fn on_probed(&mut self, event: autonat::v2::client::Event) {
        let autonat::v2::client::Event { tested_addr, server, result, .. } = event;
        tracing::debug!(addr = %tested_addr, peer = %server, reached = result.is_ok(), "own_address_tested");
        match result {
            Ok(()) => self.reached.addresses.confirm(tested_addr),
            Err(_) => self.reached.addresses.fail(tested_addr),
        }
        self.reconsider();
    }

    pub(super) fn on_punched(&mut self, event: &dcutr::Event) {
        let peer = event.remote_peer_id;
        match &event.result {
            Ok(_) => tracing::info!(peer = %peer, "hole_punched"),
            Err(error) => tracing::info!(peer = %peer, %error, "hole_not_punched"),
        }
    }

    pub(super) fn on_upnp(&mut self, event: &upnp::Event) {
        match event {
            upnp::Event::NewExternalAddr { external_addr, .. } => {
                tracing::info!(addr = %external_addr, "router_forwards");
            }
            other => tracing::debug!(event = ?other, "upnp"),
        }
    }

    /// What an identified peer means for us: a relay, or one no longer.
    pub(super) fn on_maybe_relay(&mut self, peer: PeerId, told: &identify::Info, usable: &[Multiaddr]) {
        if !told.protocols.contains(&relay::HOP_PROTOCOL_NAME) {
            self.reached.places.forget(&peer);
            return;
        }
        let remote = self.book.remote(&peer).filter(|addr| !is_relayed(addr));
        let addr = usable.iter().find(|addr| !is_relayed(addr)).or(remote);
        if let Some(addr) = addr.cloned() {
            let addr: Multiaddr = addr.iter().filter(|part| !matches!(part, Protocol::P2p(_))).collect();
            self.reached.places.learn(peer, addr);
            self.ask_relays();
        }
    }

    /// Asks relays for the places that are wanted and missing.
    pub(super) fn ask_relays(&mut self) {
        let now = Instant::now();
        for (peer, addr) in self.reached.places.due(now) {
            let addr = addr.with(Protocol::P2p(peer)).with(Protocol::P2pCircuit);
            let listener = self.swarm.listen_on(addr);
            tracing::debug!(peer = %peer, asked = listener.is_ok(), "relay_asked");
            self.reached.places.asked(&peer, listener.ok(), now);
        }
    }

    pub(super) fn on_place(&mut self, listener: ListenerId) {
        if self.reached.places.held(listener) {
            tracing::info!("relay_place_held");
        }
    }

    pub(super) fn on_place_lost(&mut self, listener: ListenerId) -> bool {
        let lost = self.reached.places.lost(listener, Instant::now());
        if lost {
            tracing::info!("relay_place_lost");
        }
        lost
    }

    /// Sees to it that a peer is reached directly, and says so when it is. Addresses that are known are tried; a relayed
    /// connection tries on its own, once, and so a new one is made if that came to nothing.
    pub(super) fn direct(&mut self, peer: PeerId, again: bool, reply: Reply<()>) {
        if self.swarm.behaviour().streams.is_direct(&peer) {
            let _ = reply.send(());
            return;
        }
        if !make_room(&mut self.directing) {
            return;
        }
        self.directing.entry(peer).or_default().push(reply);
        let (relayed, known): (Vec<_>, Vec<_>) =
            self.book.addresses(&peer).into_iter().partition(|addr| is_relayed(addr));
        let over_relays = if again { relayed } else { Vec::new() };
        for (addrs, condition) in [(known, PeerCondition::NotDialing), (over_relays, PeerCondition::Always)] {
            if !addrs.is_empty() {
                let opts = DialOpts::peer_id(peer).condition(condition).addresses(addrs).build();
                // An error means that somebody dials already, and the wait goes on.
                let _ = self.swarm.dial(opts);
            }
        }
    }

    /// Draws the consequences of what is known about our addresses.
    fn reconsider(&mut self) {
        let found = self.reached.addresses.reachability();
        let carries = match self.reached.role {
            RelayRole::Off => false,
            RelayRole::Auto => found == Reachability::Public,
            RelayRole::On => true,
        };
        if let Some(relay) = self.swarm.behaviour_mut().relay.as_mut() {
            relay.set_status(Some(if carries { relay::Status::Enable } else { relay::Status::Disable }));
        }
        let wanted = match self.reached.reserve {
            Reserve::Off => false,
            Reserve::WhenPrivate => found == Reachability::Private,
            Reserve::Always => true,
        };
        for listener in self.reached.places.want(wanted) {
            self.swarm.remove_listener(listener);
        }
        self.ask_relays();
        let open = self.reached.addresses.open();
        let told = self.channels.listening.borrow().open.clone();
        if found != self.reached.told || open != told {
            self.reached.told = found;
            self.channels.listening.send_modify(|state| {
                state.open = open;
                state.reachability = found;
            });
            tracing::info!(reachability = ?found, "reachability");
            self.tell(NetEvent::Reachability(found));
        }
    }

    /// The nodes behind waiting callers learn that there is a direct connection.
    pub(super) fn on_direct(&mut self, peer: &PeerId) {
        for reply in self.directing.remove(peer).unwrap_or_default() {
            let _ = reply.send(());
        }
        tracing::debug!(peer = %peer::node_id(peer).map(|node| node.to_string()).unwrap_or_default(), "direct_connection");
    }
}

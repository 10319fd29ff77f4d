//! Connections from others whose handshake is not finished, counted by network prefix.
//!
//! A socket that is opened and then silent costs its owner nothing and holds a place until the handshake's time is over.
//! With one count for all, a single machine could hold every place; so each prefix (/24, /56) has only so many.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, ListenFailure, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

/// The behaviour: refuses connections of a prefix that has too many unfinished.
#[derive(Debug)]
pub(crate) struct Behaviour {
    limit: u32,
    /// Bounded by the limit on all unfinished connections, which stands beside this one.
    pending: HashMap<ConnectionId, Prefix>,
}

/// Where a connection comes from. Those without an address (over a relay) are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prefix {
    V4([u8; 3]),
    V6([u8; 7]),
    Unknown,
}

#[derive(Debug, thiserror::Error)]
#[error("{limit} connections of this network are unfinished already")]
struct TooMany {
    limit: u32,
}

impl Behaviour {
    /// So many unfinished connections of one prefix.
    pub(crate) fn new(limit: u32) -> Self {
        Self { limit, pending: HashMap::new() }
    }
}

impl Prefix {
    fn of(address: &Multiaddr) -> Self {
        let ip = address.iter().find_map(|part| match part {
            Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
            Protocol::Ip6(ip) => Some(ip.to_canonical()),
            _ => None,
        });
        match ip {
            Some(IpAddr::V4(ip)) => {
                let [a, b, c, _] = ip.octets();
                Self::V4([a, b, c])
            }
            Some(IpAddr::V6(ip)) => {
                let [a, b, c, d, e, f, g, ..] = ip.octets();
                Self::V6([a, b, c, d, e, f, g])
            }
            None => Self::Unknown,
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let prefix = Prefix::of(remote);
        let of_prefix = self.pending.values().filter(|other| **other == prefix).count();
        if of_prefix >= self.limit as usize {
            return Err(ConnectionDenied::new(TooMany { limit: self.limit }));
        }
        self.pending.insert(id, prefix);
        Ok(())
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.pending.remove(&id);
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) = event {
            self.pending.remove(&connection_id);
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn arrives(behaviour: &mut Behaviour, id: usize, from: &str) -> bool {
        let local = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        let id = ConnectionId::new_unchecked(id);
        behaviour.handle_pending_inbound_connection(id, &local, &from.parse().unwrap()).is_ok()
    }

    #[test]
    fn a_network_that_has_its_places_takes_none_of_anothers() {
        let mut behaviour = Behaviour::new(2);
        assert!(arrives(&mut behaviour, 1, "/ip4/192.0.2.1/tcp/1"));
        assert!(arrives(&mut behaviour, 2, "/ip4/192.0.2.200/udp/1/quic-v1"));
        assert!(!arrives(&mut behaviour, 3, "/ip4/192.0.2.3/tcp/1"));
        assert!(!arrives(&mut behaviour, 4, "/ip6/::ffff:192.0.2.4/tcp/1"));
        assert!(arrives(&mut behaviour, 5, "/ip4/198.51.100.1/tcp/1"));
        assert!(arrives(&mut behaviour, 6, "/ip6/2001:db8:0:100::1/tcp/1"));
        assert!(arrives(&mut behaviour, 7, "/ip6/2001:db8:0:1ff::1/tcp/1"));
        assert!(!arrives(&mut behaviour, 8, "/ip6/2001:db8:0:1aa::1/tcp/1"));
        assert!(arrives(&mut behaviour, 9, "/ip6/2001:db8:0:200::1/tcp/1"));
    }

    #[test]
    fn a_finished_handshake_gives_its_place_back() {
        let mut behaviour = Behaviour::new(1);
        let from: Multiaddr = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        assert!(arrives(&mut behaviour, 1, "/ip4/192.0.2.1/tcp/1"));
        let id = ConnectionId::new_unchecked(1);
        assert!(behaviour.handle_established_inbound_connection(id, PeerId::random(), &from, &from).is_ok());
        assert!(arrives(&mut behaviour, 2, "/ip4/192.0.2.1/tcp/1"));
    }
}

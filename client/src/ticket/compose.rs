//! Tickets that are given to others: a few nodes, the addresses that mean something elsewhere, and no more.

use std::collections::BTreeSet;
use std::net::IpAddr;

use kinoflock_net::Multiaddr;
use kinoflock_net::discovery::is_global;
use kinoflock_net::multiaddr::Protocol;
use kinoflock_net::peer::{is_relayed, node_of};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::names::{NodeAddress, NodeTicket};
use kinoflock_protocol::{CollectiveId, NetworkId, NodeId};

/// Nodes of a ticket: it is to be pasted, and one that answers is enough.
pub const TICKET_NODES: usize = 3;
/// Addresses of each.
pub const TICKET_ADDRESSES: usize = 4;

/// How far an address leads; the least comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Far {
    Everywhere,
    OverRelay,
    LocalNetwork,
    ThisMachine,
}

/// A ticket for those of the nodes that others reach best, the first before later ones that are reached as well. `None`
/// if no address is known of any.
#[must_use]
pub fn node_ticket(
    network: NetworkId,
    nodes: impl IntoIterator<Item = (NodeId, Vec<Multiaddr>)>,
    collective: Option<CollectiveId>,
) -> Option<NodeTicket> {
    let mut seen = BTreeSet::new();
    let told = nodes.into_iter().filter(|(node, _)| seen.insert(*node));
    let told = told.map(|(node, addrs)| (node, told_addresses(&node, addrs)));
    let mut told: Vec<_> = told.filter_map(|(node, told)| Some((node, told.first()?.0, told))).collect();
    told.sort_by_key(|(_, far, _)| *far);
    if told.first().is_some_and(|(_, far, _)| *far != Far::ThisMachine) {
        told.retain(|(_, far, _)| *far != Far::ThisMachine);
    }
    let node = |(id, _, told): (NodeId, Far, Vec<(Far, Multiaddr)>)| NodeAddress {
        id,
        addresses: List::first_of(told.iter().filter_map(|(_, addr)| Text::new(addr.to_string()).ok())),
    };
    let nodes = List::first_of(told.into_iter().take(TICKET_NODES).map(node));
    (!nodes.is_empty()).then_some(NodeTicket { network, nodes, collective })
}

/// The addresses of a node that are told, those that lead farthest first. What only this machine reaches is told where
/// there is nothing else.
fn told_addresses(node: &NodeId, addrs: Vec<Multiaddr>) -> Vec<(Far, Multiaddr)> {
    let own = Protocol::P2p(kinoflock_net::peer::peer_id(node));
    let mut told: Vec<(Far, Multiaddr)> = Vec::new();
    for mut addr in addrs {
        if node_of(&addr).is_some_and(|named| named != *node) {
            continue;
        }
        if addr.ends_with(&own.clone().into()) {
            addr.pop();
        }
        if !told.iter().any(|(_, known)| *known == addr) && !is_unspecified(&addr) {
            told.push((far(&addr), addr));
        }
    }
    told.sort_by_key(|(far, _)| *far);
    if told.first().is_some_and(|(far, _)| *far != Far::ThisMachine) {
        told.retain(|(far, _)| *far != Far::ThisMachine);
    }
    told.truncate(TICKET_ADDRESSES);
    told
}

fn far(addr: &Multiaddr) -> Far {
    match ip(addr) {
        Some(ip) if ip.is_loopback() => Far::ThisMachine,
        _ if is_relayed(addr) => Far::OverRelay,
        _ if is_global(addr) => Far::Everywhere,
        _ => Far::LocalNetwork,
    }
}

fn is_unspecified(addr: &Multiaddr) -> bool {
    addr.is_empty() || ip(addr).is_some_and(|ip| ip.is_unspecified())
}

fn ip(addr: &Multiaddr) -> Option<IpAddr> {
    match addr.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn addr(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    fn node(number: u8) -> NodeId {
        kinoflock_protocol::Keypair::from_seed(&[number; 32]).node_id()
    }

    fn addresses(node: &NodeAddress) -> Vec<&str> {
        node.addresses.iter().map(Text::as_str).collect()
    }

    fn ticket(nodes: Vec<(NodeId, Vec<Multiaddr>)>) -> Option<NodeTicket> {
        node_ticket(NetworkId::named("test"), nodes, None)
    }

    #[test]
    fn public_addresses_come_first_and_those_that_mean_nothing_elsewhere_are_left_out() {
        let relayed = format!("/ip4/198.18.0.2/tcp/1/p2p/{}/p2p-circuit", node(9));
        let given = vec![
            addr("/ip4/127.0.0.1/tcp/1"),
            addr("/ip4/0.0.0.0/tcp/1"),
            addr("/ip4/192.168.1.2/tcp/1"),
            addr(&format!("{relayed}/p2p/{}", node(1))),
            addr(&format!("/ip4/198.18.0.1/tcp/1/p2p/{}", node(1))),
            addr("/ip4/198.18.0.1/tcp/1"),
        ];
        let told = ticket(vec![(node(1), given)]).unwrap();
        assert_eq!(addresses(&told.nodes[0]), ["/ip4/198.18.0.1/tcp/1", &relayed, "/ip4/192.168.1.2/tcp/1"]);
        let here = vec![addr("/ip4/127.0.0.1/tcp/1"), addr("/ip4/0.0.0.0/tcp/1")];
        let told = ticket(vec![(node(1), here)]).unwrap();
        assert_eq!(addresses(&told.nodes[0]), ["/ip4/127.0.0.1/tcp/1"], "there is nothing else");
        assert_eq!(ticket(vec![(node(1), Vec::new())]), None);
    }

    #[test]
    fn nodes_that_anybody_reaches_come_first_and_their_number_is_bounded() {
        let near = (node(1), vec![addr("/ip4/127.0.0.1/tcp/1")]);
        let far =
            |number: u8| (node(number), (1..20).map(|n| addr(&format!("/ip4/198.18.0.1/tcp/{n}"))).collect());
        let told = ticket(vec![near, far(2), far(3), far(2), far(4), far(5)]).unwrap();
        let nodes: Vec<_> = told.nodes.iter().map(|told| told.id).collect();
        assert_eq!(nodes, [node(2), node(3), node(4)]);
        assert!(told.nodes.iter().all(|node| node.addresses.len() == TICKET_ADDRESSES));
    }
}

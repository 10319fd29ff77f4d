//! How an artist names a node: a ticket, a multiaddress, `host:port`, or a node id. And tickets for others.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use kinoflock_net::Multiaddr;
use kinoflock_net::multiaddr::Protocol;
use kinoflock_net::peer::node_of;
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::names::{CLIP_TICKET, ClipTicket, NODE_TICKET, NodeAddress, NodeTicket, TicketError};
use kinoflock_protocol::{ClipId, CollectiveId, NetworkId, NodeId};

use crate::local::LocalNode;
use crate::store::JobRecord;

pub use compose::{TICKET_ADDRESSES, TICKET_NODES, node_ticket};

mod compose;

/// A way to one or several nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// An address, whoever answers there.
    Address(Multiaddr),
    /// A node at these addresses.
    Node(NodeId, Vec<Multiaddr>),
    /// A ticket.
    Ticket(NodeTicket),
}

/// Why a text is no way to a node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WayError {
    /// A damaged ticket.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// A ticket for a clip.
    #[error("that is a ticket for a clip; fetch it with: kinoflock get TICKET")]
    ClipTicket,
    /// None of the forms.
    #[error(
        "{given:?} is no node: give a ticket (kfnode1...), an address (/ip4/192.0.2.7/tcp/4001 or 192.0.2.7:4001) or a node id (12D3Koo...)"
    )]
    Unknown {
        /// The text.
        given: String,
    },
    /// A ticket for another network.
    #[error(
        "that ticket leads to network {given}, this client is in {here}; set network = \"{given}\" in the configuration, or KINOFLOCK_NETWORK, to go there"
    )]
    OtherNetwork {
        /// The ticket's network.
        given: NetworkId,
        /// The client's network.
        here: NetworkId,
    },
}

impl WayError {
    /// Stable name for `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ticket(error) => error.code(),
            Self::ClipTicket => "clip_ticket",
            Self::Unknown { .. } => "no_node_address",
            Self::OtherNetwork { .. } => "other_network",
        }
    }
}

impl FromStr for Way {
    type Err = WayError;

    fn from_str(text: &str) -> Result<Self, WayError> {
        let text = text.trim();
        let unknown = || WayError::Unknown { given: text.chars().take(80).collect() };
        if text.starts_with(NODE_TICKET) {
            return Ok(Self::Ticket(text.parse()?));
        }
        if text.starts_with(CLIP_TICKET) {
            return Err(WayError::ClipTicket);
        }
        if text.starts_with('/') {
            return text.parse().map(Self::Address).map_err(|_| unknown());
        }
        if let Ok(node) = text.parse::<NodeId>() {
            return Ok(Self::Node(node, Vec::new()));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(unknown)?;
        let port = port.parse().map_err(|_| unknown())?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let is_name = |b: u8| b.is_ascii_alphanumeric() || b == b'.' || b == b'-';
        let host = match host.parse::<IpAddr>() {
            Ok(ip) => Protocol::from(ip),
            Err(_) if !host.is_empty() && host.bytes().all(is_name) => Protocol::Dns(host.to_owned().into()),
            Err(_) => return Err(unknown()),
        };
        Ok(Self::Address(Multiaddr::empty().with(host).with(Protocol::Tcp(port))))
    }
}

impl Way {
    /// The way to a daemon on this machine.
    #[must_use]
    pub fn local(node: &LocalNode) -> Self {
        Self::Node(node.node_id, parse_addresses(&node.addresses))
    }

    /// The way to the node that has a job.
    #[must_use]
    pub fn to_node_of(record: &JobRecord) -> Self {
        Self::Node(record.node, parse_addresses(&record.addresses))
    }

    /// Refuses a ticket for another network.
    ///
    /// # Errors
    /// `OtherNetwork`.
    pub fn check_network(&self, here: &NetworkId) -> Result<(), WayError> {
        match self {
            Self::Ticket(ticket) if ticket.network != *here => {
                Err(WayError::OtherNetwork { given: ticket.network, here: *here })
            }
            _ => Ok(()),
        }
    }

    /// The collective that it invites to.
    #[must_use]
    pub fn collective(&self) -> Option<CollectiveId> {
        match self {
            Self::Ticket(ticket) => ticket.collective,
            _ => None,
        }
    }

    /// The nodes that it leads to; `None` for an address at which anybody may answer.
    #[must_use]
    pub fn nodes(&self) -> Option<Vec<(NodeId, Vec<Multiaddr>)>> {
        match self {
            Self::Address(addr) => node_of(addr).map(|node| vec![(node, vec![addr.clone()])]),
            Self::Node(node, addrs) => Some(vec![(*node, addrs.clone())]),
            Self::Ticket(ticket) => Some(ticket.nodes.iter().map(address_of).collect()),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(f),
            Self::Node(node, _) => node.fmt(f),
            Self::Ticket(ticket) => match &ticket.nodes[..] {
                [only] => write!(f, "ticket for {}", only.id),
                nodes => write!(f, "ticket for {} nodes", nodes.len()),
            },
        }
    }
}

/// A ticket for a clip that these nodes hold. Nodes and addresses beyond the limits of a ticket are left out.
#[must_use]
pub fn clip_ticket(
    network: NetworkId,
    clip: ClipId,
    len: u64,
    holders: &[(NodeId, Vec<String>)],
) -> ClipTicket {
    let node = |(id, addresses): &(NodeId, Vec<String>)| NodeAddress {
        id: *id,
        addresses: List::first_of(addresses.iter().filter_map(|text| Text::new(text.as_str()).ok())),
    };
    ClipTicket { network, clip, len, holders: List::first_of(holders.iter().map(node)) }
}

/// A node of a ticket with those of its addresses that can be read.
#[must_use]
pub fn address_of(node: &NodeAddress) -> (NodeId, Vec<Multiaddr>) {
    (node.id, node.addresses.iter().filter_map(|text| text.parse().ok()).collect())
}

/// Those of the texts that are addresses.
#[must_use]
pub fn parse_addresses(texts: &[String]) -> Vec<Multiaddr> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_form_of_a_node_is_read() {
        for (text, addr) in [
            ("192.0.2.7:4001", "/ip4/192.0.2.7/tcp/4001"),
            ("[2001:db8::1]:4001", "/ip6/2001:db8::1/tcp/4001"),
            ("node.example.org:4001", "/dns/node.example.org/tcp/4001"),
            ("/ip4/192.0.2.7/udp/4001/quic-v1", "/ip4/192.0.2.7/udp/4001/quic-v1"),
        ] {
            assert_eq!(text.parse::<Way>().unwrap(), Way::Address(addr.parse().unwrap()), "{text}");
        }
        let node = NodeId::from_bytes([3; 32]);
        assert_eq!(node.to_string().parse::<Way>().unwrap(), Way::Node(node, Vec::new()));
        let ticket = NodeTicket {
            network: NetworkId::named("test"),
            nodes: List::first_of([NodeAddress {
                id: node,
                addresses: List::first_of([Text::new("/ip4/192.0.2.7/tcp/1").unwrap()]),
            }]),
            collective: None,
        };
        let way = ticket.to_string().parse::<Way>().unwrap();
        assert_eq!(way.nodes().unwrap(), [(node, vec!["/ip4/192.0.2.7/tcp/1".parse().unwrap()])]);
        assert!(way.check_network(&NetworkId::named("test")).is_ok());
        assert!(way.check_network(&NetworkId::named("other")).is_err());
        for text in ["", "node", "a b:1", "192.0.2.7:99999", "kfnode1damaged", "kfclip1abc", "/ip4/x"] {
            assert!(text.parse::<Way>().is_err(), "{text}");
        }
    }
}

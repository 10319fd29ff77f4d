//! Addresses in the form that libp2p writes, checked as far as the daemon speaks them.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use kinoflock_protocol::id::NodeId;

/// Why an address was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// It is no host with a port over TCP or QUIC.
    #[error(
        "not an address like /ip4/0.0.0.0/udp/4820/quic-v1, /ip6/::/tcp/4820 or /dns/host.example/tcp/4820[/p2p/NODE]"
    )]
    Shape,
    /// A part has a value that it cannot have.
    #[error("'{given}' is no {what}")]
    Part {
        /// Which part.
        what: &'static str,
        /// What was given.
        given: String,
    },
}

/// A multiaddress of a host and a port over TCP or QUIC, perhaps with a node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListenAddress {
    text: String,
    peer: Option<NodeId>,
}

impl ListenAddress {
    /// The text, which any multiaddress parser takes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The node in its `/p2p/` part.
    #[must_use]
    pub const fn peer(&self) -> Option<NodeId> {
        self.peer
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let mut parts = text.trim().strip_prefix('/').ok_or(AddressError::Shape)?.split('/');
        let mut next = || parts.next().ok_or(AddressError::Shape);
        check_host(next()?, next()?)?;
        let transport = next()?;
        let port = next()?;
        port.parse::<u16>().map_err(|_| part("port, 0 to 65535", port))?;
        let mut rest: Vec<&str> = parts.collect();
        match transport {
            "tcp" => {}
            "udp" if rest.first() == Some(&"quic-v1") => {
                rest.remove(0);
            }
            _ => return Err(AddressError::Shape),
        }
        let peer = match rest.as_slice() {
            [] => None,
            ["p2p", peer] => Some(peer.parse().map_err(|_| part("node id", peer))?),
            _ => return Err(AddressError::Shape),
        };
        Ok(Self { text: text.trim().to_owned(), peer })
    }
}

fn check_host(kind: &str, host: &str) -> Result<(), AddressError> {
    match kind {
        "ip4" => host.parse::<Ipv4Addr>().map(drop).map_err(|_| part("IPv4 address", host)),
        "ip6" => host.parse::<Ipv6Addr>().map(drop).map_err(|_| part("IPv6 address", host)),
        "dns" | "dns4" | "dns6" if !host.is_empty() => Ok(()),
        _ => Err(AddressError::Shape),
    }
}

fn part(what: &'static str, given: &str) -> AddressError {
    AddressError::Part { what, given: given.to_owned() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn hosts_with_ports_over_tcp_and_quic_are_taken() {
        for good in
            ["/ip4/0.0.0.0/tcp/0", "/ip6/::1/udp/4820/quic-v1", "/dns/a.example/tcp/1", " /dns4/b/tcp/2 "]
        {
            let address: ListenAddress = good.parse().unwrap();
            assert_eq!(address.as_str(), good.trim());
            assert_eq!(address.peer(), None);
        }
    }

    #[test]
    fn what_is_refused_says_which_part() {
        for (bad, says) in [
            ("0.0.0.0:4820", "/ip4/0.0.0.0/udp/4820/quic-v1"),
            ("/ip4/1.2.3/tcp/1", "'1.2.3' is no IPv4 address"),
            ("/ip4/1.2.3.4/tcp/70000", "'70000' is no port"),
            ("/ip4/1.2.3.4/udp/1", "not an address like"),
            ("/ip4/1.2.3.4/tcp/1/p2p/xyz", "'xyz' is no node id"),
            ("/ip4/1.2.3.4/tcp/1/ws", "not an address like"),
        ] {
            let error = bad.parse::<ListenAddress>().unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }
}

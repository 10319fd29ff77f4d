//! Where a job comes from: its requester, in whose favour it runs, and from which network.

use std::fmt;
use std::net::IpAddr;

use kinoflock_protocol::id::RequesterId;
use serde::{Deserialize, Serialize};

use crate::policy::Class;

/// The part of an address that one party usually holds whole: /24 of IPv4, /56 of IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum NetPrefix {
    /// The first three bytes.
    V4([u8; 3]),
    /// The first seven bytes.
    V6([u8; 7]),
    /// No address to go by: relayed, or not an internet address. All such requesters share one place.
    Unknown,
}

/// Who a job is for and from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The artist's key.
    pub requester: RequesterId,
    /// In whose favour.
    pub class: Class,
    /// The network it came from.
    pub prefix: NetPrefix,
}

/// Whom fairness is between: networks in the public, keys elsewhere, because there keys are not free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum GroupKey {
    Prefix(NetPrefix),
    Requester(RequesterId),
}

impl NetPrefix {
    /// The prefix of an address; an IPv4 address in IPv6 clothes counts as IPv4.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => {
                let [a, b, c, _] = v4.octets();
                Self::V4([a, b, c])
            }
            IpAddr::V6(v6) => {
                let [a, b, c, d, e, f, g, ..] = v6.octets();
                Self::V6([a, b, c, d, e, f, g])
            }
        }
    }
}

impl fmt::Display for NetPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4([a, b, c]) => write!(f, "{a}.{b}.{c}.0/24"),
            Self::V6(head) => {
                let mut octets = [0; 16];
                octets[..7].copy_from_slice(head);
                write!(f, "{}/56", std::net::Ipv6Addr::from(octets))
            }
            Self::Unknown => f.write_str("unknown network"),
        }
    }
}

impl Origin {
    pub(super) fn group(&self) -> GroupKey {
        match self.class {
            Class::Public => GroupKey::Prefix(self.prefix),
            Class::Own | Class::Collective => GroupKey::Requester(self.requester),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_share_a_prefix() {
        let of = |text: &str| NetPrefix::of(text.parse().expect("an address"));
        assert_eq!(of("192.0.2.1"), of("192.0.2.254"));
        assert_ne!(of("192.0.2.1"), of("192.0.3.1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.9"));
        assert_eq!(of("2001:db8:0:aa00::1"), of("2001:db8:0:aaff::9"));
        assert_ne!(of("2001:db8:0:aa00::1"), of("2001:db8:0:ab00::1"));
        assert_eq!(of("192.0.2.7").to_string(), "192.0.2.0/24");
        assert_eq!(of("2001:db8:0:aaff::9").to_string(), "2001:db8:0:aa00::/56");
    }
}

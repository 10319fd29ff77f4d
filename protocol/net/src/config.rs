//! What a swarm is told at its start. Node and client differ only in these values.

use std::num::NonZeroU64;
use std::time::Duration;

use kinoflock_protocol::{Keypair, NetworkId};
use libp2p::Multiaddr;

use crate::limits;

/// The transport key of a process.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per process")]
pub enum Identity {
    /// A node: its signing key is its transport key.
    Key(Keypair),
    /// A client: a fresh key for this process.
    Fresh,
}

/// What this process does in the DHT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KadRole {
    /// It does not take part.
    #[default]
    Off,
    /// It asks others.
    Client,
    /// It asks, stores and answers.
    Server,
}

/// Ceilings of blob transfer, bytes per second; `None` means no ceiling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// What we send, all peers together.
    pub upload: Option<NonZeroU64>,
    /// What we receive, all peers together.
    pub download: Option<NonZeroU64>,
}

/// Configuration of one swarm.
#[derive(Debug)]
pub struct NetConfig {
    /// The transport key.
    pub identity: Identity,
    /// The network; peers of other networks are not spoken to.
    pub network: NetworkId,
    /// What identify tells others that we are, as `name/version`.
    pub agent: String,
    /// Addresses to listen on; port 0 takes a free one.
    pub listen: Vec<Multiaddr>,
    /// Addresses at which others reach us, where we know them.
    pub external: Vec<Multiaddr>,
    /// Nodes to connect to at the start, with or without `/p2p/...`; `/dnsaddr/...` works too.
    pub bootstrap: Vec<Multiaddr>,
    /// Find peers on the local network.
    pub mdns: bool,
    /// The role in the DHT.
    pub kad: KadRole,
    /// Take part in the gossip of adverts.
    pub gossip: bool,
    /// Ceilings of blob transfer.
    pub rates: Rates,
    /// Physical memory of the process above which new connections are refused, bytes.
    pub max_memory: usize,
    /// Connections from others.
    pub max_connections_in: u32,
    /// Pause between pings.
    pub ping_interval: Duration,
    /// The version of the protocol that is spoken. Other than the crate's own only in tests of two
    /// versions meeting.
    pub version: u8,
}

impl NetConfig {
    /// A node: its own key, gossip and DHT server on, listening on every interface with both transports at
    /// `port` (0 takes a free one). mDNS is off.
    #[must_use]
    pub fn node(key: Keypair, network: NetworkId, port: u16) -> Self {
        Self {
            listen: listen_addresses("0.0.0.0", port),
            kad: KadRole::Server,
            gossip: true,
            ..Self::bare(Identity::Key(key), network)
        }
    }

    /// A client: a fresh key, no gossip, no DHT, no listening.
    #[must_use]
    pub fn client(network: NetworkId) -> Self {
        Self::bare(Identity::Fresh, network)
    }

    /// Listens on loopback only, with both transports, at free ports.
    #[must_use]
    pub fn on_loopback(mut self) -> Self {
        self.listen = listen_addresses("127.0.0.1", 0);
        self
    }

    fn bare(identity: Identity, network: NetworkId) -> Self {
        Self {
            identity,
            network,
            agent: concat!("kinoflock/", env!("CARGO_PKG_VERSION")).to_owned(),
            listen: Vec::new(),
            external: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            kad: KadRole::Off,
            gossip: false,
            rates: Rates::default(),
            max_memory: limits::MEMORY_BYTES,
            max_connections_in: limits::CONNECTIONS_IN,
            ping_interval: Duration::from_secs(15),
            version: kinoflock_protocol::limits::PROTOCOL_VERSION,
        }
    }
}

/// The two addresses, QUIC and TCP, of one IPv4 interface.
fn listen_addresses(ip: &str, port: u16) -> Vec<Multiaddr> {
    [format!("/ip4/{ip}/udp/{port}/quic-v1"), format!("/ip4/{ip}/tcp/{port}")]
        .iter()
        .map(|addr| addr.parse().expect("invariant: a literal address parses"))
        .collect()
}

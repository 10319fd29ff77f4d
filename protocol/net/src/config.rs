//! What a swarm is told at its start. Node and client differ only in these values.

use std::net::SocketAddr;
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

/// When this process carries others' connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RelayRole {
    /// Never.
    #[default]
    Off,
    /// While AutoNAT, UPnP or [`NetConfig::external`] say that it is reached from outside.
    Auto,
    /// Always, at [`NetConfig::external`], else at its own addresses.
    On,
}

/// When this process keeps places at relays, so that others reach it over them. Needs [`Reach::dial_relays`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reserve {
    /// Never.
    #[default]
    Off,
    /// While AutoNAT says that nobody reaches it directly. Needs [`Reach::probe`].
    WhenPrivate,
    /// Always.
    Always,
}

/// How this process is reached, and reaches others, where routers stand between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reach {
    /// Ask others whether our addresses can be dialed from outside.
    pub probe: bool,
    /// Answer the same question of others by dialing them.
    pub answer_probes: bool,
    /// Dial through relays, and try to get a direct connection then.
    pub dial_relays: bool,
    /// Keep places at relays.
    pub reserve: Reserve,
    /// Carry the connections of others.
    pub relay: RelayRole,
    /// Ask the router to forward our ports.
    pub upnp: bool,
}

impl Reach {
    /// A node of a home or of a data centre: everything, but for UPnP.
    pub const NODE: Self = Self {
        probe: true,
        answer_probes: true,
        dial_relays: true,
        reserve: Reserve::WhenPrivate,
        relay: RelayRole::Auto,
        upnp: false,
    };
    /// A client: it reaches nodes behind routers, nobody needs to reach it.
    pub const CLIENT: Self = Self {
        probe: false,
        answer_probes: false,
        dial_relays: true,
        reserve: Reserve::Off,
        relay: RelayRole::Off,
        upnp: false,
    };
}

/// What a relay allows one circuit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CircuitLimits {
    /// Bytes, each way.
    pub bytes: u64,
    /// Life.
    pub time: Duration,
}

impl Default for CircuitLimits {
    fn default() -> Self {
        Self { bytes: limits::CIRCUIT_BYTES, time: limits::CIRCUIT_TIME }
    }
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
    /// The DNS server to ask; the system's if none is named.
    pub resolver: Option<SocketAddr>,
    /// Nodes that were met earlier, dialed as those of `bootstrap` are while company is missing.
    pub known: Vec<Multiaddr>,
    /// With fewer nodes connected than this, those that are named, met or heard of are dialed again; 0 for never.
    pub company: usize,
    /// Find peers on the local network.
    pub mdns: bool,
    /// The role in the DHT.
    pub kad: KadRole,
    /// Take part in the gossip of adverts.
    pub gossip: bool,
    /// Ways around routers.
    pub reach: Reach,
    /// What a circuit may carry, where this process is a relay.
    pub circuits: CircuitLimits,
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
            company: limits::COMPANY,
            reach: Reach::NODE,
            ..Self::bare(Identity::Key(key), network)
        }
    }

    /// A client: a fresh key, no gossip, no DHT, no listening.
    #[must_use]
    pub fn client(network: NetworkId) -> Self {
        Self { reach: Reach::CLIENT, ..Self::bare(Identity::Fresh, network) }
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
            resolver: None,
            known: Vec::new(),
            company: 0,
            mdns: false,
            kad: KadRole::Off,
            gossip: false,
            reach: Reach::default(),
            circuits: CircuitLimits::default(),
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

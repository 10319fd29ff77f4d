//! The sub-behaviours of one swarm. Limits come first: they refuse before anybody else allocates.

use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    allow_block_list, autonat, connection_limits, dcutr, gossipsub, identify, kad, mdns,
    memory_connection_limits, ping, relay, request_response, upnp,
};

use crate::rpc::ControlCodec;
use crate::{arrivals, streams};

/// What one swarm does.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    /// Peers that the owner has blocked.
    pub(crate) blocked: allow_block_list::Behaviour<allow_block_list::BlockedPeers>,
    /// Connections, counted.
    pub(crate) connections: connection_limits::Behaviour,
    /// Unfinished connections from others, counted by network.
    pub(crate) arrivals: arrivals::Behaviour,
    /// Physical memory of this process, in bytes: a share would trip as soon as weights are mapped.
    pub(crate) memory: memory_connection_limits::Behaviour,
    /// Who a peer is and which protocols it speaks.
    pub(crate) identify: identify::Behaviour,
    /// Whether it is still there, and how far away.
    pub(crate) ping: ping::Behaviour,
    /// Short requests and answers.
    pub(crate) control: request_response::Behaviour<ControlCodec>,
    /// Progress and blobs.
    pub(crate) streams: streams::Behaviour,
    /// Content keys to providers, under our own protocol name.
    pub(crate) kad: Toggle<kad::Behaviour<kad::store::MemoryStore>>,
    /// Signed adverts.
    pub(crate) gossip: Toggle<gossipsub::Behaviour>,
    /// Peers on the local network.
    pub(crate) mdns: Toggle<mdns::tokio::Behaviour>,
    /// Connections over relays, and places at them.
    pub(crate) relayed: Toggle<relay::client::Behaviour>,
    /// A direct connection in place of a relayed one.
    pub(crate) punch: Toggle<dcutr::Behaviour>,
    /// Connections of others over us.
    pub(crate) relay: Toggle<relay::Behaviour>,
    /// Whether others can dial us.
    pub(crate) probe: Toggle<autonat::v2::client::Behaviour>,
    /// Whether we can dial others, for those who ask.
    pub(crate) answer_probes: Toggle<autonat::v2::server::Behaviour>,
    /// Ports that the router forwards.
    pub(crate) upnp: Toggle<upnp::tokio::Behaviour>,
}

//! Finding and telling: gossiped adverts with a verdict by the owner, mDNS, Kademlia's first step.
//!
//! Adverts are signed twice: gossip's own signature is strict and says who published; the envelope inside is
//! the owner's to verify, off the driver. Until the owner has accepted an advert it is not forwarded.

use kinoflock_protocol::NodeId;
use libp2p::gossipsub::{
    self, IdentTopic, MessageAcceptance, MessageAuthenticity, MessageId, PeerScoreParams,
    PeerScoreThresholds, TopicScoreParams, ValidationMode,
};
use libp2p::kad::{self, store::MemoryStore};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, StreamProtocol, identity};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::config::KadRole;
use crate::error::NetError;
use crate::limits;

/// What an owner says about an advert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Good: forward it.
    Accept,
    /// Forged or against the rules: do not forward it, and hold it against its sender.
    Reject,
    /// Of no use to us: do not forward it, nobody is blamed.
    Ignore,
}

/// How many nodes an advert was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// It is on its way.
    Sent,
    /// Nobody listens to adverts at the moment; normal for a node that is alone.
    NobodyListens,
    /// The very same bytes were published before.
    Duplicate,
}

/// A gossiped advert. Dropping it without a verdict ignores it.
#[derive(Debug)]
pub struct Advert {
    /// Who published it, by gossip's signature.
    pub publisher: NodeId,
    /// Who handed it to us.
    pub from: NodeId,
    /// The envelope's bytes, at most [`limits::ADVERT_BYTES`]. Not verified.
    pub bytes: Vec<u8>,
    pub(crate) ticket: Option<Ticket>,
}

impl Advert {
    /// Says what is to be done with it.
    pub fn judge(mut self, verdict: Verdict) {
        if let Some(ticket) = self.ticket.take() {
            ticket.judge(verdict);
        }
    }
}

impl Drop for Advert {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            ticket.judge(Verdict::Ignore);
        }
    }
}

/// The way of a verdict to the driver.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) id: MessageId,
    pub(crate) source: PeerId,
    /// As long as there are permits: never full.
    pub(crate) verdicts: mpsc::Sender<Judged>,
    pub(crate) permit: OwnedSemaphorePermit,
}

impl Ticket {
    fn judge(self, verdict: Verdict) {
        let judged = Judged { id: self.id, source: self.source, verdict, _permit: self.permit };
        // Only a driver that has ended can refuse it; then there is nothing to forward.
        let _ = self.verdicts.try_send(judged);
    }
}

/// A verdict on its way to the driver.
#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) id: MessageId,
    pub(crate) source: PeerId,
    pub(crate) verdict: Verdict,
    _permit: OwnedSemaphorePermit,
}

impl From<Verdict> for MessageAcceptance {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Accept => Self::Accept,
            Verdict::Reject => Self::Reject,
            Verdict::Ignore => Self::Ignore,
        }
    }
}

/// Gossip for adverts: strict, signed, validated by the owner, bounded.
pub(crate) fn gossip(
    keypair: &identity::Keypair,
    topic: &IdentTopic,
) -> Result<gossipsub::Behaviour, NetError> {
    let failed = |why: String| NetError::Start { why };
    let config = gossipsub::ConfigBuilder::default()
        .validation_mode(ValidationMode::Strict)
        .validate_messages()
        .max_transmit_size(limits::ADVERT_BYTES + GOSSIP_OVERHEAD)
        .duplicate_cache_time(std::time::Duration::from_secs(120))
        .build()
        .map_err(|error| failed(error.to_string()))?;
    let mut gossip = gossipsub::Behaviour::new(MessageAuthenticity::Signed(keypair.clone()), config)
        .map_err(|error| failed(error.to_owned()))?;
    // Labs and collectives share one address; that is no sign of one attacker.
    let mut params = PeerScoreParams { ip_colocation_factor_weight: 0.0, ..PeerScoreParams::default() };
    params.topics.insert(topic.hash(), forgers());
    gossip.with_peer_score(params, PeerScoreThresholds::default()).map_err(failed)?;
    gossip.subscribe(topic).map_err(|error| failed(error.to_string()))?;
    Ok(gossip)
}

/// What counts for and against a peer: forged adverts only. With thirty seconds between adverts, how many of them a
/// peer brings first says nothing. Three forged ones within a minute or so, and nothing of it is heard any more.
pub(crate) fn forgers() -> TopicScoreParams {
    TopicScoreParams {
        topic_weight: 1.0,
        time_in_mesh_weight: 0.0,
        first_message_deliveries_weight: 0.0,
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        invalid_message_deliveries_weight: -10.0,
        invalid_message_deliveries_decay: 0.99,
        ..TopicScoreParams::default()
    }
}

/// Publisher, signature, key, topic and framing of one gossiped message, bytes.
const GOSSIP_OVERHEAD: usize = 1024;

/// Kademlia under our own name, never with records of others' making.
pub(crate) fn kad(role: KadRole, local: PeerId, name: StreamProtocol) -> Option<kad::Behaviour<MemoryStore>> {
    let mode = match role {
        KadRole::Off => return None,
        KadRole::Client => kad::Mode::Client,
        KadRole::Server => kad::Mode::Server,
    };
    let mut config = kad::Config::new(name);
    config.set_query_timeout(std::time::Duration::from_secs(30));
    // What a node serves changes within hours, and who is gone should not be asked for days.
    config.set_provider_publication_interval(Some(limits::PROVIDED_EVERY));
    config.set_provider_record_ttl(Some(limits::PROVIDED_FOR));
    config.set_record_filtering(kad::StoreInserts::FilterBoth);
    let mut kad = kad::Behaviour::with_config(local, MemoryStore::new(local), config);
    kad.set_mode(Some(mode));
    Some(kad)
}

/// Whether an address means the same to everybody. Others are only of use to peers as near as ourselves.
#[must_use]
pub fn is_global(addr: &Multiaddr) -> bool {
    addr.iter().next().is_some_and(|part| match part {
        Protocol::Ip4(ip) => {
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_broadcast()
                || ip.is_documentation())
        }
        Protocol::Ip6(ip) => {
            let first = ip.segments()[0];
            let unique_local = first & 0xfe00 == 0xfc00;
            let link_local = first & 0xffc0 == 0xfe80;
            !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || unique_local || link_local)
        }
        Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_) | Protocol::Dnsaddr(_) => true,
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_addresses_are_not_global() {
        for (addr, global) in [
            ("/ip4/8.8.8.8/tcp/1", true),
            ("/ip4/10.1.2.3/tcp/1", false),
            ("/ip4/127.0.0.1/udp/1/quic-v1", false),
            ("/ip4/169.254.1.1/tcp/1", false),
            ("/ip6/2600::1/tcp/1", true),
            ("/ip6/fd00::1/tcp/1", false),
            ("/ip6/fe80::1/tcp/1", false),
            ("/dns/example.org/tcp/1", true),
            ("/memory/1", false),
        ] {
            assert_eq!(is_global(&addr.parse().expect("address")), global, "{addr}");
        }
    }
}

//! What this node offers, and what it has heard of others.
//!
//! An advert is signed, short and short-lived. One that was heard is kept until its life is over; of each node the newest.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use kinoflock_client::ticket::Way;
use kinoflock_net::Multiaddr;
use kinoflock_net::discovery::{Advert, Verdict};
use kinoflock_net::peer::is_relayed;
use kinoflock_protocol::Millis;
use kinoflock_protocol::capacity::{
    Capacity, Device, NodeState, Offer, OfferLimits, QueueState, Serves, Terms,
};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{CardId, NodeId};
use kinoflock_protocol::limits::{MAX_NODES, SPOKEN_VERSIONS};
use kinoflock_protocol::rpc::{FindNodes, Response};
use kinoflock_protocol::work::Work;

use self::table::{Refused, Table, Taken};
use super::{Daemon, finish, ip_of, unix_now};
use crate::models::Model;
use crate::scheduler::{DeviceMode, DeviceStatus};

mod table;

/// Nodes through which another one is looked for.
const MAX_WAYS: usize = 32;
/// Basis points in a percent.
const BPS_PER_PERCENT: u16 = 100;

/// Adverts, our own and others'.
#[derive(Debug, Default)]
pub(super) struct Adverts {
    sequence: u64,
    own: Option<Envelope>,
    /// Whether what the own one says of addresses no longer holds.
    outdated: bool,
    table: Table,
    /// How many nodes were told of.
    turn: AtomicUsize,
}

impl Adverts {
    /// The addresses of this node have changed. Before the first advert nobody was told others.
    pub(super) fn outdate(&mut self) {
        self.outdated = self.own.is_some();
    }

    pub(super) fn take_outdated(&mut self) -> bool {
        std::mem::take(&mut self.outdated)
    }
}

impl Adverts {
    /// The number of the own newest advert.
    pub(super) const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Nodes whose adverts have not run out.
    pub(super) fn live(&self) -> impl Iterator<Item = (NodeId, &Capacity)> {
        self.table.live(Instant::now())
    }

    /// The same as ways to them.
    pub(super) fn ways(&self) -> Vec<Way> {
        let way = |(node, capacity): (NodeId, &Capacity)| {
            Way::Node(node, capacity.addresses.iter().filter_map(|addr| addr.parse().ok()).collect())
        };
        self.live().map(way).take(MAX_WAYS).collect()
    }
}

impl Daemon {
    /// Signs what this node can do now, and tells the network.
    pub(super) fn advertise(&mut self) {
        let sequence = self.adverts.sequence.max(unix_now().0) + 1;
        self.adverts.sequence = sequence;
        let capacity = self.capacity(sequence);
        let sealed = Envelope::seal(self.identity.keypair(), &self.network, &capacity);
        let envelope = match sealed {
            Ok(envelope) => envelope,
            Err(error) => return tracing::error!(%error, "the advert could not be signed"),
        };
        self.adverts.own = Some(envelope.clone());
        let net = self.net.clone();
        tokio::spawn(async move {
            if let Err(error) = net.publish_advert(envelope.encode()).await {
                tracing::debug!(%error, "the advert was not published");
            }
        });
    }

    fn capacity(&self, sequence: u64) -> Capacity {
        let now = Instant::now();
        let (queue, limits) = (self.scheduler.queue(now), self.scheduler.policy().limits());
        let devices = self.scheduler.devices(now);
        let loaded: Vec<_> = devices.iter().filter_map(|device| device.loaded).collect();
        let offers = self.models.values().filter(|model| self.scheduler.policy().serves_model(&model.id));
        let offers = offers.filter_map(|model| {
            let (self_test, speed, devices) = self.passed(&model.id)?;
            Some(Offer {
                model: model.id,
                name: Text::truncated(&model.name),
                architecture: model.manifest.architecture.clone(),
                speed,
                devices,
                loaded: loaded.contains(&model.id),
                self_test,
            })
        });
        let workers: Vec<_> = self.devices.values().filter_map(|device| device.worker.as_ref()).collect();
        Capacity {
            issued_at: unix_now(),
            sequence,
            name: Text::truncated(self.config.name.as_deref().unwrap_or_default()),
            addresses: List::first_of(self.addresses().iter().map(|addr| Text::truncated(addr))),
            models: List::first_of(offers),
            devices: List::first_of(self.devices.iter().filter_map(|(id, device)| {
                let worker = device.worker.as_ref()?;
                Some(Device {
                    class: finish::class_of(&worker.device),
                    name: Text::truncated(&worker.device_name),
                    memory: self.memories.limit(usize::from(id.0)),
                })
            })),
            limits: OfferLimits {
                max_frames: limits.frames.unwrap_or(0),
                max_width: limits.width.unwrap_or(0),
                max_height: limits.height.unwrap_or(0),
                max_steps: limits.steps.unwrap_or(0),
                max_work: Work(0),
                max_input_bytes: self.most_input_bytes(),
                max_queue: self.config.queue.jobs,
            },
            queue: QueueState {
                jobs: queue.waiting + queue.running,
                work: Work(queue.work),
                wait: Millis::from(queue.wait.unwrap_or_default()),
            },
            state: self.state(&devices),
            serves: self.serves(),
            terms: self.terms(),
            content_rules: self.scheduler.policy().content_rules(),
            protocol_versions: List::first_of(SPOKEN_VERSIONS.iter().copied()),
            engine: workers.first().map_or_else(Text::default, |worker| {
                Text::truncated(&format!("{}/{}", worker.engine, worker.version))
            }),
        }
    }

    /// As the scheduler would answer: a device that is paused until a known time takes jobs for later.
    fn state(&self, devices: &[DeviceStatus]) -> NodeState {
        let draining = |device: &DeviceStatus| matches!(device.mode, DeviceMode::Draining { .. });
        // An archive has no device that could be drained: it takes no jobs and does not go.
        let all_drain = !devices.is_empty() && devices.iter().all(draining);
        if self.draining || all_drain {
            NodeState::Draining
        } else if devices.iter().any(|device| device.mode.takes_jobs()) {
            NodeState::Open
        } else {
            NodeState::Paused
        }
    }

    fn serves(&self) -> Serves {
        let share = u16::from(self.scheduler.policy().public_share());
        Serves {
            public_bps: share * BPS_PER_PERCENT,
            collectives: List::first_of(self.config.serve.collectives.iter().copied()),
            listed_only: !self.config.policy.allow.is_empty(),
        }
    }

    fn terms(&self) -> Terms {
        let acknowledged = Millis::from(self.config.terms.keep_acknowledged);
        Terms {
            keeps_prompts: acknowledged,
            keeps_clips: acknowledged,
            keeps_latents: acknowledged,
            keeps_unacknowledged: Millis::from(self.config.terms.keep_at_most),
            ..Terms::default()
        }
    }

    /// The addresses under which this node may be reached: those that the operator named or others got in at, those over
    /// relays, its own. What only this machine or its cable reaches is told only where there is nothing else.
    pub(super) fn addresses(&self) -> Vec<String> {
        told(&self.net.open_addrs(), self.net.listen_addrs()).iter().map(ToString::to_string).collect()
    }

    pub(super) fn own_advert(&self) -> Response {
        match &self.adverts.own {
            Some(envelope) => Response::Capacity(envelope.clone()),
            None => Response::error("starting", "this node is starting; ask again in some seconds"),
        }
    }

    pub(super) fn find_nodes(&self, wanted: &FindNodes) -> Response {
        let now = Instant::now();
        let limit = (wanted.limit as usize).min(MAX_NODES);
        let fits = |capacity: &Capacity| {
            let serves = wanted.model.is_none_or(|model| capacity.offer(&model).is_some());
            let limits = capacity.limits;
            let within = |limit: u32, given: u32| limit == 0 || given <= limit;
            let takes = wanted.shape.is_none_or(|shape| {
                within(limits.max_frames, shape.frames)
                    && within(limits.max_width, shape.width)
                    && within(limits.max_height, shape.height)
                    && within(limits.max_steps, shape.steps)
            });
            serves && takes
        };
        let own = self
            .adverts
            .own
            .iter()
            .filter(|_| wanted.model.is_none_or(|model| self.passed(&model).is_some()));
        let mut known: Vec<_> =
            self.adverts.table.fresh(now).filter(|(capacity, _)| fits(capacity)).collect();
        let mut soonest = Vec::new();
        if known.len() > limit {
            // Half of those that are told are those with the shortest wait.
            known.sort_by_key(|(capacity, _)| (capacity.state != NodeState::Open, capacity.queue.wait));
            soonest.extend(known.drain(..limit / 2));
        }
        // Each answer goes on where the last one ended, so that nobody is told of less often than others.
        let turn = self.adverts.turn.fetch_add(limit, Ordering::Relaxed);
        known.sort_by_key(|(_, envelope)| envelope.signer);
        let first = turn.checked_rem(known.len()).unwrap_or(0);
        known.rotate_left(first);
        let known = soonest.into_iter().chain(known).map(|(_, envelope)| envelope);
        let nodes = own.chain(known).take(limit).cloned();
        Response::Nodes(List::first_of(nodes))
    }

    /// Checks a gossiped advert before it is forwarded.
    pub(super) fn handle_advert(&mut self, advert: Advert) {
        let taken = match Envelope::decode(&advert.bytes) {
            Ok(envelope) => self.take_advert(envelope, Some(advert.publisher)),
            Err(error) => Err(Refused::Forged(error.to_string())),
        };
        let verdict = match &taken {
            Ok(()) => Verdict::Accept,
            Err(Refused::Forged(_)) => Verdict::Reject,
            // An honest clock may be wrong, and an old advert may come late: nobody is blamed.
            Err(_) => Verdict::Ignore,
        };
        tracing::trace!(peer = %advert.publisher.short(), ?verdict, "advert");
        advert.judge(verdict);
    }

    /// Takes an advert that another node knew.
    pub(super) fn take_told(&mut self, advert: &Envelope) {
        // Whatever is wrong with it was logged; whoever told it may not know better.
        let _ = self.take_advert(advert.clone(), None);
    }

    fn take_advert(&mut self, envelope: Envelope, publisher: Option<NodeId>) -> Result<(), Refused> {
        let (own, now, wall) = (self.identity.node_id(), Instant::now(), unix_now());
        let taken = self.adverts.table.take(envelope, publisher, &self.network, own, (now, wall));
        match taken {
            Ok(Taken { node, addresses }) => {
                self.metrics.known_nodes.set(self.adverts.table.fresh(now).count() as i64);
                let net = self.net.clone();
                tokio::spawn(async move {
                    // An error means that the network has ended.
                    let _ = net.add_addresses(node, addresses).await;
                });
                Ok(())
            }
            Err(refused) => {
                tracing::debug!(peer = ?publisher.map(|node| node.short()), %refused, "advert_refused");
                Err(refused)
            }
        }
    }

    /// The id of the card that this node signs about a model.
    pub(super) fn card_of(&self, model: &Model) -> Option<Envelope> {
        let card = model.card.as_ref()?;
        match Envelope::seal(self.identity.keypair(), &self.network, card) {
            Ok(envelope) => Some(envelope),
            Err(error) => {
                tracing::error!(model = %model.name, %error, "the model's card could not be signed");
                None
            }
        }
    }

    pub(super) fn card_id(&self, model: &Model) -> Option<CardId> {
        self.card_of(model).map(|envelope| CardId::of(&envelope, &self.network))
    }
}

fn told(open: &[Multiaddr], listening: Vec<Multiaddr>) -> Vec<Multiaddr> {
    let (near, far): (Vec<_>, Vec<_>) = listening.into_iter().partition(is_near);
    let (relayed, own): (Vec<_>, Vec<_>) = far.into_iter().partition(is_relayed);
    let mut all: Vec<Multiaddr> = open.to_vec();
    for addr in relayed.into_iter().chain(own) {
        if !all.contains(&addr) {
            all.push(addr);
        }
    }
    if all.is_empty() { near } else { all }
}

/// Whether an address means another machine, or none, to whoever is told it elsewhere.
fn is_near(addr: &Multiaddr) -> bool {
    match ip_of(addr) {
        Some(IpAddr::V4(ip)) => ip.is_loopback() || ip.is_link_local(),
        Some(IpAddr::V6(ip)) => ip.is_loopback() || ip.is_unicast_link_local(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn addresses_at_which_others_get_in_are_told_first_and_each_once() {
        let addr = |text: &str| text.parse::<Multiaddr>().unwrap();
        let (open, own) = (addr("/ip4/198.18.0.1/tcp/1"), addr("/ip4/192.168.1.2/tcp/1"));
        let (relayed, near) = (addr("/ip4/198.18.0.2/tcp/1/p2p-circuit"), addr("/ip4/127.0.0.1/tcp/1"));
        let listening = vec![near.clone(), own.clone(), open.clone(), relayed.clone()];
        assert_eq!(told(std::slice::from_ref(&open), listening), [open, relayed, own]);
        assert_eq!(told(&[], vec![near.clone()]), [near]);
    }

    #[test]
    fn loopback_and_link_local_addresses_are_near_and_no_others() {
        for (addr, near) in [
            ("/ip4/127.0.0.1/tcp/1", true),
            ("/ip4/169.254.7.7/tcp/1", true),
            ("/ip6/::1/udp/1/quic-v1", true),
            ("/ip6/fe80::1/tcp/1", true),
            ("/ip4/192.168.1.2/tcp/1", false),
            ("/ip6/fd00::2/udp/1/quic-v1", false),
            ("/dns4/node.example/tcp/1", false),
        ] {
            assert_eq!(is_near(&addr.parse().unwrap()), near, "{addr}");
        }
    }
}

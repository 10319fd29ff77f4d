//! Whether other nodes see this one: three of them are asked to connect anew, as a stranger would, and to ask for a quote. So
//! a node that cannot be reached says so, instead of looking well and getting no jobs.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use kinoflock_net::{Multiaddr, NetConfig, NetHandle, Responder};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::custody::{Look, Seen};
use kinoflock_protocol::id::{ModelId, NetworkId, NodeId, Nonce};
use kinoflock_protocol::job::Audience;
use kinoflock_protocol::order::{QuoteRequest, ValidQuote};
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::rpc::{ReleaseReason, Request, Response};
use kinoflock_protocol::work::{JobShape, work};

use super::{Daemon, Note, ip_of};
use crate::admin::report::SeenReport;

/// Nodes that are asked.
const ASKED: usize = 3;
/// Pause between two rounds.
const EVERY: Duration = Duration::from_secs(600);
/// First round after the start, when there is somebody to ask.
const FIRST: Duration = Duration::from_secs(10);
/// Pause after a round with nobody to ask, or with a bad result.
const AGAIN: Duration = Duration::from_secs(60);
/// Time for a look, all in all.
const WITHIN: Duration = Duration::from_secs(8);
/// Longest wait for what another node has seen.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Looks for others at once; one costs a connection.
const MAX_LOOKS: usize = 4;
/// Looks for others in a minute.
const LOOKS_PER_MINUTE: usize = 30;

/// What others have seen of this node, and what it has looked at for others.
#[derive(Debug)]
pub(super) struct Looks {
    next: Instant,
    asking: bool,
    last: Option<(Instant, Vec<SeenReport>)>,
    looking: usize,
    recent: VecDeque<Instant>,
}

impl Looks {
    pub(super) fn new(now: Instant) -> Self {
        Self { next: now + FIRST, asking: false, last: None, looking: 0, recent: VecDeque::new() }
    }

    /// What the nodes said that were asked last, and how long ago.
    pub(super) fn report(&self, now: Instant) -> Option<(u64, Vec<SeenReport>)> {
        let (at, seen) = self.last.as_ref()?;
        Some((now.saturating_duration_since(*at).as_secs(), seen.clone()))
    }

    fn admit(&mut self, now: Instant) -> bool {
        while self.recent.front().is_some_and(|at| now.saturating_duration_since(*at) >= AGAIN) {
            self.recent.pop_front();
        }
        let free = self.looking < MAX_LOOKS && self.recent.len() < LOOKS_PER_MINUTE;
        if free {
            self.looking += 1;
            self.recent.push_back(now);
        }
        free
    }
}

impl Daemon {
    /// Asks three nodes whether they see this one, when it is time to.
    pub(super) fn ask_to_be_seen(&mut self) {
        let now = Instant::now();
        if self.looks.asking || now < self.looks.next {
            return;
        }
        let mut nodes: Vec<NodeId> = self.adverts.live().map(|(node, _)| node).collect();
        let round = self.adverts.sequence().to_le_bytes();
        nodes.sort_by_key(|node| *blake3::hash(&[node.as_bytes().as_slice(), &round].concat()).as_bytes());
        nodes.truncate(ASKED);
        if nodes.is_empty() {
            self.looks.next = now + AGAIN;
            return;
        }
        self.looks.asking = true;
        let addresses = List::first_of(self.addresses().iter().map(|addr| Text::truncated(addr)));
        let look = Look { addresses, quote: self.quote_for_looks() };
        let net = self.net.clone();
        self.spawn(async move {
            let asking = nodes.into_iter().map(|node| ask(&net, node, look.clone()));
            Note::Seen { reports: futures::future::join_all(asking).await }
        });
    }

    pub(super) fn handle_seen(&mut self, reports: Vec<SeenReport>) {
        let now = Instant::now();
        let well = reports.iter().all(|report| report.reached && report.quoted);
        if !well && reports.iter().all(|report| !report.reached) {
            let why = reports.first().map_or("", |report| report.text.as_str());
            tracing::warn!(
                asked = reports.len(),
                why,
                "no other node can reach this one: it will get no jobs from strangers"
            );
        }
        self.looks.asking = false;
        self.looks.next = now + if well { EVERY } else { AGAIN };
        self.looks.last = Some((now, reports));
    }

    /// Looks at a node for it. Only at addresses from which it may have asked, so that nobody is made to knock at others.
    pub(super) fn look(
        &mut self,
        look: Look,
        node: NodeId,
        from: Option<&Multiaddr>,
        responder: Responder,
    ) -> Option<(Responder, Box<Refusal>)> {
        let from = from.and_then(ip_of);
        let addresses: Vec<Multiaddr> = look.addresses.iter().filter_map(|text| text.parse().ok()).collect();
        let own: Vec<_> = addresses.into_iter().filter(|addr| may_be_from(addr, from)).collect();
        if own.is_empty() {
            let refusal = Refusal::new(Reason::Invalid, "look.addresses").given("none from which you asked");
            return Some((responder, Box::new(refusal)));
        }
        if !self.looks.admit(Instant::now()) {
            let refusal = Refusal::new(Reason::Busy, "look").advice("ask again in a minute");
            return Some((responder, Box::new(refusal)));
        }
        let (network, quote) = (self.network, look.quote);
        self.spawn(async move {
            let seen = match tokio::time::timeout(WITHIN, see(network, node, own, quote)).await {
                Ok(seen) => seen,
                Err(_) => unseen(format!("no connection within {} s", WITHIN.as_secs())),
            };
            Note::Looked { seen, responder }
        });
        None
    }

    pub(super) fn handle_looked(&mut self, seen: Seen, responder: Responder) {
        self.looks.looking = self.looks.looking.saturating_sub(1);
        if let Err(error) = responder.send(Response::Seen(seen)) {
            tracing::debug!(%error, "what was seen was not told");
        }
    }

    /// A quote that this node should give: its first model at its smallest.
    fn quote_for_looks(&self) -> Option<QuoteRequest> {
        let served = |id: &&ModelId| self.passed(id).is_some();
        let model = self.models.get(self.models.keys().find(served)?)?;
        let (rules, defaults) = (&model.manifest.rules, &model.manifest.defaults);
        let frames = rules.nearest_frames(1).first().copied().unwrap_or(defaults.frames);
        let shape =
            JobShape { frames, width: defaults.width, height: defaults.height, steps: 1, guided: false };
        Some(QuoteRequest {
            nonce: Nonce::from_bytes([0; 16]),
            requester: kinoflock_protocol::id::RequesterId::from(self.identity.keypair().public()),
            model: model.id,
            train: false,
            adapters: List::default(),
            shape,
            work: work(&model.manifest.work, &shape),
            input_bytes: 0,
            collective: None,
            addressed_to: Audience::Anyone,
            deadline: None,
        })
    }
}

async fn ask(net: &NetHandle, node: NodeId, look: Look) -> SeenReport {
    let report = |reached, quoted, text: String| SeenReport { node: node.to_string(), reached, quoted, text };
    match net.request_within(node, Request::Look(look), ANSWER_WITHIN).await {
        Ok(Response::Seen(seen)) => report(seen.reached, seen.quoted, seen.text.to_string()),
        Ok(Response::Refused(refusal)) => report(false, false, refusal.to_string()),
        Ok(other) => report(false, false, format!("answered {}", other.name())),
        Err(error) => report(false, false, error.to_string()),
    }
}

/// Goes there as a stranger: a swarm of its own with a fresh key.
async fn see(
    network: NetworkId,
    node: NodeId,
    addresses: Vec<Multiaddr>,
    quote: Option<QuoteRequest>,
) -> Seen {
    let (net, _events) = match kinoflock_net::start(NetConfig::client(network)).await {
        Ok(started) => started,
        Err(error) => return unseen(error.to_string()),
    };
    let seen = see_through(&net, &network, node, addresses, quote).await;
    net.shutdown().await;
    seen
}

async fn see_through(
    net: &NetHandle,
    network: &NetworkId,
    node: NodeId,
    addresses: Vec<Multiaddr>,
    quote: Option<QuoteRequest>,
) -> Seen {
    if let Err(error) = net.connect(node, addresses).await {
        return unseen(error.to_string());
    }
    let Some(question) = quote else {
        return Seen { reached: true, quoted: false, text: Text::truncated("no model to ask a quote for") };
    };
    let (quoted, text) = match net.request(node, Request::Quote(question.clone())).await {
        Ok(Response::Quote(envelope)) => match ValidQuote::parse(&envelope, network, &node, &question) {
            Ok(quote) => {
                let release =
                    Request::Release { lease: quote.quote().lease, reason: ReleaseReason::Cancelled };
                // It runs out by itself too.
                let _ = net.request(node, release).await;
                (true, String::new())
            }
            Err(error) => (false, error.to_string()),
        },
        Ok(Response::Refused(refusal)) => (false, refusal.to_string()),
        Ok(other) => (false, format!("answered {}", other.name())),
        Err(error) => (false, error.to_string()),
    };
    Seen { reached: true, quoted, text: Text::truncated(&text) }
}

fn unseen(text: String) -> Seen {
    Seen { reached: false, quoted: false, text: Text::truncated(&text) }
}

/// Whether a question that came from `from` may be about this address: the same machine, or a name.
fn may_be_from(addr: &Multiaddr, from: Option<IpAddr>) -> bool {
    match (ip_of(addr), from) {
        (Some(ip), Some(from)) => ip.to_canonical() == from.to_canonical(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_the_machine_that_asked_is_looked_at() {
        let from = Some("203.0.113.5".parse().unwrap());
        for (addr, may) in [
            ("/ip4/203.0.113.5/tcp/4001", true),
            ("/ip4/203.0.113.5/udp/4001/quic-v1", true),
            ("/ip6/::ffff:203.0.113.5/tcp/4001", true),
            ("/ip4/203.0.113.6/tcp/4001", false),
            ("/dns4/victim.example/tcp/80", false),
        ] {
            assert_eq!(may_be_from(&addr.parse().unwrap(), from), may, "{addr}");
        }
        assert!(!may_be_from(&"/ip4/203.0.113.5/tcp/1".parse().unwrap(), None));
    }

    #[test]
    fn looks_for_others_are_few_at_once_and_in_a_minute() {
        let start = Instant::now();
        let mut looks = Looks::new(start);
        assert_eq!((0..100).filter(|_| looks.admit(start)).count(), MAX_LOOKS);
        let mut admitted = MAX_LOOKS;
        for _ in 0..100 {
            looks.looking = 0;
            admitted += usize::from(looks.admit(start));
        }
        assert_eq!(admitted, LOOKS_PER_MINUTE);
        looks.looking = 0;
        assert!(looks.admit(start + AGAIN));
    }
}

//! Finding nodes: every way is tried at once, and the first few nodes are asked in one breath for their adverts and for
//! those they know.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use kinoflock_net::Multiaddr;
use kinoflock_protocol::limits::{MAX_CLOCK_SKEW_MS, MAX_NODES};
use kinoflock_protocol::model::ModelManifest;
use kinoflock_protocol::rpc::{FindNodes, Request, Response};
use kinoflock_protocol::{BlobId, Millis, ModelId, NodeId};

use super::{Client, Event, Events, SessionError, corrected};
use crate::config::Config;
use crate::local;
use crate::route::{Candidate, Declined, Why, read_advert};
use crate::store::MetNode;
use crate::ticket::{Way, WayError, parse_addresses};

/// Nodes that are asked at once.
const AT_ONCE: usize = 8;
/// Nodes that are tried at most, whatever tickets and lists name.
const MAX_TARGETS: usize = 48;
/// Nodes that are asked whom else they know.
const ASKED_FOR_OTHERS: usize = 4;
/// With fewer nodes than this all of them know each other.
const SMALL: usize = 4;
/// With fewer nodes that serve a model, more are looked for.
const FEW: usize = 3;
/// Time for a connection and an advert.
const PROBE: Duration = Duration::from_secs(10);
/// Once somebody answered, how long the others are waited for: dead nodes of old tickets would hold every job up.
const OTHERS_WAIT: Duration = Duration::from_secs(3);
/// Time in which nodes of the local network must have answered, if nobody else did.
const MDNS_WAIT: Duration = Duration::from_secs(2);

/// A node that was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// The node and its advert.
    pub candidate: Candidate,
    /// Where it is reached.
    pub addresses: Vec<Multiaddr>,
    /// Whether it answered itself; else its advert came from another node.
    pub direct: bool,
    /// How far its clock is ahead in milliseconds, if that is more than an advert's age explains.
    pub skew_ms: i64,
}

/// A model that nodes offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Which model.
    pub id: ModelId,
    /// The name by which the nodes offer it.
    pub name: String,
}

/// A configured way that cannot be gone: the beginning of its text, and why not.
pub type WrongWay = (String, WayError);

/// What one answered when it was asked for others, and how far its clock is ahead.
type Told = (i64, Response);

/// One node or address to be tried.
struct Target {
    label: String,
    node: Option<NodeId>,
    addresses: Vec<Multiaddr>,
}

impl Client {
    /// The ways that a configuration knows: the daemon on this machine, joined networks, the list of nodes; and those
    /// of them that cannot be read or lead to another network, each with its reason.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn known_ways(&self, config: &Config) -> Result<(Vec<Way>, Vec<WrongWay>), SessionError> {
        let (mut ways, mut wrong) = (Vec::new(), Vec::new());
        if config.local {
            let here = local::find(&local::folders());
            ways.extend(here.iter().filter(|node| node.network == self.network).map(Way::local));
        }
        for text in self.store.tickets()?.iter().chain(&config.nodes) {
            let way = text.parse::<Way>().and_then(|way| way.check_network(&self.network).map(|()| way));
            match way {
                Ok(way) => ways.push(way),
                Err(error) => wrong.push((text.chars().take(24).collect(), error)),
            }
        }
        ways.extend(self.listed_ways());
        Ok((ways, wrong))
    }

    /// Tries these ways and nobody else: on the local network only nodes are looked for that are named by their id.
    ///
    /// # Errors
    /// `NoNode` with what was tried.
    pub async fn find_named(&self, ways: &[Way], events: &Events) -> Result<Vec<Found>, SessionError> {
        let mut reasons = Vec::new();
        let mut targets = self.targets(ways).await;
        if self.mdns {
            for target in targets.iter_mut().filter(|target| target.addresses.is_empty()) {
                let Some(node) = target.node else { continue };
                let mut nearby = self.found.clone();
                // One that is not there is told as out of reach.
                let _ =
                    tokio::time::timeout(MDNS_WAIT, nearby.wait_for(|found| found.contains_key(&node))).await;
                target.addresses = nearby.borrow().get(&node).cloned().unwrap_or_default();
            }
        }
        let found = self.probe_all(targets, &mut reasons, None, events).await;
        if found.is_empty() { Err(SessionError::NoNode { reasons }) } else { Ok(found) }
    }

    /// Tries every way, and the local network if that is on. Nodes that answered come first.
    ///
    /// # Errors
    /// `NoNode` with what was tried.
    pub async fn find(&self, ways: &[Way], events: &Events) -> Result<Vec<Found>, SessionError> {
        let (mut reasons, mut told) = (Vec::new(), Vec::new());
        let targets = self.targets(ways).await;
        let mut found = self.probe_all(targets, &mut reasons, Some(&mut told), events).await;
        if self.mdns && (found.is_empty() || !self.found.borrow().is_empty()) {
            let others = self.nearby(found.is_empty(), &found).await;
            found.extend(self.probe_all(others, &mut reasons, Some(&mut told), events).await);
        }
        if found.is_empty() {
            let met = self.met_before();
            found = self.probe_all(met, &mut reasons, Some(&mut told), events).await;
        }
        if found.is_empty() {
            return Err(SessionError::NoNode { reasons });
        }
        self.add_others(&mut found, told).await;
        if self.refresh_lists(&found).await? {
            let listed = self.targets(&self.listed_ways()).await;
            let known = |target: &Target| found.iter().any(|found| Some(found.candidate.node) == target.node);
            let new = listed.into_iter().filter(|target| !known(target)).collect();
            // One of a list that does not answer is no loss: somebody else did.
            found.extend(self.probe_all(new, &mut Vec::new(), None, &Events::none()).await);
        }
        self.remember_met(&found);
        Ok(found)
    }

    /// Whom these ways lead to. Of a list in DNS each node is one of them; a list that cannot be looked up is told of when it
    /// is tried.
    async fn targets(&self, ways: &[Way]) -> Vec<Target> {
        let looked_up = ways.iter().cloned().map(|way| {
            let net = self.net.clone();
            async move {
                let Way::Address(addr) = &way else { return vec![way] };
                match net.look_up(addr).await {
                    Ok(listed) => listed.into_iter().map(Way::Address).collect(),
                    Err(_) => vec![way],
                }
            }
        });
        targets(&futures::future::join_all(looked_up).await.concat())
    }

    /// Nodes that were met by an earlier process: ways for when no other leads anywhere.
    fn met_before(&self) -> Vec<Target> {
        let target = |met: MetNode| Target {
            label: format!("{}, met before", met.node),
            node: Some(met.node),
            addresses: parse_addresses(&met.addresses),
        };
        self.store.met(&self.network).into_iter().map(target).take(MAX_TARGETS).collect()
    }

    fn remember_met(&self, found: &[Found]) {
        let (answered, heard): (Vec<_>, Vec<_>) = found.iter().partition(|found| found.direct);
        let met = answered.into_iter().chain(heard).map(|found| {
            let told = found.candidate.capacity.addresses.iter().map(ToString::to_string);
            let mut addresses: Vec<_> = found.addresses.iter().map(ToString::to_string).collect();
            addresses.extend(told);
            let mut seen = BTreeSet::new();
            addresses.retain(|addr| seen.insert(addr.clone()));
            MetNode { network: self.network, node: found.candidate.node, addresses, at: crate::now() }
        });
        if let Err(error) = self.store.keep_met(met) {
            tracing::warn!(%error, "the nodes that were found could not be remembered");
        }
    }

    async fn probe_all(
        &self,
        targets: Vec<Target>,
        reasons: &mut Vec<(String, String)>,
        mut told: Option<&mut Vec<Told>>,
        events: &Events,
    ) -> Vec<Found> {
        let asked = told.as_ref().map_or(0, |told| ASKED_FOR_OTHERS.saturating_sub(told.len()));
        let mut waiting: BTreeMap<usize, String> =
            targets.iter().map(|target| target.label.clone()).enumerate().collect();
        let probes = targets.into_iter().enumerate().map(|(place, target)| async move {
            let probed = tokio::time::timeout(PROBE, self.probe(&target, place < asked)).await;
            let late = || format!("no answer within {} s", PROBE.as_secs());
            (place, probed.map_err(|_| late()).and_then(|probed| probed.map_err(|error| error.to_string())))
        });
        let mut probes = stream::iter(probes).buffer_unordered(AT_ONCE);
        let mut found: Vec<Found> = Vec::new();
        // Whoever is named is waited for; of all that are known, some are enough.
        let (mut until, is_search) = (None, told.is_some());
        while let Some((place, probed)) = next_until(&mut probes, until).await {
            let way = waiting.remove(&place).expect("invariant: each is probed once");
            match probed {
                Ok((one, _)) if found.iter().any(|known| known.candidate.node == one.candidate.node) => {}
                Ok((one, others)) => {
                    if is_search && until.is_none() {
                        until = Some(Instant::now() + OTHERS_WAIT);
                    }
                    if let (Some(told), Some(others)) = (&mut told, others) {
                        told.push((one.skew_ms, others));
                    }
                    let (node, name) = (one.candidate.node, one.candidate.capacity.name.to_string());
                    events.tell(Event::Reached { node, name }).await;
                    found.push(one);
                }
                Err(why) => {
                    // The way is told beside its reason, which may begin with it.
                    let why = why.strip_prefix(&format!("cannot reach {way}: ")).unwrap_or(&why);
                    let why = why.strip_prefix(&format!("{way}: ")).unwrap_or(why).to_owned();
                    events.tell(Event::Unreachable { way: way.clone(), why: why.clone() }).await;
                    reasons.push((way, why));
                }
            }
        }
        for way in waiting.into_values() {
            let why = format!("no answer within {} s of another's", OTHERS_WAIT.as_secs());
            events.tell(Event::Unreachable { way: way.clone(), why: why.clone() }).await;
            reasons.push((way, why));
        }
        found
    }

    /// Asks one for its advert, and at once for those it knows, if that is wanted.
    async fn probe(
        &self,
        target: &Target,
        for_others: bool,
    ) -> Result<(Found, Option<Response>), SessionError> {
        let node = match (target.node, target.addresses.first()) {
            (None, Some(addr)) => self.net.dial(addr.clone()).await?,
            (Some(node), _) => self.net.connect(node, target.addresses.clone()).await?,
            (None, None) => return Err(SessionError::NoNode { reasons: Vec::new() }),
        };
        let asked_at = Instant::now();
        let advert = async {
            let response = self.net.request_within(node, Request::Capacity, PROBE).await;
            (response, Some(Millis::from(asked_at.elapsed())))
        };
        let others = async {
            let question = FindNodes { model: None, shape: None, limit: MAX_NODES as u32, forward: false };
            if for_others { self.net.request(node, Request::FindNodes(question)).await.ok() } else { None }
        };
        let ((response, round_trip), others) = futures::join!(advert, others);
        let response = response?;
        let Response::Capacity(envelope) = response else {
            return Err(unexpected(node, "a question for its advert", response));
        };
        let (signer, capacity) = read_advert(&envelope, &self.network)?;
        if signer != node {
            let given = format!("with the advert of {signer}");
            return Err(SessionError::Unexpected { node, asked: "a question for its advert", given });
        }
        // Just signed by whoever answers: what is beyond the limit is a clock that is wrong.
        let ahead = i128::from(capacity.issued_at.0) - i128::from(crate::now().0);
        let skew_ms = if ahead.unsigned_abs() > u128::from(MAX_CLOCK_SKEW_MS) { ahead as i64 } else { 0 };
        let candidate = Candidate { node, capacity, round_trip, seen: self.store.experience(&node) };
        Ok((Found { candidate, addresses: target.addresses.clone(), direct: true, skew_ms }, others))
    }

    /// Nodes that mDNS found; waits for the first one if `wait`.
    async fn nearby(&self, wait: bool, known: &[Found]) -> Vec<Target> {
        let mut nearby = self.found.clone();
        if wait {
            // Nobody there is told as "no node found".
            let _ = tokio::time::timeout(MDNS_WAIT, nearby.wait_for(|found| !found.is_empty())).await;
        }
        let is_known = |node: &NodeId| known.iter().any(|found| found.candidate.node == *node);
        let found = nearby.borrow();
        let target = |(node, addresses): (&NodeId, &Vec<Multiaddr>)| Target {
            label: format!("{node} on the local network"),
            node: Some(*node),
            addresses: addresses.clone(),
        };
        found.iter().filter(|(node, _)| !is_known(node)).map(target).take(MAX_TARGETS).collect()
    }

    /// Adds nodes that serve a model, where few of those found do: in a large network a node knows a part of it only, and
    /// passes the question on. `wanted` is the model's id or name.
    pub(super) async fn seek(&self, wanted: &str, found: &mut Vec<Found>) {
        let named = || offered(found).into_iter().find(|(_, name)| name == wanted).map(|(id, _)| id);
        let Some(model) = wanted.parse::<ModelId>().ok().or_else(named) else { return };
        let serving = found.iter().filter(|found| found.candidate.capacity.offer(&model).is_some()).count();
        if found.len() < SMALL || serving >= FEW {
            return;
        }
        let question = FindNodes { model: Some(model), shape: None, limit: MAX_NODES as u32, forward: true };
        let asked = found.iter().take(ASKED_FOR_OTHERS).map(|f| (f.candidate.node, f.skew_ms));
        let asking = asked.collect::<Vec<_>>().into_iter().map(|(node, skew_ms)| async move {
            Some((skew_ms, self.net.request(node, Request::FindNodes(question)).await.ok()?))
        });
        let told = futures::future::join_all(asking).await.into_iter().flatten().collect();
        self.add_others(found, told).await;
    }

    /// Adds the nodes whose adverts the first few told. One that did not answer is no loss.
    async fn add_others(&self, found: &mut Vec<Found>, told: Vec<Told>) {
        let mut known: BTreeSet<NodeId> = found.iter().map(|found| found.candidate.node).collect();
        for (skew_ms, answer) in told {
            let Response::Nodes(envelopes) = answer else { continue };
            for envelope in envelopes.iter() {
                let Ok((node, capacity)) = read_advert(envelope, &self.network) else { continue };
                let is_fresh = capacity.check(corrected(crate::now(), skew_ms), None).is_ok();
                if !is_fresh || node == self.net.local_node() || !known.insert(node) {
                    continue;
                }
                let addresses: Vec<_> = capacity.addresses.iter().filter_map(|a| a.parse().ok()).collect();
                if self.net.add_addresses(node, addresses.clone()).await.is_ok() {
                    let seen = self.store.experience(&node);
                    let candidate = Candidate { node, capacity, round_trip: None, seen };
                    found.push(Found { candidate, addresses, direct: false, skew_ms });
                }
            }
        }
    }

    /// The model that is meant: by id, by name, or the only one that is offered.
    ///
    /// # Errors
    /// `NoModel`, `UnknownModel`, `SeveralModels`.
    pub fn choose_model(&self, wanted: Option<&str>, found: &[Found]) -> Result<Model, SessionError> {
        let models = offered(found);
        let names = || models.values().cloned().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>();
        let model = |(id, name): (&ModelId, &String)| Model { id: *id, name: name.clone() };
        let Some(wanted) = wanted else {
            return match models.len() {
                1 => Ok(models.iter().map(model).next().expect("invariant: there is one")),
                0 => Err(SessionError::NoModel { reasons: other_models(found) }),
                _ => Err(SessionError::SeveralModels { known: names() }),
            };
        };
        let is_wanted = |(id, name): &(&ModelId, &String)| {
            *name == wanted
                || id.to_string() == wanted
                || (wanted.len() > 9 && id.to_string().starts_with(wanted))
        };
        let matching: Vec<Model> = models.iter().filter(is_wanted).map(model).collect();
        match &matching[..] {
            [only] => Ok(only.clone()),
            [] => {
                let known = names();
                let near = known.iter().min_by_key(|name| strsim::damerau_levenshtein(name, wanted));
                let near = near.filter(|name| strsim::damerau_levenshtein(name, wanted) <= 3).cloned();
                let (given, reasons) = (wanted.to_owned(), other_models(found));
                Err(SessionError::UnknownModel { given, known, nearest: near, reasons })
            }
            several => {
                let known = several.iter().map(|model| format!("{} ({})", model.id, model.name)).collect();
                Err(SessionError::SeveralModels { known })
            }
        }
    }

    /// A model's manifest: from the store, or from a node that offers it. Its hash is the model's id.
    ///
    /// # Errors
    /// `NoManifest`.
    pub async fn manifest(&self, model: &Model, found: &[Found]) -> Result<ModelManifest, SessionError> {
        let blob: BlobId = model.id.as_blob();
        if let Some(manifest) =
            self.store.read_blob(&blob).ok().and_then(|bytes| ModelManifest::decode(&bytes, &model.id).ok())
        {
            return Ok(manifest);
        }
        let mut reason = "no node that was found offers it".to_owned();
        for found in found.iter().filter(|found| found.candidate.capacity.offer(&model.id).is_some()) {
            let node = found.candidate.node;
            match self.net.request(node, Request::Manifest(model.id)).await {
                Ok(Response::Manifest(bytes)) => match ModelManifest::decode(&bytes, &model.id) {
                    Ok(manifest) => {
                        self.store.insert_blob(&bytes)?;
                        return Ok(manifest);
                    }
                    Err(error) => reason = error.to_string(),
                },
                Ok(other) => reason = unexpected(node, "a question for a manifest", other).to_string(),
                Err(error) => reason = error.to_string(),
            }
        }
        Err(SessionError::NoManifest { model: model.name.clone(), reason })
    }
}

/// Every model that is offered, with the name that the first node gave it.
#[must_use]
fn offered(found: &[Found]) -> BTreeMap<ModelId, String> {
    let mut models = BTreeMap::new();
    for offer in found.iter().flat_map(|found| found.candidate.capacity.models.iter()) {
        models.entry(offer.model).or_insert_with(|| offer.name.to_string());
    }
    models
}

/// The next one; none if it does not come until then.
async fn next_until<S: futures::Stream + Unpin>(stream: &mut S, until: Option<Instant>) -> Option<S::Item> {
    match until {
        None => stream.next().await,
        Some(until) => tokio::time::timeout_at(until.into(), stream.next()).await.ok().flatten(),
    }
}

/// What each node serves instead.
fn other_models(found: &[Found]) -> Vec<Declined> {
    let declined = |found: &Found| {
        let Candidate { node, capacity, .. } = &found.candidate;
        let models = capacity.models.iter().map(|offer| offer.name.to_string()).collect();
        Declined { node: *node, name: capacity.name.to_string(), why: Why::OtherModels(models) }
    };
    found.iter().map(declined).collect()
}

fn targets(ways: &[Way]) -> Vec<Target> {
    let mut targets: Vec<Target> = Vec::new();
    for way in ways {
        let Some(nodes) = way.nodes() else {
            if let Way::Address(addr) = way {
                targets.push(Target { label: addr.to_string(), node: None, addresses: vec![addr.clone()] });
            }
            continue;
        };
        for (node, addresses) in nodes {
            match targets.iter_mut().find(|target| target.node == Some(node)) {
                Some(target) => target.addresses.extend(addresses),
                None => targets.push(Target { label: node.to_string(), node: Some(node), addresses }),
            }
        }
    }
    targets.truncate(MAX_TARGETS);
    targets
}

/// What a node answered that is no answer to the question, as an error.
pub(super) fn unexpected(node: NodeId, asked: &'static str, response: Response) -> SessionError {
    match response {
        Response::Refused(refusal) => SessionError::Refused { node, refusal: Box::new(refusal) },
        Response::Error { code, text } => {
            SessionError::Unexpected { node, asked, given: format!("with an error ({code}): {text}") }
        }
        other => SessionError::Unexpected { node, asked, given: format!("with {}", other.name()) },
    }
}

//! Many nodes and clients in virtual time: the real scheduler and the real routing, with a network made of numbers.
//!
//! One seed gives one run. Messages have the bytes of the real ones ([`sizes`]); a lost one comes later, as a reliable
//! transport makes it. What gossip costs is counted on a random mesh ([`mesh`]). Nodes know of their own speed only what
//! they measured ([`node`]).
//!
//! # Adverts in slices
//!
//! Adverts to everybody cost every node bytes in proportion to the network. So in a network of more than
//! [`SLICE_AT_MOST`] nodes they go to a slice only: the nodes whose keys begin with the same bits. What runs here is the
//! answer to `FindNodes` as nodes give it: from the adverts of the slice, half of it being those with the shortest wait,
//! and where few of the slice serve the model, from two nodes that the DHT names for it.
//!
//! Changes of depth are not simulated (`node/src/run/slices.rs` tests them): it is what the number of nodes makes it. A
//! question to the DHT is three hops of time the first time; its bytes are not counted. Nor is what a slice costs beside
//! its own adverts: while members move, the slice twice as large is heard too.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kinoflock_client::route::choice::Quoted;
use kinoflock_client::route::experience::{Experience, Fault};
use kinoflock_client::route::routing::{Routing, Step};
use kinoflock_client::route::{Candidate, Needs, rank};
use kinoflock_node::policy::{Class, Wanted};
use kinoflock_node::scheduler::{DeviceId, NetPrefix, NewJob, Origin};
use kinoflock_protocol::*;

use self::dice::Dice;
use self::node::{Lie, ROOM, SimNode, Started};
use self::report::{Fate, Report};
use self::scene::{Event, Promised, SimJob, id, model};
pub use self::scene::{Scene, depth};
use self::sizes::Sizes;

pub mod dice;
pub mod mesh;
pub mod node;
pub mod plan;
pub mod report;
mod scene;
pub mod sizes;

/// Seconds between two adverts of a node.
pub const ADVERT_EVERY: f64 = 30.0;
/// Most members of a slice.
pub const SLICE_AT_MOST: usize = 128;
/// Adverts in an answer.
const ANSWER: usize = limits::MAX_NODES;
/// With fewer adverts of a model than this, others are asked.
const ENOUGH: usize = ANSWER / 2;
/// How many of those that the DHT names are asked.
const NOTED_ASKED: usize = 2;
/// Seconds until who does not answer is given up.
const NO_ANSWER: f64 = 5.0;
/// Seconds by which a lost message comes later.
const AGAIN: f64 = 0.25;
/// Seconds between the jobs of one artist that is lost with a node and its noticing.
const NOTICED: f64 = 5.0;
/// Time of the run at which nodes have advertised and jobs begin, in seconds.
const BEGIN: f64 = 30.0;

/// By which a message may take longer than the distance says, at most.
const JITTER: f64 = 1.2;

/// Seconds that a message takes at least between a client and a node.
#[must_use]
pub fn distance(client: usize, node: usize) -> f64 {
    Dice::new((client as u64) << 32 | node as u64).between(0.005, 0.08)
}

/// A run.
pub struct Sim {
    scene: Scene,
    dice: Dice,
    base: Instant,
    now: Instant,
    events: BTreeMap<(Instant, u64), Event>,
    count: u64,
    nodes: Vec<SimNode>,
    jobs: Vec<SimJob>,
    seen: BTreeMap<(usize, usize), Experience>,
    contacts: BTreeMap<(usize, usize), ()>,
    sizes: Sizes,
    left: usize,
}

/// Runs a scene to its end.
#[must_use]
pub fn run(scene: Scene) -> Report {
    let mut sim = Sim::new(scene);
    let end = sim.base + Duration::from_secs_f64(BEGIN + scene.over + 1_200.0);
    while let Some(((at, _), event)) = sim.events.pop_first() {
        if at > end || sim.left == 0 {
            break;
        }
        sim.now = at;
        sim.handle(event);
    }
    sim.report()
}

impl Sim {
    fn new(scene: Scene) -> Self {
        let mut dice = Dice::new(scene.seed);
        let base = Instant::now();
        let lie = |number: usize| {
            let lies = (number as f64 * 0.618_034).fract() < scene.liars;
            lies.then_some(if number.is_multiple_of(2) { Lie::Overstates } else { Lie::NeverDone })
        };
        let nodes = (0..scene.nodes)
            .map(|n| SimNode::new(model(n % scene.models), lie(n), &scene, &mut dice))
            .collect();
        let sizes = Sizes::measure(model(0));
        let (events, count, left) = (BTreeMap::new(), 0, scene.jobs);
        let (seen, contacts) = (BTreeMap::new(), BTreeMap::new());
        let jobs = Vec::new();
        let mut sim =
            Self { scene, dice, base, now: base, events, count, nodes, jobs, seen, contacts, sizes, left };
        sim.plan_nodes();
        sim.plan_jobs();
        sim
    }

    fn after(&mut self, seconds: f64, event: Event) {
        self.count += 1;
        self.events.insert((self.now + Duration::from_secs_f64(seconds.max(0.0)), self.count), event);
    }

    /// Seconds from one end to the other; more if messages are lost on the way.
    fn way(&mut self, job: usize, node: usize) -> f64 {
        let far = distance(self.jobs[job].client, node);
        let mut way = far * self.dice.between(1.0, JITTER);
        while self.dice.chance(self.scene.loss) {
            way += AGAIN;
        }
        way
    }

    fn reaches(&self, job: usize, node: usize) -> bool {
        let middle = BEGIN + self.scene.over / 2.0;
        let time = (self.now - self.base).as_secs_f64();
        let apart = self.scene.partition && (middle..middle + 20.0).contains(&time);
        self.nodes[node].is_up && !(apart && (self.jobs[job].client + node) % 2 == 1)
    }

    fn unix(&self) -> UnixMillis {
        UnixMillis((1 << 40) + (self.now - self.base).as_millis() as u64)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Advert(node) => {
                if self.nodes[node].is_up {
                    self.nodes[node].advertise(self.now);
                }
                self.after(self.scene.advert_every, Event::Advert(node));
            }
            Event::Down(node) => self.down(node),
            Event::Up(node) => self.nodes[node].join(),
            Event::Timer(node) => {
                self.nodes[node].timer = None;
                self.nodes[node].scheduler.handle_timeout(self.now);
                self.settle(node);
            }
            Event::Mark { node, job, start, done } => {
                if self.nodes[node].starts == start {
                    let id = JobId::from_bytes(id(job));
                    self.nodes[node].scheduler.handle_progress(DeviceId(0), &id, done, self.now);
                    self.settle(node);
                }
            }
            Event::Finish { node, job, start, took } => self.finish(node, job, start, took),
            Event::Find(job) => self.find(job),
            Event::Found { job, nodes } => self.found(job, &nodes),
            Event::Quote { job, index, token } => self.quote(job, index, token),
            Event::Promise { job, index, token, promise } => self.promise(job, index, token, promise),
            Event::Order { job, index, token, lease } => self.order(job, index, token, lease),
            Event::Answer { job, index, token, until } => self.answer(job, index, token, until),
            Event::Release { node, lease } => {
                self.nodes[node].scheduler.handle_release(&lease);
            }
            Event::Late { job, index, token } => {
                if self.jobs[job].pending.get(&index) == Some(&token) {
                    self.no(job, index, false);
                }
            }
            Event::Poll(job) => self.poll(job),
            Event::Check { job, moved, fault } => self.check(job, moved, fault),
            Event::Cancel(job) => self.cancel(job),
        }
    }

    /// Carries out what a node's scheduler decided.
    fn settle(&mut self, node: usize) {
        let started = self.nodes[node].drain(&mut self.dice, self.now);
        for Started { job, start, takes } in started {
            let Some(took) = takes else { continue };
            let job = u64::from_be_bytes(job.as_bytes()[..8].try_into().expect("8 bytes")) as usize;
            for tenth in 1..10 {
                let at = (took - self.nodes[node].overhead) * f64::from(tenth) / 10.0;
                self.after(at, Event::Mark { node, job, start, done: tenth * 100 });
            }
            self.after(took, Event::Finish { node, job, start, took });
        }
        if let Some(at) = self.nodes[node].scheduler.poll_timeout()
            && self.nodes[node].timer.is_none_or(|timer| at < timer)
        {
            self.nodes[node].timer = Some(at);
            self.after(at.saturating_duration_since(self.now).as_secs_f64(), Event::Timer(node));
        }
    }

    fn down(&mut self, node: usize) {
        self.nodes[node].leave();
        for job in 0..self.jobs.len() {
            if self.jobs[job].at == Some(node) && self.jobs[job].fate.done_at.is_none() {
                let moved = self.jobs[job].fate.moved;
                self.after(NOTICED, Event::Check { job, moved, fault: Fault::OutOfReach });
            }
        }
    }

    fn finish(&mut self, node: usize, job: usize, start: u64, took: f64) {
        if self.nodes[node].starts != start {
            return;
        }
        self.nodes[node].finish(&JobId::from_bytes(id(job)), took, self.now);
        self.settle(node);
        let (unix, begin) = (self.unix(), self.base);
        let entry = &mut self.jobs[job];
        if entry.at != Some(node) || entry.fate.done_at.is_some() || entry.fate.cancelled {
            return;
        }
        entry.fate.done_at = Some((self.now - begin).as_secs_f64() - BEGIN);
        let took = entry.accepted.map_or(Duration::ZERO, |accepted| self.now - accepted);
        entry.fate.took = took.as_secs_f64();
        let told = Millis((entry.fate.told * 1000.0) as u64);
        self.seen.entry((entry.client, node)).or_default().done(told, Millis::from(took), unix);
        self.left -= 1;
    }

    fn cost(&mut self, job: usize, bytes: usize) {
        let fate = &mut self.jobs[job].fate;
        if fate.routed == 0.0 {
            fate.bytes += bytes;
            fate.messages += 1;
        }
    }

    fn trip(&mut self, job: usize) {
        let fate = &mut self.jobs[job].fate;
        if fate.routed == 0.0 {
            fate.trips += 1;
        }
    }

    /// Asks any node for others; one that does not serve the model asks one that does.
    fn find(&mut self, job: usize) {
        let contact = self.dice.below(self.nodes.len());
        self.trip(job);
        // For its own advert, and for those it knows.
        self.cost(job, self.sizes.find);
        self.cost(job, self.sizes.ask);
        if !self.reaches(job, contact) {
            return self.after(NO_ANSWER, Event::Find(job));
        }
        let mut way = self.way(job, contact) + self.way(job, contact);
        let wanted = self.jobs[job].wanted.model;
        let number = (0..self.scene.models).find(|n| model(*n) == wanted).unwrap_or_default();
        let mut nodes = self.table(contact, wanted);
        if nodes.len() < ENOUGH && depth(self.scene.nodes) > 0 {
            // Three hops of the DHT the first time, the noted ones after.
            let hops = if self.contacts.insert((contact, number), ()).is_none() { 3 } else { 0 };
            for _ in 0..NOTED_ASKED {
                let members = self.scene.nodes.div_ceil(self.scene.models);
                let noted = self.dice.below(members) * self.scene.models + number;
                nodes.extend(self.table(noted.min(self.scene.nodes - 1), wanted));
            }
            let mut seen = BTreeSet::new();
            nodes.retain(|node| seen.insert(*node));
            nodes.truncate(ANSWER);
            way += (0..=hops).map(|_| self.dice.between(0.01, 0.16)).sum::<f64>();
        }
        let bytes = 120 + nodes.len() * self.sizes.nodes / ANSWER;
        self.cost(job, bytes);
        self.cost(job, self.sizes.advert);
        self.after(way, Event::Found { job, nodes });
    }

    /// What a node answers from its slice's table: half by the shortest wait, half drawn.
    fn table(&mut self, asked: usize, wanted: ModelId) -> Vec<usize> {
        let slices = 1_usize << depth(self.scene.nodes);
        // Models go round with the number of a node, and slices must not go round with them.
        let slice = |node: usize| (node / self.scene.models) % slices;
        let of_slice = (0..self.scene.nodes).filter(|node| slice(*node) == slice(asked));
        let of: Vec<usize> = of_slice.filter(|node| self.nodes[*node].model == wanted).collect();
        let now = self.now;
        let life = Duration::from_millis(limits::ADVERT_LIFE_MS);
        let wait = |node: &usize| {
            let (at, advert) = self.nodes[*node].advert.as_ref()?;
            (now - *at < life).then_some(advert.queue.wait)
        };
        let mut known: Vec<(Millis, u64, usize)> =
            of.into_iter().filter_map(|node| Some((wait(&node)?, 0, node))).collect();
        for entry in &mut known {
            entry.1 = self.dice.bits();
        }
        known.sort_unstable();
        let mut answer: Vec<usize> = known.drain(..known.len().min(ANSWER / 2)).map(|(.., n)| n).collect();
        known.sort_unstable_by_key(|(_, drawn, _)| *drawn);
        answer.extend(known.iter().take(ANSWER / 2).map(|(.., node)| *node));
        answer
    }

    fn needs(&self, job: usize) -> Needs {
        let Wanted { model, shape, work, .. } = self.jobs[job].wanted;
        Needs { model, shape, work, input_bytes: 0, require_terms: false }
    }

    fn found(&mut self, job: usize, nodes: &[usize]) {
        let client = self.jobs[job].client;
        let candidate = |node: &usize| {
            let capacity = self.nodes[*node].advert.clone()?.1;
            let seen = self.seen.get(&(client, *node)).copied().unwrap_or_default();
            let candidate =
                Candidate { node: NodeId::from_bytes(id(*node)), capacity, round_trip: None, seen };
            Some((*node, candidate))
        };
        let candidates: Vec<_> = nodes.iter().filter_map(candidate).collect();
        let listed: Vec<_> = candidates.iter().map(|(_, candidate)| candidate.clone()).collect();
        let (ranked, _) = rank(&listed, &self.needs(job), self.unix());
        let routing = Routing::new(ranked, self.dice.bits(), self.now);
        let entry = &mut self.jobs[job];
        (entry.candidates, entry.routing) = (candidates, Some(routing));
        self.poll(job);
    }

    fn poll(&mut self, job: usize) {
        if self.jobs[job].fate.cancelled {
            return;
        }
        let Some(routing) = self.jobs[job].routing.as_mut() else { return };
        match routing.poll(self.now) {
            Step::Ask(few) => {
                self.trip(job);
                few.iter().for_each(|ranked| self.send(job, ranked.index, None));
            }
            Step::Order(best) => {
                self.trip(job);
                let lease = self.jobs[job].leases.get(&best.index).copied();
                self.send(job, best.index, lease);
            }
            Step::Release(places) => {
                for (place, _) in places {
                    let lease = self.jobs[job].leases.remove(&place.index);
                    self.release(job, place.index, lease);
                }
                self.poll(job);
            }
            Step::Wait(at) => {
                self.after(at.saturating_duration_since(self.now).as_secs_f64(), Event::Poll(job));
            }
            Step::GiveUp => self.after(NO_ANSWER, Event::Find(job)),
            Step::Idle => {}
        }
    }

    /// Sends a question for a quote, or an order under a lease.
    fn send(&mut self, job: usize, index: usize, lease: Option<LeaseId>) {
        self.count += 1;
        let token = self.count;
        let node = self.jobs[job].candidates[index].0;
        self.jobs[job].pending.insert(index, token);
        self.cost(job, if lease.is_some() { self.sizes.submit } else { self.sizes.quote });
        let way = self.way(job, node);
        self.after(NO_ANSWER, Event::Late { job, index, token });
        self.after(
            way,
            match lease {
                Some(lease) => Event::Order { job, index, token, lease },
                None => Event::Quote { job, index, token },
            },
        );
    }

    fn origin(&self, job: usize) -> Origin {
        let client = self.jobs[job].client;
        let prefix = NetPrefix::V4([10 + (client >> 16) as u8, (client >> 8) as u8, client as u8]);
        Origin { requester: RequesterId::from_bytes(id(client)), class: Class::Public, prefix }
    }

    fn quote(&mut self, job: usize, index: usize, token: u64) {
        let node = self.jobs[job].candidates[index].0;
        if !self.reaches(job, node) {
            return;
        }
        let (origin, wanted, now) = (self.origin(job), self.jobs[job].wanted, self.now);
        let promise = self.nodes[node].scheduler.handle_quote(origin, wanted, ROOM, now);
        self.settle(node);
        let promise = match promise {
            Ok(promise) => {
                let until = promise.eta.map_or(now, |times| times.finishes);
                Ok((promise.lease, (promise.position, self.nodes[node].said(Millis::from(until - now)))))
            }
            Err(refusal) => Err(is_momentary(&refusal)),
        };
        let way = self.way(job, node);
        self.after(way, Event::Promise { job, index, token, promise });
    }

    fn promise(&mut self, job: usize, index: usize, token: u64, promise: Result<Promised, bool>) {
        if self.jobs[job].pending.get(&index) != Some(&token) {
            return;
        }
        self.cost(job, if promise.is_ok() { self.sizes.promise } else { self.sizes.refused });
        match promise {
            Ok((lease, promise)) => {
                let (needs, unix) = (self.needs(job), self.unix());
                let entry = &mut self.jobs[job];
                entry.pending.remove(&index);
                entry.leases.insert(index, lease);
                let quoted = Quoted::new(index, &entry.candidates[index].1, promise, &needs, unix);
                if let Some(routing) = entry.routing.as_mut() {
                    routing.handle_quote(quoted);
                }
                self.poll(job);
            }
            Err(is_momentary) => self.no(job, index, is_momentary),
        }
    }

    fn no(&mut self, job: usize, index: usize, is_momentary: bool) {
        let entry = &mut self.jobs[job];
        entry.pending.remove(&index);
        if let Some(routing) = entry.routing.as_mut() {
            routing.handle_no(index, is_momentary);
        }
        self.poll(job);
    }

    fn order(&mut self, job: usize, index: usize, token: u64, lease: LeaseId) {
        let node = self.jobs[job].candidates[index].0;
        if !self.reaches(job, node) {
            return;
        }
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&(job as u64).to_be_bytes());
        let new = NewJob {
            job: JobId::from_bytes(id(job)),
            nonce: Nonce::from_bytes(nonce),
            origin: self.origin(job),
            wanted: self.jobs[job].wanted,
            lease,
            deadline: None,
            needs_inputs: false,
        };
        let until = self.nodes[node].order(&new, self.now);
        self.settle(node);
        let until = match until {
            Ok(Some(until)) => {
                let said = self.nodes[node].said(Millis::from(until - self.now));
                self.jobs[job].accepted = Some(self.now);
                Ok(self.now + Duration::from(said))
            }
            Ok(None) => Err(false),
            Err(refusal) => Err(is_momentary(&refusal)),
        };
        let way = self.way(job, node);
        self.after(way, Event::Answer { job, index, token, until });
    }

    fn answer(&mut self, job: usize, index: usize, token: u64, until: Result<Instant, bool>) {
        if self.jobs[job].pending.get(&index) != Some(&token) {
            return;
        }
        self.cost(job, if until.is_ok() { self.sizes.accepted } else { self.sizes.refused });
        let until = match until {
            Ok(until) => until,
            Err(is_momentary) => return self.no(job, index, is_momentary),
        };
        let (now, node) = (self.now, self.jobs[job].candidates[index].0);
        let entry = &mut self.jobs[job];
        entry.pending.clear();
        entry.at = Some(node);
        let accepted = entry.accepted.unwrap_or(now);
        let told = until.saturating_duration_since(accepted).as_secs_f64();
        if entry.fate.moved == 0 {
            entry.fate.told = told;
            entry.fate.lied_to = self.nodes[node].lie.is_some();
        }
        if entry.fate.routed == 0.0 {
            entry.fate.routed = (now - entry.arrives).as_secs_f64();
        }
        let others = entry.routing.take().map(|mut routing| routing.handle_taken(index)).unwrap_or_default();
        let mut leases = std::mem::take(&mut entry.leases);
        let moved = entry.fate.moved;
        for (other, _) in others {
            self.release(job, other.index, leases.remove(&other.index));
        }
        self.after(told * 3.0 + 30.0, Event::Check { job, moved, fault: Fault::Stalled });
    }

    fn release(&mut self, job: usize, index: usize, lease: Option<LeaseId>) {
        let node = self.jobs[job].candidates[index].0;
        self.cost(job, self.sizes.release);
        let way = self.way(job, node);
        if let Some(lease) = lease.filter(|_| self.reaches(job, node)) {
            self.after(way, Event::Release { node, lease });
        }
    }

    /// The artist's machine looks whether a job got on where it is, and takes it elsewhere if not.
    fn check(&mut self, job: usize, moved: u32, fault: Fault) {
        let unix = self.unix();
        let entry = &mut self.jobs[job];
        let fate = &mut entry.fate;
        let Some(node) = entry.at.filter(|_| fate.moved == moved && fate.done_at.is_none()) else { return };
        if fate.cancelled {
            return;
        }
        (fate.moved, entry.at) = (moved + 1, None);
        self.seen.entry((entry.client, node)).or_default().fault(fault, unix);
        self.stop(job, node);
        self.find(job);
    }

    fn cancel(&mut self, job: usize) {
        let fate = &mut self.jobs[job].fate;
        if fate.done_at.is_some() || fate.cancelled {
            return;
        }
        fate.cancelled = true;
        self.left -= 1;
        if let Some(node) = self.jobs[job].at {
            self.stop(job, node);
        }
    }

    fn stop(&mut self, job: usize, node: usize) {
        if self.nodes[node].is_up {
            let (origin, id) = (self.origin(job), JobId::from_bytes(id(job)));
            // One that it does not know needs no stop.
            let _ = self.nodes[node].scheduler.handle_cancel(&id, &origin.requester, self.now);
            self.settle(node);
            self.settle(node);
        }
    }

    fn report(&self) -> Report {
        let Scene { nodes, seed, .. } = self.scene;
        let slice = nodes.div_ceil(1 << depth(nodes));
        let bytes =
            |members| mesh::bytes_per_second(members, self.sizes.advert, self.scene.advert_every, seed);
        let fates: Vec<Fate> = self.jobs.iter().map(|job| job.fate).collect();
        let honest: Vec<_> = self.nodes.iter().filter(|node| node.lie.is_none()).collect();
        let speeds: Vec<_> = honest.iter().map(|node| (0.0, node.speed, node.overhead)).collect();
        let works = self.jobs.iter().map(|job| job.wanted.work.0 as f64).collect();
        let slowest = fates.iter().filter_map(|fate| fate.done_at).fold(0.0, f64::max);
        Report {
            nodes,
            jobs: fates,
            advert_bytes: bytes(slice),
            advert_bytes_to_all: bytes(nodes),
            slice,
            over_best: slowest / report::best(works, &speeds).max(self.scene.over),
        }
    }
}

fn is_momentary(refusal: &Refusal) -> bool {
    kinoflock_client::route::Why::Refused(refusal.clone()).is_momentary()
}

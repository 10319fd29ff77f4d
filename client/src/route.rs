//! Which node to ask first, and why others cannot take the job. Sans-IO: adverts in, an order and reasons out.
//!
//! Nodes are ranked by when the clip is to be expected: the queue they told, the work at their measured speed, the round
//! trip, and what was seen of them before ([`experience`]). [`turn`] says who is asked first. What a node's advert already
//! rules out is not asked, and the reason is kept for the artist. Whom a node serves is not guessed from its advert: the
//! key may be on its list, and only its quote tells.

use std::fmt;

use kinoflock_protocol::capacity::{Capacity, NodeState, Terms};
use kinoflock_protocol::limits::JOB_LIFE_MS;
use kinoflock_protocol::{
    CollectiveId, EnvelopeError, JobShape, Millis, ModelId, NetworkId, NodeId, UnixMillis, Work,
};
use kinoflock_protocol::{Envelope, Refusal};

pub mod advice;
pub mod choice;
pub mod experience;
pub mod routing;
pub mod turn;

use experience::Experience;

/// Speed that is assumed of a node that tells none, in work units a second.
const UNKNOWN_SPEED: u64 = 1;
/// Bytes of inputs that an artist's line is assumed to send in a second: 10 Mbit/s.
const ASSUMED_UPLOAD: u64 = 1_250_000;

/// A node and its advert, whose signature was checked.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Which node.
    pub node: NodeId,
    /// What it says of itself.
    pub capacity: Capacity,
    /// Round trip, if it was measured.
    pub round_trip: Option<Millis>,
    /// What was seen of it before.
    pub seen: Experience,
}

/// What a job needs of a node.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// Which model.
    pub model: ModelId,
    /// Frames, size, steps, guidance.
    pub shape: JobShape,
    /// What it costs.
    pub work: Work,
    /// Bytes of inputs.
    pub input_bytes: u64,
    /// Whether only nodes will do that neither train on what they see nor claim rights, and keep nothing beyond a
    /// week.
    pub require_terms: bool,
}

/// A node that could take the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranked {
    /// Place in the list of candidates.
    pub index: usize,
    /// Which node.
    pub node: NodeId,
    /// When the clip would be there, by the advert.
    pub finish: Millis,
    /// What the nodes are ordered by; see [`cost`].
    pub cost: u64,
    /// Whether no job of ours was ever seen to its end there.
    pub is_new: bool,
    /// Whether it did wrong a moment ago.
    pub is_avoided: bool,
    /// Whether it serves the artist's own collective, if such are to be asked first; see [`own_first`].
    pub is_own: bool,
}

/// Why a node cannot take the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declined {
    /// Which node.
    pub node: NodeId,
    /// The name that it gave itself.
    pub name: String,
    /// Why.
    pub why: Why,
}

/// Why a node cannot take the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// It serves other models.
    OtherModels(Vec<String>),
    /// It takes no jobs now.
    Closed(&'static str),
    /// Beyond its limits.
    TooLarge {
        /// Which limit.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// What the job has.
        given: u64,
    },
    /// Its terms are not those that were required.
    Terms(String),
    /// It said no when asked.
    Refused(Refusal),
    /// It could not be asked.
    Failed(String),
}

impl Why {
    /// Whether an operator's or node's rule stands against the job, as opposed to a node that has no such model or
    /// is out of reach.
    #[must_use]
    pub fn is_policy(&self) -> bool {
        match self {
            Self::TooLarge { .. } | Self::Terms(_) => true,
            Self::Refused(refusal) => refusal.reason != kinoflock_protocol::Reason::ModelNotServed,
            Self::OtherModels(_) | Self::Closed(_) | Self::Failed(_) => false,
        }
    }

    /// Whether the same node may take the same job within seconds: other jobs of the same artist hold its places now,
    /// or its lease ended before the order came.
    #[must_use]
    pub fn is_momentary(&self) -> bool {
        use kinoflock_protocol::Reason::{LeaseExpired, LeaseUnknown, TooManyLeases};
        matches!(self, Self::Refused(Refusal { reason: TooManyLeases | LeaseUnknown | LeaseExpired, .. }))
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherModels(models) if models.is_empty() => f.write_str("serves no model now"),
            Self::OtherModels(models) => write!(f, "serves {} only", models.join(", ")),
            Self::Closed(state) => f.write_str(state),
            Self::TooLarge { what, limit, given } => {
                write!(f, "takes at most {limit} {what}, this job has {given}")
            }
            Self::Terms(terms) => write!(f, "its terms are not those you require: {terms}"),
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Failed(error) => f.write_str(error),
        }
    }
}

impl fmt::Display for Declined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}: {}", called(&self.name, &self.node), self.why)
    }
}

/// A node as people call it: by the name that it gave itself, if any, and the end of its id.
#[must_use]
pub fn called(name: &str, node: &NodeId) -> String {
    if name.is_empty() { format!("...{}", node.short()) } else { format!("{name} (...{})", node.short()) }
}

/// Checks an advert's signature and gives its node.
///
/// # Errors
/// When the envelope is refused.
pub fn read_advert(envelope: &Envelope, network: &NetworkId) -> Result<(NodeId, Capacity), EnvelopeError> {
    let opened = envelope.open::<Capacity>(network)?;
    Ok((opened.signer.into(), opened.value))
}

/// Those who could take the job, the most promising first, and why the others cannot.
#[must_use]
pub fn rank(candidates: &[Candidate], needs: &Needs, now: UnixMillis) -> (Vec<Ranked>, Vec<Declined>) {
    let (mut fit, mut unfit) = (Vec::new(), Vec::new());
    for (index, candidate) in candidates.iter().enumerate() {
        let Candidate { node, capacity, .. } = candidate;
        match unfit_for(capacity, needs) {
            None => {
                let finish = finish(candidate, needs);
                let (is_avoided, cost) = cost(&candidate.seen, finish, now);
                let is_new = candidate.seen.is_new();
                fit.push(Ranked { index, node: *node, finish, cost, is_new, is_avoided, is_own: false });
            }
            Some(why) => unfit.push(Declined { node: *node, name: capacity.name.to_string(), why }),
        }
    }
    fit.sort_by_key(|ranked| (ranked.is_avoided, ranked.cost, ranked.node));
    (fit, unfit)
}

/// Puts the nodes that serve one of these collectives before all others that did no wrong. Without any, nothing changes.
pub fn own_first(ranked: &mut [Ranked], candidates: &[Candidate], own: &[CollectiveId]) {
    for node in ranked.iter_mut() {
        let serves =
            |candidate: &Candidate| own.iter().any(|id| candidate.capacity.serves.collectives.contains(id));
        node.is_own = candidates.get(node.index).is_some_and(serves);
    }
    ranked.sort_by_key(|node| (node.is_avoided, !node.is_own, node.cost, node.node));
}

/// How long the inputs are on their way to any node.
#[must_use]
pub fn transfer(needs: &Needs) -> Millis {
    Millis(needs.input_bytes.saturating_mul(1000) / ASSUMED_UPLOAD)
}

/// What a promise of this node is worth: whether it did wrong a moment ago, and the time in milliseconds after which the
/// clip is to be expected, by how true its times were and how often its jobs ended well. Less is better.
#[must_use]
pub fn cost(seen: &Experience, promised: Millis, now: UnixMillis) -> (bool, u64) {
    let expected = promised.0 as f64 * seen.time_factor(now) / seen.reliability(now);
    (seen.is_avoided(now), expected as u64)
}

fn finish(candidate: &Candidate, needs: &Needs) -> Millis {
    let speed = candidate.capacity.offer(&needs.model).map_or(UNKNOWN_SPEED, |offer| offer.speed);
    let compute = needs.work.millis_at(speed.max(UNKNOWN_SPEED));
    let round_trip = candidate.round_trip.unwrap_or_default();
    let wait = candidate.capacity.queue.wait;
    // Inputs are fetched while others run.
    let starts = wait.0.max(transfer(needs).0);
    Millis(starts.saturating_add(compute.0).saturating_add(round_trip.0))
}

fn unfit_for(capacity: &Capacity, needs: &Needs) -> Option<Why> {
    if capacity.offer(&needs.model).is_none() {
        let names = capacity.models.iter().map(|offer| offer.name.to_string()).collect();
        return Some(Why::OtherModels(names));
    }
    match capacity.state {
        NodeState::Open => {}
        NodeState::Paused => return Some(Why::Closed("is paused by its operator")),
        NodeState::Draining => return Some(Why::Closed("is about to stop and takes no new jobs")),
    }
    if let Some(terms) = unwanted(&capacity.terms).filter(|_| needs.require_terms) {
        return Some(Why::Terms(terms));
    }
    beyond(capacity, needs)
}

fn beyond(capacity: &Capacity, needs: &Needs) -> Option<Why> {
    let (limits, shape) = (&capacity.limits, &needs.shape);
    let checks = [
        ("frames", u64::from(limits.max_frames), u64::from(shape.frames)),
        ("pixels of width", limits.max_width.into(), shape.width.into()),
        ("pixels of height", limits.max_height.into(), shape.height.into()),
        ("steps", limits.max_steps.into(), shape.steps.into()),
        ("units of work", limits.max_work.0, needs.work.0),
        ("bytes of inputs", limits.max_input_bytes, needs.input_bytes),
    ];
    let over = checks.into_iter().find(|(_, limit, given)| *limit > 0 && given > limit);
    if let Some((what, limit, given)) = over {
        return Some(Why::TooLarge { what, limit, given });
    }
    let (limit, given) = (u64::from(limits.max_queue), u64::from(capacity.queue.jobs));
    (limit > 0 && given >= limit).then_some(Why::Closed("has a full queue"))
}

fn unwanted(terms: &Terms) -> Option<String> {
    let week = Millis(JOB_LIFE_MS);
    let kept = [terms.keeps_prompts, terms.keeps_clips, terms.keeps_latents, terms.keeps_unacknowledged];
    if terms.trains_on_them {
        return Some("it may train on what it sees".to_owned());
    }
    if terms.claims_rights {
        return Some("it claims rights in what it makes".to_owned());
    }
    let longest = kept.into_iter().max().unwrap_or_default();
    (longest > week).then(|| format!("it keeps what it sees for {longest}, more than {week}"))
}

/// A node's terms as a sentence for people.
#[must_use]
pub fn terms_sentence(terms: &Terms) -> String {
    let kept = terms.keeps_prompts.max(terms.keeps_clips).max(terms.keeps_latents);
    let after = if kept.0 == 0 {
        "deletes them once you have the clip".to_owned()
    } else {
        format!("keeps them for {kept} after you have the clip")
    };
    let latest = terms.keeps_unacknowledged;
    let training = if terms.trains_on_them { "may train on them" } else { "does not train on them" };
    let rights = if terms.claims_rights { "claims rights in them" } else { "claims no rights" };
    let note = if terms.note.is_empty() { String::new() } else { format!("; \"{}\"", &*terms.note) };
    format!("it says that it {after} (after {latest} at the latest), {training}, {rights}{note}")
}

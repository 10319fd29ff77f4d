//! What is simulated, and what is under way in it.

use std::collections::BTreeMap;
use std::time::Instant;

use kinoflock_client::route::Candidate;
use kinoflock_client::route::experience::Fault;
use kinoflock_client::route::routing::Routing;
use kinoflock_node::policy::Wanted;
use kinoflock_protocol::{LeaseId, Millis, ModelId};

use super::report::Fate;
use super::{ADVERT_EVERY, SLICE_AT_MOST};

/// What is simulated.
#[derive(Debug, Clone, Copy)]
pub struct Scene {
    /// Nodes.
    pub nodes: usize,
    /// Models, each node serving one.
    pub models: usize,
    /// Jobs.
    pub jobs: usize,
    /// Seconds over which they come; zero for all at once.
    pub over: f64,
    /// Chance that a message is lost and sent again.
    pub loss: f64,
    /// Share of the nodes that leave for a minute.
    pub churn: f64,
    /// Share of the nodes that lie.
    pub liars: f64,
    /// Share of the jobs that are cancelled.
    pub cancels: f64,
    /// Whether half of the network cannot reach the other for some seconds.
    pub partition: bool,
    /// By which share a node's measured speed may differ from what it is.
    pub speed_error: f64,
    /// How long jobs are, and what each takes beside computing, beside the usual: 2 to 20 s on a node of middling speed.
    pub length: f64,
    /// Seconds between two adverts of a node.
    pub advert_every: f64,
    /// Jobs of one artist, where they do not all come at once.
    pub jobs_each: usize,
    /// Seed of everything.
    pub seed: u64,
}

impl Scene {
    /// A quiet one.
    #[must_use]
    pub const fn of(nodes: usize, models: usize, jobs: usize, over: f64) -> Self {
        Self {
            nodes,
            models,
            jobs,
            over,
            loss: 0.0,
            churn: 0.0,
            liars: 0.0,
            cancels: 0.0,
            partition: false,
            speed_error: 0.05,
            length: 1.0,
            advert_every: ADVERT_EVERY,
            jobs_each: 4,
            seed: 1,
        }
    }

    /// The same with everything that goes wrong.
    #[must_use]
    pub const fn rough(self) -> Self {
        Self { loss: 0.02, churn: 0.1, liars: 0.1, cancels: 0.05, partition: true, ..self }
    }
}

/// A node's promise: the lease, jobs and held places before it, and when the clip would be there.
pub(super) type Promised = (LeaseId, (u32, Millis));

/// What happens next.
#[derive(Debug)]
pub(super) enum Event {
    Advert(usize),
    Down(usize),
    Up(usize),
    Timer(usize),
    Mark { node: usize, job: usize, start: u64, done: u16 },
    Finish { node: usize, job: usize, start: u64, took: f64 },
    Find(usize),
    Found { job: usize, nodes: Vec<usize> },
    Quote { job: usize, index: usize, token: u64 },
    Promise { job: usize, index: usize, token: u64, promise: Result<Promised, bool> },
    Order { job: usize, index: usize, token: u64, lease: LeaseId },
    Answer { job: usize, index: usize, token: u64, until: Result<Instant, bool> },
    Release { node: usize, lease: LeaseId },
    Late { job: usize, index: usize, token: u64 },
    Poll(usize),
    Check { job: usize, moved: u32, fault: Fault },
    Cancel(usize),
}

/// A job on its way.
pub(super) struct SimJob {
    pub(super) client: usize,
    pub(super) wanted: Wanted,
    pub(super) arrives: Instant,
    pub(super) fate: Fate,
    pub(super) routing: Option<Routing>,
    pub(super) candidates: Vec<(usize, Candidate)>,
    pub(super) leases: BTreeMap<usize, LeaseId>,
    pub(super) pending: BTreeMap<usize, u64>,
    pub(super) at: Option<usize>,
    pub(super) accepted: Option<Instant>,
}

/// Bits of a node's key that name its slice, in a network of so many nodes.
#[must_use]
pub fn depth(members: usize) -> u32 {
    let mut depth = 0;
    while members >> depth > SLICE_AT_MOST {
        depth += 1;
    }
    depth
}

pub(super) fn model(number: usize) -> ModelId {
    ModelId::from_bytes([number as u8 + 1; 32])
}

pub(super) fn id(number: usize) -> [u8; 32] {
    let mut id = [1; 32];
    id[..8].copy_from_slice(&(number as u64).to_be_bytes());
    id
}

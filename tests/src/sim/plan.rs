//! What is to happen in a scene, drawn from its seed: for the simulator, and for real processes that do the same.

use std::collections::BTreeMap;
use std::time::Duration;

use kinoflock_node::memory::DeviceSet;
use kinoflock_node::policy::Wanted;
use kinoflock_protocol::Work;

use super::report::Fate;
use super::scene::{Event, Scene, SimJob, model};
use super::{BEGIN, Sim, sizes};

/// A scene's nodes and jobs, as the simulator would have them.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Work units a second of each node, in truth.
    pub speeds: Vec<f64>,
    /// Seconds that each job takes beside its work.
    pub overhead: f64,
    /// Seconds over which jobs come.
    pub over: f64,
    /// The jobs in the order in which they come.
    pub jobs: Vec<PlannedJob>,
}

/// A job that is to come.
#[derive(Debug, Clone, Copy)]
pub struct PlannedJob {
    /// Whose it is.
    pub client: usize,
    /// When it comes, after the beginning.
    pub at: Duration,
    /// What it costs, in work units.
    pub work: f64,
    /// When it is cancelled, after the beginning.
    pub cancelled_at: Option<Duration>,
}

/// What is to happen in this scene.
#[must_use]
pub fn plan(scene: Scene) -> Plan {
    let sim = Sim::new(scene);
    let since = |at: std::time::Instant| (at - sim.base).saturating_sub(Duration::from_secs_f64(BEGIN));
    let mut cancelled = BTreeMap::new();
    for ((at, _), event) in &sim.events {
        if let Event::Cancel(job) = event {
            cancelled.insert(*job, since(*at));
        }
    }
    let job = |(number, job): (usize, &SimJob)| PlannedJob {
        client: job.client,
        at: since(job.arrives),
        work: job.wanted.work.0 as f64,
        cancelled_at: cancelled.get(&number).copied(),
    };
    let mut jobs: Vec<_> = sim.jobs.iter().enumerate().map(job).collect();
    jobs.sort_by_key(|job| job.at);
    let overhead = sim.nodes.first().map_or(0.0, |node| node.overhead);
    Plan { speeds: sim.nodes.iter().map(|node| node.speed).collect(), overhead, over: scene.over, jobs }
}

impl Sim {
    pub(super) fn plan_nodes(&mut self) {
        for node in 0..self.scene.nodes {
            let first = self.dice.between(0.0, self.scene.advert_every);
            self.after(first, Event::Advert(node));
            if self.dice.chance(self.scene.churn) {
                let at = BEGIN + self.dice.between(0.0, self.scene.over.max(20.0));
                self.after(at, Event::Down(node));
                self.after(at + 60.0, Event::Up(node));
            }
        }
    }

    pub(super) fn plan_jobs(&mut self) {
        for number in 0..self.scene.jobs {
            let at = BEGIN + self.dice.between(0.0, self.scene.over.max(1e-6));
            let work = Work((self.dice.between(2.0, 20.0) * 1e6 * self.scene.length) as u64);
            let model = model(self.dice.below(self.scene.models));
            let arrives = self.base + Duration::from_secs_f64(at);
            self.jobs.push(SimJob {
                client: if self.scene.over == 0.0 { number } else { number / self.scene.jobs_each },
                wanted: Wanted { model, shape: sizes::shape(), work, unfit: DeviceSet::NONE },
                arrives,
                fate: Fate::default(),
                routing: None,
                candidates: Vec::new(),
                leases: BTreeMap::new(),
                pending: BTreeMap::new(),
                at: None,
                accepted: None,
            });
            self.after(at, Event::Find(number));
            if self.dice.chance(self.scene.cancels) {
                let at = at + self.dice.between(1.0, 30.0);
                self.after(at, Event::Cancel(number));
            }
        }
    }
}

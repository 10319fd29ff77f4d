//! The simulator's scenes with real processes: daemons with sleeping engines, and clients of this process that hand over the
//! planned jobs at their times. Between a client and a node lies the simulator's [`distance`], and each client is of a
//! network of its own.
//!
//! A sleeping engine takes for a job what the plan's node would: its steps sleep, and its decoding sleeps for the part
//! of the work that is no step, so that time is in proportion to work, as on a real device.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use kinoflock_client::ask::{Ask, Length};
use kinoflock_client::session::{Client, ClientOptions, Event};
use kinoflock_client::store::Store;
use kinoflock_client::ticket::Way;
use kinoflock_net::Multiaddr;
use kinoflock_node::models::ModelStore;
use kinoflock_protocol::work::{JobShape, work};
use kinoflock_protocol::{Keypair, Millis, UnixMillis};

use crate::distance::way;
use crate::requester::now;
use crate::sandbox::{Node, Sandbox, Worker, eventually};
use crate::sim::distance;
use crate::sim::plan::{Plan, PlannedJob};
use crate::sim::report::{Fate, Report, best};

/// Work units of the plan that are one step.
const UNIT: f64 = 0.2e6;
/// How long before a job its client begins to connect.
const AHEAD: Duration = Duration::from_secs(15);
/// Connections that it makes at once: handshakes with all nodes in one instant would be what is measured.
const CONNECTED_AT_ONCE: usize = 3;
/// What a client asks until a node has its job.
const ROUTING: [&str; 4] = ["capacity", "find_nodes", "quote", "submit"];

/// Daemons and clients for a plan.
#[derive(Debug)]
pub struct Rig {
    /// The daemons.
    pub sandbox: Sandbox,
    plan: Plan,
    clients: Vec<Client>,
    ways: Vec<Way>,
    /// For each client, the ways to the nodes.
    roads: Vec<Vec<Multiaddr>>,
    clip: Clip,
}

/// What every clip is like: as that of the self-test, since sleeping engines take no longer for larger ones.
#[derive(Debug, Clone, Copy)]
struct Clip {
    frames: u32,
    side: u32,
    /// Steps whose work is that of decoding and reading the prompt.
    rest: f64,
}

impl Rig {
    /// Starts the daemons, which hear of each other, and the clients, which know the first of them.
    ///
    /// # Panics
    /// When one does not start.
    pub async fn start(plan: Plan) -> Self {
        let mut sandbox = Sandbox::new();
        let clip = clip();
        for speed in &plan.speeds {
            let first = sandbox.nodes.first().map(|first| first.address("tcp"));
            let step = UNIT / speed * 1000.0;
            let decode = step * clip.rest + plan.overhead * 1000.0;
            let (step, decode) = (format!("{step:.0}"), format!("{decode:.0}"));
            let worker = Worker::test(&["--step-ms", &step, "--decode-ms", &decode]);
            let is_first = first.is_none();
            let node = sandbox.begin(&worker, "", |node| {
                node.log_only("warn");
                if let Some(first) = first {
                    node.set_network(&format!("bootstrap = [{first:?}]"));
                }
            });
            if is_first {
                node.ready();
            }
        }
        sandbox.nodes.iter_mut().for_each(Node::ready);
        for node in &sandbox.nodes {
            eventually("every node hears of every other", || {
                (node.known() + 1 >= plan.speeds.len()).then_some(())
            });
        }
        let ways = vec![sandbox.nodes[0].ticket().parse().expect("a ticket")];
        let count = plan.jobs.iter().map(|job| job.client + 1).max().unwrap_or_default();
        let (mut clients, mut roads) = (Vec::new(), Vec::new());
        for number in 0..count {
            clients.push(client(&sandbox, number).await);
            roads.push(ways_of(&sandbox, number).await);
        }
        Self { sandbox, plan, clients, ways, roads, clip }
    }

    /// Runs the plan to its end.
    ///
    /// # Panics
    /// When a job that is not cancelled does not end with a clip.
    pub async fn run(&self) -> Report {
        self.warm_up().await;
        let before = self.asked();
        let (begin, unix) = (Instant::now(), now());
        let jobs = self.plan.jobs.iter().map(|job| self.one(job, begin, unix));
        let mut fates = futures::future::join_all(jobs).await;
        let messages = 2 * (self.asked() - before) / (fates.len() as u64).max(1);
        for fate in &mut fates {
            fate.messages = u32::try_from(messages).unwrap_or(u32::MAX);
        }
        let slowest = fates.iter().filter_map(|fate| fate.done_at).fold(0.0, f64::max);
        let nodes: Vec<_> = self.plan.speeds.iter().map(|speed| (0.0, *speed, self.plan.overhead)).collect();
        let works = self.plan.jobs.iter().map(|job| job.work).collect();
        Report {
            nodes: nodes.len(),
            slice: nodes.len(),
            over_best: slowest / best(works, &nodes).max(self.plan.over),
            jobs: fates,
            ..Report::default()
        }
    }

    /// A look without a job: connections are made, and the model's manifest is at hand.
    async fn warm_up(&self) {
        for (number, client) in self.clients.iter().enumerate() {
            self.connect(number).await;
            let (events, _) = Client::events();
            let found = client.find(&self.ways, &events).await.expect("nodes are found");
            let model = client.choose_model(None, &found).expect("one model");
            client.manifest(&model, &found).await.expect("its manifest");
        }
    }

    /// Connects a client with every node, over the ways between them.
    async fn connect(&self, client: usize) {
        let net = self.clients[client].net();
        let there = net.peers().await.expect("the client runs");
        // By the road alone: a node's own addresses are nearer, and there all clients are of one network.
        let absent = self.sandbox.nodes.iter().zip(&self.roads[client]).filter(|(node, _)| {
            let node = node.local().node_id;
            !there.iter().any(|peer| peer.node == node)
        });
        let dials: Vec<_> = absent.map(|(_, road)| net.dial(road.clone())).collect();
        let mut dials = stream::iter(dials).buffer_unordered(CONNECTED_AT_ONCE);
        while let Some(connected) = dials.next().await {
            connected.expect("a node is reached");
        }
    }

    fn asked(&self) -> u64 {
        let of = |client: &Client| {
            let asked = client.net().asked();
            ROUTING.iter().filter_map(|name| asked.get(name)).sum::<u64>()
        };
        self.clients.iter().map(of).sum()
    }

    async fn one(&self, job: &PlannedJob, begin: Instant, unix: UnixMillis) -> Fate {
        let mut fate = Fate::default();
        let client = &self.clients[job.client];
        // Connections that were idle for long are closed.
        tokio::time::sleep_until((begin + job.at.saturating_sub(AHEAD)).into()).await;
        self.connect(job.client).await;
        tokio::time::sleep_until((begin + job.at).into()).await;
        let (events, mut told) = Client::events();
        let asked_at = Instant::now();
        // Who listens must not stop: a full channel would hold the job up.
        let (accepted, routed) = tokio::sync::oneshot::channel();
        let listener = tokio::spawn(async move {
            let mut accepted = Some(accepted);
            while let Some(event) = told.recv().await {
                if let Event::Accepted { .. } = event
                    && let Some(accepted) = accepted.take()
                {
                    // The run may be over.
                    let _ = accepted.send(asked_at.elapsed());
                }
            }
        });
        let record = client.submit(&self.ask(job), &self.ways, &events).await.expect("somebody takes it");
        fate.routed = routed.await.expect("it was accepted").as_secs_f64();
        fate.told = seconds(record.told.unwrap_or_default());
        let cancel = async {
            match job.cancelled_at {
                Some(at) => tokio::time::sleep_until((begin + at).into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            delivered = client.follow(&record.job, &self.ways, &events) => {
                let delivered = delivered.expect("it ends with a clip");
                let receipt = delivered.receipt.receipt();
                // Both by the node's clock, which is this machine's.
                fate.took = seconds(receipt.finished_at.since(receipt.accepted_at));
                fate.done_at = Some(seconds(receipt.finished_at.since(unix)));
                fate.moved = u32::try_from(delivered.record.former.len()).unwrap_or(u32::MAX);
            }
            () = cancel => {
                // It may have ended just now.
                fate.cancelled = client.cancel(&record.job).await.is_ok();
            }
        }
        listener.abort();
        fate
    }

    fn ask(&self, job: &PlannedJob) -> Ask {
        let steps = (job.work / UNIT - self.clip.rest).round().max(1.0) as u32;
        Ask {
            prompt: "a green square drifts up".to_owned(),
            length: Some(Length::Frames(self.clip.frames)),
            size: Some((self.clip.side, self.clip.side)),
            steps: Some(steps),
            custodians: Some(0),
            ..Ask::default()
        }
    }
}

async fn client(sandbox: &Sandbox, number: usize) -> Client {
    let mut seed = [7; 32];
    seed[..8].copy_from_slice(&(number as u64).to_be_bytes());
    let store = Store::open(sandbox.path(&format!("artist-{number}"))).expect("a store");
    let options = ClientOptions::new(sandbox.network());
    Client::start(options, Keypair::from_seed(&seed), store).await.expect("a client starts")
}

/// The ways from a client, as one of a network of its own, to the nodes.
async fn ways_of(sandbox: &Sandbox, client: usize) -> Vec<Multiaddr> {
    let network = u16::try_from(client + 1).expect("few clients").to_be_bytes();
    let from = IpAddr::V4(Ipv4Addr::new(127, network[0], network[1], 1));
    let mut ways = Vec::new();
    for (number, node) in sandbox.nodes.iter().enumerate() {
        let address = node.address("tcp");
        let port = address.split('/').nth(4).and_then(|port| port.parse().ok()).expect("a TCP address");
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let begins = way(to, from, Duration::from_secs_f64(distance(client, number))).await;
        ways.push(format!("/ip4/127.0.0.1/tcp/{}", begins.port()).parse().expect("an address"));
    }
    ways
}

fn clip() -> Clip {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = ModelStore::open(folder.path(), None).expect("a folder of models");
    let model = store.import_bundled().expect("the bundled model is sound").expect("one is bundled");
    let (rules, defaults) = (&model.manifest.rules, &model.manifest.defaults);
    let frames = rules.frames_offset + rules.frames_multiple;
    let side = (rules.size_multiple * 2).min(defaults.width);
    let of = |steps| {
        let shape = JobShape { frames, width: side, height: side, steps, guided: true };
        work(&model.manifest.work, &shape).0 as f64
    };
    let step = (of(1_001) - of(1)) / 1_000.0;
    Clip { frames, side, rest: of(1) / step - 1.0 }
}

fn seconds(time: Millis) -> f64 {
    time.0 as f64 / 1000.0
}

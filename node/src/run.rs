//! The daemon: what ties network, scheduler, stores and workers together.
//!
//! One task, [`Daemon::run`], owns the scheduler and every decision. It never waits for a disk, a worker or a peer: such
//! work is a task of its own that comes back as a [`Note`]. So an answer that must follow a commit (`Accepted`) is sent
//! by the note that tells of the commit, and a slow disk slows the one who asked.
//!
//! - `start`: from the configuration to a running daemon;
//! - `requests`: what peers ask; `prompts`, `refuse`: why some are told no;
//! - `jobs`: what scheduler and workers say; `finish`: from a worker's files to a receipt; `checkpoints`: where another
//!   run, here or elsewhere, goes on; `audits`: what is kept and shown of each step; `auditor`: jobs of others looked at;
//! - `boards`: what followers of a job are told; `selftest`: which models may be offered; `advert`: what is offered;
//! - `archive`: model files for others, and from others;
//! - `held`, `replicate`: sealed clips for others, and ours with others; `custody`: jobs watched for others;
//! - `lists`: signed lists, held and handed on;
//! - `interest`, `look`: why this node is idle; `operator`: what the admin interface asks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kinoflock_net::{Multiaddr, NetEvent, NetHandle, Responder, multiaddr::Protocol};
use kinoflock_protocol::custody::{Content, MirroredInputs, Seen};
use kinoflock_protocol::id::{JobId, ModelId, NetworkId, NodeId};
use kinoflock_protocol::job::ValidJob;
use kinoflock_protocol::refusal::Refusal;
use kinoflock_protocol::units::UnixMillis;
use tokio::sync::mpsc;

use crate::admin::AdminRequest;
use crate::admin::report::SeenReport;
use crate::clips::Clips;
use crate::config::Config;
use crate::engine::supervisor::{EngineEvent, EngineHandle};
use crate::engine::wire::WorkerInfo;
use crate::holdings::Holdings;
use crate::identity::Identity;
use crate::models::Model;
use crate::queue::{Queue, QueueError};
use crate::scheduler::{DeviceId, Origin, Scheduler};
use crate::shutdown::{Shutdown, Signals};
use crate::telemetry::Metrics;

use self::boards::Boards;

mod adapters;
mod advert;
mod archive;
mod auditor;
mod audits;
mod boards;
mod checkpoints;
mod custody;
mod finish;
mod held;
mod inputs;
mod interest;
mod jobs;
mod lists;
mod look;
mod operator;
mod ops;
mod peers;
mod prompts;
mod refuse;
mod replicate;
mod requests;
mod selftest;
mod slices;
mod start;
mod status;

pub use start::{RunError, main};

/// Notes from tasks that wait for the daemon; a task with one more waits.
const MAX_NOTES: usize = 256;
/// How often what is over is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// How long the events of an ended job are kept in memory; what it came to stays on disk.
const KEEP_BOARDS: Duration = Duration::from_secs(600);
/// How often a node says what it can do, and at most after a change.
const ADVERT_EVERY: Duration = Duration::from_secs(30);
/// How soon it says so when its addresses have changed; several that change together are told together.
const ADVERT_SOON: Duration = Duration::from_millis(500);
/// Least time between two adverts: others take 30 a minute.
const ADVERTS_APART: Duration = Duration::from_millis(2_500);
/// Longest wait for workers and network to end after a signal.
const END_WITHIN: Duration = Duration::from_secs(5);

/// What a task found out.
#[derive(Debug)]
enum Note {
    /// The operator's hook and the admitted order's write are through, or not.
    Stored { job: JobId, result: Result<(), Rejected>, responder: Responder },
    /// The hook has spoken about an order.
    Heard { order: Box<requests::Ordered>, verdict: Result<(), Refusal>, responder: Responder },
    /// A start is on disk.
    Started { device: DeviceId, job: JobId, result: Result<u32, QueueError> },
    /// Inputs of a job are here, or not.
    Inputs { job: JobId, result: Result<checkpoints::Segments, String> },
    /// A checkpoint is sealed and signed, or not.
    Checkpoint { job: JobId, result: Result<checkpoints::Made, String> },
    /// A clip is stored and its receipt signed, or not.
    Finished { device: DeviceId, job: JobId, result: Result<Box<finish::Finished>, finish::FinishError> },
    /// The end of a job without a clip is on disk.
    Ended { job: JobId, result: Result<(), QueueError> },
    /// Records were erased, because their terms are over.
    Swept { jobs: Vec<JobId> },
    /// A fetch of a blob for others is over.
    Kept { job: JobId, content: Content },
    /// What other nodes have seen of this one.
    Seen { reports: Vec<SeenReport> },
    /// What was seen of another node.
    Looked { seen: Seen, responder: Responder },
    /// Copies of a clip lie with others, or could not be made.
    Copied { job: JobId },
    /// A watched job came to its end.
    Watched { job: JobId },
    /// A node told whose adverts it knows.
    Told { adverts: Vec<kinoflock_protocol::Envelope> },
    /// How deep the slices of the neighbours are.
    Depths { neighbours: Vec<u8> },
    /// A question that was passed on is answered.
    Sought(Box<slices::Sought>),
    /// Editions of lists that another node had.
    Lists { editions: Vec<kinoflock_protocol::Envelope> },
    /// What an audit needs is here, or not.
    Gathered {
        id: kinoflock_protocol::audit::AuditId,
        result: Result<Box<auditor::AuditGathered>, auditor::AuditMissed>,
    },
    /// These models' files can be had from here.
    Shelved { models: Vec<ModelId> },
    /// A model came from other nodes, or could not be had.
    Fetched { name: String, result: Result<Box<Model>, String> },
    /// Something of an engine.
    Engine { device: DeviceId, event: EngineEvent },
}

/// Why an admitted order was not written.
#[derive(Debug)]
struct Rejected(QueueError);

/// A job that waits or runs.
#[derive(Debug)]
struct LiveJob {
    job: ValidJob,
    origin: Origin,
    accepted_at: UnixMillis,
    started_at: Option<UnixMillis>,
    admitted: Instant,
    /// Who sent it and serves its inputs; unknown after a restart.
    submitter: Option<NodeId>,
    /// Where its large inputs lie sealed, if its submitter is reached over a relay only.
    mirrored: Option<Box<MirroredInputs>>,
    steps_done: u32,
    /// As its worker counts them; a model that works in stages has more than the job says.
    steps_total: Option<u32>,
    checkpoints: checkpoints::Kept,
}

/// A device and its worker.
#[derive(Debug)]
struct Device {
    name: String,
    engine: EngineHandle,
    worker: Option<WorkerInfo>,
    /// In which numbers it computed last; empty before anything was loaded.
    dtype: String,
    tests: selftest::Tests,
}

/// One writer of a file at a time.
type Turn = Arc<tokio::sync::Mutex<()>>;

/// Jobs that ended since the start.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    done: u64,
    failed: u64,
    cancelled: u64,
}

/// The running daemon.
struct Daemon {
    config: Config,
    identity: Identity,
    network: NetworkId,
    net: NetHandle,
    scheduler: Scheduler,
    queue: Queue,
    clips: Clips,
    holdings: Holdings,
    /// Clips of which copies are being made.
    copying: BTreeSet<JobId>,
    /// Blobs that are being fetched for others.
    keeping: BTreeSet<(JobId, Content)>,
    /// Adapters of earlier jobs.
    adapters: adapters::Kept,
    custodian: custody::Custodian,
    audits: audits::Audits,
    auditor: auditor::Auditor,
    models: BTreeMap<ModelId, Arc<Model>>,
    archive: archive::Archive,
    prompts: prompts::Prompts,
    memories: crate::memory::Memories,
    self_tests: crate::models::selftest::Results,
    devices: BTreeMap<DeviceId, Device>,
    live: BTreeMap<JobId, LiveJob>,
    boards: Boards,
    adverts: advert::Adverts,
    depth: slices::Depth,
    contacts: slices::Contacts,
    interest: interest::Interest,
    looks: look::Looks,
    notes: mpsc::Sender<Note>,
    metrics: Metrics,
    counts: Counts,
    started: Instant,
    ready: tokio::sync::watch::Sender<bool>,
    draining: bool,
    peers_file: Turn,
    /// Nodes that are connected, and when each was last asked whom it knows.
    met: BTreeMap<NodeId, Instant>,
    lists: lists::Lists,
    lists_turn: Turn,
    peers: usize,
}

impl Daemon {
    async fn run(
        mut self,
        mut events: kinoflock_net::NetEvents,
        mut notes: mpsc::Receiver<Note>,
        mut admin: mpsc::Receiver<AdminRequest>,
        mut signals: Signals,
    ) {
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        let (mut advertised, mut advert_at) = (None::<Instant>, Instant::now());
        let mut drain_until: Option<Instant> = None;
        self.learn_all_listed();
        self.settle();
        while !self.over(drain_until) {
            let due = [self.scheduler.poll_timeout(), self.archive.poll_timeout(), drain_until];
            let wake = due.into_iter().flatten().min();
            tokio::select! {
                Some(note) = notes.recv() => self.handle_note(note),
                Some(event) = events.recv() => self.handle_net(event),
                Some(request) = admin.recv() => self.handle_admin(request),
                shutdown = signals.recv() => match shutdown {
                    Shutdown::Drain => drain_until = Some(self.begin_drain()),
                    Shutdown::Now => break,
                },
                () = sleep_until(wake) => self.scheduler.handle_timeout(Instant::now()),
                _ = sweep.tick() => self.sweep(),
                () = sleep_until(Some(advert_at)) => {
                    let now = Instant::now();
                    (advertised, advert_at) = (Some(now), now + ADVERT_EVERY);
                    self.advertise();
                    self.look_at_slice();
                    self.custodian.set_ways(self.adverts.ways());
                }
            }
            self.settle();
            if self.adverts.take_outdated() {
                // Never later than it would have been, and never so often that others refuse it.
                let soon = Instant::now() + ADVERT_SOON;
                let earliest = advertised.map_or(soon, |at| soon.max(at + ADVERTS_APART));
                advert_at = advert_at.min(earliest);
            }
        }
        self.end(&mut notes).await;
    }

    /// Does what the scheduler decided, until it has nothing more to say.
    fn settle(&mut self) {
        while let Some(event) = self.scheduler.poll_event() {
            self.handle_event(event);
        }
        self.audit_next();
        self.fetch_models();
        self.ask_to_be_seen();
        self.show();
    }

    fn handle_note(&mut self, note: Note) {
        match note {
            Note::Stored { job, result, responder } => self.handle_stored(job, result, responder),
            Note::Heard { order, verdict, responder } => self.handle_heard(*order, verdict, responder),
            Note::Started { device, job, result } => self.handle_started(device, job, result),
            Note::Inputs { job, result } => self.handle_inputs(job, result),
            Note::Checkpoint { job, result } => self.handle_checkpoint(job, result),
            Note::Finished { device, job, result } => self.handle_finished(device, job, result),
            Note::Ended { job, result } => self.handle_ended(job, result),
            Note::Swept { jobs } => jobs.iter().for_each(|job| self.scheduler.forget(job)),
            Note::Kept { job, content } => self.handle_kept(job, content),
            Note::Seen { reports } => self.handle_seen(reports),
            Note::Looked { seen, responder } => self.handle_looked(seen, responder),
            Note::Copied { job } => self.handle_copied(job),
            Note::Watched { job } => self.handle_watched(job),
            Note::Told { adverts } => self.handle_told(&adverts),
            Note::Depths { neighbours } => self.handle_depths(&neighbours),
            Note::Sought(sought) => self.handle_sought(*sought),
            Note::Lists { editions } => self.handle_lists(editions),
            Note::Gathered { id, result } => self.handle_gathered(id, result),
            Note::Shelved { models } => self.handle_shelved(models),
            Note::Fetched { name, result } => self.handle_fetched(&name, result),
            Note::Engine { device, event } => self.handle_engine(device, event),
        }
    }

    fn handle_net(&mut self, event: NetEvent) {
        match event {
            NetEvent::Request { node, addr, request, responder } => {
                self.handle_request(node, addr.as_ref(), *request, responder);
            }
            NetEvent::Progress { query, from_seq, sink, .. } => self.handle_follow(&query, from_seq, sink),
            NetEvent::Advert(advert) => self.handle_advert(advert),
            NetEvent::Connected { node, .. } => {
                self.peers += 1;
                tracing::debug!(peer = %node.short(), "connected");
            }
            NetEvent::Disconnected { node } => {
                self.peers = self.peers.saturating_sub(1);
                self.met.remove(&node);
                tracing::debug!(peer = %node.short(), "disconnected");
            }
            NetEvent::Identified(info) if info.is_node => self.handle_met(info.node),
            NetEvent::Found { node, addr } => self.handle_found(node, addr),
            NetEvent::OtherVersion { node, speaks, ours } => {
                tracing::warn!(peer = %node.short(), ?speaks, ours, "a peer speaks another version of the protocol; the older one should update");
            }
            NetEvent::Listening { addr } => {
                tracing::info!(%addr, "listening");
                self.adverts.outdate();
            }
            NetEvent::NotListening { addr } => {
                tracing::info!(%addr, "no longer listening");
                self.adverts.outdate();
            }
            NetEvent::Reachability(found) => {
                tracing::info!(reachability = ?found, "how others reach this node");
                self.adverts.outdate();
            }
            other => {
                tracing::trace!(event = ?std::mem::discriminant(&other), "network event without use here")
            }
        }
    }

    fn handle_found(&self, node: NodeId, addr: Multiaddr) {
        let net = self.net.clone();
        tokio::spawn(async move {
            if let Err(error) = net.connect(node, vec![addr]).await {
                tracing::debug!(peer = %node.short(), %error, "a node on the local network was not reached");
            }
        });
    }

    /// Leaves a task to itself; what it finds comes back as a note.
    fn spawn(&self, work: impl Future<Output = Note> + Send + 'static) {
        let notes = self.notes.clone();
        tokio::spawn(async move {
            let note = work.await;
            // Without a daemon nobody needs the note: what matters is on disk.
            let _ = notes.send(note).await;
        });
    }

    fn begin_drain(&mut self) -> Instant {
        let now = Instant::now();
        tracing::info!(
            limit_s = self.config.drain.as_secs(),
            "draining: no new jobs, the running ones may finish"
        );
        crate::shutdown::notify("STOPPING=1");
        self.draining = true;
        self.scheduler.drain(None, None, now);
        self.advertise();
        now + self.config.drain
    }

    /// Whether nothing runs any more or the time to finish is up.
    fn over(&self, drain_until: Option<Instant>) -> bool {
        let idle = self.scheduler.devices(Instant::now()).iter().all(|device| device.running.is_none());
        drain_until.is_some_and(|until| idle || until <= Instant::now())
    }

    /// Ends workers and network. Running jobs go back to the queue on disk, where the next start finds them.
    async fn end(self, notes: &mut mpsc::Receiver<Note>) {
        let _ = self.ready.send(false);
        let running: Vec<_> = self.running();
        for job in &running {
            if let Err(error) = self.queue.requeue(*job, false).await {
                tracing::error!(job = %job.short(), %error, "a running job could not be put back; it starts again all the same");
            }
        }
        notes.close();
        let engines = self.devices.values().map(|device| device.engine.shutdown());
        let ending = async {
            futures::future::join_all(engines).await;
            self.net.shutdown().await;
        };
        if tokio::time::timeout(END_WITHIN, ending).await.is_err() {
            tracing::warn!("workers or network did not end within {} s", END_WITHIN.as_secs());
        }
        tracing::info!(put_back = running.len(), "stopped");
    }

    fn running(&self) -> Vec<JobId> {
        self.scheduler.devices(Instant::now()).iter().filter_map(|device| device.running).collect()
    }

    fn sweep(&mut self) {
        self.sweep_held();
        self.adapters.expire(Instant::now());
        self.ask_around_for_lists();
        let now = unix_now();
        let ago = |span: Duration| now.minus(kinoflock_protocol::units::Millis(span.as_millis() as u64));
        let acknowledged = ago(self.config.terms.keep_acknowledged);
        let stored = ago(self.config.terms.keep_at_most);
        let (queue, clips) = (self.queue.clone(), self.clips.clone());
        let (audits, audited) = (self.audits.clone(), ago(self.config.storage.audit_keep));
        let forget = Instant::now().checked_sub(KEEP_BOARDS);
        for job in forget.map(|moment| self.boards.ended_before(moment)).unwrap_or_default() {
            self.boards.forget(&job);
        }
        self.spawn(async move {
            let jobs = queue.sweep(acknowledged, stored).await.unwrap_or_else(|error| {
                tracing::error!(%error, "old records could not be erased");
                Vec::new()
            });
            let swept = tokio::task::spawn_blocking(move || {
                audits.sweep(audited);
                clips.sweep(acknowledged, stored)
            });
            let swept = swept.await;
            match swept {
                Ok(Ok(blobs)) if !blobs.is_empty() => {
                    tracing::info!(clips = blobs.len(), "clips erased as the terms say")
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::error!(%error, "old clips could not be erased"),
                Err(error) => tracing::error!(%error, "the clip store's task failed"),
            }
            Note::Swept { jobs }
        });
    }
}

/// This machine's clock, as it is written in messages.
pub(crate) fn unix_now() -> UnixMillis {
    UnixMillis::from_system_time(SystemTime::now())
}

/// The IP address of a multiaddress.
fn ip_of(addr: &Multiaddr) -> Option<IpAddr> {
    addr.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
        Protocol::Ip6(ip) => Some(IpAddr::V6(ip)),
        _ => None,
    })
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake.into()).await,
        None => std::future::pending().await,
    }
}

//! From the configuration to a running daemon, in the order in which things can go wrong most cheaply.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kinoflock_client::local::LocalNode;
use kinoflock_net::{
    BlobReader, BlobSource, KadRole, NetConfig, NetError, NetHandle, Rates, Reach, RelayRole, Reserve,
};
use kinoflock_protocol::clip::{Outline, chunk_len};
use kinoflock_protocol::id::{BlobId, ModelId, NetworkId};
use kinoflock_protocol::units::UnixMillis;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::adapters::Kept;
use super::audits::Audits;
use super::custody::Custodian;
use super::selftest::{Program, Tests};
use super::{Daemon, Device, LiveJob, MAX_NOTES, Note, requests, unix_now};
use crate::admin::{ADMIN_QUEUE, Admin, AdminError};
use crate::clips::{Clips, ClipsError};
use crate::config::{Config, DeviceConfig, Relay};
use crate::engine::supervisor::{self, WorkerConfig};
use crate::holdings::{Holdings, HoldingsError};
use crate::identity::{Identity, IdentityError};
use crate::models::selftest::Results;
use crate::models::shelf::Shelf;
use crate::models::{Model, ModelStore, ModelsError, manifest, verify};
use crate::policy::Policy;
use crate::queue::{JobRecord, Queue, QueueError};
use crate::scheduler::{DeviceId, DeviceSetup, RestoredJob, Scheduler, Setup};
use crate::shutdown::Signals;
use crate::telemetry::Metrics;

/// Name of the file of self-tests that were passed, in the state folder.
const SELF_TESTS: &str = "self-tests.json";
/// Name of the admin socket in the runtime folder.
pub(crate) const ADMIN_SOCKET: &str = "admin.sock";

/// Why the daemon did not start, or ended other than asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// No usable key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The job store.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The clip store.
    #[error(transparent)]
    Clips(#[from] ClipsError),
    /// What is held for others.
    #[error(transparent)]
    Holdings(#[from] HoldingsError),
    /// The model store.
    #[error(transparent)]
    Models(#[from] ModelsError),
    /// An address that cannot be listened on.
    #[error("{0}; stop the program that has it, or choose another with network.listen or --listen")]
    Listen(NetError),
    /// The network.
    #[error(transparent)]
    Net(NetError),
    /// The admin interface.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The runtime folder.
    #[error("the runtime folder or the store of watched jobs: {0}")]
    Runtime(#[from] kinoflock_client::store::StoreError),
    /// An address of the configuration that the network layer does not take.
    #[error("address {address}: {reason}")]
    Address {
        /// The address.
        address: String,
        /// Why not.
        reason: String,
    },
    /// A worker program cannot be named.
    #[error("device {device}: {source}")]
    Worker {
        /// Which.
        device: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// No threads, no signals, no random bytes.
    #[error("the system refused: {0}")]
    System(String),
}

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// What kept it from starting.
pub fn main(config: Config) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| RunError::System(error.to_string()))?;
    let ended = runtime.block_on(run(config));
    // Blocking tasks that hang on a dead disk must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(2));
    ended
}

async fn run(config: Config) -> Result<(), RunError> {
    let signals = Signals::new().map_err(|error| RunError::System(error.to_string()))?;
    let identity = Identity::load_or_create(&config.storage.state)?;
    let network = NetworkId::named(&config.network.id);
    // The job store's lock says that no second daemon works here: everything else comes after it.
    let queue = Queue::open(&config.storage.state, identity.chain())?;
    let clips = Clips::open(&config.storage.state.join("clips"), config.storage.clips_limit)?;
    let audits = Audits::open(&config.storage.state, config.storage.audit_limit)?;
    super::auditor::clean(&config.storage.state);
    let adapters = Kept::open(&config.storage.state, config.storage.adapters_limit)
        .map_err(|error| RunError::System(error.to_string()))?;
    let models = load_models(&config)?;
    let (net, events) = start_net(&config, &identity, network).await?;
    let holdings = Holdings::open(&config.storage.state.join("held"), config.storage.replicas_limit)?;
    let custodian = Custodian::open(
        kinoflock_client::store::Store::open(config.storage.state.join("custody"))?,
        net.clone(),
        network,
        identity.keypair().clone(),
        config.custody.jobs,
        config.custody.after,
    );
    let shelf = Shelf::default();
    net.serve_blobs(Arc::new(Sources(vec![
        Arc::new(ClipSource { clips: clips.clone() }),
        Arc::new(ClipSource { clips: audits.store() }),
        Arc::new(ClipSource { clips: holdings.blobs().clone() }),
        custodian.inputs(),
        Arc::new(shelf.clone()),
    ])));

    let (metrics, registry) = Metrics::new();
    let (ready, watch_ready) = watch::channel(false);
    let (requests, admin_requests) = mpsc::channel(ADMIN_QUEUE);
    let admin = Admin::new(requests, Arc::new(registry), watch_ready);
    let stop = CancellationToken::new();
    let socket = config.storage.runtime.join(ADMIN_SOCKET);
    let local = local_node(&identity, network, &net, &socket);
    let local_file = local.write(&config.storage.runtime)?;
    let admin_socket = admin.serve_socket(&socket, stop.clone())?;
    let port = admin.serve_port(config.admin, stop.clone()).await?;
    tracing::info!(node = %identity.node_id(), network = config.network.id, admin = %port, file = %local_file.display(), "started");

    let (notes, inbox) = mpsc::channel(MAX_NOTES);
    let runtime_folder = config.storage.runtime.clone();
    let scheduler = scheduler(&config, &models)?;
    let unsound = unsound(&models).await;
    let devices = start_devices(&config, &models, &unsound, &scheduler, &notes).await?;
    let mut daemon = Daemon {
        network,
        net,
        scheduler,
        queue,
        clips,
        audits,
        auditor: super::auditor::Auditor::default(),
        holdings,
        copying: std::collections::BTreeSet::new(),
        keeping: std::collections::BTreeSet::new(),
        adapters,
        custodian,
        archive: super::archive::Archive::new(shelf, &config.storage.keep, Instant::now()),
        prompts: super::prompts::Prompts::of(&models),
        memories: crate::memory::Memories::new(&config.devices),
        models,
        self_tests: Results::open(&config.storage.state.join(SELF_TESTS)),
        devices,
        live: BTreeMap::new(),
        boards: super::boards::Boards::default(),
        adverts: super::advert::Adverts::default(),
        depth: super::slices::Depth::new(identity.node_id(), config.network.slice),
        contacts: super::slices::Contacts::default(),
        interest: super::interest::Interest::new(Instant::now()),
        looks: super::look::Looks::new(Instant::now()),
        notes,
        metrics,
        counts: super::Counts::default(),
        started: Instant::now(),
        ready,
        draining: false,
        peers_file: super::Turn::default(),
        lists: super::lists::Lists::open(&config.storage.state, &network, &config.network.lists),
        met: std::collections::BTreeMap::new(),
        lists_turn: super::Turn::default(),
        peers: 0,
        identity,
        config,
    };
    daemon.restore()?;
    daemon.restore_custody();
    let sound = daemon.models.values().filter(|model| !unsound.contains_key(&model.id)).cloned();
    daemon.put_on_shelf(sound.collect());
    if daemon.devices.is_empty() {
        daemon.be_ready();
    }
    daemon.run(events, inbox, admin_requests, signals).await;
    stop.cancel();
    if let Err(error) = local.remove(&runtime_folder) {
        tracing::warn!(%error, "the addresses file could not be removed");
    }
    if admin_socket.await.is_err() {
        tracing::warn!("the admin socket's task failed");
    }
    Ok(())
}

impl Daemon {
    /// Takes back what the store holds.
    fn restore(&mut self) -> Result<(), RunError> {
        let (now, wall) = (Instant::now(), unix_now());
        let mut restored = Vec::new();
        for record in self.queue.restore()? {
            if record.outcome().is_none() && !self.restore_live(&record, now, wall) {
                continue;
            }
            let mut job = restored_job(&record, now, wall);
            let model = self.models.get(&record.model);
            let unfit = model.map(|model| self.memories.unfit(model, &record.shape));
            job.wanted.unfit = unfit.unwrap_or_default();
            restored.push(job);
        }
        if !self.live.is_empty() {
            tracing::info!(jobs = self.live.len(), "jobs found in the queue on disk");
        }
        self.scheduler.restore(restored, now);
        Ok(())
    }

    fn restore_live(&mut self, record: &JobRecord, now: Instant, wall: UnixMillis) -> bool {
        let job = match kinoflock_protocol::ValidJob::parse_stored(&record.job, &self.network) {
            Ok(job) => job,
            Err(error) => {
                tracing::error!(job = %record.id.short(), %error, "a stored job cannot be read; it is left alone");
                return false;
            }
        };
        self.boards.board(record.id, requests::restored_seq());
        let live = LiveJob {
            job,
            origin: record.origin.into(),
            accepted_at: record.admitted_at,
            started_at: None,
            admitted: ago(now, wall, record.admitted_at),
            submitter: None,
            mirrored: None,
            steps_done: 0,
            steps_total: None,
            checkpoints: self.restore_checkpoints(record),
        };
        self.live.insert(record.id, live);
        true
    }
}

fn restored_job(record: &JobRecord, now: Instant, wall: UnixMillis) -> RestoredJob {
    RestoredJob {
        job: record.id,
        nonce: record.nonce,
        origin: record.origin.into(),
        wanted: record.wanted(),
        seq: record.seq,
        starts: record.starts,
        admitted: ago(now, wall, record.admitted_at),
        deadline: record.deadline.map(|at| now + Duration::from_millis(at.since(wall).0)),
        needs_inputs: record.needs_inputs,
        ended: record.outcome(),
    }
}

/// A time of the past on this run's clock; its beginning where that cannot say it.
fn ago(now: Instant, wall: UnixMillis, then: UnixMillis) -> Instant {
    now.checked_sub(Duration::from_millis(wall.since(then).0)).unwrap_or(now)
}

/// The models of this node; the bundled one is imported where it is missing.
fn load_models(config: &Config) -> Result<BTreeMap<ModelId, Arc<Model>>, RunError> {
    let store = ModelStore::open(&config.storage.models, config.storage.models_limit)?;
    store.import_bundled()?;
    Ok(store.list()?.into_iter().map(|model| (model.id, Arc::new(model))).collect())
}

fn scheduler(config: &Config, models: &BTreeMap<ModelId, Arc<Model>>) -> Result<Scheduler, RunError> {
    let mut policy = Policy::new(config.policy.clone(), config.serve.clone());
    for name in policy.resolve_models(|name| find(models, name)) {
        tracing::warn!(
            model = name,
            "policy.models names a model that is not here; see `kinoflockd model list`"
        );
    }
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(|error| RunError::System(error.to_string()))?;
    let devices = config.devices.iter().map(|device| DeviceSetup {
        name: device.name.clone(),
        limits: device.limits,
        models: BTreeMap::new(),
    });
    Ok(Scheduler::new(Setup { limits: config.queue, policy, devices: devices.collect(), secret }))
}

/// A model by its name or id.
fn find(models: &BTreeMap<ModelId, Arc<Model>>, name: &str) -> Option<ModelId> {
    models.values().find(|model| model.name == name || model.id.to_string() == name).map(|model| model.id)
}

/// Starts a worker for each device; its models are tested before any job may have it.
async fn start_devices(
    config: &Config,
    models: &BTreeMap<ModelId, Arc<Model>>,
    unsound: &BTreeMap<ModelId, String>,
    scheduler: &Scheduler,
    notes: &mpsc::Sender<Note>,
) -> Result<BTreeMap<DeviceId, Device>, RunError> {
    let mut devices = BTreeMap::new();
    for (id, device) in (0..=u16::MAX).map(DeviceId).zip(&config.devices) {
        let worker = WorkerConfig::of_device(device, &config.engine)
            .map_err(|source| RunError::Worker { device: device.name.clone(), source })?;
        let program = program(&worker).await;
        let (engine, mut events) = supervisor::spawn(worker);
        let notes = notes.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if notes.send(Note::Engine { device: id, event }).await.is_err() {
                    return;
                }
            }
        });
        let wanted = models_of(device, models, scheduler);
        let (faulty, sound): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|id| unsound.contains_key(id));
        let mut tests = Tests::of(sound, program);
        tests.results.extend(faulty.into_iter().map(|id| (id, Err(unsound[&id].clone()))));
        devices.insert(
            id,
            Device { name: device.name.clone(), engine, worker: None, dtype: String::new(), tests },
        );
    }
    Ok(devices)
}

/// Models whose files are not what their manifests say, each with what is wrong. They are neither tested nor offered:
/// what they compute would go out under another model's id.
async fn unsound(models: &BTreeMap<ModelId, Arc<Model>>) -> BTreeMap<ModelId, String> {
    let mut unsound = BTreeMap::new();
    for model in models.values() {
        let looked_at = Arc::clone(model);
        let faults = tokio::task::spawn_blocking(move || verify::unchanged(&looked_at)).await;
        let wrong = match faults {
            Ok(Ok(faults)) => faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        if !wrong.is_empty() {
            tracing::error!(model = %model.name, reason = wrong, "the model is not offered");
            unsound.insert(model.id, wrong);
        }
    }
    unsound
}

/// What of a worker its self-tests depend on.
async fn program(worker: &WorkerConfig) -> Program {
    let file = worker.program.clone();
    let hash = tokio::task::spawn_blocking(move || manifest::hash_file(&file)).await;
    Program {
        hash: hash.ok().and_then(Result::ok).map(|(_, hash)| hash),
        setting: format!("{} {:?}", worker.open.dtype, worker.args),
    }
}

/// The models that a device is to serve, those that the policy allows.
fn models_of(
    device: &DeviceConfig,
    models: &BTreeMap<ModelId, Arc<Model>>,
    scheduler: &Scheduler,
) -> Vec<ModelId> {
    let named = |model: &Model| {
        device.models.is_empty()
            || device.models.iter().any(|name| *name == model.name || *name == model.id.to_string())
    };
    let served = models.values().filter(|model| named(model) && scheduler.policy().serves_model(&model.id));
    served.map(|model| model.id).collect()
}

async fn start_net(
    config: &Config,
    identity: &Identity,
    network: NetworkId,
) -> Result<(NetHandle, kinoflock_net::NetEvents), RunError> {
    let parse = |addresses: &[crate::config::ListenAddress]| {
        let parsed = addresses.iter().map(|address| {
            address.as_str().parse().map_err(|error: kinoflock_net::multiaddr::Error| RunError::Address {
                address: address.to_string(),
                reason: error.to_string(),
            })
        });
        parsed.collect::<Result<Vec<_>, _>>()
    };
    let settings = &config.network;
    let rate = |bytes: Option<u64>| bytes.and_then(std::num::NonZeroU64::new);
    let net = NetConfig {
        agent: concat!("kinoflockd/", env!("CARGO_PKG_VERSION")).to_owned(),
        listen: parse(&settings.listen)?,
        external: parse(&settings.external)?,
        // What a ticket holds beyond what this release dials is passed over, as it is for artists.
        bootstrap: settings.bootstrap.iter().filter_map(|address| address.parse().ok()).collect(),
        resolver: settings.resolver,
        known: super::peers::addresses(&config.storage.state),
        mdns: settings.mdns,
        kad: KadRole::Server,
        gossip: true,
        reach: reach(settings),
        rates: Rates { upload: rate(settings.upload), download: rate(settings.download) },
        ..NetConfig::node(identity.keypair().clone(), network, 0)
    };
    kinoflock_net::start(net).await.map_err(|error| match error {
        error @ NetError::Listen { .. } => RunError::Listen(error),
        error => RunError::Net(error),
    })
}

/// What the configuration says about routers and relays, as the network layer takes it.
fn reach(settings: &crate::config::Network) -> Reach {
    let (upnp, node) = (settings.upnp, Reach::NODE);
    match settings.relay {
        Relay::Auto => Reach { upnp, ..node },
        Relay::On => Reach { upnp, relay: RelayRole::On, ..node },
        Relay::Off => Reach { upnp, relay: RelayRole::Off, reserve: Reserve::Off, ..node },
    }
}

fn local_node(
    identity: &Identity,
    network: NetworkId,
    net: &NetHandle,
    socket: &std::path::Path,
) -> LocalNode {
    LocalNode {
        schema: 1,
        node_id: identity.node_id(),
        network,
        addresses: net.listen_addrs().iter().map(ToString::to_string).collect(),
        pid: std::process::id(),
        admin: Some(socket.display().to_string()),
    }
}

/// Several places where a blob may lie, in the order in which they are looked into.
#[derive(Debug)]
struct Sources(Vec<Arc<dyn BlobSource>>);

impl BlobSource for Sources {
    fn open(&self, id: &BlobId) -> std::io::Result<Option<Box<dyn BlobReader>>> {
        for source in &self.0 {
            if let Some(reader) = source.open(id)? {
                return Ok(Some(reader));
            }
        }
        Ok(None)
    }
}

/// Clips as the network serves them: each MiB is checked against what was stored before it leaves.
#[derive(Debug)]
struct ClipSource {
    clips: Clips,
}

struct ClipReader {
    clips: Clips,
    id: BlobId,
    outline: Outline,
    /// The chunk that was checked last: its other parts are read without hashing it anew.
    checked: Option<u64>,
}

impl ClipReader {
    fn checked_chunk(&mut self, index: u64) -> std::io::Result<Vec<u8>> {
        let chunk = self.clips.read_chunk(&self.id, index).map_err(|error| {
            tracing::error!(blob = %self.id.short(), %error, "a stored blob cannot be served");
            let kind = match error {
                ClipsError::Tampered { .. } => std::io::ErrorKind::InvalidData,
                _ => std::io::ErrorKind::Other,
            };
            std::io::Error::new(kind, error)
        })?;
        self.checked = Some(index);
        Ok(chunk)
    }
}

impl BlobSource for ClipSource {
    fn open(&self, id: &BlobId) -> std::io::Result<Option<Box<dyn BlobReader>>> {
        match self.clips.outline(id) {
            Ok(outline) => {
                Ok(Some(Box::new(ClipReader { clips: self.clips.clone(), id: *id, outline, checked: None })))
            }
            Err(ClipsError::Unknown { .. }) => Ok(None),
            Err(error) => Err(std::io::Error::other(error)),
        }
    }
}

impl BlobReader for ClipReader {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let chunk_bytes = kinoflock_protocol::limits::CHUNK_BYTES as u64;
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let (index, within) = (at / chunk_bytes, (at % chunk_bytes) as usize);
            let len = chunk_len(index, self.outline.len).filter(|len| within < *len);
            let part = (len.ok_or(std::io::ErrorKind::UnexpectedEof)? - within).min(buffer.len() - done);
            let wanted = &mut buffer[done..done + part];
            if self.checked == Some(index) {
                self.clips.read_part(&self.id, at, wanted).map_err(std::io::Error::other)?;
            } else {
                let chunk = self.checked_chunk(index)?;
                wanted.copy_from_slice(&chunk[within..within + part]);
            }
            done += part;
        }
        Ok(())
    }
}

//! A client process on the network: finding nodes, handing over jobs, following them, fetching and checking clips.
//!
//! [`Client`] owns one swarm with a fresh transport key; the artist's key only signs. Everything that must outlive the
//! process goes through the [`Store`] before it goes over the network. [`Event`]s tell what happens; who renders them
//! must keep reading, for the channel is bounded and the session waits while it is full.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kinoflock_net::blobs::FileReader;
use kinoflock_net::{BlobReader, BlobSource, Multiaddr, NetConfig, NetEvent, NetEvents, NetHandle};
use kinoflock_protocol::limits::{MAX_COLLECTIVES, MAX_LISTS};
use kinoflock_protocol::list::ListName;
use kinoflock_protocol::query::{JobQuery, QueryAction};
use kinoflock_protocol::{
    BlobId, CollectiveId, Envelope, JobId, Keypair, NetworkId, NodeId, Nonce, RequesterId, UnixMillis,
};
use tokio::sync::{mpsc, watch};

use crate::route::{self, Candidate, Declined, Needs, Ranked};
use crate::store::{JobRecord, Store};

mod audit;
mod custody;
mod deliver;
mod error;
mod event;
mod faults;
mod find;
mod follow;
mod lists;
mod many;
mod mirror;
mod pace;
mod place;
mod rescue;
mod submit;
mod survey;

pub use audit::Audited;
pub use deliver::Delivered;
pub use error::SessionError;
pub use event::{Event, Events};
pub use find::{Found, Model, WrongWay};
pub use lists::Listing;
pub use many::Many;
pub use survey::{Could, SURVEYED, Survey};

/// Events that wait for whoever renders them; when it is full, the session waits, except for transfers and previews,
/// which are passed over.
pub const EVENTS: usize = 256;
/// Silence of a job's node after which the requester looks for another one.
const AWAY: Duration = Duration::from_secs(8);
/// Nodes that mDNS found and that are remembered; further ones are passed over.
const MAX_FOUND: usize = 64;

/// How a client is set up.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Which network.
    pub network: NetworkId,
    /// Look for nodes on the local network.
    pub mdns: bool,
    /// How long a node may be out of reach before following a job is given up.
    pub patience: Duration,
    /// Collectives whose nodes are asked before all others; at most [`MAX_COLLECTIVES`].
    pub collectives: Vec<CollectiveId>,
    /// Signed lists to go by; at most [`MAX_LISTS`].
    pub lists: Vec<ListName>,
    /// The DNS server to ask; the system's if none is named.
    pub resolver: Option<SocketAddr>,
}

impl ClientOptions {
    /// No discovery, ten minutes of patience.
    #[must_use]
    pub fn new(network: NetworkId) -> Self {
        Self {
            network,
            mdns: false,
            patience: Duration::from_secs(600),
            collectives: Vec::new(),
            lists: Vec::new(),
            resolver: None,
        }
    }
}

/// A client process on the network. Clones mean the same process.
#[derive(Debug, Clone)]
pub struct Client {
    pub(crate) net: NetHandle,
    pub(crate) network: NetworkId,
    pub(crate) store: Store,
    key: Keypair,
    patience: Duration,
    mdns: bool,
    collectives: Arc<[CollectiveId]>,
    lists: Arc<[ListName]>,
    found: watch::Receiver<BTreeMap<NodeId, Vec<Multiaddr>>>,
    inputs: Arc<Inputs>,
    /// Silence of a job's node after which another is looked for.
    away: Duration,
}

impl Client {
    /// Starts the swarm. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the swarm cannot be started.
    pub async fn start(options: ClientOptions, key: Keypair, store: Store) -> Result<Self, SessionError> {
        let mut config = NetConfig::client(options.network);
        config.mdns = options.mdns;
        config.resolver = options.resolver;
        let (net, events) = kinoflock_net::start(config).await?;
        let (sender, found) = watch::channel(BTreeMap::new());
        tokio::spawn(remember(events, sender));
        let inputs = Arc::new(Inputs { store: store.clone(), served: Mutex::default() });
        net.serve_blobs(inputs.clone());
        let ClientOptions { network, mdns, patience, mut collectives, mut lists, .. } = options;
        collectives.truncate(MAX_COLLECTIVES);
        lists.truncate(MAX_LISTS);
        let (collectives, lists) = (collectives.into(), lists.into());
        Ok(Self { net, network, store, key, patience, mdns, collectives, lists, found, inputs, away: AWAY })
    }

    /// A custodian: works over a swarm that runs already, with the custodian's key, for jobs that others signed. It gives up
    /// a node that is silent for `away`, and never gives up a job by itself. What [`Client::inputs`] gives is to be
    /// served by the swarm.
    #[must_use]
    pub fn custodian(net: NetHandle, network: NetworkId, key: Keypair, store: Store, away: Duration) -> Self {
        let inputs = Arc::new(Inputs { store: store.clone(), served: Mutex::default() });
        let (_, found) = watch::channel(BTreeMap::new());
        let patience = Duration::from_millis(kinoflock_protocol::limits::JOB_LIFE_MS);
        let (collectives, lists) = (Arc::new([]), Arc::new([]));
        Self { net, network, store, key, patience, mdns: false, collectives, lists, found, inputs, away }
    }

    /// The same, that gives up a node which is silent for so long.
    #[must_use]
    pub fn patient(mut self, away: Duration) -> Self {
        self.away = away;
        self
    }

    /// The inputs of jobs under way, and nothing else of the store.
    #[must_use]
    pub fn inputs(&self) -> Arc<dyn BlobSource> {
        Arc::clone(&self.inputs) as Arc<dyn BlobSource>
    }

    /// Ends all connections.
    pub async fn stop(&self) {
        self.net.shutdown().await;
    }

    /// Who asks.
    #[must_use]
    pub fn requester(&self) -> RequesterId {
        self.key.requester_id()
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The network handle, for what the session does not do.
    #[must_use]
    pub fn net(&self) -> &NetHandle {
        &self.net
    }

    /// A channel for events.
    #[must_use]
    pub fn events() -> (Events, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(EVENTS);
        (Events::to(sender), receiver)
    }

    /// Who could take a job, the most promising first, the artist's own collectives' nodes before all others.
    fn rank(&self, candidates: &[Candidate], needs: &Needs) -> (Vec<Ranked>, Vec<Declined>) {
        let (mut ranked, declined) = route::rank(candidates, needs, crate::now());
        route::own_first(&mut ranked, candidates, &self.collectives);
        (ranked, declined)
    }

    fn query(&self, record: &JobRecord, action: QueryAction) -> Result<Envelope, SessionError> {
        let issued_at = corrected(crate::now(), record.clock_skew_ms);
        let query = JobQuery { job: record.job, action, node: record.node, issued_at, nonce: nonce()? };
        Ok(Envelope::seal(&self.key, &self.network, &query)?)
    }

    fn update(&self, job: &JobId, change: impl FnOnce(&mut JobRecord)) -> Result<JobRecord, SessionError> {
        Ok(self.store.update_job(job, change)?)
    }
}

/// This time by a clock that is so far ahead.
fn corrected(time: UnixMillis, ahead_ms: i64) -> UnixMillis {
    UnixMillis(time.0.saturating_add_signed(ahead_ms))
}

pub(crate) fn random() -> Result<u64, SessionError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(SessionError::Random)?;
    Ok(u64::from_le_bytes(bytes))
}

fn nonce() -> Result<Nonce, SessionError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(SessionError::Random)?;
    Ok(Nonce::from_bytes(bytes))
}

/// Remembers whom mDNS found; everything else that the network tells is of no interest to a client.
async fn remember(mut events: NetEvents, found: watch::Sender<BTreeMap<NodeId, Vec<Multiaddr>>>) {
    while let Some(event) = events.recv().await {
        let NetEvent::Found { node, addr } = event else { continue };
        found.send_if_modified(|known| {
            if known.len() >= MAX_FOUND && !known.contains_key(&node) {
                return false;
            }
            let addresses = known.entry(node).or_default();
            let new = !addresses.contains(&addr) && addresses.len() < MAX_FOUND;
            if new {
                addresses.push(addr.clone());
            }
            new
        });
    }
}

/// The inputs of jobs under way, for the nodes that have them. Nothing else of the store is served.
#[derive(Debug)]
struct Inputs {
    store: Store,
    served: Mutex<BTreeSet<BlobId>>,
}

impl Inputs {
    fn serve(&self, ids: impl IntoIterator<Item = BlobId>) {
        self.served.lock().expect("invariant: no panic while the lock is held").extend(ids);
    }
}

impl BlobSource for Inputs {
    fn open(&self, id: &BlobId) -> std::io::Result<Option<Box<dyn BlobReader>>> {
        let served = self.served.lock().expect("invariant: no panic while the lock is held").contains(id);
        let path = self.store.blob_path(id);
        if !served || !path.is_file() {
            return Ok(None);
        }
        let mut file = std::fs::File::open(path)?;
        let (given, outline) = FileReader::outline_of(&mut file)?;
        Ok((given == *id).then(|| Box::new(FileReader::new(file, outline)) as Box<dyn BlobReader>))
    }
}

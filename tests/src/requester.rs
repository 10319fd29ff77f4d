//! A requester by hand: one who signs jobs, orders and queries piece by piece, so that a test may bend each of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use kinoflock_net::blobs::MemoryBlobs;
use kinoflock_net::{FetchOptions, MemorySink, NetConfig, NetHandle, ProgressStream};
use kinoflock_protocol::envelope::Message;
use kinoflock_protocol::job::Prompt;
use kinoflock_protocol::model::ModelManifest;
use kinoflock_protocol::order::{Order, QuoteRequest, Resume, ValidQuote};
use kinoflock_protocol::query::{JobQuery, QueryAction};
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::work::{JobShape, work};
use kinoflock_protocol::{
    BlobId, Envelope, JobId, JobSpec, Keypair, LeaseId, ModelId, NetworkId, NodeId, Nonce, UnixMillis,
};

use crate::sandbox::{Node, PATIENCE, Sandbox};

/// Longest pause that a busy node may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Somebody with a key and a connection of their own.
#[derive(Debug)]
pub struct Requester {
    /// Their key.
    pub key: Keypair,
    network: NetworkId,
    net: NetHandle,
}

/// An order and the job beside it.
#[derive(Debug, Clone)]
pub struct Ordered {
    /// The signed order.
    pub order: Envelope,
    /// The signed job.
    pub job: Envelope,
}

impl Requester {
    /// Somebody new.
    ///
    /// # Panics
    /// When no swarm can be started.
    pub async fn new(sandbox: &Sandbox) -> Self {
        let network = sandbox.network();
        let (net, mut events) = kinoflock_net::start(NetConfig::client(network)).await.expect("a swarm");
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        Self { key: Keypair::from_seed(&unique()), network, net }
    }

    /// Asks a node something, again when it is busy.
    ///
    /// # Panics
    /// When it does not answer.
    pub async fn ask(&self, node: &Node, request: Request) -> Response {
        let id =
            self.net.dial(node.address("tcp").parse().expect("an address")).await.expect("it is reached");
        loop {
            let answer = self.net.request_within(id, request.clone(), PATIENCE).await;
            match answer.expect("the node answers") {
                Response::Busy { retry_after } => {
                    tokio::time::sleep(Duration::from(retry_after).min(LONGEST_PAUSE)).await;
                }
                other => return other,
            }
        }
    }

    /// Signs something.
    ///
    /// # Panics
    /// When it is too large to be signed.
    #[must_use]
    pub fn seal<T: Message>(&self, value: &T) -> Envelope {
        Envelope::seal(&self.key, &self.network, value).expect("it can be signed")
    }

    /// A small job for a node's first model.
    ///
    /// # Panics
    /// When the node offers none.
    #[must_use]
    pub fn spec(&self, node: &Node, prompt: &str, steps: u32) -> JobSpec {
        let shape = JobShape { frames: 9, width: 64, height: 64, steps, guided: false };
        let nonce = Nonce::from_bytes(unique()[..16].try_into().expect("16 bytes"));
        JobSpec::generate(model_of(node), Prompt::new(prompt).expect("a prompt"), nonce, now(), shape)
    }

    /// The question for a quote on a job.
    pub async fn question(&self, node: &Node, spec: &JobSpec) -> QuoteRequest {
        let Response::Manifest(bytes) = self.ask(node, Request::Manifest(spec.model)).await else {
            panic!("the node has no manifest of its model")
        };
        let manifest = ModelManifest::decode(&bytes, &spec.model).expect("its hash is its id");
        let nonce = Nonce::from_bytes(unique()[..16].try_into().expect("16 bytes"));
        QuoteRequest::for_job(spec, self.key.requester_id(), nonce, work(&manifest.work, &spec.shape()))
    }

    /// A lease for a job.
    ///
    /// # Panics
    /// When the node gives none.
    pub async fn lease(&self, node: &Node, spec: &JobSpec) -> LeaseId {
        let question = self.question(node, spec).await;
        match self.ask(node, Request::Quote(question.clone())).await {
            Response::Quote(quote) => {
                let id = node.local().node_id;
                let quote = ValidQuote::parse(&quote, &self.network, &id, &question).expect("a sound quote");
                quote.quote().lease
            }
            other => panic!("no quote: {other:?}"),
        }
    }

    /// Signs a job and an order for it.
    #[must_use]
    pub fn order(&self, to: NodeId, spec: &JobSpec, lease: LeaseId) -> Ordered {
        let job = self.seal(spec);
        let id = JobId::of(&job, &self.network);
        let order = self.seal(&Order { job: id, node: to, lease, issued_at: now(), resume: None });
        Ordered { order, job }
    }

    /// Signs an order to go on with a job where another node left it.
    #[must_use]
    pub fn order_to_resume(&self, to: NodeId, job: &Envelope, lease: LeaseId, resume: Resume) -> Ordered {
        let order = Order { job: self.id(job), node: to, lease, issued_at: now(), resume: Some(resume) };
        Ordered { order: self.seal(&order), job: job.clone() }
    }

    /// From now on, serves these blobs to whoever asks.
    ///
    /// # Panics
    /// When one is too large.
    pub fn serve(&self, blobs: &[&[u8]]) {
        let source = MemoryBlobs::new();
        for blob in blobs {
            source.insert(*blob).expect("a small blob");
        }
        self.net.serve_blobs(Arc::new(source));
    }

    /// A blob that a node serves; nothing if it does not.
    pub async fn fetch(&self, node: &Node, id: BlobId) -> Option<Vec<u8>> {
        let peer =
            self.net.dial(node.address("tcp").parse().expect("an address")).await.expect("it is reached");
        let fetched = self.net.fetch_blob(id, &[peer], MemorySink::new(), FetchOptions::default()).await;
        fetched.ok().map(|(sink, _)| sink.into_bytes())
    }

    /// Follows a job from its first event that the node still knows.
    ///
    /// # Panics
    /// When the node does not let it be followed.
    pub async fn follow(&self, node: &Node, job: JobId) -> ProgressStream {
        let peer =
            self.net.dial(node.address("tcp").parse().expect("an address")).await.expect("it is reached");
        let query = self.query(peer, job, QueryAction::Progress);
        self.net.open_progress(peer, query, 0).await.expect("it may be followed")
    }

    /// The id of a signed job.
    #[must_use]
    pub fn id(&self, job: &Envelope) -> JobId {
        JobId::of(job, &self.network)
    }

    /// Hands an order over, whoever signed it.
    pub async fn submit(&self, node: &Node, ordered: &Ordered) -> Response {
        let Ordered { order, job } = ordered.clone();
        self.ask(node, Request::Submit { order, job, mirrored: None }).await
    }

    /// A signed query.
    #[must_use]
    pub fn query(&self, to: NodeId, job: JobId, action: QueryAction) -> Envelope {
        let nonce = Nonce::from_bytes(unique()[..16].try_into().expect("16 bytes"));
        self.seal(&JobQuery { job, action, node: to, issued_at: now(), nonce })
    }
}

/// The first model that a node offers.
///
/// # Panics
/// When it offers none.
#[must_use]
pub fn model_of(node: &Node) -> ModelId {
    let status = node.status();
    let model = status.devices.iter().flat_map(|device| &device.models).next();
    model.expect("it has a model").id.parse().expect("an id")
}

/// Why a request was refused: the reason's code, and the rule's.
///
/// # Panics
/// When it was not.
#[must_use]
pub fn refused(response: &Response) -> (&'static str, String) {
    match response {
        Response::Refused(refusal) => (refusal.code(), refusal.rule.to_string()),
        other => panic!("not refused: {other:?}"),
    }
}

/// This machine's time.
#[must_use]
pub fn now() -> UnixMillis {
    UnixMillis::from_system_time(SystemTime::now())
}

/// Bytes that no other call gets, of this process or another.
fn unique() -> [u8; 32] {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    hasher.update(&std::process::id().to_le_bytes()).update(&now().0.to_le_bytes());
    *hasher.finalize().as_bytes()
}

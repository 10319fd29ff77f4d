//! Jobs that this node watches while their clients are away: it follows them with the client's own library, hands them on
//! when their node is lost, and holds their clips sealed until their requesters come back.
//!
//! A custodian acts later than the requester would, each custodian later than the one named before it, and asks the others
//! first, so that a job is not handed on twice.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kinoflock_client::session::{Client, SessionError};
use kinoflock_client::store::{JobRecord, RecordState, Store, StoreError};
use kinoflock_client::ticket::{Way, address_of};
use kinoflock_net::sealed::seal_file;
use kinoflock_net::{BlobSource, FetchOptions, FileSink, NetHandle};
use kinoflock_protocol::codec::Bytes;
use kinoflock_protocol::custody::{Content, ValidCustody};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{JobId, Keypair, NetworkId, NodeId, RequesterId};
use kinoflock_protocol::job::ValidJob;
use kinoflock_protocol::receipt::ValidReceipt;
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::rpc::Response;
use kinoflock_protocol::seal::{SealKey, seal_bytes};
use kinoflock_protocol::units::Millis;
use tokio::task::AbortHandle;

use super::held::keep_file;
use super::refuse::{job_refusal, order_refusal};
use super::{Daemon, Note, unix_now};
use crate::holdings::{HeldRow, Holdings};

/// Jobs of one requester that are watched at most.
const MAX_OF_ONE: usize = 64;
/// How long nodes that are known now are believed to be there: then the newest are taken.
const WAYS_LIFE: Duration = Duration::from_secs(300);
/// Pause after nobody could take a job, and after a clip could not be fetched.
const PAUSE: Duration = Duration::from_secs(20);
/// When a client is to ask again whether a job's inputs are here.
const INPUTS_AGAIN: Millis = Millis(500);

/// The jobs that are watched. Their records lie in a client's store.
pub(super) struct Custodian {
    client: Client,
    store: Store,
    network: NetworkId,
    /// Nodes by which another one for a job is found.
    ways: Arc<Mutex<Vec<Way>>>,
    watching: BTreeMap<JobId, AbortHandle>,
    limit: usize,
    after: Duration,
}

/// A job that is watched.
pub(super) struct Watched {
    pub(super) record: JobRecord,
    pub(super) job: ValidJob,
}

impl Custodian {
    pub(super) fn open(
        store: Store,
        net: NetHandle,
        network: NetworkId,
        key: Keypair,
        limit: usize,
        after: Duration,
    ) -> Self {
        let client = Client::custodian(net, network, key, store.clone(), after);
        let (ways, watching) = (Arc::default(), BTreeMap::new());
        Self { client, store, network, ways, watching, limit, after }
    }

    /// Inputs and checkpoints of watched jobs, for the nodes that take them over.
    pub(super) fn inputs(&self) -> Arc<dyn BlobSource> {
        self.client.inputs()
    }

    pub(super) fn watched(&self, job: &JobId) -> Option<Watched> {
        let record = self.store.job(job).ok()?;
        let job = ValidJob::parse_stored(&record.envelope, &self.network).ok()?;
        Some(Watched { record, job })
    }

    /// Stops watching a job and drops what belongs to it but its sealed clip.
    pub(super) fn dismiss(&mut self, job: &JobId) {
        if let Some(task) = self.watching.remove(job) {
            task.abort();
        }
        let Ok(record) = self.store.job(job) else { return };
        let checkpoint = record.checkpoint.and_then(|envelope| {
            let opened = envelope.open::<kinoflock_protocol::progress::Checkpoint>(&self.network).ok()?;
            Some(opened.value.state.id)
        });
        let dropped = checkpoint.map_or(Ok(()), |blob| self.store.remove_blob(&blob));
        if let Err(error) = dropped.and_then(|()| self.store.remove_job(job)) {
            tracing::error!(job = %job.short(), %error, "a watched job's record could not be dropped");
        }
    }

    /// Jobs that are watched.
    pub(super) fn count(&self) -> usize {
        self.watching.len()
    }

    /// Takes over what the adverts tell of who is there.
    pub(super) fn set_ways(&self, ways: Vec<Way>) {
        *self.ways.lock().unwrap_or_else(PoisonError::into_inner) = ways;
    }

    fn count_of(&self, requester: &RequesterId) -> usize {
        let mine = |job: &&JobId| self.watched(job).is_some_and(|it| it.job.requester() == *requester);
        self.watching.keys().filter(mine).count()
    }
}

impl Daemon {
    /// Takes a job into custody, or hears where one runs now.
    pub(super) fn custody(&mut self, custody: &Envelope, envelope: Envelope, submitter: NodeId) -> Response {
        match self.try_custody(custody, envelope, submitter) {
            Ok(response) => response,
            Err(refusal) => Response::Refused(*refusal),
        }
    }

    fn try_custody(
        &mut self,
        custody: &Envelope,
        envelope: Envelope,
        submitter: NodeId,
    ) -> Result<Response, Box<Refusal>> {
        let (now, here) = (unix_now(), self.identity.node_id());
        let job = ValidJob::parse(&envelope, &self.network, now, None).map_err(job_refusal)?;
        let valid = ValidCustody::parse(custody, &self.network, now, &here, &job).map_err(order_refusal)?;
        let at = &valid.custody().runs_at;
        let known = self.custodian.store.job(&job.id()).ok();
        if known.is_none() {
            self.check_custody(&job)?;
            if !self.fetch_custody_inputs(&job, submitter) {
                return Ok(Response::Busy { retry_after: INPUTS_AGAIN });
            }
        }
        let moved = known.as_ref().is_none_or(|known| known.node != at.id);
        if moved {
            let (node, addresses) = address_of(at);
            let addresses = addresses.iter().map(ToString::to_string).collect();
            let record = self.record_of(envelope, &job, node, addresses, known);
            self.custodian.store.insert_job(&record).map_err(|error| refused(&error))?;
        }
        if !self.custodian.watching.contains_key(&job.id()) {
            self.watch(&job);
        }
        tracing::debug!(job = %job.id().short(), runs_at = %at.id.short(), "watched");
        Ok(Response::Acknowledged)
    }

    fn check_custody(&self, job: &ValidJob) -> Result<(), Box<Refusal>> {
        let refuse = |limit: usize, given: usize, advice: &str| {
            let refusal = Refusal::new(Reason::QuotaExceeded, "custody.jobs").limit(limit, given);
            Err(Box::new(refusal.advice(advice)))
        };
        let watching = self.custodian.watching.len();
        if watching >= self.custodian.limit {
            return refuse(self.custodian.limit, watching + 1, "name another custodian");
        }
        let of_one = self.custodian.count_of(&job.requester());
        if of_one >= MAX_OF_ONE {
            return refuse(MAX_OF_ONE, of_one + 1, "fetch the clips of your watched jobs first");
        }
        if let Some(rule) = self.scheduler.policy().denies(&job.requester()) {
            return Err(Box::new(rule));
        }
        Ok(())
    }

    /// Fetches the inputs of a job that is to be watched. True if all are here.
    fn fetch_custody_inputs(&mut self, job: &ValidJob, submitter: NodeId) -> bool {
        let store = self.custodian.store.clone();
        let missing: Vec<_> =
            job.spec().inputs().into_iter().filter(|blob| !store.has_blob(&blob.id)).collect();
        if missing.is_empty() {
            return true;
        }
        if self.keeping.len() >= MAX_OF_ONE || !self.keeping.insert((job.id(), Content::Checkpoint)) {
            return false;
        }
        let (net, id) = (self.net.clone(), job.id());
        let limit = |blob: &kinoflock_protocol::clip::BlobRef| {
            super::adapters::most_of(self.config.policy.adapter_bytes, job.spec(), blob)
        };
        let missing: Vec<_> = missing.into_iter().map(|blob| (blob, blob.len.min(limit(&blob)))).collect();
        self.spawn(async move {
            for (blob, max_len) in missing {
                let file = store.fetch_path(&blob.id, true);
                let options = FetchOptions { max_len, ..FetchOptions::default() };
                let fetched = net.fetch_blob(blob.id, &[submitter], FileSink::new(&file), options).await;
                let kept = fetched.map_err(|error| error.to_string()).and_then(|_| {
                    store.adopt_blob(&blob.id, &file).map_err(|error| error.to_string())
                });
                if let Err(error) = kept {
                    tracing::warn!(job = %id.short(), error, "an input of a job to be watched could not be had");
                    break;
                }
            }
            Note::Kept { job: id, content: Content::Checkpoint }
        });
        false
    }

    fn record_of(
        &self,
        envelope: Envelope,
        job: &ValidJob,
        node: NodeId,
        addresses: Vec<String>,
        known: Option<JobRecord>,
    ) -> JobRecord {
        let model = job.spec().model;
        let model_name =
            self.models.get(&model).map_or_else(|| model.to_string(), |model| model.name.clone());
        let now = unix_now();
        let (former, checkpoint, created_at) = match known {
            Some(known) => (known.former, known.checkpoint, known.created_at),
            None => (Vec::new(), None, now),
        };
        JobRecord {
            job: job.id(),
            network: self.network,
            envelope,
            order: None,
            node,
            node_name: String::new(),
            addresses,
            model,
            model_name,
            created_at,
            updated_at: now,
            clock_skew_ms: 0,
            told: None,
            state: RecordState::Queued,
            next_seq: 0,
            error: None,
            receipt: None,
            clip: None,
            latents: None,
            answer: None,
            answered: false,
            require_terms: false,
            pinned: false,
            former,
            checkpoint,
            custodians: Vec::new(),
            holders: Vec::new(),
            batch: None,
            audits: kinoflock_client::store::Audits::default(),
        }
    }

    /// Watches again what was watched before a restart.
    pub(super) fn restore_custody(&mut self) {
        let jobs = self.custodian.store.jobs().unwrap_or_else(|error| {
            tracing::error!(%error, "the jobs in custody could not be read");
            Vec::new()
        });
        for entry in jobs {
            if let Some(watched) = self.custodian.watched(&entry.job) {
                self.watch(&watched.job);
            }
        }
        if !self.custodian.watching.is_empty() {
            tracing::info!(jobs = self.custodian.watching.len(), "jobs in custody");
        }
    }

    fn watch(&mut self, job: &ValidJob) {
        let own = self.identity.node_id();
        // Those known at the last advert may be fewer, and all of them gone when the job is to be handed on.
        self.custodian.set_ways(self.adverts.ways());
        let turn = job.spec().custodians.iter().position(|node| *node == own).unwrap_or_default() as u32;
        let watch = Watch {
            job: job.clone(),
            client: self.custodian.client.clone().patient(self.custodian.after * (turn + 1)),
            store: self.custodian.store.clone(),
            ways: Arc::clone(&self.custodian.ways),
            holdings: self.holdings.clone(),
            net: self.net.clone(),
            keep: Millis::from(self.config.terms.keep_at_most),
        };
        let (id, notes) = (job.id(), self.notes.clone());
        let task = tokio::spawn(async move {
            watch.run().await;
            // Without a daemon nobody needs the note: what matters is on disk.
            let _ = notes.send(Note::Watched { job: id }).await;
        });
        self.custodian.watching.insert(id, task.abort_handle());
    }

    /// A watched job came to its end: its clip is held, or its time is over.
    pub(super) fn handle_watched(&mut self, job: JobId) {
        self.custodian.watching.remove(&job);
    }
}

/// One job in custody.
struct Watch {
    job: ValidJob,
    client: Client,
    store: Store,
    ways: Arc<Mutex<Vec<Way>>>,
    holdings: Holdings,
    net: NetHandle,
    keep: Millis,
}

impl Watch {
    async fn run(self) {
        let id = self.job.id();
        while self.job.spec().expires_at() > unix_now() {
            let ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let watched = tokio::time::timeout(WAYS_LIFE, self.client.watch_over(&id, &ways)).await;
            match watched {
                // Time for newer ways.
                Err(_) => {}
                Ok(Ok(record)) => match self.hold(&record).await {
                    Ok(()) => {
                        tracing::info!(job = %id.short(), "the clip of a watched job is held, sealed");
                        return;
                    }
                    Err(error) => {
                        tracing::debug!(job = %id.short(), error, "the clip of a watched job could not be fetched");
                        self.make_again(&record);
                        tokio::time::sleep(PAUSE).await;
                    }
                },
                Ok(Err(SessionError::Cancelled { .. } | SessionError::Failed { retryable: false, .. })) => {
                    return;
                }
                Ok(Err(SessionError::Store(StoreError::NotFound { .. }))) => return,
                Ok(Err(error)) => {
                    tracing::debug!(job = %id.short(), %error, "nobody takes over a watched job now");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Fetches the clip, seals it, and holds it.
    async fn hold(&self, record: &JobRecord) -> Result<(), String> {
        let receipt = record.receipt.as_ref().ok_or("no receipt")?;
        let made = ValidReceipt::parse(receipt, &record.network).map_err(|error| error.to_string())?;
        let (clip, len) = (made.receipt().clip, made.receipt().clip_len);
        let id = self.job.id();
        let plain = self.store.fetch_path(&clip.into(), true);
        let options = FetchOptions { max_len: len, ..FetchOptions::default() };
        let fetched = self.net.fetch_blob(clip.into(), &[record.node], FileSink::new(&plain), options).await;
        fetched.map_err(|error| error.to_string())?;
        let key = SealKey::of_job(&record.envelope);
        let statement = Bytes::new(seal_bytes(&key, &receipt.encode())).map_err(|error| error.to_string())?;
        let file = self.holdings.incoming(&id, Content::Clip);
        let to = file.clone();
        let sealed = tokio::task::spawn_blocking(move || {
            let sealed = seal_file(&key, &clip.into(), &plain, &to);
            // The clip itself is not kept here.
            let _ = std::fs::remove_file(&plain);
            sealed
        });
        let sealed = sealed.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        let row = HeldRow {
            requester: self.job.requester(),
            maker: self.net.local_node(),
            content: Content::Clip,
            sealed,
            statement,
            until: unix_now().plus(self.keep),
        };
        let (holdings, store, requester) = (self.holdings.clone(), self.store.clone(), row.requester);
        keep_file(self.holdings.clone(), id, file, row).await?;
        // Its requester may have come back meanwhile.
        if store.job(&id).is_err() {
            holdings.forget(&id, &requester, unix_now()).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// The maker is gone with the clip: as if it had never been made, unless it comes back first.
    fn make_again(&self, record: &JobRecord) {
        let again = self.store.update_job(&record.job, |record| {
            record.receipt = None;
            record.state = RecordState::Queued;
        });
        if let Err(error) = again {
            tracing::error!(job = %record.job.short(), %error, "a watched job's record could not be written");
        }
    }
}

fn refused(error: &StoreError) -> Box<Refusal> {
    tracing::error!(%error, "a job could not be taken into custody");
    Box::new(Refusal::new(Reason::Internal, error.code()).advice("name another custodian"))
}

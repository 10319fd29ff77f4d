//! Copies of a finished clip, sealed, with volunteers, until its requester has answered the receipt.
//!
//! Who may hold one says the job's `share`: nobody, nodes of this node's collectives, or everybody. Custodians that the job
//! names fetch a copy by themselves.
//!
//! One copy is made whatever the job's `share`: where the requester is reached over a relay only, which carries no clip, a
//! public node mirrors it. A holder verifies the bytes and sees nothing of them.

use std::time::Duration;

use kinoflock_net::discovery::is_global;
use kinoflock_net::limits::RELAYED_BLOB_BYTES;
use kinoflock_net::peer::is_relayed;
use kinoflock_net::{Multiaddr, NetHandle};
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::Bytes;
use kinoflock_protocol::custody::{Content, Keep};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{JobId, Keypair, NetworkId, NodeId, Nonce};
use kinoflock_protocol::job::{Share, ValidJob};
use kinoflock_protocol::query::{JobQuery, QueryAction};
use kinoflock_protocol::receipt::Receipt;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::seal::{SealKey, seal_bytes};
use kinoflock_protocol::units::{Millis, UnixMillis};

use super::{Daemon, Note, unix_now};
use crate::clips::Clips;
use crate::holdings::{HeldRow, Holdings};
use crate::queue::Queue;

/// Volunteers that are to hold a copy.
const COPIES: usize = 2;
/// Volunteers that are asked until enough hold one.
const MAX_ASKED: usize = 12;
/// Clips that are copied at once; others are copied when their requesters ask again.
const MAX_COPYING: usize = 64;
/// Time to see whether there is, or comes, a direct connection.
const DIRECT_LOOK: Duration = Duration::from_secs(1);
/// How often one is asked whether it has fetched its copy.
const TRIES: u32 = 240;
/// Pause between two such questions.
const PAUSE: Duration = Duration::from_millis(500);

/// What a copy is made of, and who sends it.
struct Copying {
    job: JobId,
    key: SealKey,
    requester: kinoflock_protocol::id::RequesterId,
    receipt: Envelope,
    clip: BlobRef,
    until: UnixMillis,
    node: NodeId,
    keypair: Keypair,
    network: NetworkId,
    net: NetHandle,
    clips: Clips,
    holdings: Holdings,
    queue: Queue,
    caller: Caller,
    /// Who may hold a copy by the job's share.
    volunteers: Vec<NodeId>,
    /// Who would mirror it, where the requester is reached over a relay only.
    mirrors: Vec<NodeId>,
    /// Who waits for the clip.
    waiting: Option<NodeId>,
}

impl Daemon {
    /// Puts copies of a clip with volunteers, in the background; `waiting` is who waits for it, if that is known.
    pub(super) fn replicate(
        &mut self,
        job: &ValidJob,
        job_envelope: &Envelope,
        receipt: &Envelope,
        waiting: Option<NodeId>,
    ) {
        let Ok(opened) = receipt.open::<Receipt>(&self.network) else { return };
        let (volunteers, mut mirrors) = (self.volunteers(job), Vec::new());
        if waiting.is_some() && opened.value.clip_len > RELAYED_BLOB_BYTES {
            mirrors = self.mirrors(job);
        }
        let is_idle = volunteers.is_empty() && mirrors.is_empty();
        if is_idle || self.copying.len() >= MAX_COPYING || !self.copying.insert(job.id()) {
            return;
        }
        let copying = Copying {
            volunteers,
            mirrors,
            waiting,
            job: job.id(),
            key: SealKey::of_job(job_envelope),
            requester: job.requester(),
            receipt: receipt.clone(),
            clip: BlobRef { id: opened.value.clip.into(), len: opened.value.clip_len },
            until: unix_now().plus(Millis::from(self.config.terms.keep_at_most)),
            node: self.identity.node_id(),
            keypair: self.identity.keypair().clone(),
            network: self.network,
            net: self.net.clone(),
            clips: self.clips.clone(),
            holdings: self.holdings.clone(),
            queue: self.queue.clone(),
            caller: self.caller(),
        };
        self.spawn(async move {
            let job = copying.job;
            match copying.spread().await {
                Ok(0) => {}
                Ok(copies) => tracing::info!(job = %job.short(), copies, "sealed copies lie with volunteers"),
                Err(error) => tracing::warn!(job = %job.short(), error, "no sealed copies could be made"),
            }
            Note::Copied { job }
        });
    }

    pub(super) fn handle_copied(&mut self, job: JobId) {
        self.copying.remove(&job);
    }

    /// The requester asks how a finished job stands: if it is reached over a relay only and nobody holds a copy yet, the clip
    /// is mirrored now.
    pub(super) fn mirror(&mut self, record: &crate::queue::JobRecord, receipt: &Envelope, waiting: NodeId) {
        let is_held = self.holdings.replicas(&record.id).is_ok_and(|replicas| !replicas.is_empty());
        if is_held || record.answer.is_some() {
            return;
        }
        if let Ok(job) = ValidJob::parse_stored(&record.job, &self.network) {
            self.replicate(&job, &record.job, receipt, Some(waiting));
        }
    }

    /// Nodes that both sides may reach: those that say that anybody does.
    fn mirrors(&self, job: &ValidJob) -> Vec<NodeId> {
        let is_open = |addr: &Multiaddr| is_global(addr) && !is_relayed(addr);
        let known = self.adverts.live().filter(|(_, capacity)| {
            capacity.addresses.iter().filter_map(|addr| addr.parse().ok()).any(|addr| is_open(&addr))
        });
        let mut nodes: Vec<NodeId> = known.map(|(node, _)| node).collect();
        nodes.retain(|node| *node != self.identity.node_id());
        in_turn(job, &mut nodes);
        nodes
    }

    /// Nodes that may hold a copy of this job's clip, in an order of their own for each job.
    fn volunteers(&self, job: &ValidJob) -> Vec<NodeId> {
        let ours = &self.config.serve.collectives;
        let fits = |collectives: &[kinoflock_protocol::id::CollectiveId]| match job.spec().share {
            Share::None => false,
            Share::Collective => collectives.iter().any(|collective| ours.contains(collective)),
            Share::Public => true,
        };
        let known = self.adverts.live().filter(|(_, capacity)| fits(&capacity.serves.collectives));
        let mut nodes: Vec<NodeId> = known.map(|(node, _)| node).collect();
        nodes.retain(|node| !job.spec().custodians.contains(node) && *node != self.identity.node_id());
        in_turn(job, &mut nodes);
        nodes
    }

    /// The requester has the clip, or wants it forgotten: those who hold copies may drop them.
    pub(super) fn call_in_copies(&self, job: &JobId) {
        let (holdings, job) = (self.holdings.clone(), *job);
        let caller = self.caller();
        tokio::spawn(async move {
            let copies = holdings.replicas(&job).unwrap_or_default();
            caller.call_in(&job, &copies).await;
            if let Err(error) = holdings.set_replicas(&job, &[]) {
                tracing::error!(job = %job.short(), %error, "where copies lie could not be erased");
            }
        });
    }

    fn caller(&self) -> Caller {
        Caller { keypair: self.identity.keypair().clone(), network: self.network, net: self.net.clone() }
    }
}

/// Who takes copies back.
#[derive(Clone)]
struct Caller {
    keypair: Keypair,
    network: NetworkId,
    net: NetHandle,
}

impl Caller {
    async fn call_in(&self, job: &JobId, copies: &[NodeId]) {
        for node in copies {
            // One that does not hear it drops its copy when its time is over.
            if let Err(error) = self.call_in_one(job, *node).await {
                tracing::debug!(job = %job.short(), node = %node.short(), error, "a holder was not told");
            }
        }
    }

    async fn call_in_one(&self, job: &JobId, node: NodeId) -> Result<(), String> {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|error| error.to_string())?;
        let query = JobQuery {
            job: *job,
            action: QueryAction::Forget,
            node,
            issued_at: unix_now(),
            nonce: Nonce::from_bytes(nonce),
        };
        let query =
            Envelope::seal(&self.keypair, &self.network, &query).map_err(|error| error.to_string())?;
        self.net.request(node, Request::Forget(query)).await.map(drop).map_err(|error| error.to_string())
    }
}

impl Copying {
    /// Whom to ask, in this order, and how many are to hold a copy.
    async fn chosen(&self) -> (Vec<NodeId>, usize) {
        let wanted = if self.volunteers.is_empty() { 0 } else { COPIES };
        let Some(waiting) = self.waiting.filter(|_| !self.mirrors.is_empty()) else {
            return (self.volunteers.clone(), wanted);
        };
        if matches!(self.net.direct(waiting, DIRECT_LOOK).await, Ok(true)) {
            return (self.volunteers.clone(), wanted);
        }
        let mut chosen = Vec::new();
        for node in &self.mirrors {
            if matches!(self.net.direct(*node, DIRECT_LOOK).await, Ok(true)) {
                chosen.push(*node);
            }
            if chosen.len() == COPIES {
                break;
            }
        }
        let others =
            self.volunteers.iter().filter(|node| !chosen.contains(node)).copied().collect::<Vec<_>>();
        chosen.extend(others);
        (chosen, wanted.max(1))
    }

    async fn spread(self) -> Result<usize, String> {
        let (chosen, wanted) = self.chosen().await;
        if chosen.is_empty() {
            return Ok(0);
        }
        let sealed = self.seal().await?;
        let statement =
            Bytes::new(seal_bytes(&self.key, &self.receipt.encode())).map_err(|e| e.to_string())?;
        let mut copies = Vec::new();
        for volunteer in chosen {
            match self.hand(volunteer, sealed, &statement).await {
                Ok(()) => {
                    copies.push(volunteer);
                    // Whoever waits need not wait for the others.
                    self.note(&copies).await?;
                }
                Err(error) => {
                    tracing::debug!(job = %self.job.short(), node = %volunteer.short(), error, "a volunteer holds no copy");
                }
            }
            if copies.len() == wanted {
                break;
            }
        }
        // Only the others' copies are wanted.
        let (holdings, job, requester) = (self.holdings.clone(), self.job, self.requester);
        let dropped =
            tokio::task::spawn_blocking(move || holdings.forget(&job, &requester, unix_now())).await;
        dropped.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        Ok(copies.len())
    }

    /// Keeps where copies lie; calls them in if the requester was quicker.
    async fn note(&self, copies: &[NodeId]) -> Result<(), String> {
        let record = self.queue.find(&self.job).map_err(|error| error.to_string())?;
        if record.is_some_and(|record| record.answer.is_none()) {
            return self.holdings.set_replicas(&self.job, copies).map_err(|error| error.to_string());
        }
        self.caller.call_in(&self.job, copies).await;
        Err("its requester has it already".to_owned())
    }

    /// The sealed clip, held here too while others fetch it.
    async fn seal(&self) -> Result<BlobRef, String> {
        let (clips, holdings, key) = (self.clips.clone(), self.holdings.clone(), self.key.clone());
        let (job, clip, requester, maker, until) =
            (self.job, self.clip, self.requester, self.node, self.until);
        let sealing = tokio::task::spawn_blocking(move || {
            let bytes = seal_bytes(&key, &clips.read(&clip.id).map_err(|error| error.to_string())?);
            let file = holdings.incoming(&job, Content::Clip);
            std::fs::write(&file, &bytes).map_err(|error| error.to_string())?;
            let sealed = BlobRef::of(&bytes);
            let row = HeldRow {
                requester,
                maker,
                content: Content::Clip,
                sealed,
                statement: Bytes::default(),
                until,
            };
            let kept = holdings.keep(job, &file, &row, unix_now()).map_err(|error| error.to_string());
            // What is kept was copied.
            let _ = std::fs::remove_file(&file);
            kept.map(|()| sealed)
        });
        sealing.await.map_err(|error| error.to_string())?
    }

    async fn hand(
        &self,
        holder: NodeId,
        sealed: BlobRef,
        statement: &Bytes<{ kinoflock_protocol::limits::MAX_STATEMENT }>,
    ) -> Result<(), String> {
        for _ in 0..TRIES {
            let keep = Keep {
                job: self.job,
                requester: self.requester,
                holder,
                content: Content::Clip,
                sealed,
                statement: statement.clone(),
                until: self.until,
                issued_at: unix_now(),
            };
            let envelope = Envelope::seal(&self.keypair, &self.network, &keep).map_err(|e| e.to_string())?;
            match self.net.request(holder, Request::Keep(envelope)).await {
                Ok(Response::Kept { .. }) => return Ok(()),
                Ok(Response::Busy { .. }) => tokio::time::sleep(PAUSE).await,
                Ok(Response::Refused(refusal)) => return Err(refusal.to_string()),
                Ok(other) => return Err(format!("answered {}", other.name())),
                Err(error) => return Err(error.to_string()),
            }
        }
        Err(format!("did not fetch it within {} s", (PAUSE * TRIES).as_secs()))
    }
}

/// An order of their own for each job, so that not all clips lie with the same few.
fn in_turn(job: &ValidJob, nodes: &mut Vec<NodeId>) {
    nodes.sort_by_key(|node| {
        *blake3::hash(&[job.id().as_bytes(), node.as_bytes().as_slice()].concat()).as_bytes()
    });
    nodes.truncate(MAX_ASKED);
}

//! Copies of a finished clip, sealed, with volunteers, until its requester has answered the receipt.
//!
//! Who may hold one says the job's `share`: nobody, nodes of this node's collectives, or everybody. Custodians that the job
//! names fetch a copy by themselves.

use std::time::Duration;

use kinoflock_net::NetHandle;
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

use super::{Daemon, unix_now};
use crate::clips::Clips;
use crate::holdings::{HeldRow, Holdings};
use crate::queue::Queue;

/// Volunteers that are to hold a copy.
const COPIES: usize = 2;
/// Volunteers that are asked until enough hold one.
const MAX_ASKED: usize = 12;
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
}

impl Daemon {
    /// Puts copies of a clip that was just made with volunteers, in the background.
    pub(super) fn replicate(&self, job: &ValidJob, job_envelope: &Envelope, receipt: &Envelope) {
        let volunteers = self.volunteers(job);
        let Ok(opened) = receipt.open::<Receipt>(&self.network) else { return };
        if volunteers.is_empty() {
            return;
        }
        let copying = Copying {
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
        tokio::spawn(async move {
            let job = copying.job;
            match copying.spread(volunteers).await {
                Ok(copies) => tracing::info!(job = %job.short(), copies, "sealed copies lie with volunteers"),
                Err(error) => tracing::warn!(job = %job.short(), error, "no sealed copies could be made"),
            }
        });
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
        let turn = |node: &NodeId| {
            *blake3::hash(&[job.id().as_bytes(), node.as_bytes().as_slice()].concat()).as_bytes()
        };
        nodes.sort_by_key(turn);
        nodes.truncate(MAX_ASKED);
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
    async fn spread(self, volunteers: Vec<NodeId>) -> Result<usize, String> {
        let sealed = self.seal().await?;
        let statement =
            Bytes::new(seal_bytes(&self.key, &self.receipt.encode())).map_err(|e| e.to_string())?;
        let mut copies = Vec::new();
        for volunteer in volunteers {
            match self.hand(volunteer, sealed, &statement).await {
                Ok(()) => copies.push(volunteer),
                Err(error) => {
                    tracing::debug!(job = %self.job.short(), node = %volunteer.short(), error, "a volunteer holds no copy");
                }
            }
            if copies.len() == COPIES {
                break;
            }
        }
        let is_wanted = match self.queue.find(&self.job).map_err(|error| error.to_string())? {
            Some(record) => record.answer.is_none(),
            None => false,
        };
        if is_wanted {
            self.holdings.set_replicas(&self.job, &copies).map_err(|error| error.to_string())?;
        } else {
            // The requester was quicker than the volunteers.
            self.caller.call_in(&self.job, &copies).await;
        }
        // Only the others' copies are wanted.
        let (holdings, job, requester) = (self.holdings.clone(), self.job, self.requester);
        let dropped =
            tokio::task::spawn_blocking(move || holdings.forget(&job, &requester, unix_now())).await;
        dropped.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        Ok(copies.len())
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

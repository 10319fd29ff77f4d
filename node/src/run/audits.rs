//! Step audits: what this node keeps of the steps that it committed to, and to whom it shows them.
//!
//! Where a job asks for a commitment to its steps, its worker leaves the latents before the first step and after each in
//! the job's folder. Once the receipt is signed they are sealed with the job's key into a store of their own, which has
//! its own limits of size and time. Beside it lies a record of what was committed to, which outlives the job's own: it
//! holds no prompt.
//!
//! Only the requester, or an auditor whom the requester named in a signed grant, learns where the sealed states are.

use std::path::{Path, PathBuf};

use kinoflock_protocol::audit::{AuditReply, MAX_OPENINGS, Opening, ValidAudit, opened, prove};
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{self, List};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{JobId, NetworkId, ReceiptId, RequesterId};
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::rpc::Response;
use kinoflock_protocol::seal::{SealKey, seal_bytes};
use kinoflock_protocol::units::UnixMillis;
use serde::{Deserialize, Serialize};

use super::refuse::{invalid, order_refusal};
use super::{Daemon, unix_now};
use crate::clips::{Clips, ClipsError, Owner};
use crate::engine::wire::{MAX_STEP_RECORD, STEPS, StepRecord, state_name};
use crate::queue::Queue;

/// Name of the folder of states in a job's folder.
pub(super) const STATES: &str = "states";
/// Name of the store in the state folder.
const STORE: &str = "audits";
/// Name of the folder of records beside it.
const RECORDS: &str = "audit-records";
/// Greatest record in bytes: what was committed to, and where the sealed states are.
const MAX_RECORD: usize = 2 * MAX_STEP_RECORD;

/// What is kept for audits.
#[derive(Debug, Clone)]
pub(super) struct Audits {
    store: Clips,
    records: PathBuf,
}

/// What is kept of one job.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    requester: RequesterId,
    receipt: ReceiptId,
    kept_at: UnixMillis,
    steps: StepRecord,
    /// The sealed states; none for those that another node went through.
    sealed: Vec<Option<BlobRef>>,
}

impl Audits {
    /// Opens or makes the store.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(super) fn open(state: &Path, limit: u64) -> Result<Self, ClipsError> {
        let records = state.join(RECORDS);
        std::fs::create_dir_all(&records).map_err(|source| ClipsError::Io {
            action: "make",
            path: records.clone(),
            source,
        })?;
        Ok(Self { store: Clips::open(&state.join(STORE), limit)?, records })
    }

    /// The sealed states, for whoever knows their ids.
    pub(super) fn store(&self) -> Clips {
        self.store.clone()
    }

    /// Keeps the states of a finished job. That they cannot be kept is no reason to fail it: it cannot be audited then.
    pub(super) async fn keep(
        &self,
        queue: &Queue,
        receipt: &Envelope,
        states: &Path,
        owner: Owner,
        network: &NetworkId,
    ) {
        let (this, queue, states) = (self.clone(), queue.clone(), states.to_owned());
        let receipt = ReceiptId::of(receipt, network);
        let kept = tokio::task::spawn_blocking(move || this.keep_now(&queue, receipt, &states, owner)).await;
        if let Err(error) = kept.unwrap_or_else(|error| Err(error.to_string())) {
            tracing::warn!(job = %owner.job.short(), error, "a job's steps were not kept for audits");
        }
    }

    fn keep_now(&self, queue: &Queue, receipt: ReceiptId, states: &Path, owner: Owner) -> Result<(), String> {
        let job = queue.find(&owner.job).map_err(|error| error.to_string())?;
        let key = SealKey::of_job(&job.ok_or("the job is not here any more")?.job);
        let steps = std::fs::read(states.join(STEPS)).map_err(|error| error.to_string())?;
        let steps: StepRecord = codec::decode(&steps, MAX_STEP_RECORD).map_err(|error| error.to_string())?;
        let now = unix_now();
        let mut sealed = Vec::with_capacity(steps.leaves.len());
        for index in 0..steps.leaves.len() {
            let state = match std::fs::read(states.join(state_name(index))) {
                Ok(state) => state,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    sealed.push(None);
                    continue;
                }
                Err(error) => return Err(error.to_string()),
            };
            let blob = self.store.put(&seal_bytes(&key, &state), owner, now);
            let blob = blob.map_err(|error| error.to_string())?;
            // What is acknowledged makes room when the store is full, the oldest first.
            self.store.acknowledge(&blob.id, &owner.job, now).map_err(|error| error.to_string())?;
            sealed.push(Some(blob));
        }
        let record = Record { requester: owner.requester, receipt, kept_at: now, steps, sealed };
        std::fs::write(self.record_path(&owner.job), codec::encode(&record))
            .map_err(|error| error.to_string())
    }

    fn record_path(&self, job: &JobId) -> PathBuf {
        self.records.join(job.to_string())
    }

    fn record(&self, job: &JobId) -> Option<Record> {
        let bytes = std::fs::read(self.record_path(job)).ok()?;
        codec::decode(&bytes, MAX_RECORD).ok()
    }

    /// Erases what is kept of a requester's job; says whether there was something.
    pub(super) fn forget(&self, job: &JobId, requester: &RequesterId) -> bool {
        if self.record(job).is_none_or(|record| record.requester != *requester) {
            return false;
        }
        let erased = self.store.forget(job, unix_now()).map(drop).map_err(|error| error.to_string());
        let erased = erased
            .and_then(|()| std::fs::remove_file(self.record_path(job)).map_err(|error| error.to_string()));
        if let Err(error) = erased {
            tracing::error!(job = %job.short(), error, "latents kept for audits could not be erased");
        }
        true
    }

    /// Erases what was kept before this time.
    pub(super) fn sweep(&self, before: UnixMillis) {
        if let Err(error) = self.store.sweep(before, before) {
            tracing::error!(%error, "old latents kept for audits could not be erased");
        }
        for entry in std::fs::read_dir(&self.records).into_iter().flatten().flatten() {
            let record = std::fs::read(entry.path()).ok();
            let record = record.and_then(|bytes| codec::decode::<Record>(&bytes, MAX_RECORD).ok());
            let is_over = record.is_none_or(|record| record.kept_at < before);
            if is_over && let Err(error) = std::fs::remove_file(entry.path()) {
                tracing::error!(%error, "an old record of audits could not be erased");
            }
        }
    }
}

impl Daemon {
    /// Shows the states that an audit asks for, to those who may see them.
    pub(super) fn audit(&mut self, request: &Envelope, grant: Option<&Envelope>) -> Response {
        match self.try_audit(request, grant) {
            Ok(reply) => {
                self.auditor.count_shown();
                Response::Audit(reply)
            }
            Err(refusal) => Response::Refused(*refusal),
        }
    }

    fn try_audit(&self, request: &Envelope, grant: Option<&Envelope>) -> Result<AuditReply, Box<Refusal>> {
        let asked = request.open::<kinoflock_protocol::audit::AuditRequest>(&self.network);
        let job = asked.map_err(|error| invalid(error.code(), &error))?.value.job;
        let unknown = || Box::new(Refusal::new(Reason::JobUnknown, "audit.job").given(job));
        let record = self.audits.record(&job).ok_or_else(unknown)?;
        let here = self.identity.node_id();
        let audit = ValidAudit::parse(request, grant, &self.network, unix_now(), &here, &record.requester);
        let asked = audit
            .map_err(|error| match error {
                kinoflock_protocol::order::OrderError::WrongSigner { .. } => {
                    Box::new(Refusal::new(Reason::NotYours, "audit.signer").given(job))
                }
                error => order_refusal(error),
            })?
            .request;
        if asked.receipt != record.receipt {
            return Err(invalid("audit.receipt", &"the job has no such receipt"));
        }
        let steps = (record.steps.leaves.len() as u32).saturating_sub(1);
        if asked.step >= steps {
            let refusal =
                Refusal::new(Reason::Invalid, "audit.step").limit(steps.saturating_sub(1), asked.step);
            return Err(Box::new(refusal));
        }
        let openings = opened(asked.step, steps).into_iter().map(|index| opening(&record, index));
        let openings = openings.collect::<Option<Vec<_>>>().filter(|all| {
            let is_here = |opening: &Opening| self.audits.store.contains(&opening.sealed.id);
            all.len() <= MAX_OPENINGS && all.iter().all(is_here)
        });
        let gone = || {
            let refusal = Refusal::new(Reason::JobUnknown, "storage.audit_keep").given(asked.step);
            Box::new(
                refusal
                    .advice("the latents of this step are not here: another node did it, or they are erased"),
            )
        };
        let openings = List::first_of(openings.ok_or_else(gone)?);
        tracing::info!(job = %job.short(), step = asked.step, "shown to an auditor");
        Ok(AuditReply { leaves: u64::from(steps) + 1, openings })
    }
}

fn opening(record: &Record, index: u32) -> Option<Opening> {
    let at = index as usize;
    Some(Opening {
        index,
        latents: *record.steps.latents.get(at)?,
        sealed: record.sealed.get(at).copied().flatten()?,
        proof: prove(&record.steps.leaves, at)?,
    })
}

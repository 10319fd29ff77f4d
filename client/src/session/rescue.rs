//! A job whose node is lost goes to another one, from its newest checkpoint where there is one; the former is called off.
//!
//! The signed job stays what it is: only the order is new. Exactly one outcome is accepted, that of the node that has the
//! job now; every former node is told to stop as soon as it can be reached.

use std::time::Duration;

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::job::Audience;
use kinoflock_protocol::order::Resume;
use kinoflock_protocol::progress::Checkpoint;
use kinoflock_protocol::query::{JobQuery, QueryAction};
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::work::work;
use kinoflock_protocol::{Envelope, JobId, JobSpec, NodeId, PublicKey, Reason};

use super::find::Model;
use super::place::Placing;
use super::{Client, Events, SessionError, corrected, nonce};
use crate::store::{Former, JobRecord};
use crate::ticket::{Way, parse_addresses};

/// How often a job may be handed on: one that kills every node is not to kill them all.
const MAX_MOVES: usize = 6;
/// Time for telling a former node to stop.
const CALL_OFF_WITHIN: Duration = Duration::from_secs(3);

impl Client {
    /// Hands a job on to another node; false if nobody else is there or takes it.
    pub(super) async fn rescue(
        &self,
        record: &JobRecord,
        why: &SessionError,
        ways: &[Way],
        events: &Events,
    ) -> Result<bool, SessionError> {
        let spec = record.envelope.open::<JobSpec>(&self.network)?.value;
        if record.former.len() >= MAX_MOVES {
            return Ok(false);
        }
        let ways: Vec<Way> = ways.iter().filter(|way| !leads_only_to(way, &record.node)).cloned().collect();
        let none = Events::none();
        let found =
            if record.pinned { self.find_named(&ways, &none).await } else { self.find(&ways, &none).await };
        let mut found = found.unwrap_or_default();
        // Somebody who watches the job may know more.
        if self.elsewhere(record, &found).await? {
            return Ok(true);
        }
        let record = &self.store.job(&record.job)?;
        if matches!(spec.addressed_to, Audience::Node(_)) {
            return Ok(false);
        }
        if !record.pinned {
            self.seek(&record.model.to_string(), &mut found).await;
        }
        found.retain(|found| self.may_have(record, &found.candidate.node));
        let model = Model { id: record.model, name: record.model_name.clone() };
        let Ok(manifest) = self.manifest(&model, &found).await else { return Ok(false) };
        let mut former = record.former.clone();
        former.push(Former::of(record, why.code()));
        let placing = Placing {
            work: work(&manifest.work, &spec.shape()),
            spec,
            model,
            require_terms: record.require_terms,
            pinned: record.pinned,
            deadline: None,
            signed: Some(record.envelope.clone()),
            resume: self.resume(record)?,
            before: Some((record.clone(), why.to_string())),
            former,
            wanted_custodians: 0,
            custodians: record.custodians.clone(),
            batch: record.batch.clone(),
            audits: record.audits.clone(),
        };
        match self.place(placing, &found, events).await {
            Ok(_) => {
                let (client, job) = (self.clone(), record.job);
                tokio::spawn(async move { client.call_off(&job).await });
                Ok(true)
            }
            Err(SessionError::NoTaker { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Tells every former node of a job to stop. One that cannot be told now is told when the job is next followed.
    pub(super) async fn call_off(&self, job: &JobId) {
        let Ok(record) = self.store.job(job) else { return };
        let going = record.former.iter().filter(|former| !former.cancelled);
        let told = going.map(|former| async move {
            let told = tokio::time::timeout(CALL_OFF_WITHIN, self.stop_former(job, former)).await;
            (former.node, matches!(told, Ok(Ok(()))))
        });
        let told: Vec<(NodeId, bool)> = futures::future::join_all(told).await;
        let stopped = |node: &NodeId| told.iter().any(|(told, stopped)| told == node && *stopped);
        if !told.iter().any(|(_, stopped)| *stopped) {
            return;
        }
        let kept = self.update(job, |record| {
            for former in record.former.iter_mut().filter(|former| stopped(&former.node)) {
                former.cancelled = true;
            }
        });
        if let Err(error) = kept {
            tracing::warn!(job = %job.short(), %error, "who stopped a job could not be kept");
        }
    }

    async fn stop_former(&self, job: &JobId, former: &Former) -> Result<(), SessionError> {
        self.net.connect(former.node, parse_addresses(&former.addresses)).await?;
        let issued_at = corrected(crate::now(), former.clock_skew_ms);
        let query = JobQuery {
            job: *job,
            action: QueryAction::Cancel,
            node: former.node,
            issued_at,
            nonce: nonce()?,
        };
        let query = Envelope::seal(&self.key, &self.network, &query)?;
        match self.net.request_within(former.node, Request::Cancel(query), CALL_OFF_WITHIN).await? {
            Response::Cancelled { .. } => Ok(()),
            Response::Refused(refusal) if refusal.reason == Reason::JobUnknown => Ok(()),
            other => Err(super::find::unexpected(former.node, "a cancel", other)),
        }
    }

    /// Keeps a running job's newest checkpoint: the state first, in the background, then the record that names it. What is
    /// not this node's word on this job is not kept.
    pub(super) fn keep_checkpoint(&self, record: &JobRecord, envelope: Envelope) {
        let Ok(opened) = envelope.open::<Checkpoint>(&self.network) else { return };
        let (checkpoint, job, node) = (opened.value, record.job, record.node);
        let is_sound = opened.signer == PublicKey::from(node)
            && checkpoint.job == job
            && checkpoint.model == record.model
            && checkpoint.step < checkpoint.total;
        if !is_sound {
            tracing::warn!(job = %job.short(), node = %node.short(), "a checkpoint that is not this job's was passed over");
            return;
        }
        let client = self.clone();
        tokio::spawn(async move {
            // One that cannot be had is no loss: the next one comes, and without any the job begins anew.
            let fetched = client.fetch_to_store(&checkpoint.state, &[node], &Events::none()).await;
            let kept = fetched.and_then(|_| client.replace_checkpoint(&job, envelope, &checkpoint));
            if let Err(error) = kept {
                tracing::debug!(job = %job.short(), step = checkpoint.step, %error, "a checkpoint was not kept");
            }
        });
    }

    /// Names a fetched checkpoint in the record, and drops the one that it replaces; or drops it, if a newer one was fetched
    /// sooner.
    fn replace_checkpoint(
        &self,
        job: &JobId,
        envelope: Envelope,
        given: &Checkpoint,
    ) -> Result<(), SessionError> {
        let mut unneeded = None;
        self.update(job, |record| {
            let held =
                record.checkpoint.as_ref().and_then(|held| held.open::<Checkpoint>(&self.network).ok());
            if held.as_ref().is_some_and(|held| held.value.step >= given.step) {
                unneeded = held.filter(|held| held.value.state != given.state).map(|_| given.state);
            } else {
                unneeded = held.map(|held| held.value.state).filter(|state| *state != given.state);
                record.checkpoint = Some(envelope);
            }
        })?;
        if let Some(state) = unneeded {
            self.store.remove_blob(&state.id)?;
        }
        Ok(())
    }

    /// Where another node can go on, its files ready to be fetched from here.
    fn resume(&self, record: &JobRecord) -> Result<Option<Resume>, SessionError> {
        let Some(envelope) = &record.checkpoint else { return Ok(None) };
        let Ok(checkpoint) = envelope.open::<Checkpoint>(&self.network) else { return Ok(None) };
        let (state, step) = (checkpoint.value.state, checkpoint.value.step);
        if self.store.read_blob(&state.id).is_err() {
            return Ok(None);
        }
        let bytes = envelope.encode();
        self.store.insert_blob(&bytes)?;
        let checkpoint = BlobRef::of(&bytes);
        self.inputs.serve([checkpoint.id, state.id]);
        Ok(Some(Resume { checkpoint, step }))
    }

    /// Whether a node may have the job: not the one that has it, none that failed it, and none that went wrong a moment ago.
    fn may_have(&self, record: &JobRecord, node: &NodeId) -> bool {
        let had = record.former.iter().find(|former| former.node == *node);
        let failed = had.is_some_and(|former| !matches!(former.why.as_str(), "unreachable" | "job_stalled"));
        let avoided = had.is_some() && self.store.experience(node).is_avoided(crate::now());
        *node != record.node && !failed && !avoided
    }
}

fn leads_only_to(way: &Way, node: &NodeId) -> bool {
    way.nodes().is_some_and(|nodes| nodes.iter().all(|(id, _)| id == node))
}

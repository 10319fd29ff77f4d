//! Audits of jobs that other nodes made, for the artists who ask for them.
//!
//! The requester hands over the signed job, its receipt and a grant. One step is drawn here, after the receipt was signed; the
//! maker is asked for the states around it (`gather`), a worker computes the step anew, and what comes of it (`judge`) is
//! signed. Whoever asks again with the same grant hears how it stands, or the verdict.
//!
//! An audit runs on a device that has nothing to do, while no job waits and no quote is open; a job that comes meanwhile
//! waits for its end, which is one step and one decode away. What was fetched is erased as soon as it was looked at; the
//! verdict is kept for a while, and holds nothing of the prompt.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kinoflock_protocol::audit::{
    AuditId, AuditObstacle, AuditOrder, AuditOutcome, AuditPrecision, AuditState, AuditVerdict,
    ValidAuditOrder,
};
use kinoflock_protocol::codec::Text;
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{JobId, NodeId, RequesterId};
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::rpc::Response;
use kinoflock_protocol::units::Micro;
use kinoflock_protocol::work::{JobShape, work};

use self::gather::{Gather, Gathered, Missed};
use super::jobs::{load_request, plain_run, remove_folder};
use super::refuse::{invalid, unserved};
use super::{Daemon, Note, adapters, finish, ops, unix_now};
use crate::admin::report::AuditsReport;
use crate::engine::wire::{AuditReport, Failure, RunRequest};
use crate::policy::{Ask, Usage, Wanted};
use crate::scheduler::DeviceId;

mod gather;
mod judge;

pub(super) use self::gather::Gathered as AuditGathered;
pub(super) use self::gather::Missed as AuditMissed;

/// Audits whose states are fetched at once.
const MAX_GATHERING: usize = 2;
/// Audits of one requester that wait.
const MAX_OF_ONE: usize = 4;
/// How long a verdict is kept for whoever ordered it.
const KEEP_VERDICTS: Duration = Duration::from_secs(600);
/// Verdicts that are kept; the oldest make room.
const MAX_VERDICTS: usize = 256;
/// Name of the folders of audits in the work folder, before their ids.
const FOLDER: &str = "audit-";

/// The audits that were ordered here.
#[derive(Debug, Default)]
pub(super) struct Auditor {
    audits: BTreeMap<AuditId, Audit>,
    /// The number of the next one.
    next: u64,
    done: AuditsReport,
}

/// One of them.
#[derive(Debug)]
struct Audit {
    /// Its place in the order of arrival.
    number: u64,
    requester: RequesterId,
    valid: ValidAuditOrder,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Ordered(Box<(AuditOrder, NodeId)>),
    Gathering,
    Ready(Box<Gathered>),
    Looking(Box<Gathered>),
    Done(Envelope, Instant),
}

impl Stage {
    fn is_over(&self) -> bool {
        matches!(self, Self::Done(..))
    }
}

impl Auditor {
    /// Figures for the operator.
    pub(super) fn report(&self) -> AuditsReport {
        let waiting = self.audits.values().filter(|audit| !audit.stage.is_over()).count();
        AuditsReport { waiting, ..self.done }
    }

    /// A state of a job made here was shown to somebody.
    pub(super) fn count_shown(&mut self) {
        self.done.shown += 1;
    }

    /// The first in the order of arrival that is at this stage.
    fn first(&self, is_at: impl Fn(&Stage) -> bool) -> Option<AuditId> {
        let at = self.audits.iter().filter(|(_, audit)| is_at(&audit.stage));
        at.min_by_key(|(_, audit)| audit.number).map(|(id, _)| *id)
    }

    /// The one that a worker knows by this job.
    fn named(&self, job: &JobId) -> Option<AuditId> {
        let id = AuditId(kinoflock_protocol::BlobId::from_bytes(*job.as_bytes()));
        self.audits.get(&id).filter(|audit| matches!(audit.stage, Stage::Looking(_))).map(|_| id)
    }

    /// Forgets verdicts whose time is over, and the oldest where there are too many.
    fn forget_old(&mut self, now: Instant) {
        self.audits.retain(|_, audit| match &audit.stage {
            Stage::Done(_, since) => now.saturating_duration_since(*since) < KEEP_VERDICTS,
            _ => true,
        });
        while self.audits.values().filter(|audit| audit.stage.is_over()).count() > MAX_VERDICTS {
            let Some(oldest) = self.first(Stage::is_over) else { return };
            self.audits.remove(&oldest);
        }
    }
}

impl Daemon {
    /// Takes an order for an audit, or tells how an earlier one stands.
    pub(super) fn order_audit(&mut self, order: AuditOrder, asker: NodeId) -> Response {
        self.auditor.forget_old(Instant::now());
        let id = AuditId::of(&order.grant);
        if let Some(audit) = self.auditor.audits.get(&id) {
            return Response::AuditState(match &audit.stage {
                Stage::Ordered(_) | Stage::Gathering | Stage::Ready(_) => AuditState::Waiting,
                Stage::Looking(_) => AuditState::Looking,
                Stage::Done(verdict, _) => AuditState::Done(verdict.clone()),
            });
        }
        match self.check_audit(&order) {
            Ok(valid) => {
                let (requester, number) = (valid.job.requester(), self.auditor.next);
                self.auditor.next += 1;
                tracing::info!(job = %valid.job.id().short(), maker = %order.maker.id.short(), "audit ordered");
                let stage = Stage::Ordered(Box::new((order, asker)));
                self.auditor.audits.insert(id, Audit { number, requester, valid, stage });
                Response::AuditState(AuditState::Waiting)
            }
            Err(refusal) => Response::Refused(*refusal),
        }
    }

    fn check_audit(&self, order: &AuditOrder) -> Result<ValidAuditOrder, Box<Refusal>> {
        if !self.config.audits.for_others {
            let refusal = Refusal::new(Reason::NotAllowed, "audits.for_others");
            return Err(Box::new(refusal.advice("this node audits nothing; ask another one")));
        }
        let here = self.identity.node_id();
        let valid = ValidAuditOrder::parse(order, &self.network, unix_now(), &here)
            .map_err(|error| invalid(error.code(), &error))?;
        let (spec, requester) = (valid.job.spec(), valid.job.requester());
        if valid.receipt.receipt().node == here {
            return Err(invalid("audit.maker", &"a node does not audit itself"));
        }
        if self.passed(&spec.model).is_none() {
            return Err(unserved(&spec.model));
        }
        ops::extra(spec).map_err(|fault| fault.refusal())?;
        adapters::check_job(self.config.policy.adapter_bytes, spec)?;
        let wanted = self.wanted(&spec.model, spec.shape())?;
        let policy = self.scheduler.policy();
        let class = policy.class_of(&requester, None);
        policy.check(&Ask { requester, class, wanted }, &Usage::default())?;
        let waiting = || self.auditor.audits.values().filter(|audit| !audit.stage.is_over());
        let full = |limit: usize, given: usize, rule: &str| {
            Err(Box::new(Refusal::new(Reason::QueueFull, rule).limit(limit, given + 1)))
        };
        match (waiting().count(), waiting().filter(|audit| audit.requester == requester).count()) {
            (all, _) if all >= self.config.audits.queue => {
                full(self.config.audits.queue, all, "audits.queue")
            }
            (_, own) if own >= MAX_OF_ONE => full(MAX_OF_ONE, own, "audits.of_one"),
            _ => Ok(valid),
        }
    }

    /// Goes on with the audits that can.
    pub(super) fn audit_next(&mut self) {
        let gathering = |stage: &Stage| matches!(stage, Stage::Gathering);
        while self.auditor.audits.values().filter(|audit| gathering(&audit.stage)).count() < MAX_GATHERING {
            let Some(id) = self.auditor.first(|stage| matches!(stage, Stage::Ordered(_))) else { break };
            self.gather(id);
        }
        if self.draining {
            return;
        }
        while let Some(id) = self.auditor.first(|stage| matches!(stage, Stage::Ready(_))) {
            let Some(wanted) = self.auditor.audits.get(&id).and_then(|audit| self.one_step(audit)) else {
                self.conclude(
                    id,
                    0,
                    could_not(AuditObstacle::Auditor, "the model is not served here any more"),
                );
                continue;
            };
            let Some(device) = self.scheduler.take_aside(&wanted, Instant::now()) else { break };
            self.look_at(id, device);
        }
    }

    /// What an audit costs, about: a job of one step.
    fn one_step(&self, audit: &Audit) -> Option<Wanted> {
        let spec = audit.valid.job.spec();
        let model = self.models.get(&spec.model).filter(|model| self.passed(&model.id).is_some())?;
        let shape = JobShape { steps: 1, ..spec.shape() };
        let unfit = self.memories.unfit(model, &shape);
        Some(Wanted { model: model.id, shape, work: work(&model.manifest.work, &shape), unfit })
    }

    fn gather(&mut self, id: AuditId) {
        let folder = audit_folder(&self.config.storage.state, &id);
        let Some(audit) = self.auditor.audits.get_mut(&id) else { return };
        let Stage::Ordered(order) = std::mem::replace(&mut audit.stage, Stage::Gathering) else { return };
        let (order, asker) = *order;
        let maker = order.maker.id;
        // Where the maker says that it is comes before where the requester says so.
        let known = self.adverts.live().find(|(node, _)| *node == maker);
        let known = known.into_iter().flat_map(|(_, capacity)| capacity.addresses.iter());
        let addresses = known.chain(order.maker.addresses.iter()).filter_map(|text| text.parse().ok());
        let gather = Gather {
            net: self.net.clone(),
            keypair: self.identity.keypair().clone(),
            network: self.network,
            addresses: addresses.collect(),
            valid: audit.valid.clone(),
            order,
            asker,
            folder,
        };
        self.spawn(async move { Note::Gathered { id, result: gather.run().await.map(Box::new) } });
    }

    pub(super) fn handle_gathered(&mut self, id: AuditId, result: Result<Box<Gathered>, Missed>) {
        match result {
            Ok(gathered) => {
                if let Some(audit) = self.auditor.audits.get_mut(&id) {
                    audit.stage = Stage::Ready(gathered);
                }
            }
            Err(Missed { step, outcome }) => self.conclude(id, step, outcome.into()),
        }
    }

    /// Hands an audit to a device that was taken aside for it.
    fn look_at(&mut self, id: AuditId, device: DeviceId) {
        let Some(audit) = self.auditor.audits.get_mut(&id) else { return };
        let Stage::Ready(gathered) = std::mem::replace(&mut audit.stage, Stage::Gathering) else { return };
        let run = self.audit_run(&id, &gathered);
        let Some(audit) = self.auditor.audits.get_mut(&id) else { return };
        audit.stage = Stage::Looking(gathered);
        let started = run.and_then(|run| {
            let engine = &self.devices.get(&device).ok_or("no such device")?.engine;
            engine.audit(run).map_err(|error| error.to_string())
        });
        if let Err(why) = started {
            let failure = Failure::new("audit", &why, true);
            self.audit_failed(device, &job_of(&id), &failure);
        }
    }

    fn audit_run(&self, id: &AuditId, gathered: &Gathered) -> Result<crate::engine::wire::AuditRun, String> {
        let audit = self.auditor.audits.get(id).ok_or("no such audit")?;
        let spec = audit.valid.job.spec();
        let model = self.models.get(&spec.model).ok_or("the model is not served here any more")?;
        let mut run: RunRequest = plain_run(job_of(id), load_request(model)?, spec)?;
        run.extra.initial_latents = gathered.initial_latents.clone();
        run.extra.inputs = gathered.inputs.clone();
        run.extra.adapters = adapters::to_use(spec);
        run.output.clip = gathered.clip.clone();
        let (states, clip) = (gathered.states.clone(), gathered.clip.clone());
        Ok(crate::engine::wire::AuditRun { run, step: gathered.step, states, clip })
    }

    /// A worker has looked.
    pub(super) fn audited(&mut self, device: DeviceId, report: &AuditReport) {
        let now = Instant::now();
        if let Some(id) = self.auditor.named(&report.job)
            && let Some(audit) = self.auditor.audits.get(&id)
            && let Stage::Looking(gathered) = &audit.stage
        {
            let maker = audit.valid.receipt.receipt();
            let here = self.devices.get(&device).and_then(|device| device.worker.as_ref());
            let here = here.map(|worker| finish::class_of(&worker.device));
            let precision = judge::precision(maker, here, &report.dtype);
            let found = judge::judge(report, &gathered.openings, &audit.valid.root, gathered.step, precision);
            let step = gathered.step;
            self.conclude(id, step, found);
        }
        self.scheduler.put_back(device, false, now);
    }

    /// Takes a worker's failure if it is an audit's.
    pub(super) fn audit_failed(&mut self, device: DeviceId, job: &JobId, failure: &Failure) -> bool {
        let Some(id) = self.auditor.named(job) else { return false };
        let audit = self.auditor.audits.get(&id);
        let step = match audit.map(|audit| &audit.stage) {
            Some(Stage::Looking(gathered)) => gathered.step,
            _ => 0,
        };
        tracing::warn!(code = %failure.code, "an audit failed in the worker");
        self.conclude(id, step, judge::failed(failure));
        self.scheduler.put_back(device, true, Instant::now());
        true
    }

    /// Signs what came of an audit, and erases what was fetched for it.
    fn conclude(&mut self, id: AuditId, step: u32, found: judge::Found) {
        let folder = audit_folder(&self.config.storage.state, &id);
        if let Err(error) = remove_folder(&folder) {
            tracing::error!(%error, "what was fetched for an audit could not be removed");
        }
        let Some(audit) = self.auditor.audits.get_mut(&id) else { return };
        let made = audit.valid.receipt.receipt();
        let verdict = AuditVerdict {
            job: made.job,
            receipt: audit.valid.receipt.id(),
            maker: made.node,
            auditor: self.identity.node_id(),
            step,
            outcome: found.outcome,
            deviation: found.deviation,
            tolerance: found.tolerance,
            precision: found.precision,
            looked_at: unix_now(),
        };
        let outcome = verdict.outcome.name();
        tracing::info!(job = %made.job.short(), maker = %made.node.short(), step, outcome, "audited");
        match &verdict.outcome {
            AuditOutcome::Honest => self.auditor.done.honest += 1,
            AuditOutcome::Differs(_) => self.auditor.done.caught += 1,
            AuditOutcome::CouldNotLook { .. } => self.auditor.done.could_not_look += 1,
        }
        match Envelope::seal(self.identity.keypair(), &self.network, &verdict) {
            Ok(envelope) => audit.stage = Stage::Done(envelope, Instant::now()),
            Err(error) => {
                tracing::error!(%error, "a verdict could not be signed");
                self.auditor.audits.remove(&id);
            }
        }
    }
}

/// Removes what audits left that a former daemon did not finish.
pub(super) fn clean(state: &Path) {
    let folders = std::fs::read_dir(state.join("work")).into_iter().flatten().flatten();
    for folder in folders.filter(|entry| entry.file_name().to_string_lossy().starts_with(FOLDER)) {
        if let Err(error) = remove_folder(&folder.path()) {
            tracing::error!(%error, "what was fetched for an audit could not be removed");
        }
    }
}

fn audit_folder(state: &Path, id: &AuditId) -> PathBuf {
    state.join("work").join(format!("{FOLDER}{}", hex_of(id)))
}

fn hex_of(id: &AuditId) -> String {
    id.0.to_hex()
}

/// By what a worker knows an audit.
fn job_of(id: &AuditId) -> JobId {
    JobId::from_bytes(*id.0.as_bytes())
}

fn could_not(obstacle: AuditObstacle, why: &str) -> judge::Found {
    AuditOutcome::CouldNotLook { obstacle, why: Text::truncated(why) }.into()
}

impl From<AuditOutcome> for judge::Found {
    /// Where nothing was computed.
    fn from(outcome: AuditOutcome) -> Self {
        Self { outcome, deviation: Micro::ZERO, tolerance: Micro::ZERO, precision: AuditPrecision::Half }
    }
}

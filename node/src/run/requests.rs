//! What peers ask of the daemon, and what it answers.
//!
//! Everything that comes in is hostile until it is checked: the signature over the received bytes, then the content, then
//! whether this node can make it, then the operator's rules. Every refusal says which rule, which limit, which value.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use kinoflock_net::{Multiaddr, Responder};
use kinoflock_protocol::codec::{Bytes, List};
use kinoflock_protocol::custody::MirroredInputs;
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{JobId, NodeId, RequesterId};
use kinoflock_protocol::job::{Addressee, JobKind, ValidJob};
use kinoflock_protocol::order::{Quote, QuoteRequest, ValidOrder};
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::units::{Millis, UnixMillis};
use kinoflock_protocol::work::{JobShape, work};

use super::adapters::{check_adapters, check_inputs, check_job};
use super::checkpoints::{Kept, check_states};
use super::refuse::{invalid, job_refusal, order_refusal, unserved, unsupported};
use super::{Daemon, LiveJob, Note, Rejected, ip_of, ops, unix_now};
use crate::clips::OwnerClass;
use crate::policy::{Wanted, hook};
use crate::queue::{JobRecord, StoredState};
use crate::scheduler::{Admission, NetPrefix, NewJob, Origin, Room, Stage};
use crate::telemetry::{ReasonLabels, ResultLabels};

/// Bytes of a clip's file beyond its frames: container, first picture.
const CLIP_OVERHEAD: u64 = 64 * 1024;
/// Pixels per byte of a clip that are reserved at admission. The encoder's quality mode stays well below one byte.
const PIXELS_PER_BYTE: u64 = 2;

/// An order that passed every check but the operator's hook.
#[derive(Debug)]
pub(super) struct Ordered {
    job: ValidJob,
    job_envelope: Envelope,
    order: ValidOrder,
    order_envelope: Envelope,
    origin: Origin,
    wanted: Wanted,
    /// A second prompt, mixed into the job's.
    second_prompt: Option<String>,
    submitter: NodeId,
    mirrored: Option<Box<MirroredInputs>>,
}

impl Daemon {
    pub(super) fn handle_request(
        &mut self,
        node: NodeId,
        addr: Option<&Multiaddr>,
        request: Request,
        responder: Responder,
    ) {
        let kind = request.name();
        let response = match request {
            Request::Capacity => self.own_advert(),
            Request::FindNodes(wanted) => return self.find_or_seek(wanted, responder),
            Request::Quote(request) => self.quote(&request, addr),
            Request::Submit { order, job, mirrored } => match self.check_submit(order, job, node, addr) {
                Ok(ordered) => return self.submit(Ordered { mirrored, ..ordered }, responder),
                Err(refusal) => Response::Refused(*refusal),
            },
            Request::Status(query) => self.status(&query, node),
            Request::Cancel(query) => self.cancel(&query),
            Request::Audit { request, grant } => self.audit(&request, grant.as_ref()),
            Request::OrderAudit(order) => self.order_audit(*order, node),
            Request::Answer(answer) => self.answer(answer),
            Request::Release { lease, reason } => {
                if self.scheduler.handle_release(&lease) {
                    self.interest.released(reason, Instant::now());
                }
                Response::Acknowledged
            }
            Request::Manifest(id) => match self.models.get(&id) {
                Some(model) => match Bytes::new(model.manifest.encode()) {
                    Ok(bytes) => Response::Manifest(bytes),
                    Err(error) => Response::error("manifest_too_long", &error.to_string()),
                },
                None => Response::Refused(*unserved(&id)),
            },
            Request::Cards(id) => match self.models.get(&id) {
                Some(model) => Response::Cards(List::first_of(self.card_of(model))),
                None => Response::Refused(*unserved(&id)),
            },
            Request::Custody { custody, job } => self.custody(&custody, job, node),
            Request::Keep(keep) => self.keep(&keep, node),
            Request::Held(query) => self.held(&query),
            Request::Forget(query) => self.forget(&query),
            Request::Look(look) => match self.look(look, node, addr, responder) {
                Some((responder, refusal)) => {
                    return self.respond(kind, responder, Response::Refused(*refusal));
                }
                None => return,
            },
            Request::List(name) => self.list(&name),
            Request::Publish(edition) => self.take_published(edition),
        };
        self.respond(kind, responder, response);
    }

    pub(super) fn respond(&self, kind: &'static str, responder: Responder, response: Response) {
        if let Response::Refused(refusal) = &response {
            let reason = refusal.code().to_owned();
            tracing::debug!(kind, reason, rule = %refusal.rule, "refused");
            self.metrics.refusals.get_or_create(&ReasonLabels { reason }).inc();
        }
        if let Err(error) = responder.send(response) {
            tracing::error!(kind, %error, "an answer was not sent");
        }
    }

    fn quote(&mut self, request: &QuoteRequest, addr: Option<&Multiaddr>) -> Response {
        let response = match self.try_quote(request, addr) {
            Ok(envelope) => {
                self.interest.offered(Instant::now());
                Response::Quote(envelope)
            }
            Err(refusal) => {
                self.interest.refused(refusal.reason, &request.model, Instant::now());
                Response::Refused(*refusal)
            }
        };
        let result = if matches!(response, Response::Quote(_)) { "quoted" } else { "refused" };
        self.metrics.offers.get_or_create(&ResultLabels { result }).inc();
        response
    }

    fn try_quote(
        &mut self,
        request: &QuoteRequest,
        addr: Option<&Multiaddr>,
    ) -> Result<Envelope, Box<Refusal>> {
        if request.train {
            let refusal = Refusal::new(Reason::UnknownOperation, "train").given("train");
            return Err(Box::new(refusal.advice("this release makes clips only")));
        }
        let (limit, adapters) = (self.config.policy.adapter_bytes, request.adapters.len());
        check_adapters(limit, adapters, 0)?;
        check_inputs(limit, adapters, request.input_bytes)?;
        let wanted = self.wanted(&request.model, request.shape)?;
        let origin = self.origin(request.requester, addr);
        let now = Instant::now();
        let room = self.room(&request.requester, origin.class.into(), &request.shape);
        let promise = self
            .scheduler
            .handle_quote(origin, wanted, room, now)
            .map_err(|refusal| self.told(refusal, &wanted))?;
        let issued_at = unix_now();
        let quote = Quote {
            request: request.hash(),
            requester: request.requester,
            lease: promise.lease,
            issued_at,
            expires_at: issued_at.plus(Millis::from(promise.expires.saturating_duration_since(now))),
            position: promise.position,
            eta: eta_millis(promise.eta.map(|times| times.finishes), now),
            work: wanted.work,
            speed: promise.speed,
            max_input_bytes: self.most_input_bytes(),
        };
        Envelope::seal(self.identity.keypair(), &self.network, &quote)
            .map_err(|error| invalid(error.code(), &error))
    }

    /// What a job costs here, if the model can make it at all.
    pub(super) fn wanted(
        &self,
        model: &kinoflock_protocol::ModelId,
        shape: JobShape,
    ) -> Result<Wanted, Box<Refusal>> {
        let known = self.models.get(model).ok_or_else(|| unserved(model))?;
        known.manifest.rules.check(shape.frames, shape.width, shape.height).map_err(|error| {
            let refusal = Refusal::new(Reason::Impossible, error.code()).given(&error);
            Box::new(refusal)
        })?;
        let unfit = self.memories.unfit(known, &shape);
        Ok(Wanted { model: *model, shape, work: work(&known.manifest.work, &shape), unfit })
    }

    /// A refusal with the figures that the scheduler does not have.
    fn told(&self, refusal: Refusal, wanted: &Wanted) -> Refusal {
        match self.models.get(&wanted.model) {
            Some(model) => self.memories.told(refusal, model, &wanted.shape),
            None => refusal,
        }
    }

    fn origin(&self, requester: RequesterId, addr: Option<&Multiaddr>) -> Origin {
        // A peer without a visible address (behind a relay) shares the prefix of all such.
        let ip = addr.and_then(ip_of).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let class = self.scheduler.policy().class_of(&requester, None);
        Origin { requester, class, prefix: NetPrefix::of(ip) }
    }

    fn check_submit(
        &self,
        order_envelope: Envelope,
        job_envelope: Envelope,
        submitter: NodeId,
        addr: Option<&Multiaddr>,
    ) -> Result<Ordered, Box<Refusal>> {
        let (now, node) = (unix_now(), self.identity.node_id());
        let collectives: Vec<_> = self.config.serve.collectives.iter().copied().collect();
        let addressee = Addressee { node: &node, collectives: &collectives };
        let job = ValidJob::parse(&job_envelope, &self.network, now, Some(addressee)).map_err(job_refusal)?;
        let order =
            ValidOrder::parse(&order_envelope, &self.network, now, &node, &job).map_err(order_refusal)?;
        let spec = job.spec();
        if let JobKind::Train(_) = spec.kind {
            return Err(unsupported("train", "this release makes clips only"));
        }
        if spec.extend.is_some() && spec.start_image.is_some() {
            return Err(unsupported(
                "start_image",
                "a clip that goes on from another begins with its frames",
            ));
        }
        let model = self.models.get(&spec.model).ok_or_else(|| unserved(&spec.model))?;
        check_states(order.order(), spec, &model.manifest.work)?;
        check_job(self.config.policy.adapter_bytes, spec)?;
        let extra = ops::extra(spec).map_err(|fault| fault.refusal())?;
        ops::check(spec, &extra, &model.manifest.work)?;
        let wanted = self.wanted(&spec.model, spec.shape())?;
        let second = extra.touch.prompt.as_ref().map(|second| second.with.to_string());
        if !extra.truncate_prompt && !extra.touch.decode_only {
            self.prompts.check(model, spec, second.as_deref(), !extra.touch.guidance.is_empty())?;
        }
        let origin = self.origin(job.requester(), addr);
        let mirrored = None;
        Ok(Ordered {
            job,
            job_envelope,
            order,
            order_envelope,
            origin,
            wanted,
            second_prompt: second,
            submitter,
            mirrored,
        })
    }

    /// Asks the operator's hook, where there is one, and admits the job.
    fn submit(&mut self, ordered: Ordered, responder: Responder) {
        let Some(hook) = self.scheduler.policy().hook().cloned() else {
            return self.admit(ordered, responder);
        };
        self.spawn(async move {
            let spec = ordered.job.spec();
            let asked = hook::HookJob {
                job: ordered.job.id(),
                requester: ordered.job.requester(),
                class: ordered.origin.class,
                wanted: ordered.wanted,
                prompt: spec.prompt.as_str(),
                second_prompt: ordered.second_prompt.as_deref(),
                negative_prompt: spec.negative_prompt.as_str(),
            };
            let verdict = hook::run(&hook, &asked).await;
            Note::Heard { order: Box::new(ordered), verdict, responder }
        });
    }

    pub(super) fn handle_heard(
        &mut self,
        ordered: Ordered,
        verdict: Result<(), Refusal>,
        responder: Responder,
    ) {
        match verdict {
            Ok(()) => self.admit(ordered, responder),
            Err(refusal) => self.respond("submit", responder, Response::Refused(refusal)),
        }
    }

    fn admit(&mut self, ordered: Ordered, responder: Responder) {
        let now = Instant::now();
        let (id, spec) = (ordered.job.id(), ordered.job.spec());
        let remaining = |at: UnixMillis| Duration::from_millis(at.since(unix_now()).0);
        let new = NewJob {
            job: id,
            nonce: spec.nonce,
            origin: ordered.origin,
            wanted: ordered.wanted,
            lease: ordered.order.order().lease,
            deadline: spec.deadline.map(|at| now + remaining(at)),
            needs_inputs: !spec.inputs().is_empty() || ordered.order.order().resume.is_some(),
        };
        let room = self.room(&ordered.job.requester(), ordered.origin.class.into(), &spec.shape());
        match self.scheduler.handle_order(&new, room, now) {
            Ok(Admission::Store { seq }) => {
                self.interest.won(now);
                self.store(ordered, &new, seq, responder);
            }
            Ok(Admission::Live(_)) => {
                let accepted = self.accepted(&id);
                self.respond("submit", responder, accepted);
            }
            Ok(Admission::Ended(_)) => {
                let accepted = Response::Accepted { job: id, position: 0, eta: Millis(0) };
                self.respond("submit", responder, accepted);
            }
            Err(refusal) => {
                let refusal = self.told(refusal, &new.wanted);
                self.respond("submit", responder, Response::Refused(refusal));
            }
        }
    }

    /// Writes an admitted job; the answer goes out when it is on disk.
    fn store(&mut self, ordered: Ordered, new: &NewJob, seq: u64, responder: Responder) {
        let (id, accepted_at) = (ordered.job.id(), unix_now());
        let record = JobRecord {
            id,
            seq,
            nonce: new.nonce,
            origin: new.origin.into(),
            model: new.wanted.model,
            shape: new.wanted.shape,
            work: new.wanted.work,
            job: ordered.job_envelope,
            order: ordered.order_envelope,
            admitted_at: accepted_at,
            deadline: ordered.job.spec().deadline,
            needs_inputs: new.needs_inputs,
            started_at: None,
            starts: 0,
            state: StoredState::Waiting,
            answer: None,
        };
        let live = LiveJob {
            job: ordered.job,
            origin: new.origin,
            accepted_at,
            started_at: None,
            admitted: Instant::now(),
            submitter: Some(ordered.submitter),
            mirrored: ordered.mirrored,
            steps_done: 0,
            steps_total: None,
            checkpoints: Kept::of(ordered.order.order()),
        };
        self.live.insert(id, live);
        self.boards.board(id, 0);
        let queue = self.queue.clone();
        self.spawn(async move {
            let result = queue.admit(record).await.map_err(Rejected);
            Note::Stored { job: id, result, responder }
        });
    }

    pub(super) fn handle_stored(&mut self, job: JobId, result: Result<(), Rejected>, responder: Responder) {
        let now = Instant::now();
        match result {
            Ok(()) => {
                let stage = self.scheduler.handle_stored(&job, now);
                tracing::info!(job = %job.short(), "accepted");
                if matches!(stage, Some(Stage::AwaitingInputs { .. })) {
                    self.fetch_inputs(&job);
                }
                let accepted = self.accepted(&job);
                self.respond("submit", responder, accepted);
            }
            Err(Rejected(error)) => {
                self.scheduler.handle_store_failed(&job, now);
                self.live.remove(&job);
                self.boards.forget(&job);
                tracing::error!(job = %job.short(), %error, "an admitted job could not be written");
                self.respond("submit", responder, Response::error(error.code(), &error.to_string()));
            }
        }
    }

    fn accepted(&self, job: &JobId) -> Response {
        let (position, eta) = self.standing(job);
        Response::Accepted { job: *job, position, eta }
    }

    /// Jobs before this one, and the time until it is done.
    pub(super) fn standing(&self, job: &JobId) -> (u32, Millis) {
        let now = Instant::now();
        if let Some((position, eta)) = self.scheduler.standing(job, now) {
            return (position, eta_millis(eta.map(|times| times.finishes), now));
        }
        let devices = self.scheduler.devices(now);
        let busy = devices.iter().find(|device| device.running == Some(*job)).map(|device| device.busy_for);
        (0, Millis::from(busy.unwrap_or_default()))
    }

    /// The room for one more clip, beside those of the jobs that are here already.
    fn room(&self, requester: &RequesterId, class: OwnerClass, shape: &JobShape) -> Room {
        let taken: u64 = self.live.values().map(|live| expected_bytes(&live.job.spec().shape())).sum();
        let room = self.clips.room(requester, class, expected_bytes(shape));
        Room { available: room.available.saturating_sub(taken), ..room }
    }
}

/// After a restart a job's events are numbered from here: beyond every number that was used before.
pub(super) fn restored_seq() -> u64 {
    unix_now().0
}

/// Bytes that a clip of this shape is expected to need at most.
fn expected_bytes(shape: &JobShape) -> u64 {
    let pixels = u64::from(shape.width)
        .saturating_mul(u64::from(shape.height))
        .saturating_mul(u64::from(shape.frames));
    pixels / PIXELS_PER_BYTE + CLIP_OVERHEAD
}

fn eta_millis(finishes: Option<Instant>, now: Instant) -> Millis {
    finishes.map_or(Millis(u64::MAX), |at| Millis::from(at.saturating_duration_since(now)))
}

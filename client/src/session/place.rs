//! From a job to a node that has it durably: rank, quotes, signature, order.
//!
//! The same way is gone for a job that is new and for one that is handed on because its node is gone: that one is signed
//! already, and begins from its newest checkpoint where one is at hand.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::future::join_all;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::List;
use kinoflock_protocol::limits::MAX_CLOCK_SKEW_MS;
use kinoflock_protocol::order::{Order, QuoteRequest, Resume, ValidQuote};
use kinoflock_protocol::progress::Checkpoint;
use kinoflock_protocol::rpc::{ReleaseReason, Request, Response};
use kinoflock_protocol::{Envelope, JobId, JobSpec, Millis, NodeId, Reason, Work};

use super::find::{Found, Model, unexpected};
use super::{Client, Event, Events, SessionError, corrected, nonce};
use crate::route::choice::Quoted;
use crate::route::routing::{Routing, Step};
use crate::route::{self, Candidate, Declined, Needs, Ranked, Why};
use crate::store::{Audits, BatchKey, Custodian, Former, Holder, JobRecord, RecordState};

/// Tries to hand over an order; the same order again gives the same job.
const SUBMIT_TRIES: u32 = 4;
/// Pause between two tries.
const SUBMIT_PAUSE: Duration = Duration::from_millis(400);
/// Difference of clocks that is corrected without a word.
const SKEW_IGNORED_MS: u64 = 30_000;

/// A node that would take the job, and how far its clock is ahead.
pub(super) struct Offered<'a> {
    pub(super) found: &'a Found,
    pub(super) quote: ValidQuote,
    skew_ms: i64,
}

/// A job that a node is to have.
pub(super) struct Placing {
    pub(super) spec: JobSpec,
    pub(super) model: Model,
    pub(super) work: Work,
    pub(super) require_terms: bool,
    /// Whether only the nodes that were named may have it.
    pub(super) pinned: bool,
    /// How long after its signature its result is of no more use.
    pub(super) deadline: Option<Millis>,
    /// As it was signed, once it is.
    pub(super) signed: Option<Envelope>,
    /// Its record and why its node lost it, when it is handed on.
    pub(super) before: Option<(JobRecord, String)>,
    /// Where to go on, when it is handed on.
    pub(super) resume: Option<Resume>,
    /// Nodes that have it, or may have it, and are not to do it.
    pub(super) former: Vec<Former>,
    /// How many nodes are to watch it, chosen when it is signed.
    pub(super) wanted_custodians: usize,
    /// Nodes that watch it.
    pub(super) custodians: Vec<Custodian>,
    /// By what a batch finds it again.
    pub(super) batch: Option<BatchKey>,
    /// Who may audit it.
    pub(super) audits: Audits,
}

impl Placing {
    pub(super) fn needs(&self) -> Needs {
        Needs {
            model: self.model.id,
            shape: self.spec.shape(),
            work: self.work,
            input_bytes: self.spec.inputs().iter().map(|blob| blob.len).sum(),
            require_terms: self.require_terms,
        }
    }
}

/// Places that are not needed, each with the reason.
type GivenBack<'a> = Vec<(Offered<'a>, ReleaseReason)>;

/// The search for a node: what was offered and refused so far.
struct Search<'a> {
    found: &'a [Found],
    events: &'a Events,
    /// Who takes a job that is handed on is told; who does not is of no interest then.
    tells_all: bool,
    /// By their place among those found.
    offers: BTreeMap<usize, Offered<'a>>,
    /// Who declined, each once however often it was asked.
    declined: Vec<Declined>,
}

impl<'a> Search<'a> {
    async fn note(&mut self, declined: impl IntoIterator<Item = Declined>) {
        for declined in declined {
            if !self.declined.contains(&declined) {
                if self.tells_all {
                    self.events.tell(Event::from(&declined)).await;
                }
                self.declined.push(declined);
            }
        }
    }

    fn index_of(&self, node: &NodeId) -> usize {
        let at = self.found.iter().position(|found| found.candidate.node == *node);
        at.expect("invariant: only those found are asked")
    }

    /// Takes offers out, to give them back.
    fn remove(&mut self, places: Vec<(Quoted, ReleaseReason)>) -> GivenBack<'a> {
        let offer =
            |(quoted, reason): (Quoted, ReleaseReason)| Some((self.offers.remove(&quoted.index)?, reason));
        places.into_iter().filter_map(offer).collect()
    }
}

impl Client {
    /// Hands the job to the best of those who take it, as [`Routing`] says.
    pub(super) async fn place(
        &self,
        mut placing: Placing,
        found: &[Found],
        events: &Events,
    ) -> Result<JobRecord, SessionError> {
        let candidates: Vec<Candidate> = found.iter().map(|found| found.candidate.clone()).collect();
        let (ranked, unfit) = self.rank(&candidates, &placing.needs());
        let mut routing = Routing::new(ranked, super::random()?, Instant::now());
        let tells_all = placing.before.is_none();
        let mut search = Search { found, events, tells_all, offers: BTreeMap::new(), declined: Vec::new() };
        search.note(unfit).await;
        loop {
            match routing.poll(Instant::now()) {
                Step::Ask(few) => self.ask(&few, &placing, &mut search, &mut routing).await,
                Step::Release(places) => self.release(search.remove(places)).await,
                Step::Wait(at) => tokio::time::sleep_until(at.into()).await,
                Step::Order(chosen) => {
                    let taken = self.order(&chosen, &mut placing, &mut search, &mut routing).await?;
                    if let Some((job, others)) = taken {
                        let (told, ()) =
                            tokio::join!(self.tell_custodians(&job, events), self.release(others));
                        told?;
                        return Ok(self.store.job(&job)?);
                    }
                }
                // Every answer was waited for.
                Step::Idle | Step::GiveUp => {
                    let (model, reasons) = (placing.model.name, search.declined);
                    return Err(SessionError::NoTaker { model, reasons });
                }
            }
        }
    }

    /// Asks some nodes for quotes.
    async fn ask<'a>(
        &self,
        few: &[Ranked],
        placing: &Placing,
        search: &mut Search<'a>,
        routing: &mut Routing,
    ) {
        let asked: Vec<&'a Found> = few.iter().map(|ranked| &search.found[ranked.index]).collect();
        let (offers, declined) = self.quotes(&asked, placing).await;
        for offer in offers {
            let (candidate, index) = (&offer.found.candidate, search.index_of(&offer.quote.node()));
            let promise = (offer.quote.quote().position, offer.quote.quote().eta);
            routing.handle_quote(Quoted::new(index, candidate, promise, &placing.needs(), crate::now()));
            search.offers.insert(index, offer);
        }
        for declined in &declined {
            routing.handle_no(search.index_of(&declined.node), declined.why.is_momentary());
        }
        search.note(declined).await;
    }

    /// Hands the job to the chosen one; once that has it, gives the places that are not needed. It is signed once, by the
    /// clock of the node that was chosen first.
    async fn order<'a>(
        &self,
        chosen: &Quoted,
        placing: &mut Placing,
        search: &mut Search<'a>,
        routing: &mut Routing,
    ) -> Result<Option<(JobId, GivenBack<'a>)>, SessionError> {
        let offer = search.offers.remove(&chosen.index).expect("invariant: it was offered");
        let job = match &placing.signed {
            Some(job) => job.clone(),
            None => {
                let wanted = placing.wanted_custodians;
                placing.custodians = self.choose_custodians(search.found, &chosen.node, wanted).await;
                let job = self.sign(placing, offer.skew_ms)?;
                placing.signed.insert(job).clone()
            }
        };
        if placing.audits.share > 0 && placing.before.is_none() {
            placing.audits.auditors = self.choose_auditors(search.found, &placing.needs(), &chosen.node);
        }
        self.announce(&offer, placing, search.events).await;
        match self.hand_over(&offer, placing, job, search).await? {
            Ok(record) => {
                let others = routing.handle_taken(chosen.index);
                Ok(Some((record.job, search.remove(others))))
            }
            Err(why) => {
                routing.handle_no(chosen.index, why.is_momentary());
                search.note([self.declined(offer.found, why)]).await;
                // Its place is held for some seconds more, and the artist's next try may need it.
                self.release(vec![(offer, ReleaseReason::ChoseAnother)]).await;
                Ok(None)
            }
        }
    }

    pub(super) async fn quotes<'a>(
        &self,
        asked: &[&'a Found],
        placing: &Placing,
    ) -> (Vec<Offered<'a>>, Vec<Declined>) {
        let quotes = asked.iter().map(|found| async move { (*found, self.quote(found, placing).await) });
        let (mut offers, mut declined) = (Vec::new(), Vec::new());
        for (found, quote) in join_all(quotes).await {
            match quote {
                Ok((quote, skew_ms)) => offers.push(Offered { found, quote, skew_ms }),
                Err(why) => declined.push(self.declined(found, why)),
            }
        }
        (offers, declined)
    }

    async fn quote(&self, found: &Found, placing: &Placing) -> Result<(ValidQuote, i64), Why> {
        let failed = |error: SessionError| match error {
            SessionError::Refused { refusal, .. } => Why::Refused(*refusal),
            other => Why::Failed(other.to_string()),
        };
        let node = found.candidate.node;
        let nonce = nonce().map_err(failed)?;
        // A custodian asks for whom it watches the job.
        let signer = placing.signed.as_ref().map(|job| job.signer.into());
        let requester = signer.unwrap_or_else(|| self.requester());
        let mut request = QuoteRequest::for_job(&placing.spec, requester, nonce, placing.work);
        // By the node's clock, as far as its advert told.
        request.deadline = request.deadline.map(|time| corrected(time, found.skew_ms));
        match self.net.request(node, Request::Quote(request.clone())).await {
            Ok(Response::Quote(envelope)) => {
                let quote = ValidQuote::parse(&envelope, &self.network, &node, &request)
                    .map_err(|error| Why::Failed(error.to_string()))?;
                let skew = quote.skew(crate::now());
                Ok((quote, if skew.unsigned_abs() > SKEW_IGNORED_MS { skew } else { 0 }))
            }
            Ok(Response::Busy { retry_after }) => {
                Err(Why::Failed(format!("is busy, ask again in {retry_after}")))
            }
            Ok(other) => Err(failed(unexpected(node, "a question for a quote", other))),
            Err(error) => Err(Why::Failed(error.to_string())),
        }
    }

    /// Signs the job, by the chosen node's clock.
    fn sign(&self, placing: &mut Placing, skew_ms: i64) -> Result<Envelope, SessionError> {
        let spec = &mut placing.spec;
        spec.issued_at = corrected(crate::now(), skew_ms);
        spec.deadline = placing.deadline.map(|deadline| spec.issued_at.plus(deadline));
        spec.custodians = List::first_of(placing.custodians.iter().map(|custodian| custodian.node));
        Ok(Envelope::seal(&self.key, &self.network, spec)?)
    }

    /// Says who will see what, before anything is sent.
    async fn announce(&self, offer: &Offered<'_>, placing: &Placing, events: &Events) {
        let Placing { spec, model, .. } = placing;
        let Candidate { node, capacity, .. } = &offer.found.candidate;
        if offer.skew_ms.unsigned_abs() > MAX_CLOCK_SKEW_MS {
            let limit = Millis(MAX_CLOCK_SKEW_MS);
            events.tell(Event::ClockSkew { node: *node, ahead_ms: offer.skew_ms, limit }).await;
        }
        let sees = if spec.inputs().is_empty() {
            "your prompt and the frames"
        } else {
            "your prompt, your files and the frames"
        };
        let (position, eta) = (offer.quote.quote().position, offer.quote.quote().eta);
        if let Some((before, why)) = &placing.before {
            let moved = Event::Moved {
                from: before.node,
                from_name: before.node_name.clone(),
                why: why.clone(),
                node: *node,
                name: capacity.name.to_string(),
                step: placing.resume.as_ref().map(|resume| resume.step),
                eta,
                sees,
            };
            return events.tell(moved).await;
        }
        let chosen = Event::Chosen {
            node: *node,
            name: capacity.name.to_string(),
            model: model.name.clone(),
            position,
            eta,
            seed: spec.seed.to_string(),
            sees,
            terms: capacity.terms.clone(),
            content_rules: capacity.content_rules,
            custodians: placing.custodians.iter().map(|it| route::called(&it.name, &it.node)).collect(),
            audit_share: placing.audits.share,
            auditors: placing.audits.auditors.iter().map(|it| route::called(&it.name, &it.node)).collect(),
        };
        events.tell(chosen).await;
    }

    /// Writes the record, then sends the order. The inner error is the node's no.
    async fn hand_over(
        &self,
        offer: &Offered<'_>,
        placing: &mut Placing,
        job: Envelope,
        search: &Search<'_>,
    ) -> Result<Result<JobRecord, Why>, SessionError> {
        let (node, events) = (offer.found.candidate.node, search.events);
        let id = JobId::of(&job, &self.network);
        let mirrored = self.mirror_inputs(offer.found, search.found, &job, &self.brings(placing)).await?;
        let mirrored = mirrored.map(Box::new);
        if let Some(mirrored) = &mirrored {
            events.tell(Event::InputsMirrored { node: mirrored.holder.id }).await;
        }
        let issued_at = corrected(crate::now(), offer.skew_ms);
        let lease = offer.quote.quote().lease;
        let order = Order { job: id, node, lease, issued_at, resume: placing.resume.clone() };
        let order = Envelope::seal(&self.key, &self.network, &order)?;
        self.store.insert_job(&self.record(id, offer, placing, &job, &order))?;
        let until = Instant::now() + Duration::from(offer.quote.held_for());
        let mut tries = 0;
        loop {
            tries += 1;
            let (order, job) = (order.clone(), job.clone());
            let request = Request::Submit { order, job, mirrored: mirrored.clone() };
            let (why, pause) = match self.net.request(node, request).await {
                Ok(Response::Accepted { job, position, eta }) if job == id => {
                    if placing.before.is_none() {
                        events.tell(Event::Accepted { job, position, eta }).await;
                    }
                    let taken = self.update(&id, |record| {
                        record.state = RecordState::Queued;
                        record.told = Some(eta);
                        let holders = mirrored.iter().map(|mirrored| mirrored.holder.id);
                        record.holders.extend(holders.map(|node| Holder { node, sealed: None }));
                    })?;
                    return Ok(Ok(taken));
                }
                Ok(Response::Busy { retry_after }) => (Why::Failed("is busy".to_owned()), retry_after.into()),
                Err(error) if error.is_transient() => (Why::Failed(error.to_string()), SUBMIT_PAUSE),
                Ok(Response::Refused(refusal)) => return self.withdraw(&id, placing, Why::Refused(refusal)),
                Ok(other) => {
                    let error = unexpected(node, "an order", other);
                    return self.withdraw(&id, placing, Why::Failed(error.to_string()));
                }
                Err(error) => return self.withdraw(&id, placing, Why::Failed(error.to_string())),
            };
            if tries == SUBMIT_TRIES || Instant::now() + pause > until {
                // Whether the node has it is not known: the record stays, so that nothing is lost.
                let record = self.update(&id, |record| record.state = RecordState::Sent)?;
                placing.former.push(Former::of(&record, "unreachable"));
                return Ok(Err(why));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// What the job's node will fetch from here, and whether it is sealed already.
    fn brings(&self, placing: &Placing) -> Vec<(BlobRef, bool)> {
        let inputs = placing.spec.inputs().into_iter().map(|blob| (blob, false));
        let record = placing.before.as_ref().map(|(record, _)| record);
        let checkpoint = record.filter(|_| placing.resume.is_some()).and_then(|it| it.checkpoint.as_ref());
        let state = checkpoint.and_then(|it| Some(it.open::<Checkpoint>(&self.network).ok()?.value.state));
        inputs.chain(state.map(|state| (state, true))).collect()
    }

    /// The node said no: there is no such job there.
    fn withdraw(
        &self,
        id: &JobId,
        placing: &Placing,
        why: Why,
    ) -> Result<Result<JobRecord, Why>, SessionError> {
        match &placing.before {
            Some((before, _)) => self.store.insert_job(before)?,
            None => self.store.remove_job(id)?,
        }
        Ok(Err(why))
    }

    fn record(
        &self,
        job: JobId,
        offer: &Offered<'_>,
        placing: &Placing,
        envelope: &Envelope,
        order: &Envelope,
    ) -> JobRecord {
        let Found { candidate, addresses, .. } = offer.found;
        let advertised = candidate.capacity.addresses.iter().map(|address| address.to_string());
        let mut addresses: Vec<String> =
            addresses.iter().map(ToString::to_string).chain(advertised).collect();
        addresses.dedup();
        let before = placing.before.as_ref().map(|(record, _)| record);
        JobRecord {
            job,
            network: self.network,
            envelope: envelope.clone(),
            order: Some(order.clone()),
            node: candidate.node,
            node_name: candidate.capacity.name.to_string(),
            addresses,
            model: placing.model.id,
            model_name: placing.model.name.clone(),
            created_at: before.map_or_else(crate::now, |before| before.created_at),
            updated_at: crate::now(),
            clock_skew_ms: offer.skew_ms,
            told: None,
            state: RecordState::Sent,
            next_seq: 0,
            error: None,
            receipt: None,
            clip: None,
            latents: None,
            answer: None,
            answered: false,
            require_terms: placing.require_terms,
            pinned: placing.pinned,
            former: placing.former.clone(),
            checkpoint: before.and_then(|before| before.checkpoint.clone()),
            custodians: placing.custodians.clone(),
            holders: Vec::new(),
            batch: placing.batch.clone(),
            audits: placing.audits.clone(),
        }
    }

    /// Gives back places that are not needed, each with its reason. A node that does not hear it gives them away by itself.
    pub(super) async fn release(&self, places: GivenBack<'_>) {
        let released = places.into_iter().map(|(offer, reason)| {
            let request = Request::Release { lease: offer.quote.quote().lease, reason };
            self.net.request(offer.found.candidate.node, request)
        });
        join_all(released).await;
    }

    fn declined(&self, found: &Found, why: Why) -> Declined {
        let Candidate { node, capacity, .. } = &found.candidate;
        Declined { node: *node, name: capacity.name.to_string(), why }
    }
}

/// Whether an artist may hope that the same node takes the same job later.
#[must_use]
pub(super) fn is_passing(reason: Reason) -> bool {
    matches!(reason, Reason::Busy | Reason::QueueFull | Reason::TooManyLeases)
}

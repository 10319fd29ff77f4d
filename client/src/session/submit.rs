//! From what is asked to a job that a node has durably: rank, quotes, signature, order.

use std::time::{Duration, Instant};

use futures::future::join_all;
use kinoflock_protocol::job::Audience;
use kinoflock_protocol::limits::MAX_CLOCK_SKEW_MS;
use kinoflock_protocol::model::ModelManifest;
use kinoflock_protocol::order::{Order, QuoteRequest, ValidQuote};
use kinoflock_protocol::rpc::{ReleaseReason, Request, Response};
use kinoflock_protocol::work::work;
use kinoflock_protocol::{Envelope, JobId, JobSpec, Millis, Reason, Work};

use super::find::{Found, Model, unexpected};
use super::{Client, Event, Events, SessionError, corrected, nonce};
use crate::ask::Ask;
use crate::route::{self, Candidate, Declined, Needs, Why};
use crate::store::{JobRecord, RecordState};
use crate::ticket::Way;

/// Nodes that are asked for a quote at once.
const QUOTES_AT_ONCE: usize = 3;
/// Tries to hand over an order; the same order again gives the same job.
const SUBMIT_TRIES: u32 = 4;
/// Pause between two tries.
const SUBMIT_PAUSE: Duration = Duration::from_millis(400);
/// How long a node that only holds too many places for this key just now is asked again: its leases last seconds.
const PLACES_WAIT: Duration = Duration::from_secs(60);
/// Pause before it is asked again.
const PLACES_PAUSE: Duration = Duration::from_millis(300);
/// Difference of clocks that is corrected without a word.
const SKEW_IGNORED_MS: u64 = 30_000;

/// A node that would take the job, and how far its clock is ahead.
struct Offered<'a> {
    found: &'a Found,
    quote: ValidQuote,
    skew_ms: i64,
}

/// Those who offered a place, and the job that one of them is to have.
struct Place<'a> {
    ask: &'a Ask,
    model: &'a Model,
    offers: Vec<Offered<'a>>,
    signed: &'a mut Option<Envelope>,
}

/// Who declined, each told once however often it was asked.
struct Told<'a> {
    events: &'a Events,
    declined: Vec<Declined>,
}

impl Told<'_> {
    async fn all(&mut self, declined: &[Declined]) {
        for declined in declined {
            if !self.declined.contains(declined) {
                self.events.tell(Event::from(declined)).await;
                self.declined.push(declined.clone());
            }
        }
    }
}

impl Client {
    /// Finds nodes, chooses one, and hands the job to it. From the moment it is sent, its record is in the store.
    ///
    /// # Errors
    /// See [`SessionError`]; `NoTaker` tells every node's reason.
    pub async fn submit(&self, ask: &Ask, ways: &[Way], events: &Events) -> Result<JobRecord, SessionError> {
        ask.check()?;
        // Who names a node trusts that one with the prompt, and not whoever else is near.
        let found =
            if ask.pinned { self.find_named(ways, events).await? } else { self.find(ways, events).await? };
        let model = self.choose_model(ask.model.as_deref(), &found)?;
        let manifest = self.manifest(&model, &found).await?;
        let mut spec = ask.to_spec(model.id, &manifest, seed(ask.seed)?, nonce()?)?;
        if let (true, [only]) = (ask.pinned, &found[..]) {
            spec.addressed_to = Audience::Node(only.candidate.node);
        }
        if let Some(latents) = &ask.initial_latents {
            self.store.insert_blob(latents)?;
        }
        self.inputs.serve(spec.inputs().iter().map(|blob| blob.id));
        self.order(ask, spec, &model, &manifest, &found, events).await
    }

    async fn order(
        &self,
        ask: &Ask,
        mut spec: JobSpec,
        model: &Model,
        manifest: &ModelManifest,
        found: &[Found],
        events: &Events,
    ) -> Result<JobRecord, SessionError> {
        let work = work(&manifest.work, &spec.shape());
        let needs = Needs {
            model: model.id,
            shape: spec.shape(),
            work,
            input_bytes: spec.inputs().iter().map(|blob| blob.len).sum(),
            require_terms: ask.require_terms,
        };
        let candidates: Vec<Candidate> = found.iter().map(|found| found.candidate.clone()).collect();
        let (ranked, unfit) = route::rank(&candidates, &needs, crate::now());
        let ranked = route::turn::in_turn(ranked, QUOTES_AT_ONCE, seed(None)?);
        let mut told = Told { events, declined: Vec::new() };
        told.all(&unfit).await;
        let until = Instant::now() + PLACES_WAIT;
        let mut signed: Option<Envelope> = None;
        loop {
            let mut reasons = unfit.clone();
            for few in ranked.chunks(QUOTES_AT_ONCE) {
                let asked: Vec<&Found> = few.iter().map(|ranked| &found[ranked.index]).collect();
                let (offers, declined) = self.quotes(&asked, &spec, work).await;
                told.all(&declined).await;
                reasons.extend(declined);
                let place = Place { ask, model, offers, signed: &mut signed };
                if let Some(record) = self.take(place, &mut spec, &mut reasons, &mut told).await? {
                    return Ok(record);
                }
            }
            let is_momentary = reasons.iter().any(|declined| declined.why.is_momentary());
            if !is_momentary || Instant::now() + PLACES_PAUSE > until {
                return Err(SessionError::NoTaker { model: model.name.clone(), reasons });
            }
            tokio::time::sleep(PLACES_PAUSE).await;
        }
    }

    /// Hands the job to the first of those who offered that takes it. The job is signed once, by the clock of the node
    /// that was chosen first.
    async fn take(
        &self,
        place: Place<'_>,
        spec: &mut JobSpec,
        reasons: &mut Vec<Declined>,
        told: &mut Told<'_>,
    ) -> Result<Option<JobRecord>, SessionError> {
        let Place { ask, model, mut offers, signed } = place;
        let now = crate::now();
        offers.sort_by_key(|offer| {
            let cost = route::cost(&offer.found.candidate.seen, offer.quote.quote().eta, now);
            (cost, offer.quote.node())
        });
        let mut offers = offers.into_iter();
        while let Some(offer) = offers.next() {
            let job = match &signed {
                Some(job) => job.clone(),
                None => signed.insert(self.sign(spec, ask, offer.skew_ms)?).clone(),
            };
            self.announce(&offer, model, spec, told.events).await;
            match self.hand_over(&offer, model, job, told.events).await? {
                Ok(record) => {
                    self.release(offers).await;
                    return Ok(Some(record));
                }
                Err(why) => {
                    let declined = self.declined(offer.found, why);
                    told.all(std::slice::from_ref(&declined)).await;
                    reasons.push(declined);
                    // Its place is held for some seconds more, and the artist's next try may need it.
                    self.release(std::iter::once(offer)).await;
                }
            }
        }
        Ok(None)
    }

    async fn quotes<'a>(
        &self,
        asked: &[&'a Found],
        spec: &JobSpec,
        work: Work,
    ) -> (Vec<Offered<'a>>, Vec<Declined>) {
        let quotes = asked.iter().map(|found| async move { (*found, self.quote(found, spec, work).await) });
        let (mut offers, mut declined) = (Vec::new(), Vec::new());
        for (found, quote) in join_all(quotes).await {
            match quote {
                Ok((quote, skew_ms)) => offers.push(Offered { found, quote, skew_ms }),
                Err(why) => declined.push(self.declined(found, why)),
            }
        }
        (offers, declined)
    }

    async fn quote(&self, found: &Found, spec: &JobSpec, work: Work) -> Result<(ValidQuote, i64), Why> {
        let failed = |error: SessionError| match error {
            SessionError::Refused { refusal, .. } => Why::Refused(*refusal),
            other => Why::Failed(other.to_string()),
        };
        let node = found.candidate.node;
        let nonce = nonce().map_err(failed)?;
        let mut request = QuoteRequest::for_job(spec, self.requester(), nonce, work);
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
    fn sign(&self, spec: &mut JobSpec, ask: &Ask, skew_ms: i64) -> Result<Envelope, SessionError> {
        spec.issued_at = corrected(crate::now(), skew_ms);
        spec.deadline = ask.deadline.map(|deadline| spec.issued_at.plus(deadline));
        Ok(Envelope::seal(&self.key, &self.network, spec)?)
    }

    /// Says who will see what, before anything is sent.
    async fn announce(&self, offer: &Offered<'_>, model: &Model, spec: &JobSpec, events: &Events) {
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
        };
        events.tell(chosen).await;
    }

    /// Writes the record, then sends the order. The inner error is the node's no.
    async fn hand_over(
        &self,
        offer: &Offered<'_>,
        model: &Model,
        job: Envelope,
        events: &Events,
    ) -> Result<Result<JobRecord, Why>, SessionError> {
        let node = offer.found.candidate.node;
        let id = JobId::of(&job, &self.network);
        let issued_at = corrected(crate::now(), offer.skew_ms);
        let order = Order { job: id, node, lease: offer.quote.quote().lease, issued_at, resume: None };
        let order = Envelope::seal(&self.key, &self.network, &order)?;
        self.store.insert_job(&self.record(id, offer, model, &job, &order))?;
        let until = Instant::now() + Duration::from(offer.quote.held_for());
        let mut tries = 0;
        loop {
            tries += 1;
            let request = Request::Submit { order: order.clone(), job: job.clone() };
            let (why, pause) = match self.net.request(node, request).await {
                Ok(Response::Accepted { job, position, eta }) if job == id => {
                    events.tell(Event::Accepted { job, position, eta }).await;
                    let taken = self.update(&id, |record| {
                        record.state = RecordState::Queued;
                        record.told = Some(eta);
                    })?;
                    return Ok(Ok(taken));
                }
                Ok(Response::Busy { retry_after }) => (Why::Failed("is busy".to_owned()), retry_after.into()),
                Err(error) if error.is_transient() => (Why::Failed(error.to_string()), SUBMIT_PAUSE),
                Ok(Response::Refused(refusal)) => return self.withdraw(&id, Why::Refused(refusal)),
                Ok(other) => {
                    let error = unexpected(node, "an order", other);
                    return self.withdraw(&id, Why::Failed(error.to_string()));
                }
                Err(error) => return self.withdraw(&id, Why::Failed(error.to_string())),
            };
            if tries == SUBMIT_TRIES || Instant::now() + pause > until {
                // Whether the node has it is not known: the record stays, so that nothing is lost.
                self.update(&id, |record| record.state = RecordState::Sent)?;
                return Ok(Err(why));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// The node said no: there is no such job.
    fn withdraw(&self, id: &JobId, why: Why) -> Result<Result<JobRecord, Why>, SessionError> {
        self.store.remove_job(id)?;
        Ok(Err(why))
    }

    fn record(
        &self,
        job: JobId,
        offer: &Offered<'_>,
        model: &Model,
        envelope: &Envelope,
        order: &Envelope,
    ) -> JobRecord {
        let Found { candidate, addresses, .. } = offer.found;
        let advertised = candidate.capacity.addresses.iter().map(|address| address.to_string());
        let mut addresses: Vec<String> =
            addresses.iter().map(ToString::to_string).chain(advertised).collect();
        addresses.dedup();
        JobRecord {
            job,
            network: self.network,
            envelope: envelope.clone(),
            order: Some(order.clone()),
            node: candidate.node,
            node_name: candidate.capacity.name.to_string(),
            addresses,
            model: model.id,
            model_name: model.name.clone(),
            created_at: crate::now(),
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
        }
    }

    /// Gives back the places that are not needed. A node that does not hear it gives them away by itself.
    async fn release(&self, offers: impl Iterator<Item = Offered<'_>>) {
        let reason = ReleaseReason::ChoseAnother;
        let released = offers.map(|offer| {
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

fn seed(given: Option<u64>) -> Result<u64, SessionError> {
    match given {
        Some(seed) => Ok(seed),
        None => {
            let mut bytes = [0; 8];
            getrandom::fill(&mut bytes).map_err(SessionError::Random)?;
            Ok(u64::from_le_bytes(bytes))
        }
    }
}

//! Following a job to its end, over broken streams and restarted nodes.
//!
//! A node that stays silent, that looks alive and does nothing, that fails the job or delivers something else loses it:
//! it is handed on to another one. Each connection begins with the question how the job stands, for a node that restarted may count its events anew,
//! and a job may have ended while nobody listened. Then the events are told from the next one wanted.

use std::time::{Duration, Instant};

use futures::StreamExt;
use kinoflock_net::NetError;
use kinoflock_protocol::job::JobSpec;
use kinoflock_protocol::progress::{JobEvent, Progress};
use kinoflock_protocol::query::QueryAction;
use kinoflock_protocol::rpc::{JobState, JobStatus, Request, Response};
use kinoflock_protocol::{JobId, Millis, NodeId, Reason, ValidJob};

use super::faults::fault_of;
use super::find::unexpected;
use super::pace::Watch;
use super::place::is_passing;
use super::{Client, Delivered, Event, Events, SessionError};
use crate::ask::Ask;
use crate::local;
use crate::route::experience::{Experience, Fault};
use crate::store::{Holder, JobRecord, RecordError, RecordState};
use crate::ticket::{Way, parse_addresses};

/// Least silence after which another node is looked for when the clip is made: its node may come back sooner than another
/// could make it again.
const AWAY_WITH_CLIP: Duration = Duration::from_secs(30);
/// Pause between two looks for another node.
const RESCUE_EVERY: Duration = Duration::from_secs(15);
/// Time in which a node must tell how a job stands.
const STATUS_WITHIN: Duration = Duration::from_secs(5);
/// First pause before a broken connection is taken up again; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// What is known of a job while it is followed.
struct Following<'a> {
    job: JobId,
    ways: &'a [Way],
    events: &'a Events,
    /// When its node was last heard.
    heard: Instant,
    /// Pause before its node is asked again.
    pause: Duration,
    /// Not before this is another node looked for.
    rescue_at: Instant,
    watch: Watch,
    /// How far it is followed.
    until: Until,
    /// Silence after which another node is looked for.
    away: Duration,
    /// Since when its node is known to have done wrong.
    wronged: Option<Instant>,
}

/// How far a job is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// Until its receipt is in the store.
    Receipt,
    /// Until its clip is here, checked and accepted.
    Clip,
}

impl<'a> Following<'a> {
    fn new(job: JobId, ways: &'a [Way], events: &'a Events, until: Until, away: Duration) -> Self {
        let now = Instant::now();
        let watch = Watch::new(now);
        Self {
            job,
            ways,
            events,
            heard: now,
            pause: FIRST_PAUSE,
            rescue_at: now,
            watch,
            until,
            away,
            wronged: None,
        }
    }

    /// As at the beginning: another node has the job.
    fn again(self) -> Self {
        Self::new(self.job, self.ways, self.events, self.until, self.away)
    }

    /// Whether it is time to look for another node. A custodian waits in any case: the requester may be at it already.
    fn is_lost(&mut self, record: &JobRecord, error: &SessionError) -> bool {
        let made = record.receipt.is_some() && !matches!(error, SessionError::Disputed { .. });
        let patience = if made { self.away.max(AWAY_WITH_CLIP) } else { self.away };
        match error {
            error if is_transient(error) => {
                self.heard.elapsed() >= patience && Instant::now() >= self.rescue_at
            }
            error if fault_of(error).is_none() => false,
            _ => !self.leaves_it_to_others(),
        }
    }

    fn leaves_it_to_others(&mut self) -> bool {
        let since = *self.wronged.get_or_insert_with(Instant::now);
        self.until == Until::Receipt && since.elapsed() < self.away
    }
}

impl Client {
    /// Follows a job until its clip is here and checked. May be called again at any time, by any process. A job whose
    /// node is lost or did wrong is handed on to another one, found by these ways.
    ///
    /// # Errors
    /// `Failed`, `Cancelled`, `Lost`, `OutOfReach`, `Disputed`, and what the store or the fetch meets.
    pub async fn follow(
        &self,
        job: &JobId,
        ways: &[Way],
        events: &Events,
    ) -> Result<Delivered, SessionError> {
        let record = self.store.job(job)?;
        self.serve_inputs(&record);
        let following = Following::new(*job, ways, events, Until::Clip, self.away);
        let outcome = self.follow_to_end(following).await;
        let outcome = outcome.map(|delivered| delivered.expect("invariant: followed to its clip"));
        if let (Ok(delivered), false) = (&outcome, record.state.is_final()) {
            self.remember_done(delivered);
        }
        if outcome.is_ok() {
            self.call_off(job).await;
        }
        outcome
    }

    /// Watches a job that somebody else signed until a node has signed a receipt for it, and hands it on as
    /// [`Client::follow`] does. The clip is neither fetched nor judged.
    ///
    /// # Errors
    /// As [`Client::follow`].
    pub async fn watch_over(&self, job: &JobId, ways: &[Way]) -> Result<JobRecord, SessionError> {
        self.serve_inputs(&self.store.job(job)?);
        let events = Events::none();
        self.follow_to_end(Following::new(*job, ways, &events, Until::Receipt, self.away)).await?;
        Ok(self.store.job(job)?)
    }

    async fn follow_to_end(&self, mut following: Following<'_>) -> Result<Option<Delivered>, SessionError> {
        loop {
            let (record, before) = (self.store.job(&following.job)?, following.heard);
            let outcome = match (ended(&record), &record.receipt) {
                (Some(ended), _) => Err(ended),
                (None, Some(_)) if following.until == Until::Receipt => return Ok(None),
                (None, Some(_)) => self.deliver(&record, following.events).await,
                (None, None) => match self.listen(&record, &mut following).await {
                    // The receipt is in the store now.
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
            };
            let error = match outcome {
                Ok(delivered) => return Ok(Some(delivered)),
                Err(error) => error,
            };
            if following.is_lost(&record, &error) {
                if self.hand_on(&error, &following).await? {
                    following = following.again();
                    continue;
                }
                following.rescue_at = Instant::now() + RESCUE_EVERY;
            }
            self.wait_for_node(&record, error, before, &mut following).await?;
        }
    }

    /// Hands a job on whose node is lost; false if nobody else takes it.
    async fn hand_on(&self, error: &SessionError, following: &Following<'_>) -> Result<bool, SessionError> {
        // As it stands now: the error may have been written into it.
        let record = self.store.job(&following.job)?;
        let is_moved = self.rescue(&record, error, following.ways, following.events).await?;
        if is_moved || !is_transient(error) {
            self.blame(&record, error).await;
        }
        Ok(is_moved)
    }

    /// Waits before a node is asked again, if there is hope that it answers.
    async fn wait_for_node(
        &self,
        record: &JobRecord,
        error: SessionError,
        before: Instant,
        following: &mut Following<'_>,
    ) -> Result<(), SessionError> {
        let stalled = matches!(error, SessionError::Stalled { .. });
        let others_may = fault_of(&error).is_some() && following.leaves_it_to_others();
        if !stalled && !is_transient(&error) && !others_may {
            return Err(error);
        }
        if stalled {
            following.watch = Watch::new(Instant::now());
        }
        let doubled = (following.pause * 2).min(LONGEST_PAUSE);
        following.pause = if following.heard > before { FIRST_PAUSE } else { doubled };
        let (waited, pause) = (following.heard.elapsed(), following.pause);
        if waited + pause > self.patience {
            let (job, node, reason) = (record.job, record.node, error.to_string());
            self.remember_fault(record, Fault::OutOfReach);
            return Err(SessionError::OutOfReach { job, node, waited: waited.into(), reason });
        }
        let lost = Event::Reconnecting { node: record.node, why: error.to_string(), after: pause.into() };
        following.events.tell(lost).await;
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Keeps that it went well, and how true the node's times were, for the next choice of a node.
    fn remember_done(&self, delivered: &Delivered) {
        let record = &delivered.record;
        let made = delivered.receipt.receipt();
        let took = made.finished_at.since(made.accepted_at);
        let mut seen = self.store.experience(&record.node);
        seen.done(record.told.unwrap_or(took), took, crate::now());
        self.keep_experience(&record.node, &seen);
    }

    pub(super) fn remember_fault(&self, record: &JobRecord, fault: Fault) {
        let mut seen = self.store.experience(&record.node);
        seen.fault(fault, crate::now());
        self.keep_experience(&record.node, &seen);
    }

    pub(super) fn keep_experience(&self, node: &NodeId, seen: &Experience) {
        if let Err(error) = self.store.keep_experience(node, seen) {
            tracing::warn!(node = %node.short(), %error, "what was seen of a node could not be kept");
        }
    }

    /// [`Client::submit`], then [`Client::follow`].
    ///
    /// # Errors
    /// Those of both.
    pub async fn generate(
        &self,
        ask: &Ask,
        ways: &[Way],
        events: &Events,
    ) -> Result<Delivered, SessionError> {
        let record = self.submit(ask, ways, events).await?;
        self.follow(&record.job, ways, events).await
    }

    /// Asks a job's node how the job stands, and keeps what is new.
    ///
    /// # Errors
    /// When the node cannot be asked, or knows no such job.
    pub async fn status(&self, job: &JobId) -> Result<(JobRecord, JobStatus), SessionError> {
        let record = self.store.job(job)?;
        self.reach(&record).await?;
        let status = self.ask_status(&record).await?;
        Ok((self.note_status(&record, &status)?, status))
    }

    /// Stops a job.
    ///
    /// # Errors
    /// When the node cannot be asked, or knows no such job.
    pub async fn cancel(&self, job: &JobId) -> Result<JobRecord, SessionError> {
        let record = self.store.job(job)?;
        self.reach(&record).await?;
        let query = self.query(&record, QueryAction::Cancel)?;
        match self.net.request(record.node, Request::Cancel(query)).await? {
            Response::Cancelled { .. } => self.update(job, |record| record.state = RecordState::Cancelled),
            other => Err(unknown_job(&record, unexpected(record.node, "a cancel", other))),
        }
    }

    /// Connects to the node that has a job, wherever it is now.
    pub(super) async fn reach(&self, record: &JobRecord) -> Result<(), SessionError> {
        let mut addresses = parse_addresses(&record.addresses);
        // A daemon on this machine may have other ports since it restarted.
        for here in local::find(&local::folders()).iter().filter(|here| here.node_id == record.node) {
            addresses.extend(parse_addresses(&here.addresses));
        }
        // One that moved has sent out a new ticket.
        let joined = self.store.tickets()?;
        let ways = joined.iter().filter_map(|text| text.parse::<Way>().ok());
        let nodes = ways.filter_map(|way| way.nodes()).flatten();
        for (_, newer) in nodes.filter(|(node, _)| *node == record.node) {
            addresses.extend(newer);
        }
        if let Some(nearby) = self.found.borrow().get(&record.node) {
            addresses.extend(nearby.iter().cloned());
        }
        self.net.connect(record.node, addresses).await?;
        Ok(())
    }

    async fn listen(&self, record: &JobRecord, following: &mut Following<'_>) -> Result<(), SessionError> {
        self.reach(record).await?;
        let status = self.ask_status(record).await?;
        following.heard = Instant::now();
        let record = self.note_status(record, &status)?;
        if record.receipt.is_some() {
            return Ok(());
        }
        if let Some(ended) = ended(&record) {
            return Err(ended);
        }
        let wants_previews =
            record.envelope.open::<JobSpec>(&self.network).is_ok_and(|job| job.value.returns.previews);
        let action = if wants_previews { QueryAction::Previews } else { QueryAction::Progress };
        let query = self.query(&record, action)?;
        let stream = self.net.open_progress(record.node, query, record.next_seq).await;
        let stream = stream.map_err(|error| match error {
            NetError::Refused { node, refusal } => {
                unknown_job(&record, SessionError::Refused { node, refusal })
            }
            other => other.into(),
        })?;
        let mut stream = Box::pin(stream.into_stream());
        loop {
            match tokio::time::timeout(following.watch.quiet(), stream.next()).await {
                Ok(None) => break,
                Ok(Some(progress)) => {
                    let progress = progress?;
                    following.heard = Instant::now();
                    if progress.job == record.job {
                        following.watch.saw(&progress.event, following.heard);
                        self.note(&record, progress, following.events).await?;
                    }
                }
                Err(_) => {
                    self.ask_status(&record).await?;
                    following.heard = Instant::now();
                }
            }
            if let Some(still) = following.watch.stalled(Instant::now()) {
                let (job, node) = (record.job, record.node);
                return Err(SessionError::Stalled { job, node, still: still.into() });
            }
        }
        ended(&self.store.job(&record.job)?).map_or(Ok(()), Err)
    }

    async fn ask_status(&self, record: &JobRecord) -> Result<JobStatus, SessionError> {
        let query = self.query(record, QueryAction::Status)?;
        match self.net.request_within(record.node, Request::Status(query), STATUS_WITHIN).await? {
            Response::Status(status) if status.job == record.job => Ok(status),
            Response::Busy { .. } => Err(NetError::Busy { node: record.node }.into()),
            other => Err(unknown_job(record, unexpected(record.node, "a question for a job", other))),
        }
    }

    fn note_status(&self, record: &JobRecord, status: &JobStatus) -> Result<JobRecord, SessionError> {
        self.update(&record.job, |record| {
            if status.seq.saturating_add(1) < record.next_seq {
                record.next_seq = 0;
            }
            if record.state.is_final() {
                return;
            }
            record.state = match status.state {
                JobState::AwaitingInputs | JobState::Queued => RecordState::Queued,
                JobState::Running => RecordState::Running,
                JobState::Done => RecordState::Made,
                JobState::Failed => RecordState::Failed,
                JobState::Cancelled => RecordState::Cancelled,
            };
            if let Some(receipt) = &status.receipt {
                record.receipt.get_or_insert_with(|| receipt.clone());
            }
            for node in status.replicas.iter() {
                if !record.holders.iter().any(|holder| holder.node == *node) {
                    record.holders.push(Holder { node: *node, sealed: None });
                }
            }
            if let (JobState::Failed, None) = (status.state, &record.error) {
                record.error = Some(match &status.error {
                    Some(error) => RecordError {
                        code: error.code.to_string(),
                        text: error.text.to_string(),
                        retryable: error.retryable,
                    },
                    None => RecordError {
                        code: "failed".to_owned(),
                        text: "no cause told".to_owned(),
                        retryable: false,
                    },
                });
            }
        })
    }

    /// Keeps what a change of state says, and tells every event.
    async fn note(
        &self,
        record: &JobRecord,
        progress: Progress,
        events: &Events,
    ) -> Result<(), SessionError> {
        let job = &record.job;
        let next_seq = progress.seq.saturating_add(1);
        let state = |state: RecordState| {
            move |record: &mut JobRecord| {
                record.state = state;
                record.next_seq = next_seq;
            }
        };
        match progress.event {
            JobEvent::AwaitingInputs { missing } => {
                events.tell(Event::AwaitingInputs { missing: missing.len() }).await;
            }
            JobEvent::Queued { position, eta } => events.tell(Event::Queued { position, eta }).await,
            JobEvent::Loading => {
                self.update(job, state(RecordState::Running))?;
                events.tell(Event::Loading).await;
            }
            // Not worth a write to the disk: a stream that is taken up again tells the step again.
            JobEvent::Step { done, total, eta } => events.tell(Event::Step { done, total, eta }).await,
            JobEvent::Preview { step, png } => events.hint(Event::Preview { step, png: png.into_vec() }),
            JobEvent::Checkpoint { checkpoint } => self.keep_checkpoint(record, checkpoint),
            JobEvent::Encoding => events.tell(Event::Encoding).await,
            JobEvent::Done { receipt } => {
                self.update(job, |record| {
                    record.state = RecordState::Made;
                    record.next_seq = next_seq;
                    record.receipt = Some(receipt);
                })?;
            }
            JobEvent::Failed { code, text, retryable } => {
                let error = RecordError { code: code.to_string(), text: text.to_string(), retryable };
                self.update(job, |record| {
                    state(RecordState::Failed)(record);
                    record.error = Some(error);
                })?;
                let (code, text) = (code.to_string(), text.to_string());
                return Err(SessionError::Failed { job: *job, code, text, retryable });
            }
            JobEvent::Cancelled => {
                self.update(job, state(RecordState::Cancelled))?;
            }
        }
        Ok(())
    }

    fn serve_inputs(&self, record: &JobRecord) {
        if let Ok(job) = ValidJob::parse_stored(&record.envelope, &record.network) {
            self.inputs.serve(job.spec().inputs().iter().map(|blob| blob.id));
        }
    }
}

/// The error of a job that ended without a clip.
fn ended(record: &JobRecord) -> Option<SessionError> {
    let job = record.job;
    match record.state {
        RecordState::Cancelled => Some(SessionError::Cancelled { job }),
        RecordState::Failed => {
            let none = RecordError { code: String::new(), text: String::new(), retryable: false };
            let RecordError { code, text, retryable } = record.error.clone().unwrap_or(none);
            Some(SessionError::Failed { job, code, text, retryable })
        }
        _ => None,
    }
}

/// A node that knows no such job is told apart from other refusals.
fn unknown_job(record: &JobRecord, error: SessionError) -> SessionError {
    match error {
        SessionError::Refused { node, refusal } if refusal.reason == Reason::JobUnknown => {
            SessionError::Lost { job: record.job, node }
        }
        other => other,
    }
}

fn is_transient(error: &SessionError) -> bool {
    match error {
        SessionError::Net(NetError::Refused { refusal, .. }) => is_passing(refusal.reason),
        SessionError::Refused { refusal, .. } => is_passing(refusal.reason),
        SessionError::Net(error) => error.is_transient() || matches!(error, NetError::NoAddress { .. }),
        SessionError::Fetch { error, .. } => crate::fetch::is_transient(error),
        _ => false,
    }
}

impl SessionError {
    /// How long a node was out of reach, and which.
    #[must_use]
    pub fn out_of_reach(&self) -> Option<(NodeId, Millis)> {
        match self {
            Self::OutOfReach { node, waited, .. } => Some((*node, *waited)),
            _ => None,
        }
    }
}

//! What a job's owner asks of the daemon afterwards: how it stands, a cancel, an answer to its receipt, its events.

use std::time::Instant;

use kinoflock_net::progress::ProgressSink;
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{JobId, NodeId, RequesterId};
use kinoflock_protocol::job::ValidJob;
use kinoflock_protocol::progress::JobEvent;
use kinoflock_protocol::query::{QueryAction, ValidQuery};
use kinoflock_protocol::receipt::{ReceiptAnswer, ValidReceipt, Verdict};
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::rpc::{JobFailure, JobState, JobStatus, Response};
use kinoflock_protocol::units::Millis;

use super::refuse::{invalid, order_refusal};
use super::requests::restored_seq;
use super::{Daemon, unix_now};
use crate::queue::{End, JobRecord, StoredState};
use crate::scheduler::{Cancelled, Stage};
use crate::telemetry::ResultLabels;

impl Daemon {
    /// Checks a signed query and that its signer owns the job, or may watch it.
    pub(super) fn owned(&self, envelope: &Envelope) -> Result<(ValidQuery, Option<JobRecord>), Box<Refusal>> {
        let node = self.identity.node_id();
        let query = ValidQuery::parse(envelope, &self.network, unix_now(), &node).map_err(order_refusal)?;
        let job = query.query.job;
        let (requester, record) = match self.live.get(&job) {
            Some(live) => (live.job.requester(), None),
            None => {
                let record = self.record(&job)?;
                (record.origin.requester, Some(record))
            }
        };
        let watches = matches!(query.query.action, QueryAction::Status | QueryAction::Progress);
        let is_custodian = || match (self.live.get(&job), &record) {
            (Some(live), _) => live.job.spec().custodians.contains(&NodeId::from(query.signer)),
            (None, Some(record)) => ValidJob::parse_stored(&record.job, &self.network)
                .is_ok_and(|job| job.spec().custodians.contains(&NodeId::from(query.signer))),
            (None, None) => false,
        };
        if RequesterId::from(query.signer) != requester && !(watches && is_custodian()) {
            return Err(Box::new(Refusal::new(Reason::NotYours, "query.signer").given(job)));
        }
        Ok((query, record))
    }

    fn record(&self, job: &JobId) -> Result<JobRecord, Box<Refusal>> {
        let unknown = || Box::new(Refusal::new(Reason::JobUnknown, "query.job").given(job));
        match self.queue.find(job) {
            Ok(record) => record.ok_or_else(unknown),
            // Not "unknown", for then its requester would give it up.
            Err(error) => {
                tracing::error!(job = %job.short(), %error, "a job could not be looked up");
                Err(Box::new(Refusal::new(Reason::Busy, error.code()).advice("ask again in some seconds")))
            }
        }
    }

    pub(super) fn status(&mut self, envelope: &Envelope, node: NodeId) -> Response {
        let (query, record) = match self.owned(envelope) {
            Ok(owned) => owned,
            Err(refusal) => return Response::Refused(*refusal),
        };
        let job = query.query.job;
        let seq = self.boards.find(&job).map_or(0, |board| board.next().saturating_sub(1));
        let mut status = JobStatus {
            job,
            state: JobState::Queued,
            seq,
            position: 0,
            eta: Millis(0),
            receipt: None,
            replicas: List::default(),
            error: None,
        };
        match record {
            Some(record) => {
                self.ended_status(&record, &mut status);
                if let Some(receipt) = &status.receipt {
                    self.mirror(&record, receipt, node);
                }
            }
            None => {
                (status.position, status.eta) = self.standing(&job);
                status.state = match self.scheduler.stage(&job) {
                    Some(Stage::AwaitingInputs { .. }) => JobState::AwaitingInputs,
                    Some(Stage::Running { .. }) => JobState::Running,
                    Some(Stage::Committing | Stage::Queued) | None => JobState::Queued,
                };
            }
        }
        Response::Status(status)
    }

    fn ended_status(&self, record: &JobRecord, status: &mut JobStatus) {
        match &record.state {
            StoredState::Waiting | StoredState::Running => {}
            StoredState::Done { .. } => {
                status.replicas = self.holdings.replicas(&record.id).unwrap_or_default();
                status.state = JobState::Done;
                status.receipt = self.receipt_of(record);
            }
            StoredState::Ended { end: End::Cancelled, .. } => status.state = JobState::Cancelled,
            StoredState::Ended { end: End::Failed { code, text, retryable }, .. } => {
                status.state = JobState::Failed;
                let (code, text) = (Text::truncated(code), Text::truncated(text));
                status.error = Some(JobFailure { code, text, retryable: *retryable });
            }
        }
    }

    /// The event that an ended job's board ends with.
    fn last_event(&self, record: &JobRecord) -> Option<JobEvent> {
        match &record.state {
            StoredState::Waiting | StoredState::Running => None,
            StoredState::Done { .. } => Some(JobEvent::Done { receipt: self.receipt_of(record)? }),
            StoredState::Ended { end: End::Cancelled, .. } => Some(JobEvent::Cancelled),
            StoredState::Ended { end: End::Failed { code, text, retryable }, .. } => Some(JobEvent::Failed {
                code: Text::truncated(code),
                text: Text::truncated(text),
                retryable: *retryable,
            }),
        }
    }

    /// The receipt of a finished job.
    pub(super) fn receipt_of(&self, record: &JobRecord) -> Option<Envelope> {
        let StoredState::Done { chain, sequence, .. } = record.state else { return None };
        match self.queue.receipt_in(chain, sequence) {
            Ok(receipt) => receipt,
            Err(error) => {
                tracing::error!(job = %record.id.short(), %error, "a receipt could not be read");
                None
            }
        }
    }

    pub(super) fn cancel(&mut self, envelope: &Envelope) -> Response {
        let (query, record) = match self.owned(envelope) {
            Ok(owned) => owned,
            Err(refusal) => return Response::Refused(*refusal),
        };
        let job = query.query.job;
        if query.query.action != QueryAction::Cancel {
            return Response::Refused(*invalid("query.action", &"the query does not ask for a cancel"));
        }
        if record.is_some() {
            return Response::Cancelled { job };
        }
        match self.scheduler.handle_cancel(&job, &RequesterId::from(query.signer), Instant::now()) {
            Ok(Cancelled::Removed | Cancelled::Stopping | Cancelled::Ended(_)) => Response::Cancelled { job },
            Err(refusal) => Response::Refused(refusal),
        }
    }

    /// A requester's word on a receipt: on acceptance the clip's bytes no longer count against them.
    pub(super) fn answer(&mut self, envelope: Envelope) -> Response {
        if let Some(heard) = self.answer_for_held(&envelope) {
            return heard;
        }
        match self.check_answer(&envelope) {
            Ok((record, receipt, verdict)) => {
                let job = record.id;
                if matches!(verdict, Verdict::Accept) {
                    self.call_in_copies(&job);
                }
                let accepted = matches!(verdict, Verdict::Accept);
                let result = if accepted { "accepted" } else { "disputed" };
                self.metrics.receipts.get_or_create(&ResultLabels { result }).inc();
                let (queue, clips) = (self.queue.clone(), self.clips.clone());
                tokio::spawn(async move {
                    let now = unix_now();
                    if let Err(error) = queue.acknowledge(job, envelope, now).await {
                        return tracing::error!(job = %job.short(), %error, "an answer could not be written");
                    }
                    let blobs =
                        [Some(receipt.receipt().clip.into()), receipt.receipt().latents.map(|blob| blob.id)];
                    for blob in blobs.into_iter().flatten().filter(|_| accepted) {
                        if let Err(error) = clips.acknowledge(&blob, &job, now) {
                            tracing::debug!(job = %job.short(), %error, "an acknowledged blob is not here any more");
                        }
                    }
                });
                Response::Acknowledged
            }
            Err(refusal) => Response::Refused(*refusal),
        }
    }

    fn check_answer(&self, envelope: &Envelope) -> Result<(JobRecord, ValidReceipt, Verdict), Box<Refusal>> {
        let opened =
            envelope.open::<ReceiptAnswer>(&self.network).map_err(|error| invalid(error.code(), &error))?;
        let answer = opened.value;
        let record = self.record(&answer.job)?;
        if RequesterId::from(opened.signer) != record.origin.requester {
            return Err(Box::new(Refusal::new(Reason::NotYours, "answer.signer").given(answer.job)));
        }
        let receipt =
            self.receipt_of(&record).and_then(|receipt| ValidReceipt::parse(&receipt, &self.network).ok());
        match receipt {
            Some(receipt) if receipt.id() == answer.receipt => Ok((record, receipt, answer.verdict)),
            _ => Err(invalid("answer.receipt", &"the job has no such receipt")),
        }
    }

    pub(super) fn handle_follow(&mut self, query: &Envelope, from: u64, sink: ProgressSink) {
        let (query, record) = match self.owned(query) {
            Ok(owned) => owned,
            Err(refusal) => return sink.refuse(*refusal),
        };
        let previews = query.query.action == QueryAction::Previews;
        if !previews && query.query.action != QueryAction::Progress {
            return sink.refuse(*invalid("query.action", &"the query does not ask for progress"));
        }
        let job = query.query.job;
        let board = match self.boards.find(&job) {
            Some(board) => board,
            None => {
                let board = self.boards.board(job, restored_seq());
                if let Some(event) = record.as_ref().and_then(|record| self.last_event(record)) {
                    self.boards.tell(&job, event);
                }
                board
            }
        };
        tokio::spawn(board.follow(sink.accept(), from, previews));
    }
}

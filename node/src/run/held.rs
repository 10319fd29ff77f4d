//! What peers ask this node to hold, to give back and to forget.
//!
//! A holder verifies the bytes on their way in and cannot see them. Only who signed the job (or a custodian that the job
//! names) hears what is held for it; only who signed it makes it go away.

use std::time::{Duration, Instant};

use kinoflock_net::{FetchOptions, FileSink};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::custody::{Content, Held, Keep, ValidKeep};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{JobId, NodeId, RequesterId};
use kinoflock_protocol::names::NodeAddress;
use kinoflock_protocol::query::{QueryAction, ValidQuery};
use kinoflock_protocol::receipt::ReceiptAnswer;
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::rpc::Response;
use kinoflock_protocol::units::Millis;

use super::refuse::{invalid, order_refusal};
use super::{Daemon, Note, unix_now};
use crate::clips::ClipsError;
use crate::holdings::{HeldRow, Holdings, HoldingsError};

/// Blobs that are fetched for others at once.
const MAX_KEEPING: usize = 8;
/// When to ask again whether a blob is here.
const KEEP_AGAIN: Millis = Millis(500);
/// Longest fetch of a blob for others.
const KEEP_WITHIN: Duration = Duration::from_secs(600);

impl Daemon {
    /// Takes a sealed blob into keeping: fetches it from whoever asks, and says `Kept` once it is on disk.
    pub(super) fn keep(&mut self, envelope: &Envelope, from: NodeId) -> Response {
        match self.try_keep(envelope, from) {
            Ok(response) => response,
            Err(refusal) => Response::Refused(*refusal),
        }
    }

    fn try_keep(&mut self, envelope: &Envelope, from: NodeId) -> Result<Response, Box<Refusal>> {
        let now = unix_now();
        let ValidKeep { signer, keep } =
            ValidKeep::parse(envelope, &self.network, now, &self.identity.node_id())
                .map_err(order_refusal)?;
        let Keep { job, requester, content, sealed, statement, until, .. } = keep;
        let until = until.min(now.plus(Millis::from(self.config.terms.keep_at_most)));
        let row = HeldRow { requester, maker: signer, content, sealed, statement, until };
        if self.holdings.has(&job, &row).map_err(|error| refused(&error))? {
            return Ok(Response::Kept { until });
        }
        if self.keeping.contains(&(job, content)) {
            return Ok(Response::Busy { retry_after: KEEP_AGAIN });
        }
        self.holdings.check(&job, &signer, sealed.len).map_err(|error| refused(&error))?;
        if self.keeping.len() >= MAX_KEEPING {
            return Ok(Response::Busy { retry_after: KEEP_AGAIN });
        }
        self.keeping.insert((job, content));
        let (net, holdings) = (self.net.clone(), self.holdings.clone());
        self.spawn(async move {
            let file = holdings.incoming(&job, content);
            let options = FetchOptions { max_len: sealed.len, ..FetchOptions::default() };
            let givers = [from];
            let fetch = net.fetch_blob(sealed.id, &givers, FileSink::new(&file), options);
            let kept = match tokio::time::timeout(KEEP_WITHIN, fetch).await {
                Ok(Ok(_)) => keep_file(holdings, job, file, row).await,
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("not fetched within {} s", KEEP_WITHIN.as_secs())),
            };
            if let Err(error) = kept {
                tracing::warn!(job = %job.short(), maker = %signer.short(), error, "a sealed blob could not be taken into keeping");
            }
            Note::Kept { job, content }
        });
        Ok(Response::Busy { retry_after: KEEP_AGAIN })
    }

    pub(super) fn handle_kept(&mut self, job: JobId, content: Content) {
        self.keeping.remove(&(job, content));
    }

    /// What is held here for a job, told to its requester and its custodians alone.
    pub(super) fn held(&self, envelope: &Envelope) -> Response {
        let query = match ValidQuery::parse(envelope, &self.network, unix_now(), &self.identity.node_id()) {
            Ok(query) if query.query.action == QueryAction::Held => query,
            Ok(_) => {
                return Response::Refused(*invalid("query.action", &"the query does not ask what is held"));
            }
            Err(error) => return Response::Refused(*order_refusal(error)),
        };
        let job = query.query.job;
        let mut held = Held::default();
        let mut requester = RequesterId::from(query.signer);
        if let Some(watched) = self.custodian.watched(&job) {
            let is_custodian = watched.job.spec().custodians.contains(&NodeId::from(query.signer));
            if is_custodian {
                requester = watched.job.requester();
            }
            if requester == watched.job.requester() {
                let addresses = watched.record.addresses.iter().map(|address| Text::truncated(address));
                held.runs_at =
                    Some(NodeAddress { id: watched.record.node, addresses: List::first_of(addresses) });
            }
        }
        match self.holdings.items(&job, &requester) {
            Ok(items) => {
                held.items = items;
                Response::Held(held)
            }
            Err(error) => {
                tracing::error!(job = %job.short(), %error, "what is held could not be read");
                Response::error(error.code(), &error.to_string())
            }
        }
    }

    /// Forgets a job on its requester's word: clip, latents, checkpoints, prompt, sealed copies, and the
    /// requester's adapters. Its receipt stays.
    pub(super) fn forget(&mut self, envelope: &Envelope) -> Response {
        match self.try_forget(envelope) {
            Ok(job) => Response::Forgotten { job },
            Err(refusal) => Response::Refused(*refusal),
        }
    }

    fn try_forget(&mut self, envelope: &Envelope) -> Result<JobId, Box<Refusal>> {
        let now = unix_now();
        let query = ValidQuery::parse(envelope, &self.network, now, &self.identity.node_id())
            .map_err(order_refusal)?;
        let (job, requester) = (query.query.job, RequesterId::from(query.signer));
        if query.query.action != QueryAction::Forget {
            return Err(invalid("query.action", &"the query does not ask to forget"));
        }
        let unknown = || Refusal::new(Reason::JobUnknown, "query.job").given(job);
        if let Some(live) = self.live.get(&job).filter(|live| live.job.requester() == requester) {
            let refusal = Refusal::new(Reason::Busy, "query.job").given(live.job.id());
            return Err(Box::new(refusal.advice("the job runs or waits: cancel it first")));
        }
        let own = match self.queue.find(&job) {
            Ok(record) => record.is_some_and(|record| record.origin.requester == requester),
            Err(error) => return Err(Box::new(Refusal::new(Reason::Busy, error.code()))),
        };
        let taken_back =
            self.holdings.take_back(&job, &NodeId::from(query.signer), now).unwrap_or_else(|error| {
                tracing::error!(job = %job.short(), %error, "what was held could not be dropped");
                false
            });
        self.adapters.forget(&requester);
        let audited = self.audits.forget(&job, &requester);
        let held = self.let_go(&job, &requester) || taken_back || audited;
        if !own {
            return if held { Ok(job) } else { Err(Box::new(unknown())) };
        }
        // The bytes first: a crash in between leaves a job whose clip is gone, and the word is given again.
        self.clips
            .forget(&job, now)
            .map_err(|error| Box::new(Refusal::new(Reason::Internal, error.code())))?;
        let queue = self.queue.clone();
        self.call_in_copies(&job);
        self.boards.forget(&job);
        self.spawn(async move {
            let forgotten = queue.forget(job).await;
            if let Err(error) = forgotten {
                tracing::error!(job = %job.short(), %error, "a job's record could not be erased");
            }
            Note::Swept { jobs: vec![job] }
        });
        tracing::info!(job = %job.short(), "forgotten on its requester's word");
        Ok(job)
    }

    /// Drops sealed copies and custody of a job. Tells whether there was anything.
    pub(super) fn let_go(&mut self, job: &JobId, requester: &RequesterId) -> bool {
        let held = self.holdings.forget(job, requester, unix_now()).unwrap_or_else(|error| {
            tracing::error!(job = %job.short(), %error, "what was held could not be dropped");
            false
        });
        let watched =
            self.custodian.watched(job).is_some_and(|watched| watched.job.requester() == *requester);
        if watched {
            self.custodian.dismiss(job);
        }
        held || watched
    }

    /// A requester's word on a job that others made: what was held for it is not needed any more.
    pub(super) fn answer_for_held(&mut self, envelope: &Envelope) -> Option<Response> {
        let opened = envelope.open::<ReceiptAnswer>(&self.network).ok()?;
        let (job, requester) = (opened.value.job, RequesterId::from(opened.signer));
        self.let_go(&job, &requester).then_some(Response::Acknowledged)
    }

    /// Drops sealed copies whose time is over.
    pub(super) fn sweep_held(&self) {
        let holdings = self.holdings.clone();
        tokio::task::spawn_blocking(move || match holdings.sweep(unix_now()) {
            Ok(0) => {}
            Ok(dropped) => tracing::info!(dropped, "sealed copies dropped whose time is over"),
            Err(error) => tracing::error!(%error, "old sealed copies could not be dropped"),
        });
    }
}

/// Moves a fetched file into keeping, away from the daemon's loop.
pub(super) async fn keep_file(
    holdings: Holdings,
    job: JobId,
    file: std::path::PathBuf,
    row: HeldRow,
) -> Result<(), String> {
    let began = Instant::now();
    let kept = tokio::task::spawn_blocking(move || {
        let kept = holdings.keep(job, &file, &row, unix_now());
        // What is kept was copied; what could not be kept is of no use.
        let _ = std::fs::remove_file(&file);
        kept
    });
    let kept = kept.await.map_err(|error| error.to_string())?;
    tracing::debug!(job = %job.short(), took_ms = began.elapsed().as_millis() as u64, "sealed blob kept");
    kept.map_err(|error| error.to_string())
}

fn refused(error: &HoldingsError) -> Box<Refusal> {
    let refusal = match error {
        HoldingsError::Clips(ClipsError::StoreFull { needed, available, .. }) => {
            Refusal::new(Reason::StoreFull, "storage.replicas_limit").limit(available, needed)
        }
        HoldingsError::MakerFull { limit, used, given, .. } => {
            Refusal::new(Reason::QuotaExceeded, "storage.replicas_limit").limit(limit, used + given)
        }
        HoldingsError::TooMany { limit, .. } => {
            Refusal::new(Reason::QuotaExceeded, "held").limit(limit, limit + 1)
        }
        other => Refusal::new(Reason::Internal, other.code()),
    };
    Box::new(refusal.advice("ask another node"))
}

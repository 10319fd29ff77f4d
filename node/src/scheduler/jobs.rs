//! The jobs that live here, what their requesters used today, and a memory of those that ended.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use kinoflock_protocol::id::{JobId, Nonce, RequesterId};

use super::device::DeviceId;
use super::fair::Came;
use super::origin::Origin;
use crate::policy::Wanted;

/// What counts as a day in quotas.
pub(super) const DAY: Duration = Duration::from_secs(24 * 3600);

/// Most ended jobs remembered here; older ones are found in the queue's store only.
pub(super) const MAX_ENDED: usize = 16_384;

/// Most entries of work remembered for daily quotas.
const MAX_SPENT: usize = 65_536;

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The clip is there.
    Done,
    /// Stopped on the requester's word.
    Cancelled,
    /// It failed.
    Failed(Cause),
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Stable name.
    pub code: String,
    /// For people. No prompt, no path.
    pub text: String,
    /// Whether another try, here or elsewhere, may succeed.
    pub retryable: bool,
    /// Whether another try here may.
    pub here: bool,
}

/// Where a live job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Admitted, not yet on disk.
    Committing,
    /// Its inputs are being fetched; it keeps its place until then.
    AwaitingInputs {
        /// When its place is given up.
        until: Instant,
    },
    /// It waits for a device.
    Queued,
    /// It runs.
    Running {
        /// Where.
        device: DeviceId,
    },
}

#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) origin: Origin,
    pub(super) wanted: Wanted,
    pub(super) nonce: Nonce,
    pub(super) seq: u64,
    pub(super) deadline: Option<Instant>,
    pub(super) needs_inputs: bool,
    pub(super) stage: Stage,
    /// Starts so far, those before a restart of the daemon included.
    pub(super) starts: u32,
    pub(super) failures: u32,
    /// Found in the store, admitted under the limits of an earlier run.
    pub(super) restored: bool,
    pub(super) bypassed: u8,
    /// When it came, in the virtual times of fairness.
    pub(super) came: Came,
    pub(super) avoid: Option<DeviceId>,
    /// Position and expected finish as last told.
    pub(super) told: Option<(u32, Option<Instant>)>,
}

impl Job {
    pub(super) const fn waits(&self) -> bool {
        !matches!(self.stage, Stage::Running { .. })
    }
}

#[derive(Debug, Default)]
pub(super) struct Jobs {
    pub(super) live: BTreeMap<JobId, Job>,
    nonces: BTreeMap<(RequesterId, Nonce), JobId>,
    ended: BTreeMap<JobId, (RequesterId, Nonce, Outcome)>,
    ended_order: VecDeque<JobId>,
    spent: BTreeMap<RequesterId, VecDeque<(Instant, JobId, u64)>>,
    spent_entries: usize,
    next_seq: u64,
}

impl Jobs {
    pub(super) fn insert(&mut self, id: JobId, mut job: Job, seq: Option<u64>) -> u64 {
        job.seq = seq.unwrap_or(self.next_seq);
        self.next_seq = self.next_seq.max(job.seq + 1);
        self.nonces.insert((job.origin.requester, job.nonce), id);
        let seq = job.seq;
        self.live.insert(id, job);
        seq
    }

    /// The other job of this requester that has this nonce.
    pub(super) fn nonce_holder(&self, requester: &RequesterId, nonce: &Nonce, job: &JobId) -> Option<JobId> {
        self.nonces.get(&(*requester, *nonce)).copied().filter(|holder| holder != job)
    }

    pub(super) fn ended(&self, id: &JobId) -> Option<&Outcome> {
        self.ended.get(id).map(|(_, _, outcome)| outcome)
    }

    pub(super) fn end(&mut self, id: JobId, outcome: Outcome) -> Option<Job> {
        let job = self.live.remove(&id)?;
        self.remember_ended(id, job.origin.requester, job.nonce, outcome);
        Some(job)
    }

    pub(super) fn remember_ended(
        &mut self,
        id: JobId,
        requester: RequesterId,
        nonce: Nonce,
        outcome: Outcome,
    ) {
        self.nonces.insert((requester, nonce), id);
        self.ended.insert(id, (requester, nonce, outcome));
        self.ended_order.push_back(id);
        while self.ended_order.len() > MAX_ENDED {
            if let Some(oldest) = self.ended_order.pop_front() {
                self.forget(&oldest);
            }
        }
    }

    /// Takes a job back that was never stored, as if it had never come.
    pub(super) fn undo(&mut self, id: &JobId) -> Option<Job> {
        let job = self.live.remove(id)?;
        self.nonces.remove(&(job.origin.requester, job.nonce));
        self.unspend(&job.origin.requester, id);
        Some(job)
    }

    /// Forgets an ended job, when its retention is over.
    pub(super) fn forget(&mut self, id: &JobId) {
        if let Some((requester, nonce, _)) = self.ended.remove(id) {
            self.nonces.remove(&(requester, nonce));
        }
    }

    pub(super) fn waiting_count(&self, of: impl Fn(&Job) -> bool) -> u32 {
        let count = self.live.values().filter(|job| job.waits() && of(job)).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    pub(super) fn live_of(&self, requester: &RequesterId) -> u32 {
        let count = self.live.values().filter(|job| job.origin.requester == *requester).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    pub(super) fn spend(&mut self, requester: RequesterId, job: JobId, work: u64, at: Instant) {
        if self.spent_entries >= MAX_SPENT {
            // The requester with most entries loses its oldest: who floods the table does it to its own account.
            let most = self.spent.values_mut().max_by_key(|entries| entries.len());
            if most.is_some_and(|entries| entries.pop_front().is_some()) {
                self.spent_entries -= 1;
            }
        }
        self.spent.entry(requester).or_default().push_back((at, job, work));
        self.spent_entries += 1;
    }

    pub(super) fn unspend(&mut self, requester: &RequesterId, job: &JobId) {
        if let Some(entries) = self.spent.get_mut(requester) {
            let before = entries.len();
            entries.retain(|(_, of, _)| of != job);
            self.spent_entries -= before - entries.len();
        }
    }

    pub(super) fn spent_since_yesterday(&mut self, requester: &RequesterId, now: Instant) -> u64 {
        let Some(entries) = self.spent.get_mut(requester) else { return 0 };
        let before = entries.len();
        entries.retain(|(at, ..)| now.saturating_duration_since(*at) < DAY);
        self.spent_entries -= before - entries.len();
        let work = entries.iter().fold(0_u64, |sum, (_, _, work)| sum.saturating_add(*work));
        if entries.is_empty() {
            self.spent.remove(requester);
        }
        work
    }

    pub(super) fn ended_count(&self) -> usize {
        self.ended.len()
    }
}

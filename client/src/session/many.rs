//! Many jobs of one artist: placed a few at a time, so that each sees the queues that the former ones left, followed all at
//! once, and found again by a process that comes later.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, Semaphore};

use super::find::Found;
use super::{Client, Delivered, Events, SessionError};
use crate::ask::Ask;
use crate::store::{BatchKey, JobRecord, RecordError, RecordState};
use crate::ticket::Way;

/// Time after which nodes are looked for anew.
const FRESH: Duration = Duration::from_secs(30);
/// Jobs that are placed at once: as many places as a node holds for one artist, so that none is refused for the others.
/// What one of them is promised counts the places of the other.
const PLACED_AT_ONCE: usize = 2;

/// Many jobs that are placed with one look at the network.
#[derive(Debug)]
pub struct Many<'a> {
    client: &'a Client,
    ways: &'a [Way],
    /// Held while nodes are looked for.
    known: Mutex<Option<Known>>,
    placing: Semaphore,
}

#[derive(Debug)]
struct Known {
    found: Vec<Found>,
    at: Instant,
}

impl Client {
    /// Many jobs by these ways.
    #[must_use]
    pub fn many<'a>(&'a self, ways: &'a [Way]) -> Many<'a> {
        Many { client: self, ways, known: Mutex::new(None), placing: Semaphore::new(PLACED_AT_ONCE) }
    }

    /// The jobs of batches that are under way or done, by their keys. One that failed or was cancelled is to be made
    /// again.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn batch_jobs(&self) -> Result<BTreeMap<BatchKey, JobRecord>, SessionError> {
        let mut jobs = BTreeMap::new();
        for entry in self.store.jobs()? {
            use RecordState::{Cancelled, Disputed, Failed};
            if matches!(entry.state, Failed | Cancelled | Disputed) {
                continue;
            }
            let record = self.store.job(&entry.job)?;
            if let Some(key) = record.batch.clone() {
                // A finished one before one that may still come.
                let is_done = |record: &JobRecord| record.state == RecordState::Done;
                if !jobs.get(&key).is_some_and(is_done) {
                    jobs.insert(key, record);
                }
            }
        }
        Ok(jobs)
    }
}

impl Many<'_> {
    /// Hands one of the jobs over, when all but one of those before it are.
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub async fn submit(
        &self,
        ask: &Ask,
        key: Option<&BatchKey>,
        events: &Events,
    ) -> Result<JobRecord, SessionError> {
        ask.check()?;
        let _turn = self.placing.acquire().await.expect("invariant: it is never closed");
        let found = self.found(ask, events).await?;
        let mut placing = self.client.prepare(ask, &found).await?;
        placing.batch = key.cloned();
        let record = self.client.hand_in(ask, placing, &found, events).await?;
        let mut known = self.known.lock().await;
        let found = known.iter_mut().flat_map(|known| &mut known.found);
        if let Some(taken) = found.into_iter().find(|found| found.candidate.node == record.node) {
            // Its advert does not know of this job yet, and the next one is ranked by it.
            let queue = &mut taken.candidate.capacity.queue;
            queue.wait = queue.wait.max(record.told.unwrap_or_default());
            queue.jobs = queue.jobs.saturating_add(1);
        }
        Ok(record)
    }

    /// The nodes, looked for once in a while only.
    async fn found(&self, ask: &Ask, events: &Events) -> Result<Vec<Found>, SessionError> {
        let mut known = self.known.lock().await;
        if let Some(known) = known.as_ref().filter(|known| known.at.elapsed() <= FRESH) {
            return Ok(known.found.clone());
        }
        *known = None;
        let found = self.client.find_for(ask, self.ways, events).await?;
        *known = Some(Known { found: found.clone(), at: Instant::now() });
        Ok(found)
    }

    /// One of the jobs from its words to its clip.
    ///
    /// # Errors
    /// As [`Client::submit`] and [`Client::follow`].
    pub async fn generate(
        &self,
        ask: &Ask,
        key: Option<&BatchKey>,
        events: &Events,
    ) -> Result<Delivered, SessionError> {
        let record = self.submit(ask, key, events).await?;
        self.go_on(&record, events).await
    }

    /// Follows one that was handed over, by this process or by an earlier one.
    ///
    /// # Errors
    /// As [`Client::follow`].
    pub async fn go_on(&self, record: &JobRecord, events: &Events) -> Result<Delivered, SessionError> {
        let outcome = self.client.follow(&record.job, self.ways, events).await;
        if let (Err(error @ SessionError::Lost { .. }), true) = (&outcome, record.batch.is_some()) {
            // Nobody has it any more: whoever runs the batch again is to make it again.
            let (code, text) = (error.code().to_owned(), error.to_string());
            let error = RecordError { code, text, retryable: false };
            self.client.update(&record.job, |record| {
                record.state = RecordState::Failed;
                record.error = Some(error);
            })?;
        }
        outcome
    }
}

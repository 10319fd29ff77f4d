//! Many jobs of one artist: placed one after the other, so that each sees the queues that the former ones left, followed
//! all at once, and found again by a process that comes later.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::find::Found;
use super::{Client, Delivered, Events, SessionError};
use crate::ask::Ask;
use crate::store::{BatchKey, JobRecord, RecordError, RecordState};
use crate::ticket::Way;

/// Time after which nodes are looked for anew.
const FRESH: Duration = Duration::from_secs(30);

/// Many jobs that are placed with one look at the network.
#[derive(Debug)]
pub struct Many<'a> {
    client: &'a Client,
    ways: &'a [Way],
    /// Held while a job is placed.
    known: Mutex<Option<Known>>,
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
        Many { client: self, ways, known: Mutex::new(None) }
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
    /// Hands one of the jobs over, when those before it are.
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
        let mut known = self.known.lock().await;
        if known.as_ref().is_none_or(|known| known.at.elapsed() > FRESH) {
            *known = None;
            let found = self.client.find_for(ask, self.ways, events).await?;
            *known = Some(Known { found, at: Instant::now() });
        }
        let found = &mut known.as_mut().expect("invariant: just found").found;
        let mut placing = self.client.prepare(ask, found).await?;
        placing.batch = key.cloned();
        let record = self.client.hand_in(ask, placing, found, events).await?;
        if let Some(taken) = found.iter_mut().find(|found| found.candidate.node == record.node) {
            // Its advert does not know of this job yet, and the next one is ranked by it.
            let queue = &mut taken.candidate.capacity.queue;
            queue.wait = queue.wait.max(record.told.unwrap_or_default());
        }
        Ok(record)
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
            let error = RecordError { code: error.code().to_owned(), text: error.to_string() };
            self.client.update(&record.job, |record| {
                record.state = RecordState::Failed;
                record.error = Some(error);
            })?;
        }
        outcome
    }
}

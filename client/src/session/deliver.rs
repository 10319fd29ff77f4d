//! From a receipt to a clip that is here: check the receipt, fetch, check the clip, answer.

use std::path::PathBuf;

use kinoflock_net::limits::RELAYED_BLOB_BYTES;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::receipt::{ReceiptAnswer, ValidReceipt, Verdict};
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::{BlobId, ClipId, Envelope, Text, ValidJob};

use super::find::unexpected;
use super::{Client, Event, Events, SessionError, corrected};
use crate::store::{JobRecord, RecordState, StoreError};
use crate::verify::{self, ClipInfo, VerifyError};

/// A clip that is here and was checked.
#[derive(Debug, Clone)]
pub struct Delivered {
    /// The job's record, with receipt and answer.
    pub record: JobRecord,
    /// The receipt.
    pub receipt: ValidReceipt,
    /// The clip.
    pub clip: ClipId,
    /// The bare clip in the store. [`crate::provenance::export`] makes the file for the artist.
    pub path: PathBuf,
    /// What the clip says of itself.
    pub info: ClipInfo,
}

impl Client {
    /// Fetches and checks the clip of a job whose receipt is in the record, and answers the receipt. A clip that is
    /// here already is checked again, and an answer that the node has not heard is sent again.
    pub(super) async fn deliver(
        &self,
        record: &JobRecord,
        events: &Events,
    ) -> Result<Delivered, SessionError> {
        let job = ValidJob::parse_stored(&record.envelope, &record.network).map_err(|error| {
            let path = self.store.job_path(&record.job);
            StoreError::Record { path, reason: error.to_string() }
        })?;
        let envelope = record.receipt.as_ref().expect("invariant: called with a receipt");
        let checked = verify::receipt(envelope, &record.network, &job, &record.node);
        let receipt = match checked {
            Ok(receipt) => receipt,
            Err(error) => return Err(self.dispute(record, envelope, error).await?),
        };
        let made = receipt.receipt();
        let (clip, blob) = (made.clip, BlobRef { id: made.clip.into(), len: made.clip_len });
        let latents = made.latents.filter(|_| job.spec().returns.latents);
        self.update(&record.job, |record| {
            record.clip = Some(blob);
            record.latents = latents;
        })?;
        let bytes = self.clip_bytes(record, &blob, events).await?;
        let info = match verify::clip(&bytes, &clip, &job) {
            Ok(info) => info,
            Err(error) => return Err(self.dispute(record, envelope, error).await?),
        };
        if let Some(latents) = latents {
            self.fetch_to_store(&latents, &[record.node], events).await?;
        }
        let ClipInfo { frames, width, height, .. } = info;
        events.tell(Event::Verified { clip, frames, width, height }).await;
        let record = self.accept(record, &receipt, events).await?;
        Ok(Delivered { record, receipt, clip, path: self.store.blob_path(&blob.id), info })
    }

    async fn clip_bytes(
        &self,
        record: &JobRecord,
        blob: &BlobRef,
        events: &Events,
    ) -> Result<Vec<u8>, SessionError> {
        match self.store.read_blob(&blob.id) {
            Ok(bytes) => return Ok(bytes),
            // Damaged on this disk: it comes again.
            Err(StoreError::NotFound { .. } | StoreError::Damaged { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        events.tell(Event::Made { clip: blob.id.into(), len: blob.len }).await;
        if self.fetch_sealed(record, blob, events).await? {
            return Ok(self.store.read_blob(&blob.id)?);
        }
        self.reach(record).await?;
        if blob.len > RELAYED_BLOB_BYTES && self.fetch_mirrored(record, blob, events).await? {
            return Ok(self.store.read_blob(&blob.id)?);
        }
        self.fetch_to_store(blob, &[record.node], events).await?;
        Ok(self.store.read_blob(&blob.id)?)
    }

    async fn accept(
        &self,
        record: &JobRecord,
        receipt: &ValidReceipt,
        events: &Events,
    ) -> Result<JobRecord, SessionError> {
        let answer = match &record.answer {
            Some(answer) => answer.clone(),
            None => self.seal_answer(record, receipt, Verdict::Accept)?,
        };
        let record = self.update(&record.job, |record| {
            record.state = RecordState::Done;
            record.answer = Some(answer);
        })?;
        if record.answered {
            return Ok(record);
        }
        let (answered, ()) = futures::join!(self.send_answer(&record, events), self.answer_holders(&record));
        answered
    }

    /// Tells the node, and keeps that it knows. The clip is here whether or not it can be told.
    async fn send_answer(&self, record: &JobRecord, events: &Events) -> Result<JobRecord, SessionError> {
        let Some(answer) = record.answer.clone() else { return Ok(record.clone()) };
        let told = async {
            self.reach(record).await?;
            match self.net.request(record.node, Request::Answer(answer)).await? {
                Response::Acknowledged => Ok(()),
                other => Err(unexpected(record.node, "the answer to its receipt", other)),
            }
        };
        match told.await {
            Ok(()) => {
                events.tell(Event::Answered).await;
                self.update(&record.job, |record| record.answered = true)
            }
            Err(error) => {
                events.tell(Event::NotAnswered { why: error.to_string() }).await;
                Ok(record.clone())
            }
        }
    }

    /// Keeps that the clip is not what was asked for, tells the node, and gives the error.
    async fn dispute(
        &self,
        record: &JobRecord,
        envelope: &Envelope,
        error: VerifyError,
    ) -> Result<SessionError, SessionError> {
        let verdict = Verdict::Dispute {
            code: Text::truncated(error.code()),
            text: Text::truncated(&error.to_string()),
        };
        // A receipt that is not even well signed has no id that could be answered.
        let answer = match ValidReceipt::parse(envelope, &record.network) {
            Ok(receipt) => Some(self.seal_answer(record, &receipt, verdict)?),
            Err(_) => None,
        };
        let record = self.update(&record.job, |record| {
            record.state = RecordState::Disputed;
            let (code, text) = (error.code().to_owned(), error.to_string());
            record.error = Some(crate::store::RecordError { code, text, retryable: false });
            record.answer = answer;
        })?;
        self.send_answer(&record, &Events::none()).await?;
        Ok(SessionError::Disputed { error })
    }

    fn seal_answer(
        &self,
        record: &JobRecord,
        receipt: &ValidReceipt,
        verdict: Verdict,
    ) -> Result<Envelope, SessionError> {
        let answered_at = corrected(crate::now(), record.clock_skew_ms);
        let answer =
            ReceiptAnswer { receipt: receipt.id(), job: receipt.receipt().job, verdict, answered_at };
        Ok(Envelope::seal(&self.key, &self.network, &answer)?)
    }

    /// The final latents of a delivered job, if they were asked for and came.
    #[must_use]
    pub fn latents_path(&self, record: &JobRecord) -> Option<PathBuf> {
        let latents: BlobId = record.latents?.id;
        self.store.has_blob(&latents).then(|| self.store.blob_path(&latents))
    }
}

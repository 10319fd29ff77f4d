//! Clips and latents by their ids: verified MiB by MiB on their way into the store.

use std::path::PathBuf;

use kinoflock_net::{FetchError, FetchOptions, FetchProgress, FileSink, HolderFault};
use kinoflock_protocol::NodeId;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::names::ClipTicket;
use tokio::sync::watch;

use crate::session::{Client, Event, Events, SessionError};
use crate::store::ClipRecord;
use crate::ticket::address_of;
use crate::verify::MAX_CLIP_BYTES;

impl Client {
    /// Fetches a clip by its ticket into the store, and remembers the ticket.
    ///
    /// # Errors
    /// `Fetch`, and what the store meets.
    pub async fn fetch_ticket(&self, ticket: &ClipTicket, events: &Events) -> Result<PathBuf, SessionError> {
        let mut holders = Vec::new();
        for (node, addresses) in ticket.holders.iter().map(address_of) {
            // A holder that cannot be reached is told by the fetch.
            self.net.add_addresses(node, addresses).await?;
            holders.push(node);
        }
        let blob = BlobRef { id: ticket.clip.into(), len: ticket.len };
        let path = self.fetch_to_store(&blob, &holders, events).await?;
        let (clip, len, got_at) = (ticket.clip, ticket.len, crate::now());
        self.store.insert_clip(&ClipRecord { clip, len, got_at, ticket: ticket.to_string() })?;
        Ok(path)
    }

    /// Fetches content into the store, unless it is there.
    ///
    /// # Errors
    /// `Fetch`, and what the store meets.
    pub async fn fetch_to_store(
        &self,
        blob: &BlobRef,
        holders: &[NodeId],
        events: &Events,
    ) -> Result<PathBuf, SessionError> {
        if self.store.read_blob(&blob.id).is_ok() {
            return Ok(self.store.blob_path(&blob.id));
        }
        let fetched = match self.fetch_to(blob, holders, self.store.fetch_path(&blob.id, false), events).await
        {
            // Another process fetches the same: both may, each for itself.
            Err(FetchError::Sink { error, .. }) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                self.fetch_to(blob, holders, self.store.fetch_path(&blob.id, true), events).await
            }
            other => other,
        };
        match fetched {
            Ok(file) => Ok(self.store.adopt_blob(&blob.id, &file)?),
            Err(_) if self.store.read_blob(&blob.id).is_ok() => Ok(self.store.blob_path(&blob.id)),
            Err(FetchError::Sink { error, .. }) => {
                Err(crate::store::StoreError::io("write", &self.store.blob_path(&blob.id))(error).into())
            }
            Err(error) => Err(SessionError::Fetch { clip: blob.id.into(), error }),
        }
    }

    async fn fetch_to(
        &self,
        blob: &BlobRef,
        holders: &[NodeId],
        file: PathBuf,
        events: &Events,
    ) -> Result<PathBuf, FetchError> {
        let (progress, told) = watch::channel(FetchProgress::default());
        let max_len = blob.len.min(MAX_CLIP_BYTES);
        let options = FetchOptions { max_len, progress: Some(progress), ..FetchOptions::default() };
        let telling = tell(told, events.clone());
        let sink = FileSink::new(&file);
        let (fetched, ()) = futures::join!(self.net.fetch_blob(blob.id, holders, sink, options), telling);
        fetched.map(|_| file)
    }
}

/// Whether the same fetch may succeed later.
pub(crate) fn is_transient(error: &FetchError) -> bool {
    match error {
        FetchError::AllFailed { holders, .. } => holders.iter().any(|holder| match &holder.fault {
            Some(HolderFault::Net(error)) => error.is_transient(),
            Some(HolderFault::Busy | HolderFault::Stalled { .. } | HolderFault::TooSlow { .. }) => true,
            _ => false,
        }),
        _ => false,
    }
}

/// Tells how far the fetch has come until it is over.
async fn tell(mut progress: watch::Receiver<FetchProgress>, events: Events) {
    while progress.changed().await.is_ok() {
        let FetchProgress { len, done } = *progress.borrow_and_update();
        events.hint(Event::Transfer { done, len });
    }
}

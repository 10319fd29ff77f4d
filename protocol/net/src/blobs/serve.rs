//! The holder's side: answers questions on a stream within the upload ceiling, a piece at a time.

use std::num::NonZeroU64;
use std::sync::{Arc, RwLock};

use kinoflock_protocol::clip::{BlobRef, chunk_count, chunk_len};
use kinoflock_protocol::limits::{CHUNK_BYTES, MAX_BLOB_FRAME};
use kinoflock_protocol::rpc::{BlobReply, BlobRequest};
use kinoflock_protocol::{BlobId, Reason, Refusal, frame};
use libp2p::swarm::Stream;
use tokio::sync::Semaphore;

use super::{BlobReader, BlobSource};
use crate::framed::{FrameFault, close, read_message, write_all, write_message};
use crate::inbound::refuse_version;
use crate::limits;
use crate::rate::RateLimit;

/// Serves blobs to all peers.
#[derive(Debug)]
pub(crate) struct Server {
    source: RwLock<Option<Arc<dyn BlobSource>>>,
    pub(crate) upload: RateLimit,
    reads: Semaphore,
}

/// A blob that a stream asks about.
struct Opened {
    id: BlobId,
    reader: Box<dyn BlobReader>,
}

impl Server {
    pub(crate) fn new(upload: Option<NonZeroU64>) -> Self {
        Self {
            source: RwLock::new(None),
            upload: RateLimit::new(upload),
            reads: Semaphore::new(limits::BLOB_READS),
        }
    }

    pub(crate) fn set_source(&self, source: Arc<dyn BlobSource>) {
        *self.source.write().expect("invariant: no panic while the lock is held") = Some(source);
    }

    /// Serves one stream until the peer ends it or is silent for too long.
    pub(crate) async fn serve(&self, mut stream: Stream) -> Result<(), FrameFault> {
        let mut opened = None;
        let mut idle = limits::HELLO_TIMEOUT;
        loop {
            let request: BlobRequest = match read_message(&mut stream, idle).await {
                Ok(Some(request)) => request,
                Ok(None) => {
                    close(&mut stream).await;
                    return Ok(());
                }
                Err(fault) => return refuse_version(stream, fault).await,
            };
            idle = limits::BLOB_IDLE;
            opened = self.answer(&mut stream, request, opened).await?;
        }
    }

    async fn answer(
        &self,
        stream: &mut Stream,
        request: BlobRequest,
        opened: Option<Opened>,
    ) -> Result<Option<Opened>, FrameFault> {
        let opened = match opened {
            Some(opened) if opened.id == request.id => opened,
            _ => match self.open(request.id).await {
                Some(opened) => opened,
                None => {
                    write_message(stream, &BlobReply::NotFound).await?;
                    return Ok(None);
                }
            },
        };
        let outline = opened.reader.outline();
        let chunks = chunk_count(outline.len);
        let end = request.first_chunk.checked_add(request.chunks).filter(|end| *end <= chunks);
        let Some(end) = end else {
            let asked = request.first_chunk.saturating_add(request.chunks);
            let refusal = Refusal::new(Reason::Impossible, "chunks_of_blob").limit(chunks, asked);
            write_message(stream, &BlobReply::Refused(refusal)).await?;
            return Ok(Some(opened));
        };
        let blob = BlobRef { id: request.id, len: outline.len };
        let outline = request.outline.then(|| outline.clone());
        let mut opened = opened;
        if request.chunks > 0 && blob.len > 0 {
            opened = match self.probe(opened, request.first_chunk).await {
                Ok(opened) => opened,
                Err(error) => {
                    write_message(stream, &BlobReply::Refused(unreadable(&error))).await?;
                    return Ok(None);
                }
            };
        }
        write_message(stream, &BlobReply::Found { blob, outline }).await?;
        for index in request.first_chunk..end {
            opened = self.send_chunk(stream, opened, index, blob.len).await?;
        }
        Ok(Some(opened))
    }

    async fn open(&self, id: BlobId) -> Option<Opened> {
        let source = self.source.read().expect("invariant: no panic while the lock is held").clone()?;
        let found = self.blocking(move || source.open(&id)).await;
        match found {
            Ok(reader) => reader.map(|reader| Opened { id, reader }),
            Err(error) => {
                tracing::warn!(blob = %id, %error, "blob_open_failed");
                None
            }
        }
    }

    /// Reads the first byte of a chunk: a store that cannot give it is found out while the peer can still be told.
    async fn probe(&self, opened: Opened, chunk: u64) -> std::io::Result<Opened> {
        let Opened { id, mut reader } = opened;
        let read = move || reader.read_at(chunk * CHUNK_BYTES as u64, &mut [0]).map(|()| reader);
        let reader = self.blocking(read).await?;
        Ok(Opened { id, reader })
    }

    async fn send_chunk(
        &self,
        stream: &mut Stream,
        mut opened: Opened,
        index: u64,
        blob_len: u64,
    ) -> Result<Opened, FrameFault> {
        let len = chunk_len(index, blob_len).expect("invariant: the range was checked");
        write_all(stream, &frame::header(len, MAX_BLOB_FRAME)?).await?;
        let mut buffer = vec![0; len.min(limits::BLOB_PIECE)];
        let mut sent = 0;
        while sent < len {
            let piece = (len - sent).min(limits::BLOB_PIECE);
            let offset = index * CHUNK_BYTES as u64 + sent as u64;
            buffer.truncate(piece);
            self.upload.take(piece).await;
            let Opened { id, mut reader } = opened;
            let read = move || {
                reader.read_at(offset, &mut buffer)?;
                Ok((reader, buffer))
            };
            let (reader, filled) = self.blocking(read).await?;
            opened = Opened { id, reader };
            buffer = filled;
            write_all(stream, &buffer).await?;
            sent += piece;
        }
        Ok(opened)
    }

    /// Runs a disk operation on the blocking pool, [`limits::BLOB_READS`] at once.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> std::io::Result<T> {
        let _place = self.reads.acquire().await.expect("invariant: the semaphore is never closed");
        tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
    }
}

fn unreadable(error: &std::io::Error) -> Refusal {
    let reason = match error.kind() {
        std::io::ErrorKind::InvalidData => Reason::BlobDamaged,
        _ => Reason::Internal,
    };
    Refusal::new(reason, "blob").advice("ask another holder")
}

//! One holder's share of a fetch.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::AsyncReadExt;
use kinoflock_protocol::clip::{BlobRef, Outline, chunk_len};
use kinoflock_protocol::limits::{MAX_BLOB_FRAME, MAX_OPEN_FRAME};
use kinoflock_protocol::rpc::{BlobReply, BlobRequest, decode_stream};
use kinoflock_protocol::{Millis, NodeId};
use tokio::time::{Instant, timeout};

use super::{HolderFault, Shared, with_sink};
use crate::blobs::BlobSink;
use crate::error::NetError;
use crate::framed::{FrameFault, message_frame, read_header, read_message, write_message};
use crate::limits;
use crate::opener::{self, Held, Opening};

/// How often a holder that is busy or out of reach is asked again.
const TRIES: u32 = 4;

impl<S: BlobSink> Shared<S> {
    /// Fetches from one holder until nothing is missing. Busy answers and broken streams are tried again.
    pub(super) async fn work(&self, node: NodeId) -> Result<(), HolderFault> {
        let mut tries = TRIES;
        loop {
            let before = self.given_by(node);
            let fault = match self.session(node).await {
                Ok(()) => return Ok(()),
                Err(fault) => fault,
            };
            if self.is_over() {
                return Ok(());
            }
            // A stream that brought something before it broke earns its holder fresh tries.
            tries = if self.given_by(node) > before { TRIES } else { tries - 1 };
            let again =
                matches!(fault, HolderFault::Busy | HolderFault::Net(NetError::ConnectionLost { .. }));
            if !again || tries == 0 {
                return Err(fault);
            }
            let Millis(pause) = limits::RETRY_AFTER;
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(pause)) => {}
                () = self.wait_until_over() => return Ok(()),
            }
        }
    }

    fn given_by(&self, node: NodeId) -> u64 {
        self.plan().bytes_of.get(&node).copied().unwrap_or_default()
    }

    async fn wait_until_over(&self) {
        let mut changed = self.changed.subscribe();
        // The sender lives as long as `self`, so this ends only when the fetch is over.
        let _ = changed.wait_for(|_| self.is_over()).await;
    }

    /// One stream: blob, outline, then chunks.
    async fn session(&self, node: NodeId) -> Result<(), HolderFault> {
        let (mut held, blob) = self.begin(node).await?;
        let limit = self.options.max_len;
        if blob.len > limit {
            return Err(HolderFault::TooLarge { limit, given: blob.len });
        }
        let outline = self.agree(&mut held, blob).await?;
        let mut claims = Claims { shared: self, runs: VecDeque::new() };
        loop {
            while claims.runs.len() < limits::BLOB_PIPELINE
                && let Some(run) = self.claim()
            {
                claims.runs.push_back(run.clone());
                self.ask(&mut held, &run).await?;
            }
            if claims.runs.is_empty() {
                if self.is_over() {
                    return Ok(());
                }
                // Others hold the rest: wait for the end, or for what one of them gives back.
                let mut changed = self.changed.subscribe();
                let ready = |_: &u64| self.is_over() || !self.plan().missing.is_empty();
                let _ = timeout(limits::BLOB_IDLE / 2, changed.wait_for(ready)).await;
                continue;
            }
            self.receive_run(&mut held, &outline, &mut claims).await?;
            if self.plan().broken.is_some() {
                return Ok(());
            }
        }
    }

    /// Opens a stream that may carry the blob: a relay is no way for a large one, which waits for a direct connection.
    async fn begin(&self, node: NodeId) -> Result<(Held, BlobRef), HolderFault> {
        let (limit, wait) = (limits::RELAYED_BLOB_BYTES, self.options.direct_wait);
        let mut waited = false;
        loop {
            let (held, answer) = self.open(node).await?;
            let reply = decode_stream(&answer).map_err(|error| FrameFault::from(error).on(node, "answer"))?;
            let (blob, _) = found(reply)?;
            if !held.relayed || blob.len <= limit {
                return Ok((held, blob));
            }
            drop(held);
            if waited || !self.handle.direct(node, wait).await? {
                let waited_ms = wait.as_millis() as u64;
                return Err(NetError::OnlyRelayed { node, limit, given: blob.len, waited_ms }.into());
            }
            waited = true;
        }
    }

    /// Opens the stream with two questions at once: how long is it, and what are its chaining values. The
    /// second answer is not read if the first tells too much.
    async fn open(&self, node: NodeId) -> Result<(Held, Vec<u8>), NetError> {
        let ask = |outline| BlobRequest { id: self.id, outline, first_chunk: 0, chunks: 0 };
        let framed =
            |outline| message_frame(&ask(outline)).map_err(|error| FrameFault::from(error).on(node, "open"));
        let mut first = framed(false)?;
        first.extend(framed(true)?);
        let protocol = self.handle.inner.names.blobs.clone();
        let opening = Opening { protocol, what: "blobs", first, answer: MAX_OPEN_FRAME };
        opener::open(&self.handle, node, &opening).await
    }

    /// Reads the holder's outline, checks it, and agrees with the others on one.
    async fn agree(&self, held: &mut Held, blob: BlobRef) -> Result<Arc<Outline>, HolderFault> {
        let node = held.node;
        let reply = read_message(&mut held.stream, self.options.stall).await;
        let reply = reply.map_err(|fault| fault.on(node, "tell the outline"))?;
        let (again, outline) = found(reply.ok_or_else(|| ended(node))?)?;
        let wrong = |why: String| HolderFault::WrongOutline { why };
        let outline = outline.ok_or_else(|| wrong("no outline came".into()))?;
        if again != blob || outline.len != blob.len {
            return Err(wrong(format!("it said {} bytes, then {}", blob.len, outline.len)));
        }
        let installed = match self.outline() {
            Some(installed) => installed,
            None => {
                let id = self.id;
                let check = move || outline.check(&id).map(|()| outline).map_err(|error| error.to_string());
                let checked = tokio::task::spawn_blocking(check).await;
                let outline = checked.map_err(|error| wrong(error.to_string()))?.map_err(wrong)?;
                self.install(Arc::new(outline)).await
            }
        };
        if installed.len != blob.len {
            return Err(wrong(format!("it said {} bytes, there are {}", blob.len, installed.len)));
        }
        Ok(installed)
    }

    async fn ask(&self, held: &mut Held, run: &Range<u64>) -> Result<(), HolderFault> {
        let request =
            BlobRequest { id: self.id, outline: false, first_chunk: run.start, chunks: run.end - run.start };
        let written = write_message(&mut held.stream, &request).await;
        Ok(written.map_err(|fault| fault.on(held.node, "take a question"))?)
    }

    /// Reads the answer to the oldest question and its chunks.
    async fn receive_run(
        &self,
        held: &mut Held,
        outline: &Arc<Outline>,
        claims: &mut Claims<'_, S>,
    ) -> Result<(), HolderFault> {
        let node = held.node;
        let reply = read_message(&mut held.stream, self.options.stall).await;
        let reply = reply.map_err(|fault| self.stalled(fault, node))?;
        found(reply.ok_or_else(|| ended(node))?)?;
        while let Some(index) = claims.current() {
            let bytes = self.receive_chunk(held, index, outline.len).await?;
            let checking = Arc::clone(outline);
            let written = with_sink(Arc::clone(&self.sink), move |sink| {
                if checking.check_chunk(index, &bytes).is_err() {
                    return Ok(None);
                }
                sink.write_chunk(index, &bytes)?;
                Ok(Some(bytes.len() as u64))
            });
            match written.await {
                Ok(None) => return Err(HolderFault::WrongChunk { index }),
                Ok(Some(bytes)) => self.written(node, index, Ok(bytes)),
                Err(error) => {
                    self.written(node, index, Err(error));
                    return Ok(());
                }
            }
            claims.advance();
        }
        Ok(())
    }

    async fn receive_chunk(
        &self,
        held: &mut Held,
        index: u64,
        blob_len: u64,
    ) -> Result<Vec<u8>, HolderFault> {
        let node = held.node;
        let (stall, whole) = (self.options.stall, self.options.chunk_timeout);
        let header = read_header(&mut held.stream, MAX_BLOB_FRAME, stall).await;
        let given = header.map_err(|fault| self.stalled(fault, node))?.ok_or_else(|| ended(node))?;
        if Some(given) != chunk_len(index, blob_len) {
            return Err(HolderFault::WrongChunk { index });
        }
        let mut bytes = vec![0; given];
        let mut spent = Duration::ZERO;
        for piece in bytes.chunks_mut(limits::BLOB_PIECE) {
            self.handle.inner.download.take(piece.len()).await;
            let begun = Instant::now();
            let stalled = HolderFault::Stalled { limit_ms: stall.as_millis() as u64 };
            let read = timeout(stall, held.stream.read_exact(piece)).await.map_err(|_| stalled)?;
            read.map_err(|error| FrameFault::Io(error).on(node, "send a chunk"))?;
            spent += begun.elapsed();
            if spent > whole {
                return Err(HolderFault::TooSlow { limit_ms: whole.as_millis() as u64 });
            }
        }
        Ok(bytes)
    }

    fn stalled(&self, fault: FrameFault, node: NodeId) -> HolderFault {
        match fault {
            FrameFault::Idle { limit_ms } | FrameFault::Slow { limit_ms } => {
                HolderFault::Stalled { limit_ms }
            }
            other => HolderFault::Net(other.on(node, "send a chunk")),
        }
    }
}

/// The runs that a worker has asked for, oldest first. What is left of them when it ends, in whichever way,
/// goes back to the plan.
struct Claims<'a, S: BlobSink> {
    shared: &'a Shared<S>,
    runs: VecDeque<Range<u64>>,
}

impl<S: BlobSink> Claims<'_, S> {
    /// The next chunk of the oldest run; `None` at its end, which forgets the run.
    fn current(&mut self) -> Option<u64> {
        let run = self.runs.front()?;
        if run.is_empty() {
            self.runs.pop_front();
            return None;
        }
        Some(run.start)
    }

    fn advance(&mut self) {
        if let Some(run) = self.runs.front_mut() {
            run.start += 1;
        }
    }
}

impl<S: BlobSink> Drop for Claims<'_, S> {
    fn drop(&mut self) {
        self.shared.unclaim(self.runs.drain(..).flatten());
    }
}

fn found(reply: BlobReply) -> Result<(BlobRef, Option<Outline>), HolderFault> {
    match reply {
        BlobReply::Found { blob, outline } => Ok((blob, outline)),
        BlobReply::NotFound => Err(HolderFault::NotFound),
        BlobReply::Busy { .. } => Err(HolderFault::Busy),
        BlobReply::Refused(refusal) => Err(HolderFault::Refused(Box::new(refusal))),
    }
}

fn ended(node: NodeId) -> HolderFault {
    HolderFault::Net(NetError::ConnectionLost { node, why: "the stream ended before the blob did".into() })
}

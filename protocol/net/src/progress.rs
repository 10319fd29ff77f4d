//! The events of a job over one stream.
//!
//! The follower opens with a signed query and the first number it wants. The node's owner gets a
//! [`ProgressSink`] and accepts or refuses; after an acceptance every event is one frame. An empty frame is a
//! sign of life, sent while there is nothing to tell; a follower that hears nothing for
//! [`limits::PROGRESS_IDLE`] gives up. The stream ends after the job's final event; one that ends before is
//! broken and can be taken up again from the next number.

use kinoflock_protocol::progress::{JobEvent, Progress, ProgressFrame, ProgressOpen};
use kinoflock_protocol::refusal::Refusal;
use kinoflock_protocol::rpc::{StreamMessage, decode_stream};
use kinoflock_protocol::{NodeId, frame};

use futures::{AsyncReadExt, AsyncWrite};
use libp2p::swarm::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::error::NetError;
use crate::event::NetEvent;
use crate::framed::{FrameFault, close, message_frame, read_frame, write_all, write_message};
use crate::handle::NetHandle;
use crate::limits;
use crate::opener::{self, Held, Opening};

/// A question to follow a job that waits for the owner's verdict. Dropping it answers `Busy`.
#[derive(Debug)]
pub struct ProgressSink {
    verdict: oneshot::Sender<Verdict>,
}

#[derive(Debug)]
enum Verdict {
    Accept(mpsc::Receiver<Progress>),
    Refuse(Box<Refusal>),
}

impl ProgressSink {
    /// Lets the peer follow; events go through what this returns.
    #[must_use]
    pub fn accept(self) -> ProgressSender {
        let (sender, events) = mpsc::channel(limits::PROGRESS_QUEUE);
        // A peer that has gone shows as a closed sender.
        let _ = self.verdict.send(Verdict::Accept(events));
        ProgressSender { sender }
    }

    /// Tells the peer why not.
    pub fn refuse(self, refusal: Refusal) {
        // A peer that has gone does not need the reason.
        let _ = self.verdict.send(Verdict::Refuse(Box::new(refusal)));
    }
}

/// Sends the events of a job to one follower. Dropping it ends the stream once all is written.
#[derive(Debug, Clone)]
pub struct ProgressSender {
    sender: mpsc::Sender<Progress>,
}

/// The follower has gone, or reads too slowly to be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the follower has gone")]
pub struct FollowerGone;

impl FollowerGone {
    /// A short name for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        "progress_follower_gone"
    }
}

impl ProgressSender {
    /// Sends an event, waiting while [`limits::PROGRESS_QUEUE`] are on their way.
    ///
    /// # Errors
    /// [`FollowerGone`].
    pub async fn send(&self, event: Progress) -> Result<(), FollowerGone> {
        self.sender.send(event).await.map_err(|_| FollowerGone)
    }

    /// Sends an event if there is room for it now; says whether there was. For previews, which may be missed.
    ///
    /// # Errors
    /// [`FollowerGone`].
    pub fn try_send(&self, event: Progress) -> Result<bool, FollowerGone> {
        match self.sender.try_send(event) {
            Ok(()) => Ok(true),
            Err(mpsc::error::TrySendError::Full(_)) => Ok(false),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(FollowerGone),
        }
    }

    /// Waits until the follower has gone.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

/// Serves one follower: asks the owner, then writes its events until either side ends.
pub(crate) async fn serve(
    events: &mpsc::Sender<NetEvent>,
    node: NodeId,
    mut stream: Stream,
    open: ProgressOpen,
    relayed: bool,
) -> Result<(), FrameFault> {
    let (verdict, decided) = oneshot::channel();
    let sink = ProgressSink { verdict };
    let event = NetEvent::Progress { node, query: Box::new(open.query), from_seq: open.from_seq, sink };
    let asked = async {
        // Waits while the owner is behind; an owner that is gone drops the sink, which is `Busy`.
        let _ = events.send(event).await;
        decided.await.ok()
    };
    let decided = timeout(limits::HELLO_TIMEOUT, asked).await.ok().flatten();
    match decided {
        Some(Verdict::Accept(queue)) => {
            write_message(&mut stream, &ProgressFrame::Open).await?;
            return write_events(stream, queue, relayed).await;
        }
        Some(Verdict::Refuse(refusal)) => {
            write_message(&mut stream, &ProgressFrame::Refused(*refusal)).await?;
        }
        None => {
            let retry_after = limits::RETRY_AFTER;
            write_message(&mut stream, &ProgressFrame::Busy { retry_after }).await?;
        }
    }
    close(&mut stream).await;
    Ok(())
}

/// Writes events until either side ends. Over a relay there are no previews: they would use up its bytes.
async fn write_events(
    stream: Stream,
    mut queue: mpsc::Receiver<Progress>,
    relayed: bool,
) -> Result<(), FrameFault> {
    let (mut reader, mut writer) = stream.split();
    let mut heartbeat = interval(limits::HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut byte = [0];
    loop {
        tokio::select! {
            // The follower has nothing to say after its query: whatever comes, the end included, ends it.
            _ = reader.read(&mut byte) => return Ok(()),
            event = queue.recv() => match event {
                Some(Progress { event: JobEvent::Preview { .. }, .. }) if relayed => {}
                Some(event) => {
                    write_all(&mut writer, &message_frame(&ProgressFrame::Event(event))?).await?;
                    heartbeat.reset();
                }
                None => {
                    close(&mut writer).await;
                    return Ok(());
                }
            },
            _ = heartbeat.tick() => sign_of_life(&mut writer).await?,
        }
    }
}

async fn sign_of_life<T: AsyncWrite + Unpin>(writer: &mut T) -> Result<(), FrameFault> {
    write_all(writer, &frame::frame(&[], 0)?).await
}

/// The events of a job, as they come.
#[derive(Debug)]
pub struct ProgressStream {
    held: Held,
    ended: bool,
}

pub(crate) async fn open(
    handle: &NetHandle,
    node: NodeId,
    open: &ProgressOpen,
) -> Result<ProgressStream, NetError> {
    let opening = Opening {
        protocol: handle.inner.names.progress.clone(),
        what: "progress of jobs",
        first: message_frame(open).map_err(|error| FrameFault::from(error).on(node, "open"))?,
        answer: ProgressFrame::MAX_FRAME,
    };
    let (held, answer) = opener::open(handle, node, &opening).await?;
    match decode_stream(&answer).map_err(|error| FrameFault::from(error).on(node, "answer"))? {
        ProgressFrame::Open => Ok(ProgressStream { held, ended: false }),
        ProgressFrame::Busy { .. } => Err(NetError::Busy { node }),
        ProgressFrame::Refused(refusal) => Err(NetError::Refused { node, refusal: Box::new(refusal) }),
        ProgressFrame::Event(_) => {
            Err(NetError::Garbage { node, why: "an event came before the acceptance".into() })
        }
    }
}

impl ProgressStream {
    /// The node that tells.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.held.node
    }

    /// The next event; `None` after the job's final event. After an error the stream is over; take it up
    /// again with [`NetHandle::open_progress`] from the next number.
    ///
    /// Not cancel-safe: dropping the returned future in the middle of a frame breaks the stream.
    pub async fn next(&mut self) -> Option<Result<Progress, NetError>> {
        if self.ended {
            return None;
        }
        let outcome = self.read().await;
        self.ended = outcome.as_ref().map_or(true, |event| event.event.is_final());
        Some(outcome)
    }

    /// The same as a [`futures::Stream`], which can be polled together with other things without loss.
    pub fn into_stream(self) -> impl futures::Stream<Item = Result<Progress, NetError>> + Send {
        futures::stream::unfold(self, |mut this| async move { Some((this.next().await?, this)) })
    }

    async fn read(&mut self) -> Result<Progress, NetError> {
        let node = self.held.node;
        loop {
            let limit = ProgressFrame::MAX_FRAME;
            let content = read_frame(&mut self.held.stream, limit, limits::PROGRESS_IDLE).await;
            let content = content.map_err(|fault| fault.on(node, "tell of the job"))?.ok_or_else(|| {
                let why = "the stream ended before the job did".to_owned();
                NetError::ConnectionLost { node, why }
            })?;
            if content.is_empty() {
                continue;
            }
            match decode_stream(&content).map_err(|error| FrameFault::from(error).on(node, "tell"))? {
                ProgressFrame::Event(event) => return Ok(event),
                ProgressFrame::Refused(refusal) => {
                    return Err(NetError::Refused { node, refusal: Box::new(refusal) });
                }
                ProgressFrame::Busy { .. } => return Err(NetError::Busy { node }),
                ProgressFrame::Open => {
                    return Err(NetError::Garbage { node, why: "a second acceptance".into() });
                }
            }
        }
    }
}

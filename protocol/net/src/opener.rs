//! Opening a stream until it is known to be open: slot, connection, negotiation, first frame, answer.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use kinoflock_protocol::NodeId;
use libp2p::StreamProtocol;
use libp2p::swarm::Stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use crate::driver::Command;
use crate::error::NetError;
use crate::framed::{FrameFault, read_frame, write_all};
use crate::handle::{NetHandle, timed_out};
use crate::streams::{OpenError, Opened};
use crate::{limits, peer};

/// A stream of ours, and its place among those that we may hold open to its peer.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) node: NodeId,
    pub(crate) stream: Stream,
    /// Whether it runs over a relay.
    pub(crate) relayed: bool,
    _place: OwnedSemaphorePermit,
}

/// What is to be opened.
#[derive(Debug)]
pub(crate) struct Opening {
    pub(crate) protocol: StreamProtocol,
    /// In words, for errors.
    pub(crate) what: &'static str,
    /// The first frame, ready to be written.
    pub(crate) first: Vec<u8>,
    /// Greatest answer, bytes.
    pub(crate) answer: usize,
}

/// Opens a stream, says the first frame, and gives the content of the first answer. A stream that ended
/// before its answer is tried again, at most [`limits::OPEN_TRIES`] times, with a random pause between.
pub(crate) async fn open(
    handle: &NetHandle,
    node: NodeId,
    opening: &Opening,
) -> Result<(Held, Vec<u8>), NetError> {
    let tries = async {
        let mut left = limits::OPEN_TRIES;
        loop {
            left -= 1;
            match try_open(handle, node, opening).await {
                Err(NetError::ConnectionLost { .. }) if left > 0 => {
                    tokio::time::sleep(random_pause()).await;
                }
                outcome => return outcome,
            }
        }
    };
    let outcome = timeout(limits::OPEN_TIMEOUT, tries).await;
    outcome.map_err(|_| timed_out(node, "open a stream", limits::OPEN_TIMEOUT))?
}

async fn try_open(handle: &NetHandle, node: NodeId, opening: &Opening) -> Result<(Held, Vec<u8>), NetError> {
    let lost = |why: &str| NetError::ConnectionLost { node, why: why.to_owned() };
    let place = handle.inner.streams.take(&node).await;
    handle.connect(node, Vec::new()).await?;
    let peer = peer::peer_id(&node);
    let (reply, answer) = tokio::sync::oneshot::channel();
    handle.send(Command::Open { peer, protocol: opening.protocol.clone(), reply }).await?;
    let Opened { mut stream, relayed } = match answer.await {
        Ok(Ok(opened)) => opened,
        Ok(Err(OpenError::Unsupported)) => return Err(handle.why_unsupported(node, opening.what).await),
        Ok(Err(OpenError::QueueFull { limit })) => {
            return Err(NetError::TooMany { what: "opens of streams", limit });
        }
        Ok(Err(error)) => return Err(lost(&error.to_string())),
        Err(_) => return Err(lost("it ended while a stream was being opened")),
    };
    // A holder that is busy answers and closes without reading; so a failed write is told only if no
    // answer came either.
    let written = write_all(&mut stream, &opening.first).await;
    match read_frame(&mut stream, opening.answer, limits::OPEN_TIMEOUT).await {
        Ok(Some(content)) => Ok((Held { node, stream, relayed, _place: place }, content)),
        Ok(None) => {
            written.map_err(|fault| fault.on(node, "take the first frame"))?;
            Err(lost("the stream ended before its answer came"))
        }
        Err(FrameFault::Io(error)) if peer::is_unspoken(&error) => {
            Err(handle.why_unsupported(node, opening.what).await)
        }
        Err(fault) => Err(fault.on(node, "answer the first frame")),
    }
}

/// Between 20 and 150 ms, so that many who failed together do not come back together.
fn random_pause() -> Duration {
    let random = RandomState::new().build_hasher().finish();
    Duration::from_millis(20 + random % 131)
}

//! Frames on a stream, each with its time limit: nobody can hold a stream by going slow.

use std::io;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use kinoflock_protocol::NodeId;
use kinoflock_protocol::frame::{self, FrameError};
use kinoflock_protocol::rpc::{RpcError, StreamMessage, decode_stream, encode_stream};
use tokio::time::timeout;

use crate::error::NetError;
use crate::limits;
use crate::rpc::read_growing;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameFault {
    /// Nothing began within the time for it.
    #[error("nothing came for {limit_ms} ms")]
    Idle { limit_ms: u64 },
    /// A frame that had begun did not end within the time for it.
    #[error("a frame took longer than {limit_ms} ms")]
    Slow { limit_ms: u64 },
    /// A frame over its limit.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that is no message.
    #[error(transparent)]
    Message(#[from] RpcError),
    /// The stream ended inside a frame, or broke.
    #[error("the stream broke: {0}")]
    Io(#[from] io::Error),
}

impl FrameFault {
    /// The same as the caller's error.
    pub(crate) fn on(self, node: NodeId, what: &'static str) -> NetError {
        match self {
            Self::Idle { limit_ms } | Self::Slow { limit_ms } => NetError::TimedOut { node, what, limit_ms },
            Self::Message(RpcError::UnsupportedVersion { speaks, sent }) => {
                NetError::other_version(node, speaks, sent)
            }
            Self::Frame(_) | Self::Message(_) => NetError::Garbage { node, why: self.to_string() },
            Self::Io(error) => NetError::ConnectionLost { node, why: error.to_string() },
        }
    }
}

fn millis(limit: Duration) -> u64 {
    u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)
}

/// The content of the next frame; `None` if the stream ended before one began. The first byte may take
/// `idle`, the rest [`limits::FRAME_TIMEOUT`].
pub(crate) async fn read_frame<T: AsyncRead + Unpin>(
    io: &mut T,
    limit: usize,
    idle: Duration,
) -> Result<Option<Vec<u8>>, FrameFault> {
    let Some(len) = read_header(io, limit, idle).await? else { return Ok(None) };
    let content = timeout(limits::FRAME_TIMEOUT, read_growing(io, len)).await;
    Ok(Some(content.map_err(|_| FrameFault::Slow { limit_ms: millis(limits::FRAME_TIMEOUT) })??))
}

/// The length of the next frame; `None` if the stream ended before one began.
pub(crate) async fn read_header<T: AsyncRead + Unpin>(
    io: &mut T,
    limit: usize,
    idle: Duration,
) -> Result<Option<usize>, FrameFault> {
    let mut head = [0; frame::HEADER_BYTES];
    let first = timeout(idle, io.read(&mut head[..1])).await;
    if first.map_err(|_| FrameFault::Idle { limit_ms: millis(idle) })?? == 0 {
        return Ok(None);
    }
    let rest = timeout(limits::FRAME_TIMEOUT, io.read_exact(&mut head[1..])).await;
    rest.map_err(|_| FrameFault::Slow { limit_ms: millis(limits::FRAME_TIMEOUT) })??;
    Ok(Some(frame::parse_header(head, limit)?))
}

/// The next message; `None` if the stream ended before one began.
pub(crate) async fn read_message<T: AsyncRead + Unpin, M: StreamMessage>(
    io: &mut T,
    idle: Duration,
) -> Result<Option<M>, FrameFault> {
    match read_frame(io, M::MAX_FRAME, idle).await? {
        None => Ok(None),
        Some(content) => Ok(Some(decode_stream(&content)?)),
    }
}

/// Writes bytes that are framed already, within [`limits::FRAME_TIMEOUT`].
pub(crate) async fn write_all<T: AsyncWrite + Unpin>(io: &mut T, bytes: &[u8]) -> Result<(), FrameFault> {
    let write = async {
        io.write_all(bytes).await?;
        io.flush().await
    };
    let written = timeout(limits::FRAME_TIMEOUT, write).await;
    Ok(written.map_err(|_| FrameFault::Slow { limit_ms: millis(limits::FRAME_TIMEOUT) })??)
}

/// Writes one message.
pub(crate) async fn write_message<T: AsyncWrite + Unpin, M: StreamMessage>(
    io: &mut T,
    message: &M,
) -> Result<(), FrameFault> {
    write_all(io, &message_frame(message)?).await
}

/// One message, ready to be written.
pub(crate) fn message_frame<M: StreamMessage>(message: &M) -> Result<Vec<u8>, FrameError> {
    frame::frame(&encode_stream(message), M::MAX_FRAME)
}

/// Ends our side of a stream so that what was written still arrives; a peer that does not let us in time
/// loses the rest.
pub(crate) async fn close<T: AsyncWrite + Unpin>(io: &mut T) {
    // Nothing more is to be said to a peer that cannot even be closed to.
    let _ = timeout(limits::FRAME_TIMEOUT, io.close()).await;
}

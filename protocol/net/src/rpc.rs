//! Control RPC: one request, one answer, both short.
//!
//! On the wire a message is one frame of the protocol (32-bit little-endian length, then so many bytes), whose
//! first byte is the protocol version. A whole frame that is no request in our version is still answered, so
//! that the far side learns why: the codec hands the driver an [`RpcError`], never a bare IO error.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use kinoflock_protocol::frame::{self, Class, FrameError};
use kinoflock_protocol::rpc::{
    Request, Response, RpcError, decode_request, decode_response, encode_request, encode_response,
};
use libp2p::StreamProtocol;
use libp2p::request_response::{self, ResponseChannel};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::error::NetError;
use crate::limits;

/// A request or what is wrong with it; on the way out always `Ok`.
pub(crate) type WireRequest = Result<Box<Request>, RpcError>;
/// A response or what is wrong with it; on the way out always `Ok`.
pub(crate) type WireResponse = Result<Box<Response>, RpcError>;

/// The codec of control messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ControlCodec;

async fn read<T: AsyncRead + Unpin + Send>(io: &mut T) -> io::Result<Vec<u8>> {
    let mut head = [0; frame::HEADER_BYTES];
    io.read_exact(&mut head).await?;
    let len = frame::parse_header(head, Class::Control.limit()).map_err(invalid)?;
    read_growing(io, len).await
}

async fn write<T: AsyncWrite + Unpin + Send>(io: &mut T, content: &[u8]) -> io::Result<()> {
    let bytes = frame::frame(content, Class::Control.limit()).map_err(invalid)?;
    io.write_all(&bytes).await?;
    io.flush().await
}

/// Reads `len` bytes, reserving only as they arrive: an announced length alone costs a peer nothing, and so
/// must not cost us anything either.
pub(crate) async fn read_growing<T: AsyncRead + Unpin>(io: &mut T, len: usize) -> io::Result<Vec<u8>> {
    const STEP: usize = 8 * 1024;
    let mut content = Vec::new();
    while content.len() < len {
        let start = content.len();
        content.resize(len.min(start + STEP), 0);
        io.read_exact(&mut content[start..]).await?;
    }
    Ok(content)
}

fn invalid(error: FrameError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl request_response::Codec for ControlCodec {
    type Protocol = StreamProtocol;
    type Request = WireRequest;
    type Response = WireResponse;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<WireRequest>
    where
        T: AsyncRead + Unpin + Send,
    {
        Ok(decode_request(&read(io).await?).map(Box::new))
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<WireResponse>
    where
        T: AsyncRead + Unpin + Send,
    {
        Ok(decode_response(&read(io).await?).map(Box::new))
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        request: WireRequest,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        match request {
            Ok(request) => write(io, &encode_request(&request)).await,
            Err(error) => Err(io::Error::other(error)),
        }
    }

    async fn write_response<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        response: WireResponse,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        match response {
            Ok(response) => write(io, &encode_response(&response)).await,
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

/// Checks that a message fits its frame before it goes anywhere.
pub(crate) fn check_length(what: &'static str, content: &[u8]) -> Result<(), NetError> {
    let (limit, given) = (Class::Control.limit(), content.len());
    if given > limit { Err(NetError::TooLong { what, limit, given }) } else { Ok(()) }
}

/// The answer of a process that is at a limit of its own.
pub(crate) fn busy() -> Response {
    Response::Busy { retry_after: limits::RETRY_AFTER }
}

/// The answer to a frame that is no request.
pub(crate) fn fault(error: &RpcError) -> Response {
    match error {
        RpcError::UnsupportedVersion { speaks, sent } => {
            Response::UnsupportedVersion { speaks: *speaks, sent: *sent }
        }
        other => Response::error(other.code(), &other.to_string()),
    }
}

/// Where the answer to one inbound request goes. Dropping it answers `Busy`.
#[derive(Debug)]
pub struct Responder {
    pub(crate) inner: Option<Reply>,
}

/// The way of one answer to the driver.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) channel: ResponseChannel<WireResponse>,
    /// As long as there are permits: never full.
    pub(crate) answers: mpsc::Sender<Answered>,
    pub(crate) permits: [OwnedSemaphorePermit; 2],
}

/// An answer on its way to the driver, with the places that it frees.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) channel: ResponseChannel<WireResponse>,
    pub(crate) response: Box<Response>,
    _permits: [OwnedSemaphorePermit; 2],
}

impl Responder {
    /// Sends the answer. A peer that has gone meanwhile does not get it; the requester asks again.
    ///
    /// # Errors
    /// `TooLong` if the answer does not fit its frame; the peer hears `Busy` then.
    pub fn send(mut self, response: Response) -> Result<(), NetError> {
        check_length("a response", &encode_response(&response))?;
        if let Some(reply) = self.inner.take() {
            reply.send(response);
        }
        Ok(())
    }

    /// Whether the peer still waits.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.inner.as_ref().is_some_and(|reply| reply.channel.is_open())
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if let Some(reply) = self.inner.take() {
            reply.send(busy());
        }
    }
}

impl Reply {
    fn send(self, response: Response) {
        let answered =
            Answered { channel: self.channel, response: Box::new(response), _permits: self.permits };
        // Only a driver that has ended can refuse it; then there is no stream to answer on.
        let _ = self.answers.try_send(answered);
    }
}

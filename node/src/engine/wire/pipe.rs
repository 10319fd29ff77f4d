//! How messages go over the pipe: the greeting, then frames.

use std::io::{Read, Write};

use kinoflock_protocol::codec::{self, CodecError};
use kinoflock_protocol::frame::{self, FrameError};
use serde::{Deserialize, Serialize};

/// The version of these messages. Both sides are of one release, or the daemon says that they are not.
pub const WIRE_VERSION: u32 = 5;
/// Greatest message, bytes: three prompts and the numbers of every operation, or a preview, with room.
pub const MAX_FRAME: usize = 128 * 1024;

/// The mark that opens the conversation.
const MARK: [u8; 4] = *b"kfwk";

/// Why the other side was not understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The pipe failed.
    #[error("worker pipe: {0}")]
    Io(#[from] std::io::Error),
    /// A frame over the limit or cut.
    #[error("worker pipe: {0}")]
    Frame(#[from] FrameError),
    /// A frame that is no message.
    #[error("worker pipe: {0}")]
    Codec(#[from] CodecError),
    /// The other side does not speak this language at all.
    #[error(
        "the program at the other end of the worker pipe is no kinoflock worker: it began with {given:02x?}"
    )]
    NotAWorker {
        /// What it began with instead of the mark.
        given: [u8; 4],
    },
    /// Another version.
    #[error(
        "worker speaks version {theirs} of the engine's language, this daemon speaks {ours}: install both from one release"
    )]
    Version {
        /// This side's version.
        ours: u32,
        /// The other side's.
        theirs: u32,
    },
}

impl WireError {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io(_) => "worker_pipe",
            Self::Frame(error) => error.code(),
            Self::Codec(error) => error.code(),
            Self::NotAWorker { .. } => "not_a_worker",
            Self::Version { .. } => "worker_version",
        }
    }
}

/// The first eight bytes each way. Their form is the same in all versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The version that the sender speaks.
    pub version: u32,
}

impl Greeting {
    /// Bytes of a greeting.
    pub const LEN: usize = 8;

    /// This release's greeting.
    pub const OURS: Self = Self { version: WIRE_VERSION };

    /// The bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&MARK);
        bytes[4..].copy_from_slice(&self.version.to_le_bytes());
        bytes
    }

    /// Reads the other side's greeting, and checks that it speaks our version.
    ///
    /// # Errors
    /// [`WireError::NotAWorker`] or [`WireError::Version`].
    pub fn check(bytes: [u8; Self::LEN]) -> Result<Self, WireError> {
        let [mark @ .., a, b, c, d] = bytes;
        if mark != MARK {
            return Err(WireError::NotAWorker { given: mark });
        }
        let theirs = u32::from_le_bytes([a, b, c, d]);
        if theirs != WIRE_VERSION {
            return Err(WireError::Version { ours: WIRE_VERSION, theirs });
        }
        Ok(Self { version: theirs })
    }
}

/// A message as it goes over the pipe.
///
/// # Errors
/// [`WireError::Frame`] for one over [`MAX_FRAME`].
pub fn to_frame<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    Ok(frame::frame(&codec::encode(message), MAX_FRAME)?)
}

/// Writes a message and flushes.
///
/// # Errors
/// When the message is over the limit or the pipe fails.
pub fn write_message<T: Serialize>(pipe: &mut impl Write, message: &T) -> Result<(), WireError> {
    pipe.write_all(&to_frame(message)?)?;
    Ok(pipe.flush()?)
}

/// Reads a message; `None` at the end of the pipe.
///
/// # Errors
/// When the pipe fails or ends within a message, or the bytes are no message.
pub fn read_message<T: for<'de> Deserialize<'de>>(pipe: &mut impl Read) -> Result<Option<T>, WireError> {
    let mut header = [0; frame::HEADER_BYTES];
    let mut filled = 0;
    while filled < header.len() {
        match pipe.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Cut { missing: header.len() - filled }.into()),
            Ok(read) => filled += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut content = vec![0; frame::parse_header(header, MAX_FRAME)?];
    pipe.read_exact(&mut content)?;
    Ok(Some(decode(&content)?))
}

/// A message from the content of its frame.
///
/// # Errors
/// When the bytes are no message.
pub fn decode<T: for<'de> Deserialize<'de>>(content: &[u8]) -> Result<T, WireError> {
    Ok(codec::decode(content, MAX_FRAME)?)
}

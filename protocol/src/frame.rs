//! Frames: a 32-bit little-endian length, then so many bytes.
//!
//! [`FrameReader`] is pure and incremental: bytes in by [`FrameReader::push`], frames out by
//! [`FrameReader::next_frame`]. It refuses a length over its class's limit as soon as the four bytes are there, and
//! never holds more memory than what arrived.

use crate::limits;

/// Bytes of the length prefix.
pub const HEADER_BYTES: usize = 4;

/// What a stream carries, which bounds its frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Requests and answers.
    Control,
    /// Events of a job.
    Progress,
    /// The first frame of a progress or blob stream.
    Open,
    /// Chunks of a blob.
    Blob,
    /// Chaining values of a blob.
    Outline,
}

impl Class {
    /// Greatest frame in bytes, without the length prefix.
    pub const fn limit(self) -> usize {
        match self {
            Self::Control => limits::MAX_CONTROL_FRAME,
            Self::Progress => limits::MAX_PROGRESS_FRAME,
            Self::Open => limits::MAX_OPEN_FRAME,
            Self::Blob => limits::MAX_BLOB_FRAME,
            Self::Outline => limits::MAX_OUTLINE_FRAME,
        }
    }
}

/// Why a frame is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A frame over the limit of its class.
    #[error("frame of {given} bytes exceeds the limit of {limit} bytes")]
    TooLarge {
        /// Greatest length in bytes.
        limit: usize,
        /// Length announced in bytes.
        given: usize,
    },
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame: {missing} bytes are missing")]
    Cut {
        /// Bytes missing.
        missing: usize,
    },
}

impl FrameError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "frame_too_large",
            Self::Cut { .. } => "frame_cut",
        }
    }
}

/// Length prefix and content, ready to be written.
pub fn frame(content: &[u8], limit: usize) -> Result<Vec<u8>, FrameError> {
    let header = header(content.len(), limit)?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + content.len());
    bytes.extend_from_slice(&header);
    bytes.extend_from_slice(content);
    Ok(bytes)
}

/// The length prefix of a frame of `len` bytes.
pub fn header(len: usize, limit: usize) -> Result<[u8; HEADER_BYTES], FrameError> {
    match u32::try_from(len) {
        Ok(short) if len <= limit => Ok(short.to_le_bytes()),
        _ => Err(FrameError::TooLarge { limit, given: len }),
    }
}

/// The length that a prefix announces, if it is within `limit` bytes.
pub fn parse_header(header: [u8; HEADER_BYTES], limit: usize) -> Result<usize, FrameError> {
    let given = u32::from_le_bytes(header) as usize;
    if given > limit { Err(FrameError::TooLarge { limit, given }) } else { Ok(given) }
}

/// Turns bytes as they arrive into frames.
#[derive(Debug)]
pub struct FrameReader {
    limit: usize,
    buffer: Vec<u8>,
    start: usize,
}

impl FrameReader {
    /// A reader of frames of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, buffer: Vec::new(), start: 0 }
    }

    /// Takes bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        let needed = self.buffer.len() + bytes.len();
        if needed > self.buffer.capacity() {
            self.buffer.reserve_exact(needed.max(needed.saturating_mul(3) / 2) - self.buffer.len());
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` if more bytes are needed. After an error the stream is beyond repair.
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some((head, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let len = parse_header(*head, self.limit)?;
        let Some(content) = rest.get(..len) else {
            return Ok(None);
        };
        let frame = content.to_vec();
        self.start += HEADER_BYTES + len;
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        Ok(Some(frame))
    }

    /// Bytes held that are not yet a frame.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// Says whether the stream may end here.
    pub fn finish(&self) -> Result<(), FrameError> {
        let rest = &self.buffer[self.start..];
        match rest.split_first_chunk::<HEADER_BYTES>() {
            None if rest.is_empty() => Ok(()),
            None => Err(FrameError::Cut { missing: HEADER_BYTES - rest.len() }),
            Some((head, rest)) => {
                let len = parse_header(*head, self.limit)?;
                if rest.len() >= len { Ok(()) } else { Err(FrameError::Cut { missing: len - rest.len() }) }
            }
        }
    }
}

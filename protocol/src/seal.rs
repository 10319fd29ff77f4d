//! Sealing: what leaves the making node and is held by others is bytes that they can verify and serve, and cannot see.
//!
//! The key comes from the signed job's bytes, so whoever holds the job (its requester, the nodes that run it, the
//! custodians that it names) can open what belongs to it, and nobody else. One content under one key has one sealed form,
//! so that several holders serve the same blob.
//!
//! A sealed blob is a header of [`HEADER_BYTES`] (magic, salt) and chunks of XChaCha20-Poly1305 of [`PLAIN_CHUNK`] bytes
//! each; the nonce is salt, place of the chunk, and whether it is the last (the STREAM construction of Hoang, Reyhanitabar,
//! Rogaway and Vizár 2015), so that chunks can be neither moved nor left out.

use std::fmt;

use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

use crate::envelope::Envelope;
use crate::id::BlobId;
use crate::limits::CHUNK_BYTES;

/// Bytes that the cipher adds to a chunk.
pub const TAG_BYTES: usize = 16;
/// Bytes of a chunk before it is sealed; sealed it is one blob chunk.
pub const PLAIN_CHUNK: usize = CHUNK_BYTES - TAG_BYTES;
/// Bytes before the first chunk: magic and salt.
pub const HEADER_BYTES: usize = MAGIC.len() + SALT_BYTES;

const MAGIC: [u8; 8] = *b"KFSEAL\x01\0";
const SALT_BYTES: usize = 16;
const KEY_CONTEXT: &str = "kinoflock 1 seal key of a job's blobs";
const SALT_CONTEXT: &str = "kinoflock 1 seal salt of a blob";

/// Why sealed bytes cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// Not sealed in a way that is known here.
    #[error("not a sealed blob of version 1")]
    Header,
    /// The key is another's, or bytes were changed, moved or left out.
    #[error(
        "chunk {chunk} of the sealed blob cannot be opened: another job's key, or its bytes were changed"
    )]
    Chunk {
        /// Which, from 0.
        chunk: u64,
    },
    /// Shorter than any sealed blob.
    #[error("sealed blob of {given} bytes is shorter than the least possible, {least}")]
    Short {
        /// Least length in bytes.
        least: u64,
        /// Length given in bytes.
        given: u64,
    },
}

impl SealError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Header => "seal_header",
            Self::Chunk { .. } => "seal_chunk",
            Self::Short { .. } => "seal_short",
        }
    }
}

/// The key of everything that belongs to one job.
#[derive(Clone)]
pub struct SealKey(Zeroizing<[u8; 32]>);

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<seal key>")
    }
}

impl SealKey {
    /// The key that all who hold this signed job know.
    pub fn of_job(job: &Envelope) -> Self {
        Self(Zeroizing::new(blake3::derive_key(KEY_CONTEXT, &job.body)))
    }
}

/// Seals one content, chunk by chunk in order.
pub struct Sealer(Chunks);

/// Opens one sealed blob, chunk by chunk in order.
pub struct Opener(Chunks);

struct Chunks {
    cipher: XChaCha20Poly1305,
    header: [u8; HEADER_BYTES],
    next: u64,
}

impl Sealer {
    /// Seals the content of this id.
    pub fn new(key: &SealKey, plain: &BlobId) -> Self {
        let secret = Zeroizing::new([key.0.as_slice(), plain.as_bytes()].concat());
        let salt = blake3::derive_key(SALT_CONTEXT, &secret);
        let mut header = [0; HEADER_BYTES];
        header[..MAGIC.len()].copy_from_slice(&MAGIC);
        header[MAGIC.len()..].copy_from_slice(&salt[..SALT_BYTES]);
        Self(Chunks::new(key, header))
    }

    /// The first bytes of the sealed blob.
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        self.0.header
    }

    /// Seals the next chunk in place: [`PLAIN_CHUNK`] bytes, the last one whatever is left.
    ///
    /// # Panics
    /// When a chunk is longer.
    pub fn seal(&mut self, chunk: &mut Vec<u8>, is_last: bool) {
        assert!(chunk.len() <= PLAIN_CHUNK, "a chunk of {} bytes, {PLAIN_CHUNK} are the limit", chunk.len());
        let nonce = self.0.nonce(is_last);
        let sealed = self.0.cipher.encrypt_in_place(&nonce, &self.0.header, chunk);
        sealed.expect("invariant: a chunk is far below the cipher's limit");
    }
}

impl Opener {
    /// Opens the sealed blob that begins with this header.
    ///
    /// # Errors
    /// When it is no sealed blob.
    pub fn new(key: &SealKey, header: [u8; HEADER_BYTES]) -> Result<Self, SealError> {
        if header[..MAGIC.len()] != MAGIC {
            Err(SealError::Header)
        } else {
            Ok(Self(Chunks::new(key, header)))
        }
    }

    /// Opens the next chunk in place.
    ///
    /// # Errors
    /// When key or bytes are not the right ones.
    pub fn open(&mut self, chunk: &mut Vec<u8>, is_last: bool) -> Result<(), SealError> {
        let place = self.0.next;
        let nonce = self.0.nonce(is_last);
        let opened = self.0.cipher.decrypt_in_place(&nonce, &self.0.header, chunk);
        opened.map_err(|_| SealError::Chunk { chunk: place })
    }
}

impl Chunks {
    fn new(key: &SealKey, header: [u8; HEADER_BYTES]) -> Self {
        Self { cipher: XChaCha20Poly1305::new(key.0.as_slice().into()), header, next: 0 }
    }

    fn nonce(&mut self, is_last: bool) -> XNonce {
        let mut nonce = [0; 24];
        nonce[..SALT_BYTES].copy_from_slice(&self.header[MAGIC.len()..]);
        nonce[SALT_BYTES..23].copy_from_slice(&self.next.to_le_bytes()[..7]);
        nonce[23] = u8::from(is_last);
        self.next += 1;
        nonce.into()
    }
}

/// Length of a content once it is sealed.
pub fn sealed_len(plain: u64) -> u64 {
    let chunks = plain.div_ceil(PLAIN_CHUNK as u64).max(1);
    HEADER_BYTES as u64 + plain + chunks * TAG_BYTES as u64
}

/// Seals a small content as a whole.
pub fn seal_bytes(key: &SealKey, plain: &[u8]) -> Vec<u8> {
    let mut sealer = Sealer::new(key, &BlobId::of(plain));
    let mut sealed = sealer.header().to_vec();
    let mut chunks = plain.chunks(PLAIN_CHUNK).peekable();
    if plain.is_empty() {
        let mut last = Vec::new();
        sealer.seal(&mut last, true);
        sealed.extend(last);
    }
    while let Some(chunk) = chunks.next() {
        let mut chunk = chunk.to_vec();
        sealer.seal(&mut chunk, chunks.peek().is_none());
        sealed.extend(chunk);
    }
    sealed
}

/// Opens a small sealed content as a whole.
///
/// # Errors
/// When it is no sealed blob, or not of this key.
pub fn open_bytes(key: &SealKey, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
    let least = sealed_len(0);
    let short = SealError::Short { least, given: sealed.len() as u64 };
    let (header, body) = sealed.split_first_chunk::<HEADER_BYTES>().ok_or(short)?;
    if body.len() < TAG_BYTES {
        return Err(short);
    }
    let mut opener = Opener::new(key, *header)?;
    let mut plain = Vec::with_capacity(body.len());
    let mut chunks = body.chunks(CHUNK_BYTES).peekable();
    while let Some(chunk) = chunks.next() {
        let mut chunk = chunk.to_vec();
        opener.open(&mut chunk, chunks.peek().is_none())?;
        plain.extend(chunk);
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(of: u8) -> SealKey {
        SealKey(Zeroizing::new([of; 32]))
    }

    #[test]
    fn what_was_sealed_opens_with_its_key_alone_around_every_boundary() {
        let lengths =
            [0, 1, PLAIN_CHUNK - 1, PLAIN_CHUNK, PLAIN_CHUNK + 1, 2 * PLAIN_CHUNK, 2 * PLAIN_CHUNK + 5];
        for len in lengths {
            let plain: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let sealed = seal_bytes(&key(1), &plain);
            assert_eq!(sealed.len() as u64, sealed_len(len as u64), "{len}");
            assert_eq!(sealed, seal_bytes(&key(1), &plain), "one content has one sealed form");
            assert_eq!(open_bytes(&key(1), &sealed).unwrap(), plain);
            assert_eq!(open_bytes(&key(2), &sealed), Err(SealError::Chunk { chunk: 0 }));
        }
    }

    #[test]
    fn a_changed_moved_or_missing_byte_is_noticed() {
        let plain = vec![7; PLAIN_CHUNK + 100];
        let sealed = seal_bytes(&key(1), &plain);
        for at in [0, 9, HEADER_BYTES, HEADER_BYTES + CHUNK_BYTES - 1, sealed.len() - 1] {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(open_bytes(&key(1), &changed).is_err(), "byte {at}");
        }
        let first_alone = &sealed[..HEADER_BYTES + CHUNK_BYTES];
        assert_eq!(
            open_bytes(&key(1), first_alone),
            Err(SealError::Chunk { chunk: 0 }),
            "its end is missing"
        );
        let (head, body) = sealed.split_at(HEADER_BYTES);
        let moved = [head, &body[CHUNK_BYTES..], &body[..CHUNK_BYTES]].concat();
        assert!(open_bytes(&key(1), &moved).is_err());
        assert!(matches!(open_bytes(&key(1), &sealed[..HEADER_BYTES + 3]), Err(SealError::Short { .. })));
    }

    #[test]
    fn sealed_bytes_do_not_hold_what_they_seal() {
        let plain = b"a red circle drifts left".repeat(20);
        let sealed = seal_bytes(&key(1), &plain);
        assert!(!sealed.windows(8).any(|window| plain.windows(8).any(|other| other == window)));
        let id = BlobId::of(&plain);
        assert!(!sealed.windows(8).any(|window| id.as_bytes().windows(8).any(|other| other == window)));
    }
}

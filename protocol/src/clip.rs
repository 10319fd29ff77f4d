//! Content by its hash: verifying a blob chunk by chunk against its plain blake3 id.
//!
//! blake3 is a tree. The chaining values of a blob's 1 MiB chunks ([`Outline`]) merge to the ordinary
//! `blake3::hash` of the whole, so whoever has an outline that merges to the wanted id can check each chunk alone,
//! from any holder, in any order, before writing it. A blob of at most one chunk has an outline of one value: its
//! id itself.

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue as Cv, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use serde::{Deserialize, Serialize};

use crate::codec::{List, array, text_u64};
use crate::id::BlobId;
use crate::limits::{CHUNK_BYTES, MAX_BLOB_BYTES, MAX_CHUNKS};

const CHUNK: u64 = CHUNK_BYTES as u64;

/// Why content is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClipError {
    /// A blob beyond the protocol's limit.
    #[error("blob of {given} bytes exceeds the limit of {limit} bytes")]
    TooLarge {
        /// Greatest length in bytes.
        limit: u64,
        /// Length given in bytes.
        given: u64,
    },
    /// An outline with another number of values than its length has chunks.
    #[error("outline of {given} chaining values for {len} bytes, which have {expected} chunks")]
    OutlineLength {
        /// Length of the blob in bytes.
        len: u64,
        /// Chunks that it has.
        expected: u64,
        /// Values given.
        given: u64,
    },
    /// An outline of another blob.
    #[error("outline merges to {given}, not to {expected}")]
    WrongOutline {
        /// The blob that was asked for.
        expected: BlobId,
        /// What the outline merges to.
        given: BlobId,
    },
    /// A chunk beyond the end.
    #[error("chunk {given} of a blob of {chunks} chunks")]
    NoSuchChunk {
        /// Chunks of the blob.
        chunks: u64,
        /// Index given, from 0.
        given: u64,
    },
    /// A chunk of the wrong length.
    #[error("chunk {index} has {given} bytes instead of {expected}")]
    ChunkLength {
        /// Index of the chunk, from 0.
        index: u64,
        /// Length that it must have, in bytes.
        expected: u64,
        /// Length given, in bytes.
        given: u64,
    },
    /// A chunk with a wrong byte.
    #[error("chunk {index} does not match its hash")]
    WrongChunk {
        /// Index of the chunk, from 0.
        index: u64,
    },
}

impl ClipError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "blob_too_large",
            Self::OutlineLength { .. } => "outline_length",
            Self::WrongOutline { .. } => "wrong_outline",
            Self::NoSuchChunk { .. } => "no_such_chunk",
            Self::ChunkLength { .. } => "chunk_length",
            Self::WrongChunk { .. } => "wrong_chunk",
        }
    }
}

/// A blob and its length, so that a node knows what it will fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlobRef {
    /// Which blob.
    pub id: BlobId,
    /// Its length in bytes.
    #[serde(with = "text_u64")]
    pub len: u64,
}

impl BlobRef {
    /// The reference to these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { id: BlobId::of(bytes), len: bytes.len() as u64 }
    }
}

/// The blake3 chaining value of one chunk; the root hash if the blob has one chunk only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChainingValue(#[serde(with = "array")] pub [u8; 32]);

/// The chaining values of a blob. Untrusted until [`Outline::check`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outline {
    /// Length of the blob in bytes.
    #[serde(with = "text_u64")]
    pub len: u64,
    /// One value for each chunk, in order.
    pub values: List<ChainingValue, MAX_CHUNKS>,
}

impl Outline {
    /// The outline of these bytes.
    pub fn of(bytes: &[u8]) -> Result<Self, ClipError> {
        let values = chaining_values(bytes)?;
        Ok(Self { len: bytes.len() as u64, values: List::first_of(values) })
    }

    /// Checks that this is the outline of `id`.
    pub fn check(&self, id: &BlobId) -> Result<(), ClipError> {
        let given = merge(self.len, &self.values)?;
        if given != *id {
            return Err(ClipError::WrongOutline { expected: *id, given });
        }
        Ok(())
    }

    /// Checks chunk `index` against a checked outline.
    pub fn check_chunk(&self, index: u64, bytes: &[u8]) -> Result<(), ClipError> {
        let no_such = ClipError::NoSuchChunk { chunks: chunk_count(self.len), given: index };
        let value = usize::try_from(index).ok().and_then(|i| self.values.get(i)).ok_or(no_such)?;
        verify_chunk(index, self.len, bytes, value)
    }
}

/// Number of chunks of a blob of `len` bytes: at least one, for an empty blob has one empty chunk.
pub fn chunk_count(len: u64) -> u64 {
    len.div_ceil(CHUNK).max(1)
}

/// Length in bytes of chunk `index` of a blob of `len` bytes; `None` beyond the last.
pub fn chunk_len(index: u64, len: u64) -> Option<usize> {
    if index >= chunk_count(len) {
        return None;
    }
    Some((len - index * CHUNK).min(CHUNK) as usize)
}

/// The chaining values of the chunks of these bytes.
pub fn chaining_values(bytes: &[u8]) -> Result<Vec<ChainingValue>, ClipError> {
    let len = bytes.len() as u64;
    check_len(len)?;
    if bytes.is_empty() {
        return Ok(vec![chunk_value(0, 0, &[])]);
    }
    Ok((0..).zip(bytes.chunks(CHUNK_BYTES)).map(|(index, chunk)| chunk_value(index, len, chunk)).collect())
}

/// The id of the blob of `len` bytes with these chaining values.
pub fn merge(len: u64, values: &[ChainingValue]) -> Result<BlobId, ClipError> {
    check_len(len)?;
    let (expected, given) = (chunk_count(len), values.len() as u64);
    if expected != given {
        return Err(ClipError::OutlineLength { len, expected, given });
    }
    if let [only] = values {
        return Ok(BlobId::from_bytes(only.0));
    }
    let (left, right) = merge_halves(len, values);
    Ok(BlobId::from_bytes(*merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()))
}

/// Checks one chunk of a blob of `len` bytes against its chaining value.
pub fn verify_chunk(index: u64, len: u64, bytes: &[u8], value: &ChainingValue) -> Result<(), ClipError> {
    check_len(len)?;
    let chunks = chunk_count(len);
    let expected = chunk_len(index, len).ok_or(ClipError::NoSuchChunk { chunks, given: index })? as u64;
    if bytes.len() as u64 != expected {
        return Err(ClipError::ChunkLength { index, expected, given: bytes.len() as u64 });
    }
    if chunk_value(index, len, bytes) != *value {
        return Err(ClipError::WrongChunk { index });
    }
    Ok(())
}

/// Hashes a blob as it is written: gives its id and its chaining values.
#[derive(Debug, Default)]
pub struct ChunkHasher {
    done: Vec<Cv>,
    current: Hasher,
    in_current: usize,
    whole: Hasher,
    len: u64,
}

impl ChunkHasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) -> Result<(), ClipError> {
        check_len(self.len.saturating_add(bytes.len() as u64))?;
        if self.done.is_empty() {
            // Only a blob of one chunk needs its plain hash; a longer one's root comes from merging.
            let head = bytes.len().min(CHUNK_BYTES - self.in_current);
            self.whole.update(&bytes[..head]);
        }
        while !bytes.is_empty() {
            if self.in_current == CHUNK_BYTES {
                self.close_chunk();
            }
            let (head, rest) = bytes.split_at(bytes.len().min(CHUNK_BYTES - self.in_current));
            self.current.update(head);
            self.in_current += head.len();
            self.len += head.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Bytes seen so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing was seen yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The id and the outline of all that was seen.
    pub fn finish(mut self) -> (BlobId, Outline) {
        let values = if self.done.is_empty() {
            vec![ChainingValue(*self.whole.finalize().as_bytes())]
        } else {
            self.close_chunk();
            self.done.into_iter().map(ChainingValue).collect()
        };
        let id = merge(self.len, &values).expect("invariant: one value for each chunk");
        (id, Outline { len: self.len, values: List::first_of(values) })
    }

    fn close_chunk(&mut self) {
        self.done.push(self.current.finalize_non_root());
        let offset = self.done.len() as u64 * CHUNK;
        self.current = Hasher::new();
        self.current.set_input_offset(offset);
        self.in_current = 0;
    }
}

fn check_len(len: u64) -> Result<(), ClipError> {
    if len > MAX_BLOB_BYTES {
        return Err(ClipError::TooLarge { limit: MAX_BLOB_BYTES, given: len });
    }
    Ok(())
}

/// `bytes` must be chunk `index` of a blob of `len` bytes.
fn chunk_value(index: u64, len: u64, bytes: &[u8]) -> ChainingValue {
    if chunk_count(len) == 1 {
        return ChainingValue(*blake3::hash(bytes).as_bytes());
    }
    let mut hasher = Hasher::new();
    hasher.set_input_offset(index * CHUNK);
    hasher.update(bytes);
    ChainingValue(hasher.finalize_non_root())
}

fn merge_halves(len: u64, values: &[ChainingValue]) -> (Cv, Cv) {
    let left_len = left_subtree_len(len);
    let (left, right) = values.split_at((left_len / CHUNK) as usize);
    (merge_subtree(left_len, left), merge_subtree(len - left_len, right))
}

fn merge_subtree(len: u64, values: &[ChainingValue]) -> Cv {
    if let [only] = values {
        return only.0;
    }
    let (left, right) = merge_halves(len, values);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

//! Content by its hash: served to whoever knows the id, fetched from several holders at once.
//!
//! A stream carries any number of questions, one after the other. Each is a
//! [`BlobRequest`](kinoflock_protocol::rpc::BlobRequest), answered by a
//! [`BlobReply`](kinoflock_protocol::rpc::BlobReply) and as many frames as chunks were asked for, each the raw
//! bytes of one chunk. Nothing that was fetched reaches a [`BlobSink`] before its hash was checked.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::{Arc, RwLock};

use kinoflock_protocol::clip::{ChunkHasher, ClipError, Outline};
use kinoflock_protocol::{BlobId, limits::CHUNK_BYTES};

pub(crate) mod fetch;
pub(crate) mod serve;
mod sink;

pub use fetch::{FetchError, FetchOptions, FetchProgress, FetchReport, HolderFault, HolderReport};
pub use sink::{BlobSink, FileSink, MemorySink};

/// Where served blobs come from. Called on the blocking pool, never on the driver.
pub trait BlobSource: fmt::Debug + Send + Sync + 'static {
    /// Opens a blob; `None` if it is not here.
    ///
    /// # Errors
    /// Whatever the store met; the peer is told that the blob is not here.
    fn open(&self, id: &BlobId) -> io::Result<Option<Box<dyn BlobReader>>>;
}

/// One blob that is being served.
pub trait BlobReader: Send + 'static {
    /// Its length and the chaining values of its chunks.
    fn outline(&self) -> &Outline;

    /// Fills `buffer` from `offset` on; the range lies within the blob.
    ///
    /// # Errors
    /// Whatever the store met; `InvalidData` where the content is not what it was. A peer hears of it if it is met at
    /// the first byte that it asked for; else its stream ends, and it asks again from there.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// A blob in a file whose outline is known.
#[derive(Debug)]
pub struct FileReader {
    file: File,
    outline: Outline,
}

impl FileReader {
    /// A reader of this file. The outline is taken at its word: a file that changed under it is noticed by
    /// whoever fetches.
    #[must_use]
    pub fn new(file: File, outline: Outline) -> Self {
        Self { file, outline }
    }

    /// The id and the outline of a file's content, read whole in chunks.
    ///
    /// # Errors
    /// Those of reading, and `InvalidInput` for a file beyond the protocol's greatest blob.
    pub fn outline_of(file: &mut File) -> io::Result<(BlobId, Outline)> {
        file.seek(SeekFrom::Start(0))?;
        let mut hasher = ChunkHasher::new();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.finish()),
                read => hasher.update(&buffer[..read]).map_err(io::Error::other)?,
            }
        }
    }
}

impl BlobReader for FileReader {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(offset))?;
        self.file.read_exact(buffer)
    }
}

/// Blobs in memory: the inputs of a job while it is being submitted, and tests.
#[derive(Debug, Default)]
pub struct MemoryBlobs {
    blobs: RwLock<HashMap<BlobId, MemoryReader>>,
}

impl MemoryBlobs {
    /// No blobs yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a blob; gives its id.
    ///
    /// # Errors
    /// Beyond the protocol's greatest blob.
    pub fn insert(&self, bytes: impl Into<Arc<[u8]>>) -> Result<BlobId, ClipError> {
        let bytes = bytes.into();
        let outline = Outline::of(&bytes)?;
        let id = BlobId::of(&bytes);
        self.blobs
            .write()
            .expect("invariant: no panic while the lock is held")
            .insert(id, MemoryReader { outline, bytes });
        Ok(id)
    }

    /// Forgets a blob.
    pub fn remove(&self, id: &BlobId) {
        self.blobs.write().expect("invariant: no panic while the lock is held").remove(id);
    }
}

impl BlobSource for MemoryBlobs {
    fn open(&self, id: &BlobId) -> io::Result<Option<Box<dyn BlobReader>>> {
        let blobs = self.blobs.read().expect("invariant: no panic while the lock is held");
        Ok(blobs.get(id).map(|blob| Box::new(blob.clone()) as Box<dyn BlobReader>))
    }
}

#[derive(Debug, Clone)]
struct MemoryReader {
    outline: Outline,
    bytes: Arc<[u8]>,
}

impl BlobReader for MemoryReader {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(self.bytes.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

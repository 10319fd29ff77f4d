//! The clip store: finished clips and latents as files by content, with an index, a size limit and owners.
//!
//! - A blob is written to a temporary name, synced, renamed, its folder synced, and its index row last: a row means a
//!   whole file. What a crash leaves behind (temporary files, files without a row, rows without a file) is removed when
//!   the store is opened.
//! - Room is made by evicting blobs whose owners have all acknowledged them, oldest acknowledged first. What nobody has
//!   acknowledged is never evicted for room: then it is [`ClipsError::StoreFull`], and admission refuses before it comes
//!   to that ([`Clips::room`]).
//! - Chaining values per MiB are kept in the index, so that blobs are served verified: [`Clips::read_chunk`] checks
//!   every chunk it reads, and a file that was tampered with is named as such.
//!
//! All calls block on the disk: use them from blocking code. Clones share the store. For kinoflock-net's blob source:
//! [`Clips::outline`] and [`Clips::read_chunk`].

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kinoflock_protocol::clip::{BlobRef, ChunkHasher, ClipError, Outline};
use kinoflock_protocol::codec::CodecError;
use kinoflock_protocol::id::{BlobId, JobId, RequesterId};
use kinoflock_protocol::limits::CHUNK_BYTES;
use kinoflock_protocol::units::UnixMillis;

use self::index::{Index, Row};
use crate::disk::StoreError;
use crate::scheduler::Room;

pub use self::index::{Owner, OwnerClass};

mod files;
mod index;

/// The part of the store that what the public has not fetched leaves free: one in so many.
const RESERVED_PART: u64 = 4;
/// Name of the index in the clip folder.
const INDEX_FILE: &str = "index.redb";

/// Most owners of one blob: the same clip made for several jobs.
pub const MAX_OWNERS: usize = 256;

/// Why the store refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClipsError {
    /// No room, and nothing that may be evicted.
    #[error("the clip store is full: {needed} bytes are needed, {available} of {limit} can be had")]
    StoreFull {
        /// Bytes needed.
        needed: u64,
        /// Bytes that can be had.
        available: u64,
        /// The store's limit in bytes.
        limit: u64,
    },
    /// The disk itself is full.
    #[error("no space is left on the disk of the clip store; free some, or lower storage.clips_limit")]
    DiskFull,
    /// There is no such blob.
    #[error("no blob {id} in the clip store")]
    Unknown {
        /// The blob.
        id: BlobId,
    },
    /// The file is not what was stored.
    #[error("blob {id} was changed on disk: {source}")]
    Tampered {
        /// The blob.
        id: BlobId,
        /// What does not match.
        source: ClipError,
    },
    /// The blob has as many owners as it may have.
    #[error("blob {id} has {limit} owners, the most that one may have")]
    TooManyOwners {
        /// The blob.
        id: BlobId,
        /// The limit.
        limit: usize,
    },
    /// The content is beyond the protocol's limit.
    #[error(transparent)]
    Content(#[from] ClipError),
    /// The index cannot be opened or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A row of the index cannot be read.
    #[error("a row of the clip index cannot be read: {0}")]
    Row(#[from] CodecError),
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl ClipsError {
    /// A short stable name for metrics and `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::StoreFull { .. } => "store_full",
            Self::DiskFull => "disk_full",
            Self::Unknown { .. } => "blob_unknown",
            Self::Tampered { .. } => "blob_tampered",
            Self::TooManyOwners { .. } => "blob_owners",
            Self::Content(error) => error.code(),
            Self::Store(error) => error.code(),
            Self::Row(_) => "clip_row",
            Self::Io { .. } => "clip_io",
        }
    }
}

/// Bytes in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fill {
    /// The limit.
    pub limit: u64,
    /// All blobs.
    pub used: u64,
    /// Of which acknowledged by all owners: these can be evicted.
    pub evictable: u64,
    /// Number of blobs.
    pub blobs: u64,
}

/// The store.
#[derive(Debug, Clone)]
pub struct Clips {
    dir: PathBuf,
    limit: u64,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    index: Index,
    /// Bytes that running writes have taken of the limit.
    reserved: u64,
    next_temporary: u64,
}

impl Clips {
    /// Opens or makes the store in `dir`, at most `limit` bytes large, and removes what a crash left behind.
    ///
    /// # Errors
    /// When it is in use, newer, or the disk refuses.
    pub fn open(dir: &Path, limit: u64) -> Result<Self, ClipsError> {
        files::make_dirs(dir)?;
        let index = Index::open(&dir.join(INDEX_FILE))?;
        let store = Self {
            dir: dir.to_owned(),
            limit,
            state: Arc::new(Mutex::new(State { index, reserved: 0, next_temporary: 0 })),
        };
        store.recover()?;
        Ok(store)
    }

    /// Stores bytes for an owner.
    ///
    /// # Errors
    /// When there is no room, the disk is full, or it refuses; the store is then as before.
    pub fn put(&self, bytes: &[u8], owner: Owner, now: UnixMillis) -> Result<BlobRef, ClipsError> {
        let mut writer = self.writer(owner, bytes.len() as u64, now)?;
        writer.append(bytes)?;
        writer.finish()
    }

    /// Stores a file's content for an owner. The file itself is left where it is.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn put_file(&self, path: &Path, owner: Owner, now: UnixMillis) -> Result<BlobRef, ClipsError> {
        let io = |action| move |source| files::io_error(action, path, source);
        let file = std::fs::File::open(path).map_err(io("open"))?;
        let len = file.metadata().map_err(io("look at"))?.len();
        let mut writer = self.writer(owner, len, now)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut reader = file;
        loop {
            match std::io::Read::read(&mut reader, &mut chunk).map_err(io("read"))? {
                0 => return writer.finish(),
                read => writer.append(&chunk[..read])?,
            }
        }
    }

    /// Begins a blob of about `expected` bytes, for which room is made and held until the writer is gone.
    ///
    /// # Errors
    /// When there is no room or the disk refuses.
    pub fn writer(&self, owner: Owner, expected: u64, now: UnixMillis) -> Result<ClipWriter, ClipsError> {
        let mut state = self.lock();
        self.make_room(&mut state, expected)?;
        state.next_temporary += 1;
        let number = state.next_temporary;
        drop(state);
        let hold = Hold { store: self.clone(), bytes: expected };
        let temporary = files::Temporary::create(&self.dir, number)?;
        Ok(ClipWriter { hold, temporary, hasher: ChunkHasher::new(), owner, now })
    }

    /// Marks an owner's part in a blob as acknowledged. Evictable once all owners have.
    ///
    /// # Errors
    /// When there is no such blob, or the index fails.
    pub fn acknowledge(&self, id: &BlobId, job: &JobId, now: UnixMillis) -> Result<(), ClipsError> {
        self.lock().index.acknowledge(id, job, now)
    }

    /// Takes a job's part out of a blob, and deletes it if no other job has one.
    ///
    /// # Errors
    /// When there is no such blob, or the index fails.
    pub fn release(&self, id: &BlobId, job: &JobId) -> Result<(), ClipsError> {
        let mut state = self.lock();
        if state.index.remove_owner(id, job)? { Ok(()) } else { self.delete(&mut state, id) }
    }

    /// Deletes blobs whose terms are over: all owners acknowledged before `acknowledged_before`, or stored before
    /// `stored_before`. Gives back what was deleted.
    ///
    /// # Errors
    /// When the index fails.
    pub fn sweep(
        &self,
        acknowledged_before: UnixMillis,
        stored_before: UnixMillis,
    ) -> Result<Vec<BlobId>, ClipsError> {
        let mut state = self.lock();
        let over = |row: &Row| {
            row.acknowledged_at().is_some_and(|at| at < acknowledged_before) || row.stored_at < stored_before
        };
        let ids: Vec<_> = state.index.rows().filter(|(_, row)| over(row)).map(|(id, _)| *id).collect();
        for id in &ids {
            self.delete(&mut state, id)?;
        }
        Ok(ids)
    }

    /// Deletes what is this job's alone; what others own too stays for them.
    ///
    /// # Errors
    /// When the index fails.
    pub fn forget(&self, job: &JobId, now: UnixMillis) -> Result<Vec<BlobId>, ClipsError> {
        let mut state = self.lock();
        let owned = |row: &Row| row.owners.iter().any(|part| part.owner.job == *job);
        let alone = |row: &Row| row.owners.iter().all(|part| part.owner.job == *job);
        let rows = state.index.rows().filter(|(_, row)| owned(row));
        let (gone, kept): (Vec<_>, Vec<_>) =
            rows.map(|(id, row)| (*id, alone(row))).partition(|(_, alone)| *alone);
        for (id, _) in &kept {
            state.index.acknowledge(id, job, now)?;
        }
        for (id, _) in &gone {
            self.delete(&mut state, id)?;
        }
        Ok(gone.into_iter().map(|(id, _)| id).collect())
    }

    /// The chaining values of a blob.
    ///
    /// # Errors
    /// When there is no such blob.
    pub fn outline(&self, id: &BlobId) -> Result<Outline, ClipsError> {
        self.lock().index.row(id).map(|row| row.outline.clone())
    }

    /// Reads one chunk of a blob and checks it against its chaining value.
    ///
    /// # Errors
    /// When there is no such blob or chunk, the file cannot be read, or it was changed.
    pub fn read_chunk(&self, id: &BlobId, chunk: u64) -> Result<Vec<u8>, ClipsError> {
        let outline = self.outline(id)?;
        let bytes = files::read_chunk(&self.dir, id, outline.len, chunk)?;
        outline.check_chunk(chunk, &bytes).map_err(|source| ClipsError::Tampered { id: *id, source })?;
        Ok(bytes)
    }

    /// Reads a part of a chunk that was read before, unchecked: whoever gets it checks the chunk.
    ///
    /// # Errors
    /// `Io` when the file cannot be read so far.
    pub fn read_part(&self, id: &BlobId, offset: u64, buffer: &mut [u8]) -> Result<(), ClipsError> {
        files::read_part(&self.dir, id, offset, buffer)
    }

    /// Reads a whole blob, checked chunk by chunk.
    ///
    /// # Errors
    /// As [`read_chunk`](Self::read_chunk).
    pub fn read(&self, id: &BlobId) -> Result<Vec<u8>, ClipsError> {
        let chunks = kinoflock_protocol::clip::chunk_count(self.outline(id)?.len);
        let mut all = Vec::new();
        for chunk in 0..chunks {
            all.extend(self.read_chunk(id, chunk)?);
        }
        Ok(all)
    }

    /// Whether the blob is here.
    #[must_use]
    pub fn contains(&self, id: &BlobId) -> bool {
        self.lock().index.row(id).is_ok()
    }

    /// Who has a part in a blob.
    ///
    /// # Errors
    /// When there is no such blob.
    pub fn owners(&self, id: &BlobId) -> Result<Vec<Owner>, ClipsError> {
        self.lock().index.row(id).map(|row| row.owners.iter().map(|part| part.owner).collect())
    }

    /// What admission needs to know for a job of this requester whose results need about `needed` bytes. What the public
    /// has not fetched may fill all but a quarter of the store: that quarter is for own keys and collectives.
    #[must_use]
    pub fn room(&self, requester: &RequesterId, class: OwnerClass, needed: u64) -> Room {
        let state = self.lock();
        let for_class = match class {
            OwnerClass::Own | OwnerClass::Collective => u64::MAX,
            OwnerClass::Public => (self.limit - self.limit / RESERVED_PART)
                .saturating_sub(state.index.unacknowledged(|owner| owner.class == class)),
        };
        Room {
            available: self.available(&state).min(for_class),
            needed,
            unacknowledged: state.index.unacknowledged(|owner| owner.requester == *requester),
        }
    }

    /// Unacknowledged bytes of a class.
    #[must_use]
    pub fn unacknowledged_of(&self, class: OwnerClass) -> u64 {
        self.lock().index.unacknowledged(|owner| owner.class == class)
    }

    /// How full the store is.
    #[must_use]
    pub fn fill(&self) -> Fill {
        let state = self.lock();
        Fill {
            limit: self.limit,
            used: state.index.used(),
            evictable: state.index.evictable(),
            blobs: state.index.rows().count() as u64,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held left the index as it was: every change of it is one commit.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn available(&self, state: &State) -> u64 {
        let kept = state.index.used() - state.index.evictable();
        self.limit.saturating_sub(kept).saturating_sub(state.reserved)
    }

    /// Evicts until `needed` more bytes fit, and reserves them.
    fn make_room(&self, state: &mut State, needed: u64) -> Result<(), ClipsError> {
        let available = self.available(state);
        if needed > available {
            return Err(ClipsError::StoreFull { needed, available, limit: self.limit });
        }
        while state.index.used() + state.reserved + needed > self.limit {
            let oldest =
                state.index.oldest_acknowledged().expect("invariant: what is available is free or evictable");
            self.delete(state, &oldest)?;
        }
        state.reserved += needed;
        Ok(())
    }

    /// The row goes first: a file without a row is removed at the next start, a row without a file would lie.
    fn delete(&self, state: &mut State, id: &BlobId) -> Result<(), ClipsError> {
        state.index.remove(id)?;
        files::remove(&self.dir, id)
    }

    fn recover(&self) -> Result<(), ClipsError> {
        let mut state = self.lock();
        let lost: Vec<_> = state
            .index
            .rows()
            .filter(|(id, row)| !files::has_len(&self.dir, id, row.outline.len))
            .map(|(id, _)| *id)
            .collect();
        for id in &lost {
            tracing::warn!(blob = %id, "stored file is missing or has another length: its row is dropped");
            state.index.remove(id)?;
        }
        files::remove_strays(&self.dir, |id| state.index.row(id).is_ok())
    }
}

/// A blob that is being written. Dropped before [`finish`](Self::finish), it leaves nothing.
#[derive(Debug)]
pub struct ClipWriter {
    hold: Hold,
    temporary: files::Temporary,
    hasher: ChunkHasher,
    owner: Owner,
    now: UnixMillis,
}

/// Room that a running write holds.
#[derive(Debug)]
struct Hold {
    store: Clips,
    bytes: u64,
}

impl ClipWriter {
    /// Adds bytes.
    ///
    /// # Errors
    /// When there is no more room, the disk is full, or it refuses.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), ClipsError> {
        let after = self.hasher.len() + bytes.len() as u64;
        if let Some(more) = after.checked_sub(self.hold.bytes).filter(|more| *more > 0) {
            let mut state = self.hold.store.lock();
            self.hold.store.make_room(&mut state, more)?;
            drop(state);
            self.hold.bytes = after;
        }
        self.hasher.update(bytes)?;
        self.temporary.write(bytes)
    }

    /// Syncs, names and indexes the blob.
    ///
    /// # Errors
    /// When the disk is full or refuses; the store is then as before.
    pub fn finish(self) -> Result<BlobRef, ClipsError> {
        let Self { hold, temporary, hasher, owner, now } = self;
        let (id, outline) = hasher.finish();
        let len = outline.len;
        let mut state = hold.store.lock();
        if state.index.row(&id).is_ok() {
            state.index.add_owner(&id, owner)?;
        } else {
            temporary.keep(&hold.store.dir, &id)?;
            state.index.insert(id, Row::new(outline, owner, now))?;
        }
        drop(state);
        Ok(BlobRef { id, len })
    }
}

impl Write for ClipWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.append(bytes).map_err(std::io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.store.lock();
        state.reserved = state.reserved.saturating_sub(self.bytes);
    }
}

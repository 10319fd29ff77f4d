//! What this node holds for others: sealed clips and checkpoints with their sealed statements, which it can verify and
//! serve and cannot see. And where it holds sealed copies of its own clips.
//!
//! Bytes lie in a [`Clips`] store of their own, with a limit of their own; what belongs to them lies in a table. A row is
//! written after its bytes and removed before them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{self, Bytes, CodecError, List};
use kinoflock_protocol::custody::{Content, HeldItem};
use kinoflock_protocol::id::{JobId, NodeId, RequesterId};
use kinoflock_protocol::limits::{MAX_HELD, MAX_NODES, MAX_STATEMENT};
use kinoflock_protocol::units::UnixMillis;
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::clips::{Clips, ClipsError, Owner, OwnerClass};
use crate::disk::{Failure, Store, StoreError};

/// Version of the tables. A store of a higher one is refused.
const SCHEMA: u64 = 1;
/// Name of the tables' file.
const FILE_NAME: &str = "held.redb";
/// One maker may fill this part of the room for replicas.
const PART_OF_ONE_MAKER: u64 = 2;
/// Most bytes of a row.
const MAX_ROW: usize = MAX_STATEMENT + 1024;

/// Job and content -> [`HeldRow`].
const HELD: TableDefinition<'_, &[u8; 33], &[u8]> = TableDefinition::new("held");
/// Own job -> nodes that hold sealed copies of its clip.
const REPLICAS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("replicas");

/// Why holdings could not be kept or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HoldingsError {
    /// The bytes.
    #[error(transparent)]
    Clips(#[from] ClipsError),
    /// The table.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A row that this release cannot read.
    #[error("a row of what is held cannot be read: {0}")]
    Row(#[from] CodecError),
    /// One maker's share is used up.
    #[error(
        "{maker} fills {used} bytes of the {limit} that one node may fill here, {given} more were asked for"
    )]
    MakerFull {
        /// Which node.
        maker: NodeId,
        /// Bytes that it fills.
        used: u64,
        /// Bytes that it may fill.
        limit: u64,
        /// Bytes asked for.
        given: u64,
    },
    /// Too many blobs for one job.
    #[error("{limit} sealed blobs are held for job {job}, the most for one")]
    TooMany {
        /// Which job.
        job: JobId,
        /// The limit.
        limit: usize,
    },
}

impl HoldingsError {
    /// A short stable name for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Clips(error) => error.code(),
            Self::Store(error) => error.code(),
            Self::Row(_) => "held_row",
            Self::MakerFull { .. } => "held_maker_full",
            Self::TooMany { .. } => "held_too_many",
        }
    }
}

/// Something that is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldRow {
    /// For whom.
    pub requester: RequesterId,
    /// Who asked for it.
    pub maker: NodeId,
    /// What it is.
    pub content: Content,
    /// The sealed blob.
    pub sealed: BlobRef,
    /// The sealed statement.
    pub statement: Bytes<MAX_STATEMENT>,
    /// How long it is held, at most.
    pub until: UnixMillis,
}

/// What is held. Clones share it.
#[derive(Debug, Clone)]
pub struct Holdings {
    blobs: Clips,
    rows: Arc<Store>,
    limit: u64,
    incoming: PathBuf,
}

impl Holdings {
    /// Opens or makes the store in `dir`, with room for `limit` bytes.
    ///
    /// # Errors
    /// When it is in use, newer, or the disk refuses.
    pub fn open(dir: &Path, limit: u64) -> Result<Self, HoldingsError> {
        let blobs = Clips::open(dir, limit)?;
        let rows = Store::open(&dir.join(FILE_NAME), SCHEMA, |tx| {
            tx.open_table(HELD)?;
            tx.open_table(REPLICAS)?;
            Ok(())
        })?;
        let incoming = dir.join("incoming");
        let made = std::fs::remove_dir_all(&incoming).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        });
        made.and_then(|()| std::fs::create_dir_all(&incoming)).map_err(|source| ClipsError::Io {
            action: "clear",
            path: incoming.clone(),
            source,
        })?;
        Ok(Self { blobs, rows: Arc::new(rows), limit, incoming })
    }

    /// The bytes, to be served.
    #[must_use]
    pub const fn blobs(&self) -> &Clips {
        &self.blobs
    }

    /// Where a fetch may put what it brings.
    #[must_use]
    pub fn incoming(&self, job: &JobId, content: Content) -> PathBuf {
        self.incoming.join(format!("{}-{}-{}", job.short(), content.name(), content.number()))
    }

    /// Whether there is room for so many bytes of this maker.
    ///
    /// # Errors
    /// `StoreFull`, `MakerFull`, `TooMany`.
    pub fn check(&self, job: &JobId, maker: &NodeId, len: u64) -> Result<(), HoldingsError> {
        let fill = self.blobs.fill();
        let available = fill.limit.saturating_sub(fill.used.saturating_sub(fill.evictable));
        if len > available {
            return Err(ClipsError::StoreFull { needed: len, available, limit: fill.limit }.into());
        }
        let rows = self.rows()?;
        let used = rows.iter().filter(|(_, row)| row.maker == *maker).map(|(_, row)| row.sealed.len).sum();
        let limit = self.limit / PART_OF_ONE_MAKER;
        if len > limit.saturating_sub(used) {
            return Err(HoldingsError::MakerFull { maker: *maker, used, limit, given: len });
        }
        if rows.iter().filter(|(held, _)| held == job).count() >= MAX_HELD {
            return Err(HoldingsError::TooMany { job: *job, limit: MAX_HELD });
        }
        Ok(())
    }

    /// Whether this very blob is held.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn has(&self, job: &JobId, row: &HeldRow) -> Result<bool, HoldingsError> {
        Ok(self.of(job)?.iter().any(|held| held.sealed == row.sealed) && self.blobs.contains(&row.sealed.id))
    }

    /// Takes over a sealed file. What it replaces (an older checkpoint) goes.
    ///
    /// # Errors
    /// When there is no room or the disk refuses; the file is left where it is.
    pub fn keep(&self, job: JobId, file: &Path, row: &HeldRow, now: UnixMillis) -> Result<(), HoldingsError> {
        let older = self.of(&job)?.into_iter().find(|held| held.content == row.content);
        let owner = Owner { job, requester: row.requester, class: OwnerClass::Public };
        self.blobs.put_file(file, owner, now)?;
        let bytes = codec::encode(row);
        self.rows.write(|tx| {
            tx.open_table(HELD)?.insert(&key(&job, row.content), bytes.as_slice())?;
            Ok::<_, Failure<HoldingsError>>(())
        })?;
        if let Some(older) = older.filter(|older| older.sealed != row.sealed) {
            self.blobs.acknowledge(&older.sealed.id, &job, now)?;
        }
        Ok(())
    }

    /// What is held for a job.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn of(&self, job: &JobId) -> Result<Vec<HeldRow>, HoldingsError> {
        Ok(self.rows()?.into_iter().filter(|(held, _)| held == job).map(|(_, row)| row).collect())
    }

    /// What is held for a job, as it is told to its requester.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn items(
        &self,
        job: &JobId,
        requester: &RequesterId,
    ) -> Result<List<HeldItem, MAX_HELD>, HoldingsError> {
        let rows = self.of(job)?.into_iter().filter(|row| row.requester == *requester);
        let item =
            |row: HeldRow| HeldItem { content: row.content, sealed: row.sealed, statement: row.statement };
        Ok(List::first_of(rows.map(item)))
    }

    /// Drops what is held for a job of this requester. Tells whether there was anything.
    ///
    /// # Errors
    /// When the table or the disk refuses.
    pub fn forget(
        &self,
        job: &JobId,
        requester: &RequesterId,
        now: UnixMillis,
    ) -> Result<bool, HoldingsError> {
        let rows: Vec<_> = self.of(job)?.into_iter().filter(|row| row.requester == *requester).collect();
        if rows.is_empty() {
            return Ok(false);
        }
        self.rows.write(|tx| {
            let mut table = tx.open_table(HELD)?;
            for row in &rows {
                table.remove(&key(job, row.content))?;
            }
            Ok::<_, Failure<HoldingsError>>(())
        })?;
        self.blobs.forget(job, now)?;
        Ok(true)
    }

    /// Drops what this maker asked to hold for a job. Tells whether there was anything.
    ///
    /// # Errors
    /// When the table or the disk refuses.
    pub fn take_back(&self, job: &JobId, maker: &NodeId, now: UnixMillis) -> Result<bool, HoldingsError> {
        let theirs: Vec<_> = self.of(job)?.into_iter().filter(|row| row.maker == *maker).collect();
        let mut dropped = false;
        for row in &theirs {
            dropped |= self.forget(job, &row.requester, now)?;
        }
        Ok(dropped)
    }

    /// Drops what has been held long enough.
    ///
    /// # Errors
    /// When the table or the disk refuses.
    pub fn sweep(&self, now: UnixMillis) -> Result<usize, HoldingsError> {
        let over: Vec<_> = self.rows()?.into_iter().filter(|(_, row)| row.until <= now).collect();
        for (job, row) in &over {
            self.forget(job, &row.requester, now)?;
        }
        Ok(over.len())
    }

    /// Remembers where sealed copies of an own clip lie.
    ///
    /// # Errors
    /// When the table refuses.
    pub fn set_replicas(&self, job: &JobId, nodes: &[NodeId]) -> Result<(), HoldingsError> {
        let nodes: List<NodeId, MAX_NODES> = List::first_of(nodes.iter().copied());
        let bytes = codec::encode(&nodes);
        self.rows.write(|tx| {
            let mut table = tx.open_table(REPLICAS)?;
            if nodes.is_empty() {
                table.remove(job.as_bytes())?;
            } else {
                table.insert(job.as_bytes(), bytes.as_slice())?;
            }
            Ok::<_, Failure<HoldingsError>>(())
        })
    }

    /// Where sealed copies of an own clip lie.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn replicas(&self, job: &JobId) -> Result<List<NodeId, MAX_NODES>, HoldingsError> {
        self.rows.read(|tx| match tx.open_table(REPLICAS)?.get(job.as_bytes())? {
            Some(row) => {
                codec::decode(row.value(), MAX_ROW).map_err(|error| Failure::Body(HoldingsError::Row(error)))
            }
            None => Ok(List::default()),
        })
    }

    fn rows(&self) -> Result<Vec<(JobId, HeldRow)>, HoldingsError> {
        self.rows.read(|tx| {
            let mut rows = Vec::new();
            for row in tx.open_table(HELD)?.iter()? {
                let (key, bytes) = row?;
                let (job, _) = key.value().split_first_chunk::<32>().expect("invariant: keys have 33 bytes");
                let row = codec::decode(bytes.value(), MAX_ROW)
                    .map_err(|error| Failure::Body(HoldingsError::Row(error)))?;
                rows.push((JobId::from_bytes(*job), row));
            }
            Ok(rows)
        })
    }
}

fn key(job: &JobId, content: Content) -> [u8; 33] {
    let mut key = [0; 33];
    key[..32].copy_from_slice(job.as_bytes());
    key[32] = content.number();
    key
}

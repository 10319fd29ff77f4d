//! The index of the clip store: one redb row per blob, and all rows in memory for counting.

use std::collections::BTreeMap;
use std::path::Path;

use kinoflock_protocol::clip::Outline;
use kinoflock_protocol::codec;
use kinoflock_protocol::id::{BlobId, JobId, RequesterId};
use kinoflock_protocol::limits::MAX_OUTLINE_FRAME;
use kinoflock_protocol::units::UnixMillis;
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::{ClipsError, MAX_OWNERS};
use crate::disk::{Failure, Store};
use crate::policy::Class;

const BLOBS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("blobs");

/// Version of the table. An index of a higher one is refused.
const SCHEMA: u64 = 1;

/// Most bytes of a row: an outline and its owners.
const MAX_ROW: usize = MAX_OUTLINE_FRAME + MAX_OWNERS * 128 + 1024;

/// Whose a blob is: the job that made it, and who asked for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The job.
    pub job: JobId,
    /// The artist's key.
    pub requester: RequesterId,
    /// In whose favour it ran.
    pub class: OwnerClass,
}

/// [`Class`] as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OwnerClass {
    /// The operator's own.
    Own,
    /// A collective's member.
    Collective,
    /// Everybody else.
    Public,
}

impl From<Class> for OwnerClass {
    fn from(class: Class) -> Self {
        match class {
            Class::Own => Self::Own,
            Class::Collective => Self::Collective,
            Class::Public => Self::Public,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) outline: Outline,
    pub(super) stored_at: UnixMillis,
    pub(super) owners: Vec<Part>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) owner: Owner,
    acknowledged_at: Option<UnixMillis>,
}

impl Row {
    pub(super) fn new(outline: Outline, owner: Owner, now: UnixMillis) -> Self {
        Self { outline, stored_at: now, owners: vec![Part { owner, acknowledged_at: None }] }
    }

    /// When the last owner acknowledged; `None` while one has not.
    pub(super) fn acknowledged_at(&self) -> Option<UnixMillis> {
        self.owners
            .iter()
            .map(|part| part.acknowledged_at)
            .try_fold(UnixMillis(0), |last, at| Some(last.max(at?)))
    }
}

#[derive(Debug)]
pub(super) struct Index {
    store: Store,
    rows: BTreeMap<BlobId, Row>,
}

impl Index {
    pub(super) fn open(path: &Path) -> Result<Self, ClipsError> {
        let store = Store::open(path, SCHEMA, |tx| tx.open_table(BLOBS).map(drop).map_err(Into::into))?;
        let rows = load(&store)?;
        Ok(Self { store, rows })
    }

    pub(super) fn row(&self, id: &BlobId) -> Result<&Row, ClipsError> {
        self.rows.get(id).ok_or(ClipsError::Unknown { id: *id })
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = (&BlobId, &Row)> {
        self.rows.iter()
    }

    pub(super) fn used(&self) -> u64 {
        self.rows.values().map(|row| row.outline.len).sum()
    }

    pub(super) fn evictable(&self) -> u64 {
        self.rows.values().filter(|row| row.acknowledged_at().is_some()).map(|row| row.outline.len).sum()
    }

    pub(super) fn oldest_acknowledged(&self) -> Option<BlobId> {
        let acknowledged = self.rows.iter().filter_map(|(id, row)| Some((row.acknowledged_at()?, *id)));
        acknowledged.min().map(|(_, id)| id)
    }

    /// Bytes of blobs in which such an owner has an unacknowledged part. Each blob counts once.
    pub(super) fn unacknowledged(&self, of: impl Fn(&Owner) -> bool) -> u64 {
        let open = |part: &Part| part.acknowledged_at.is_none() && of(&part.owner);
        self.rows.values().filter(|row| row.owners.iter().any(open)).map(|row| row.outline.len).sum()
    }

    pub(super) fn insert(&mut self, id: BlobId, row: Row) -> Result<(), ClipsError> {
        self.write(&id, Some(&row))?;
        self.rows.insert(id, row);
        Ok(())
    }

    pub(super) fn remove(&mut self, id: &BlobId) -> Result<(), ClipsError> {
        self.write(id, None)?;
        self.rows.remove(id);
        Ok(())
    }

    pub(super) fn add_owner(&mut self, id: &BlobId, owner: Owner) -> Result<(), ClipsError> {
        let mut row = self.row(id)?.clone();
        if row.owners.iter().any(|part| part.owner.job == owner.job) {
            return Ok(());
        }
        if row.owners.len() >= MAX_OWNERS {
            // A clip that many ask for is fetched by many: whoever has it longest makes room.
            let has_it =
                row.owners.iter().enumerate().filter_map(|(at, part)| Some((part.acknowledged_at?, at)));
            if let Some((_, at)) = has_it.min() {
                row.owners.remove(at);
            }
        }
        if row.owners.len() >= MAX_OWNERS {
            return Err(ClipsError::TooManyOwners { id: *id, limit: MAX_OWNERS });
        }
        row.owners.push(Part { owner, acknowledged_at: None });
        self.insert(*id, row)
    }

    /// Takes a job's part out of a blob; gives whether another is left, without which nothing is changed.
    pub(super) fn remove_owner(&mut self, id: &BlobId, job: &JobId) -> Result<bool, ClipsError> {
        let mut row = self.row(id)?.clone();
        row.owners.retain(|part| part.owner.job != *job);
        if row.owners.is_empty() {
            return Ok(false);
        }
        self.insert(*id, row)?;
        Ok(true)
    }

    pub(super) fn acknowledge(
        &mut self,
        id: &BlobId,
        job: &JobId,
        now: UnixMillis,
    ) -> Result<(), ClipsError> {
        let mut row = self.row(id)?.clone();
        for part in row.owners.iter_mut().filter(|part| part.owner.job == *job) {
            part.acknowledged_at.get_or_insert(now);
        }
        self.insert(*id, row)
    }

    fn write(&self, id: &BlobId, row: Option<&Row>) -> Result<(), ClipsError> {
        self.store.write(|tx| {
            let mut table = tx.open_table(BLOBS)?;
            match row {
                Some(row) => table.insert(id.as_bytes(), codec::encode(row).as_slice())?,
                None => table.remove(id.as_bytes())?,
            };
            Ok(())
        })
    }
}

fn load(store: &Store) -> Result<BTreeMap<BlobId, Row>, ClipsError> {
    store.read(|tx| {
        let mut rows = BTreeMap::new();
        for row in tx.open_table(BLOBS)?.iter()? {
            let (id, bytes) = row?;
            let row = codec::decode(bytes.value(), MAX_ROW).map_err(|error| Failure::Body(error.into()))?;
            rows.insert(BlobId::from_bytes(*id.value()), row);
        }
        Ok(rows)
    })
}

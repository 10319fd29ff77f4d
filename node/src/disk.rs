//! What the daemon's stores share: a redb file with one writer at a time that outlives a full disk.
//!
//! redb refuses everything after its first failed write, until the file is opened again. A disk that was full for a
//! minute must not end the daemon, so [`Store`] does that: a failed write changes nothing, and the next access finds
//! the file opened anew, repaired to its last commit.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, TableDefinition, WriteTransaction};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const SCHEMA_KEY: &str = "schema";
/// Memory that a store may keep of what is on its disk, bytes. All of them are small, and a daemon has several.
const CACHE_BYTES: usize = 8 << 20;

/// Whether the disk, a quota or a limit on file sizes is full: all three mean that what is there stays and nothing more
/// can be written.
#[must_use]
pub fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
}

/// Bytes that may still be written where `folder` lies.
///
/// # Errors
/// When the system does not tell.
pub fn available(folder: &Path) -> std::io::Result<u64> {
    let space = rustix::fs::statvfs(folder)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

/// Why a store could not be opened, read or written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has it open.
    #[error("{} is in use by another kinoflockd; stop that one, or give this one its own folder with --state", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A newer release wrote it.
    #[error("{} has schema {given}, this release reads up to {limit}; install the newer kinoflockd again", path.display())]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// The highest schema that this release reads.
        limit: u64,
        /// Its schema.
        given: u64,
    },
    /// The disk is full; nothing was changed.
    #[error("no space is left on the disk of {}; free some", path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// Anything else; nothing was changed.
    #[error("store {} failed: {text}", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
        /// What redb says.
        text: String,
    },
}

impl StoreError {
    /// A short stable name for metrics and `--json`.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "store_in_use",
            Self::NewerSchema { .. } => "store_newer",
            Self::DiskFull { .. } => "disk_full",
            Self::Failed { .. } => "store_failed",
        }
    }
}

/// A redb file.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    db: RwLock<Option<Database>>,
}

impl Store {
    /// Opens or makes the file. `tables` makes the tables of a new one, whose schema is then `schema`.
    ///
    /// # Errors
    /// When it is in use, of a newer schema, or the disk refuses.
    pub fn open(
        path: &Path,
        schema: u64,
        tables: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<Self, StoreError> {
        let db = create(path)?;
        let store = Self { path: path.to_owned(), db: RwLock::new(Some(db)) };
        match store.schema()? {
            Some(given) if given > schema => {
                Err(StoreError::NewerSchema { path: path.to_owned(), limit: schema, given })
            }
            Some(_) => Ok(store),
            None => {
                store.write(|tx| {
                    tx.open_table(META)?.insert(SCHEMA_KEY, schema)?;
                    tables(tx).map_err(Failure::from)
                })?;
                Ok(store)
            }
        }
    }

    /// Reads the last commit.
    ///
    /// # Errors
    /// Those of `body`, and when the file cannot be read.
    pub fn read<T, E: From<StoreError>>(
        &self,
        body: impl FnOnce(&ReadTransaction) -> Result<T, Failure<E>>,
    ) -> Result<T, E> {
        let guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let Some(db) = guard.as_ref() else {
            drop(guard);
            self.reopen()?;
            return self.read(body);
        };
        let result = db.begin_read().map_err(Failure::from).and_then(|tx| body(&tx));
        drop(guard);
        result.map_err(|failure| self.explain(failure))
    }

    /// One transaction: all of `body` or nothing, on disk when this returns.
    ///
    /// # Errors
    /// Those of `body`, and when the file cannot be written.
    pub fn write<T, E: From<StoreError>>(
        &self,
        body: impl FnOnce(&WriteTransaction) -> Result<T, Failure<E>>,
    ) -> Result<T, E> {
        if self.db.read().unwrap_or_else(PoisonError::into_inner).is_none() {
            self.reopen()?;
        }
        let guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let result = match guard.as_ref() {
            Some(db) => transact(db, body),
            None => Err(Failure::Redb(redb::Error::DatabaseClosed)),
        };
        drop(guard);
        if matches!(result, Err(Failure::Redb(_))) {
            self.close();
        }
        result.map_err(|failure| self.explain(failure))
    }

    fn schema(&self) -> Result<Option<u64>, StoreError> {
        self.read(|tx| match tx.open_table(META) {
            Ok(meta) => Ok(meta.get(SCHEMA_KEY)?.map(|schema| schema.value())),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(other) => Err(other.into()),
        })
    }

    fn close(&self) {
        *self.db.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn reopen(&self) -> Result<(), StoreError> {
        let mut slot = self.db.write().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(create(&self.path)?);
        }
        Ok(())
    }

    fn explain<E: From<StoreError>>(&self, failure: Failure<E>) -> E {
        match failure {
            Failure::Body(error) => error,
            Failure::Redb(error) => E::from(explain(&self.path, &error)),
        }
    }
}

/// What can go wrong inside a transaction: redb, or what the caller says.
#[derive(Debug)]
pub enum Failure<E> {
    /// The store failed.
    Redb(redb::Error),
    /// The caller's own error; nothing is written.
    Body(E),
}

macro_rules! from_redb {
    ($($error:ty),*) => {
        $(impl<E> From<$error> for Failure<E> {
            fn from(error: $error) -> Self {
                Self::Redb(error.into())
            }
        })*
    };
}
from_redb!(redb::Error, redb::StorageError, redb::TableError, redb::TransactionError, redb::CommitError);

fn transact<T, E>(
    db: &Database,
    body: impl FnOnce(&WriteTransaction) -> Result<T, Failure<E>>,
) -> Result<T, Failure<E>> {
    let transaction = db.begin_write()?;
    match body(&transaction) {
        Ok(value) => {
            transaction.commit()?;
            Ok(value)
        }
        Err(error) => {
            // An abort that fails leaves the transaction uncommitted, which is the same.
            let _ = transaction.abort();
            Err(error)
        }
    }
}

fn create(path: &Path) -> Result<Database, StoreError> {
    Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
        other => explain(path, &other.into()),
    })
}

fn explain(path: &Path, error: &redb::Error) -> StoreError {
    match error {
        redb::Error::Io(io) if is_full(io) => StoreError::DiskFull { path: path.to_owned() },
        other => StoreError::Failed { path: path.to_owned(), text: other.to_string() },
    }
}

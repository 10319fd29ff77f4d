//! The artist's store: files only, so that many client processes may use it at once.
//!
//! ```text
//! VERSION           version of this layout
//! jobs/ID.json      one record for each job: written whole, synced, renamed into place
//! clips/ID.json     one record for each clip that came by a ticket
//! blobs/ab/HEX      content by its blake3
//! tickets/HEX.json  networks that were joined
//! adapters/ID.json  what is kept of an adapter beside its weights, which are a blob
//! cards/ID.json     signed cards of adapters
//! lists/NAME.json   signed lists that are subscribed to
//! nodes/ID.json     what was seen of a node; may be removed at any time
//! met.json          nodes that were met, for when every other way is gone; may be removed at any time
//! index.json        what a listing shows; may be deleted at any time, it is made again from the records
//! tmp/              what is being written; never read
//! lock              held while a record is read, changed and written again
//! ```
//! A reader sees the old record or the new one, never half of one. The index is only believed where a record file
//! still has the size, time and number that the index saw, so whoever wrote it last did no harm.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use kinoflock_protocol::{BlobId, ClipId, JobId, NodeId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::route::experience::Experience;

mod adapters;
mod index;
mod lists;
mod met;
mod record;

pub use adapters::AdapterRecord;
pub use index::{ClipEntry, JobEntry};
pub use lists::ListRecord;
pub use met::{MAX_MET, MetNode};
pub use record::{
    Auditor, Audits, BatchKey, ClipRecord, Custodian, Former, Holder, JobRecord, MAX_VERDICTS, RecordError,
    RecordState,
};

/// The version of the layout that this release reads and writes.
pub const STORE_VERSION: u32 = 1;
/// What a crashed process left under `tmp` is removed after this.
const TEMPORARY_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Fewest characters of an id that are taken for one.
const MIN_PREFIX: usize = 3;

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A newer release made it.
    #[error(
        "the store at {} has version {given}, this release reads up to {limit}: update kinoflock, or name another folder with --store",
        path.display()
    )]
    Newer {
        /// The store.
        path: PathBuf,
        /// Its version.
        given: u32,
        /// The greatest version that is read.
        limit: u32,
    },
    /// Its version file is damaged.
    #[error("{} holds {given:?} instead of a version number: is this a kinoflock store?", path.display())]
    NoVersion {
        /// The version file.
        path: PathBuf,
        /// What it holds.
        given: String,
    },
    /// No room.
    #[error(
        "disk full: {} could not be written; free some space and try again, what was there is unharmed",
        path.display()
    )]
    DiskFull {
        /// What was to be written.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A record that cannot be read.
    #[error("the record {} is damaged: {reason}", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A blob whose bytes changed on disk.
    #[error("{} is damaged: its hash is {given}, it should be {expected}; fetch it again with: kinoflock get {}", path.display(), ClipId::from(*expected))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: BlobId,
        /// What it is.
        given: BlobId,
    },
    /// Nothing by that name.
    #[error("no {what} {given:?} here; see: kinoflock {list}")]
    NotFound {
        /// `job` or `clip`.
        what: &'static str,
        /// What was asked for.
        given: String,
        /// The command that lists them.
        list: &'static str,
    },
    /// Several begin so.
    #[error("{matches} {what}s begin with {given:?}; give more characters of the one you mean")]
    Ambiguous {
        /// `job` or `clip`.
        what: &'static str,
        /// What was asked for.
        given: String,
        /// How many match.
        matches: usize,
    },
}

impl StoreError {
    /// Stable name for `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Newer { .. } => "store_newer",
            Self::NoVersion { .. } => "store_no_version",
            Self::DiskFull { .. } => "disk_full",
            Self::Io { .. } => "store_io",
            Self::Record { .. } => "store_record",
            Self::Damaged { .. } => "store_damaged",
            Self::NotFound { .. } => "not_found",
            Self::Ambiguous { .. } => "ambiguous",
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io { action, path, source },
        }
    }
}

/// The store in one folder.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store at `root`; makes it where there is none.
    ///
    /// # Errors
    /// A store of a newer version, or a folder that cannot be written.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        make_private_dir(&root)?;
        let store = Self { root };
        store.check_version()?;
        for folder in [
            "jobs",
            "clips",
            "blobs",
            "tickets",
            "nodes",
            lists::FOLDER,
            adapters::FOLDER,
            adapters::CARDS,
            "tmp",
        ] {
            make_private_dir(&store.root.join(folder))?;
        }
        store.sweep();
        Ok(store)
    }

    /// Its folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes a new job.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn insert_job(&self, record: &JobRecord) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        self.write_json(&self.job_path(&record.job), record)
    }

    /// The record of a job.
    ///
    /// # Errors
    /// `NotFound`, a damaged record, or a disk that refuses.
    pub fn job(&self, id: &JobId) -> Result<JobRecord, StoreError> {
        read_json(&self.job_path(id))?.ok_or_else(|| no_job(&id.to_string()))
    }

    /// Reads a job's record, changes it, and writes it again; nobody else changes it meanwhile.
    ///
    /// # Errors
    /// As [`Store::job`] and [`Store::insert_job`].
    pub fn update_job(
        &self,
        id: &JobId,
        change: impl FnOnce(&mut JobRecord),
    ) -> Result<JobRecord, StoreError> {
        let _lock = self.lock()?;
        let mut record = self.job(id)?;
        change(&mut record);
        record.updated_at = crate::now();
        self.write_json(&self.job_path(id), &record)?;
        Ok(record)
    }

    /// The job whose id is, or begins with, `text`.
    ///
    /// # Errors
    /// `NotFound`, `Ambiguous`.
    pub fn find_job(&self, text: &str) -> Result<JobId, StoreError> {
        if let Ok(id) = text.parse() {
            return self.job(&id).map(|record| record.job);
        }
        let ids = self.jobs()?.into_iter().map(|entry| entry.job);
        by_prefix("job", "ps --all", JobId::PREFIX, text, ids)
    }

    /// The clip whose id is, or begins with, `text`; or that of the job so named.
    ///
    /// # Errors
    /// `NotFound`, `Ambiguous`.
    pub fn find_clip(&self, text: &str) -> Result<ClipId, StoreError> {
        if let Ok(id) = text.parse() {
            return Ok(id);
        }
        if text.starts_with(JobId::PREFIX) {
            let record = self.job(&self.find_job(text)?)?;
            let none = StoreError::NotFound { what: "clip of job", given: text.to_owned(), list: "ps --all" };
            return record.clip.map(|clip| clip.id.into()).ok_or(none);
        }
        let mut ids: Vec<_> = self.clips()?.into_iter().map(|entry| entry.clip).collect();
        ids.sort_unstable();
        ids.dedup();
        by_prefix("clip", "ls", ClipId::PREFIX, text, ids.into_iter())
    }

    /// Removes a job's record; its clip stays.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove_job(&self, id: &JobId) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        remove(&self.job_path(id))
    }

    /// Remembers a clip that came by a ticket.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn insert_clip(&self, record: &ClipRecord) -> Result<(), StoreError> {
        self.write_json(&self.clip_path(&record.clip), record)
    }

    /// What is remembered of a clip that came by a ticket.
    ///
    /// # Errors
    /// A damaged record, or a disk that refuses.
    pub fn clip_record(&self, id: &ClipId) -> Result<Option<ClipRecord>, StoreError> {
        read_json(&self.clip_path(id))
    }

    /// The job that a clip came from.
    ///
    /// # Errors
    /// As [`Store::jobs`].
    pub fn job_of_clip(&self, clip: &ClipId) -> Result<Option<JobRecord>, StoreError> {
        let entry = self.jobs()?.into_iter().find(|entry| entry.clip == Some(*clip));
        entry.map(|entry| self.job(&entry.job)).transpose()
    }

    /// Removes a clip's bytes and what is remembered of it by ticket.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove_clip(&self, id: &ClipId) -> Result<(), StoreError> {
        remove(&self.clip_path(id))?;
        remove(&self.blob_path(&(*id).into()))
    }

    /// Whether these bytes are here.
    #[must_use]
    pub fn has_blob(&self, id: &BlobId) -> bool {
        self.blob_path(id).is_file()
    }

    /// Where these bytes are, or would be.
    #[must_use]
    pub fn blob_path(&self, id: &BlobId) -> PathBuf {
        let hex = id.to_hex();
        self.root.join("blobs").join(&hex[..2]).join(hex)
    }

    /// Bytes from the store, checked against their hash.
    ///
    /// # Errors
    /// `NotFound`, `Damaged`, or a disk that refuses.
    pub fn read_blob(&self, id: &BlobId) -> Result<Vec<u8>, StoreError> {
        let path = self.blob_path(id);
        let bytes = fs::read(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                StoreError::NotFound { what: "content", given: id.to_string(), list: "ls" }
            }
            _ => StoreError::io("read", &path)(error),
        })?;
        let given = BlobId::of(&bytes);
        if given != *id {
            return Err(StoreError::Damaged { path, expected: *id, given });
        }
        Ok(bytes)
    }

    /// Stores bytes; gives their id. Storing the same again changes nothing.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn insert_blob(&self, bytes: &[u8]) -> Result<BlobId, StoreError> {
        let id = BlobId::of(bytes);
        if self.read_blob(&id).is_err() {
            self.write_whole(&self.blob_path(&id), bytes)?;
        }
        Ok(id)
    }

    /// Removes content that is of no more use.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove_blob(&self, id: &BlobId) -> Result<(), StoreError> {
        remove(&self.blob_path(id))
    }

    /// Takes over a file whose content was verified to be `id`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn adopt_blob(&self, id: &BlobId, file: &Path) -> Result<PathBuf, StoreError> {
        let path = self.blob_path(id);
        make_private_dir(path.parent().unwrap_or(&self.root))?;
        fs::rename(file, &path).map_err(StoreError::io("move the clip to", &path))?;
        sync_folder(&path);
        Ok(path)
    }

    /// A file under `tmp` for a blob that is being fetched. Its name is the same every time, so that a broken fetch
    /// goes on; with `own` it is this process's alone.
    #[must_use]
    pub fn fetch_path(&self, id: &BlobId, own: bool) -> PathBuf {
        let hex = id.to_hex();
        let name = if own { format!("{hex}-{}", unique()) } else { hex };
        self.root.join("tmp").join(name)
    }

    /// Remembers a text under `tickets`, once.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn insert_ticket(&self, text: &str) -> Result<(), StoreError> {
        let name = BlobId::of(text.as_bytes()).to_hex();
        self.write_json(&self.root.join("tickets").join(format!("{}.json", &name[..32])), &text)
    }

    /// Every ticket that was remembered, in the order of their files' names.
    ///
    /// # Errors
    /// When the folder cannot be read. A damaged file is passed over.
    pub fn tickets(&self) -> Result<Vec<String>, StoreError> {
        let mut names = file_names(&self.root.join("tickets"))?;
        names.sort();
        let read = |name: &String| read_json::<String>(&self.root.join("tickets").join(name)).ok().flatten();
        Ok(names.iter().filter_map(read).collect())
    }

    /// What was seen of a node. One that was never seen, or whose file is damaged, is a new one.
    #[must_use]
    pub fn experience(&self, node: &NodeId) -> Experience {
        read_json(&self.node_path(node)).ok().flatten().unwrap_or_default()
    }

    /// Remembers what was seen of a node. Of two processes that do so at once one may be forgotten.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn keep_experience(&self, node: &NodeId, seen: &Experience) -> Result<(), StoreError> {
        self.write_json(&self.node_path(node), seen)
    }

    fn node_path(&self, node: &NodeId) -> PathBuf {
        self.root.join("nodes").join(format!("{node}.json"))
    }

    pub(crate) fn job_path(&self, id: &JobId) -> PathBuf {
        self.root.join("jobs").join(format!("{id}.json"))
    }

    fn clip_path(&self, id: &ClipId) -> PathBuf {
        self.root.join("clips").join(format!("{id}.json"))
    }

    fn lock(&self) -> Result<File, StoreError> {
        let path = self.root.join("lock");
        let file = private(OpenOptions::new().create(true).truncate(false).write(true))
            .open(&path)
            .map_err(StoreError::io("open", &path))?;
        file.lock().map_err(StoreError::io("lock", &path))?;
        Ok(file)
    }

    fn check_version(&self) -> Result<(), StoreError> {
        let path = self.root.join("VERSION");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make_private_dir(&self.root.join("tmp"))?;
                return self.write_whole(&path, format!("{STORE_VERSION}\n").as_bytes());
            }
            Err(error) => return Err(StoreError::io("read", &path)(error)),
        };
        match text.trim().parse::<u32>() {
            Ok(given) if given > STORE_VERSION => {
                Err(StoreError::Newer { path: self.root.clone(), given, limit: STORE_VERSION })
            }
            Ok(_) => Ok(()),
            Err(_) => Err(StoreError::NoVersion { path, given: text.chars().take(40).collect() }),
        }
    }

    pub(crate) fn write_json<T: Serialize>(&self, path: &Path, value: &T) -> Result<(), StoreError> {
        let json = serde_json::to_vec_pretty(value)
            .map_err(|error| StoreError::Record { path: path.to_owned(), reason: error.to_string() })?;
        self.write_whole(path, &json)
    }

    fn write_whole(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        make_private_dir(path.parent().unwrap_or(&self.root))?;
        write_whole(&self.root.join("tmp").join(unique()), path, bytes)
    }

    /// Removes what crashed processes left long ago. Whatever goes wrong here can wait for the next time.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(self.root.join("tmp")) else { return };
        for entry in entries.flatten() {
            let modified = entry.metadata().and_then(|data| data.modified());
            let age = modified.ok().and_then(|time| SystemTime::now().duration_since(time).ok());
            if age.is_some_and(|age| age > TEMPORARY_LIFE) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Writes a file whole: under a temporary name in the same file system, synced, renamed.
pub(crate) fn write_whole(temporary: &Path, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let written = (|| {
        let mut file = private(OpenOptions::new().create_new(true).write(true)).open(temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        fs::rename(temporary, path)
    })();
    if let Err(error) = written {
        let _ = fs::remove_file(temporary);
        return Err(StoreError::io("write", path)(error));
    }
    sync_folder(path);
    Ok(())
}

/// A name that no other process and no other call has.
pub(crate) fn unique() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut random = [0; 6];
    // Without random bytes, process and count alone must do.
    let _ = getrandom::fill(&mut random);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{}-{count}-{}", std::process::id(), hex::encode(random))
}

fn by_prefix<T: std::fmt::Display + Copy>(
    what: &'static str,
    list: &'static str,
    head: &str,
    text: &str,
    ids: impl Iterator<Item = T>,
) -> Result<T, StoreError> {
    let wanted = text.strip_prefix(head).unwrap_or(text).to_ascii_lowercase();
    let not_found = || StoreError::NotFound { what, given: text.to_owned(), list };
    if wanted.len() < MIN_PREFIX {
        return Err(not_found());
    }
    let matching: Vec<T> = ids.filter(|id| id.to_string()[head.len()..].starts_with(&wanted)).collect();
    match matching[..] {
        [] => Err(not_found()),
        [one] => Ok(one),
        _ => Err(StoreError::Ambiguous { what, given: text.to_owned(), matches: matching.len() }),
    }
}

fn no_job(text: &str) -> StoreError {
    StoreError::NotFound { what: "job", given: text.to_owned(), list: "ps --all" }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("read", path)(error)),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| StoreError::Record { path: path.to_owned(), reason: error.to_string() })
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(StoreError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

fn file_names(folder: &Path) -> Result<Vec<String>, StoreError> {
    let entries = fs::read_dir(folder).map_err(StoreError::io("list", folder))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// A folder that only its owner may enter, where the system knows of such.
pub(crate) fn make_private_dir(path: &Path) -> Result<(), StoreError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(StoreError::io("make the folder", path))
}

/// Records hold prompts: only their owner may read them, where the system knows of such.
#[cfg(unix)]
fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600)
}

#[cfg(not(unix))]
fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    options
}

/// A rename lasts through a power cut only once its folder is synced.
#[cfg(unix)]
fn sync_folder(path: &Path) {
    // A file system that cannot sync a folder has no better way to be asked.
    let _ = path.parent().map(|folder| File::open(folder).and_then(|folder| folder.sync_all()));
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) {}

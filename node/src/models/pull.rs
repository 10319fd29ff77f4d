//! Takes a known model from the hub into the store.
//!
//! ```text
//! <models>/.pull-<name>/files/...        the published layout, as it fills; `.part` files are not whole yet
//!                      /have.json        which content lies under which path
//!                      /lock             held by the pull that runs
//! ```
//!
//! The configuration comes first, so that a model that this release cannot run is refused before its weights. Every file
//! is hashed as it is written and has its name only once length and hash are right. What is there when a pull breaks off
//! is where the next one goes on, even if the repository has moved meanwhile: files are told apart by their content.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::hub::{FileHash, Hub, HubError, Listing, RemoteFile};
use super::known::KnownModel;
use super::{CARD, Model, ModelStore, ModelsError, file_error, manifest};
use crate::disk;

mod file;

/// How the name of a folder begins whose model is being pulled.
const PULL: &str = ".pull-";
const HAVE: &str = "have.json";
/// Beside a pulled model's manifest: where it came from.
const SOURCE: &str = "source.json";
/// Endings of files that a model may need, beside its weights.
const SMALL: &[&str] = &["json", "model", "txt"];
/// Endings of weights.
const WEIGHTS: &[&str] = &["safetensors", "bin"];
/// Room that is left on the disk, bytes: others write there too.
const SPARE: u64 = 256 << 20;
/// Waits before a broken transfer is taken up again; one that brings something starts them anew.
pub const PAUSES: &[Duration] = &[
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_secs(30),
];

/// Why a model was not pulled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The store.
    #[error(transparent)]
    Models(#[from] ModelsError),
    /// A model that this release cannot run.
    #[error("{name} cannot be pulled: {reason}")]
    Hindered {
        /// Which.
        name: String,
        /// Why.
        reason: String,
    },
    /// The repository lacks what the list says it has.
    #[error(
        "{repository} at {commit} has no {what}; the list of known models may be older than the repository"
    )]
    Lacking {
        /// Repository.
        repository: String,
        /// Commit.
        commit: String,
        /// What is lacking.
        what: String,
    },
    /// Another file than the one that is known.
    #[error("{path} is {told} on the hub, by {by} it is {expected}: it is not fetched")]
    OtherFile {
        /// The file.
        path: String,
        /// Hash that it should have.
        expected: FileHash,
        /// Who says so.
        by: &'static str,
        /// Hash that the hub tells.
        told: FileHash,
    },
    /// The disk.
    #[error(
        "{} more bytes are needed for {}, and {SPARE} to spare; the disk has {available}",
        needed, folder.display()
    )]
    Space {
        /// The store.
        folder: PathBuf,
        /// Bytes that are to come.
        needed: u64,
        /// Bytes that can be had.
        available: u64,
    },
    /// Another pull of the same model runs.
    #[error("another process pulls {name}")]
    Running {
        /// Which model.
        name: String,
    },
    /// The transfer ended too early.
    #[error("{path} broke off after {given} of {len} bytes")]
    Cut {
        /// The file.
        path: String,
        /// Bytes that it has.
        len: u64,
        /// Bytes that came.
        given: u64,
    },
    /// More bytes than there should be.
    #[error("{path} has {len} bytes, more came")]
    TooLong {
        /// The file.
        path: String,
        /// Bytes that it has.
        len: u64,
    },
    /// Other bytes than there should be.
    #[error("{path} came with wrong bytes: {expected} was expected, {found} found; nothing of it is kept")]
    Wrong {
        /// The file.
        path: String,
        /// Hash that it should have.
        expected: FileHash,
        /// Hash that it has.
        found: FileHash,
    },
}

impl PullError {
    /// Stable name for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Hub(error) => error.code(),
            Self::Models(error) => error.code(),
            Self::Hindered { .. } => "pull_hindered",
            Self::Lacking { .. } => "pull_lacking",
            Self::OtherFile { .. } => "pull_other_file",
            Self::Space { .. } => "disk_full",
            Self::Running { .. } => "pull_running",
            Self::Cut { .. } => "pull_cut",
            Self::TooLong { .. } => "pull_too_long",
            Self::Wrong { .. } => "pull_wrong",
        }
    }

    /// Whether the transfer may be taken up again.
    fn is_passing(&self) -> bool {
        match self {
            Self::Hub(error) => error.is_passing(),
            Self::Cut { .. } => true,
            _ => false,
        }
    }
}

/// What is told while a model comes.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A file begins, `had` bytes of it being here.
    File {
        /// Which.
        file: &'a RemoteFile,
        /// Bytes that are here.
        had: u64,
    },
    /// So many bytes more are here; fewer, if some had to be dropped.
    Bytes(i64),
    /// The transfer broke and is taken up again after a pause.
    Again {
        /// What happened.
        error: &'a PullError,
        /// The pause.
        pause: Duration,
    },
    /// All is here; it is hashed once more and taken into the store.
    Importing,
}

/// What a pull will fetch.
#[derive(Debug, Clone)]
pub struct Plan {
    known: &'static KnownModel,
    /// The commit.
    pub commit: String,
    /// Whether the hub gives it to those alone who accepted its terms there.
    pub gated: bool,
    /// The files, small ones first.
    pub files: Vec<RemoteFile>,
}

/// Where a model came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its name in the list.
    pub name: String,
    /// Repository.
    pub repository: String,
    /// Commit.
    pub commit: String,
}

impl Plan {
    /// Asks the hub for a model's files, at the list's revision or another.
    ///
    /// # Errors
    /// When the model cannot be run here, the hub refuses, or has something else than the list says.
    pub fn new(hub: &Hub, known: &'static KnownModel, revision: Option<&str>) -> Result<Self, PullError> {
        check(known)?;
        let listing = hub.listing(&known.repository, revision.unwrap_or(&known.revision))?;
        let mut files = needed(known, &listing)?;
        if revision.is_none() {
            files.iter_mut().try_for_each(|file| compare(known, file))?;
        }
        Ok(Self { known, commit: listing.commit, gated: listing.gated, files })
    }

    /// Bytes of all files.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.files.iter().map(|file| file.len).fold(0, u64::saturating_add)
    }

    /// Bytes of them that are in a store already.
    #[must_use]
    pub fn had(&self, store: &ModelStore) -> u64 {
        let work = Work::at(store, &self.known.name);
        self.files.iter().map(|file| work.had(file, &self.commit)).sum()
    }
}

/// Whether this release can run a model at all.
///
/// # Errors
/// [`PullError::Hindered`].
pub fn check(known: &KnownModel) -> Result<(), PullError> {
    match known.hindrance() {
        Some(reason) => Err(PullError::Hindered { name: known.name.clone(), reason }),
        None => Ok(()),
    }
}

/// The same of what its configuration says, now that it is here. A single file holds its own.
fn check_configuration(known: &KnownModel, files: &Path) -> Result<(), PullError> {
    if known.checkpoint.is_some() {
        return Ok(());
    }
    let hindered =
        |error: ModelsError| PullError::Hindered { name: known.name.clone(), reason: error.to_string() };
    manifest::work_of(files).map(drop).map_err(hindered)
}

/// Fetches what a plan lists and imports it.
///
/// # Errors
/// See [`PullError`]. What is whole stays for the next try.
pub fn pull(
    hub: &Hub,
    store: &ModelStore,
    plan: &Plan,
    pauses: &[Duration],
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Model, PullError> {
    let known = plan.known;
    let mut work = Work::at(store, &known.name);
    let _lock = work.lock(&known.name)?;
    room(store, plan.total(), plan.total() - plan.had(store))?;
    let mut looked_at = false;
    for file in &plan.files {
        if !looked_at && is_weights(&file.path) {
            // Everything small is here.
            check_configuration(known, &work.files())?;
            looked_at = true;
        }
        work.fetch(hub, known, &plan.commit, file, pauses, tell).map_err(|error| full(store, plan, error))?;
    }
    tell(Event::Importing);
    work.leave_only(&plan.files)?;
    let made = manifest::of_folder(&work.files())?;
    let card = known.card(made.id(), crate::run::unix_now());
    let text = serde_json::to_vec_pretty(&card).expect("invariant: wire types always encode");
    let path = work.files().join(CARD);
    fs::write(&path, text).map_err(file_error(&path))?;
    let model = store.import(&work.files(), &known.name)?;
    let origin = Origin {
        name: known.name.clone(),
        repository: known.repository.clone(),
        commit: plan.commit.clone(),
    };
    let path = model.dir.with_file_name(SOURCE);
    let text = serde_json::to_vec_pretty(&origin).expect("invariant: texts always encode");
    fs::write(&path, text).map_err(file_error(&path))?;
    fs::remove_dir_all(&work.folder).map_err(file_error(&work.folder))?;
    Ok(model)
}

/// Where a model of the store came from, if it was pulled.
#[must_use]
pub fn origin(model: &Model) -> Option<Origin> {
    let text = fs::read_to_string(model.dir.with_file_name(SOURCE)).ok()?;
    serde_json::from_str(&text).ok()
}

/// Names of models of which something is here and not all, with the bytes that are.
///
/// # Errors
/// When the store cannot be read.
pub fn unfinished(store: &ModelStore) -> Result<Vec<(String, u64)>, ModelsError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(&store.folder).map_err(file_error(&store.folder))? {
        let entry = entry.map_err(file_error(&store.folder))?;
        if let Some(name) = entry.file_name().to_str().and_then(|name| name.strip_prefix(PULL)) {
            found.push((name.to_owned(), size_of(&entry.path().join("files"))));
        }
    }
    found.sort();
    Ok(found)
}

/// Drops what is here of a model that was not pulled to its end. Tells whether there was anything.
///
/// # Errors
/// When a pull of it runs, or the disk refuses.
pub fn discard(store: &ModelStore, name: &str) -> Result<bool, PullError> {
    let work = Work::at(store, name);
    if !super::is_name(name) || !work.folder.is_dir() {
        return Ok(false);
    }
    let _lock = work.lock(name)?;
    fs::remove_dir_all(&work.folder).map_err(file_error(&work.folder))?;
    Ok(true)
}

/// The files of a repository that a model needs, small ones first.
fn needed(known: &KnownModel, listing: &Listing) -> Result<Vec<RemoteFile>, PullError> {
    let lacking = |what: &str| PullError::Lacking {
        repository: known.repository.clone(),
        commit: listing.commit.clone(),
        what: what.to_owned(),
    };
    let has = |path: &str| listing.files.iter().any(|file| file.path == path);
    let mut files = Vec::new();
    for folder in &known.folders {
        let before = files.len();
        let inside = listing.files.iter().filter(|file| {
            let name = file.path.strip_prefix(folder.as_str()).and_then(|rest| rest.strip_prefix('/'));
            // The whole beside its shards, or pickled beside plain, would be the same weights twice.
            let twice = has(&format!("{}.index.json", file.path))
                || file.path.strip_suffix(".bin").is_some_and(|stem| has(&format!("{stem}.safetensors")));
            name.is_some_and(is_needed) && !twice
        });
        files.extend(inside.cloned());
        if files.len() == before {
            return Err(lacking(&format!("folder {folder}")));
        }
    }
    let file = |path: &str| listing.files.iter().find(|file| file.path == path).cloned();
    match &known.checkpoint {
        Some(path) => files.push(file(path).ok_or_else(|| lacking(path))?),
        None => files.extend(file("model_index.json")),
    }
    if !files.iter().any(|file| is_weights(&file.path)) {
        return Err(lacking("weights"));
    }
    files.sort_by(|a, b| (is_weights(&a.path), &a.path).cmp(&(is_weights(&b.path), &b.path)));
    files.dedup_by(|a, b| a.path == b.path);
    Ok(files)
}

/// Whether a file of a component belongs to it: plain names, and no variant in another number format.
fn is_needed(name: &str) -> bool {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let Some((stem, ending)) = name.rsplit_once('.').filter(|(stem, _)| plain && !stem.is_empty()) else {
        return false;
    };
    let index = stem.strip_suffix(".index").and_then(|stem| stem.rsplit_once('.'));
    match index {
        Some((stem, kind)) => ending == "json" && WEIGHTS.contains(&kind) && !stem.contains('.'),
        None if WEIGHTS.contains(&ending) => !stem.contains('.'),
        // `model.safetensors.index.fp16.json` is a variant's.
        None => SMALL.contains(&ending) && !stem.contains(".index."),
    }
}

fn is_weights(path: &str) -> bool {
    path.rsplit_once('.').is_some_and(|(_, ending)| WEIGHTS.contains(&ending))
}

/// Compares a file with what is known of it; where the hub tells no hash, the known one counts.
fn compare(known: &KnownModel, file: &mut RemoteFile) -> Result<(), PullError> {
    let Some(expected) = known.sha256.get(&file.path).and_then(|hex| FileHash::from_hex(hex)) else {
        return Ok(());
    };
    match file.hash {
        Some(told) if told != expected => {
            let by = "the list of known models (--revision takes what is there)";
            Err(PullError::OtherFile { path: file.path.clone(), expected, by, told })
        }
        _ => {
            file.hash = Some(expected);
            Ok(())
        }
    }
}

/// Whether a model of `given` bytes has room in the store's limit, and the `needed` that are to come on the disk.
///
/// # Errors
/// [`ModelsError::StoreFull`], [`PullError::Space`], and when the disk does not tell.
pub fn room(store: &ModelStore, given: u64, needed: u64) -> Result<(), PullError> {
    let used = store.used()?;
    if let Some(limit) = store.limit.filter(|limit| used.saturating_add(given) > *limit) {
        return Err(ModelsError::StoreFull { limit, used, given }.into());
    }
    let available = disk::available(&store.folder).map_err(file_error(&store.folder))?;
    if needed.saturating_add(SPARE) > available {
        return Err(PullError::Space { folder: store.folder.clone(), needed, available });
    }
    Ok(())
}

fn full(store: &ModelStore, plan: &Plan, error: PullError) -> PullError {
    match error {
        PullError::Models(ModelsError::File { source, .. }) if disk::is_full(&source) => {
            ModelsError::DiskFull { path: store.folder.clone(), needed: plan.total() }.into()
        }
        other => other,
    }
}

/// The folder of a pull.
struct Work {
    folder: PathBuf,
    /// Path -> content that is whole there.
    have: BTreeMap<String, String>,
}

impl Work {
    fn at(store: &ModelStore, name: &str) -> Self {
        let folder = store.folder.join(format!("{PULL}{name}"));
        let have = fs::read(folder.join(HAVE)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { folder, have: have.unwrap_or_default() }
    }

    fn files(&self) -> PathBuf {
        self.folder.join("files")
    }

    fn path(&self, file: &RemoteFile) -> PathBuf {
        self.files().join(&file.path)
    }

    /// Content under way lies beside the place where it will be, under its own name.
    fn part(&self, file: &RemoteFile, commit: &str) -> PathBuf {
        let content = content(file, commit);
        self.files().join(format!("{}.{}.part", file.path, &content[..16.min(content.len())]))
    }

    /// Bytes of a file that are here.
    fn had(&self, file: &RemoteFile, commit: &str) -> u64 {
        if self.is_whole(file, commit) {
            return file.len;
        }
        fs::metadata(self.part(file, commit)).map_or(0, |part| part.len().min(file.len))
    }

    fn is_whole(&self, file: &RemoteFile, commit: &str) -> bool {
        let same = self.have.get(&file.path).is_some_and(|have| *have == content(file, commit));
        same && fs::metadata(self.path(file)).is_ok_and(|found| found.len() == file.len)
    }

    fn note_whole(&mut self, file: &RemoteFile, commit: &str) -> Result<(), ModelsError> {
        self.have.insert(file.path.clone(), content(file, commit));
        let path = self.folder.join(HAVE);
        let text = serde_json::to_vec_pretty(&self.have).expect("invariant: texts always encode");
        let new = path.with_extension("new");
        fs::write(&new, text).and_then(|()| fs::rename(&new, &path)).map_err(file_error(&path))
    }

    fn lock(&self, name: &str) -> Result<File, PullError> {
        let files = self.files();
        fs::create_dir_all(&files).map_err(file_error(&files))?;
        let path = self.folder.join("lock");
        let lock = File::create(&path).map_err(file_error(&path))?;
        lock.try_lock().map_err(|_| PullError::Running { name: name.to_owned() })?;
        Ok(lock)
    }

    /// Removes what an older commit had and this one has not.
    fn leave_only(&self, files: &[RemoteFile]) -> Result<(), ModelsError> {
        let stale = self.have.keys().filter(|path| !files.iter().any(|file| file.path == **path));
        for path in stale.map(|path| self.files().join(path)) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(file_error(&path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Names a file's content: its hash, or where none is known the commit that has it.
fn content(file: &RemoteFile, commit: &str) -> String {
    file.hash.map_or_else(|| format!("{commit} {}", file.path), |hash| hash.hex())
}

fn size_of(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => size_of(&entry.path()),
            Ok(found) => found.len(),
            Err(_) => 0,
        })
        .sum()
}

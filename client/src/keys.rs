//! The artist's key: one file with a 32-byte seed that only its owner may read.
//!
//! A key that others on the machine can read is refused, not silently repaired: it may already have been copied, and
//! its owner should know. An existing key is never overwritten.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use kinoflock_protocol::Keypair;
use zeroize::Zeroizing;

use crate::store::{make_private_dir, unique};

mod access;
#[cfg(feature = "cli")]
pub mod words;

/// Length of the seed in bytes.
pub const SEED_BYTES: usize = 32;

/// A seed, wiped from memory when it is dropped.
pub type Seed = Zeroizing<[u8; SEED_BYTES]>;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// None yet.
    #[error("no key at {}; make one with: kinoflock key new", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// There is one already.
    #[error("{} exists already and will not be overwritten; move it away first", path.display())]
    Exists {
        /// The existing file.
        path: PathBuf,
    },
    /// Others may read it.
    #[error("{} is open to others ({given}); others may have copied it. Close it with: {remedy}", path.display())]
    Open {
        /// The key.
        path: PathBuf,
        /// Who may read it.
        given: String,
        /// The command that closes it.
        remedy: String,
    },
    /// It is no regular file.
    #[error("{} is no regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// It has the wrong length.
    #[error("{} has {given} bytes, a key has {limit}: it is damaged or no key; restore it from your words with: kinoflock key restore", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes that a key has.
        limit: usize,
        /// Bytes found.
        given: u64,
    },
    /// The words are no key.
    #[error("these words are no key: {reason}")]
    Words {
        /// What is wrong.
        reason: String,
    },
    /// The file's permissions could not be read or set.
    #[error("cannot {action} the permissions of {}: {reason}", path.display())]
    Permissions {
        /// `read` or `set`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
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
    /// The system gave no random bytes.
    #[error("no random bytes from the system: {0}")]
    Random(getrandom::Error),
}

impl KeyError {
    /// Stable name for `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "key_missing",
            Self::Exists { .. } => "key_exists",
            Self::Open { .. } => "key_open",
            Self::NotAFile { .. } => "key_not_a_file",
            Self::Length { .. } => "key_length",
            Self::Words { .. } => "key_words",
            Self::Permissions { .. } => "key_permissions",
            Self::Io { .. } => "key_io",
            Self::Random(_) => "random",
        }
    }
}

/// A fresh random seed.
///
/// # Errors
/// When the system gives no random bytes.
pub fn new_seed() -> Result<Seed, KeyError> {
    let mut seed = Zeroizing::new([0; SEED_BYTES]);
    getrandom::fill(seed.as_mut_slice()).map_err(KeyError::Random)?;
    Ok(seed)
}

/// Reads a key.
///
/// # Errors
/// When it is missing, open to others, unreadable, or of the wrong length.
pub fn load(path: &Path) -> Result<Keypair, KeyError> {
    let seed = load_seed(path)?;
    Ok(Keypair::from_seed(&seed))
}

/// Reads a key, or makes one where there is none. Says whether it was made.
///
/// # Errors
/// As [`load`], or when it cannot be written.
pub fn load_or_create(path: &Path) -> Result<(Keypair, bool), KeyError> {
    match load(path) {
        Err(KeyError::Missing { .. }) => match save(path, &new_seed()?) {
            Ok(()) => Ok((load(path)?, true)),
            // Another process made it in the same moment.
            Err(KeyError::Exists { .. }) => Ok((load(path)?, false)),
            Err(error) => Err(error),
        },
        other => Ok((other?, false)),
    }
}

/// Reads a key's seed.
///
/// # Errors
/// As [`load`].
pub fn load_seed(path: &Path) -> Result<Seed, KeyError> {
    let io = |action| move |source| KeyError::Io { action, path: path.to_owned(), source };
    let mut file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => KeyError::Missing { path: path.to_owned() },
        _ => io("read")(error),
    })?;
    // Asked of the open file, so that nobody can swap it in between.
    let data = file.metadata().map_err(io("look at"))?;
    if !data.is_file() {
        return Err(KeyError::NotAFile { path: path.to_owned() });
    }
    access::refuse_open(path, &data)?;
    if data.len() != SEED_BYTES as u64 {
        return Err(KeyError::Length { path: path.to_owned(), limit: SEED_BYTES, given: data.len() });
    }
    let mut seed = Zeroizing::new([0; SEED_BYTES]);
    file.read_exact(seed.as_mut_slice()).map_err(io("read"))?;
    Ok(seed)
}

/// Writes a key that only its owner may read; never over an existing file.
///
/// # Errors
/// When there is a file already, or the disk refuses.
pub fn save(path: &Path, seed: &Seed) -> Result<(), KeyError> {
    let io = |action| move |source| KeyError::Io { action, path: path.to_owned(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_private_dir(folder).map_err(|error| io("make the folder of")(std::io::Error::other(error)))?;
    let temporary = folder.join(format!(".key-{}", unique()));
    let written = (|| {
        let mut options = OpenOptions::new();
        let mut file =
            access::private(options.write(true).create_new(true)).open(&temporary).map_err(io("write"))?;
        access::close(&temporary)?;
        file.write_all(seed.as_slice()).map_err(io("write"))?;
        file.sync_all().map_err(io("write"))?;
        place(&temporary, path)
    })();
    // Linked into place or not, the temporary name has served.
    let _ = fs::remove_file(&temporary);
    written
}

/// Gives a written file its name, unless that is taken.
fn place(temporary: &Path, path: &Path) -> Result<(), KeyError> {
    match fs::hard_link(temporary, path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            Err(KeyError::Exists { path: path.to_owned() })
        }
        // A file system without links: the check and the rename leave a moment for another process.
        Err(_) if !path.exists() => fs::rename(temporary, path).map_err(|source| KeyError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        }),
        Err(_) => Err(KeyError::Exists { path: path.to_owned() }),
    }
}

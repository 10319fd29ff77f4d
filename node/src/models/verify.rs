//! Whether a model's files are still what its manifest says, named file by file.
//!
//! [`verify`] hashes everything. A daemon does so once: [`unchanged`] remembers lengths and times of change of files that
//! were found sound, beside the manifest, and hashes again only what differs from that.

use std::path::{Path, PathBuf};

use kinoflock_protocol::id::BlobId;
use kinoflock_protocol::model::ModelManifest;

use super::{Model, ModelsError, file_error, manifest};

/// Name of the file that remembers what was found sound, beside the manifest.
const SOUND: &str = "sound";

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// It is not there.
    #[error("{} is missing: {expected} bytes were expected; import the model again", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// Bytes that it should have.
        expected: u64,
    },
    /// It is shorter or longer than it should be.
    #[error("{} is truncated or changed: {expected} bytes were expected, {found} found; import the model again", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes that it should have.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// It has the right length and other bytes.
    #[error("{} is damaged: hash {} was expected, {} found; import the model again", path.display(), expected.to_hex(), found.to_hex())]
    Hash {
        /// The file.
        path: PathBuf,
        /// blake3 that it should have.
        expected: BlobId,
        /// blake3 that it has.
        found: BlobId,
    },
}

impl Fault {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "file_missing",
            Self::Length { .. } => "file_length",
            Self::Hash { .. } => "file_hash",
        }
    }
}

/// Compares every file of a folder with a manifest. A file of the wrong length is not hashed.
///
/// # Errors
/// When a file is there and cannot be read.
pub fn verify(manifest: &ModelManifest, dir: &Path) -> Result<Vec<Fault>, ModelsError> {
    let mut faults = Vec::new();
    for file in &manifest.files {
        let path = dir.join(file.path.as_str());
        let found = match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            Ok(_) => {
                faults.push(Fault::Missing { path, expected: file.len });
                continue;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                faults.push(Fault::Missing { path, expected: file.len });
                continue;
            }
            Err(source) => return Err(ModelsError::File { path, source }),
        };
        if found != file.len {
            faults.push(Fault::Length { path, expected: file.len, found });
            continue;
        }
        let (_, found) = manifest::hash_file(&path)?;
        if found != file.blake3 {
            faults.push(Fault::Hash { path, expected: file.blake3, found });
        }
    }
    Ok(faults)
}

/// As [`verify`], but files are hashed only if any of them changed since all were last found sound.
///
/// # Errors
/// When a file is there and cannot be read.
pub fn unchanged(model: &Model) -> Result<Vec<Fault>, ModelsError> {
    let note = model.dir.with_file_name(SOUND);
    let state = state(model)?;
    if std::fs::read_to_string(&note).is_ok_and(|noted| noted == state) {
        return Ok(Vec::new());
    }
    let faults = verify(&model.manifest, &model.dir)?;
    if faults.is_empty() {
        // Where it cannot be noted, everything is hashed again the next time.
        let _noted = std::fs::write(&note, state);
    }
    Ok(faults)
}

/// Path, length and time of change of every file; what is not there has neither.
pub(super) fn state(model: &Model) -> Result<String, ModelsError> {
    let mut lines = String::new();
    for file in &model.manifest.files {
        let path = model.dir.join(file.path.as_str());
        let seen = match std::fs::metadata(&path) {
            Ok(metadata) => {
                let changed = metadata.modified().map_err(file_error(&path))?;
                let changed = changed.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                format!("{} {}", metadata.len(), changed.as_nanos())
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => "missing".to_owned(),
            Err(source) => return Err(ModelsError::File { path, source }),
        };
        lines.push_str(&format!("{} {seen}\n", file.path.as_str()));
    }
    Ok(lines)
}

//! Whether a model's files are still what its manifest says, named file by file.

use std::path::{Path, PathBuf};

use kinoflock_protocol::id::BlobId;
use kinoflock_protocol::model::ModelManifest;

use super::{ModelsError, manifest};

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

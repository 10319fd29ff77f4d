//! Blobs as files: `ab/<hash>` below the clip folder, `tmp/<number>` while they are written.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use kinoflock_protocol::clip::{ClipError, chunk_count, chunk_len};
use kinoflock_protocol::id::BlobId;
use kinoflock_protocol::limits::CHUNK_BYTES;

use super::ClipsError;
use crate::disk::is_full;

/// Folder of unfinished files.
const TEMPORARY: &str = "tmp";

/// A file without its final name, removed when dropped.
#[derive(Debug)]
pub(super) struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    pub(super) fn create(dir: &Path, number: u64) -> Result<Self, ClipsError> {
        let path = dir.join(TEMPORARY).join(number.to_string());
        let file = File::create(&path).map_err(|source| io_error("create", &path, source))?;
        Ok(Self { path, file })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ClipsError> {
        self.file.write_all(bytes).map_err(|source| io_error("write", &self.path, source))
    }

    /// Syncs the file, gives it its name, and syncs the folders, so that the name survives a power cut.
    pub(super) fn keep(self, dir: &Path, id: &BlobId) -> Result<(), ClipsError> {
        self.file.sync_all().map_err(|source| io_error("sync", &self.path, source))?;
        let path = path_of(dir, id);
        let folder = path.parent().expect("invariant: blobs lie in a folder");
        if !folder.is_dir() {
            fs::create_dir_all(folder).map_err(|source| io_error("create", folder, source))?;
            sync_dir(dir)?;
        }
        fs::rename(&self.path, &path).map_err(|source| io_error("rename", &path, source))?;
        sync_dir(folder)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already when it was kept; what stays is removed at the next start.
        let _ = fs::remove_file(&self.path);
    }
}

pub(super) fn make_dirs(dir: &Path) -> Result<(), ClipsError> {
    let temporary = dir.join(TEMPORARY);
    fs::create_dir_all(&temporary).map_err(|source| io_error("create", &temporary, source))
}

pub(super) fn read_chunk(dir: &Path, id: &BlobId, len: u64, chunk: u64) -> Result<Vec<u8>, ClipsError> {
    let no_such = ClipError::NoSuchChunk { chunks: chunk_count(len), given: chunk };
    let expected = chunk_len(chunk, len).ok_or(no_such)?;
    let path = path_of(dir, id);
    let io = |action| {
        let path = path.clone();
        move |source| io_error(action, &path, source)
    };
    let mut file = File::open(&path).map_err(io("open"))?;
    file.seek(SeekFrom::Start(chunk * CHUNK_BYTES as u64)).map_err(io("read"))?;
    let mut bytes = Vec::with_capacity(expected);
    // A file that became shorter gives fewer bytes, which the check against the outline names.
    file.take(expected as u64).read_to_end(&mut bytes).map_err(io("read"))?;
    Ok(bytes)
}

pub(super) fn read_part(dir: &Path, id: &BlobId, offset: u64, buffer: &mut [u8]) -> Result<(), ClipsError> {
    let path = path_of(dir, id);
    let read = File::open(&path).and_then(|mut file| {
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buffer)
    });
    read.map_err(|source| io_error("read", &path, source))
}

pub(super) fn has_len(dir: &Path, id: &BlobId, len: u64) -> bool {
    fs::metadata(path_of(dir, id)).is_ok_and(|metadata| metadata.is_file() && metadata.len() == len)
}

pub(super) fn remove(dir: &Path, id: &BlobId) -> Result<(), ClipsError> {
    let path = path_of(dir, id);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_error("remove", &path, error)),
        _ => Ok(()),
    }
}

/// Removes unfinished files and files that `known` does not know.
pub(super) fn remove_strays(dir: &Path, known: impl Fn(&BlobId) -> bool) -> Result<(), ClipsError> {
    for folder in entries(dir)?.into_iter().filter(|path| path.is_dir()) {
        let temporary = folder.file_name().is_some_and(|name| name == TEMPORARY);
        for file in entries(&folder)? {
            if temporary || !id_of(&file).is_some_and(|id| known(&id)) {
                fs::remove_file(&file).map_err(|source| io_error("remove", &file, source))?;
            }
        }
    }
    Ok(())
}

pub(super) fn path_of(dir: &Path, id: &BlobId) -> PathBuf {
    let hex = id.to_hex();
    dir.join(&hex[..2]).join(hex)
}

pub(super) fn io_error(action: &'static str, path: &Path, source: std::io::Error) -> ClipsError {
    if is_full(&source) {
        ClipsError::DiskFull
    } else {
        ClipsError::Io { action, path: path.to_owned(), source }
    }
}

fn id_of(path: &Path) -> Option<BlobId> {
    let hex = path.file_name()?.to_str()?;
    let hash = blake3::Hash::from_hex(hex).ok()?;
    Some(BlobId::from_bytes(*hash.as_bytes()))
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, ClipsError> {
    let io = |source| io_error("list", dir, source);
    fs::read_dir(dir).map_err(io)?.map(|entry| entry.map(|entry| entry.path()).map_err(io)).collect()
}

fn sync_dir(dir: &Path) -> Result<(), ClipsError> {
    #[cfg(unix)]
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| io_error("sync", dir, source))?;
    #[cfg(not(unix))]
    let _ = dir;
    Ok(())
}

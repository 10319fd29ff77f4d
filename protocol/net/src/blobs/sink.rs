//! Where a fetched blob goes. Called on the blocking pool, with verified bytes only.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use kinoflock_protocol::clip::{Outline, chunk_count, chunk_len};
use kinoflock_protocol::limits::CHUNK_BYTES;

/// Takes the chunks of one blob, in any order.
pub trait BlobSink: Send + 'static {
    /// Told once, with an outline that merges to the blob's id. Gives the indexes of the chunks that are
    /// here already; the sink has checked them.
    ///
    /// # Errors
    /// Ends the fetch.
    fn begin(&mut self, outline: &Outline) -> io::Result<Vec<u64>>;

    /// Takes a verified chunk.
    ///
    /// # Errors
    /// Ends the fetch.
    fn write_chunk(&mut self, index: u64, bytes: &[u8]) -> io::Result<()>;

    /// Told once, when every chunk is here.
    ///
    /// # Errors
    /// Ends the fetch.
    fn finish(&mut self) -> io::Result<()>;
}

/// Collects a blob in memory; for inputs and previews, with a size limit on the fetch.
#[derive(Debug, Default)]
pub struct MemorySink {
    bytes: Vec<u8>,
}

impl MemorySink {
    /// An empty sink.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The blob, once fetched.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

impl BlobSink for MemorySink {
    fn begin(&mut self, _: &Outline) -> io::Result<Vec<u64>> {
        Ok(Vec::new())
    }

    fn write_chunk(&mut self, index: u64, bytes: &[u8]) -> io::Result<()> {
        let start = usize::try_from(index).map_err(io::Error::other)? * CHUNK_BYTES;
        let end = start + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(bytes);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a blob beside its place under a temporary name, syncs it, and renames it. What a broken fetch left
/// is found again by its content: every chunk of the temporary file that matches its hash is kept.
#[derive(Debug)]
pub struct FileSink {
    path: PathBuf,
    part: PathBuf,
    file: Option<File>,
}

impl FileSink {
    /// A sink for the file at `path`; its folder must exist.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let part = path.with_file_name(name);
        Self { path, part, file: None }
    }

    /// Where the blob will be.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&mut self) -> io::Result<&mut File> {
        self.file.as_mut().ok_or_else(|| io::Error::other("the sink has not begun"))
    }
}

impl BlobSink for FileSink {
    fn begin(&mut self, outline: &Outline) -> io::Result<Vec<u64>> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&self.part)?;
        file.try_lock().map_err(|error| {
            let kind = io::ErrorKind::ResourceBusy;
            io::Error::new(kind, format!("{}: another fetch writes it ({error})", self.part.display()))
        })?;
        let kept = if file.metadata()?.len() == outline.len { scan(&mut file, outline)? } else { Vec::new() };
        file.set_len(outline.len)?;
        self.file = Some(file);
        Ok(kept)
    }

    fn write_chunk(&mut self, index: u64, bytes: &[u8]) -> io::Result<()> {
        let file = self.file()?;
        file.seek(SeekFrom::Start(index * CHUNK_BYTES as u64))?;
        file.write_all(bytes)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.file()?.sync_all()?;
        fs::rename(&self.part, &self.path)?;
        self.file = None;
        sync_folder(&self.path)
    }
}

/// The chunks of a file that match their hashes.
fn scan(file: &mut File, outline: &Outline) -> io::Result<Vec<u64>> {
    let mut kept = Vec::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    file.seek(SeekFrom::Start(0))?;
    for index in 0..chunk_count(outline.len) {
        let len = chunk_len(index, outline.len).expect("invariant: the index is below the count");
        file.read_exact(&mut buffer[..len])?;
        if outline.check_chunk(index, &buffer[..len]).is_ok() {
            kept.push(index);
        }
    }
    Ok(kept)
}

/// A rename lasts through a power cut only once its folder is synced.
#[cfg(unix)]
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_broken_fetch_left_is_kept_if_it_is_right() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("clip.mp4");
        let bytes: Vec<u8> = (0..CHUNK_BYTES * 2 + 7).map(|at| (at % 251) as u8).collect();
        let outline = Outline::of(&bytes).expect("outline");
        let mut broken = FileSink::new(&path);
        assert_eq!(broken.begin(&outline).expect("begin"), Vec::<u64>::new());
        broken.write_chunk(0, &bytes[..CHUNK_BYTES]).expect("write");
        broken.write_chunk(1, &vec![9; CHUNK_BYTES]).expect("write");
        assert!(FileSink::new(&path).begin(&outline).is_err(), "two fetches never share a file");
        drop(broken);
        assert!(!path.exists(), "nothing has the final name before it is whole");
        let mut again = FileSink::new(&path);
        assert_eq!(again.begin(&outline).expect("begin"), vec![0]);
        again.write_chunk(2, &bytes[CHUNK_BYTES * 2..]).expect("write");
        again.write_chunk(1, &bytes[CHUNK_BYTES..CHUNK_BYTES * 2]).expect("write");
        again.finish().expect("finish");
        assert_eq!(fs::read(&path).expect("read"), bytes);
        assert_eq!(fs::read_dir(folder.path()).expect("folder").count(), 1);
    }
}

//! Model files as other nodes get them: by hash, MiB by MiB, each checked before it leaves.
//!
//! Only files of models under open licences stand here. Chaining values are made once for each file, which means reading
//! it, and kept beside the model.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use kinoflock_net::blobs::FileReader;
use kinoflock_net::{BlobReader, BlobSource};
use kinoflock_protocol::clip::{Outline, chunk_len};
use kinoflock_protocol::codec;
use kinoflock_protocol::id::{BlobId, ModelId};
use kinoflock_protocol::limits::{CHUNK_BYTES, MAX_OUTLINE_FRAME};
use kinoflock_protocol::model::ModelFile;

use super::{Model, licence};

/// Folder of chaining values, beside the manifest.
const OUTLINES: &str = "outlines";

/// The files that others may have. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Shelf {
    files: Arc<RwLock<BTreeMap<BlobId, Standing>>>,
}

#[derive(Debug, Clone)]
struct Standing {
    path: PathBuf,
    outline: Arc<Outline>,
}

/// Whether a model's files may go to other nodes: by its card here.
#[must_use]
pub fn may_share(model: &Model) -> bool {
    model.card.as_ref().is_some_and(|card| licence::is_open(&card.licence.name))
}

impl Shelf {
    /// Puts a model's files here, all or none. Reads those whose chaining values are not known yet.
    ///
    /// # Errors
    /// When a file cannot be read, or is not what the manifest says.
    pub fn put(&self, model: &Model) -> io::Result<()> {
        let mut standing = Vec::new();
        for file in &model.manifest.files {
            let path = model.dir.join(file.path.as_str());
            let outline = outline(&model.dir.with_file_name(OUTLINES), &path, file)?;
            standing.push((file.blake3, Standing { path, outline: Arc::new(outline) }));
        }
        self.files.write().unwrap_or_else(PoisonError::into_inner).extend(standing);
        Ok(())
    }

    /// The models among these whose every file stands here.
    #[must_use]
    pub fn holds<'a>(&self, models: impl Iterator<Item = &'a Model>) -> Vec<ModelId> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        let whole = |model: &&Model| model.manifest.files.iter().all(|file| files.contains_key(&file.blake3));
        models.filter(whole).map(|model| model.id).collect()
    }
}

impl BlobSource for Shelf {
    fn open(&self, id: &BlobId) -> io::Result<Option<Box<dyn BlobReader>>> {
        let standing = self.files.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        let Some(Standing { path, outline }) = standing else { return Ok(None) };
        let file = File::open(&path)?;
        Ok(Some(Box::new(Checked { file, outline, chunk: None })))
    }
}

/// A file's chaining values: those that are kept, or new ones.
fn outline(kept: &Path, path: &Path, file: &ModelFile) -> io::Result<Outline> {
    let len = fs::metadata(path)?.len();
    if len != file.len {
        let text = format!("{}: {} bytes were expected, {len} found", path.display(), file.len);
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let note = kept.join(file.blake3.to_hex());
    let known =
        fs::read(&note).ok().and_then(|bytes| codec::decode::<Outline>(&bytes, MAX_OUTLINE_FRAME).ok());
    if let Some(outline) = known.filter(|known| known.len == len && known.check(&file.blake3).is_ok()) {
        return Ok(outline);
    }
    let (found, outline) = FileReader::outline_of(&mut File::open(path)?)?;
    if found != file.blake3 {
        let text = format!("{} is damaged: it has another hash than its manifest says", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    // Where it cannot be kept, it is made again at the next start.
    let _kept = fs::create_dir_all(kept).and_then(|()| fs::write(&note, codec::encode(&outline)));
    Ok(outline)
}

/// A file each of whose chunks is read whole and compared before any byte of it leaves.
struct Checked {
    file: File,
    outline: Arc<Outline>,
    chunk: Option<(u64, Vec<u8>)>,
}

impl Checked {
    fn chunk(&mut self, index: u64) -> io::Result<&[u8]> {
        let fits = self.chunk.as_ref().is_some_and(|(here, _)| *here == index);
        if !fits {
            let len = chunk_len(index, self.outline.len).ok_or(io::ErrorKind::UnexpectedEof)?;
            let mut bytes = vec![0; len];
            self.file.seek(SeekFrom::Start(index * CHUNK_BYTES as u64))?;
            self.file.read_exact(&mut bytes)?;
            self.outline
                .check_chunk(index, &bytes)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            self.chunk = Some((index, bytes));
        }
        Ok(self.chunk.as_ref().map_or(&[], |(_, bytes)| bytes))
    }
}

impl BlobReader for Checked {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let (index, within) = (at / CHUNK_BYTES as u64, (at % CHUNK_BYTES as u64) as usize);
            let rest = self.chunk(index)?.get(within..).filter(|rest| !rest.is_empty());
            let rest = rest.ok_or(io::ErrorKind::UnexpectedEof)?;
            let part = rest.len().min(buffer.len() - done);
            buffer[done..done + part].copy_from_slice(&rest[..part]);
            done += part;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ModelStore, embedded};
    use super::*;

    #[test]
    fn files_leave_as_they_are_and_a_damaged_one_does_not() {
        let folder = tempfile::tempdir().expect("folder");
        let store = ModelStore::open(folder.path(), None).expect("store");
        let model = store.import_bundled().expect("import").expect("one is bundled");
        assert!(may_share(&model), "{} is under open licences", embedded::NAME);
        let shelf = Shelf::default();
        assert!(shelf.holds([&model].into_iter()).is_empty());
        shelf.put(&model).expect("put");
        assert_eq!(shelf.holds([&model].into_iter()), [model.id]);
        let file = model.manifest.files.iter().max_by_key(|file| file.len).expect("files");
        assert!(file.len > 3 * CHUNK_BYTES as u64, "the test wants several chunks");
        let path = model.dir.join(file.path.as_str());
        let bytes = fs::read(&path).expect("read");
        let mut reader = shelf.open(&file.blake3).expect("open").expect("it stands here");
        let (from, mut part) = (CHUNK_BYTES - 5, vec![0; CHUNK_BYTES + 11]);
        reader.read_at(from as u64, &mut part).expect("read");
        assert_eq!(part, bytes[from..from + part.len()]);
        assert!(reader.read_at(file.len - 1, &mut [0; 2]).is_err(), "beyond the end");
        assert!(shelf.open(&BlobId::of(b"something else")).expect("open").is_none());

        // Chaining values are kept: a second shelf reads no file.
        let mut changed = bytes.clone();
        changed[2 * CHUNK_BYTES] ^= 1;
        fs::write(&path, &changed).expect("write");
        let again = Shelf::default();
        again.put(&model).expect("put");
        let mut reader = again.open(&file.blake3).expect("open").expect("it stands here");
        reader.read_at(0, &mut part[..9]).expect("an unharmed chunk");
        let error = reader.read_at(2 * CHUNK_BYTES as u64 + 9, &mut part[..9]).expect_err("a damaged chunk");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        fs::remove_dir_all(model.dir.with_file_name(OUTLINES)).expect("remove");
        assert!(Shelf::default().put(&model).is_err(), "a damaged file is not put on the shelf");
    }
}

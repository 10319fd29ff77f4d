//! One file of a pull: written and hashed at once, taken up where it broke off, named once it is right.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use super::super::hub::{FileHash, Hashing, Hub, RemoteFile};
use super::super::known::KnownModel;
use super::super::{ModelsError, file_error};
use super::{Event, PullError, Work};

/// Bytes that are read and written at once.
const PIECE: usize = 1 << 20;

/// A file that is not whole yet.
struct Part {
    path: PathBuf,
    file: File,
    /// Bytes that are written and hashed.
    len: u64,
    /// Bytes that an earlier pull left.
    left: u64,
    hashing: Option<(FileHash, Hashing)>,
}

impl Work {
    /// Brings a file, unless it is here.
    pub(super) fn fetch(
        &mut self,
        hub: &Hub,
        known: &KnownModel,
        commit: &str,
        file: &RemoteFile,
        pauses: &[Duration],
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), PullError> {
        let had = self.had(file, commit);
        tell(Event::File { file, had });
        if self.is_whole(file, commit) {
            return Ok(());
        }
        let mut part = Part::open(self.part(file, commit), file)?;
        if part.len != had {
            tell(Event::Bytes(part.len.cast_signed() - had.cast_signed()));
        }
        let mut waits = pauses.iter();
        loop {
            let before = part.len;
            let error = match part.fill(hub, &known.repository, commit, file, tell) {
                Ok(()) => break,
                Err(error) => error,
            };
            if matches!(error, PullError::Wrong { .. }) && part.left > 0 {
                // What lay here may be at fault, after a power cut: once more from the beginning.
                part.clear(file, tell)?;
                continue;
            }
            if part.len > before {
                waits = pauses.iter();
            }
            let Some(pause) = waits.next().filter(|_| error.is_passing()).copied() else {
                if matches!(error, PullError::Wrong { .. } | PullError::TooLong { .. }) {
                    fs::remove_file(&part.path).map_err(file_error(&part.path))?;
                }
                return Err(error);
            };
            tell(Event::Again { error: &error, pause });
            std::thread::sleep(pause);
        }
        part.file.sync_all().map_err(file_error(&part.path))?;
        let path = self.path(file);
        fs::rename(&part.path, &path).map_err(file_error(&path))?;
        Ok(self.note_whole(file, commit)?)
    }
}

impl Part {
    /// Opens what is here of a file, and hashes it.
    fn open(path: PathBuf, file: &RemoteFile) -> Result<Self, ModelsError> {
        let fault = file_error(&path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(file_error(folder))?;
        }
        let opened = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(&fault)?;
        let hashing = file.hash.map(|wanted| (wanted, Hashing::like(&wanted, file.len)));
        let mut part = Self { path: path.clone(), file: opened, len: 0, left: 0, hashing };
        let len = part.file.metadata().map_err(&fault)?.len();
        if len > file.len {
            part.file.set_len(0).map_err(&fault)?;
            return Ok(part);
        }
        let mut piece = vec![0; PIECE];
        while part.len < len {
            match part.file.read(&mut piece).map_err(&fault)? {
                0 => break,
                read => part.take(&piece[..read]),
            }
        }
        part.left = part.len;
        Ok(part)
    }

    fn take(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        if let Some((_, hashing)) = &mut self.hashing {
            hashing.update(bytes);
        }
    }

    fn clear(&mut self, file: &RemoteFile, tell: &mut dyn FnMut(Event<'_>)) -> Result<(), ModelsError> {
        tell(Event::Bytes(-self.len.cast_signed()));
        self.file.set_len(0).map_err(file_error(&self.path))?;
        (self.len, self.left) = (0, 0);
        self.hashing = file.hash.map(|wanted| (wanted, Hashing::like(&wanted, file.len)));
        Ok(())
    }

    /// Fetches what is missing, as long as the connection holds, and checks the whole.
    fn fill(
        &mut self,
        hub: &Hub,
        repository: &str,
        commit: &str,
        file: &RemoteFile,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), PullError> {
        if self.len < file.len || file.len == 0 {
            let mut incoming = hub.open(repository, commit, &file.path, self.len)?;
            if let (Some(told), Some(expected)) = (incoming.hash, file.hash)
                && told != expected
            {
                let by = "its own listing";
                return Err(PullError::OtherFile { path: file.path.clone(), expected, by, told });
            }
            if incoming.from != self.len {
                self.clear(file, tell)?;
            }
            if self.hashing.is_none() && self.len == 0 {
                self.hashing = incoming.hash.map(|told| (told, Hashing::like(&told, file.len)));
            }
            self.copy(&mut incoming.bytes, file, tell)?;
        }
        match &self.hashing {
            Some((wanted, hashing)) => match hashing.clone().finish() {
                found if found == *wanted => Ok(()),
                found => Err(PullError::Wrong { path: file.path.clone(), expected: *wanted, found }),
            },
            None => Ok(()),
        }
    }

    fn copy(
        &mut self,
        bytes: &mut dyn Read,
        file: &RemoteFile,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), PullError> {
        let mut piece = vec![0; PIECE];
        loop {
            let cut = PullError::Cut { path: file.path.clone(), len: file.len, given: self.len };
            let Ok(read) = bytes.read(&mut piece) else { return Err(cut) };
            if read == 0 {
                return if self.len == file.len { Ok(()) } else { Err(cut) };
            }
            if self.len + read as u64 > file.len {
                return Err(PullError::TooLong { path: file.path.clone(), len: file.len });
            }
            self.file.write_all(&piece[..read]).map_err(file_error(&self.path))?;
            self.take(&piece[..read]);
            tell(Event::Bytes(read as i64));
        }
    }
}

//! Takes models into the store: whole or not at all.
//!
//! Files are gathered in a folder of another name, by hard link where the disk allows it (a model of many gigabytes is
//! then not stored twice) and by copy elsewhere; they are hashed where they then lie; the folder gets its name last. A
//! hard link is the same file: changing the original in place changes the model here, and verification says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use kinoflock_inference::facts::Part as TextPart;
use kinoflock_protocol::id::ModelId;

use super::{
    CARD, FILES, MANIFEST, MANIFEST_JSON, MAX_MODELS, Model, ModelStore, ModelsError, NAME, embedded,
    file_error, is_name, manifest, read_card,
};

/// How the name of a folder begins that is not a model yet.
const PART: &str = ".import-";
/// Says which bundled model is here, so that it is not hashed at every start.
const BUNDLED: &str = ".bundled";

impl ModelStore {
    /// Takes in a folder in the published layout, with its `card.json` where it has one. The name must be free or is
    /// taken over. A model that is here already only changes its name and card.
    ///
    /// # Errors
    /// When the folder is no model, or the store's limit or the disk has no room for it. The store is as before then.
    pub fn import(&self, folder: &Path, name: &str) -> Result<Model, ModelsError> {
        self.take(folder, name, None)
    }

    /// Takes in a model that is published as one file, with text encoder and tokenizer from the model folder `beside`.
    ///
    /// # Errors
    /// As [`ModelStore::import`].
    pub fn import_file(&self, file: &Path, beside: &Path, name: &str) -> Result<Model, ModelsError> {
        let part = Part::new(&self.folder)?;
        let own = file.file_name().ok_or_else(|| ModelsError::Missing { path: file.to_owned() })?;
        let mut sources = vec![(file.to_owned(), part.files().join(own))];
        for folder in TextPart::text() {
            let found = folder.names(beside).map_err(|error| manifest::in_folder(beside, error))?;
            sources.extend(found.into_iter().map(|name| (beside.join(&name), part.files().join(name))));
        }
        let needed =
            sources.iter().map(|(from, _)| Ok(metadata(from)?.len())).sum::<Result<u64, ModelsError>>()?;
        for (from, to) in &sources {
            place(from, to).map_err(|error| self.disk(error, needed))?;
        }
        self.take(&part.files(), name, None)
    }

    /// As [`ModelStore::import`] of a model whose id is known. What this release reads from its files must make that very model.
    ///
    /// # Errors
    /// As [`ModelStore::import`], and [`ModelsError::OtherModel`].
    pub fn import_as(&self, folder: &Path, name: &str, id: &ModelId) -> Result<Model, ModelsError> {
        self.take(folder, name, Some(id))
    }

    fn take(&self, folder: &Path, name: &str, wanted: Option<&ModelId>) -> Result<Model, ModelsError> {
        if !is_name(name) {
            return Err(ModelsError::Name { given: name.to_owned() });
        }
        // Here already, so that what is wrong is named where it lies.
        let files = manifest::files_of(folder)?;
        let part = Part::new(&self.folder)?;
        let needed = files
            .iter()
            .map(|file| Ok(metadata(&folder.join(file))?.len()))
            .sum::<Result<u64, ModelsError>>()?;
        for file in &files {
            place(&folder.join(file), &part.files().join(file)).map_err(|error| self.disk(error, needed))?;
        }
        let card = folder.join(CARD);
        if card.is_file() {
            fs::copy(&card, part.path.join(CARD)).map_err(file_error(&card))?;
        }
        self.finish(part, name, wanted)
    }

    /// Takes in the model that is bundled with this program, unless it is here and sound: one whose files were damaged
    /// is made anew. `None` if none is bundled.
    ///
    /// # Errors
    /// As [`ModelStore::import`].
    pub fn import_bundled(&self) -> Result<Option<Model>, ModelsError> {
        let Some(stamp) = embedded::stamp() else { return Ok(None) };
        let marker = self.folder.join(BUNDLED);
        if let Some(id) = fs::read_to_string(&marker).ok().and_then(|text| marked(&text, &stamp))
            && self.path(&id).join(MANIFEST).is_file()
        {
            let model = self.read(id)?;
            if self.unchanged(&model)?.is_empty() {
                return Ok(Some(model));
            }
            fs::remove_dir_all(self.path(&id)).map_err(file_error(&self.path(&id)))?;
        }
        let part = Part::new(&self.folder)?;
        let needed = embedded::FILES.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        for (file, bytes) in embedded::FILES {
            let target = if *file == CARD { part.path.join(CARD) } else { part.files().join(file) };
            parent(&target)?;
            fs::write(&target, bytes)
                .map_err(file_error(&target))
                .map_err(|error| self.disk(error, needed))?;
        }
        let model = self.finish(part, embedded::NAME, None)?;
        let line = format!("{stamp} {}\n", model.id);
        fs::write(&marker, line).map_err(file_error(&marker))?;
        Ok(Some(model))
    }

    fn finish(&self, part: Part, name: &str, wanted: Option<&ModelId>) -> Result<Model, ModelsError> {
        let made = manifest::of_folder(&part.files())?;
        let bytes = made.encode();
        let id = ModelId::of(&bytes);
        if let Some(expected) = wanted.filter(|wanted| **wanted != id) {
            return Err(ModelsError::OtherModel { expected: *expected, given: id });
        }
        let here = self.list()?;
        let known = here.iter().any(|model| model.id == id);
        read_card(&part.path.join(CARD), &id)?;
        if !known {
            let given = made.total_len();
            let used = here.iter().map(|model| model.manifest.total_len()).sum::<u64>();
            if let Some(limit) = self.limit.filter(|limit| used.saturating_add(given) > *limit) {
                return Err(ModelsError::StoreFull { limit, used, given });
            }
            if here.len() >= MAX_MODELS {
                return Err(ModelsError::TooMany { limit: MAX_MODELS, given: here.len() + 1 });
            }
        }
        let json = serde_json::to_vec_pretty(&made).expect("invariant: wire types always encode");
        for (file, content) in [(MANIFEST, bytes), (MANIFEST_JSON, json), (NAME, name.as_bytes().to_vec())] {
            write_synced(&part.path.join(file), &content)
                .map_err(|error| self.disk(error, made.total_len()))?;
        }
        if known {
            for file in [NAME, CARD] {
                let (from, to) = (part.path.join(file), self.path(&id).join(file));
                if from.is_file() {
                    fs::rename(&from, &to).map_err(file_error(&to))?;
                }
            }
        } else {
            fs::rename(&part.path, self.path(&id)).map_err(file_error(&self.path(&id)))?;
        }
        for old in here.iter().filter(|model| model.name == name && model.id != id) {
            let path = self.path(&old.id).join(NAME);
            fs::remove_file(&path).map_err(file_error(&path))?;
        }
        fs::File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(file_error(&self.folder))?;
        self.read(id)
    }

    fn disk(&self, error: ModelsError, needed: u64) -> ModelsError {
        match error {
            ModelsError::File { source, .. } if crate::disk::is_full(&source) => {
                ModelsError::DiskFull { path: self.folder.clone(), needed }
            }
            other => other,
        }
    }
}

/// A model that is not whole yet. Gone when it is dropped, unless it was renamed.
struct Part {
    path: PathBuf,
}

impl Part {
    fn new(store: &Path) -> Result<Self, ModelsError> {
        let mut number = 0u32;
        loop {
            let path = store.join(format!("{PART}{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => {
                    let part = Self { path };
                    fs::create_dir(part.files()).map_err(file_error(&part.files()))?;
                    return Ok(part);
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(source) => return Err(ModelsError::File { path, source }),
            }
        }
    }

    fn files(&self) -> PathBuf {
        self.path.join(FILES)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _renamed = fs::remove_dir_all(&self.path);
    }
}

fn place(from: &Path, to: &Path) -> Result<(), ModelsError> {
    parent(to)?;
    // A link to a link would hang on a download cache.
    let from = fs::canonicalize(from).map_err(file_error(from))?;
    if fs::hard_link(&from, to).is_ok() {
        return Ok(());
    }
    fs::copy(&from, to).map_err(file_error(to))?;
    fs::File::open(to).and_then(|file| file.sync_all()).map_err(file_error(to))
}

fn parent(path: &Path) -> Result<(), ModelsError> {
    match path.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(file_error(folder)),
        None => Ok(()),
    }
}

fn metadata(path: &Path) -> Result<fs::Metadata, ModelsError> {
    fs::metadata(path).map_err(file_error(path))
}

fn write_synced(path: &Path, content: &[u8]) -> Result<(), ModelsError> {
    use std::io::Write;
    let write = || {
        let mut file = fs::File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(file_error(path))
}

fn marked(text: &str, stamp: &str) -> Option<ModelId> {
    let (found, id) = text.trim().split_once(' ')?;
    (found == stamp).then(|| ModelId::from_str(id).ok())?
}

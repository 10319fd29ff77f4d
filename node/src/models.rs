//! The model store: what this node can run, each model a folder under its id.
//!
//! ```text
//! <models>/<model id>/manifest        the manifest's bytes, whose hash is the id
//!                    /manifest.json   the same for people
//!                    /name            the name by which this node offers it
//!                    /card.json       what people say about it, if anybody does
//!                    /files/...       the published layout
//! ```
//!
//! - [`manifest`]: from a folder in the published layout to a manifest; rules and work figures come from its
//!   configuration files.
//! - [`import`]: takes a folder, or the bundled model, into the store: whole or not at all.
//! - [`known`]: the models that are known by name, each with a card; [`hub`]: where they are published; [`pull`]: takes one
//!   from there; [`licence`]: which may be passed on.
//! - [`shelf`]: what other nodes may have of it, piece by piece.
//! - [`verify`]: hashes every file again and names what is missing, cut or changed.
//! - [`selftest`]: the small fixed job by which a node shows itself that it can run a model.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use kinoflock_inference::weights::WeightsError;
use kinoflock_protocol::card::{Card, CardError};
use kinoflock_protocol::codec::TooLong;
use kinoflock_protocol::id::ModelId;
use kinoflock_protocol::model::{ModelError, ModelManifest};

pub use self::verify::Fault;

pub mod embedded;
pub mod hub;
pub mod import;
pub mod known;
pub mod licence;
pub mod manifest;
pub mod pull;
pub mod selftest;
pub mod shelf;
pub mod verify;

/// Most models in one store.
pub const MAX_MODELS: usize = 1024;
/// Longest name, bytes.
pub const MAX_NAME: usize = 64;

const MANIFEST: &str = "manifest";
const MANIFEST_JSON: &str = "manifest.json";
const NAME: &str = "name";
pub(crate) const CARD: &str = "card.json";
const FILES: &str = "files";
/// How the name of a folder begins that is being removed.
const REMOVED: &str = ".removed-";

/// A model of this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Which.
    pub id: ModelId,
    /// The name by which this node offers it.
    pub name: String,
    /// Its files, in the published layout.
    pub dir: PathBuf,
    /// What computes.
    pub manifest: ModelManifest,
    /// What people say about it; unsigned here.
    pub card: Option<Card>,
}

/// Why a model could not be read or taken in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelsError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk is full.
    #[error("no space is left on the disk for {}: {needed} bytes are needed", path.display())]
    DiskFull {
        /// The store.
        path: PathBuf,
        /// Bytes that the model needs.
        needed: u64,
    },
    /// The store's own limit.
    #[error(
        "a model of {given} bytes does not fit: the store holds {used} of its limit of {limit} bytes; see storage.models_limit"
    )]
    StoreFull {
        /// Greatest number of bytes.
        limit: u64,
        /// Bytes used.
        used: u64,
        /// Bytes of the model.
        given: u64,
    },
    /// Too many models.
    #[error("the store holds {given} models, the limit is {limit}")]
    TooMany {
        /// Most models.
        limit: usize,
        /// Models there.
        given: usize,
    },
    /// A file that the published layout needs is not there.
    #[error("{} is missing: a model is a folder in the published diffusers layout", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Weights that are missing, cut short or corrupt.
    #[error("{0}; download or copy the model's folder again")]
    Weights(#[from] WeightsError),
    /// An architecture that nobody here runs.
    #[error("unknown architecture {class:?} in {}; known: {known}", path.display())]
    UnknownArchitecture {
        /// The pipeline's class.
        class: String,
        /// The file that names it.
        path: PathBuf,
        /// The classes that are known.
        known: String,
    },
    /// A configuration value that makes no sense here.
    #[error("{}: {key}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key, empty for the whole file.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A name that is none.
    #[error("model name {given:?}: at most {MAX_NAME} letters, digits, '.', '_' and '-' are taken")]
    Name {
        /// What was given.
        given: String,
    },
    /// The manifest cannot be what it says.
    #[error("{}: {source}", path.display())]
    Manifest {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        source: ModelError,
    },
    /// A text or list beyond the protocol's limit.
    #[error("{}: {source}", path.display())]
    TooLong {
        /// The folder.
        path: PathBuf,
        /// Which limit.
        source: TooLong,
    },
    /// Files that make another model than the one that was wanted.
    #[error(
        "the files make {given} and not {expected}: this release reads their configuration otherwise than the one that listed them"
    )]
    OtherModel {
        /// The model that was wanted.
        expected: ModelId,
        /// The one that they make.
        given: ModelId,
    },
    /// A card that is none.
    #[error("{}: {reason}", path.display())]
    Card {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl ModelsError {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::File { .. } => "model_file",
            Self::DiskFull { .. } => "disk_full",
            Self::StoreFull { .. } => "store_full",
            Self::TooMany { .. } => "too_many_models",
            Self::Missing { .. } => "model_file_missing",
            Self::Weights(source) => source.code(),
            Self::UnknownArchitecture { .. } => "unknown_architecture",
            Self::Config { .. } => "model_config",
            Self::Name { .. } => "model_name",
            Self::Manifest { source, .. } => source.code(),
            Self::TooLong { .. } => "too_long",
            Self::OtherModel { .. } => "other_model",
            Self::Card { .. } => "card",
        }
    }
}

/// The folder of models.
#[derive(Debug, Clone)]
pub struct ModelStore {
    folder: PathBuf,
    limit: Option<u64>,
}

impl ModelStore {
    /// Opens a store, making its folder if it is not there. `limit` is in bytes.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(folder: &Path, limit: Option<u64>) -> Result<Self, ModelsError> {
        std::fs::create_dir_all(folder).map_err(file_error(folder))?;
        Ok(Self { folder: folder.to_owned(), limit })
    }

    /// Every model here, by name.
    ///
    /// # Errors
    /// When the store cannot be read, or a manifest or card in it is not what it says.
    pub fn list(&self) -> Result<Vec<Model>, ModelsError> {
        let mut models = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(file_error(&self.folder))? {
            let entry = entry.map_err(file_error(&self.folder))?;
            let Some(id) = entry.file_name().to_str().and_then(|name| ModelId::from_str(name).ok()) else {
                continue;
            };
            if models.len() == MAX_MODELS {
                return Err(ModelsError::TooMany { limit: MAX_MODELS, given: models.len() + 1 });
            }
            models.push(self.read(id)?);
        }
        models.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        Ok(models)
    }

    /// A model by its name or id.
    ///
    /// # Errors
    /// As [`ModelStore::list`].
    pub fn find(&self, name: &str) -> Result<Option<Model>, ModelsError> {
        Ok(self.list()?.into_iter().find(|model| model.name == name || model.id.to_string() == name))
    }

    /// Bytes of all models.
    ///
    /// # Errors
    /// As [`ModelStore::list`].
    pub fn used(&self) -> Result<u64, ModelsError> {
        Ok(self.list()?.iter().map(|model| model.manifest.total_len()).fold(0, u64::saturating_add))
    }

    /// Removes a model and its files. A daemon that runs has it until its next start.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(&self, model: &Model) -> Result<(), ModelsError> {
        let (path, going) = (self.path(&model.id), self.folder.join(format!("{REMOVED}{}", model.id)));
        // Gone as a model at once, however long its files take.
        std::fs::rename(&path, &going).map_err(file_error(&path))?;
        std::fs::remove_dir_all(&going).map_err(file_error(&going))
    }

    /// Hashes every file of a model again. What is wrong is named, file by file; nothing is sound.
    ///
    /// # Errors
    /// When a file is there and cannot be read.
    pub fn verify(&self, model: &Model) -> Result<Vec<Fault>, ModelsError> {
        verify::verify(&model.manifest, &model.dir)
    }

    /// As [`ModelStore::verify`], but hashes only what changed since it was last found sound.
    ///
    /// # Errors
    /// When a file is there and cannot be read.
    pub fn unchanged(&self, model: &Model) -> Result<Vec<Fault>, ModelsError> {
        verify::unchanged(model)
    }

    fn path(&self, id: &ModelId) -> PathBuf {
        self.folder.join(id.to_string())
    }

    fn read(&self, id: ModelId) -> Result<Model, ModelsError> {
        let folder = self.path(&id);
        let path = folder.join(MANIFEST);
        let bytes = std::fs::read(&path).map_err(file_error(&path))?;
        let manifest = ModelManifest::decode(&bytes, &id)
            .map_err(|source| ModelsError::Manifest { path: path.clone(), source })?;
        let name = match std::fs::read_to_string(folder.join(NAME)) {
            Ok(name) if is_name(name.trim()) => name.trim().to_owned(),
            _ => id.short(),
        };
        let card = read_card(&folder.join(CARD), &id)?;
        Ok(Model { id, name, dir: folder.join(FILES), manifest, card })
    }
}

/// A card from its JSON form. One without a subject is about `model`.
fn read_card(path: &Path, model: &ModelId) -> Result<Option<Card>, ModelsError> {
    use kinoflock_protocol::card::Subject;
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ModelsError::File { path: path.to_owned(), source }),
    };
    let fault = |reason: String| ModelsError::Card { path: path.to_owned(), reason };
    let mut value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| fault(error.to_string()))?;
    if let Some(object) = value.as_object_mut().filter(|object| !object.contains_key("subject")) {
        let subject =
            serde_json::to_value(Subject::Model(*model)).map_err(|error| fault(error.to_string()))?;
        object.insert("subject".to_owned(), subject);
    }
    let card: Card = serde_json::from_value(value).map_err(|error| fault(error.to_string()))?;
    card.check().map_err(|error: CardError| fault(error.to_string()))?;
    if card.subject != Subject::Model(*model) {
        return Err(fault(format!("the card is about {:?}, this model is {model}", card.subject)));
    }
    Ok(Some(card))
}

pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && name.bytes().any(|b| b.is_ascii_alphanumeric())
}

fn file_error(path: &Path) -> impl Fn(std::io::Error) -> ModelsError {
    let path = path.to_owned();
    move |source| ModelsError::File { path: path.clone(), source }
}

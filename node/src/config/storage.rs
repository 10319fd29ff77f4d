//! `[storage]`, checked: folders and disk limits.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{ConfigError, Folders, MAX_KEPT, file, invalid};

/// `[storage]`, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Key, queue, clips, receipts.
    pub state: PathBuf,
    /// Model folders.
    pub models: PathBuf,
    /// The addresses file.
    pub runtime: PathBuf,
    /// Bytes; `None` for no limit.
    pub models_limit: Option<u64>,
    /// Bytes of clips and latents made here.
    pub clips_limit: u64,
    /// Bytes of sealed copies kept for others.
    pub replicas_limit: u64,
    /// Bytes of latents kept for audits.
    pub audit_limit: u64,
    /// How long they are kept.
    pub audit_keep: Duration,
    /// Bytes of adapters kept between jobs.
    pub adapters_limit: u64,
    /// Whether other nodes may have the files of models under open licences.
    pub share_models: bool,
    /// Names or ids of models to fetch from others and hold, at most [`MAX_KEPT`].
    pub keep: Vec<String>,
}

pub(super) fn check_storage(
    section: &file::StorageSection,
    folders: Option<&Folders>,
) -> Result<Storage, ConfigError> {
    let folder = |key: &str, given: &str, default: Option<PathBuf>| {
        if given.is_empty() {
            return default.ok_or(ConfigError::NoHome);
        }
        // A relative folder would move with the shell that the daemon was started from.
        let path = PathBuf::from(given);
        if path.is_absolute() { Ok(path) } else { Err(invalid(key, given, "it must be an absolute path")) }
    };
    let state = folder("storage.state", &section.state, folders.map(|folders| folders.state.clone()))?;
    // A daemon with a state folder of its own keeps the rest there too, so that two of them never meet.
    let beside = |own: &Path, below: &str, default: fn(&Folders) -> PathBuf| match folders {
        Some(folders) if section.state.is_empty() => default(folders),
        _ => own.join(below),
    };
    let models = beside(&state, "models", |folders| folders.models.clone());
    let runtime = beside(&state, "run", |folders| folders.runtime.clone());
    Ok(Storage {
        models: folder("storage.models", &section.models, Some(models))?,
        runtime: folder("storage.runtime", &section.runtime, Some(runtime))?,
        state,
        models_limit: section.models_limit.0.map(|size| size.0),
        clips_limit: section.clips_limit.0,
        replicas_limit: section.replicas_limit.0,
        audit_limit: section.audit_limit.0,
        audit_keep: section.audit_keep.duration(),
        adapters_limit: section.adapters_limit.0,
        share_models: section.share_models,
        keep: match section.keep.len() {
            given if given > MAX_KEPT => {
                let count = format!("{given} models");
                return Err(invalid("storage.keep", &count, &format!("at most {MAX_KEPT}")));
            }
            _ => section.keep.clone(),
        },
    })
}

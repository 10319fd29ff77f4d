//! From a folder in a published layout to a manifest.
//!
//! What there is to know of a model is asked of its family ([`kinoflock_inference::registry::facts`]): which files it is
//! made of, which clips it can make, what it does where nobody says otherwise, what a job costs. All of it comes from
//! configuration files, so that a manifest is made without loading a model. This file only puts it in the protocol's
//! words and hashes the files.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use kinoflock_inference::facts::{Attention as TextPart, Facts};
use kinoflock_inference::{Defaults, Error, PipelineInfo, registry};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::id::BlobId;
use kinoflock_protocol::model::{ModelDefaults, ModelFile, ModelManifest, ModelRules};
use kinoflock_protocol::units::Micro;
use kinoflock_protocol::work::{Attention, Figures, Schedule, Transformer, WorkModel};

use super::{ModelsError, file_error};

/// The manifest of a folder. Every file is read and hashed.
///
/// # Errors
/// When a file of the layout is missing, cannot be read, or holds a value that is not known.
pub fn of_folder(folder: &Path) -> Result<ModelManifest, ModelsError> {
    let facts = looked_at(folder)?;
    let mut files = Vec::new();
    for relative in facts.files(folder).map_err(|error| in_folder(folder, error))? {
        let path = folder.join(&relative);
        let (len, blake3) = hash_file(&path)?;
        let path = Text::new(relative).map_err(|source| ModelsError::TooLong { path, source })?;
        files.push(ModelFile { path, len, blake3 });
    }
    let too_long = |source| ModelsError::TooLong { path: folder.to_owned(), source };
    let numbers = Numbers { folder };
    let manifest = ModelManifest {
        architecture: Text::truncated(&facts.info.architecture),
        files: List::new(files).map_err(too_long)?,
        rules: numbers.rules(&facts.info)?,
        defaults: numbers.defaults(&facts.info.defaults)?,
        work: numbers.work(&facts)?,
    };
    manifest.check().map_err(|source| ModelsError::Manifest { path: folder.to_owned(), source })?;
    Ok(manifest)
}

/// What a job costs with a folder's model. Weights need not be there.
///
/// # Errors
/// When a configuration is missing, cannot be read, or holds a value that is not known.
pub fn work_of(folder: &Path) -> Result<WorkModel, ModelsError> {
    let facts = registry::facts(folder).map_err(|error| in_folder(folder, error))?;
    Numbers { folder }.work(&facts)
}

/// Length and blake3 of a file.
///
/// # Errors
/// When it cannot be read.
pub fn hash_file(path: &Path) -> Result<(u64, BlobId), ModelsError> {
    let file = File::open(path).map_err(file_error(path))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(file_error(path))?;
    Ok((hasher.count(), BlobId::from_bytes(*hasher.finalize().as_bytes())))
}

/// What a folder says of itself, once its weights are seen to be there and whole.
fn looked_at(folder: &Path) -> Result<Facts, ModelsError> {
    let found = registry::facts(folder).and_then(|facts| facts.check_weights(folder).map(|()| facts));
    found.map_err(|error| in_folder(folder, error))
}

/// Paths within a folder that belong to the model, sorted, with `/`, once its weights are seen to be there and whole.
pub(super) fn files_of(folder: &Path) -> Result<BTreeSet<String>, ModelsError> {
    looked_at(folder)?.files(folder).map_err(|error| in_folder(folder, error))
}

/// Puts a family's numbers into the protocol's, which are bounded.
struct Numbers<'a> {
    folder: &'a Path,
}

impl Numbers<'_> {
    fn rules(&self, info: &PipelineInfo) -> Result<ModelRules, ModelsError> {
        Ok(ModelRules {
            size_multiple: self.count("size_multiple", info.size_multiple)?,
            frames_multiple: self.count("frames_multiple", info.frame_rule.multiple)?,
            frames_offset: self.count("frames_offset", info.frame_rule.offset)?,
            max_prompt_tokens: self.count("max_prompt_tokens", info.token_limit)?,
        })
    }

    fn defaults(&self, defaults: &Defaults) -> Result<ModelDefaults, ModelsError> {
        let Defaults { width, height, frames, fps, steps, guidance } = *defaults;
        Ok(ModelDefaults {
            frames: self.count("defaults.frames", frames)?,
            width: self.count("defaults.width", width)?,
            height: self.count("defaults.height", height)?,
            fps: self.number("defaults.fps", fps)?,
            steps: self.count("defaults.steps", steps)?,
            guidance: self.number("defaults.guidance", guidance)?,
        })
    }

    fn work(&self, facts: &Facts) -> Result<WorkModel, ModelsError> {
        let (work, figures) = (&facts.info.work, &facts.figures);
        let count = |key, value| self.count(key, value);
        let mut decoder = Vec::with_capacity(figures.decoder.len());
        for (channels, blocks) in &figures.decoder {
            decoder.push((count("decoder channels", *channels)?, count("decoder blocks", *blocks)?));
        }
        let transformer = Transformer {
            attention: match figures.attention {
                TextPart::Cross => Attention::Cross,
                TextPart::Joint => Attention::Joint,
                TextPart::Shared => Attention::Shared,
            },
            layers: count("layers", work.layers.saturating_sub(figures.single_layers))?,
            single_layers: count("single layers", figures.single_layers)?,
            width: count("width of a token", work.hidden)?,
            feed_forward: count("width of a feed-forward", work.feed_forward)?,
            feed_forward_matrices: count("matrices of a feed-forward", figures.feed_forward_matrices)?,
            text_width: count("width of a text token", figures.text_width)?,
            text_tokens: count("text tokens", facts.info.token_limit)?,
            channels: count("latent channels", work.latent_channels)?,
            patch_frames: count("latent frames in a token", work.patch[0])?,
            patch_side: count("latent cells along a token", work.patch[2])?,
        };
        Ok(WorkModel::of(&Figures {
            transformer,
            text_parameters: figures.text_parameters,
            spatial: count("spatial compression", work.spatial_ratio)?,
            temporal: count("temporal compression", work.temporal_ratio)?,
            decoder: &decoder,
            vae_patch: count("patch of the VAE", figures.vae_patch)?,
            schedule: if figures.staged { Schedule::Pyramid } else { Schedule::Whole },
        }))
    }

    fn count(&self, key: &str, value: usize) -> Result<u32, ModelsError> {
        let over = || format!("{value} exceeds the limit of {}", u32::MAX);
        u32::try_from(value).map_err(|_| self.fault(key, over()))
    }

    fn number(&self, key: &str, value: f64) -> Result<Micro, ModelsError> {
        Micro::from_f64(value).map_err(|error| self.fault(key, error.to_string()))
    }

    fn fault(&self, key: &str, reason: String) -> ModelsError {
        ModelsError::Config { path: self.folder.to_owned(), key: key.to_owned(), reason }
    }
}

pub(super) fn in_folder(folder: &Path, error: Error) -> ModelsError {
    match error {
        Error::UnknownArchitecture { class, file, known } => {
            ModelsError::UnknownArchitecture { class, path: file, known }
        }
        Error::Config { file, key, value, reason } => {
            ModelsError::Config { path: file, key, reason: format!("it is {value}: {reason}") }
        }
        Error::Read { file, source } if source.kind() == std::io::ErrorKind::NotFound => {
            ModelsError::Missing { path: file }
        }
        Error::Read { file, source } => ModelsError::File { path: file, source },
        Error::Weights(error) => ModelsError::Weights(error),
        // The others name their file themselves.
        other => ModelsError::Config {
            path: folder.to_owned(),
            key: "configuration".to_owned(),
            reason: other.to_string(),
        },
    }
}

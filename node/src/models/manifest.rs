//! From a folder in the published layout to a manifest.
//!
//! The manifest lists `model_index.json`, `kinoflock.json` where there is one, and the files of every component that the
//! index names: weights, configurations, vocabularies. Anything else in the folder (a card, a readme, a single-file
//! checkpoint of the same weights) is nobody's business here. Rules, defaults and work figures are read from the
//! configuration files, never from the weights, so that a manifest is made without loading a model.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use kinoflock_inference::models::ltx::config::TransformerConfig;
use kinoflock_inference::models::ltx::pipeline::{CLASSES, DEFAULTS, LtxClass, TEXT_STEM, WEIGHTS_STEM};
use kinoflock_inference::models::ltx::vae::config::LtxVaeConfig;
use kinoflock_inference::registry::ModelIndex;
use kinoflock_inference::{Defaults, Error, weights};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::id::BlobId;
use kinoflock_protocol::model::{ModelDefaults, ModelFile, ModelManifest, ModelRules};
use kinoflock_protocol::units::Micro;
use kinoflock_protocol::work::{LtxConfig, WorkModel};
use serde::Deserialize;
use serde_json::Value;

use super::{ModelsError, file_error};

/// Endings of files that belong to a model.
const ENDINGS: &[&str] = &["json", "safetensors", "model", "txt"];

/// The manifest of a folder. Every file is read and hashed.
///
/// # Errors
/// When a file of the layout is missing, cannot be read, or holds a value that is not known.
pub fn of_folder(folder: &Path) -> Result<ModelManifest, ModelsError> {
    let (architecture, rules, defaults, work) = looked_at(folder)?;
    let mut files = Vec::new();
    for relative in files_of(folder)? {
        let path = folder.join(&relative);
        let (len, blake3) = hash_file(&path)?;
        let path = Text::new(relative).map_err(|source| ModelsError::TooLong { path, source })?;
        files.push(ModelFile { path, len, blake3 });
    }
    let too_long = |source| ModelsError::TooLong { path: folder.to_owned(), source };
    let manifest = ModelManifest {
        architecture: Text::truncated(architecture),
        files: List::new(files).map_err(too_long)?,
        rules,
        defaults,
        work,
    };
    manifest.check().map_err(|source| ModelsError::Manifest { path: folder.to_owned(), source })?;
    Ok(manifest)
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

/// Paths within a folder that belong to the model, sorted, with `/`.
pub(super) fn files_of(folder: &Path) -> Result<BTreeSet<String>, ModelsError> {
    let index = read_json(&folder.join("model_index.json"))?;
    let mut files = BTreeSet::from(["model_index.json".to_owned()]);
    if folder.join("kinoflock.json").is_file() {
        files.insert("kinoflock.json".to_owned());
    }
    // A component that the pipeline does without is `[null, null]`.
    let named = index
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, value)| value.get(1).is_some_and(Value::is_string));
    for (component, _) in named {
        let inside = folder.join(component);
        if !inside.is_dir() {
            return Err(ModelsError::Missing { path: inside });
        }
        for entry in std::fs::read_dir(&inside).map_err(file_error(&inside))? {
            let path = entry.map_err(file_error(&inside))?.path();
            let ending = path.extension().and_then(|ending| ending.to_str());
            let name = path.file_name().and_then(|name| name.to_str());
            // `metadata` follows links: download caches are full of them.
            let is_file = std::fs::metadata(&path).map_err(file_error(&path))?.is_file();
            if let (Some(name), true) =
                (name, is_file && ending.is_some_and(|ending| ENDINGS.contains(&ending)))
            {
                files.insert(format!("{component}/{name}"));
            }
        }
    }
    Ok(files)
}

/// What a folder's configuration says, once its weights are seen to be there and whole.
pub(super) fn looked_at(folder: &Path) -> Result<Figures, ModelsError> {
    let figures = figures(folder)?;
    let weighty = [("transformer", WEIGHTS_STEM), ("vae", WEIGHTS_STEM), ("text_encoder", TEXT_STEM)];
    for (component, stem) in weighty {
        weights::check(&folder.join(component), stem, None)?;
    }
    Ok(figures)
}

pub(super) type Figures = (&'static str, ModelRules, ModelDefaults, WorkModel);

fn figures(folder: &Path) -> Result<Figures, ModelsError> {
    let path = folder.join("model_index.json");
    if !path.is_file() {
        return Err(ModelsError::Missing { path });
    }
    let index = ModelIndex::read(folder).map_err(|error| config(&path, &error))?;
    match LtxClass::from_name(&index.class) {
        Some(class) => ltx(folder, class),
        None => Err(ModelsError::UnknownArchitecture { class: index.class, path, known: CLASSES.join(", ") }),
    }
}

fn ltx(folder: &Path, class: LtxClass) -> Result<Figures, ModelsError> {
    let path = component(folder, "transformer")?;
    let transformer = TransformerConfig::read(&path).map_err(|error| config(&path, &error))?;
    let path = component(folder, "vae")?;
    let text = std::fs::read_to_string(&path).map_err(file_error(&path))?;
    let vae = LtxVaeConfig::from_json(&text).map_err(|error| ModelsError::Config {
        path: path.clone(),
        key: error.key,
        reason: error.reason,
    })?;
    let encoder: TextEncoder = parse(&component(folder, "text_encoder")?)?;
    let tokens = token_limit(folder, class.text_tokens() as u32)?;
    let (spatial, temporal) = (vae.spatial_ratio() as u32, vae.temporal_ratio() as u32);
    let (side, frames) = (transformer.patch_size as u32, transformer.patch_size_t as u32);
    let mut work = WorkModel::ltx(&LtxConfig {
        layers: transformer.num_layers as u32,
        heads: transformer.num_attention_heads as u32,
        head_dim: transformer.attention_head_dim as u32,
        cross_dim: transformer.cross_attention_dim as u32,
        channels: transformer.in_channels as u32,
        text_tokens: tokens,
        text_parameters: encoder.parameters(),
        spatial,
        temporal,
        decoder: &decoder_levels(&vae),
        vae_patch: vae.patch_size as u32,
    });
    (work.transformer.patch_side, work.transformer.patch_frames) = (side, frames);
    let rules = ModelRules {
        size_multiple: spatial * side,
        frames_multiple: temporal * frames,
        frames_offset: temporal * (frames - 1) + 1,
        max_prompt_tokens: tokens,
    };
    Ok(("ltx-video", rules, defaults(folder)?, work))
}

/// Channels and residual blocks at each resolution, from the finest to the coarsest.
fn decoder_levels(vae: &LtxVaeConfig) -> Vec<(u32, u32)> {
    let mut levels = vec![(vae.decoder.width as u32, vae.decoder.layers as u32)];
    for block in &vae.decoder.blocks {
        match levels.last_mut() {
            Some(level) if !block.scale => {
                *level = (level.0.max(block.output as u32), level.1 + block.layers as u32);
            }
            _ => levels.push((block.output as u32, block.layers as u32)),
        }
    }
    levels.reverse();
    levels
}

/// What of a T5's configuration its size follows from.
#[derive(Debug, Deserialize)]
struct TextEncoder {
    d_model: u64,
    d_ff: u64,
    d_kv: u64,
    num_heads: u64,
    num_layers: u64,
    feed_forward_proj: String,
}

impl TextEncoder {
    /// Parameters that every token meets: attention and feed-forward of every layer, without the vocabulary.
    fn parameters(&self) -> u64 {
        let matrices = if self.feed_forward_proj.starts_with("gated-") { 3 } else { 2 };
        let attention =
            self.num_heads.saturating_mul(self.d_kv).saturating_mul(self.d_model).saturating_mul(4);
        let forward = self.d_model.saturating_mul(self.d_ff).saturating_mul(matrices);
        attention.saturating_add(forward).saturating_mul(self.num_layers)
    }
}

/// Text tokens that the model reads: what its class does, unless the tokenizer says fewer.
fn token_limit(folder: &Path, most: u32) -> Result<u32, ModelsError> {
    let path = folder.join("tokenizer").join("tokenizer_config.json");
    let limit =
        if path.is_file() { read_json(&path)?.get("model_max_length").and_then(Value::as_f64) } else { None };
    // transformers writes 1e30 where it knows none.
    Ok(limit.filter(|limit| *limit >= 1.0).map_or(most, |limit| limit.min(f64::from(most)) as u32))
}

fn defaults(folder: &Path) -> Result<ModelDefaults, ModelsError> {
    #[derive(Deserialize)]
    struct Extras {
        defaults: Option<Defaults>,
    }
    let path = folder.join("kinoflock.json");
    let own = if path.is_file() { parse::<Extras>(&path)?.defaults } else { None };
    let Defaults { width, height, frames, fps, steps, guidance } = own.unwrap_or(DEFAULTS);
    let fault =
        |key: &str, reason: String| ModelsError::Config { path: path.clone(), key: key.to_owned(), reason };
    let count = |key: &str, value: usize| {
        u32::try_from(value).map_err(|_| fault(key, format!("{value} exceeds the limit of {}", u32::MAX)))
    };
    let number =
        |key: &str, value: f64| Micro::from_f64(value).map_err(|error| fault(key, error.to_string()));
    Ok(ModelDefaults {
        frames: count("defaults.frames", frames)?,
        width: count("defaults.width", width)?,
        height: count("defaults.height", height)?,
        fps: number("defaults.fps", fps)?,
        steps: count("defaults.steps", steps)?,
        guidance: number("defaults.guidance", guidance)?,
    })
}

fn component(folder: &Path, name: &str) -> Result<PathBuf, ModelsError> {
    let path = folder.join(name).join("config.json");
    if path.is_file() { Ok(path) } else { Err(ModelsError::Missing { path }) }
}

fn read_json(path: &Path) -> Result<Value, ModelsError> {
    if !path.is_file() {
        return Err(ModelsError::Missing { path: path.to_owned() });
    }
    parse(path)
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ModelsError> {
    let text = std::fs::read_to_string(path).map_err(file_error(path))?;
    serde_json::from_str(&text).map_err(|error| ModelsError::Config {
        path: path.to_owned(),
        key: "the file".to_owned(),
        reason: error.to_string(),
    })
}

fn config(path: &Path, error: &Error) -> ModelsError {
    match error {
        Error::Config { file, key, value, reason } => ModelsError::Config {
            path: file.clone(),
            key: key.clone(),
            reason: format!("{value} is not known: {reason}"),
        },
        other => ModelsError::Config {
            path: path.to_owned(),
            key: "the file".to_owned(),
            reason: other.to_string(),
        },
    }
}

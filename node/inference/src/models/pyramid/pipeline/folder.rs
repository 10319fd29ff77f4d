//! A published folder: which of its transformers is taken, what the parts beside it are called, and how each is loaded.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::{EXTRAS_FILE, TEXT_STEM, WEIGHTS_STEM, open_weights};
use crate::models::pyramid::config::{TransformerConfig, Variant};
use crate::models::pyramid::transformer::PyramidTransformer;
use crate::models::pyramid::vae::{PyramidVae, PyramidVaeConfig};
use crate::pipeline::{Defaults, LoadOptions, config_error, read_json};
use crate::text::{ClipTextConfig, ClipTextEncoder};

pub(in crate::models::pyramid) const VAE_FOLDER: &str = "causal_video_vae";
const TRANSFORMER_FOLDER: &str = "diffusion_transformer";
/// How a transformer for large pictures is called, and one for small ones.
const LARGE: &str = "diffusion_transformer_768p";
const SMALL: &str = "diffusion_transformer_384p";

/// A text encoder's folder and its tokenizer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextParts {
    /// The encoder's.
    pub encoder: &'static str,
    /// The tokenizer's.
    pub tokenizer: &'static str,
}

const fn text(encoder: &'static str, tokenizer: &'static str) -> TextParts {
    TextParts { encoder, tokenizer }
}

impl Variant {
    /// The CLIP encoders, whose vectors are put one behind the other.
    #[must_use]
    pub const fn clips(self) -> &'static [TextParts] {
        const CLIPS: &[TextParts] =
            &[text("text_encoder", "tokenizer"), text("text_encoder_2", "tokenizer_2")];
        match self {
            Self::Flux => CLIPS.split_at(1).0,
            Self::Mmdit => CLIPS,
        }
    }

    /// T5, whose tokenizer's limit counts: what CLIP does not read is in T5's text.
    #[must_use]
    pub const fn t5(self) -> TextParts {
        match self {
            Self::Flux => text("text_encoder_2", "tokenizer_2"),
            Self::Mmdit => text("text_encoder_3", "tokenizer_3"),
        }
    }

    /// Whether CLIP's vectors are projected.
    #[must_use]
    pub const fn projects(self) -> bool {
        matches!(self, Self::Mmdit)
    }
}

/// What a transformer's form and its folder's name tell.
#[derive(Debug, Clone, Copy)]
pub(in crate::models::pyramid) struct Usual {
    pub(in crate::models::pyramid) variant: Variant,
    /// What such a one makes when it is told nothing.
    pub(in crate::models::pyramid) defaults: Defaults,
}

impl Usual {
    pub(in crate::models::pyramid) fn of(variant: Variant, part: &Path) -> Self {
        let large = part.file_name().is_some_and(|name| name == LARGE);
        let (width, height) = if large { (1280, 768) } else { (640, 384) };
        let guidance = if large && variant == Variant::Mmdit { 9.0 } else { 7.0 };
        Self { variant, defaults: Defaults { width, height, frames: 121, fps: 24.0, steps: 10, guidance } }
    }
}

/// The class of a folder that has no index and Pyramid Flow's parts.
pub(crate) fn implied_class(folder: &Path) -> Option<String> {
    if !folder.join(VAE_FOLDER).join("config.json").exists() {
        return None;
    }
    let part = transformer_folder(folder, None).ok()?;
    let config: Map<String, Value> = read_json(&part.join("config.json")).ok()?;
    config.get("_class_name").and_then(Value::as_str).map(str::to_owned)
}

/// The transformer's folder. There may be several: `named` decides, else large pictures go before small ones.
pub(in crate::models::pyramid) fn transformer_folder(
    folder: &Path,
    named: Option<&str>,
) -> Result<PathBuf, Error> {
    let names = match named {
        Some(name) => vec![name.to_owned()],
        None => {
            let mut names = vec![LARGE.to_owned(), SMALL.to_owned()];
            names.extend(others(folder)?);
            names
        }
    };
    match names.iter().find(|name| folder.join(name).join("config.json").exists()) {
        Some(name) => Ok(folder.join(name)),
        None => {
            let file = folder.join(EXTRAS_FILE);
            let reason = format!("no folder {} with a config.json is there", names.join(" or "));
            Err(config_error(file, "transformer", named.unwrap_or("missing"), reason))
        }
    }
}

/// Every other folder that is called as a transformer is, in order.
fn others(folder: &Path) -> Result<Vec<String>, Error> {
    let unreadable = |source| Error::Read { file: folder.to_owned(), source };
    let entries = std::fs::read_dir(folder).map_err(unreadable)?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(TRANSFORMER_FOLDER)).collect();
    names.sort_unstable();
    Ok(names)
}

/// The transformer in a folder of its own, and how many parameters it has.
///
/// # Errors
/// See [`crate::load`].
pub fn load_transformer(part: &Path, options: &LoadOptions) -> Result<(PyramidTransformer, u64), Error> {
    let config = TransformerConfig::read(&part.join("config.json"))?;
    let weights = open_weights(part, WEIGHTS_STEM, options, options.dtype)?;
    let transformer = weights.build(|vb| PyramidTransformer::load(&config, &vb))?;
    Ok((transformer, weights.parameters()))
}

/// The folder of a model's transformer, as [`super::PyramidPipeline::load`] picks it.
///
/// # Errors
/// When there is none.
pub fn find_transformer(folder: &Path) -> Result<PathBuf, Error> {
    transformer_folder(folder, None)
}

/// A model's VAE, with its encoder where asked for, and how many parameters its files hold.
///
/// # Errors
/// See [`crate::load`].
pub fn load_vae(folder: &Path, options: &LoadOptions, encoder: bool) -> Result<(PyramidVae, u64), Error> {
    let part = folder.join(VAE_FOLDER);
    let config = PyramidVaeConfig::read(&part.join("config.json"))?;
    let weights = open_weights(&part, WEIGHTS_STEM, options, options.dtype)?;
    let load = if encoder { PyramidVae::load } else { PyramidVae::load_decoder };
    let vae = weights.build(|vb| load(&config, &vb))?;
    Ok((vae, weights.parameters()))
}

/// The configuration of a CLIP text encoder, checked.
pub(in crate::models::pyramid) fn read_clip(part: &Path) -> Result<ClipTextConfig, Error> {
    let file = part.join("config.json");
    let config: ClipTextConfig = read_json(&file)?;
    config.check(&file)?;
    Ok(config)
}

/// A CLIP text encoder from a folder of its own, projecting or not, and how many parameters it has.
///
/// # Errors
/// See [`crate::load`].
pub fn load_clip(
    part: &Path,
    options: &LoadOptions,
    projects: bool,
) -> Result<(ClipTextEncoder, u64), Error> {
    let config = read_clip(part)?;
    let weights = open_weights(part, TEXT_STEM, options, options.dtype)?;
    let load = if projects { ClipTextEncoder::load_projected } else { ClipTextEncoder::load };
    let encoder = weights.build(|vb| load(&config, &vb))?;
    Ok((encoder, weights.parameters()))
}

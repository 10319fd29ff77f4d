//! A model folder in the published layout: what its parts are called, and how the parts that several models have are
//! read.

use std::path::Path;

use candle_core::DType;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::pipeline::latents::LatentRgb;
use crate::pipeline::{Defaults, LoadOptions, config_error, read_json};
use crate::sampler::FlowMatchConfig;
use crate::sampler::flow_match::means_something;
use crate::text::{T5Config, T5Encoder, t5_name};
use crate::weights::{self, Rename, Weights};

/// Stem of the transformer's and the VAE's weight files.
pub const WEIGHTS_STEM: &str = "diffusion_pytorch_model";
/// Stem of a text encoder's weight files.
pub const TEXT_STEM: &str = "model";
/// The greatest count that is believed: a product of two fits 64 bits.
const MOST: usize = 1 << 24;
/// What the published layout has no place for.
pub const EXTRAS_FILE: &str = "kinoflock.json";

/// `kinoflock.json`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Extras {
    /// What a request holds when the artist says nothing.
    pub defaults: Option<Defaults>,
    /// How latents are shown before they are decoded.
    pub latent_rgb: Option<LatentRgb>,
}

impl Extras {
    /// Reads a folder's, which may be missing; `channels` is how many its latents have.
    ///
    /// # Errors
    /// When the file has another form, or its factors do not fit the channels.
    pub fn read(folder: &Path, channels: usize) -> Result<Self, Error> {
        let file = folder.join(EXTRAS_FILE);
        let extras: Self = if file.exists() { read_json(&file)? } else { Self::default() };
        if let Some(latent_rgb) = &extras.latent_rgb {
            latent_rgb.check(&file, channels)?;
        }
        Ok(extras)
    }
}

/// Opens a component's weights.
///
/// # Errors
/// When a file is missing, cut short or corrupt.
pub fn open_weights(part: &Path, stem: &str, options: &LoadOptions, dtype: DType) -> Result<Weights, Error> {
    let weights = Weights::open(part, stem, options.variant.as_deref(), dtype, &options.device)?;
    Ok(weights.entering(options.places.of_component(part)))
}

/// The same, for a component whose tensors are published in several namings.
///
/// # Errors
/// When a file is missing, cut short or corrupt.
pub fn open_renamed(
    part: &Path,
    stem: &str,
    options: &LoadOptions,
    dtype: DType,
    rename: Rename<'_>,
) -> Result<Weights, Error> {
    let files = weights::find(part, stem, options.variant.as_deref())?;
    let weights = Weights::of_files(files, rename, dtype, &options.device)?;
    Ok(weights.entering(options.places.of_component(part)))
}

/// A T5 or UMT5 encoder from its component's folder, and how many parameters it has. T5 overflows in f16: it is bf16
/// there.
///
/// # Errors
/// See [`crate::load`].
pub fn load_t5(part: &Path, options: &LoadOptions) -> Result<(T5Encoder, u64), Error> {
    let config = read_t5(part)?;
    let weights = open_t5(part, &config, options)?;
    let encoder = weights.build(|vb| T5Encoder::load(&config, &vb))?;
    Ok((encoder, weights.parameters()))
}

/// The type in which a T5 encoder computes where the rest has `dtype`: it overflows in f16.
pub(crate) fn text_dtype(dtype: DType) -> DType {
    if dtype == DType::F16 { DType::BF16 } else { dtype }
}

/// Opens the weights of such an encoder.
///
/// # Errors
/// When a file is missing, cut short or corrupt.
pub fn open_t5(part: &Path, config: &T5Config, options: &LoadOptions) -> Result<Weights, Error> {
    let gated = config.is_gated();
    open_renamed(part, TEXT_STEM, options, text_dtype(options.dtype), &|name| t5_name(name, gated))
}

/// The configuration of a T5 or UMT5 encoder from its component's folder, checked.
///
/// # Errors
/// When it cannot be read or holds a setting that is not computed here.
pub fn read_t5(part: &Path) -> Result<T5Config, Error> {
    let file = part.join("config.json");
    let config: T5Config = read_json(&file)?;
    config.check(&file)?;
    Ok(config)
}

/// A folder's flow-matching scheduler configuration, checked.
///
/// # Errors
/// When it cannot be read or holds a setting that is not computed here.
pub fn load_flow_match(folder: &Path) -> Result<FlowMatchConfig, Error> {
    let scheduler: FlowMatchConfig = read_json(&folder.join("scheduler").join("scheduler_config.json"))?;
    scheduler.check()?;
    Ok(scheduler)
}

/// Checks what a configuration holds beside the fields that a model reads: the class, where it is named, is `class`, and
/// nothing else could change what is computed. Keys that begin with `_` are notes.
///
/// # Errors
/// The first such field, with file, key and value.
pub fn check_others(file: &Path, others: &Map<String, Value>, class: &str) -> Result<(), Error> {
    let named = others.get("_class_name").and_then(Value::as_str);
    if let Some(named) = named.filter(|&named| named != class) {
        return Err(config_error(file, "_class_name", named, format!("only {class} is known")));
    }
    match others.iter().find(|(key, value)| !key.starts_with('_') && means_something(value)) {
        Some((key, value)) => Err(config_error(file, key, value, "this setting is not known")),
        None => Ok(()),
    }
}

/// Checks that a setting has the only value that is known.
///
/// # Errors
/// Another value, with file, key and value.
pub fn check_only<T: PartialEq + std::fmt::Debug>(
    file: &Path,
    key: &str,
    value: &T,
    only: &T,
) -> Result<(), Error> {
    if value == only {
        return Ok(());
    }
    Err(config_error(file, key, format!("{value:?}"), format!("only {only:?} is known")))
}

/// Checks that what a part's settings say of other parts is so: each is a key, its value, what it must be, and whose that
/// is.
///
/// # Errors
/// The first that differs, with file, key and value.
pub fn check_agree(file: &Path, settings: &[(&str, usize, usize, &str)]) -> Result<(), Error> {
    match settings.iter().find(|(_, given, needed, _)| given != needed) {
        Some((key, given, needed, who)) => Err(config_error(file, key, given, format!("{who} {needed}"))),
        None => Ok(()),
    }
}

/// Checks that no count is 0, nor so large that no model can have it.
///
/// # Errors
/// The first that is, with file and key.
pub fn check_counts(file: &Path, counts: &[(&str, usize)]) -> Result<(), Error> {
    match counts.iter().find(|(_, value)| !(1..=MOST).contains(value)) {
        Some((key, 0)) => Err(config_error(file, key, 0, "it must be at least 1")),
        Some((key, value)) => Err(config_error(file, key, value, format!("it must be at most {MOST}"))),
        None => Ok(()),
    }
}

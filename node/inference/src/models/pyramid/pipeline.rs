//! Pyramid Flow miniFLUX from request to frames.
//!
//! A clip is made unit by unit: its first latent frame, then one after another. A unit goes through stages: it begins as
//! noise a quarter as wide and high as the clip, is denoised for some steps, enlarged, given noise that hides the
//! enlargement's blocks, denoised again, and so on up to full size. At every step the transformer sees the units before
//! it, the last in the stage's own size and earlier ones smaller and smaller. A step of a run is one step of one stage of
//! one unit.

mod parts;
pub(super) mod plan;
mod resize;
mod units;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::config::TransformerConfig;
use super::facts::{CLIP_TOKENIZER, T5_TOKENIZER, facts, info};
use super::transformer::PyramidTransformer;
use super::vae::{PyramidVae, PyramidVaeConfig};
use crate::error::Error;
use crate::folder::{EXTRAS_FILE, Extras, TEXT_STEM, WEIGHTS_STEM, count_weights, open_weights};
use crate::offload::{Placement, Slot};
use crate::pipeline::latents::LatentRgb;
use crate::pipeline::{
    Defaults, GenerateRequest, LoadOptions, Observer, PipelineInfo, config_error, read_json,
};
use crate::sampler::{PyramidConfig, PyramidSchedule};
use crate::text::{ClipTextConfig, ClipTextEncoder, PromptEncoder, PromptTokenizer};
pub use resize::{enlarge, shrink};

/// The architecture's name.
pub const NAME: &str = "pyramid-flow";
/// The classes that this module computes: the reference's pipeline, and the transformer, which is what a published folder
/// names.
pub const CLASSES: &[&str] = &["PyramidDiTForVideoGeneration", super::config::CLASS];
/// Text tokens that the reference reads.
pub(super) const TEXT_TOKENS: usize = 128;
pub(super) const VAE_FOLDER: &str = "causal_video_vae";
pub(super) const CLIP_FOLDER: &str = "text_encoder";
pub(super) const T5_FOLDER: &str = "text_encoder_2";
const TRANSFORMER_FOLDER: &str = "diffusion_transformer";
/// How a transformer for large pictures is called, and what such a one makes when it is told nothing.
const LARGE: (&str, Defaults) = (
    "diffusion_transformer_768p",
    Defaults { width: 1280, height: 768, frames: 121, fps: 24.0, steps: 10, guidance: 7.0 },
);
/// The same for small pictures.
const SMALL: (&str, Defaults) = (
    "diffusion_transformer_384p",
    Defaults { width: 640, height: 384, frames: 121, fps: 24.0, steps: 10, guidance: 7.0 },
);

/// A latent as the VAE gives it is `z / scale + shift`, where `z` is what the transformer knows.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct LatentScale {
    /// Added.
    pub shift: f64,
    /// Divided by.
    pub scale: f64,
}

/// What the reference has in its code and no file tells; `pyramid` in a folder's `kinoflock.json` replaces it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct PyramidSettings {
    /// The stages.
    pub scheduler: PyramidConfig,
    /// Latent frames of every unit but the first, which has one.
    pub frames_per_unit: usize,
    /// Put behind every prompt, not behind negative ones.
    pub prompt_suffix: String,
    /// Of the first latent frame.
    pub first_frame: LatentScale,
    /// Of the others.
    pub later_frames: LatentScale,
    /// The part of a request's guidance that later units have, where it does not say.
    pub later_guidance: f64,
}

impl Default for PyramidSettings {
    fn default() -> Self {
        Self {
            scheduler: PyramidConfig::default(),
            frames_per_unit: 1,
            prompt_suffix: ", hyper quality, Ultra HD, 8K".to_owned(),
            first_frame: LatentScale { shift: -0.04, scale: 1.0 / 1.8726 },
            later_frames: LatentScale { shift: -0.2343, scale: 1.0 / 3.0986 },
            later_guidance: 5.0 / 7.0,
        }
    }
}

impl PyramidSettings {
    fn check(&self, file: &Path) -> Result<PyramidSchedule, Error> {
        let numbers =
            [("first_frame.scale", self.first_frame.scale), ("later_frames.scale", self.later_frames.scale)];
        if let Some((key, value)) =
            numbers.into_iter().find(|(_, value)| !(value.is_finite() && *value > 0.0))
        {
            return Err(config_error(file, key, value, "it must be above 0"));
        }
        if self.frames_per_unit == 0 {
            return Err(config_error(file, "frames_per_unit", 0, "it must be at least 1"));
        }
        Ok(PyramidSchedule::new(&self.scheduler)?)
    }
}

/// A loaded Pyramid Flow model.
pub struct PyramidPipeline {
    info: PipelineInfo,
    settings: PyramidSettings,
    schedule: PyramidSchedule,
    text: PromptEncoder,
    clip_tokenizer: PromptTokenizer,
    clip_config: ClipTextConfig,
    clip: Slot<ClipTextEncoder>,
    transformer: Slot<PyramidTransformer>,
    vae: Slot<PyramidVae>,
    placement: Placement,
    latent_rgb: LatentRgb,
    device: Device,
    text_device: Device,
    dtype: DType,
}

/// `kinoflock.json` as far as it is this model's own.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct OwnExtras {
    /// The folder of the transformer, where there are several.
    pub(super) transformer: Option<String>,
    pub(super) pyramid: PyramidSettings,
}

impl OwnExtras {
    /// Reads a folder's, which may be missing, and checks them.
    pub(super) fn read(folder: &Path) -> Result<Self, Error> {
        let file = folder.join(EXTRAS_FILE);
        let own: Self = if file.exists() { read_json(&file)? } else { Self::default() };
        own.pyramid.check(&file)?;
        if let Some(name) = own.transformer.as_ref().filter(|name| name.contains(['/', '\\'])) {
            return Err(config_error(file, "transformer", name, "it must be a folder's plain name"));
        }
        Ok(own)
    }
}

/// The text as the transformer reads it.
pub struct PromptEmbeds {
    /// T5's, `[1, tokens, width]`.
    pub embeds: Tensor,
    /// 1 where the prompt is and 0 where it is filled up, `[1, tokens]`.
    pub mask: Tensor,
    /// CLIP's, `[1, width]`.
    pub pooled: Tensor,
}

impl PyramidPipeline {
    /// Reads a model folder.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load(folder: &Path, options: &LoadOptions) -> Result<Self, Error> {
        let mut info = facts(folder)?.info;
        let own = OwnExtras::read(folder)?;
        let schedule = own.pyramid.check(&folder.join(EXTRAS_FILE))?;
        let (part, _) = transformer_folder(folder, own.transformer.as_deref())?;
        let placement = Placement::new(folder, options)?;
        let turns = placement.turns();
        let (text, text_parameters) = PromptEncoder::load_parts(
            &folder.join(T5_TOKENIZER),
            &folder.join(T5_FOLDER),
            options,
            info.token_limit,
            turns,
        )?;
        let clip_tokenizer = PromptTokenizer::load_clip(&folder.join(CLIP_TOKENIZER))?;
        let clip_parameters = count_weights(&folder.join(CLIP_FOLDER), TEXT_STEM, options)?;
        let transformer_parameters = count_weights(&part, WEIGHTS_STEM, options)?;
        let vae_parameters = count_weights(&folder.join(VAE_FOLDER), WEIGHTS_STEM, options)?;
        let (from, with) = (folder.to_owned(), options.for_text());
        let clip = Slot::new(turns, move || Ok(load_clip(&from, &with)?.0))?;
        let with = options.clone();
        let transformer = Slot::new(turns, move || Ok(load_transformer(&part, &with)?.0))?;
        let (from, with) = (folder.to_owned(), options.clone());
        let vae = Slot::new(turns, move || Ok(load_vae(&from, &with, false)?.0))?;
        let parameters = [transformer_parameters, vae_parameters, text_parameters + clip_parameters];
        info.work = info.work.with_parameters(parameters);
        let latent_rgb = Extras::read(folder, info.work.latent_channels)?.latent_rgb.unwrap_or_default();
        Ok(Self {
            info,
            settings: own.pyramid,
            schedule,
            text,
            clip_tokenizer,
            clip_config: read_clip(folder)?,
            clip,
            transformer,
            vae,
            placement,
            latent_rgb,
            device: options.device.clone(),
            text_device: options.for_text().device,
            dtype: options.dtype,
        })
    }

    /// Uses other settings from now on.
    ///
    /// # Errors
    /// When they are none that can be computed.
    pub fn set_settings(&mut self, settings: PyramidSettings) -> Result<(), Error> {
        self.schedule = settings.check(Path::new(EXTRAS_FILE))?;
        self.info = info(&settings, self.info.work, self.info.defaults);
        self.settings = settings;
        Ok(())
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &PyramidSettings {
        &self.settings
    }

    /// A prompt, as it stands, as the transformer reads it. CLIP's part is cut silently, as in the reference: it is a
    /// summary, and the whole prompt is in T5's.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where T5 cannot read it whole and `truncate` is false, or what the device reports.
    pub fn encode_prompt(&self, prompt: &str, truncate: bool) -> Result<PromptEmbeds, Error> {
        let (embeds, mask) = self.text.encode(prompt, truncate, true)?;
        let most = self.clip_config.max_position_embeddings;
        let limit = self.clip_tokenizer.max_length.map_or(most, |limit| limit.min(most));
        let ids = self.clip_tokenizer.encode(prompt, limit)?.ids;
        let ids = Tensor::from_vec(ids, (1, limit), &self.text_device)?;
        let (_, pooled) = self.clip.get()?.forward(&ids)?;
        Ok(PromptEmbeds { embeds, mask, pooled: pooled.to_device(&self.device)? })
    }

    /// Latents as the transformer gives them, `[1, C, F, H, W]`, to latents as the VAE takes them.
    ///
    /// # Errors
    /// When the shape or the device fails.
    pub fn denormalize(&self, latents: &Tensor) -> candle_core::Result<Tensor> {
        let latents = latents.to_dtype(DType::F32)?;
        let one = |frames: Tensor, by: LatentScale| frames.affine(1.0 / by.scale, by.shift);
        let first = one(latents.narrow(2, 0, 1)?, self.settings.first_frame)?;
        match latents.dim(2)? - 1 {
            0 => Ok(first),
            later => Tensor::cat(&[first, one(latents.narrow(2, 1, later)?, self.settings.later_frames)?], 2),
        }
    }

    /// Normalised latents `[1, C, F, H, W]` to pictures `[F, 3, H, W]` with values in 0 to 1, as a request says.
    ///
    /// # Errors
    /// A cancel between the pieces of a decode, or what the device reports.
    pub fn decode_video(
        &self,
        latents: &Tensor,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Tensor, Error> {
        parts::decode(self, request, latents, observer)
    }
}

/// The class of a folder that has no index and Pyramid Flow's parts.
pub(crate) fn implied_class(folder: &Path) -> Option<String> {
    if !folder.join(VAE_FOLDER).join("config.json").exists() {
        return None;
    }
    let (part, _) = transformer_folder(folder, None).ok()?;
    let config: Map<String, Value> = read_json(&part.join("config.json")).ok()?;
    config.get("_class_name").and_then(Value::as_str).map(str::to_owned)
}

/// The transformer's folder and what such a one makes when it is told nothing. A folder may hold several: `named` decides,
/// else large pictures go before small ones.
pub(super) fn transformer_folder(folder: &Path, named: Option<&str>) -> Result<(PathBuf, Defaults), Error> {
    let names = match named {
        Some(name) => vec![name.to_owned()],
        None => {
            let mut names = vec![LARGE.0.to_owned(), SMALL.0.to_owned()];
            names.extend(others(folder)?);
            names
        }
    };
    let there = |name: &&String| folder.join(name).join("config.json").exists();
    match names.iter().find(there) {
        Some(name) => {
            let defaults = if name == LARGE.0 { LARGE.1 } else { SMALL.1 };
            Ok((folder.join(name), defaults))
        }
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

/// The folder of a model's transformer, as [`PyramidPipeline::load`] picks it.
///
/// # Errors
/// When there is none.
pub fn find_transformer(folder: &Path) -> Result<PathBuf, Error> {
    Ok(transformer_folder(folder, None)?.0)
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

/// A model's CLIP text encoder, and how many parameters it has.
///
/// # Errors
/// See [`crate::load`].
pub fn load_clip(folder: &Path, options: &LoadOptions) -> Result<(ClipTextEncoder, u64), Error> {
    let part = folder.join(CLIP_FOLDER);
    let config = read_clip(folder)?;
    let weights = open_weights(&part, TEXT_STEM, options, options.dtype)?;
    let encoder = weights.build(|vb| ClipTextEncoder::load(&config, &vb))?;
    Ok((encoder, weights.parameters()))
}

/// The configuration of a folder's CLIP text encoder, checked.
fn read_clip(folder: &Path) -> Result<ClipTextConfig, Error> {
    let file = folder.join(CLIP_FOLDER).join("config.json");
    let config: ClipTextConfig = read_json(&file)?;
    config.check(&file)?;
    Ok(config)
}

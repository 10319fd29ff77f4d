//! Wan from request to frames: `WanPipeline`, text to video, and `WanImageToVideoPipeline`, which begins with a picture.
//!
//! The prompt is made plain and encoded, and what is filled up is zeros; with guidance the negative prompt is a second
//! pass through the transformer. The sampler is UniPC, or Euler steps with a constant shift. A folder with two
//! transformers and a `boundary_ratio` (Wan 2.2 A14B) uses the first for timesteps from `1000 boundary_ratio` on and the
//! second below, for which `low_noise_guidance` in `kinoflock.json` may give a guidance of its own. `expand_timesteps`
//! (Wan 2.2 TI2V-5B) gives every token a timestep, which without a picture is the same for all.

mod parts;
mod pictures;
pub(super) mod plan;
pub(super) mod sampler;

use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Deserialize;

use super::config::TransformerConfig;
use super::facts::{facts, form};
use super::names::transformer_name;
use super::transformer::WanTransformer;
use super::vae::{WanVae, WanVaeConfig};
use crate::error::Error;
use crate::folder::{EXTRAS_FILE, WEIGHTS_STEM, open_renamed, open_weights};
use crate::offload::{InTurn, Placement, Slot};
use crate::pipeline::run::Base;
use crate::pipeline::{Defaults, GenerateRequest, LoadOptions, config_error, read_json};
use crate::registry::ModelIndex;
use crate::text::PromptEncoder;
use crate::text::clean::clean;
use pictures::Pictures;
pub use sampler::{WanSampler, WanSchedule};

/// The architecture's name.
pub const NAME: &str = "wan";
/// The pipeline classes that this module computes.
pub const CLASSES: &[&str] = &["WanPipeline", IMAGE_CLASS];
pub(super) const IMAGE_CLASS: &str = "WanImageToVideoPipeline";
/// What the reference makes when it is told nothing.
pub const DEFAULTS: Defaults =
    Defaults { width: 832, height: 480, frames: 81, fps: 16.0, steps: 50, guidance: 5.0 };
/// Text tokens that are read, where the tokenizer does not say fewer.
pub(super) const TEXT_TOKENS: usize = 512;
/// The folder of the transformer of the last steps.
pub(super) const SECOND: &str = "transformer_2";

/// A loaded Wan model.
pub struct WanPipeline {
    base: Base,
    sampler: WanSampler,
    text: PromptEncoder,
    /// For high noise; and for all noise where there is no other.
    config: TransformerConfig,
    transformer: Slot<WanTransformer>,
    low_noise: Option<LowNoise>,
    vae: Slot<WanVae>,
    pictures: Pictures,
}

/// The transformer of the last steps.
struct LowNoise {
    transformer: Slot<WanTransformer>,
    /// It computes the timesteps below, 0 to 1000.
    boundary: f64,
    /// Its guidance, where it is not the request's.
    guidance: Option<f64>,
}

/// What Wan adds to `kinoflock.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LowNoiseExtras {
    low_noise_guidance: Option<f64>,
}

impl LowNoiseExtras {
    fn read(folder: &Path) -> Result<Option<f64>, Error> {
        let file = folder.join(EXTRAS_FILE);
        let extras: Self = if file.exists() { read_json(&file)? } else { Self::default() };
        match extras.low_noise_guidance {
            Some(value) if !value.is_finite() => {
                Err(config_error(file, "low_noise_guidance", value, "it must be a finite number"))
            }
            value => Ok(value),
        }
    }
}

impl WanPipeline {
    /// Reads a model folder.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load(folder: &Path, index: &ModelIndex, options: &LoadOptions) -> Result<Self, Error> {
        let info = facts(folder, index)?.info;
        let sampler = WanSampler::load(folder)?;
        let placement = Placement::new(folder, options)?;
        let turns = placement.turns();
        let (pictures, more) = Pictures::load(folder, form(folder, index)?, options, turns)?;
        let (text, text_parameters) = PromptEncoder::load(folder, options, info.token_limit, turns)?;
        let (transformer, mut parameters) = transformer_slot(folder, "transformer", options, turns)?;
        let mut low_noise = None;
        if let Some(boundary) = boundary(folder, index, sampler.train_timesteps())? {
            let (transformer, more) = transformer_slot(folder, SECOND, options, turns)?;
            parameters += more;
            let guidance = LowNoiseExtras::read(folder)?;
            low_noise = Some(LowNoise { transformer, boundary, guidance });
        }
        let (from, with, encodes) = (folder.to_owned(), options.clone(), pictures.encodes());
        let (vae, vae_parameters) = Slot::new(turns, move || load_vae(&from, &with, encodes))?;
        let config = TransformerConfig::read(&folder.join("transformer").join("config.json"))?;
        Ok(Self {
            base: Base::new(
                folder,
                info,
                [parameters, vae_parameters, text_parameters + more],
                placement,
                options,
            )?,
            sampler,
            text,
            config,
            transformer,
            low_noise,
            vae,
            pictures,
        })
    }

    /// Uses another sampler from now on.
    pub fn set_sampler(&mut self, sampler: WanSampler) {
        self.sampler = sampler;
    }

    /// The sampler.
    #[must_use]
    pub fn sampler(&self) -> &WanSampler {
        &self.sampler
    }

    /// Guides the second transformer so from now on; `None` as the request says. Without a second one it changes nothing.
    pub fn set_low_noise_guidance(&mut self, guidance: Option<f64>) {
        if let Some(low) = &mut self.low_noise {
            low.guidance = guidance;
        }
    }

    /// Reads more or fewer text tokens from now on.
    pub fn set_token_limit(&mut self, limit: usize) {
        self.base.info.token_limit = limit;
        self.text.set_limit(limit);
    }

    /// The points that a request's run goes through.
    ///
    /// # Errors
    /// When it has no steps, or timesteps that the sampler cannot take.
    pub fn schedule(&self, request: &GenerateRequest) -> Result<WanSchedule, Error> {
        self.sampler.schedule(request)
    }

    /// The embeddings `[1, tokens, width]` of a prompt, zeros where it is filled up.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where it is and `truncate` is false, or what the device reports.
    pub fn encode_prompt(&self, prompt: &str, truncate: bool) -> Result<Tensor, Error> {
        let (embeds, mask) = self.text.encode(&clean(prompt), truncate, true)?;
        Ok(embeds.broadcast_mul(&mask.to_dtype(embeds.dtype())?.unsqueeze(2)?)?)
    }

    /// Whether the second transformer computes a timestep.
    fn is_low(&self, timestep: f32) -> bool {
        self.low_noise.as_ref().is_some_and(|low| f64::from(timestep) < low.boundary)
    }
}

/// The timestep below which the second transformer computes, where the index names one.
pub(super) fn boundary(
    folder: &Path,
    index: &ModelIndex,
    train_timesteps: usize,
) -> Result<Option<f64>, Error> {
    let file = folder.join("model_index.json");
    let second = index.component(SECOND).is_some();
    match index.value("boundary_ratio") {
        None if second => {
            let reason = "it is needed where there is a transformer_2";
            Err(config_error(file, "boundary_ratio", "null", reason))
        }
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(ratio) if second => Ok(Some(ratio * train_timesteps as f64)),
            Some(_) => {
                let reason = "boundary_ratio needs a transformer_2";
                Err(config_error(file, SECOND, "null", reason))
            }
            None => Err(config_error(file, "boundary_ratio", value, "it must be a number")),
        },
    }
}

fn transformer_slot(
    folder: &Path,
    name: &'static str,
    options: &LoadOptions,
    turns: &InTurn,
) -> Result<(Slot<WanTransformer>, u64), Error> {
    let (folder, options) = (folder.to_owned(), options.clone());
    Slot::new(turns, move || load_transformer(&folder, name, &options))
}

/// A folder's transformer of that name, and how many parameters it has.
///
/// # Errors
/// See [`crate::load`].
pub fn load_transformer(
    folder: &Path,
    name: &str,
    options: &LoadOptions,
) -> Result<(WanTransformer, u64), Error> {
    let part = folder.join(name);
    let config = TransformerConfig::read(&part.join("config.json"))?;
    let weights = open_renamed(&part, WEIGHTS_STEM, options, options.dtype, &transformer_name)?;
    let transformer = weights.build(|vb| WanTransformer::load(&config, &vb))?;
    Ok((transformer, weights.parameters()))
}

/// A folder's VAE, with its encoder where asked for, and how many parameters its files hold. It is small, and f32 in
/// whatever numbers the rest is, as the reference recommends.
///
/// # Errors
/// See [`crate::load`].
pub fn load_vae(folder: &Path, options: &LoadOptions, encoder: bool) -> Result<(WanVae, u64), Error> {
    let part = folder.join("vae");
    let config = WanVaeConfig::read(&part.join("config.json"))?;
    let weights = open_weights(&part, WEIGHTS_STEM, options, DType::F32)?;
    let load = if encoder { WanVae::load } else { WanVae::load_decoder };
    let vae = weights.build(|vb| load(&config, vb))?;
    Ok((vae, weights.parameters()))
}

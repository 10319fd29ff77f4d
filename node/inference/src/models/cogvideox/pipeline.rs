//! CogVideoX from request to frames: `CogVideoXPipeline`, and `CogVideoXImageToVideoPipeline`, which begins with a
//! picture.
//!
//! The forms differ in their positions (added; rotary, stretched onto the trained grid or a part of it), in tokens of
//! one or two latent frames, and in the sampler that the folder names. Latents are kept as `[1, F, C, H, W]`. Where a
//! clip's latent frames do not come in whole tokens, further ones stand before them and are dropped before the decode.

mod parts;
pub(super) mod plan;

use std::path::Path;

use candle_core::Tensor;

use super::config::{TransformerConfig, VaeConfig};
use super::facts::facts;
use super::transformer::CogVideoXTransformer;
use super::vae::CogVideoXVae;
use crate::error::Error;
use crate::folder::{WEIGHTS_STEM, open_weights};
use crate::offload::{Placement, Slot};
use crate::pipeline::run::Base;
use crate::pipeline::{GenerateRequest, LoadOptions, config_error, read_json};
use crate::registry::ModelIndex;
use crate::sampler::{DiffusionConfig, DiffusionSampler, DiffusionSchedule};
use crate::text::PromptEncoder;

/// The architecture's name.
pub const NAME: &str = "cogvideox";
/// The pipeline classes that this module computes.
pub const CLASSES: &[&str] = &["CogVideoXPipeline", IMAGE_CLASS];
/// The class of those whose clips begin with a picture.
pub(super) const IMAGE_CLASS: &str = "CogVideoXImageToVideoPipeline";
/// The scheduler classes that this module computes.
pub const SCHEDULERS: &[&str] = &["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"];

/// A loaded CogVideoX model.
pub struct CogVideoXPipeline {
    base: Base,
    sampler: DiffusionSampler,
    scheduler: DiffusionConfig,
    text: PromptEncoder,
    config: TransformerConfig,
    transformer: Slot<CogVideoXTransformer>,
    vae: Slot<CogVideoXVae>,
    /// Whether clips begin with a picture.
    image: bool,
}

impl CogVideoXPipeline {
    /// Reads a model folder.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load(folder: &Path, index: &ModelIndex, options: &LoadOptions) -> Result<Self, Error> {
        let info = facts(folder, index)?.info;
        let (sampler, scheduler) = load_scheduler(folder, index)?;
        let image = index.class == IMAGE_CLASS;
        let placement = Placement::new(folder, options)?;
        let turns = placement.turns();
        let (text, text_parameters) = PromptEncoder::load(folder, options, info.token_limit, turns)?;
        let (from, with) = (folder.to_owned(), options.clone());
        let (transformer, transformer_parameters) = Slot::new(turns, move || load_transformer(&from, &with))?;
        let (from, with) = (folder.to_owned(), options.clone());
        let (vae, vae_parameters) = Slot::new(turns, move || load_vae(&from, &with, image))?;
        Ok(Self {
            base: Base::new(
                folder,
                info,
                [transformer_parameters, vae_parameters, text_parameters],
                placement,
                options,
            )?,
            sampler,
            scheduler,
            text,
            config: TransformerConfig::read(&folder.join("transformer").join("config.json"))?,
            transformer,
            vae,
            image,
        })
    }

    /// Uses another sampler from now on.
    pub fn set_sampler(&mut self, sampler: DiffusionSampler, scheduler: DiffusionConfig) {
        self.sampler = sampler;
        self.scheduler = scheduler;
    }

    /// Reads more or fewer text tokens from now on.
    pub fn set_token_limit(&mut self, limit: usize) {
        self.base.info.token_limit = limit;
        self.text.set_limit(limit);
    }

    /// The points that a request's run goes through.
    ///
    /// # Errors
    /// When it has no steps or too many.
    pub fn schedule(&self, request: &GenerateRequest) -> Result<DiffusionSchedule, Error> {
        Ok(DiffusionSchedule::new(&self.scheduler, request.steps)?)
    }

    /// The embeddings `[1, tokens, width]` of a prompt; the encoder attends to the filling too, as the reference's does.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where it is and `truncate` is false, or what the device reports.
    pub fn encode_prompt(&self, prompt: &str, truncate: bool) -> Result<Tensor, Error> {
        Ok(self.text.encode(prompt, truncate, false)?.0)
    }
}

/// A folder's sampler and its configuration, checked.
///
/// # Errors
/// When it cannot be read, its class is not known, or it holds a setting that is not computed here.
pub fn load_scheduler(
    folder: &Path,
    index: &ModelIndex,
) -> Result<(DiffusionSampler, DiffusionConfig), Error> {
    let file = folder.join("scheduler").join("scheduler_config.json");
    let config: DiffusionConfig = read_json(&file)?;
    let class = config.class().or_else(|| index.component("scheduler")).unwrap_or_default();
    let sampler = DiffusionSampler::from_class(class).ok_or_else(|| {
        config_error(
            &file,
            "_class_name",
            format!("{class:?}"),
            format!("known are {}", SCHEDULERS.join(", ")),
        )
    })?;
    config.check()?;
    Ok((sampler, config))
}

/// A folder's transformer, and how many parameters it has.
///
/// # Errors
/// See [`crate::load`].
pub fn load_transformer(folder: &Path, options: &LoadOptions) -> Result<(CogVideoXTransformer, u64), Error> {
    let part = folder.join("transformer");
    let config = TransformerConfig::read(&part.join("config.json"))?;
    let weights = open_weights(&part, WEIGHTS_STEM, options, options.dtype)?;
    let transformer = weights.build(|vb| CogVideoXTransformer::load(&config, &vb))?;
    Ok((transformer, weights.parameters()))
}

/// A folder's VAE, with its encoder where asked for, and how many parameters its files hold.
///
/// # Errors
/// See [`crate::load`].
pub fn load_vae(folder: &Path, options: &LoadOptions, encoder: bool) -> Result<(CogVideoXVae, u64), Error> {
    let part = folder.join("vae");
    let config = VaeConfig::read(&part.join("config.json"))?;
    let weights = open_weights(&part, WEIGHTS_STEM, options, options.dtype)?;
    let load = if encoder { CogVideoXVae::load } else { CogVideoXVae::load_decoder };
    let vae = weights.build(|vb| load(&config, vb))?;
    Ok((vae, weights.parameters()))
}

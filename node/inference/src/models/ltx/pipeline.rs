//! LTX-Video from request to frames: `LTXPipeline` with `LTXImageToVideoPipeline`, and `LTXConditionPipeline`.
//!
//! The two forms differ in their schedule (shifted by the number of tokens; linear-quadratic and unshifted), in positions
//! (cells; pixels and seconds with the first frame counted once), in the step's rule (by index; by timestep), and in
//! the text encoder's attention (to the filling too; to the prompt alone).

mod conditions;
mod parts;
pub(super) mod plan;
mod second;

use std::path::{Path, PathBuf};

use candle_core::Tensor;

use super::checkpoint::Checkpoint;
use super::config::TransformerConfig;
use super::facts::{class, facts};
use super::names::transformer_name;
use super::transformer::LtxTransformer;
use super::upsampler::UpsamplerConfig;
use super::vae::{LtxVae, LtxVaeConfig};
use crate::error::Error;
pub use crate::folder::{TEXT_STEM, WEIGHTS_STEM};
use crate::folder::{load_flow_match, open_renamed, open_weights};
use crate::offload::{Placement, Slot};
pub use crate::pipeline::latents::{pack, unpack};
use crate::pipeline::run::Base;
use crate::pipeline::{Defaults, GenerateRequest, LoadOptions, config_error, read_json};
use crate::registry::ModelIndex;
use crate::sampler::{FlowMatchConfig, Schedule};
use crate::text::PromptEncoder;
use crate::weights::Weights;

/// The architecture's name.
pub const NAME: &str = "ltx-video";
/// The pipeline classes that this module computes.
pub const CLASSES: &[&str] = &["LTXPipeline", IMAGE_CLASS, "LTXConditionPipeline"];
const IMAGE_CLASS: &str = "LTXImageToVideoPipeline";
/// A tensor that a VAE's weights hold where its encoder is among them.
const ENCODER_TENSOR: &str = "encoder.conv_in.conv.weight";
/// What the reference makes when it is told nothing.
pub const DEFAULTS: Defaults =
    Defaults { width: 704, height: 512, frames: 161, fps: 25.0, steps: 50, guidance: 3.0 };

/// Which of the reference's two forms is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LtxClass {
    /// `LTXPipeline`, and `LTXImageToVideoPipeline` where a picture is given for the beginning.
    Text,
    /// `LTXConditionPipeline`.
    Condition,
}

impl LtxClass {
    /// From the class's name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "LTXPipeline" | IMAGE_CLASS => Some(Self::Text),
            "LTXConditionPipeline" => Some(Self::Condition),
            _ => None,
        }
    }

    /// Text tokens that it reads, where the tokenizer does not say fewer.
    #[must_use]
    pub fn text_tokens(self) -> usize {
        match self {
            Self::Text => 128,
            Self::Condition => 256,
        }
    }
}

/// A loaded LTX-Video model.
pub struct LtxPipeline {
    base: Base,
    class: LtxClass,
    scheduler: FlowMatchConfig,
    text: PromptEncoder,
    config: TransformerConfig,
    vae_config: LtxVaeConfig,
    transformer: Slot<LtxTransformer>,
    vae: Slot<LtxVae>,
    /// Of the folder's upsampler, where it has one.
    upsampler: Option<UpsamplerConfig>,
    /// Whether the VAE's files hold an encoder.
    encodes: bool,
    folder: PathBuf,
    options: LoadOptions,
}

impl LtxPipeline {
    /// Reads a model folder.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load(folder: &Path, index: &ModelIndex, options: &LoadOptions) -> Result<Self, Error> {
        let info = facts(folder, index)?.info;
        let class = class(folder, index)?;
        let scheduler = read_scheduler(folder)?;
        let placement = Placement::new(folder, options)?;
        let turns = placement.turns();
        let (text, text_parameters) = PromptEncoder::load(folder, options, class.text_tokens(), turns)?;
        let (from, with) = (folder.to_owned(), options.clone());
        let (transformer, transformer_parameters) = Slot::new(turns, move || load_transformer(&from, &with))?;
        let (from, with) = (folder.to_owned(), options.clone());
        let (vae, vae_parameters) = Slot::new(turns, move || load_vae(&from, &with, false))?;
        let encodes = open_vae(folder, options)?.1.builder().contains_tensor(ENCODER_TENSOR);
        let parameters = [transformer_parameters, vae_parameters, text_parameters];
        Ok(Self {
            base: Base::new(folder, info, parameters, placement, options)?,
            class,
            scheduler,
            text,
            config: read_transformer_config(folder)?,
            vae_config: read_vae_config(folder)?,
            transformer,
            vae,
            upsampler: UpsamplerConfig::find(folder)?,
            encodes,
            folder: folder.to_owned(),
            options: options.clone(),
        })
    }

    /// The VAE's encoder. It is read when a run needs it and given back after, since most runs have no pictures.
    fn load_encoder(&self) -> Result<LtxVae, Error> {
        let (config, weights) = open_vae(&self.folder, &self.options)?;
        weights.build(|vb| LtxVae::load_encoder(&config, vb))
    }

    /// Computes as the other pipeline class from now on.
    pub fn set_class(&mut self, class: LtxClass) {
        self.class = class;
    }

    /// Uses another schedule from now on.
    pub fn set_scheduler(&mut self, scheduler: FlowMatchConfig) {
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
    /// When its timesteps do not fall or it has no steps.
    pub fn schedule(&self, request: &GenerateRequest) -> Result<Schedule, Error> {
        parts::schedule(self, request)
    }

    /// The embeddings `[1, tokens, width]` of a prompt and their mask `[1, tokens]` (u8).
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where it is and `truncate` is false, or what the device reports.
    pub fn encode_prompt(&self, prompt: &str, truncate: bool) -> Result<(Tensor, Tensor), Error> {
        self.text.encode(prompt, truncate, self.class == LtxClass::Condition)
    }
}

/// A folder's transformer, and how many parameters it has.
///
/// # Errors
/// See [`crate::load`].
pub fn load_transformer(folder: &Path, options: &LoadOptions) -> Result<(LtxTransformer, u64), Error> {
    let config = read_transformer_config(folder)?;
    let weights = open_transformer(folder, options)?;
    let transformer = weights.build(|vb| LtxTransformer::load(&config, &vb))?;
    Ok((transformer, weights.parameters()))
}

fn open_transformer(folder: &Path, options: &LoadOptions) -> Result<Weights, Error> {
    match Checkpoint::find(folder)? {
        Some(single) => Ok(single.open_transformer(options)?),
        None => {
            let part = folder.join("transformer");
            open_renamed(&part, WEIGHTS_STEM, options, options.dtype, &transformer_name)
        }
    }
}

/// A folder's VAE, with its encoder where asked for, and how many parameters its files hold.
///
/// # Errors
/// See [`crate::load`].
pub fn load_vae(folder: &Path, options: &LoadOptions, encoder: bool) -> Result<(LtxVae, u64), Error> {
    let (config, weights) = open_vae(folder, options)?;
    let load = if encoder { LtxVae::load } else { LtxVae::load_decoder };
    let vae = weights.build(|vb| load(&config, vb))?;
    Ok((vae, weights.parameters()))
}

fn open_vae(folder: &Path, options: &LoadOptions) -> Result<(LtxVaeConfig, Weights), Error> {
    match Checkpoint::find(folder)? {
        Some(single) => Ok((single.vae(), single.open_vae(options)?)),
        None => {
            let weights = open_weights(&folder.join("vae"), WEIGHTS_STEM, options, options.dtype)?;
            Ok((read_vae_config(folder)?, weights))
        }
    }
}

/// A folder's transformer configuration, checked.
pub(super) fn read_transformer_config(folder: &Path) -> Result<TransformerConfig, Error> {
    match Checkpoint::find(folder)? {
        Some(single) => Ok(single.transformer()),
        None => TransformerConfig::read(&folder.join("transformer").join("config.json")),
    }
}

/// A folder's scheduler, checked; that of a single file where the folder has none.
pub(super) fn read_scheduler(folder: &Path) -> Result<FlowMatchConfig, Error> {
    match Checkpoint::find(folder)? {
        Some(single) if !folder.join("scheduler").is_dir() => Ok(single.scheduler()),
        _ => load_flow_match(folder),
    }
}

/// A folder's VAE configuration, checked.
pub(super) fn read_vae_config(folder: &Path) -> Result<LtxVaeConfig, Error> {
    if let Some(single) = Checkpoint::find(folder)? {
        return Ok(single.vae());
    }
    let file = folder.join("vae").join("config.json");
    LtxVaeConfig::from_value(&read_json(&file)?)
        .map_err(|error| config_error(&file, &error.key, &error.value, &error.reason))
}

//! Mochi from request to frames (`MochiPipeline`).
//!
//! Noise levels fall linearly for the first half of the steps and quadratically from there. The published scheduler counts
//! the other way round: its sigmas rise from 0 to 1, and the model predicts `data - noise`.

mod parts;
pub(super) mod plan;

use std::path::Path;

use candle_core::Tensor;

use super::config::TransformerConfig;
use super::facts::facts;
use super::transformer::MochiTransformer;
use super::vae::{MochiVae, MochiVaeConfig};
use crate::error::Error;
use crate::folder::{WEIGHTS_STEM, load_flow_match, open_weights};
use crate::offload::{Placement, Slot};
use crate::pipeline::run::Base;
use crate::pipeline::{Defaults, GenerateRequest, LoadOptions, config_error};
use crate::registry::ModelIndex;
use crate::sampler::{FlowMatchConfig, Schedule};
use crate::text::PromptEncoder;

/// The architecture's name.
pub const NAME: &str = "mochi";
/// The pipeline classes that this module computes.
pub const CLASSES: &[&str] = &["MochiPipeline"];
/// What the reference makes when it is told nothing; the model was made for 30 frames a second.
pub const DEFAULTS: Defaults =
    Defaults { width: 848, height: 480, frames: 19, fps: 30.0, steps: 64, guidance: 4.5 };

/// A loaded Mochi model.
pub struct MochiPipeline {
    base: Base,
    scheduler: FlowMatchConfig,
    text: PromptEncoder,
    /// An empty prompt is read as no token at all.
    empty_is_nothing: bool,
    transformer: Slot<MochiTransformer>,
    vae: Slot<MochiVae>,
}

impl MochiPipeline {
    /// Reads a model folder.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load(folder: &Path, index: &ModelIndex, options: &LoadOptions) -> Result<Self, Error> {
        if !CLASSES.contains(&index.class.as_str()) {
            let file = folder.join("model_index.json");
            return Err(config_error(file, "_class_name", &index.class, "no pipeline of Mochi"));
        }
        let info = facts(folder, index)?.info;
        let empty_is_nothing = index.flag(folder, "force_zeros_for_empty_prompt")?.unwrap_or(false);
        let scheduler = load_scheduler(folder)?;
        let placement = Placement::new(folder, options)?;
        let turns = placement.turns();
        let (from, with) = (folder.to_owned(), options.clone());
        let (transformer, transformer_parameters) = Slot::new(turns, move || load_transformer(&from, &with))?;
        let (text, text_parameters) = PromptEncoder::load(folder, options, info.token_limit, turns)?;
        let (from, with) = (folder.to_owned(), options.clone());
        let (vae, vae_parameters) = Slot::new(turns, move || load_vae(&from, &with, false))?;
        Ok(Self {
            base: Base::new(
                folder,
                info,
                [transformer_parameters, vae_parameters, text_parameters],
                placement,
                options,
            )?,
            scheduler,
            text,
            empty_is_nothing,
            transformer,
            vae,
        })
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

    /// The points that a request's run goes through, as the scheduler counts them.
    ///
    /// # Errors
    /// When it has no steps or gives its own timesteps.
    pub fn schedule(&self, request: &GenerateRequest) -> Result<Schedule, Error> {
        parts::schedule(self, request)
    }

    /// The embeddings `[1, tokens, width]` of a prompt and their mask `[1, tokens]` (u8).
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where it is and `truncate` is false, or what the device reports.
    pub fn encode_prompt(&self, prompt: &str, truncate: bool) -> Result<(Tensor, Tensor), Error> {
        if self.empty_is_nothing && prompt.is_empty() {
            return self.text.encode_nothing();
        }
        self.text.encode(prompt, truncate, true)
    }
}

/// A folder's scheduler; the pipeline gives no `mu`, so one that shifts by it is refused.
pub(super) fn load_scheduler(folder: &Path) -> Result<FlowMatchConfig, Error> {
    let scheduler = load_flow_match(folder)?;
    if scheduler.use_dynamic_shifting {
        let file = folder.join("scheduler").join("scheduler_config.json");
        let reason = "only false is known: Mochi's shift does not depend on the size";
        return Err(config_error(file, "use_dynamic_shifting", true, reason));
    }
    Ok(scheduler)
}

/// A folder's transformer, and how many parameters it has.
///
/// # Errors
/// See [`crate::load`].
pub fn load_transformer(folder: &Path, options: &LoadOptions) -> Result<(MochiTransformer, u64), Error> {
    let part = folder.join("transformer");
    let config = TransformerConfig::read(&part.join("config.json"))?;
    let weights = open_weights(&part, WEIGHTS_STEM, options, options.dtype)?;
    let transformer = weights.build(|vb| MochiTransformer::load(&config, &vb))?;
    Ok((transformer, weights.parameters()))
}

/// A folder's VAE, with its encoder where asked for, and how many parameters its files hold.
///
/// # Errors
/// See [`crate::load`].
pub fn load_vae(folder: &Path, options: &LoadOptions, encoder: bool) -> Result<(MochiVae, u64), Error> {
    let part = folder.join("vae");
    let config = MochiVaeConfig::read(&part.join("config.json"))?;
    let weights = open_weights(&part, WEIGHTS_STEM, options, options.dtype)?;
    let load = if encoder { MochiVae::load } else { MochiVae::load_decoder };
    let vae = weights.build(|vb| load(&config, &vb))?;
    Ok((vae, weights.parameters()))
}

//! Pyramid Flow, miniFLUX and SD3, from request to frames.
//!
//! A clip is made unit by unit: its first latent frame, then one after another; a picture that is given is the first. A
//! unit goes through stages: it begins as noise a quarter as wide and high as the clip, is denoised for some steps,
//! enlarged, given noise that hides the enlargement's blocks, denoised again, and so on up to full size. At every step the
//! transformer sees the units before it, the last in the stage's own size and earlier ones smaller and smaller. A step of
//! a run is one step of one stage of one unit.

mod folder;
mod parts;
pub(super) mod plan;
mod resize;
mod settings;
mod text;
mod units;

use std::path::Path;

use candle_core::{DType, Tensor};

use super::config::{TransformerConfig, Variant};
use super::facts::{facts, info};
use super::transformer::PyramidTransformer;
use super::vae::PyramidVae;
use crate::error::Error;
use crate::folder::EXTRAS_FILE;
use crate::offload::{Placement, Slot};
use crate::pipeline::LoadOptions;
use crate::pipeline::run::Base;
use crate::sampler::PyramidSchedule;
pub(crate) use folder::implied_class;
pub use folder::{TextParts, find_transformer, load_clip, load_transformer, load_vae};
pub(super) use folder::{Usual, VAE_FOLDER, read_clip, transformer_folder};
pub use resize::{enlarge, shrink};
pub(super) use settings::OwnExtras;
pub use settings::{LatentScale, PyramidSettings};
pub use text::PromptEmbeds;
use text::Text;

/// The architecture's name.
pub const NAME: &str = "pyramid-flow";
/// The classes that this module computes: the reference's pipeline, and the transformer, which is what a published folder
/// names.
pub const CLASSES: &[&str] = &["PyramidDiTForVideoGeneration", Variant::Flux.class(), Variant::Mmdit.class()];
/// Text tokens that the reference reads.
pub(super) const TEXT_TOKENS: usize = 128;

/// A loaded Pyramid Flow model.
pub struct PyramidPipeline {
    base: Base,
    settings: PyramidSettings,
    schedule: PyramidSchedule,
    text: Text,
    config: TransformerConfig,
    transformer: Slot<PyramidTransformer>,
    vae: Slot<PyramidVae>,
}

impl PyramidPipeline {
    /// Reads a model folder.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load(folder: &Path, options: &LoadOptions) -> Result<Self, Error> {
        let info = facts(folder)?.info;
        let own = OwnExtras::read(folder)?;
        let part = transformer_folder(folder, own.transformer.as_deref())?;
        let config = TransformerConfig::read(&part.join("config.json"))?;
        let variant = config.variant;
        let (settings, schedule) = own.settle(folder, &Usual::of(variant, &part))?;
        let placement = Placement::new(folder, options)?;
        let turns = placement.turns();
        let (text, text_parameters) = Text::load(folder, variant, options, info.token_limit, turns)?;
        let with = options.clone();
        let (transformer, transformer_parameters) = Slot::new(turns, move || load_transformer(&part, &with))?;
        let (from, with) = (folder.to_owned(), options.clone());
        let (vae, vae_parameters) = Slot::new(turns, move || load_vae(&from, &with, true))?;
        Ok(Self {
            base: Base::new(
                folder,
                info,
                [transformer_parameters, vae_parameters, text_parameters],
                placement,
                options,
            )?,
            settings,
            schedule,
            text,
            config,
            transformer,
            vae,
        })
    }

    /// Uses other settings from now on.
    ///
    /// # Errors
    /// When they are none that can be computed.
    pub fn set_settings(&mut self, settings: PyramidSettings) -> Result<(), Error> {
        self.schedule = settings.check(Path::new(EXTRAS_FILE))?;
        self.base.info = info(&settings, self.base.info.work, self.base.info.defaults);
        self.settings = settings;
        Ok(())
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &PyramidSettings {
        &self.settings
    }

    /// A prompt, as it stands, as the transformer reads it; of what CLIP reads the end is cut silently.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where T5 cannot read it whole and `truncate` is false, or what the device reports.
    pub fn encode_prompt(&self, prompt: &str, truncate: bool) -> Result<PromptEmbeds, Error> {
        self.text.encode(prompt, truncate)
    }

    /// The ids that each CLIP reads of a prompt, padded or cut to its limit.
    ///
    /// # Errors
    /// When a tokenizer fails.
    pub fn clip_ids(&self, prompt: &str) -> Result<Vec<Vec<u32>>, Error> {
        self.text.clip_ids(prompt)
    }

    /// A picture's latents as the VAE gives them to those that the transformer knows.
    fn normalize_first(&self, latents: &Tensor) -> candle_core::Result<Tensor> {
        let LatentScale { shift, scale } = self.settings.first_frame;
        (latents - shift)? * scale
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
}

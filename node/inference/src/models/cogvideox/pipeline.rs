//! CogVideoX from request to frames: `CogVideoXPipeline`, and `CogVideoXImageToVideoPipeline`, which begins with a
//! picture.
//!
//! The forms differ in their positions (added; rotary, stretched onto the trained grid or a part of it), in tokens of
//! one or two latent frames, and in the sampler that the folder names. Latents are kept as `[1, F, C, H, W]`. Where a
//! clip's latent frames do not come in whole tokens, further ones stand before them and are dropped before the decode.

mod parts;

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::config::{TransformerConfig, VaeConfig};
use super::transformer::CogVideoXTransformer;
use super::vae::CogVideoXVae;
use crate::error::Error;
use crate::folder::{Extras, WEIGHTS_STEM, open_weights};
use crate::pipeline::latents::LatentRgb;
use crate::pipeline::run::VideoModel;
use crate::pipeline::{
    Defaults, FrameRule, GenerateRequest, LoadOptions, Observer, PipelineInfo, WorkConfig, config_error,
    read_json,
};
use crate::registry::ModelIndex;
use crate::sampler::{DiffusionConfig, DiffusionSampler, DiffusionSchedule};
use crate::text::PromptEncoder;

/// The architecture's name.
pub const NAME: &str = "cogvideox";
/// The pipeline classes that this module computes.
pub const CLASSES: &[&str] = &["CogVideoXPipeline", IMAGE_CLASS];
const IMAGE_CLASS: &str = "CogVideoXImageToVideoPipeline";
/// The scheduler classes that this module computes.
pub const SCHEDULERS: &[&str] = &["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"];

/// A loaded CogVideoX model.
pub struct CogVideoXPipeline {
    info: PipelineInfo,
    sampler: DiffusionSampler,
    scheduler: DiffusionConfig,
    text: PromptEncoder,
    transformer: CogVideoXTransformer,
    vae: CogVideoXVae,
    latent_rgb: LatentRgb,
    /// Whether clips begin with a picture.
    image: bool,
    device: Device,
    dtype: DType,
}

impl CogVideoXPipeline {
    /// Reads a model folder.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load(folder: &Path, index: &ModelIndex, options: &LoadOptions) -> Result<Self, Error> {
        index.expect(folder, "transformer", &["CogVideoXTransformer3DModel"])?;
        index.expect(folder, "vae", &["AutoencoderKLCogVideoX"])?;
        index.expect(folder, "text_encoder", &["T5EncoderModel"])?;
        index.expect(folder, "tokenizer", &["T5TokenizerFast", "T5Tokenizer"])?;
        index.expect(folder, "scheduler", SCHEDULERS)?;
        let (sampler, scheduler) = load_scheduler(folder, index)?;
        let config = TransformerConfig::read(&folder.join("transformer").join("config.json"))?;
        let image = index.class == IMAGE_CLASS;
        check_fit(folder, &config, &VaeConfig::read(&folder.join("vae").join("config.json"))?, image)?;
        let (text, text_parameters) = PromptEncoder::load(folder, options, config.max_text_seq_length)?;
        let (transformer, transformer_parameters) = load_transformer(folder, options)?;
        let (vae, vae_parameters) = load_vae(folder, options, image)?;
        let parameters = [transformer_parameters, vae_parameters, text_parameters];
        let work = work_config(&config, vae.config(), text.limit(), parameters);
        let extras = Extras::read(folder, work.latent_channels)?;
        let info = PipelineInfo {
            architecture: NAME.to_owned(),
            size_multiple: work.spatial_ratio * work.patch[2],
            frame_rule: frame_rule(&work),
            defaults: extras.defaults.unwrap_or_else(|| defaults(&config, &work)),
            token_limit: text.limit(),
            work,
        };
        Ok(Self {
            info,
            sampler,
            scheduler,
            text,
            transformer,
            vae,
            latent_rgb: extras.latent_rgb.unwrap_or_default(),
            image,
            device: options.device.clone(),
            dtype: options.dtype,
        })
    }

    /// Uses another sampler from now on.
    pub fn set_sampler(&mut self, sampler: DiffusionSampler, scheduler: DiffusionConfig) {
        self.sampler = sampler;
        self.scheduler = scheduler;
    }

    /// Reads more or fewer text tokens from now on.
    pub fn set_token_limit(&mut self, limit: usize) {
        self.info.token_limit = limit;
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

    /// Latents `[1, C, F, H, W]` to pictures `[F, 3, H, W]` with values in 0 to 1, as a request says.
    ///
    /// # Errors
    /// A cancel between the runs of a decode, or what the device reports.
    pub fn decode_video(
        &self,
        latents: &Tensor,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Tensor, Error> {
        self.decode(request, latents, observer)
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

/// Transformer and VAE agree about latents.
fn check_fit(
    folder: &Path,
    transformer: &TransformerConfig,
    vae: &VaeConfig,
    image: bool,
) -> Result<(), Error> {
    let file = folder.join("transformer").join("config.json");
    let (given, needed) = (transformer.outputs(), vae.latent_channels);
    if given != needed {
        return Err(config_error(&file, "out_channels", given, format!("the VAE's latents have {needed}")));
    }
    let (given, needed) = (transformer.in_channels, if image { 2 * needed } else { needed });
    if given != needed {
        let reason = format!("this pipeline's transformer has {needed}");
        return Err(config_error(&file, "in_channels", given, reason));
    }
    let (given, needed) = (transformer.temporal_compression_ratio, vae.temporal_ratio());
    if given != needed {
        return Err(config_error(
            &file,
            "temporal_compression_ratio",
            given,
            format!("the VAE's is {needed}"),
        ));
    }
    Ok(())
}

/// The decoder gives exactly one frame for the first of an odd number of latent frames, so clips have an odd number.
fn frame_rule(work: &WorkConfig) -> FrameRule {
    FrameRule { multiple: 2 * work.temporal_ratio, offset: 1 }
}

/// What the model was trained with; the reference's example where the configuration tells the largest grid instead.
fn defaults(config: &TransformerConfig, work: &WorkConfig) -> Defaults {
    const STEPS: usize = 50;
    const GUIDANCE: f64 = 6.0;
    let base = Defaults { width: 1360, height: 768, frames: 81, fps: 16.0, steps: STEPS, guidance: GUIDANCE };
    if config.patch_size_t.is_some() {
        return base;
    }
    Defaults {
        width: config.sample_width * work.spatial_ratio,
        height: config.sample_height * work.spatial_ratio,
        frames: config.sample_frames,
        fps: 8.0,
        ..base
    }
}

fn work_config(
    config: &TransformerConfig,
    vae: &VaeConfig,
    context_tokens: usize,
    parameters: [u64; 3],
) -> WorkConfig {
    const FEED_FACTOR: usize = 4;
    WorkConfig {
        layers: config.num_layers,
        hidden: config.inner(),
        feed_forward: FEED_FACTOR * config.inner(),
        context_tokens,
        context_width: config.text_embed_dim,
        spatial_ratio: vae.spatial_ratio(),
        temporal_ratio: vae.temporal_ratio(),
        patch: config.patch(),
        latent_channels: vae.latent_channels,
        transformer_parameters: parameters[0],
        vae_parameters: parameters[1],
        text_parameters: parameters[2],
    }
}

//! What a Wan folder says of itself, from its configuration files.

use std::path::Path;

use super::config::{CLASS, TransformerConfig};
use super::pipeline::{DEFAULTS, IMAGE_CLASS, NAME, SECOND, TEXT_TOKENS, WanSampler, boundary, sampler};
use super::vae::{WanVaeConfig, config as vae_config};
use crate::error::Error;
use crate::facts::{Attention, Facts, Figures, Part, PromptRule, usual_info};
use crate::folder::{TEXT_STEM, WEIGHTS_STEM, read_t5};
use crate::pipeline::{Defaults, WorkConfig, config_error};
use crate::registry::ModelIndex;
use crate::text::clean::clean;
use crate::text::token_limit;
use crate::vision;

/// What TI2V-5B was made for: finer pictures, faster.
const FINE_DEFAULTS: Defaults = Defaults { width: 1280, height: 704, frames: 121, fps: 24.0, ..DEFAULTS };

/// Reads and checks a folder's configuration.
///
/// # Errors
/// See [`crate::registry::facts`].
pub fn facts(folder: &Path, index: &ModelIndex) -> Result<Facts, Error> {
    index.expect(folder, "transformer", &[CLASS])?;
    index.expect(folder, SECOND, &[CLASS])?;
    index.expect(folder, "vae", &[vae_config::CLASS])?;
    index.expect(folder, "text_encoder", &["UMT5EncoderModel", "T5EncoderModel"])?;
    index.expect(folder, "scheduler", sampler::CLASSES)?;
    index.expect(folder, "tokenizer", &["T5TokenizerFast", "T5Tokenizer"])?;
    index.expect(folder, vision::PART, &["CLIPVisionModel", "CLIPVisionModelWithProjection"])?;
    index.expect(folder, vision::PROCESSOR_PART, &["CLIPImageProcessor"])?;
    let second = boundary(folder, index, WanSampler::load(folder)?.train_timesteps())?.is_some();
    let config = TransformerConfig::read(&folder.join("transformer").join("config.json"))?;
    let vae = WanVaeConfig::read(&folder.join("vae").join("config.json"))?;
    check_fit(folder, &config, &vae)?;
    if second {
        check_second(folder, &config)?;
    }
    let text = read_t5(&folder.join("text_encoder"))?;
    let tokens = token_limit(&folder.join("tokenizer"), TEXT_TOKENS)?;
    let work = work_config(&config, &vae, tokens);
    let form = form(folder, index)?;
    let usual = if form == Form::First { FINE_DEFAULTS } else { DEFAULTS };
    let info = usual_info(folder, NAME, work, usual)?;
    let figures = Figures {
        vae_patch: vae.patch(),
        ..Figures::usual(Attention::Cross, config.inner(), &text, decoder_levels(&vae))
    };
    let mut parts = Part::usual();
    if second {
        parts.push(Part::with(SECOND, WEIGHTS_STEM));
    }
    if form == Form::Clip {
        parts.extend([Part::with(vision::PART, TEXT_STEM), Part::plain(vision::PROCESSOR_PART)]);
    }
    let prompts = PromptRule { clean: Some(clean), ..PromptRule::plain() };
    Ok(Facts { info, figures, prompts, parts, one_size: false })
}

/// How a folder's model takes pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Not at all.
    Text,
    /// As the first latent frame, where one is given.
    First,
    /// As further channels of the latents.
    Channels,
    /// So, and through CLIP.
    Clip,
}

/// By the pipeline's class and the transformer's configuration, which must agree.
pub(super) fn form(folder: &Path, index: &ModelIndex) -> Result<Form, Error> {
    let file = folder.join("transformer").join("config.json");
    let config = TransformerConfig::read(&file)?;
    let vae = WanVaeConfig::read(&folder.join("vae").join("config.json"))?;
    let is_image = index.class == IMAGE_CLASS;
    if index.flag(folder, "expand_timesteps")?.unwrap_or(false) && config.in_channels == vae.z_dim {
        return Ok(Form::First);
    }
    let needed = if is_image { 2 * vae.z_dim + vae.temporal_ratio() } else { vae.z_dim };
    if config.in_channels != needed {
        let reason = format!("{} reads {needed} with this VAE", index.class);
        return Err(config_error(file, "in_channels", config.in_channels, reason));
    }
    let Some(dim) = config.image_dim else {
        return Ok(if is_image { Form::Channels } else { Form::Text });
    };
    if !is_image {
        let reason = format!("{} reads no pictures", index.class);
        return Err(config_error(file, "image_dim", dim, reason));
    }
    let (seen, _) = vision::read_vision(folder)?;
    if seen.hidden_size != dim {
        let reason = format!("the image encoder's states have {}", seen.hidden_size);
        return Err(config_error(file, "image_dim", dim, reason));
    }
    match config.pos_embed_seq_len.filter(|&tokens| tokens != 2 * seen.tokens()) {
        None => Ok(Form::Clip),
        Some(tokens) => {
            let reason = format!("two pictures have {} tokens", 2 * seen.tokens());
            Err(config_error(file, "pos_embed_seq_len", tokens, reason))
        }
    }
}

/// Checks what one part's configuration says about another part.
fn check_fit(folder: &Path, config: &TransformerConfig, latents: &WanVaeConfig) -> Result<(), Error> {
    let file = folder.join("vae").join("config.json");
    if latents.z_dim != config.outputs() {
        let reason = format!("the transformer predicts {} channels", config.outputs());
        return Err(config_error(file, "z_dim", latents.z_dim, reason));
    }
    let ratios = [
        ("scale_factor_spatial", latents.scale_factor_spatial, latents.spatial_ratio()),
        ("scale_factor_temporal", latents.scale_factor_temporal, latents.temporal_ratio()),
    ];
    match ratios.into_iter().find(|(_, said, made)| said != made) {
        Some((key, said, made)) => Err(config_error(file, key, said, format!("the levels make it {made}"))),
        None => Ok(()),
    }
}

/// The second transformer continues what the first one began.
fn check_second(folder: &Path, first: &TransformerConfig) -> Result<(), Error> {
    let file = folder.join(SECOND).join("config.json");
    let second = TransformerConfig::read(&file)?;
    let facts = |config: &TransformerConfig| {
        [
            ("patch_size", format!("{:?}", config.patch_size)),
            ("in_channels", config.in_channels.to_string()),
            ("out_channels", config.outputs().to_string()),
            ("image_dim", format!("{:?}", config.image_dim)),
        ]
    };
    match facts(&second).into_iter().zip(facts(first)).find(|(second, first)| second != first) {
        Some(((key, value), _)) => Err(config_error(file, key, value, "the first transformer has another")),
        None => Ok(()),
    }
}

fn work_config(config: &TransformerConfig, vae: &WanVaeConfig, context_tokens: usize) -> WorkConfig {
    WorkConfig {
        layers: config.num_layers,
        hidden: config.inner(),
        feed_forward: config.ffn_dim,
        context_tokens,
        context_width: config.text_dim,
        spatial_ratio: vae.spatial_ratio(),
        temporal_ratio: vae.temporal_ratio(),
        patch: config.patch_size,
        latent_channels: vae.z_dim,
        ..WorkConfig::default()
    }
}

/// One residual block more than the encoder has in each level, and two in the middle.
fn decoder_levels(vae: &WanVaeConfig) -> Vec<(usize, usize)> {
    let base = vae.decoder_base_dim.unwrap_or(vae.base_dim);
    let mut levels: Vec<_> =
        vae.dim_mult.iter().map(|factor| (base * factor, vae.num_res_blocks + 1)).collect();
    if let Some(coarsest) = levels.last_mut() {
        coarsest.1 += 2;
    }
    levels
}

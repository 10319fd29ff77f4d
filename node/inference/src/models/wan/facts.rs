//! What a Wan folder says of itself, from its configuration files.

use std::path::Path;

use super::config::{CLASS, TransformerConfig};
use super::pipeline::{DEFAULTS, NAME, SECOND, TEXT_TOKENS, WanSampler, boundary, sampler};
use super::vae::{WanVaeConfig, config as vae_config};
use crate::error::Error;
use crate::facts::{Attention, Facts, Figures, Part, PromptRule};
use crate::folder::{Extras, WEIGHTS_STEM, read_t5};
use crate::pipeline::{FrameRule, PipelineInfo, WorkConfig, config_error};
use crate::registry::ModelIndex;
use crate::text::clean::clean;
use crate::text::token_limit;

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
    let info = PipelineInfo {
        architecture: NAME.to_owned(),
        size_multiple: work.spatial_ratio * work.patch[1],
        frame_rule: FrameRule::of_tokens(&work),
        defaults: Extras::read(folder, work.latent_channels)?.defaults.unwrap_or(DEFAULTS),
        token_limit: tokens,
        work,
    };
    let figures = Figures {
        attention: Attention::Cross,
        single_layers: 0,
        feed_forward_matrices: 2,
        text_width: config.inner(),
        text_parameters: text.token_parameters(),
        decoder: decoder_levels(&vae),
        vae_patch: vae.patch(),
        staged: false,
    };
    let mut parts = Part::usual();
    if second {
        parts.push(Part::with(SECOND, WEIGHTS_STEM));
    }
    let prompts = PromptRule { clean: Some(clean), ..PromptRule::plain() };
    Ok(Facts { info, figures, prompts, parts })
}

/// Checks what one part's configuration says about another part.
fn check_fit(folder: &Path, config: &TransformerConfig, latents: &WanVaeConfig) -> Result<(), Error> {
    let file = folder.join("vae").join("config.json");
    if latents.z_dim != config.in_channels {
        let reason = format!("the transformer reads {} channels", config.in_channels);
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
    if second.patch_size == first.patch_size {
        return Ok(());
    }
    let value = format!("{:?}", second.patch_size);
    Err(config_error(file, "patch_size", value, "the first transformer has another"))
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

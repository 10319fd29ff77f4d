//! What a CogVideoX folder says of itself, from its configuration files.

use std::path::Path;

use super::config::{TransformerConfig, VaeConfig};
use super::pipeline::{IMAGE_CLASS, NAME, SCHEDULERS, load_scheduler};
use crate::error::Error;
use crate::facts::{Attention, Facts, Figures, Part, PromptRule, usual_info};
use crate::folder::read_t5;
use crate::pipeline::{Defaults, FrameRule, PipelineInfo, WorkConfig, config_error};
use crate::registry::ModelIndex;
use crate::text::token_limit;

/// Inner width of a feed-forward, in widths of a token.
const FEED_FACTOR: usize = 4;

/// Reads and checks a folder's configuration.
///
/// # Errors
/// See [`crate::registry::facts`].
pub fn facts(folder: &Path, index: &ModelIndex) -> Result<Facts, Error> {
    index.expect(folder, "transformer", &["CogVideoXTransformer3DModel"])?;
    index.expect(folder, "vae", &["AutoencoderKLCogVideoX"])?;
    index.expect(folder, "text_encoder", &["T5EncoderModel"])?;
    index.expect(folder, "tokenizer", &["T5TokenizerFast", "T5Tokenizer"])?;
    index.expect(folder, "scheduler", SCHEDULERS)?;
    load_scheduler(folder, index)?;
    let config = TransformerConfig::read(&folder.join("transformer").join("config.json"))?;
    let vae = VaeConfig::read(&folder.join("vae").join("config.json"))?;
    check_fit(folder, &config, &vae, index.class == IMAGE_CLASS)?;
    let text = read_t5(&folder.join("text_encoder"))?;
    let tokens = token_limit(&folder.join("tokenizer"), config.max_text_seq_length)?;
    let work = work_config(&config, &vae, tokens);
    let usual = defaults(&config, &work);
    let info = PipelineInfo { frame_rule: frame_rule(&work), ..usual_info(folder, NAME, work, usual)? };
    let figures = Figures::usual(Attention::Shared, config.inner(), &text, decoder_levels(&vae));
    let one_size = config.use_learned_positional_embeddings;
    Ok(Facts { info, figures, prompts: PromptRule::plain(), parts: Part::usual(), one_size })
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
        let reason = format!("the VAE's is {needed}");
        return Err(config_error(&file, "temporal_compression_ratio", given, reason));
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

fn work_config(config: &TransformerConfig, vae: &VaeConfig, context_tokens: usize) -> WorkConfig {
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
        ..WorkConfig::default()
    }
}

/// One residual block more than the encoder has in each block, and two in the middle.
fn decoder_levels(vae: &VaeConfig) -> Vec<(usize, usize)> {
    let mut levels: Vec<_> =
        vae.block_out_channels.iter().map(|&width| (width, vae.layers_per_block + 1)).collect();
    if let Some(coarsest) = levels.last_mut() {
        coarsest.1 += 2;
    }
    levels
}

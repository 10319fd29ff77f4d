//! What an LTX-Video folder says of itself, from its configuration files.

use std::path::Path;

use super::checkpoint::Checkpoint;
use super::config::TransformerConfig;
use super::pipeline::{DEFAULTS, LtxClass, NAME, read_scheduler, read_transformer_config, read_vae_config};
use super::upsampler::{self, UpsamplerConfig};
use super::vae::LtxVaeConfig;
use crate::error::Error;
use crate::facts::{Attention, Facts, Figures, Part, PromptRule, usual_info};
use crate::folder::{WEIGHTS_STEM, read_t5};
use crate::pipeline::{WorkConfig, config_error};
use crate::registry::ModelIndex;
use crate::text::token_limit;

/// Inner width of a feed-forward, in widths of a token.
const FEED_FACTOR: usize = 4;

/// Reads and checks a folder's configuration.
///
/// # Errors
/// See [`crate::registry::facts`].
pub fn facts(folder: &Path, index: &ModelIndex) -> Result<Facts, Error> {
    let class = class(folder, index)?;
    index.expect(folder, "transformer", &["LTXVideoTransformer3DModel"])?;
    index.expect(folder, "vae", &["AutoencoderKLLTXVideo"])?;
    index.expect(folder, "text_encoder", &["T5EncoderModel"])?;
    index.expect(folder, "tokenizer", &["T5TokenizerFast", "T5Tokenizer"])?;
    index.expect(folder, "scheduler", &["FlowMatchEulerDiscreteScheduler"])?;
    read_scheduler(folder)?;
    let config = read_transformer_config(folder)?;
    let vae = read_vae_config(folder)?;
    let text = read_t5(&folder.join("text_encoder"))?;
    let tokens = token_limit(&folder.join("tokenizer"), class.text_tokens())?;
    let work = work_config(&config, &vae, tokens);
    let info = usual_info(folder, NAME, work, DEFAULTS)?;
    let figures = Figures {
        vae_patch: vae.patch_size,
        ..Figures::usual(Attention::Cross, config.cross_attention_dim, &text, decoder_levels(&vae))
    };
    let mut parts = parts(folder)?;
    if UpsamplerConfig::find(folder)?.is_some() {
        parts.push(Part::with(upsampler::PART, WEIGHTS_STEM));
    }
    Ok(Facts { info, figures, prompts: PromptRule::plain(), parts, one_size: false })
}

fn parts(folder: &Path) -> Result<Vec<Part>, Error> {
    let Some(single) = Checkpoint::find(folder)? else { return Ok(Part::usual()) };
    let mut parts = Part::text();
    parts.push(Part::file(single.file()));
    if folder.join("scheduler").is_dir() {
        parts.push(Part::plain("scheduler"));
    }
    Ok(parts)
}

/// Which of the reference's pipelines a folder names.
pub(super) fn class(folder: &Path, index: &ModelIndex) -> Result<LtxClass, Error> {
    LtxClass::from_name(&index.class).ok_or_else(|| {
        config_error(folder.join("model_index.json"), "_class_name", &index.class, "no pipeline of LTX-Video")
    })
}

fn work_config(config: &TransformerConfig, vae: &LtxVaeConfig, context_tokens: usize) -> WorkConfig {
    WorkConfig {
        layers: config.num_layers,
        hidden: config.inner(),
        feed_forward: FEED_FACTOR * config.inner(),
        context_tokens,
        context_width: config.caption_channels,
        spatial_ratio: vae.spatial_ratio(),
        temporal_ratio: vae.temporal_ratio(),
        patch: [config.patch_size_t, config.patch_size, config.patch_size],
        latent_channels: vae.latent_channels,
        ..WorkConfig::default()
    }
}

/// Blocks between which nothing grows are of one resolution, the widest of them counts.
fn decoder_levels(vae: &LtxVaeConfig) -> Vec<(usize, usize)> {
    let mut levels = vec![(vae.decoder.width, vae.decoder.layers)];
    for block in &vae.decoder.blocks {
        match levels.last_mut() {
            Some(level) if !block.scale => *level = (level.0.max(block.output), level.1 + block.layers),
            _ => levels.push((block.output, block.layers)),
        }
    }
    levels.reverse();
    levels
}

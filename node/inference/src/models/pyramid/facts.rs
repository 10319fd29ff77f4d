//! What a Pyramid Flow folder says of itself, from its configuration files.

use std::path::Path;

use super::config::{PATCH, TransformerConfig};
use super::pipeline::{
    CLIP_FOLDER, NAME, OwnExtras, PyramidSettings, T5_FOLDER, TEXT_TOKENS, VAE_FOLDER, transformer_folder,
};
use super::vae::PyramidVaeConfig;
use crate::error::Error;
use crate::facts::{Attention, Facts, Figures, Part, PromptRule};
use crate::folder::{Extras, TEXT_STEM, WEIGHTS_STEM, read_t5};
use crate::pipeline::{Defaults, FrameRule, PipelineInfo, WorkConfig, config_error, read_json};
use crate::text::{ClipTextConfig, T5Config, token_limit};

/// Inner width of a feed-forward, in widths of a token.
const FEED_FACTOR: usize = 4;
/// Residual blocks in the middle of the VAE's decoder.
const MIDDLE: usize = 2;
/// The folder of T5's tokenizer, whose limit counts: what CLIP does not read is in T5's text.
pub(super) const T5_TOKENIZER: &str = "tokenizer_2";
/// The folder of CLIP's.
pub(super) const CLIP_TOKENIZER: &str = "tokenizer";

/// Reads and checks a folder's configuration.
///
/// # Errors
/// See [`crate::registry::facts`].
pub fn facts(folder: &Path) -> Result<Facts, Error> {
    let own = OwnExtras::read(folder)?;
    let (part, usual) = transformer_folder(folder, own.transformer.as_deref())?;
    let config = TransformerConfig::read(&part.join("config.json"))?;
    let vae = PyramidVaeConfig::read(&folder.join(VAE_FOLDER).join("config.json"))?;
    let t5 = read_t5(&folder.join(T5_FOLDER))?;
    check_widths(folder, &part, (&config, &vae, &t5))?;
    let tokens = token_limit(&folder.join(T5_TOKENIZER), TEXT_TOKENS)?;
    let work = work_config(&config, &vae, tokens);
    let defaults = Extras::read(folder, work.latent_channels)?.defaults.unwrap_or(usual);
    let figures = Figures {
        attention: Attention::Joint,
        single_layers: config.num_single_layers,
        feed_forward_matrices: 2,
        text_width: config.inner(),
        // CLIP, a fortieth of T5, is left out.
        text_parameters: t5.token_parameters(),
        decoder: decoder_levels(&vae),
        vae_patch: 1,
        staged: true,
    };
    let transformer = part.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let parts = vec![
        Part::with(transformer, WEIGHTS_STEM),
        Part::with(VAE_FOLDER, WEIGHTS_STEM),
        Part::with(CLIP_FOLDER, TEXT_STEM),
        Part::with(T5_FOLDER, TEXT_STEM),
        Part::plain(CLIP_TOKENIZER),
        Part::plain(T5_TOKENIZER),
    ];
    let suffix = own.pyramid.prompt_suffix.clone();
    let prompts = PromptRule { tokenizer: T5_TOKENIZER, clean: None, suffix };
    Ok(Facts { info: info(&own.pyramid, work, defaults), figures, prompts, parts, one_size: false })
}

/// What follows from the settings.
pub(super) fn info(settings: &PyramidSettings, work: WorkConfig, defaults: Defaults) -> PipelineInfo {
    let stages = settings.scheduler.stage_range.len() - 1;
    PipelineInfo {
        architecture: NAME.to_owned(),
        size_multiple: (work.spatial_ratio * PATCH) << (stages - 1),
        frame_rule: FrameRule { multiple: work.temporal_ratio * settings.frames_per_unit, offset: 1 },
        defaults,
        token_limit: work.context_tokens,
        work,
    }
}

/// What one part gives must be what the next takes.
fn check_widths(
    folder: &Path,
    part: &Path,
    (config, vae, t5): (&TransformerConfig, &PyramidVaeConfig, &T5Config),
) -> Result<(), Error> {
    let clip_file = folder.join(CLIP_FOLDER).join("config.json");
    let clip: ClipTextConfig = read_json(&clip_file)?;
    clip.check(&clip_file)?;
    let widths = [
        ("in_channels", config.in_channels, vae.latent_channels() * PATCH * PATCH, VAE_FOLDER),
        ("joint_attention_dim", config.joint_attention_dim, t5.d_model, T5_FOLDER),
        ("pooled_projection_dim", config.pooled_projection_dim, clip.hidden_size, CLIP_FOLDER),
    ];
    match widths.into_iter().find(|(_, takes, gives, _)| takes != gives) {
        Some((key, takes, gives, from)) => {
            let file = part.join("config.json");
            Err(config_error(file, key, takes, format!("{from} gives a width of {gives}")))
        }
        None => Ok(()),
    }
}

fn work_config(config: &TransformerConfig, vae: &PyramidVaeConfig, context_tokens: usize) -> WorkConfig {
    WorkConfig {
        layers: config.num_layers + config.num_single_layers,
        hidden: config.inner(),
        feed_forward: FEED_FACTOR * config.inner(),
        context_tokens,
        context_width: config.joint_attention_dim,
        spatial_ratio: vae.downsample_scale,
        temporal_ratio: vae.downsample_scale,
        patch: [1, PATCH, PATCH],
        latent_channels: vae.latent_channels(),
        ..WorkConfig::default()
    }
}

/// Widths stand in the file from the video on, numbers of blocks from the latents on.
fn decoder_levels(vae: &PyramidVaeConfig) -> Vec<(usize, usize)> {
    let layers = vae.decoder_layers_per_block.iter().rev().copied();
    let mut levels: Vec<_> = vae.decoder_block_out_channels.iter().copied().zip(layers).collect();
    if let Some(coarsest) = levels.last_mut() {
        coarsest.1 += MIDDLE;
    }
    levels
}

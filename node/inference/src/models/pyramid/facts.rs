//! What a Pyramid Flow folder says of itself, from its configuration files.

use std::path::Path;

use super::config::{PATCH, TransformerConfig, Variant};
use super::pipeline::{
    NAME, OwnExtras, PyramidSettings, TEXT_TOKENS, Usual, VAE_FOLDER, read_clip, transformer_folder,
};
use super::vae::PyramidVaeConfig;
use crate::error::Error;
use crate::facts::{Attention, Facts, Figures, Part, PromptRule};
use crate::folder::{Extras, TEXT_STEM, WEIGHTS_STEM, check_agree, read_t5};
use crate::pipeline::{Defaults, FrameRule, PipelineInfo, WorkConfig};
use crate::text::{ClipTextConfig, T5Config, token_limit};

/// Inner width of a feed-forward, in widths of a token.
const FEED_FACTOR: usize = 4;
/// Residual blocks in the middle of the VAE's decoder.
const MIDDLE: usize = 2;

/// Reads and checks a folder's configuration.
///
/// # Errors
/// See [`crate::registry::facts`].
pub fn facts(folder: &Path) -> Result<Facts, Error> {
    let own = OwnExtras::read(folder)?;
    let part = transformer_folder(folder, own.transformer.as_deref())?;
    let config = TransformerConfig::read(&part.join("config.json"))?;
    let usual = Usual::of(config.variant, &part);
    let (settings, _) = own.settle(folder, &usual)?;
    let vae = PyramidVaeConfig::read(&folder.join(VAE_FOLDER).join("config.json"))?;
    let text = config.variant.t5();
    let t5 = read_t5(&folder.join(text.encoder))?;
    let clips = config.variant.clips().iter().map(|parts| read_clip(&folder.join(parts.encoder)));
    let clips = clips.collect::<Result<Vec<_>, _>>()?;
    check_widths(&part, &config, &vae, (&clips, &t5))?;
    let tokens = token_limit(&folder.join(text.tokenizer), TEXT_TOKENS)?;
    let work = work_config(&config, &vae, tokens);
    let defaults = Extras::read(folder, work.latent_channels)?.defaults.unwrap_or(usual.defaults);
    let figures = Figures {
        attention: Attention::Joint,
        single_layers: config.num_single_layers,
        feed_forward_matrices: 2,
        text_width: config.inner(),
        text_parameters: text_parameters(config.variant, &clips, &t5),
        decoder: decoder_levels(&vae),
        vae_patch: 1,
        staged: true,
    };
    let transformer = part.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let mut parts = vec![Part::with(transformer, WEIGHTS_STEM), Part::with(VAE_FOLDER, WEIGHTS_STEM)];
    for of_text in config.variant.clips().iter().chain([&text]) {
        parts.extend([Part::with(of_text.encoder, TEXT_STEM), Part::plain(of_text.tokenizer)]);
    }
    let suffix = settings.prompt_suffix.clone();
    let prompts = PromptRule { tokenizer: text.tokenizer, clean: None, suffix };
    Ok(Facts { info: info(&settings, work, defaults), figures, prompts, parts, one_size: false })
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
    part: &Path,
    config: &TransformerConfig,
    vae: &PyramidVaeConfig,
    (clips, t5): (&[ClipTextConfig], &T5Config),
) -> Result<(), Error> {
    let projects = config.variant.projects();
    let vector = |clip: &ClipTextConfig| if projects { clip.projection_dim } else { clip.hidden_size };
    let pooled = clips.iter().fold(0, |all: usize, clip| all.saturating_add(vector(clip)));
    let cells = if config.variant == Variant::Flux { PATCH * PATCH } else { 1 };
    let (takes, gives) = (config.latent_channels * cells, vae.latent_channels().saturating_mul(cells));
    let settings = [
        ("in_channels", takes, gives, "the VAE gives"),
        ("joint_attention_dim", config.joint_attention_dim, t5.d_model, "T5 gives a width of"),
        ("pooled_projection_dim", config.pooled_projection_dim, pooled, "CLIP gives a width of"),
    ];
    check_agree(&part.join("config.json"), &settings)
}

/// miniFLUX's CLIP, a fortieth of T5, is left out.
fn text_parameters(variant: Variant, clips: &[ClipTextConfig], t5: &T5Config) -> u64 {
    let t5 = t5.token_parameters();
    match variant {
        Variant::Flux => t5,
        Variant::Mmdit => clips.iter().fold(t5, |all, clip| all.saturating_add(clip.token_parameters())),
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

//! What a Mochi folder says of itself, from its configuration files.

use std::path::Path;

use super::config::TransformerConfig;
use super::pipeline::{DEFAULTS, NAME, load_scheduler};
use super::vae::MochiVaeConfig;
use crate::error::Error;
use crate::facts::{Attention, Facts, Figures, Part, PromptRule, usual_info};
use crate::folder::{check_agree, read_t5};
use crate::pipeline::WorkConfig;
use crate::registry::ModelIndex;
use crate::text::{T5Config, token_limit};

/// Reads and checks a folder's configuration.
///
/// # Errors
/// See [`crate::registry::facts`].
pub fn facts(folder: &Path, index: &ModelIndex) -> Result<Facts, Error> {
    index.expect(folder, "transformer", &["MochiTransformer3DModel"])?;
    index.expect(folder, "vae", &["AutoencoderKLMochi"])?;
    index.expect(folder, "text_encoder", &["T5EncoderModel"])?;
    index.expect(folder, "tokenizer", &["T5TokenizerFast", "T5Tokenizer"])?;
    index.expect(folder, "scheduler", &["FlowMatchEulerDiscreteScheduler"])?;
    index.flag(folder, "force_zeros_for_empty_prompt")?;
    load_scheduler(folder)?;
    let file = folder.join("transformer").join("config.json");
    let config = TransformerConfig::read(&file)?;
    let vae = MochiVaeConfig::read(&folder.join("vae").join("config.json"))?;
    let text = read_t5(&folder.join("text_encoder"))?;
    check_fit(&file, &config, &vae, &text)?;
    let tokens = token_limit(&folder.join("tokenizer"), config.max_sequence_length)?;
    let work = work_config(&config, &vae, tokens);
    let info = usual_info(folder, NAME, work, DEFAULTS)?;
    let figures = Figures {
        feed_forward_matrices: 3,
        ..Figures::usual(Attention::Joint, config.pooled_projection_dim, &text, decoder_levels(&vae))
    };
    Ok(Facts { info, figures, prompts: PromptRule::plain(), parts: Part::usual(), one_size: false })
}

/// Whether what one part gives is what the next takes, as their configurations say.
fn check_fit(
    file: &Path,
    transformer: &TransformerConfig,
    vae: &MochiVaeConfig,
    text: &T5Config,
) -> Result<(), Error> {
    let settings = [
        ("in_channels", transformer.in_channels, vae.latent_channels, "the VAE's latents have channels:"),
        (
            "text_embed_dim",
            transformer.text_embed_dim,
            text.d_model,
            "the text encoder's embeddings have channels:",
        ),
    ];
    check_agree(file, &settings)
}

fn work_config(config: &TransformerConfig, vae: &MochiVaeConfig, context_tokens: usize) -> WorkConfig {
    WorkConfig {
        layers: config.num_layers,
        hidden: config.inner(),
        feed_forward: TransformerConfig::feed_forward(config.inner()),
        context_tokens,
        context_width: config.text_embed_dim,
        spatial_ratio: vae.spatial_ratio(),
        temporal_ratio: vae.temporal_ratio(),
        patch: [1, config.patch_size, config.patch_size],
        latent_channels: vae.latent_channels,
        ..WorkConfig::default()
    }
}

/// Each width has its residual blocks before it grows, and the coarsest those of the middle too.
fn decoder_levels(vae: &MochiVaeConfig) -> Vec<(usize, usize)> {
    let widths = &vae.decoder_block_out_channels;
    let mut levels: Vec<_> = widths.iter().copied().zip(vae.layers_per_block.iter().copied()).collect();
    if let (Some(coarsest), Some(middle)) = (levels.last_mut(), vae.layers_per_block.get(widths.len())) {
        coarsest.1 += middle;
    }
    levels
}

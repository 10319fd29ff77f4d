//! `transformer/config.json` of Mochi, and what of it this engine computes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::{check_counts, check_only, check_others};
use crate::pipeline::{config_error, read_json};

/// Heads of the attention that pools the text into one vector; the format has no key for it.
pub const POOL_HEADS: usize = 8;

/// The transformer's configuration; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TransformerConfig {
    /// Latent cells along a side of a token.
    pub patch_size: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Width of a text token inside.
    pub pooled_projection_dim: usize,
    /// Latent channels.
    pub in_channels: usize,
    /// Channels of a prediction; as many as `in_channels` where the file says null.
    pub out_channels: Option<usize>,
    /// `rms_norm`.
    pub qk_norm: String,
    /// Width of the text encoder's output.
    pub text_embed_dim: usize,
    /// Width of the timestep's sinusoids.
    pub time_embed_dim: usize,
    /// `swiglu`.
    pub activation_fn: String,
    /// Text tokens that it reads.
    pub max_sequence_length: usize,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for TransformerConfig {
    fn default() -> Self {
        Self {
            patch_size: 2,
            num_attention_heads: 24,
            attention_head_dim: 128,
            num_layers: 48,
            pooled_projection_dim: 1536,
            in_channels: 12,
            out_channels: None,
            qk_norm: "rms_norm".to_owned(),
            text_embed_dim: 4096,
            time_embed_dim: 256,
            activation_fn: "swiglu".to_owned(),
            max_sequence_length: 256,
            others: Map::new(),
        }
    }
}

impl TransformerConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or holds a value that this engine does not compute; the error names file, key and value.
    pub fn read(file: &Path) -> Result<Self, Error> {
        let config: Self = read_json(file)?;
        config.check(file)?;
        Ok(config)
    }

    /// Width of a video token inside.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of a prediction.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.out_channels.filter(|&channels| channels > 0).unwrap_or(self.in_channels)
    }

    /// Inner width of the feed-forward part of a stream of `width`.
    #[must_use]
    pub fn feed_forward(width: usize) -> usize {
        4 * width * 2 / 3
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        check_others(file, &self.others, "MochiTransformer3DModel")?;
        check_only(file, "qk_norm", &self.qk_norm.as_str(), &"rms_norm")?;
        check_only(file, "activation_fn", &self.activation_fn.as_str(), &"swiglu")?;
        check_counts(
            file,
            &[
                ("patch_size", self.patch_size),
                ("num_attention_heads", self.num_attention_heads),
                ("attention_head_dim", self.attention_head_dim),
                ("num_layers", self.num_layers),
                ("pooled_projection_dim", self.pooled_projection_dim),
                ("in_channels", self.in_channels),
                ("text_embed_dim", self.text_embed_dim),
                ("time_embed_dim", self.time_embed_dim),
                ("max_sequence_length", self.max_sequence_length),
            ],
        )?;
        let fault = |key: &str, value: usize, reason: String| Err(config_error(file, key, value, reason));
        if !self.attention_head_dim.is_multiple_of(2) {
            let reason = "rotary embedding turns pairs of channels".to_owned();
            return fault("attention_head_dim", self.attention_head_dim, reason);
        }
        if !self.text_embed_dim.is_multiple_of(POOL_HEADS) {
            let reason = format!("it is split into {POOL_HEADS} heads");
            return fault("text_embed_dim", self.text_embed_dim, reason);
        }
        if self.outputs() != self.in_channels {
            let reason = format!("a step adds a prediction to latents of {} channels", self.in_channels);
            return fault("out_channels", self.outputs(), reason);
        }
        Ok(())
    }
}

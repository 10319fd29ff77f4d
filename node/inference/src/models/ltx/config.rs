//! `transformer/config.json` of LTX-Video, and what of it this engine computes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::pipeline::{config_error, read_json};
use crate::sampler::flow_match::means_something;

/// The transformer's configuration; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TransformerConfig {
    /// Channels of a token.
    pub in_channels: usize,
    /// Channels of a prediction; as many as `in_channels` where the file says null.
    pub out_channels: Option<usize>,
    /// Latent cells along a side of a token.
    pub patch_size: usize,
    /// Latent frames in a token.
    pub patch_size_t: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Width of what cross-attention reads.
    pub cross_attention_dim: usize,
    /// Blocks.
    pub num_layers: usize,
    /// `gelu-approximate`.
    pub activation_fn: String,
    /// `rms_norm_across_heads`.
    pub qk_norm: String,
    /// Whether the blocks' norms have weights.
    pub norm_elementwise_affine: bool,
    /// Added to the mean square in the blocks' norms.
    pub norm_eps: f64,
    /// Width of the text encoder's output.
    pub caption_channels: usize,
    /// Whether query, key and value have a bias.
    pub attention_bias: bool,
    /// Whether the attention's output has a bias.
    pub attention_out_bias: bool,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for TransformerConfig {
    fn default() -> Self {
        Self {
            in_channels: 128,
            out_channels: Some(128),
            patch_size: 1,
            patch_size_t: 1,
            num_attention_heads: 32,
            attention_head_dim: 64,
            cross_attention_dim: 2048,
            num_layers: 28,
            activation_fn: "gelu-approximate".to_owned(),
            qk_norm: "rms_norm_across_heads".to_owned(),
            norm_elementwise_affine: false,
            norm_eps: 1e-6,
            caption_channels: 4096,
            attention_bias: true,
            attention_out_bias: true,
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
        Self::of_value(file, read_json(file)?)
    }

    /// The same of what was read already.
    ///
    /// # Errors
    /// As [`TransformerConfig::read`].
    pub fn of_value(file: &Path, value: Value) -> Result<Self, Error> {
        let config: Self =
            serde_json::from_value(value).map_err(|error| config_error(file, "", "not readable", error))?;
        config.check(file)?;
        Ok(config)
    }

    /// Width of a token inside.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of a prediction.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.out_channels.filter(|&channels| channels > 0).unwrap_or(self.in_channels)
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        let known = [
            ("activation_fn", &self.activation_fn, "gelu-approximate"),
            ("qk_norm", &self.qk_norm, "rms_norm_across_heads"),
        ];
        for (key, value, only) in known {
            if value != only {
                return Err(config_error(file, key, format!("{value:?}"), format!("only {only:?} is known")));
            }
        }
        let class = self.others.get("_class_name").and_then(Value::as_str);
        if let Some(class) = class.filter(|&class| class != "LTXVideoTransformer3DModel") {
            return Err(config_error(file, "_class_name", class, "only LTXVideoTransformer3DModel is known"));
        }
        let strange = self.others.iter().find(|(key, value)| !key.starts_with('_') && means_something(value));
        if let Some((key, value)) = strange {
            return Err(config_error(file, key, value, "this setting is not known"));
        }
        let counts = [
            ("in_channels", self.in_channels),
            ("patch_size", self.patch_size),
            ("patch_size_t", self.patch_size_t),
            ("num_attention_heads", self.num_attention_heads),
            ("attention_head_dim", self.attention_head_dim),
            ("num_layers", self.num_layers),
            ("caption_channels", self.caption_channels),
        ];
        if let Some((key, value)) = counts.into_iter().find(|&(_, value)| value == 0) {
            return Err(config_error(file, key, value, "it must be at least 1"));
        }
        if !self.inner().is_multiple_of(2) || self.inner() < 6 {
            let width = self.inner();
            return Err(config_error(
                file,
                "attention_head_dim",
                self.attention_head_dim,
                format!("heads times width is {width}, rotary embedding needs an even number of at least 6"),
            ));
        }
        if self.cross_attention_dim != self.inner() {
            return Err(config_error(
                file,
                "cross_attention_dim",
                self.cross_attention_dim,
                format!("the projected caption has width {}", self.inner()),
            ));
        }
        Ok(())
    }
}

//! `transformer/config.json` of Wan, and what of it this engine computes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::{check_counts, check_only, check_others};
use crate::pipeline::{config_error, read_json};

/// The transformer's class.
pub const CLASS: &str = "WanTransformer3DModel";

/// The transformer's configuration; what a file leaves out has the reference's default, which is the 14B form.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TransformerConfig {
    /// Latent cells in a token: time, height, width.
    pub patch_size: [usize; 3],
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Latent channels that are read.
    pub in_channels: usize,
    /// Latent channels that are predicted; as many as `in_channels` where the file says null.
    pub out_channels: Option<usize>,
    /// Width of the text encoder's output.
    pub text_dim: usize,
    /// Width of the timestep's sinusoids.
    pub freq_dim: usize,
    /// Inner width of a feed-forward.
    pub ffn_dim: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Whether what goes into cross-attention is normed.
    pub cross_attn_norm: bool,
    /// `rms_norm_across_heads`.
    pub qk_norm: Option<String>,
    /// Added to the mean square or the variance in every norm.
    pub eps: f64,
    /// Positions along an axis for which there are rotary angles.
    pub rope_max_seq_len: usize,
    /// Width of the states that a picture's encoder gives, for forms that read them.
    pub image_dim: Option<usize>,
    /// Width of what the keys and values of pictures are made of.
    pub added_kv_proj_dim: Option<usize>,
    /// Tokens of two pictures, for forms that give them positions of their own.
    pub pos_embed_seq_len: Option<usize>,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for TransformerConfig {
    fn default() -> Self {
        Self {
            patch_size: [1, 2, 2],
            num_attention_heads: 40,
            attention_head_dim: 128,
            in_channels: 16,
            out_channels: Some(16),
            text_dim: 4096,
            freq_dim: 256,
            ffn_dim: 13_824,
            num_layers: 40,
            cross_attn_norm: true,
            qk_norm: Some(QK_NORM.to_owned()),
            eps: 1e-6,
            rope_max_seq_len: 1024,
            image_dim: None,
            added_kv_proj_dim: None,
            pos_embed_seq_len: None,
            others: Map::new(),
        }
    }
}

const QK_NORM: &str = "rms_norm_across_heads";
/// A head is split into three axes of whole pairs.
const LEAST_HEAD: usize = 6;

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

    /// Width of a token inside.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Width of the states of pictures, where the blocks attend to some: with `image_dim` alone nothing would.
    #[must_use]
    pub fn states(&self) -> Option<usize> {
        self.image_dim.filter(|_| self.added_kv_proj_dim.is_some())
    }

    /// Latent channels of a prediction.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.out_channels.filter(|&channels| channels > 0).unwrap_or(self.in_channels)
    }

    /// Latent cells in a token.
    #[must_use]
    pub fn cells(&self) -> usize {
        self.patch_size.iter().product()
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        check_only(file, "qk_norm", &self.qk_norm, &Some(QK_NORM.to_owned()))?;
        let inner = self.inner();
        // The states of pictures are brought to this width first; the reference loads another one and cannot compute.
        if let Some(given) = self.added_kv_proj_dim.filter(|&given| given != inner) {
            let reason = format!("it can be the width of a token alone, which is {inner}");
            return Err(config_error(file, "added_kv_proj_dim", given, reason));
        }
        if let Some(odd) =
            self.pos_embed_seq_len.filter(|len| !len.is_multiple_of(2) && self.states().is_some())
        {
            let reason = "it is for the tokens of two pictures";
            return Err(config_error(file, "pos_embed_seq_len", odd, reason));
        }
        check_others(file, &self.others, CLASS)?;
        self.check_sizes(file)
    }

    fn check_sizes(&self, file: &Path) -> Result<(), Error> {
        let counts: &[(&str, usize)] = &[
            ("patch_size", self.cells()),
            ("num_attention_heads", self.num_attention_heads),
            ("in_channels", self.in_channels),
            ("text_dim", self.text_dim),
            ("freq_dim", self.freq_dim),
            ("ffn_dim", self.ffn_dim),
            ("num_layers", self.num_layers),
            ("rope_max_seq_len", self.rope_max_seq_len),
        ];
        check_counts(file, counts)?;
        let head = self.attention_head_dim;
        if head < LEAST_HEAD || !head.is_multiple_of(2) {
            let reason = format!("rotary embedding needs an even number of at least {LEAST_HEAD}");
            return Err(config_error(file, "attention_head_dim", head, reason));
        }
        if self.patch_size[1] != self.patch_size[2] {
            let value = format!("{:?}", self.patch_size);
            return Err(config_error(file, "patch_size", value, "tokens must be as high as wide"));
        }
        if self.outputs() > self.in_channels {
            let reason = format!(
                "a velocity is of the {} channels that are read, or of some of them",
                self.in_channels
            );
            return Err(config_error(file, "out_channels", self.outputs(), reason));
        }
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            return Err(config_error(file, "eps", self.eps, "it must be a number of at least 0"));
        }
        Ok(())
    }
}

//! `config.json` of the SD3 transformer (the authors' `PyramidDiffusionMMDiT`).

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{NO_MATTER, PATCH, TransformerConfig, Variant, check_known};
use crate::error::Error;
use crate::folder::{check_counts, check_only};
use crate::pipeline::{config_error, read_json};

/// What the reference's pipeline sets itself, whatever the file says: text is masked, time turns queries and keys,
/// nothing attends to later frames, positions of smaller pictures are spread over the large one.
const SET_BY_THE_PIPELINE: &[&str] = &[
    "add_temp_pos_embed",
    "interp_condition_pos",
    "temp_pos_embed_type",
    "use_t5_mask",
    "use_temporal_causal",
];
/// What the stored table of positions was computed from, and the length of one that is not used beside it.
const OF_THE_TABLE: &[&str] = &["sample_size", "max_num_frames"];

/// What the file holds; what it leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct MmditConfig {
    /// Only 2.
    pub patch_size: usize,
    /// Channels of a latent cell.
    pub in_channels: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a text token inside: that of a video token.
    pub caption_projection_dim: usize,
    /// Width of the text encoder's output.
    pub joint_attention_dim: usize,
    /// Width of the text as one vector.
    pub pooled_projection_dim: usize,
    /// Rows and columns of the table of positions.
    pub pos_embed_max_size: usize,
    /// Only `sincos`: the reference has no videos with the other.
    pub pos_embed_type: String,
    /// Only `rms_norm`.
    pub qk_norm: String,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for MmditConfig {
    fn default() -> Self {
        Self {
            patch_size: 2,
            in_channels: 16,
            num_layers: 24,
            attention_head_dim: 64,
            num_attention_heads: 24,
            caption_projection_dim: 1152,
            joint_attention_dim: 4096,
            pooled_projection_dim: 2048,
            pos_embed_max_size: 192,
            pos_embed_type: "rope".to_owned(),
            qk_norm: "rms_norm".to_owned(),
            others: Map::new(),
        }
    }
}

impl MmditConfig {
    /// Reads and checks a file.
    pub(super) fn read(file: &Path) -> Result<TransformerConfig, Error> {
        let config: Self = read_json(file)?;
        config.check(file)?;
        Ok(config.settled())
    }

    /// As the transformer is built.
    #[must_use]
    pub fn settled(&self) -> TransformerConfig {
        TransformerConfig {
            variant: Variant::Mmdit,
            num_layers: self.num_layers,
            num_single_layers: 0,
            attention_head_dim: self.attention_head_dim,
            num_attention_heads: self.num_attention_heads,
            joint_attention_dim: self.joint_attention_dim,
            pooled_projection_dim: self.pooled_projection_dim,
            latent_channels: self.in_channels,
            // Only time turns, over a head's whole width.
            axes: vec![self.attention_head_dim],
            positions: Some(self.pos_embed_max_size),
        }
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        check_known(file, &self.others, &[NO_MATTER, SET_BY_THE_PIPELINE, OF_THE_TABLE], Variant::Mmdit)?;
        check_only(file, "patch_size", &self.patch_size, &PATCH)?;
        check_only(file, "pos_embed_type", &self.pos_embed_type.as_str(), &"sincos")?;
        check_only(file, "qk_norm", &self.qk_norm.as_str(), &"rms_norm")?;
        let counts = [
            ("in_channels", self.in_channels),
            ("num_layers", self.num_layers),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
            ("pos_embed_max_size", self.pos_embed_max_size),
        ];
        check_counts(file, &counts)?;
        if !self.attention_head_dim.is_multiple_of(2) {
            let reason = "it must be a multiple of 2";
            return Err(config_error(file, "attention_head_dim", self.attention_head_dim, reason));
        }
        check_only(file, "caption_projection_dim", &self.caption_projection_dim, &self.settled().inner())
    }
}

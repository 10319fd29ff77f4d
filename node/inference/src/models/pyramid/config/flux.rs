//! `config.json` of the miniFLUX transformer (the authors' `PyramidFluxTransformer`).

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{NO_MATTER, PATCH, TransformerConfig, Variant, check_known};
use crate::error::Error;
use crate::folder::{check_counts, check_only};
use crate::pipeline::{config_error, read_json};

/// What the file holds; what it leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct FluxConfig {
    /// Only 1: the reference's patches of 2 x 2 cells are counted in `in_channels`.
    pub patch_size: usize,
    /// Channels of a token: four times those of a latent cell.
    pub in_channels: usize,
    /// Blocks with a text stream of their own.
    pub num_layers: usize,
    /// Blocks with text and video in one stream.
    pub num_single_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of the text encoder's output.
    pub joint_attention_dim: usize,
    /// Width of the text as one vector.
    pub pooled_projection_dim: usize,
    /// Channels of a head that time, height and width turn.
    pub axes_dims_rope: Vec<usize>,
    /// Only true: nothing attends to later frames.
    pub use_temporal_causal: bool,
    /// Only true: positions of smaller pictures are spread over the large one.
    pub interp_condition_pos: bool,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for FluxConfig {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 64,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            axes_dims_rope: vec![16, 24, 24],
            use_temporal_causal: true,
            interp_condition_pos: true,
            others: Map::new(),
        }
    }
}

impl FluxConfig {
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
            variant: Variant::Flux,
            num_layers: self.num_layers,
            num_single_layers: self.num_single_layers,
            attention_head_dim: self.attention_head_dim,
            num_attention_heads: self.num_attention_heads,
            joint_attention_dim: self.joint_attention_dim,
            pooled_projection_dim: self.pooled_projection_dim,
            latent_channels: self.in_channels / (PATCH * PATCH),
            axes: self.axes_dims_rope.clone(),
            positions: None,
        }
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        check_known(file, &self.others, &[NO_MATTER], Variant::Flux)?;
        check_only(file, "patch_size", &self.patch_size, &1)?;
        check_only(file, "use_temporal_causal", &self.use_temporal_causal, &true)?;
        check_only(file, "interp_condition_pos", &self.interp_condition_pos, &true)?;
        let counts = [
            ("in_channels", self.in_channels),
            ("num_layers", self.num_layers),
            ("num_single_layers", self.num_single_layers),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
        ];
        check_counts(file, &counts)?;
        if !self.in_channels.is_multiple_of(PATCH * PATCH) {
            return Err(config_error(file, "in_channels", self.in_channels, "it must be a multiple of 4"));
        }
        let axes = &self.axes_dims_rope;
        let even = axes.iter().all(|width| width.is_multiple_of(2));
        if axes.len() != 3 || !even || axes.iter().sum::<usize>() != self.attention_head_dim {
            let reason = format!("three even widths of {} together are needed", self.attention_head_dim);
            return Err(config_error(file, "axes_dims_rope", format!("{axes:?}"), reason));
        }
        Ok(())
    }
}

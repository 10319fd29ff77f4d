//! `transformer/config.json` and `vae/config.json` of CogVideoX, and what of them this engine computes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::{check_counts, check_only, check_others};
use crate::pipeline::{config_error, read_json};

/// The transformer's configuration; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TransformerConfig {
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Channels of a cell that goes in: a latent's, or twice as many with the picture's latents beside it.
    pub in_channels: usize,
    /// Channels of a predicted cell, a latent's; as many as `in_channels` where the file says null.
    pub out_channels: Option<usize>,
    /// Cosines before sines in the timestep's embedding.
    pub flip_sin_to_cos: bool,
    /// Taken from the number of the timestep's frequencies.
    pub freq_shift: f64,
    /// Width of the timestep's embedding.
    pub time_embed_dim: usize,
    /// Width of the embedding of `ofs`, a number that image to video of 1.5 is told.
    pub ofs_embed_dim: Option<usize>,
    /// Width of the text encoder's output.
    pub text_embed_dim: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Of no meaning when a model is run.
    pub dropout: f64,
    /// Whether query, key and value have a bias.
    pub attention_bias: bool,
    /// Latent columns of the size that the model was trained with.
    pub sample_width: usize,
    /// Latent rows of that size.
    pub sample_height: usize,
    /// Frames of that clip.
    pub sample_frames: usize,
    /// Latent cells along a side of a token.
    pub patch_size: usize,
    /// Latent frames in a token; null is one, with a convolution's weights for the patch.
    pub patch_size_t: Option<usize>,
    /// Frames in a latent frame.
    pub temporal_compression_ratio: usize,
    /// Text tokens.
    pub max_text_seq_length: usize,
    /// `gelu-approximate`.
    pub activation_fn: String,
    /// `silu`.
    pub timestep_activation_fn: String,
    /// Whether norms have weights.
    pub norm_elementwise_affine: bool,
    /// Added to the variance in the blocks' norms.
    pub norm_eps: f64,
    /// Cells per unit of a sinusoidal position in space.
    pub spatial_interpolation_scale: f64,
    /// Latent frames per unit of a sinusoidal position in time.
    pub temporal_interpolation_scale: f64,
    /// Rotary positions instead of sinusoidal ones.
    pub use_rotary_positional_embeddings: bool,
    /// A table of positions among the weights, which image to video of 5b has.
    pub use_learned_positional_embeddings: bool,
    /// Whether the patches' projection has a bias.
    pub patch_bias: bool,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for TransformerConfig {
    fn default() -> Self {
        Self {
            num_attention_heads: 30,
            attention_head_dim: 64,
            in_channels: 16,
            out_channels: Some(16),
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            time_embed_dim: 512,
            ofs_embed_dim: None,
            text_embed_dim: 4096,
            num_layers: 30,
            dropout: 0.0,
            attention_bias: true,
            sample_width: 90,
            sample_height: 60,
            sample_frames: 49,
            patch_size: 2,
            patch_size_t: None,
            temporal_compression_ratio: 4,
            max_text_seq_length: 226,
            activation_fn: "gelu-approximate".to_owned(),
            timestep_activation_fn: "silu".to_owned(),
            norm_elementwise_affine: true,
            norm_eps: 1e-5,
            spatial_interpolation_scale: 1.875,
            temporal_interpolation_scale: 1.0,
            use_rotary_positional_embeddings: false,
            use_learned_positional_embeddings: false,
            patch_bias: true,
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

    /// Width of a token inside.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of a predicted cell.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.out_channels.filter(|&channels| channels > 0).unwrap_or(self.in_channels)
    }

    /// Width of the embedding of `ofs`, where there is one.
    #[must_use]
    pub fn ofs(&self) -> Option<usize> {
        self.ofs_embed_dim.filter(|&width| width > 0)
    }

    /// Latent frames, rows and columns of the size that the model was trained with.
    #[must_use]
    pub fn trained_cells(&self) -> [usize; 3] {
        let frames = (self.sample_frames - 1) / self.temporal_compression_ratio + 1;
        [frames, self.sample_height, self.sample_width]
    }

    /// Latent cells in a token: time, height, width.
    #[must_use]
    pub fn patch(&self) -> [usize; 3] {
        [self.patch_size_t.unwrap_or(1), self.patch_size, self.patch_size]
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        check_others(file, &self.others, "CogVideoXTransformer3DModel")?;
        check_only(file, "activation_fn", &self.activation_fn.as_str(), &"gelu-approximate")?;
        check_only(file, "timestep_activation_fn", &self.timestep_activation_fn.as_str(), &"silu")?;
        if let Some(width) = self.ofs().filter(|&width| width != self.time_embed_dim) {
            let reason = format!("it is added to the timestep's, of time_embed_dim {}", self.time_embed_dim);
            return Err(config_error(file, "ofs_embed_dim", width, reason));
        }
        if self.use_learned_positional_embeddings && !self.use_rotary_positional_embeddings {
            let reason = "a learned table stands beside rotary positions only";
            return Err(config_error(file, "use_learned_positional_embeddings", true, reason));
        }
        if ![self.outputs(), 2 * self.outputs()].contains(&self.in_channels) {
            let reason = format!("it must be out_channels, {}, or twice that", self.outputs());
            return Err(config_error(file, "in_channels", self.in_channels, reason));
        }
        check_counts(
            file,
            &[
                ("num_attention_heads", self.num_attention_heads),
                ("attention_head_dim", self.attention_head_dim),
                ("in_channels", self.in_channels),
                ("time_embed_dim", self.time_embed_dim),
                ("text_embed_dim", self.text_embed_dim),
                ("num_layers", self.num_layers),
                ("sample_width", self.sample_width),
                ("sample_height", self.sample_height),
                ("sample_frames", self.sample_frames),
                ("patch_size", self.patch_size),
                ("patch_size_t", self.patch_size_t.unwrap_or(1)),
                ("temporal_compression_ratio", self.temporal_compression_ratio),
                ("max_text_seq_length", self.max_text_seq_length),
            ],
        )?;
        self.check_positions(file)
    }

    fn check_positions(&self, file: &Path) -> Result<(), Error> {
        if self.use_rotary_positional_embeddings {
            return if self.attention_head_dim.is_multiple_of(16) {
                Ok(())
            } else {
                let reason = "rotary positions need a multiple of 16";
                Err(config_error(file, "attention_head_dim", self.attention_head_dim, reason))
            };
        }
        for (key, scale) in [
            ("spatial_interpolation_scale", self.spatial_interpolation_scale),
            ("temporal_interpolation_scale", self.temporal_interpolation_scale),
        ] {
            if !(scale.is_finite() && scale > 0.0) {
                return Err(config_error(file, key, scale, "it must be above 0"));
            }
        }
        if self.inner().is_multiple_of(16) {
            return Ok(());
        }
        let reason =
            format!("heads times width is {}, sinusoidal positions need a multiple of 16", self.inner());
        Err(config_error(file, "attention_head_dim", self.attention_head_dim, reason))
    }
}

/// The autoencoder's configuration; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    /// Channels of a video to encode.
    pub in_channels: usize,
    /// Channels of a decoded video.
    pub out_channels: usize,
    /// Each `CogVideoXDownBlock3D`.
    pub down_block_types: Vec<String>,
    /// Each `CogVideoXUpBlock3D`.
    pub up_block_types: Vec<String>,
    /// Widths of the encoder's blocks; the decoder has them backwards.
    pub block_out_channels: Vec<usize>,
    /// Channels of a latent cell.
    pub latent_channels: usize,
    /// Residual blocks in a block of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// `silu`.
    pub act_fn: String,
    /// Added to the variance in residual blocks of the encoder.
    pub norm_eps: f64,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Frames in a latent frame, a power of two.
    pub temporal_compression_ratio: f64,
    /// Rows of the pictures that the model was trained with, for the size of tiles.
    pub sample_height: usize,
    /// Columns of those pictures.
    pub sample_width: usize,
    /// What latents are multiplied by for the transformer.
    pub scaling_factor: f64,
    /// Not computed here.
    pub use_quant_conv: bool,
    /// Not computed here.
    pub use_post_quant_conv: bool,
    /// Whether a picture's latents are divided by `scaling_factor` for image to video.
    pub invert_scale_latents: bool,
    /// Of no meaning here.
    pub force_upcast: bool,
    /// Of no meaning here.
    pub sample_size: Value,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DOWN_BLOCK.to_owned(); 4],
            up_block_types: vec![UP_BLOCK.to_owned(); 4],
            block_out_channels: vec![128, 256, 256, 512],
            latent_channels: 16,
            layers_per_block: 3,
            act_fn: "silu".to_owned(),
            norm_eps: 1e-6,
            norm_num_groups: 32,
            temporal_compression_ratio: 4.0,
            sample_height: 480,
            sample_width: 720,
            scaling_factor: 1.152_584_26,
            use_quant_conv: false,
            use_post_quant_conv: false,
            invert_scale_latents: false,
            force_upcast: true,
            sample_size: Value::Null,
            others: Map::new(),
        }
    }
}

const DOWN_BLOCK: &str = "CogVideoXDownBlock3D";
const UP_BLOCK: &str = "CogVideoXUpBlock3D";

impl VaeConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or holds a value that this engine does not compute; the error names file, key and value.
    pub fn read(file: &Path) -> Result<Self, Error> {
        let config: Self = read_json(file)?;
        config.check(file)?;
        Ok(config)
    }

    /// Pixels along a side of a latent cell.
    #[must_use]
    pub fn spatial_ratio(&self) -> usize {
        1 << (self.block_out_channels.len().max(1) - 1)
    }

    /// Frames in a latent frame.
    #[must_use]
    pub fn temporal_ratio(&self) -> usize {
        1 << self.temporal_levels()
    }

    /// How many blocks halve time.
    #[must_use]
    pub fn temporal_levels(&self) -> usize {
        self.temporal_compression_ratio.log2() as usize
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        check_others(file, &self.others, "AutoencoderKLCogVideoX")?;
        check_only(file, "act_fn", &self.act_fn.as_str(), &"silu")?;
        check_only(file, "use_quant_conv", &self.use_quant_conv, &false)?;
        check_only(file, "use_post_quant_conv", &self.use_post_quant_conv, &false)?;
        check_only(file, "out_channels", &self.out_channels, &3)?;
        let widths = &self.block_out_channels;
        let kinds = [
            ("down_block_types", &self.down_block_types, DOWN_BLOCK),
            ("up_block_types", &self.up_block_types, UP_BLOCK),
        ];
        for (key, kinds, known) in kinds {
            if let Some(kind) = kinds.iter().find(|&kind| kind != known) {
                return Err(config_error(file, key, format!("{kind:?}"), format!("only {known:?} is known")));
            }
            if kinds.len() != widths.len() || widths.is_empty() {
                let reason = format!("block_out_channels has {} entries", widths.len());
                return Err(config_error(file, key, format!("{} entries", kinds.len()), reason));
            }
        }
        check_counts(
            file,
            &[
                ("in_channels", self.in_channels),
                ("latent_channels", self.latent_channels),
                ("layers_per_block", self.layers_per_block),
                ("norm_num_groups", self.norm_num_groups),
            ],
        )?;
        if let Some(width) =
            widths.iter().find(|&&width| width == 0 || !width.is_multiple_of(self.norm_num_groups))
        {
            let reason = format!("it must be a multiple of norm_num_groups, {}", self.norm_num_groups);
            return Err(config_error(file, "block_out_channels", width, reason));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return Err(config_error(file, "scaling_factor", self.scaling_factor, "it must be above 0"));
        }
        let most = (1usize << (widths.len() - 1)) as f64;
        let ratio = self.temporal_compression_ratio;
        if !(ratio >= 1.0 && ratio <= most && ratio.log2().fract() == 0.0) {
            let reason = format!("it must be a power of two, at most {most}");
            return Err(config_error(file, "temporal_compression_ratio", ratio, reason));
        }
        Ok(())
    }
}

//! `config.json` of Pyramid Flow's VAE, and what of it this engine computes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::{check_counts, check_only, check_others};
use crate::pipeline::{config_error, read_json};

/// The VAE's class.
pub const CLASS: &str = "CausalVideoVAE";

/// The autoencoder's configuration; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct PyramidVaeConfig {
    /// Channels of a video.
    pub encoder_in_channels: usize,
    /// Channels of a latent cell.
    pub encoder_out_channels: usize,
    /// Residual blocks of each down block.
    pub encoder_layers_per_block: Vec<usize>,
    /// `DownEncoderBlockCausal3D` for each.
    pub encoder_down_block_types: Vec<String>,
    /// Channels of each down block.
    pub encoder_block_out_channels: Vec<usize>,
    /// Which down blocks halve height and width.
    pub encoder_spatial_down_sample: Vec<bool>,
    /// Which down blocks halve time.
    pub encoder_temporal_down_sample: Vec<bool>,
    /// `silu`.
    pub encoder_act_fn: String,
    /// Groups of the encoder's norms.
    pub encoder_norm_num_groups: usize,
    /// Only true: the encoder gives means and variances.
    pub encoder_double_z: bool,
    /// `causal_vae_conv`.
    pub encoder_type: String,
    /// Channels of a latent cell.
    pub decoder_in_channels: usize,
    /// Channels of a video.
    pub decoder_out_channels: usize,
    /// Residual blocks of each up block, from the latents on.
    pub decoder_layers_per_block: Vec<usize>,
    /// `UpDecoderBlockCausal3D` for each.
    pub decoder_up_block_types: Vec<String>,
    /// Channels of each up block, from the video on: the other way round.
    pub decoder_block_out_channels: Vec<usize>,
    /// Which up blocks double height and width, from the latents on.
    pub decoder_spatial_up_sample: Vec<bool>,
    /// Which up blocks double time, from the latents on.
    pub decoder_temporal_up_sample: Vec<bool>,
    /// `silu`.
    pub decoder_act_fn: String,
    /// Groups of the decoder's norms.
    pub decoder_norm_num_groups: usize,
    /// `causal_vae_conv`.
    pub decoder_type: String,
    /// Only true: latents go through a layer of their own before the decoder.
    pub add_post_quant_conv: bool,
    /// Only false: pictures grow by a convolution.
    pub interpolate: bool,
    /// Pixels along a side of a latent cell, and frames in a latent frame.
    pub downsample_scale: usize,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

const DOWN: &str = "DownEncoderBlockCausal3D";
const UP: &str = "UpDecoderBlockCausal3D";
const ACTIVATION: &str = "silu";
const TYPE: &str = "causal_vae_conv";

impl Default for PyramidVaeConfig {
    fn default() -> Self {
        let flags = vec![true, true, true, false];
        let channels = vec![128, 256, 512, 512];
        Self {
            encoder_in_channels: 3,
            encoder_out_channels: 4,
            encoder_layers_per_block: vec![2; 4],
            encoder_down_block_types: vec![DOWN.to_owned(); 4],
            encoder_block_out_channels: channels.clone(),
            encoder_spatial_down_sample: flags.clone(),
            encoder_temporal_down_sample: flags.clone(),
            encoder_act_fn: ACTIVATION.to_owned(),
            encoder_norm_num_groups: 32,
            encoder_double_z: true,
            encoder_type: TYPE.to_owned(),
            decoder_in_channels: 4,
            decoder_out_channels: 3,
            decoder_layers_per_block: vec![3; 4],
            decoder_up_block_types: vec![UP.to_owned(); 4],
            decoder_block_out_channels: channels,
            decoder_spatial_up_sample: flags.clone(),
            decoder_temporal_up_sample: flags,
            decoder_act_fn: ACTIVATION.to_owned(),
            decoder_norm_num_groups: 32,
            decoder_type: TYPE.to_owned(),
            add_post_quant_conv: true,
            interpolate: false,
            downsample_scale: 8,
            others: Map::new(),
        }
    }
}

/// One half's lists, for the checks that both have in common.
struct Half<'a> {
    keys: [&'static str; 7],
    types: (&'a [String], &'static str),
    layers: &'a [usize],
    channels: &'a [usize],
    spatial: &'a [bool],
    temporal: &'a [bool],
    activation: &'a String,
    groups: usize,
}

impl PyramidVaeConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or holds a value that this engine does not compute; the error names file, key and value.
    pub fn read(file: &Path) -> Result<Self, Error> {
        let config: Self = read_json(file)?;
        config.check(file)?;
        Ok(config)
    }

    /// Channels of a latent cell.
    #[must_use]
    pub fn latent_channels(&self) -> usize {
        self.decoder_in_channels
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        /// What only training and other engines read; the reference never scales by `scaling_factor`.
        const NO_MATTER: [&str; 4] =
            ["encoder_block_dropout", "decoder_block_dropout", "sample_size", "scaling_factor"];
        let mut others = self.others.clone();
        others.retain(|key, _| !NO_MATTER.contains(&key.as_str()));
        check_others(file, &others, CLASS)?;
        check_only(file, "encoder_in_channels", &self.encoder_in_channels, &3)?;
        check_only(file, "decoder_out_channels", &self.decoder_out_channels, &3)?;
        check_only(file, "encoder_double_z", &self.encoder_double_z, &true)?;
        check_only(file, "encoder_type", &self.encoder_type.as_str(), &TYPE)?;
        check_only(file, "decoder_type", &self.decoder_type.as_str(), &TYPE)?;
        check_only(file, "add_post_quant_conv", &self.add_post_quant_conv, &true)?;
        check_only(file, "interpolate", &self.interpolate, &false)?;
        check_counts(file, &[("decoder_in_channels", self.decoder_in_channels)])?;
        check_only(file, "encoder_out_channels", &self.encoder_out_channels, &self.decoder_in_channels)?;
        for half in self.halves() {
            half.check(file, self.downsample_scale)?;
        }
        Ok(())
    }

    fn halves(&self) -> [Half<'_>; 2] {
        let encoder = Half {
            keys: [
                "encoder_down_block_types",
                "encoder_layers_per_block",
                "encoder_block_out_channels",
                "encoder_spatial_down_sample",
                "encoder_temporal_down_sample",
                "encoder_act_fn",
                "encoder_norm_num_groups",
            ],
            types: (&self.encoder_down_block_types, DOWN),
            layers: &self.encoder_layers_per_block,
            channels: &self.encoder_block_out_channels,
            spatial: &self.encoder_spatial_down_sample,
            temporal: &self.encoder_temporal_down_sample,
            activation: &self.encoder_act_fn,
            groups: self.encoder_norm_num_groups,
        };
        let decoder = Half {
            keys: [
                "decoder_up_block_types",
                "decoder_layers_per_block",
                "decoder_block_out_channels",
                "decoder_spatial_up_sample",
                "decoder_temporal_up_sample",
                "decoder_act_fn",
                "decoder_norm_num_groups",
            ],
            types: (&self.decoder_up_block_types, UP),
            layers: &self.decoder_layers_per_block,
            channels: &self.decoder_block_out_channels,
            spatial: &self.decoder_spatial_up_sample,
            temporal: &self.decoder_temporal_up_sample,
            activation: &self.decoder_act_fn,
            groups: self.decoder_norm_num_groups,
        };
        [encoder, decoder]
    }
}

impl Half<'_> {
    fn check(&self, file: &Path, scale: usize) -> Result<(), Error> {
        let [types, layers, channels, spatial, temporal, activation, groups] = self.keys;
        if self.types.0.is_empty() {
            return Err(config_error(file, types, "[]", "at least one block is needed"));
        }
        if let Some(strange) = self.types.0.iter().find(|&name| name != self.types.1) {
            return Err(config_error(file, types, strange, format!("only {} is known", self.types.1)));
        }
        let blocks = self.types.0.len();
        let lengths = [
            (layers, self.layers.len()),
            (channels, self.channels.len()),
            (spatial, self.spatial.len()),
            (temporal, self.temporal.len()),
        ];
        if let Some((key, length)) = lengths.into_iter().find(|&(_, length)| length != blocks) {
            let (value, reason) = (format!("{length} entries"), format!("{blocks} are needed"));
            return Err(config_error(file, key, value, reason));
        }
        check_only(file, activation, &self.activation.as_str(), &ACTIVATION)?;
        for &width in self.channels {
            if self.groups == 0 || width == 0 || !width.is_multiple_of(self.groups) {
                let reason = format!("it must divide the {width} channels of a block");
                return Err(config_error(file, groups, self.groups, reason));
            }
        }
        for (key, flags) in [(spatial, self.spatial), (temporal, self.temporal)] {
            let ratio = 1usize << flags.iter().filter(|&&flag| flag).count().min(16);
            if ratio != scale {
                let reason = format!("this makes {ratio}, downsample_scale is {scale}");
                return Err(config_error(file, key, format!("{flags:?}"), reason));
            }
        }
        Ok(())
    }
}

//! `vae/config.json` of Wan's autoencoder, and what of it this engine computes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::{check_counts, check_others};
use crate::pipeline::{config_error, read_json};

/// The autoencoder's class.
pub const CLASS: &str = "AutoencoderKLWan";

/// The autoencoder's form; what a file leaves out has the reference's default, which is Wan 2.1's.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct WanVaeConfig {
    /// Width that the encoder's levels are multiples of.
    pub base_dim: usize,
    /// The same for the decoder; the encoder's where the file says null.
    pub decoder_base_dim: Option<usize>,
    /// Channels of a latent cell.
    pub z_dim: usize,
    /// Width of each level, in base widths; all levels but the last halve height and width.
    pub dim_mult: Vec<usize>,
    /// Residual blocks in a level of the encoder; the decoder has one more.
    pub num_res_blocks: usize,
    /// Sizes at which there is attention beside the middle's; none are known.
    pub attn_scales: Vec<f64>,
    /// Whether a level halves time as well, for every level but the last. Sic.
    pub temperal_downsample: Vec<bool>,
    /// Each channel's mean, of `z_dim` channels.
    pub latents_mean: Vec<f64>,
    /// Each channel's standard deviation.
    pub latents_std: Vec<f64>,
    /// Whether levels have shortcuts around their resampling (Wan 2.2's TI2V-5B).
    pub is_residual: bool,
    /// Channels of a video to encode, after patches were folded.
    pub in_channels: usize,
    /// Channels of a decoded video, before patches are unfolded.
    pub out_channels: usize,
    /// Pixels along a side of a patch; none where the file says null.
    pub patch_size: Option<usize>,
    /// Frames in a latent frame, as the pipeline counts.
    pub scale_factor_temporal: usize,
    /// Pixels along a side of a latent cell, as the pipeline counts.
    pub scale_factor_spatial: usize,
    /// Without effect once a model is trained.
    pub dropout: f64,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for WanVaeConfig {
    fn default() -> Self {
        Self {
            base_dim: 96,
            decoder_base_dim: None,
            z_dim: 16,
            dim_mult: vec![1, 2, 4, 4],
            num_res_blocks: 2,
            attn_scales: Vec::new(),
            temperal_downsample: vec![false, true, true],
            latents_mean: MEAN.to_vec(),
            latents_std: STD.to_vec(),
            is_residual: false,
            in_channels: 3,
            out_channels: 3,
            patch_size: None,
            scale_factor_temporal: 4,
            scale_factor_spatial: 8,
            dropout: 0.0,
            others: Map::new(),
        }
    }
}

const MEAN: [f64; 16] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
    -0.1922, -0.9497, 0.2503, -0.2921,
];
const STD: [f64; 16] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382,
    1.1253, 2.8251, 1.9160,
];
/// The most levels that are believed: each halves the picture.
const MOST_LEVELS: usize = 8;

impl WanVaeConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or holds a value that this engine does not compute; the error names file, key and value.
    pub fn read(file: &Path) -> Result<Self, Error> {
        let config: Self = read_json(file)?;
        config.check(file)?;
        Ok(config)
    }

    /// Pixels along a side of a latent cell, as the levels make it.
    #[must_use]
    pub fn spatial_ratio(&self) -> usize {
        self.patch() << (self.dim_mult.len() - 1)
    }

    /// Frames in a latent frame after the first, as the levels make it.
    #[must_use]
    pub fn temporal_ratio(&self) -> usize {
        1 << self.temperal_downsample.iter().filter(|&&halves| halves).count()
    }

    /// Pixels along a side of a patch.
    #[must_use]
    pub fn patch(&self) -> usize {
        self.patch_size.unwrap_or(1)
    }

    /// Widths of the encoder's levels, the first convolution's before them.
    #[must_use]
    pub fn encoder_widths(&self) -> Vec<usize> {
        std::iter::once(&1).chain(&self.dim_mult).map(|factor| factor * self.base_dim).collect()
    }

    /// Widths of the decoder's levels in the order in which it runs them, the middle's before them.
    #[must_use]
    pub fn decoder_widths(&self) -> Vec<usize> {
        let base = self.decoder_base_dim.unwrap_or(self.base_dim);
        let widest = self.dim_mult.last();
        widest.into_iter().chain(self.dim_mult.iter().rev()).map(|factor| factor * base).collect()
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        check_others(file, &self.others, CLASS)?;
        let levels = self.dim_mult.len();
        if !(1..=MOST_LEVELS).contains(&levels) {
            let reason = format!("1 to {MOST_LEVELS} levels are known");
            return Err(config_error(file, "dim_mult", format!("{:?}", self.dim_mult), reason));
        }
        check_counts(
            file,
            &[
                ("base_dim", self.base_dim),
                ("decoder_base_dim", self.decoder_base_dim.unwrap_or(1)),
                ("z_dim", self.z_dim),
                ("dim_mult", self.dim_mult.iter().product()),
                ("num_res_blocks", self.num_res_blocks),
                ("in_channels", self.in_channels),
                ("out_channels", self.out_channels),
                ("patch_size", self.patch()),
                ("scale_factor_temporal", self.scale_factor_temporal),
                ("scale_factor_spatial", self.scale_factor_spatial),
            ],
        )?;
        if !self.attn_scales.is_empty() {
            let value = format!("{:?}", self.attn_scales);
            return Err(config_error(file, "attn_scales", value, "only [] is known"));
        }
        if self.temperal_downsample.len() + 1 != levels {
            let value = format!("{:?}", self.temperal_downsample);
            let reason = format!("{} are needed, one less than dim_mult has", levels - 1);
            return Err(config_error(file, "temperal_downsample", value, reason));
        }
        for (key, values) in [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)] {
            if values.len() != self.z_dim {
                let reason = format!("z_dim is {}", self.z_dim);
                return Err(config_error(file, key, format!("{} values", values.len()), reason));
            }
        }
        self.check_forms(file)
    }

    /// Checks what only one of the two forms can have.
    fn check_forms(&self, file: &Path) -> Result<(), Error> {
        let pixels = self.patch() * self.patch();
        for (key, channels) in [("in_channels", self.in_channels), ("out_channels", self.out_channels)] {
            if !channels.is_multiple_of(pixels) {
                let reason = format!("patches have {pixels} pixels");
                return Err(config_error(file, key, channels, reason));
            }
        }
        let (encoder, decoder) = (self.encoder_widths(), self.decoder_widths());
        let fault =
            |reason: String| Err(config_error(file, "dim_mult", format!("{:?}", self.dim_mult), reason));
        if !self.is_residual {
            let halved = decoder[1..self.dim_mult.len()].iter().find(|width| !width.is_multiple_of(2));
            return halved.map_or(Ok(()), |width| {
                fault(format!("a level of the decoder has {width} channels and halves them"))
            });
        }
        for level in 0..self.dim_mult.len() {
            let cells = |halves_time: Option<&bool>| halves_time.map_or(1, |&time| if time { 8 } else { 4 });
            let down = cells(self.temperal_downsample.get(level));
            let up = cells(self.temperal_downsample.iter().rev().nth(level));
            if !(encoder[level] * down).is_multiple_of(encoder[level + 1])
                || !(decoder[level + 1] * up).is_multiple_of(decoder[level])
            {
                return fault(format!("level {level}'s channels do not fit into its shortcut"));
            }
        }
        Ok(())
    }
}

//! `vae/config.json` of Mochi, and what of it this engine computes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::{check_counts, check_others};
use crate::pipeline::{config_error, read_json};

/// Groups of every norm; the format has no key for it.
pub const GROUPS: usize = 32;
/// Channels of a head in the encoder's attention; the format has no key for it.
pub const HEAD: usize = 32;
/// Octaves of the encoder's Fourier features: the frequencies are `2^6` and `2^7`.
pub const OCTAVES: [i32; 2] = [6, 7];
/// The widest layer, the most blocks, layers and expansion that are believed.
const MOST_CHANNELS: usize = 1 << 16;
const MOST_BLOCKS: usize = 16;
const MOST_LAYERS: usize = 256;
const MOST_EXPANSION: usize = 64;

/// The autoencoder's configuration; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct MochiVaeConfig {
    /// Channels of a video to encode, with its Fourier features: five for each channel of a picture.
    pub in_channels: usize,
    /// Channels of a decoded video.
    pub out_channels: usize,
    /// Widths of the encoder, from the finest to the coarsest.
    pub encoder_block_out_channels: Vec<usize>,
    /// Widths of the decoder, from the finest to the coarsest.
    pub decoder_block_out_channels: Vec<usize>,
    /// Channels of a latent cell.
    pub latent_channels: usize,
    /// Residual blocks at each width and, last, in the middle.
    pub layers_per_block: Vec<usize>,
    /// `silu` or `swish`, which are one.
    pub act_fn: String,
    /// By how much time grows between two widths, from the finest on.
    pub temporal_expansions: Vec<usize>,
    /// By how much sides grow between two widths, from the finest on.
    pub spatial_expansions: Vec<usize>,
    /// Whether the encoder attends over time at each width and, last, in the middle.
    pub add_attention_block: Vec<bool>,
    /// Mean of each latent channel; `None` where the file says null.
    pub latents_mean: Option<Vec<f64>>,
    /// Spread of each latent channel; `None` where the file says null.
    pub latents_std: Option<Vec<f64>>,
    /// Factor of normalised latents.
    pub scaling_factor: f64,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for MochiVaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 15,
            out_channels: 3,
            encoder_block_out_channels: vec![64, 128, 256, 384],
            decoder_block_out_channels: vec![128, 256, 512, 768],
            latent_channels: 12,
            layers_per_block: vec![3, 3, 4, 6, 3],
            act_fn: "silu".to_owned(),
            temporal_expansions: vec![1, 2, 3],
            spatial_expansions: vec![2, 2, 2],
            add_attention_block: vec![false, true, true, true, true],
            latents_mean: Some(MEAN.to_vec()),
            latents_std: Some(STD.to_vec()),
            scaling_factor: 1.0,
            others: Map::new(),
        }
    }
}

/// Statistics of Mochi 1 preview's latents, which its file leaves to the class.
const MEAN: [f64; 12] = [
    -0.06730895953510081,
    -0.038011381506090416,
    -0.07477820912866141,
    -0.05565264470995561,
    0.012767231469026969,
    -0.04703542746246419,
    0.043896967884726704,
    -0.09346305707025976,
    -0.09918314763016893,
    -0.008729793427399178,
    -0.011931556316503654,
    -0.0321993391887285,
];
const STD: [f64; 12] = [
    0.9263795028493863,
    0.9248894543193766,
    0.9393059390890617,
    0.959253732819592,
    0.8244560132752793,
    0.917259975397747,
    0.9294154431013696,
    1.3720942357788521,
    0.881393668867029,
    0.9168315692124348,
    0.9185249279345552,
    0.9274757570805041,
];

impl MochiVaeConfig {
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
        self.spatial_expansions.iter().product()
    }

    /// Frames in a latent frame after the first.
    #[must_use]
    pub fn temporal_ratio(&self) -> usize {
        self.temporal_expansions.iter().product()
    }

    /// Channels of a picture to encode.
    #[must_use]
    pub fn picture_channels(&self) -> usize {
        self.in_channels / (1 + 2 * OCTAVES.len())
    }

    fn check(&self, file: &Path) -> Result<(), Error> {
        check_others(file, &self.others, "AutoencoderKLMochi")?;
        if !matches!(self.act_fn.as_str(), "silu" | "swish") {
            return Err(config_error(
                file,
                "act_fn",
                format!("{:?}", self.act_fn),
                "known are \"silu\" and \"swish\"",
            ));
        }
        check_counts(
            file,
            &[
                ("in_channels", self.in_channels),
                ("out_channels", self.out_channels),
                ("latent_channels", self.latent_channels),
            ],
        )?;
        let features = 1 + 2 * OCTAVES.len();
        if !self.in_channels.is_multiple_of(features) {
            let reason = format!("a picture's channels have {features} features each");
            return Err(config_error(file, "in_channels", self.in_channels, reason));
        }
        if self.out_channels != 3 {
            return Err(config_error(file, "out_channels", self.out_channels, "a picture has 3"));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0) {
            return Err(config_error(
                file,
                "scaling_factor",
                self.scaling_factor,
                "it must be finite, not 0",
            ));
        }
        self.check_lists(file)?;
        self.check_statistics(file)
    }

    fn check_lists(&self, file: &Path) -> Result<(), Error> {
        let widths = self.decoder_block_out_channels.len();
        if !(2..=MOST_BLOCKS).contains(&widths) {
            let value = format!("{:?}", self.decoder_block_out_channels);
            let reason = format!("2 to {MOST_BLOCKS} widths are needed");
            return Err(config_error(file, "decoder_block_out_channels", value, reason));
        }
        let flags: Vec<usize> = self.add_attention_block.iter().map(|&flag| usize::from(flag)).collect();
        let width = 1..=MOST_CHANNELS;
        let lists = [
            ("encoder_block_out_channels", &self.encoder_block_out_channels, widths, width.clone(), GROUPS),
            ("decoder_block_out_channels", &self.decoder_block_out_channels, widths, width, GROUPS),
            ("layers_per_block", &self.layers_per_block, widths + 1, 0..=MOST_LAYERS, 1),
            ("temporal_expansions", &self.temporal_expansions, widths - 1, 1..=MOST_EXPANSION, 1),
            ("spatial_expansions", &self.spatial_expansions, widths - 1, 1..=MOST_EXPANSION, 1),
            ("add_attention_block", &flags, widths + 1, 0..=1, 1),
        ];
        for (key, list, count, range, multiple) in lists {
            let reason = if list.len() != count {
                format!("{count} entries are needed beside {widths} widths of the decoder")
            } else if list.iter().any(|n| !range.contains(n) || !n.is_multiple_of(multiple)) {
                format!("entries lie in {} to {}, multiples of {multiple}", range.start(), range.end())
            } else {
                continue;
            };
            return Err(config_error(file, key, format!("{list:?}"), reason));
        }
        Ok(())
    }

    fn check_statistics(&self, file: &Path) -> Result<(), Error> {
        let lists = [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)];
        for (key, list) in lists {
            if let Some(list) = list.as_ref().filter(|list| list.len() != self.latent_channels) {
                let reason =
                    format!("a number for each of {} latent channels is needed", self.latent_channels);
                return Err(config_error(file, key, format!("{} numbers", list.len()), reason));
            }
        }
        if self.latents_std.iter().flatten().any(|std| !(std.is_finite() && *std > 0.0)) {
            return Err(config_error(
                file,
                "latents_std",
                format!("{:?}", self.latents_std),
                "spreads are above 0",
            ));
        }
        Ok(())
    }
}

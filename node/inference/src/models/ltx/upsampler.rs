//! LTX-Video's latent upsampler (diffusers' `LTXLatentUpsamplerModel`): latents of a clip to latents of the same clip at
//! twice the size, from which a second pass goes on.
//!
//! Residual blocks, a convolution whose channels become positions, residual blocks. Latents are as the autoencoder gives
//! them, not normalised.

use std::path::Path;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::{WEIGHTS_STEM, check_counts, check_only, check_others, open_weights};
use crate::nn::conv3d::{Conv3d, Conv3dConfig, Edge, TimePad};
use crate::nn::group_norm::GroupNorm;
use crate::nn::ops::silu;
use crate::nn::shuffle::depth_to_space;
use crate::pipeline::{LoadOptions, config_error, read_json};

/// By how much time, height and width grow.
pub(super) const GROWTH: [usize; 3] = [1, 2, 2];
/// Groups of every norm.
const GROUPS: usize = 32;
/// Epsilon of every norm.
const EPSILON: f64 = 1e-5;

/// The component's folder.
pub const PART: &str = "latent_upsampler";
/// The component's class.
pub const CLASS: &str = "LTXLatentUpsamplerModel";

/// `latent_upsampler/config.json`; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct UpsamplerConfig {
    /// Latent channels.
    pub in_channels: usize,
    /// Channels inside.
    pub mid_channels: usize,
    /// Residual blocks before, and as many after.
    pub num_blocks_per_stage: usize,
    /// 3: convolutions over time too.
    pub dims: usize,
    /// Twice the height and width: true.
    pub spatial_upsample: bool,
    /// Twice the frames: false.
    pub temporal_upsample: bool,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for UpsamplerConfig {
    fn default() -> Self {
        Self {
            in_channels: 128,
            mid_channels: 512,
            num_blocks_per_stage: 4,
            dims: 3,
            spatial_upsample: true,
            temporal_upsample: false,
            others: Map::new(),
        }
    }
}

impl UpsamplerConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or holds a value that this engine does not compute; the error names file, key and value.
    pub fn read(file: &Path) -> std::result::Result<Self, Error> {
        let config: Self = read_json(file)?;
        check_only(file, "dims", &config.dims, &3)?;
        check_others(file, &config.others, CLASS)?;
        check_counts(file, &[("in_channels", config.in_channels), ("mid_channels", config.mid_channels)])?;
        if !config.mid_channels.is_multiple_of(GROUPS) {
            let reason = format!("it must be a multiple of {GROUPS}");
            return Err(config_error(file, "mid_channels", config.mid_channels, reason));
        }
        check_only(file, "spatial_upsample", &config.spatial_upsample, &true)?;
        check_only(file, "temporal_upsample", &config.temporal_upsample, &false)?;
        Ok(config)
    }

    /// The latent cells that some cells become.
    #[must_use]
    pub fn grown(&self, [frames, rows, columns]: [usize; 3]) -> [usize; 3] {
        [frames * GROWTH[0], rows * GROWTH[1], columns * GROWTH[2]]
    }
}

/// The upsampler on a device.
pub struct LtxUpsampler {
    config: UpsamplerConfig,
    conv_in: Conv3d,
    norm_in: GroupNorm,
    before: Vec<ResBlock>,
    grow: Conv3d,
    after: Vec<ResBlock>,
    conv_out: Conv3d,
}

impl LtxUpsampler {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &UpsamplerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let (channels, width) = (config.in_channels, config.mid_channels);
        let blocks = |name: &str| {
            let block = |index: usize| ResBlock::load(width, &vb.pp(name).pp(index));
            (0..config.num_blocks_per_stage).map(block).collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            conv_in: Conv3d::load(cube(channels, width), vb.pp("initial_conv"))?,
            norm_in: GroupNorm::load(GROUPS, width, EPSILON, vb.pp("initial_norm"))?,
            before: blocks("res_blocks")?,
            grow: load_grow(width, &vb.pp("upsampler").pp(0))?,
            after: blocks("post_upsample_res_blocks")?,
            conv_out: Conv3d::load(cube(width, channels), vb.pp("final_conv"))?,
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &UpsamplerConfig {
        &self.config
    }

    /// Latents `[B, C, F, H, W]` to those of [`UpsamplerConfig::grown`] cells.
    ///
    /// # Errors
    /// When the channels differ, or the device has no room.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let x = latents.permute((0, 2, 3, 4, 1))?.contiguous()?;
        let mut x = self.norm_in.forward_silu(&self.conv_in.forward(&x)?)?;
        for block in &self.before {
            x = block.forward(&x)?;
        }
        x = depth_to_space(&self.grow.forward(&x)?, GROWTH, 0)?;
        for block in &self.after {
            x = block.forward(&x)?;
        }
        self.conv_out.forward(&x)?.permute((0, 4, 1, 2, 3))?.contiguous()
    }
}

/// The convolution of single frames whose channels become positions; the file orders them with the position last.
fn load_grow(width: usize, vb: &VarBuilder<'_>) -> Result<Conv3d> {
    let cells = GROWTH.iter().product::<usize>();
    let order = |channel: usize| ((channel % width) * cells + channel / width) as u32;
    let weight = vb.get((cells * width, width, 3, 3), "weight")?.unsqueeze(2)?;
    let bias = vb.get(cells * width, "bias")?;
    let order: Vec<u32> = (0..cells * width).map(order).collect();
    Conv3d::new_ordered(grow_form(width), &order, weight, bias)
}

pub(super) fn grow_form(width: usize) -> Conv3dConfig {
    Conv3dConfig { kernel: [1, 3, 3], ..cube(width, GROWTH.iter().product::<usize>() * width) }
}

/// Three taps along each axis, zeros beyond every edge.
pub(super) fn cube(input: usize, output: usize) -> Conv3dConfig {
    Conv3dConfig { time: TimePad::Both(Edge::Zeros), ..Conv3dConfig::cube(input, output, 3, false) }
}

struct ResBlock {
    convs: [Conv3d; 2],
    norms: [GroupNorm; 2],
}

impl ResBlock {
    fn load(width: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let conv = |name: &str| Conv3d::load(cube(width, width), vb.pp(name));
        let norm = |name: &str| GroupNorm::load(GROUPS, width, EPSILON, vb.pp(name));
        Ok(Self { convs: [conv("conv1")?, conv("conv2")?], norms: [norm("norm1")?, norm("norm2")?] })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.norms[0].forward_silu(&self.convs[0].forward(x)?)?;
        silu(&(self.norms[1].forward(&self.convs[1].forward(&h)?)? + x)?)
    }
}

/// Each channel with the mean and the spread that it has in `reference`, mixed in by `factor` (adaptive instance
/// normalisation); both `[B, C, F, H, W]`, which may be of different sizes.
///
/// # Errors
/// When the channels differ.
pub fn adapt(latents: &Tensor, reference: &Tensor, factor: f64) -> Result<Tensor> {
    let statistics = |x: &Tensor| -> Result<(Tensor, Tensor)> {
        let flat = x.flatten_from(2)?;
        let mean = flat.mean_keepdim(2)?;
        let count = flat.dim(2)?.max(2) - 1;
        let variance = (flat.broadcast_sub(&mean)?.sqr()?.sum_keepdim(2)? / count as f64)?;
        let shape = (x.dim(0)?, x.dim(1)?, 1, 1, 1);
        Ok((mean.reshape(shape)?, variance.sqrt()?.reshape(shape)?))
    };
    let ((mean, spread), (wanted_mean, wanted_spread)) = (statistics(latents)?, statistics(reference)?);
    let unit = latents.broadcast_sub(&mean)?.broadcast_div(&spread)?;
    let adapted = unit.broadcast_mul(&wanted_spread)?.broadcast_add(&wanted_mean)?;
    latents + ((adapted - latents)? * factor)?
}

/// Large values pulled in, from not at all at 0 to most at 1.
///
/// # Errors
/// When the device has no room.
pub fn tone_map(latents: &Tensor, compression: f64) -> Result<Tensor> {
    let amount = compression * 0.75;
    let large = candle_nn::ops::sigmoid(&latents.abs()?.affine(4.0 * amount, -4.0 * amount)?)?;
    latents * large.affine(-0.8 * amount, 1.0)?
}

impl UpsamplerConfig {
    /// A folder's, where it has an upsampler.
    ///
    /// # Errors
    /// As [`UpsamplerConfig::read`].
    pub fn find(folder: &Path) -> std::result::Result<Option<Self>, Error> {
        let part = folder.join(PART);
        if part.is_dir() { Self::read(&part.join("config.json")).map(Some) } else { Ok(None) }
    }
}

/// A folder's upsampler, where it has one.
///
/// # Errors
/// See [`crate::load`].
pub fn load_upsampler(
    folder: &Path,
    options: &LoadOptions,
) -> std::result::Result<Option<LtxUpsampler>, Error> {
    let Some(config) = UpsamplerConfig::find(folder)? else { return Ok(None) };
    let weights = open_weights(&folder.join(PART), WEIGHTS_STEM, options, options.dtype)?;
    Ok(Some(weights.build(|vb| LtxUpsampler::load(&config, &vb))?))
}

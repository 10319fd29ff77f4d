//! The autoencoder's parts: residual blocks, halving and doubling, encoder and decoder, each over one run of frames.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::{Trace, show};
use crate::models::cogvideox::config::VaeConfig;
use crate::nn::conv3d::{Conv3d, Conv3dConfig, Edge, TimePad};
use crate::nn::frame_cache::FrameCache;
use crate::nn::group_norm::{GroupNorm, Spatial};
use crate::nn::linear::Linear;
use crate::nn::shuffle::repeat;

/// Epsilon of the norms that the configuration does not set.
const EPSILON: f64 = 1e-6;
/// Residual blocks in the middle.
const MIDDLE: usize = 2;

fn causal(input: usize, output: usize, vb: &VarBuilder<'_>) -> Result<Conv3d> {
    Conv3d::load(Conv3dConfig::cube(input, output, 3, true), vb.pp("conv"))
}

/// A convolution of one tap.
fn pointwise(input: usize, output: usize, vb: &VarBuilder<'_>) -> Result<Linear> {
    let weight = vb.get((output, input, 1, 1, 1), "weight")?.reshape((output, input))?;
    Linear::new(weight, Some(vb.get(output, "bias")?))
}

/// A convolution over each picture alone, from a file of two dimensions.
fn planar(channels: usize, stride: usize, vb: &VarBuilder<'_>) -> Result<Conv3d> {
    let config = Conv3dConfig {
        input: channels,
        output: channels,
        kernel: [1, 3, 3],
        stride: [1, stride, stride],
        time: TimePad::Valid,
        space: Edge::Zeros,
    };
    let weight = vb.get((channels, channels, 3, 3), "weight")?.unsqueeze(2)?;
    Conv3d::new(config, weight, Some(vb.get(channels, "bias")?))
}

/// The latents of a run, which the decoder's norms read.
struct Guide {
    /// `(batch, cells, channels)`.
    cells: Tensor,
    size: [usize; 3],
}

impl Guide {
    fn new(z: &Tensor) -> Result<Self> {
        let (batch, t, h, w, channels) = z.dims5()?;
        Ok(Self { cells: z.reshape((batch, t * h * w, channels))?, size: [t, h, w] })
    }

    /// The latent cell of each position of an activation, the nearest before it. Of an odd number of frames the first
    /// belongs to the first latent frame alone.
    fn places(&self, x: &Tensor) -> Result<Vec<u32>> {
        let (_, frames, height, width, _) = x.dims5()?;
        let [t, h, w] = self.size;
        let alone = frames > 1 && frames % 2 == 1;
        let frame = |i: usize| match (alone, i) {
            (true, 0) => 0,
            (true, _) => 1 + (i - 1) * (t - 1) / (frames - 1),
            (false, _) => i * t / frames,
        };
        let columns: Vec<usize> = (0..width).map(|x| x * w / width).collect();
        let mut places = Vec::with_capacity(frames * height * width);
        for i in 0..frames {
            for y in 0..height {
                let line = (frame(i) * h + y * h / height) * w;
                places.extend(columns.iter().map(|column| (line + column) as u32));
            }
        }
        Ok(places)
    }
}

/// A norm with what the latents say of it.
#[derive(Debug)]
struct GuidedNorm {
    norm: GroupNorm,
    guided: Option<[Linear; 2]>,
}

impl GuidedNorm {
    fn plain(channels: usize, config: &VaeConfig, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self { norm: GroupNorm::load(config.norm_num_groups, channels, eps, vb)?, guided: None })
    }

    fn guided(channels: usize, config: &VaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let part = |name: &str| pointwise(config.latent_channels, channels, &vb.pp(name).pp("conv"));
        let norm = GroupNorm::load(config.norm_num_groups, channels, EPSILON, vb.pp("norm_layer"))?;
        Ok(Self { norm, guided: Some([part("conv_y")?, part("conv_b")?]) })
    }

    /// Norm, modulation, SiLU.
    fn forward(&self, x: &Tensor, guide: Option<(&Guide, &[u32])>) -> Result<Tensor> {
        match (&self.guided, guide) {
            (None, _) => self.norm.forward_silu(x),
            (Some([scale, shift]), Some((guide, cells))) => {
                let (scale, shift) = (scale.forward(&guide.cells)?, shift.forward(&guide.cells)?);
                let spatial = Spatial { scale: &scale, shift: &shift, cells };
                self.norm.forward_spatial(x, &spatial, true)
            }
            (Some(_), None) => candle_core::bail!("a norm that reads latents was given none"),
        }
    }
}

/// Norm, SiLU, convolution, twice, with a shortcut.
#[derive(Debug)]
struct Resnet {
    norms: [GuidedNorm; 2],
    convs: [Conv3d; 2],
    shortcut: Option<Linear>,
}

impl Resnet {
    fn load(
        input: usize,
        output: usize,
        config: &VaeConfig,
        guided: bool,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let norm = |channels, name: &str| {
            if guided {
                GuidedNorm::guided(channels, config, &vb.pp(name))
            } else {
                GuidedNorm::plain(channels, config, config.norm_eps, vb.pp(name))
            }
        };
        let shortcut =
            if input == output { None } else { Some(pointwise(input, output, &vb.pp("conv_shortcut"))?) };
        Ok(Self {
            norms: [norm(input, "norm1")?, norm(output, "norm2")?],
            convs: [causal(input, output, &vb.pp("conv1"))?, causal(output, output, &vb.pp("conv2"))?],
            shortcut,
        })
    }

    fn forward(&self, x: &Tensor, guide: Option<(&Guide, &[u32])>, cache: &mut FrameCache) -> Result<Tensor> {
        let [first, second] = &self.norms;
        let h = cache.conv(&self.convs[0], &first.forward(x, guide)?)?;
        let h = second.forward(&h, guide)?;
        let shortcut = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)?,
            None => x.clone(),
        };
        cache.conv_with(&self.convs[1], &h, Some(&shortcut), None)
    }
}

/// What follows the residual blocks: a halving of the encoder, a doubling of the decoder, in time as well or not.
#[derive(Debug)]
struct Resize {
    conv: Conv3d,
    time: bool,
}

/// Residual blocks of one width, then a change of size.
#[derive(Debug)]
struct Stage {
    resnets: Vec<Resnet>,
    resize: Option<Resize>,
}

impl Stage {
    fn load(
        (input, output): (usize, usize),
        layers: usize,
        config: &VaeConfig,
        guided: bool,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let resnets = (0..layers)
            .map(|i| {
                let input = if i == 0 { input } else { output };
                Resnet::load(input, output, config, guided, &vb.pp("resnets").pp(i))
            })
            .collect::<Result<_>>()?;
        Ok(Self { resnets, resize: None })
    }

    fn resnets(&self, x: &Tensor, guide: Option<&Guide>, cache: &mut FrameCache) -> Result<Tensor> {
        let places = guide.map(|guide| guide.places(x)).transpose()?;
        let guide = guide.zip(places.as_deref());
        let mut x = x.clone();
        for resnet in &self.resnets {
            x = resnet.forward(&x, guide, cache)?;
        }
        Ok(x)
    }
}

/// Each two frames averaged; of an odd number the first stays alone.
fn halve_time(x: &Tensor) -> Result<Tensor> {
    let (batch, frames, height, width, channels) = x.dims5()?;
    let alone = frames % 2;
    let pairs = (frames - alone) / 2;
    if pairs == 0 {
        return Ok(x.clone());
    }
    let rest = x.narrow(1, alone, 2 * pairs)?.contiguous()?;
    let rest = rest.reshape(vec![batch, pairs, 2, height * width * channels])?.mean(2)?;
    let rest = rest.reshape((batch, pairs, height, width, channels))?;
    if alone == 0 { Ok(rest) } else { Tensor::cat(&[&x.narrow(1, 0, 1)?, &rest], 1) }
}

/// The encoder.
#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: Conv3d,
    stages: Vec<Stage>,
    middle: Stage,
    norm_out: GuidedNorm,
    conv_out: Conv3d,
}

impl Encoder {
    pub(super) fn load(config: &VaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let widths = &config.block_out_channels;
        let mut input = widths[0];
        let mut stages = Vec::with_capacity(widths.len());
        for (i, &output) in widths.iter().enumerate() {
            let vb = vb.pp("down_blocks").pp(i);
            let mut stage = Stage::load((input, output), config.layers_per_block, config, false, &vb)?;
            if i + 1 < widths.len() {
                let conv = planar(output, 2, &vb.pp("downsamplers.0.conv"))?;
                stage.resize = Some(Resize { conv, time: i < config.temporal_levels() });
            }
            stages.push(stage);
            input = output;
        }
        Ok(Self {
            conv_in: causal(config.in_channels, widths[0], &vb.pp("conv_in"))?,
            stages,
            middle: Stage::load((input, input), MIDDLE, config, false, &vb.pp("mid_block"))?,
            norm_out: GuidedNorm::plain(input, config, EPSILON, vb.pp("norm_out"))?,
            conv_out: causal(input, 2 * config.latent_channels, &vb.pp("conv_out"))?,
        })
    }

    /// A run of frames to its means and logarithms of variance, channels last.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        cache: &mut FrameCache,
        trace: &mut Option<Trace<'_>>,
    ) -> Result<Tensor> {
        let mut x = cache.conv(&self.conv_in, x)?;
        show(trace, "encoder.conv_in.conv", &x)?;
        for (i, stage) in self.stages.iter().enumerate() {
            x = stage.resnets(&x, None, cache)?;
            if let Some(resize) = &stage.resize {
                let shorter = if resize.time { halve_time(&x)? } else { x };
                x = resize.conv.forward_padded_after(&shorter)?;
            }
            show(trace, &format!("encoder.down_blocks.{i}.0"), &x)?;
        }
        x = self.middle.resnets(&x, None, cache)?;
        show(trace, "encoder.mid_block.0", &x)?;
        x = cache.conv(&self.conv_out, &self.norm_out.forward(&x, None)?)?;
        show(trace, "encoder.conv_out.conv", &x)?;
        Ok(x)
    }
}

/// The decoder.
#[derive(Debug)]
pub(super) struct Decoder {
    conv_in: Conv3d,
    middle: Stage,
    stages: Vec<Stage>,
    norm_out: GuidedNorm,
    conv_out: Conv3d,
}

impl Decoder {
    pub(super) fn load(config: &VaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let mut input = widths[0];
        let mut stages = Vec::with_capacity(widths.len());
        for (i, &output) in widths.iter().enumerate() {
            let vb = vb.pp("up_blocks").pp(i);
            let mut stage = Stage::load((input, output), config.layers_per_block + 1, config, true, &vb)?;
            if i + 1 < widths.len() {
                let conv = planar(output, 1, &vb.pp("upsamplers.0.conv"))?;
                stage.resize = Some(Resize { conv, time: i < config.temporal_levels() });
            }
            stages.push(stage);
            input = output;
        }
        Ok(Self {
            conv_in: causal(config.latent_channels, widths[0], &vb.pp("conv_in"))?,
            middle: Stage::load((widths[0], widths[0]), MIDDLE, config, true, &vb.pp("mid_block"))?,
            stages,
            norm_out: GuidedNorm::guided(input, config, &vb.pp("norm_out"))?,
            conv_out: causal(input, config.out_channels, &vb.pp("conv_out"))?,
        })
    }

    /// A run of latents to its frames, channels last.
    pub(super) fn forward(
        &self,
        z: &Tensor,
        cache: &mut FrameCache,
        trace: &mut Option<Trace<'_>>,
    ) -> Result<Tensor> {
        let guide = Guide::new(z)?;
        let mut x = cache.conv(&self.conv_in, z)?;
        show(trace, "decoder.conv_in.conv", &x)?;
        x = self.middle.resnets(&x, Some(&guide), cache)?;
        show(trace, "decoder.mid_block.0", &x)?;
        for (i, stage) in self.stages.iter().enumerate() {
            x = stage.resnets(&x, Some(&guide), cache)?;
            if let Some(resize) = &stage.resize {
                // A single frame, and the first of an odd number, stays one frame.
                let alone = x.dim(1)? % 2 == 1;
                x = resize.conv.forward(&repeat(&x, [1 + usize::from(resize.time), 2, 2], alone)?)?;
            }
            show(trace, &format!("decoder.up_blocks.{i}.0"), &x)?;
        }
        let places = guide.places(&x)?;
        let normed = self.norm_out.forward(&x, Some((&guide, &places)))?;
        drop(x);
        let x = cache.conv(&self.conv_out, &normed)?;
        show(trace, "decoder.conv_out.conv", &x)?;
        Ok(x)
    }
}

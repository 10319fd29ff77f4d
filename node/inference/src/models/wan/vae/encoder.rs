//! Video to the distribution of its latents.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::{CUBE, Gamma, Middle, Residual, Shrink, causal};
use super::config::WanVaeConfig;
use super::shortcut::{Fold, block};
use crate::nn::conv3d::Conv3d;
use crate::nn::frame_cache::FrameCache;
use crate::nn::shuffle::patchify;

/// The encoder.
#[derive(Debug, Clone)]
pub(super) struct Encoder {
    conv_in: Conv3d,
    parts: Vec<Part>,
    middle: Middle,
    norm_out: Gamma,
    conv_out: Conv3d,
    /// Pixels along a side of a patch.
    patch: usize,
}

/// What follows the first convolution.
#[derive(Debug, Clone)]
enum Part {
    /// A residual block; Wan 2.1's files number those of a level and its shrinking one after the other.
    Residual(Residual),
    /// See there.
    Shrink(Shrink),
    /// A level of Wan 2.2's form: residual blocks and shrinking, with a shortcut around them.
    Level(Vec<Residual>, Option<Shrink>, Fold),
}

impl Encoder {
    pub(super) fn load(config: &WanVaeConfig, vb: VarBuilder) -> Result<Self> {
        let widths = config.encoder_widths();
        let down = vb.pp("down_blocks");
        let mut parts = Vec::new();
        for (level, pair) in widths.windows(2).enumerate() {
            let halves_time = config.temperal_downsample.get(level).copied();
            if config.is_residual {
                let count = config.num_res_blocks;
                parts.push(level_part(count, (pair[0], pair[1]), halves_time, &down.pp(level))?);
                continue;
            }
            for i in 0..config.num_res_blocks {
                let input = if i == 0 { pair[0] } else { pair[1] };
                parts.push(Part::Residual(Residual::load(input, pair[1], down.pp(parts.len()))?));
            }
            if let Some(halves_time) = halves_time {
                parts.push(Part::Shrink(Shrink::load(pair[1], halves_time, down.pp(parts.len()))?));
            }
        }
        let last = widths[widths.len() - 1];
        Ok(Self {
            conv_in: Conv3d::load(causal(config.in_channels, widths[0], CUBE), vb.pp("conv_in"))?,
            parts,
            middle: Middle::load(last, vb.pp("mid_block"))?,
            norm_out: Gamma::load(last, 3, vb.pp("norm_out"))?,
            conv_out: Conv3d::load(causal(last, 2 * config.z_dim, CUBE), vb.pp("conv_out"))?,
            patch: config.patch(),
        })
    }

    /// `(batch, channels, frames, height, width)` to `(batch, time, height, width, 2 latent channels)`, in runs: the
    /// first frame, then `run` at a time.
    pub(super) fn forward(&self, video: &Tensor, run: usize) -> Result<Tensor> {
        let x = patchify(video, self.patch, 1)?;
        let frames = x.dim(1)?;
        let mut cache = FrameCache::default();
        let mut done = vec![self.encode(&x.narrow(1, 0, 1)?.contiguous()?, &mut cache)?];
        for start in (1..frames).step_by(run) {
            cache.rewind();
            done.push(self.encode(&x.narrow(1, start, run)?.contiguous()?, &mut cache)?);
        }
        Tensor::cat(&done, 1)
    }

    fn encode(&self, x: &Tensor, cache: &mut FrameCache) -> Result<Tensor> {
        let mut x = cache.conv(&self.conv_in, x)?;
        for part in &self.parts {
            x = match part {
                Part::Residual(residual) => residual.forward(&x, cache)?,
                Part::Shrink(shrink) => shrink.forward(&x, cache)?,
                Part::Level(residuals, shrink, fold) => {
                    let shortcut = fold.forward(&x)?;
                    for residual in residuals {
                        x = residual.forward(&x, cache)?;
                    }
                    if let Some(shrink) = shrink {
                        x = shrink.forward(&x, cache)?;
                    }
                    (x + shortcut)?
                }
            };
        }
        x = self.middle.forward(&x, cache)?;
        cache.conv(&self.conv_out, &self.norm_out.norm().silu().apply(&x)?)
    }
}

fn level_part(
    residuals: usize,
    (input, output): (usize, usize),
    halves_time: Option<bool>,
    vb: &VarBuilder,
) -> Result<Part> {
    let residuals = (0..residuals)
        .map(|i| Residual::load(if i == 0 { input } else { output }, output, vb.pp("resnets").pp(i)))
        .collect::<Result<_>>()?;
    let shrink = halves_time.map(|time| Shrink::load(output, time, vb.pp("downsampler"))).transpose()?;
    let fold = Fold::new(input, output, block(halves_time == Some(true), halves_time.is_some()))?;
    Ok(Part::Level(residuals, shrink, fold))
}

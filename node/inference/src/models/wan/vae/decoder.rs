//! Latents to video.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::{CUBE, Gamma, Grow, Middle, Residual, causal};
use super::config::WanVaeConfig;
use crate::nn::conv3d::Conv3d;
use crate::nn::frame_cache::FrameCache;
use crate::tiling::{Margin, Plan, Ratio, Tiling};

/// The decoder: a convolution and the middle, which attends over whole frames; then levels that grow, run by run and, if
/// asked for, tile by tile.
#[derive(Debug, Clone)]
pub(super) struct Decoder {
    conv_in: Conv3d,
    middle: Middle,
    levels: Vec<Level>,
    norm_out: Gamma,
    conv_out: Conv3d,
    ratio: Ratio,
}

/// Residual blocks of one width, then growth.
#[derive(Debug, Clone)]
struct Level {
    residuals: Vec<Residual>,
    grow: Option<Grow>,
}

/// Called between the pieces of a decode; an error ends it.
pub type Watch<'a> = &'a mut dyn FnMut() -> Result<()>;

impl Decoder {
    pub(super) fn load(config: &WanVaeConfig, vb: VarBuilder) -> Result<Self> {
        let widths = config.decoder_widths();
        let levels = config.dim_mult.len();
        let doubles_time: Vec<bool> = config.temperal_downsample.iter().rev().copied().collect();
        let level = |index: usize| {
            // Growth halves the width, so that a level begins with half of what the one before ended with.
            let input = if index == 0 { widths[0] } else { widths[index] / 2 };
            let output = widths[index + 1];
            let vb = vb.pp("up_blocks").pp(index);
            let residuals = (0..=config.num_res_blocks)
                .map(|i| Residual::load(if i == 0 { input } else { output }, output, vb.pp("resnets").pp(i)))
                .collect::<Result<_>>()?;
            let grow = if index + 1 < levels {
                Some(Grow::load(output, output / 2, doubles_time[index], vb.pp("upsamplers.0"))?)
            } else {
                None
            };
            Ok(Level { residuals, grow })
        };
        let last = widths[levels];
        Ok(Self {
            conv_in: Conv3d::load(causal(config.z_dim, widths[0], CUBE), vb.pp("conv_in"))?,
            middle: Middle::load(widths[0], vb.pp("mid_block"))?,
            levels: (0..levels).map(level).collect::<Result<_>>()?,
            norm_out: Gamma::load(last, 3, vb.pp("norm_out"))?,
            conv_out: Conv3d::load(causal(last, config.out_channels, CUBE), vb.pp("conv_out"))?,
            ratio: Ratio { time: config.temporal_ratio(), space: config.spatial_ratio() / config.patch() },
        })
    }

    /// `(batch, time, height, width, channels)` to `(batch, channels, frames, height, width)`.
    pub(super) fn forward(&self, z: &Tensor, tiling: Tiling, watch: Watch<'_>) -> Result<Tensor> {
        let x = self.middle.forward(&self.conv_in.forward(z)?, &mut FrameCache::default())?;
        watch()?;
        // Runs remember what lies before them, so that only pictures are cut with margins.
        let run = (tiling.chunk.unwrap_or(0) / self.ratio.time).max(1);
        let (_, t, h, w, _) = x.dims5()?;
        let plan = Plan::new(Tiling { chunk: None, ..tiling }, self.ratio, self.margin(), [t, h, w]);
        if plan.tiles() == 1 {
            return self.grow(&x, run, watch);
        }
        plan.decode(&x, |tile, _| self.grow(tile, run, watch))
    }

    /// The levels and the end, `run` latent frames at a time.
    fn grow(&self, x: &Tensor, run: usize, watch: Watch<'_>) -> Result<Tensor> {
        let frames = x.dim(1)?;
        let mut cache = FrameCache::default();
        let mut parts = Vec::with_capacity(frames.div_ceil(run));
        for start in (0..frames).step_by(run) {
            cache.rewind();
            let mut part = x.narrow(1, start, run.min(frames - start))?.contiguous()?;
            for level in &self.levels {
                part = level.forward(&part, &mut cache)?;
            }
            part = self.norm_out.norm().silu().apply(&part)?;
            part = cache.conv(&self.conv_out, &part)?;
            parts.push(part.permute((0, 4, 1, 2, 3))?.contiguous()?);
            watch()?;
        }
        Tensor::cat(&parts, 2)
    }

    /// Rows and columns around a position that its pixels depend on.
    fn margin(&self) -> Margin {
        let mut space = 1;
        for level in self.levels.iter().rev() {
            if level.grow.is_some() {
                space = (space + 1usize).div_ceil(2);
            }
            space += 2 * level.residuals.len();
        }
        Margin { time: 0, space }
    }
}

impl Level {
    fn forward(&self, x: &Tensor, cache: &mut FrameCache) -> Result<Tensor> {
        let mut x = x.clone();
        for residual in &self.residuals {
            x = residual.forward(&x, cache)?;
        }
        match &self.grow {
            Some(grow) => grow.forward(&x, cache),
            None => Ok(x),
        }
    }
}

//! Latents to video.

use std::ops::Range;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::{CUBE, Gamma, Grow, Middle, Residual, causal};
use super::config::WanVaeConfig;
use super::shortcut::{Spread, block};
use crate::nn::conv3d::Conv3d;
use crate::nn::frame_cache::FrameCache;
use crate::nn::shuffle::unpatchify;
use crate::sink::Sink;
use crate::tiling::{Margin, Plan, Ratio, Tiling};

/// Tiles begin as early in the decoder as costs at most this many times the work in what follows.
const MOST_OVERHEAD: f64 = 3.0;

/// The decoder: a convolution and the middle, which attends over whole frames; then levels that grow, run by run and, if
/// asked for, tile by tile.
#[derive(Debug, Clone)]
pub(super) struct Decoder {
    conv_in: Conv3d,
    middle: Middle,
    levels: Vec<Level>,
    norm_out: Gamma,
    conv_out: Conv3d,
    /// Pixels along a side of a patch.
    patch: usize,
}

/// Residual blocks of one width, then growth, with a shortcut around all of it in Wan 2.2's form.
#[derive(Debug, Clone)]
struct Level {
    residuals: Vec<Residual>,
    grow: Option<Grow>,
    shortcut: Option<Spread>,
}

impl Decoder {
    pub(super) fn load(config: &WanVaeConfig, vb: VarBuilder) -> Result<Self> {
        let widths = config.decoder_widths();
        let levels = config.dim_mult.len();
        let level = |index| Level::load(config, index, vb.pp("up_blocks").pp(index));
        let last = widths[levels];
        Ok(Self {
            conv_in: Conv3d::load(causal(config.z_dim, widths[0], CUBE), vb.pp("conv_in"))?,
            middle: Middle::load(widths[0], vb.pp("mid_block"))?,
            levels: (0..levels).map(level).collect::<Result<_>>()?,
            norm_out: Gamma::load(last, 3, vb.pp("norm_out"))?,
            conv_out: Conv3d::load(causal(last, config.out_channels, CUBE), vb.pp("conv_out"))?,
            patch: config.patch(),
        })
    }

    /// `(batch, time, height, width, channels)` to `(batch, channels, frames, height, width)` of -1 to 1.
    pub(super) fn forward(&self, z: &Tensor, tiling: Tiling, sink: &mut dyn Sink) -> Result<()> {
        let x = self.middle.forward(&self.conv_in.forward(z)?, &mut FrameCache::default())?;
        sink.go_on()?;
        // Runs remember what lies before them, so that only pictures are cut with margins.
        let run = (tiling.chunk.unwrap_or(0) / self.ratio(0).time).max(1);
        let (_, t, h, w, _) = x.dims5()?;
        match self.plan(Tiling { chunk: None, ..tiling }, [t, h, w]) {
            None => self.end(&x, 0, run, sink),
            Some((0, plan)) => plan.decode(&x, sink, |tile, _, sink| self.end(tile, 0, run, sink)),
            Some((first, plan)) => {
                let mut parts = Vec::new();
                self.run(&x, 0..first, run, |part, _| {
                    parts.push(part);
                    sink.go_on()
                })?;
                let x = Tensor::cat(&parts, 1)?;
                drop(parts);
                let run = run * self.ratio(0).time / self.ratio(first).time;
                plan.decode(&x, sink, |tile, _, sink| self.end(tile, first, run, sink))
            }
        }
    }

    /// The levels from `first` on and what follows the last.
    fn end(&self, x: &Tensor, first: usize, run: usize, sink: &mut dyn Sink) -> Result<()> {
        self.run(x, first..self.levels.len(), run, |part, cache| {
            let normed = self.norm_out.norm().silu().apply(&part)?;
            drop(part);
            let pixels = cache.conv(&self.conv_out, &normed)?;
            drop(normed);
            let video = unpatchify(&pixels, self.patch, 1)?;
            drop(pixels);
            let raised = video.maximum(-1f32)?;
            drop(video);
            sink.put(raised.minimum(1f32)?)?;
            sink.go_on()
        })
    }

    /// Some levels, `run` positions of time at a go: `each` takes what they give.
    fn run(
        &self,
        x: &Tensor,
        levels: Range<usize>,
        run: usize,
        mut each: impl FnMut(Tensor, &mut FrameCache) -> Result<()>,
    ) -> Result<()> {
        let positions = x.dim(1)?;
        let mut cache = FrameCache::default();
        for start in (0..positions).step_by(run) {
            cache.rewind();
            let mut part = x.narrow(1, start, run.min(positions - start))?.contiguous()?;
            for level in &self.levels[levels.clone()] {
                part = level.forward(&part, &mut cache)?;
            }
            each(part, &mut cache)?;
        }
        Ok(())
    }

    /// From which level on the decode goes in tiles, and which: as early as [`MOST_OVERHEAD`] lets it, so that little is
    /// kept whole, else the last level that grows. `None` where everything fits into one tile.
    pub(super) fn plan(&self, tiling: Tiling, latents: [usize; 3]) -> Option<(usize, Plan)> {
        let whole = self.ratio(0);
        let plans = (0..self.levels.len().max(2) - 1).map(|first| {
            let ratio = self.ratio(first);
            let (time, space) = (whole.time / ratio.time, whole.space / ratio.space);
            let size = [(latents[0] - 1) * time + 1, latents[1] * space, latents[2] * space];
            (first, Plan::new(tiling, ratio, self.margin(first), size))
        });
        let mut latest = None;
        for (first, plan) in plans {
            if plan.tiles() == 1 {
                return None;
            }
            let is_cheap = plan.overhead() <= MOST_OVERHEAD;
            latest = Some((first, plan));
            if is_cheap {
                break;
            }
        }
        latest
    }

    /// What a position before level `first` becomes.
    fn ratio(&self, first: usize) -> Ratio {
        let grown = self.levels[first..].iter().filter_map(|level| level.grow.as_ref());
        let mut ratio = Ratio { time: 1, space: self.patch };
        for grow in grown {
            ratio = Ratio { time: ratio.time * grow.time_scale(), space: ratio.space * 2 };
        }
        ratio
    }

    /// Rows and columns around a position before level `first` that its pixels depend on.
    fn margin(&self, first: usize) -> Margin {
        let mut space = 1;
        for level in self.levels[first..].iter().rev() {
            if level.grow.is_some() {
                space = (space + 1usize).div_ceil(2);
            }
            space += 2 * level.residuals.len();
        }
        Margin { time: 0, space }
    }
}

impl Level {
    fn load(config: &WanVaeConfig, index: usize, vb: VarBuilder) -> Result<Self> {
        let widths = config.decoder_widths();
        // Growth halves the width in Wan 2.1's form, so that a level begins with half of what the one before ended with.
        let halves = index > 0 && !config.is_residual;
        let input = if halves { widths[index] / 2 } else { widths[index] };
        let output = widths[index + 1];
        let residuals = (0..=config.num_res_blocks)
            .map(|i| Residual::load(if i == 0 { input } else { output }, output, vb.pp("resnets").pp(i)))
            .collect::<Result<_>>()?;
        let grows = config.temperal_downsample.iter().rev().nth(index).copied();
        let Some(doubles_time) = grows else { return Ok(Self { residuals, grow: None, shortcut: None }) };
        let (narrow, name) =
            if config.is_residual { (output, "upsampler") } else { (output / 2, "upsamplers.0") };
        let shortcut = if config.is_residual {
            Some(Spread::new(input, output, block(doubles_time, true), vb.device())?)
        } else {
            None
        };
        Ok(Self { residuals, grow: Some(Grow::load(output, narrow, doubles_time, vb.pp(name))?), shortcut })
    }

    fn forward(&self, before: &Tensor, cache: &mut FrameCache) -> Result<Tensor> {
        let mut x = before.clone();
        for residual in &self.residuals {
            x = residual.forward(&x, cache)?;
        }
        let Some(grow) = &self.grow else { return Ok(x) };
        let shortcut = self.shortcut.as_ref().map(|shortcut| shortcut.forward(before, cache)).transpose()?;
        grow.forward(&x, shortcut.as_ref(), cache)
    }
}

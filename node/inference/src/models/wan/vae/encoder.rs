//! Video to the distribution of its latents.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::{CUBE, Gamma, Middle, Residual, Shrink, causal};
use super::config::WanVaeConfig;
use crate::nn::conv3d::Conv3d;
use crate::nn::frame_cache::FrameCache;

/// The encoder.
#[derive(Debug, Clone)]
pub(super) struct Encoder {
    conv_in: Conv3d,
    parts: Vec<Part>,
    middle: Middle,
    norm_out: Gamma,
    conv_out: Conv3d,
}

/// The files number a level's residual blocks and its shrinking one after the other.
#[derive(Debug, Clone)]
enum Part {
    Residual(Residual),
    Shrink(Shrink),
}

impl Encoder {
    pub(super) fn load(config: &WanVaeConfig, vb: VarBuilder) -> Result<Self> {
        let widths = config.encoder_widths();
        let mut parts = Vec::new();
        for (level, pair) in widths.windows(2).enumerate() {
            let (mut input, output) = (pair[0], pair[1]);
            for _ in 0..config.num_res_blocks {
                let vb = vb.pp("down_blocks").pp(parts.len());
                parts.push(Part::Residual(Residual::load(input, output, vb)?));
                input = output;
            }
            if let Some(&halves_time) = config.temperal_downsample.get(level) {
                let vb = vb.pp("down_blocks").pp(parts.len());
                parts.push(Part::Shrink(Shrink::load(output, halves_time, vb)?));
            }
        }
        let last = widths[widths.len() - 1];
        Ok(Self {
            conv_in: Conv3d::load(causal(config.in_channels, widths[0], CUBE), vb.pp("conv_in"))?,
            parts,
            middle: Middle::load(last, vb.pp("mid_block"))?,
            norm_out: Gamma::load(last, 3, vb.pp("norm_out"))?,
            conv_out: Conv3d::load(causal(last, 2 * config.z_dim, CUBE), vb.pp("conv_out"))?,
        })
    }

    /// `(batch, frames, height, width, channels)` to `(batch, time, height, width, 2 latent channels)`, in runs: the
    /// first frame, then `run` at a time.
    pub(super) fn forward(&self, x: &Tensor, run: usize) -> Result<Tensor> {
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
            };
        }
        x = self.middle.forward(&x, cache)?;
        cache.conv(&self.conv_out, &self.norm_out.norm().silu().apply(&x)?)
    }
}

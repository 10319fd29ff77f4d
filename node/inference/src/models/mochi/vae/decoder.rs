//! Latents to video: whole, or run of frames by run of frames with the very same values.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::config::MochiVaeConfig;
use super::resnet::Resnets;
use super::{Trace, show};
use crate::nn::conv3d::{Conv3d, Conv3dConfig};
use crate::nn::frame_cache::FrameCache;
use crate::nn::linear::Linear;
use crate::nn::ops::silu;
use crate::nn::shuffle::{block_first, depth_to_space};
use crate::sink::Sink;
use crate::tiling::frames_at_once;

/// The decoder.
#[derive(Debug, Clone)]
pub(super) struct Decoder {
    conv_in: Conv3d,
    block_in: Resnets,
    ups: Vec<Up>,
    block_out: Resnets,
    out: Linear,
    /// Frames, and pixels along a side, of a latent cell.
    ratio: (usize, usize),
    /// Channels of the finest activation.
    finest: usize,
}

/// Residual blocks, then channels into time, height and width.
#[derive(Debug, Clone)]
struct Up {
    resnets: Resnets,
    grow: Linear,
    block: [usize; 3],
}

impl Decoder {
    pub(super) fn load(config: &MochiVaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let widths = &config.decoder_block_out_channels;
        let (finest, coarsest) = (widths[0], widths[widths.len() - 1]);
        let layers = &config.layers_per_block;
        let ups = (0..widths.len() - 1)
            .map(|i| {
                let level = widths.len() - 1 - i;
                let (time, space) =
                    (config.temporal_expansions[level - 1], config.spatial_expansions[level - 1]);
                let vb = vb.pp("up_blocks").pp(i);
                Up::load((widths[level], widths[level - 1]), layers[level], [time, space, space], &vb)
            })
            .collect::<Result<_>>()?;
        let conv_in = Conv3dConfig::cube(config.latent_channels, coarsest, 1, true);
        Ok(Self {
            conv_in: Conv3d::load(conv_in, vb.pp("conv_in"))?,
            block_in: Resnets::load(coarsest, layers[layers.len() - 1], &vb.pp("block_in"))?,
            ups,
            block_out: Resnets::load(finest, layers[0], &vb.pp("block_out"))?,
            out: Linear::load(finest, config.out_channels, true, vb.pp("proj_out"))?,
            ratio: (config.temporal_ratio(), config.spatial_ratio()),
            finest,
        })
    }

    /// `(batch, channels, time, height, width)` to `(batch, 3, frames, height, width)`, in runs of about `chunk` frames.
    pub(super) fn decode(&self, z: &Tensor, chunk: Option<usize>, sink: &mut dyn Sink) -> Result<()> {
        let frames = z.dim(2)?;
        let run = self.run_length(z, chunk)?;
        if run >= frames {
            sink.go_on()?;
            return sink.put(self.start_cut(&self.forward(z, None, &mut None)?)?);
        }
        let mut cache = FrameCache::default();
        for start in (0..frames).step_by(run) {
            sink.go_on()?;
            cache.rewind();
            let part = z.narrow(2, start, run.min(frames - start))?;
            let part = self.forward(&part, Some(&mut cache), &mut None)?;
            sink.put(if start == 0 { self.start_cut(&part)? } else { part })?;
        }
        Ok(())
    }

    /// The whole clip, with every block's result shown.
    pub(super) fn decode_traced(&self, z: &Tensor, trace: Trace<'_>) -> Result<Tensor> {
        self.start_cut(&self.forward(z, None, &mut Some(trace))?)
    }

    /// Latent frames in a run.
    pub(super) fn run_length(&self, z: &Tensor, chunk: Option<usize>) -> Result<usize> {
        let (batch, _, frames, height, width) = z.dims5()?;
        let (time, space) = self.ratio;
        let run = match chunk {
            Some(pictures) => pictures / time,
            None => frames_at_once(&[batch, time, height, width, space, space, self.finest]),
        };
        Ok(run.clamp(1, frames.max(1)))
    }

    /// The first latent frame stands for one picture, the last that it grows into.
    fn start_cut(&self, video: &Tensor) -> Result<Tensor> {
        let skip = self.ratio.0 - 1;
        video.narrow(2, skip, video.dim(2)? - skip)?.contiguous()
    }

    fn forward(
        &self,
        z: &Tensor,
        mut cache: Option<&mut FrameCache>,
        trace: &mut Option<Trace<'_>>,
    ) -> Result<Tensor> {
        let mut x = self.conv_in.forward(&z.permute((0, 2, 3, 4, 1))?.contiguous()?)?;
        show(trace, "decoder.conv_in", &x)?;
        x = self.block_in.forward(&x, cache.as_deref_mut())?;
        show(trace, "decoder.block_in.0", &x)?;
        for (i, up) in self.ups.iter().enumerate() {
            x = up.forward(&x, cache.as_deref_mut())?;
            show(trace, &format!("decoder.up_blocks.{i}.0"), &x)?;
        }
        x = self.block_out.forward(&x, cache)?;
        show(trace, "decoder.block_out.0", &x)?;
        self.out.forward(&silu(&x)?)?.permute((0, 4, 1, 2, 3))?.contiguous()
    }
}

impl Up {
    fn load(
        (input, output): (usize, usize),
        layers: usize,
        block: [usize; 3],
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let cells: usize = block.iter().product();
        let grown = output * cells;
        let (weight, bias) = (vb.get((grown, input), "proj.weight")?, vb.get(grown, "proj.bias")?);
        let order = Tensor::new(block_first(grown, cells), weight.device())?;
        let ordered = |tensor: &Tensor| tensor.contiguous()?.index_select(&order, 0);
        let grow = Linear::new(ordered(&weight)?, Some(ordered(&bias)?))?;
        Ok(Self { resnets: Resnets::load(input, layers, vb)?, grow, block })
    }

    fn forward(&self, x: &Tensor, cache: Option<&mut FrameCache>) -> Result<Tensor> {
        let x = self.resnets.forward(x, cache)?;
        depth_to_space(&self.grow.forward(&x)?, self.block, 0)
    }
}

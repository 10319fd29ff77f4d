//! Video to the distribution of its latents.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::Down;
use super::config::LtxVaeConfig;
use super::resnet::{Form, RMS_EPS, Resnets};
use super::{Draws, Noise, Trace, show};
use crate::nn::conv3d::{Conv3d, Conv3dConfig};
use crate::nn::norm::Norm;
use crate::nn::shuffle::patchify;

/// The encoder.
#[derive(Debug, Clone)]
pub(super) struct Encoder {
    conv_in: Conv3d,
    blocks: Vec<Down>,
    middle: Resnets,
    conv_out: Conv3d,
    patch: (usize, usize),
    ratio: (usize, usize),
}

impl Encoder {
    pub(super) fn load(config: &LtxVaeConfig, vb: VarBuilder) -> Result<Self> {
        let form = Form {
            causal: config.encoder_causal,
            eps: config.resnet_norm_eps,
            inject_noise: false,
            timestep: false,
        };
        let conv = |input, output, name: &str| {
            Conv3d::load(Conv3dConfig::cube(input, output, 3, form.causal), vb.pp(name).pp("conv"))
        };
        let widths = &config.block_out_channels;
        let mut width = widths[0];
        let mut blocks = Vec::with_capacity(config.down_blocks.len());
        for (i, kind) in config.down_blocks.iter().enumerate() {
            let output = widths.get(i + 1).copied().unwrap_or(widths[i]);
            let (layers, scale) = (config.layers_per_block[i], config.spatio_temporal_scaling[i]);
            blocks.push(Down::load(
                *kind,
                (width, output),
                layers,
                scale,
                form,
                vb.pp(format!("down_blocks.{i}")),
            )?);
            width = output;
        }
        let layers = config.layers_per_block.last().copied().unwrap_or(0);
        let pixels = config.in_channels * config.patch_size * config.patch_size;
        Ok(Self {
            conv_in: conv(pixels, widths[0], "conv_in")?,
            blocks,
            middle: Resnets::load(width, layers, form, vb.pp("mid_block"))?,
            conv_out: conv(width, config.latent_channels + 1, "conv_out")?,
            patch: (config.patch_size, config.patch_size_t),
            ratio: (config.spatial_ratio(), config.temporal_ratio()),
        })
    }

    /// `(batch, 3, frames, height, width)` to `(batch, 2 latent channels, time, height, width)`: means, then one
    /// logarithm of variance that all channels share, repeated.
    pub(super) fn forward(&self, video: &Tensor, trace: &mut Option<Trace<'_>>) -> Result<Tensor> {
        let (_, _, frames, height, width) = video.dims5()?;
        let (space, time) = self.ratio;
        let fits = height.is_multiple_of(space) && width.is_multiple_of(space) && frames % time == 1 % time;
        if !fits {
            candle_core::bail!(
                "a video of {frames} frames, {height}x{width}, cannot be encoded: frames must be {time}k+1, sides \
                 multiples of {space}"
            );
        }
        let mut draws = Draws::whole(&Noise::None);
        let mut x = self.conv_in.forward(&patchify(video, self.patch.0, self.patch.1)?)?;
        show(trace, "encoder.conv_in", &x)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &mut draws)?;
            show(trace, &format!("encoder.down_blocks.{i}"), &x)?;
        }
        x = self.middle.forward(&x, None, &mut draws)?;
        show(trace, "encoder.mid_block", &x)?;
        x = self.conv_out.forward(&Norm::rms(RMS_EPS).silu().apply(&x)?)?;
        show(trace, "encoder.conv_out", &x)?;
        let x = x.permute((0, 4, 1, 2, 3))?.contiguous()?;
        let latents = x.dim(1)? - 1;
        let last = x.narrow(1, latents, 1)?;
        let mut parts = vec![x];
        parts.extend(std::iter::repeat_n(last, latents - 1));
        Tensor::cat(&parts, 1)
    }
}

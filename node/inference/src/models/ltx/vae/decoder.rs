//! Latents to video.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::Up;
use super::config::LtxVaeConfig;
use super::resnet::{Form, RMS_EPS, Resnets, modulation};
use super::{Draws, Trace, show};
use crate::nn::conv3d::{Conv3d, Conv3dConfig};
use crate::nn::embedding::PixArtTimestepEmbedding;
use crate::nn::norm::Norm;
use crate::nn::shuffle::unpatchify;

/// The decoder.
#[derive(Debug, Clone)]
pub(super) struct Decoder {
    conv_in: Conv3d,
    middle: Resnets,
    blocks: Vec<Up>,
    conv_out: Conv3d,
    conditioning: Option<Conditioning>,
    patch: (usize, usize),
}

/// What the end of a timestep-conditioned decoder needs.
#[derive(Debug, Clone)]
struct Conditioning {
    multiplier: f64,
    embedder: PixArtTimestepEmbedding,
    table: Tensor,
}

impl Decoder {
    pub(super) fn load(config: &LtxVaeConfig, vb: VarBuilder) -> Result<Self> {
        let decoder = &config.decoder;
        let form = |inject_noise| Form {
            causal: decoder.causal,
            eps: config.resnet_norm_eps,
            inject_noise,
            timestep: decoder.timestep_conditioning,
        };
        let conv = |input, output, name: &str| {
            Conv3d::load(Conv3dConfig::cube(input, output, 3, decoder.causal), vb.pp(name).pp("conv"))
        };
        let width = decoder.blocks.last().map_or(decoder.width, |block| block.output);
        let pixels = config.out_channels * config.patch_size * config.patch_size * config.patch_size_t;
        let conditioning = if decoder.timestep_conditioning {
            Some(Conditioning {
                multiplier: f64::from(vb.get((), "timestep_scale_multiplier")?.to_dtype(DType::F32)?.to_scalar::<f32>()?),
                embedder: PixArtTimestepEmbedding::load(width * 2, vb.pp("time_embedder"))?,
                table: vb.get((2, width), "scale_shift_table")?,
            })
        } else {
            None
        };
        Ok(Self {
            conv_in: conv(config.latent_channels, decoder.width, "conv_in")?,
            middle: Resnets::load(decoder.width, decoder.layers, form(decoder.inject_noise), vb.pp("mid_block"))?,
            blocks: decoder
                .blocks
                .iter()
                .enumerate()
                .map(|(i, block)| Up::load(block, form(block.inject_noise), vb.pp(format!("up_blocks.{i}"))))
                .collect::<Result<_>>()?,
            conv_out: conv(width, pixels, "conv_out")?,
            conditioning,
            patch: (config.patch_size, config.patch_size_t),
        })
    }

    /// `(batch, channels, time, height, width)` to `(batch, 3, frames, height, width)`.
    pub(super) fn forward(
        &self,
        z: &Tensor,
        timestep: Option<&Tensor>,
        draws: &mut Draws,
        trace: &mut Option<Trace<'_>>,
    ) -> Result<Tensor> {
        let timestep = match (&self.conditioning, timestep) {
            (None, _) => None,
            (Some(c), Some(t)) => Some((t.to_dtype(DType::F32)?.flatten_all()? * c.multiplier)?),
            (Some(_), None) => candle_core::bail!("this decoder must be told a timestep"),
        };
        let mut x = self.conv_in.forward(&z.permute((0, 2, 3, 4, 1))?.contiguous()?)?;
        show(trace, "decoder.conv_in", &x)?;
        x = self.middle.forward(&x, timestep.as_ref(), draws)?;
        show(trace, "decoder.mid_block", &x)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, timestep.as_ref(), draws)?;
            show(trace, &format!("decoder.up_blocks.{i}"), &x)?;
        }
        let parts = match (&self.conditioning, &timestep) {
            (Some(c), Some(t)) => Some(modulation(&c.embedder.forward(t)?, &c.table)?),
            _ => None,
        };
        let norm = Norm::rms(RMS_EPS).silu();
        let norm = match &parts {
            Some(parts) => norm.modulate(&parts[1], &parts[0]),
            None => norm,
        };
        x = self.conv_out.forward(&norm.apply(&x)?)?;
        show(trace, "decoder.conv_out", &x)?;
        unpatchify(&x, self.patch.0, self.patch.1)
    }
}

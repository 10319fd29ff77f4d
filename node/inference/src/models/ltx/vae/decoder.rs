//! Latents to video.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::Up;
use super::config::LtxVaeConfig;
use super::resnet::{Form, RMS_EPS, Resnets, modulation};
use super::{DecodeSettings, Draws, Trace, show};
use crate::nn::conv3d::{Conv3d, Conv3dConfig};
use crate::nn::embedding::PixArtTimestepEmbedding;
use crate::nn::norm::Norm;
use crate::nn::shuffle::unpatchify;
use crate::sink::Sink;
use crate::tiling::{Margin, Plan, Ratio, Tiling};

/// Tiles begin as early in the decoder as costs at most this many times the work in what follows.
const MOST_OVERHEAD: f64 = 3.0;

/// The decoder.
#[derive(Debug, Clone)]
pub(super) struct Decoder {
    conv_in: Conv3d,
    middle: Resnets,
    blocks: Vec<Up>,
    conv_out: Conv3d,
    conditioning: Option<Conditioning>,
    patch: (usize, usize),
    causal: bool,
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
                multiplier: f64::from(
                    vb.get((), "timestep_scale_multiplier")?.to_dtype(DType::F32)?.to_scalar::<f32>()?,
                ),
                embedder: PixArtTimestepEmbedding::load(width * 2, vb.pp("time_embedder"))?,
                table: vb.get((2, width), "scale_shift_table")?,
            })
        } else {
            None
        };
        Ok(Self {
            conv_in: conv(config.latent_channels, decoder.width, "conv_in")?,
            middle: Resnets::load(
                decoder.width,
                decoder.layers,
                form(decoder.inject_noise),
                vb.pp("mid_block"),
            )?,
            blocks: decoder
                .blocks
                .iter()
                .enumerate()
                .map(|(i, block)| Up::load(block, form(block.inject_noise), vb.pp(format!("up_blocks.{i}"))))
                .collect::<Result<_>>()?,
            conv_out: conv(width, pixels, "conv_out")?,
            conditioning,
            patch: (config.patch_size, config.patch_size_t),
            causal: decoder.causal,
        })
    }

    /// `(batch, channels, time, height, width)` to `(batch, 3, frames, height, width)`.
    pub(super) fn decode(
        &self,
        z: &Tensor,
        settings: &DecodeSettings,
        sink: &mut dyn Sink,
        trace: &mut Option<Trace<'_>>,
    ) -> Result<()> {
        let timestep = match (&self.conditioning, settings.timestep) {
            (None, _) => None,
            (Some(c), Some(t)) => Some((t.to_dtype(DType::F32)?.flatten_all()? * c.multiplier)?),
            (Some(_), None) => candle_core::bail!("this decoder must be told a timestep"),
        };
        let timestep = timestep.as_ref();
        let (_, _, t, h, w) = z.dims5()?;
        let mut draws = Draws::whole(&settings.noise);
        let cut = self.plan(settings.tiling, [t, h, w]);
        let mut x = self.conv_in.forward(&z.permute((0, 2, 3, 4, 1))?.contiguous()?)?;
        show(trace, "decoder.conv_in", &x)?;
        sink.go_on()?;
        x = self.middle.forward(&x, timestep, &mut draws)?;
        show(trace, "decoder.mid_block", &x)?;
        let whole = cut.as_ref().map_or(self.blocks.len(), |(first, _)| *first);
        for (i, block) in self.blocks[..whole].iter().enumerate() {
            x = block.forward(&x, timestep, &mut draws)?;
            show(trace, &format!("decoder.up_blocks.{i}"), &x)?;
            sink.go_on()?;
        }
        let Some((first, plan)) = cut else { return sink.put(self.finish(x, timestep, trace)?) };
        plan.decode(&x, sink, |tile, place, sink| {
            let mut draws = draws.within(place);
            let mut x = tile.clone();
            for block in &self.blocks[first..] {
                x = block.forward(&x, timestep, &mut draws)?;
            }
            sink.put(self.finish(x, timestep, &mut None)?)
        })
    }

    /// From which block on the decode goes in tiles, and which: as early as [`MOST_OVERHEAD`] lets it, so that little
    /// runs whole, else the last block that grows. `None` where everything fits into one tile.
    pub(super) fn plan(&self, tiling: Tiling, latents: [usize; 3]) -> Option<(usize, Plan)> {
        if tiling.is_whole() {
            return None;
        }
        let mut margin = Margin { time: if self.causal { 2 } else { 1 }, space: 1 };
        let mut scale = 1;
        let mut best = None;
        for (first, block) in self.blocks.iter().enumerate().rev() {
            margin = block.margin(margin, self.causal);
            scale *= block.scale();
            if block.scale() == 1 && best.is_some() {
                continue;
            }
            let before: usize = self.blocks[..first].iter().map(Up::scale).product();
            let size = [(latents[0] - 1) * before + 1, latents[1] * before, latents[2] * before];
            let ratio = Ratio { time: scale * self.patch.1, space: scale * self.patch.0 };
            let plan = Plan::new(tiling, ratio, margin, size);
            if plan.tiles() == 1 {
                break;
            }
            if best.is_none() || plan.overhead() <= MOST_OVERHEAD {
                best = Some((first, plan));
            }
        }
        best
    }

    /// After the last block: norm, convolution, patches to pixels.
    fn finish(&self, x: Tensor, timestep: Option<&Tensor>, trace: &mut Option<Trace<'_>>) -> Result<Tensor> {
        let parts = match (&self.conditioning, timestep) {
            (Some(c), Some(t)) => Some(modulation(&c.embedder.forward(t)?, &c.table)?),
            _ => None,
        };
        let norm = Norm::rms(RMS_EPS).silu();
        let norm = match &parts {
            Some(parts) => norm.modulate(&parts[1], &parts[0]),
            None => norm,
        };
        let normed = norm.apply(&x)?;
        drop(x);
        let x = self.conv_out.forward(&normed)?;
        show(trace, "decoder.conv_out", &x)?;
        unpatchify(&x, self.patch.0, self.patch.1)
    }
}

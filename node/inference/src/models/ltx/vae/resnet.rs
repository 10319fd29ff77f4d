//! The residual block of encoder and decoder, and what the decoder's blocks are told about the noise level.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::Draws;
use crate::nn::conv3d::{Conv3d, Conv3dConfig};
use crate::nn::embedding::PixArtTimestepEmbedding;
use crate::nn::norm::{Norm, layer_norm};

/// Added to the mean square in every RMS norm of this autoencoder.
pub(super) const RMS_EPS: f64 = 1e-8;

/// What all of a model's residual blocks have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    pub(super) causal: bool,
    pub(super) eps: f64,
    pub(super) inject_noise: bool,
    pub(super) timestep: bool,
}

/// Norm, SiLU, convolution, twice, with a shortcut.
#[derive(Debug, Clone)]
pub(super) struct ResnetBlock {
    conv1: Conv3d,
    conv2: Conv3d,
    shortcut: Option<Shortcut>,
    noise_scales: Option<(Tensor, Tensor)>,
    /// `(4, channels)`: shift and scale before the first convolution, then before the second.
    table: Option<Tensor>,
}

/// Layer norm and a convolution of one tap, where the width changes.
#[derive(Debug, Clone)]
struct Shortcut {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    conv: Conv3d,
}

impl ResnetBlock {
    pub(super) fn load(input: usize, output: usize, form: Form, vb: VarBuilder) -> Result<Self> {
        let conv = |input, kernel, vb: VarBuilder| {
            Conv3d::load(Conv3dConfig::cube(input, output, kernel, form.causal), vb.pp("conv"))
        };
        let shortcut = if input == output {
            None
        } else {
            Some(Shortcut {
                weight: vb.get(input, "norm3.weight")?,
                bias: vb.get(input, "norm3.bias")?,
                eps: form.eps,
                conv: conv(input, 1, vb.pp("conv_shortcut"))?,
            })
        };
        let scale = |name: &str| vb.get((input, 1, 1), name)?.flatten_all();
        Ok(Self {
            conv1: conv(input, 3, vb.pp("conv1"))?,
            conv2: conv(output, 3, vb.pp("conv2"))?,
            shortcut,
            noise_scales: if form.inject_noise {
                Some((scale("per_channel_scale1")?, scale("per_channel_scale2")?))
            } else {
                None
            },
            table: if form.timestep { Some(vb.get((4, input), "scale_shift_table")?) } else { None },
        })
    }

    /// `(batch, time, height, width, input)` to `(.., output)`; `time` is `(batch or 1, 4 channels)`.
    pub(super) fn forward(&self, x: &Tensor, time: Option<&Tensor>, draws: &mut Draws) -> Result<Tensor> {
        let parts = match (&self.table, time) {
            (Some(table), Some(time)) => Some(modulation(time, table)?),
            (Some(_), None) => candle_core::bail!("a timestep-conditioned block was given no timestep"),
            (None, _) => None,
        };
        let norm = |first: usize| {
            let norm = Norm::rms(RMS_EPS).silu();
            match &parts {
                Some(parts) => norm.modulate(&parts[first + 1], &parts[first]),
                None => norm,
            }
        };
        let shortcut = match &self.shortcut {
            Some(s) => s.conv.forward(&layer_norm(x, Some((&s.weight, &s.bias)), s.eps)?)?,
            None => x.clone(),
        };
        let h = norm(0).apply(x)?;
        let Some((scale1, scale2)) = &self.noise_scales else {
            let h = self.conv1.forward_with(&h, None, Some(&norm(2)))?;
            return self.conv2.forward_with(&h, Some(&shortcut), None);
        };
        let h = add_noise(self.conv1.forward(&h)?, scale1, draws)?;
        let h = norm(2).apply(&h)?;
        add_noise(self.conv2.forward_with(&h, Some(&shortcut), None)?, scale2, draws)
    }
}

/// A table's rows, each plus its part of the embedding: `rows` tensors of `(batch or 1, channels)`.
pub(super) fn modulation(time: &Tensor, table: &Tensor) -> Result<Vec<Tensor>> {
    let (rows, channels) = table.dims2()?;
    let batch = time.dim(0)?;
    let sum = time.reshape((batch, rows, channels))?.broadcast_add(&table.unsqueeze(0)?)?;
    (0..rows).map(|row| sum.narrow(1, row, 1)?.squeeze(1)?.contiguous()).collect()
}

/// Adds one draw, the same for every frame, times each channel's factor.
fn add_noise(x: Tensor, scale: &Tensor, draws: &mut Draws) -> Result<Tensor> {
    let (_, _, h, w, channels) = x.dims5()?;
    let Some(noise) = draws.next(h, w, x.device())? else { return Ok(x) };
    let noise = noise.to_dtype(x.dtype())?.reshape((1, 1, h, w, 1))?;
    let scale = scale.to_dtype(x.dtype())?.reshape((1, 1, 1, 1, channels))?;
    x.broadcast_add(&noise.broadcast_mul(&scale)?)
}

/// Residual blocks of one width, with their embedding of the noise level: a middle, or the end of an upward block.
#[derive(Debug, Clone)]
pub(super) struct Resnets {
    embedder: Option<PixArtTimestepEmbedding>,
    blocks: Vec<ResnetBlock>,
}

impl Resnets {
    pub(super) fn load(width: usize, layers: usize, form: Form, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            embedder: if form.timestep {
                Some(PixArtTimestepEmbedding::load(width * 4, vb.pp("time_embedder"))?)
            } else {
                None
            },
            blocks: (0..layers)
                .map(|i| ResnetBlock::load(width, width, form, vb.pp(format!("resnets.{i}"))))
                .collect::<Result<_>>()?,
        })
    }

    /// How many residual blocks.
    pub(super) fn count(&self) -> usize {
        self.blocks.len()
    }

    /// `timestep` is already multiplied for the sinusoid, `(batch or 1)`.
    pub(super) fn forward(&self, x: &Tensor, timestep: Option<&Tensor>, draws: &mut Draws) -> Result<Tensor> {
        let time = match (&self.embedder, timestep) {
            (Some(embedder), Some(timestep)) => Some(embedder.forward(timestep)?),
            _ => None,
        };
        let mut x = x.clone();
        for block in &self.blocks {
            x = block.forward(&x, time.as_ref(), draws)?;
        }
        Ok(x)
    }
}

//! Video to the distribution of its latents: Fourier features, residual blocks, causal attention of each position over
//! time.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::{HEAD, MochiVaeConfig, OCTAVES};
use super::resnet::{FrameNorm, ResnetBlock, causal};
use super::{Trace, show};
use crate::nn::attention::attention;
use crate::nn::conv3d::Conv3d;
use crate::nn::linear::Linear;

/// Least length that query and key are divided by.
const QK_EPSILON: f64 = 1e-5;

/// The encoder.
#[derive(Debug, Clone)]
pub(super) struct Encoder {
    proj_in: Linear,
    block_in: Layers,
    downs: Vec<Down>,
    block_out: Layers,
    norm_out: FrameNorm,
    proj_out: Linear,
}

/// A convolution that shrinks, then layers.
#[derive(Debug, Clone)]
struct Down {
    shrink: Conv3d,
    layers: Layers,
}

/// Residual blocks of one width, each with its attention where there is one.
#[derive(Debug, Clone)]
struct Layers(Vec<(ResnetBlock, Option<TimeAttention>)>);

impl Encoder {
    pub(super) fn load(config: &MochiVaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let (widths, layers) = (&config.encoder_block_out_channels, &config.layers_per_block);
        let attends = &config.add_attention_block;
        let last = layers.len() - 1;
        let (finest, coarsest) = (widths[0], widths[widths.len() - 1]);
        let downs = (1..widths.len())
            .map(|level| {
                let vb = vb.pp("down_blocks").pp(level - 1);
                let (time, space) =
                    (config.temporal_expansions[level - 1], config.spatial_expansions[level - 1]);
                let block = [time, space, space];
                let shrink = causal((widths[level - 1], widths[level]), block, block);
                Ok(Down {
                    shrink: Conv3d::load(shrink, vb.pp("conv_in.conv"))?,
                    layers: Layers::load(widths[level], layers[level], attends[level], &vb)?,
                })
            })
            .collect::<Result<_>>()?;
        let out = vb.pp("proj_out").get((2 * config.latent_channels, coarsest), "weight")?;
        Ok(Self {
            proj_in: Linear::load(config.in_channels, finest, true, vb.pp("proj_in"))?,
            block_in: Layers::load(finest, layers[0], attends[0], &vb.pp("block_in"))?,
            downs,
            block_out: Layers::load(coarsest, layers[last], attends[last], &vb.pp("block_out"))?,
            norm_out: FrameNorm::load(coarsest, &vb.pp("norm_out"))?,
            proj_out: Linear::new(out, None)?,
        })
    }

    /// `(batch, 3, frames, height, width)` to `(batch, 2 latent channels, time, height, width)`: means, then logarithms
    /// of variances.
    pub(super) fn forward(&self, video: &Tensor, trace: &mut Option<Trace<'_>>) -> Result<Tensor> {
        let features = fourier_features(&video.permute((0, 2, 3, 4, 1))?.contiguous()?)?;
        let mut x = self.proj_in.forward(&features)?;
        x = self.block_in.forward(&x)?;
        show(trace, "encoder.block_in.0", &x)?;
        for (i, down) in self.downs.iter().enumerate() {
            x = down.layers.forward(&down.shrink.forward(&x)?)?;
            show(trace, &format!("encoder.down_blocks.{i}.0"), &x)?;
        }
        x = self.block_out.forward(&x)?;
        show(trace, "encoder.block_out.0", &x)?;
        let x = self.proj_out.forward(&self.norm_out.forward(&x, true)?)?;
        x.permute((0, 4, 1, 2, 3))?.contiguous()
    }
}

/// Channels, then sines and cosines of each at every octave, `(.., c)` to `(.., c + 2 c octaves)`, in f32.
fn fourier_features(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let wide = x.to_dtype(DType::F32)?;
    let factors = OCTAVES.map(|octave| 2f32.powi(octave) * std::f32::consts::TAU);
    let factors = Tensor::new(&factors, &Device::Cpu)?.to_device(x.device())?;
    let angles = wide.unsqueeze(D::Minus1)?.broadcast_mul(&factors)?.flatten_from(x.rank() - 1)?;
    Tensor::cat(&[wide, angles.sin()?, angles.cos()?], D::Minus1)?.to_dtype(dtype)
}

impl Layers {
    fn load(width: usize, count: usize, attends: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        let layer = |i: usize| {
            let attention = if attends { Some(TimeAttention::load(width, i, vb)?) } else { None };
            Ok((ResnetBlock::load(width, &vb.pp("resnets").pp(i))?, attention))
        };
        Ok(Self((0..count).map(layer).collect::<Result<_>>()?))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (resnet, attention) in &self.0 {
            x = resnet.forward(&x, None)?;
            if let Some(attention) = attention {
                x = attention.forward(&x)?;
            }
        }
        Ok(x)
    }
}

/// Each position attends to itself at this time and before; query and key have length 1.
#[derive(Debug, Clone)]
struct TimeAttention {
    norm: FrameNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl TimeAttention {
    fn load(width: usize, index: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let own = vb.pp("attentions").pp(index);
        let linear = |name: &str, bias: bool| Linear::load(width, width, bias, own.pp(name));
        Ok(Self {
            norm: FrameNorm::load(width, &vb.pp("norms").pp(index))?,
            query: linear("to_q", false)?,
            key: linear("to_k", false)?,
            value: linear("to_v", false)?,
            out: linear("to_out.0", true)?,
        })
    }

    /// `(batch, time, height, width, channels)`, with what is attended to added.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, time, height, width, channels) = x.dims5()?;
        let normed = self.norm.forward(x, false)?.permute((0, 2, 3, 1, 4))?.contiguous()?;
        let columns = (batch * height * width, time, channels / HEAD, HEAD);
        let split = |layer: &Linear| layer.forward(&normed)?.reshape(columns);
        let (query, key) = (unit(&split(&self.query)?)?, unit(&split(&self.key)?)?);
        let scale = 1.0 / (HEAD as f64).sqrt();
        let later = later(time, x.device())?;
        let mixed = attention(&query, &key, &split(&self.value)?, Some(&later), scale)?;
        let mixed = self.out.forward(&mixed.reshape((batch, height, width, time, channels))?)?;
        x + mixed.permute((0, 3, 1, 2, 4))?.contiguous()?
    }
}

/// Divides by the length over the last dimension.
fn unit(x: &Tensor) -> Result<Tensor> {
    let length = x.to_dtype(DType::F32)?.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    let length = length.maximum(QK_EPSILON)?.to_dtype(x.dtype())?;
    x.broadcast_div(&length)
}

/// `(1, 1, time, time)`: minus infinity where a key is later than the query.
fn later(time: usize, device: &Device) -> Result<Tensor> {
    let value = |i: usize| if i % time > i / time { f32::NEG_INFINITY } else { 0.0 };
    let values: Vec<f32> = (0..time * time).map(value).collect();
    Tensor::from_vec(values, (1, 1, time, time), device)
}

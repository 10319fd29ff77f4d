//! What the encoder and the decoder of Pyramid Flow's VAE are made of: causal convolutions that may remember, norms of
//! each frame alone, residual blocks and the attention in the middle.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::nn::attention::attention;
use crate::nn::conv3d::{Conv3d, Conv3dConfig, Edge, TimePad};
use crate::nn::frame_cache::FrameCache;
use crate::nn::group_norm::GroupNorm;
use crate::nn::linear::Linear;

const EPSILON: f64 = 1e-6;
const KERNEL: usize = 3;

/// A cube of three taps that looks back in time, zeros beyond every edge.
pub(super) fn cube(input: usize, output: usize, stride: [usize; 3]) -> Conv3dConfig {
    Conv3dConfig {
        input,
        output,
        kernel: [KERNEL; 3],
        stride,
        time: TimePad::Causal(Edge::Zeros),
        space: Edge::Zeros,
    }
}

/// A single tap.
pub(super) fn point(input: usize, output: usize) -> Conv3dConfig {
    Conv3dConfig { kernel: [1; 3], ..cube(input, output, [1; 3]) }
}

/// The clip at once, or run by run with what the convolutions remember.
pub(super) enum Pass<'a> {
    Whole,
    Runs(&'a mut FrameCache),
}

impl Pass<'_> {
    pub(super) fn conv(&mut self, conv: &Conv3d, x: &Tensor) -> Result<Tensor> {
        self.conv_add(conv, x, None)
    }

    /// The convolution, then `+ residual`.
    fn conv_add(&mut self, conv: &Conv3d, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Whole => conv.forward_with(x, residual, None),
            Self::Runs(cache) => cache.conv_with(conv, x, residual, None),
        }
    }
}

/// Group norm over each frame alone, so that a frame depends on no other but through convolutions.
#[derive(Debug, Clone)]
pub(super) struct FrameNorm(GroupNorm);

impl FrameNorm {
    pub(super) fn load(groups: usize, channels: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self(GroupNorm::load(groups, channels, EPSILON, vb)?))
    }

    pub(super) fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, h, w, c) = x.dims5()?;
        self.0.forward_silu(&x.reshape((b * t, h * w, c))?)?.reshape(x.shape())
    }
}

/// Norm, SiLU, convolution, twice, beside a shortcut.
#[derive(Debug, Clone)]
pub(super) struct Resnet {
    norms: [FrameNorm; 2],
    convs: [Conv3d; 2],
    shortcut: Option<Conv3d>,
}

impl Resnet {
    pub(super) fn load(input: usize, output: usize, groups: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let conv = |name: &str, config| Conv3d::load(config, vb.pp(name).pp("conv"));
        Ok(Self {
            norms: [
                FrameNorm::load(groups, input, vb.pp("norm1"))?,
                FrameNorm::load(groups, output, vb.pp("norm2"))?,
            ],
            convs: [
                conv("conv1", cube(input, output, [1; 3]))?,
                conv("conv2", cube(output, output, [1; 3]))?,
            ],
            shortcut: match input == output {
                true => None,
                false => Some(conv("conv_shortcut", point(input, output))?),
            },
        })
    }

    pub(super) fn forward(&self, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let inner = pass.conv(&self.convs[0], &self.norms[0].forward_silu(x)?)?;
        let inner = self.norms[1].forward_silu(&inner)?;
        match &self.shortcut {
            Some(shortcut) => pass.conv_add(&self.convs[1], &inner, Some(&shortcut.forward(x)?)),
            None => pass.conv_add(&self.convs[1], &inner, Some(x)),
        }
    }
}

/// Some residual blocks, the first of which changes the channels.
pub(super) fn resnets(
    count: usize,
    input: usize,
    output: usize,
    groups: usize,
    vb: &VarBuilder<'_>,
) -> Result<Vec<Resnet>> {
    let each = |index| {
        let input = if index == 0 { input } else { output };
        Resnet::load(input, output, groups, &vb.pp("resnets").pp(index))
    };
    (0..count).map(each).collect()
}

/// Residual, attention, residual.
#[derive(Debug, Clone)]
pub(super) struct Middle {
    resnets: Vec<Resnet>,
    attention: FrameAttention,
}

impl Middle {
    pub(super) fn load(channels: usize, groups: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            resnets: resnets(2, channels, channels, groups, vb)?,
            attention: FrameAttention::load(channels, groups, &vb.pp("attentions").pp(0))?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let x = self.resnets[0].forward(x, pass)?;
        self.resnets[1].forward(&self.attention.forward(&x)?, pass)
    }
}

/// Attention of one head within each frame.
#[derive(Debug, Clone)]
struct FrameAttention {
    norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl FrameAttention {
    fn load(channels: usize, groups: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let linear = |vb: VarBuilder<'_>| Linear::load(channels, channels, true, vb);
        Ok(Self {
            norm: GroupNorm::load(groups, channels, EPSILON, vb.pp("group_norm"))?,
            query: linear(vb.pp("to_q"))?,
            key: linear(vb.pp("to_k"))?,
            value: linear(vb.pp("to_v"))?,
            out: linear(vb.pp("to_out").pp(0))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, h, w, c) = x.dims5()?;
        let tokens = x.reshape((b * t, h * w, c))?;
        let normed = self.norm.forward(&tokens)?;
        let head = |x: Tensor| x.unsqueeze(2);
        let query = head(self.query.forward(&normed)?)?;
        let (key, value) = (head(self.key.forward(&normed)?)?, head(self.value.forward(&normed)?)?);
        let mixed = attention(&query, &key, &value, None, 1.0 / (c as f64).sqrt())?.squeeze(2)?;
        self.out.forward_add(&mixed, &tokens)?.reshape((b, t, h, w, c))
    }
}

//! The residual block of encoder and decoder: norm of each frame alone, SiLU, causal convolution, twice.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::config::GROUPS;
use crate::nn::conv3d::{Conv3d, Conv3dConfig, Edge, TimePad};
use crate::nn::frame_cache::FrameCache;
use crate::nn::group_norm::GroupNorm;

const NORM_EPSILON: f64 = 1e-5;

/// A group norm over each frame alone.
#[derive(Debug, Clone)]
pub(super) struct FrameNorm(GroupNorm);

impl FrameNorm {
    pub(super) fn load(channels: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self(GroupNorm::load(GROUPS, channels, NORM_EPSILON, vb.pp("norm_layer"))?))
    }

    /// `(batch, time, height, width, channels)`, then SiLU where asked for.
    pub(super) fn forward(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        let (batch, time, height, width, channels) = x.dims5()?;
        let frames = x.reshape((batch * time, height, width, channels))?;
        let normed = if silu { self.0.forward_silu(&frames)? } else { self.0.forward(&frames)? };
        normed.reshape((batch, time, height, width, channels))
    }
}

/// Channels, taps and steps of a convolution that pads as all of them do: the first frame repeated before it, edges
/// repeated in space.
pub(super) fn causal(channels: (usize, usize), kernel: [usize; 3], stride: [usize; 3]) -> Conv3dConfig {
    let (input, output) = channels;
    Conv3dConfig { input, output, kernel, stride, time: TimePad::Causal(Edge::Repeat), space: Edge::Repeat }
}

/// A convolution of a whole clip, or of a run of frames after those in a cache.
fn convolve(
    conv: &Conv3d,
    x: &Tensor,
    residual: Option<&Tensor>,
    cache: Option<&mut FrameCache>,
) -> Result<Tensor> {
    match cache {
        Some(cache) => cache.conv_with(conv, x, residual, None),
        None => conv.forward_with(x, residual, None),
    }
}

/// A residual block.
#[derive(Debug, Clone)]
pub(super) struct ResnetBlock {
    norm1: FrameNorm,
    conv1: Conv3d,
    norm2: FrameNorm,
    conv2: Conv3d,
}

impl ResnetBlock {
    pub(super) fn load(width: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let conv = |name: &str| Conv3d::load(causal((width, width), [3; 3], [1; 3]), vb.pp(name).pp("conv"));
        Ok(Self {
            norm1: FrameNorm::load(width, &vb.pp("norm1"))?,
            conv1: conv("conv1")?,
            norm2: FrameNorm::load(width, &vb.pp("norm2"))?,
            conv2: conv("conv2")?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, mut cache: Option<&mut FrameCache>) -> Result<Tensor> {
        let inner = self.norm1.forward(x, true)?;
        let inner = convolve(&self.conv1, &inner, None, cache.as_deref_mut())?;
        let inner = self.norm2.forward(&inner, true)?;
        convolve(&self.conv2, &inner, Some(x), cache)
    }
}

/// Residual blocks of one width.
#[derive(Debug, Clone)]
pub(super) struct Resnets(Vec<ResnetBlock>);

impl Resnets {
    /// From `resnets.0` on.
    pub(super) fn load(width: usize, layers: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let resnets = vb.pp("resnets");
        Ok(Self((0..layers).map(|i| ResnetBlock::load(width, &resnets.pp(i))).collect::<Result<_>>()?))
    }

    pub(super) fn forward(&self, x: &Tensor, mut cache: Option<&mut FrameCache>) -> Result<Tensor> {
        let mut x = x.clone();
        for block in &self.0 {
            x = block.forward(&x, cache.as_deref_mut())?;
        }
        Ok(x)
    }
}

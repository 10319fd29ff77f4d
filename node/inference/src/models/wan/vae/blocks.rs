//! What encoder and decoder are built of: residual blocks, the middle with its attention, resampling.
//!
//! Time is causal throughout: a convolution sees two frames back, zeros before the first. The clip's first frame stands
//! for itself, so where time is halved or doubled it passes by. Everything goes run by run with a [`FrameCache`].

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::nn::attention::attention;
use crate::nn::conv3d::{Conv3d, Conv3dConfig, Edge, TimePad};
use crate::nn::frame_cache::FrameCache;
use crate::nn::linear::Linear;
use crate::nn::norm::Norm;
use crate::nn::shuffle::{depth_to_space, repeat};

/// A causal convolution of `kernel` taps in time, height and width, zeros beyond every edge.
pub(super) fn causal(input: usize, output: usize, kernel: [usize; 3]) -> Conv3dConfig {
    Conv3dConfig {
        input,
        output,
        kernel,
        stride: [1; 3],
        time: TimePad::Causal(Edge::Zeros),
        space: Edge::Zeros,
    }
}

/// Three taps along every axis.
pub(super) const CUBE: [usize; 3] = [3; 3];

/// A norm over channels: a vector of length `sqrt(channels)`, times `gamma`.
#[derive(Debug, Clone)]
pub(super) struct Gamma {
    gamma: Tensor,
    epsilon: f64,
}

impl Gamma {
    /// Loads `gamma` for `(channels, 1, ..)` with so many ones.
    pub(super) fn load(channels: usize, ones: usize, vb: VarBuilder) -> Result<Self> {
        let mut shape = vec![1; ones + 1];
        shape[0] = channels;
        // The reference divides by the length or 1e-12, whichever is more.
        const LEAST: f64 = 1e-12;
        Ok(Self { gamma: vb.get(shape, "gamma")?.flatten_all()?, epsilon: LEAST * LEAST / channels as f64 })
    }

    pub(super) fn norm(&self) -> Norm<'_> {
        Norm::rms(self.epsilon).weight(Some(&self.gamma))
    }
}

/// Norm, SiLU, convolution, twice, with a shortcut.
#[derive(Debug, Clone)]
pub(super) struct Residual {
    norm1: Gamma,
    conv1: Conv3d,
    norm2: Gamma,
    conv2: Conv3d,
    shortcut: Option<Conv3d>,
}

impl Residual {
    pub(super) fn load(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        let shortcut = if input == output {
            None
        } else {
            Some(Conv3d::load(causal(input, output, [1; 3]), vb.pp("conv_shortcut"))?)
        };
        Ok(Self {
            norm1: Gamma::load(input, 3, vb.pp("norm1"))?,
            conv1: Conv3d::load(causal(input, output, CUBE), vb.pp("conv1"))?,
            norm2: Gamma::load(output, 3, vb.pp("norm2"))?,
            conv2: Conv3d::load(causal(output, output, CUBE), vb.pp("conv2"))?,
            shortcut,
        })
    }

    /// `(batch, time, height, width, input)` to `(.., output)`.
    pub(super) fn forward(&self, x: &Tensor, cache: &mut FrameCache) -> Result<Tensor> {
        let normed = self.norm1.norm().silu().apply(x)?;
        let inner = cache.conv_with(&self.conv1, &normed, None, Some(&self.norm2.norm().silu()))?;
        drop(normed);
        let shortcut = match &self.shortcut {
            Some(conv) => &conv.forward(x)?,
            None => x,
        };
        cache.conv_with(&self.conv2, &inner, Some(shortcut), None)
    }
}

/// Residual, attention within each frame, residual.
#[derive(Debug, Clone)]
pub(super) struct Middle {
    first: Residual,
    attention: Attention,
    last: Residual,
}

impl Middle {
    pub(super) fn load(width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            first: Residual::load(width, width, vb.pp("resnets.0"))?,
            attention: Attention::load(width, vb.pp("attentions.0"))?,
            last: Residual::load(width, width, vb.pp("resnets.1"))?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, cache: &mut FrameCache) -> Result<Tensor> {
        let x = self.first.forward(x, cache)?;
        self.last.forward(&self.attention.forward(&x)?, cache)
    }
}

/// Attention of one head over a frame's positions.
#[derive(Debug, Clone)]
struct Attention {
    norm: Gamma,
    parts: [Linear; 3],
    out: Linear,
}

impl Attention {
    fn load(width: usize, vb: VarBuilder) -> Result<Self> {
        let (qkv, proj) = (vb.pp("to_qkv"), vb.pp("proj"));
        let weight = qkv.get((3 * width, width, 1, 1), "weight")?.reshape((3 * width, width))?;
        let bias = qkv.get(3 * width, "bias")?;
        let part = |index: usize| {
            let rows = |tensor: &Tensor| tensor.narrow(0, index * width, width)?.contiguous();
            Linear::new(rows(&weight)?, Some(rows(&bias)?))
        };
        let out = proj.get((width, width, 1, 1), "weight")?.reshape((width, width))?;
        Ok(Self {
            norm: Gamma::load(width, 2, vb.pp("norm"))?,
            parts: [part(0)?, part(1)?, part(2)?],
            out: Linear::new(out, Some(proj.get(width, "bias")?))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, h, w, width) = x.dims5()?;
        let tokens = x.reshape((b * t, h * w, width))?;
        let normed = self.norm.norm().apply(&tokens)?;
        let part = |linear: &Linear| linear.forward(&normed)?.reshape((b * t, h * w, 1, width));
        let (query, key, value) = (part(&self.parts[0])?, part(&self.parts[1])?, part(&self.parts[2])?);
        let mixed = attention(&query, &key, &value, None, 1.0 / (width as f64).sqrt())?;
        self.out.forward_add(&mixed.reshape((b * t, h * w, width))?, &tokens)?.reshape((b, t, h, w, width))
    }
}

/// Halves height and width, and time where it has a convolution for it.
#[derive(Debug, Clone)]
pub(super) struct Shrink {
    space: Conv3d,
    time: Option<Conv3d>,
}

impl Shrink {
    pub(super) fn load(width: usize, halves_time: bool, vb: VarBuilder) -> Result<Self> {
        let time = causal(width, width, [3, 1, 1]).stride([2, 1, 1]);
        Ok(Self {
            space: plane(width, width, [1, 2, 2], vb.pp("resample.1"))?,
            time: if halves_time { Some(Conv3d::load(time, vb.pp("time_conv"))?) } else { None },
        })
    }

    /// The first run is one frame or more of them, `2k + 1`; later ones are `2k`.
    pub(super) fn forward(&self, x: &Tensor, cache: &mut FrameCache) -> Result<Tensor> {
        let x = self.space.forward_padded_after(x)?;
        let Some(conv) = &self.time else { return Ok(x) };
        let frames = x.dim(1)?;
        let last = x.narrow(1, frames - 1, 1)?.force_contiguous()?;
        match cache.place().replace(last) {
            Some(before) => conv.forward_unpadded(&Tensor::cat(&[&before, &x], 1)?, None, None),
            None if frames == 1 => Ok(x),
            None => Tensor::cat(&[x.narrow(1, 0, 1)?, conv.forward_unpadded(&x, None, None)?], 1),
        }
    }
}

/// Doubles height and width, and before that time where it has a convolution for it.
#[derive(Debug, Clone)]
pub(super) struct Grow {
    space: Conv3d,
    time: Option<Conv3d>,
}

impl Grow {
    pub(super) fn load(input: usize, output: usize, doubles_time: bool, vb: VarBuilder) -> Result<Self> {
        let time = causal(input, 2 * input, [3, 1, 1]);
        Ok(Self {
            space: plane(input, output, [1; 3], vb.pp("resample.1"))?,
            time: if doubles_time { Some(Conv3d::load(time, vb.pp("time_conv"))?) } else { None },
        })
    }

    /// Frames that a frame after the first becomes.
    pub(super) fn time_scale(&self) -> usize {
        if self.time.is_some() { 2 } else { 1 }
    }

    /// Adds the shortcut, where there is one, to the result.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        shortcut: Option<&Tensor>,
        cache: &mut FrameCache,
    ) -> Result<Tensor> {
        let x = match &self.time {
            Some(conv) => &grow_time(conv, x, cache)?,
            None => x,
        };
        self.space.forward_with(&repeat(x, [1, 2, 2], false)?, shortcut, None)
    }
}

/// Two frames of each, but for the clip's first, which the convolution does not see either.
fn grow_time(conv: &Conv3d, x: &Tensor, cache: &mut FrameCache) -> Result<Tensor> {
    let double = |x: &Tensor, cache: &mut FrameCache| depth_to_space(&cache.conv(conv, x)?, [2, 1, 1], 0);
    let is_first = cache.place().replace(Tensor::zeros((), x.dtype(), x.device())?).is_none();
    let frames = x.dim(1)?;
    if !is_first {
        return double(x, cache);
    }
    if frames == 1 {
        // The convolution's place stays empty: it begins with the next run.
        cache.place();
        return Ok(x.clone());
    }
    let rest = x.narrow(1, 1, frames - 1)?.contiguous()?;
    Tensor::cat(&[&x.narrow(1, 0, 1)?, &double(&rest, cache)?], 1)
}

/// A convolution within frames, whose file has no time axis.
fn plane(input: usize, output: usize, stride: [usize; 3], vb: VarBuilder) -> Result<Conv3d> {
    let config = causal(input, output, [1, 3, 3]).stride(stride);
    let weight = vb.get((output, input, 3, 3), "weight")?.unsqueeze(2)?;
    Conv3d::new(config, weight, Some(vb.get(output, "bias")?))
}

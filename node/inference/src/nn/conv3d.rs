//! Convolution over time, height and width on channels-last activations, `(batch, time, height, width, channels)`.
//!
//! Video VAEs differ in how they pad: in time before the first frame only (causal) or on both sides, by repeating the
//! edge frame or by zeros; in space by zeros or by repeating the edge. All of that is [`Conv3dConfig`]; the rest is one
//! type. On the CPU it reads its input through a table of offsets and needs no column buffer; elsewhere it is one
//! matrix product for each tap of time and height, over rows whose width taps are laid side by side.

mod direct;
mod taps;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::cpu::{View, generic_only, note_repacked, shapes_only};
use super::norm::Norm;
use super::pack::{Packed, packed_len};

/// What lies beyond an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// Zeros.
    Zeros,
    /// The nearest frame, row or column.
    Repeat,
}

/// How time is padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimePad {
    /// `kernel - 1` frames before the first: a frame depends on no later one.
    Causal(Edge),
    /// `(kernel - 1) / 2` frames on both sides.
    Both(Edge),
    /// None: the caller has put frames before, for instance from a cache.
    Valid,
}

impl TimePad {
    /// Causal or on both sides, repeating the edge frame.
    #[must_use]
    pub fn repeating(causal: bool) -> Self {
        if causal { Self::Causal(Edge::Repeat) } else { Self::Both(Edge::Repeat) }
    }

    /// Frames before, frames after, and what they are.
    fn amounts(self, kernel: usize) -> (usize, usize, Edge) {
        match self {
            Self::Causal(edge) => (kernel - 1, 0, edge),
            Self::Both(edge) => ((kernel - 1) / 2, (kernel - 1) / 2, edge),
            Self::Valid => (0, 0, Edge::Zeros),
        }
    }
}

/// A convolution's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv3dConfig {
    /// Channels in.
    pub input: usize,
    /// Channels out.
    pub output: usize,
    /// Taps in time, height, width.
    pub kernel: [usize; 3],
    /// Steps in time, height, width.
    pub stride: [usize; 3],
    /// Padding in time.
    pub time: TimePad,
    /// Padding in space, `(kernel - 1) / 2` on each side.
    pub space: Edge,
}

impl Conv3dConfig {
    /// A cube of `kernel` taps, stride 1, padding as [`TimePad::repeating`], zeros in space.
    #[must_use]
    pub fn cube(input: usize, output: usize, kernel: usize, causal: bool) -> Self {
        Self {
            input,
            output,
            kernel: [kernel; 3],
            stride: [1; 3],
            time: TimePad::repeating(causal),
            space: Edge::Zeros,
        }
    }

    /// The same with another stride.
    #[must_use]
    pub fn stride(mut self, stride: [usize; 3]) -> Self {
        self.stride = stride;
        self
    }

    /// Before, after, edge for each axis.
    fn padding(&self) -> Padding {
        let side = |kernel: usize| ((kernel - 1) / 2, (kernel - 1) / 2, self.space);
        [self.time.amounts(self.kernel[0]), side(self.kernel[1]), side(self.kernel[2])]
    }

    /// The size of the result along each axis.
    ///
    /// # Errors
    /// When the padded input is smaller than the kernel.
    pub fn output_size(&self, size: [usize; 3]) -> Result<[usize; 3]> {
        self.padded_size(&self.padding(), size)
    }

    fn padded_size(&self, padding: &Padding, size: [usize; 3]) -> Result<[usize; 3]> {
        let mut out = [0; 3];
        for axis in 0..3 {
            let padded = size[axis] + padding[axis].0 + padding[axis].1;
            if size[axis] == 0 || padded < self.kernel[axis] {
                candle_core::bail!(
                    "a convolution of kernel {:?} was given an input of {size:?}",
                    self.kernel
                );
            }
            out[axis] = (padded - self.kernel[axis]) / self.stride[axis] + 1;
        }
        Ok(out)
    }
}

/// Before, after, and what lies there, for time, height and width.
type Padding = [(usize, usize, Edge); 3];

/// A convolution with its weights.
///
/// On the CPU weights that want no gradient are packed as f32 and inputs of other types are widened for the call; load
/// under [`super::set_generic_only`] to differentiate there.
#[derive(Debug, Clone)]
pub struct Conv3d {
    config: Conv3dConfig,
    inner: Inner,
}

#[derive(Debug, Clone)]
enum Inner {
    Packed {
        weight: Arc<Packed>,
        bias: Option<Arc<Vec<f32>>>,
    },
    /// `(time taps * height taps, width taps * input, output)` and the bias.
    Taps {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Conv3d {
    /// Loads `weight` `(output, input, time, height, width)` and `bias` `(output)`.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(config: Conv3dConfig, vb: VarBuilder) -> Result<Self> {
        let (weight, bias) = Self::tensors(&config, vb)?;
        Self::new(config, weight, Some(bias))
    }

    /// [`Conv3d::load`] with the output channels in another order: channel `i` of the result is the file's `order[i]`.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape, or `order` names a channel that is not there.
    pub fn load_ordered(config: Conv3dConfig, order: &[u32], vb: VarBuilder) -> Result<Self> {
        let (weight, bias) = Self::tensors(&config, vb)?;
        Self::new_ordered(config, order, weight, bias)
    }

    /// [`Conv3d::new`] with the output channels in another order, as [`Conv3d::load_ordered`].
    ///
    /// # Errors
    /// When shapes do not fit, or `order` names a channel that is not there.
    pub fn new_ordered(config: Conv3dConfig, order: &[u32], weight: Tensor, bias: Tensor) -> Result<Self> {
        if shapes_only() {
            return Self::new(config, weight, Some(bias));
        }
        let order = Tensor::new(order, weight.device())?;
        Self::new(config, weight.index_select(&order, 0)?, Some(bias.index_select(&order, 0)?))
    }

    fn tensors(config: &Conv3dConfig, vb: VarBuilder) -> Result<(Tensor, Tensor)> {
        let [t, h, w] = config.kernel;
        Ok((vb.get((config.output, config.input, t, h, w), "weight")?, vb.get(config.output, "bias")?))
    }

    /// From tensors: `weight` `(output, input, time, height, width)`, `bias` `(output)`.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn new(config: Conv3dConfig, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let [t, h, w] = config.kernel;
        if weight.dims() != [config.output, config.input, t, h, w] {
            candle_core::bail!("a convolution {config:?} was given weights of shape {:?}", weight.shape());
        }
        if bias.as_ref().is_some_and(|b| b.dims() != [config.output]) {
            candle_core::bail!("a convolution {config:?} was given a bias of another shape");
        }
        if shapes_only() {
            note_repacked(&weight, packed_len(t * h * w, config.input, config.output));
            return Ok(Self { config, inner: Inner::Taps { weight, bias } });
        }
        let tracked = weight.track_op() || bias.as_ref().is_some_and(Tensor::track_op);
        if !weight.device().is_cpu() || tracked || generic_only() {
            return Ok(Self {
                config,
                inner: Inner::Taps { weight: taps::weights(&config, &weight)?, bias },
            });
        }
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        let view = View::new(&weight)?;
        let values = view.slice()?;
        let (input, count) = (config.input, t * h * w);
        let packed =
            Packed::new(count, input, config.output, |o, tap, i| values[(o * input + i) * count + tap]);
        let bias = match bias {
            Some(bias) => Some(Arc::new(bias.to_dtype(DType::F32)?.to_vec1::<f32>()?)),
            None => None,
        };
        Ok(Self { config, inner: Inner::Packed { weight: Arc::new(packed), bias } })
    }

    /// Its form.
    #[must_use]
    pub fn config(&self) -> &Conv3dConfig {
        &self.config
    }

    /// `(batch, time, height, width, input)` to `(batch, time', height', width', output)`.
    ///
    /// # Errors
    /// When shapes do not fit, the device fails, or a gradient is asked for through packed weights.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, None, None)
    }

    /// [`Conv3d::forward`], then `+ residual`, then the norm with all that follows it.
    ///
    /// # Errors
    /// As [`Conv3d::forward`].
    pub fn forward_with(&self, x: &Tensor, residual: Option<&Tensor>, norm: Option<&Norm>) -> Result<Tensor> {
        self.run(self.config.padding(), x, residual, norm)
    }

    /// [`Conv3d::forward_with`] without padding in time: the caller has put frames before, for instance from a cache.
    ///
    /// # Errors
    /// As [`Conv3d::forward`].
    pub fn forward_unpadded(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        norm: Option<&Norm>,
    ) -> Result<Tensor> {
        let [_, rows, columns] = self.config.padding();
        self.run([(0, 0, Edge::Zeros), rows, columns], x, residual, norm)
    }

    /// [`Conv3d::forward`] with `kernel / 2` zeros after the last row and column and none before the first, as encoders
    /// pad that halve a picture.
    ///
    /// # Errors
    /// As [`Conv3d::forward`].
    pub fn forward_padded_after(&self, x: &Tensor) -> Result<Tensor> {
        let [time, (rows, ..), (columns, ..)] = self.config.padding();
        self.run([time, (0, rows, Edge::Zeros), (0, columns, Edge::Zeros)], x, None, None)
    }

    fn run(
        &self,
        padding: Padding,
        x: &Tensor,
        residual: Option<&Tensor>,
        norm: Option<&Norm>,
    ) -> Result<Tensor> {
        let (_, t, h, w, channels) = x.dims5()?;
        let config = &self.config;
        if channels != config.input {
            candle_core::bail!("a convolution of {} channels was given {:?}", config.input, x.shape());
        }
        let size = config.padded_size(&padding, [t, h, w])?;
        match &self.inner {
            Inner::Packed { weight, bias } => {
                let tracked = x.track_op() || residual.is_some_and(Tensor::track_op);
                if tracked {
                    candle_core::bail!("packed weights have no gradient: load under set_generic_only(true)");
                }
                let bias = bias.as_ref().map(|b| b.as_slice());
                direct::forward((config, &padding), weight, bias, x, size, residual, norm)
            }
            Inner::Taps { weight, bias } => {
                let mut y = taps::forward(config, &padding, weight, x, size)?;
                if let Some(bias) = bias {
                    y = y.broadcast_add(bias)?;
                }
                if let Some(residual) = residual {
                    y = (y + residual)?;
                }
                match norm {
                    Some(norm) => norm.apply(&y),
                    None => Ok(y),
                }
            }
        }
    }
}

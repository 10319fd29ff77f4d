//! The convolution on the CPU: a packed product whose rows are read where they lie.

use candle_core::{DType, Result, Tensor};

use super::{Conv3dConfig, Edge, Padding};
use crate::nn::cpu::View;
use crate::nn::norm::Norm;
use crate::nn::pack::{Epilogue, Packed, TILE, ZERO, product};

/// `(batch, time, height, width, input)` to the result of `size`, with bias, residual and norm.
pub(super) fn forward(
    (config, padding): (&Conv3dConfig, &Padding),
    weight: &Packed,
    bias: Option<&[f32]>,
    x: &Tensor,
    size: [usize; 3],
    residual: Option<&Tensor>,
    norm: Option<&Norm>,
) -> Result<Tensor> {
    let (batch, t, h, w, channels) = x.dims5()?;
    let shape = (batch, size[0], size[1], size[2], config.output);
    let source = x.to_dtype(DType::F32)?.contiguous()?;
    let residual = match residual {
        Some(r) if r.dims5()? != shape => {
            candle_core::bail!("a residual of shape {:?} was added to a result of shape {shape:?}", r.shape())
        }
        Some(r) => Some(r.to_dtype(DType::F32)?.contiguous()?),
        None => None,
    };
    let residual = residual.as_ref().map(View::new).transpose()?;
    let view = View::new(&source)?;
    let tables = Tables::new(config, padding, [t, h, w], size, channels);
    let pixels = size.iter().product::<usize>();
    let held = match norm {
        Some(norm) => Some(norm.hold(batch, config.output)?),
        None => None,
    };
    let epilogue = Epilogue {
        bias,
        residual: residual.as_ref().map(View::slice).transpose()?,
        norm: match &held {
            Some(held) => Some(held.steps(batch * pixels)?),
            None => None,
        },
        ..Epilogue::default()
    };
    let frame = t * h * w * channels;
    let out = product(
        weight,
        view.slice()?,
        batch * pixels,
        |row, slots| tables.fill(row / pixels * frame, row % pixels, slots),
        &epilogue,
    );
    Tensor::from_vec(out, shape, x.device())?.to_dtype(x.dtype())
}

/// For each axis, output position and tap: the offset that it adds, or [`ZERO`].
struct Tables {
    axes: [Vec<usize>; 3],
    kernel: [usize; 3],
    height: usize,
    width: usize,
}

impl Tables {
    fn new(
        config: &Conv3dConfig,
        padding: &Padding,
        size: [usize; 3],
        out: [usize; 3],
        channels: usize,
    ) -> Self {
        let strides = [size[1] * size[2] * channels, size[2] * channels, channels];
        let axes = std::array::from_fn(|axis| {
            let (before, _, edge) = padding[axis];
            let mut table = Vec::with_capacity(out[axis] * config.kernel[axis]);
            for position in 0..out[axis] {
                for tap in 0..config.kernel[axis] {
                    let at = position * config.stride[axis] + tap;
                    let inside = (before..before + size[axis]).contains(&at);
                    table.push(match (inside, edge) {
                        (true, _) => (at - before) * strides[axis],
                        (false, Edge::Zeros) => ZERO,
                        (false, Edge::Repeat) => {
                            at.saturating_sub(before).min(size[axis] - 1) * strides[axis]
                        }
                    });
                }
            }
            table
        });
        Self { axes, kernel: config.kernel, height: out[1], width: out[2] }
    }

    /// Writes the offsets of one output pixel; several [`ZERO`]s add up to no less than one.
    fn fill(&self, start: usize, pixel: usize, slots: &mut [usize]) {
        let [taps_t, taps_h, taps_w] = self.kernel;
        let (rest, column) = (pixel / self.width, pixel % self.width);
        let (frame, row) = (rest / self.height, rest % self.height);
        let columns = &self.axes[2][column * taps_w..(column + 1) * taps_w];
        let mut slot = 0;
        for time in &self.axes[0][frame * taps_t..(frame + 1) * taps_t] {
            for line in &self.axes[1][row * taps_h..(row + 1) * taps_h] {
                for across in columns {
                    slots[slot] = start + time + line + across;
                    slot += TILE;
                }
            }
        }
    }
}

//! The convolution as shifted matrix products, for every device, with gradients.

use candle_core::{Result, Tensor};

use super::{Conv3dConfig, Edge, Padding};

/// `(output, input, time, height, width)` to `(time * height, width * input, output)`.
pub(super) fn weights(config: &Conv3dConfig, weight: &Tensor) -> Result<Tensor> {
    let [t, h, w] = config.kernel;
    weight.permute((2, 3, 4, 1, 0))?.contiguous()?.reshape((t * h, w * config.input, config.output))
}

/// `(batch, time, height, width, input)` to the result of `size` without a bias.
pub(super) fn forward(
    config: &Conv3dConfig,
    padding: &Padding,
    weight: &Tensor,
    x: &Tensor,
    size: [usize; 3],
) -> Result<Tensor> {
    let padded = pad(padding, x)?;
    let out = match config.stride {
        [1, 1, 1] => {
            let entries = (0..x.dim(0)?).map(|entry| dense(config, weight, &padded.get(entry)?, size));
            Tensor::stack(&entries.collect::<Result<Vec<_>>>()?, 0)?
        }
        _ => strided(config, weight, &padded, size)?,
    };
    out.reshape((x.dim(0)?, size[0], size[1], size[2], config.output))
}

fn pad(padding: &Padding, x: &Tensor) -> Result<Tensor> {
    let mut padded = x.clone();
    for (axis, (before, after, edge)) in padding.iter().copied().enumerate() {
        if before + after > 0 {
            padded = match edge {
                Edge::Zeros => padded.pad_with_zeros(axis + 1, before, after)?,
                Edge::Repeat => padded.pad_with_same(axis + 1, before, after)?,
            };
        }
    }
    Ok(padded)
}

/// One padded entry `(time, height, width, input)` at stride 1: its width taps are laid side by side once, and the rows
/// that a tap of time and height reads are a part of that, which a product of frames takes as it lies.
fn dense(config: &Conv3dConfig, weight: &Tensor, padded: &Tensor, size: [usize; 3]) -> Result<Tensor> {
    let [taps_t, taps_h, taps_w] = config.kernel;
    let [frames, rows, columns] = size;
    let depth = taps_w * config.input;
    let (time, height, ..) = padded.dims4()?;
    let lines = if taps_w == 1 {
        padded.contiguous()?
    } else {
        let taps = (0..taps_w).map(|tap| padded.narrow(2, tap, columns)?.contiguous());
        Tensor::cat(&taps.collect::<Result<Vec<_>>>()?, 3)?
    };
    if taps_t * taps_h == 1 {
        return lines.reshape((frames * rows * columns, depth))?.matmul(&weight.get(0)?);
    }
    let lines = lines.reshape((time, height * columns, depth))?;
    sum((0..taps_t * taps_h).map(|tap| {
        let (tap_t, tap_h) = (tap / taps_h, tap % taps_h);
        let read = lines.narrow(0, tap_t, frames)?.narrow(1, tap_h * columns, rows * columns)?;
        read.matmul(&weight.get(tap)?.broadcast_as((frames, depth, config.output))?)
    }))
}

/// All padded entries at any stride: the rows that a tap reads are picked out for it.
fn strided(config: &Conv3dConfig, weight: &Tensor, padded: &Tensor, size: [usize; 3]) -> Result<Tensor> {
    let [taps_t, taps_h, taps_w] = config.kernel;
    let batch = padded.dim(0)?;
    sum((0..taps_t * taps_h).map(|tap| {
        let frames = pick(padded, 1, tap / taps_h, size[0], config.stride[0])?;
        let rows = pick(&frames, 2, tap % taps_h, size[1], config.stride[1])?;
        let columns = (0..taps_w).map(|tap_w| pick(&rows, 3, tap_w, size[2], config.stride[2]));
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let columns = if taps_w == 1 { columns[0].contiguous()? } else { Tensor::cat(&columns, 4)? };
        let columns = columns.reshape((batch * size.iter().product::<usize>(), taps_w * config.input))?;
        columns.matmul(&weight.get(tap)?)
    }))
}

fn sum(parts: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for part in parts {
        let part = part?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    sum.ok_or_else(|| candle_core::Error::Msg("a convolution has no taps".to_owned()))
}

/// `count` positions from `start` on, `stride` apart.
fn pick(x: &Tensor, axis: usize, start: usize, count: usize, stride: usize) -> Result<Tensor> {
    if stride == 1 {
        return x.narrow(axis, start, count);
    }
    let index: Vec<u32> = (0..count).map(|i| (start + i * stride) as u32).collect();
    x.contiguous()?.index_select(&Tensor::from_vec(index, count, x.device())?, axis)
}

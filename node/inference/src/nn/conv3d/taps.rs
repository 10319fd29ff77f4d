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
    let batch = x.dim(0)?;
    let mut padded = x.clone();
    for (axis, (before, after, edge)) in padding.iter().copied().enumerate() {
        if before + after > 0 {
            padded = match edge {
                Edge::Zeros => padded.pad_with_zeros(axis + 1, before, after)?,
                Edge::Repeat => padded.pad_with_same(axis + 1, before, after)?,
            };
        }
    }
    let [taps_t, taps_h, taps_w] = config.kernel;
    let mut sum: Option<Tensor> = None;
    for tap_t in 0..taps_t {
        let frames = pick(&padded, 1, tap_t, size[0], config.stride[0])?;
        for tap_h in 0..taps_h {
            let rows = pick(&frames, 2, tap_h, size[1], config.stride[1])?;
            let columns = (0..taps_w)
                .map(|tap_w| pick(&rows, 3, tap_w, size[2], config.stride[2]))
                .collect::<Result<Vec<_>>>()?;
            let columns = if taps_w == 1 { columns[0].contiguous()? } else { Tensor::cat(&columns, 4)? };
            let columns = columns.reshape((batch * size.iter().product::<usize>(), taps_w * config.input))?;
            let part = columns.matmul(&weight.get(tap_t * taps_h + tap_h)?)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
    }
    let Some(sum) = sum else {
        candle_core::bail!("a convolution of kernel {:?} has no taps", config.kernel)
    };
    sum.reshape((batch, size[0], size[1], size[2], config.output))
}

/// `count` positions from `start` on, `stride` apart.
fn pick(x: &Tensor, axis: usize, start: usize, count: usize, stride: usize) -> Result<Tensor> {
    if stride == 1 {
        return x.narrow(axis, start, count);
    }
    let index: Vec<u32> = (0..count).map(|i| (start + i * stride) as u32).collect();
    x.contiguous()?.index_select(&Tensor::from_vec(index, count, x.device())?, axis)
}

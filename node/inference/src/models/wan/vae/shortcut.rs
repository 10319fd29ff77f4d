//! The shortcuts around a level's resampling in Wan 2.2's smaller autoencoder: no weights, only means and copies.

use candle_core::{Device, Result, Tensor};

use crate::nn::frame_cache::FrameCache;
use crate::nn::shuffle::{depth_to_space, space_to_depth};

/// A block of time, height and width: what a level halves or doubles.
pub(super) fn block(time: bool, space: bool) -> [usize; 3] {
    let factor = |on: bool| if on { 2 } else { 1 };
    [factor(time), factor(space), factor(space)]
}

/// Blocks of positions into channels, and groups of those averaged (diffusers' `AvgDown3D`).
#[derive(Debug, Clone)]
pub(super) struct Fold {
    block: [usize; 3],
    output: usize,
}

impl Fold {
    /// From `input` channels to `output`.
    pub(super) fn new(input: usize, output: usize, block: [usize; 3]) -> Result<Self> {
        let cells: usize = block.iter().product();
        if !(input * cells).is_multiple_of(output) {
            candle_core::bail!("{input} channels cannot be folded by {block:?} into {output}");
        }
        Ok(Self { block, output })
    }

    /// `(batch, time, height, width, input)`; time that is no whole number of blocks has zeros before it.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let over = x.dim(1)? % self.block[0];
        let missing = (self.block[0] - over) % self.block[0];
        let padded = if missing > 0 { &x.pad_with_zeros(1, missing, 0)? } else { x };
        let folded = space_to_depth(padded, self.block)?;
        let (b, t, h, w, channels) = folded.dims5()?;
        folded.reshape(vec![b, t, h, w, self.output, channels / self.output])?.mean(5)
    }
}

/// Channels repeated and moved into blocks of positions (diffusers' `DupUp3D`).
#[derive(Debug, Clone)]
pub(super) struct Spread {
    block: [usize; 3],
    /// Which input channel each output channel at each of the block's positions copies, positions first.
    order: Tensor,
}

impl Spread {
    /// From `input` channels to `output`.
    pub(super) fn new(input: usize, output: usize, block: [usize; 3], device: &Device) -> Result<Self> {
        let cells: usize = block.iter().product();
        if !(output * cells).is_multiple_of(input) {
            candle_core::bail!("{input} channels cannot be spread by {block:?} over {output}");
        }
        let repeats = output * cells / input;
        let order: Vec<u32> = (0..cells)
            .flat_map(|cell| (0..output).map(move |channel| ((channel * cells + cell) / repeats) as u32))
            .collect();
        Ok(Self { block, order: Tensor::new(order, device)? })
    }

    /// `(batch, time, height, width, input)`; the clip's first frame stays one frame.
    pub(super) fn forward(&self, x: &Tensor, cache: &mut FrameCache) -> Result<Tensor> {
        let mark = Tensor::zeros((), x.dtype(), x.device())?;
        let is_first = cache.place().replace(mark).is_none();
        let copies = x.contiguous()?.index_select(&self.order, 4)?;
        depth_to_space(&copies, self.block, if is_first { self.block[0] - 1 } else { 0 })
    }
}

//! Decoding in tiles and runs of frames, so that memory has a bound, with the very values of the whole decode.
//!
//! The first, small part of a decoder runs over the whole clip; what follows, where positions multiply and the memory
//! goes, runs tile by tile. A convolution sees a few positions around its own, and everything else in these decoders
//! looks at one position alone; so a tile that is cut with a margin as wide as all of its convolutions see together
//! has in its core exactly the values that the whole would have. The margins are thrown away: there is no seam, and
//! the price is that margins are computed more than once.
//!
//! A decoder that norms over whole pictures has no such tiles: [`blend`] fades overlapping ones into each other.
//!
//! Peak memory is the finished video, the activations of the part that runs whole, and one tile with its margins.

pub mod blend;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::nn::cpu::View;

/// How to cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tiling {
    /// Side of a tile's core, pixels; `None` leaves pictures whole.
    pub tile: Option<usize>,
    /// Frames in a run's core; `None` leaves the clip whole.
    pub chunk: Option<usize>,
}

impl Tiling {
    /// Whether everything stays whole.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.tile.is_none() && self.chunk.is_none()
    }
}

/// What a position of an activation becomes: frames and pixels along a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ratio {
    /// Frames of every position but the first, which becomes one frame.
    pub time: usize,
    /// Pixels.
    pub space: usize,
}

/// Positions around a tile's core that its values depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Margin {
    /// Frames of the activation.
    pub time: usize,
    /// Rows and columns of the activation.
    pub space: usize,
}

/// Where an activation is cut.
#[derive(Debug, Clone)]
pub struct Plan {
    axes: [Vec<Segment>; 3],
    ratio: Ratio,
    size: [usize; 3],
}

/// A tile's place with its margins, in positions of the activation: time, height, width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where it begins.
    pub start: [usize; 3],
    /// How long it is.
    pub len: [usize; 3],
    /// How long the whole is.
    pub whole: [usize; 3],
}

/// A piece of one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    core: (usize, usize),
    outer: (usize, usize),
}

impl Segment {
    fn len(&self) -> usize {
        self.outer.1 - self.outer.0
    }
}

impl Plan {
    /// A plan for an activation of `size` frames, rows and columns.
    #[must_use]
    pub fn new(tiling: Tiling, ratio: Ratio, margin: Margin, size: [usize; 3]) -> Self {
        let side = tiling.tile.map(|pixels| (pixels / ratio.space).max(1));
        let run = tiling.chunk.map(|frames| (frames / ratio.time).max(1));
        let axes = [
            cut(size[0], run, margin.time),
            cut(size[1], side, margin.space),
            cut(size[2], side, margin.space),
        ];
        Self { axes, ratio, size }
    }

    /// How many tiles there are.
    #[must_use]
    pub fn tiles(&self) -> usize {
        self.axes.iter().map(Vec::len).product()
    }

    /// The greatest tile with its margins: frames, rows and columns.
    #[must_use]
    pub fn greatest(&self) -> [usize; 3] {
        [0, 1, 2].map(|axis| self.axes[axis].iter().map(Segment::len).max().unwrap_or(0))
    }

    /// How many times as many positions are computed as there are.
    #[must_use]
    pub fn overhead(&self) -> f64 {
        let computed = |axis: &Vec<Segment>| axis.iter().map(Segment::len).sum::<usize>() as f64;
        self.axes.iter().zip(self.size).map(|(axis, size)| computed(axis) / size.max(1) as f64).product()
    }

    /// Runs `decode` on every tile of `x`, `(batch, time, height, width, channels)`, and joins the cores of the
    /// results, `(batch, channels, frames, height, width)`.
    ///
    /// # Errors
    /// What `decode` or the device reports.
    pub fn decode(
        &self,
        x: &Tensor,
        mut decode: impl FnMut(&Tensor, Place) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut canvas: Option<Canvas> = None;
        for t in &self.axes[0] {
            for h in &self.axes[1] {
                for w in &self.axes[2] {
                    let segments = [*t, *h, *w];
                    let place = Place {
                        start: segments.map(|s| s.outer.0),
                        len: segments.map(|s| s.len()),
                        whole: self.size,
                    };
                    let mut tile = x.clone();
                    for (axis, segment) in segments.iter().enumerate() {
                        tile = tile.narrow(axis + 1, segment.outer.0, segment.len())?;
                    }
                    let out = decode(&tile.contiguous()?, place)?;
                    match &mut canvas {
                        Some(canvas) => canvas.put(&out, segments)?,
                        None => canvas.insert(Canvas::new(&out, self)?).put(&out, segments)?,
                    }
                }
            }
        }
        match canvas {
            Some(canvas) => canvas.finish(x),
            None => candle_core::bail!("an activation of size {:?} has no tiles", self.size),
        }
    }
}

/// Cores of `len` positions side by side, each with a margin where there is room.
fn cut(size: usize, len: Option<usize>, margin: usize) -> Vec<Segment> {
    let len = len.unwrap_or(size).max(1);
    (0..size)
        .step_by(len)
        .map(|start| {
            let end = (start + len).min(size);
            Segment { core: (start, end), outer: (start.saturating_sub(margin), (end + margin).min(size)) }
        })
        .collect()
}

/// The video as it comes together, f32 in the machine's memory.
struct Canvas {
    data: Vec<f32>,
    planes: [usize; 2],
    size: [usize; 3],
    ratio: Ratio,
    dtype: DType,
}

impl Canvas {
    fn new(tile: &Tensor, plan: &Plan) -> Result<Self> {
        let (batch, channels, ..) = tile.dims5()?;
        let ratio = plan.ratio;
        let size =
            [(plan.size[0] - 1) * ratio.time + 1, plan.size[1] * ratio.space, plan.size[2] * ratio.space];
        let data = vec![0f32; batch * channels * size.iter().product::<usize>()];
        Ok(Self { data, planes: [batch, channels], size, ratio, dtype: tile.dtype() })
    }

    /// Copies a tile's core. Position `g > 0` in time becomes frames `(g - 1) time + 1` to `g time`.
    fn put(&mut self, tile: &Tensor, [t, h, w]: [Segment; 3]) -> Result<()> {
        let (_, _, frames, rows, columns) = tile.dims5()?;
        let ratio = self.ratio;
        let needed = [(t.len() - 1) * ratio.time + 1, h.len() * ratio.space, w.len() * ratio.space];
        if [frames, rows, columns] != needed {
            candle_core::bail!("a tile decoded to {:?}, planned was {needed:?}", tile.shape());
        }
        let tile = tile.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        let view = View::new(&tile)?;
        let source = view.slice()?;
        let [whole_frames, height, width] = self.size;
        let first = |position: usize| if position == 0 { 0 } else { (position - 1) * ratio.time + 1 };
        let range = first(t.core.0)..first(t.core.1);
        let offset = t.outer.0 * ratio.time;
        let across = (w.core.0 * ratio.space)..(w.core.1 * ratio.space);
        let left = across.start - w.outer.0 * ratio.space;
        self.data.par_chunks_mut(height * width).enumerate().for_each(|(index, plane)| {
            let (frame, volume) = (index % whole_frames, index / whole_frames);
            if !range.contains(&frame) {
                return;
            }
            let local = volume * frames + (frame - offset);
            for y in h.core.0 * ratio.space..h.core.1 * ratio.space {
                let row = (local * rows + (y - h.outer.0 * ratio.space)) * columns + left;
                plane[y * width..][across.clone()].copy_from_slice(&source[row..row + across.len()]);
            }
        });
        Ok(())
    }

    fn finish(self, like: &Tensor) -> Result<Tensor> {
        let ([batch, channels], [frames, height, width]) = (self.planes, self.size);
        Tensor::from_vec(self.data, (batch, channels, frames, height, width), &Device::Cpu)?
            .to_device(like.device())?
            .to_dtype(self.dtype)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// Every position becomes `ratio` frames and pixels that hold its own value.
    fn grow(x: &Tensor, ratio: Ratio) -> Tensor {
        let (b, t, h, w, c) = x.dims5().unwrap();
        let x = x.permute((0, 4, 1, 2, 3)).unwrap().contiguous().unwrap();
        let r = ratio.space;
        let x = x.reshape(vec![b, c, t, 1, h, 1, w, 1]).unwrap();
        let x = x.broadcast_as(vec![b, c, t, ratio.time, h, r, w, r]).unwrap().contiguous().unwrap();
        let x = x.reshape((b, c, t * ratio.time, h * r, w * r)).unwrap();
        x.narrow(2, ratio.time - 1, (t - 1) * ratio.time + 1).unwrap().contiguous().unwrap()
    }

    proptest! {
        #[test]
        fn tiles_of_a_local_decoder_join_to_the_whole(
            (t, h, w) in (1usize..6, 1usize..6, 1usize..6),
            (tile, chunk) in (prop::option::of(1usize..12), prop::option::of(1usize..12)),
            (time, space, margin) in (1usize..3, 1usize..4, 0usize..3),
        ) {
            let ratio = Ratio { time, space };
            // A tile's first frame stands for a whole position only where a margin lies before it.
            let margin = Margin { time: margin + 1, space: margin };
            let x = Tensor::randn(0f32, 1.0, (2, t, h, w, 3), &Device::Cpu).unwrap();
            let plan = Plan::new(Tiling { tile, chunk }, ratio, margin, [t, h, w]);
            let joined = plan.decode(&x, |tile, _| Ok(grow(tile, ratio))).unwrap();
            let whole = grow(&x, ratio);
            prop_assert_eq!(joined.dims(), whole.dims());
            let difference = (joined - whole).unwrap().abs().unwrap().sum_all().unwrap();
            prop_assert_eq!(difference.to_scalar::<f32>().unwrap(), 0.0);
            prop_assert!(plan.overhead() >= 1.0);
        }
    }
}

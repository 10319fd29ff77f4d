//! Decoding in tiles and runs of frames, so that memory has a bound.
//!
//! Latents are cut along time, height and width into overlapping tiles, each is decoded alone, and the results are
//! added up with weights that come to one everywhere. A tile knows nothing beyond its edges, so there its pixels
//! differ most from the whole decode: of an overlap the outer quarters are thrown away on either side and the weight
//! goes linearly from one tile to the next over the half between. Peak memory is the finished video plus one tile.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::nn::cpu::View;

/// How to cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tiling {
    /// Side of a tile, pixels; `None` leaves pictures whole.
    pub tile: Option<usize>,
    /// Frames in a run; `None` leaves the clip whole.
    pub chunk: Option<usize>,
}

/// Pixels along a side of a latent cell, and frames in a latent frame after the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ratio {
    /// Pixels.
    pub space: usize,
    /// Frames.
    pub time: usize,
}

/// Where latents are cut.
#[derive(Debug, Clone)]
pub struct Plan {
    axes: [Vec<Segment>; 3],
    ratio: Ratio,
    /// Latent frames, rows, columns.
    size: [usize; 3],
}

/// A tile's place, latent frames, rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where it begins.
    pub start: [usize; 3],
    /// How long it is.
    pub len: [usize; 3],
    /// How long the whole is.
    pub whole: [usize; 3],
}

/// A piece of one axis, in latent cells, with its overlaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    start: usize,
    len: usize,
    /// Cells shared with the segment before and after; none at an edge.
    before: usize,
    after: usize,
}

/// The fewest cells in a tile and in the overlap of two.
const LEAST_CELLS: usize = 4;
const LEAST_OVERLAP: usize = 2;

impl Plan {
    /// A plan for latents of `size` frames, rows and columns; `None` where the whole fits in one tile.
    #[must_use]
    pub fn new(tiling: Tiling, ratio: Ratio, size: [usize; 3]) -> Option<Self> {
        let side = tiling.tile.map(|pixels| (pixels / ratio.space).max(LEAST_CELLS));
        let run = tiling.chunk.map(|frames| (frames.saturating_sub(1) / ratio.time + 1).max(LEAST_CELLS));
        let axes = [cut(size[0], run), cut(size[1], side), cut(size[2], side)];
        axes.iter().any(|axis| axis.len() > 1).then_some(Self { axes, ratio, size })
    }

    /// How many tiles there are.
    #[must_use]
    pub fn tiles(&self) -> usize {
        self.axes.iter().map(Vec::len).product()
    }

    /// Decodes `z`, `(batch, channels, time, height, width)`, tile by tile with `decode`, which turns `n` latent
    /// frames into `(n - 1) time + 1` frames, and joins the results.
    ///
    /// # Errors
    /// What `decode` or the device reports.
    pub fn decode(&self, z: &Tensor, mut decode: impl FnMut(&Tensor, Place) -> Result<Tensor>) -> Result<Tensor> {
        let frames = (self.size[0] - 1) * self.ratio.time + 1;
        let shape = [frames, self.size[1] * self.ratio.space, self.size[2] * self.ratio.space];
        let mut canvas: Option<Canvas> = None;
        for t in &self.axes[0] {
            for y in &self.axes[1] {
                for x in &self.axes[2] {
                    let place = Place { start: [t.start, y.start, x.start], len: [t.len, y.len, x.len], whole: self.size };
                    let tile = z.narrow(2, t.start, t.len)?.narrow(3, y.start, y.len)?.narrow(4, x.start, x.len)?;
                    let out = decode(&tile.contiguous()?, place)?;
                    let weights = [
                        t.frame_weights(self.ratio.time),
                        y.pixel_weights(self.ratio.space),
                        x.pixel_weights(self.ratio.space),
                    ];
                    let at = [t.start * self.ratio.time, y.start * self.ratio.space, x.start * self.ratio.space];
                    match &mut canvas {
                        Some(canvas) => canvas.add(&out, at, &weights)?,
                        None => canvas.insert(Canvas::new(&out, shape)?).add(&out, at, &weights)?,
                    }
                }
            }
        }
        match canvas {
            Some(canvas) => canvas.finish(z),
            None => candle_core::bail!("a plan without tiles"),
        }
    }
}

/// Segments of at most `most` cells that overlap by a quarter, at least [`LEAST_OVERLAP`]; the last is moved back to
/// keep its size.
fn cut(size: usize, most: Option<usize>) -> Vec<Segment> {
    let Some(len) = most.filter(|&most| most < size) else {
        return vec![Segment { start: 0, len: size, before: 0, after: 0 }];
    };
    let overlap = (len / 4).max(LEAST_OVERLAP);
    let step = len - overlap;
    let count = (size - overlap).div_ceil(step);
    let mut segments: Vec<Segment> =
        (0..count).map(|i| Segment { start: i * step, len, before: overlap, after: overlap }).collect();
    for segment in &mut segments {
        segment.len = segment.len.min(size - segment.start);
    }
    let last = count - 1;
    segments[0].before = 0;
    segments[last].after = 0;
    segments
}

/// The weight of the later of two segments at `at` of `span` positions of their overlap.
fn rise(at: f32, span: f32) -> f32 {
    (2.0 * at / span - 0.5).clamp(0.0, 1.0)
}

impl Segment {
    fn pixel_weights(&self, ratio: usize) -> Vec<f32> {
        let (len, before, after) = (self.len * ratio, self.before * ratio, self.after * ratio);
        (0..len)
            .map(|i| {
                let mut weight = 1.0;
                if i < before {
                    weight = rise(i as f32 + 0.5, before as f32);
                }
                if i >= len - after {
                    weight = 1.0 - rise((i - (len - after)) as f32 + 0.5, after as f32);
                }
                weight
            })
            .collect()
    }

    /// A latent frame after a run's first makes `ratio` frames, the first makes one: overlaps of `n` latent frames
    /// share `(n - 1) ratio + 1` frames.
    fn frame_weights(&self, ratio: usize) -> Vec<f32> {
        let frames = |latents: usize| if latents == 0 { 0 } else { (latents - 1) * ratio + 1 };
        let (len, before, after) = (frames(self.len), frames(self.before), frames(self.after));
        (0..len)
            .map(|i| {
                let mut weight = 1.0;
                if i < before {
                    weight = rise(i as f32 + 0.5, before as f32);
                }
                if i >= len - after {
                    weight = 1.0 - rise((i - (len - after)) as f32 + 0.5, after as f32);
                }
                weight
            })
            .collect()
    }
}

/// The video as it comes together, f32 in the machine's memory.
struct Canvas {
    data: Vec<f32>,
    planes: [usize; 2],
    size: [usize; 3],
}

impl Canvas {
    fn new(tile: &Tensor, size: [usize; 3]) -> Result<Self> {
        let (batch, channels, ..) = tile.dims5()?;
        let data = vec![0f32; batch * channels * size.iter().product::<usize>()];
        Ok(Self { data, planes: [batch, channels], size })
    }

    fn add(&mut self, tile: &Tensor, at: [usize; 3], weights: &[Vec<f32>; 3]) -> Result<()> {
        let (_, _, t, h, w) = tile.dims5()?;
        if [t, h, w] != [weights[0].len(), weights[1].len(), weights[2].len()] {
            candle_core::bail!("a tile decoded to {:?}, not to the size planned", tile.shape());
        }
        let tile = tile.to_device(&candle_core::Device::Cpu)?.to_dtype(candle_core::DType::F32)?.contiguous()?;
        let view = View::new(&tile)?;
        let source = view.slice()?;
        let [frames, height, width] = self.size;
        let columns: Range<usize> = at[2]..at[2] + w;
        self.data.par_chunks_mut(height * width).enumerate().for_each(|(index, plane)| {
            let (frame, volume) = (index % frames, index / frames);
            let Some(local) = frame.checked_sub(at[0]).filter(|&f| f < t) else { return };
            for y in 0..h {
                let weight = weights[0][local] * weights[1][y];
                if weight == 0.0 {
                    continue;
                }
                let row = &source[((volume * t + local) * h + y) * w..][..w];
                let out = &mut plane[(at[1] + y) * width..][columns.clone()];
                for ((o, x), across) in out.iter_mut().zip(row).zip(&weights[2]) {
                    *o += x * (weight * across);
                }
            }
        });
        Ok(())
    }

    fn finish(self, like: &Tensor) -> Result<Tensor> {
        let [batch, channels] = self.planes;
        let [frames, height, width] = self.size;
        Tensor::from_vec(self.data, (batch, channels, frames, height, width), &candle_core::Device::Cpu)?
            .to_device(like.device())?
            .to_dtype(like.dtype())
    }
}

//! Decoding in overlapping tiles whose seams are blended, for decoders that look at a whole picture at once.
//!
//! A decoder that norms over a whole picture has no tiles with the values of the whole: each tile is normed by itself. So
//! tiles overlap by a quarter and are faded into each other, which hides the difference and does not remove it: the result
//! is close to the whole decode, not equal to it. Tiles are of one size and lie at even distances.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::nn::cpu::View;

/// Parts of a tile's side of which one overlaps at least.
const OVERLAP: usize = 4;

/// Where pictures are cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlendPlan {
    /// First cell of each tile, for rows and columns.
    starts: [Vec<usize>; 2],
    /// Cells of a tile.
    tile: [usize; 2],
    size: [usize; 2],
    ratio: usize,
}

impl BlendPlan {
    /// A plan for pictures of `size` rows and columns of latent cells, with tiles of about `pixels` along a side; a cell
    /// becomes `ratio` pixels along a side.
    #[must_use]
    pub fn new(pixels: usize, ratio: usize, size: [usize; 2]) -> Self {
        let side = (pixels / ratio.max(1)).max(1);
        let tile = size.map(|cells| side.min(cells));
        let starts = [0, 1].map(|axis| starts(size[axis], tile[axis]));
        Self { starts, tile, size, ratio }
    }

    /// How many tiles there are.
    #[must_use]
    pub fn tiles(&self) -> usize {
        self.starts.iter().map(Vec::len).product()
    }

    /// Rows and columns of cells of every tile.
    #[must_use]
    pub fn tile(&self) -> [usize; 2] {
        self.tile
    }

    /// Runs `decode` on every tile of `z`, `(batch, channels, time, rows, columns)`, and fades the results,
    /// `(batch, channels, frames, height, width)`, into each other; on the machine's memory, f32.
    ///
    /// # Errors
    /// What `decode` or the device reports.
    pub fn decode(&self, z: &Tensor, mut decode: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let mut canvas: Option<Canvas> = None;
        for (i, &top) in self.starts[0].iter().enumerate() {
            for (j, &left) in self.starts[1].iter().enumerate() {
                let part = z.narrow(3, top, self.tile[0])?.narrow(4, left, self.tile[1])?.contiguous()?;
                let out = decode(&part)?;
                let canvas = match &mut canvas {
                    Some(canvas) => canvas,
                    None => canvas.insert(Canvas::new(&out, self)?),
                };
                canvas.add(&out, [self.weights(0, i), self.weights(1, j)], [top, left])?;
            }
        }
        match canvas {
            Some(canvas) => Tensor::from_vec(canvas.data, canvas.shape, &Device::Cpu),
            None => candle_core::bail!("pictures of {:?} cells have no tiles", self.size),
        }
    }

    /// How much each pixel of a tile counts along an axis: all tiles at a pixel count 1 together.
    fn weights(&self, axis: usize, index: usize) -> Vec<f32> {
        let (starts, tile) = (&self.starts[axis], self.tile[axis] * self.ratio);
        let fade = (tile / OVERLAP).max(1);
        let height = |start: usize, pixel: usize| {
            let inside = (start..start + tile).contains(&pixel);
            let edge = if inside { (pixel - start + 1).min(start + tile - pixel) } else { 0 };
            edge.min(fade) as f32
        };
        let own = starts[index] * self.ratio;
        (own..own + tile)
            .map(|pixel| {
                let all: f32 = starts.iter().map(|&start| height(start * self.ratio, pixel)).sum();
                height(own, pixel) / all
            })
            .collect()
    }
}

/// Even distances from 0 to the last place, so that neighbours overlap by a quarter of a tile or more.
fn starts(size: usize, tile: usize) -> Vec<usize> {
    let room = size - tile;
    let stride = (tile - tile / OVERLAP).max(1);
    let last = room.div_ceil(stride);
    (0..=last).map(|i| (i * room).checked_div(last).unwrap_or(0)).collect()
}

/// The video as it comes together.
struct Canvas {
    data: Vec<f32>,
    shape: (usize, usize, usize, usize, usize),
    ratio: usize,
}

impl Canvas {
    fn new(tile: &Tensor, plan: &BlendPlan) -> Result<Self> {
        let (batch, channels, frames, ..) = tile.dims5()?;
        let (height, width) = (plan.size[0] * plan.ratio, plan.size[1] * plan.ratio);
        let data = vec![0f32; batch * channels * frames * height * width];
        Ok(Self { data, shape: (batch, channels, frames, height, width), ratio: plan.ratio })
    }

    fn add(&mut self, tile: &Tensor, weights: [Vec<f32>; 2], start: [usize; 2]) -> Result<()> {
        let (batch, channels, frames, height, width) = self.shape;
        let [down, across] = &weights;
        if tile.dims() != [batch, channels, frames, down.len(), across.len()] {
            let planned = [down.len(), across.len()];
            candle_core::bail!("a tile decoded to {:?}, planned was {planned:?}", tile.shape());
        }
        let tile = tile.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        let view = View::new(&tile)?;
        let source = view.slice()?;
        let (top, left) = (start[0] * self.ratio, start[1] * self.ratio);
        self.data.par_chunks_mut(height * width).zip(source.par_chunks(down.len() * across.len())).for_each(
            |(plane, tile)| {
                for (y, row) in tile.chunks_exact(across.len()).enumerate() {
                    let out = &mut plane[(top + y) * width + left..][..across.len()];
                    for ((o, x), w) in out.iter_mut().zip(row).zip(across) {
                        *o += x * (w * down[y]);
                    }
                }
            },
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tiles_of_a_local_decoder_fade_to_the_whole(
            (rows, columns) in (1usize..12, 1usize..12),
            (pixels, ratio) in (1usize..24, 1usize..4),
        ) {
            let z = Tensor::randn(0f32, 1.0, (1, 2, 3, rows, columns), &Device::Cpu).unwrap();
            let grow = |z: &Tensor| {
                let (b, c, t, h, w) = z.dims5()?;
                let z = z.reshape(vec![b, c, t, h, 1, w, 1])?;
                z.broadcast_as(vec![b, c, t, h, ratio, w, ratio])?.contiguous()?
                    .reshape((b, c, t, h * ratio, w * ratio))
            };
            let plan = BlendPlan::new(pixels, ratio, [rows, columns]);
            let faded = plan.decode(&z, grow).unwrap();
            let whole = grow(&z).unwrap();
            prop_assert_eq!(faded.dims(), whole.dims());
            let difference = (faded - whole).unwrap().abs().unwrap().flatten_all().unwrap();
            prop_assert!(difference.max(0).unwrap().to_scalar::<f32>().unwrap() < 1e-5);
        }
    }

    #[test]
    fn neighbours_overlap_and_the_last_tile_ends_at_the_edge() {
        for (size, tile) in [(60, 32), (106, 32), (32, 32), (33, 32), (5, 1), (7, 3)] {
            let starts = starts(size, tile);
            assert_eq!((starts[0], starts[starts.len() - 1]), (0, size - tile));
            assert!(starts.windows(2).all(|pair| pair[1] - pair[0] <= (tile - tile / OVERLAP).max(1)));
        }
    }
}

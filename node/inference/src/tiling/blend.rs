//! Decoding in overlapping tiles whose seams are blended, for decoders that look at a whole picture at once.
//!
//! A decoder that norms over a whole picture has no tiles with the values of the whole: each tile is normed by itself. So
//! tiles overlap by a quarter and are faded into each other, which hides the difference and does not remove it: the result
//! is close to the whole decode, not equal to it. Tiles are of one size and lie at even distances.

use candle_core::{Result, Tensor};

use super::canvas::Canvas;
use crate::sink::Sink;

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

    /// Runs `decode` on every tile of `z`, `(batch, channels, time, rows, columns)`, fades the results,
    /// `(batch, channels, frames, height, width)`, into each other, and hands frames on as the last tile finishes them. A
    /// tile may be decoded in runs of frames.
    ///
    /// # Errors
    /// What `decode`, `sink` or the device reports.
    pub fn decode(
        &self,
        z: &Tensor,
        sink: &mut dyn Sink,
        mut decode: impl FnMut(&Tensor, &mut dyn Sink) -> Result<()>,
    ) -> Result<()> {
        let mut canvas = Canvas::new(self.size.map(|cells| cells * self.ratio));
        let mut frames = None;
        for (i, &top) in self.starts[0].iter().enumerate() {
            for (j, &left) in self.starts[1].iter().enumerate() {
                let part = z.narrow(3, top, self.tile[0])?.narrow(4, left, self.tile[1])?.contiguous()?;
                sink.go_on()?;
                let mut tile = Tile {
                    start: [top, left].map(|cells| cells * self.ratio),
                    width: self.size[1] * self.ratio,
                    weights: [self.weights(0, i), self.weights(1, j)],
                    canvas: &mut canvas,
                    done: 0,
                    is_last: i + 1 == self.starts[0].len() && j + 1 == self.starts[1].len(),
                    sink: &mut *sink,
                };
                decode(&part, &mut tile)?;
                let (done, first) = (tile.done, *frames.get_or_insert(tile.done));
                if done != first {
                    candle_core::bail!("a tile decoded to {done} frames, the first one to {first}");
                }
            }
        }
        Ok(())
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

/// Takes a tile's frames, and adds them to those of the tiles before.
struct Tile<'a> {
    /// Its first row and column, pixels.
    start: [usize; 2],
    /// Pixels in a row of the whole picture.
    width: usize,
    weights: [Vec<f32>; 2],
    canvas: &'a mut Canvas,
    /// Frames that have come.
    done: usize,
    /// Whether frames are finished with this tile.
    is_last: bool,
    sink: &'a mut dyn Sink,
}

impl Sink for Tile<'_> {
    fn go_on(&mut self) -> Result<()> {
        self.sink.go_on()
    }

    fn put(&mut self, tile: Tensor) -> Result<()> {
        let (batch, channels, frames, height, width) = tile.dims5()?;
        let [down, across] = &self.weights;
        if [height, width] != [down.len(), across.len()] {
            let planned = [down.len(), across.len()];
            candle_core::bail!("a tile decoded to {:?}, planned was {planned:?}", tile.shape());
        }
        let ([top, left], whole) = (self.start, self.width);
        self.canvas.reach([batch, channels], self.done + frames);
        self.canvas.paint(self.done, (&tile, 0), |plane, tile| {
            for (y, row) in tile.chunks_exact(width).enumerate() {
                let out = &mut plane[(top + y) * whole + left..][..width];
                for ((o, x), w) in out.iter_mut().zip(row).zip(across) {
                    *o += x * (w * down[y]);
                }
            }
        })?;
        drop(tile);
        self.done += frames;
        if !self.is_last {
            return Ok(());
        }
        self.canvas.hand_on(self.done, self.sink)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::sink::whole;

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
            // Frame by frame, as a decoder that goes in runs gives them.
            let by_frames = |tile: &Tensor, sink: &mut dyn Sink| {
                (0..tile.dim(2)?).try_for_each(|frame| sink.put(grow(&tile.narrow(2, frame, 1)?)?))
            };
            let faded = whole(|sink| plan.decode(&z, sink, by_frames)).unwrap();
            let plain = grow(&z).unwrap();
            prop_assert_eq!(faded.dims(), plain.dims());
            let difference = (faded - plain).unwrap().abs().unwrap().flatten_all().unwrap();
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

//! A decode in overlapping squares whose overlaps are blended, as the reference does it.
//!
//! A square is `cells` latent cells along a side; neighbours overlap by a sixth of it in height and a fifth in width.
//! Over an overlap the weights go linearly from the square above (left) to the one below (right).

use std::ops::Range;

use candle_core::{Result, Tensor};

use crate::sink::{Sink, whole};

/// Cells along the side of the least square that overlaps its neighbours and still gets on.
pub(super) const LEAST: usize = 2;
/// The part of a square's height that it shares with the one above.
const OVERLAP_HEIGHT: f64 = 1.0 / 6.0;
/// The part of a square's width that it shares with the one on its left.
const OVERLAP_WIDTH: f64 = 1.0 / 5.0;

/// Latents `(batch, channels, time, height, width)` to a video, square by square; a cell is `ratio` pixels along a side.
/// `decode` hands on a square's frames in order, and those of the last square finish the video's.
pub(super) fn decode(
    z: &Tensor,
    cells: usize,
    ratio: usize,
    sink: &mut dyn Sink,
    mut decode: impl FnMut(&Tensor, &mut dyn Sink) -> Result<()>,
) -> Result<()> {
    let (_, _, _, height, width) = z.dims5()?;
    let step = |overlap: f64| ((cells as f64 * (1.0 - overlap)) as usize).max(1);
    let (down, across) = (step(OVERLAP_HEIGHT), step(OVERLAP_WIDTH));
    let mut video = Video {
        kept: [down * ratio, across * ratio],
        shared: [(cells - down) * ratio, (cells - across) * ratio],
        above: Vec::new(),
        row: Vec::new(),
        bands: Vec::new(),
        done: 0,
        sink,
    };
    for top in (0..height).step_by(down) {
        for left in (0..width).step_by(across) {
            let square = z.narrow(3, top, cells.min(height - top))?;
            let square = square.narrow(4, left, cells.min(width - left))?;
            if top + down >= height && left + across >= width {
                return decode(&square, &mut video);
            }
            let made = whole(|kept| decode(&square, &mut Asking { kept, asked: &mut *video.sink }))?;
            let blended = video.blended(&made, 0..made.dim(2)?)?;
            video.row.push(blended);
        }
        video.end_row()?;
    }
    Ok(())
}

/// Keeps a square's frames, and asks whether to go on where the whole decode's frames go.
struct Asking<'a> {
    kept: &'a mut dyn Sink,
    asked: &'a mut dyn Sink,
}

impl Sink for Asking<'_> {
    fn go_on(&mut self) -> Result<()> {
        self.asked.go_on()
    }

    fn put(&mut self, frames: Tensor) -> Result<()> {
        self.kept.put(frames)
    }
}

/// The video as it comes together: finished bands, and squares that others still lie beside.
struct Video<'a> {
    /// Rows and columns of a square that are not the next ones'.
    kept: [usize; 2],
    /// Rows and columns that a square shares with the one above and with the one on its left.
    shared: [usize; 2],
    above: Vec<Tensor>,
    row: Vec<Tensor>,
    bands: Vec<Tensor>,
    /// Frames of the last square that have come.
    done: usize,
    sink: &'a mut dyn Sink,
}

impl Video<'_> {
    /// These frames of the row's next square, blended with those above and on the left.
    fn blended(&self, square: &Tensor, frames: Range<usize>) -> Result<Tensor> {
        let of = |tensor: &Tensor| tensor.narrow(2, frames.start, frames.len());
        let mut square = square.clone();
        if let Some(above) = self.above.get(self.row.len()) {
            square = blend(&of(above)?, &square, 3, self.shared[0])?;
        }
        if let Some(before) = self.row.last() {
            square = blend(&of(before)?, &square, 4, self.shared[1])?;
        }
        Ok(square)
    }

    /// What a square keeps of itself.
    fn core(&self, square: &Tensor) -> Result<Tensor> {
        let [rows, columns] = self.kept;
        square.narrow(3, 0, square.dim(3)?.min(rows))?.narrow(4, 0, square.dim(4)?.min(columns))
    }

    fn end_row(&mut self) -> Result<()> {
        let cores = self.row.iter().map(|square| self.core(square)).collect::<Result<Vec<_>>>()?;
        self.bands.push(Tensor::cat(&cores, 4)?);
        self.above = std::mem::take(&mut self.row);
        Ok(())
    }
}

/// Takes the last square's frames.
impl Sink for Video<'_> {
    fn go_on(&mut self) -> Result<()> {
        self.sink.go_on()
    }

    fn put(&mut self, square: Tensor) -> Result<()> {
        let frames = self.done..self.done + square.dim(2)?;
        self.done = frames.end;
        let of = |tensor: &Tensor| tensor.narrow(2, frames.start, frames.len());
        let square = self.blended(&square, frames.clone())?;
        let squares = self.row.iter().map(|square| self.core(&of(square)?));
        let mut cores = squares.collect::<Result<Vec<_>>>()?;
        cores.push(self.core(&square)?);
        let mut bands = self.bands.iter().map(of).collect::<Result<Vec<_>>>()?;
        bands.push(Tensor::cat(&cores, 4)?);
        drop((square, cores));
        self.sink.put(Tensor::cat(&bands, 3)?)
    }
}

/// `after` with its first positions along `axis` blended with the last of `before`.
fn blend(before: &Tensor, after: &Tensor, axis: usize, shared: usize) -> Result<Tensor> {
    let (end, len) = (before.dim(axis)?, after.dim(axis)?);
    let shared = shared.min(end).min(len);
    if shared == 0 {
        return Ok(after.clone());
    }
    let weights: Vec<f32> = (0..shared).map(|i| i as f32 / shared as f32).collect();
    let mut shape = [1; 5];
    shape[axis] = shared;
    let weights = Tensor::from_vec(weights, &shape[..], after.device())?.to_dtype(after.dtype())?;
    let (old, new) = (before.narrow(axis, end - shared, shared)?, after.narrow(axis, 0, shared)?);
    let mixed = (old.broadcast_mul(&weights.affine(-1.0, 1.0)?)? + new.broadcast_mul(&weights)?)?;
    if shared == len {
        return Ok(mixed);
    }
    Tensor::cat(&[&mixed, &after.narrow(axis, shared, len - shared)?], axis)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    #[test]
    fn squares_of_a_decoder_that_looks_at_one_cell_join_to_the_whole() {
        for (height, width, cells) in [(5, 7, 2), (12, 9, 6), (13, 26, 10), (3, 40, 12)] {
            let z = Tensor::randn(0f32, 1.0, (1, 2, 3, height, width), &Device::Cpu).unwrap();
            // Frame by frame, as a decoder that goes in runs gives them.
            let grow = |z: &Tensor, sink: &mut dyn Sink| {
                (0..z.dim(2)?).try_for_each(|frame| sink.put(z.narrow(2, frame, 1)?.upsample_twice()?))
            };
            let joined = whole(|sink| decode(&z, cells, 2, sink, grow)).unwrap();
            let plain = z.upsample_twice().unwrap();
            assert_eq!(joined.dims(), plain.dims());
            let worst = (joined - plain).unwrap().abs().unwrap().max_all().unwrap();
            assert!(worst.to_scalar::<f32>().unwrap() < 1e-5);
        }
    }

    trait Twice {
        fn upsample_twice(&self) -> Result<Tensor>;
    }

    impl Twice for Tensor {
        fn upsample_twice(&self) -> Result<Tensor> {
            let (b, c, t, h, w) = self.dims5()?;
            self.reshape((b * c * t, 1, h, w))?.upsample_nearest2d(h * 2, w * 2)?.reshape((
                b,
                c,
                t,
                h * 2,
                w * 2,
            ))
        }
    }
}

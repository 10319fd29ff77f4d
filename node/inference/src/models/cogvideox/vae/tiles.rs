//! A decode in overlapping squares whose overlaps are blended, as the reference does it.
//!
//! A square is `cells` latent cells along a side; neighbours overlap by a sixth of it in height and a fifth in width.
//! Over an overlap the weights go linearly from the square above (left) to the one below (right).

use candle_core::{Result, Tensor};

/// Cells along the side of the least square that overlaps its neighbours and still gets on.
pub(super) const LEAST: usize = 2;
/// The part of a square's height that it shares with the one above.
const OVERLAP_HEIGHT: f64 = 1.0 / 6.0;
/// The part of a square's width that it shares with the one on its left.
const OVERLAP_WIDTH: f64 = 1.0 / 5.0;

/// Latents `(batch, channels, time, height, width)` to a video, square by square; a cell is `ratio` pixels along a side.
pub(super) fn decode(
    z: &Tensor,
    cells: usize,
    ratio: usize,
    decode: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, _, _, height, width) = z.dims5()?;
    let step = |overlap: f64| ((cells as f64 * (1.0 - overlap)) as usize).max(1);
    let (down, across) = (step(OVERLAP_HEIGHT), step(OVERLAP_WIDTH));
    let (shared_rows, shared_columns) = ((cells - down) * ratio, (cells - across) * ratio);
    let mut above: Vec<Tensor> = Vec::new();
    let mut bands = Vec::new();
    for top in (0..height).step_by(down) {
        let mut row: Vec<Tensor> = Vec::new();
        for (column, left) in (0..width).step_by(across).enumerate() {
            let tile = z.narrow(3, top, cells.min(height - top))?;
            let mut tile = decode(&tile.narrow(4, left, cells.min(width - left))?)?;
            if let Some(above) = above.get(column) {
                tile = blend(above, &tile, 3, shared_rows)?;
            }
            if let Some(before) = row.last() {
                tile = blend(before, &tile, 4, shared_columns)?;
            }
            row.push(tile);
        }
        let kept = row.iter().map(|tile| {
            let rows = tile.dim(3)?.min(down * ratio);
            tile.narrow(3, 0, rows)?.narrow(4, 0, tile.dim(4)?.min(across * ratio))
        });
        bands.push(Tensor::cat(&kept.collect::<Result<Vec<_>>>()?, 4)?);
        above = row;
    }
    Tensor::cat(&bands, 3)
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
            let mut grow = |z: &Tensor| z.upsample_twice();
            let joined = decode(&z, cells, 2, &mut grow).unwrap();
            let whole = z.upsample_twice().unwrap();
            assert_eq!(joined.dims(), whole.dims());
            let worst = (joined - whole).unwrap().abs().unwrap().max_all().unwrap();
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

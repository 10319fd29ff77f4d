//! Pyramid Flow's rotary embedding: a head's channels are shared out to time, height and width (in the SD3 form all are
//! time's), and every token of a clip has a place in the grid of the largest picture, whatever the size that it is given
//! in.
//!
//! Text lies at the origin. A clip of half the size has its rows at 0.5, 2.5, and so on: the middle of the rows that
//! they stand for. Angles are computed in f64 and tables kept in f32, as the reference does.

use candle_core::{DType, Device, Result, Tensor};

const THETA: f64 = 10_000.0;

/// Cosine and sine for each pair of channels of each head, `[tokens * heads, head width / 2]`, f32: all heads of a token
/// have the same, and with a row for each of them nothing is transposed.
#[derive(Debug, Clone)]
pub struct RopeTables {
    cos: Tensor,
    sin: Tensor,
}

impl RopeTables {
    /// For `text` text tokens and then clips, each of so many frames, rows and columns of tokens; the last is the
    /// largest. `axes` are the widths of time and, where they turn too, of height and width in a head.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(
        axes: &[usize],
        heads: usize,
        text: usize,
        clips: &[[usize; 3]],
        device: &Device,
    ) -> Result<Self> {
        let pairs: usize = axes.iter().map(|width| width / 2).sum();
        let whole = clips.last().copied().unwrap_or_default();
        let mut table = Table::default();
        for _ in 0..text {
            table.push(axes, [0.0; 3]);
        }
        let mut time = 0;
        for &[frames, rows, columns] in clips {
            let (rows, columns) = (spread(rows, whole[1]), spread(columns, whole[2]));
            for frame in time..time + frames {
                for &row in &rows {
                    for &column in &columns {
                        table.push(axes, [frame as f64, row, column]);
                    }
                }
            }
            time += frames;
        }
        let tokens = table.cos.len() / pairs.max(1);
        let for_heads = |values: Vec<f32>| {
            let one = Tensor::from_vec(values, (tokens, 1, pairs), device)?;
            one.broadcast_as((tokens, heads, pairs))?.reshape((tokens * heads, pairs))
        };
        Ok(Self { cos: for_heads(table.cos)?, sin: for_heads(table.sin)? })
    }

    /// Turns the pairs of `x` `[B, tokens, heads, width]`, in f32, and gives `x`'s own type back.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, heads, width) = x.dims4()?;
        let wide = x.to_dtype(DType::F32)?.reshape((batch, 1, tokens * heads, width))?.contiguous()?;
        let turned = candle_nn::rotary_emb::rope_i(&wide, &self.cos, &self.sin)?;
        turned.reshape((batch, tokens, heads, width))?.to_dtype(x.dtype())
    }
}

/// Places of `count` rows in a grid of `whole`: torch's linear interpolation of 0, 1, 2, ..
pub(super) fn spread(count: usize, whole: usize) -> Vec<f64> {
    let scale = whole as f32 / count as f32;
    let place = |index: usize| {
        if count == whole {
            return index as f64;
        }
        let at = (scale * (index as f32 + 0.5) - 0.5).max(0.0);
        f64::from(at.min((whole - 1) as f32))
    };
    (0..count).map(place).collect()
}

#[derive(Default)]
struct Table {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Table {
    fn push(&mut self, axes: &[usize], place: [f64; 3]) {
        for (&width, place) in axes.iter().zip(place) {
            for pair in 0..width / 2 {
                let angle = place / THETA.powf((2 * pair) as f64 / width as f64);
                self.cos.push(angle.cos() as f32);
                self.sin.push(angle.sin() as f32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn smaller_pictures_lie_in_the_middle_of_what_they_stand_for() {
        assert_eq!(spread(4, 4), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(spread(2, 4), [0.5, 2.5]);
        assert_eq!(spread(1, 4), [1.5]);
    }

    #[test]
    fn text_is_not_turned_and_frames_count_on_from_clip_to_clip() {
        let tables = RopeTables::new(&[2, 2, 2], 3, 1, &[[2, 1, 1], [1, 1, 1]], &Device::Cpu).unwrap();
        let cos = tables.cos.to_vec2::<f32>().unwrap();
        assert_eq!(cos[0], [1.0; 3]);
        assert_eq!(cos[9][0], 2f64.cos() as f32);
        let x = Tensor::new(&[1f32, 0.0], &Device::Cpu).unwrap();
        let x = Tensor::cat(&[&x, &x, &x], 0).unwrap().broadcast_as((2, 4, 3, 6)).unwrap();
        let turned = tables.apply(&x).unwrap();
        let last = turned.get(1).unwrap().get(3).unwrap().get(2).unwrap().to_vec1::<f32>().unwrap();
        assert!((last[0] - 2f32.cos()).abs() < 1e-6 && (last[1] - 2f32.sin()).abs() < 1e-6, "{last:?}");
    }
}

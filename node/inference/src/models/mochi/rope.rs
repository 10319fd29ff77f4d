//! Mochi's rotary embedding: three axes with learned frequencies for each head.
//!
//! Time counts latent frames. Rows and columns are the centres of cells of a picture that is scaled, sides in
//! proportion, to the area of 192 x 192 and centred on 0. A pair's angle is the sum over the axes of position times
//! frequency. Everything is f32, in the reference's order.

use candle_core::{DType, Device, Result, Tensor};

/// Area that every picture is scaled to.
const TARGET_AREA: f64 = 192.0 * 192.0;

/// Cosine and sine for each pair of a head's channels.
#[derive(Debug, Clone)]
pub struct RopeTables {
    /// `[tokens * heads, head / 2]`, f32.
    cos: Tensor,
    /// As `cos`.
    sin: Tensor,
}

impl RopeTables {
    /// From frequencies `[3, heads, head / 2]`, for a grid of frames, rows and columns of tokens, on the frequencies'
    /// device.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(frequencies: &Tensor, grid: [usize; 3]) -> Result<Self> {
        let (axes, heads, pairs) = frequencies.dims3()?;
        let tokens = grid.iter().product::<usize>();
        let positions = Tensor::from_vec(positions(grid), (tokens, axes), &Device::Cpu)?;
        let frequencies = frequencies.to_dtype(DType::F32)?.reshape((axes, heads * pairs))?;
        let angles = positions.to_device(frequencies.device())?.matmul(&frequencies)?;
        let angles = angles.reshape((tokens * heads, pairs))?;
        Ok(Self { cos: angles.cos()?, sin: angles.sin()? })
    }

    /// Turns the pairs of `x` `[B, tokens, heads, head]`, in f32, and gives `x`'s own type back.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, heads, head) = x.dims4()?;
        let wide = x.to_dtype(DType::F32)?.contiguous()?.reshape((batch, 1, tokens * heads, head))?;
        let turned = candle_nn::rotary_emb::rope_i(&wide, &self.cos, &self.sin)?;
        turned.reshape(x.shape())?.to_dtype(x.dtype())
    }
}

/// Frame, row and column of every token, frames first.
fn positions([frames, rows, columns]: [usize; 3]) -> Vec<f32> {
    let scale = (TARGET_AREA / (rows * columns) as f64).sqrt();
    let (down, across) = (centres(rows, scale), centres(columns, scale));
    let mut out = Vec::with_capacity(3 * frames * rows * columns);
    for frame in 0..frames {
        for row in &down {
            for column in &across {
                out.extend([frame as f32, *row, *column]);
            }
        }
    }
    out
}

/// Middles between the `count + 1` edges of `linspace(-count * scale / 2, count * scale / 2)`; torch computes a linspace
/// from both ends inwards.
fn centres(count: usize, scale: f64) -> Vec<f32> {
    let end = (count as f64 * scale / 2.0) as f32;
    let (start, edges) = (-end, count + 1);
    let step = (end - start) / count.max(1) as f32;
    let edge = |i: usize| {
        if i < edges / 2 { start + step * i as f32 } else { end - step * (edges - 1 - i) as f32 }
    };
    (0..count).map(|i| (edge(i) + edge(i + 1)) / 2.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_centred_and_span_the_target_area() {
        let points = positions([2, 4, 9]);
        assert_eq!(points.len(), 3 * 2 * 4 * 9);
        assert_eq!((points[0], points[3 * 36]), (0.0, 1.0));
        let side = (TARGET_AREA / 36.0).sqrt();
        assert!((f64::from(points[1]) + 1.5 * side).abs() < 1e-4);
        assert!((f64::from(points[2]) + 4.0 * side).abs() < 1e-4);
        let mean: f32 = points.iter().skip(2).step_by(3).sum::<f32>();
        assert!(mean.abs() < 1e-2, "{mean}");
    }
}

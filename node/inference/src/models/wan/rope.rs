//! Wan's rotary embedding: each head's channels are split over time, height and width, pairs side by side.
//!
//! Of `head` channels height and width have `2 (head / 6)` each, time has the rest; an axis of `n` channels has the
//! frequencies `10000^(-2i / n)`, a position is the token's number along the axis. Angles are computed in f64.

use candle_core::{Device, Result, Tensor};

use super::config::TransformerConfig;
use crate::nn::rope::rotate_pairs;

const THETA: f64 = 10_000.0;

/// Cosine and sine for every token and pair of a head's channels.
#[derive(Debug, Clone)]
pub struct RopeTables {
    /// `(tokens, head / 2)`, f32.
    pub cos: Tensor,
    /// As `cos`.
    pub sin: Tensor,
    /// Tokens in time, height and width.
    pub grid: [usize; 3],
}

impl RopeTables {
    /// The tables for a grid of tokens: frames, rows, columns.
    ///
    /// # Errors
    /// When the grid is longer along an axis than the model has positions, or the device has no room.
    pub fn new(config: &TransformerConfig, grid: [usize; 3], device: &Device) -> Result<Self> {
        if let Some(length) = grid.into_iter().find(|&length| length > config.rope_max_seq_len) {
            candle_core::bail!("{length} tokens along an axis, the model has {}", config.rope_max_seq_len);
        }
        let head = config.attention_head_dim;
        let side = 2 * (head / 6);
        let widths = [head - 2 * side, side, side];
        let axes: [Vec<Vec<(f32, f32)>>; 3] =
            std::array::from_fn(|axis| (0..grid[axis]).map(|at| turns(at, widths[axis])).collect());
        let tokens: usize = grid.iter().product();
        let mut cos = Vec::with_capacity(tokens * head / 2);
        let mut sin = Vec::with_capacity(tokens * head / 2);
        for frame in &axes[0] {
            for row in &axes[1] {
                for column in &axes[2] {
                    let pairs = frame.iter().chain(row).chain(column);
                    cos.extend(pairs.clone().map(|pair| pair.0));
                    sin.extend(pairs.map(|pair| pair.1));
                }
            }
        }
        let shape = (tokens, head / 2);
        let cos = Tensor::from_vec(cos, shape, device)?;
        Ok(Self { cos, sin: Tensor::from_vec(sin, shape, device)?, grid })
    }

    /// Turns the pairs of `x` `(batch, tokens, heads, head)`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        rotate_pairs(x, &self.cos, &self.sin)
    }
}

/// Cosine and sine of every pair at a position of an axis with `width` channels.
fn turns(position: usize, width: usize) -> Vec<(f32, f32)> {
    (0..width / 2)
        .map(|i| {
            let angle = position as f64 * (1.0 / THETA.powf(2.0 * i as f64 / width as f64));
            (angle.cos() as f32, angle.sin() as f32)
        })
        .collect()
}

//! CogVideoX's positions of video tokens: sinusoids that are added (2b), or rotary tables (5b, 1.5).
//!
//! Text tokens have no position: nothing is added to them, and they are not turned.

use candle_core::{Device, Result, Tensor};

use super::config::TransformerConfig;

/// The period's base of both kinds.
const THETA: f64 = 10_000.0;

/// Sinusoids `[tokens, width]` in f32 for a grid of tokens (frames, rows, columns): a quarter of the width tells the
/// frame, three eighths the column, three eighths the row; each part is sines, then cosines. Computed in f64.
///
/// # Errors
/// When the device has no room.
pub fn sinusoids(config: &TransformerConfig, grid: [usize; 3], device: &Device) -> Result<Tensor> {
    let width = config.inner();
    let [frames, rows, columns] = grid;
    // Positions are f32 in the reference, angles f64.
    let unit = |index: usize, scale: f64| f64::from(index as f32 / scale as f32);
    let time = |index| sinusoid(width / 4, unit(index, config.temporal_interpolation_scale));
    let space = |index| sinusoid(3 * width / 8, unit(index, config.spatial_interpolation_scale));
    let along = |count: usize, values: &dyn Fn(usize) -> Vec<f32>| (0..count).map(values).collect::<Vec<_>>();
    let (frame, row, column) = (along(frames, &time), along(rows, &space), along(columns, &space));
    let mut values = Vec::with_capacity(frames * rows * columns * width);
    for frame in &frame {
        for row in &row {
            for column in &column {
                values.extend_from_slice(frame);
                values.extend_from_slice(column);
                values.extend_from_slice(row);
            }
        }
    }
    Tensor::from_vec(values, (frames * rows * columns, width), device)
}

fn sinusoid(width: usize, position: f64) -> Vec<f32> {
    let half = width / 2;
    let angles = (0..half).map(|i| position / THETA.powf(i as f64 / (width as f64 / 2.0)));
    angles.clone().map(|a| a.sin() as f32).chain(angles.map(|a| a.cos() as f32)).collect()
}

/// Cosine and sine for each pair of a head's channels, `[tokens, head width / 2]`, f32.
#[derive(Debug, Clone)]
pub struct RopeTables {
    /// Cosines.
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
}

impl RopeTables {
    /// Tables for a grid of tokens (frames, rows, columns): a quarter of a head's width turns with the frame, three
    /// eighths with the row, three eighths with the column. With patches of one frame, the grid is stretched and centred
    /// onto the one that the model was trained with; with longer ones it is that grid's first part.
    ///
    /// # Errors
    /// When the grid does not lie within the trained one where it must, or the device has no room.
    pub fn new(config: &TransformerConfig, grid: [usize; 3], device: &Device) -> Result<Self> {
        let [frames, rows, columns] = grid;
        let base = [config.sample_height / config.patch_size, config.sample_width / config.patch_size];
        let count = |n: usize| (0..n).map(|i| i as f32).collect::<Vec<f32>>();
        let (row_places, column_places) = if config.patch_size_t.is_none() {
            let region = Region::new([rows, columns], base);
            let [row, column] = [0, 1].map(|axis| region.places(axis, grid[axis + 1]));
            (row, column)
        } else if rows > base[0] || columns > base[1] {
            candle_core::bail!(
                "{rows}x{columns} tokens do not lie within the trained {}x{}",
                base[0],
                base[1]
            )
        } else {
            (count(rows), count(columns))
        };
        let head = config.attention_head_dim;
        let time: Vec<_> = count(frames).iter().map(|&p| angles(head / 4, p)).collect();
        let row: Vec<_> = row_places.iter().map(|&p| angles(head / 8 * 3, p)).collect();
        let column: Vec<_> = column_places.iter().map(|&p| angles(head / 8 * 3, p)).collect();
        let mut all = Vec::with_capacity(frames * rows * columns * head / 2);
        for frame in &time {
            for row in &row {
                for column in &column {
                    all.extend([frame, row, column].into_iter().flatten().copied());
                }
            }
        }
        let shape = (frames * rows * columns, head / 2);
        let table = |f: fn(f32) -> f32| Tensor::from_vec(all.iter().map(|&a| f(a)).collect(), shape, device);
        Ok(Self { cos: table(f32::cos)?, sin: table(f32::sin)? })
    }

    /// The tables with `tokens` tokens before that are not turned.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn after(&self, tokens: usize) -> Result<Self> {
        let shape = (tokens, self.cos.dim(1)?);
        let (ones, zeros) = (self.cos.ones_like()?, self.sin.zeros_like()?);
        let first = |x: Tensor| x.narrow(0, 0, 1)?.broadcast_as(shape)?.contiguous();
        Ok(Self {
            cos: Tensor::cat(&[&first(ones)?, &self.cos], 0)?,
            sin: Tensor::cat(&[&first(zeros)?, &self.sin], 0)?,
        })
    }

    /// The tables as the reference keeps them, each value twice: `[tokens, head width]`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn full(&self) -> Result<(Tensor, Tensor)> {
        let twice = |x: &Tensor| {
            let (tokens, pairs) = x.dims2()?;
            x.unsqueeze(2)?.broadcast_as((tokens, pairs, 2))?.reshape((tokens, pairs * 2))
        };
        Ok((twice(&self.cos)?, twice(&self.sin)?))
    }
}

/// A position's angle for each of `width / 2` pairs, in f32 in the reference's order.
fn angles(width: usize, position: f32) -> Vec<f32> {
    let frequency = |i: usize| 1.0 / (THETA.powf(f64::from(2.0 * i as f32 / width as f32)) as f32);
    (0..width / 2).map(|i| position * frequency(i)).collect()
}

/// Where a grid of rows and columns lies within the trained one, once stretched to fit: first and past-the-end.
struct Region {
    start: [i64; 2],
    stop: [i64; 2],
}

impl Region {
    fn new(grid: [usize; 2], base: [usize; 2]) -> Self {
        let [rows, columns] = grid.map(|n| n as f64);
        let [height, width] = base.map(|n| n as f64);
        let whole = f64::round_ties_even;
        let size = if rows / columns > height / width {
            [height, whole(height / rows * columns)]
        } else {
            [whole(width / columns * rows), width]
        };
        let start = [whole((height - size[0]) / 2.0), whole((width - size[1]) / 2.0)];
        Self {
            start: start.map(|n| n as i64),
            stop: [(start[0] + size[0]) as i64, (start[1] + size[1]) as i64],
        }
    }

    /// `count` places from the region's start to `stop (count - 1) / count`, as torch's linspace computes them in f32:
    /// from both ends inwards.
    fn places(&self, axis: usize, count: usize) -> Vec<f32> {
        let n = count as f64;
        let start = self.start[axis] as f32;
        let end = (self.stop[axis] as f64 * (n - 1.0) / n) as f32;
        let stride = (end - start) / (count.max(2) - 1) as f32;
        let place = |i: usize| {
            if i < count / 2 || count == 1 {
                start + stride * i as f32
            } else {
                end - stride * (count - 1 - i) as f32
            }
        };
        (0..count).map(place).collect()
    }
}

//! Latents as a volume and as tokens, and a rough picture straight from them.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use serde::Deserialize;

use crate::error::Error;
use crate::frames::RgbFrames;
use crate::pipeline::{GenerateRequest, WorkConfig, config_error};

/// `[B, C, F, H, W]` to tokens `[B, F' H' W', C pt p p]`; `patch` is time, height, width.
///
/// # Errors
/// When a patch does not divide the volume.
pub fn pack(latents: &Tensor, patch: [usize; 3]) -> Result<Tensor> {
    let (batch, channels, frames, height, width) = latents.dims5()?;
    let [pt, ph, pw] = patch;
    let (f, h, w) = (frames / pt, height / ph, width / pw);
    if patch == [1, 1, 1] {
        return latents.flatten_from(2)?.transpose(1, 2)?.contiguous();
    }
    latents
        .reshape(vec![batch, channels, f, pt, h, ph, w, pw])?
        .permute(vec![0, 2, 4, 6, 1, 3, 5, 7])?
        .contiguous()?
        .reshape((batch, f * h * w, channels * pt * ph * pw))
}

/// Tokens back to `[B, C, F, H, W]`; `cells` is the volume's frames, height and width.
///
/// # Errors
/// When the tokens do not make that volume.
pub fn unpack(tokens: &Tensor, cells: [usize; 3], patch: [usize; 3]) -> Result<Tensor> {
    let (batch, _, width) = tokens.dims3()?;
    let [pt, ph, pw] = patch;
    let [frames, height, columns] = cells;
    let (f, h, w) = (frames / pt, height / ph, columns / pw);
    let channels = width / (pt * ph * pw);
    tokens
        .reshape(vec![batch, f, h, w, channels, pt, ph, pw])?
        .permute(vec![0, 4, 1, 5, 2, 6, 3, 7])?
        .contiguous()?
        .reshape((batch, channels, frames, height, columns))
}

/// A clip in latent cells, for models that keep latents packed into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Volume {
    /// Frames, height, width.
    pub cells: [usize; 3],
    /// Cells in a token: time, height, width.
    pub patch: [usize; 3],
    /// Channels of a cell.
    pub channels: usize,
}

impl Volume {
    /// Of a request, for a model's compression: the first latent frame is one picture.
    #[must_use]
    pub fn new(work: &WorkConfig, request: &GenerateRequest) -> Self {
        let frames = request.frames.saturating_sub(1) / work.temporal_ratio + 1;
        let cells = [frames, request.height / work.spatial_ratio, request.width / work.spatial_ratio];
        Self { cells, patch: work.patch, channels: work.latent_channels }
    }

    /// `[1, C, F, H, W]`.
    #[must_use]
    pub fn shape(&self) -> Vec<usize> {
        let [frames, height, width] = self.cells;
        vec![1, self.channels, frames, height, width]
    }

    /// Frames, rows and columns of tokens.
    #[must_use]
    pub fn grid(&self) -> [usize; 3] {
        std::array::from_fn(|axis| self.cells[axis] / self.patch[axis])
    }

    /// `[1, tokens, channels of a token]`.
    #[must_use]
    pub fn packed_shape(&self) -> Vec<usize> {
        vec![1, self.grid().iter().product(), self.channels * self.patch.iter().product::<usize>()]
    }
}

/// How latents are shown before they are decoded: a linear map from a cell's channels to a colour.
///
/// With factors (of `kinoflock.json`, or [`LatentRgb::fitted`]), a colour in 0 to 1 is `channels x factors + bias`. Without,
/// the first three channels are stretched over the clip's range.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentRgb {
    /// A row of red, green and blue for each channel; empty for none.
    #[serde(default)]
    pub factors: Vec<[f32; 3]>,
    /// Added to the sum.
    #[serde(default)]
    pub bias: [f32; 3],
}

impl LatentRgb {
    /// Checks that there are no factors or a row for each channel; `file` is where they stand.
    ///
    /// # Errors
    /// Another number of rows.
    pub fn check(&self, file: &Path, channels: usize) -> std::result::Result<(), Error> {
        let rows = self.factors.len();
        if rows == 0 || rows == channels {
            return Ok(());
        }
        Err(config_error(
            file,
            "latent_rgb.factors",
            format!("{rows} rows"),
            format!("{channels} are needed"),
        ))
    }

    /// The map that comes nearest, in squares, from cells `[C, n]` to colours `[3, n]` in 0 to 1; `n` is above `C`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn fitted(cells: &Tensor, colours: &Tensor) -> Result<Self> {
        /// Keeps channels that never vary out of the solution.
        const RIDGE: f64 = 1e-6;
        let (channels, count) = cells.dims2()?;
        let cells = cells.to_dtype(DType::F64)?;
        let ones = Tensor::ones((1, count), DType::F64, cells.device())?;
        let known = Tensor::cat(&[&cells, &ones], 0)?;
        let mut normal = known.matmul(&known.t()?)?.to_vec2::<f64>()?;
        let mut wanted = known.matmul(&colours.to_dtype(DType::F64)?.t()?)?.to_vec2::<f64>()?;
        for (index, row) in normal.iter_mut().enumerate() {
            row[index] += RIDGE * count as f64;
        }
        solve(&mut normal, &mut wanted);
        let row = |index: usize| std::array::from_fn(|colour| wanted[index][colour] as f32);
        Ok(Self { factors: (0..channels).map(row).collect(), bias: row(channels) })
    }

    /// One pixel a cell, one frame a latent frame, of normalised latents `[1, C, F, H, W]`.
    ///
    /// # Errors
    /// When the latents cannot be read back from their device.
    pub fn project(&self, latents: &Tensor) -> Result<RgbFrames> {
        let (_, channels, frames, height, width) = latents.dims5()?;
        let cells = latents
            .to_dtype(DType::F32)?
            .to_device(&Device::Cpu)?
            .reshape((channels, frames * height * width))?;
        let colours = if self.factors.is_empty() {
            stretched(&cells.narrow(0, 0, channels.min(3))?)?
        } else {
            let factors: Vec<f32> = self.factors.iter().flatten().copied().collect();
            let factors = Tensor::from_vec(factors, (channels, 3), &Device::Cpu)?;
            let bias = Tensor::from_slice(&self.bias, (3, 1), &Device::Cpu)?;
            factors.t()?.matmul(&cells)?.broadcast_add(&bias)?
        };
        let video = colours.reshape((3, frames, height, width))?.transpose(0, 1)?;
        RgbFrames::from_unit(&video)
    }
}

/// Solves `normal x = wanted` for a symmetric positive matrix, in place: `wanted` becomes `x`.
fn solve(normal: &mut [Vec<f64>], wanted: &mut [Vec<f64>]) {
    let size = normal.len();
    for pivot in 0..size {
        let (row, value) = (normal[pivot].clone(), wanted[pivot].clone());
        for below in pivot + 1..size {
            let factor = normal[below][pivot] / row[pivot];
            normal[below].iter_mut().zip(&row).for_each(|(cell, above)| *cell -= factor * above);
            wanted[below].iter_mut().zip(&value).for_each(|(cell, above)| *cell -= factor * above);
        }
    }
    for pivot in (0..size).rev() {
        let (rest, diagonal) = (normal[pivot].clone(), normal[pivot][pivot]);
        for colour in 0..wanted[pivot].len() {
            let known: f64 = (pivot + 1..size).map(|column| rest[column] * wanted[column][colour]).sum();
            wanted[pivot][colour] = (wanted[pivot][colour] - known) / diagonal;
        }
    }
}

/// Rows stretched to 0 to 1 each, and repeated to three.
fn stretched(rows: &Tensor) -> Result<Tensor> {
    let low = rows.min_keepdim(1)?;
    let range = (rows.max_keepdim(1)?.sub(&low)? + 1e-6)?;
    let unit = rows.broadcast_sub(&low)?.broadcast_div(&range)?;
    let last = unit.dim(0)? - 1;
    let parts = (0..3).map(|i| unit.narrow(0, i.min(last), 1)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&parts, 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn tokens_go_back_to_the_same_volume_for_every_patch() {
        let volume = Tensor::arange(0f32, 2.0 * 3.0 * 4.0 * 6.0 * 8.0, &Device::Cpu).unwrap();
        let volume = volume.reshape((2, 3, 4, 6, 8)).unwrap();
        for patch in [[1, 1, 1], [2, 2, 2], [1, 2, 4], [4, 3, 1]] {
            let tokens = pack(&volume, patch).unwrap();
            assert_eq!(tokens.dim(2).unwrap(), 3 * patch.iter().product::<usize>());
            let back = unpack(&tokens, [4, 6, 8], patch).unwrap();
            assert_eq!(
                back.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                volume.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            );
        }
    }

    #[test]
    fn a_preview_has_a_pixel_a_cell_and_takes_fitted_factors() {
        let latents = Tensor::from_vec(vec![0.0f32, 1.0, 0.5, 0.5], (1, 2, 1, 1, 2), &Device::Cpu).unwrap();
        let plain = LatentRgb::default().project(&latents).unwrap();
        assert_eq!((plain.width, plain.height, plain.count, plain.data.len()), (2, 1, 1, 6));
        let fitted = LatentRgb { factors: vec![[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], bias: [0.0, 0.0, 1.0] };
        assert_eq!(fitted.project(&latents).unwrap().data, [0, 255, 255, 255, 255, 255]);
    }

    #[test]
    fn the_fitted_map_is_the_one_by_which_the_colours_were_made() {
        let cells: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin()).collect();
        let cells = Tensor::from_vec(cells, (2, 20), &Device::Cpu).unwrap();
        let factors = Tensor::new(&[[0.1f32, 0.2], [0.0, -0.3], [0.25, 0.05]], &Device::Cpu).unwrap();
        let bias = Tensor::new(&[[0.5f32], [0.4], [0.3]], &Device::Cpu).unwrap();
        let colours = factors.matmul(&cells).unwrap().broadcast_add(&bias).unwrap();
        let fitted = LatentRgb::fitted(&cells, &colours).unwrap();
        let near = |a: [f32; 3], b: [f32; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(near(fitted.factors[0], [0.1, 0.0, 0.25]) && near(fitted.factors[1], [0.2, -0.3, 0.05]));
        assert!(near(fitted.bias, [0.5, 0.4, 0.3]), "{fitted:?}");
    }
}

//! LTX's rotary embedding: over the whole inner width before heads are split, three axes interleaved.
//!
//! An axis has `width / 6` frequencies `theta^linspace(0, 1) * pi / 2`; a position is scaled to a part of 20 frames
//! and 2048 pixels, an angle is `frequency * (2 * position - 1)`. Angles reach 1.5e4 rad, so that a last bit shows:
//! everything is computed in f32 in the reference's order. Tables hold each pair's value once, `[B, tokens, width/2]`.

use candle_core::{DType, Device, Result, Tensor};

/// Cosine and sine for each pair of channels.
#[derive(Debug, Clone)]
pub struct RopeTables {
    /// `[B, tokens, width / 2]`, f32; B is 1 where all samples share positions.
    pub cos: Tensor,
    /// As `cos`.
    pub sin: Tensor,
}

/// Where the tokens lie.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    /// A grid of latent cells, with the factors that make seconds and pixels of them (`LTXPipeline`).
    Grid {
        /// Latent frames, rows and columns.
        size: [usize; 3],
        /// Per axis; `None` leaves cells as they are.
        scale: Option<[f64; 3]>,
    },
    /// Given coordinates `[B, 3, tokens]` in seconds and pixels (`LTXConditionPipeline`).
    Coordinates(&'a Tensor),
}

/// The embedding's constants.
#[derive(Debug, Clone)]
pub struct Rope {
    width: usize,
    patch: [f32; 3],
}

/// Frames, rows and columns of the picture that positions are parts of.
const BASE: [f32; 3] = [20.0, 2048.0, 2048.0];
const THETA: f64 = 10_000.0;

impl Rope {
    /// For an inner width and the tokens' patch sizes.
    #[must_use]
    pub fn new(width: usize, patch_size: usize, patch_size_t: usize) -> Self {
        Self { width, patch: [patch_size_t as f32, patch_size as f32, patch_size as f32] }
    }

    /// The tables for some positions.
    ///
    /// # Errors
    /// When the coordinates have another shape.
    pub fn tables(&self, positions: Positions<'_>, device: &Device) -> Result<RopeTables> {
        match positions {
            Positions::Grid { size, scale } => self.at_points(&[self.grid(size, scale)], device),
            Positions::Coordinates(coordinates) => {
                let (_, axes, _) = coordinates.dims3()?;
                if axes != 3 {
                    candle_core::bail!("coordinates have {axes} axes, 3 are needed");
                }
                let samples: Vec<Vec<[f32; 3]>> = coordinates
                    .to_dtype(DType::F32)?
                    .to_device(&Device::Cpu)?
                    .to_vec3::<f32>()?
                    .iter()
                    .map(|axes| {
                        (0..axes[0].len()).map(|i| std::array::from_fn(|a| axes[a][i] / BASE[a])).collect()
                    })
                    .collect();
                self.at_points(&samples, device)
            }
        }
    }

    fn grid(&self, [frames, rows, columns]: [usize; 3], scale: Option<[f64; 3]>) -> Vec<[f32; 3]> {
        let part = |axis: usize, index: usize| match scale {
            Some(scale) => index as f32 * scale[axis] as f32 * self.patch[axis] / BASE[axis],
            None => index as f32,
        };
        let mut points = Vec::with_capacity(frames * rows * columns);
        for frame in 0..frames {
            for row in 0..rows {
                points.extend((0..columns).map(|column| [part(0, frame), part(1, row), part(2, column)]));
            }
        }
        points
    }

    fn at_points(&self, samples: &[Vec<[f32; 3]>], device: &Device) -> Result<RopeTables> {
        let pairs = self.width / 2;
        let padding = (self.width % 6) / 2;
        let frequencies = self.frequencies();
        let tokens = samples.first().map_or(0, Vec::len);
        let mut cos = Vec::with_capacity(samples.len() * tokens * pairs);
        let mut sin = Vec::with_capacity(cos.capacity());
        for point in samples.iter().flatten() {
            cos.extend(std::iter::repeat_n(1f32, padding));
            sin.extend(std::iter::repeat_n(0f32, padding));
            for frequency in &frequencies {
                for position in point {
                    let angle = frequency * (position * 2.0 - 1.0);
                    cos.push(angle.cos());
                    sin.push(angle.sin());
                }
            }
        }
        let shape = (samples.len(), tokens, pairs);
        Ok(RopeTables {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
        })
    }

    /// `theta^linspace(0, 1, width / 6) * pi / 2`; torch computes a linspace from both ends inwards.
    fn frequencies(&self) -> Vec<f32> {
        let count = self.width / 6;
        let stride = 1.0 / (count.max(2) - 1) as f32;
        let point = |i: usize| {
            if i < count / 2 || count == 1 {
                i as f32 * stride
            } else {
                1.0 - stride * (count - 1 - i) as f32
            }
        };
        let power = |exponent: f32| THETA.powf(f64::from(exponent)) as f32;
        (0..count).map(|i| power(point(i)) * std::f32::consts::PI / 2.0).collect()
    }
}

impl RopeTables {
    /// Turns the pairs of `x` `[B, tokens, width]`, in f32, and gives `x`'s own type back.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(DType::F32)?.unsqueeze(1)?.contiguous()?;
        let (cos, sin) = if self.cos.dim(0)? == 1 {
            (self.cos.squeeze(0)?, self.sin.squeeze(0)?)
        } else {
            (self.cos.clone(), self.sin.clone())
        };
        candle_nn::rotary_emb::rope_i(&wide, &cos, &sin)?.squeeze(1)?.to_dtype(x.dtype())
    }

    /// The tables as the reference keeps them, each value twice: `[B, tokens, width]`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn full(&self) -> Result<(Tensor, Tensor)> {
        let twice = |x: &Tensor| {
            let (batch, tokens, pairs) = x.dims3()?;
            x.unsqueeze(3)?.broadcast_as((batch, tokens, pairs, 2))?.reshape((batch, tokens, pairs * 2))
        };
        Ok((twice(&self.cos)?, twice(&self.sin)?))
    }
}

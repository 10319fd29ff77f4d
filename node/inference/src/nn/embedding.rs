//! Timesteps as vectors: sinusoids, and the small network that diffusion transformers put behind them.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::linear::Linear;
use super::ops;

/// Sinusoids of a timestep (diffusers' `Timesteps`): `sin(t f_i)` and `cos(t f_i)` with
/// `f_i = period^(-i / (half - downscale_freq_shift))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timesteps {
    /// Width of the embedding.
    pub channels: usize,
    /// Cosines first.
    pub flip_sin_to_cos: bool,
    /// See the formula.
    pub downscale_freq_shift: f64,
    /// Factor on the angle.
    pub scale: f64,
    /// Longest period.
    pub max_period: f64,
}

impl Timesteps {
    /// What LTX-Video, PixArt, and most transformers use: 256 wide, cosines first, no shift.
    pub const PIXART: Self = Self {
        channels: 256,
        flip_sin_to_cos: true,
        downscale_freq_shift: 0.0,
        scale: 1.0,
        max_period: 10_000.0,
    };

    /// The embedding of `timesteps`, `(n)`, as `(n, channels)` in f32 on `device`.
    ///
    /// Computed on the CPU with the system's sine and cosine in f32 order of operations, so that every device gets
    /// the same numbers. Give timesteps on the CPU: to read them from a device waits for all that was begun there.
    ///
    /// # Errors
    /// When `timesteps` is not one-dimensional or the device fails.
    pub fn embed(&self, timesteps: &Tensor, device: &Device) -> Result<Tensor> {
        let values = timesteps.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
        let half = self.channels / 2;
        let mut out = Vec::with_capacity(values.len() * self.channels);
        let rate = -self.max_period.ln() as f32;
        let span = (half as f64 - self.downscale_freq_shift) as f32;
        let frequencies: Vec<f32> = (0..half).map(|i| (rate * i as f32 / span).exp()).collect();
        for value in &values {
            let angles = frequencies.iter().map(|f| self.scale as f32 * (value * f));
            if self.flip_sin_to_cos {
                out.extend(angles.clone().map(f32::cos));
                out.extend(angles.map(f32::sin));
            } else {
                out.extend(angles.clone().map(f32::sin));
                out.extend(angles.map(f32::cos));
            }
            out.extend(std::iter::repeat_n(0.0, self.channels % 2));
        }
        Tensor::from_vec(out, (values.len(), self.channels), device)
    }
}

/// Linear, SiLU, linear (diffusers' `TimestepEmbedding`); tensors `linear_1.*` and `linear_2.*`.
#[derive(Debug, Clone)]
pub struct TimestepEmbedding {
    first: Linear,
    second: Linear,
}

impl TimestepEmbedding {
    /// Loads the network from `input` channels to `width`.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(input: usize, width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            first: Linear::load(input, width, true, vb.pp("linear_1"))?,
            second: Linear::load(width, width, true, vb.pp("linear_2"))?,
        })
    }

    /// `(n, input)` to `(n, width)`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.second.forward(&ops::silu(&self.first.forward(x)?)?)
    }
}

/// diffusers' `PixArtAlphaCombinedTimestepSizeEmbeddings` without its size conditions: [`Timesteps::PIXART`] and a
/// [`TimestepEmbedding`] under `timestep_embedder`.
#[derive(Debug, Clone)]
pub struct PixArtTimestepEmbedding {
    embedder: TimestepEmbedding,
    dtype: DType,
    device: Device,
}

impl PixArtTimestepEmbedding {
    /// Loads it; `width` is the embedding's.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(width: usize, vb: VarBuilder) -> Result<Self> {
        let (dtype, device) = (vb.dtype(), vb.device().clone());
        let embedder =
            TimestepEmbedding::load(Timesteps::PIXART.channels, width, vb.pp("timestep_embedder"))?;
        Ok(Self { embedder, dtype, device })
    }

    /// Timesteps `(n)`, best on the CPU, to `(n, width)` in the weights' type and on their device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(&self, timesteps: &Tensor) -> Result<Tensor> {
        self.embedder.forward(&Timesteps::PIXART.embed(timesteps, &self.device)?.to_dtype(self.dtype)?)
    }
}

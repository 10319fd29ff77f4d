//! What a variational encoder says of a video.

use candle_core::{DType, Result, Tensor};

/// A normal distribution over latents, `(batch, channels, time, height, width)`.
#[derive(Debug, Clone)]
pub struct Moments {
    /// The mean, which is also the mode.
    pub mean: Tensor,
    /// The logarithm of the variance, within -30 to 20.
    pub logvar: Tensor,
}

impl Moments {
    /// From an encoder's output, whose channels are the means' and then those of the logarithms of variances.
    ///
    /// # Errors
    /// When there are not twice `channels`.
    pub fn new(moments: &Tensor, channels: usize) -> Result<Self> {
        if moments.dim(1)? != 2 * channels {
            candle_core::bail!("an encoder of {channels} channels gave {:?}", moments.shape());
        }
        Ok(Self {
            mean: moments.narrow(1, 0, channels)?.contiguous()?,
            logvar: moments.narrow(1, channels, channels)?.clamp(-30f32, 20f32)?,
        })
    }

    /// A draw: `mean + noise * exp(logvar / 2)`, in f32.
    ///
    /// # Errors
    /// When `noise` has another shape or the device fails.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        let deviation = (self.logvar.to_dtype(DType::F32)? * 0.5)?.exp()?;
        self.mean.to_dtype(DType::F32)? + (deviation * noise.to_dtype(DType::F32)?)?
    }
}

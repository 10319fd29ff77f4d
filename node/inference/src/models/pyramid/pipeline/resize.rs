//! Latents of half and of double size.

use candle_core::{Result, Tensor};

/// `[1, C, T, H, W]` to half the height and width, which are even: the mean of each block of 2 x 2, which is what torch's
/// bilinear interpolation is at this factor.
///
/// # Errors
/// When the shape or the device fails.
pub fn shrink(latents: &Tensor) -> Result<Tensor> {
    let (b, c, t, h, w) = latents.dims5()?;
    latents.reshape((b, c * t, h, w))?.avg_pool2d(2)?.reshape((b, c, t, h / 2, w / 2))
}

/// `[1, C, T, H, W]` to `factor` times the height and width, each cell repeated.
///
/// # Errors
/// When the shape or the device fails.
pub fn enlarge(latents: &Tensor, factor: usize) -> Result<Tensor> {
    let (b, c, t, h, w) = latents.dims5()?;
    let flat = latents.reshape((b, c * t, h, w))?;
    flat.upsample_nearest2d(h * factor, w * factor)?.reshape((b, c, t, h * factor, w * factor))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    #[test]
    fn shrinking_undoes_enlarging_and_averages_blocks() {
        let small = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((1, 2, 2, 2, 3)).unwrap();
        let back = shrink(&enlarge(&small, 2).unwrap()).unwrap();
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&back), flat(&small));
        let square = Tensor::from_vec(vec![1f32, 2.0, 3.0, 6.0], (1, 1, 1, 2, 2), &Device::Cpu).unwrap();
        assert_eq!(flat(&shrink(&square).unwrap()), [3.0]);
    }
}

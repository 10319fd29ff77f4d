//! Classifier-free guidance: away from what the negative prompt gives, towards what the prompt gives.

use candle_core::{Result, Tensor};

/// `negative + scale * (positive - negative)`.
///
/// # Errors
/// When the shapes differ.
pub fn guide(negative: &Tensor, positive: &Tensor, scale: f64) -> Result<Tensor> {
    negative + ((positive - negative)? * scale)?
}

/// Scales a guided prediction towards the spread of the unguided one, per sample ("Common Diffusion Noise Schedules and
/// Sample Steps are Flawed", section 3.4): `amount` 1 takes the spread over, 0 changes nothing.
///
/// # Errors
/// When the shapes differ.
pub fn rescale(guided: &Tensor, positive: &Tensor, amount: f64) -> Result<Tensor> {
    let ratio = spread(positive)?.div(&spread(guided)?)?;
    (guided.broadcast_mul(&ratio)? * amount)? + (guided * (1.0 - amount))?
}

/// The standard deviation (with n - 1) of each sample, `[B, 1, ...]`.
fn spread(x: &Tensor) -> Result<Tensor> {
    let batch = x.dim(0)?;
    let flat = x.flatten_from(1)?;
    let count = flat.dim(1)?;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
    let variance = (centred.sqr()?.sum_keepdim(1)? / (count.max(2) - 1) as f64)?;
    let mut shape = vec![1; x.rank()];
    shape[0] = batch;
    variance.sqrt()?.reshape(shape)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_full_rescale_takes_the_spread_of_the_prediction_over() {
        let positive = Tensor::new(&[[1.0f32, 2.0, 4.0], [0.0, 1.0, -1.0]], &Device::Cpu).unwrap();
        let guided = (&positive * 7.0).unwrap();
        let back = rescale(&guided, &positive, 1.0).unwrap().to_vec2::<f32>().unwrap();
        let want = positive.to_vec2::<f32>().unwrap();
        for (a, b) in back.iter().flatten().zip(want.iter().flatten()) {
            assert!((a - b).abs() < 1e-5);
        }
        let same = rescale(&guided, &positive, 0.0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(same, guided.to_vec2::<f32>().unwrap());
    }
}

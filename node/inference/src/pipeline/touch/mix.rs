//! Between two tensors: on a line, or on a sphere.

use candle_core::{DType, Device, Result, Tensor};

use super::super::GenerateRequest;
use crate::error::Error;
use crate::rng::{Stream, normal_tensor};

/// Below this sine two tensors point the same way or against each other, and no sphere is told by them.
const LEAST_SINE: f64 = 1e-6;

/// The way from one tensor to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `(1 - w) a + w b`.
    Line,
    /// Along the arc between them, each taken as one vector (Shoemake, "Animating Rotation with Quaternion Curves",
    /// 1985); a line where they point the same way.
    Sphere,
}

/// Between `a` at weight 0 and `b` at weight 1, which are exactly these; any other weight goes on beyond them.
///
/// # Errors
/// When the shapes differ.
pub fn mix(a: &Tensor, b: &Tensor, weight: f64, way: Way) -> Result<Tensor> {
    if weight == 0.0 {
        return Ok(a.clone());
    }
    if weight == 1.0 {
        return Ok(b.clone());
    }
    let (of_a, of_b) = match way {
        Way::Line => (1.0 - weight, weight),
        Way::Sphere => arc(a, b, weight)?,
    };
    let sum = ((a.to_dtype(DType::F32)? * of_a)? + (b.to_dtype(DType::F32)? * of_b)?)?;
    sum.to_dtype(a.dtype())
}

/// How much of each makes the point on the arc.
fn arc(a: &Tensor, b: &Tensor, weight: f64) -> Result<(f64, f64)> {
    let values = |tensor: &Tensor| -> Result<Vec<f32>> {
        tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
    };
    let (a, b) = (values(a)?, values(b)?);
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let cosine = dot(&a, &b) / (dot(&a, &a).sqrt() * dot(&b, &b).sqrt());
    let angle = cosine.clamp(-1.0, 1.0).acos();
    let sine = angle.sin();
    // Also where one of them is nothing and the angle no number.
    if sine.is_nan() || sine < LEAST_SINE {
        return Ok((1.0 - weight, weight));
    }
    Ok((((1.0 - weight) * angle).sin() / sine, (weight * angle).sin() / sine))
}

/// The noise of a request's seed, with that of its second seed mixed in; f32, on the CPU.
pub(crate) fn noise(request: &GenerateRequest, shape: &[usize]) -> Result<Tensor> {
    let of = |seed: u64| normal_tensor(seed, Stream::Initial, shape, &Device::Cpu);
    match &request.touch.noise {
        None => of(request.seed),
        Some(second) => mix(&of(request.seed)?, &of(second.seed)?, second.weight, second.way),
    }
}

/// A prompt as a text encoder gives it.
pub trait Embeds: Sized {
    /// Between this and another, as [`mix`].
    ///
    /// # Errors
    /// When the shapes differ.
    fn mixed(&self, other: &Self, weight: f64, way: Way) -> Result<Self>;

    /// A batch of this and another behind it.
    ///
    /// # Errors
    /// When the shapes differ.
    fn joined(&self, other: &Self) -> Result<Self>;
}

impl Embeds for Tensor {
    fn mixed(&self, other: &Self, weight: f64, way: Way) -> Result<Self> {
        mix(self, other, weight, way)
    }

    fn joined(&self, other: &Self) -> Result<Self> {
        Tensor::cat(&[self, other], 0)
    }
}

/// Embeddings with their mask. A token counts where it is one of either prompt; at the ends the mask is that prompt's own.
impl Embeds for (Tensor, Tensor) {
    fn mixed(&self, other: &Self, weight: f64, way: Way) -> Result<Self> {
        let mask = match weight {
            0.0 => self.1.clone(),
            1.0 => other.1.clone(),
            _ => self.1.maximum(&other.1)?,
        };
        Ok((mix(&self.0, &other.0, weight, way)?, mask))
    }

    fn joined(&self, other: &Self) -> Result<Self> {
        Ok((self.0.joined(&other.0)?, self.1.joined(&other.1)?))
    }
}

/// A request's prompt, with its second one mixed in.
pub(crate) fn prompt<T: Embeds>(
    request: &GenerateRequest,
    encode: impl Fn(&str) -> std::result::Result<T, Error>,
) -> std::result::Result<T, Error> {
    let first = encode(&request.prompt)?;
    match &request.touch.prompt {
        None => Ok(first),
        Some(second) => Ok(first.mixed(&encode(&second.prompt)?, second.weight, second.way)?),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.to_vec1().unwrap()
    }

    #[test]
    fn both_ways_end_exactly_where_they_should() {
        let (a, b) = (tensor(&[0.1, -7.3, 1e-20]), tensor(&[3.3, 0.7, -2.0]));
        for way in [Way::Line, Way::Sphere] {
            assert_eq!(values(&mix(&a, &b, 0.0, way).unwrap()), values(&a));
            assert_eq!(values(&mix(&a, &b, 1.0, way).unwrap()), values(&b));
        }
    }

    #[test]
    fn a_sphere_keeps_the_length_and_a_line_loses_it() {
        let (a, b) = (tensor(&[1.0, 0.0]), tensor(&[0.0, 1.0]));
        let length = |way| values(&mix(&a, &b, 0.5, way).unwrap()).iter().map(|x| x * x).sum::<f32>();
        assert!((length(Way::Sphere) - 1.0).abs() < 1e-6 && (length(Way::Line) - 0.5).abs() < 1e-6);
        let third = values(&mix(&a, &b, 1.0 / 3.0, Way::Sphere).unwrap());
        assert!((third[0] - 0.75f32.sqrt()).abs() < 1e-6 && (third[1] - 0.5).abs() < 1e-6, "{third:?}");
        let beyond = values(&mix(&a, &b, 2.0, Way::Sphere).unwrap());
        assert!((beyond[0] + 1.0).abs() < 1e-6 && beyond[1].abs() < 1e-6, "{beyond:?}");
    }

    #[test]
    fn where_no_sphere_is_told_the_way_is_a_line() {
        let (a, b) = (tensor(&[1.0, 2.0]), tensor(&[3.0, 6.0]));
        assert_eq!(values(&mix(&a, &b, 0.5, Way::Sphere).unwrap()), [2.0, 4.0]);
        let nothing = tensor(&[0.0, 0.0]);
        assert_eq!(values(&mix(&nothing, &b, 0.5, Way::Sphere).unwrap()), [1.5, 3.0]);
    }

    #[test]
    fn a_mixed_mask_holds_the_tokens_of_both_prompts() {
        let mask = |values: &[u8]| Tensor::new(values, &Device::Cpu).unwrap();
        let (a, b) = ((tensor(&[1.0, 0.0]), mask(&[1, 0])), (tensor(&[2.0, 2.0]), mask(&[1, 1])));
        let of = |weight| a.mixed(&b, weight, Way::Line).unwrap().1.to_vec1::<u8>().unwrap();
        assert_eq!((of(0.0), of(0.25), of(1.0)), (vec![1, 0], vec![1, 1], vec![1, 1]));
    }
}

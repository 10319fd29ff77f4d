//! Files of latents on the artist's machine: read, looked at, mixed and written, without a model.
//!
//! A safetensors file with one tensor `latents`, or with what a job gave back beside its final latents: `noise`, `step_N`
//! with what the sampler remembers there, and `final`. Numbers are read as f32, f16 or bf16 and written as f32.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// Greatest file that is read, bytes (1 GiB).
pub const MAX_FILE: u64 = 1 << 30;
/// Most tensors of a file.
const MAX_TENSORS: usize = 4096;
/// Below this sine two tensors tell no arc, and the way between them is a line.
const LEAST_SINE: f64 = 1e-6;
/// What a file says of itself.
const FORMAT: (&str, &str) = ("format", "kinoflock-latents-1");
/// Names of tensors that may be decoded, the best first.
const FINAL: [&str; 2] = ["final", "latents"];

/// Why a file is none of latents, or two do not go together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LatentsError {
    /// It cannot be read.
    #[error("{0}")]
    Read(#[from] std::io::Error),
    /// It is too large.
    #[error("{given} bytes exceed the limit of {limit} bytes")]
    TooLarge {
        /// Most bytes.
        limit: u64,
        /// Bytes of the file.
        given: u64,
    },
    /// It is no safetensors file.
    #[error("no safetensors file: {0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// It holds too many tensors.
    #[error("{given} tensors exceed the limit of {limit}")]
    TooMany {
        /// Most tensors.
        limit: usize,
        /// Tensors of the file.
        given: usize,
    },
    /// A tensor of numbers that are not read here.
    #[error("tensor {name:?} is {dtype}; F32, F16 or BF16 is needed")]
    Numbers {
        /// Which.
        name: String,
        /// Its numbers.
        dtype: String,
    },
    /// Two files hold different tensors.
    #[error("the files hold different tensors: {0:?} is in one of them only")]
    Alone(String),
    /// Two tensors of different shapes.
    #[error("tensor {name:?} has shape {first:?} in one file and {second:?} in the other")]
    Shapes {
        /// Which.
        name: String,
        /// In the first file.
        first: Vec<usize>,
        /// In the second.
        second: Vec<usize>,
    },
}

/// The way between two tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A line.
    Line,
    /// An arc, each tensor taken as one vector; a line where they point the same way.
    Arc,
}

/// A tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, the last dimension's beside each other.
    pub values: Vec<f32>,
}

/// What a tensor's values are like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Statistics {
    /// The mean.
    pub mean: f64,
    /// The standard deviation.
    pub deviation: f64,
    /// The least.
    pub least: f32,
    /// The greatest.
    pub greatest: f32,
    /// How many are no finite numbers; the others are not counted with them.
    pub not_finite: usize,
}

/// A file's tensors by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Latents(pub BTreeMap<String, Tensor>);

impl Latents {
    /// Reads a file.
    ///
    /// # Errors
    /// See [`LatentsError`].
    pub fn read(path: &Path) -> Result<Self, LatentsError> {
        let given = std::fs::metadata(path)?.len();
        if given > MAX_FILE {
            return Err(LatentsError::TooLarge { limit: MAX_FILE, given });
        }
        Self::parse(&std::fs::read(path)?)
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// See [`LatentsError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, LatentsError> {
        let file = SafeTensors::deserialize(bytes)?;
        if file.len() > MAX_TENSORS {
            return Err(LatentsError::TooMany { limit: MAX_TENSORS, given: file.len() });
        }
        let tensors = file.iter().map(|(name, view)| {
            let values = widened(&view).ok_or_else(|| LatentsError::Numbers {
                name: name.to_owned(),
                dtype: format!("{:?}", view.dtype()),
            })?;
            Ok((name.to_owned(), Tensor { shape: view.shape().to_vec(), values }))
        });
        tensors.collect::<Result<_, LatentsError>>().map(Self)
    }

    /// The bytes of a file with these tensors, f32.
    ///
    /// # Errors
    /// When a shape does not fit its values.
    pub fn to_bytes(&self) -> Result<Vec<u8>, LatentsError> {
        let bytes = |tensor: &Tensor| tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let data: Vec<Vec<u8>> = self.0.values().map(bytes).collect();
        let mut views = Vec::with_capacity(data.len());
        for ((name, tensor), data) in self.0.iter().zip(&data) {
            views.push((name.as_str(), TensorView::new(Dtype::F32, tensor.shape.clone(), data)?));
        }
        let metadata = HashMap::from([(FORMAT.0.to_owned(), FORMAT.1.to_owned())]);
        Ok(safetensors::serialize(views, Some(metadata))?)
    }

    /// Between this and another file, tensor by tensor: 0 is this one, 1 the other, exactly.
    ///
    /// # Errors
    /// When they do not hold the same tensors.
    pub fn mix(&self, other: &Self, weight: f64, way: Way) -> Result<Self, LatentsError> {
        let alone = |one: &Self, two: &Self| one.0.keys().find(|name| !two.0.contains_key(*name)).cloned();
        if let Some(name) = alone(self, other).or_else(|| alone(other, self)) {
            return Err(LatentsError::Alone(name));
        }
        let mixed = self.0.iter().map(|(name, first)| {
            let second = &other.0[name];
            if first.shape != second.shape {
                let (first, second) = (first.shape.clone(), second.shape.clone());
                return Err(LatentsError::Shapes { name: name.clone(), first, second });
            }
            let values = mix(&first.values, &second.values, weight, way);
            Ok((name.clone(), Tensor { shape: first.shape.clone(), values }))
        });
        mixed.collect::<Result<_, _>>().map(Self)
    }

    /// Channels, latent frames, rows and columns of what the file holds as a volume `[1, C, F, H, W]`: of its final
    /// latents, or of its noise.
    #[must_use]
    pub fn volume(&self) -> Option<[usize; 4]> {
        let named = FINAL.iter().chain(&["noise"]).find_map(|name| self.0.get(*name));
        match named?.shape.as_slice() {
            [1, channels, frames, rows, columns] => Some([*channels, *frames, *rows, *columns]),
            _ => None,
        }
    }
}

impl Tensor {
    /// What its values are like.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let finite = || self.values.iter().copied().filter(|value| value.is_finite());
        let count = finite().count();
        let mean = finite().map(f64::from).sum::<f64>() / count.max(1) as f64;
        let square = finite().map(|value| (f64::from(value) - mean).powi(2)).sum::<f64>();
        Statistics {
            mean,
            deviation: (square / count.max(1) as f64).sqrt(),
            least: finite().fold(f32::INFINITY, f32::min),
            greatest: finite().fold(f32::NEG_INFINITY, f32::max),
            not_finite: self.values.len() - count,
        }
    }
}

/// Between two lists of numbers of the same length; the ends are exactly these.
#[must_use]
pub fn mix(first: &[f32], second: &[f32], weight: f64, way: Way) -> Vec<f32> {
    if weight == 0.0 {
        return first.to_vec();
    }
    if weight == 1.0 {
        return second.to_vec();
    }
    let (a, b) = match way {
        Way::Line => (1.0 - weight, weight),
        Way::Arc => arc(first, second, weight),
    };
    first.iter().zip(second).map(|(x, y)| (f64::from(*x) * a + f64::from(*y) * b) as f32).collect()
}

fn arc(first: &[f32], second: &[f32], weight: f64) -> (f64, f64) {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let lengths = dot(first, first).sqrt() * dot(second, second).sqrt();
    let angle = (dot(first, second) / lengths).clamp(-1.0, 1.0).acos();
    let sine = angle.sin();
    if sine.is_nan() || sine < LEAST_SINE {
        return (1.0 - weight, weight);
    }
    (((1.0 - weight) * angle).sin() / sine, (weight * angle).sin() / sine)
}

/// A tensor's numbers as f32.
fn widened(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let data = view.data();
    let halves = || data.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
    match view.dtype() {
        Dtype::F32 => Some(data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
        Dtype::BF16 => Some(halves().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect()),
        Dtype::F16 => Some(halves().map(of_half).collect()),
        _ => None,
    }
}

/// An IEEE half-precision number.
fn of_half(bits: u16) -> f32 {
    const SMALLEST: f32 = 1.0 / 16_777_216.0;
    let (exponent, fraction) = ((bits >> 10) & 0x1f, u32::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => fraction as f32 * SMALLEST,
        0x1f => f32::from_bits(0x7f80_0000 | (fraction << 13)),
        _ => f32::from_bits(((u32::from(exponent) + 112) << 23) | (fraction << 13)),
    };
    if bits & 0x8000 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn file(tensors: &[(&str, &[f32])]) -> Latents {
        let tensor = |values: &[f32]| Tensor { shape: vec![values.len()], values: values.to_vec() };
        Latents(tensors.iter().map(|(name, values)| ((*name).to_owned(), tensor(values))).collect())
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        let written = file(&[("noise", &[1.5, -0.0, f32::MIN_POSITIVE]), ("final", &[7.0])]);
        let bytes = written.to_bytes().unwrap();
        assert_eq!(Latents::parse(&bytes).unwrap(), written);
        assert_eq!(written.to_bytes().unwrap(), bytes);
        for end in 0..bytes.len() {
            assert!(Latents::parse(&bytes[..end]).is_err());
        }
    }

    #[test]
    fn the_ends_of_both_ways_are_the_files_themselves_and_between_them_an_arc_keeps_the_length() {
        let (a, b) = (file(&[("latents", &[3.0, 0.1])]), file(&[("latents", &[-0.2, 4.0])]));
        for way in [Way::Line, Way::Arc] {
            assert_eq!(a.mix(&b, 0.0, way).unwrap(), a);
            assert_eq!(a.mix(&b, 1.0, way).unwrap(), b);
        }
        let middle = mix(&[1.0, 0.0], &[0.0, 1.0], 0.5, Way::Arc);
        assert!(middle.iter().all(|value| (value - 0.5f32.sqrt()).abs() < 1e-6), "{middle:?}");
        assert_eq!(mix(&[1.0, 0.0], &[0.0, 1.0], 0.5, Way::Line), [0.5, 0.5]);
        assert_eq!(mix(&[1.0, 2.0], &[2.0, 4.0], 0.5, Way::Arc), [1.5, 3.0]);
        assert_eq!(mix(&[0.0, 0.0], &[2.0, 4.0], 0.5, Way::Arc), [1.0, 2.0]);
        assert_eq!(mix(&[1.0], &[2.0], -1.0, Way::Line), [0.0]);
    }

    #[test]
    fn files_that_do_not_go_together_are_told_apart() {
        let (a, b) = (file(&[("noise", &[1.0])]), file(&[("noise", &[1.0, 2.0])]));
        let told = |other: &Latents| a.mix(other, 0.5, Way::Line).unwrap_err().to_string();
        assert!(told(&b).contains("shape [1] in one file and [2] in the other"));
        assert!(told(&file(&[("final", &[1.0])])).contains("\"noise\" is in one of them only"));
    }

    #[test]
    fn half_precision_numbers_are_widened_exactly() {
        let of = |bits: u16| of_half(bits);
        assert_eq!([of(0x3c00), of(0xc000), of(0x7bff), of(0x0001)], [1.0, -2.0, 65504.0, 2f32.powi(-24)]);
        assert_eq!(of(0x03ff), 1023.0 * 2f32.powi(-24));
        assert!(
            of(0x7c00).is_infinite() && of(0x7e00).is_nan() && of(0x8000).to_bits() == (-0.0f32).to_bits()
        );
        let bytes = [0x80, 0x3f, 0x00, 0xc0];
        let view = TensorView::new(Dtype::BF16, vec![2], &bytes).unwrap();
        assert_eq!(widened(&view).unwrap(), [1.0, -2.0]);
        let whole = [1u8; 8];
        let bytes =
            safetensors::serialize([("x", TensorView::new(Dtype::I64, vec![1], &whole).unwrap())], None);
        assert!(Latents::parse(&bytes.unwrap()).unwrap_err().to_string().contains("\"x\" is I64"));
    }

    #[test]
    fn statistics_leave_out_what_is_no_number_and_count_it() {
        let tensor = &file(&[("x", &[1.0, 3.0, f32::NAN, f32::INFINITY])]).0["x"];
        let found = tensor.statistics();
        assert_eq!((found.mean, found.deviation, found.least, found.greatest), (2.0, 1.0, 1.0, 3.0));
        assert_eq!(found.not_finite, 2);
    }
}

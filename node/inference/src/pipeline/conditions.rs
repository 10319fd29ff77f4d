//! Pictures that frames of a clip are to show: what a request says of them, which of it a model takes, and how they
//! reach an autoencoder.

use candle_core::{DType, Device, Tensor};

use super::GenerateRequest;
use crate::error::Error;
use crate::rng::{Stream, normal_tensor};

/// Pictures that a stretch of a clip is to show.
#[derive(Debug, Clone)]
pub struct Condition {
    /// `[n, 3, height, width]` with values in 0 to 1: one picture, or a clip's frames in their order.
    pub pictures: Tensor,
    /// The frame that shows the first of them, zero-based.
    pub frame: usize,
    /// How strongly: 1 is fully, 0 not at all.
    pub strength: f64,
}

impl Condition {
    /// Pictures from a frame on, fully.
    #[must_use]
    pub fn new(pictures: Tensor, frame: usize) -> Self {
        Self { pictures, frame, strength: 1.0 }
    }

    /// How many pictures.
    #[must_use]
    pub fn count(&self) -> usize {
        self.pictures.dims().first().copied().unwrap_or(0)
    }

    /// The first `count` pictures as autoencoders take them, `[1, 3, count, height, width]` of -1 to 1.
    ///
    /// # Errors
    /// When there are fewer, or the device has no room.
    pub fn video(&self, count: usize, device: &Device, dtype: DType) -> candle_core::Result<Tensor> {
        let pixels = self.pictures.narrow(0, 0, count)?.to_device(device)?.to_dtype(DType::F32)?;
        pixels.affine(2.0, -1.0)?.to_dtype(dtype)?.transpose(0, 1)?.unsqueeze(0)?.contiguous()
    }
}

/// Which pictures a model takes beside the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// None, and what is said to who gives one.
    Nothing(&'static str),
    /// One that the clip begins with.
    First {
        /// Whether it must be given.
        needed: bool,
    },
    /// One that the clip begins with, and one that it ends with where that is given too.
    Ends {
        /// Whether the first must be given.
        needed: bool,
    },
    /// One that the clip begins with and one that it ends with; both must be given.
    Both,
    /// Any number of pictures and stretches of clips, at any frames, of any strength.
    Any,
}

impl Takes {
    /// What most models take.
    pub const NOTHING: Self = Self::Nothing("takes no picture, and one was given");
}

const BOTH: &str = "needs a picture to begin with and one to end with, fully";

/// Checks a request's pictures against each other, its sizes, and what a model takes.
pub(super) fn check(architecture: &str, takes: Takes, request: &GenerateRequest) -> Result<(), Error> {
    for condition in &request.conditions {
        check_one(condition, request)?;
    }
    let scale = request.condition_noise_scale;
    if !scale.is_finite() {
        let rule = "it must be a finite number";
        return Err(Error::Number { field: "condition_noise_scale", given: scale, rule });
    }
    let is_at = |condition: &Condition, frame: usize| {
        condition.frame == frame && condition.count() == 1 && condition.strength >= 1.0
    };
    let rule = match (takes, request.conditions.as_slice()) {
        (Takes::First { needed: true } | Takes::Ends { needed: true }, []) => {
            "needs a picture to begin with, and none was given"
        }
        (Takes::Both, []) => BOTH,
        (_, []) | (Takes::Any, _) => return Ok(()),
        (Takes::First { .. } | Takes::Ends { .. }, [first]) if is_at(first, 0) => return Ok(()),
        (Takes::Ends { .. } | Takes::Both, [first, last])
            if is_at(first, 0) && is_at(last, request.frames - 1) =>
        {
            return Ok(());
        }
        (Takes::Nothing(rule), _) => rule,
        (Takes::Both, _) => BOTH,
        (Takes::First { .. }, _) => "takes one picture, fully, which a clip begins with",
        (Takes::Ends { .. }, _) => {
            "takes one picture that a clip begins with and one that it ends with, fully"
        }
    };
    Err(Error::Image { architecture: architecture.to_owned(), rule })
}

fn check_one(condition: &Condition, request: &GenerateRequest) -> Result<(), Error> {
    let given = condition.pictures.dims().to_vec();
    let needed = vec![condition.count().max(1), 3, request.height, request.width];
    if given != needed {
        return Err(Error::LatentShape { what: "a picture", given, needed });
    }
    if condition.frame >= request.frames {
        let (given, rule) = (condition.frame as f64, "the clip does not reach it");
        return Err(Error::Number { field: "frame of a picture", given, rule });
    }
    if !(0.0..=1.0).contains(&condition.strength) {
        let (given, rule) = (condition.strength, "it must be in 0 to 1");
        return Err(Error::Number { field: "strength of a picture", given, rule });
    }
    Ok(())
}

/// Draw `index` of the noise with which pictures become latents: the request's, or a stream of its seed; f32.
///
/// # Errors
/// [`Error::LatentShape`] for given noise of another shape, or when the device has no room.
pub fn condition_noise(
    request: &GenerateRequest,
    index: usize,
    shape: &[usize],
    device: &Device,
) -> Result<Tensor, Error> {
    match request.condition_noise.get(index) {
        None => Ok(normal_tensor(request.seed, Stream::Image(index as u32), shape, device)?),
        Some(noise) if noise.dims() == shape => Ok(noise.to_dtype(DType::F32)?.to_device(device)?),
        Some(noise) => {
            let (given, needed) = (noise.dims().to_vec(), shape.to_vec());
            Err(Error::LatentShape { what: "condition_noise", given, needed })
        }
    }
}

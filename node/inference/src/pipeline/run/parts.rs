//! What the parts of several models have in common.

use candle_core::{DType, Tensor};

use crate::error::Error;
use crate::pipeline::{GenerateRequest, Observer, touch};

/// The latents that a run begins with: noise from the seed as a volume `[1, C, F, H, W]`, or the request's, given as
/// that volume or in the model's own shape. `own` brings a volume into that shape.
///
/// # Errors
/// [`Error::LatentShape`] for given latents of another shape.
pub fn initial(
    request: &GenerateRequest,
    volume: &[usize],
    own_shape: &[usize],
    own: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor, Error> {
    match &request.initial_latents {
        None => Ok(own(&touch::noise(request, volume)?)?),
        Some(given) if given.dims() == own_shape => Ok(given.to_dtype(DType::F32)?.contiguous()?),
        Some(given) if given.dims() == volume => Ok(own(&given.to_dtype(DType::F32)?)?),
        Some(given) => {
            let (given, needed) = (given.dims().to_vec(), volume.to_vec());
            Err(Error::LatentShape { what: "initial_latents", given, needed })
        }
    }
}

/// Runs a decode in pieces: `decode` is given a function to call between pieces, which fails once the observer wants to
/// stop; that failure becomes [`Error::Cancelled`].
///
/// # Errors
/// What `decode` reports, or a cancel.
pub fn watched<T>(
    observer: &dyn Observer,
    decode: impl FnOnce(&mut dyn FnMut() -> candle_core::Result<()>) -> candle_core::Result<T>,
) -> Result<T, Error> {
    let mut stopped = false;
    let mut watch = || {
        stopped = stopped || observer.cancelled();
        if stopped { candle_core::bail!("cancelled") } else { Ok(()) }
    };
    let decoded = decode(&mut watch);
    match decoded {
        Err(_) if stopped => Err(Error::Cancelled { steps_done: 0, steps: 0 }),
        other => Ok(other?),
    }
}

/// A decoded video `(1, 3, frames, height, width)` of -1 to 1 as pictures `[frames, 3, height, width]` of 0 to 1, f32.
/// They are made one by one, so that besides the video only they are held.
///
/// # Errors
/// What the device reports.
pub fn pictures(video: Tensor) -> candle_core::Result<Tensor> {
    let frames = video.squeeze(0)?.transpose(0, 1)?;
    drop(video);
    let one = |index: usize| {
        let frame = frames.narrow(0, index, 1)?.to_dtype(DType::F32)?;
        frame.affine(0.5, 0.5)?.clamp(0f32, 1f32)
    };
    let made = (0..frames.dim(0)?).map(one).collect::<candle_core::Result<Vec<_>>>()?;
    drop(frames);
    Tensor::cat(&made, 0)
}

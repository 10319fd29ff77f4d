//! What the parts of several models have in common.

use candle_core::{DType, Tensor};

use super::VideoModel;
use crate::error::Error;
use crate::pipeline::{GenerateRequest, touch};
use crate::sink::whole;

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

/// The frames of a volume as pictures `[frames, 3, height, width]` of 0 to 1, f32.
///
/// # Errors
/// What the device reports.
pub fn decoded<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    volume: &Tensor,
) -> Result<Tensor, Error> {
    let video = whole(|sink| model.decode(request, volume, sink))?.squeeze(0)?.transpose(0, 1)?;
    Ok(video.to_dtype(DType::F32)?.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
}

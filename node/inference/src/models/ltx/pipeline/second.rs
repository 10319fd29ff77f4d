//! A second pass: a run that goes on from finished latents, of the clip's size or of half of it.
//!
//! Latents of half the size are first made larger by the folder's upsampler, as `LTXLatentUpsamplePipeline` does it; then
//! they are hidden under as much noise as the last part of the schedule takes away, as `LTXConditionPipeline` does it.

use std::path::Path;

use candle_core::{DType, Tensor};

use super::{LtxPipeline, pack};
use crate::error::Error;
use crate::models::ltx::upsampler::{UpsamplerConfig, adapt, load_upsampler, tone_map};
use crate::pipeline::latents::Volume;
use crate::pipeline::{GenerateRequest, SecondPass};
use crate::sampler::Schedule;

/// Checks what a second pass goes on from.
pub(super) fn check(model: &LtxPipeline, request: &GenerateRequest, volume: &Volume) -> Result<(), Error> {
    if request.second_pass.is_none() {
        return Ok(());
    }
    let Some(given) = &request.initial_latents else { return Ok(()) };
    let whole = [volume.shape(), volume.packed_shape()];
    if whole.iter().any(|shape| given.dims() == shape) || is_small(model.upsampler.as_ref(), given, volume) {
        return Ok(());
    }
    let (given, needed) = (given.dims().to_vec(), volume.shape());
    Err(Error::LatentShape { what: "initial_latents", given, needed })
}

/// Whether latents become the clip's size when they are upsampled.
fn is_small(upsampler: Option<&UpsamplerConfig>, given: &Tensor, volume: &Volume) -> bool {
    let Some(config) = upsampler else { return false };
    match *given.dims() {
        [1, channels, frames, rows, columns] => {
            channels == volume.channels && config.grown([frames, rows, columns]) == volume.cells
        }
        _ => false,
    }
}

/// The folder's upsampler, where a request needs it.
pub(super) fn needed(
    folder: &Path,
    request: &GenerateRequest,
    volume: &Volume,
) -> Result<Option<UpsamplerConfig>, Error> {
    let (Some(_), Some(given)) = (&request.second_pass, &request.initial_latents) else { return Ok(None) };
    let found = UpsamplerConfig::find(folder)?;
    Ok(found.filter(|config| is_small(Some(config), given, volume)))
}

/// The last part of a schedule, of at least one step.
pub(super) fn part(schedule: Schedule, request: &GenerateRequest) -> Result<Schedule, Error> {
    let Some(second) = &request.second_pass else { return Ok(schedule) };
    let steps = schedule.steps();
    Ok(schedule.without_first(steps - second.steps_of(steps)?))
}

/// The normalised latents that a second pass goes on from, packed, f32 on the model's device.
pub(super) fn clean(
    model: &LtxPipeline,
    request: &GenerateRequest,
    volume: &Volume,
) -> Result<Option<Tensor>, Error> {
    let (Some(second), Some(given)) = (&request.second_pass, &request.initial_latents) else {
        return Ok(None);
    };
    let given = given.to_dtype(DType::F32)?.to_device(&model.base.device)?;
    if given.dims() == volume.packed_shape() {
        return Ok(Some(given.contiguous()?));
    }
    let is_small = is_small(model.upsampler.as_ref(), &given, volume);
    let whole = if is_small { upsample(model, second, &given)? } else { given };
    Ok(Some(pack(&whole, volume.patch)?))
}

/// Noise over clean tokens, at a noise level.
pub(super) fn hide(clean: &Tensor, noise: &Tensor, sigma: f32) -> candle_core::Result<Tensor> {
    let sigma = f64::from(sigma);
    (noise * sigma)? + (clean * (1.0 - sigma))?
}

fn upsample(model: &LtxPipeline, second: &SecondPass, latents: &Tensor) -> Result<Tensor, Error> {
    let upsampler = load_upsampler(&model.folder, &model.options)?;
    let upsampler = upsampler.ok_or_else(|| Error::SecondPass {
        architecture: model.base.info.architecture.clone(),
        rule: "has no latent upsampler any more",
    })?;
    let vae = model.vae.get()?;
    let latents = vae.denormalize(latents)?;
    let mut large = upsampler.forward(&latents.to_dtype(model.base.dtype)?)?.to_dtype(DType::F32)?;
    if second.adain > 0.0 {
        large = adapt(&large, &latents, second.adain)?;
    }
    if second.tone_map > 0.0 {
        large = tone_map(&large, second.tone_map)?;
    }
    let made = vae.normalize(&large)?;
    model.vae.give_back();
    Ok(made)
}

impl LtxPipeline {
    /// Normalised latents `[1, C, F, H, W]` at twice the size.
    ///
    /// # Errors
    /// When the folder has no upsampler, or what the device reports.
    pub fn upsample(&self, second: &SecondPass, latents: &Tensor) -> Result<Tensor, Error> {
        upsample(self, second, &latents.to_device(&self.base.device)?)
    }

    /// Tokens after those that stand before the clip's own, put over clean ones at the first noise level.
    pub(super) fn enter_second(
        &self,
        plan: &super::parts::Plan,
        clean: &Tensor,
        latents: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let own = clean.dim(1)?;
        let extra = latents.dim(1)? - own;
        let hidden = hide(clean, &latents.narrow(1, extra, own)?, plan.schedule.sigmas[0])?;
        if extra == 0 {
            return Ok(hidden);
        }
        Tensor::cat(&[latents.narrow(1, 0, extra)?, hidden], 1)
    }
}

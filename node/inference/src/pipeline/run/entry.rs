//! Where a run begins: with noise, within its schedule, or behind its last step.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::film::Film;
use super::{State, VideoModel};
use crate::error::Error;
use crate::frames::RgbFrames;
use crate::pipeline::latents::Volume;
use crate::pipeline::{GenerateRequest, Generated, Observer, Phase};
use crate::sampler::checkpoint::latents_bytes;

/// The latents that a run begins with, f32, on the CPU, and how many steps lie behind them.
pub(super) fn begin<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    plan: &M::Plan,
) -> Result<(Tensor, usize), Error> {
    let touch = &request.touch;
    let (latents, done) = if let Some(latents) = &touch.decode_only {
        (home(latents)?, model.course(plan).steps())
    } else if let Some(start) = &touch.start {
        (home(&start.latents)?, start.done)
    } else if request.second_pass.is_some() && model.hides() {
        hidden(model, request, plan)?
    } else {
        (model.begin(request, plan)?, 0)
    };
    if touch.decode_only.is_none() && touch.channels.is_due(Some(done)) {
        let channels = model.facts().work.latent_channels;
        return Ok((touch.channels.apply(&latents, model.channel_axis(), channels)?, done));
    }
    Ok((latents, done))
}

/// The same as a state, on the model's device.
pub(super) fn state<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    plan: &M::Plan,
) -> Result<(State, usize), Error> {
    let (latents, done) = begin(model, request, plan)?;
    let here = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_device(model.device());
    let mut memory = BTreeMap::new();
    for (name, tensor) in request.touch.start.iter().flat_map(|start| &start.memory) {
        memory.insert(name.clone(), here(tensor)?);
    }
    Ok((State { latents: here(&latents)?, memory }, done))
}

/// Finished latents under as much noise as the last part of the schedule takes away.
fn hidden<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    plan: &M::Plan,
) -> Result<(Tensor, usize), Error> {
    let second = request.second_pass.as_ref().expect("invariant: asked for such a request alone");
    let plain =
        |latents: &Option<Tensor>| GenerateRequest { initial_latents: latents.clone(), ..request.clone() };
    let clean = model.begin(&plain(&request.initial_latents), plan)?;
    let noise = model.begin(&plain(&second.noise), plan)?;
    let steps = model.course(plan).steps();
    let done = steps - second.steps_of(steps)?;
    Ok((model.hide(plan, done, &clean, &noise)?, done))
}

fn home(latents: &Tensor) -> candle_core::Result<Tensor> {
    latents.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()
}

/// The final volume with what is done to its channels before the decode, on the device where it was.
pub(super) fn finished<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    volume: Tensor,
) -> Result<Tensor, Error> {
    let channels = &request.touch.channels;
    if !channels.is_due(None) {
        return Ok(volume);
    }
    Ok(channels.apply(&volume, 1, model.facts().work.latent_channels)?)
}

/// Makes frames of the request's latents, and computes no step.
pub(super) fn decoded<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    plan: &M::Plan,
    observer: &mut dyn Observer,
) -> Result<Generated, Error> {
    let (given, steps) = begin(model, request, plan)?;
    let start_hash = *blake3::hash(&latents_bytes(&given)?).as_bytes();
    let is_volume = given.dims() == Volume::new(&model.facts().work, request).shape();
    let volume = if is_volume { given } else { model.volume(plan, &given)? };
    let latents = finished(model, request, volume)?;
    let frames = frames(model, request, &latents, steps, observer)?;
    let kept = BTreeMap::new();
    Ok(Generated { frames, latents, start_hash, step_hashes: Vec::new(), steps_done: 0, kept })
}

/// A volume's frames, or none where the request wants none.
pub(super) fn frames<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    volume: &Tensor,
    steps: usize,
    observer: &mut dyn Observer,
) -> Result<RgbFrames, Error> {
    if request.decode.skip {
        return Ok(RgbFrames { width: request.width, height: request.height, count: 0, data: Vec::new() });
    }
    observer.phase(Phase::Decode);
    if observer.cancelled() {
        return Err(Error::Cancelled { steps_done: steps, steps });
    }
    let mut film = Film::new(request, observer);
    let decoded = model.decode(request, volume, &mut film);
    model.give_back(Phase::Decode);
    film.develop(decoded, steps).map_err(|error| super::during(error, "decoding"))
}

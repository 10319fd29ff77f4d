//! What a run commits to, and one step of it computed anew.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::check::check;
use super::digest::digest;
use super::film::Film;
use super::{State, VideoModel, entry, settle};
use crate::audit::{Commitment, Transition};
use crate::error::Error;
use crate::frames::RgbFrames;
use crate::pipeline::{GenerateRequest, Phase, Silent};

pub(super) fn commitment<M: VideoModel>(model: &M, request: &GenerateRequest) -> Result<Commitment, Error> {
    let plan = check(model, request)?;
    let course = model.course(&plan);
    let points = course.sigmas.iter().chain(course.timesteps).flat_map(|point| point.to_le_bytes());
    let mut hasher = blake3::Hasher::new();
    hasher.update(course.sampler.as_bytes()).update(&points.collect::<Vec<_>>());
    let sampler = |index: usize| {
        let mut place = hasher.clone();
        *place.update(&(index as u64).to_le_bytes()).finalize().as_bytes()
    };
    let samplers = (0..=course.steps()).map(sampler).collect();
    Ok(Commitment { conditioning: digest(request, &course)?, samplers })
}

pub(super) fn transition<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    index: usize,
    latents: &Tensor,
) -> Result<Transition, Error> {
    let plan = check(model, request)?;
    if index >= model.course(&plan).steps() {
        let rule = "it must be below the number of steps";
        return Err(Error::Number { field: "audited step", given: index as f64, rule });
    }
    let touch = &request.touch;
    let is_within = touch.start.is_some() || touch.decode_only.is_some() || request.second_pass.is_some();
    let is_alone = !is_within && !touch.channels.is_due(Some(index + 1));
    let Some(change) = model.change(&plan, index).filter(|_| is_alone) else {
        return Err(Error::NotAuditable { architecture: model.facts().architecture.clone() });
    };
    let latents = checked(latents, model.latents_shape(&plan, index))?.to_device(model.device())?;
    let request = &settle(model, request)?;
    let _beside = model.places().apply(&request.adapters)?;
    let context = model.context(request, &plan)?;
    let state = State { latents, memory: BTreeMap::new() };
    let output = model.output(request, &plan, &context, index, &state);
    model.give_back(Phase::Step);
    let output = output?;
    Ok(Transition { output: output.to_device(&Device::Cpu)?, change })
}

pub(super) fn frames<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    latents: &Tensor,
) -> Result<RgbFrames, Error> {
    let plan = check(model, request)?;
    let latents = checked(latents, model.latents_shape(&plan, model.course(&plan).steps()))?;
    let volume = entry::finished(model, request, model.volume(&plan, &latents)?)?;
    let request = &settle(model, request)?;
    let mut silent = Silent;
    let mut film = Film::new(request, &mut silent);
    let decoded = model.decode(request, &volume, &mut film);
    model.give_back(Phase::Decode);
    film.develop(decoded, model.course(&plan).steps())
}

fn checked(latents: &Tensor, needed: Vec<usize>) -> Result<Tensor, Error> {
    if latents.dims() != needed {
        let given = latents.dims().to_vec();
        return Err(Error::LatentShape { what: "the audited latents", given, needed });
    }
    Ok(latents.to_dtype(DType::F32)?.contiguous()?)
}

//! What a run commits to, and one step of it computed anew.

use candle_core::{DType, Device, Tensor};

use super::run::{self, Context, Volume, velocity};
use super::{LtxClass, LtxPipeline, unpack};
use crate::audit::{Commitment, Transition};
use crate::error::Error;
use crate::frames::RgbFrames;
use crate::pipeline::{GenerateRequest, Silent};

pub(super) fn commitment(model: &LtxPipeline, request: &GenerateRequest) -> Result<Commitment, Error> {
    let schedule = run::schedule(model, request)?;
    let points = schedule.sigmas.iter().chain(&schedule.timesteps).flat_map(|point| point.to_le_bytes());
    let class = match model.class {
        LtxClass::Text => b"text",
        LtxClass::Condition => b"cond",
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"flow-match-euler\0").update(class).update(&points.collect::<Vec<_>>());
    let sampler = |index: usize| {
        let mut place = hasher.clone();
        *place.update(&(index as u64).to_le_bytes()).finalize().as_bytes()
    };
    let samplers = (0..=schedule.steps()).map(sampler).collect();
    Ok(Commitment { conditioning: run::digest(request, &schedule)?, samplers })
}

pub(super) fn start(model: &LtxPipeline, request: &GenerateRequest) -> Result<Tensor, Error> {
    run::begin(request, &Volume::of(model, request))
}

pub(super) fn transition(
    model: &LtxPipeline,
    request: &GenerateRequest,
    index: usize,
    latents: &Tensor,
) -> Result<Transition, Error> {
    run::check(model, request)?;
    let schedule = run::schedule(model, request)?;
    if index >= schedule.steps() {
        let rule = "it must be below the number of steps";
        return Err(Error::Number { field: "audited step", given: index as f64, rule });
    }
    let volume = Volume::of(model, request);
    let latents = checked(latents, &volume)?.to_device(&model.device)?;
    let context = Context::new(model, request, &volume)?;
    let output = velocity(model, request, &schedule, &context, index, &latents)?;
    let change = match model.class {
        LtxClass::Text => schedule.change(index),
        LtxClass::Condition => schedule.change_from_timestep(index),
    };
    Ok(Transition { output: output.to_device(&Device::Cpu)?, change })
}

pub(super) fn frames(
    model: &LtxPipeline,
    request: &GenerateRequest,
    latents: &Tensor,
) -> Result<RgbFrames, Error> {
    let volume = Volume::of(model, request);
    let latents = unpack(&checked(latents, &volume)?, volume.cells, volume.patch)?;
    Ok(RgbFrames::from_unit(&run::decode(model, request, &latents, &Silent)?)?)
}

fn checked(latents: &Tensor, volume: &Volume) -> Result<Tensor, Error> {
    if latents.dims() != volume.packed_shape() {
        let (given, needed) = (latents.dims().to_vec(), volume.packed_shape());
        return Err(Error::LatentShape { what: "the audited latents", given, needed });
    }
    Ok(latents.to_dtype(DType::F32)?.contiguous()?)
}

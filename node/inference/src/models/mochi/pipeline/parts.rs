//! Mochi's parts of a run: its schedule, the guided velocity, its step, its decode.

use candle_core::{DType, Device, Tensor};

use super::MochiPipeline;
use crate::adapter::Places;
use crate::error::Error;
use crate::models::mochi::rope::RopeTables;
use crate::models::mochi::transformer::TextContext;
use crate::offload::Placement;
use crate::pipeline::latents::{LatentRgb, Volume, pack, unpack};
use crate::pipeline::run::{Course, State, VideoModel, initial};
use crate::pipeline::{GenerateRequest, Phase, PipelineInfo, touch};
use crate::sampler::guidance::{guide, rescale};
use crate::sampler::{Schedule, ScheduleRequest, linear_quadratic};
use crate::sink::Sink;
use crate::tiling::Tiling;

/// Noise that is taken away in the linear half of the steps.
const LINEAR_THRESHOLD: f64 = 0.025;

/// What follows from a request without the network.
pub struct Plan {
    schedule: Schedule,
    /// Noise levels, 1 at first and 0 at last, whichever way the scheduler counts.
    levels: Vec<f32>,
    volume: Volume,
}

/// What stays the same over all steps.
pub struct Context {
    text: TextContext,
    rope: RopeTables,
    guided: bool,
}

impl VideoModel for MochiPipeline {
    type Plan = Plan;
    type Context = Context;

    fn facts(&self) -> &PipelineInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn give_back(&self, phase: Phase) {
        match phase {
            Phase::Text => self.text.give_back(),
            Phase::Step => self.transformer.give_back(),
            Phase::Decode => self.vae.give_back(),
            Phase::Load => {}
        }
    }

    fn places(&self) -> &Places {
        &self.places
    }

    fn prompt_tokens(&self, prompt: &str) -> Result<usize, Error> {
        self.text.tokens(prompt)
    }

    fn prompt_fits(&self, prompt: &str, truncate: bool) -> Result<(), Error> {
        self.text.check(prompt, truncate)
    }

    fn hides(&self) -> bool {
        true
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Plan, Error> {
        let schedule = schedule(self, request)?;
        let level = |&sigma: &f32| if self.scheduler.invert_sigmas { 1.0 - sigma } else { sigma };
        let levels = schedule.sigmas.iter().map(level).collect();
        Ok(Plan { schedule, levels, volume: Volume::new(&self.info.work, request) })
    }

    fn course<'a>(&self, plan: &'a Plan) -> Course<'a> {
        let sampler = "flow-match-euler\0mochi";
        Course { sampler, sigmas: &plan.levels, timesteps: &plan.schedule.timesteps }
    }

    fn latents_shape(&self, plan: &Plan, _done: usize) -> Vec<usize> {
        plan.volume.packed_shape()
    }

    fn begin(&self, request: &GenerateRequest, plan: &Plan) -> Result<Tensor, Error> {
        let volume = &plan.volume;
        initial(request, &volume.shape(), &volume.packed_shape(), |noise| pack(noise, volume.patch))
    }

    fn channel_axis(&self) -> usize {
        2
    }

    fn context(&self, request: &GenerateRequest, plan: &Plan) -> Result<Context, Error> {
        let guided = self.is_guided(request);
        let encode = |prompt: &str| self.encode_prompt(prompt, request.truncate_prompt);
        let (mut text, mut mask) = touch::prompt(request, encode)?;
        if guided {
            let (negative, its_mask) = encode(&request.negative_prompt)?;
            text = Tensor::cat(&[negative, text], 0)?;
            mask = Tensor::cat(&[its_mask, mask], 0)?;
        }
        self.text.give_back();
        let transformer = self.transformer.get()?;
        let mut text = transformer.text_context(&text, &mask)?;
        text.route = request.touch.route.clone();
        Ok(Context { text, rope: transformer.rope(plan.volume.grid())?, guided })
    }

    fn output(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        context: &Context,
        index: usize,
        state: &State,
    ) -> Result<Tensor, Error> {
        let latents = &state.latents;
        let batch = if context.guided { 2 } else { 1 };
        let input = if context.guided { Tensor::cat(&[latents, latents], 0)? } else { latents.clone() };
        let timesteps = Tensor::from_vec(vec![plan.schedule.timesteps[index]; batch], batch, &Device::Cpu)?;
        let velocity = self.transformer.get()?.forward(&input, &timesteps, &context.text, &context.rope)?;
        let velocity = velocity.to_dtype(DType::F32)?;
        if !context.guided {
            return Ok(velocity);
        }
        let (negative, positive) = (velocity.narrow(0, 0, 1)?, velocity.narrow(0, 1, 1)?);
        let scale = request.guidance_at(index, plan.schedule.steps(), request.guidance);
        let guided = guide(&negative, &positive, scale)?;
        if request.guidance_rescale > 0.0 {
            return Ok(rescale(&guided, &positive, request.guidance_rescale)?);
        }
        Ok(guided)
    }

    fn advance(
        &self,
        _request: &GenerateRequest,
        plan: &Plan,
        _context: &Context,
        index: usize,
        state: &mut State,
        output: &Tensor,
    ) -> Result<Tensor, Error> {
        let sigmas = &plan.schedule.sigmas;
        let rest = f64::from(sigmas[sigmas.len() - 1] - sigmas[index]);
        let predicted = (&state.latents + (output * rest)?)?;
        state.latents = plan.schedule.step(index, &state.latents, output)?;
        Ok(predicted)
    }

    fn change(&self, plan: &Plan, index: usize) -> Option<f32> {
        Some(plan.schedule.change(index))
    }

    fn colours(&self) -> &LatentRgb {
        &self.latent_rgb
    }

    fn volume(&self, plan: &Plan, latents: &Tensor) -> Result<Tensor, Error> {
        Ok(unpack(latents, plan.volume.cells, plan.volume.patch)?)
    }

    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error> {
        let vae = self.vae.get()?;
        let z = vae.denormalize(&volume.to_device(&self.device)?)?.to_dtype(self.dtype)?;
        let tiling = Tiling { tile: request.decode.tile, chunk: request.decode.chunk };
        Ok(vae.decode(&z, tiling, sink)?)
    }
}

/// The points of a request's run.
pub(super) fn schedule(model: &MochiPipeline, request: &GenerateRequest) -> Result<Schedule, Error> {
    if let Some(timesteps) = &request.timesteps {
        return Err(Error::Number {
            field: "number of given timesteps",
            given: timesteps.len() as f64,
            rule: "it must be 0, because this model's schedule follows from the number of steps",
        });
    }
    let sigmas = linear_quadratic(request.steps, LINEAR_THRESHOLD);
    Ok(Schedule::new(&model.scheduler, &ScheduleRequest::Sigmas(sigmas), 0.0)?)
}

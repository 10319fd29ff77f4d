//! Mochi's parts of a run: its schedule, the guided velocity, its step, its decode.

use candle_core::{DType, Device, Tensor};

use super::MochiPipeline;
use crate::error::Error;
use crate::models::mochi::rope::RopeTables;
use crate::models::mochi::transformer::TextContext;
use crate::pipeline::guided::{Texts, each};
use crate::pipeline::latents::{Volume, pack, unpack};
use crate::pipeline::run::{Base, Course, State, VideoModel, initial};
use crate::pipeline::{GenerateRequest, Phase, touch};
use crate::sampler::guidance::Passes;
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
    texts: Texts<TextContext>,
    rope: RopeTables,
}

impl VideoModel for MochiPipeline {
    type Plan = Plan;
    type Context = Context;

    fn base(&self) -> &Base {
        &self.base
    }

    fn give_back(&self, phase: Phase) {
        match phase {
            Phase::Text => self.text.give_back(),
            Phase::Step => self.transformer.give_back(),
            Phase::Decode => self.vae.give_back(),
            Phase::Load => {}
        }
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
        Ok(Plan { schedule, levels, volume: Volume::new(&self.base.info.work, request) })
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
        let encode = |prompt: &str| self.encode_prompt(prompt, request.truncate_prompt);
        let positive = touch::prompt(request, encode)?;
        let negative = self.is_guided(request).then(|| encode(&request.negative_prompt)).transpose()?;
        self.text.give_back();
        let transformer = self.transformer.get()?;
        let passes = Passes::new(request.guidance_passes, &self.base.device);
        let texts = Texts::new(&passes, &positive, negative.as_ref(), |(text, mask)| {
            let mut context = transformer.text_context(text, mask)?;
            context.route = request.touch.route.clone();
            Ok(context)
        })?;
        Ok(Context { texts, rope: transformer.rope(plan.volume.grid())? })
    }

    fn output(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        context: &Context,
        index: usize,
        state: &State,
    ) -> Result<Tensor, Error> {
        let transformer = self.transformer.get()?;
        let place = (index, plan.schedule.steps());
        context.texts.guided(request, place, request.guidance, |text, batch| {
            let timesteps = vec![plan.schedule.timesteps[index]; batch];
            let timesteps = Tensor::from_vec(timesteps, batch, &Device::Cpu)?;
            let input = each(&state.latents, batch)?;
            Ok(transformer.forward(&input, &timesteps, text, &context.rope)?.to_dtype(DType::F32)?)
        })
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

    fn volume(&self, plan: &Plan, latents: &Tensor) -> Result<Tensor, Error> {
        Ok(unpack(latents, plan.volume.cells, plan.volume.patch)?)
    }

    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error> {
        let vae = self.vae.get()?;
        let z = vae.denormalize(&volume.to_device(&self.base.device)?)?.to_dtype(self.base.dtype)?;
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

//! LTX-Video's parts of a run: its schedule and positions, the guided velocity, its step, its decode.

use candle_core::{DType, Device, Tensor};

use super::conditions::{Given, Layout};
use super::second;
use super::{LtxClass, LtxPipeline, pack, unpack};
use crate::error::Error;
use crate::models::ltx::rope::{Positions, Rope, RopeTables};
use crate::models::ltx::transformer::TextContext;
use crate::models::ltx::vae::{DecodeSettings, Noise};
use crate::pipeline::conditions::Takes;
use crate::pipeline::guided::{Texts, each};
use crate::pipeline::latents::Volume;
use crate::pipeline::run::{Base, Course, State, VideoModel, initial};
use crate::pipeline::{GenerateRequest, Phase, touch};
use crate::rng::{Stream, normal_tensor};
use crate::sampler::guidance::Passes;
use crate::sampler::{FlowMatchConfig, Schedule, ScheduleRequest, calculate_shift, linear_quadratic};
use crate::sink::Sink;
use crate::tiling::Tiling;

/// Where the condition pipeline's schedule turns from linear to quadratic.
const LINEAR_THRESHOLD: f64 = 0.025;

/// What follows from a request without the network.
pub struct Plan {
    pub(super) schedule: Schedule,
    pub(super) volume: Volume,
    pub(super) class: LtxClass,
    /// Where the request's pictures go.
    pub(super) layout: Layout,
    /// Whether the run goes on from finished latents.
    second: bool,
}

impl Plan {
    /// Tokens of latent frames that stand before the clip's own.
    fn extra_tokens(&self) -> usize {
        let [_, rows, columns] = self.volume.grid();
        self.layout.extra() * rows * columns
    }

    /// `[1, tokens, channels of a token]` with all that stands before the clip's own.
    fn shape(&self) -> Vec<usize> {
        let mut shape = self.volume.packed_shape();
        shape[1] += self.extra_tokens();
        shape
    }
}

impl VideoModel for LtxPipeline {
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

    fn takes(&self) -> Takes {
        if !self.encodes {
            return Takes::Nothing("takes no picture, and one was given: its autoencoder has no encoder");
        }
        if self.base.info.work.patch[0] != 1 {
            return Takes::Nothing(
                "takes no picture, and one was given: its tokens span several latent frames",
            );
        }
        Takes::Any
    }

    fn makes_second_pass(&self) -> bool {
        true
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Plan, Error> {
        let volume = Volume::new(&self.base.info.work, request);
        let layout = Layout::new(request, volume.cells[0], self.base.info.work.temporal_ratio);
        second::check(self, request, &volume)?;
        let schedule = schedule(self, request)?;
        let second = request.second_pass.is_some();
        let plan = Plan { schedule, volume, class: class(self, request), layout, second };
        check_noise(request, &plan)?;
        Ok(plan)
    }

    fn course<'a>(&self, plan: &'a Plan) -> Course<'a> {
        let sampler = match plan.class {
            LtxClass::Text => "flow-match-euler\0text",
            LtxClass::Condition => "flow-match-euler\0cond",
        };
        Course { sampler, sigmas: &plan.schedule.sigmas, timesteps: &plan.schedule.timesteps }
    }

    fn latents_shape(&self, plan: &Plan, _done: usize) -> Vec<usize> {
        plan.shape()
    }

    fn begin(&self, request: &GenerateRequest, plan: &Plan) -> Result<Tensor, Error> {
        let volume = &plan.volume;
        // What a second pass goes on from is hidden once the context is there; a run begins with the noise alone.
        let noise = request
            .second_pass
            .as_ref()
            .map(|second| GenerateRequest { initial_latents: second.noise.clone(), ..request.clone() });
        let request = noise.as_ref().unwrap_or(request);
        let whole = request.initial_latents.as_ref().filter(|given| given.dims() == plan.shape());
        if let Some(given) = whole {
            return Ok(given.to_dtype(DType::F32)?.contiguous()?);
        }
        let own =
            initial(request, &volume.shape(), &volume.packed_shape(), |noise| pack(noise, volume.patch))?;
        match plan.layout.hiding(request, volume)? {
            Some(before) => Ok(Tensor::cat(&[pack(&before, volume.patch)?, own], 1)?),
            None => Ok(own),
        }
    }

    fn channel_axis(&self) -> usize {
        2
    }

    fn context(&self, request: &GenerateRequest, plan: &Plan) -> Result<Context, Error> {
        Context::new(self, request, plan)
    }

    fn enter(
        &self,
        _request: &GenerateRequest,
        plan: &Plan,
        context: &Context,
        state: &mut State,
    ) -> Result<(), Error> {
        if let Some(clean) = &context.clean {
            state.latents = self.enter_second(plan, clean, &state.latents)?;
        }
        if let Some(given) = &context.given {
            state.latents = given.lay(&state.latents, &plan.layout, &plan.volume)?;
        }
        Ok(())
    }

    fn output(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        context: &Context,
        index: usize,
        state: &State,
    ) -> Result<Tensor, Error> {
        velocity(self, request, plan, context, index, &state.latents)
    }

    fn advance(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        context: &Context,
        index: usize,
        state: &mut State,
        output: &Tensor,
    ) -> Result<Tensor, Error> {
        if let Some(given) = &context.given {
            let latents = given.noised(request, plan, index, &state.latents)?;
            let levels = plan.levels(index, &self.base.device)?;
            state.latents = (&latents + output.broadcast_mul(&levels.changes)?)?;
            return Ok((latents - output.broadcast_mul(&levels.sigmas)?)?);
        }
        let sigma = f64::from(plan.schedule.sigmas[index]);
        let predicted = (&state.latents - (output * sigma)?)?;
        state.latents = match plan.class {
            LtxClass::Text => plan.schedule.step(index, &state.latents, output)?,
            LtxClass::Condition => plan.schedule.step_from_timestep(index, &state.latents, output)?,
        };
        Ok(predicted)
    }

    fn change(&self, plan: &Plan, index: usize) -> Option<f32> {
        if !plan.layout.is_empty() || plan.second {
            return None;
        }
        Some(match plan.class {
            LtxClass::Text => plan.schedule.change(index),
            LtxClass::Condition => plan.schedule.change_from_timestep(index),
        })
    }

    fn volume(&self, plan: &Plan, latents: &Tensor) -> Result<Tensor, Error> {
        let own = latents.narrow(1, plan.extra_tokens(), plan.volume.packed_shape()[1])?;
        Ok(unpack(&own, plan.volume.cells, plan.volume.patch)?)
    }

    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error> {
        decode(self, request, volume, sink)
    }
}

/// Which of the reference's pipelines computes a request. `LTXImageToVideoPipeline`, which is `LTXPipeline` beside its
/// picture, takes one for the beginning; everything else is given as `LTXConditionPipeline` takes it.
fn class(model: &LtxPipeline, request: &GenerateRequest) -> LtxClass {
    match request.conditions.as_slice() {
        _ if request.second_pass.is_some() => LtxClass::Condition,
        [] => model.class,
        [only] if only.frame == 0 && only.count() == 1 && only.strength >= 1.0 => model.class,
        _ => LtxClass::Condition,
    }
}

/// Given noise is as much as the steps take, and of their shape.
fn check_noise(request: &GenerateRequest, plan: &Plan) -> Result<(), Error> {
    let given = &request.step_noise;
    if given.is_empty() || plan.layout.is_empty() {
        return Ok(());
    }
    if given.len() < plan.schedule.steps() {
        let rule = "each step takes one";
        return Err(Error::Number { field: "number of step_noise", given: given.len() as f64, rule });
    }
    match given.iter().find(|noise| noise.dims() != plan.shape()) {
        Some(noise) => {
            let (given, needed) = (noise.dims().to_vec(), plan.shape());
            Err(Error::LatentShape { what: "step_noise", given, needed })
        }
        None => Ok(()),
    }
}

/// The points of a request's run.
pub(super) fn schedule(model: &LtxPipeline, request: &GenerateRequest) -> Result<Schedule, Error> {
    second::part(whole_schedule(model, request)?, request)
}

fn whole_schedule(model: &LtxPipeline, request: &GenerateRequest) -> Result<Schedule, Error> {
    let given = request.timesteps.as_ref().map(|t| t.iter().map(|&t| t as f32).collect::<Vec<f32>>());
    let config = &model.scheduler;
    match class(model, request) {
        LtxClass::Text => {
            let volume = Volume::new(&model.base.info.work, request);
            let mu = calculate_shift(config, volume.cells.iter().product());
            let points = given.map_or(ScheduleRequest::Steps(request.steps), ScheduleRequest::Timesteps);
            Ok(Schedule::new(config, &points, mu)?)
        }
        LtxClass::Condition => {
            let scale = config.num_train_timesteps as f32;
            let points = given.unwrap_or_else(|| {
                linear_quadratic(request.steps, LINEAR_THRESHOLD)
                    .into_iter()
                    .map(|sigma| sigma * scale)
                    .collect()
            });
            Ok(Schedule::new(&unshifted(config), &ScheduleRequest::Timesteps(points), 0.0)?)
        }
    }
}

/// The condition pipeline gives its timesteps itself and no `mu`: the reference refuses a scheduler with dynamic
/// shifting there, and such models are run with one that shifts nothing.
fn unshifted(config: &FlowMatchConfig) -> FlowMatchConfig {
    if !config.use_dynamic_shifting {
        return config.clone();
    }
    FlowMatchConfig { use_dynamic_shifting: false, shift: 1.0, shift_terminal: None, ..config.clone() }
}

/// What stays the same over all steps.
pub struct Context {
    texts: Texts<TextContext>,
    rope: RopeTables,
    /// Where there are pictures.
    given: Option<Given>,
    /// What a second pass goes on from.
    clean: Option<Tensor>,
}

impl Context {
    fn new(model: &LtxPipeline, request: &GenerateRequest, plan: &Plan) -> Result<Self, Error> {
        let masked = plan.class == LtxClass::Condition;
        let encode = |prompt: &str| model.text.encode(prompt, request.truncate_prompt, masked);
        let positive = touch::prompt(request, encode)?;
        let negative = model.is_guided(request).then(|| encode(&request.negative_prompt)).transpose()?;
        model.text.give_back();
        let given = match plan.layout.is_empty() {
            true => None,
            false => Some(Given::new(model, request, &plan.layout, &plan.volume)?),
        };
        let clean = second::clean(model, request, &plan.volume)?;
        let transformer = model.transformer.get()?;
        let passes = Passes::new(request.guidance_passes, &model.base.device);
        let texts = Texts::new(&passes, &positive, negative.as_ref(), |(text, mask)| {
            let mut context = transformer.text_context(text, Some(mask))?;
            context.route = request.touch.route.clone();
            Ok(context)
        })?;
        Ok(Self { texts, rope: rope(model, request, plan)?, given, clean })
    }
}

fn rope(model: &LtxPipeline, request: &GenerateRequest, plan: &Plan) -> Result<RopeTables, Error> {
    let (work, volume) = (&model.base.info.work, &plan.volume);
    let (time, space) = (work.temporal_ratio as f64, work.spatial_ratio as f64);
    let config = &model.config;
    let rope = Rope::new(config.inner(), config.patch_size, config.patch_size_t);
    let tables = match plan.class {
        LtxClass::Text => {
            let scale = Some([time / request.fps, space, space]);
            rope.tables(Positions::Grid { size: volume.grid(), scale }, &model.base.device)?
        }
        LtxClass::Condition => {
            let times = plan.layout.times(volume, work.temporal_ratio);
            let coordinates = coordinates(volume, &times, work.spatial_ratio, request.fps)?;
            rope.tables(Positions::Coordinates(&coordinates), &model.base.device)?
        }
    };
    Ok(tables)
}

/// `[1, 3, tokens]`: seconds and pixels of tokens whose frames begin at these frames of the clip.
fn coordinates(volume: &Volume, times: &[usize], spatial: usize, fps: f64) -> Result<Tensor, Error> {
    let [_, rows, columns] = volume.grid();
    let [_, ph, pw] = volume.patch;
    let second = (1.0 / fps) as f32;
    let tokens = times.len() * rows * columns;
    let mut axes: [Vec<f32>; 3] = std::array::from_fn(|_| Vec::with_capacity(tokens));
    for &picture in times {
        for row in 0..rows {
            for column in 0..columns {
                axes[0].push(picture as f32 * second);
                axes[1].push((row * ph * spatial) as f32);
                axes[2].push((column * pw * spatial) as f32);
            }
        }
    }
    Ok(Tensor::from_vec(axes.concat(), (1, 3, tokens), &Device::Cpu)?)
}

/// The guided model output at a step, from packed latents on the model's device; f32.
fn velocity(
    model: &LtxPipeline,
    request: &GenerateRequest,
    plan: &Plan,
    context: &Context,
    index: usize,
    latents: &Tensor,
) -> Result<Tensor, Error> {
    let (input, timesteps) = match &context.given {
        Some(given) => {
            (given.noised(request, plan, index, latents)?, plan.levels(index, &model.base.device)?.timesteps)
        }
        None => (latents.clone(), Tensor::new(&[[plan.schedule.timesteps[index]]], &Device::Cpu)?),
    };
    let transformer = model.transformer.get()?;
    let place = (index, plan.schedule.steps());
    context.texts.guided(request, place, request.guidance, |text, batch| {
        let (input, timesteps) = (each(&input, batch)?, each(&timesteps, batch)?);
        Ok(transformer.forward(&input, &timesteps, text, &context.rope)?.to_dtype(DType::F32)?)
    })
}

/// Normalised latents `[1, C, F, H, W]` to a video.
fn decode(
    model: &LtxPipeline,
    request: &GenerateRequest,
    latents: &Tensor,
    sink: &mut dyn Sink,
) -> Result<(), Error> {
    let vae = model.vae.get()?;
    let conditioned = model.vae_config.decoder.timestep_conditioning;
    let mut given = request.decode_noise.as_slice();
    let mut z = vae.denormalize(&latents.to_device(&model.base.device)?)?;
    let mut timestep = None;
    if conditioned {
        let noise = match given.split_first() {
            Some((first, rest)) => {
                given = rest;
                decode_noise(first, &z)?
            }
            None => normal_tensor(request.seed, Stream::Decode, z.dims(), &model.base.device)?,
        };
        let scale = request.decode_noise_scale.unwrap_or(request.decode_timestep);
        z = ((z * (1.0 - scale))? + (noise * scale)?)?;
        timestep = Some(Tensor::new(&[request.decode_timestep as f32], &Device::Cpu)?);
    }
    let noise = if given.is_empty() { Noise::Seed(request.seed) } else { Noise::Given(given) };
    let tiling = Tiling { tile: request.decode.tile, chunk: request.decode.chunk };
    let settings = DecodeSettings { timestep: timestep.as_ref(), noise, tiling };
    Ok(vae.decode(&z.to_dtype(model.base.dtype)?, &settings, sink, None)?)
}

fn decode_noise(given: &Tensor, z: &Tensor) -> Result<Tensor, Error> {
    if given.dims() != z.dims() {
        let (given, needed) = (given.dims().to_vec(), z.dims().to_vec());
        return Err(Error::LatentShape { what: "decode_noise", given, needed });
    }
    Ok(given.to_dtype(DType::F32)?.to_device(z.device())?)
}

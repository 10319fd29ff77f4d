//! CogVideoX's parts of a run: its schedule and sizes, the guided prediction, its step, its decode.

use candle_core::{DType, Device, Tensor};

use super::CogVideoXPipeline;
use crate::error::Error;
use crate::models::cogvideox::transformer::Positions;
use crate::pipeline::conditions::{Takes, condition_noise};
use crate::pipeline::guided::{Texts, each};
use crate::pipeline::run::{Base, Course, State, VideoModel, initial};
use crate::pipeline::{GenerateRequest, Phase, touch};
use crate::rng::{Stream, normal_tensor};
use crate::sampler::guidance::Passes;
use crate::sampler::{DiffusionSampler, DiffusionSchedule};
use crate::sink::Sink;

/// What the sampler of second order remembers: the clean latents that the step before predicted.
const EARLIER: &str = "earlier";

/// What follows from a request without the network.
pub struct Plan {
    sampler: DiffusionSampler,
    schedule: DiffusionSchedule,
    /// Latent frames, rows and columns, with those that fill up the first token.
    cells: [usize; 3],
    channels: usize,
    /// Latent frames at the beginning that are dropped before the decode.
    dropped: usize,
}

impl Plan {
    fn volume(&self) -> [usize; 5] {
        let [frames, rows, columns] = self.cells;
        [1, self.channels, frames, rows, columns]
    }

    fn shape(&self) -> [usize; 5] {
        let [frames, rows, columns] = self.cells;
        [1, frames, self.channels, rows, columns]
    }
}

/// What stays the same over all steps.
pub struct Context {
    /// `[1 or 2, tokens, width]`.
    texts: Texts<Tensor>,
    positions: Positions,
    /// The picture's latents and zeros, `[1, F, C, H, W]`, in the latents' numbers.
    image: Option<Tensor>,
}

impl VideoModel for CogVideoXPipeline {
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
        if self.image { Takes::First { needed: true } } else { Takes::NOTHING }
    }

    fn hides(&self) -> bool {
        true
    }

    /// `sqrt(1 - sigma^2) clean + sigma noise`.
    fn hide(&self, plan: &Plan, index: usize, clean: &Tensor, noise: &Tensor) -> candle_core::Result<Tensor> {
        let sigma = f64::from(plan.schedule.sigmas[index]);
        (noise * sigma)? + (clean * (1.0 - sigma * sigma).max(0.0).sqrt())?
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Plan, Error> {
        if let Some(timesteps) = &request.timesteps {
            let given = timesteps.len() as f64;
            let rule = "this model's sampler has its own timesteps: say how many steps instead";
            return Err(Error::Number { field: "number of timesteps", given, rule });
        }
        let work = &self.base.info.work;
        let frames = (request.frames - 1) / work.temporal_ratio + 1;
        let dropped = frames.next_multiple_of(work.patch[0]) - frames;
        let cells =
            [frames + dropped, request.height / work.spatial_ratio, request.width / work.spatial_ratio];
        check_grid(self, request, cells)?;
        let schedule = self.schedule(request)?;
        let plan = Plan { sampler: self.sampler, schedule, cells, channels: work.latent_channels, dropped };
        check_noise(request, &plan)?;
        Ok(plan)
    }

    fn course<'a>(&self, plan: &'a Plan) -> Course<'a> {
        let sampler = match plan.sampler {
            DiffusionSampler::Ddim => "diffusion-ddim",
            DiffusionSampler::Dpm => "diffusion-dpm",
        };
        Course { sampler, sigmas: &plan.schedule.sigmas, timesteps: &plan.schedule.timesteps }
    }

    fn latents_shape(&self, plan: &Plan, _done: usize) -> Vec<usize> {
        plan.shape().to_vec()
    }

    fn begin(&self, request: &GenerateRequest, plan: &Plan) -> Result<Tensor, Error> {
        initial(request, &plan.volume(), &plan.shape(), |noise| noise.transpose(1, 2)?.contiguous())
    }

    fn channel_axis(&self) -> usize {
        2
    }

    fn context(&self, request: &GenerateRequest, plan: &Plan) -> Result<Context, Error> {
        let encode = |prompt: &str| self.encode_prompt(prompt, request.truncate_prompt);
        let positive = touch::prompt(request, encode)?;
        let negative = self.is_guided(request).then(|| encode(&request.negative_prompt)).transpose()?;
        self.text.give_back();
        let image = image_latents(self, request, plan)?;
        self.vae.give_back();
        let transformer = self.transformer.get()?;
        let mut positions = transformer.positions(plan.cells, positive.dim(1)?, &self.base.device)?;
        positions.route = request.touch.route.clone();
        let passes = Passes::new(request.guidance_passes, &self.base.device);
        let project = |text: &Tensor| Ok(transformer.project_text(text)?);
        let texts = Texts::new(&passes, &positive, negative.as_ref(), project)?;
        Ok(Context { texts, positions, image })
    }

    fn output(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        context: &Context,
        index: usize,
        state: &State,
    ) -> Result<Tensor, Error> {
        let input = match &context.image {
            Some(image) => Tensor::cat(&[&state.latents, image], 2)?,
            None => state.latents.clone(),
        };
        let timestep = plan.schedule.timesteps[index];
        let transformer = self.transformer.get()?;
        let (place, plain) = ((index, plan.schedule.steps()), guidance(request, f64::from(timestep)));
        context.texts.guided(request, place, plain, |text, batch| {
            let timesteps = Tensor::from_vec(vec![timestep; batch], batch, &Device::Cpu)?;
            let output = transformer.forward(&each(&input, batch)?, &timesteps, text, &context.positions)?;
            Ok(output.to_dtype(DType::F32)?)
        })
    }

    fn advance(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        _context: &Context,
        index: usize,
        state: &mut State,
        output: &Tensor,
    ) -> Result<Tensor, Error> {
        let schedule = &plan.schedule;
        let step = match plan.sampler {
            DiffusionSampler::Ddim => schedule.ddim(index, &state.latents, output)?,
            DiffusionSampler::Dpm => {
                let noise = step_noise(request, plan, index)?.to_device(&self.base.device)?;
                let earlier = state.remembered(EARLIER)?;
                schedule.dpm(index, &state.latents, output, earlier, &noise)?
            }
        };
        state.latents = step.sample;
        if plan.sampler == DiffusionSampler::Dpm {
            state.memory.insert(EARLIER.to_owned(), step.predicted.clone());
        }
        Ok(step.predicted)
    }

    fn volume(&self, plan: &Plan, latents: &Tensor) -> Result<Tensor, Error> {
        let kept = latents.narrow(1, plan.dropped, plan.cells[0] - plan.dropped)?;
        Ok(kept.transpose(1, 2)?.contiguous()?)
    }

    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error> {
        let vae = self.vae.get()?;
        let z = vae.denormalize(&volume.to_device(&self.base.device)?)?.to_dtype(self.base.dtype)?;
        Ok(vae.decode(&z, request.decode.tile, sink, None)?)
    }
}

/// Tokens that span several latent frames have positions up to the trained grid's end alone, and a learned table knows
/// one size of picture.
fn check_grid(model: &CogVideoXPipeline, request: &GenerateRequest, cells: [usize; 3]) -> Result<(), Error> {
    let config = &model.config;
    let sides = [
        ("height", request.height, cells[1], config.sample_height),
        ("width", request.width, cells[2], config.sample_width),
    ];
    let bounded = config.use_rotary_positional_embeddings && config.patch_size_t.is_some();
    for (field, given, cells, trained) in sides {
        let rule = if bounded && cells > trained {
            "the model has no positions for so large a picture"
        } else if config.use_learned_positional_embeddings && cells != trained {
            "the model has positions for the size of its defaults alone"
        } else {
            continue;
        };
        return Err(Error::Number { field, given: given as f64, rule });
    }
    Ok(())
}

/// The latents of the request's picture, drawn from the distribution that the VAE gives, in the place of the first
/// latent frame, and zeros in the others'.
fn image_latents(
    model: &CogVideoXPipeline,
    request: &GenerateRequest,
    plan: &Plan,
) -> Result<Option<Tensor>, Error> {
    let Some(given) = request.conditions.first() else { return Ok(None) };
    let vae = model.vae.get()?;
    let moments = vae.encode(&given.video(1, &model.base.device, model.base.dtype)?, None)?;
    let noise = condition_noise(request, 0, moments.mean.dims(), &model.base.device)?;
    let drawn = vae.scale_image(&moments.sample(&noise)?)?.transpose(1, 2)?.contiguous()?;
    let rest = plan.cells[0] - 1;
    Ok(Some(drawn.to_dtype(DType::F32)?.pad_with_zeros(1, 0, rest)?))
}

/// Given noise is of the latents' shape and as much as the steps take.
fn check_noise(request: &GenerateRequest, plan: &Plan) -> Result<(), Error> {
    let given = &request.step_noise;
    if given.is_empty() || plan.sampler == DiffusionSampler::Ddim {
        return Ok(());
    }
    let needed = plan.schedule.reference_draw(plan.schedule.steps() - 1) + 1;
    if given.len() < needed {
        let rule = "the steps draw more noise than that";
        return Err(Error::Number { field: "number of step_noise", given: given.len() as f64, rule });
    }
    match given.iter().find(|noise| noise.dims() != plan.shape()) {
        Some(noise) => {
            let (given, needed) = (noise.dims().to_vec(), plan.shape().to_vec());
            Err(Error::LatentShape { what: "step_noise", given, needed })
        }
        None => Ok(()),
    }
}

/// The noise of a step: the request's, or its own stream of the seed, so that it does not matter where a run began.
fn step_noise(request: &GenerateRequest, plan: &Plan, index: usize) -> Result<Tensor, Error> {
    match request.step_noise.get(plan.schedule.reference_draw(index)) {
        Some(noise) => Ok(noise.to_dtype(DType::F32)?),
        None => Ok(normal_tensor(request.seed, Stream::Step(index as u32), &plan.shape()[..], &Device::Cpu)?),
    }
}

/// The guidance at a timestep. Where it is dynamic it follows the reference, whose formula takes the timestep (999 to 0)
/// where one would expect the step's number.
fn guidance(request: &GenerateRequest, timestep: f64) -> f64 {
    if !request.dynamic_guidance {
        return request.guidance;
    }
    let steps = request.steps as f64;
    let angle = std::f64::consts::PI * ((steps - timestep) / steps).powf(5.0);
    1.0 + request.guidance * ((1.0 - angle.cos()) / 2.0)
}

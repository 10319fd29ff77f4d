//! CogVideoX's parts of a run: its schedule and sizes, the guided prediction, its step, its decode.

use candle_core::{DType, Device, Tensor};

use super::CogVideoXPipeline;
use crate::adapter::Places;
use crate::error::Error;
use crate::models::cogvideox::transformer::Positions;
use crate::offload::Placement;
use crate::pipeline::conditions::{Takes, condition_noise};
use crate::pipeline::latents::LatentRgb;
use crate::pipeline::run::{Course, State, VideoModel, initial};
use crate::pipeline::{GenerateRequest, Phase, PipelineInfo, touch};
use crate::rng::{Stream, normal_tensor};
use crate::sampler::guidance::{guide, rescale};
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
    /// Negative prompt first where there is one, `[1 or 2, tokens, width]`.
    text: Tensor,
    positions: Positions,
    /// The picture's latents and zeros, `[1, F, C, H, W]`, in the latents' numbers.
    image: Option<Tensor>,
}

impl VideoModel for CogVideoXPipeline {
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
        let work = &self.info.work;
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
        let mut text = touch::prompt(request, encode)?;
        if self.is_guided(request) {
            let negative = encode(&request.negative_prompt)?;
            text = Tensor::cat(&[negative, text], 0)?;
        }
        self.text.give_back();
        let image = image_latents(self, request, plan)?;
        self.vae.give_back();
        let transformer = self.transformer.get()?;
        let mut positions = transformer.positions(plan.cells, text.dim(1)?, &self.device)?;
        positions.route = request.touch.route.clone();
        Ok(Context { text: transformer.project_text(&text)?, positions, image })
    }

    fn output(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        context: &Context,
        index: usize,
        state: &State,
    ) -> Result<Tensor, Error> {
        let batch = context.text.dim(0)?;
        let input = match &context.image {
            Some(image) => Tensor::cat(&[&state.latents, image], 2)?,
            None => state.latents.clone(),
        };
        let input = Tensor::cat(&vec![input; batch], 0)?;
        let timestep = plan.schedule.timesteps[index];
        let timesteps = Tensor::from_vec(vec![timestep; batch], batch, &Device::Cpu)?;
        let transformer = self.transformer.get()?;
        let output = transformer.forward(&input, &timesteps, &context.text, &context.positions)?;
        let output = output.to_dtype(DType::F32)?;
        if batch == 1 {
            return Ok(output);
        }
        let (negative, positive) = (output.narrow(0, 0, 1)?, output.narrow(0, 1, 1)?);
        let plain = guidance(request, f64::from(timestep));
        let scale = request.guidance_at(index, plan.schedule.steps(), plain);
        let guided = guide(&negative, &positive, scale)?;
        if request.guidance_rescale > 0.0 {
            return Ok(rescale(&guided, &positive, request.guidance_rescale)?);
        }
        Ok(guided)
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
                let noise = step_noise(request, plan, index)?.to_device(&self.device)?;
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

    fn colours(&self) -> &LatentRgb {
        &self.latent_rgb
    }

    fn volume(&self, plan: &Plan, latents: &Tensor) -> Result<Tensor, Error> {
        let kept = latents.narrow(1, plan.dropped, plan.cells[0] - plan.dropped)?;
        Ok(kept.transpose(1, 2)?.contiguous()?)
    }

    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error> {
        let vae = self.vae.get()?;
        let z = vae.denormalize(&volume.to_device(&self.device)?)?.to_dtype(self.dtype)?;
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
    let moments = vae.encode(&given.video(1, &model.device, model.dtype)?, None)?;
    let noise = condition_noise(request, 0, moments.mean.dims(), &model.device)?;
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

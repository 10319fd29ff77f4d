//! Wan's parts of a run: its sizes, the guided velocity, its decode. Latents are kept as a volume `[1, C, F, H, W]`.

use candle_core::{DType, Device, Tensor};

use super::pictures::{self, Pictures};
use super::{WanPipeline, WanSchedule};
use crate::adapter::Places;
use crate::error::Error;
use crate::models::wan::rope::RopeTables;
use crate::models::wan::transformer::{TextContext, WanTransformer};
use crate::offload::{Placement, Slot};
use crate::pipeline::conditions::Takes;
use crate::pipeline::latents::{LatentRgb, pack, unpack};
use crate::pipeline::run::{Course, State, VideoModel, initial};
use crate::pipeline::{GenerateRequest, Phase, PipelineInfo, touch};
use crate::sampler::guidance::{Passes, guide, rescale};
use crate::sink::Sink;
use crate::text::clean::clean;
use crate::tiling::Tiling;

/// What follows from a request without the network.
pub struct Plan {
    schedule: WanSchedule,
    /// Whether a picture is the first latent frame.
    first: bool,
    /// Latent frames, rows and columns.
    cells: [usize; 3],
}

/// What stays the same over all steps.
pub struct Context {
    /// For the first transformer, where the run has a step of it.
    high: Option<Texts>,
    /// For the second.
    low: Option<Texts>,
    rope: RopeTables,
    passes: Passes,
    /// The latents of the pictures, in the form in which the model takes them.
    pictures: Option<Tensor>,
}

/// The prompts as one transformer reads them.
struct Texts {
    positive: TextContext,
    /// Where there is guidance.
    negative: Option<TextContext>,
    /// Negative and positive as one batch, where they go together.
    both: Option<TextContext>,
}

impl VideoModel for WanPipeline {
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
            Phase::Text => {
                self.text.give_back();
                self.pictures.give_back();
            }
            Phase::Step => self.give_back_transformers(),
            Phase::Decode => self.vae.give_back(),
            Phase::Load => {}
        }
    }

    fn reads_before(&self, plan: &Plan, index: usize) -> bool {
        let low = self.low_noise.as_ref().filter(|_| self.is_low(plan.schedule.course().timesteps[index]));
        low.is_some_and(|low| !low.transformer.is_held())
    }

    fn read_before(&self, _plan: &Plan, _index: usize) -> Result<(), Error> {
        self.transformer.give_back();
        if let Some(low) = &self.low_noise {
            low.transformer.get()?;
        }
        Ok(())
    }

    fn places(&self) -> &Places {
        &self.places
    }

    fn prompt_tokens(&self, prompt: &str) -> Result<usize, Error> {
        self.text.tokens(&clean(prompt))
    }

    fn prompt_fits(&self, prompt: &str, truncate: bool) -> Result<(), Error> {
        self.text.check(&clean(prompt), truncate)
    }

    fn takes(&self) -> Takes {
        self.pictures.takes(&self.config)
    }

    fn hides(&self) -> bool {
        true
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Plan, Error> {
        let work = &self.info.work;
        let frames = request.frames.saturating_sub(1) / work.temporal_ratio + 1;
        let cells = [frames, request.height / work.spatial_ratio, request.width / work.spatial_ratio];
        check_positions(self, request, cells)?;
        let first = matches!(self.pictures, Pictures::First) && !request.conditions.is_empty();
        Ok(Plan { schedule: self.sampler.schedule(request)?, first, cells })
    }

    fn course<'a>(&self, plan: &'a Plan) -> Course<'a> {
        plan.schedule.course()
    }

    fn latents_shape(&self, plan: &Plan, _done: usize) -> Vec<usize> {
        let [frames, height, width] = plan.cells;
        vec![1, self.info.work.latent_channels, frames, height, width]
    }

    fn begin(&self, request: &GenerateRequest, plan: &Plan) -> Result<Tensor, Error> {
        let shape = self.latents_shape(plan, 0);
        initial(request, &shape, &shape, |volume| Ok(volume.clone()))
    }

    fn context(&self, request: &GenerateRequest, plan: &Plan) -> Result<Context, Error> {
        let encode = |prompt: &str| self.encode_prompt(prompt, request.truncate_prompt);
        let positive = touch::prompt(request, encode)?;
        let negative = match self.is_guided(request) {
            true => Some(encode(&request.negative_prompt)?),
            false => None,
        };
        self.text.give_back();
        let states = self.pictures.states(request, self)?;
        self.pictures.give_back();
        let pictures = pictures::latents(self, request)?;
        self.vae.give_back();
        let passes = Passes::new(request.guidance_passes, &self.device);
        let texts = |transformer: &Slot<WanTransformer>| -> Result<Texts, Error> {
            let transformer = transformer.get()?;
            let context = |text: &Tensor| -> Result<TextContext, Error> {
                let mut context = transformer.text_context(text, states.as_ref())?;
                context.route = request.touch.route.clone();
                Ok(context)
            };
            let negative = negative.as_ref().map(context).transpose()?;
            let positive = context(&positive)?;
            let both = negative.as_ref().filter(|_| passes.is_together());
            let both = both.map(|negative| TextContext::join(negative, &positive)).transpose()?;
            Ok(Texts { positive, negative, both })
        };
        let timesteps = plan.schedule.course().timesteps;
        let any = |low: bool| timesteps.iter().any(|&timestep| self.is_low(timestep) == low);
        let low = self.low_noise.as_ref().filter(|_| any(true));
        let patch = self.info.work.patch;
        let grid = std::array::from_fn(|axis| plan.cells[axis] / patch[axis]);
        // The steps begin with the high transformer: it is the one that stays.
        let low = low.map(|low| texts(&low.transformer)).transpose()?;
        self.give_back_transformers();
        Ok(Context {
            high: any(false).then(|| texts(&self.transformer)).transpose()?,
            low,
            rope: RopeTables::new(&self.config, grid, &self.device)?,
            pictures,
            passes,
        })
    }

    fn output(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        context: &Context,
        index: usize,
        state: &State,
    ) -> Result<Tensor, Error> {
        let course = plan.schedule.course();
        let timestep = course.timesteps[index];
        let low = self.low_noise.as_ref().filter(|_| self.is_low(timestep));
        let (transformer, texts, guidance) = match low {
            Some(low) => {
                self.transformer.give_back();
                (low.transformer.get()?, &context.low, low.guidance.unwrap_or(request.guidance))
            }
            None => (self.transformer.get()?, &context.high, request.guidance),
        };
        let texts =
            texts.as_ref().expect("invariant: a context has the texts of every transformer of its plan");
        let patch = self.info.work.patch;
        let (latents, timestep) = match &context.pictures {
            None => (state.latents.clone(), Tensor::new(&[[timestep]], &Device::Cpu)?),
            Some(first) if plan.first => {
                (pictures::with_first(&state.latents, first)?, self.timesteps_after_first(plan, timestep)?)
            }
            Some(channels) => {
                (Tensor::cat(&[&state.latents, channels], 1)?, Tensor::new(&[[timestep]], &Device::Cpu)?)
            }
        };
        let latents = pack(&latents, patch)?;
        let velocity = |text: &TextContext| -> Result<Tensor, Error> {
            let batch = text.projected.dim(0)?;
            let each = |tensor: &Tensor| Tensor::cat(&vec![tensor; batch], 0);
            let velocity = transformer.forward(&each(&latents)?, &each(&timestep)?, text, &context.rope)?;
            Ok(unpack(&velocity.to_dtype(DType::F32)?, plan.cells, patch)?)
        };
        let Some(negative) = &texts.negative else { return velocity(&texts.positive) };
        let both = || velocity(texts.both.as_ref().expect("invariant: texts that go together are joined"));
        let [negative, positive] =
            context.passes.predict(both, |entry| velocity([negative, &texts.positive][entry]))?;
        let scale = request.guidance_at(index, course.steps(), guidance);
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
        context: &Context,
        index: usize,
        state: &mut State,
        output: &Tensor,
    ) -> Result<Tensor, Error> {
        let predicted = plan.schedule.advance(index, state, output)?;
        let Some(first) = context.pictures.as_ref().filter(|_| plan.first) else { return Ok(predicted) };
        if index + 1 == plan.schedule.course().steps() {
            state.latents = pictures::with_first(&state.latents, first)?;
        }
        Ok(pictures::with_first(&predicted, first)?)
    }

    fn change(&self, plan: &Plan, index: usize) -> Option<f32> {
        // The last step also puts a given first frame back.
        if plan.first { None } else { plan.schedule.change(index) }
    }

    fn colours(&self) -> &LatentRgb {
        &self.latent_rgb
    }

    fn volume(&self, _plan: &Plan, latents: &Tensor) -> Result<Tensor, Error> {
        Ok(latents.clone())
    }

    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error> {
        let vae = self.vae.get()?;
        let z = vae.denormalize(&volume.to_device(&self.device)?)?;
        let tiling = Tiling { tile: request.decode.tile, chunk: request.decode.chunk };
        Ok(vae.decode(&z, tiling, sink)?)
    }
}

impl WanPipeline {
    fn give_back_transformers(&self) {
        self.transformer.give_back();
        if let Some(low) = &self.low_noise {
            low.transformer.give_back();
        }
    }

    /// A timestep for each token, `[1, tokens]`, with the first latent frame's without noise.
    fn timesteps_after_first(&self, plan: &Plan, timestep: f32) -> Result<Tensor, Error> {
        let patch = self.info.work.patch;
        let [frames, rows, columns] = std::array::from_fn(|axis| plan.cells[axis] / patch[axis]);
        let (first, all) = (rows * columns, frames * rows * columns);
        let values = (0..all).map(|token| if token < first { 0.0 } else { timestep }).collect::<Vec<_>>();
        Ok(Tensor::from_vec(values, (1, all), &Device::Cpu)?)
    }
}

/// Refuses what is longer along an axis than the model has positions for.
fn check_positions(
    model: &WanPipeline,
    request: &GenerateRequest,
    [frames, rows, columns]: [usize; 3],
) -> Result<(), Error> {
    let info = &model.info;
    let most = model.config.rope_max_seq_len;
    let (multiple, patch) = (info.size_multiple, info.work.patch);
    for (side, given, cells) in [("height", request.height, rows), ("width", request.width, columns)] {
        if cells / patch[1] > most {
            return Err(Error::Size { side, given, multiple, nearest: most * multiple });
        }
    }
    if frames / patch[0] > most {
        let rule = info.frame_rule;
        let nearest = (most - 1) * rule.multiple + rule.offset;
        let (multiple, offset) = (rule.multiple, rule.offset);
        return Err(Error::Frames { given: request.frames, multiple, offset, nearest });
    }
    Ok(())
}

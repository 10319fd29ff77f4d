//! Wan's parts of a run: its sizes, the guided velocity, its decode. Latents are kept as a volume `[1, C, F, H, W]`.

use candle_core::{DType, Device, Tensor};

use super::pictures::{self, Pictures};
use super::{WanPipeline, WanSchedule};
use crate::error::Error;
use crate::models::wan::rope::RopeTables;
use crate::models::wan::transformer::{TextContext, WanTransformer};
use crate::offload::Slot;
use crate::pipeline::conditions::Takes;
use crate::pipeline::guided::{Texts, each};
use crate::pipeline::latents::{pack, unpack};
use crate::pipeline::run::{Base, Course, State, VideoModel, initial};
use crate::pipeline::{GenerateRequest, Phase, touch};
use crate::sampler::guidance::Passes;
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
    high: Option<Texts<TextContext>>,
    /// For the second.
    low: Option<Texts<TextContext>>,
    rope: RopeTables,
    /// The latents of the pictures, in the form in which the model takes them.
    pictures: Option<Tensor>,
}

impl VideoModel for WanPipeline {
    type Plan = Plan;
    type Context = Context;

    fn base(&self) -> &Base {
        &self.base
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
        let work = &self.base.info.work;
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
        vec![1, self.base.info.work.latent_channels, frames, height, width]
    }

    fn begin(&self, request: &GenerateRequest, plan: &Plan) -> Result<Tensor, Error> {
        let shape = self.latents_shape(plan, 0);
        initial(request, &shape, &shape, |volume| Ok(volume.clone()))
    }

    fn context(&self, request: &GenerateRequest, plan: &Plan) -> Result<Context, Error> {
        let encode = |prompt: &str| self.encode_prompt(prompt, request.truncate_prompt);
        let positive = touch::prompt(request, encode)?;
        let negative = self.is_guided(request).then(|| encode(&request.negative_prompt)).transpose()?;
        self.text.give_back();
        let states = self.pictures.states(request, self)?;
        self.pictures.give_back();
        let pictures = pictures::latents(self, request)?;
        self.vae.give_back();
        let passes = Passes::new(request.guidance_passes, &self.base.device);
        let texts = |transformer: &Slot<WanTransformer>| -> Result<Texts<TextContext>, Error> {
            let transformer = transformer.get()?;
            Texts::new(&passes, &positive, negative.as_ref(), |text| {
                let mut context = transformer.text_context(text, states.as_ref())?;
                context.route = request.touch.route.clone();
                Ok(context)
            })
        };
        let timesteps = plan.schedule.course().timesteps;
        let any = |low: bool| timesteps.iter().any(|&timestep| self.is_low(timestep) == low);
        let low = self.low_noise.as_ref().filter(|_| any(true));
        let patch = self.base.info.work.patch;
        let grid = std::array::from_fn(|axis| plan.cells[axis] / patch[axis]);
        // The steps begin with the high transformer: it is the one that stays.
        let low = low.map(|low| texts(&low.transformer)).transpose()?;
        self.give_back_transformers();
        Ok(Context {
            high: any(false).then(|| texts(&self.transformer)).transpose()?,
            low,
            rope: RopeTables::new(&self.config, grid, &self.base.device)?,
            pictures,
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
        let patch = self.base.info.work.patch;
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
        texts.guided(request, (index, course.steps()), guidance, |text, batch| {
            let (latents, timestep) = (each(&latents, batch)?, each(&timestep, batch)?);
            let velocity = transformer.forward(&latents, &timestep, text, &context.rope)?;
            Ok(unpack(&velocity.to_dtype(DType::F32)?, plan.cells, patch)?)
        })
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

    fn volume(&self, _plan: &Plan, latents: &Tensor) -> Result<Tensor, Error> {
        Ok(latents.clone())
    }

    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error> {
        let vae = self.vae.get()?;
        let z = vae.denormalize(&volume.to_device(&self.base.device)?)?;
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
        let patch = self.base.info.work.patch;
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
    let info = &model.base.info;
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

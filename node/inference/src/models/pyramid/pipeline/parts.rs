//! Pyramid Flow's parts of a run: the guided velocity, a step with what follows at the end of a stage and of a unit, and
//! the decode.

use candle_core::{DType, Device, Tensor};

use super::PyramidPipeline;
use super::resize::enlarge;
use super::units::Plan;
use crate::error::Error;
use crate::models::pyramid::transformer::TextContext;
use crate::pipeline::conditions::{Takes, condition_noise};
use crate::pipeline::guided::{Texts, each};
use crate::pipeline::run::{Base, Course, State, VideoModel};
use crate::pipeline::{GenerateRequest, Phase, touch};
use crate::sampler::guidance::Passes;
use crate::sink::Sink;
use crate::tiling::Tiling;

/// What a run remembers beside the latents: those of the units that are done, `[1, C, frames, H, W]`.
const FINISHED: &str = "units";

/// What stays the same over all steps.
pub struct Context {
    texts: Texts<TextContext>,
    /// The first unit, where a picture was given.
    picture: Option<Tensor>,
}

impl VideoModel for PyramidPipeline {
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
        self.text.t5.tokens(&self.with_suffix(prompt))
    }

    /// What is put behind a prompt counts, and not behind a negative one: [`VideoModel::plan`] checks both.
    fn prompt_fits(&self, _prompt: &str, _truncate: bool) -> Result<(), Error> {
        Ok(())
    }

    fn is_guided(&self, request: &GenerateRequest) -> bool {
        is_guided(request)
    }

    fn takes(&self) -> Takes {
        Takes::First { needed: false }
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Plan, Error> {
        if request.touch.decode_only.is_none() {
            let second = request.touch.prompt.as_ref().map(|second| &second.prompt);
            for prompt in [Some(&request.prompt), second].into_iter().flatten() {
                self.text.t5.check(&self.with_suffix(prompt), request.truncate_prompt)?;
            }
            if self.is_guided(request) {
                self.text.t5.check(&request.negative_prompt, request.truncate_prompt)?;
            }
        }
        Plan::new(self, request)
    }

    fn course<'a>(&self, plan: &'a Plan) -> Course<'a> {
        Course { sampler: "pyramid-flow-match-euler", sigmas: &plan.sigmas, timesteps: &plan.timesteps }
    }

    fn latents_shape(&self, plan: &Plan, done: usize) -> Vec<usize> {
        match plan.places.get(done) {
            Some(place) => plan.shape(place.unit, place.stage),
            None => plan.whole_shape(),
        }
    }

    fn begin(&self, request: &GenerateRequest, plan: &Plan) -> Result<Tensor, Error> {
        plan.noise(request, plan.first())
    }

    fn noise(&self, request: &GenerateRequest, plan: &Plan) -> Result<Tensor, Error> {
        plan.whole_noise(request)
    }

    fn context(&self, request: &GenerateRequest, _plan: &Plan) -> Result<Context, Error> {
        let encode = |prompt: &str| self.encode_prompt(prompt, request.truncate_prompt);
        let positive = touch::prompt(request, |prompt| encode(&self.with_suffix(prompt)))?;
        let negative = self.is_guided(request).then(|| encode(&request.negative_prompt)).transpose()?;
        self.text.give_back();
        let picture = picture(self, request)?;
        self.vae.give_back();
        let transformer = self.transformer.get()?;
        let passes = Passes::new(request.guidance_passes, &self.base.device);
        let texts = Texts::new(&passes, &positive, negative.as_ref(), |text| {
            let mut context = transformer.text_context(&text.embeds, &text.mask, &text.pooled)?;
            context.route = request.touch.route.clone();
            Ok(context)
        })?;
        Ok(Context { texts, picture })
    }

    /// A given picture is a unit that is done.
    fn enter(
        &self,
        _request: &GenerateRequest,
        _plan: &Plan,
        context: &Context,
        state: &mut State,
    ) -> Result<(), Error> {
        if let Some(picture) = &context.picture {
            state.memory.insert(FINISHED.to_owned(), picture.clone());
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
        let place = plan.places[index];
        let mut clips = match finished(plan, place.unit, state)? {
            Some(finished) => plan.conditions(finished, place.unit, place.stage)?,
            None => Vec::new(),
        };
        clips.push(state.latents.clone());
        let transformer = self.transformer.get()?;
        let plain = self.settings.guidance(request, place.unit);
        context.texts.guided(request, (index, plan.places.len()), plain, |text, batch| {
            let timesteps = Tensor::from_vec(vec![plan.timesteps[index]; batch], batch, &Device::Cpu)?;
            let clips = clips.iter().map(|clip| each(clip, batch)).collect::<Result<Vec<_>, _>>()?;
            Ok(transformer.forward(&clips, &timesteps, text)?.to_dtype(DType::F32)?)
        })
    }

    /// The clean latents that it gives are those of the units that are done and of this one in full size.
    fn advance(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        _context: &Context,
        index: usize,
        state: &mut State,
        output: &Tensor,
    ) -> Result<Tensor, Error> {
        let place = plan.places[index];
        let predicted = (&state.latents - (output * place.sigma)?)?;
        let mut seen = enlarge(&predicted, plan.factor(place.stage))?;
        if let Some(finished) = finished(plan, place.unit, state)? {
            seen = Tensor::cat(&[finished, &seen], 2)?;
        }
        state.latents = (&state.latents + (output * place.change)?)?;
        if !place.ends_stage {
            return Ok(seen);
        }
        if !plan.is_last_stage(place.stage) {
            let enlarged = enlarge(&state.latents, 2)?;
            state.latents = plan.enter(request, place.unit, place.stage + 1, &enlarged)?;
            return Ok(seen);
        }
        let made = match state.memory.remove(FINISHED) {
            Some(before) => Tensor::cat(&[&before, &state.latents], 2)?,
            None => state.latents.clone(),
        };
        if place.unit + 1 == plan.units() {
            state.latents = made;
        } else {
            state.memory.insert(FINISHED.to_owned(), made);
            state.latents = plan.noise(request, place.unit + 1)?.to_device(&self.base.device)?;
        }
        Ok(seen)
    }

    fn volume(&self, _plan: &Plan, latents: &Tensor) -> Result<Tensor, Error> {
        Ok(latents.clone())
    }

    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error> {
        let vae = self.vae.get()?;
        let z = self.denormalize(&volume.to_device(&self.base.device)?)?.to_dtype(self.base.dtype)?;
        let tiling = Tiling { tile: request.decode.tile, chunk: request.decode.chunk };
        Ok(vae.decode(&z, tiling, sink)?)
    }
}

/// Whether the negative prompt is used: one guidance of both is enough.
pub(super) fn is_guided(request: &GenerateRequest) -> bool {
    let later = request.later_guidance.is_some_and(|guidance| guidance > 1.0);
    request.is_guided() || (later && request.touch.guidance.is_empty())
}

impl PyramidPipeline {
    fn with_suffix(&self, prompt: &str) -> String {
        format!("{prompt}{}", self.settings.prompt_suffix)
    }
}

/// The latents of a given picture, drawn from the distribution that the VAE gives, `[1, C, 1, H, W]`.
fn picture(model: &PyramidPipeline, request: &GenerateRequest) -> Result<Option<Tensor>, Error> {
    let Some(given) = request.conditions.first() else { return Ok(None) };
    let moments = model.vae.get()?.encode(&given.video(1, &model.base.device, model.base.dtype)?)?;
    let noise = condition_noise(request, 0, moments.mean.dims(), &model.base.device)?;
    Ok(Some(model.normalize_first(&moments.sample(&noise)?)?))
}

/// The units before this one; a checkpoint may have lost them or hold others.
fn finished<'a>(plan: &Plan, unit: usize, state: &'a State) -> Result<Option<&'a Tensor>, Error> {
    if unit == 0 {
        return Ok(None);
    }
    let mut needed = plan.whole_shape();
    needed[2] = plan.frames(unit).0;
    match state.memory.get(FINISHED) {
        Some(finished) if finished.dims() == needed => Ok(Some(finished)),
        Some(finished) => {
            let given = finished.dims().to_vec();
            Err(Error::LatentShape { what: "the checkpoint's finished units", given, needed })
        }
        None => Err(Error::Checkpoint { reason: "it lacks the units that are done".to_owned() }),
    }
}

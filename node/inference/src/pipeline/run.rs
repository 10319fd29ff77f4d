//! One run, the same for every model: the request is checked, the text encoded, the latents denoised step by step, and
//! decoded, while an observer looks on.
//!
//! A model supplies the parts as a [`VideoModel`] and is a [`Pipeline`](super::Pipeline) by that alone. Between two steps a run is a
//! [`State`]: the latents, and what a sampler of several steps remembers, as named tensors; both go into checkpoints, so
//! a run that is resumed goes on bit for bit. Everything else that a step depends on follows from the request.

mod audit;
mod base;
mod check;
mod colours;
mod digest;
mod entry;
mod film;
mod parts;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

pub use base::Base;
pub use check::{check_prompt, check_sizes};
use digest::digest;
pub(crate) use film::FRAMES_AT_ONCE;
pub use parts::{decoded, initial};

use super::conditions::Takes;
use super::{
    Checkpoint, Commitment, GenerateRequest, Generated, Observer, Phase, Pipeline, PipelineInfo, StepEvent,
    Transition,
};
use crate::adapter::Places;
use crate::error::Error;
use crate::frames::RgbFrames;
use crate::offload::Placement;
use crate::pipeline::latents::LatentRgb;
use crate::pipeline::touch::{NOISE, check_kept, memory_prefix, step_name};
use crate::sampler::checkpoint::latents_bytes;
use crate::sink::Sink;

/// The points that a run goes through.
#[derive(Debug, Clone, Copy)]
pub struct Course<'a> {
    /// The sampler's name with whatever of its rule the points do not tell; part of what a run commits to.
    pub sampler: &'a str,
    /// Noise levels before the first step and after each, so one more than there are steps.
    pub sigmas: &'a [f32],
    /// What the model is told at each step.
    pub timesteps: &'a [f32],
}

impl Course<'_> {
    /// Steps of the run.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }
}

/// A run between two steps.
#[derive(Debug, Clone)]
pub struct State {
    /// The latents in the shape in which the model keeps them, f32, on the model's device.
    pub latents: Tensor,
    /// What the sampler remembers of earlier steps, f32, on the model's device.
    pub memory: BTreeMap<String, Tensor>,
}

impl State {
    /// What the sampler remembers under a name, in the latents' shape; it may come from outside.
    ///
    /// # Errors
    /// [`Error::LatentShape`] where it has another one.
    pub fn remembered(&self, name: &str) -> Result<Option<&Tensor>, Error> {
        match self.memory.get(name) {
            Some(tensor) if tensor.dims() != self.latents.dims() => {
                let (given, needed) = (tensor.dims().to_vec(), self.latents.dims().to_vec());
                Err(Error::LatentShape { what: "what the sampler remembers", given, needed })
            }
            found => Ok(found),
        }
    }
}

/// The parts of a video model from which a run is made, in the order in which they are used.
pub trait VideoModel: Send {
    /// What follows from a request without the network: its schedule and sizes.
    type Plan;
    /// What is computed once before the steps: the text's embeddings, tables of positions.
    type Context;

    /// What it has as every model has it.
    fn base(&self) -> &Base;

    /// Facts about the model.
    fn facts(&self) -> &PipelineInfo {
        &self.base().info
    }

    /// Where it computes.
    fn device(&self) -> &Device {
        &self.base().device
    }

    /// Where its components are.
    fn placement(&self) -> &Placement {
        &self.base().placement
    }

    /// Its layers that adapters may change.
    fn places(&self) -> &Places {
        &self.base().places
    }

    /// Gives back the components that a phase alone uses, where they go in turn.
    fn give_back(&self, phase: Phase);

    /// Whether a component must be read before a step that the ones before did not need.
    fn reads_before(&self, _plan: &Self::Plan, _index: usize) -> bool {
        false
    }

    /// Reads it.
    ///
    /// # Errors
    /// What reading reports.
    fn read_before(&self, _plan: &Self::Plan, _index: usize) -> Result<(), Error> {
        Ok(())
    }

    /// How many tokens a prompt has, with the end mark.
    ///
    /// # Errors
    /// When the tokenizer fails.
    fn prompt_tokens(&self, prompt: &str) -> Result<usize, Error>;

    /// Refuses a prompt that does not fit, unless it may be cut; [`check_prompt`] does so for one tokenizer.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    fn prompt_fits(&self, prompt: &str, truncate: bool) -> Result<(), Error>;

    /// Whether the negative prompt is used.
    fn is_guided(&self, request: &GenerateRequest) -> bool {
        request.is_guided()
    }

    /// Which pictures are taken beside the prompt.
    fn takes(&self) -> Takes {
        Takes::NOTHING
    }

    /// Whether a run may go on from finished latents.
    fn makes_second_pass(&self) -> bool {
        self.hides()
    }

    /// Whether such a run begins within the schedule, with what [`VideoModel::hide`] makes; else the model sees to it
    /// itself.
    fn hides(&self) -> bool {
        false
    }

    /// Clean latents as they are before step `index`, with this noise over them; for the straight flow of most models
    /// `(1 - sigma) clean + sigma noise`.
    ///
    /// # Errors
    /// When the shapes differ.
    fn hide(
        &self,
        plan: &Self::Plan,
        index: usize,
        clean: &Tensor,
        noise: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let sigma = f64::from(self.course(plan).sigmas[index]);
        (noise * sigma)? + (clean * (1.0 - sigma))?
    }

    /// The schedule and the sizes of a request that has passed every other check.
    ///
    /// # Errors
    /// What this model cannot make, beside what sizes, frame counts and numbers tell.
    fn plan(&self, request: &GenerateRequest) -> Result<Self::Plan, Error>;

    /// The plan's points.
    fn course<'a>(&self, plan: &'a Self::Plan) -> Course<'a>;

    /// The latents' shape after `done` steps, as the model keeps them.
    fn latents_shape(&self, plan: &Self::Plan, done: usize) -> Vec<usize>;

    /// The latents that a run begins with, f32, on the CPU; [`initial`] makes them for most models.
    ///
    /// # Errors
    /// [`Error::LatentShape`] for given latents of another shape.
    fn begin(&self, request: &GenerateRequest, plan: &Self::Plan) -> Result<Tensor, Error>;

    /// The noise of the whole run, as [`GenerateRequest::initial_latents`] takes it.
    ///
    /// # Errors
    /// As [`VideoModel::begin`].
    fn noise(&self, request: &GenerateRequest, plan: &Self::Plan) -> Result<Tensor, Error> {
        self.begin(request, plan)
    }

    /// The dimension that holds the channels, in the latents' shape as the model keeps them.
    fn channel_axis(&self) -> usize {
        1
    }

    /// Encodes text and pictures and computes what stays the same over all steps.
    ///
    /// # Errors
    /// What the device reports.
    fn context(&self, request: &GenerateRequest, plan: &Self::Plan) -> Result<Self::Context, Error>;

    /// Puts what the context holds of given pictures into the latents that a run begins with.
    ///
    /// # Errors
    /// What the device reports.
    fn enter(
        &self,
        _request: &GenerateRequest,
        _plan: &Self::Plan,
        _context: &Self::Context,
        _state: &mut State,
    ) -> Result<(), Error> {
        Ok(())
    }

    /// The network's output at step `index` with guidance applied, f32, in the latents' shape.
    ///
    /// # Errors
    /// What the device reports.
    fn output(
        &self,
        request: &GenerateRequest,
        plan: &Self::Plan,
        context: &Self::Context,
        index: usize,
        state: &State,
    ) -> Result<Tensor, Error>;

    /// Goes step `index` with that output, and gives the clean latents that it predicts, for a preview.
    ///
    /// # Errors
    /// What the device reports.
    fn advance(
        &self,
        request: &GenerateRequest,
        plan: &Self::Plan,
        context: &Self::Context,
        index: usize,
        state: &mut State,
        output: &Tensor,
    ) -> Result<Tensor, Error>;

    /// `change` where step `index` is `after = before + change * output`: such a step can be audited alone.
    fn change(&self, _plan: &Self::Plan, _index: usize) -> Option<f32> {
        None
    }

    /// How latents are shown before they are decoded, as the folder says it. Without factors they are learnt from the
    /// decoder when the first preview is due.
    fn colours(&self) -> &LatentRgb {
        &self.base().latent_rgb
    }

    /// The latents after the last step as a volume `[1, C, F, H, W]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    fn volume(&self, plan: &Self::Plan, latents: &Tensor) -> Result<Tensor, Error>;

    /// That volume as a video `(1, 3, frames, height, width)` of -1 to 1, which `sink` is given as it is finished.
    ///
    /// # Errors
    /// What the device or `sink` reports.
    fn decode(&self, request: &GenerateRequest, volume: &Tensor, sink: &mut dyn Sink) -> Result<(), Error>;
}

impl<M: VideoModel> Pipeline for M {
    fn info(&self) -> &PipelineInfo {
        self.facts()
    }

    fn count_tokens(&self, prompt: &str) -> Result<usize, Error> {
        self.prompt_tokens(prompt)
    }

    fn pictures(&self) -> Takes {
        self.takes()
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), Error> {
        check::check(self, request).map(|_| ())
    }

    fn generate(
        &mut self,
        request: &GenerateRequest,
        observer: &mut dyn Observer,
    ) -> Result<Generated, Error> {
        let generated = generate(self, request, observer);
        self.places().explain(generated)
    }

    fn commitment(&self, request: &GenerateRequest) -> Result<Commitment, Error> {
        audit::commitment(self, request)
    }

    fn start(&self, request: &GenerateRequest) -> Result<Tensor, Error> {
        Ok(entry::begin(self, request, &check::check(self, request)?)?.0)
    }

    fn transition(
        &mut self,
        request: &GenerateRequest,
        index: usize,
        latents: &Tensor,
    ) -> Result<Transition, Error> {
        let moved = audit::transition(self, request, index, latents);
        self.places().explain(moved)
    }

    fn frames(&self, request: &GenerateRequest, latents: &Tensor) -> Result<RgbFrames, Error> {
        audit::frames(self, request, latents)
    }
}

/// Makes the clip.
fn generate<M: VideoModel>(
    model: &M,
    request: &GenerateRequest,
    observer: &mut dyn Observer,
) -> Result<Generated, Error> {
    let plan = check::check(model, request)?;
    let request = &settle(model, request)?;
    if request.touch.decode_only.is_some() {
        return entry::decoded(model, request, &plan, observer);
    }
    let course = model.course(&plan);
    let _beside = model.places().apply(&request.adapters)?;
    let mut run = Run::begin(model, request, &plan)?;
    let steps = course.steps();
    // Where components go in turn, reading them is most of what comes before the steps.
    let in_turn = model.placement().turns().is_on();
    observer.phase(if in_turn { Phase::Load } else { Phase::Text });
    if observer.cancelled() {
        return Err(Error::Cancelled { steps_done: run.done, steps });
    }
    let context = model.context(request, &plan).map_err(|error| during(error, "encoding the text"))?;
    observer.phase(Phase::Step);
    let first = run.done;
    while run.done < steps {
        if observer.cancelled() {
            return Err(Error::Cancelled { steps_done: run.done, steps });
        }
        if model.reads_before(&plan, run.done) {
            observer.phase(Phase::Load);
            model.read_before(&plan, run.done)?;
            observer.phase(Phase::Step);
        }
        let predicted = run.step(&context).map_err(|error| during(error, "computing a step"))?;
        run.tell(&predicted, observer)?;
    }
    drop(context);
    model.give_back(Phase::Step);
    let latents = entry::finished(model, request, model.volume(&plan, &run.state.latents)?)?;
    let frames = entry::frames(model, request, &latents, steps, observer)?;
    let latents = latents.to_device(&Device::Cpu)?;
    let start_hash = *blake3::hash(&latents_bytes(&entry::begin(model, request, &plan)?.0)?).as_bytes();
    let Run { hashes: step_hashes, mut kept, .. } = run;
    if request.touch.keep.noise {
        kept.insert(NOISE.to_owned(), model.noise(request, &plan)?);
    }
    Ok(Generated { frames, latents, start_hash, step_hashes, steps_done: steps - first, kept })
}

/// Decides how a run's components are placed and what follows for its request, and empties what it begins without.
fn settle<M: VideoModel>(model: &M, request: &GenerateRequest) -> Result<GenerateRequest, Error> {
    let settled = model.placement().settle(request)?;
    for phase in [Phase::Text, Phase::Step, Phase::Decode] {
        model.give_back(phase);
    }
    Ok(settled)
}

fn during(error: Error, phase: &'static str) -> Error {
    match error {
        Error::OutOfMemory { detail, .. } => Error::OutOfMemory { during: phase, detail },
        other => other,
    }
}

/// A run on its way.
struct Run<'a, M: VideoModel> {
    model: &'a M,
    request: &'a GenerateRequest,
    plan: &'a M::Plan,
    course: Course<'a>,
    state: State,
    done: usize,
    hashes: Vec<[u8; 32]>,
    digest: [u8; 32],
    history: Vec<u8>,
    /// Steps' latents that come back.
    kept: BTreeMap<String, Tensor>,
    /// Colours of previews, where they had to be learnt.
    colours: Option<LatentRgb>,
}

impl<'a, M: VideoModel> Run<'a, M> {
    fn begin(model: &'a M, request: &'a GenerateRequest, plan: &'a M::Plan) -> Result<Self, Error> {
        let course = model.course(plan);
        let digest = digest(request, &course)?;
        let colours = None;
        if let Some(checkpoint) = &request.resume {
            let state = resumed(model, checkpoint, plan, digest)?;
            let (done, hashes) = (checkpoint.steps_done, checkpoint.step_hashes.clone());
            let (history, kept) = (checkpoint.history.clone(), checkpoint.kept.clone());
            return Ok(Self {
                model,
                request,
                plan,
                course,
                state,
                done,
                hashes,
                digest,
                history,
                kept,
                colours,
            });
        }
        let (state, done) = entry::state(model, request, plan)?;
        let hashes = match done {
            0 => Vec::new(),
            _ => vec![*blake3::hash(&latents_bytes(&state.latents)?).as_bytes(); done],
        };
        let (history, kept) = (Vec::new(), BTreeMap::new());
        Ok(Self { model, request, plan, course, state, done, hashes, digest, history, kept, colours })
    }

    /// Goes one step and gives the clean latents that the model predicted before it.
    fn step(&mut self, context: &M::Context) -> Result<Tensor, Error> {
        let (model, request, plan) = (self.model, self.request, self.plan);
        if self.done == 0 {
            model.enter(request, plan, context, &mut self.state)?;
        }
        let output = model.output(request, plan, context, self.done, &self.state)?;
        let predicted = model.advance(request, plan, context, self.done, &mut self.state, &output)?;
        self.done += 1;
        let channels = &request.touch.channels;
        if channels.is_due(Some(self.done)) {
            let count = model.facts().work.latent_channels;
            self.state.latents = channels.apply(&self.state.latents, model.channel_axis(), count)?;
        }
        if request.touch.keep.steps.contains(&self.done) {
            self.keep()?;
        }
        Ok(predicted)
    }

    /// Takes the state along as something that comes back.
    fn keep(&mut self) -> Result<(), Error> {
        let home = |tensor: &Tensor| tensor.to_device(&Device::Cpu);
        self.kept.insert(step_name(self.done), home(&self.state.latents)?);
        for (name, tensor) in &self.state.memory {
            self.kept.insert(format!("{}{name}", memory_prefix(self.done)), home(tensor)?);
        }
        // What a sampler remembers is not known before.
        let bytes: usize = self.kept.values().map(|tensor| tensor.elem_count() * size_of::<f32>()).sum();
        check_kept(bytes)
    }

    /// Hashes the latents and tells the observer.
    fn tell(&mut self, predicted: &Tensor, observer: &mut dyn Observer) -> Result<(), Error> {
        let bytes = latents_bytes(&self.state.latents)?;
        let finite =
            |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().all(|word| f32::from_le_bytes(*word).is_finite());
        if !finite(&bytes) {
            return Err(Error::NotFinite { step: self.done });
        }
        let hash = *blake3::hash(&bytes).as_bytes();
        self.hashes.push(hash);
        observer.step(&StepEvent {
            index: self.done - 1,
            total: self.course.steps(),
            timestep: f64::from(self.course.timesteps[self.done - 1]),
            sigma: f64::from(self.course.sigmas[self.done]),
            latents: &self.state.latents,
            hash,
        });
        let done = self.done;
        let due = |every: usize| every > 0 && done.is_multiple_of(every);
        if due(self.request.preview_every) {
            observer.preview(&self.preview(predicted)?);
        }
        if due(self.request.checkpoint_every) && self.done < self.course.steps() {
            observer.checkpoint(&self.checkpoint()?);
        }
        Ok(())
    }

    /// A rough picture of predicted clean latents.
    fn preview(&mut self, predicted: &Tensor) -> Result<RgbFrames, Error> {
        let volume = self.model.volume(self.plan, predicted)?;
        if let Some(colours) = Some(self.model.colours()).filter(|colours| !colours.factors.is_empty()) {
            return Ok(colours.project(&volume)?);
        }
        let colours = match &self.colours {
            Some(colours) => colours,
            // The decoder waits for its turn.
            None if self.model.placement().turns().is_on() => self.colours.insert(LatentRgb::default()),
            // A device without room for that is no reason to fail a run: channels are then shown as they are.
            None => self.colours.insert(colours::learnt(self.model, self.request).unwrap_or_default()),
        };
        Ok(colours.project(&volume)?)
    }

    fn checkpoint(&self) -> Result<Checkpoint, Error> {
        let home = |tensor: &Tensor| tensor.to_device(&Device::Cpu);
        let memory = self.state.memory.iter().map(|(name, tensor)| Ok((name.clone(), home(tensor)?)));
        Ok(Checkpoint {
            steps_done: self.done,
            sigmas: self.course.sigmas.to_vec(),
            latents: home(&self.state.latents)?,
            memory: memory.collect::<candle_core::Result<_>>()?,
            kept: self.kept.clone(),
            request_digest: self.digest,
            step_hashes: self.hashes.clone(),
            history: self.history.clone(),
        })
    }
}

fn resumed<M: VideoModel>(
    model: &M,
    checkpoint: &Checkpoint,
    plan: &M::Plan,
    digest: [u8; 32],
) -> Result<State, Error> {
    let fault = |reason: &str| Err(Error::Checkpoint { reason: reason.to_owned() });
    let course = model.course(plan);
    if checkpoint.request_digest != digest {
        return fault("it belongs to another request");
    }
    if checkpoint.sigmas != course.sigmas || checkpoint.steps_done > course.steps() {
        return fault("its schedule is another one");
    }
    let needed = model.latents_shape(plan, checkpoint.steps_done);
    if checkpoint.latents.dims() != needed {
        let given = checkpoint.latents.dims().to_vec();
        return Err(Error::LatentShape { what: "the checkpoint's latents", given, needed });
    }
    let here = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_device(model.device());
    let memory = checkpoint.memory.iter().map(|(name, tensor)| Ok((name.clone(), here(tensor)?)));
    Ok(State { latents: here(&checkpoint.latents)?, memory: memory.collect::<candle_core::Result<_>>()? })
}

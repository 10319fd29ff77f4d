//! One run: the request is checked, the text encoded, the latents denoised step by step, and decoded.

use candle_core::{DType, Device, Tensor};

use super::{LtxClass, LtxPipeline, pack, unpack};
use crate::error::Error;
use crate::frames::RgbFrames;
use crate::models::ltx::rope::{Positions, RopeTables};
use crate::models::ltx::transformer::TextContext;
use crate::models::ltx::vae::{DecodeSettings, Noise};
use crate::pipeline::{Checkpoint, GenerateRequest, Generated, Observer, Phase, StepEvent};
use crate::rng::{Stream, normal_tensor};
use crate::sampler::checkpoint::{MAX_STEPS, latents_bytes};
use crate::sampler::guidance::{guide, rescale};
use crate::sampler::{FlowMatchConfig, Schedule, ScheduleRequest, calculate_shift, linear_quadratic};
use crate::tiling::Tiling;

/// Where the condition pipeline's schedule turns from linear to quadratic.
const LINEAR_THRESHOLD: f64 = 0.025;

/// Checks what can be known without computing.
pub(super) fn check(model: &LtxPipeline, request: &GenerateRequest) -> Result<(), Error> {
    let info = &model.info;
    check_size(info.size_multiple, "width", request.width)?;
    check_size(info.size_multiple, "height", request.height)?;
    if !info.frame_rule.allows(request.frames) {
        let (multiple, offset) = (info.frame_rule.multiple, info.frame_rule.offset);
        let nearest = info.frame_rule.nearest(request.frames);
        return Err(Error::Frames { given: request.frames, multiple, offset, nearest });
    }
    if request.steps == 0 && request.timesteps.is_none() {
        return Err(Error::ZeroSteps);
    }
    check_numbers(request)?;
    for prompt in
        [Some(&request.prompt), guided(request).then_some(&request.negative_prompt)].into_iter().flatten()
    {
        let encoded = model.tokenizer.encode(prompt, info.token_limit)?;
        if let Some(cut_text) = encoded.cut_text.filter(|_| !request.truncate_prompt) {
            return Err(Error::PromptTooLong { tokens: encoded.tokens, limit: info.token_limit, cut_text });
        }
    }
    schedule(model, request).map(|_| ())
}

fn check_size(multiple: usize, side: &'static str, given: usize) -> Result<(), Error> {
    if given > 0 && given.is_multiple_of(multiple) {
        return Ok(());
    }
    let nearest = ((given + multiple / 2) / multiple).max(1) * multiple;
    Err(Error::Size { side, given, multiple, nearest })
}

fn check_numbers(request: &GenerateRequest) -> Result<(), Error> {
    let finite = [
        ("guidance", request.guidance),
        ("guidance_rescale", request.guidance_rescale),
        ("decode_timestep", request.decode_timestep),
        ("decode_noise_scale", request.decode_noise_scale.unwrap_or(0.0)),
    ];
    if !(request.fps.is_finite() && request.fps > 0.0) {
        return Err(Error::Number { field: "fps", given: request.fps, rule: "it must be above 0" });
    }
    if request.steps > MAX_STEPS {
        let given = request.steps as f64;
        return Err(Error::Number { field: "steps", given, rule: "it must be at most 100000" });
    }
    match finite.into_iter().find(|(_, value)| !value.is_finite()) {
        Some((field, given)) => Err(Error::Number { field, given, rule: "it must be a finite number" }),
        None => Ok(()),
    }
}

/// Makes the clip.
pub(super) fn generate(
    model: &LtxPipeline,
    request: &GenerateRequest,
    observer: &mut dyn Observer,
) -> Result<Generated, Error> {
    check(model, request)?;
    let schedule = schedule(model, request)?;
    let volume = Volume::of(model, request);
    let mut state = State::begin(model, request, &schedule, &volume)?;
    let steps = schedule.steps();
    observer.phase(Phase::Text);
    if observer.cancelled() {
        return Err(Error::Cancelled { steps_done: state.done, steps });
    }
    let context = Context::new(model, request, &volume)?;
    observer.phase(Phase::Step);
    let first = state.done;
    while state.done < steps {
        if observer.cancelled() {
            return Err(Error::Cancelled { steps_done: state.done, steps });
        }
        let predicted = state.step(model, request, &schedule, &context)?;
        state.tell(model, request, &schedule, &volume, &predicted, observer)?;
    }
    let latents = unpack(&state.latents, volume.cells, volume.patch)?;
    let frames = if request.decode.skip {
        RgbFrames { width: request.width, height: request.height, count: 0, data: Vec::new() }
    } else {
        observer.phase(Phase::Decode);
        if observer.cancelled() {
            return Err(Error::Cancelled { steps_done: steps, steps });
        }
        let video = decode(model, request, &latents, observer).map_err(|error| match error {
            Error::Cancelled { .. } => Error::Cancelled { steps_done: steps, steps },
            other => during(other, "decoding"),
        })?;
        RgbFrames::from_unit(&video)?
    };
    let latents = latents.to_device(&Device::Cpu)?;
    let start_hash = *blake3::hash(&latents_bytes(&begin(request, &volume)?)?).as_bytes();
    Ok(Generated { frames, latents, start_hash, step_hashes: state.hashes, steps_done: steps - first })
}

fn during(error: Error, phase: &'static str) -> Error {
    match error {
        Error::OutOfMemory { detail, .. } => Error::OutOfMemory { during: phase, detail },
        other => other,
    }
}

fn guided(request: &GenerateRequest) -> bool {
    request.guidance > 1.0
}

/// The clip in latent cells.
pub(super) struct Volume {
    /// Frames, height, width.
    pub(super) cells: [usize; 3],
    pub(super) patch: [usize; 3],
    channels: usize,
}

impl Volume {
    pub(super) fn of(model: &LtxPipeline, request: &GenerateRequest) -> Self {
        let work = &model.info.work;
        let frames = (request.frames - 1) / work.temporal_ratio + 1;
        let cells = [frames, request.height / work.spatial_ratio, request.width / work.spatial_ratio];
        Self { cells, patch: work.patch, channels: work.latent_channels }
    }

    fn shape(&self) -> Vec<usize> {
        let [frames, height, width] = self.cells;
        vec![1, self.channels, frames, height, width]
    }

    fn grid(&self) -> [usize; 3] {
        std::array::from_fn(|axis| self.cells[axis] / self.patch[axis])
    }

    pub(super) fn packed_shape(&self) -> Vec<usize> {
        vec![1, self.grid().iter().product(), self.channels * self.patch.iter().product::<usize>()]
    }
}

/// The points of a request's run.
pub(super) fn schedule(model: &LtxPipeline, request: &GenerateRequest) -> Result<Schedule, Error> {
    let given = request.timesteps.as_ref().map(|t| t.iter().map(|&t| t as f32).collect::<Vec<f32>>());
    let config = &model.scheduler;
    match model.class {
        LtxClass::Text => {
            let volume = Volume::of(model, request);
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
pub(super) struct Context {
    text: TextContext,
    rope: RopeTables,
    guided: bool,
}

impl Context {
    pub(super) fn new(
        model: &LtxPipeline,
        request: &GenerateRequest,
        volume: &Volume,
    ) -> Result<Self, Error> {
        let guided = guided(request);
        let (mut text, mut mask) = model.encode_prompt(&request.prompt, request.truncate_prompt)?;
        if guided {
            let (negative, its_mask) =
                model.encode_prompt(&request.negative_prompt, request.truncate_prompt)?;
            text = Tensor::cat(&[negative, text], 0)?;
            mask = Tensor::cat(&[its_mask, mask], 0)?;
        }
        let text = model.transformer.text_context(&text, Some(&mask))?;
        Ok(Self { text, rope: rope(model, request, volume)?, guided })
    }
}

fn rope(model: &LtxPipeline, request: &GenerateRequest, volume: &Volume) -> Result<RopeTables, Error> {
    let work = &model.info.work;
    let (time, space) = (work.temporal_ratio as f64, work.spatial_ratio as f64);
    let rope = model.transformer.rope();
    let tables = match model.class {
        LtxClass::Text => {
            let scale = Some([time / request.fps, space, space]);
            rope.tables(Positions::Grid { size: volume.grid(), scale }, &model.device)?
        }
        LtxClass::Condition => {
            let coordinates = coordinates(volume, work.temporal_ratio, work.spatial_ratio, request.fps)?;
            rope.tables(Positions::Coordinates(&coordinates), &model.device)?
        }
    };
    Ok(tables)
}

/// `[1, 3, tokens]`: seconds at a cell's first frame, with the first latent frame a single picture, and pixels.
fn coordinates(volume: &Volume, temporal: usize, spatial: usize, fps: f64) -> Result<Tensor, Error> {
    let [frames, rows, columns] = volume.grid();
    let [pt, ph, pw] = volume.patch;
    let second = (1.0 / fps) as f32;
    let tokens = frames * rows * columns;
    let mut axes: [Vec<f32>; 3] = std::array::from_fn(|_| Vec::with_capacity(tokens));
    for frame in 0..frames {
        for row in 0..rows {
            for column in 0..columns {
                let picture = (frame * pt * temporal + 1).saturating_sub(temporal);
                axes[0].push(picture as f32 * second);
                axes[1].push((row * ph * spatial) as f32);
                axes[2].push((column * pw * spatial) as f32);
            }
        }
    }
    Ok(Tensor::from_vec(axes.concat(), (1, 3, tokens), &Device::Cpu)?)
}

/// What changes from step to step.
struct State {
    /// Packed, f32.
    latents: Tensor,
    done: usize,
    hashes: Vec<[u8; 32]>,
    digest: [u8; 32],
    history: Vec<u8>,
}

/// The packed latents that a run begins with, on the CPU.
pub(super) fn begin(request: &GenerateRequest, volume: &Volume) -> Result<Tensor, Error> {
    match &request.initial_latents {
        None => {
            let noise = normal_tensor(request.seed, Stream::Initial, volume.shape(), &Device::Cpu)?;
            Ok(pack(&noise, volume.patch)?)
        }
        Some(given) if given.dims() == volume.shape() => {
            Ok(pack(&given.to_dtype(DType::F32)?, volume.patch)?)
        }
        Some(given) if given.dims() == volume.packed_shape() => {
            Ok(given.to_dtype(DType::F32)?.contiguous()?)
        }
        Some(given) => {
            let (given, needed) = (given.dims().to_vec(), volume.shape());
            Err(Error::LatentShape { what: "initial_latents", given, needed })
        }
    }
}

impl State {
    fn begin(
        model: &LtxPipeline,
        request: &GenerateRequest,
        schedule: &Schedule,
        volume: &Volume,
    ) -> Result<Self, Error> {
        let digest = digest(request, schedule)?;
        if let Some(checkpoint) = &request.resume {
            return Self::resume(model, checkpoint, schedule, volume, digest);
        }
        let latents = begin(request, volume)?.to_device(&model.device)?;
        Ok(Self { latents, done: 0, hashes: Vec::new(), digest, history: Vec::new() })
    }

    fn resume(
        model: &LtxPipeline,
        checkpoint: &Checkpoint,
        schedule: &Schedule,
        volume: &Volume,
        digest: [u8; 32],
    ) -> Result<Self, Error> {
        let fault = |reason: &str| Err(Error::Checkpoint { reason: reason.to_owned() });
        if checkpoint.request_digest != digest {
            return fault("it belongs to another request");
        }
        if checkpoint.sigmas != schedule.sigmas || checkpoint.steps_done > schedule.steps() {
            return fault("its schedule is another one");
        }
        if checkpoint.latents.dims() != volume.packed_shape() {
            let (given, needed) = (checkpoint.latents.dims().to_vec(), volume.packed_shape());
            return Err(Error::LatentShape { what: "the checkpoint's latents", given, needed });
        }
        let latents = checkpoint.latents.to_dtype(DType::F32)?.to_device(&model.device)?;
        let (hashes, history) = (checkpoint.step_hashes.clone(), checkpoint.history.clone());
        Ok(Self { latents, done: checkpoint.steps_done, hashes, digest, history })
    }

    /// Goes one step and gives the clean latents that the model predicted before it, packed.
    fn step(
        &mut self,
        model: &LtxPipeline,
        request: &GenerateRequest,
        schedule: &Schedule,
        context: &Context,
    ) -> Result<Tensor, Error> {
        let velocity = velocity(model, request, schedule, context, self.done, &self.latents)?;
        let sigma = f64::from(schedule.sigmas[self.done]);
        let predicted = (&self.latents - (&velocity * sigma)?)?;
        self.latents = match model.class {
            LtxClass::Text => schedule.step(self.done, &self.latents, &velocity)?,
            LtxClass::Condition => schedule.step_from_timestep(self.done, &self.latents, &velocity)?,
        };
        self.done += 1;
        Ok(predicted)
    }

    /// Hashes the latents and tells the observer.
    fn tell(
        &mut self,
        model: &LtxPipeline,
        request: &GenerateRequest,
        schedule: &Schedule,
        volume: &Volume,
        predicted: &Tensor,
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        let bytes = latents_bytes(&self.latents)?;
        let finite =
            |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().all(|word| f32::from_le_bytes(*word).is_finite());
        if !finite(&bytes) {
            return Err(Error::NotFinite { step: self.done });
        }
        let hash = *blake3::hash(&bytes).as_bytes();
        self.hashes.push(hash);
        observer.step(&StepEvent {
            index: self.done - 1,
            total: schedule.steps(),
            timestep: f64::from(schedule.timesteps[self.done - 1]),
            sigma: f64::from(schedule.sigmas[self.done]),
            latents: &self.latents,
            hash,
        });
        let due = |every: usize| every > 0 && self.done.is_multiple_of(every);
        if due(request.preview_every) {
            let latents = unpack(predicted, volume.cells, volume.patch)?;
            observer.preview(&model.latent_rgb.project(&latents)?);
        }
        if due(request.checkpoint_every) && self.done < schedule.steps() {
            observer.checkpoint(&Checkpoint {
                steps_done: self.done,
                sigmas: schedule.sigmas.clone(),
                latents: self.latents.to_device(&Device::Cpu)?,
                request_digest: self.digest,
                step_hashes: self.hashes.clone(),
                history: self.history.clone(),
            });
        }
        Ok(())
    }
}

/// The guided model output at a step, from packed latents on the model's device; f32.
pub(super) fn velocity(
    model: &LtxPipeline,
    request: &GenerateRequest,
    schedule: &Schedule,
    context: &Context,
    index: usize,
    latents: &Tensor,
) -> Result<Tensor, Error> {
    let batch = if context.guided { 2 } else { 1 };
    let input = if context.guided { Tensor::cat(&[latents, latents], 0)? } else { latents.clone() };
    let timesteps = Tensor::from_vec(vec![schedule.timesteps[index]; batch], (batch, 1), &model.device)?;
    let forward = model.transformer.forward(&input, &timesteps, &context.text, &context.rope);
    let velocity = forward.map_err(|error| during(error.into(), "computing a step"))?.to_dtype(DType::F32)?;
    if !context.guided {
        return Ok(velocity);
    }
    let (negative, positive) = (velocity.narrow(0, 0, 1)?, velocity.narrow(0, 1, 1)?);
    let guided = guide(&negative, &positive, request.guidance)?;
    if request.guidance_rescale > 0.0 {
        return Ok(rescale(&guided, &positive, request.guidance_rescale)?);
    }
    Ok(guided)
}

/// blake3 of everything that the latents depend on, the model aside.
pub(super) fn digest(request: &GenerateRequest, schedule: &Schedule) -> Result<[u8; 32], Error> {
    let mut hasher = blake3::Hasher::new();
    for text in [&request.prompt, &request.negative_prompt] {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    let counts = [request.seed, request.frames as u64, request.width as u64, request.height as u64];
    counts.iter().for_each(|count| {
        hasher.update(&count.to_le_bytes());
    });
    [request.fps, request.guidance, request.guidance_rescale].iter().for_each(|number| {
        hasher.update(&number.to_bits().to_le_bytes());
    });
    schedule.sigmas.iter().chain(&schedule.timesteps).for_each(|point| {
        hasher.update(&point.to_bits().to_le_bytes());
    });
    if let Some(latents) = &request.initial_latents {
        hasher.update(&latents_bytes(latents)?);
    }
    Ok(*hasher.finalize().as_bytes())
}

/// Normalised latents `[1, C, F, H, W]` to pictures `[F, 3, H, W]` with values in 0 to 1.
pub(super) fn decode(
    model: &LtxPipeline,
    request: &GenerateRequest,
    latents: &Tensor,
    observer: &dyn Observer,
) -> Result<Tensor, Error> {
    let conditioned = model.vae.config().decoder.timestep_conditioning;
    let mut given = request.decode_noise.as_slice();
    let mut z = model.vae.denormalize(&latents.to_device(&model.device)?)?;
    let mut timestep = None;
    if conditioned {
        let noise = match given.split_first() {
            Some((first, rest)) => {
                given = rest;
                decode_noise(first, &z)?
            }
            None => normal_tensor(request.seed, Stream::Decode, z.dims(), &model.device)?,
        };
        let scale = request.decode_noise_scale.unwrap_or(request.decode_timestep);
        z = ((z * (1.0 - scale))? + (noise * scale)?)?;
        timestep = Some(Tensor::new(&[request.decode_timestep as f32], &model.device)?);
    }
    let noise = if given.is_empty() { Noise::Seed(request.seed) } else { Noise::Given(given) };
    let tiling = Tiling { tile: request.decode.tile, chunk: request.decode.chunk };
    let settings = DecodeSettings { timestep: timestep.as_ref(), noise, tiling };
    let mut watch = |_: &str, _: &Tensor| match observer.cancelled() {
        true => candle_core::bail!("cancelled"),
        false => Ok(()),
    };
    // Only a decode in pieces is watched: showing a block's result copies it.
    let watched = tiling != Tiling::default();
    let decoded = model.vae.decode(&z.to_dtype(model.dtype)?, &settings, watched.then_some(&mut watch));
    let video = match decoded {
        Err(_) if watched && observer.cancelled() => {
            return Err(Error::Cancelled { steps_done: 0, steps: 0 });
        }
        other => other?,
    };
    let video = video.squeeze(0)?.transpose(0, 1)?.to_dtype(DType::F32)?;
    Ok(video.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
}

fn decode_noise(given: &Tensor, z: &Tensor) -> Result<Tensor, Error> {
    if given.dims() != z.dims() {
        let (given, needed) = (given.dims().to_vec(), z.dims().to_vec());
        return Err(Error::LatentShape { what: "decode_noise", given, needed });
    }
    Ok(given.to_dtype(DType::F32)?.to_device(z.device())?)
}

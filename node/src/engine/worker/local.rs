//! The engine with the models: `kinoflock_inference` on this machine's device. One model is loaded at a time.

use std::collections::BTreeMap;
use std::path::Path;

use kinoflock_inference::adapter::{Adapter, Places};
use kinoflock_inference::audit::frames_deviation;
use kinoflock_inference::offload::Offload;
use kinoflock_inference::plan::{Fit, PlanOptions};
use kinoflock_inference::sampler::checkpoint::latents_bytes;
use kinoflock_inference::{
    Checkpoint, Commitment, Condition, DType, DecodeOptions, Device, Error, Facts, GenerateRequest,
    Generated, LoadOptions, Observer, Pipeline, RgbFrames, SecondPass, StepEvent, Tensor, open_device,
    registry,
};
use kinoflock_protocol::id::{BlobId, ModelId};

use super::adapters::adapters;
use super::touch::read_latents;
use super::{Context, Engine, LoadedModel, Made, Stop};
use crate::engine::wire::{
    AdapterUse, AuditReport, AuditRun, Failure, Hash, LoadRequest, Name, OpenRequest, Phase, RunRequest,
    StatePaths, WorkerInfo,
};
use crate::engine::{encode, mp4};

/// Greatest file of latents or of a checkpoint that is read, bytes (1 GiB).
const MAX_STATE_BYTES: u64 = 1 << 30;

/// Models on one device.
#[derive(Default)]
pub struct LocalEngine {
    device: Option<(Device, DType)>,
    /// How models are loaded, once there is a device.
    options: LoadOptions,
    /// Whether a run's adapters go into the weights.
    merges: bool,
    loaded: Option<Loaded>,
}

/// The model that is loaded.
struct Loaded {
    model: ModelId,
    /// What is in its weights.
    merged: Vec<AdapterUse>,
    pipeline: Box<dyn Pipeline>,
}

impl Engine for LocalEngine {
    fn open(&mut self, request: &OpenRequest) -> Result<WorkerInfo, Failure> {
        let device = open_device(&request.device).map_err(|error| failure(&error))?;
        let dtype = dtype(&request.dtype, &device)?;
        let threads = candle_threads(request.threads);
        self.options = load_options(request, &device, dtype)?;
        self.device = Some((device, dtype));
        self.merges = request.merge_adapters;
        Ok(WorkerInfo {
            engine: Name::truncated("kinoflock"),
            version: Name::truncated(env!("CARGO_PKG_VERSION")),
            device: request.device.clone(),
            device_name: Name::truncated(&device_name(&request.device)),
            threads,
            pid: std::process::id(),
        })
    }

    fn load(&mut self, request: &LoadRequest) -> Result<LoadedModel, Failure> {
        self.load_with(request, Vec::new(), || Ok(Vec::new()))
    }

    fn prepare(&mut self, run: &RunRequest) -> Result<LoadedModel, Failure> {
        if !self.merges {
            return self.load(&run.model);
        }
        self.load_with(&run.model, run.extra.adapters.to_vec(), || adapters(run))
    }

    fn check(&mut self, request: &RunRequest) -> Result<(), Failure> {
        let Some(available) = self.options.memory else { return Ok(()) };
        let folder = Path::new(request.model.dir.as_str());
        // What the model cannot make is told by the model.
        let Ok(facts) = registry::facts(folder) else { return Ok(()) };
        let merges = self.merges && !request.extra.adapters.is_empty();
        let planned = planned(request, &facts, merges)?;
        let how = (self.options.offload, self.options.memory);
        let options = PlanOptions { merges, ..PlanOptions::of(&self.options) };
        let Ok(fit) = Fit::of(folder, &planned, &options, how) else { return Ok(()) };
        let needs = fit.needs;
        if needs.fits {
            return Ok(());
        }
        Err(failure(&Error::DoesNotFit { needed: needs.bytes, available }))
    }

    fn run(&mut self, request: &RunRequest, context: &mut Context<'_>) -> Result<Made, Stop> {
        // What cannot be encoded is not worth computing.
        encode::check_size(request.width as usize, request.height as usize, request.fps)
            .map_err(|error| Failure::new(error.code(), &error.to_string(), false))?;
        let Loaded { pipeline, .. } = self.loaded.as_mut().ok_or_else(not_open)?;
        let generate = generate_request(request, pipeline.as_ref())?;
        let mut watcher = Watcher { context, step_hash: [0; 32], fault: None };
        let commitment = pipeline.commitment(&generate).map_err(|error| failure(&error))?;
        if watcher.context.wants_states() {
            let start = pipeline.start(&generate).map_err(|error| failure(&error))?;
            watcher.state(0, &start);
            if let Some(left) = &generate.resume {
                watcher.state(left.steps_done, &left.latents);
            }
        }
        let generated = pipeline.generate(&generate, &mut watcher);
        if let Some(fault) = watcher.fault {
            return Err(fault.into());
        }
        match generated {
            Ok(generated) => Ok(made(generated, commitment)?),
            Err(Error::Cancelled { .. }) => Err(Stop::Cancelled),
            Err(error) => Err(failure(&error).into()),
        }
    }

    fn audit(&mut self, audit: &AuditRun, context: &mut Context<'_>) -> Result<AuditReport, Failure> {
        let (_, dtype) = self.device.clone().ok_or_else(not_open)?;
        let Loaded { pipeline, .. } = self.loaded.as_mut().ok_or_else(not_open)?;
        let generate = generate_request(&audit.run, pipeline.as_ref())?;
        look(audit, &generate, pipeline.as_mut(), &format!("{dtype:?}").to_lowercase(), context)
    }

    fn reset(&mut self) {
        self.loaded = None;
    }
}

impl LocalEngine {
    /// Reads a model with adapters in its weights, if it is not loaded so.
    fn load_with(
        &mut self,
        request: &LoadRequest,
        merged: Vec<AdapterUse>,
        adapters: impl FnOnce() -> Result<Vec<Adapter>, Failure>,
    ) -> Result<LoadedModel, Failure> {
        let (_, dtype) = self.device.clone().ok_or_else(not_open)?;
        let numbers = format!("{dtype:?}").to_lowercase();
        if let Some(loaded) = &self.loaded
            && loaded.model == request.model
            && loaded.merged == merged
        {
            return Ok(LoadedModel {
                architecture: loaded.pipeline.info().architecture.clone(),
                dtype: numbers,
                cached: true,
            });
        }
        // The old weights go first: two models need not fit the device at once.
        self.loaded = None;
        let places = Places::merging(adapters()?);
        let options = LoadOptions { places, ..self.options.clone() };
        let pipeline = kinoflock_inference::load(Path::new(request.dir.as_str()), &options)
            .map_err(|error| failure(&error))?;
        let architecture = pipeline.info().architecture.clone();
        self.loaded = Some(Loaded { model: request.model, merged, pipeline });
        Ok(LoadedModel { architecture, dtype: numbers, cached: false })
    }
}

/// Passes what a pipeline shows on to the daemon.
struct Watcher<'a, 'b> {
    context: &'a mut Context<'b>,
    step_hash: [u8; 32],
    /// Why the frames could not be taken: the run ends then.
    fault: Option<Failure>,
}

impl Watcher<'_, '_> {
    /// A state that cannot be read back from the device is no reason to fail the job.
    fn state(&mut self, index: usize, latents: &Tensor) {
        let values = latents.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
        if let Ok(values) = values {
            self.context.state(index, latents.dims(), &values);
        }
    }
}

impl Observer for Watcher<'_, '_> {
    fn phase(&mut self, phase: kinoflock_inference::Phase) {
        match phase {
            kinoflock_inference::Phase::Text => self.context.phase(Phase::Text),
            kinoflock_inference::Phase::Step => self.context.phase(Phase::Step),
            kinoflock_inference::Phase::Decode => self.context.phase(Phase::Decode),
            // What is read while a run goes on.
            kinoflock_inference::Phase::Load => self.context.phase(Phase::Load),
            _ => {}
        }
    }

    fn step(&mut self, event: &StepEvent<'_>) {
        self.step_hash = event.hash;
        if self.context.wants_states() {
            self.state(event.index + 1, event.latents);
        }
        self.context.step(event.index as u32 + 1, event.total as u32);
    }

    fn preview(&mut self, frames: &RgbFrames) {
        self.context.preview(frames);
    }

    fn frames(&mut self, frames: RgbFrames) -> Option<RgbFrames> {
        if self.fault.is_none() {
            self.fault = self.context.frames(frames).err();
        }
        None
    }

    fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        // A state that cannot be read back from the device is no reason to fail the job.
        if let Ok(bytes) = checkpoint.to_bytes() {
            self.context.checkpoint(&bytes, self.step_hash);
        }
    }

    fn cancelled(&self) -> bool {
        self.fault.is_some() || self.context.cancelled()
    }
}

/// Everything that an audit asks of the model. What was shown comes from strangers: it is read with bounds, and its
/// shapes are checked by the pipeline.
fn look(
    audit: &AuditRun,
    generate: &GenerateRequest,
    pipeline: &mut dyn Pipeline,
    dtype: &str,
    context: &mut Context<'_>,
) -> Result<AuditReport, Failure> {
    let fault = |error: Error| failure(&error);
    let StatePaths { start, before, after, end } = &audit.states;
    let [start, before, after, end] =
        [read_latents(start)?, read_latents(before)?, read_latents(after)?, read_latents(end)?];
    let commitment = pipeline.commitment(generate).map_err(fault)?;
    let step = audit.step as usize;
    let sampler = |index: usize| {
        let missing = || Failure::new("audited_step", "the step is beyond the last one", false);
        commitment.samplers.get(index).copied().map(Hash).ok_or_else(missing)
    };
    let samplers = [sampler(0)?, sampler(step)?, sampler(step + 1)?, sampler(generate.steps)?];
    let hash = |tensor: &Tensor| latents_bytes(tensor).map(|bytes| BlobId::of(&bytes)).map_err(fault);
    let latents = [hash(&start)?, hash(&before)?, hash(&after)?, hash(&end)?];
    let starts_well = hash(&pipeline.start(generate).map_err(fault)?)? == latents[0];
    context.phase(Phase::Step);
    let here = pipeline.transition(generate, step, &before).map_err(fault)?;
    let deviation = here.deviation(&before, &after).map_err(fault)?;
    context.phase(Phase::Decode);
    let decoded = pipeline.frames(generate, &end).map_err(fault)?;
    let clip = read_state(&audit.clip)?;
    // A clip that is none differs from every other.
    let frames = mp4::decode_mp4_bytes(&clip).map_or(f64::INFINITY, |clip| frames_deviation(&decoded, &clip));
    Ok(AuditReport {
        job: audit.run.job,
        latents,
        samplers,
        conditioning: Hash(commitment.conditioning),
        starts_well,
        deviation,
        frames,
        dtype: Name::truncated(dtype),
    })
}

fn load_options(request: &OpenRequest, device: &Device, dtype: DType) -> Result<LoadOptions, Failure> {
    let (offload, text_on_cpu) = match request.offload.as_str() {
        "auto" => (Offload::Auto, false),
        "none" => (Offload::None, false),
        "in-turn" => (Offload::InTurn, false),
        "text-cpu" => (Offload::Auto, true),
        other => {
            let text = format!("offload {other:?} is not known: auto, none, in-turn or text-cpu");
            return Err(Failure::new("offload", &text, false));
        }
    };
    let memory = (request.memory > 0).then_some(request.memory);
    Ok(LoadOptions { device: device.clone(), dtype, offload, memory, text_on_cpu, ..LoadOptions::default() })
}

/// A run as its memory is planned: with its sizes, tiles and places of pictures, whose files are not read. Those of given
/// latents are, and those of adapters, whose layers tell what they take, unless they go into the model's own weights.
fn planned(request: &RunRequest, facts: &Facts, merges: bool) -> Result<GenerateRequest, Failure> {
    let extra = &request.extra;
    let (width, height) = (request.width as usize, request.height as usize);
    let picture = |frame: u32, count: usize| {
        let none = Tensor::zeros((), DType::F32, &Device::Cpu)
            .and_then(|zero| zero.broadcast_as((count, 3, height, width)));
        none.ok().map(|pictures| Condition::new(pictures, frame as usize))
    };
    let given = extra.pictures.iter().filter_map(|given| picture(given.frame, 1));
    let adapters = if merges { Vec::new() } else { super::adapters::read_all(request)? };
    let (touch, initial_latents) = super::touch::read(extra)?;
    let extended = extra.extend.map(|_| picture(0, extra.extend_frames.unwrap_or(1).max(1) as usize));
    Ok(GenerateRequest {
        width,
        height,
        frames: request.frames as usize,
        guidance: request.guidance,
        adapters,
        second_pass: extra.denoise_strength.map(SecondPass::new),
        initial_latents,
        touch,
        decode: DecodeOptions {
            tile: extra.decode_tile.map(|pixels| pixels as usize),
            chunk: extra.decode_chunk.map(|frames| frames as usize),
            skip: false,
        },
        conditions: given.chain(extended.flatten()).collect(),
        ..GenerateRequest::new("", &facts.info.defaults)
    })
}

fn generate_request(request: &RunRequest, pipeline: &dyn Pipeline) -> Result<GenerateRequest, Failure> {
    let extra = &request.extra;
    let base = GenerateRequest::new(request.prompt.as_str(), &pipeline.info().defaults);
    let (touch, initial_latents) = super::touch::read(extra)?;
    let resume = match &extra.resume {
        Some(path) => Some(Checkpoint::from_bytes(&read_state(path)?).map_err(|error| failure(&error))?),
        None => None,
    };
    Ok(GenerateRequest {
        negative_prompt: request.negative.as_str().to_owned(),
        seed: request.seed,
        frames: request.frames as usize,
        width: request.width as usize,
        height: request.height as usize,
        fps: request.fps,
        steps: request.steps as usize,
        guidance: request.guidance,
        guidance_rescale: extra.guidance_rescale.unwrap_or(base.guidance_rescale),
        timesteps: extra.timesteps.clone().map(|list| list.into_vec()),
        conditions: super::pictures::conditions(request, pipeline)?,
        condition_noise_scale: extra.picture_noise_scale.unwrap_or(base.condition_noise_scale),
        second_pass: extra.denoise_strength.map(|strength| SecondPass {
            adain: extra.upsample_adain.unwrap_or(0.0),
            tone_map: extra.upsample_tone_map.unwrap_or(0.0),
            ..SecondPass::new(strength)
        }),
        initial_latents,
        adapters: adapters(request)?,
        touch,
        decode: DecodeOptions {
            tile: extra.decode_tile.map(|pixels| pixels as usize),
            chunk: extra.decode_chunk.map(|frames| frames as usize),
            ..base.decode
        },
        decode_timestep: extra.decode_timestep.unwrap_or(base.decode_timestep),
        decode_noise_scale: extra.decode_noise_scale.or(base.decode_noise_scale),
        truncate_prompt: extra.truncate_prompt,
        checkpoint_every: if request.output.checkpoint.is_some() {
            request.checkpoint_every as usize
        } else {
            0
        },
        preview_every: request.preview_every as usize,
        resume,
        ..base
    })
}

fn made(generated: Generated, commitment: Commitment) -> Result<Made, Failure> {
    let values = |tensor: &Tensor| {
        let values = tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
        values.map_err(|error| failure(&Error::from(error)))
    };
    let mut kept = BTreeMap::new();
    for (name, tensor) in &generated.kept {
        kept.insert(name.clone(), (tensor.dims().to_vec(), values(tensor)?));
    }
    Ok(Made {
        latents_shape: generated.latents.dims().to_vec(),
        latents: values(&generated.latents)?,
        kept,
        state_hashes: [&[generated.start_hash], generated.step_hashes.as_slice()].concat(),
        commitment,
        steps_done: generated.steps_done as u32,
    })
}

pub(super) fn read_state(path: &str) -> Result<Vec<u8>, Failure> {
    let fault =
        |error: std::io::Error| Failure::new("input", &format!("an input cannot be read: {error}"), true);
    let len = std::fs::metadata(path).map_err(fault)?.len();
    if len > MAX_STATE_BYTES {
        let text = format!("an input of {len} bytes exceeds the limit of {MAX_STATE_BYTES} bytes");
        return Err(Failure::new("input_too_large", &text, false));
    }
    std::fs::read(path).map_err(fault)
}

pub(super) fn failure(error: &Error) -> Failure {
    // Another try, or another node, may have the memory, the device or the file; it has not another arithmetic.
    let (code, retryable) = match error {
        Error::OutOfMemory { .. } => ("out_of_memory", true),
        Error::DoesNotFit { .. } => (error.code(), true),
        Error::Read { .. } | Error::Device { .. } | Error::Weights(_) | Error::Tensor(_) => {
            (error.code(), true)
        }
        _ => (error.code(), false),
    };
    Failure::new(code, &error.to_string(), retryable)
}

fn not_open() -> Failure {
    Failure::new("worker_order", "the worker was told to work before it had a device and a model", false)
}

fn dtype(name: &str, device: &Device) -> Result<DType, Failure> {
    match name {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        // Half of the memory and of the traffic, with the exponents of f32, where the hardware has it.
        "auto" if device.is_cuda() => Ok(DType::BF16),
        "auto" => Ok(DType::F32),
        _ => Err(Failure::new(
            "dtype",
            &format!("number format {name:?} is not known: auto, f32, bf16 or f16"),
            false,
        )),
    }
}

fn candle_threads(asked: u32) -> u32 {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
        asked => asked,
    }
}

/// The name that the system gives the processor or GPU; the device's own where it gives none.
fn device_name(device: &str) -> String {
    let found = match device.split_once(':').unwrap_or((device, "0")) {
        ("cpu", _) => processor_name(),
        ("cuda", index) => index.parse().ok().and_then(gpu_name),
        _ => None,
    };
    found.unwrap_or_else(|| device.to_owned())
}

fn processor_name() -> Option<String> {
    field(&std::fs::read_to_string("/proc/cpuinfo").ok()?, "model name")
}

fn gpu_name(index: usize) -> Option<String> {
    let mut folders: Vec<_> = std::fs::read_dir("/proc/driver/nvidia/gpus")
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    // By bus address, as CUDA counts with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    folders.sort();
    field(&std::fs::read_to_string(folders.get(index)?.join("information")).ok()?, "Model")
}

fn field(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

//! What the node and its worker say to each other: length-prefixed messages over the worker's stdin and stdout.
//!
//! # Flow
//! 1. Both sides begin with a [`Greeting`], whose eight bytes never change: a mark and a version. Whoever reads another
//!    version says so and ends; nothing else is decoded.
//! 2. The node sends [`ToWorker::Open`] with device, threads and memory; the worker answers [`FromWorker::Ready`], or
//!    [`FromWorker::Failed`] without a job when it cannot have the device.
//! 3. [`ToWorker::Load`], [`ToWorker::Run`] and [`ToWorker::Audit`], one at a time. A run that needs another model loads it
//!    first. It ends with exactly one of [`FromWorker::Done`], [`FromWorker::Failed`] and [`FromWorker::Cancelled`]; an
//!    audit with [`FromWorker::Audited`] or [`FromWorker::Failed`].
//! 4. At the end of its stdin the worker exits at once, whatever it is doing.
//!
//! A frame is a 32-bit little-endian length and so many bytes ([`kinoflock_protocol::frame`]), a message one value of
//! the protocol's codec. Clips, latents and checkpoints are files; only their names are here.

use kinoflock_protocol::codec::{Bytes, List, Text};
use kinoflock_protocol::id::{BlobId, JobId, ModelId};
use kinoflock_protocol::limits::{MAX_ADAPTERS, MAX_KEYFRAMES, MAX_LINE, MAX_NAME, MAX_PREVIEW, MAX_PROMPT};
use serde::{Deserialize, Serialize};

pub use self::adapter::AdapterUse;
pub use self::audit::{AuditReport, AuditRun, Hash, StatePaths};
pub use self::pipe::{
    Greeting, MAX_FRAME, WIRE_VERSION, WireError, decode, read_message, to_frame, write_message,
};
pub use self::report::{
    DoneReport, FileReport, LatentsSummary, MAX_SAMPLES, MAX_STEP_RECORD, STEPS, StepRecord, Timings,
};
pub use self::touch::{Mixed, Numbers, Places, Touch};

mod adapter;
mod audit;
mod pipe;
mod report;
mod touch;

/// Greatest path, bytes of UTF-8.
pub const MAX_PATH: usize = 4096;
/// Most timesteps that a run may name.
pub const MAX_TIMESTEPS: usize = 4096;
/// Most pictures of a run: the keyframes, the beginning, the end.
pub const MAX_PICTURES: usize = MAX_KEYFRAMES + 2;
/// Greatest explanation of a failure, bytes of UTF-8: cut where it is longer.
pub const MAX_TEXT: usize = MAX_LINE;

/// A path on this machine.
pub type WirePath = Text<MAX_PATH>;
/// A short name.
pub type Name = Text<MAX_NAME>;

/// From the node to its worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// Take this device. The first message.
    Open(OpenRequest),
    /// Read a model's weights, so that the next run starts at once.
    Load(LoadRequest),
    /// Make a clip.
    Run(Box<RunRequest>),
    /// Look at one step of a clip that another node made.
    Audit(Box<AuditRun>),
    /// Stop this job within a step.
    Cancel(JobId),
    /// End when idle.
    Shutdown,
}

/// The device that a worker owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenRequest {
    /// `cpu`, `cuda:N`, `metal` or `metal:N`.
    pub device: Name,
    /// `auto`, `f32`, `bf16` or `f16`.
    pub dtype: Name,
    /// Whether a run's adapters go into the weights instead of beside them.
    pub merge_adapters: bool,
    /// CPU threads; 0 for all cores.
    pub threads: u32,
    /// Greatest private memory of the process, bytes; 0 for no limit.
    pub memory_limit: u64,
    /// What a run's plan may need, bytes; 0 for no limit.
    pub memory: u64,
    /// `auto`, `none`, `in-turn` or `text-cpu`.
    pub offload: Name,
}

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadRequest {
    /// Which.
    pub model: ModelId,
    /// Its folder, in the published layout.
    pub dir: WirePath,
}

/// One clip to make. The daemon has checked the numbers; the worker checks them again against the loaded model.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRequest {
    /// Which job.
    pub job: JobId,
    /// With which model.
    pub model: LoadRequest,
    /// What it shows.
    pub prompt: Text<MAX_PROMPT>,
    /// What it should not show.
    pub negative: Text<MAX_PROMPT>,
    /// Every random draw follows from it.
    pub seed: u64,
    /// Frames.
    pub frames: u32,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Frames a second.
    pub fps: f64,
    /// Denoising steps.
    pub steps: u32,
    /// Classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// What else the artist has set.
    pub extra: Extra,
    /// Where the results go.
    pub output: Output,
    /// A checkpoint after every so many steps; 0 for none.
    pub checkpoint_every: u32,
    /// A preview after every so many steps; 0 for none.
    pub preview_every: u32,
}

impl std::fmt::Debug for RunRequest {
    // The prompt is the artist's: it stays out of every log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "RunRequest({} {}x{}x{}, {} steps)",
            self.job.short(),
            self.width,
            self.height,
            self.frames,
            self.steps
        )
    }
}

/// Numbers that have a default in the engine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Extra {
    /// 0 to 1: how far guidance is scaled back to the spread of the unguided prediction.
    pub guidance_rescale: Option<f64>,
    /// The model's own timesteps, falling.
    pub timesteps: Option<List<f64, MAX_TIMESTEPS>>,
    /// The noise level that a timestep-conditioned decoder is told.
    pub decode_timestep: Option<f64>,
    /// How much noise such a decoder's input gets.
    pub decode_noise_scale: Option<f64>,
    /// Decode in tiles of about this many pixels.
    pub decode_tile: Option<u32>,
    /// Decode in runs of about this many frames.
    pub decode_chunk: Option<u32>,
    /// Cut a prompt that is too long instead of refusing it.
    pub truncate_prompt: bool,
    /// A safetensors file whose tensor `latents` is where to start, instead of noise.
    pub initial_latents: Option<WirePath>,
    /// A checkpoint file to go on from.
    pub resume: Option<WirePath>,
    /// The folder with the files of `pictures`, `extend` and `adapters`: [`input_name`].
    pub inputs: Option<WirePath>,
    /// PNG or JPEG files that frames are to show.
    pub pictures: List<Picture, MAX_PICTURES>,
    /// LoRA files that change the model for this run.
    pub adapters: List<AdapterUse, MAX_ADAPTERS>,
    /// A clip whose last frames this one begins with.
    pub extend: Option<BlobId>,
    /// How many.
    pub extend_frames: Option<u32>,
    /// Grey pictures where the model needs some and none are given: for self-tests, which bring none.
    pub grey_pictures: bool,
    /// Part of the schedule that is run from `initial_latents` as finished ones.
    pub denoise_strength: Option<f64>,
    /// How far latents that were made larger get back each channel's mean and spread.
    pub upsample_adain: Option<f64>,
    /// How far large values of theirs are pulled in.
    pub upsample_tone_map: Option<f64>,
    /// How much noise is put on fully given latents at each step.
    pub picture_noise_scale: Option<f64>,
    /// What is changed inside the run.
    pub touch: Touch,
}

/// A picture that a frame is to show.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Picture {
    /// Which.
    pub image: BlobId,
    /// The frame, zero-based.
    pub frame: u32,
    /// How strongly; 1 is fully.
    pub strength: f64,
}

/// The file of an input, in the folder of inputs.
#[must_use]
pub fn input_name(blob: &BlobId) -> String {
    format!("input-{blob}")
}

/// Where a run's files go. Each is written whole and synced before the message that names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// The MP4.
    pub clip: WirePath,
    /// The latents it was decoded from, if wanted.
    pub latents: Option<WirePath>,
    /// A folder for checkpoints: [`checkpoint_name`]. Beside a new one, the one before it stays.
    pub checkpoint: Option<WirePath>,
    /// A folder for the latents before the first step and after each, for audits: [`state_name`], and the
    /// [`StepRecord`] under [`STEPS`].
    pub states: Option<WirePath>,
}

/// The file of the state after so many steps.
#[must_use]
pub fn state_name(index: usize) -> String {
    format!("state-{index}.safetensors")
}

/// The file of a checkpoint after so many steps.
#[must_use]
pub fn checkpoint_name(step: u32) -> String {
    format!("step-{step}.safetensors")
}

/// From the worker to its node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// The device is there.
    Ready(WorkerInfo),
    /// A model is loaded.
    Loaded(LoadedReport),
    /// A phase begins; without a job it is the loading of [`ToWorker::Load`].
    Phase {
        /// Which job.
        job: Option<JobId>,
        /// What begins.
        phase: Phase,
    },
    /// A step is done.
    Step(StepReport),
    /// A small picture of how the clip looks so far.
    Preview {
        /// Which job.
        job: JobId,
        /// Steps done.
        step: u32,
        /// PNG.
        png: Bytes<MAX_PREVIEW>,
    },
    /// A checkpoint is written.
    Checkpoint {
        /// Which job.
        job: JobId,
        /// Steps done.
        step: u32,
        /// The file.
        file: FileReport,
        /// Hash of the latents after that step.
        latents: BlobId,
    },
    /// The clip is written.
    Done(Box<DoneReport>),
    /// The step was looked at.
    Audited(Box<AuditReport>),
    /// The job failed, or a load, or the opening of the device.
    Failed {
        /// Which job; `None` for a load or the device.
        job: Option<JobId>,
        /// Why.
        failure: Failure,
    },
    /// The job was stopped as asked.
    Cancelled {
        /// Which job.
        job: JobId,
        /// Steps that were done.
        steps_done: u32,
    },
}

/// Who the worker is and what it computes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// The engine's name.
    pub engine: Name,
    /// Its version.
    pub version: Name,
    /// The device as it was opened.
    pub device: Name,
    /// The device's own name, such as a processor's or GPU's model.
    pub device_name: Name,
    /// CPU threads.
    pub threads: u32,
    /// The worker's process id.
    pub pid: u32,
}

/// A loaded model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadedReport {
    /// Which job asked for it, if one did.
    pub job: Option<JobId>,
    /// Which model.
    pub model: ModelId,
    /// How long it took, seconds.
    pub seconds: f64,
    /// The architecture that runs it.
    pub architecture: Name,
    /// In which numbers it computes.
    pub dtype: Name,
}

/// A step that is done.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Which job.
    pub job: JobId,
    /// Steps done.
    pub done: u32,
    /// Steps in all.
    pub total: u32,
    /// How long it took, seconds.
    pub seconds: f64,
}

/// Why something failed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Stable name of the cause.
    pub code: Name,
    /// The cause for the requester. May quote the prompt: never to be logged.
    pub text: Text<MAX_TEXT>,
    /// Whether another try, here or elsewhere, may succeed.
    pub retryable: bool,
}

impl Failure {
    /// A failure; what is too long is cut.
    #[must_use]
    pub fn new(code: &str, text: &str, retryable: bool) -> Self {
        Self { code: Name::truncated(code), text: Text::truncated(text), retryable }
    }
}

impl std::fmt::Debug for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Failure({}, retryable: {})", self.code, self.retryable)
    }
}

/// Where a worker is within a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Weights are read.
    Load,
    /// The prompt is encoded.
    Text,
    /// Steps are computed.
    Step,
    /// Latents become frames.
    Decode,
    /// Frames become a file.
    Encode,
}

impl Phase {
    /// Its name in metrics and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Text => "text",
            Self::Step => "step",
            Self::Decode => "decode",
            Self::Encode => "encode",
        }
    }
}

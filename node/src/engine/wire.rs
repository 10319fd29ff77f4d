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

use std::io::{Read, Write};

use kinoflock_inference::Commitment;
use kinoflock_protocol::audit::Leaf;
use kinoflock_protocol::codec::{self, Bytes, CodecError, List, Text};
use kinoflock_protocol::frame::{self, FrameError};
use kinoflock_protocol::id::{BlobId, JobId, ModelId};
use kinoflock_protocol::limits::{MAX_ADAPTERS, MAX_KEYFRAMES, MAX_LINE, MAX_NAME, MAX_PREVIEW, MAX_PROMPT};
use serde::{Deserialize, Serialize};

pub use self::adapter::AdapterUse;
pub use self::audit::{AuditReport, AuditRun, Hash, StatePaths};
pub use self::touch::{Mixed, Numbers, Places, Touch};

mod adapter;
mod audit;
mod touch;

/// The version of these messages. Both sides are of one release, or the daemon says that they are not.
pub const WIRE_VERSION: u32 = 5;
/// Greatest message, bytes: three prompts and the numbers of every operation, or a preview, with room.
pub const MAX_FRAME: usize = 128 * 1024;
/// Greatest path, bytes of UTF-8.
pub const MAX_PATH: usize = 4096;
/// Most timesteps that a run may name.
pub const MAX_TIMESTEPS: usize = 4096;
/// Most pictures of a run: the keyframes, the beginning, the end.
pub const MAX_PICTURES: usize = MAX_KEYFRAMES + 2;
/// Greatest explanation of a failure, bytes of UTF-8: cut where it is longer.
pub const MAX_TEXT: usize = MAX_LINE;

/// The mark that opens the conversation.
const MARK: [u8; 4] = *b"kfwk";

/// A path on this machine.
pub type WirePath = Text<MAX_PATH>;
/// A short name.
pub type Name = Text<MAX_NAME>;

/// Why the other side was not understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The pipe failed.
    #[error("worker pipe: {0}")]
    Io(#[from] std::io::Error),
    /// A frame over the limit or cut.
    #[error("worker pipe: {0}")]
    Frame(#[from] FrameError),
    /// A frame that is no message.
    #[error("worker pipe: {0}")]
    Codec(#[from] CodecError),
    /// The other side does not speak this language at all.
    #[error(
        "the program at the other end of the worker pipe is no kinoflock worker: it began with {given:02x?}"
    )]
    NotAWorker {
        /// What it began with instead of the mark.
        given: [u8; 4],
    },
    /// Another version.
    #[error(
        "worker speaks version {theirs} of the engine's language, this daemon speaks {ours}: install both from one release"
    )]
    Version {
        /// This side's version.
        ours: u32,
        /// The other side's.
        theirs: u32,
    },
}

impl WireError {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io(_) => "worker_pipe",
            Self::Frame(error) => error.code(),
            Self::Codec(error) => error.code(),
            Self::NotAWorker { .. } => "not_a_worker",
            Self::Version { .. } => "worker_version",
        }
    }
}

/// The first eight bytes each way. Their form is the same in all versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The version that the sender speaks.
    pub version: u32,
}

impl Greeting {
    /// Bytes of a greeting.
    pub const LEN: usize = 8;

    /// This release's greeting.
    pub const OURS: Self = Self { version: WIRE_VERSION };

    /// The bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&MARK);
        bytes[4..].copy_from_slice(&self.version.to_le_bytes());
        bytes
    }

    /// Reads the other side's greeting, and checks that it speaks our version.
    ///
    /// # Errors
    /// [`WireError::NotAWorker`] or [`WireError::Version`].
    pub fn check(bytes: [u8; Self::LEN]) -> Result<Self, WireError> {
        let [mark @ .., a, b, c, d] = bytes;
        if mark != MARK {
            return Err(WireError::NotAWorker { given: mark });
        }
        let theirs = u32::from_le_bytes([a, b, c, d]);
        if theirs != WIRE_VERSION {
            return Err(WireError::Version { ours: WIRE_VERSION, theirs });
        }
        Ok(Self { version: theirs })
    }
}

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

/// Name of the file with a run's [`StepRecord`].
pub const STEPS: &str = "steps";
/// Greatest [`StepRecord`], bytes: 64 for each of the most steps that a run may have.
pub const MAX_STEP_RECORD: usize = 8 << 20;

/// What a run committed to, one entry for each state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The leaves under the root.
    pub leaves: Vec<Leaf>,
    /// Hashes of the latents.
    pub latents: Vec<BlobId>,
}

impl StepRecord {
    /// The record of these states, whose hashes are `latents`.
    #[must_use]
    pub fn new(latents: &[[u8; 32]], commitment: &Commitment) -> Self {
        let latents: Vec<_> = latents.iter().map(|hash| BlobId::from_bytes(*hash)).collect();
        let leaf = |(latents, sampler)| Leaf::new(latents, sampler, &commitment.conditioning);
        Self { leaves: latents.iter().zip(&commitment.samplers).map(leaf).collect(), latents }
    }
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

/// A file that the worker wrote and synced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReport {
    /// Where.
    pub path: WirePath,
    /// Bytes.
    pub len: u64,
    /// blake3 of its content.
    pub blake3: BlobId,
}

/// Seconds that each phase took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Reading the weights; 0 where they were loaded.
    pub load: f64,
    /// The prompt.
    pub text: f64,
    /// All steps of this run.
    pub steps: f64,
    /// Latents to frames.
    pub decode: f64,
    /// What was left to encode when the frames were there, and writing the file.
    pub encode: f64,
}

impl Timings {
    /// Seconds without loading: what the job itself cost.
    #[must_use]
    pub fn compute(&self) -> f64 {
        self.text + self.steps + self.decode + self.encode
    }
}

/// What a run made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DoneReport {
    /// Which job.
    pub job: JobId,
    /// The MP4.
    pub clip: FileReport,
    /// The latents, if they were wanted.
    pub latents: Option<FileReport>,
    /// Root over the states of all steps: [`kinoflock_protocol::audit::root`].
    pub step_root: Option<BlobId>,
    /// Steps computed in this run, without those before a checkpoint that it went on from.
    pub steps_done: u32,
    /// Frames in the clip.
    pub frames: u32,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// How long each phase took.
    pub timings: Timings,
    /// Whether every frame has one colour throughout, the same in all: what a broken model makes.
    pub constant: bool,
    /// What the final latents are like.
    pub latents_summary: LatentsSummary,
}

/// Greatest number of latent values that a summary samples.
pub const MAX_SAMPLES: usize = kinoflock_protocol::limits::MAX_SAMPLES;

/// Figures of the final latents `[1, C, F, H, W]`, for the self-test.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LatentsSummary {
    /// Number of values.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub deviation: f64,
    /// Whether all values are finite.
    pub finite: bool,
    /// Value `i * count / n` for each of the `n` samples.
    pub samples: List<f32, MAX_SAMPLES>,
}

impl LatentsSummary {
    /// The figures of these values.
    #[must_use]
    pub fn of(values: &[f32]) -> Self {
        let count = values.len();
        let finite = values.iter().all(|value| value.is_finite());
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count.max(1) as f64;
        let spread = values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>();
        let samples = count.min(MAX_SAMPLES);
        Self {
            count: count as u64,
            mean,
            deviation: (spread / count.max(1) as f64).sqrt(),
            finite,
            samples: List::first_of((0..samples).map(|i| values[i * count / samples])),
        }
    }
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

/// A message as it goes over the pipe.
///
/// # Errors
/// [`WireError::Frame`] for one over [`MAX_FRAME`].
pub fn to_frame<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    Ok(frame::frame(&codec::encode(message), MAX_FRAME)?)
}

/// Writes a message and flushes.
///
/// # Errors
/// When the message is over the limit or the pipe fails.
pub fn write_message<T: Serialize>(pipe: &mut impl Write, message: &T) -> Result<(), WireError> {
    pipe.write_all(&to_frame(message)?)?;
    Ok(pipe.flush()?)
}

/// Reads a message; `None` at the end of the pipe.
///
/// # Errors
/// When the pipe fails or ends within a message, or the bytes are no message.
pub fn read_message<T: for<'de> Deserialize<'de>>(pipe: &mut impl Read) -> Result<Option<T>, WireError> {
    let mut header = [0; frame::HEADER_BYTES];
    let mut filled = 0;
    while filled < header.len() {
        match pipe.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Cut { missing: header.len() - filled }.into()),
            Ok(read) => filled += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut content = vec![0; frame::parse_header(header, MAX_FRAME)?];
    pipe.read_exact(&mut content)?;
    Ok(Some(decode(&content)?))
}

/// A message from the content of its frame.
///
/// # Errors
/// When the bytes are no message.
pub fn decode<T: for<'de> Deserialize<'de>>(content: &[u8]) -> Result<T, WireError> {
    Ok(codec::decode(content, MAX_FRAME)?)
}

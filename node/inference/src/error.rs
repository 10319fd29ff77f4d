//! What can go wrong between a request and its frames, one line each: what, which limit, which value, what to do.

use std::path::PathBuf;

use crate::adapter::AdapterError;
use crate::sampler::SamplerError;
use crate::text::TextError;
use crate::weights::WeightsError;

/// Why a model could not be loaded or a request not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The prompt has more tokens than the text encoder reads.
    #[error("prompt too long: {tokens} tokens, the limit is {limit}; this would be cut: {cut_text:?}")]
    PromptTooLong {
        /// Tokens in the prompt, with the end mark.
        tokens: usize,
        /// Tokens that the model reads, with the end mark.
        limit: usize,
        /// The end of the prompt that does not fit.
        cut_text: String,
    },
    /// A width or height that is not a multiple of the model's compression.
    #[error("{side} {given} cannot be made: it must be a multiple of {multiple}; the nearest is {nearest}")]
    Size {
        /// `width` or `height`.
        side: &'static str,
        /// What was asked for, pixels.
        given: usize,
        /// The model's multiple, pixels.
        multiple: usize,
        /// The nearest size that can be made, pixels.
        nearest: usize,
    },
    /// A number of frames that is not of the model's form.
    #[error(
        "{given} frames cannot be made: the count must be {multiple}k+{offset}; the nearest is {nearest}"
    )]
    Frames {
        /// What was asked for.
        given: usize,
        /// The model's temporal compression.
        multiple: usize,
        /// Frames beside the multiple.
        offset: usize,
        /// The nearest count that can be made.
        nearest: usize,
    },
    /// No denoising step was asked for.
    #[error("steps is 0: at least 1 step is needed")]
    ZeroSteps,
    /// A number in the request is not finite or is out of the range in which the arithmetic has a meaning.
    #[error("{field} is {given}: {rule}")]
    Number {
        /// The request's field.
        field: &'static str,
        /// What was given.
        given: f64,
        /// What it must be.
        rule: &'static str,
    },
    /// Latents of another shape than the request needs.
    #[error("{what} has shape {given:?}, this request needs {needed:?}")]
    LatentShape {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        given: Vec<usize>,
        /// The shape needed.
        needed: Vec<usize>,
    },
    /// A picture for a model that takes none, or none for one that does.
    #[error("{architecture} {rule}")]
    Image {
        /// The model's architecture.
        architecture: String,
        /// What it needs.
        rule: &'static str,
    },
    /// A second pass that a model does not make, or not so.
    #[error("{architecture} {rule}")]
    SecondPass {
        /// The model's architecture.
        architecture: String,
        /// What it needs.
        rule: &'static str,
    },
    /// An operation that this request or model cannot have.
    #[error("{op}: {reason}")]
    Operation {
        /// Its name in a job.
        op: &'static str,
        /// The limit and what was given.
        reason: String,
    },
    /// A checkpoint that belongs to another request or cannot be read.
    #[error("checkpoint cannot be resumed: {reason}")]
    Checkpoint {
        /// Why.
        reason: String,
    },
    /// The observer asked to stop.
    #[error("cancelled after {steps_done} of {steps} steps")]
    Cancelled {
        /// Steps that were finished.
        steps_done: usize,
        /// Steps that were asked for.
        steps: usize,
    },
    /// `model_index.json` names a pipeline that nobody here makes.
    #[error("unknown architecture {class:?} in {file}; known: {known}")]
    UnknownArchitecture {
        /// The class that the file names.
        class: String,
        /// The file.
        file: PathBuf,
        /// Every class that is known, separated by commas.
        known: String,
    },
    /// A configuration file that is missing, malformed, or holds a value that this engine does not know.
    #[error("{file}: {key} is {value}: {reason}")]
    Config {
        /// The file.
        file: PathBuf,
        /// The key within it, empty for the whole file.
        key: String,
        /// The value found.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that could not be read.
    #[error("cannot read {file}: {source}")]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The device has no memory left for this request.
    #[error(
        "out of device memory while {during}: ask for fewer frames, a smaller size, or a tiled decode ({detail})"
    )]
    OutOfMemory {
        /// The phase.
        during: &'static str,
        /// What the device said.
        detail: String,
    },
    /// A request that needs more memory than it may have.
    #[error(
        "this clip needs {needed} bytes of memory, {available} may be had: ask for fewer frames, a smaller size, or a \
         tiled decode"
    )]
    DoesNotFit {
        /// What its plan says, bytes.
        needed: u64,
        /// The limit, bytes.
        available: u64,
    },
    /// The result holds values that are not numbers.
    #[error("latents are not finite after step {step}: try f32 or bf16 instead of f16")]
    NotFinite {
        /// One-based step.
        step: usize,
    },
    /// One step cannot be looked at alone: it is no multiple of the model's output, by the sampler's rule or by what the
    /// request does inside the run.
    #[error("a step of {architecture} cannot be audited: it is not a change along the model's output alone")]
    NotAuditable {
        /// The model's architecture.
        architecture: String,
    },
    /// A device that this build or machine does not have.
    #[error("device {name:?} cannot be opened: {reason}")]
    Device {
        /// The name that was asked for.
        name: String,
        /// Why not.
        reason: String,
    },
    /// An adapter that cannot be used, or not with this model.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A weight file or tensor.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Tokenizer or text encoder.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Noise schedule.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// The tensor library.
    #[error("tensor operation failed: {0}")]
    Tensor(candle_core::Error),
}

impl Error {
    /// A short stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::PromptTooLong { .. } => "prompt_too_long",
            Self::Size { .. } => "size",
            Self::Frames { .. } => "frames",
            Self::ZeroSteps => "zero_steps",
            Self::Number { .. } => "number",
            Self::LatentShape { .. } => "latent_shape",
            Self::Image { .. } => "image",
            Self::SecondPass { .. } => "second_pass",
            Self::Operation { .. } => "operation",
            Self::Checkpoint { .. } => "checkpoint",
            Self::Cancelled { .. } => "cancelled",
            Self::UnknownArchitecture { .. } => "unknown_architecture",
            Self::Config { .. } => "config",
            Self::Read { .. } => "read",
            Self::OutOfMemory { .. } => "out_of_memory",
            Self::DoesNotFit { .. } => "memory_limit",
            Self::NotFinite { .. } => "not_finite",
            Self::NotAuditable { .. } => "not_auditable",
            Self::Device { .. } => "device",
            Self::Adapter(e) => e.fault.code(),
            Self::Weights(e) => e.code(),
            Self::Text(e) => e.code(),
            Self::Sampler(e) => e.code(),
            Self::Tensor(_) => "tensor",
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        let lower = text.to_lowercase();
        if lower.contains("out of memory")
            || lower.contains("out_of_memory")
            || lower.contains("cannot allocate")
        {
            return Self::OutOfMemory { during: "computing", detail: text };
        }
        Self::Tensor(error)
    }
}

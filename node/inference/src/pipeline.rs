//! What a model is to everybody else: a thing with facts about itself that turns a request into frames, while an
//! observer looks on and may stop it.
//!
//! The order of calls to an [`Observer`] within one [`Pipeline::generate`]: `phase(Text)`, `phase(Step)`, then for each
//! step `cancelled`, `step`, and where asked for `preview` and `checkpoint`, then `phase(Decode)` with `cancelled`
//! before it, and `frames` with `cancelled` between. Where components go in turn, `phase(Load)` comes instead of
//! `phase(Text)`, and again where another transformer is read between steps. A cancelled run answers
//! [`Error::Cancelled`] within one step.

pub mod conditions;
pub mod latents;
pub mod run;
pub mod touch;

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Places};
use crate::audit::{Commitment, Transition};
use crate::error::Error;
use crate::frames::RgbFrames;
use crate::offload::Offload;
pub use crate::sampler::checkpoint::Checkpoint;
use crate::sampler::guidance::GuidancePasses;
pub use conditions::Condition;
pub use touch::Touch;

/// How a model is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where it computes.
    pub device: Device,
    /// In which numbers. The text encoder uses bf16 where this is f16, because T5 overflows in f16.
    pub dtype: DType,
    /// The infix of the weight files to prefer, such as `fp16` or `bf16`; files without an infix are taken where there
    /// are none with it.
    pub variant: Option<String>,
    /// Whether components stay loaded.
    pub offload: Offload,
    /// Memory of the device that a run may take, bytes; `None` for no limit. [`Offload::Auto`] decides by it.
    pub memory: Option<u64>,
    /// The text encoder is on the CPU though the rest is not.
    pub text_on_cpu: bool,
    /// Where the model's layers are entered that adapters may change.
    pub places: Places,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            variant: None,
            offload: Offload::default(),
            memory: None,
            text_on_cpu: false,
            places: Places::default(),
        }
    }
}

impl LoadOptions {
    /// Those of the text encoder.
    #[must_use]
    pub fn for_text(&self) -> Self {
        let device = if self.text_on_cpu { Device::Cpu } else { self.device.clone() };
        Self { device, ..self.clone() }
    }
}

/// Opens `cpu`, `cuda`, `cuda:N`, `metal` or `metal:N`.
///
/// # Errors
/// When the name is unknown, or this build or machine lacks the device.
pub fn open_device(name: &str) -> Result<Device, Error> {
    let fault = |reason: String| Error::Device { name: name.to_owned(), reason };
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    let index: usize = index.parse().map_err(|_| fault(format!("{index:?} is no device number")))?;
    let opened = match kind {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Device::new_cuda(index),
        "metal" => Device::new_metal(index),
        _ => return Err(fault("known are cpu, cuda:N and metal:N".to_owned())),
    };
    opened.map_err(|error| fault(error.to_string()))
}

/// A video model that is ready to generate.
pub trait Pipeline: Send {
    /// Facts about the model.
    fn info(&self) -> &PipelineInfo;

    /// How many tokens a prompt has, with the end mark; compare with [`PipelineInfo::token_limit`].
    ///
    /// # Errors
    /// When the tokenizer fails.
    fn count_tokens(&self, prompt: &str) -> Result<usize, Error>;

    /// Which pictures are taken beside the prompt.
    fn pictures(&self) -> conditions::Takes;

    /// Checks everything about a request that can be known without computing; [`Pipeline::generate`] does so first.
    ///
    /// # Errors
    /// The first thing that the model cannot make, with the nearest that it can.
    fn check(&self, request: &GenerateRequest) -> Result<(), Error>;

    /// Makes the frames.
    ///
    /// # Errors
    /// What [`Pipeline::check`] finds, a cancel, or what the device reports.
    fn generate(
        &mut self,
        request: &GenerateRequest,
        observer: &mut dyn Observer,
    ) -> Result<Generated, Error>;

    /// What a run of this request commits to beside its latents: see [`crate::audit`].
    ///
    /// # Errors
    /// What [`Pipeline::check`] finds.
    fn commitment(&self, request: &GenerateRequest) -> Result<Commitment, Error>;

    /// The latents that a run begins with, in the shape in which the model keeps them between steps: packed
    /// `[1, tokens, C]` for LTX-Video; f32, on the CPU.
    ///
    /// # Errors
    /// When given latents have another shape.
    fn start(&self, request: &GenerateRequest) -> Result<Tensor, Error>;

    /// Computes one step anew, from these latents before it.
    ///
    /// # Errors
    /// When there is no such step, the sampler's steps cannot be audited ([`Error::NotAuditable`]), the latents have another shape, or what the device reports.
    fn transition(
        &mut self,
        request: &GenerateRequest,
        index: usize,
        latents: &Tensor,
    ) -> Result<Transition, Error>;

    /// The frames of latents after the last step.
    ///
    /// # Errors
    /// When the latents have another shape, or what the device reports.
    fn frames(&self, request: &GenerateRequest, latents: &Tensor) -> Result<RgbFrames, Error>;
}

/// Facts about a loaded model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PipelineInfo {
    /// The architecture's name, such as `ltx-video`.
    pub architecture: String,
    /// Width and height are multiples of this, pixels.
    pub size_multiple: usize,
    /// Which frame counts can be made.
    pub frame_rule: FrameRule,
    /// What a request holds when the artist says nothing.
    pub defaults: Defaults,
    /// Tokens that the model reads of a prompt, with the end mark.
    pub token_limit: usize,
    /// The model's size, from which work is computed.
    pub work: WorkConfig,
}

/// Frame counts of the form `multiple * k + offset`, `k >= 0`, at least one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameRule {
    /// The temporal compression.
    pub multiple: usize,
    /// Frames beside the multiple.
    pub offset: usize,
}

impl FrameRule {
    /// Of a model whose latent frames come in whole tokens, the first of them a single picture.
    pub(crate) fn of_tokens(work: &WorkConfig) -> Self {
        let (ratio, patch) = (work.temporal_ratio, work.patch[0]);
        Self { multiple: ratio * patch, offset: ratio * (patch - 1) + 1 }
    }

    /// Whether `frames` can be made.
    #[must_use]
    pub fn allows(&self, frames: usize) -> bool {
        frames >= self.offset.max(1) && (frames - self.offset).is_multiple_of(self.multiple)
    }

    /// The count that can be made and lies nearest; the larger of two at equal distance.
    #[must_use]
    pub fn nearest(&self, frames: usize) -> usize {
        let steps = (frames.saturating_sub(self.offset) + self.multiple / 2) / self.multiple;
        (steps * self.multiple + self.offset).max(1)
    }
}

/// What a request holds when the artist says nothing; the `defaults` of a folder's `kinoflock.json`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Defaults {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Frames.
    pub frames: usize,
    /// Frames a second.
    pub fps: f64,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance; 1 is none.
    pub guidance: f64,
}

/// The sizes from which a job's work is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkConfig {
    /// Transformer blocks.
    pub layers: usize,
    /// Width of a token in the transformer.
    pub hidden: usize,
    /// Inner width of a feed-forward.
    pub feed_forward: usize,
    /// Text tokens that every video token attends to.
    pub context_tokens: usize,
    /// Width of a text token before projection.
    pub context_width: usize,
    /// Pixels along a side of a latent cell.
    pub spatial_ratio: usize,
    /// Frames in a latent frame.
    pub temporal_ratio: usize,
    /// Latent cells in a token: time, height, width.
    pub patch: [usize; 3],
    /// Latent channels.
    pub latent_channels: usize,
    /// Parameters of the transformer.
    pub transformer_parameters: u64,
    /// Parameters of the VAE.
    pub vae_parameters: u64,
    /// Parameters of the text encoder.
    pub text_parameters: u64,
}

impl WorkConfig {
    /// With the numbers of parameters of transformer, VAE and text encoder.
    pub(crate) fn with_parameters(self, [transformer, vae, text]: [u64; 3]) -> Self {
        Self { transformer_parameters: transformer, vae_parameters: vae, text_parameters: text, ..self }
    }
}

/// What to make.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// What the clip shows.
    pub prompt: String,
    /// What it should not show; used with guidance above 1.
    pub negative_prompt: String,
    /// Every random draw follows from it.
    pub seed: u64,
    /// Frames of the clip.
    pub frames: usize,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Frames a second; the model's motion depends on it.
    pub fps: f64,
    /// Denoising steps; ignored where `timesteps` are given. Of each stage of each part, for a model that makes a clip part
    /// by part in stages; its first part may have more.
    pub steps: usize,
    /// Steps of each stage of the first part and of each later one, for such a model, instead of what it makes of `steps`.
    pub stage_steps: Option<[Vec<usize>; 2]>,
    /// Classifier-free guidance; 1 and below is none.
    pub guidance: f64,
    /// Guidance of the later parts, for a model that makes a clip part by part, instead of what it makes of `guidance`.
    pub later_guidance: Option<f64>,
    /// 0 to 1: how far guidance is scaled back to the spread of the unguided prediction; 0 is off.
    pub guidance_rescale: f64,
    /// The model's own timesteps (0 to 1000, falling), for distilled models.
    pub timesteps: Option<Vec<f64>>,
    /// Guidance that grows over the steps, for models that are run so.
    pub dynamic_guidance: bool,
    /// Pictures that frames of the clip are to show, for models that take some.
    pub conditions: Vec<Condition>,
    /// The noise with which pictures become latents instead of noise from the seed, `[1, C, F, H, W]`, in the order in
    /// which it is drawn; empty for noise from the seed.
    pub condition_noise: Vec<Tensor>,
    /// How much noise is put on fully given latents at each step, times the square of the noise level, for models that
    /// are run so.
    pub condition_noise_scale: f64,
    /// Where to start instead of noise from the seed: `[1, C, F, H, W]`, or in the shape that [`Pipeline::start`] gives.
    pub initial_latents: Option<Tensor>,
    /// How a run goes on from `initial_latents` as finished ones, for models that do; `None` takes them for noise.
    pub second_pass: Option<SecondPass>,
    /// The steps' noise instead of noise from the seed, in the order in which they take it and in the shape of
    /// [`Pipeline::start`], or in the shape that a stage begins with; empty for noise from the seed.
    pub step_noise: Vec<Tensor>,
    /// How guidance's two predictions are computed; it changes nothing of the result.
    pub guidance_passes: GuidancePasses,
    /// What changes the model's layers for this run, in this order.
    pub adapters: Vec<Adapter>,
    /// What is changed inside the run.
    pub touch: Touch,
    /// How to decode.
    pub decode: DecodeOptions,
    /// The noise level that a timestep-conditioned decoder is told, 0 to 1.
    pub decode_timestep: f64,
    /// How much noise such a decoder's input gets; `decode_timestep` where not given.
    pub decode_noise_scale: Option<f64>,
    /// The decoder's noise instead of noise from the seed, in the order in which it is drawn: `[1, C, F, H, W]` for a
    /// timestep-conditioned decoder, then what the decoder injects; empty for noise from the seed.
    pub decode_noise: Vec<Tensor>,
    /// Cut a prompt that is too long instead of refusing it.
    pub truncate_prompt: bool,
    /// A checkpoint after every so many steps; 0 is never.
    pub checkpoint_every: usize,
    /// A preview after every so many steps; 0 is never.
    pub preview_every: usize,
    /// Go on from here.
    pub resume: Option<Checkpoint>,
}

impl GenerateRequest {
    /// A request for a prompt with a model's defaults and seed 0.
    #[must_use]
    pub fn new(prompt: impl Into<String>, defaults: &Defaults) -> Self {
        Self {
            prompt: prompt.into(),
            negative_prompt: String::new(),
            seed: 0,
            frames: defaults.frames,
            width: defaults.width,
            height: defaults.height,
            fps: defaults.fps,
            steps: defaults.steps,
            stage_steps: None,
            guidance: defaults.guidance,
            later_guidance: None,
            guidance_rescale: 0.0,
            timesteps: None,
            dynamic_guidance: false,
            conditions: Vec::new(),
            condition_noise: Vec::new(),
            condition_noise_scale: 0.15,
            initial_latents: None,
            second_pass: None,
            step_noise: Vec::new(),
            guidance_passes: GuidancePasses::Auto,
            adapters: Vec::new(),
            touch: Touch::default(),
            decode: DecodeOptions::default(),
            decode_timestep: 0.05,
            decode_noise_scale: Some(0.025),
            decode_noise: Vec::new(),
            truncate_prompt: false,
            checkpoint_every: 0,
            preview_every: 0,
            resume: None,
        }
    }
}

/// How a run goes on from finished latents.
#[derive(Debug, Clone)]
pub struct SecondPass {
    /// Part of the schedule that is run, above 0 to 1: how much may change.
    pub strength: f64,
    /// The noise that hides them instead of noise from the seed, in the shape of the clip's latents.
    pub noise: Option<Tensor>,
    /// How far latents that were made larger get back the mean and spread of each channel, 0 to 1.
    pub adain: f64,
    /// How far large values of theirs are pulled in, 0 to 1.
    pub tone_map: f64,
}

impl SecondPass {
    /// With a part of the schedule, and nothing else changed.
    #[must_use]
    pub fn new(strength: f64) -> Self {
        Self { strength, noise: None, adain: 0.0, tone_map: 0.0 }
    }

    /// How many of a schedule's steps, the last ones, are run.
    pub(crate) fn steps_of(&self, steps: usize) -> Result<usize, Error> {
        let kept = ((steps as f64 * self.strength) as usize).min(steps);
        if kept == 0 {
            let (given, rule) =
                (self.strength, "of so few steps no whole one is left: ask for more of either");
            return Err(Error::Number { field: "denoise_strength", given, rule });
        }
        Ok(kept)
    }
}

/// How latents become frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Decode in square tiles of about this many pixels, so that memory has a bound; `None` decodes whole pictures.
    pub tile: Option<usize>,
    /// Decode in runs of about this many frames; `None` decodes the clip at once, or in the runs that the model needs.
    pub chunk: Option<usize>,
    /// Make latents only: [`Generated::frames`] is empty.
    pub skip: bool,
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Phase {
    /// Weights are read; before the steps also where they are read for this run and the prompt is encoded between.
    Load,
    /// The prompt is encoded.
    Text,
    /// Steps are computed.
    Step,
    /// Latents become frames.
    Decode,
}

/// A finished step.
#[derive(Debug, Clone, Copy)]
pub struct StepEvent<'a> {
    /// Zero-based.
    pub index: usize,
    /// Steps in all.
    pub total: usize,
    /// The timestep that was computed, 0 to 1000.
    pub timestep: f64,
    /// The noise level that the latents now have, 0 to 1.
    pub sigma: f64,
    /// The latents now, in the shape that [`Pipeline::start`] gives, f32.
    pub latents: &'a Tensor,
    /// blake3 of the latents' little-endian bytes.
    pub hash: [u8; 32],
}

/// Sees a run and may stop it. Every method does nothing by default.
pub trait Observer {
    /// A phase begins.
    fn phase(&mut self, _phase: Phase) {}
    /// A step is done.
    fn step(&mut self, _event: &StepEvent<'_>) {}
    /// A rough picture of what the clip becomes, one pixel a latent cell, one frame a latent frame.
    fn preview(&mut self, _frames: &RgbFrames) {}
    /// The next finished frames of the clip, while others may still be decoded. What is given back is kept for
    /// [`Generated::frames`].
    fn frames(&mut self, frames: RgbFrames) -> Option<RgbFrames> {
        Some(frames)
    }
    /// A state from which the run can be taken up again.
    fn checkpoint(&mut self, _checkpoint: &Checkpoint) {}
    /// Asked before every step and between the pieces of a decode; true ends the run with [`Error::Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// An observer that does not look.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {}

/// What a run made.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The clip; empty where decoding was skipped, and without the frames that the observer took.
    pub frames: RgbFrames,
    /// The latents that it was decoded from, normalised, `[1, C, F, H, W]`, f32, on the CPU.
    pub latents: Tensor,
    /// blake3 of the latents before the first step.
    pub start_hash: [u8; 32],
    /// blake3 of the latents after each step, from the first on, those before a resume included; for steps before a start
    /// within the schedule that of the latents there.
    pub step_hashes: Vec<[u8; 32]>,
    /// Steps computed in this run, without those before a resume.
    pub steps_done: usize,
    /// What was asked for beside the final latents, by the names of [`touch`], f32, on the CPU.
    pub kept: BTreeMap<String, Tensor>,
}

/// Reads a JSON file into a value.
///
/// # Errors
/// When the file cannot be read or does not have the form of `T`; both name the file.
pub fn read_json<T: serde::de::DeserializeOwned>(file: &std::path::Path) -> Result<T, Error> {
    let text =
        std::fs::read_to_string(file).map_err(|source| Error::Read { file: file.to_owned(), source })?;
    serde_json::from_str(&text).map_err(|error| config_error(file, "", "not readable", error))
}

/// An error about a configuration value.
pub(crate) fn config_error(
    file: impl Into<PathBuf>,
    key: &str,
    value: impl ToString,
    reason: impl ToString,
) -> Error {
    Error::Config {
        file: file.into(),
        key: key.to_owned(),
        value: value.to_string(),
        reason: reason.to_string(),
    }
}

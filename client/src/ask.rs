//! What an artist asks for, and how it becomes a job: the model's defaults fill what was left open.
//!
//! Nothing is clamped. What the model's arithmetic cannot express is refused with the nearest that it can.

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{List, Text, TooLong};
use kinoflock_protocol::job::{Adapter, Audience, Keyframe, Op, OpValue, Returns, Share};
use kinoflock_protocol::limits::{MAX_ADAPTERS, MAX_NAME, MAX_OPS};
use kinoflock_protocol::model::{ModelManifest, RuleError};
use kinoflock_protocol::ops;
use kinoflock_protocol::{ClipId, JobShape, JobSpec, Micro, Millis, ModelId, Nonce, Prompt, UnixMillis};

/// Checkpoints of a job with many steps.
const CHECKPOINTS: u32 = 8;

/// What an artist asks for.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    /// Name or id of the model; the only one offered if none is named.
    pub model: Option<String>,
    /// What is to be seen.
    pub prompt: String,
    /// What is not to be seen.
    pub negative_prompt: String,
    /// Seed; random if none is given.
    pub seed: Option<u64>,
    /// How long.
    pub length: Option<Length>,
    /// Width and height in pixels.
    pub size: Option<(u32, u32)>,
    /// Frames per second.
    pub fps: Option<Micro>,
    /// Number of denoising steps.
    pub steps: Option<u32>,
    /// Guidance scale.
    pub guidance: Option<Micro>,
    /// Further operations by name.
    pub ops: Vec<(String, OpValue)>,
    /// Latents to begin from: bytes of a safetensors file.
    pub initial_latents: Option<Vec<u8>>,
    /// Their channels, latent frames, rows and columns, where they are a volume: the clip is then of that size, if
    /// nothing else is said.
    pub volume: Option<[usize; 4]>,
    /// What frames are to show.
    pub pictures: Pictures,
    /// Adapters on top of the model, in order. Their weights are in the store.
    pub adapters: Vec<Adapter>,
    /// Whether the final latents are wanted too.
    pub latents: bool,
    /// Whether small pictures of how it looks are wanted meanwhile.
    pub previews: bool,
    /// Name that the clip is to carry.
    pub artist: Option<String>,
    /// Licence that the clip is to carry.
    pub licence: Option<String>,
    /// Whether only nodes will do that neither train on what they see nor claim rights.
    pub require_terms: bool,
    /// Whether only the nodes that were named may run it.
    pub pinned: bool,
    /// How many nodes are to watch the job while this machine is away; two if nothing is said.
    pub custodians: Option<usize>,
    /// How wide the clip may be announced, and who may hold sealed copies.
    pub share: Share,
    /// After how many steps each a checkpoint is wanted; as the client chooses if nothing is said.
    pub checkpoint_every: Option<u32>,
    /// Percent of such jobs that are audited by another node when their clips are here. Above 0 each commits to its steps.
    pub audit_share: u8,
    /// After how long the result is of no more use.
    pub deadline: Option<Millis>,
}

/// What frames of a clip are to show: bytes of PNG or JPEG files, and of a clip.
#[derive(Debug, Clone, Default)]
pub struct Pictures {
    /// What it begins with.
    pub start: Option<Vec<u8>>,
    /// What it ends with.
    pub end: Option<Vec<u8>>,
    /// What frames between are to show, fully.
    pub keyframes: Vec<(u32, Vec<u8>)>,
    /// The clip whose last frames it begins with.
    pub extend: Option<Vec<u8>>,
}

impl Pictures {
    /// Every file.
    pub fn files(&self) -> impl Iterator<Item = &Vec<u8>> {
        let between = self.keyframes.iter().map(|(_, image)| image);
        self.start.iter().chain(&self.end).chain(&self.extend).chain(between)
    }

    fn enter(&self, spec: &mut JobSpec) -> Result<(), AskError> {
        let blob = |bytes: &Option<Vec<u8>>| bytes.as_deref().map(BlobRef::of);
        (spec.start_image, spec.end_image, spec.extend) =
            (blob(&self.start), blob(&self.end), blob(&self.extend));
        let parents = spec.extend.map(|clip| ClipId::from(clip.id));
        spec.parents = List::first_of(parents);
        let keyframe = |(frame, image): &(u32, Vec<u8>)| Keyframe {
            frame: *frame,
            image: BlobRef::of(image),
            strength: Micro::ONE,
        };
        spec.keyframes = List::new(self.keyframes.iter().map(keyframe).collect::<Vec<_>>())
            .map_err(|TooLong { limit, given, .. }| AskError::TooManyKeyframes { limit, given })?;
        match self.keyframes.iter().find(|(frame, _)| *frame >= spec.frames) {
            Some((given, _)) => Err(AskError::KeyframeBeyondEnd { frames: spec.frames, given: *given }),
            None => Ok(()),
        }
    }
}

/// How long a clip is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// So many frames, exactly.
    Frames(u32),
    /// About so many seconds: the nearest number of frames that the model can make.
    Seconds(Micro),
}

/// Why it cannot become a job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// A count or size of zero.
    #[error("{what}: 0 is below the least possible, 1")]
    Zero {
        /// Which.
        what: &'static str,
    },
    /// A number that must be above zero.
    #[error("{what}: {given} is not above 0")]
    NotPositive {
        /// Which.
        what: &'static str,
        /// Value given.
        given: Micro,
    },
    /// A text beyond the protocol's limit.
    #[error("{what} of {given} bytes exceeds the limit of {limit} bytes")]
    TooLong {
        /// Which.
        what: &'static str,
        /// Most bytes.
        limit: usize,
        /// Bytes given.
        given: usize,
    },
    /// Too many operations.
    #[error("{given} operations exceed the limit of {limit}")]
    TooManyOps {
        /// Most operations.
        limit: usize,
        /// Operations given.
        given: usize,
    },
    /// Too many adapters.
    #[error("{given} adapters exceed the limit of {limit}")]
    TooManyAdapters {
        /// Most adapters.
        limit: usize,
        /// Adapters given.
        given: usize,
    },
    /// Too many keyframes.
    #[error("{given} keyframes exceed the limit of {limit}")]
    TooManyKeyframes {
        /// Most keyframes.
        limit: usize,
        /// Keyframes given.
        given: usize,
    },
    /// A keyframe that the clip does not reach.
    #[error("keyframe {given} lies beyond the last frame, {}", frames.saturating_sub(1))]
    KeyframeBeyondEnd {
        /// Frames of the clip.
        frames: u32,
        /// Keyframe given.
        given: u32,
    },
    /// What the model cannot make.
    #[error(transparent)]
    Rule(#[from] RuleError),
}

impl AskError {
    /// Stable name for `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Zero { .. } => "zero",
            Self::NotPositive { .. } => "not_positive",
            Self::TooLong { .. } => "too_long",
            Self::TooManyOps { .. } => "too_many_operations",
            Self::TooManyAdapters { .. } => "too_many_adapters",
            Self::TooManyKeyframes { .. } => "too_many_keyframes",
            Self::KeyframeBeyondEnd { .. } => "keyframe_beyond_end",
            Self::Rule(error) => error.code(),
        }
    }
}

impl Ask {
    /// Checks what is wrong with any model, before anybody is asked.
    ///
    /// # Errors
    /// Zeros, and texts beyond the protocol's limits.
    pub fn check(&self) -> Result<(), AskError> {
        let (width, height) = self.size.unwrap_or((1, 1));
        let frames = match self.length {
            Some(Length::Frames(frames)) => frames,
            Some(Length::Seconds(given)) if given <= Micro::ZERO => {
                return Err(AskError::NotPositive { what: "seconds", given });
            }
            _ => 1,
        };
        let counts =
            [("frames", frames), ("width", width), ("height", height), ("steps", self.steps.unwrap_or(1))];
        if let Some((what, _)) = counts.into_iter().find(|(_, value)| *value == 0) {
            return Err(AskError::Zero { what });
        }
        if let Some(given) = self.fps.filter(|fps| *fps <= Micro::ZERO) {
            return Err(AskError::NotPositive { what: "fps", given });
        }
        prompt("prompt", &self.prompt)?;
        prompt("negative prompt", &self.negative_prompt)?;
        name("artist", self.artist.as_deref())?;
        name("licence", self.licence.as_deref())?;
        self.adapters()?;
        self.ops().map(drop)
    }

    /// The job for a model. Signing time and addressee are set when a node was chosen.
    ///
    /// # Errors
    /// As [`Ask::check`], and what the model cannot make.
    pub fn to_spec(
        &self,
        model: ModelId,
        manifest: &ModelManifest,
        seed: u64,
        nonce: Nonce,
    ) -> Result<JobSpec, AskError> {
        self.check()?;
        let (rules, defaults) = (&manifest.rules, &manifest.defaults);
        let own = self.volume_size(manifest);
        let usual = own.map_or((defaults.width, defaults.height), |(_, size)| size);
        let (width, height) = self.size.unwrap_or(usual);
        let fps = self.fps.unwrap_or(defaults.fps);
        let frames = match self.length {
            None => own.map_or(defaults.frames, |(frames, _)| frames),
            Some(Length::Frames(frames)) => frames,
            Some(Length::Seconds(seconds)) => {
                let nearest = rules.nearest_frames(frames_of(seconds, fps));
                nearest.first().copied().unwrap_or(defaults.frames)
            }
        };
        rules.check(frames, width, height)?;
        let guidance = self.guidance.unwrap_or_else(|| self.usual_guidance(defaults.guidance));
        let steps = self.steps.unwrap_or_else(|| self.usual_steps(defaults.steps));
        let shape = JobShape { frames, width, height, steps, guided: guidance != Micro::ONE };
        let words = prompt("prompt", &self.prompt)?;
        let mut spec = JobSpec::generate(model, words, nonce, UnixMillis::default(), shape);
        spec.negative_prompt = prompt("negative prompt", &self.negative_prompt)?;
        spec.seed = seed;
        spec.fps = fps;
        spec.guidance = guidance;
        spec.initial_latents = self.initial_latents.as_deref().map(BlobRef::of);
        spec.adapters = self.adapters()?;
        self.pictures.enter(&mut spec)?;
        spec.returns = Returns {
            latents: self.latents || self.brings_back(),
            previews: self.previews,
            // Steps that pictures reach into cannot be looked at alone.
            step_root: self.audit_share > 0
                && manifest.work.counts_by_steps()
                && !self.reaches_in()
                && self.pictures.files().next().is_none(),
            checkpoint_every: self.checkpoint_every.unwrap_or_else(|| checkpoint_every(steps)),
        };
        spec.addressed_to = Audience::Anyone;
        spec.share = self.share;
        spec.ops = self.ops()?;
        spec.artist = name("artist", self.artist.as_deref())?;
        spec.licence = name("licence", self.licence.as_deref())?;
        Ok(spec)
    }

    fn adapters(&self) -> Result<List<Adapter, MAX_ADAPTERS>, AskError> {
        let too_many = |TooLong { limit, given, .. }| AskError::TooManyAdapters { limit, given };
        List::new(self.adapters.clone()).map_err(too_many)
    }

    /// The operation of this name, if it is asked for.
    fn op(&self, name: &str) -> Option<&OpValue> {
        self.ops.iter().find(|(given, _)| given == name).map(|(_, value)| value)
    }

    /// Whether the run is reached into, so that its steps do not follow from each other.
    fn reaches_in(&self) -> bool {
        self.ops.iter().any(|(name, value)| ops::reaches_in(name, value))
    }

    /// Whether more latents than the final ones come back, which come in one file with these.
    fn brings_back(&self) -> bool {
        self.op("latents.return_steps").is_some()
            || self.op("latents.return_noise") == Some(&OpValue::Flag(true))
    }

    /// Frames and size of a clip of the given latents.
    fn volume_size(&self, manifest: &ModelManifest) -> Option<(u32, (u32, u32))> {
        let [channels, frames, rows, columns] = self.volume?.map(|count| u32::try_from(count).ok());
        let work = &manifest.work;
        if channels? != work.transformer.channels {
            return None;
        }
        let frames = (frames?.checked_sub(1)?).checked_mul(work.vae.temporal)?.checked_add(1)?;
        let side = |cells: Option<u32>| cells?.checked_mul(work.vae.spatial);
        Some((frames, (side(columns)?, side(rows)?)))
    }

    /// A job's work is counted by its guidance: where it follows a curve, by the curve's greatest point.
    fn usual_guidance(&self, default: Micro) -> Micro {
        match self.op("guidance.curve") {
            Some(OpValue::Numbers(points)) => points.iter().copied().max().unwrap_or(default),
            Some(OpValue::Number(point)) => *point,
            Some(OpValue::Whole(point)) => Micro(point.saturating_mul(Micro::ONE.0)),
            _ => default,
        }
    }

    /// As many steps as timesteps; one where nothing is computed.
    fn usual_steps(&self, default: u32) -> u32 {
        match (self.op("decode_only"), self.op("timesteps")) {
            (Some(OpValue::Flag(true)), _) => 1,
            (_, Some(OpValue::Numbers(timesteps))) => timesteps.len() as u32,
            (_, Some(OpValue::Number(_) | OpValue::Whole(_))) => 1,
            _ => default,
        }
    }

    fn ops(&self) -> Result<List<Op, MAX_OPS>, AskError> {
        let op = |(key, value): &(String, OpValue)| match name("operation", Some(key)) {
            Ok(Some(name)) => Ok(Op { name, value: value.clone() }),
            Ok(None) => Err(AskError::Zero { what: "length of an operation's name" }),
            Err(error) => Err(error),
        };
        let ops: Vec<Op> = self.ops.iter().map(op).collect::<Result<_, _>>()?;
        List::new(ops).map_err(|TooLong { limit, given, .. }| AskError::TooManyOps { limit, given })
    }
}

/// A job with few steps is as quickly begun anew; of one with many, an eighth at most is lost with its node.
fn checkpoint_every(steps: u32) -> u32 {
    if steps < CHECKPOINTS { 0 } else { steps / CHECKPOINTS }
}

fn frames_of(seconds: Micro, fps: Micro) -> u32 {
    let frames = i128::from(seconds.0) * i128::from(fps.0) / 1_000_000;
    u32::try_from((frames + 500_000) / 1_000_000).unwrap_or(u32::MAX).max(1)
}

fn prompt(what: &'static str, text: &str) -> Result<Prompt, AskError> {
    Prompt::new(text).map_err(|TooLong { limit, given, .. }| AskError::TooLong { what, limit, given })
}

fn name(what: &'static str, text: Option<&str>) -> Result<Option<Text<MAX_NAME>>, AskError> {
    let too_long = |TooLong { limit, given, .. }| AskError::TooLong { what, limit, given };
    text.filter(|text| !text.is_empty()).map(|text| Text::new(text).map_err(too_long)).transpose()
}

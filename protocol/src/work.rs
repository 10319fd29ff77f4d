//! What a job costs, computed by everybody alike from the architecture's configuration and the job.
//!
//! Whole numbers only, in 10^6 FLOP (a multiply and its add count as two), so that every machine finds the same.
//! Counted are the matrices and the attention of the transformer for each denoising step and guidance pass, the
//! convolutions of the VAE's decoder, and the text encoder. It is a measure to compare and to credit, not a
//! prediction to the last operation. A pass over `n` video and `s` text tokens costs `a + b n + c n^2`, where `c`
//! comes from attention, which every video token pays to every other.

use std::fmt;
use std::iter::Sum;
use std::num::Saturating;

use serde::{Deserialize, Serialize};

use crate::codec::{List, text_u64};

/// FLOP in one unit of [`Work`].
const UNIT: u128 = 1_000_000;
/// Most levels of a VAE decoder.
const MAX_LEVELS: usize = 8;

/// Work in 10^6 FLOP.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Work(#[serde(with = "text_u64")] pub u64);

impl Work {
    /// Milliseconds at a speed in work units a second; the longest time if the speed is 0.
    pub fn millis_at(self, speed: u64) -> crate::units::Millis {
        let millis = (u128::from(self.0) * 1000).checked_div(u128::from(speed));
        crate::units::Millis(millis.and_then(|ms| u64::try_from(ms).ok()).unwrap_or(u64::MAX))
    }

    /// Speed in work units a second when this took so many milliseconds (at least one).
    pub fn speed(self, took: crate::units::Millis) -> u64 {
        let speed = u128::from(self.0) * 1000 / u128::from(took.0.max(1));
        u64::try_from(speed).unwrap_or(u64::MAX)
    }

    /// The part of it that `steps` of `total` steps are.
    pub fn share(self, steps: u32, total: u32) -> Self {
        Self((u128::from(self.0) * u128::from(steps.min(total)) / u128::from(total.max(1))) as u64)
    }

    /// The sum, at most the greatest number.
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self(0), Self::plus)
    }
}

impl fmt::Display for Work {
    /// In TFLOP, with three digits after the point.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} TFLOP", self.0 / 1_000_000, self.0 % 1_000_000 / 1000)
    }
}

/// What decides how much a job costs with a given model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JobShape {
    /// Number of frames.
    pub frames: u32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Number of denoising steps.
    pub steps: u32,
    /// Whether classifier-free guidance doubles every step.
    pub guided: bool,
}

/// What a model's work is computed from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkModel {
    /// The transformer.
    pub transformer: Transformer,
    /// The VAE's decoder.
    pub vae: Vae,
    /// The text encoder.
    pub text: TextEncoder,
    /// How steps and frames make passes.
    pub schedule: Schedule,
}

/// A diffusion transformer's figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transformer {
    /// How text takes part.
    pub attention: Attention,
    /// Blocks of the main sort.
    pub layers: u32,
    /// Blocks that see text and video as one sequence with one set of weights, after the main ones.
    pub single_layers: u32,
    /// Channels of the video stream: heads times their size.
    pub width: u32,
    /// Channels between the two halves of the feed-forward part.
    pub feed_forward: u32,
    /// Matrices of the feed-forward part: 2, or 3 if it is gated.
    pub feed_forward_matrices: u32,
    /// Channels of the text stream; for cross attention, of the projected text.
    pub text_width: u32,
    /// Text tokens.
    pub text_tokens: u32,
    /// Latent channels.
    pub channels: u32,
    /// Latent frames in one token.
    pub patch_frames: u32,
    /// Latent pixels along one side of one token.
    pub patch_side: u32,
}

/// How text takes part in a transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attention {
    /// Video attends to itself, then to the text.
    Cross,
    /// Text and video attend to each other as one sequence.
    Joint,
    /// As one sequence, through the same weights.
    Shared,
}

/// A VAE's figures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vae {
    /// Pixels along one side of one latent pixel.
    pub spatial: u32,
    /// Frames in one latent frame; the first frame stands apart.
    pub temporal: u32,
    /// Levels of the decoder.
    pub levels: List<VaeLevel, MAX_LEVELS>,
}

/// Convolutions at one resolution of a VAE decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaeLevel {
    /// Channels in and out.
    pub channels: u32,
    /// Convolutions of 3x3x3.
    pub convolutions: u32,
    /// Pixels of the clip for each place of this level.
    pub pixels: u32,
}

/// A text encoder's figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextEncoder {
    /// Parameters that each token meets.
    #[serde(with = "text_u64")]
    pub parameters: u64,
    /// Tokens, with padding.
    pub tokens: u32,
}

/// How steps and frames make passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Schedule {
    /// Every step sees the whole clip.
    Whole,
    /// Latent frame by latent frame, each in three stages of rising resolution (a quarter of the tokens less for
    /// each), with earlier frames as conditions: the one before at full, older ones at a quarter of the stage's
    /// tokens (Pyramid Flow, Jin et al. 2024). Every stage has all the steps.
    Pyramid,
}

/// What this job costs with this model.
pub fn work(model: &WorkModel, shape: &JobShape) -> Work {
    let passes = if shape.guided { 2 } else { 1 };
    let latent = LatentShape::of(model, shape);
    let per_step = match model.schedule {
        Schedule::Whole => model.transformer.pass(latent.tokens),
        Schedule::Pyramid => pyramid_step(&model.transformer, &latent),
    };
    let denoise = per_step.saturating_mul(u128::from(shape.steps)).saturating_mul(passes);
    let text = 2 * u128::from(model.text.parameters) * u128::from(model.text.tokens) * passes;
    let total = denoise.saturating_add(text).saturating_add(model.vae.decode(shape));
    Work(u64::try_from(total.div_ceil(UNIT)).unwrap_or(u64::MAX))
}

struct LatentShape {
    frames: u128,
    frame_tokens: u128,
    tokens: u128,
}

impl LatentShape {
    fn of(model: &WorkModel, shape: &JobShape) -> Self {
        let (t, v) = (&model.transformer, &model.vae);
        let latent_frames = shape.frames.saturating_sub(1) / v.temporal.max(1) + 1;
        let frames = u128::from(latent_frames.div_ceil(t.patch_frames.max(1)));
        let side = u64::from(v.spatial.max(1)) * u64::from(t.patch_side.max(1));
        let along = |pixels: u32| u128::from(u64::from(pixels).div_ceil(side));
        let frame_tokens = along(shape.width) * along(shape.height);
        Self { frames, frame_tokens, tokens: frames * frame_tokens }
    }
}

impl Transformer {
    /// FLOP of one pass over `n` video tokens.
    fn pass(&self, n: u128) -> u128 {
        let (a, b, c) = self.coefficients();
        a.saturating_add(b.saturating_mul(n)).saturating_add(c.saturating_mul(n.saturating_mul(n)))
    }

    /// `(a, b, c)` of `a + b n + c n^2` FLOP for one pass over `n` video tokens. A stranger's manifest may hold any
    /// figures, so nothing here overflows.
    fn coefficients(&self) -> (u128, u128, u128) {
        let whole = |figure: u32| Saturating(u128::from(figure));
        let two = Saturating(2u128);
        let [d, f, m] = [self.width, self.feed_forward, self.feed_forward_matrices].map(whole);
        let [layers, single] = [self.layers, self.single_layers].map(whole);
        let [dt, s] = [self.text_width, self.text_tokens].map(whole);
        let patch =
            whole(self.channels) * whole(self.patch_frames) * whole(self.patch_side) * whole(self.patch_side);
        let own = two * two * d * d + m * d * f;
        let shared_text = s * own + two * s * s * d;
        let (a, b) = match self.attention {
            // Queries and the output for video, keys and values for text; scores and sums over the text.
            Attention::Cross => (layers * two * s * dt * d, layers * (own + two * d * d + two * s * d)),
            // Four projections and a feed-forward part for each stream; the text's part of the square.
            Attention::Joint => {
                let text_feed_forward = f * dt / Saturating(d.0.max(1));
                let text = two * two * s * dt * d + m * s * dt * text_feed_forward + two * s * s * d;
                (layers * text, layers * (own + two * two * s * d))
            }
            Attention::Shared => (layers * shared_text, layers * (own + two * two * s * d)),
        };
        let a = a + single * shared_text;
        let b = b + single * (own + two * two * s * d) + two * patch * d;
        let c = (layers + single) * two * d;
        ((two * a).0, (two * b).0, (two * c).0)
    }
}

impl Vae {
    /// FLOP of decoding a clip.
    fn decode(&self, shape: &JobShape) -> u128 {
        let pixels = u128::from(shape.frames) * u128::from(shape.width) * u128::from(shape.height);
        let level = |level: &VaeLevel| {
            let (c, convolutions) = (u128::from(level.channels), u128::from(level.convolutions));
            (2 * 27 * c * c * convolutions).saturating_mul(pixels) / u128::from(level.pixels.max(1))
        };
        self.levels.iter().map(level).fold(0, u128::saturating_add)
    }
}

/// FLOP of one step in every stage of every latent frame, in closed form over the frames.
///
/// In stage `k` a frame has `t_k = tokens / 4^(2-k)` tokens. Frame `u` is passed with the one before it (`t_k`, if
/// there is one) and `u - 1` older ones (`t_k / 4` each). With `q` for a quarter of `t_k`, that is 4q, 8q, 9q, 10q...
fn pyramid_step(transformer: &Transformer, latent: &LatentShape) -> u128 {
    /// Parts of a token, so that quarters of sixteenths stay whole.
    const PARTS: u128 = 64;
    let (a, b, c) = transformer.coefficients();
    let older = latent.frames.saturating_sub(1);
    // Sums over u = 1..=older of (7 + u) and of (7 + u)^2.
    let sum = (7 * older).saturating_add(older.saturating_mul(older + 1) / 2);
    let squares = (49 * older)
        .saturating_add((7 * older).saturating_mul(older + 1))
        .saturating_add(older.saturating_mul(older + 1).saturating_mul(2 * older + 1) / 6);
    let mut total = 0u128;
    for stage in 0..STAGES {
        let q = latent.frame_tokens * 4u128.pow(stage);
        let linear = b.saturating_mul(q).saturating_mul(4 + sum) / PARTS;
        let square = c.saturating_mul(q).saturating_mul(q).saturating_mul(16 + squares) / (PARTS * PARTS);
        total = total
            .saturating_add(a.saturating_mul(latent.frames))
            .saturating_add(linear)
            .saturating_add(square);
    }
    total
}

/// Stages of a latent frame that is made in stages.
const STAGES: u32 = 3;

/// T5 v1.1 XXL, encoder only.
const T5_XXL: u64 = 4_762_000_000;
/// UMT5 XXL, encoder only.
const UMT5_XXL: u64 = 5_681_000_000;

/// What the published files of a model say, whatever its architecture: everything from which its work follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures<'a> {
    /// The transformer.
    pub transformer: Transformer,
    /// Parameters of the text encoder that each token meets.
    pub text_parameters: u64,
    /// Pixels along one side of one latent pixel.
    pub spatial: u32,
    /// Frames in one latent frame.
    pub temporal: u32,
    /// The VAE decoder's levels from the finest to the coarsest: channels and residual blocks.
    pub decoder: &'a [(u32, u32)],
    /// Pixels along one side of what the finest level works on.
    pub vae_patch: u32,
    /// How steps and frames make passes.
    pub schedule: Schedule,
}

/// The configuration of an LTX-Video model, from its published files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LtxConfig<'a> {
    /// Transformer blocks.
    pub layers: u32,
    /// Attention heads.
    pub heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Channels of the text that cross attention sees.
    pub cross_dim: u32,
    /// Latent channels.
    pub channels: u32,
    /// Most prompt tokens.
    pub text_tokens: u32,
    /// Parameters of the text encoder.
    pub text_parameters: u64,
    /// Pixels along one side of one latent pixel.
    pub spatial: u32,
    /// Frames in one latent frame.
    pub temporal: u32,
    /// The VAE decoder's levels from the finest to the coarsest: channels and residual blocks.
    pub decoder: &'a [(u32, u32)],
    /// Pixels along one side of what the finest level works on.
    pub vae_patch: u32,
}

impl WorkModel {
    /// Any model, from its figures. The text encoder reads as many tokens as the transformer sees.
    pub fn of(figures: &Figures<'_>) -> Self {
        let Figures { transformer, text_parameters, spatial, temporal, decoder, vae_patch, schedule } =
            *figures;
        let coarsest = spatial.saturating_mul(spatial).saturating_mul(temporal);
        let levels = levels(decoder, vae_patch.saturating_mul(vae_patch), coarsest, temporal);
        Self {
            transformer,
            vae: Vae { spatial, temporal, levels },
            text: TextEncoder { parameters: text_parameters, tokens: transformer.text_tokens },
            schedule,
        }
    }

    /// Any model of the LTX-Video architecture.
    pub fn ltx(config: &LtxConfig<'_>) -> Self {
        let width = config.heads.saturating_mul(config.head_dim);
        Self::of(&Figures {
            transformer: Transformer {
                attention: Attention::Cross,
                layers: config.layers,
                single_layers: 0,
                width,
                feed_forward: width.saturating_mul(4),
                feed_forward_matrices: 2,
                text_width: config.cross_dim,
                text_tokens: config.text_tokens,
                channels: config.channels,
                patch_frames: 1,
                patch_side: 1,
            },
            text_parameters: config.text_parameters,
            spatial: config.spatial,
            temporal: config.temporal,
            decoder: config.decoder,
            vae_patch: config.vae_patch,
            schedule: Schedule::Whole,
        })
    }

    /// LTX-Video 2B (0.9.0).
    pub fn ltx_2b() -> Self {
        Self::ltx_with(&[(128, 4), (256, 3), (512, 3), (512, 7)])
    }

    /// LTX-Video 2B with the decoder of 0.9.1.
    pub fn ltx_2b_091() -> Self {
        Self::ltx_with(&[(256, 5), (512, 6), (1024, 7), (1024, 8)])
    }

    /// LTX-Video 2B with the decoder of 0.9.5 and later.
    pub fn ltx_2b_095() -> Self {
        Self::ltx_with(&[(256, 5), (512, 5), (1024, 5), (1024, 5)])
    }

    fn ltx_with(decoder: &[(u32, u32)]) -> Self {
        Self::ltx(&LtxConfig {
            layers: 28,
            heads: 32,
            head_dim: 64,
            cross_dim: 2048,
            channels: 128,
            text_tokens: 128,
            text_parameters: T5_XXL,
            spatial: 32,
            temporal: 8,
            decoder,
            vae_patch: 4,
        })
    }

    /// LTX-Video 13B (0.9.7 and later).
    pub fn ltx_13b() -> Self {
        let transformer = Transformer {
            layers: 48,
            width: 4096,
            feed_forward: 16_384,
            text_width: 4096,
            ..Self::ltx_2b().transformer
        };
        Self { transformer, ..Self::ltx_2b_095() }
    }

    /// CogVideoX 2B.
    pub fn cogvideox_2b() -> Self {
        Self::cogvideox(30, 1920, 1)
    }

    /// CogVideoX 5B.
    pub fn cogvideox_5b() -> Self {
        Self::cogvideox(42, 3072, 1)
    }

    /// CogVideoX 1.5 5B.
    pub fn cogvideox_15_5b() -> Self {
        Self::cogvideox(42, 3072, 2)
    }

    fn cogvideox(layers: u32, width: u32, patch_frames: u32) -> Self {
        Self::of(&Figures {
            transformer: Transformer {
                attention: Attention::Shared,
                layers,
                single_layers: 0,
                width,
                feed_forward: width * 4,
                feed_forward_matrices: 2,
                text_width: width,
                text_tokens: 226,
                channels: 16,
                patch_frames,
                patch_side: 2,
            },
            text_parameters: T5_XXL,
            spatial: 8,
            temporal: 4,
            decoder: &[(128, 4), (256, 4), (256, 4), (512, 6)],
            vae_patch: 1,
            schedule: Schedule::Whole,
        })
    }

    /// Mochi 1 preview.
    pub fn mochi_1() -> Self {
        Self::of(&Figures {
            transformer: Transformer {
                attention: Attention::Joint,
                layers: 48,
                single_layers: 0,
                width: 3072,
                feed_forward: 8192,
                feed_forward_matrices: 3,
                text_width: 1536,
                text_tokens: 256,
                channels: 12,
                patch_frames: 1,
                patch_side: 2,
            },
            text_parameters: T5_XXL,
            spatial: 8,
            temporal: 6,
            decoder: &[(128, 3), (256, 4), (512, 6), (768, 3)],
            vae_patch: 1,
            schedule: Schedule::Whole,
        })
    }

    /// Pyramid Flow miniFLUX.
    pub fn pyramid_flow_miniflux() -> Self {
        Self::of(&Figures {
            transformer: Transformer {
                attention: Attention::Joint,
                layers: 8,
                single_layers: 16,
                width: 1920,
                feed_forward: 7680,
                feed_forward_matrices: 2,
                text_width: 1920,
                text_tokens: 128,
                channels: 16,
                patch_frames: 1,
                patch_side: 2,
            },
            text_parameters: T5_XXL,
            spatial: 8,
            temporal: 8,
            decoder: &[(128, 4), (256, 4), (512, 4), (512, 6)],
            vae_patch: 1,
            schedule: Schedule::Pyramid,
        })
    }

    /// Wan 2.1 T2V 1.3B.
    pub fn wan_1_3b() -> Self {
        Self::wan(30, 1536, 8960)
    }

    /// Wan 2.1 T2V 14B.
    pub fn wan_14b() -> Self {
        Self::wan(40, 5120, 13_824)
    }

    fn wan(layers: u32, width: u32, feed_forward: u32) -> Self {
        Self::of(&Figures {
            transformer: Transformer {
                attention: Attention::Cross,
                layers,
                single_layers: 0,
                width,
                feed_forward,
                feed_forward_matrices: 2,
                text_width: width,
                text_tokens: 512,
                channels: 16,
                patch_frames: 1,
                patch_side: 2,
            },
            text_parameters: UMT5_XXL,
            spatial: 8,
            temporal: 4,
            decoder: &[(96, 3), (192, 3), (384, 3), (384, 5)],
            vae_patch: 1,
            schedule: Schedule::Whole,
        })
    }

    /// Whether a run has as many states as its job has steps. Elsewhere every stage has all the steps, so that neither a
    /// checkpoint nor a state for an audit can be told by a job's step.
    pub fn counts_by_steps(&self) -> bool {
        self.schedule == Schedule::Whole
    }

    /// About how many passes a step of a clip of so many frames is.
    pub fn passes(&self, frames: u32) -> u32 {
        match self.schedule {
            Schedule::Whole => 1,
            Schedule::Pyramid => {
                let latent = frames.saturating_sub(1) / self.vae.temporal.max(1);
                latent.saturating_add(1).saturating_mul(STAGES)
            }
        }
    }
}

/// Levels of a decoder from the finest to the coarsest: (channels, residual blocks of two convolutions). The finest
/// has `finest` pixels for each place, each further one `2 * 2 * 2` times as many until time is not divided any more
/// (`temporal`), then `2 * 2` times, up to `coarsest`.
fn levels(blocks: &[(u32, u32)], finest: u32, coarsest: u32, temporal: u32) -> List<VaeLevel, MAX_LEVELS> {
    let (mut pixels, mut time) = (finest.max(1), 1);
    List::first_of(blocks.iter().enumerate().map(|(i, (channels, residuals))| {
        let last = i + 1 == blocks.len();
        let level = VaeLevel {
            channels: *channels,
            convolutions: residuals.saturating_mul(2),
            pixels: if last { coarsest.max(1) } else { pixels.min(coarsest.max(1)) },
        };
        let factor = if time < temporal { 8 } else { 4 };
        (pixels, time) = (pixels.saturating_mul(factor), time * 2);
        level
    }))
}

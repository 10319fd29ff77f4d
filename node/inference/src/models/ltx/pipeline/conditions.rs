//! Given pictures in a run of LTX-Video, as `LTXConditionPipeline` and `LTXImageToVideoPipeline` put them there.
//!
//! Tokens are those of the clip's latent frames, and before them those of latent frames that stand for keyframes: what is
//! given for frame 0 is laid into the clip's own first latent frames; of what is given for a later frame the first two
//! latent frames stand before the clip's with that frame's time, and the rest is laid into the clip. A token given with
//! strength `s` starts as `lerp(noise, latents, s)`, is told a noise level of at most `1 - s`, and is not touched before
//! the run's noise level has come down to that. On fully given ones noise is put anew at each step.

use candle_core::{DType, Device, Tensor};

use super::{LtxClass, LtxPipeline, pack, unpack};
use crate::error::Error;
use crate::models::ltx::vae::LtxVae;
use crate::pipeline::GenerateRequest;
use crate::pipeline::conditions::{Condition, condition_noise};
use crate::pipeline::latents::Volume;
use crate::rng::{Stream, normal_tensor};

/// Latent frames of a clip that stand before those that are made, where it is given for a later frame than 0.
const PREFIX: usize = 2;
/// Strengths and noise levels closer than this are the same.
const EPSILON: f32 = 1e-6;

/// Where a request's pictures go.
pub(super) struct Layout {
    pieces: Vec<Piece>,
    /// Pictures that are used of each condition.
    counts: Vec<usize>,
    /// The clip's frame at which each latent frame before the clip's begins.
    times: Vec<usize>,
    /// How strongly each latent frame is given, those before the clip's first.
    strengths: Vec<f32>,
}

/// A stretch of a condition's latent frames and its place.
struct Piece {
    condition: usize,
    /// Its first latent frame in the condition.
    from: usize,
    /// Its first latent frame in the run.
    to: usize,
    len: usize,
    strength: f64,
    /// Which draw hides it, where it stands before the clip's latent frames.
    hiding: Option<usize>,
}

impl Layout {
    /// For a clip of `latent_frames`, with `ratio` frames in a latent frame.
    pub(super) fn new(request: &GenerateRequest, latent_frames: usize, ratio: usize) -> Self {
        let counts: Vec<_> = request.conditions.iter().map(|given| used(given, request, ratio)).collect();
        let before = |given: &Condition, count: usize| {
            if given.frame == 0 { 0 } else { ((count - 1) / ratio + 1).min(PREFIX) }
        };
        let all = || request.conditions.iter().zip(&counts);
        let extra: usize = all().map(|(given, &count)| before(given, count)).sum();
        let mut layout = Self {
            pieces: Vec::new(),
            counts: counts.clone(),
            times: Vec::with_capacity(extra),
            strengths: vec![0.0; extra + latent_frames],
        };
        let mut draws = 0;
        for (condition, (given, &count)) in all().enumerate() {
            let (len, ahead) = ((count - 1) / ratio + 1, before(given, count));
            let piece = |from: usize, to: usize, len: usize, hiding: Option<usize>| Piece {
                condition,
                from,
                to,
                len,
                strength: given.strength,
                hiding,
            };
            if ahead > 0 {
                layout.put(piece(0, layout.times.len(), ahead, Some(draws + 1)));
                let starts = (0..ahead).map(|index| given.frame + picture(index, ratio));
                layout.times.extend(starts);
            }
            if len > ahead {
                layout.put(piece(ahead, extra + given.frame / ratio + ahead, len - ahead, None));
            }
            draws += 1 + usize::from(ahead > 0);
        }
        layout
    }

    fn put(&mut self, piece: Piece) {
        self.strengths[piece.to..piece.to + piece.len].fill(piece.strength as f32);
        self.pieces.push(piece);
    }

    /// Pictures of the condition that has most, where there is one.
    pub(super) fn longest(&self) -> Option<usize> {
        self.counts.iter().copied().max()
    }

    /// Latent frames before the clip's own.
    pub(super) fn extra(&self) -> usize {
        self.times.len()
    }

    /// Whether nothing is given.
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The clip's frame at which each of the run's latent frames begins.
    pub(super) fn times(&self, volume: &Volume, ratio: usize) -> Vec<usize> {
        let own = (0..volume.grid()[0]).map(|frame| picture(frame * volume.patch[0], ratio));
        self.times.iter().copied().chain(own).collect()
    }

    /// The noise that hides the latent frames before the clip's own, `[1, C, F, H, W]`.
    pub(super) fn hiding(&self, request: &GenerateRequest, volume: &Volume) -> Result<Option<Tensor>, Error> {
        let hidden = self.pieces.iter().filter_map(|piece| Some((piece, piece.hiding?)));
        let noise = hidden.map(|(piece, draw)| {
            let shape = [1, volume.channels, piece.len, volume.cells[1], volume.cells[2]];
            condition_noise(request, draw, &shape, &Device::Cpu)
        });
        let noise = noise.collect::<Result<Vec<_>, _>>()?;
        Ok(if noise.is_empty() { None } else { Some(Tensor::cat(&noise, 2)?) })
    }

    /// One value a token of what is one value a latent frame, `[1, tokens]`.
    fn tokens(
        &self,
        value: impl Fn(f32) -> f32,
        volume: &Volume,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let [_, rows, columns] = volume.grid();
        let each = |&strength: &f32| std::iter::repeat_n(value(strength), rows * columns);
        let values: Vec<f32> = self.strengths.iter().flat_map(each).collect();
        let count = values.len();
        Tensor::from_vec(values, (1, count), device)
    }
}

/// The first picture of a latent frame: latent frame 0 is one picture.
fn picture(latent_frame: usize, ratio: usize) -> usize {
    (latent_frame * ratio + 1).saturating_sub(ratio)
}

/// How many pictures fit into the clip and make whole latent frames.
fn used(given: &Condition, request: &GenerateRequest, ratio: usize) -> usize {
    let fitting = given.count().min(request.frames - given.frame).max(1);
    (fitting - 1) / ratio * ratio + 1
}

/// What a step does with each token.
pub(super) struct Levels {
    /// The timestep that each is told, `[1, tokens]`.
    pub(super) timesteps: Tensor,
    /// Their noise level, `[1, tokens, 1]`.
    pub(super) sigmas: Tensor,
    /// By how much it changes, `[1, tokens, 1]`; 0 where the token stays as it is.
    pub(super) changes: Tensor,
}

impl super::parts::Plan {
    /// The tokens' levels at a step.
    pub(super) fn levels(&self, index: usize, device: &Device) -> candle_core::Result<Levels> {
        let (schedule, t) = (&self.schedule, self.schedule.timesteps[index]);
        let scale = schedule.scale();
        let timestep = |strength: f32| match self.class {
            LtxClass::Text => t * (1.0 - strength),
            LtxClass::Condition => t.min((1.0 - strength) * scale),
        };
        let sigma = |strength: f32| match self.class {
            LtxClass::Text => schedule.sigmas[index] * (1.0 - strength),
            LtxClass::Condition => timestep(strength) / scale,
        };
        let change = |strength: f32| match self.class {
            LtxClass::Text if strength > 0.0 => 0.0,
            LtxClass::Text => schedule.change(index),
            LtxClass::Condition if t / scale - EPSILON < 1.0 - strength => {
                schedule.change_from(timestep(strength))
            }
            LtxClass::Condition => 0.0,
        };
        Ok(Levels {
            timesteps: self.layout.tokens(timestep, &self.volume, &Device::Cpu)?,
            sigmas: self.layout.tokens(sigma, &self.volume, device)?.unsqueeze(2)?,
            changes: self.layout.tokens(change, &self.volume, device)?.unsqueeze(2)?,
        })
    }
}

/// A request's pictures as latents.
pub(super) struct Given {
    /// Of each piece of the layout, `[1, C, F, H, W]`, f32.
    pieces: Vec<Tensor>,
    /// What is fully given, in the run's shape.
    full: Tensor,
    /// 1 where a token is fully given, `[1, tokens, 1]`.
    mask: Tensor,
}

impl Given {
    /// Encodes the pictures.
    pub(super) fn new(
        model: &LtxPipeline,
        request: &GenerateRequest,
        layout: &Layout,
        volume: &Volume,
    ) -> Result<Self, Error> {
        let encoder = model.load_encoder()?;
        let mut draw = 0;
        let mut encoded = Vec::with_capacity(request.conditions.len());
        for (given, &count) in request.conditions.iter().zip(&layout.counts) {
            encoded.push(encode(model, &encoder, request, (given, count), draw)?);
            draw += 1 + usize::from(given.frame > 0);
        }
        let piece = |piece: &Piece| encoded[piece.condition].narrow(2, piece.from, piece.len)?.contiguous();
        let pieces = layout.pieces.iter().map(piece).collect::<candle_core::Result<Vec<_>>>()?;
        let shape =
            [1, layout.strengths.len() * volume.grid()[1] * volume.grid()[2], volume.packed_shape()[2]];
        let nothing = Tensor::zeros(&shape, DType::F32, &model.base.device)?;
        let full = lay(&nothing, layout, volume, &pieces)?;
        let is_full = |strength: f32| if strength > 1.0 - EPSILON { 1.0 } else { 0.0 };
        let mask = layout.tokens(is_full, volume, &model.base.device)?.unsqueeze(2)?;
        Ok(Self { pieces, full, mask })
    }

    /// The latents that a run begins with, from noise.
    pub(super) fn lay(
        &self,
        noise: &Tensor,
        layout: &Layout,
        volume: &Volume,
    ) -> candle_core::Result<Tensor> {
        lay(noise, layout, volume, &self.pieces)
    }

    /// The latents before a step: what is fully given gets that step's noise.
    pub(super) fn noised(
        &self,
        request: &GenerateRequest,
        plan: &super::parts::Plan,
        index: usize,
        latents: &Tensor,
    ) -> Result<Tensor, Error> {
        if plan.class == LtxClass::Text || request.condition_noise_scale <= 0.0 {
            return Ok(latents.clone());
        }
        let noise = match request.step_noise.get(index) {
            Some(noise) => noise.to_dtype(DType::F32)?.to_device(latents.device())?,
            None => {
                normal_tensor(request.seed, Stream::Step(index as u32), latents.shape(), latents.device())?
            }
        };
        let level = f64::from(plan.schedule.timesteps[index] / plan.schedule.scale());
        let noised = (&self.full + (noise * (request.condition_noise_scale * level * level))?)?;
        let mask = self.mask.to_dtype(DType::U8)?.broadcast_as(latents.shape())?;
        Ok(mask.where_cond(&noised, latents)?)
    }
}

/// The normalised latents of the first `count` of a condition's pictures, drawn from what the encoder says of them.
fn encode(
    model: &LtxPipeline,
    encoder: &LtxVae,
    request: &GenerateRequest,
    (given, count): (&Condition, usize),
    draw: usize,
) -> Result<Tensor, Error> {
    let moments = encoder.encode(&given.video(count, &model.base.device, model.base.dtype)?, None)?;
    let noise = condition_noise(request, draw, moments.mean.dims(), &model.base.device)?;
    Ok(encoder.normalize(&moments.sample(&noise)?)?)
}

/// Mixes the pieces into tokens, each as strongly as it is given.
fn lay(tokens: &Tensor, layout: &Layout, volume: &Volume, pieces: &[Tensor]) -> candle_core::Result<Tensor> {
    let [_, rows, columns] = volume.cells;
    let frames = layout.strengths.len();
    let mut x = unpack(tokens, [frames, rows, columns], volume.patch)?;
    for (piece, latents) in layout.pieces.iter().zip(pieces) {
        let old = x.narrow(2, piece.to, piece.len)?;
        let mixed = mix(&old, latents, piece.strength)?;
        let end = piece.to + piece.len;
        let parts = [x.narrow(2, 0, piece.to)?, mixed, x.narrow(2, end, frames - end)?];
        x = Tensor::cat(&parts.into_iter().filter(|part| part.elem_count() > 0).collect::<Vec<_>>(), 2)?;
    }
    pack(&x, volume.patch)
}

/// `lerp(a, b, amount)` from the nearer end, as torch computes it: 1 gives `b` itself.
fn mix(a: &Tensor, b: &Tensor, amount: f64) -> candle_core::Result<Tensor> {
    let way = (b - a)?;
    if amount < 0.5 { a + (way * amount)? } else { b - (way * (1.0 - amount))? }
}

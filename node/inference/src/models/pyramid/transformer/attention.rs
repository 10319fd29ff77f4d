//! Attention in Pyramid Flow's blocks: text sees itself and the first frame, a frame sees the text, itself and the frames
//! before it, and the text's filling sees the filling alone.
//!
//! Frames lie in the order of time, so what a frame sees is the beginning of the sequence up to its own end. The sequence
//! is therefore attended to in pieces, text and then frame by frame, each over that beginning: no score is computed to be
//! thrown away, and the only masks are those of the filling.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::models::pyramid::config::{TransformerConfig, Variant};
use crate::models::pyramid::rope::RopeTables;
use crate::nn::attention::attention;
use crate::nn::linear::Linear;
use crate::nn::norm::rms_norm;

/// What is added to a score that does not count.
const HIDDEN: f64 = f32::MIN as f64;

/// Where the tokens lie and what they may see.
pub(super) struct Layout {
    rope: RopeTables,
    text: usize,
    /// Tokens of each frame, in order.
    frames: Vec<usize>,
    masks: Option<Masks>,
}

/// Where a prompt in the batch is filled up.
struct Masks {
    /// For the text's queries: `[B, 1, text, text + first frame]`.
    text: Tensor,
    /// For a frame's queries, over the whole sequence: `[B, 1, 1, tokens]`.
    frames: Tensor,
}

impl Layout {
    /// `mask` is `[B, text]`, 1 or 0, with a 0 somewhere where it is `filled`; `frames` are the tokens of each frame.
    pub(super) fn new(rope: RopeTables, mask: &Tensor, filled: bool, frames: Vec<usize>) -> Result<Self> {
        let (batch, text) = mask.dims2()?;
        let masks = filled
            .then(|| {
                let tokens: usize = frames.iter().sum();
                let video = Tensor::ones((batch, tokens), DType::F32, mask.device())?;
                let seen = Tensor::cat(&[mask, &video], 1)?;
                let hide = |seen: &Tensor| seen.affine(-HIDDEN, HIDDEN);
                let first = text + frames.first().copied().unwrap_or_default();
                let keys = seen.narrow(1, 0, first)?.reshape((batch, 1, 1, first))?;
                let queries = mask.reshape((batch, 1, text, 1))?;
                let same = queries.broadcast_eq(&keys)?.to_dtype(DType::F32)?;
                Ok::<_, candle_core::Error>(Masks {
                    text: hide(&same)?,
                    frames: hide(&seen.reshape((batch, 1, 1, text + tokens))?)?,
                })
            })
            .transpose()?;
        Ok(Self { rope, text, frames, masks })
    }

    /// Mixes values; all are `[B, tokens, heads, width]` with the text first, queries and keys not turned yet. Gives
    /// `[B, tokens, heads * width]`.
    fn mix(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let scale = 1.0 / (query.dim(3)? as f64).sqrt();
        let (query, key) = (self.rope.apply(query)?, self.rope.apply(key)?);
        let mut pieces = Vec::with_capacity(1 + self.frames.len());
        let mut piece = |start: usize, length: usize, keys: usize, mask: Option<&Tensor>| {
            let seen = |x: &Tensor| x.narrow(1, 0, keys);
            pieces.push(attention(
                &query.narrow(1, start, length)?,
                &seen(&key)?,
                &seen(value)?,
                mask,
                scale,
            )?);
            Ok::<_, candle_core::Error>(())
        };
        let first = self.text + self.frames.first().copied().unwrap_or_default();
        piece(0, self.text, first, self.masks.as_ref().map(|masks| &masks.text))?;
        let mut start = self.text;
        for &length in &self.frames {
            let keys = start + length;
            let mask = self.masks.as_ref().map(|masks| masks.frames.narrow(3, 0, keys)).transpose()?;
            piece(start, length, keys, mask.as_ref())?;
            start = keys;
        }
        Tensor::cat(&pieces, 1)?.flatten_from(2)
    }
}

/// Query, key and value of a stream, with the norms of the first two.
struct Projections {
    query: Linear,
    key: Linear,
    value: Linear,
    norm_query: Tensor,
    norm_key: Tensor,
    /// Of the norms of query and key.
    epsilon: f64,
    heads: usize,
    head: usize,
}

impl Projections {
    /// `names` are those of the three projections and the two norms.
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>, names: [&str; 5]) -> Result<Self> {
        let width = config.inner();
        let head = config.attention_head_dim;
        let linear = |name: &str| Linear::load(width, width, true, vb.pp(name));
        let norm = |name: &str| vb.get(head, &format!("{name}.weight"));
        Ok(Self {
            query: linear(names[0])?,
            key: linear(names[1])?,
            value: linear(names[2])?,
            norm_query: norm(names[3])?,
            norm_key: norm(names[4])?,
            epsilon: match config.variant {
                Variant::Flux => 1e-6,
                Variant::Mmdit => 1e-5,
            },
            heads: config.num_attention_heads,
            head,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, tokens, _) = x.dims3()?;
        let split = |x: Tensor| x.reshape((batch, tokens, self.heads, self.head));
        Ok([
            rms_norm(&split(self.query.forward(x)?)?, Some(&self.norm_query), self.epsilon)?,
            rms_norm(&split(self.key.forward(x)?)?, Some(&self.norm_key), self.epsilon)?,
            split(self.value.forward(x)?)?,
        ])
    }
}

/// Attention over text and video with projections of their own.
pub(super) struct Joint {
    context: Projections,
    video: Projections,
    video_out: Linear,
}

impl Joint {
    pub(super) fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let norms = match config.variant {
            Variant::Flux => ["norm_added_q", "norm_added_k"],
            Variant::Mmdit => ["norm_add_q", "norm_add_k"],
        };
        let added = ["add_q_proj", "add_k_proj", "add_v_proj", norms[0], norms[1]];
        Ok(Self {
            context: Projections::load(config, vb, added)?,
            video: Projections::load(config, vb, OWN)?,
            video_out: Linear::load(width, width, true, vb.pp("to_out").pp(0))?,
        })
    }

    /// Text and video mixed, before their last projections.
    pub(super) fn mix(&self, context: &Tensor, video: &Tensor, layout: &Layout) -> Result<(Tensor, Tensor)> {
        let (context, video) = (self.context.forward(context)?, self.video.forward(video)?);
        let joined = |part: usize| Tensor::cat(&[&context[part], &video[part]], 1);
        let mixed = layout.mix(&joined(0)?, &joined(1)?, &joined(2)?)?;
        let (text, whole) = (layout.text, mixed.dim(1)?);
        Ok((mixed.narrow(1, 0, text)?.contiguous()?, mixed.narrow(1, text, whole - text)?.contiguous()?))
    }

    pub(super) fn video_out(&self, mixed: &Tensor, gate: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.video_out.forward_gated(mixed, gate, residual)
    }
}

const OWN: [&str; 5] = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];

/// Attention within one stream.
pub(super) struct Single(Projections);

impl Single {
    pub(super) fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self(Projections::load(config, vb, OWN)?))
    }

    pub(super) fn mix(&self, x: &Tensor, layout: &Layout) -> Result<Tensor> {
        let [query, key, value] = self.0.forward(x)?;
        layout.mix(&query, &key, &value)
    }
}

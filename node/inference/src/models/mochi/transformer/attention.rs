//! Attention of video and text together: each has its own projections and norms, the softmax runs over both.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::text::TextContext;
use crate::models::mochi::config::TransformerConfig;
use crate::models::mochi::rope::RopeTables;
use crate::nn::attention::attention;
use crate::nn::linear::Linear;
use crate::nn::norm::rms_norm;

/// Epsilon of the norms of query and key.
const QK_EPSILON: f64 = 1e-5;

pub(super) struct JointAttention {
    video: Projections,
    text: Projections,
    out: Linear,
    /// Where the text is changed.
    text_out: Option<Linear>,
}

struct Projections {
    query: Linear,
    key: Linear,
    value: Linear,
    norm_query: Tensor,
    norm_key: Tensor,
    heads: usize,
    head: usize,
}

/// Query, key and value, `[B, tokens, heads, head]` each.
struct Parts([Tensor; 3]);

impl JointAttention {
    pub(super) fn load(config: &TransformerConfig, answers: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        let (width, text) = (config.inner(), config.pooled_projection_dim);
        let video = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
        let added = ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"];
        Ok(Self {
            video: Projections::load(config, width, video, vb)?,
            text: Projections::load(config, text, added, vb)?,
            out: Linear::load(width, width, true, vb.pp("to_out.0"))?,
            text_out: if answers {
                Some(Linear::load(width, text, true, vb.pp("to_add_out"))?)
            } else {
                None
            },
        })
    }

    /// What video `[B, tokens, width]` and, where it is changed, text `[B, text tokens, text width]` get to see.
    ///
    /// A sample's text tokens that count stand together before the filling in the result; filling gets zeros before the
    /// last projection.
    pub(super) fn forward(
        &self,
        video: &Tensor,
        words: &Tensor,
        text: &TextContext,
        rope: &RopeTables,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (batch, tokens, _) = video.dims3()?;
        let Parts([query, key, value]) = self.video.parts(video)?;
        let seen = Parts([rope.apply(&query)?, rope.apply(&key)?, value]);
        let read = self.text.parts(words)?;
        let mut videos = Vec::with_capacity(batch);
        let mut answers = Vec::with_capacity(batch);
        for sample in 0..batch {
            let mixed = self.mix(sample, &seen, &read, text)?;
            videos.push(mixed.narrow(1, 0, tokens)?);
            if self.text_out.is_some() {
                answers.push(filled(&mixed, tokens, words.dim(1)?)?);
            }
        }
        let answer = match &self.text_out {
            Some(out) => Some(out.forward(&Tensor::cat(&answers, 0)?)?),
            None => None,
        };
        Ok((self.out.forward(&Tensor::cat(&videos, 0)?)?, answer))
    }

    /// One sample's video, then the text tokens that count: `[1, tokens + text tokens that count, width]`.
    fn mix(&self, sample: usize, seen: &Parts, read: &Parts, text: &TextContext) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(3);
        for (seen, read) in seen.0.iter().zip(&read.0) {
            let seen = seen.narrow(0, sample, 1)?;
            parts.push(match text.counting(sample, read)? {
                Some(read) => Tensor::cat(&[seen, read], 1)?,
                None => seen,
            });
        }
        let scale = 1.0 / (self.video.head as f64).sqrt();
        attention(&parts[0], &parts[1], &parts[2], None, scale)?.flatten_from(2)
    }
}

/// What follows `tokens` in `mixed`, filled up with zeros to `count`.
fn filled(mixed: &Tensor, tokens: usize, count: usize) -> Result<Tensor> {
    let (_, all, width) = mixed.dims3()?;
    let zeros = |count: usize| Tensor::zeros((1, count, width), mixed.dtype(), mixed.device());
    match all - tokens {
        0 => zeros(count),
        found if found == count => mixed.narrow(1, tokens, count),
        found => Tensor::cat(&[mixed.narrow(1, tokens, found)?, zeros(count - found)?], 1),
    }
}

impl Projections {
    fn load(config: &TransformerConfig, input: usize, names: [&str; 5], vb: &VarBuilder<'_>) -> Result<Self> {
        let linear = |name: &str| Linear::load(input, config.inner(), false, vb.pp(name));
        let norm = |name: &str| vb.pp(name).get(config.attention_head_dim, "weight");
        Ok(Self {
            query: linear(names[0])?,
            key: linear(names[1])?,
            value: linear(names[2])?,
            norm_query: norm(names[3])?,
            norm_key: norm(names[4])?,
            heads: config.num_attention_heads,
            head: config.attention_head_dim,
        })
    }

    fn parts(&self, x: &Tensor) -> Result<Parts> {
        let (batch, tokens, _) = x.dims3()?;
        let split = |x: Tensor| x.reshape((batch, tokens, self.heads, self.head));
        let query = rms_norm(&split(self.query.forward(x)?)?, Some(&self.norm_query), QK_EPSILON)?;
        let key = rms_norm(&split(self.key.forward(x)?)?, Some(&self.norm_key), QK_EPSILON)?;
        Ok(Parts([query, key, split(self.value.forward(x)?)?]))
    }
}

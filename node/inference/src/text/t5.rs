//! The T5 encoder (Raffel et al. 2020, v1.1) and its multilingual kin UMT5: relative position bias, no scaling of
//! attention scores, RMS norms before each part.
//!
//! candle-transformers' encoder takes no attention mask and knows the bias in the first block only; this one has both,
//! because later models need them. Norms, scores and softmax are computed in f32.

use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Embedding, Module, VarBuilder};
use serde::Deserialize;

use super::TextError;
use crate::nn::attention::attention;
use crate::nn::linear::Linear;
use crate::nn::norm::rms_norm;
use crate::nn::ops::{gelu_tanh, silu};
use crate::weights::held::planned_blocks;
use crate::weights::quantised;

/// `config.json` of a T5 or UMT5 encoder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct T5Config {
    /// `t5` or `umt5`: the latter has its own position bias in every block.
    #[serde(default = "t5")]
    pub model_type: String,
    /// Width of a token.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Inner width of a feed-forward.
    pub d_ff: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Heads.
    pub num_heads: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Buckets of the position bias.
    #[serde(default = "buckets")]
    pub relative_attention_num_buckets: usize,
    /// Distance from which on all positions share a bucket.
    #[serde(default = "max_distance")]
    pub relative_attention_max_distance: usize,
    /// Added to the mean square.
    #[serde(default = "epsilon")]
    pub layer_norm_epsilon: f64,
    /// `relu`, `gelu`, `gated-gelu` or `gated-silu`.
    #[serde(default = "relu")]
    pub feed_forward_proj: String,
}

fn t5() -> String {
    "t5".to_owned()
}
fn buckets() -> usize {
    32
}
fn max_distance() -> usize {
    128
}
fn epsilon() -> f64 {
    1e-6
}
fn relu() -> String {
    "relu".to_owned()
}

impl T5Config {
    /// Refuses what this encoder does not compute.
    ///
    /// # Errors
    /// The first such setting, with the file that it stands in.
    pub fn check(&self, file: &Path) -> std::result::Result<(), TextError> {
        let fault = |key, value: String, reason| {
            Err(TextError::Setting { file: file.to_owned(), key, value, reason })
        };
        if !matches!(self.model_type.as_str(), "t5" | "umt5") {
            return fault("model_type", self.model_type.clone(), "known are t5 and umt5");
        }
        if !matches!(self.feed_forward_proj.as_str(), "relu" | "gelu" | "gated-gelu" | "gated-silu") {
            let known = "known are relu, gelu, gated-gelu and gated-silu";
            return fault("feed_forward_proj", self.feed_forward_proj.clone(), known);
        }
        if self.relative_attention_num_buckets < 4 {
            let value = self.relative_attention_num_buckets.to_string();
            return fault("relative_attention_num_buckets", value, "at least 4 are needed");
        }
        Ok(())
    }

    /// Whether the feed-forward has a gate.
    #[must_use]
    pub fn is_gated(&self) -> bool {
        self.feed_forward_proj.starts_with("gated-")
    }

    /// Parameters that every token meets: attention and feed-forward of every layer, without the vocabulary.
    #[must_use]
    pub fn token_parameters(&self) -> u64 {
        let [width, head, forward, layers, heads] =
            [self.d_model, self.d_kv, self.d_ff, self.num_layers, self.num_heads].map(|n| n as u64);
        let matrices = if self.is_gated() { 3 } else { 2 };
        let attention = heads.saturating_mul(head).saturating_mul(width).saturating_mul(4);
        let forward = width.saturating_mul(forward).saturating_mul(matrices);
        attention.saturating_add(forward).saturating_mul(layers)
    }
}

/// A T5 encoder on a device.
pub struct T5Encoder {
    embedding: Table,
    blocks: Vec<Block>,
    norm: Norm,
    config: T5Config,
}

/// The vocabulary's vectors.
enum Table {
    Plain(Embedding),
    /// In blocks of few bits, and the numbers in which they are given.
    Quantised(Arc<QTensor>, DType),
}

impl Table {
    fn load(config: &T5Config, vb: &VarBuilder<'_>) -> Result<Self> {
        let shape = (config.vocab_size, config.d_model);
        let shared = vb.contains_tensor("shared.weight");
        let name = if shared { "shared.weight" } else { "encoder.embed_tokens.weight" };
        if let Some(table) = planned_blocks(vb, name, shape)? {
            return Ok(Self::Plain(Embedding::new(table, config.d_model)));
        }
        if let Some(table) = quantised(vb, name, shape)? {
            return Ok(Self::Quantised(table, vb.dtype()));
        }
        Ok(Self::Plain(Embedding::new(vb.get(shape, name)?, config.d_model)))
    }

    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(table) => table.forward(ids),
            Self::Quantised(table, dtype) => table.embedding(ids)?.to_dtype(*dtype),
        }
    }
}

impl T5Encoder {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &T5Config, vb: &VarBuilder<'_>) -> Result<Self> {
        let embedding = Table::load(config, vb)?;
        let encoder = vb.pp("encoder");
        let blocks = (0..config.num_layers)
            .map(|index| Block::load(config, index, &encoder.pp("block").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        let norm = Norm::load(config, &encoder.pp("final_layer_norm"))?;
        Ok(Self { embedding, blocks, norm, config: config.clone() })
    }

    /// The last hidden state `[B, tokens, d_model]` of ids `[B, tokens]` (u32). With a mask `[B, tokens]` (1 or 0),
    /// nothing attends to what it leaves out.
    ///
    /// # Errors
    /// When an id is not in the vocabulary, or the device has no room.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (_, tokens) = ids.dims2()?;
        let mut x = self.embedding.forward(ids)?;
        let buckets = self.buckets(tokens, ids.device())?;
        let mask = mask.map(mask_bias).transpose()?;
        let mut bias = None;
        for block in &self.blocks {
            if let Some(own) = block.position_bias(&buckets, tokens)? {
                bias = Some(match &mask {
                    Some(mask) => own.broadcast_add(mask)?,
                    None => own,
                });
            }
            x = block.forward(&x, bias.as_ref())?;
        }
        self.norm.forward(&x)
    }

    /// The bucket of each pair of positions, `[tokens * tokens]`.
    fn buckets(&self, tokens: usize, device: &Device) -> Result<Tensor> {
        let half = self.config.relative_attention_num_buckets / 2;
        let exact = half / 2;
        let span = (self.config.relative_attention_max_distance as f32 / exact as f32).ln();
        let mut buckets = Vec::with_capacity(tokens * tokens);
        for query in 0..tokens {
            for key in 0..tokens {
                let distance = query.abs_diff(key);
                let near = if distance < exact {
                    distance
                } else {
                    let steps = (distance as f32 / exact as f32).ln() / span * (half - exact) as f32;
                    (exact + steps as usize).min(half - 1)
                };
                buckets.push((near + if key > query { half } else { 0 }) as u32);
            }
        }
        Tensor::from_vec(buckets, tokens * tokens, device)
    }
}

/// `[B, tokens]` of ones and zeros to `[B, 1, 1, tokens]` of 0 and the least f32.
fn mask_bias(mask: &Tensor) -> Result<Tensor> {
    let (batch, tokens) = mask.dims2()?;
    let bias = mask.to_dtype(DType::F32)?.affine(-1.0, 1.0)?.affine(f64::from(f32::MIN), 0.0)?;
    bias.reshape((batch, 1, 1, tokens))
}

struct Block {
    attention_norm: Norm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    position: Option<Embedding>,
    feed_norm: Norm,
    feed: FeedForward,
    heads: usize,
    head: usize,
}

impl Block {
    fn load(config: &T5Config, index: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let (attention, feed) = (vb.pp("layer").pp(0), vb.pp("layer").pp(1));
        let own = attention.pp("SelfAttention");
        let inner = config.num_heads * config.d_kv;
        let linear = |name: &str| Linear::load(config.d_model, inner, false, own.pp(name));
        let has_bias = index == 0 || config.model_type == "umt5";
        let position = has_bias
            .then(|| {
                let shape = (config.relative_attention_num_buckets, config.num_heads);
                let table = own.get(shape, "relative_attention_bias.weight")?;
                Ok::<_, candle_core::Error>(Embedding::new(table, config.num_heads))
            })
            .transpose()?;
        Ok(Self {
            attention_norm: Norm::load(config, &attention.pp("layer_norm"))?,
            query: linear("q")?,
            key: linear("k")?,
            value: linear("v")?,
            out: Linear::load(inner, config.d_model, false, own.pp("o"))?,
            position,
            feed_norm: Norm::load(config, &feed.pp("layer_norm"))?,
            feed: FeedForward::load(config, &feed.pp("DenseReluDense"))?,
            heads: config.num_heads,
            head: config.d_kv,
        })
    }

    /// `[1, heads, tokens, tokens]` in f32, where the block has a table of its own.
    fn position_bias(&self, buckets: &Tensor, tokens: usize) -> Result<Option<Tensor>> {
        let Some(table) = &self.position else { return Ok(None) };
        let bias = table.forward(buckets)?.to_dtype(DType::F32)?.reshape((tokens, tokens, self.heads))?;
        Ok(Some(bias.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()?))
    }

    fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let x = (x + self.attend(&self.attention_norm.forward(x)?, bias)?)?;
        &x + self.feed.forward(&self.feed_norm.forward(&x)?)?
    }

    fn attend(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let split = |x: Tensor| x.reshape((batch, tokens, self.heads, self.head));
        let (query, key) = (split(self.query.forward(x)?)?, split(self.key.forward(x)?)?);
        let mixed = attention(&query, &key, &split(self.value.forward(x)?)?, bias, 1.0)?;
        self.out.forward(&mixed.flatten_from(2)?)
    }
}

struct FeedForward {
    gate: Linear,
    linear: Option<Linear>,
    out: Linear,
    activation: fn(&Tensor) -> Result<Tensor>,
}

impl FeedForward {
    fn load(config: &T5Config, vb: &VarBuilder<'_>) -> Result<Self> {
        let linear = |name: &str| Linear::load(config.d_model, config.d_ff, false, vb.pp(name));
        let (gate, linear) =
            if config.is_gated() { (linear("wi_0")?, Some(linear("wi_1")?)) } else { (linear("wi")?, None) };
        let activation = match config.feed_forward_proj.as_str() {
            "gated-gelu" => gelu_tanh,
            "gelu" => Tensor::gelu_erf,
            "gated-silu" => silu,
            _ => Tensor::relu,
        };
        Ok(Self {
            gate,
            linear,
            out: Linear::load(config.d_ff, config.d_model, false, vb.pp("wo"))?,
            activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut inner = (self.activation)(&self.gate.forward(x)?)?;
        if let Some(linear) = &self.linear {
            inner = (inner * linear.forward(x)?)?;
        }
        self.out.forward(&inner)
    }
}

struct Norm {
    weight: Tensor,
    epsilon: f64,
}

impl Norm {
    fn load(config: &T5Config, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self { weight: vb.get(config.d_model, "weight")?, epsilon: config.layer_norm_epsilon })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, Some(&self.weight), self.epsilon)
    }
}

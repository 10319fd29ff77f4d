//! LTX's transformer (diffusers' `LTXVideoTransformer3DModel`): packed latent tokens in, velocity out.
//!
//! A block normalises, modulates by the timestep and attends to the video itself with rotary positions; attends to the
//! text; normalises, modulates and feeds forward. What depends on the text alone (its projection, keys and values of
//! every block) is computed once per run as a [`TextContext`], what depends on positions alone as [`RopeTables`].

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::TransformerConfig;
use super::rope::{Rope, RopeTables};
use crate::nn::attention::attention;
use crate::nn::embedding::PixArtTimestepEmbedding;
use crate::nn::linear::Linear;
use crate::nn::norm::{Norm, rms_norm};
use crate::nn::ops::silu;
use crate::nn::route::Route;
use crate::pipeline::guided::Entries;

/// What cross-attention adds where the text is filled up.
const MASKED: f64 = -10_000.0;
/// Epsilon of the norms of query and key.
const QK_EPSILON: f64 = 1e-5;
/// Epsilon of the last norm.
const OUT_EPSILON: f64 = 1e-6;

/// The transformer on a device.
pub struct LtxTransformer {
    config: TransformerConfig,
    rope: Rope,
    proj_in: Linear,
    time: TimeEmbedding,
    caption: [Linear; 2],
    blocks: Vec<Block>,
    scale_shift_table: Tensor,
    proj_out: Linear,
    dtype: DType,
}

/// What is computed from the text once.
pub struct TextContext {
    /// The projected text, `[B, text tokens, width]`.
    pub projected: Tensor,
    blocks: Vec<KeyValue>,
    bias: Option<Tensor>,
    /// Which blocks are computed how often.
    pub route: Route,
}

struct KeyValue {
    key: Tensor,
    value: Tensor,
}

impl Entries for TextContext {
    fn entry(&self, index: usize) -> Result<Self> {
        let blocks = self
            .blocks
            .iter()
            .map(|block| Ok(KeyValue { key: block.key.entry(index)?, value: block.value.entry(index)? }));
        Ok(Self {
            projected: self.projected.entry(index)?,
            blocks: blocks.collect::<Result<_>>()?,
            bias: self.bias.entry(index)?,
            route: self.route.clone(),
        })
    }
}

/// Sees intermediate results by the reference's module names; for parity checks.
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

impl LtxTransformer {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let blocks = (0..config.num_layers)
            .map(|index| Block::load(config, &vb.pp("transformer_blocks").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        let caption = vb.pp("caption_projection");
        Ok(Self {
            rope: Rope::new(width, config.patch_size, config.patch_size_t),
            proj_in: Linear::load(config.in_channels, width, true, vb.pp("proj_in"))?,
            time: TimeEmbedding::load(width, &vb.pp("time_embed"))?,
            caption: [
                Linear::load(config.caption_channels, width, true, caption.pp("linear_1"))?,
                Linear::load(width, width, true, caption.pp("linear_2"))?,
            ],
            blocks,
            scale_shift_table: vb.get((2, width), "scale_shift_table")?,
            proj_out: Linear::load(width, config.outputs(), true, vb.pp("proj_out"))?,
            dtype: vb.dtype(),
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The rotary embedding.
    #[must_use]
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Prepares text embeddings `[B, text tokens, caption channels]` with their mask `[B, text tokens]` (1 or 0).
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn text_context(&self, text: &Tensor, mask: Option<&Tensor>) -> Result<TextContext> {
        let inner = self.caption[0].forward_gelu(&text.to_dtype(self.dtype)?)?;
        let projected = self.caption[1].forward(&inner)?;
        let blocks =
            self.blocks.iter().map(|block| block.cross.key_value(&projected)).collect::<Result<Vec<_>>>()?;
        let bias = mask
            .map(|mask| {
                let (batch, tokens) = mask.dims2()?;
                let bias = (mask.to_dtype(DType::F32)?.affine(-1.0, 1.0)? * MASKED)?;
                bias.to_dtype(self.dtype)?.reshape((batch, 1, 1, tokens))
            })
            .transpose()?;
        Ok(TextContext { projected, blocks, bias, route: Route::default() })
    }

    /// The prediction `[B, tokens, out channels]` for packed latents `[B, tokens, in channels]`; timesteps (0 to 1000)
    /// are `[B]`, or `[B, n]` with n 1 or one a token.
    ///
    /// # Errors
    /// When the shapes do not fit, or the device has no room.
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        text: &TextContext,
        rope: &RopeTables,
    ) -> Result<Tensor> {
        self.forward_probed(latents, timesteps, text, rope, &mut |_, _| Ok(()))
    }

    /// As [`LtxTransformer::forward`], and shows what the modules give.
    ///
    /// # Errors
    /// As [`LtxTransformer::forward`], and what the probe gives.
    pub fn forward_probed(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        text: &TextContext,
        rope: &RopeTables,
        probe: Probe<'_>,
    ) -> Result<Tensor> {
        let batch = latents.dim(0)?;
        let mut x = self.proj_in.forward(&latents.to_dtype(self.dtype)?)?;
        probe("proj_in", &x)?;
        let (modulation, embedded) = self.time.forward(timesteps)?;
        probe("time_embed.0", &modulation)?;
        probe("time_embed.1", &embedded)?;
        probe("caption_projection", &text.projected)?;
        let width = self.config.inner();
        let modulation = modulation.reshape((batch, (), 6, width))?;
        for (index, block) in self.blocks.iter().enumerate() {
            for _ in 0..text.route.times(index) {
                x = block.forward(&x, &modulation, &text.blocks[index], text.bias.as_ref(), rope)?;
            }
            probe(&format!("transformer_blocks.{index}"), &x)?;
        }
        let table = self.scale_shift_table.reshape((1, 1, 2, width))?;
        let values = embedded.reshape((batch, (), 1, width))?.broadcast_add(&table)?;
        let (shift, scale) = (part(&values, 0)?, part(&values, 1)?);
        self.proj_out.forward(&Norm::layer(OUT_EPSILON).modulate(&scale, &shift).apply(&x)?)
    }
}

/// Number `index` of `[B, n, parts, width]`, as `[B, n, width]`.
fn part(values: &Tensor, index: usize) -> Result<Tensor> {
    values.narrow(2, index, 1)?.squeeze(2)?.contiguous()
}

struct Block {
    norms: [Option<Tensor>; 2],
    epsilon: f64,
    attention: Attention,
    cross: Attention,
    feed: [Linear; 2],
    scale_shift_table: Tensor,
}

impl Block {
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        const FEED_FACTOR: usize = 4;
        let width = config.inner();
        let norm = |name: &str| {
            config.norm_elementwise_affine.then(|| vb.get(width, &format!("{name}.weight"))).transpose()
        };
        let feed = vb.pp("ff").pp("net");
        Ok(Self {
            norms: [norm("norm1")?, norm("norm2")?],
            epsilon: config.norm_eps,
            attention: Attention::load(config, &vb.pp("attn1"))?,
            cross: Attention::load(config, &vb.pp("attn2"))?,
            feed: [
                Linear::load(width, FEED_FACTOR * width, true, feed.pp(0).pp("proj"))?,
                Linear::load(FEED_FACTOR * width, width, true, feed.pp(2))?,
            ],
            scale_shift_table: vb.get((6, width), "scale_shift_table")?.reshape((1, 1, 6, width))?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        modulation: &Tensor,
        text: &KeyValue,
        bias: Option<&Tensor>,
        rope: &RopeTables,
    ) -> Result<Tensor> {
        let values = modulation.broadcast_add(&self.scale_shift_table)?;
        let normed = self.norm(x, 0, &part(&values, 1)?, &part(&values, 0)?)?;
        let own = self.attention.attend_itself(&normed, rope)?;
        let x = self.attention.out.forward_gated(&own, &part(&values, 2)?, x)?;
        let x = self.cross.out.forward_add(&self.cross.attend_text(&x, text, bias)?, &x)?;
        let normed = self.norm(&x, 1, &part(&values, 4)?, &part(&values, 3)?)?;
        self.feed[1].forward_gated(&self.feed[0].forward_gelu(&normed)?, &part(&values, 5)?, &x)
    }

    fn norm(&self, x: &Tensor, which: usize, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
        Norm::rms(self.epsilon).weight(self.norms[which].as_ref()).modulate(scale, shift).apply(x)
    }
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm_query: Tensor,
    norm_key: Tensor,
    heads: usize,
    head: usize,
}

impl Attention {
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let linear = |name: &str, bias: bool| Linear::load(width, width, bias, vb.pp(name));
        Ok(Self {
            query: linear("to_q", config.attention_bias)?,
            key: linear("to_k", config.attention_bias)?,
            value: linear("to_v", config.attention_bias)?,
            out: linear("to_out.0", config.attention_out_bias)?,
            norm_query: vb.get(width, "norm_q.weight")?,
            norm_key: vb.get(width, "norm_k.weight")?,
            heads: config.num_attention_heads,
            head: config.attention_head_dim,
        })
    }

    fn attend_itself(&self, x: &Tensor, rope: &RopeTables) -> Result<Tensor> {
        let query = rope.apply(&rms_norm(&self.query.forward(x)?, Some(&self.norm_query), QK_EPSILON)?)?;
        let key = rope.apply(&rms_norm(&self.key.forward(x)?, Some(&self.norm_key), QK_EPSILON)?)?;
        self.mix(&query, &key, &self.value.forward(x)?, None)
    }

    fn key_value(&self, text: &Tensor) -> Result<KeyValue> {
        let key = rms_norm(&self.key.forward(text)?, Some(&self.norm_key), QK_EPSILON)?;
        Ok(KeyValue { key, value: self.value.forward(text)? })
    }

    fn attend_text(&self, x: &Tensor, text: &KeyValue, bias: Option<&Tensor>) -> Result<Tensor> {
        let query = rms_norm(&self.query.forward(x)?, Some(&self.norm_query), QK_EPSILON)?;
        self.mix(&query, &text.key, &text.value, bias)
    }

    fn mix(&self, query: &Tensor, key: &Tensor, value: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let split = |x: &Tensor| {
            let (batch, tokens, _) = x.dims3()?;
            x.reshape((batch, tokens, self.heads, self.head))
        };
        let scale = 1.0 / (self.head as f64).sqrt();
        attention(&split(query)?, &split(key)?, &split(value)?, bias, scale)?.flatten_from(2)
    }
}

/// The embedded timestep, and that through a layer for the blocks' six values (diffusers' `AdaLayerNormSingle`).
struct TimeEmbedding {
    embedding: PixArtTimestepEmbedding,
    out: Linear,
}

impl TimeEmbedding {
    fn load(width: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            embedding: PixArtTimestepEmbedding::load(width, vb.pp("emb"))?,
            out: Linear::load(width, 6 * width, true, vb.pp("linear"))?,
        })
    }

    /// `[B * n, 6 * width]` and `[B * n, width]`.
    fn forward(&self, timesteps: &Tensor) -> Result<(Tensor, Tensor)> {
        let embedded = self.embedding.forward(&timesteps.flatten_all()?)?;
        Ok((self.out.forward(&silu(&embedded)?)?, embedded))
    }
}

//! Wan's transformer (diffusers' `WanTransformer3DModel`): packed latent tokens in, velocity out.
//!
//! A block normalises, modulates by the timestep and attends to the video itself with rotary positions; normalises and
//! attends to the text, whose filling is zeros and is attended to as well; normalises, modulates and feeds forward. What
//! depends on the text alone (its projection, keys and values of every block) is computed once per run as a
//! [`TextContext`]. The timestep's embedding and the tables that it is added to are f32 whatever the weights are.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::TransformerConfig;
use super::rope::RopeTables;
use crate::nn::attention::attention;
use crate::nn::embedding::{TimestepEmbedding, Timesteps};
use crate::nn::linear::Linear;
use crate::nn::norm::{Norm, layer_norm, rms_norm};
use crate::nn::ops::silu;
use crate::nn::route::Route;
use crate::pipeline::guided::{Entries, each};

/// The transformer on a device.
pub struct WanTransformer {
    config: TransformerConfig,
    patch_embedding: Linear,
    time: TimeEmbedding,
    text: [Linear; 2],
    image: Option<ImageEmbedding>,
    blocks: Vec<Block>,
    scale_shift_table: Tensor,
    proj_out: Linear,
    dtype: DType,
}

/// What is computed from the text once.
pub struct TextContext {
    /// The projected text, `(batch, text tokens, width)`.
    pub projected: Tensor,
    blocks: Vec<KeyValue>,
    /// Which blocks are computed how often.
    pub route: Route,
}

struct KeyValue {
    key: Tensor,
    value: Tensor,
    /// Those of the pictures.
    image: Option<(Tensor, Tensor)>,
}

impl Entries for TextContext {
    fn entry(&self, index: usize) -> Result<Self> {
        let blocks = self.blocks.iter().map(|block| {
            Ok(KeyValue {
                key: block.key.entry(index)?,
                value: block.value.entry(index)?,
                image: block.image.entry(index)?,
            })
        });
        Ok(Self {
            projected: self.projected.entry(index)?,
            blocks: blocks.collect::<Result<_>>()?,
            route: self.route.clone(),
        })
    }
}

/// Sees intermediate results by the reference's module names; for parity checks.
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

impl WanTransformer {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let blocks = (0..config.num_layers)
            .map(|index| Block::load(config, &vb.pp("blocks").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        let condition = vb.pp("condition_embedder");
        let text = condition.pp("text_embedder");
        Ok(Self {
            patch_embedding: load_patches(config, &vb.pp("patch_embedding"))?,
            time: TimeEmbedding::load(config, &condition)?,
            text: [
                Linear::load(config.text_dim, width, true, text.pp("linear_1"))?,
                Linear::load(width, width, true, text.pp("linear_2"))?,
            ],
            image: config
                .states()
                .map(|dim| ImageEmbedding::load(config, dim, &condition.pp("image_embedder")))
                .transpose()?,
            blocks,
            scale_shift_table: table(vb, 2, width)?,
            proj_out: load_output(config, &vb.pp("proj_out"))?,
            dtype: vb.dtype(),
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// Prepares text embeddings `(batch, text tokens, text width)`, zeros where they are filled up, and for a form that
    /// reads them the states of pictures `(pictures, tokens, image width)`, the same for every text.
    ///
    /// # Errors
    /// When the shapes do not fit, or pictures are given to a form that reads none or missing for one that does.
    pub fn text_context(&self, text: &Tensor, pictures: Option<&Tensor>) -> Result<TextContext> {
        let pictures = match (&self.image, pictures) {
            (Some(image), Some(states)) => Some(image.forward(&states.to_dtype(self.dtype)?)?),
            (None, None) => None,
            (Some(_), None) => candle_core::bail!("this transformer reads pictures, and none were given"),
            (None, Some(_)) => candle_core::bail!("this transformer reads no pictures"),
        };
        let inner = self.text[0].forward_gelu(&text.to_dtype(self.dtype)?)?;
        let projected = self.text[1].forward(&inner)?;
        let key_value = |block: &Block| block.cross.key_value(&projected, pictures.as_ref());
        let blocks = self.blocks.iter().map(key_value).collect::<Result<Vec<_>>>()?;
        Ok(TextContext { projected, blocks, route: Route::default() })
    }

    /// The prediction for packed latents `(batch, tokens, channels x cells)`, in the same form; timesteps (0 to 1000) are
    /// `(batch)`, or `(batch, n)` with n 1 or one a token.
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

    /// As [`WanTransformer::forward`], and shows what the modules give.
    ///
    /// # Errors
    /// As [`WanTransformer::forward`], and what the probe gives.
    pub fn forward_probed(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        text: &TextContext,
        rope: &RopeTables,
        probe: Probe<'_>,
    ) -> Result<Tensor> {
        let (batch, width) = (latents.dim(0)?, self.config.inner());
        let mut x = self.patch_embedding.forward(&latents.to_dtype(self.dtype)?)?;
        probe("patch_embedding", &as_volume(&x, rope.grid)?)?;
        let (embedded, modulation) = self.time.forward(timesteps)?;
        probe("condition_embedder.0", &embedded)?;
        probe("condition_embedder.1", &modulation)?;
        probe("condition_embedder.2", &text.projected)?;
        let modulation = modulation.to_dtype(DType::F32)?.reshape((batch, (), 6, width))?;
        for (index, block) in self.blocks.iter().enumerate() {
            for _ in 0..text.route.times(index) {
                x = block.forward(&x, &modulation, &text.blocks[index], rope)?;
            }
            probe(&format!("blocks.{index}"), &x)?;
        }
        let values = embedded.to_dtype(DType::F32)?.reshape((batch, (), 1, width))?;
        let values = values.broadcast_add(&self.scale_shift_table)?.to_dtype(self.dtype)?;
        let (shift, scale) = (part(&values, 0)?, part(&values, 1)?);
        self.proj_out.forward(&Norm::layer(self.config.eps).modulate(&scale, &shift).apply(&x)?)
    }
}

/// The patch embedding, a convolution whose stride is its kernel, as a linear layer over packed tokens.
fn load_patches(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Linear> {
    let ([t, h, w], width) = (config.patch_size, config.inner());
    let weight = vb.get((width, config.in_channels, t, h, w), "weight")?;
    Linear::placed(weight.reshape((width, ()))?, Some(vb.get(width, "bias")?), vb, None)
}

/// The output layer, whose rows are a token's cells and within each its channels, in the order of packed tokens:
/// channels first.
fn load_output(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Linear> {
    let (channels, cells) = (config.outputs(), config.cells());
    let (rows, width) = (channels * cells, config.inner());
    let weight = vb.get((rows, width), "weight")?.reshape((cells, channels, width))?;
    let bias = vb.get(rows, "bias")?.reshape((cells, channels))?;
    let order = |channel: usize| (0..cells).map(move |cell| (cell * channels + channel) as u32);
    let order: Vec<u32> = (0..channels).flat_map(order).collect();
    Linear::placed(
        weight.transpose(0, 1)?.contiguous()?.reshape((rows, width))?,
        Some(bias.t()?.contiguous()?.flatten_all()?),
        vb,
        Some(&order),
    )
}

/// `scale_shift_table`, as `(1, 1, rows, width)` in f32.
fn table(vb: &VarBuilder<'_>, rows: usize, width: usize) -> Result<Tensor> {
    let vb = vb.clone().set_dtype(DType::F32);
    vb.get((1, rows, width), "scale_shift_table")?.reshape((1, 1, rows, width))
}

/// Tokens `(batch, tokens, width)` as `(batch, width, frames, rows, columns)`.
fn as_volume(x: &Tensor, [frames, rows, columns]: [usize; 3]) -> Result<Tensor> {
    let (batch, _, width) = x.dims3()?;
    x.transpose(1, 2)?.reshape((batch, width, frames, rows, columns))
}

/// Number `index` of `(batch, n, parts, width)`, as `(batch, n, width)`.
fn part(values: &Tensor, index: usize) -> Result<Tensor> {
    values.narrow(2, index, 1)?.squeeze(2)?.contiguous()
}

struct Block {
    attention: Attention,
    cross: Attention,
    cross_norm: Option<[Tensor; 2]>,
    feed: [Linear; 2],
    scale_shift_table: Tensor,
    epsilon: f64,
    dtype: DType,
}

impl Block {
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let norm = vb.pp("norm2");
        let cross_norm = config
            .cross_attn_norm
            .then(|| Ok::<_, candle_core::Error>([norm.get(width, "weight")?, norm.get(width, "bias")?]))
            .transpose()?;
        let feed = vb.pp("ffn").pp("net");
        Ok(Self {
            attention: Attention::load(config, None, &vb.pp("attn1"))?,
            cross: Attention::load(config, config.added_kv_proj_dim, &vb.pp("attn2"))?,
            cross_norm,
            feed: [
                Linear::load(width, config.ffn_dim, true, feed.pp(0).pp("proj"))?,
                Linear::load(config.ffn_dim, width, true, feed.pp(2))?,
            ],
            scale_shift_table: table(vb, 6, width)?,
            epsilon: config.eps,
            dtype: vb.dtype(),
        })
    }

    fn forward(&self, x: &Tensor, modulation: &Tensor, text: &KeyValue, rope: &RopeTables) -> Result<Tensor> {
        let values = modulation.broadcast_add(&self.scale_shift_table)?.to_dtype(self.dtype)?;
        let norm = |x: &Tensor, shift: usize, scale: usize| {
            Norm::layer(self.epsilon).modulate(&part(&values, scale)?, &part(&values, shift)?).apply(x)
        };
        let own = self.attention.attend_itself(&norm(x, 0, 1)?, rope)?;
        let x = self.attention.out.forward_gated(&own, &part(&values, 2)?, x)?;
        let asking = match &self.cross_norm {
            Some([weight, bias]) => {
                Norm::layer(self.epsilon).weight(Some(weight)).bias(Some(bias)).apply(&x)?
            }
            None => x.clone(),
        };
        let x = self.cross.out.forward_add(&self.cross.attend_text(&asking, text)?, &x)?;
        let inner = self.feed[0].forward_gelu(&norm(&x, 3, 4)?)?;
        self.feed[1].forward_gated(&inner, &part(&values, 5)?, &x)
    }
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm_query: Tensor,
    norm_key: Tensor,
    added: Option<Added>,
    epsilon: f64,
    heads: usize,
    head: usize,
}

/// Keys and values of pictures.
struct Added {
    key: Linear,
    value: Linear,
    norm_key: Tensor,
}

impl Attention {
    fn load(config: &TransformerConfig, input: Option<usize>, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let linear = |name: &str| Linear::load(width, width, true, vb.pp(name));
        let added = |input: usize| -> Result<Added> {
            let linear = |name: &str| Linear::load(input, width, true, vb.pp(name));
            let norm_key = vb.get(width, "norm_added_k.weight")?;
            Ok(Added { key: linear("add_k_proj")?, value: linear("add_v_proj")?, norm_key })
        };
        Ok(Self {
            query: linear("to_q")?,
            key: linear("to_k")?,
            value: linear("to_v")?,
            out: linear("to_out.0")?,
            norm_query: vb.get(width, "norm_q.weight")?,
            norm_key: vb.get(width, "norm_k.weight")?,
            added: input.map(added).transpose()?,
            epsilon: config.eps,
            heads: config.num_attention_heads,
            head: config.attention_head_dim,
        })
    }

    fn attend_itself(&self, x: &Tensor, rope: &RopeTables) -> Result<Tensor> {
        let query = rms_norm(&self.query.forward(x)?, Some(&self.norm_query), self.epsilon)?;
        let key = rms_norm(&self.key.forward(x)?, Some(&self.norm_key), self.epsilon)?;
        let (query, key) = (rope.apply(&self.split(&query)?)?, rope.apply(&self.split(&key)?)?);
        self.mix(&query, &key, &self.split(&self.value.forward(x)?)?)
    }

    fn key_value(&self, text: &Tensor, pictures: Option<&Tensor>) -> Result<KeyValue> {
        let key = rms_norm(&self.key.forward(text)?, Some(&self.norm_key), self.epsilon)?;
        let image = |(added, pictures): (&Added, &Tensor)| {
            let key = rms_norm(&added.key.forward(pictures)?, Some(&added.norm_key), self.epsilon)?;
            let seen = |x: &Tensor| each(&self.split(x)?, text.dim(0)?);
            Ok::<_, candle_core::Error>((seen(&key)?, seen(&added.value.forward(pictures)?)?))
        };
        Ok(KeyValue {
            key: self.split(&key)?,
            value: self.split(&self.value.forward(text)?)?,
            image: self.added.as_ref().zip(pictures).map(image).transpose()?,
        })
    }

    fn attend_text(&self, x: &Tensor, text: &KeyValue) -> Result<Tensor> {
        let query = rms_norm(&self.query.forward(x)?, Some(&self.norm_query), self.epsilon)?;
        let query = self.split(&query)?;
        let words = self.mix(&query, &text.key, &text.value)?;
        match &text.image {
            Some((key, value)) => words + self.mix(&query, key, value)?,
            None => Ok(words),
        }
    }

    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        x.reshape((batch, tokens, self.heads, self.head))
    }

    fn mix(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let scale = 1.0 / (self.head as f64).sqrt();
        attention(query, key, value, None, scale)?.flatten_from(2)
    }
}

/// The states of pictures, brought to the transformer's width.
struct ImageEmbedding {
    /// Positions of the tokens of two pictures.
    positions: Option<Tensor>,
    norms: [[Tensor; 2]; 2],
    feed: [Linear; 2],
}

impl ImageEmbedding {
    fn load(config: &TransformerConfig, dim: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let norm = |name: &str, width: usize| -> Result<[Tensor; 2]> {
            let vb = vb.pp(name).set_dtype(DType::F32);
            Ok([vb.get(width, "weight")?, vb.get(width, "bias")?])
        };
        let feed = vb.pp("ff").pp("net");
        Ok(Self {
            positions: config
                .pos_embed_seq_len
                .map(|tokens| vb.get((1, tokens, dim), "pos_embed"))
                .transpose()?,
            norms: [norm("norm1", dim)?, norm("norm2", width)?],
            feed: [
                Linear::load(dim, dim, true, feed.pp(0).pp("proj"))?,
                Linear::load(dim, width, true, feed.pp(2))?,
            ],
        })
    }

    /// `(pictures, tokens, image width)` to `(1, all tokens, width)`.
    fn forward(&self, states: &Tensor) -> Result<Tensor> {
        const EPSILON: f64 = 1e-5;
        let norm = |x: &Tensor, [weight, bias]: &[Tensor; 2]| {
            layer_norm(&x.to_dtype(DType::F32)?, Some((weight, bias)), EPSILON)?.to_dtype(x.dtype())
        };
        let (pictures, tokens, dim) = states.dims3()?;
        let mut x = states.reshape((1, pictures * tokens, dim))?;
        if let Some(positions) = &self.positions {
            x = (x + positions)?;
        }
        let inner = self.feed[0].forward(&norm(&x, &self.norms[0])?)?.gelu_erf()?;
        norm(&self.feed[1].forward(&inner)?, &self.norms[1])
    }
}

/// The embedded timestep, and that through a layer for the blocks' six values.
struct TimeEmbedding {
    sinusoids: Timesteps,
    embedding: TimestepEmbedding,
    out: Linear,
    dtype: DType,
    device: Device,
}

impl TimeEmbedding {
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let embedding = vb.pp("time_embedder").set_dtype(DType::F32);
        Ok(Self {
            sinusoids: Timesteps { channels: config.freq_dim, ..Timesteps::PIXART },
            embedding: TimestepEmbedding::load(config.freq_dim, width, embedding)?,
            out: Linear::load(width, 6 * width, true, vb.pp("time_proj"))?,
            dtype: vb.dtype(),
            device: vb.device().clone(),
        })
    }

    /// `(.., width)` and `(.., 6 width)`.
    fn forward(&self, timesteps: &Tensor) -> Result<(Tensor, Tensor)> {
        let sinusoids = self.sinusoids.embed(&timesteps.flatten_all()?, &self.device)?;
        let embedded = self.embedding.forward(&sinusoids)?.to_dtype(self.dtype)?;
        let mut shape = timesteps.dims().to_vec();
        shape.push(embedded.dim(D::Minus1)?);
        let embedded = embedded.reshape(shape)?;
        let modulation = self.out.forward(&silu(&embedded)?)?;
        Ok((embedded, modulation))
    }
}

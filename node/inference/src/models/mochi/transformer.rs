//! Mochi's transformer (diffusers' `MochiTransformer3DModel`): packed latent tokens in, velocity out.
//!
//! Two streams, video and text, of different widths, attend together and feed forward apart; what each part adds is
//! normed and let in through a gate that the timestep and the pooled text set. Filling among the text tokens takes no part
//! in attention. What depends on the text alone is computed once per run as a [`TextContext`], what depends on positions
//! alone as [`RopeTables`].

mod attention;
mod stream;
mod text;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use self::attention::JointAttention;
use self::stream::{NORM_EPSILON, Stream};
use self::text::Pooler;
pub use self::text::TextContext;
use super::config::TransformerConfig;
use super::rope::RopeTables;
use crate::nn::embedding::{TimestepEmbedding, Timesteps};
use crate::nn::linear::Linear;
use crate::nn::norm::Norm;
use crate::nn::ops::silu;

/// The transformer on a device.
pub struct MochiTransformer {
    config: TransformerConfig,
    patch: Linear,
    timesteps: Timesteps,
    time: TimestepEmbedding,
    pooler: Pooler,
    caption: Linear,
    /// `[3, heads, head / 2]`.
    frequencies: Tensor,
    blocks: Vec<Block>,
    out_modulation: Linear,
    out: Linear,
}

/// Sees intermediate results by the reference's module names; for parity checks.
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

impl MochiTransformer {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let blocks = (0..config.num_layers)
            .map(|index| Block::load(config, index, &vb.pp("transformer_blocks").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        let time = vb.pp("time_embed");
        let frequencies = (3, config.num_attention_heads, config.attention_head_dim / 2);
        Ok(Self {
            patch: load_patch(config, &vb.pp("patch_embed").pp("proj"))?,
            timesteps: Timesteps { channels: config.time_embed_dim, ..Timesteps::PIXART },
            time: TimestepEmbedding::load(config.time_embed_dim, width, time.pp("timestep_embedder"))?,
            pooler: Pooler::load(config.text_embed_dim, width, &time.pp("pooler"))?,
            caption: Linear::load(
                config.text_embed_dim,
                config.pooled_projection_dim,
                true,
                time.pp("caption_proj"),
            )?,
            frequencies: vb.get(frequencies, "pos_frequencies")?,
            blocks,
            out_modulation: Linear::load(width, 2 * width, true, vb.pp("norm_out").pp("linear"))?,
            out: load_out(config, &vb.pp("proj_out"))?,
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The rotary embedding of a grid of frames, rows and columns of tokens.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn rope(&self, grid: [usize; 3]) -> Result<RopeTables> {
        RopeTables::new(&self.frequencies, grid)
    }

    /// Prepares text embeddings `[B, text tokens, text channels]` with their mask `[B, text tokens]` (1 or 0).
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn text_context(&self, text: &Tensor, mask: &Tensor) -> Result<TextContext> {
        TextContext::new(&self.pooler, &self.caption, &text.to_dtype(self.frequencies.dtype())?, mask)
    }

    /// The prediction for packed latents, both `[B, tokens, channels * patch * patch]`; timesteps (0 to 1000) are `[B]`.
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

    /// As [`MochiTransformer::forward`], and shows what the modules give.
    ///
    /// # Errors
    /// As [`MochiTransformer::forward`], and what the probe gives.
    pub fn forward_probed(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        text: &TextContext,
        rope: &RopeTables,
        probe: Probe<'_>,
    ) -> Result<Tensor> {
        let dtype = self.frequencies.dtype();
        let mut video = self.patch.forward(&latents.to_dtype(dtype)?)?;
        probe("patch_embed", &video)?;
        let sinusoids = self.timesteps.embed(timesteps, latents.device())?;
        let embedded = self.time.forward(&sinusoids.to_dtype(dtype)?)?;
        let embedded = (embedded + &text.pooled)?;
        probe("time_embed.0", &embedded)?;
        probe("time_embed.1", &text.tokens)?;
        let signal = silu(&embedded)?;
        let mut words = text.tokens.clone();
        for (index, block) in self.blocks.iter().enumerate() {
            for _ in 0..text.route.times(index) {
                (video, words) = block.forward(&video, &words, &signal, text, rope)?;
            }
            probe(&format!("transformer_blocks.{index}.0"), &video)?;
            probe(&format!("transformer_blocks.{index}.1"), &words)?;
        }
        let values = self.out_modulation.forward(&signal)?;
        let part = |index: usize| values.narrow(1, index * self.config.inner(), self.config.inner());
        let (scale, shift) = (part(0)?.contiguous()?, part(1)?.contiguous()?);
        self.out.forward(&Norm::layer(NORM_EPSILON).modulate(&scale, &shift).apply(&video)?)
    }
}

/// A convolution of one patch is a product with a packed token.
fn load_patch(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Linear> {
    let (side, width) = (config.patch_size, config.inner());
    let weight = vb.get((width, config.in_channels, side, side), "weight")?.flatten_from(1)?;
    Linear::placed(weight, Some(vb.get(width, "bias")?), vb, None)
}

/// The file's predictions have the channel last in a patch, packed tokens have it first.
fn load_out(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Linear> {
    let (cells, channels) = (config.patch_size * config.patch_size, config.outputs());
    let weight = vb.get((cells * channels, config.inner()), "weight")?;
    let bias = vb.get(cells * channels, "bias")?;
    let order: Vec<u32> = (0..channels)
        .flat_map(|channel| (0..cells).map(move |cell| (cell * channels + channel) as u32))
        .collect();
    let rows = Tensor::new(order.as_slice(), weight.device())?;
    let ordered = |tensor: &Tensor| tensor.contiguous()?.index_select(&rows, 0);
    Linear::placed(ordered(&weight)?, Some(ordered(&bias)?), vb, Some(&order))
}

struct Block {
    video: Stream,
    text: TextSide,
    attention: JointAttention,
}

/// What a block does with the text.
enum TextSide {
    /// Reads and changes it.
    Stream(Stream),
    /// Reads it only, as the last block does; a layer from the signal to its norm's factors.
    Read(Linear),
}

impl Block {
    fn load(config: &TransformerConfig, index: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let (width, text) = (config.inner(), config.pooled_projection_dim);
        let last = index + 1 == config.num_layers;
        let side = if last {
            TextSide::Read(Linear::load(width, text, true, vb.pp("norm1_context").pp("linear_1"))?)
        } else {
            TextSide::Stream(Stream::load(width, text, &vb.pp("norm1_context"), &vb.pp("ff_context"))?)
        };
        Ok(Self {
            video: Stream::load(width, width, &vb.pp("norm1"), &vb.pp("ff"))?,
            text: side,
            attention: JointAttention::load(config, !last, &vb.pp("attn1"))?,
        })
    }

    /// Both streams after the block.
    fn forward(
        &self,
        video: &Tensor,
        words: &Tensor,
        signal: &Tensor,
        text: &TextContext,
        rope: &RopeTables,
    ) -> Result<(Tensor, Tensor)> {
        let own = self.video.modulation(signal)?;
        let normed = own.before_attention(video)?;
        match &self.text {
            TextSide::Stream(stream) => {
                let theirs = stream.modulation(signal)?;
                let (attended, answered) =
                    self.attention.forward(&normed, &theirs.before_attention(words)?, text, rope)?;
                let words = match answered {
                    Some(answered) => stream.absorb(words, &answered, &theirs)?,
                    None => words.clone(),
                };
                Ok((self.video.absorb(video, &attended, &own)?, words))
            }
            TextSide::Read(scale) => {
                let factor = (scale.forward(signal)?.to_dtype(DType::F32)? + 1.0)?;
                let read = Norm::rms(NORM_EPSILON).factor(&factor).apply(words)?;
                let (attended, _) = self.attention.forward(&normed, &read, text, rope)?;
                Ok((self.video.absorb(video, &attended, &own)?, words.clone()))
            }
        }
    }
}

//! Pyramid Flow's transformer (the authors' `PyramidFluxTransformer` and `PyramidDiffusionMMDiT`): past latents in several
//! sizes and the current ones in, the current ones' velocity out.
//!
//! The sequence is the text, then clips of tokens from the earliest to the current. The first blocks keep text and video
//! apart but for attention; the later ones, which only miniFLUX has, are one stream, with attention and feed-forward side
//! by side. The SD3 form's last block makes no text. What depends on the text alone is computed once per run as a
//! [`TextContext`].

mod attention;
mod positions;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use self::attention::{Joint, Layout, Single};
use self::positions::{Positions, load_patches};
use super::config::{PATCH, TransformerConfig, Variant};
use super::rope::RopeTables;
use crate::nn::embedding::{TimestepEmbedding, Timesteps};
use crate::nn::linear::Linear;
use crate::nn::norm::Norm;
use crate::nn::ops::silu;
use crate::nn::route::Route;
use crate::pipeline::guided::Entries;

/// Epsilon of every layer norm.
const EPSILON: f64 = 1e-6;
const FEED_FACTOR: usize = 4;

/// The transformer on a device.
pub struct PyramidTransformer {
    config: TransformerConfig,
    time: TimestepEmbedding,
    pooled: [Linear; 2],
    context: Linear,
    video: Linear,
    positions: Option<Positions>,
    blocks: Vec<DoubleBlock>,
    single_blocks: Vec<SingleBlock>,
    norm_out: Linear,
    proj_out: Linear,
    dtype: DType,
}

/// What is computed from the text once.
pub struct TextContext {
    /// The projected text, `[B, text tokens, width]`.
    pub projected: Tensor,
    pooled: Tensor,
    /// `[B, text tokens]`, 1 where the prompt is and 0 where it is filled up.
    mask: Tensor,
    /// Whether the mask leaves anything out: asked once, since a step does not wait to read from its device.
    filled: bool,
    /// Which blocks are computed how often; those of one stream are counted on behind those of two.
    pub route: Route,
}

impl Entries for TextContext {
    fn entry(&self, index: usize) -> Result<Self> {
        Ok(Self {
            projected: self.projected.entry(index)?,
            pooled: self.pooled.entry(index)?,
            mask: self.mask.entry(index)?,
            filled: self.filled,
            route: self.route.clone(),
        })
    }
}

/// Sees intermediate results by the reference's module names; for parity checks.
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

impl PyramidTransformer {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let embed = vb.pp("time_text_embed");
        let text = embed.pp("text_embedder");
        let blocks = (0..config.num_layers)
            .map(|index| DoubleBlock::load(config, index, &vb.pp("transformer_blocks").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        let single_blocks = (0..config.num_single_layers)
            .map(|index| SingleBlock::load(config, &vb.pp("single_transformer_blocks").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        let patches = vb.pp("pos_embed");
        let positions = config.positions.map(|side| Positions::load(side, width, &patches)).transpose()?;
        let video = match config.variant {
            Variant::Flux => Linear::load(config.token_channels(), width, true, vb.pp("x_embedder"))?,
            Variant::Mmdit => load_patches(config, &patches.pp("proj"))?,
        };
        Ok(Self {
            time: TimestepEmbedding::load(Timesteps::PIXART.channels, width, embed.pp("timestep_embedder"))?,
            pooled: [
                Linear::load(config.pooled_projection_dim, width, true, text.pp("linear_1"))?,
                Linear::load(width, width, true, text.pp("linear_2"))?,
            ],
            context: Linear::load(config.joint_attention_dim, width, true, vb.pp("context_embedder"))?,
            video,
            positions,
            blocks,
            single_blocks,
            norm_out: Linear::load(width, 2 * width, true, vb.pp("norm_out").pp("linear"))?,
            proj_out: Linear::load(width, config.token_channels(), true, vb.pp("proj_out"))?,
            dtype: vb.dtype(),
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// Prepares text embeddings `[B, text tokens, joint dim]` with their mask `[B, text tokens]` (1 or 0), and the text as
    /// one vector `[B, pooled dim]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn text_context(&self, text: &Tensor, mask: &Tensor, pooled: &Tensor) -> Result<TextContext> {
        let projected = self.context.forward(&text.to_dtype(self.dtype)?)?;
        let pooled = silu(&self.pooled[0].forward(&pooled.to_dtype(self.dtype)?)?)?;
        let mask = mask.to_dtype(DType::F32)?;
        if mask.dims() != &text.dims()[..2] {
            candle_core::bail!("a text {:?} was given a mask of shape {:?}", text.shape(), mask.shape());
        }
        let filled = mask.min_all()?.to_scalar::<f32>()? < 1.0;
        let (pooled, route) = (self.pooled[1].forward(&pooled)?, Route::default());
        Ok(TextContext { projected, pooled, mask, filled, route })
    }

    /// The velocity `[B, C, T, H, W]` of the last of `clips`, each `[B, C, frames, height, width]`, from the earliest to
    /// the current; timesteps (0 to 1000) are `[B]`.
    ///
    /// # Errors
    /// When there is no clip, the shapes do not fit, or the device has no room.
    pub fn forward(&self, clips: &[Tensor], timesteps: &Tensor, text: &TextContext) -> Result<Tensor> {
        self.forward_probed(clips, timesteps, text, &mut |_, _| Ok(()))
    }

    /// As [`PyramidTransformer::forward`], and shows what the modules give.
    ///
    /// # Errors
    /// As [`PyramidTransformer::forward`], and what the probe gives.
    pub fn forward_probed(
        &self,
        clips: &[Tensor],
        timesteps: &Tensor,
        text: &TextContext,
        probe: Probe<'_>,
    ) -> Result<Tensor> {
        let Some(current) = clips.last() else { candle_core::bail!("a step was given no latents") };
        let grids = clips.iter().map(grid).collect::<Result<Vec<_>>>()?;
        let layout = self.layout(&grids, text, current.device())?;
        let tokens = clips.iter().map(pack).collect::<Result<Vec<_>>>()?;
        let mut x = self.video.forward(&Tensor::cat(&tokens, 1)?.to_dtype(self.dtype)?)?;
        if let Some(positions) = &self.positions {
            x = x.broadcast_add(&positions.of(&grids)?.to_dtype(self.dtype)?)?;
        }
        let mut context = text.projected.clone();
        let sinusoids = Timesteps::PIXART.embed(timesteps, current.device())?;
        let time = self.time.forward(&sinusoids.to_dtype(self.dtype)?)?;
        let embedded = (time + &text.pooled)?;
        probe(if self.positions.is_some() { "pos_embed" } else { "x_embedder" }, &x)?;
        probe("context_embedder", &context)?;
        probe("time_text_embed", &embedded)?;
        let conditioning = silu(&embedded)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let mut told = false;
            for _ in 0..text.route.times(index) {
                let (words, video) = block.forward(&context, &x, &conditioning, &layout)?;
                x = video;
                if let Some(words) = words {
                    (context, told) = (words, true);
                }
            }
            probe(&format!("transformer_blocks.{index}.1"), &x)?;
            if told {
                probe(&format!("transformer_blocks.{index}.0"), &context)?;
            }
        }
        if !self.single_blocks.is_empty() {
            x = Tensor::cat(&[&context, &x], 1)?;
        }
        for (index, block) in self.single_blocks.iter().enumerate() {
            for _ in 0..text.route.times(self.blocks.len() + index) {
                x = block.forward(&x, &conditioning, &layout)?;
            }
            probe(&format!("single_transformer_blocks.{index}"), &x)?;
        }
        let length: usize = grids.last().copied().unwrap_or_default().iter().product();
        let whole = x.dim(1)?;
        let x = x.narrow(1, whole - length, length)?.contiguous()?;
        let [scale, shift] = parts(&self.norm_out.forward(&conditioning)?)?;
        let x = self.proj_out.forward(&Norm::layer(EPSILON).modulate(&scale, &shift).apply(&x)?)?;
        unpack(&x, current)
    }

    fn layout(&self, grids: &[[usize; 3]], text: &TextContext, device: &Device) -> Result<Layout> {
        let config = &self.config;
        let tokens = text.projected.dim(1)?;
        let rope = RopeTables::new(&config.axes, config.num_attention_heads, tokens, grids, device)?;
        let frames = grids.iter().flat_map(|&[frames, rows, columns]| vec![rows * columns; frames]);
        Layout::new(rope, &text.mask, text.filled, frames.collect())
    }
}

/// Frames, rows and columns of tokens of a clip `[B, C, frames, height, width]`.
fn grid(clip: &Tensor) -> Result<[usize; 3]> {
    let (_, _, frames, height, width) = clip.dims5()?;
    if !height.is_multiple_of(PATCH) || !width.is_multiple_of(PATCH) {
        candle_core::bail!("latents of {height} x {width} cells make no whole tokens of {PATCH} x {PATCH}");
    }
    Ok([frames, height / PATCH, width / PATCH])
}

/// `[B, C, T, H, W]` to `[B, tokens, p p C]`: a token holds its cells row by row, each with its channels together.
fn pack(clip: &Tensor) -> Result<Tensor> {
    let (batch, channels, _, _, _) = clip.dims5()?;
    let [frames, rows, columns] = grid(clip)?;
    clip.reshape(vec![batch, channels, frames, rows, PATCH, columns, PATCH])?
        .permute(vec![0, 2, 3, 5, 4, 6, 1])?
        .contiguous()?
        .reshape((batch, frames * rows * columns, PATCH * PATCH * channels))
}

/// Tokens back to the shape of `clip`.
fn unpack(tokens: &Tensor, clip: &Tensor) -> Result<Tensor> {
    let (batch, channels, _, _, _) = clip.dims5()?;
    let [frames, rows, columns] = grid(clip)?;
    tokens
        .reshape(vec![batch, frames, rows, columns, PATCH, PATCH, channels])?
        .permute(vec![0, 6, 1, 2, 4, 3, 5])?
        .contiguous()?
        .reshape(clip.shape())
}

/// `[B, N * width]` as N times `[B, 1, width]`.
fn parts<const N: usize>(values: &Tensor) -> Result<[Tensor; N]> {
    let values = values.unsqueeze(1)?;
    let chunks = values.chunk(N, 2)?.iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    chunks.try_into().map_err(|_| candle_core::Error::Msg(format!("{values:?} has no {N} parts")))
}

/// A stream's modulation, its feed-forward, and what it is added to.
struct Stream {
    modulation: Linear,
    feed: [Linear; 2],
}

impl Stream {
    fn load(width: usize, norm: &VarBuilder<'_>, feed: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            modulation: Linear::load(width, 6 * width, true, norm.pp("linear"))?,
            feed: [
                Linear::load(width, FEED_FACTOR * width, true, feed.pp("net").pp(0).pp("proj"))?,
                Linear::load(FEED_FACTOR * width, width, true, feed.pp("net").pp(2))?,
            ],
        })
    }

    /// Shift, scale and gate for attention, then for the feed-forward.
    fn modulation(&self, conditioning: &Tensor) -> Result<[Tensor; 6]> {
        parts(&self.modulation.forward(conditioning)?)
    }

    fn feed(&self, x: &Tensor, [shift, scale, gate]: [&Tensor; 3]) -> Result<Tensor> {
        let normed = Norm::layer(EPSILON).modulate(scale, shift).apply(x)?;
        self.feed[1].forward_gated(&self.feed[0].forward_gelu(&normed)?, gate, x)
    }
}

/// A block's text.
enum Words {
    /// Its stream, and attention's last projection.
    Stream(Stream, Linear),
    /// Of the SD3 form's last block: it is read by the video and not made anew; scale and shift.
    Read(Linear),
}

/// A block with a text stream of its own.
struct DoubleBlock {
    context: Words,
    video: Stream,
    attention: Joint,
}

impl DoubleBlock {
    fn load(config: &TransformerConfig, index: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let norm = vb.pp("norm1_context");
        let reads = config.variant == Variant::Mmdit && index + 1 == config.num_layers;
        let context = if reads {
            Words::Read(Linear::load(width, 2 * width, true, norm.pp("linear"))?)
        } else {
            let out = Linear::load(width, width, true, vb.pp("attn").pp("to_add_out"))?;
            Words::Stream(Stream::load(width, &norm, &vb.pp("ff_context"))?, out)
        };
        Ok(Self {
            context,
            video: Stream::load(width, &vb.pp("norm1"), &vb.pp("ff"))?,
            attention: Joint::load(config, &vb.pp("attn"))?,
        })
    }

    /// Text, where it goes on, and video after it.
    fn forward(
        &self,
        context: &Tensor,
        video: &Tensor,
        conditioning: &Tensor,
        layout: &Layout,
    ) -> Result<(Option<Tensor>, Tensor)> {
        let normed =
            |x: &Tensor, scale: &Tensor, shift: &Tensor| Norm::layer(EPSILON).modulate(scale, shift).apply(x);
        let [shift, scale, gate, feed @ ..] = self.video.modulation(conditioning)?;
        let video_in = normed(video, &scale, &shift)?;
        let after = |mixed: &Tensor| {
            let video = self.attention.video_out(mixed, &gate, video)?;
            self.video.feed(&video, feed.each_ref())
        };
        match &self.context {
            Words::Read(modulation) => {
                let [scale, shift] = parts(&modulation.forward(conditioning)?)?;
                let mixed = self.attention.mix(&normed(context, &scale, &shift)?, &video_in, layout)?;
                Ok((None, after(&mixed.1)?))
            }
            Words::Stream(stream, out) => {
                let [shift, scale, gate, feed @ ..] = stream.modulation(conditioning)?;
                let mixed = self.attention.mix(&normed(context, &scale, &shift)?, &video_in, layout)?;
                let context = out.forward_gated(&mixed.0, &gate, context)?;
                Ok((Some(stream.feed(&context, feed.each_ref())?), after(&mixed.1)?))
            }
        }
    }
}

/// A block of one stream, attention and feed-forward side by side.
struct SingleBlock {
    modulation: Linear,
    attention: Single,
    feed: Linear,
    out: Linear,
}

impl SingleBlock {
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let feed = FEED_FACTOR * width;
        Ok(Self {
            modulation: Linear::load(width, 3 * width, true, vb.pp("norm").pp("linear"))?,
            attention: Single::load(config, &vb.pp("attn"))?,
            feed: Linear::load(width, feed, true, vb.pp("proj_mlp"))?,
            out: Linear::load(width + feed, width, true, vb.pp("proj_out"))?,
        })
    }

    fn forward(&self, x: &Tensor, conditioning: &Tensor, layout: &Layout) -> Result<Tensor> {
        let [shift, scale, gate] = parts(&self.modulation.forward(conditioning)?)?;
        let normed = Norm::layer(EPSILON).modulate(&scale, &shift).apply(x)?;
        let mixed = self.attention.mix(&normed, layout)?;
        let both = Tensor::cat(&[&mixed, &self.feed.forward_gelu(&normed)?], 2)?;
        self.out.forward_gated(&both, &gate, x)
    }
}

//! CogVideoX's transformer (diffusers' `CogVideoXTransformer3DModel`): latents in, `v` out.
//!
//! Text and video are one sequence, text first. A block norms and modulates both, each with values of its own from the
//! timestep, attends over the whole sequence, and feeds both forward through the same layers. What depends on the text
//! alone is computed once per run, what depends on positions alone as [`Positions`].

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::TransformerConfig;
use super::positions::{RopeTables, sinusoids};
use crate::nn::attention::attention;
use crate::nn::embedding::{TimestepEmbedding, Timesteps};
use crate::nn::linear::Linear;
use crate::nn::norm::Norm;
use crate::nn::ops::silu;
use crate::nn::rope::rotate_pairs;
use crate::nn::route::Route;
use crate::pipeline::latents::{pack, unpack};

/// Epsilon of the norms of query and key.
const QK_EPSILON: f64 = 1e-6;
const MAX_PERIOD: f64 = 10_000.0;
const FEED_FACTOR: usize = 4;
/// The number that the reference always tells a model with `ofs`.
const OFS: f32 = 2.0;

/// The transformer on a device.
pub struct CogVideoXTransformer {
    config: TransformerConfig,
    patches: Linear,
    text: Linear,
    timesteps: Timesteps,
    time: TimestepEmbedding,
    ofs: Option<(Timesteps, TimestepEmbedding)>,
    learned: Option<Tensor>,
    blocks: Vec<Block>,
    norm_final: Affine,
    norm_out: Affine,
    modulation_out: Linear,
    proj_out: Linear,
    dtype: DType,
}

/// Where tokens lie, and their way.
#[derive(Debug, Clone, Default)]
pub struct Positions {
    /// Added to the sequence of text and video, `[tokens, width]`.
    pub added: Option<Tensor>,
    /// Turns query and key of that sequence.
    pub rotary: Option<RopeTables>,
    /// Which blocks are computed how often.
    pub route: Route,
}

/// Sees intermediate results by the reference's module names; for parity checks.
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

impl CogVideoXTransformer {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let (width, time_width) = (config.inner(), config.time_embed_dim);
        let patch = config.patch();
        let cells = patch.iter().product::<usize>();
        let blocks = (0..config.num_layers)
            .map(|index| Block::load(config, &vb.pp("transformer_blocks").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        let embed = vb.pp("patch_embed");
        let sinusoids = |channels| Timesteps {
            channels,
            flip_sin_to_cos: config.flip_sin_to_cos,
            downscale_freq_shift: config.freq_shift,
            scale: 1.0,
            max_period: MAX_PERIOD,
        };
        let ofs = match config.ofs() {
            None => None,
            Some(width) => {
                Some((sinusoids(width), TimestepEmbedding::load(width, width, vb.pp("ofs_embedding"))?))
            }
        };
        Ok(Self {
            patches: load_patches(config, &embed.pp("proj"))?,
            text: Linear::load(config.text_embed_dim, width, true, embed.pp("text_proj"))?,
            timesteps: sinusoids(width),
            time: TimestepEmbedding::load(width, time_width, vb.pp("time_embedding"))?,
            ofs,
            learned: load_table(config, &embed)?,
            blocks,
            norm_final: Affine::load(config, width, config.norm_eps, &vb.pp("norm_final"))?,
            norm_out: Affine::load(config, width, config.norm_eps, &vb.pp("norm_out").pp("norm"))?,
            modulation_out: Linear::load(time_width, 2 * width, true, vb.pp("norm_out").pp("linear"))?,
            proj_out: Linear::load(width, cells * config.outputs(), true, vb.pp("proj_out"))?,
            dtype: vb.dtype(),
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The tables for latents of `cells` frames, rows and columns behind `text_tokens` tokens of text.
    ///
    /// # Errors
    /// When the model has no positions for such a grid.
    pub fn positions(&self, cells: [usize; 3], text_tokens: usize, device: &Device) -> Result<Positions> {
        let (config, patch) = (&self.config, self.config.patch());
        let grid = std::array::from_fn(|axis| cells[axis] / patch[axis]);
        let mut positions = Positions::default();
        if config.use_rotary_positional_embeddings {
            positions.rotary = Some(RopeTables::new(config, grid, device)?.after(text_tokens)?);
        }
        let table = self.learned.as_ref().filter(|_| cells == config.trained_cells());
        if let Some(table) = table {
            positions.added = Some(table.clone());
        } else if self.learned.is_some() || positions.rotary.is_none() {
            // For other frame counts the reference puts sinusoids in the table's place.
            let video = sinusoids(config, grid, device)?;
            let text = Tensor::zeros((text_tokens, config.inner()), DType::F32, device)?;
            positions.added = Some(Tensor::cat(&[text, video], 0)?.to_dtype(self.dtype)?);
        }
        Ok(positions)
    }

    /// Text embeddings `[B, text tokens, text width]` as tokens `[B, text tokens, width]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn project_text(&self, text: &Tensor) -> Result<Tensor> {
        self.text.forward(&text.to_dtype(self.dtype)?)
    }

    /// The prediction `[B, F, C, H, W]` for latents `[B, F, C or 2 C, H, W]`, timesteps `[B]` (0 to 999), and what
    /// [`CogVideoXTransformer::project_text`] made of the text.
    ///
    /// # Errors
    /// When the shapes do not fit, or the device has no room.
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        text: &Tensor,
        positions: &Positions,
    ) -> Result<Tensor> {
        self.forward_probed(latents, timesteps, text, positions, &mut |_, _| Ok(()))
    }

    /// As [`CogVideoXTransformer::forward`], and shows what the modules give.
    ///
    /// # Errors
    /// As [`CogVideoXTransformer::forward`], and what the probe gives.
    pub fn forward_probed(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        text: &Tensor,
        positions: &Positions,
        probe: Probe<'_>,
    ) -> Result<Tensor> {
        let (_, frames, _, height, width) = latents.dims5()?;
        let patch = self.config.patch();
        let device = latents.device();
        let sinusoids = self.timesteps.embed(timesteps, device)?;
        let mut time = self.time.forward(&sinusoids.to_dtype(self.dtype)?)?;
        probe("time_embedding", &time)?;
        if let Some((sinusoids, embedding)) = &self.ofs {
            let ofs = sinusoids.embed(&Tensor::new(&[OFS], &Device::Cpu)?, device)?.to_dtype(self.dtype)?;
            let ofs = embedding.forward(&ofs)?;
            probe("ofs_embedding", &ofs)?;
            time = time.broadcast_add(&ofs)?;
        }
        let mut text = text.clone();
        let mut video =
            self.patches.forward(&pack(&latents.to_dtype(self.dtype)?.transpose(1, 2)?, patch)?)?;
        if let Some(table) = &positions.added {
            let words = text.dim(1)?;
            text = text.broadcast_add(&table.narrow(0, 0, words)?)?;
            video = video.broadcast_add(&table.narrow(0, words, table.dim(0)? - words)?)?;
        }
        let rope = positions.rotary.as_ref();
        probe("patch_embed", &Tensor::cat(&[&text, &video], 1)?)?;
        let time = silu(&time)?;
        for (index, block) in self.blocks.iter().enumerate() {
            for _ in 0..positions.route.times(index) {
                (video, text) = block.forward(&video, &text, &time, rope)?;
            }
            probe(&format!("transformer_blocks.{index}.0"), &video)?;
            probe(&format!("transformer_blocks.{index}.1"), &text)?;
        }
        let video = self.norm_final.norm().apply(&video)?;
        probe("norm_final", &video)?;
        let values = Values::new(&self.modulation_out.forward(&time)?, 2)?;
        let (shift, scale) = (values.part(0)?, values.part(1)?);
        let out = self.proj_out.forward(&self.norm_out.norm().modulate(&scale, &shift).apply(&video)?)?;
        unpack(&out, [frames, height, width], patch)?.transpose(1, 2)?.contiguous()
    }
}

/// The patches' projection: with patches of one frame its weights are a convolution's over rows and columns.
fn load_patches(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Linear> {
    let (width, side) = (config.inner(), config.patch_size);
    let inputs = config.in_channels * config.patch().iter().product::<usize>();
    let weight = match config.patch_size_t {
        None => vb.get((width, config.in_channels, side, side), "weight")?.reshape((width, inputs))?,
        Some(_) => vb.get((width, inputs), "weight")?,
    };
    // The reference gives the form with longer patches a bias whatever the setting says.
    let biased = config.patch_bias || config.patch_size_t.is_some();
    let bias = if biased { Some(vb.get(width, "bias")?) } else { None };
    Linear::placed(weight, bias, vb, None)
}

/// The learned table of positions, text first, `[tokens, width]`.
fn load_table(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Option<Tensor>> {
    if !config.use_learned_positional_embeddings {
        return Ok(None);
    }
    let cells = config.trained_cells();
    let patch = config.patch();
    // The table does not know of tokens that span several frames.
    let tokens = cells[0] * (cells[1] / patch[1]) * (cells[2] / patch[2]);
    let shape = (1, config.max_text_seq_length + tokens, config.inner());
    Ok(Some(vb.get(shape, "pos_embedding")?.squeeze(0)?))
}

/// A layer norm with weights or without.
struct Affine {
    weights: Option<(Tensor, Tensor)>,
    epsilon: f64,
}

impl Affine {
    fn load(config: &TransformerConfig, width: usize, epsilon: f64, vb: &VarBuilder<'_>) -> Result<Self> {
        let weights = if config.norm_elementwise_affine {
            Some((vb.get(width, "weight")?, vb.get(width, "bias")?))
        } else {
            None
        };
        Ok(Self { weights, epsilon })
    }

    fn norm(&self) -> Norm<'_> {
        let norm = Norm::layer(self.epsilon);
        match &self.weights {
            Some((weight, bias)) => norm.weight(Some(weight)).bias(Some(bias)),
            None => norm,
        }
    }
}

/// Several values of one width side by side, `[B, parts * width]`.
struct Values {
    all: Tensor,
    width: usize,
}

impl Values {
    fn new(all: &Tensor, parts: usize) -> Result<Self> {
        Ok(Self { all: all.clone(), width: all.dim(1)? / parts })
    }

    /// Number `index`, as `[B, 1, width]`.
    fn part(&self, index: usize) -> Result<Tensor> {
        self.all.narrow(1, index * self.width, self.width)?.contiguous()?.unsqueeze(1)
    }
}

/// Norm and modulation before a part of a block: shift, scale and gate for the video, then for the text.
struct Before {
    modulation: Linear,
    norm: Affine,
}

impl Before {
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        Ok(Self {
            modulation: Linear::load(config.time_embed_dim, 6 * width, true, vb.pp("linear"))?,
            norm: Affine::load(config, width, config.norm_eps, &vb.pp("norm"))?,
        })
    }

    /// The sequence, text first, and the gates of video and text; `time` has gone through SiLU.
    fn forward(&self, video: &Tensor, text: &Tensor, time: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let values = Values::new(&self.modulation.forward(time)?, 6)?;
        let normed = |x: &Tensor, first: usize| {
            let (shift, scale) = (values.part(first)?, values.part(first + 1)?);
            self.norm.norm().modulate(&scale, &shift).apply(x)
        };
        let all = Tensor::cat(&[normed(text, 3)?, normed(video, 0)?], 1)?;
        Ok((all, values.part(2)?, values.part(5)?))
    }
}

struct Block {
    before_attention: Before,
    attention: Attention,
    before_feed: Before,
    feed: [Linear; 2],
}

impl Block {
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.inner();
        let feed = vb.pp("ff").pp("net");
        Ok(Self {
            before_attention: Before::load(config, &vb.pp("norm1"))?,
            attention: Attention::load(config, &vb.pp("attn1"))?,
            before_feed: Before::load(config, &vb.pp("norm2"))?,
            feed: [
                Linear::load(width, FEED_FACTOR * width, true, feed.pp(0).pp("proj"))?,
                Linear::load(FEED_FACTOR * width, width, true, feed.pp(2))?,
            ],
        })
    }

    fn forward(
        &self,
        video: &Tensor,
        text: &Tensor,
        time: &Tensor,
        rope: Option<&RopeTables>,
    ) -> Result<(Tensor, Tensor)> {
        let (all, video_gate, text_gate) = self.before_attention.forward(video, text, time)?;
        let mixed = self.attention.forward(&all, rope)?;
        let out = &self.attention.out;
        let (video, text) = gated(out, &mixed, (video, &video_gate), (text, &text_gate))?;
        let (all, video_gate, text_gate) = self.before_feed.forward(&video, &text, time)?;
        let inner = self.feed[0].forward_gelu(&all)?;
        gated(&self.feed[1], &inner, (&video, &video_gate), (&text, &text_gate))
    }
}

/// `x + gate * layer(..)` for video and text, each with its part of the sequence, text first.
fn gated(
    layer: &Linear,
    all: &Tensor,
    (video, video_gate): (&Tensor, &Tensor),
    (text, text_gate): (&Tensor, &Tensor),
) -> Result<(Tensor, Tensor)> {
    let (text_tokens, video_tokens) = (text.dim(1)?, video.dim(1)?);
    let of_video = all.narrow(1, text_tokens, video_tokens)?;
    Ok((
        layer.forward_gated(&of_video, video_gate, video)?,
        layer.forward_gated(&all.narrow(1, 0, text_tokens)?, text_gate, text)?,
    ))
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm_query: Affine,
    norm_key: Affine,
    heads: usize,
    head: usize,
}

impl Attention {
    fn load(config: &TransformerConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let (width, head) = (config.inner(), config.attention_head_dim);
        let linear = |name: &str, bias: bool| Linear::load(width, width, bias, vb.pp(name));
        // The reference's attention gives these norms weights whatever the setting for the blocks' norms.
        let norm = |name: &str| {
            let vb = vb.pp(name);
            Ok::<_, candle_core::Error>(Affine {
                weights: Some((vb.get(head, "weight")?, vb.get(head, "bias")?)),
                epsilon: QK_EPSILON,
            })
        };
        Ok(Self {
            query: linear("to_q", config.attention_bias)?,
            key: linear("to_k", config.attention_bias)?,
            value: linear("to_v", config.attention_bias)?,
            out: linear("to_out.0", true)?,
            norm_query: norm("norm_q")?,
            norm_key: norm("norm_k")?,
            heads: config.num_attention_heads,
            head,
        })
    }

    /// `[B, tokens, width]` without the output's layer.
    fn forward(&self, x: &Tensor, rope: Option<&RopeTables>) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let split = |x: Tensor| x.reshape((batch, tokens, self.heads, self.head));
        let turned = |linear: &Linear, norm: &Affine| {
            let normed = norm.norm().apply(&split(linear.forward(x)?)?)?;
            match rope {
                Some(tables) => rotate_pairs(&normed, &tables.cos, &tables.sin),
                None => Ok(normed),
            }
        };
        let (query, key) = (turned(&self.query, &self.norm_query)?, turned(&self.key, &self.norm_key)?);
        let value = split(self.value.forward(x)?)?;
        attention(&query, &key, &value, None, 1.0 / (self.head as f64).sqrt())?.flatten_from(2)
    }
}

//! What the transformer computes from the text once per run: its tokens for the narrow stream, and one vector of all.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::models::mochi::config::POOL_HEADS;
use crate::nn::attention::attention;
use crate::nn::linear::Linear;
use crate::nn::route::Route;
use crate::pipeline::guided::Entries;

/// Text that is ready for every step.
pub struct TextContext {
    /// One vector for each sample, `[B, width]`.
    pub pooled: Tensor,
    /// The narrow stream before the first block, `[B, text tokens, text width]`.
    pub tokens: Tensor,
    counting: Vec<Counting>,
    /// Which blocks are computed how often.
    pub route: Route,
}

/// Which of a sample's tokens count.
#[derive(Clone)]
enum Counting {
    /// The first so many.
    First(usize),
    /// Those at these places.
    At(Tensor),
}

impl TextContext {
    pub(super) fn new(pooler: &Pooler, caption: &Linear, text: &Tensor, mask: &Tensor) -> Result<Self> {
        let (batch, tokens, _) = text.dims3()?;
        if mask.dims() != [batch, tokens] {
            candle_core::bail!("text {:?} was given a mask {:?}", text.shape(), mask.shape());
        }
        let rows = mask.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        Ok(Self {
            pooled: pooler.forward(text, &rows)?,
            tokens: caption.forward(text)?,
            counting: rows.iter().map(|row| Counting::of(row, text.device())).collect::<Result<_>>()?,
            route: Route::default(),
        })
    }

    /// A sample's part of `x` `[B, text tokens, ..]` without filling, `[1, n, ..]`; `None` where there is only filling.
    pub(super) fn counting(&self, sample: usize, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(counting) = self.counting.get(sample) else {
            candle_core::bail!("{} samples of text, sample {sample} was asked for", self.counting.len())
        };
        let own = x.narrow(0, sample, 1)?;
        match counting {
            Counting::First(0) => Ok(None),
            Counting::First(count) => own.narrow(1, 0, *count).map(Some),
            Counting::At(places) => own.contiguous()?.index_select(places, 1).map(Some),
        }
    }
}

impl Entries for TextContext {
    fn entry(&self, index: usize) -> Result<Self> {
        Ok(Self {
            pooled: self.pooled.entry(index)?,
            tokens: self.tokens.entry(index)?,
            counting: self.counting.iter().skip(index).take(1).cloned().collect(),
            route: self.route.clone(),
        })
    }
}

impl Counting {
    fn of(mask: &[f32], device: &Device) -> Result<Self> {
        let places: Vec<u32> =
            mask.iter().enumerate().filter(|(_, bit)| **bit != 0.0).map(|(place, _)| place as u32).collect();
        let together = places.iter().enumerate().all(|(index, &place)| index == place as usize);
        if together { Ok(Self::First(places.len())) } else { Ok(Self::At(Tensor::new(places, device)?)) }
    }
}

/// Attention of the tokens' mean to itself and the tokens, filling left out (diffusers' `MochiAttentionPool`).
pub(super) struct Pooler {
    query: Linear,
    key_value: Linear,
    out: Linear,
}

impl Pooler {
    pub(super) fn load(input: usize, output: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            query: Linear::load(input, input, true, vb.pp("to_q"))?,
            key_value: Linear::load(input, 2 * input, true, vb.pp("to_kv"))?,
            out: Linear::load(input, output, true, vb.pp("to_out"))?,
        })
    }

    /// `[B, tokens, input]` to `[B, output]`; `mask` has a row of ones and zeros for each sample.
    fn forward(&self, x: &Tensor, mask: &[Vec<f32>]) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let shares = mask.iter().flat_map(|row| {
            let count = row.iter().sum::<f32>().max(1.0);
            row.iter().map(move |bit| bit / count)
        });
        let shares = Tensor::from_vec(shares.collect::<Vec<f32>>(), (batch, 1, tokens), x.device())?;
        let mean = shares.matmul(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?;
        let hidden = mask.iter().flat_map(|row| {
            let bias = row.iter().map(|bit| if *bit == 0.0 { f32::NEG_INFINITY } else { 0.0 });
            std::iter::once(0.0).chain(bias)
        });
        let hidden = Tensor::from_vec(hidden.collect::<Vec<f32>>(), (batch, 1, 1, tokens + 1), x.device())?;
        let head = width / POOL_HEADS;
        let split = |x: Tensor, count: usize| x.contiguous()?.reshape((batch, count, POOL_HEADS, head));
        let query = split(self.query.forward(&mean)?, 1)?;
        let both = self.key_value.forward(&Tensor::cat(&[&mean, x], 1)?)?;
        let key = split(both.narrow(2, 0, width)?, tokens + 1)?;
        let value = split(both.narrow(2, width, width)?, tokens + 1)?;
        let scale = 1.0 / (head as f64).sqrt();
        let pooled = attention(&query, &key, &value, Some(&hidden), scale)?;
        self.out.forward(&pooled.reshape((batch, width))?)
    }
}

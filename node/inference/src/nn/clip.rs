//! A block of CLIP's transformers, the same for words and pictures.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::attention::attention;
use super::linear::Linear;
use super::norm::layer_norm;

/// The sizes of a block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipForm {
    /// Width of a token.
    pub width: usize,
    /// Inner width of a feed-forward.
    pub inner: usize,
    /// Heads.
    pub heads: usize,
    /// Whether the activation is `x sigmoid(1.702 x)` instead of the exact GELU.
    pub quick: bool,
    /// Added to the variance.
    pub epsilon: f64,
}

impl ClipForm {
    /// The activations that are known.
    pub const ACTIVATIONS: [&'static str; 2] = ["quick_gelu", "gelu"];

    /// From a configuration's values, whose activation is one of [`ClipForm::ACTIVATIONS`].
    #[must_use]
    pub fn new([width, inner, heads]: [usize; 3], activation: &str, epsilon: f64) -> Self {
        Self { width, inner, heads, quick: activation == Self::ACTIVATIONS[0], epsilon }
    }
}

/// Attention and feed-forward, normed before.
pub struct ClipBlock {
    norms: [ClipNorm; 2],
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    feed: [Linear; 2],
    form: ClipForm,
}

impl ClipBlock {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(form: ClipForm, vb: &VarBuilder<'_>) -> Result<Self> {
        let ClipForm { width, inner, .. } = form;
        let own = |name: &str| Linear::load(width, width, true, vb.pp("self_attn").pp(name));
        let feed = vb.pp("mlp");
        Ok(Self {
            norms: [
                ClipNorm::load(form, &vb.pp("layer_norm1"))?,
                ClipNorm::load(form, &vb.pp("layer_norm2"))?,
            ],
            query: own("q_proj")?,
            key: own("k_proj")?,
            value: own("v_proj")?,
            out: own("out_proj")?,
            feed: [
                Linear::load(width, inner, true, feed.pp("fc1"))?,
                Linear::load(inner, width, true, feed.pp("fc2"))?,
            ],
            form,
        })
    }

    /// Tokens `(batch, tokens, width)`; `mask` is added to the scores.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let head = width / self.form.heads;
        let split = |x: Tensor| x.reshape((batch, tokens, self.form.heads, head));
        let normed = self.norms[0].forward(x)?;
        let query = split(self.query.forward(&normed)?)?;
        let (key, value) = (split(self.key.forward(&normed)?)?, split(self.value.forward(&normed)?)?);
        let scale = 1.0 / (head as f64).sqrt();
        let mixed = attention(&query, &key, &value, mask, scale)?.flatten_from(2)?;
        let x = self.out.forward_add(&mixed, x)?;
        let inner = self.feed[0].forward(&self.norms[1].forward(&x)?)?;
        let inner = if self.form.quick { quick_gelu(&inner)? } else { inner.gelu_erf()? };
        self.feed[1].forward_add(&inner, &x)
    }
}

/// `x sigmoid(1.702 x)`.
fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    const SLOPE: f64 = 1.702;
    x * candle_nn::ops::sigmoid(&(x * SLOPE)?)?
}

/// A layer norm with its weights, in f32 whatever the rest is.
pub struct ClipNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl ClipNorm {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(form: ClipForm, vb: &VarBuilder<'_>) -> Result<Self> {
        let (weight, bias) = (vb.get(form.width, "weight")?, vb.get(form.width, "bias")?);
        Ok(Self { weight, bias, epsilon: form.epsilon })
    }

    /// Norms the last dimension, in `x`'s type.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // In f32 as a whole: sequences are short, and half types lose the small differences that a pooled state lives on.
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let (weight, bias) = (wide(&self.weight)?, wide(&self.bias)?);
        layer_norm(&wide(x)?, Some((&weight, &bias)), self.epsilon)?.to_dtype(x.dtype())
    }
}

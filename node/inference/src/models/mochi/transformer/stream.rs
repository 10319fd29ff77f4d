//! One stream's part of a block: what the timestep does to its norms, its gates, and its feed-forward part.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::models::mochi::config::TransformerConfig;
use crate::nn::linear::Linear;
use crate::nn::norm::Norm;
use crate::nn::ops::swiglu;

/// Epsilon of the norms over a token.
pub(super) const NORM_EPSILON: f64 = 1e-6;

/// The layers of a stream of `width` channels.
pub(super) struct Stream {
    modulation: Linear,
    feed_in: Linear,
    feed_out: Linear,
    width: usize,
}

/// Factors of the norms and gates of what is added, `[B, width]`, f32.
pub(super) struct Modulation {
    attention: [Tensor; 2],
    feed: [Tensor; 2],
}

impl Stream {
    /// `norm` holds the layer from the signal of `signal` channels, `feed` the feed-forward part.
    pub(super) fn load(
        signal: usize,
        width: usize,
        norm: &VarBuilder<'_>,
        feed: &VarBuilder<'_>,
    ) -> Result<Self> {
        let (inner, net) = (TransformerConfig::feed_forward(width), feed.pp("net"));
        Ok(Self {
            modulation: Linear::load(signal, 4 * width, true, norm.pp("linear"))?,
            feed_in: Linear::load(width, 2 * inner, false, net.pp(0).pp("proj"))?,
            feed_out: Linear::load(inner, width, false, net.pp(2))?,
            width,
        })
    }

    /// From the signal `[B, signal channels]`: the embedded timestep and text after SiLU.
    pub(super) fn modulation(&self, signal: &Tensor) -> Result<Modulation> {
        let values = self.modulation.forward(signal)?.to_dtype(DType::F32)?;
        let part = |index: usize| values.narrow(1, index * self.width, self.width)?.contiguous();
        Ok(Modulation {
            attention: [(part(0)? + 1.0)?, part(1)?.tanh()?],
            feed: [(part(2)? + 1.0)?, part(3)?.tanh()?],
        })
    }

    /// The stream `[B, tokens, width]` after attention's result is added and fed forward.
    pub(super) fn absorb(&self, x: &Tensor, attended: &Tensor, modulation: &Modulation) -> Result<Tensor> {
        let x = (x + norm(&modulation.attention[1], attended)?)?;
        let inner = swiglu(&self.feed_in.forward(&norm(&modulation.feed[0], &x)?)?)?;
        let fed = self.feed_out.forward(&inner)?;
        x + norm(&modulation.feed[1], &fed)?
    }
}

impl Modulation {
    /// What attention sees of a stream.
    pub(super) fn before_attention(&self, x: &Tensor) -> Result<Tensor> {
        norm(&self.attention[0], x)
    }
}

fn norm(factor: &Tensor, x: &Tensor) -> Result<Tensor> {
    Norm::rms(NORM_EPSILON).factor(factor).apply(x)
}

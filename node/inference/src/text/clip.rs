//! CLIP's text encoder (Radford et al. 2021): a causal transformer over a prompt, and the state at its end mark as one
//! vector for the whole prompt.

use std::path::Path;

use candle_core::{Device, Result, Tensor};
use candle_nn::{Embedding, Module, VarBuilder};
use serde::Deserialize;

use super::TextError;
use crate::nn::clip::{ClipBlock, ClipForm, ClipNorm};
use crate::nn::linear::Linear;

/// The `eos_token_id` of configurations that were written before it meant anything: the end mark is then the largest id.
const OLD_EOS: u32 = 2;

/// `config.json` of a CLIP text model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ClipTextConfig {
    /// `clip_text_model`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Inner width of a feed-forward.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Tokens of the longest prompt.
    pub max_position_embeddings: usize,
    /// `quick_gelu` or `gelu`.
    pub hidden_act: String,
    /// Added to the variance.
    pub layer_norm_eps: f64,
    /// The end mark; 2 stands for the largest id of a prompt.
    pub eos_token_id: u32,
    /// Width of a prompt's vector where it is projected.
    #[serde(default = "usual_projection")]
    pub projection_dim: usize,
}

/// The reference's default.
fn usual_projection() -> usize {
    512
}

impl ClipTextConfig {
    fn form(&self) -> ClipForm {
        let sizes = [self.hidden_size, self.intermediate_size, self.num_attention_heads];
        ClipForm::new(sizes, &self.hidden_act, self.layer_norm_eps)
    }

    /// Refuses what this encoder does not compute.
    ///
    /// # Errors
    /// The first such setting, with the file that it stands in.
    pub fn check(&self, file: &Path) -> std::result::Result<(), TextError> {
        let fault = |key, value: String, reason| {
            Err(TextError::Setting { file: file.to_owned(), key, value, reason })
        };
        if self.model_type != "clip_text_model" {
            return fault("model_type", self.model_type.clone(), "only clip_text_model is known");
        }
        if !ClipForm::ACTIVATIONS.contains(&self.hidden_act.as_str()) {
            return fault("hidden_act", self.hidden_act.clone(), "known are quick_gelu and gelu");
        }
        if self.num_attention_heads == 0 || !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let value = self.num_attention_heads.to_string();
            return fault("num_attention_heads", value, "it must divide hidden_size");
        }
        Ok(())
    }

    /// Parameters that every token meets: attention and feed-forward of every layer, without the vocabulary.
    #[must_use]
    pub fn token_parameters(&self) -> u64 {
        let [width, inner, layers] =
            [self.hidden_size, self.intermediate_size, self.num_hidden_layers].map(|n| n as u64);
        let matrices = width.saturating_mul(4).saturating_add(inner.saturating_mul(2));
        matrices.saturating_mul(width).saturating_mul(layers)
    }
}

/// A CLIP text encoder on a device.
pub struct ClipTextEncoder {
    tokens: Embedding,
    positions: Tensor,
    blocks: Vec<ClipBlock>,
    norm: ClipNorm,
    projection: Option<Linear>,
    config: ClipTextConfig,
}

impl ClipTextEncoder {
    /// Reads the weights of an encoder that projects the state at the end mark (`CLIPTextModelWithProjection`).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load_projected(config: &ClipTextConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let (width, projected) = (config.hidden_size, config.projection_dim);
        let projection = Linear::load(width, projected, false, vb.pp("text_projection"))?;
        Ok(Self { projection: Some(projection), ..Self::load(config, vb)? })
    }

    /// Reads the weights of one that gives that state as it is.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &ClipTextConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let vb = vb.pp("text_model");
        let embeddings = vb.pp("embeddings");
        let width = config.hidden_size;
        let tokens = embeddings.get((config.vocab_size, width), "token_embedding.weight")?;
        let blocks = (0..config.num_hidden_layers)
            .map(|index| ClipBlock::load(config.form(), &vb.pp("encoder").pp("layers").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            tokens: Embedding::new(tokens, width),
            positions: embeddings
                .get((config.max_position_embeddings, width), "position_embedding.weight")?,
            blocks,
            norm: ClipNorm::load(config.form(), &vb.pp("final_layer_norm"))?,
            projection: None,
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// The last hidden state `[B, tokens, width]` and the state at the end mark, projected where it is, `[B, width]`, of
    /// ids `[B, tokens]` (u32).
    ///
    /// # Errors
    /// When there are more tokens than positions, an id is not in the vocabulary, or the device has no room.
    pub fn forward(&self, ids: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, tokens) = ids.dims2()?;
        let most = self.config.max_position_embeddings;
        if tokens > most {
            candle_core::bail!("{tokens} tokens were given to a CLIP encoder of {most} positions");
        }
        let mut x = self.tokens.forward(ids)?.broadcast_add(&self.positions.narrow(0, 0, tokens)?)?;
        let mask = causal(tokens, ids.device())?;
        for block in &self.blocks {
            x = block.forward(&x, Some(&mask))?;
        }
        let x = self.norm.forward(&x)?;
        let ends = ids.to_vec2::<u32>()?;
        let ends = ends.iter().enumerate().map(|(entry, ids)| x.get(entry)?.get(self.end(ids)));
        let pooled = Tensor::stack(&ends.collect::<Result<Vec<_>>>()?, 0)?;
        match &self.projection {
            Some(projection) => Ok((x, projection.forward(&pooled)?)),
            None => Ok((x, pooled)),
        }
    }

    /// Where a prompt ends: the first end mark, or the first of its largest id; the beginning where there is none.
    fn end(&self, ids: &[u32]) -> usize {
        let mark = match self.config.eos_token_id {
            OLD_EOS => ids.iter().copied().max().unwrap_or_default(),
            id => id,
        };
        ids.iter().position(|&id| id == mark).unwrap_or(0)
    }
}

/// `[1, 1, tokens, tokens]`: nothing attends to what comes later.
fn causal(tokens: usize, device: &Device) -> Result<Tensor> {
    let value = |at: usize| if at % tokens > at / tokens { f32::MIN } else { 0.0 };
    Tensor::from_vec((0..tokens * tokens).map(value).collect(), (1, 1, tokens, tokens), device)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::DType;

    use super::*;

    fn config() -> ClipTextConfig {
        ClipTextConfig {
            model_type: "clip_text_model".to_owned(),
            vocab_size: 10,
            hidden_size: 4,
            intermediate_size: 8,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            max_position_embeddings: 6,
            hidden_act: "quick_gelu".to_owned(),
            layer_norm_eps: 1e-5,
            eos_token_id: 2,
            projection_dim: 4,
        }
    }

    #[test]
    fn a_prompt_ends_at_its_first_end_mark_and_in_old_configurations_at_its_first_largest_id() {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let old = ClipTextEncoder::load(&config(), &vb).unwrap();
        assert_eq!(old.end(&[8, 2, 3, 9, 9, 9]), 3);
        let new = ClipTextEncoder::load(&ClipTextConfig { eos_token_id: 7, ..config() }, &vb).unwrap();
        assert_eq!(new.end(&[8, 2, 7, 9, 7]), 2);
        let long = Tensor::zeros((1, 7), DType::U32, &Device::Cpu).unwrap();
        assert!(old.forward(&long).is_err());
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let file = Path::new("text_encoder/config.json");
        assert!(config().check(file).is_ok());
        let relu = ClipTextConfig { hidden_act: "relu".to_owned(), ..config() };
        let said = relu.check(file).unwrap_err().to_string();
        assert!(
            said.contains("config.json") && said.contains("hidden_act") && said.contains("relu"),
            "{said}"
        );
        assert!(ClipTextConfig { num_attention_heads: 3, ..config() }.check(file).is_err());
    }
}

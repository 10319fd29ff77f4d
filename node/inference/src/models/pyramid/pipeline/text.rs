//! A prompt as the transformer reads it: T5's states of all tokens, and CLIP's one vector, of one encoder or of two.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::folder::{load_clip, read_clip};
use crate::error::Error;
use crate::models::pyramid::config::Variant;
use crate::offload::{InTurn, Slot};
use crate::pipeline::LoadOptions;
use crate::pipeline::touch::{Embeds, Way, mix};
use crate::text::{ClipTextConfig, ClipTextEncoder, PromptEncoder, PromptTokenizer};

/// The text as the transformer reads it.
pub struct PromptEmbeds {
    /// T5's, `[1, tokens, width]`.
    pub embeds: Tensor,
    /// 1 where the prompt is and 0 where it is filled up, `[1, tokens]`.
    pub mask: Tensor,
    /// CLIP's, `[1, width]`.
    pub pooled: Tensor,
}

impl Embeds for PromptEmbeds {
    fn mixed(&self, other: &Self, weight: f64, way: Way) -> candle_core::Result<Self> {
        let words = |embeds: &Self| (embeds.embeds.clone(), embeds.mask.clone());
        let (embeds, mask) = words(self).mixed(&words(other), weight, way)?;
        Ok(Self { embeds, mask, pooled: mix(&self.pooled, &other.pooled, weight, way)? })
    }

    fn joined(&self, other: &Self) -> candle_core::Result<Self> {
        Ok(Self {
            embeds: self.embeds.joined(&other.embeds)?,
            mask: self.mask.joined(&other.mask)?,
            pooled: self.pooled.joined(&other.pooled)?,
        })
    }
}

/// All text encoders of a model.
pub(super) struct Text {
    pub(super) t5: PromptEncoder,
    clips: Vec<Clip>,
    /// Where CLIP computes.
    here: Device,
    /// Where its vectors are wanted.
    device: Device,
}

struct Clip {
    tokenizer: PromptTokenizer,
    config: ClipTextConfig,
    encoder: Slot<ClipTextEncoder>,
}

impl Text {
    /// Reads a folder's, and says how many parameters they have together.
    pub(super) fn load(
        folder: &Path,
        variant: Variant,
        options: &LoadOptions,
        limit: usize,
        in_turn: &InTurn,
    ) -> Result<(Self, u64), Error> {
        let parts = variant.t5();
        let (tokenizer, encoder) = (folder.join(parts.tokenizer), folder.join(parts.encoder));
        let (t5, mut parameters) = PromptEncoder::load_parts(&tokenizer, &encoder, options, limit, in_turn)?;
        let mut clips = Vec::new();
        for parts in variant.clips() {
            let tokenizer = PromptTokenizer::load_clip(&folder.join(parts.tokenizer))?;
            let (from, with) = (folder.join(parts.encoder), options.for_text());
            let config = read_clip(&from)?;
            let read = move || load_clip(&from, &with, variant.projects());
            let (encoder, more) = Slot::new(in_turn, read)?;
            clips.push(Clip { tokenizer, config, encoder });
            parameters += more;
        }
        let (here, device) = (options.for_text().device, options.device.clone());
        Ok((Self { t5, clips, here, device }, parameters))
    }

    /// Gives the encoders back where components go in turn.
    pub(super) fn give_back(&self) {
        self.t5.give_back();
        self.clips.iter().for_each(|clip| clip.encoder.give_back());
    }

    /// A prompt as it stands. CLIP's part is cut silently, as in the reference: it is a summary, and the whole prompt is
    /// in T5's.
    pub(super) fn encode(&self, prompt: &str, truncate: bool) -> Result<PromptEmbeds, Error> {
        let (embeds, mask) = self.t5.encode(prompt, truncate, true)?;
        let vectors = self.clips.iter().map(|clip| {
            let ids = clip.ids(prompt)?;
            let ids = Tensor::from_slice(&ids, (1, ids.len()), &self.here)?;
            Ok(clip.encoder.get()?.forward(&ids)?.1.to_device(&self.device)?)
        });
        let pooled = Tensor::cat(&vectors.collect::<Result<Vec<_>, Error>>()?, 1)?;
        Ok(PromptEmbeds { embeds, mask, pooled })
    }

    /// The ids that each CLIP reads of a prompt.
    pub(super) fn clip_ids(&self, prompt: &str) -> Result<Vec<Vec<u32>>, Error> {
        self.clips.iter().map(|clip| clip.ids(prompt)).collect()
    }
}

impl Clip {
    fn ids(&self, prompt: &str) -> Result<Vec<u32>, Error> {
        let most = self.config.max_position_embeddings;
        let limit = self.tokenizer.max_length.map_or(most, |limit| limit.min(most));
        Ok(self.tokenizer.encode(prompt, limit)?.ids)
    }
}

//! A tokenizer and a T5 encoder together: from a prompt to the embeddings that a video model reads.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::{PromptTokenizer, T5Encoder, TextCache};
use crate::error::Error;
use crate::folder::load_t5;
use crate::offload::{InTurn, Slot};
use crate::pipeline::LoadOptions;
use crate::pipeline::run::check_prompt;

/// What a model reads prompts with.
pub struct PromptEncoder {
    tokenizer: PromptTokenizer,
    encoder: Slot<T5Encoder>,
    limit: usize,
    /// Where the encoder computes.
    here: Device,
    /// Where its embeddings are wanted.
    device: Device,
    known: TextCache<Text, (Tensor, Tensor)>,
}

/// What embeddings depend on: the ids, which of them are the prompt, and whether the filling is left out.
type Text = (Vec<u32>, Vec<u8>, bool);

impl PromptEncoder {
    /// Reads a folder's `tokenizer` and `text_encoder`, and says how many parameters the latter has. A prompt has at most
    /// `most` tokens, or as many as the tokenizer's own limit where that is less.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load(
        folder: &Path,
        options: &LoadOptions,
        most: usize,
        in_turn: &InTurn,
    ) -> Result<(Self, u64), Error> {
        Self::load_parts(&folder.join("tokenizer"), &folder.join("text_encoder"), options, most, in_turn)
    }

    /// [`PromptEncoder::load`] from folders of other names.
    ///
    /// # Errors
    /// See [`crate::load`].
    pub fn load_parts(
        tokenizer: &Path,
        encoder: &Path,
        options: &LoadOptions,
        most: usize,
        in_turn: &InTurn,
    ) -> Result<(Self, u64), Error> {
        let tokenizer = PromptTokenizer::load(tokenizer)?;
        let limit = tokenizer.max_length.map_or(most, |limit| limit.min(most));
        let here = options.for_text();
        let (part, at) = (encoder.to_owned(), here.device.clone());
        let (encoder, parameters) = Slot::new(in_turn, move || load_t5(&part, &here))?;
        let (device, known) = (options.device.clone(), TextCache::default());
        Ok((Self { tokenizer, encoder, limit, here: at, device, known }, parameters))
    }

    /// Tokens that are read of a prompt, with the end mark.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Reads more or fewer tokens from now on.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Gives the encoder back where components go in turn.
    pub fn give_back(&self) {
        self.encoder.give_back();
    }

    /// How many tokens a prompt has, with the end mark.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn tokens(&self, prompt: &str) -> Result<usize, Error> {
        Ok(self.tokenizer.ids(prompt)?.len())
    }

    /// Refuses a prompt that does not fit, unless it may be cut.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`], or when the tokenizer fails.
    pub fn check(&self, prompt: &str, truncate: bool) -> Result<(), Error> {
        check_prompt(&self.tokenizer, prompt, self.limit, truncate)
    }

    /// The embeddings `[1, limit, width]` of a prompt, filled up, and their mask `[1, limit]` (u8). Where `masked` is
    /// false, the encoder attends to the filling too, as some references do.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where it is and `truncate` is false, or what the device reports.
    pub fn encode(&self, prompt: &str, truncate: bool, masked: bool) -> Result<(Tensor, Tensor), Error> {
        let limit = self.limit;
        let encoded = self.tokenizer.encode(prompt, limit)?;
        if let Some(cut_text) = encoded.cut_text.filter(|_| !truncate) {
            return Err(Error::PromptTooLong { tokens: encoded.tokens, limit, cut_text });
        }
        self.embed((encoded.ids, encoded.mask, masked))
    }

    /// The embeddings `[1, limit, width]` of filling alone, and their mask of zeros `[1, limit]` (u8): what some references
    /// make of an empty prompt.
    ///
    /// # Errors
    /// What the device reports.
    pub fn encode_nothing(&self) -> Result<(Tensor, Tensor), Error> {
        self.embed((vec![0; self.limit], vec![0; self.limit], true))
    }

    /// How often the encoder was run: the last few texts are remembered.
    #[must_use]
    pub fn encodings(&self) -> usize {
        self.known.made()
    }

    fn embed(&self, text: Text) -> Result<(Tensor, Tensor), Error> {
        self.known.get_or(text.clone(), || {
            let (ids, mask, masked) = text;
            let ids = Tensor::from_vec(ids, (1, self.limit), &self.here)?;
            let mask = Tensor::from_vec(mask, (1, self.limit), &self.here)?;
            let embeds = self.encoder.get()?.forward(&ids, masked.then_some(&mask))?;
            Ok((embeds.to_device(&self.device)?, mask.to_device(&self.device)?))
        })
    }
}

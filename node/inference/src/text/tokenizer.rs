//! A prompt's token ids, from `tokenizer.json` or from `spiece.model` alone, or from CLIP's `vocab.json` and `merges.txt`.
//!
//! From `spiece.model` the tokenizer is built as Hugging Face's converter builds it for T5: the model's pieces, then
//! `<extra_id_N>` downwards, the precompiled normaliser, trailing space stripped, runs of spaces to one U+2581,
//! metaspace, `</s>` at the end. The prefix space follows `add_prefix_space` in `tokenizer_config.json` (null and
//! false mean none).

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::precompiled::Precompiled;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{NormalizerWrapper, Sequence, Strip};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::sentencepiece::{PieceKind, SentencePiece};
use super::{TextError, clip_tokenizer};

/// The `model_max_length` that is no limit: transformers writes 1e30 where it knows none.
const NO_LIMIT: f64 = 1e15;

const SPIECE: &str = "spiece.model";

/// What fills up and what ends, where the configuration does not say.
const T5_MARKS: [&str; 2] = ["<pad>", "</s>"];

/// A tokenizer with the limits of its model.
pub struct PromptTokenizer {
    tokenizer: Tokenizer,
    /// What is done to a prompt first.
    clean: Option<fn(&str) -> String>,
    /// `model_max_length` of `tokenizer_config.json`, where it has one.
    pub max_length: Option<usize>,
    /// The id that fills up.
    pub pad_id: u32,
    /// The id at the end.
    pub eos_id: u32,
}

/// A prompt as ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Padded or cut to the limit.
    pub ids: Vec<u32>,
    /// 1 where `ids` holds the prompt, 0 where it is filled up.
    pub mask: Vec<u8>,
    /// Tokens in the whole prompt, with the end mark.
    pub tokens: usize,
    /// The end of the prompt that did not fit.
    pub cut_text: Option<String>,
}

impl PromptTokenizer {
    /// Reads the tokenizer of a folder.
    ///
    /// # Errors
    /// When there is none, or it cannot be read; both name the file.
    pub fn load(folder: &Path) -> Result<Self, TextError> {
        let json = folder.join("tokenizer.json");
        if json.exists() {
            return Self::new(folder, from_json(&json)?, &config(folder)?, T5_MARKS);
        }
        if folder.join(SPIECE).exists() {
            return Self::load_spiece(folder);
        }
        Err(TextError::NoTokenizer { folder: folder.to_owned() })
    }

    /// Reads a folder's `spiece.model`, whether there is a `tokenizer.json` or not.
    ///
    /// # Errors
    /// As [`PromptTokenizer::load`].
    pub fn load_spiece(folder: &Path) -> Result<Self, TextError> {
        let config = config(folder)?;
        Self::new(folder, from_spiece(&folder.join(SPIECE), &config)?, &config, T5_MARKS)
    }

    /// Reads CLIP's tokenizer, `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// When a file is missing or cannot be read; the error names it.
    pub fn load_clip(folder: &Path) -> Result<Self, TextError> {
        let config = config(folder)?;
        let end = clip_tokenizer::END;
        let loaded = Self::new(folder, clip_tokenizer::read(folder, &config)?, &config, [end, end])?;
        Ok(Self { clean: Some(clip_tokenizer::clean), ..loaded })
    }

    /// `marks` are the usual texts of what fills up and of the end mark.
    fn new(
        folder: &Path,
        tokenizer: Tokenizer,
        config: &Map<String, Value>,
        marks: [&str; 2],
    ) -> Result<Self, TextError> {
        let id = |key: &str, usual: &str| {
            let token = config.get(key).and_then(token_text).unwrap_or_else(|| usual.to_owned());
            tokenizer.token_to_id(&token).ok_or_else(|| TextError::Tokenizer {
                file: folder.to_owned(),
                reason: format!("{key} {token:?} is not in the vocabulary"),
            })
        };
        let (pad_id, eos_id) = (id("pad_token", marks[0])?, id("eos_token", marks[1])?);
        Ok(Self { tokenizer, clean: None, max_length: max_length(config), pad_id, eos_id })
    }

    /// Every id of a prompt, with the end mark, neither padded nor cut.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn ids(&self, prompt: &str) -> Result<Vec<u32>, TextError> {
        Ok(self.encoding(&self.cleaned(prompt))?.get_ids().to_vec())
    }

    /// A prompt in exactly `limit` ids; what is too long is cut before the end mark.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, prompt: &str, limit: usize) -> Result<Encoded, TextError> {
        let prompt = self.cleaned(prompt);
        let encoding = self.encoding(&prompt)?;
        let mut ids = encoding.get_ids().to_vec();
        let tokens = ids.len();
        let mut cut_text = None;
        if tokens > limit {
            let kept = limit.saturating_sub(1);
            let from = encoding.get_offsets().get(kept).map_or(prompt.len(), |offsets| offsets.0);
            cut_text = Some(prompt.get(from..).unwrap_or_default().to_owned());
            ids.truncate(kept);
            ids.extend((limit > 0).then_some(self.eos_id));
        }
        let mut mask = vec![1u8; ids.len()];
        mask.resize(limit, 0);
        ids.resize(limit, self.pad_id);
        Ok(Encoded { ids, mask, tokens, cut_text })
    }

    fn cleaned<'a>(&self, prompt: &'a str) -> Cow<'a, str> {
        match self.clean {
            Some(clean) => Cow::Owned(clean(prompt)),
            None => Cow::Borrowed(prompt),
        }
    }

    fn encoding(&self, prompt: &str) -> Result<tokenizers::Encoding, TextError> {
        self.tokenizer.encode(prompt, true).map_err(|error| TextError::Encode { reason: error.to_string() })
    }
}

/// Tokens that are read of a prompt with a folder's tokenizer: `most`, or its own limit where that is less. The tokenizer
/// itself is not read.
///
/// # Errors
/// When `tokenizer_config.json` is there and cannot be read.
pub fn token_limit(folder: &Path, most: usize) -> Result<usize, TextError> {
    Ok(max_length(&config(folder)?).map_or(most, |limit| limit.min(most)))
}

fn max_length(config: &Map<String, Value>) -> Option<usize> {
    let limit = config.get("model_max_length").and_then(Value::as_f64);
    limit.filter(|&n| (1.0..NO_LIMIT).contains(&n)).map(|n| n as usize)
}

fn config(folder: &Path) -> Result<Map<String, Value>, TextError> {
    let file = folder.join("tokenizer_config.json");
    if !file.exists() {
        return Ok(Map::new());
    }
    let unreadable = |reason: String| TextError::Tokenizer { file: file.clone(), reason };
    let text = std::fs::read_to_string(&file).map_err(|error| unreadable(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))
}

/// A special token is written as its text, or as an object with `content`.
pub(super) fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn from_json(file: &Path) -> Result<Tokenizer, TextError> {
    let fault =
        |error: tokenizers::Error| TextError::Tokenizer { file: file.to_owned(), reason: error.to_string() };
    let mut tokenizer = Tokenizer::from_file(file).map_err(fault)?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(fault)?;
    Ok(tokenizer)
}

fn from_spiece(file: &Path, config: &Map<String, Value>) -> Result<Tokenizer, TextError> {
    let fault = |reason: String| TextError::Tokenizer { file: file.to_owned(), reason };
    let bytes = std::fs::read(file).map_err(|error| fault(error.to_string()))?;
    let model = SentencePiece::parse(&bytes).map_err(fault)?;
    build(model, config).map_err(|error| fault(error.to_string()))
}

fn build(model: SentencePiece, config: &Map<String, Value>) -> tokenizers::Result<Tokenizer> {
    const SPACE: char = '\u{2581}';
    const EXTRA_IDS: u64 = 100;
    let extra = config.get("extra_ids").and_then(Value::as_u64).unwrap_or(EXTRA_IDS).min(10_000);
    let sentinels: Vec<String> = (0..extra).rev().map(|n| format!("<extra_id_{n}>")).collect();
    let special = |kind: PieceKind| matches!(kind, PieceKind::Control | PieceKind::Unknown);
    let added: Vec<AddedToken> = model
        .pieces
        .iter()
        .filter(|piece| special(piece.kind) || piece.kind == PieceKind::UserDefined)
        .map(|piece| AddedToken::from(piece.text.clone(), special(piece.kind)).normalized(false))
        .chain(sentinels.iter().map(|text| AddedToken::from(text.clone(), true)))
        .collect();
    let mut vocabulary: Vec<(String, f64)> =
        model.pieces.into_iter().map(|piece| (piece.text, f64::from(piece.score))).collect();
    vocabulary.extend(sentinels.into_iter().map(|text| (text, 0.0)));

    let mut tokenizer = Tokenizer::new(Unigram::from(vocabulary, Some(model.unk_id), false)?);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if !model.charsmap.is_empty() {
        normalizers.push(Precompiled::from(&model.charsmap)?.into());
    }
    normalizers.push(Strip::new(false, true).into());
    normalizers.push(Replace::new(ReplacePattern::Regex(" {2,}".to_owned()), SPACE.to_string())?.into());
    tokenizer.with_normalizer(Some(Sequence::new(normalizers)))?;
    tokenizer.with_pre_tokenizer(Some(Metaspace::new(SPACE, prepend(config), true)));
    tokenizer.add_tokens(added)?;
    let end = config.get("eos_token").and_then(token_text).unwrap_or_else(|| "</s>".to_owned());
    let id = tokenizer.token_to_id(&end).ok_or_else(|| format!("{end:?} is not in the vocabulary"))?;
    let template = TemplateProcessing::builder()
        .try_single(vec!["$A".to_owned(), end.clone()])?
        .special_tokens(vec![(end, id)])
        .build()?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}

/// Whether a text begins with a space: always, at its very beginning only, or never.
fn prepend(config: &Map<String, Value>) -> PrependScheme {
    let on = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
    let legacy = config.get("legacy").and_then(Value::as_bool).unwrap_or(true);
    match (on, legacy) {
        (false, _) => PrependScheme::Never,
        (true, true) => PrependScheme::Always,
        (true, false) => PrependScheme::First,
    }
}

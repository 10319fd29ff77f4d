//! CLIP's tokenizer from `vocab.json` and `merges.txt`: text put in order and in lower case, cut into words, and each
//! word's bytes merged pair by pair, the last with `</w>`.
//!
//! As transformers' `CLIPTokenizer` with ftfy installed, which is how CLIP was trained.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::models::bpe::{BpeBuilder, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::TextError;
use super::clean::{collapse_space, fix_text};
use super::tokenizer::token_text;

const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const WORD_END: &str = "</w>";
const START: &str = "<|startoftext|>";
pub(super) const END: &str = "<|endoftext|>";

/// A prompt as the merges know it.
pub(super) fn clean(prompt: &str) -> String {
    collapse_space(&fix_text(prompt)).to_lowercase()
}

/// Reads a folder's vocabulary and merges.
pub(super) fn read(folder: &Path, config: &Map<String, Value>) -> Result<Tokenizer, TextError> {
    let file = folder.join("vocab.json");
    let fault = |reason: String| TextError::Tokenizer { file: file.clone(), reason };
    let text = std::fs::read_to_string(&file).map_err(|error| fault(error.to_string()))?;
    let vocabulary: BTreeMap<String, u32> =
        serde_json::from_str(&text).map_err(|error| fault(error.to_string()))?;
    let merges_file = folder.join("merges.txt");
    let fault = |reason: String| TextError::Tokenizer { file: merges_file.clone(), reason };
    let text = std::fs::read_to_string(&merges_file).map_err(|error| fault(error.to_string()))?;
    let merges = merges(&text, &vocabulary).map_err(fault)?;
    build(vocabulary, merges, config).map_err(|error| fault(error.to_string()))
}

/// Pairs, the first to be merged first. The file's first line is its version.
fn merges(text: &str, vocabulary: &BTreeMap<String, u32>) -> Result<Vec<(String, String)>, String> {
    let pair = |line: &str| {
        let (first, second) = line.trim_end().split_once(' ').ok_or(format!("{line:?} is no pair"))?;
        // The builder takes for granted that a pair's two halves and their whole have an id.
        let whole = format!("{first}{second}");
        match [first, second, &whole].into_iter().find(|&part| !vocabulary.contains_key(part)) {
            Some(missing) => Err(format!("{missing:?} is merged and not in vocab.json")),
            None => Ok((first.to_owned(), second.to_owned())),
        }
    };
    text.lines().skip(1).filter(|line| !line.trim().is_empty()).map(pair).collect()
}

fn build(
    vocabulary: BTreeMap<String, u32>,
    merges: Vec<(String, String)>,
    config: &Map<String, Value>,
) -> tokenizers::Result<Tokenizer> {
    let special =
        |key: &str, usual: &str| config.get(key).and_then(token_text).unwrap_or_else(|| usual.to_owned());
    let (start, end, unknown) =
        (special("bos_token", START), special("eos_token", END), special("unk_token", END));
    let vocabulary: Vocab = vocabulary.into_iter().collect();
    let model = BpeBuilder::new()
        .vocab_and_merges(vocabulary, merges)
        .unk_token(unknown)
        .end_of_word_suffix(WORD_END.to_owned())
        .build()?;
    let mut tokenizer = Tokenizer::new(model);
    let words = Split::new(SplitPattern::Regex(WORDS.to_owned()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::new(false, false, false);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), bytes.into()])));
    let marks = [&start, &end].map(|text| AddedToken::from(text.clone(), true).normalized(false));
    tokenizer.add_special_tokens(marks)?;
    let id = |text: &str| tokenizer.token_to_id(text).ok_or_else(|| format!("{text:?} has no id"));
    let template = TemplateProcessing::builder()
        .try_single(vec![start.clone(), "$A".to_owned(), end.clone()])?
        .special_tokens(vec![(start.clone(), id(&start)?), (end.clone(), id(&end)?)])
        .build()?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}

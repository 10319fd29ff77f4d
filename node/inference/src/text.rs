//! From a prompt to the numbers that a video model reads: tokenizers and text encoders.

pub mod cache;
pub mod clean;
pub mod clip;
mod clip_tokenizer;
pub mod entities;
pub mod prompt;
pub mod sentencepiece;
pub mod t5;
mod t5_names;
pub mod tokenizer;

use std::path::PathBuf;

pub use cache::TextCache;
pub use clip::{ClipTextConfig, ClipTextEncoder};
pub use prompt::PromptEncoder;
pub use t5::{T5Config, T5Encoder};
pub use t5_names::t5_name;
pub use tokenizer::{Encoded, PromptTokenizer, token_limit};

/// What is wrong with a tokenizer or a text encoder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// Neither form of a tokenizer is in the folder.
    #[error("no tokenizer in {folder}: neither tokenizer.json nor spiece.model is there")]
    NoTokenizer {
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// A tokenizer file that cannot be read.
    #[error("tokenizer {file} cannot be read: {reason}")]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// The tokenizer failed on a text.
    #[error("the tokenizer failed: {reason}")]
    Encode {
        /// What it said.
        reason: String,
    },
    /// An encoder setting that this engine does not compute.
    #[error("{file}: {key} is {value}: {reason}")]
    Setting {
        /// The configuration file.
        file: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is known instead.
        reason: &'static str,
    },
}

impl TextError {
    /// A short stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoTokenizer { .. } => "no_tokenizer",
            Self::Tokenizer { .. } => "tokenizer",
            Self::Encode { .. } => "tokenize",
            Self::Setting { .. } => "text_setting",
        }
    }
}

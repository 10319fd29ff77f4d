//! A key as 24 words (BIP39, English): what an artist writes on paper.

use bip39::{Language, Mnemonic};
use zeroize::Zeroizing;

use super::{KeyError, SEED_BYTES, Seed};

/// Number of words of a key.
pub const WORDS: usize = 24;

/// The words of a seed, in order.
#[must_use]
pub fn of(seed: &Seed) -> Vec<&'static str> {
    let mnemonic = Mnemonic::from_entropy(seed.as_slice()).expect("invariant: 32 bytes are 24 words");
    mnemonic.words().collect()
}

/// The seed of these words, separated by any white space, numbered or not.
///
/// # Errors
/// Another number of words, a word that is not in the list, or a checksum that does not match.
pub fn to_seed(text: &str) -> Result<Seed, KeyError> {
    let is_word = |word: &&str| !word.trim_end_matches(['.', ')']).bytes().all(|b| b.is_ascii_digit());
    let words: Vec<String> = text.split_whitespace().filter(is_word).map(str::to_lowercase).collect();
    let refuse = |reason: String| KeyError::Words { reason };
    if words.len() != WORDS {
        return Err(refuse(format!("there are {} of them, a key has {WORDS}", words.len())));
    }
    let list = Language::English.word_list();
    if let Some((index, word)) = words.iter().enumerate().find(|(_, word)| !list.contains(&word.as_str())) {
        let near = list.iter().min_by_key(|known| strsim::damerau_levenshtein(known, word));
        let near = near.map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
        return Err(refuse(format!("word {} ({word:?}) is not in the list{near}", index + 1)));
    }
    let joined = Zeroizing::new(words.join(" "));
    let mnemonic =
        Mnemonic::parse_in_normalized(Language::English, &joined).map_err(|error| match error {
            bip39::Error::InvalidChecksum => {
                refuse("a word is wrong or in the wrong place (the checksum does not match)".to_owned())
            }
            other => refuse(other.to_string()),
        })?;
    let (entropy, len) = mnemonic.to_entropy_array();
    let entropy = Zeroizing::new(entropy);
    let mut seed = Zeroizing::new([0; SEED_BYTES]);
    if len != SEED_BYTES {
        return Err(refuse(format!("they hold {len} bytes, a key has {SEED_BYTES}")));
    }
    seed.copy_from_slice(&entropy[..SEED_BYTES]);
    Ok(seed)
}

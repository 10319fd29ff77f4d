//! `key new|show|export|import|backup|restore`.

use std::io::Read;

use kinoflock_protocol::{Keypair, RequesterId};
use serde::Serialize;
use zeroize::Zeroizing;

use super::args::Key;
use super::context::Context;
use super::failure::Failure;
use crate::keys::{self, Seed, words};

/// Most bytes of words that are read.
const MAX_WORDS_BYTES: u64 = 4096;

#[derive(Serialize)]
struct Shown {
    requester: RequesterId,
}

#[derive(Serialize)]
struct Words<'a> {
    words: &'a [&'a str],
}

pub(super) fn run(command: Key, context: &Context<'_>) -> Result<(), Failure> {
    let (path, out) = (&context.config.key, context.out);
    match command {
        Key::New => {
            make(&keys::new_seed()?, context)?;
            out.words("write down the words of: kinoflock key backup");
            Ok(())
        }
        Key::Show => {
            show(keys::load(path)?.requester_id(), context);
            Ok(())
        }
        Key::Export { output } => {
            keys::save(&output, &keys::load_seed(path)?)?;
            out.words("whoever has this file can sign as you");
            out.line(&output.display().to_string());
            Ok(())
        }
        Key::Import { file } => make(&keys::load_seed(&file)?, context),
        Key::Backup => {
            let seed = keys::load_seed(path)?;
            let words = words::of(&seed);
            out.words("write these words on paper, in order; whoever has them can sign as you");
            for (row, four) in words.chunks(4).enumerate() {
                let numbered: Vec<String> = four
                    .iter()
                    .enumerate()
                    .map(|(i, word)| format!("{:>2}. {word:<9}", row * 4 + i + 1))
                    .collect();
                out.line(numbered.join(" ").trim_end());
            }
            out.record(&Words { words: &words });
            Ok(())
        }
        Key::Restore { words } => {
            let text = Zeroizing::new(if words.is_empty() { read_words(context)? } else { words.join(" ") });
            make(&words::to_seed(&text)?, context)
        }
    }
}

fn make(seed: &Seed, context: &Context<'_>) -> Result<(), Failure> {
    keys::save(&context.config.key, seed)?;
    context.out.words(&format!("your key is at {}", context.config.key.display()));
    show(Keypair::from_seed(seed).requester_id(), context);
    Ok(())
}

fn show(requester: RequesterId, context: &Context<'_>) {
    context.out.line(&requester.to_string());
    context.out.record(&Shown { requester });
}

fn read_words(context: &Context<'_>) -> Result<String, Failure> {
    if context.out.can_ask() {
        context.out.words("type the 24 words, then Ctrl-D:");
    }
    let mut text = String::new();
    std::io::stdin()
        .take(MAX_WORDS_BYTES)
        .read_to_string(&mut text)
        .map_err(|error| Failure::usage(format!("cannot read the words: {error}")))?;
    Ok(text)
}

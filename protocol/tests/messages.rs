//! Every message: one encoding, exact length, a JSON twin, and golden bytes that never change by accident.
//!
//! `KINOFLOCK_WRITE_GOLDEN=1 cargo test -p kinoflock-protocol --test messages` writes the golden bytes and the fuzz
//! corpus anew; a released version's bytes must not be rewritten, a new version of the kind is added instead.
#![allow(clippy::unwrap_used, missing_docs, dead_code)]

#[path = "support/samples.rs"]
mod samples;

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use kinoflock_protocol::codec::{CodecError, decode, decode_canonical, encode};
use kinoflock_protocol::names::{ClipTicket, NodeTicket};
use proptest::prelude::*;
use samples::{Draw, Visit, every_message};
use serde::Serialize;
use serde::de::DeserializeOwned;

struct RoundTrip(u64);

impl Visit for RoundTrip {
    fn message<T>(&mut self, name: &str, max: usize, make: fn(&mut Draw) -> T)
    where
        T: Serialize + DeserializeOwned + PartialEq + Debug + Clone,
    {
        let value = make(&mut Draw(self.0));
        let bytes = encode(&value);
        assert_eq!(decode_canonical::<T>(&bytes, max).as_ref(), Ok(&value), "{name}");
        let json = serde_json::to_string(&value).unwrap();
        assert_eq!(serde_json::from_str::<T>(&json).unwrap(), value, "{name} as JSON: {json}");
    }
}

struct Strict(u64);

impl Visit for Strict {
    fn message<T>(&mut self, name: &str, max: usize, make: fn(&mut Draw) -> T)
    where
        T: Serialize + DeserializeOwned + PartialEq + Debug + Clone,
    {
        let mut draw = Draw(self.0);
        let mut bytes = encode(&make(&mut draw));
        let cut = draw.below(bytes.len() as u64) as usize;
        assert!(decode::<T>(&bytes[..cut], max).is_err(), "{name} cut to {cut} of {} bytes", bytes.len());
        bytes.push(draw.u64() as u8);
        let trailing = decode::<T>(&bytes, max.max(bytes.len()));
        assert_eq!(trailing, Err(CodecError::Trailing { left: 1 }), "{name}");
        bytes.pop();
        let over = decode::<T>(&bytes, bytes.len() - 1);
        assert_eq!(over, Err(CodecError::TooLarge { limit: bytes.len() - 1, given: bytes.len() }), "{name}");
        for _ in 0..8 {
            let mut other = bytes.clone();
            for _ in 0..=draw.below(2) {
                let at = draw.below(other.len() as u64) as usize;
                other[at] = draw.u64() as u8;
            }
            if let Ok(value) = decode::<T>(&other, max) {
                assert_eq!(encode(&value), other, "{name}: a second encoding of one value");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_message_survives_its_bytes_and_its_json(seed in any::<u64>()) {
        every_message(&mut RoundTrip(seed));
    }

    #[test]
    fn every_message_has_one_encoding_of_exact_length(seed in any::<u64>()) {
        every_message(&mut Strict(seed));
    }
}

struct Golden {
    write: bool,
    wrong: Vec<String>,
    names: Vec<String>,
}

/// Seeds whose values together fill every option and reach every variant that one draw leaves out.
const GOLDEN_SEEDS: std::ops::Range<u64> = 0..4;

impl Visit for Golden {
    fn message<T>(&mut self, name: &str, max: usize, make: fn(&mut Draw) -> T)
    where
        T: Serialize + DeserializeOwned + PartialEq + Debug + Clone,
    {
        for seed in GOLDEN_SEEDS {
            let value = make(&mut Draw(seed));
            self.compare(name, seed, &encode(&value), |golden| {
                decode::<T>(golden, max).as_ref() == Ok(&value)
            });
        }
    }
}

impl Golden {
    fn compare(&mut self, name: &str, seed: u64, bytes: &[u8], reads: impl FnOnce(&[u8]) -> bool) {
        let file = format!("{name}-{seed}.bin");
        let path = golden_folder().join(&file);
        if self.write {
            fs::create_dir_all(golden_folder()).unwrap();
            fs::write(&path, bytes).unwrap();
            let corpus = corpus_folder().join(name.replace('-', "_"));
            fs::create_dir_all(&corpus).unwrap();
            fs::write(corpus.join(format!("golden-{seed}")), bytes).unwrap();
        }
        match fs::read(&path) {
            Ok(golden) if golden == bytes && reads(&golden) => {}
            Ok(_) => self.wrong.push(format!("{file} differs")),
            Err(error) => self.wrong.push(format!("{file}: {error}")),
        }
        self.names.push(file);
    }

    /// Tickets are packed in a form of their own.
    fn tickets(&mut self) {
        for seed in GOLDEN_SEEDS {
            let ticket = samples::node_ticket(&mut Draw(seed));
            let reads = |golden: &[u8]| NodeTicket::decode(golden).as_ref() == Ok(&ticket);
            self.compare("node-ticket", seed, &ticket.encode(), reads);
            let ticket = samples::clip_ticket(&mut Draw(seed));
            let reads = |golden: &[u8]| ClipTicket::decode(golden).as_ref() == Ok(&ticket);
            self.compare("clip-ticket", seed, &ticket.encode(), reads);
        }
    }
}

#[test]
fn golden_bytes_of_every_message_are_unchanged() {
    let write = std::env::var_os("KINOFLOCK_WRITE_GOLDEN").is_some();
    let mut golden = Golden { write, wrong: Vec::new(), names: Vec::new() };
    every_message(&mut golden);
    golden.tickets();
    assert!(golden.wrong.is_empty(), "{:?}", golden.wrong);
    for entry in fs::read_dir(golden_folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(golden.names.contains(&name), "{name} is golden, but no message has that name");
    }
}

fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn corpus_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus")
}

//! Replays the committed fuzz corpus (`tests/fuzz/corpus`) through the fuzz targets.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

#[path = "../../tests/fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

#[test]
fn the_committed_corpus_is_replayed_through_every_fuzz_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
    for (name, _) in targets::TARGETS {
        let mut inputs = 0;
        for entry in fs::read_dir(corpus.join(name)).unwrap_or_else(|e| panic!("no corpus for {name}: {e}")) {
            targets::run(name, &fs::read(entry.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs >= 4, "{name} has {inputs} inputs only");
    }
    for entry in fs::read_dir(&corpus).unwrap() {
        let folder = entry.unwrap().file_name().into_string().unwrap();
        assert!(targets::TARGETS.iter().any(|(name, _)| *name == folder), "{folder} belongs to no target");
    }
}

#[test]
fn every_target_is_in_the_fuzz_crate() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz");
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    for (name, _) in targets::TARGETS {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
        let source = fs::read_to_string(fuzz.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(source.contains(&format!("run(\"{name}\", data)")), "{name}");
    }
}

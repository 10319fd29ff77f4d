//! Fuzz targets for everything that a stranger's bytes reach.
//!
//! With a nightly toolchain and cargo-fuzz, from the repository's root: `cargo +nightly fuzz run --fuzz-dir
//! tests/fuzz envelope`. What each target does is in [`targets`]; the committed corpus beside it is replayed by the
//! ordinary tests.

pub mod targets;

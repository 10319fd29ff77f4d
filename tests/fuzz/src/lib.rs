//! Fuzz targets for everything that a stranger's bytes reach: `cargo +nightly fuzz run envelope` in this folder's
//! parent crate layout, with the corpus beside it. What each target does is in [`targets`].

pub mod targets;

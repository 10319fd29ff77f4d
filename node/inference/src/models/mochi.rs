//! Mochi 1 (Genmo): 8x spatial and 6x temporal compression, a transformer with a wide stream for video and a narrow one
//! for text that attend to each other, T5 text.

pub mod config;
pub mod facts;
pub mod pipeline;
pub mod rope;
pub mod transformer;
pub mod vae;

pub use pipeline::MochiPipeline;

use crate::registry::{Architecture, Exact};

/// Mochi's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    name: pipeline::NAME,
    classes: pipeline::CLASSES,
    facts: facts::facts,
    plan: pipeline::plan::plan,
    exact: Exact { tiles: false, runs: true },
    load: |folder, index, options| Ok(Box::new(MochiPipeline::load(folder, index, options)?)),
};

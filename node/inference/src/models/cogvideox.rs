//! CogVideoX (Zhipu) in the forms 2b, 5b and 1.5-5b, text to video and image to video: 8x spatial and 4x temporal compression, a
//! transformer over text and video in one sequence, T5 text, a diffusion sampler that predicts `v`.

pub mod config;
pub mod facts;
pub mod pipeline;
pub mod positions;
pub mod transformer;
pub mod vae;

pub use pipeline::CogVideoXPipeline;

use crate::registry::{Architecture, Exact};

/// CogVideoX's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    name: pipeline::NAME,
    classes: pipeline::CLASSES,
    facts: facts::facts,
    plan: pipeline::plan::plan,
    exact: Exact { tiles: false, runs: false },
    load: |folder, index, options| Ok(Box::new(CogVideoXPipeline::load(folder, index, options)?)),
};

//! Wan text to video (Alibaba): 8x or 16x spatial and 4x temporal compression, a transformer over packed latent tokens,
//! UMT5 text. Wan 2.1 in its 1.3B and 14B forms, Wan 2.2 as A14B with two transformers and as TI2V-5B.

pub mod config;
pub mod facts;
pub mod names;
pub mod pipeline;
pub mod rope;
pub mod transformer;
pub mod vae;

pub use pipeline::WanPipeline;

use crate::registry::{Architecture, Exact};

/// Wan's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    name: pipeline::NAME,
    classes: pipeline::CLASSES,
    facts: facts::facts,
    plan: pipeline::plan::plan,
    exact: Exact { tiles: true, runs: true },
    load: |folder, index, options| Ok(Box::new(WanPipeline::load(folder, index, options)?)),
};

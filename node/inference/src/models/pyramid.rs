//! Pyramid Flow (Jin et al. 2024), miniFLUX and SD3: a clip is made one latent frame at a time, each in stages of growing
//! size, from the frames before it; 8x spatial and 8x temporal compression, a transformer of FLUX's form or of Stable
//! Diffusion 3's, T5 and CLIP text.
//!
//! Its folder is published without a `model_index.json` and is known by its parts, see `implied_class`.

pub mod config;
pub mod facts;
pub mod pipeline;
pub mod rope;
pub mod transformer;
pub mod vae;

pub use pipeline::PyramidPipeline;
pub(crate) use pipeline::implied_class;

use crate::registry::{Architecture, Exact};

/// Pyramid Flow's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    name: pipeline::NAME,
    classes: pipeline::CLASSES,
    facts: |folder, _| facts::facts(folder),
    plan: |folder, _, request, options| pipeline::plan::plan(folder, request, options),
    exact: Exact { tiles: false, runs: true },
    load: |folder, _, options| Ok(Box::new(PyramidPipeline::load(folder, options)?)),
};

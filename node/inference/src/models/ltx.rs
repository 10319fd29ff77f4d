//! LTX-Video (Lightricks), in the 0.9.0, 0.9.1 and 0.9.5+ forms: 32x spatial and 8x temporal compression, a
//! transformer over packed latent tokens, T5 text.

mod checkpoint;
pub mod config;
pub mod facts;
pub mod names;
pub mod pipeline;
pub mod rope;
pub mod transformer;
pub mod upsampler;
pub mod vae;

pub use pipeline::{LtxClass, LtxPipeline};

use crate::registry::{Architecture, Exact};

/// The class of a folder without an index, if it is one of a single file.
pub(crate) fn implied_class(folder: &std::path::Path) -> Result<Option<String>, crate::Error> {
    Ok(checkpoint::Checkpoint::find(folder)?.map(|checkpoint| checkpoint.class().to_owned()))
}

/// LTX-Video's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    name: pipeline::NAME,
    classes: pipeline::CLASSES,
    facts: facts::facts,
    plan: pipeline::plan::plan,
    exact: Exact { tiles: true, runs: true },
    load: |folder, index, options| Ok(Box::new(LtxPipeline::load(folder, index, options)?)),
};

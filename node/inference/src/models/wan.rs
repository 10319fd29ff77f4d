//! Wan text to video (Alibaba): 8x spatial and 4x temporal compression, a transformer over packed latent tokens, UMT5
//! text. Wan 2.1 in its 1.3B and 14B forms.

pub mod config;
pub mod pipeline;
pub mod rope;
pub mod transformer;
pub mod vae;

pub use pipeline::WanPipeline;

use crate::registry::Architecture;

/// Wan's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    name: pipeline::NAME,
    classes: pipeline::CLASSES,
    load: |folder, index, options| Ok(Box::new(WanPipeline::load(folder, index, options)?)),
};

//! Wan 2.1 text to video (Alibaba): 8x spatial and 4x temporal compression, a transformer over packed latent tokens,
//! UMT5 text.

pub mod config;
pub mod rope;
pub mod transformer;
pub mod vae;

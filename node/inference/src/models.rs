//! The video models, one folder each: config, transformer, VAE and pipeline.

pub mod cogvideox;
pub mod ltx;
pub mod pyramid;

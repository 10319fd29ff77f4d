//! The numeric base that the video models share: convolution over time and space, attention, norms, embeddings.
//!
//! Activations are channels-last, `(batch, time, height, width, channels)` or `(batch, tokens, channels)`, so that a
//! convolution is a row of matrix products and a norm runs over contiguous memory. Every function has two ways and
//! picks one itself: candle's own operations (any device, any float type, with gradients), and for f32 on the CPU,
//! when no gradient is asked for, kernels of our own that are parallel over rayon's threads. Both ways agree to a few
//! units in the last place; `tests/nn.rs` holds them to it.

pub mod attention;
pub mod beside;
pub mod clip;
pub mod conv3d;
pub(crate) mod cpu;
pub mod embedding;
pub mod frame_cache;
pub mod group_norm;
pub mod linear;
pub mod moments;
pub mod norm;
pub mod ops;
pub(crate) mod pack;
pub mod rope;
pub mod route;
pub mod shuffle;
pub(crate) mod simd;

#[doc(hidden)]
pub use cpu::{generic_only, set_generic_only};

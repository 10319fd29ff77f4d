//! Adapters (LoRA, Hu et al. 2021): small files that change what a model's linear layers compute, any number of them at
//! once, each with a scale of any sign. A layer then computes `W x + b + sum of scale * alpha / rank * (B A x)`.
//!
//! [`Lora::read`] reads a file, which comes from strangers; [`names`] knows what its tensors are called; [`Places`] keeps
//! the list of a model's layers. There are two ways to the same result:
//! - beside: [`Places::apply`] puts the matrices beside the layers until the guard that it gives is dropped. The model's own
//!   weights stay as they are, of whatever kind they are, so the next run without adapters is what it always was. Every
//!   run does this with the adapters of its request.
//! - merged: [`Places::merging`] has the products added to the weights while the model is loaded. A step costs no more
//!   then, and the model has these adapters for good.

mod error;
mod lora;
pub mod names;
mod places;

pub use error::{AdapterError, AdapterFault};
pub(crate) use lora::LayerSize;
pub use lora::{Lora, MAX_RANK};
pub use places::{Applied, Places};

use std::sync::Arc;

/// An adapter and how strongly it acts.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The file.
    pub lora: Arc<Lora>,
    /// Any finite number; 1 is as trained.
    pub scale: f64,
}

impl Adapter {
    /// Whether it is the same file with the same scale.
    fn is(&self, other: &Self) -> bool {
        self.lora.hash() == other.lora.hash() && self.scale.to_bits() == other.scale.to_bits()
    }
}

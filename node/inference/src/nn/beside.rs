//! What may stand beside a linear layer: a narrow second way from its input to its output, whose result is added.
//!
//! While [`entering`] runs, every layer that is loaded under a name is entered into a [`Register`], which gives it a
//! [`Place`]. Whoever holds the place may fill and empty it at any time; the layer's own weights stay as they are, of
//! whatever kind they are. A register may also have something added to the weights at once.

use std::cell::RefCell;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{DType, Device, Result, Tensor};

use super::linear::Linear;

/// `x down^T up^T + bias`.
#[derive(Debug)]
pub struct Branch {
    down: Linear,
    up: Linear,
}

impl Branch {
    /// From `down` `(rank, input)`, `up` `(output, rank)` and `bias` `(output)`.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn new(down: Tensor, up: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Ok(Self { down: Linear::new(down, None)?, up: Linear::new(up, bias)? })
    }

    /// The layer's own result `own` with this one's added.
    pub(super) fn add(&self, x: &Tensor, own: &Tensor) -> Result<Tensor> {
        self.up.forward_add(&self.down.forward(x)?, own)
    }
}

/// A layer's place for a branch, shared by the layer and whoever fills it.
#[derive(Debug, Clone, Default)]
pub struct Place(Arc<RwLock<Option<Arc<Branch>>>>);

impl Place {
    /// Fills or empties it.
    pub fn put(&self, branch: Option<Arc<Branch>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = branch;
    }

    /// What stands in it.
    #[must_use]
    pub fn get(&self) -> Option<Arc<Branch>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A layer that is being loaded.
#[derive(Debug)]
pub struct Named<'a> {
    /// Its name, as the files have it.
    pub name: &'a str,
    /// Channels in.
    pub input: usize,
    /// Channels out.
    pub output: usize,
    /// Which row of the file's weights each output is, where the layer has them in another order.
    pub rows: Option<&'a [u32]>,
    /// Type of what it is given.
    pub dtype: DType,
    /// Where it computes.
    pub device: &'a Device,
}

/// What a register says of a layer.
#[derive(Debug, Default)]
pub struct Entered {
    /// Its place.
    pub place: Place,
    /// What is to be added to its weights `(output, input)`, f32, at once.
    pub weight: Option<Tensor>,
    /// And to its bias `(output)`.
    pub bias: Option<Tensor>,
}

/// Who keeps a list of layers.
pub trait Register {
    /// Takes a layer in.
    ///
    /// # Errors
    /// When what is to be added does not fit it.
    fn enter(&self, layer: &Named<'_>) -> Result<Entered>;
}

thread_local! {
    static REGISTER: RefCell<Option<Arc<dyn Register>>> = const { RefCell::new(None) };
}

/// Runs `build`, and enters all layers that it loads in this thread.
pub fn entering<T>(register: Arc<dyn Register>, build: impl FnOnce() -> T) -> T {
    /// Puts the former register back, whatever becomes of the build.
    struct Back(Option<Arc<dyn Register>>);
    impl Drop for Back {
        fn drop(&mut self) {
            REGISTER.with(|cell| cell.replace(self.0.take()));
        }
    }
    let _back = Back(REGISTER.with(|cell| cell.replace(Some(register))));
    build()
}

/// Enters a layer, where there is a register.
pub(super) fn enter(layer: &Named<'_>) -> Result<Option<Entered>> {
    let register = REGISTER.with(|cell| cell.borrow().clone());
    register.map(|register| register.enter(layer)).transpose()
}

/// Adds to weights what a register says; the sum is made in f32.
pub(super) fn merged(own: Tensor, more: Option<&Tensor>) -> Result<Tensor> {
    match more {
        Some(more) => (own.to_dtype(DType::F32)? + more.to_device(own.device())?)?.to_dtype(own.dtype()),
        None => Ok(own),
    }
}

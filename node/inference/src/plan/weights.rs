//! What a component's weights take once they are loaded: from the tensors that its own loading asks for, without a file.
//!
//! On the CPU the weights of layers are packed as f32, in panels that may be a little wider, whatever type was asked for;
//! everything else keeps its type. A weight file is mapped while it is read; its pages are the system's, which can take
//! them back, and do not count.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

use crate::nn::cpu::with_repacked;

/// A component's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Resident {
    /// Bytes of all tensors.
    pub(crate) bytes: u64,
    /// Bytes of the greatest one, which loading holds twice.
    pub(crate) greatest: u64,
}

/// Builds a module without its weights, and says what they would take.
///
/// # Errors
/// What the module's loading reports.
pub(crate) fn resident<T>(
    dtype: DType,
    cpu: bool,
    build: impl FnOnce(VarBuilder<'static>) -> Result<T>,
) -> Result<(T, Resident)> {
    let sums = Arc::new(Sums::default());
    let backend = Summed(Arc::clone(&sums));
    let vb = VarBuilder::from_backend(Box::new(backend), dtype, Device::Cpu);
    let (module, repacked) = with_repacked(|| build(vb));
    let module = module?;
    let (given, greatest) = (sums.given.load(Ordering::Relaxed), sums.greatest.load(Ordering::Relaxed));
    if !cpu {
        return Ok((module, Resident { bytes: given, greatest }));
    }
    let bytes = given.saturating_sub(repacked.plain).saturating_add(repacked.packed);
    Ok((module, Resident { bytes, greatest }))
}

#[derive(Debug, Default)]
struct Sums {
    given: AtomicU64,
    greatest: AtomicU64,
}

/// Gives one zero, spread over whatever shape is asked for, and adds up the bytes.
struct Summed(Arc<Sums>);

impl SimpleBackend for Summed {
    fn get(
        &self,
        shape: Shape,
        _: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let bytes = super::ledger::count(shape.dims()).saturating_mul(dtype.size_in_bytes() as u64);
        self.0.given.fetch_add(bytes, Ordering::Relaxed);
        self.0.greatest.fetch_max(bytes, Ordering::Relaxed);
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("tensor {name} was asked for without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

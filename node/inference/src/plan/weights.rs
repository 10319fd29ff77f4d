//! What a component's weights take once they are loaded: from the tensors that its own loading asks for, and from how its
//! files hold them, none of which is read.
//!
//! On the CPU the weights of layers are packed as f32, in panels that may be a little wider, whatever type was asked for;
//! what GGUF files hold in blocks of few bits stays so where layers take it; everything else has the type that is asked
//! for. A weight file is mapped while it is read; its pages are the system's, which can take them back, and do not count.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

use crate::nn::cpu::with_repacked;
use crate::weights::Weights;
use crate::weights::held::{Form, Held, InBlocks, planning};

/// A component's weights.
#[derive(Debug)]
pub(crate) struct Resident {
    /// Bytes of all tensors.
    pub(crate) bytes: u64,
    /// The most that is held beside them while one is made.
    pub(crate) loading: u64,
    /// What layers keep in blocks of few bits, and widen for each call.
    pub(crate) blocks: InBlocks,
}

/// Where a component's weights are to be, and as what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// In which numbers.
    pub(crate) dtype: DType,
    /// Whether on the CPU.
    pub(crate) cpu: bool,
    /// Whether layers are widened for good, because something is added to their weights.
    pub(crate) widened: bool,
}

/// Builds a module without its weights, and says what they would take, out of these files; where there are none, as much
/// as if a file held every tensor in the wanted numbers.
///
/// # Errors
/// What the module's loading reports.
pub(crate) fn resident<T>(
    wanted: Wanted,
    files: Option<&Weights>,
    build: impl FnOnce(VarBuilder<'static>) -> Result<T>,
) -> Result<(T, Resident)> {
    let mut held = files.map(Weights::held).unwrap_or_default();
    if wanted.widened {
        for tensor in held.values_mut().filter(|tensor| tensor.form == Form::Blocks { kept: true }) {
            tensor.form = Form::Blocks { kept: false };
        }
    }
    let sums = Arc::new(Sums::default());
    let backend = Summed { sums: Arc::clone(&sums), held: held.clone(), cpu: wanted.cpu };
    let vb = VarBuilder::from_backend(Box::new(backend), wanted.dtype, Device::Cpu);
    let ((module, repacked), blocks) = planning(held, || with_repacked(|| build(vb)));
    let module = module?;
    let (given, greatest) = (sums.given.load(Ordering::Relaxed), sums.greatest.load(Ordering::Relaxed));
    let bytes = given.saturating_add(blocks.bytes);
    if !wanted.cpu {
        return Ok((module, Resident { bytes, loading: greatest, blocks }));
    }
    let bytes = bytes.saturating_sub(repacked.plain).saturating_add(repacked.packed);
    Ok((module, Resident { bytes, loading: greatest.max(repacked.greatest), blocks }))
}

#[derive(Debug, Default)]
struct Sums {
    given: AtomicU64,
    /// Of a tensor, with what is held beside it while it is made.
    greatest: AtomicU64,
}

/// Gives one zero, spread over whatever shape is asked for, and adds up the bytes.
struct Summed {
    sums: Arc<Sums>,
    held: BTreeMap<String, Held>,
    cpu: bool,
}

impl SimpleBackend for Summed {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let count = super::ledger::count(shape.dims());
        let bytes = count.saturating_mul(dtype.size_in_bytes() as u64);
        let beside = self.held.get(name).map_or(0, |held| held.beside(count, dtype, self.cpu));
        self.sums.given.fetch_add(bytes, Ordering::Relaxed);
        self.sums.greatest.fetch_max(bytes.saturating_add(beside), Ordering::Relaxed);
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("tensor {name} was asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.held.is_empty() || self.held.contains_key(name)
    }
}

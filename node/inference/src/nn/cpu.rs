//! Reading candle's CPU tensors as slices, and the rule for when the kernels here may be used.

use std::cell::Cell;
use std::mem::MaybeUninit;

use candle_core::{DType, Device, Result, Storage, StorageRef, Tensor};
use rayon::prelude::*;

thread_local! {
    static GENERIC_ONLY: Cell<bool> = const { Cell::new(false) };
    static SHAPES_ONLY: Cell<bool> = const { Cell::new(false) };
    static REPACKED: Cell<Repacked> = const { Cell::new(Repacked { plain: 0, packed: 0, greatest: 0 }) };
}

/// Weights that layers would have packed: what they take as they are given, and packed, bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Repacked {
    pub(crate) plain: u64,
    pub(crate) packed: u64,
    /// The most that is held of one beside its packed form while that is made.
    pub(crate) greatest: u64,
}

/// Makes this thread use candle's own operations only; for tests and benches that compare the two ways.
pub fn set_generic_only(on: bool) {
    GENERIC_ONLY.with(|flag| flag.set(on));
}

/// Whether [`set_generic_only`] is on in this thread.
#[must_use]
pub fn generic_only() -> bool {
    GENERIC_ONLY.with(Cell::get)
}

/// Runs `build` while this thread's layers keep their weights as they were given, without a copy in the kernels' own
/// order: such layers cannot compute, but a whole model of them takes no memory.
pub(crate) fn with_shapes_only<T>(build: impl FnOnce() -> T) -> T {
    let before = SHAPES_ONLY.with(|flag| flag.replace(true));
    let built = build();
    SHAPES_ONLY.with(|flag| flag.set(before));
    built
}

/// Runs `build` as [`with_shapes_only`] does, and adds up what its layers would pack.
pub(crate) fn with_repacked<T>(build: impl FnOnce() -> T) -> (T, Repacked) {
    REPACKED.with(|sums| sums.set(Repacked::default()));
    let built = with_shapes_only(build);
    (built, REPACKED.with(Cell::take))
}

/// A layer keeps its weights as they are given, where it would pack them into so many f32.
pub(crate) fn note_repacked(weight: &Tensor, packed: usize) {
    const F32: u64 = 4;
    let plain = (weight.elem_count() as u64).saturating_mul(weight.dtype().size_in_bytes() as u64);
    let wide = match weight.dtype() {
        DType::F32 => 0,
        _ => (weight.elem_count() as u64).saturating_mul(F32),
    };
    REPACKED.with(|sums| {
        let before = sums.get();
        sums.set(Repacked {
            plain: before.plain.saturating_add(plain),
            packed: before.packed.saturating_add((packed as u64).saturating_mul(F32)),
            greatest: before.greatest.max(plain.saturating_add(wide)),
        });
    });
}

/// Whether [`with_shapes_only`] is running in this thread.
pub(crate) fn shapes_only() -> bool {
    SHAPES_ONLY.with(Cell::get)
}

/// Whether the CPU kernels may compute on these tensors: f32, on the CPU, and nobody wants a gradient.
pub(crate) fn fast(tensors: &[&Tensor]) -> bool {
    !generic_only()
        && tensors.iter().all(|t| {
            t.dtype() == DType::F32
                && matches!(t.device(), Device::Cpu)
                && !t.track_op()
                && t.elem_count() > 0
        })
}

/// The elements of a contiguous f32 CPU tensor, borrowed.
pub(crate) struct View<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl<'a> View<'a> {
    /// Borrows `tensor`, which must be contiguous.
    pub(crate) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a CPU kernel was given a tensor that is not contiguous: {:?}", tensor.shape())
        };
        Ok(Self { storage, start, len: end - start })
    }

    /// The elements in row-major order.
    pub(crate) fn slice(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<f32>()?[self.start..self.start + self.len]),
            _ => candle_core::bail!("a CPU kernel was given a tensor of another device"),
        }
    }
}

/// How many rows of `width` one parallel task takes, so that a task is worth its start and threads stay busy.
pub(crate) fn rows_per_task(rows: usize, width: usize) -> usize {
    const ELEMENTS_PER_TASK: usize = 16 * 1024;
    (ELEMENTS_PER_TASK / width.max(1)).clamp(1, rows.max(1))
}

/// `len` elements, of which `write` gets every `part` in turn with its number, all zeros, on rayon's threads.
///
/// The memory is zeroed piece by piece by the thread that writes there, so that it is in that thread's cache and no thread
/// waits for another to zero all of it first.
pub(crate) fn written(len: usize, part: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut out: Vec<f32> = Vec::with_capacity(len);
    out.spare_capacity_mut()[..len].par_chunks_mut(part.max(1)).enumerate().for_each(|(index, piece)| {
        piece.fill(MaybeUninit::new(0.0));
        #[expect(unsafe_code, reason = "the slice was just filled")]
        // SAFETY: every element of the piece was initialised by the line before.
        let piece = unsafe { piece.assume_init_mut() };
        write(index, piece);
    });
    #[expect(unsafe_code, reason = "all pieces were filled")]
    // SAFETY: `len` is within the capacity, and the pieces, which cover the first `len` elements, were all initialised.
    unsafe {
        out.set_len(len);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_written_or_zero() {
        for len in [0, 1, 7, 64, 1000] {
            for part in [0, 1, 3, 64, 5000] {
                let out = written(len, part, |index, piece| {
                    if index % 2 == 0 {
                        piece.fill(index as f32 + 1.0);
                    }
                });
                assert_eq!(out.len(), len);
                let wanted = |i: usize| match i / part.max(1) {
                    index if index % 2 == 0 => index as f32 + 1.0,
                    _ => 0.0,
                };
                assert!(out.iter().enumerate().all(|(i, &x)| x == wanted(i)), "{len} in parts of {part}");
            }
        }
    }
}

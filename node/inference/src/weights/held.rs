//! What a component's files hold, for a plan: how a tensor is stored says what it takes while and after it is loaded. No
//! tensor is read.
//!
//! While [`planning`] runs, a layer that would keep its file's blocks ([`super::quantised`]) is told so by
//! [`planned_blocks`], and the bytes are added up.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::whole_name;

/// How a file holds a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    /// In its file.
    pub(crate) bytes: u64,
    pub(crate) form: Form,
}

/// In which numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As they are computed with, in this type.
    Plain(DType),
    /// The same with scales, which are worked in as f32.
    Scaled,
    /// Of 8 bits, which become f32.
    Coded,
    /// Of GGUF, which become f32. Layers keep a matrix in blocks of few bits.
    Blocks { kept: bool },
}

impl Held {
    /// Bytes beside the tensor itself while it is made, in `dtype`, of so many numbers: on the device, where it is the CPU
    /// or not. What a file's pages take is the system's.
    pub(crate) fn beside(&self, count: u64, dtype: DType, cpu: bool) -> u64 {
        let wide = if dtype == DType::F32 { 0 } else { count.saturating_mul(size_of::<f32>() as u64) };
        match self.form {
            Form::Plain(own) if own == dtype => 0,
            Form::Plain(_) => self.bytes,
            // These are made on the CPU whatever the device is.
            _ if !cpu => 0,
            Form::Coded => wide,
            Form::Scaled | Form::Blocks { .. } => self.bytes.saturating_add(wide),
        }
    }
}

/// What layers would keep in blocks of few bits.
#[derive(Debug, Default)]
pub(crate) struct InBlocks {
    /// Bytes of all.
    pub(crate) bytes: u64,
    /// Channels in and out of those that are widened for each call.
    pub(crate) layers: BTreeSet<(usize, usize)>,
}

struct Planning {
    held: BTreeMap<String, Held>,
    sums: InBlocks,
}

thread_local! {
    static PLANNING: RefCell<Option<Planning>> = const { RefCell::new(None) };
}

/// Runs `build`, which loads a component without its files, and tells its layers what those hold in blocks.
pub(crate) fn planning<T>(held: BTreeMap<String, Held>, build: impl FnOnce() -> T) -> (T, InBlocks) {
    /// Ends it, also when building panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            PLANNING.take();
        }
    }
    PLANNING.set(Some(Planning { held, sums: InBlocks::default() }));
    let _end = End;
    let built = build();
    let sums = PLANNING.take().map(|planning| planning.sums);
    (built, sums.unwrap_or_default())
}

/// The tensor `name` below `vb` without its values and without memory, where a plan is made and its file has it in blocks
/// that layers keep.
///
/// # Errors
/// What making it reports.
pub(crate) fn planned_blocks(
    vb: &VarBuilder<'_>,
    name: &str,
    (output, input): (usize, usize),
) -> Result<Option<Tensor>> {
    let is_kept = PLANNING.with_borrow_mut(|planning| {
        let Planning { held, sums } = planning.as_mut()?;
        let found =
            held.get(&whole_name(vb, name)).filter(|found| found.form == Form::Blocks { kept: true })?;
        sums.bytes = sums.bytes.saturating_add(found.bytes);
        sums.layers.insert((input, output));
        Some(())
    });
    let nothing = || Tensor::zeros((), vb.dtype(), &Device::Cpu)?.broadcast_as((output, input));
    is_kept.map(|()| nothing()).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_tensor_takes_while_it_is_made_is_told_by_its_form() {
        let beside = |form, dtype, cpu| Held { bytes: 100, form }.beside(10, dtype, cpu);
        assert_eq!(beside(Form::Plain(DType::F32), DType::F32, true), 0);
        assert_eq!(beside(Form::Plain(DType::F16), DType::BF16, false), 100, "both are on the device");
        assert_eq!(beside(Form::Coded, DType::F32, true), 0, "it is widened once");
        assert_eq!(beside(Form::Coded, DType::BF16, true), 40);
        assert_eq!(beside(Form::Blocks { kept: false }, DType::BF16, true), 140);
        assert_eq!(beside(Form::Blocks { kept: false }, DType::BF16, false), 0);
    }
}

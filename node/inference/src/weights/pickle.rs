//! Weights in PyTorch's own form: a zip file with a pickle that names tensors, and the tensors' bytes.
//!
//! The pickle is read as data by candle's reader: classes and calls in it are names, and nothing of it runs. Tensors that
//! it does not describe as plain tensors are left out. Such a file is not mapped: each tensor is read when it is loaded.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::pickle::{PthTensors, TensorInfo};
use candle_core::{DType, Device, Tensor};

use super::{FileTensors, Source, WeightsError};

/// How such files end.
pub(super) const EXTENSION: &str = "bin";

/// Reads the list of a file's tensors, and checks that each lies within the file.
pub(super) fn open(file: &Path) -> Result<(PthTensors, FileTensors), WeightsError> {
    let corrupt = |reason: String| WeightsError::Corrupt { file: file.to_owned(), reason };
    let unreadable = |source| WeightsError::Read { file: file.to_owned(), source };
    let length = std::fs::metadata(file).map_err(unreadable)?.len();
    // The reader takes the form of a tensor's description for granted and panics on another.
    let read = catch_unwind(AssertUnwindSafe(|| PthTensors::new(file, None)));
    let tensors = match read {
        Ok(read) => read.map_err(|error| corrupt(error.to_string()))?,
        Err(_) => return Err(corrupt("its list of tensors has another form than PyTorch writes".to_owned())),
    };
    let mut list = FileTensors::new();
    for (name, info) in tensors.tensor_infos() {
        if let Some(reason) = fault(info, length) {
            return Err(corrupt(format!("tensor {name} {reason}")));
        }
        list.push((name.clone(), info.layout.dims().to_vec()));
    }
    if list.is_empty() {
        return Err(corrupt("it holds no tensors".to_owned()));
    }
    Ok((tensors, list))
}

/// What is wrong with a tensor's description, for a file of `length` bytes.
fn fault(info: &TensorInfo, length: u64) -> Option<String> {
    if !info.layout.is_contiguous() && !info.layout.is_fortran_contiguous() {
        return Some(format!("is stored with strides {:?}", info.layout.stride()));
    }
    let numbers = info.layout.dims().iter().try_fold(1u64, |all, &n| all.checked_mul(n as u64));
    let bytes = numbers.and_then(|numbers| numbers.checked_mul(info.dtype.size_in_bytes() as u64));
    let end = bytes.and_then(|bytes| bytes.checked_add(info.layout.start_offset() as u64));
    // PyTorch stores without compression, so that a tensor is never longer than its file.
    match end {
        Some(end) if end <= length => None,
        _ => Some(format!("of shape {:?} is longer than the file's {length} bytes", info.layout.dims())),
    }
}

/// Gives tensors out of such a file.
pub(super) struct Pickled(pub(super) PthTensors);

impl Source for Pickled {
    fn tensor(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        match self.0.get(name)? {
            Some(tensor) => tensor.contiguous()?.to_device(device)?.to_dtype(dtype),
            None => Err(candle_core::Error::CannotFindTensor { path: name.to_owned() }),
        }
    }
}

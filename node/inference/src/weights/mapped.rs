//! Safetensors files: checked, mapped, and read tensor by tensor, with the scales of 8-bit weights worked in.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::safetensors::{Load, MmapedSafetensors};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, TensorView};

use super::fp8::{self, Scales};
use super::held::{Form, Held};
use super::{FileTensors, Source, WeightsError};

/// Tensors that are about others: scales of weights and inputs, marks of what a file is, a vocabulary.
const SCALES: [&str; 2] = ["scale_weight", "weight_scale"];
const ASIDE: [&str; 3] = ["scale_input", "input_scale", "comfy_quant"];
const MARKS: [&str; 2] = ["scaled_fp8", "spiece_model"];

/// Mapped files, with the name of the scale of each weight that has one.
pub(super) struct Mapped {
    files: MmapedSafetensors,
    scales: BTreeMap<String, String>,
}

/// Maps files that were checked to be whole.
pub(super) fn open(files: &[PathBuf]) -> Result<(Mapped, Vec<FileTensors>), WeightsError> {
    let mut lists = Vec::with_capacity(files.len());
    let mut scales = BTreeMap::new();
    for file in files {
        let mut list = FileTensors::new();
        for (name, info) in header(file)?.tensors() {
            match role(&name) {
                Role::Weight => list.push((name, info.shape.clone())),
                Role::Scale(of) => {
                    if let Some(other) = scales.insert(of.clone(), name.clone()) {
                        let reason = format!("{other} and {name} are both scales of {of}");
                        return Err(WeightsError::Corrupt { file: file.clone(), reason });
                    }
                }
                Role::Other => {}
            }
        }
        lists.push(list);
    }
    Ok((Mapped { files: map(files)?, scales }, lists))
}

/// Whether a file is whole, as far as its header tells.
pub(super) fn check(file: &Path) -> Result<(), WeightsError> {
    header(file).map(drop)
}

/// What a safetensors file says beside its tensors.
///
/// # Errors
/// When the file is cut short or corrupt.
pub fn metadata(file: &Path) -> Result<HashMap<String, String>, WeightsError> {
    Ok(header(file)?.metadata().clone().unwrap_or_default())
}

enum Role {
    Weight,
    /// Of the weight of this name.
    Scale(String),
    Other,
}

fn role(name: &str) -> Role {
    let (layer, last) = name.rsplit_once('.').unwrap_or(("", name));
    match last {
        last if layer.is_empty() && MARKS.contains(&last) => Role::Other,
        last if SCALES.contains(&last) => Role::Scale(format!("{layer}.weight")),
        last if ASIDE.contains(&last) => Role::Other,
        _ => Role::Weight,
    }
}

/// A file's header, after it and the length are checked.
fn header(file: &Path) -> Result<Metadata, WeightsError> {
    use std::io::Read;
    const LENGTH_BYTES: u64 = 8;
    const MAX_HEADER: u64 = 100_000_000;
    let unreadable = |source| WeightsError::Read { file: file.to_owned(), source };
    let corrupt = |reason: String| WeightsError::Corrupt { file: file.to_owned(), reason };
    let mut opened = std::fs::File::open(file).map_err(unreadable)?;
    let has = opened.metadata().map_err(unreadable)?.len();
    let short = |needs: u64| WeightsError::Truncated { file: file.to_owned(), has, needs };
    if has < LENGTH_BYTES {
        return Err(short(LENGTH_BYTES));
    }
    let mut length = [0u8; LENGTH_BYTES as usize];
    opened.read_exact(&mut length).map_err(unreadable)?;
    let header = u64::from_le_bytes(length);
    if header > MAX_HEADER {
        return Err(corrupt(format!("its header claims {header} bytes, the limit is {MAX_HEADER}")));
    }
    if LENGTH_BYTES + header > has {
        return Err(short(LENGTH_BYTES + header));
    }
    let mut bytes = Vec::new();
    opened.take(header).read_to_end(&mut bytes).map_err(unreadable)?;
    let metadata: Metadata = serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
    let needs = LENGTH_BYTES + header + metadata.data_len() as u64;
    if has < needs {
        return Err(short(needs));
    }
    if has > needs {
        return Err(corrupt(format!("it has {has} bytes, its header tells of {needs}")));
    }
    Ok(metadata)
}

#[expect(
    unsafe_code,
    reason = "weights are memory-mapped, so that gigabytes are neither copied nor read ahead"
)]
fn map(files: &[PathBuf]) -> Result<MmapedSafetensors, WeightsError> {
    // SAFETY: the mapping is sound as long as nobody shortens or rewrites the files while it lives. Model folders are
    // written once under a temporary name and renamed, never changed in place; tensors are copied out of the mapping
    // when they are loaded, and the mapping ends with the `Weights` and its builders.
    let mapped = unsafe { MmapedSafetensors::multi(files) };
    mapped.map_err(|error| WeightsError::Corrupt {
        file: files.first().cloned().unwrap_or_default(),
        reason: error.to_string(),
    })
}

impl Source for Mapped {
    fn tensor(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let view = self.files.get(name)?;
        let scales = self.scales.get(name).map(|scale| self.scale(scale)).transpose()?;
        let (kind, rows) = (fp8::Kind::of(view.dtype()), view.shape().first().copied().unwrap_or(1));
        let shape = view.shape().to_vec();
        match (kind, scales) {
            (None, None) => view.load(device)?.to_dtype(dtype),
            (None, Some(scales)) => {
                let mut values =
                    view.load(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                scales.check(name, rows)?.apply(&mut values);
                Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
            }
            (Some(kind), scales) => {
                let scales = scales.unwrap_or_default().check(name, rows)?;
                let values = fp8::widen(kind, view.data(), &scales);
                Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
            }
        }
    }

    fn held(&self, name: &str) -> Option<Held> {
        let view = self.files.get(name).ok()?;
        let form = match DType::try_from(view.dtype()) {
            _ if fp8::Kind::of(view.dtype()).is_some() => Form::Coded,
            _ if self.scales.contains_key(name) => Form::Scaled,
            Ok(dtype) => Form::Plain(dtype),
            Err(_) => return None,
        };
        Some(Held { bytes: view.data().len() as u64, form })
    }
}

impl Mapped {
    fn scale(&self, name: &str) -> candle_core::Result<Scales> {
        let view: TensorView<'_> = self.files.get(name)?;
        let values = view.load(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Scales::new(name, values))
    }
}

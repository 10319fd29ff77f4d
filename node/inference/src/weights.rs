//! Weight files: found by the published names, checked before use, memory-mapped, and read tensor by tensor.
//!
//! For a stem such as `diffusion_pytorch_model` a folder holds one of: `STEM.safetensors`; shards with
//! `STEM.safetensors.index.json`; and both with an infix such as `fp16` or `bf16` (`STEM.fp16.safetensors`,
//! `STEM.safetensors.index.fp16.json`). Where there is none of these, `STEM.bin` is taken, PyTorch's own form, which is
//! read and never run. Every file is checked whole (header readable, length as the header says) when
//! it is opened, so that a cut download is an error with the file's name and not a fault later.

mod pickle;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use serde::Deserialize;

use crate::nn::beside::{Register, entering};
use crate::nn::cpu::with_shapes_only;

/// What is wrong with weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// No weight file under any of the published names.
    #[error("no weights in {folder}: looked for {looked_for}")]
    NotFound {
        /// Where.
        folder: PathBuf,
        /// The names.
        looked_for: String,
    },
    /// A shard that the index names and the folder lacks.
    #[error("weight file {file} is missing; {index} names it")]
    MissingShard {
        /// The shard.
        file: PathBuf,
        /// The index.
        index: PathBuf,
    },
    /// An index that cannot be read or that names a path outside its folder.
    #[error("weight index {file} cannot be used: {reason}")]
    Index {
        /// The index.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file that ends before its header says.
    #[error("weight file {file} is truncated: it has {has} bytes, its header needs {needs}")]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Its length, bytes.
        has: u64,
        /// The length that it should have, bytes.
        needs: u64,
    },
    /// A file that is no safetensors file.
    #[error("weight file {file} is corrupt: {reason}")]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file that the system does not give.
    #[error("weight file {file} cannot be read: {source}")]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tensor that the configuration needs and no file holds.
    #[error("tensor {tensor} is missing in {file}")]
    MissingTensor {
        /// Its name.
        tensor: String,
        /// The file, or the files, where it was looked for.
        file: String,
    },
    /// A tensor of another shape than the configuration says.
    #[error("tensor {tensor} in {file} has shape {found:?}, the configuration needs {needed:?}")]
    TensorShape {
        /// Its name.
        tensor: String,
        /// The file.
        file: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape needed.
        needed: Vec<usize>,
    },
    /// Another fault while a tensor was read.
    #[error("weights in {file} cannot be loaded: {reason}")]
    Load {
        /// The file or files.
        file: String,
        /// Why.
        reason: String,
    },
}

impl WeightsError {
    /// A short stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "weights_not_found",
            Self::MissingShard { .. } => "weights_missing_shard",
            Self::Index { .. } => "weights_index",
            Self::Truncated { .. } => "weights_truncated",
            Self::Corrupt { .. } => "weights_corrupt",
            Self::Read { .. } => "weights_read",
            Self::MissingTensor { .. } => "weights_missing_tensor",
            Self::TensorShape { .. } => "weights_tensor_shape",
            Self::Load { .. } => "weights_load",
        }
    }
}

/// The opened weights of one component.
pub struct Weights {
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, TensorFacts>,
    builder: VarBuilder<'static>,
    register: Option<Arc<dyn Register>>,
}

struct TensorFacts {
    file: usize,
    shape: Vec<usize>,
}

impl Weights {
    /// Finds, checks and maps the weights of a component's folder; tensors are given in `dtype` on `device`.
    ///
    /// # Errors
    /// When a file is missing, cut short or corrupt.
    pub fn open(
        folder: &Path,
        stem: &str,
        variant: Option<&str>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, WeightsError> {
        let files = find(folder, stem, variant)?;
        let mut tensors = BTreeMap::new();
        let mut add = |index: usize, list: FileTensors| {
            tensors.extend(list.into_iter().map(|(name, shape)| (name, TensorFacts { file: index, shape })));
        };
        let backend: Box<dyn SimpleBackend> = match files.as_slice() {
            [file] if is_pickle(file) => {
                let (pickled, list) = pickle::open(file)?;
                add(0, list);
                Box::new(pickle::Pickled(pickled))
            }
            files => {
                for (index, file) in files.iter().enumerate() {
                    add(index, check_file(file)?);
                }
                let names = tensors.keys().cloned().collect();
                Box::new(Mapped { mapped: map(files)?, names })
            }
        };
        let builder = VarBuilder::from_backend(backend, dtype, device.clone());
        Ok(Self { files, tensors, builder, register: None })
    }

    /// Where modules take their tensors from.
    #[must_use]
    pub fn builder(&self) -> VarBuilder<'static> {
        self.builder.clone()
    }

    /// With the layers of what is built from them entered there.
    #[must_use]
    pub fn entering(self, register: Option<Arc<dyn Register>>) -> Self {
        Self { register, ..self }
    }

    /// Numbers in all tensors together.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(|facts| facts.shape.iter().map(|&n| n as u64).product::<u64>()).sum()
    }

    /// Builds a module, and says which file and tensor are at fault when that fails.
    ///
    /// # Errors
    /// A missing tensor, one of another shape, or what the device reports.
    pub fn build<T>(
        &self,
        build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<T, crate::Error> {
        let built = match &self.register {
            Some(register) => entering(Arc::clone(register), || build(self.builder())),
            None => build(self.builder()),
        };
        built.map_err(|error| self.explain(error))
    }

    fn explain(&self, error: candle_core::Error) -> crate::Error {
        let text = match innermost(&error) {
            candle_core::Error::CannotFindTensor { path } => {
                return WeightsError::MissingTensor { tensor: path.clone(), file: self.file_names() }.into();
            }
            candle_core::Error::UnexpectedShape { msg, expected, got } => {
                let tensor = msg.clone();
                let file = self.file_of(&tensor);
                let (found, needed) = (got.dims().to_vec(), expected.dims().to_vec());
                return WeightsError::TensorShape { tensor, file, found, needed }.into();
            }
            inner => inner.to_string(),
        };
        match crate::Error::from(error) {
            memory @ crate::Error::OutOfMemory { .. } => memory,
            _ => WeightsError::Load { file: self.file_names(), reason: text }.into(),
        }
    }

    fn file_of(&self, tensor: &str) -> String {
        let file = self.tensors.get(tensor).and_then(|facts| self.files.get(facts.file));
        file.map_or_else(|| self.file_names(), |file| file.display().to_string())
    }

    fn file_names(&self) -> String {
        const SHOWN: usize = 2;
        let mut names: Vec<String> =
            self.files.iter().take(SHOWN).map(|file| file.display().to_string()).collect();
        if self.files.len() > SHOWN {
            names.push(format!("{} more", self.files.len() - SHOWN));
        }
        names.join(", ")
    }
}

/// The names and shapes of all tensors that a module takes, with the numbers in them left out: a model of any size is
/// listed without its files and without memory for its weights. The module that was built cannot compute.
///
/// # Errors
/// What the module's loading reports.
pub fn tensor_shapes<T>(
    build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
) -> candle_core::Result<BTreeMap<String, Vec<usize>>> {
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let listed = Listed { seen: Arc::clone(&seen) };
    let vb = VarBuilder::from_backend(Box::new(listed), DType::F32, Device::Cpu);
    with_shapes_only(|| build(vb).map(drop))?;
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(std::mem::take(&mut *seen))
}

/// Numbers in all tensors of a list.
#[must_use]
pub fn count_parameters(shapes: &BTreeMap<String, Vec<usize>>) -> u64 {
    shapes.values().map(|shape| shape.iter().map(|&n| n as u64).product::<u64>()).sum()
}

/// Gives one zero, spread over whatever shape is asked for, and keeps a list.
struct Listed {
    seen: Arc<Mutex<BTreeMap<String, Vec<usize>>>>,
}

impl SimpleBackend for Listed {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(name.to_owned(), shape.dims().to_vec());
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("tensor {name} was asked for without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

fn innermost(error: &candle_core::Error) -> &candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. }
        | candle_core::Error::WithPath { inner, .. }
        | candle_core::Error::Context { inner, .. } => innermost(inner),
        other => other,
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The weight files of a folder, in order.
///
/// # Errors
/// When there are none, or an index names one that is not there.
pub fn find(folder: &Path, stem: &str, variant: Option<&str>) -> Result<Vec<PathBuf>, WeightsError> {
    let usual = ["", "bf16", "fp16"];
    let infixes = variant.into_iter().chain(usual.into_iter().filter(|&infix| variant != Some(infix)));
    let mut looked_for = Vec::new();
    for infix in infixes {
        let dotted = if infix.is_empty() { String::new() } else { format!(".{infix}") };
        let single = format!("{stem}{dotted}.safetensors");
        let index = format!("{stem}.safetensors.index{dotted}.json");
        if folder.join(&single).exists() {
            return Ok(vec![folder.join(single)]);
        }
        if folder.join(&index).exists() {
            return shards(&folder.join(index));
        }
        looked_for.extend([single, index]);
    }
    let pickled = format!("{stem}.{}", pickle::EXTENSION);
    if folder.join(&pickled).exists() {
        return Ok(vec![folder.join(pickled)]);
    }
    looked_for.push(pickled);
    Err(WeightsError::NotFound { folder: folder.to_owned(), looked_for: looked_for.join(", ") })
}

fn is_pickle(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == pickle::EXTENSION)
}

fn shards(file: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let fault = |reason: String| WeightsError::Index { file: file.to_owned(), reason };
    let text = std::fs::read_to_string(file).map_err(|error| fault(error.to_string()))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| fault(error.to_string()))?;
    let names: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() {
        return Err(fault("it names no file".to_owned()));
    }
    let folder = file.parent().unwrap_or(Path::new(""));
    names
        .into_iter()
        .map(|name| {
            if name.contains(['/', '\\']) || name.starts_with("..") {
                return Err(fault(format!("{name:?} is not a plain file name")));
            }
            let shard = folder.join(name);
            if shard.exists() {
                Ok(shard)
            } else {
                Err(WeightsError::MissingShard { file: shard, index: file.to_owned() })
            }
        })
        .collect()
}

/// Whether all weights of a component are there and whole, as far as their headers tell; nothing is loaded.
///
/// # Errors
/// When a file is missing, cut short or corrupt.
pub fn check(folder: &Path, stem: &str, variant: Option<&str>) -> Result<(), WeightsError> {
    find(folder, stem, variant)?.iter().try_for_each(|file| match is_pickle(file) {
        true => pickle::open(file).map(drop),
        false => check_file(file).map(drop),
    })
}

/// The tensors of a file with their shapes.
type FileTensors = Vec<(String, Vec<usize>)>;

/// The tensors of a file, after its header and length are checked.
fn check_file(file: &Path) -> Result<FileTensors, WeightsError> {
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
    let metadata: safetensors::tensor::Metadata =
        serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
    let needs = LENGTH_BYTES + header + metadata.data_len() as u64;
    if has < needs {
        return Err(short(needs));
    }
    if has > needs {
        return Err(corrupt(format!("it has {has} bytes, its header tells of {needs}")));
    }
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect())
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

/// Gives tensors out of the mapping, with the tensor's name alone in its errors.
struct Mapped {
    mapped: MmapedSafetensors,
    names: std::collections::BTreeSet<String>,
}

impl SimpleBackend for Mapped {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let view = self.view(name)?;
        if view.shape() != shape.dims() {
            let got = Shape::from(view.shape());
            return Err(candle_core::Error::UnexpectedShape { msg: name.to_owned(), expected: shape, got });
        }
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        use candle_core::safetensors::Load;
        self.view(name)?.load(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

impl Mapped {
    fn view(&self, name: &str) -> candle_core::Result<safetensors::tensor::TensorView<'_>> {
        if self.names.contains(name) {
            return self.mapped.get(name);
        }
        Err(candle_core::Error::CannotFindTensor { path: name.to_owned() })
    }
}

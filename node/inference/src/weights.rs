//! Weight files: found by the published names, checked before use, memory-mapped, and read tensor by tensor.
//!
//! For a stem such as `diffusion_pytorch_model` a folder holds one of: `STEM.safetensors`; shards with
//! `STEM.safetensors.index.json`; and both with an infix such as `fp16` or `bf16` (`STEM.fp16.safetensors`,
//! `STEM.safetensors.index.fp16.json`). Where there is none of these, `STEM.bin` is taken, PyTorch's own form, which is
//! read and never run; then the folder's only `*.gguf`, then its only `*.safetensors`, of other names. Every file
//! is checked whole (header readable, length as the header says) when it is opened, so that a cut download is an error
//! with the file's name and not a fault later.
//!
//! Tensors come in the numbers that are asked for, whatever the file holds, and by the names that modules ask for: a
//! family knows how other namings of its tensors read ([`Rename`]). What a GGUF file holds in blocks of few bits stays so
//! where a linear layer takes it ([`quantised`]).

pub(crate) mod find;
mod fp8;
mod gguf;
pub(crate) mod held;
mod mapped;
mod pickle;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

pub use self::find::find;
use self::held::Held;
pub use self::mapped::metadata;
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
    /// Several weight files, none of them under a published name.
    #[error("{folder} holds several weight files and none under a published name: {found}; leave one")]
    Several {
        /// Where.
        folder: PathBuf,
        /// The files, or the first of them.
        found: String,
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
    /// A file that is not what its name says.
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
            Self::Several { .. } => "weights_several",
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

/// From a tensor's name in a file to the name by which modules ask for it, or `None` for what is no part of theirs. A
/// name that modules ask for stays as it is.
pub type Rename<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The opened weights of one component.
pub struct Weights {
    files: Vec<PathBuf>,
    tensors: Arc<Tensors>,
    builder: VarBuilder<'static>,
    register: Option<Arc<dyn Register>>,
}

/// Gives a component's tensors by the names that modules ask for, with the shapes that they expect.
struct Tensors {
    source: Box<dyn Source>,
    named: BTreeMap<String, TensorFacts>,
}

struct TensorFacts {
    file: usize,
    /// Its name in the file.
    name: String,
    shape: Vec<usize>,
}

/// A component's tensors by their names in its files.
trait Source: Send + Sync {
    /// A tensor that is there, in `dtype` on `device`.
    fn tensor(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor>;

    /// The same in its blocks, where the file holds it in blocks of few bits.
    fn quantised(&self, _name: &str, _device: &Device) -> candle_core::Result<Option<QTensor>> {
        Ok(None)
    }

    /// How the file holds a tensor; `None` where that makes no difference to a plan.
    fn held(&self, _name: &str) -> Option<Held> {
        None
    }

    /// Whether its shapes are the expected ones only but for sides of 1.
    fn is_loose(&self) -> bool {
        false
    }
}

/// The tensors of a file with their shapes.
type FileTensors = Vec<(String, Vec<usize>)>;

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
        Self::of_files(find(folder, stem, variant)?, &|name| Some(name.to_owned()), dtype, device)
    }

    /// The same of these files, whose tensors have other names.
    ///
    /// # Errors
    /// When a file is cut short or corrupt, or two tensors get the same name.
    pub fn of_files(
        files: Vec<PathBuf>,
        rename: Rename<'_>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, WeightsError> {
        let (source, lists): (Box<dyn Source>, Vec<FileTensors>) = match files.as_slice() {
            [file] if is_pickle(file) => {
                let (pickled, list) = pickle::open(file)?;
                (Box::new(pickle::Pickled(pickled)), vec![list])
            }
            [file] if is_gguf(file) => {
                let (blocks, list) = gguf::open(file)?;
                (Box::new(blocks), vec![list])
            }
            files => {
                let (mapped, lists) = mapped::open(files)?;
                (Box::new(mapped), lists)
            }
        };
        let mut named: BTreeMap<String, TensorFacts> = BTreeMap::new();
        for (file, list) in lists.into_iter().enumerate() {
            for (name, shape) in list {
                let Some(new) = rename(&name) else { continue };
                if let Some(other) = named.get(&new).filter(|other| other.name != name) {
                    let reason = format!("its tensors {} and {name} are both {new}", other.name);
                    return Err(WeightsError::Corrupt { file: files[file].clone(), reason });
                }
                named.insert(new, TensorFacts { file, name, shape });
            }
        }
        let tensors = Arc::new(Tensors { source, named });
        let builder = VarBuilder::from_backend(Box::new(Shared(Arc::clone(&tensors))), dtype, device.clone());
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
        self.tensors.named.values().map(|facts| facts.shape.iter().map(|&n| n as u64).product::<u64>()).sum()
    }

    /// How the files hold the tensors, by the names that modules ask for.
    pub(crate) fn held(&self) -> BTreeMap<String, Held> {
        let Tensors { source, named } = &*self.tensors;
        named.iter().filter_map(|(name, facts)| Some((name.clone(), source.held(&facts.name)?))).collect()
    }

    /// Builds a module, and says which file and tensor are at fault when that fails.
    ///
    /// # Errors
    /// A missing tensor, one of another shape, or what the device reports.
    pub fn build<T>(
        &self,
        build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<T, crate::Error> {
        BUILDING.with_borrow_mut(|building| building.push(Arc::clone(&self.tensors)));
        let _built = Built;
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
        let file = self.tensors.named.get(tensor).and_then(|facts| self.files.get(facts.file));
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

/// Whether all weights of a component are there and whole, as far as their headers tell; nothing is loaded.
///
/// # Errors
/// When a file is missing, cut short or corrupt.
pub fn check(folder: &Path, stem: &str, variant: Option<&str>) -> Result<(), WeightsError> {
    find(folder, stem, variant)?.iter().try_for_each(|file| check_file(file))
}

/// Whether a weight file is whole, as far as its header tells.
///
/// # Errors
/// When it is not.
pub fn check_file(file: &Path) -> Result<(), WeightsError> {
    match file {
        file if is_pickle(file) => pickle::open(file).map(drop),
        file if is_gguf(file) => gguf::open(file).map(drop),
        file => mapped::check(file),
    }
}

fn is_pickle(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == pickle::EXTENSION)
}

fn is_gguf(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == gguf::EXTENSION)
}

thread_local! {
    /// The weights out of which this thread is building modules, the innermost last.
    static BUILDING: RefCell<Vec<Arc<Tensors>>> = const { RefCell::new(Vec::new()) };
}

/// Takes the innermost of [`BUILDING`] away, also when building panics.
struct Built;

impl Drop for Built {
    fn drop(&mut self) {
        BUILDING.with_borrow_mut(Vec::pop);
    }
}

/// The tensor `name` below `vb`, in the blocks of few bits in which its file holds it: `None` where it is held otherwise,
/// or where `vb` is not what [`Weights::build`] gave. A builder itself gives such a tensor widened.
///
/// # Errors
/// When it has another shape, or the device has no room.
pub fn quantised(
    vb: &VarBuilder<'_>,
    name: &str,
    shape: (usize, usize),
) -> candle_core::Result<Option<Arc<QTensor>>> {
    let Some(tensors) = BUILDING.with_borrow(|building| building.last().cloned()) else { return Ok(None) };
    let whole = whole_name(vb, name);
    let Ok(facts) = tensors.facts(&whole) else { return Ok(None) };
    match tensors.source.quantised(&facts.name, vb.device())? {
        Some(tensor) if tensor.shape().dims() == [shape.0, shape.1] => Ok(Some(Arc::new(tensor))),
        Some(tensor) => Err(candle_core::Error::UnexpectedShape {
            msg: whole,
            expected: Shape::from(shape),
            got: tensor.shape().clone(),
        }),
        None => Ok(None),
    }
}

/// The name of the tensor `name` below `vb`.
fn whole_name(vb: &VarBuilder<'_>, name: &str) -> String {
    let prefix = vb.prefix();
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

impl Tensors {
    fn facts(&self, name: &str) -> candle_core::Result<&TensorFacts> {
        let missing = || candle_core::Error::CannotFindTensor { path: name.to_owned() };
        self.named.get(name).ok_or_else(missing)
    }

    /// Whether the tensor can be taken for one of `needed`.
    fn fits(&self, facts: &TensorFacts, needed: &[usize]) -> bool {
        let sides = |shape: &[usize]| shape.iter().copied().filter(|&side| side != 1).collect::<Vec<_>>();
        facts.shape == needed || (self.source.is_loose() && sides(&facts.shape) == sides(needed))
    }
}

/// [`Tensors`] for a builder. Its errors hold the tensor's name alone.
struct Shared(Arc<Tensors>);

impl SimpleBackend for Shared {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let facts = self.0.facts(name)?;
        if !self.0.fits(facts, shape.dims()) {
            let got = Shape::from(facts.shape.as_slice());
            return Err(candle_core::Error::UnexpectedShape { msg: name.to_owned(), expected: shape, got });
        }
        self.0.source.tensor(&facts.name, dtype, device)?.reshape(shape)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.0.source.tensor(&self.0.facts(name)?.name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.named.contains_key(name)
    }
}

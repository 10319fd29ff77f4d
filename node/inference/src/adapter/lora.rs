//! A LoRA's file: read whole, checked, and kept as bytes until a model's layers ask for their parts.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::SafeTensors;
use serde_json::{Map, Value};

use super::error::{AdapterError, AdapterFault};
use super::names::{self, Key, Part, TRANSFORMER};

/// Greatest header of a file, bytes (16 MiB).
const MAX_HEADER: u64 = 16 << 20;
/// Most tensors of a file.
const MAX_TENSORS: usize = 1 << 16;
/// Greatest rank of a layer's matrices.
pub const MAX_RANK: usize = 4096;
/// Where diffusers puts the settings of the training, JSON within JSON.
const SETTINGS: &str = "lora_adapter_metadata";

/// An adapter's file.
pub struct Lora {
    name: String,
    hash: [u8; 32],
    bytes: Vec<u8>,
    layers: BTreeMap<String, Parts>,
    /// What the file calls the layers that a model may have under these names.
    owns: BTreeMap<String, Vec<String>>,
    settings: Map<String, Value>,
    ignored: Vec<String>,
}

/// What a file holds for a layer.
#[derive(Debug, Default)]
struct Parts {
    down: Option<Piece>,
    up: Option<Piece>,
    up_bias: Option<Piece>,
    bias: Option<Piece>,
    whole: Option<Piece>,
    alpha: Option<f64>,
}

/// A tensor in the file.
#[derive(Debug)]
struct Piece {
    key: String,
    dtype: DType,
    shape: Vec<usize>,
    at: Range<usize>,
}

/// How large it is what files add to a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LayerSize {
    /// Channels in.
    pub(crate) input: usize,
    /// Channels out.
    pub(crate) output: usize,
    pub(crate) rank: usize,
    /// Numbers added to the bias.
    pub(crate) bias: usize,
}

/// What a file adds to a layer: matrices in f32 on the CPU, everything but the adapter's scale multiplied in.
#[derive(Debug)]
pub(super) struct Delta {
    /// `(rank, input)`.
    pub(super) down: Tensor,
    /// `(output, rank)`.
    pub(super) up: Tensor,
    /// `(output)`.
    pub(super) bias: Option<Tensor>,
}

impl std::fmt::Debug for Lora {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lora({}, {} layers)", self.name, self.layers.len())
    }
}

impl Lora {
    /// Reads a file of at most `limit` bytes; errors call it `name`.
    ///
    /// # Errors
    /// When it cannot be read, is larger, is no safetensors file, or holds a tensor whose name is not understood.
    pub fn read(path: &Path, name: &str, limit: u64) -> Result<Self, AdapterError> {
        let read = || {
            let file = std::fs::File::open(path).map_err(AdapterFault::Read)?;
            let given = file.metadata().map_err(AdapterFault::Read)?.len();
            if given > limit {
                return Err(AdapterFault::TooLarge { what: "bytes", limit, given });
            }
            let mut bytes = Vec::with_capacity(given as usize);
            file.take(limit).read_to_end(&mut bytes).map_err(AdapterFault::Read)?;
            Ok(bytes)
        };
        Self::from_bytes(read().map_err(|fault| fault.of(name))?, name)
    }

    /// From the bytes of a file; errors call it `name`.
    ///
    /// # Errors
    /// As [`Lora::read`].
    pub fn from_bytes(bytes: Vec<u8>, name: &str) -> Result<Self, AdapterError> {
        let hash = *blake3::hash(&bytes).as_bytes();
        let (layers, settings, ignored) = listed(&bytes).map_err(|fault| fault.of(name))?;
        let mut owns = BTreeMap::<String, Vec<String>>::new();
        for own in layers.keys() {
            candidates(own).for_each(|name| owns.entry(name).or_default().push(own.clone()));
        }
        Ok(Self { name: name.to_owned(), hash, bytes, layers, owns, settings, ignored })
    }

    /// Its name in errors.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// blake3 of the file.
    #[must_use]
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// Bytes of the file, all of which are held.
    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// How large it is what the file adds to each layer, by the shapes of its tensors, which are not checked against any
    /// model.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (String, LayerSize)> {
        self.layers.iter().map(|(own, parts)| {
            let name = candidates(own).last().unwrap_or_else(|| own.clone());
            (name, parts.size())
        })
    }

    /// Tensors that are passed over, as the reference does.
    #[must_use]
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// The file's layers, `COMPONENT.LAYER`, as it names them.
    pub(super) fn layers(&self) -> impl Iterator<Item = &str> {
        self.layers.keys().map(String::as_str)
    }

    /// Names under which a model may have the file's layers.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.owns.keys()
    }

    /// What the file calls the model's layer of this name; several where it has it several times.
    pub(super) fn owns(&self, name: &str) -> &[String] {
        self.owns.get(name).map_or(&[], Vec::as_slice)
    }

    /// The name of some tensor of a layer, for errors.
    pub(super) fn key_of(&self, own: &str) -> String {
        let parts = self.layers.get(own);
        let piece =
            parts.and_then(|p| p.down.as_ref().or(p.up.as_ref()).or(p.bias.as_ref()).or(p.whole.as_ref()));
        piece.map_or_else(|| own.to_owned(), |piece| piece.key.clone())
    }

    /// What the file's layer `own` adds to the model's layer `layer` of these channels; `None` if it is passed over.
    pub(super) fn delta(
        &self,
        own: &str,
        layer: &str,
        (input, output): (usize, usize),
    ) -> Result<Option<Delta>, AdapterFault> {
        let Some(parts) = self.layers.get(own) else { return Ok(None) };
        let shape = |piece: &Piece, needed: String| AdapterFault::Shape {
            key: piece.key.clone(),
            found: piece.shape.clone(),
            layer: layer.to_owned(),
            needed,
        };
        let bias = |piece: &Option<Piece>, factor: f64| -> Result<Option<Tensor>, AdapterFault> {
            let Some(piece) = piece else { return Ok(None) };
            if piece.shape != [output] {
                return Err(shape(piece, format!("[{output}]")));
            }
            Ok(Some((self.tensor(piece)? * factor)?))
        };
        let own_bias = bias(&parts.bias, 1.0)?;
        let (down, up, factor) = match (&parts.down, &parts.up, &parts.whole) {
            (Some(down), Some(up), _) => {
                let rank = down.shape.first().copied().unwrap_or(0);
                if rank == 0 || down.matrix() != Some((rank, input)) {
                    return Err(shape(down, format!("[rank, {input}]")));
                }
                if up.matrix() != Some((output, rank)) {
                    return Err(shape(up, format!("[{output}, {rank}]")));
                }
                let factor = self.factor(layer, parts.alpha, rank);
                (self.tensor(down)?.flatten_from(1)?, self.tensor(up)?.flatten_from(1)?, factor)
            }
            (Some(down), None, _) => {
                return Err(AdapterFault::Alone { key: down.key.clone(), missing: "up" });
            }
            (None, Some(up), _) => {
                return Err(AdapterFault::Alone { key: up.key.clone(), missing: "down" });
            }
            (None, None, Some(whole)) => {
                if whole.matrix() != Some((output, input)) {
                    return Err(shape(whole, format!("[{output}, {input}]")));
                }
                (self.tensor(whole)?, Tensor::eye(output, DType::F32, &Device::Cpu)?, 1.0)
            }
            // Some files of Wan have such a bias without matrices, by mistake; the reference leaves it out.
            (None, None, None) if own_bias.is_none() || layer.ends_with(".time_proj") => return Ok(None),
            (None, None, None) => (zeros(1, input)?, zeros(output, 1)?, 1.0),
        };
        let bias = match (own_bias, bias(&parts.up_bias, factor)?) {
            (Some(a), Some(b)) => Some((a + b)?),
            (a, b) => a.or(b),
        };
        Ok(Some(Delta { down, up: (up * factor)?, bias }))
    }

    /// `alpha / rank` of a layer, by its own alpha or by the settings of the training.
    fn factor(&self, layer: &str, alpha: Option<f64>, rank: usize) -> f64 {
        let (component, layer) = layer.split_once('.').unwrap_or((TRANSFORMER, layer));
        let setting = |name: &str| self.settings.get(&format!("{component}.{name}"));
        let pattern = || {
            let fits =
                |key: &str| layer == key || layer.strip_suffix(key).is_some_and(|rest| rest.ends_with('.'));
            let patterns = setting("alpha_pattern")?.as_object()?;
            patterns.iter().find(|(key, _)| fits(key))?.1.as_f64()
        };
        let alpha = alpha.or_else(pattern).or_else(|| setting("lora_alpha")?.as_f64());
        let by_root = setting("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        let rank = rank as f64;
        alpha.unwrap_or(rank) / if by_root { rank.sqrt() } else { rank }
    }

    /// A tensor in f32 on the CPU.
    fn tensor(&self, piece: &Piece) -> Result<Tensor, AdapterFault> {
        let bytes = &self.bytes[piece.at.clone()];
        let tensor = Tensor::from_raw_buffer(bytes, piece.dtype, &piece.shape, &Device::Cpu)?;
        let tensor = tensor.to_dtype(DType::F32)?;
        // A sum of squares is finite only if everything is.
        let sum = tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
        if sum.is_finite() { Ok(tensor) } else { Err(AdapterFault::NotFinite { key: piece.key.clone() }) }
    }
}

impl Parts {
    fn size(&self) -> LayerSize {
        let matrix = |piece: &Option<Piece>| piece.as_ref().and_then(Piece::matrix);
        let biases = [&self.bias, &self.up_bias].into_iter().flatten();
        let bias = biases.filter_map(|piece| piece.shape.first().copied()).max().unwrap_or(0);
        match (matrix(&self.down), matrix(&self.up), matrix(&self.whole)) {
            (Some((rank, input)), Some((output, _)), _) => LayerSize { input, output, rank, bias },
            (None, None, Some((output, input))) => LayerSize { input, output, rank: output, bias },
            _ => LayerSize { bias, ..LayerSize::default() },
        }
    }
}

impl Piece {
    /// Its shape as a matrix: what comes after the first dimension is one, as in a convolution of one patch.
    fn matrix(&self) -> Option<(usize, usize)> {
        let (first, rest) = self.shape.split_first()?;
        let columns = rest.iter().try_fold(1usize, |all, &size| all.checked_mul(size))?;
        (!rest.is_empty()).then_some((*first, columns))
    }
}

/// Names under which a model may have the layer that a file calls so.
pub(super) fn candidates(own: &str) -> impl Iterator<Item = String> {
    let (component, layer) = own.split_once('.').unwrap_or((TRANSFORMER, own));
    let renamed = names::diffusers_name(layer).map(|name| format!("{component}.{name}"));
    std::iter::once(own.to_owned()).chain(renamed)
}

fn zeros(rows: usize, columns: usize) -> Result<Tensor, AdapterFault> {
    Ok(Tensor::zeros((rows, columns), DType::F32, &Device::Cpu)?)
}

type Listed = (BTreeMap<String, Parts>, Map<String, Value>, Vec<String>);

/// The layers of a file, the settings of its training, and what is passed over.
fn listed(bytes: &[u8]) -> Result<Listed, AdapterFault> {
    let too_large = |what, limit: u64, given: u64| AdapterFault::TooLarge { what, limit, given };
    let corrupt = |error: safetensors::SafeTensorError| AdapterFault::Corrupt(error.to_string());
    if let Some((length, _)) = bytes.split_first_chunk::<8>()
        && u64::from_le_bytes(*length) > MAX_HEADER
    {
        return Err(too_large("bytes of its header", MAX_HEADER, u64::from_le_bytes(*length)));
    }
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(corrupt)?;
    let start = header + size_of::<u64>();
    let settings = metadata.metadata().as_ref().and_then(|all| serde_json::from_str(all.get(SETTINGS)?).ok());
    let tensors = metadata.tensors();
    if tensors.len() > MAX_TENSORS {
        return Err(too_large("tensors", MAX_TENSORS as u64, tensors.len() as u64));
    }
    let (mut layers, mut ignored) = (BTreeMap::<String, Parts>::new(), Vec::new());
    for (key, info) in tensors.into_iter().collect::<BTreeMap<_, _>>() {
        let (component, layer, part) = match names::parse(&key) {
            Some(Key::Part { component, layer, part }) => (component, layer, part),
            Some(Key::Ignored) => {
                ignored.push(key);
                continue;
            }
            None => return Err(AdapterFault::UnknownKey { key }),
        };
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(AdapterFault::Numbers { key, dtype: format!("{other:?}") }),
        };
        let at = start + info.data_offsets.0..start + info.data_offsets.1;
        let parts = layers.entry(format!("{component}.{layer}")).or_default();
        let piece = Piece { key: key.clone(), dtype, shape: info.shape.clone(), at };
        if part == Part::Alpha {
            if parts.alpha.replace(number(bytes, &piece)?).is_some() {
                return Err(AdapterFault::Twice { key });
            }
            continue;
        }
        let ranked = matches!(part, Part::Down).then(|| piece.shape.first().copied()).flatten();
        if let Some(given) = ranked.filter(|rank| *rank > MAX_RANK) {
            return Err(too_large("rows of a matrix, its rank", MAX_RANK as u64, given as u64));
        }
        let slot = match part {
            Part::Down => &mut parts.down,
            Part::Up => &mut parts.up,
            Part::UpBias => &mut parts.up_bias,
            Part::Bias => &mut parts.bias,
            Part::Whole | Part::Alpha => &mut parts.whole,
        };
        if slot.replace(piece).is_some() {
            return Err(AdapterFault::Twice { key });
        }
    }
    let holds = |parts: &Parts| {
        parts.down.is_some() || parts.up.is_some() || parts.bias.is_some() || parts.whole.is_some()
    };
    if !layers.values().any(holds) {
        return Err(AdapterFault::Empty);
    }
    Ok((layers, settings.unwrap_or_default(), ignored))
}

/// The only value of a tensor.
fn number(bytes: &[u8], piece: &Piece) -> Result<f64, AdapterFault> {
    let needed = || AdapterFault::Shape {
        key: piece.key.clone(),
        found: piece.shape.clone(),
        layer: "alpha".to_owned(),
        needed: "one number".to_owned(),
    };
    if piece.shape.iter().any(|size| *size != 1) {
        return Err(needed());
    }
    let tensor = Tensor::from_raw_buffer(&bytes[piece.at.clone()], piece.dtype, &piece.shape, &Device::Cpu)?;
    let value = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    match value.first() {
        Some(value) if value.is_finite() => Ok(*value),
        Some(_) => Err(AdapterFault::NotFinite { key: piece.key.clone() }),
        None => Err(needed()),
    }
}

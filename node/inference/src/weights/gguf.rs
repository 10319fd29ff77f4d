//! GGUF files (llama.cpp's), versions 2 and 3: a list of tensors whose numbers are in blocks of few bits.
//!
//! Only the list is read here, candle knows the blocks. Its own reader is not used: it takes tensors of four dimensions
//! at most, while published video models have kernels of five. Every place in the file is checked before it is used.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use super::held::{Form, Held};
use super::{FileTensors, Source, WeightsError};

/// How such files end.
pub(super) const EXTENSION: &str = "gguf";
const MAGIC: &[u8] = b"GGUF";
const ALIGNMENT_KEY: &[u8] = b"general.alignment";
const USUAL_ALIGNMENT: u64 = 32;
/// No block has stricter needs.
const LEAST_ALIGNMENT: u64 = 8;
const MOST_ALIGNMENT: u64 = 1 << 20;
const MOST_DIMENSIONS: u32 = 8;
/// Arrays within arrays.
const MOST_DEPTH: usize = 8;
/// The value type of an array, and of a text.
const ARRAY: u32 = 9;
const TEXT: u32 = 8;
const U32: u32 = 4;

/// A mapped file with its list.
pub(super) struct Blocks {
    file: Mmap,
    tensors: BTreeMap<String, Placed>,
}

/// A tensor in the file.
struct Placed {
    kind: GgmlDType,
    shape: Vec<usize>,
    start: usize,
    len: usize,
}

impl Placed {
    /// Whether layers keep it as it is.
    fn is_kept(&self) -> bool {
        self.kind.block_size() > 1 && self.shape.len() == 2
    }
}

/// Reads the list of a file's tensors, and checks that each lies within the file.
pub(super) fn open(file: &Path) -> Result<(Blocks, FileTensors), WeightsError> {
    let unreadable = |source| WeightsError::Read { file: file.to_owned(), source };
    let opened = File::open(file).map_err(unreadable)?;
    let mapped = map(&opened).map_err(unreadable)?;
    let read = Reader { bytes: &mapped, at: 0 }.tensors();
    let tensors = read.map_err(|fault| match fault {
        Fault::Short(needs) => {
            WeightsError::Truncated { file: file.to_owned(), has: mapped.len() as u64, needs }
        }
        Fault::Wrong(reason) => WeightsError::Corrupt { file: file.to_owned(), reason },
    })?;
    let list = tensors.iter().map(|(name, placed)| (name.clone(), placed.shape.clone())).collect();
    Ok((Blocks { file: mapped, tensors }, list))
}

#[expect(
    unsafe_code,
    reason = "weights are memory-mapped, so that gigabytes are neither copied nor read ahead"
)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is sound as long as nobody shortens or rewrites the file while it lives. Model folders are
    // written once under a temporary name and renamed, never changed in place; blocks are copied out of the mapping
    // when they are loaded, and the mapping ends with the `Weights` and its builders.
    unsafe { Mmap::map(file) }
}

impl Blocks {
    fn read(&self, name: &str, device: &Device) -> candle_core::Result<QTensor> {
        let missing = || candle_core::Error::CannotFindTensor { path: name.to_owned() };
        let placed = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = &self.file[placed.start..placed.start + placed.len];
        let storage = QStorage::from_data(Cow::Borrowed(bytes), device, placed.kind)?;
        QTensor::new(storage, placed.shape.as_slice())
    }
}

impl Source for Blocks {
    fn tensor(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.read(name, &Device::Cpu)?.dequantize(&Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    }

    fn quantised(&self, name: &str, device: &Device) -> candle_core::Result<Option<QTensor>> {
        let found = self.tensors.get(name).filter(|placed| placed.is_kept());
        found.map(|_| self.read(name, device)).transpose()
    }

    fn held(&self, name: &str) -> Option<Held> {
        let placed = self.tensors.get(name)?;
        Some(Held { bytes: placed.len as u64, form: Form::Blocks { kept: placed.is_kept() } })
    }

    /// Other tools leave out leading sides of 1, and the format has no tensors without sides.
    fn is_loose(&self) -> bool {
        true
    }
}

/// What is wrong with a file.
enum Fault {
    /// It ends before this byte.
    Short(u64),
    Wrong(String),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn tensors(mut self) -> Result<BTreeMap<String, Placed>, Fault> {
        if self.take(4)? != MAGIC {
            return Err(Fault::Wrong("it does not begin with GGUF".to_owned()));
        }
        let version = self.u32()?;
        if !matches!(version, 2 | 3) {
            return Err(Fault::Wrong(format!("it is of version {version}, known are 2 and 3")));
        }
        let (count, values) = (self.u64()?, self.u64()?);
        let mut alignment = USUAL_ALIGNMENT;
        for _ in 0..values {
            let key = self.text()?;
            let kind = self.u32()?;
            if key == ALIGNMENT_KEY && kind == U32 {
                alignment = u64::from(self.u32()?);
            } else {
                self.skip(kind, 0)?;
            }
        }
        if !alignment.is_power_of_two() || !(LEAST_ALIGNMENT..=MOST_ALIGNMENT).contains(&alignment) {
            let reason =
                format!("its alignment is {alignment}, known are powers of 2 from {LEAST_ALIGNMENT}");
            return Err(Fault::Wrong(reason));
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..count {
            let (name, placed) = self.tensor(alignment)?;
            if tensors.insert(name.clone(), placed).is_some() {
                return Err(Fault::Wrong(format!("tensor {name} stands twice")));
            }
        }
        if tensors.is_empty() {
            return Err(Fault::Wrong("it holds no tensors".to_owned()));
        }
        let base = self.at.next_multiple_of(alignment as usize);
        for placed in tensors.values_mut() {
            let start = base.saturating_add(placed.start);
            let end = start.saturating_add(placed.len);
            if end > self.bytes.len() {
                return Err(Fault::Short(end as u64));
            }
            placed.start = start;
        }
        Ok(tensors)
    }

    /// A tensor's name and place, counted from where the tensors begin.
    fn tensor(&mut self, alignment: u64) -> Result<(String, Placed), Fault> {
        let name = String::from_utf8(self.text()?.to_vec());
        let name = name.map_err(|_| Fault::Wrong("a tensor's name is no text".to_owned()))?;
        let wrong = |reason: String| Fault::Wrong(format!("tensor {name} {reason}"));
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            return Err(wrong(format!("has {dimensions} dimensions, the limit is {MOST_DIMENSIONS}")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let side = usize::try_from(self.u64()?);
            shape.push(side.map_err(|_| wrong("has a side that no memory holds".to_owned()))?);
        }
        shape.reverse();
        let number = self.u32()?;
        let kind =
            kind(number).map_err(|known| wrong(format!("is of type {known}, which is not read here")))?;
        let offset = self.u64()?;
        if offset % alignment != 0 {
            return Err(wrong(format!("begins at {offset}, no multiple of {alignment}")));
        }
        let (row, block) = (shape.last().copied().unwrap_or(1), kind.block_size());
        if row % block != 0 {
            return Err(wrong(format!("has rows of {row}, no multiple of its blocks of {block}")));
        }
        let numbers = shape.iter().try_fold(1usize, |all, &side| all.checked_mul(side));
        let len = numbers.and_then(|numbers| (numbers / block).checked_mul(kind.type_size()));
        let (len, start) = (len, usize::try_from(offset).ok());
        let (Some(len), Some(start)) = (len, start) else {
            return Err(wrong(format!("of shape {shape:?} at {offset} is longer than any file")));
        };
        Ok((name, Placed { kind, shape, start, len }))
    }

    /// Passes over a value.
    fn skip(&mut self, kind: u32, depth: usize) -> Result<(), Fault> {
        match (kind, width(kind)) {
            (_, Some(width)) => self.take(width).map(drop),
            (TEXT, _) => self.text().map(drop),
            (ARRAY, _) if depth < MOST_DEPTH => {
                let inner = self.u32()?;
                let count = self.u64()?;
                match width(inner) {
                    Some(width) => {
                        let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(width));
                        self.take(bytes.unwrap_or(usize::MAX)).map(drop)
                    }
                    None => (0..count).try_for_each(|_| self.skip(inner, depth + 1)),
                }
            }
            (ARRAY, _) => Err(Fault::Wrong(format!("a value holds arrays in more than {MOST_DEPTH} arrays"))),
            _ => Err(Fault::Wrong(format!("a value is of type {kind}, which is not known"))),
        }
    }

    fn text(&mut self) -> Result<&'a [u8], Fault> {
        let length = self.u64()?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.take(4)?);
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.saturating_add(length);
        let taken = self.bytes.get(self.at..end).ok_or(Fault::Short(end as u64))?;
        self.at = end;
        Ok(taken)
    }
}

/// Bytes of a value of this type, where all have as many.
fn width(kind: u32) -> Option<usize> {
    match kind {
        // U8, I8, bool
        0 | 1 | 7 => Some(1),
        // U16, I16
        2 | 3 => Some(2),
        // U32, I32, f32
        U32 | 5 | 6 => Some(4),
        // U64, I64, f64
        10..=12 => Some(8),
        _ => None,
    }
}

/// A tensor type by its number; the name of one that candle does not know.
fn kind(number: u32) -> Result<GgmlDType, String> {
    Ok(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        16 => return Err("IQ2_XXS".to_owned()),
        17 => return Err("IQ2_XS".to_owned()),
        18 => return Err("IQ3_XXS".to_owned()),
        19 => return Err("IQ1_S".to_owned()),
        20 => return Err("IQ4_NL".to_owned()),
        21 => return Err("IQ3_S".to_owned()),
        22 => return Err("IQ2_S".to_owned()),
        23 => return Err("IQ4_XS".to_owned()),
        other => return Err(format!("number {other}")),
    })
}

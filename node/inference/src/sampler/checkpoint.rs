//! The state between two steps, as a tensor and as bytes, so that a run goes on elsewhere bit for bit.
//!
//! The bytes are one safetensors file: tensor `latents` (f32), a tensor `memory.NAME` (f32) for each thing that the
//! sampler remembers of earlier steps, a tensor `kept.NAME` (f32) for each that comes back beside the final latents, and
//! in its metadata the steps done, the sigmas, the request's digest and the hashes of the steps before.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::error::Error;

/// The largest number of steps that a checkpoint may tell of.
pub const MAX_STEPS: usize = 100_000;
/// The most bytes of history that a checkpoint carries.
pub const MAX_HISTORY: usize = 16 * 1024;

/// The most tensors that a sampler remembers.
pub const MAX_MEMORY: usize = 64;
/// The most tensors that come back beside the final latents.
pub const MAX_KEPT: usize = 4096;

/// Where a run can be taken up again.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Steps that are done.
    pub steps_done: usize,
    /// The schedule's noise levels.
    pub sigmas: Vec<f32>,
    /// The latents in the shape in which the model keeps them between steps, f32, on the CPU.
    pub latents: Tensor,
    /// What the sampler remembers of earlier steps, f32, on the CPU; empty for one that looks at the latents alone.
    pub memory: BTreeMap<String, Tensor>,
    /// Latents of steps that are done, and what the sampler remembered then, where they are to come back.
    pub kept: BTreeMap<String, Tensor>,
    /// blake3 of everything in the request that the result depends on.
    pub request_digest: [u8; 32],
    /// blake3 of the latents after each step that is done.
    pub step_hashes: Vec<[u8; 32]>,
    /// What those who run jobs wrote about who did the steps so far: carried along unread, at most
    /// [`MAX_HISTORY`] bytes.
    pub history: Vec<u8>,
}

impl Checkpoint {
    /// The bytes to store or to send.
    ///
    /// # Errors
    /// When the latents cannot be read back.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut tensors = vec![(LATENTS.to_owned(), &self.latents)];
        tensors.extend(self.memory.iter().map(|(name, tensor)| (format!("{MEMORY}{name}"), tensor)));
        tensors.extend(self.kept.iter().map(|(name, tensor)| (format!("{KEPT}{name}"), tensor)));
        let bytes = tensors.iter().map(|(_, tensor)| latents_bytes(tensor)).collect::<Result<Vec<_>, _>>()?;
        let views = tensors.iter().zip(&bytes).map(|((name, tensor), bytes)| {
            let view = TensorView::new(Dtype::F32, tensor.dims().to_vec(), bytes).map_err(unreadable)?;
            Ok((name.as_str(), view))
        });
        let views = views.collect::<Result<Vec<_>, Error>>()?;
        let sigmas: Vec<String> = self.sigmas.iter().map(|s| format!("{:08x}", s.to_bits())).collect();
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("steps_done".to_owned(), self.steps_done.to_string()),
            ("sigmas".to_owned(), sigmas.join(",")),
            ("request".to_owned(), to_hex(&self.request_digest)),
            ("hashes".to_owned(), self.step_hashes.iter().map(to_hex).collect::<Vec<_>>().join(",")),
            ("history".to_owned(), self.history.iter().map(|byte| format!("{byte:02x}")).collect()),
        ]);
        safetensors::serialize(views, Some(metadata)).map_err(unreadable)
    }

    /// Reads what [`Checkpoint::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(unreadable)?;
        let metadata = header.metadata().as_ref().ok_or_else(|| fault("it has no metadata"))?;
        let field = |key: &str| {
            metadata.get(key).map(String::as_str).ok_or_else(|| fault(&format!("{key} is missing")))
        };
        if field("format")? != FORMAT {
            return Err(fault("it has another format"));
        }
        let steps_done: usize = field("steps_done")?.parse().map_err(unreadable)?;
        let sigmas = list(field("sigmas")?)
            .map(|text| u32::from_str_radix(text, 16).map(f32::from_bits).map_err(unreadable))
            .collect::<Result<Vec<_>, _>>()?;
        let step_hashes = list(field("hashes")?).map(from_hex).collect::<Result<Vec<_>, _>>()?;
        if sigmas.len() > MAX_STEPS + 1 || steps_done >= sigmas.len() || step_hashes.len() != steps_done {
            return Err(fault("its counts of steps, sigmas and hashes do not fit"));
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(unreadable)?;
        let latents = tensor_of(&tensors.tensor(LATENTS).map_err(unreadable)?)?;
        let (mut memory, mut kept) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in tensors.tensors() {
            if let Some(name) = name.strip_prefix(MEMORY) {
                memory.insert(name.to_owned(), tensor_of(&view)?);
            } else if let Some(name) = name.strip_prefix(KEPT) {
                kept.insert(name.to_owned(), tensor_of(&view)?);
            }
        }
        for (given, limit) in [(memory.len(), MAX_MEMORY), (kept.len(), MAX_KEPT)] {
            if given > limit {
                return Err(fault(&format!("it holds {given} tensors of a sort, the limit is {limit}")));
            }
        }
        let history = bytes_of_hex(field("history")?)?;
        let request_digest = from_hex(field("request")?)?;
        Ok(Self { steps_done, sigmas, latents, memory, kept, request_digest, step_hashes, history })
    }
}

const FORMAT: &str = "kinoflock-checkpoint-1";
const LATENTS: &str = "latents";
const MEMORY: &str = "memory.";
const KEPT: &str = "kept.";

fn tensor_of(view: &TensorView<'_>) -> Result<Tensor, Error> {
    if view.dtype() != Dtype::F32 {
        return Err(fault("a tensor in it is not f32"));
    }
    Ok(Tensor::from_raw_buffer(view.data(), DType::F32, view.shape(), &Device::Cpu)?)
}

/// The little-endian f32 bytes of a tensor, in its order: what a step hash is taken over.
///
/// # Errors
/// When the tensor cannot be read back from its device.
pub fn latents_bytes(latents: &Tensor) -> Result<Vec<u8>, Error> {
    let values = latents.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

fn fault(reason: &str) -> Error {
    Error::Checkpoint { reason: reason.to_owned() }
}

fn unreadable(error: impl std::fmt::Display) -> Error {
    fault(&error.to_string())
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(|part| !part.is_empty())
}

fn to_hex(bytes: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*bytes).to_hex().to_string()
}

fn bytes_of_hex(text: &str) -> Result<Vec<u8>, Error> {
    if text.len() > 2 * MAX_HISTORY {
        return Err(fault(&format!("its history of {} bytes exceeds {MAX_HISTORY}", text.len() / 2)));
    }
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return Err(fault("its history is cut"));
    }
    let byte = |pair: &[u8; 2]| {
        let digits = std::str::from_utf8(pair).map_err(unreadable)?;
        u8::from_str_radix(digits, 16).map_err(unreadable)
    };
    pairs.iter().map(byte).collect()
}

fn from_hex(text: &str) -> Result<[u8; 32], Error> {
    blake3::Hash::from_hex(text).map(|hash| *hash.as_bytes()).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sample() -> Checkpoint {
        Checkpoint {
            steps_done: 1,
            sigmas: vec![1.0, 0.3, 0.0],
            latents: Tensor::new(&[[[1.5f32, f32::MIN_POSITIVE]]], &Device::Cpu).unwrap(),
            memory: BTreeMap::from([(
                "x0".to_owned(),
                Tensor::new(&[[0.1f32], [-7.0]], &Device::Cpu).unwrap(),
            )]),
            kept: BTreeMap::from([("step_1".to_owned(), Tensor::new(&[4.5f32], &Device::Cpu).unwrap())]),
            request_digest: [7; 32],
            step_hashes: vec![[9; 32]],
            history: vec![0, 17, 255],
        }
    }

    #[test]
    fn bytes_give_the_same_state_back_bit_for_bit() {
        let bytes = sample().to_bytes().unwrap();
        let back = Checkpoint::from_bytes(&bytes).unwrap();
        assert_eq!(latents_bytes(&back.latents).unwrap(), latents_bytes(&sample().latents).unwrap());
        assert_eq!(back.sigmas, sample().sigmas);
        assert_eq!(back.memory.keys().collect::<Vec<_>>(), ["x0"]);
        let values = |state: &Checkpoint| state.memory["x0"].to_vec2::<f32>().unwrap();
        assert_eq!(values(&back), values(&sample()));
        assert_eq!(back.kept["step_1"].to_vec1::<f32>().unwrap(), [4.5]);
        assert_eq!((back.steps_done, back.request_digest, back.step_hashes), (1, [7; 32], vec![[9; 32]]));
        assert_eq!(back.history, [0, 17, 255]);
    }

    #[test]
    fn cut_or_strange_bytes_are_refused_without_a_panic() {
        let bytes = sample().to_bytes().unwrap();
        for end in 0..bytes.len() {
            assert!(Checkpoint::from_bytes(&bytes[..end]).is_err());
        }
        assert!(matches!(Checkpoint::from_bytes(b"hello"), Err(Error::Checkpoint { .. })));
    }
}

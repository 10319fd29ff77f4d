//! What a request changes inside a run, as part of the hash of all that its result follows from.

use candle_core::Tensor;

use super::{Touch, Way};
use crate::error::Error;
use crate::sampler::checkpoint::latents_bytes;

/// Goes into the hasher; nothing where nothing is changed. What merely comes back changes no result.
pub(crate) fn digest(touch: &Touch, hasher: &mut blake3::Hasher) -> Result<(), Error> {
    if let Some(start) = &touch.start {
        hasher.update(b"start").update(&(start.done as u64).to_le_bytes());
        tensor(hasher, &start.latents)?;
        for (name, memory) in &start.memory {
            text(hasher, name);
            tensor(hasher, memory)?;
        }
    }
    if let Some(latents) = &touch.decode_only {
        hasher.update(b"decode only");
        tensor(hasher, latents)?;
    }
    numbers(hasher, b"guidance curve", &touch.guidance);
    indices(hasher, b"skip", &touch.route.skip);
    indices(hasher, b"repeat", &touch.route.repeat);
    let channels = &touch.channels;
    indices(hasher, b"permute", &channels.permute);
    numbers(hasher, b"scale", &channels.scale);
    numbers(hasher, b"shift", &channels.shift);
    indices(hasher, b"channels after", channels.after.as_slice());
    if let Some(second) = &touch.prompt {
        hasher.update(b"second prompt");
        text(hasher, &second.prompt);
        way(hasher, second.weight, second.way);
    }
    if let Some(second) = &touch.noise {
        hasher.update(b"second seed").update(&second.seed.to_le_bytes());
        way(hasher, second.weight, second.way);
    }
    Ok(())
}

fn tensor(hasher: &mut blake3::Hasher, tensor: &Tensor) -> Result<(), Error> {
    let bytes = latents_bytes(tensor)?;
    hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
    Ok(())
}

fn text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
}

fn numbers(hasher: &mut blake3::Hasher, name: &[u8], numbers: &[f64]) {
    if numbers.is_empty() {
        return;
    }
    hasher.update(name).update(&(numbers.len() as u64).to_le_bytes());
    numbers.iter().for_each(|number| {
        hasher.update(&number.to_bits().to_le_bytes());
    });
}

fn indices(hasher: &mut blake3::Hasher, name: &[u8], indices: &[usize]) {
    if indices.is_empty() {
        return;
    }
    hasher.update(name).update(&(indices.len() as u64).to_le_bytes());
    indices.iter().for_each(|index| {
        hasher.update(&(*index as u64).to_le_bytes());
    });
}

fn way(hasher: &mut blake3::Hasher, weight: f64, way: Way) {
    hasher.update(&weight.to_bits().to_le_bytes()).update(&[u8::from(way == Way::Sphere)]);
}

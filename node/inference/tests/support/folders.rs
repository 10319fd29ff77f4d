//! Copies of the goldens' folders whose weights are held in another form.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kinoflock_inference::{Silent, Tensor};

#[path = "tiny.rs"]
mod tiny;

/// Tensors by name.
pub(crate) type Named = BTreeMap<String, Tensor>;

pub(crate) fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(path)
}

pub(crate) fn copied(golden: &str) -> tempfile::TempDir {
    tiny::copied(&tiny::golden(golden))
}

pub(crate) fn read(file: &Path) -> Named {
    candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap().into_iter().collect()
}

pub(crate) fn write(file: &Path, tensors: &Named) {
    safetensors::serialize_to_file(tensors, None, file).unwrap();
}

/// The latents and frames of a short run.
pub(crate) fn run(folder: &Path) -> (Vec<f32>, Vec<u8>) {
    let mut pipeline = tiny::open(folder);
    let frames = pipeline.info().frame_rule.nearest(9);
    let request = tiny::request(&*pipeline, (64, 64, frames, 2));
    let made = pipeline.generate(&request, &mut Silent).unwrap();
    let frames = (0..request.frames).flat_map(|i| made.frames.frame(i).unwrap().to_vec()).collect();
    (made.latents.flatten_all().unwrap().to_vec1().unwrap(), frames)
}

/// The greatest difference as a part of the greatest value.
pub(crate) fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let greatest = b.iter().fold(0f32, |most, x| most.max(x.abs()));
    a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / greatest
}

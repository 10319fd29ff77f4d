//! Copies of the goldens' folders whose weights are held in another form.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kinoflock_inference::{GenerateRequest, LoadOptions, Silent, Tensor, load};

/// Tensors by name.
pub(crate) type Named = BTreeMap<String, Tensor>;

pub(crate) fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(path)
}

pub(crate) fn copied(golden: &str) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    copy(&here("goldens").join(golden).join("pipeline"), target.path());
    target
}

pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

pub(crate) fn read(file: &Path) -> Named {
    candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap().into_iter().collect()
}

pub(crate) fn write(file: &Path, tensors: &Named) {
    safetensors::serialize_to_file(tensors, None, file).unwrap();
}

/// The latents and frames of a short run.
pub(crate) fn run(folder: &Path) -> (Vec<f32>, Vec<u8>) {
    let mut pipeline = load(folder, &LoadOptions::default()).unwrap();
    let mut request = GenerateRequest::new("a red dog", &pipeline.info().defaults);
    let frames = pipeline.info().frame_rule.nearest(9);
    (request.width, request.height, request.frames, request.steps) = (64, 64, frames, 2);
    request.negative_prompt = "cold fog".to_owned();
    request.seed = 7;
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

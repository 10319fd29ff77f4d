//! All tiny models, and a small guided request for any of them.

use std::path::{Path, PathBuf};

use kinoflock_inference::{Condition, Device, GenerateRequest, Tensor, registry};

/// Every form of every family, with as many pictures as it takes.
pub(crate) const PIPELINES: &[(&str, usize)] = &[
    ("ltx-video-0.9.0", 0),
    ("ltx-video-0.9.5", 1),
    ("cogvideox-2b", 0),
    ("cogvideox-5b-i2v", 1),
    ("cogvideox-1.5", 0),
    ("mochi-1", 0),
    ("pyramid-flow-miniflux", 1),
    ("pyramid-flow-sd3", 0),
    ("wan2.1", 0),
    ("wan2.1-flf2v", 2),
    ("wan2.2-a14b", 0),
    ("wan2.2-ti2v-5b", 1),
];

/// The tiny model of a folder of goldens.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("pipeline")
}

/// Four guided steps of its smallest clip, with pictures at the beginning and at the end.
pub(crate) fn request(folder: &Path, pictures: usize) -> GenerateRequest {
    let facts = registry::facts(folder).unwrap();
    let mut request = facts.smallest();
    request.prompt = "a red dog".to_owned();
    request.negative_prompt = "cold fog".to_owned();
    (request.steps, request.guidance, request.seed, request.truncate_prompt) = (4, 3.0, 7, true);
    let shape = (1, 3, request.height, request.width);
    let picture = || Tensor::full(0.5f32, shape, &Device::Cpu).unwrap();
    let frames = [0, request.frames - 1];
    request.conditions =
        frames.iter().take(pictures).map(|&frame| Condition::new(picture(), frame)).collect();
    request
}

//! What tests of whole models have in common: tiny folders, copies that a test may damage, one small request, an observer
//! that records everything.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::path::{Path, PathBuf};

use kinoflock_inference::{
    Checkpoint, DType, Error, GenerateRequest, LoadOptions, Observer, Phase, Pipeline, RgbFrames, StepEvent,
    Tensor, load,
};

/// The tiny model of a folder of goldens.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("pipeline")
}

pub(crate) fn open(folder: &Path) -> Box<dyn Pipeline> {
    load(folder, &LoadOptions::default()).unwrap()
}

pub(crate) fn load_error(folder: &Path) -> Error {
    match load(folder, &LoadOptions::default()) {
        Ok(_) => panic!("the folder loads"),
        Err(error) => error,
    }
}

/// A clip of this width, height, number of frames and of steps.
pub(crate) fn request(
    pipeline: &dyn Pipeline,
    (width, height, frames, steps): (usize, usize, usize, usize),
) -> GenerateRequest {
    let mut request = GenerateRequest::new("a red dog", &pipeline.info().defaults);
    (request.width, request.height, request.frames, request.steps) = (width, height, frames, steps);
    request.negative_prompt = "cold fog".to_owned();
    request.seed = 7;
    request
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

/// A copy of a folder.
pub(crate) fn copied(folder: &Path) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    copy(folder, target.path());
    target
}

/// Changes a JSON file.
pub(crate) fn edit(file: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

/// A copy of a folder in which one key of one file was changed.
pub(crate) fn changed(folder: &Path, file: &str, key: &str, value: serde_json::Value) -> tempfile::TempDir {
    let copied = copied(folder);
    edit(&copied.path().join(file), |config| config[key] = value);
    copied
}

/// What is said of a folder in which one key of one file was changed.
pub(crate) fn error_of(folder: &Path, file: &str, key: &str, value: serde_json::Value) -> String {
    load_error(changed(folder, file, key, value).path()).to_string()
}

/// The largest difference.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
    let difference = (wide(a) - wide(b)).unwrap().abs().unwrap();
    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// The mean of absolute values.
pub(crate) fn mean(x: &Tensor) -> f32 {
    x.to_dtype(DType::F32).unwrap().abs().unwrap().mean_all().unwrap().to_scalar().unwrap()
}

/// Records everything, and cancels when the given number of steps is done.
#[derive(Default)]
pub(crate) struct Watch {
    pub(crate) phases: Vec<Phase>,
    pub(crate) hashes: Vec<[u8; 32]>,
    pub(crate) sigmas: Vec<f64>,
    pub(crate) latents: Vec<Tensor>,
    pub(crate) previews: Vec<RgbFrames>,
    pub(crate) checkpoints: Vec<Checkpoint>,
    /// Of the whole run, as the last step told.
    pub(crate) total: usize,
    pub(crate) cancel_after: Option<usize>,
}

impl Watch {
    pub(crate) fn cancelling_after(steps: usize) -> Self {
        Self { cancel_after: Some(steps), ..Self::default() }
    }
}

impl Observer for Watch {
    fn phase(&mut self, phase: Phase) {
        self.phases.push(phase);
    }
    fn step(&mut self, event: &StepEvent<'_>) {
        self.hashes.push(event.hash);
        self.sigmas.push(event.sigma);
        self.latents.push(event.latents.clone());
        self.total = event.total;
    }
    fn preview(&mut self, frames: &RgbFrames) {
        self.previews.push(frames.clone());
    }
    fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.checkpoints.push(checkpoint.clone());
    }
    fn cancelled(&self) -> bool {
        self.cancel_after.is_some_and(|steps| self.hashes.len() >= steps)
    }
}

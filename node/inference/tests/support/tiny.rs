//! What tests of whole models have in common: tiny folders, copies that a test may damage, one small request, an observer
//! that records everything.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::path::{Path, PathBuf};

use kinoflock_inference::{
    Checkpoint, DType, Error, GenerateRequest, Generated, LoadOptions, Observer, Phase, Pipeline, RgbFrames,
    Silent, StepEvent, Tensor, load,
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

/// Says what is told when a request that can be made is changed.
pub(crate) fn refusals<'a>(
    pipeline: &'a dyn Pipeline,
    good: &'a GenerateRequest,
) -> impl Fn(&dyn Fn(&mut GenerateRequest)) -> String + 'a {
    |change| {
        let mut request = good.clone();
        change(&mut request);
        pipeline.check(&request).unwrap_err().to_string()
    }
}

/// A run of so many steps stops after any number of them, and before the decode.
pub(crate) fn assert_cancels(pipeline: &mut dyn Pipeline, request: &GenerateRequest, steps: usize) {
    for after in 0..=steps {
        let mut watch = Watch { cancel_after: Some(after), ..Watch::default() };
        match pipeline.generate(request, &mut watch) {
            Err(Error::Cancelled { steps_done, steps: told }) => {
                assert_eq!((steps_done, told), (after, steps));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(watch.hashes.len(), after);
    }
}

/// A run with a checkpoint after every step but the last goes on from each, as bytes, to the same clip; gives the whole run
/// and its checkpoints.
pub(crate) fn assert_resumes(
    pipeline: &mut dyn Pipeline,
    request: &GenerateRequest,
) -> (Generated, Vec<Checkpoint>) {
    let request = GenerateRequest { checkpoint_every: 1, ..request.clone() };
    let mut watch = Watch::default();
    let whole = pipeline.generate(&request, &mut watch).unwrap();
    assert_eq!(watch.checkpoints.len(), watch.total - 1);
    for checkpoint in &watch.checkpoints {
        let resume = Some(Checkpoint::from_bytes(&checkpoint.to_bytes().unwrap()).unwrap());
        let rest = pipeline.generate(&GenerateRequest { resume, ..request.clone() }, &mut Silent).unwrap();
        assert_eq!((&rest.step_hashes, &rest.frames), (&whole.step_hashes, &whole.frames));
        assert_eq!(rest.steps_done, watch.total - checkpoint.steps_done);
    }
    (whole, watch.checkpoints)
}

/// A checkpoint belongs to its request alone.
pub(crate) fn assert_foreign(
    pipeline: &mut dyn Pipeline,
    checkpoint: &Checkpoint,
    others: &[GenerateRequest],
) {
    for other in others {
        let resumed = GenerateRequest { resume: Some(checkpoint.clone()), ..other.clone() };
        assert_eq!(pipeline.generate(&resumed, &mut Silent).unwrap_err().code(), "checkpoint");
    }
}

/// Latents of half types lie within `most` of those in f32, in the mean.
pub(crate) fn assert_halves_near(folder: &Path, request: &GenerateRequest, exact: &Tensor, most: f32) {
    for dtype in [DType::BF16, DType::F16] {
        let options = LoadOptions { dtype, ..LoadOptions::default() };
        let made = load(folder, &options).unwrap().generate(request, &mut Silent).unwrap();
        let off = mean(&(&made.latents - exact).unwrap());
        assert!(off < most, "{dtype:?}: {off}, at most {most}");
    }
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

impl Observer for Watch {
    fn phase(&mut self, phase: Phase) {
        self.phases.push(phase);
    }
    fn step(&mut self, event: &StepEvent<'_>) {
        assert_eq!(event.index, self.hashes.len());
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

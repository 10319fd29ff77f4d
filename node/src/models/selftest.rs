//! The self-test: a model's small fixed job through the real worker, judged by its final latents.
//!
//! The job is the one of the fingerprint on the model's card. Without a card it is the smallest clip of two latent
//! frames, in two steps; then only finite numbers and a picture that is not of one colour can be asked for, and the
//! advert says `unreferenced`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kinoflock_inference::registry;
use kinoflock_protocol::capacity::SelfTest;
use kinoflock_protocol::card::Fingerprint;
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::id::{BlobId, JobId, ModelId};
use kinoflock_protocol::job::Prompt;
use kinoflock_protocol::units::{Micro, UnixMillis};
use serde::{Deserialize, Serialize};

use super::{Model, ModelsError, file_error, verify};
use crate::engine::wire::{DoneReport, Extra, LoadRequest, Output, RunRequest};

/// The prompt where no card names one.
const PROMPT: &str = "a red circle drifts left over a blue field";
/// The seed where no card names one.
const SEED: u64 = 1;
/// Steps where no card names them.
const STEPS: u32 = 2;
/// Sides in units of the model's size multiple where no card names them.
const SIDE: u32 = 2;
/// Most results that are kept.
const MAX_RESULTS: usize = 4096;

/// Why a model is not offered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SelfTestError {
    /// Infinities or what is no number.
    #[error("final latents are not finite: this device or number format does not compute the model")]
    NotFinite,
    /// One colour throughout.
    #[error(
        "every pixel of every frame has the same colour: the model's weights or this device are at fault"
    )]
    Constant,
    /// Another number of latents than the card says.
    #[error("{given} latent values were made, the card's fingerprint has {expected}")]
    Count {
        /// On the card.
        expected: u64,
        /// Made.
        given: u64,
    },
    /// A fingerprint that samples other places than the worker.
    #[error("the card's fingerprint has {given} samples: their number must divide {made}")]
    Samples {
        /// Samples that the worker takes.
        made: usize,
        /// On the card.
        given: usize,
    },
    /// Further from the card's fingerprint than it allows.
    #[error("final latents differ by {given:.6} from the card's fingerprint, the limit is {limit:.6}")]
    Differs {
        /// The card's tolerance.
        limit: f64,
        /// Greatest difference found.
        given: f64,
    },
}

impl SelfTestError {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFinite => "selftest_not_finite",
            Self::Constant => "selftest_constant",
            Self::Count { .. } => "selftest_count",
            Self::Samples { .. } => "selftest_samples",
            Self::Differs { .. } => "selftest_differs",
        }
    }
}

/// The model's small fixed job.
#[must_use]
pub fn request(model: &Model, job: JobId, load: LoadRequest, output: Output) -> RunRequest {
    let (rules, defaults) = (&model.manifest.rules, &model.manifest.defaults);
    // What cannot be read is told when the model is loaded.
    let one_size = registry::facts(&model.dir).is_ok_and(|facts| facts.one_size);
    let side = |usual: u32| if one_size { usual } else { (rules.size_multiple * SIDE).min(usual) };
    let base = RunRequest {
        job,
        model: load,
        prompt: Text::truncated(PROMPT),
        negative: Text::default(),
        seed: SEED,
        frames: rules.frames_offset + rules.frames_multiple,
        width: side(defaults.width),
        height: side(defaults.height),
        fps: defaults.fps.to_f64(),
        steps: STEPS,
        guidance: defaults.guidance.to_f64(),
        // A model of few words gets as many of the prompt as it reads.
        extra: Extra { truncate_prompt: true, grey_pictures: true, ..Extra::default() },
        output,
        checkpoint_every: 0,
        preview_every: 0,
    };
    match model.card.as_ref().and_then(|card| card.fingerprint.as_ref()) {
        None => base,
        Some(print) => RunRequest {
            prompt: Text::truncated(print.prompt.as_str()),
            seed: print.seed,
            frames: print.frames,
            width: print.width,
            height: print.height,
            fps: print.fps.to_f64(),
            steps: print.steps,
            guidance: print.guidance.to_f64(),
            ..base
        },
    }
}

/// What the job's result says about this device and the model.
///
/// # Errors
/// Why the model is not to be offered.
pub fn judge(model: &Model, report: &DoneReport, at: UnixMillis) -> Result<SelfTest, SelfTestError> {
    if !report.latents_summary.finite {
        return Err(SelfTestError::NotFinite);
    }
    if report.constant {
        return Err(SelfTestError::Constant);
    }
    let Some(print) = model.card.as_ref().and_then(|card| card.fingerprint.as_ref()) else {
        return Ok(SelfTest::Unreferenced { at });
    };
    let given = difference(print, report)?;
    let limit = print.tolerance.to_f64();
    if given > limit {
        return Err(SelfTestError::Differs { limit, given });
    }
    Ok(SelfTest::Passed { deviation: Micro::from_f64(given).unwrap_or(Micro::ZERO), at })
}

/// Greatest difference between a result and a fingerprint: of any sample, of the mean, of the standard deviation.
fn difference(print: &Fingerprint, report: &DoneReport) -> Result<f64, SelfTestError> {
    let found = &report.latents_summary;
    if found.count != print.count {
        return Err(SelfTestError::Count { expected: print.count, given: found.count });
    }
    let (made, given) = (found.samples.len(), print.samples.len());
    if given > 0 && made % given != 0 {
        return Err(SelfTestError::Samples { made, given });
    }
    let stride = made.checked_div(given).unwrap_or(1).max(1);
    let samples = print.samples.iter().zip(found.samples.iter().step_by(stride));
    let samples = samples.map(|(expected, found)| (expected.to_f64() - f64::from(*found)).abs());
    let figures = [print.mean.to_f64() - found.mean, print.deviation.to_f64() - found.deviation];
    Ok(samples.chain(figures.map(f64::abs)).fold(0.0, f64::max))
}

/// The fingerprint of a result, for a model's card. `None` if the result is not finite.
#[must_use]
pub fn fingerprint(request: &RunRequest, report: &DoneReport, tolerance: f64) -> Option<Fingerprint> {
    let found = &report.latents_summary;
    let samples = found.samples.iter().map(|value| Micro::from_f64(f64::from(*value)).ok());
    Some(Fingerprint {
        prompt: Prompt::new(request.prompt.as_str()).ok()?,
        seed: request.seed,
        frames: request.frames,
        width: request.width,
        height: request.height,
        fps: Micro::from_f64(request.fps).ok()?,
        steps: request.steps,
        guidance: Micro::from_f64(request.guidance).ok()?,
        mean: Micro::from_f64(found.mean).ok()?,
        deviation: Micro::from_f64(found.deviation).ok()?,
        count: found.count,
        samples: List::first_of(samples.collect::<Option<Vec<_>>>()?),
        tolerance: Micro::from_f64(tolerance).ok()?,
    })
}

/// What a result is good for: the test is made again when weights, worker binary or device change.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ResultKey {
    /// The model.
    pub model: ModelId,
    /// Its files as they lie on the disk: lengths and times of change, so that damage is tested again too.
    pub files: BlobId,
    /// blake3 of the worker's program file.
    pub worker: BlobId,
    /// Device, its own name, and the number format.
    pub device: String,
}

impl ResultKey {
    /// The key of a model on a device, with a worker whose program has this hash.
    ///
    /// # Errors
    /// When the model's files cannot be looked at.
    pub fn new(model: &Model, worker: BlobId, device: String) -> Result<Self, ModelsError> {
        Ok(Self { model: model.id, files: BlobId::of(verify::state(model)?.as_bytes()), worker, device })
    }

    fn text(&self) -> String {
        format!("{} {} {} {}", self.model, self.files.to_hex(), self.worker.to_hex(), self.device)
    }
}

/// A result that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// How the test went.
    pub result: SelfTest,
    /// Speed measured with it, work units a second.
    pub speed: u64,
}

/// Results of passed self-tests, in a file. A file that cannot be read is an empty one: the tests are made again.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    kept: BTreeMap<String, Kept>,
}

impl Results {
    /// Reads the file.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let kept = std::fs::read(path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self { path: path.to_owned(), kept }
    }

    /// A result, if one was kept.
    #[must_use]
    pub fn get(&self, key: &ResultKey) -> Option<Kept> {
        self.kept.get(&key.text()).copied()
    }

    /// Keeps a result.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put(&mut self, key: &ResultKey, kept: Kept) -> Result<(), ModelsError> {
        while self.kept.len() >= MAX_RESULTS {
            self.kept.pop_first();
        }
        self.kept.insert(key.text(), kept);
        let bytes = serde_json::to_vec_pretty(&self.kept).expect("invariant: results always encode");
        let part = self.path.with_added_extension("part");
        std::fs::write(&part, bytes).map_err(file_error(&part))?;
        std::fs::rename(&part, &self.path).map_err(file_error(&self.path))
    }
}

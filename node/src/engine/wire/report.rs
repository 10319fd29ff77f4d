//! What a run made, as the worker tells it.

use kinoflock_inference::Commitment;
use kinoflock_protocol::audit::Leaf;
use kinoflock_protocol::codec::List;
use kinoflock_protocol::id::{BlobId, JobId};
use serde::{Deserialize, Serialize};

use super::WirePath;

/// Name of the file with a run's [`StepRecord`].
pub const STEPS: &str = "steps";
/// Greatest [`StepRecord`], bytes: 64 for each of the most steps that a run may have.
pub const MAX_STEP_RECORD: usize = 8 << 20;

/// What a run committed to, one entry for each state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The leaves under the root.
    pub leaves: Vec<Leaf>,
    /// Hashes of the latents.
    pub latents: Vec<BlobId>,
}

impl StepRecord {
    /// The record of these states, whose hashes are `latents`.
    #[must_use]
    pub fn new(latents: &[[u8; 32]], commitment: &Commitment) -> Self {
        let latents: Vec<_> = latents.iter().map(|hash| BlobId::from_bytes(*hash)).collect();
        let leaf = |(latents, sampler)| Leaf::new(latents, sampler, &commitment.conditioning);
        Self { leaves: latents.iter().zip(&commitment.samplers).map(leaf).collect(), latents }
    }
}

/// A file that the worker wrote and synced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReport {
    /// Where.
    pub path: WirePath,
    /// Bytes.
    pub len: u64,
    /// blake3 of its content.
    pub blake3: BlobId,
}

/// Seconds that each phase took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Reading the weights; 0 where they were loaded.
    pub load: f64,
    /// The prompt.
    pub text: f64,
    /// All steps of this run.
    pub steps: f64,
    /// Latents to frames.
    pub decode: f64,
    /// What was left to encode when the frames were there, and writing the file.
    pub encode: f64,
}

impl Timings {
    /// Seconds without loading: what the job itself cost.
    #[must_use]
    pub fn compute(&self) -> f64 {
        self.text + self.steps + self.decode + self.encode
    }
}

/// What a run made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DoneReport {
    /// Which job.
    pub job: JobId,
    /// The MP4.
    pub clip: FileReport,
    /// The latents, if they were wanted.
    pub latents: Option<FileReport>,
    /// Root over the states of all steps: [`kinoflock_protocol::audit::root`].
    pub step_root: Option<BlobId>,
    /// Steps computed in this run, without those before a checkpoint that it went on from.
    pub steps_done: u32,
    /// Frames in the clip.
    pub frames: u32,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// How long each phase took.
    pub timings: Timings,
    /// Whether every frame has one colour throughout, the same in all: what a broken model makes.
    pub constant: bool,
    /// What the final latents are like.
    pub latents_summary: LatentsSummary,
}

/// Greatest number of latent values that a summary samples.
pub const MAX_SAMPLES: usize = kinoflock_protocol::limits::MAX_SAMPLES;

/// Figures of the final latents `[1, C, F, H, W]`, for the self-test.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LatentsSummary {
    /// Number of values.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub deviation: f64,
    /// Whether all values are finite.
    pub finite: bool,
    /// Value `i * count / n` for each of the `n` samples.
    pub samples: List<f32, MAX_SAMPLES>,
}

impl LatentsSummary {
    /// The figures of these values.
    #[must_use]
    pub fn of(values: &[f32]) -> Self {
        let count = values.len();
        let finite = values.iter().all(|value| value.is_finite());
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count.max(1) as f64;
        let spread = values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>();
        let samples = count.min(MAX_SAMPLES);
        Self {
            count: count as u64,
            mean,
            deviation: (spread / count.max(1) as f64).sqrt(),
            finite,
            samples: List::first_of((0..samples).map(|i| values[i * count / samples])),
        }
    }
}

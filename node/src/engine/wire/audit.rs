//! What a worker is told to look at of a clip that another node made, and what it finds.

use kinoflock_protocol::id::{BlobId, JobId};
use serde::{Deserialize, Serialize};

use super::{Name, RunRequest, WirePath};

/// One step of another node's clip.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditRun {
    /// The run as its maker was told it. Nothing is written to its outputs; its job names this audit.
    pub run: RunRequest,
    /// Which step, from 0.
    pub step: u32,
    /// What the maker showed.
    pub states: StatePaths,
    /// The clip.
    pub clip: WirePath,
}

/// Files of latents that a maker showed. Two of them may be the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatePaths {
    /// Before the first step.
    pub start: WirePath,
    /// Before the audited step.
    pub before: WirePath,
    /// After it.
    pub after: WirePath,
    /// After the last step.
    pub end: WirePath,
}

/// What a worker found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditReport {
    /// Which audit.
    pub job: JobId,
    /// Hashes of the four files' latents, in the order of [`StatePaths`].
    pub latents: [BlobId; 4],
    /// Hashes of the sampler's state at the same four places.
    pub samplers: [Hash; 4],
    /// Hash of what the steps depend on beside the model.
    pub conditioning: Hash,
    /// Whether the first state is what the seed or the given latents make.
    pub starts_well: bool,
    /// How far the recovered output of the step is from the one computed here, relative.
    pub deviation: f64,
    /// Root mean square difference of the decoded end and the clip's frames, of 255.
    pub frames: f64,
    /// In which numbers it computed.
    pub dtype: Name,
}

/// 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hash(pub [u8; 32]);

//! The adapters of a run.

use kinoflock_protocol::id::BlobId;
use serde::{Deserialize, Serialize};

/// An adapter that changes the model for one run: its file lies in the folder of inputs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdapterUse {
    /// Its weights.
    pub weights: BlobId,
    /// How strongly it acts; 1 is as trained.
    pub scale: f64,
}

//! What a run changes inside itself, as its worker is told.

use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::limits::{MAX_OP_NUMBERS, MAX_PROMPT};
use serde::{Deserialize, Serialize};

/// Numbers of an operation.
pub type Numbers = List<f64, MAX_OP_NUMBERS>;
/// Places that an operation names.
pub type Places = List<u32, MAX_OP_NUMBERS>;

/// Nothing by default; the operations of [`kinoflock_protocol::ops`] say what each does.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Touch {
    /// Points of the guidance's curve.
    pub guidance: Numbers,
    /// A second prompt.
    pub prompt: Option<Mixed<Text<MAX_PROMPT>>>,
    /// A second seed.
    pub noise: Option<Mixed<u64>>,
    /// Blocks that are left out.
    pub skip: Places,
    /// Blocks that are computed once more.
    pub repeat: Places,
    /// The new order of the channels.
    pub permute: Places,
    /// Their factors.
    pub scale: Numbers,
    /// What is added to them.
    pub shift: Numbers,
    /// After how many steps.
    pub channels_after: Option<u32>,
    /// Whether the noise comes back.
    pub return_noise: bool,
    /// After which steps the latents come back.
    pub return_steps: Places,
    /// Steps that lie behind the given latents.
    pub start_step: Option<u32>,
    /// Whether the given latents are decoded and nothing else is done.
    pub decode_only: bool,
}

/// What is mixed into the first of its kind.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Mixed<T> {
    /// The second.
    pub with: T,
    /// 0 is the first, 1 the second.
    pub weight: f64,
    /// On an arc, not on a line.
    pub spherical: bool,
}

impl std::fmt::Debug for Touch {
    // A prompt is the artist's: it stays out of every log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Touch(..)")
    }
}

//! What computes: a model's manifest, and what its arithmetic can express.
//!
//! The manifest lists every file with its hash; [`ModelId`] is blake3 of the encoded manifest, so the manifest can
//! be fetched like any blob. Rules, defaults and work figures in it are derived from the configuration files by the
//! architecture's code: whoever imports a model derives them again and refuses a difference. Nothing that people
//! may revise is in it; that is on cards.

use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError, List, Text, text_u64};
use crate::id::{BlobId, ModelId};
use crate::limits::*;
use crate::units::Micro;
use crate::work::WorkModel;

/// What computes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelManifest {
    /// Architecture, such as `ltx-video`: the code that runs it.
    pub architecture: Text<MAX_NAME>,
    /// Every file, sorted by path.
    pub files: List<ModelFile, MAX_MODEL_FILES>,
    /// Which frames and sizes it can make.
    pub rules: ModelRules,
    /// What to ask for if the artist does not say.
    pub defaults: ModelDefaults,
    /// What its work is computed from.
    pub work: WorkModel,
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFile {
    /// Path within the model's folder, with `/`.
    pub path: Text<MAX_ADDRESS>,
    /// Length in bytes.
    #[serde(with = "text_u64")]
    pub len: u64,
    /// blake3 of the content.
    pub blake3: BlobId,
}

/// What to ask for if the artist does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelDefaults {
    /// Number of frames.
    pub frames: u32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Frames per second.
    pub fps: Micro,
    /// Number of denoising steps.
    pub steps: u32,
    /// Classifier-free guidance scale; 1 means none.
    pub guidance: Micro,
}

/// Which frames and sizes a model's arithmetic can express: width and height are multiples of `size_multiple`,
/// frames are `frames_offset` plus a multiple of `frames_multiple`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRules {
    /// Width and height are multiples of this many pixels, and at least that.
    pub size_multiple: u32,
    /// Frames beyond the offset are a multiple of this.
    pub frames_multiple: u32,
    /// Frames that stand apart, usually the first one; also the least number of frames if above 0.
    pub frames_offset: u32,
    /// Most tokens of a prompt that the model reads.
    pub max_prompt_tokens: u32,
}

/// Why a model cannot make a clip of this shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// A width or height that the model cannot make.
    #[error(
        "{width}x{height}: {what} {given} is not a multiple of {multiple}; the nearest this model can make {}",
        sizes(nearest)
    )]
    Size {
        /// Width given, in pixels.
        width: u32,
        /// Height given, in pixels.
        height: u32,
        /// `width` or `height`, the first that is wrong.
        what: &'static str,
        /// Its value.
        given: u32,
        /// What it must be a multiple of.
        multiple: u32,
        /// Sizes that the model can make, nearest first.
        nearest: Vec<(u32, u32)>,
    },
    /// A number of frames that the model cannot make.
    #[error("{given} frames: this model makes {multiple}k{} frames; the nearest it can make {}", offset(*frames_offset), counts(nearest))]
    Frames {
        /// Number given.
        given: u32,
        /// Frames beyond the offset are a multiple of this.
        multiple: u32,
        /// Frames that stand apart.
        frames_offset: u32,
        /// Numbers that the model can make, nearest first.
        nearest: Vec<u32>,
    },
    /// A prompt with more tokens than the model reads.
    #[error("prompt of {given} tokens exceeds the limit of {limit}; the last {} tokens would be cut", given - limit)]
    PromptTokens {
        /// Most tokens.
        limit: u32,
        /// Tokens given.
        given: u32,
    },
}

impl RuleError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Size { .. } => "size",
            Self::Frames { .. } => "frames",
            Self::PromptTokens { .. } => "prompt_tokens",
        }
    }
}

impl ModelRules {
    /// Checks frames and size.
    pub fn check(&self, frames: u32, width: u32, height: u32) -> Result<(), RuleError> {
        let multiple = self.size_multiple.max(1);
        for (what, given) in [("width", width), ("height", height)] {
            if given == 0 || given % multiple != 0 {
                let nearest = self.nearest_sizes(width, height);
                return Err(RuleError::Size { width, height, what, given, multiple, nearest });
            }
        }
        if self.nearest_frames(frames) != [frames] {
            return Err(RuleError::Frames {
                given: frames,
                multiple: self.frames_multiple.max(1),
                frames_offset: self.frames_offset,
                nearest: self.nearest_frames(frames),
            });
        }
        Ok(())
    }

    /// Checks the number of tokens of a prompt.
    pub fn check_prompt(&self, tokens: u32) -> Result<(), RuleError> {
        if tokens > self.max_prompt_tokens {
            return Err(RuleError::PromptTokens { limit: self.max_prompt_tokens, given: tokens });
        }
        Ok(())
    }

    /// The one or two numbers of frames nearest to `frames` that the model can make, nearest first.
    pub fn nearest_frames(&self, frames: u32) -> Vec<u32> {
        let (multiple, offset) = (self.frames_multiple.max(1), self.frames_offset);
        let least = if offset > 0 { offset } else { multiple };
        if frames <= least {
            return vec![least];
        }
        let below = (frames - offset) / multiple * multiple + offset;
        around(frames, below, multiple)
    }

    /// The sizes nearest to `width`x`height` that the model can make, nearest first.
    pub fn nearest_sizes(&self, width: u32, height: u32) -> Vec<(u32, u32)> {
        let multiple = self.size_multiple.max(1);
        let side = |given: u32| {
            if given <= multiple {
                vec![multiple]
            } else {
                around(given, given / multiple * multiple, multiple)
            }
        };
        let heights = side(height);
        let mut sizes: Vec<_> =
            side(width).into_iter().flat_map(|w| heights.iter().map(move |h| (w, *h))).collect();
        sizes.sort_by_key(|(w, h)| u64::from(w.abs_diff(width)) + u64::from(h.abs_diff(height)));
        sizes
    }
}

/// Why a manifest is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Not the bytes of a manifest.
    #[error("cannot read the model manifest: {0}")]
    Codec(#[from] CodecError),
    /// The bytes of another manifest.
    #[error("manifest is {given}, not {expected}")]
    WrongModel {
        /// Model that was asked for.
        expected: ModelId,
        /// Model that came.
        given: ModelId,
    },
    /// No files.
    #[error("model lists no files")]
    NoFiles,
    /// A path that could leave the model's folder, or that some systems cannot store.
    #[error("model lists the path {path:?}, which is not a plain relative path")]
    Path {
        /// The path.
        path: String,
    },
    /// Files that are not sorted, or one twice.
    #[error("model lists {path:?} out of order or twice")]
    Order {
        /// The path.
        path: String,
    },
    /// Rules, defaults or work figures that cannot be.
    #[error("model manifest has {what} of 0")]
    Zero {
        /// Which figure.
        what: &'static str,
    },
}

impl ModelError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Codec(error) => error.code(),
            Self::WrongModel { .. } => "wrong_model",
            Self::NoFiles => "no_files",
            Self::Path { .. } => "path",
            Self::Order { .. } => "order",
            Self::Zero { .. } => "zero",
        }
    }
}

impl ModelManifest {
    /// The id of this manifest.
    pub fn id(&self) -> ModelId {
        ModelId::of(&self.encode())
    }

    /// The manifest's bytes.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// The manifest of `expected` from its bytes.
    pub fn decode(bytes: &[u8], expected: &ModelId) -> Result<Self, ModelError> {
        let given = ModelId::of(bytes);
        if given != *expected {
            return Err(ModelError::WrongModel { expected: *expected, given });
        }
        let manifest: Self = codec::decode_canonical(bytes, MAX_MANIFEST)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks paths and figures.
    pub fn check(&self) -> Result<(), ModelError> {
        if self.files.is_empty() {
            return Err(ModelError::NoFiles);
        }
        if let Some(file) = self.files.iter().find(|file| !is_plain_path(&file.path)) {
            return Err(ModelError::Path { path: file.path.to_string() });
        }
        if let Some(pair) = self.files.windows(2).find(|pair| *pair[0].path >= *pair[1].path) {
            return Err(ModelError::Order { path: pair[1].path.to_string() });
        }
        let figures = [
            ("size_multiple", self.rules.size_multiple),
            ("frames_multiple", self.rules.frames_multiple),
            ("default frames", self.defaults.frames),
            ("default width", self.defaults.width),
            ("default height", self.defaults.height),
            ("default steps", self.defaults.steps),
        ];
        match figures.into_iter().find(|(_, value)| *value == 0) {
            Some((what, _)) => Err(ModelError::Zero { what }),
            None => Ok(()),
        }
    }

    /// Bytes of all files.
    pub fn total_len(&self) -> u64 {
        self.files.iter().map(|file| file.len).fold(0, u64::saturating_add)
    }
}

impl ModelId {
    /// The id of a manifest with these bytes.
    pub fn of(manifest: &[u8]) -> Self {
        Self::from_bytes(*BlobId::of(manifest).as_bytes())
    }

    /// The manifest as a blob.
    pub fn as_blob(&self) -> BlobId {
        BlobId::from_bytes(*self.as_bytes())
    }
}

fn is_plain_path(path: &str) -> bool {
    !path.is_empty()
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && path.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+/ ".contains(&b))
}

/// `below` if it is `given`, else `below` and the next above, nearest first.
fn around(given: u32, below: u32, multiple: u32) -> Vec<u32> {
    if below == given {
        return vec![given];
    }
    match below.checked_add(multiple) {
        Some(above) if above - given < given - below => vec![above, below],
        Some(above) => vec![below, above],
        None => vec![below],
    }
}

fn offset(offset: u32) -> String {
    if offset == 0 { String::new() } else { format!("+{offset}") }
}

fn sizes(nearest: &[(u32, u32)]) -> String {
    listed(nearest.iter().map(|(w, h)| format!("{w}x{h}")).collect())
}

fn counts(nearest: &[u32]) -> String {
    listed(nearest.iter().map(u32::to_string).collect())
}

fn listed(items: Vec<String>) -> String {
    match items.split_last() {
        Some((last, [])) => format!("is {last}"),
        Some((last, rest)) => format!("are {} and {last}", rest.join(", ")),
        None => "is unknown".to_owned(),
    }
}

//! The configuration of Pyramid Flow's transformer, whichever of its two forms it has, and what of it this engine
//! computes.

mod flux;
mod mmdit;

use std::path::Path;

use serde_json::{Map, Value};

pub use flux::FluxConfig;
pub use mmdit::MmditConfig;

use crate::error::Error;
use crate::folder::check_others;
use crate::pipeline::{config_error, read_json};

/// Latent cells along a side of a token; the reference has no other.
pub const PATCH: usize = 2;
/// Which kernel computes, and how training saves memory: no matter for what is computed.
const NO_MATTER: &[&str] = &["use_flash_attn", "use_gradient_checkpointing", "gradient_checkpointing_ratio"];

/// The forms of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// miniFLUX: blocks of two streams, then of one; positions turn queries and keys.
    Flux,
    /// Stable Diffusion 3's: blocks of two streams alone; places in a picture are added to its tokens, time turns queries
    /// and keys.
    Mmdit,
}

impl Variant {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Flux, Self::Mmdit];

    /// The transformer's class.
    #[must_use]
    pub const fn class(self) -> &'static str {
        match self {
            Self::Flux => "PyramidFluxTransformer",
            Self::Mmdit => "PyramidDiffusionMMDiT",
        }
    }
}

/// What the transformer is built from.
#[derive(Debug, Clone, PartialEq)]
pub struct TransformerConfig {
    /// Its form.
    pub variant: Variant,
    /// Blocks with a text stream of their own.
    pub num_layers: usize,
    /// Blocks with text and video in one stream.
    pub num_single_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of the text encoder's output.
    pub joint_attention_dim: usize,
    /// Width of the text as one vector.
    pub pooled_projection_dim: usize,
    /// Channels of a latent cell.
    pub latent_channels: usize,
    /// Channels of a head that time, and then height and width, turn.
    pub axes: Vec<usize>,
    /// Rows and columns of the table of positions that are added, where there is one.
    pub positions: Option<usize>,
}

impl TransformerConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or holds a value that this engine does not compute; the error names file, key and value.
    pub fn read(file: &Path) -> Result<Self, Error> {
        let fields: Map<String, Value> = read_json(file)?;
        let class = fields.get("_class_name").and_then(Value::as_str).unwrap_or(Variant::Flux.class());
        match Variant::ALL.into_iter().find(|variant| variant.class() == class) {
            Some(Variant::Flux) => FluxConfig::read(file),
            Some(Variant::Mmdit) => MmditConfig::read(file),
            None => {
                let known = Variant::ALL.map(Variant::class).join(" and ");
                Err(config_error(file, "_class_name", class, format!("known are {known}")))
            }
        }
    }

    /// Width of a token inside.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Numbers in a token's cells.
    #[must_use]
    pub fn token_channels(&self) -> usize {
        self.latent_channels * PATCH * PATCH
    }
}

/// Checks what a file holds beside the fields that are read; what is in one of the `passed` lists is no matter.
fn check_known(
    file: &Path,
    others: &Map<String, Value>,
    passed: &[&[&str]],
    variant: Variant,
) -> Result<(), Error> {
    let mut others = others.clone();
    others.retain(|key, _| !passed.iter().any(|list| list.contains(&key.as_str())));
    check_others(file, &others, variant.class())
}

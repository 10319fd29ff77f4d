//! Open video models on candle: from a prompt and a seed to frames, with no knowledge of the network.
//!
//! [`load`] reads a model folder in the published diffusers layout and answers a [`Pipeline`]; the pipeline turns a
//! [`GenerateRequest`] into [`Generated`] frames while an [`Observer`] sees phases, steps, previews and checkpoints,
//! and may cancel. A model is a folder under [`models`] and one line in [`registry`]; what models share lies in
//! [`nn`], [`adapter`], [`sampler`], [`text`], [`vision`], [`folder`], [`weights`] and [`tiling`]; the run itself is [`pipeline::run`].
//!
//! Everything here computes for seconds or minutes: call it from a plain thread, never from an async worker.

pub mod adapter;
pub mod audit;
pub mod error;
pub mod facts;
pub mod folder;
pub mod frames;
pub mod measure;
pub mod models;
pub mod motif;
pub mod nn;
pub mod offload;
pub mod pipeline;
pub mod plan;
pub mod registry;
pub mod rng;
pub mod sampler;
pub mod sink;
pub mod text;
pub mod tiling;
pub mod vision;
pub mod weights;

pub use candle_core::{DType, Device, Tensor};

pub use crate::adapter::{Adapter, Lora};
pub use crate::audit::{Commitment, Transition};
pub use crate::error::Error;
pub use crate::facts::Facts;
pub use crate::frames::RgbFrames;
pub use crate::pipeline::{
    Checkpoint, Condition, DecodeOptions, Defaults, FrameRule, GenerateRequest, Generated, LoadOptions,
    Observer, Phase, Pipeline, PipelineInfo, SecondPass, Silent, StepEvent, Touch, WorkConfig, open_device,
};
pub use crate::registry::load;

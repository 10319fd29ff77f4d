//! Noise schedules and the steps along them, guidance, and the state that a run can be resumed from.

pub mod checkpoint;
pub mod diffusion;
pub mod flow_match;
pub mod guidance;
pub mod pyramid;

pub use diffusion::{DiffusionConfig, DiffusionSampler, DiffusionSchedule};
pub use flow_match::{FlowMatchConfig, Schedule, ScheduleRequest, calculate_shift, linear_quadratic};
pub use pyramid::{PyramidConfig, PyramidSchedule};

/// What is wrong with a schedule.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// A scheduler setting that this engine does not compute.
    #[error("scheduler setting {key} is {value}: {reason}")]
    Setting {
        /// The key in `scheduler_config.json`.
        key: String,
        /// Its value.
        value: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// Timesteps that do not fall, or that lie outside the schedule.
    #[error("timestep {index} is {value}: timesteps fall and lie in 0 to {limit}")]
    Timesteps {
        /// Zero-based.
        index: usize,
        /// What was given.
        value: f64,
        /// The largest.
        limit: f64,
    },
    /// More steps than a diffusion model has levels.
    #[error("{steps} steps are too many: the model has {limit} noise levels")]
    TooMany {
        /// What was asked for.
        steps: usize,
        /// Levels.
        limit: usize,
    },
    /// A schedule without steps.
    #[error("a schedule needs at least 1 step, 0 were given")]
    Empty,
}

impl SamplerError {
    /// A short stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Setting { .. } => "scheduler_setting",
            Self::Timesteps { .. } => "timesteps",
            Self::TooMany { .. } => "too_many_steps",
            Self::Empty => "zero_steps",
        }
    }
}

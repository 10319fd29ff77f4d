//! The two samplers that Wan is run with.

use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

use crate::error::Error;
use crate::pipeline::run::{Course, State};
use crate::pipeline::{GenerateRequest, config_error, read_json};
use crate::sampler::{
    FlowMatchConfig, SamplerError, Schedule, ScheduleRequest, UniPc, UniPcConfig, UniPcState,
};

/// The schedulers' classes.
pub(in crate::models::wan) const CLASSES: &[&str] =
    &["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"];

/// A sampler's settings.
#[derive(Debug, Clone, PartialEq)]
pub enum WanSampler {
    /// `UniPCMultistepScheduler`, as published.
    UniPc(UniPcConfig),
    /// `FlowMatchEulerDiscreteScheduler`.
    Euler(FlowMatchConfig),
}

impl WanSampler {
    /// Reads a folder's `scheduler/scheduler_config.json`, which names its class.
    ///
    /// # Errors
    /// When it cannot be read, or holds a class or a setting that is not computed here.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let file = folder.join("scheduler").join("scheduler_config.json");
        let value: Value = read_json(&file)?;
        let class = value.get("_class_name").and_then(Value::as_str).unwrap_or("none");
        let fault = |error: serde_json::Error| config_error(&file, "", "not readable", error);
        let sampler = match class {
            "UniPCMultistepScheduler" => Self::UniPc(serde_json::from_value(value).map_err(fault)?),
            "FlowMatchEulerDiscreteScheduler" => Self::Euler(serde_json::from_value(value).map_err(fault)?),
            other => {
                let known = format!("known are {}", CLASSES.join(", "));
                return Err(config_error(file, "_class_name", other, known));
            }
        };
        sampler.check().map_err(|error| match error {
            SamplerError::Setting { key, value, reason } => config_error(&file, &key, value, reason),
            other => other.into(),
        })?;
        Ok(sampler)
    }

    fn check(&self) -> Result<(), SamplerError> {
        match self {
            Self::UniPc(config) => config.check(),
            Self::Euler(config) if config.use_dynamic_shifting => Err(SamplerError::Setting {
                key: "use_dynamic_shifting".to_owned(),
                value: "true".to_owned(),
                reason: "Wan's pipeline shifts by a constant".to_owned(),
            }),
            Self::Euler(config) => config.check(),
        }
    }

    /// The timestep at sigma 1.
    #[must_use]
    pub fn train_timesteps(&self) -> usize {
        match self {
            Self::UniPc(config) => config.num_train_timesteps,
            Self::Euler(config) => config.num_train_timesteps,
        }
    }

    /// The points that a request's run goes through.
    ///
    /// # Errors
    /// When it has no steps, or timesteps that the sampler cannot take.
    pub fn schedule(&self, request: &GenerateRequest) -> Result<WanSchedule, Error> {
        self.check()?;
        let given = request.timesteps.as_ref();
        Ok(match self {
            Self::UniPc(_) if given.is_some() => {
                let reason =
                    "UniPC computes its own timesteps: ask for steps, or use a folder with Euler steps";
                let (key, value) = ("timesteps".to_owned(), "given".to_owned());
                return Err(SamplerError::Setting { key, value, reason: reason.to_owned() }.into());
            }
            Self::UniPc(config) => {
                let rule = format!(
                    "unipc\0{}\0{}\0{}\0{:?}",
                    config.solver_type,
                    config.solver_order,
                    config.lower_order_final,
                    config.disable_corrector
                );
                let unipc = UniPc::new(config, request.steps)?;
                let fresh = request.fresh_at(unipc.steps())?;
                WanSchedule::UniPc(unipc.fresh_at(fresh), rule)
            }
            Self::Euler(config) => {
                let points = match given {
                    Some(given) => ScheduleRequest::Timesteps(given.iter().map(|&t| t as f32).collect()),
                    None => ScheduleRequest::Trained(request.steps),
                };
                WanSchedule::Euler(Schedule::new(config, &points, 0.0)?)
            }
        })
    }
}

/// The points of one run with its sampler's rule.
#[derive(Debug, Clone, PartialEq)]
pub enum WanSchedule {
    /// UniPC, and its settings as a run commits to them.
    UniPc(UniPc, String),
    /// Euler steps.
    Euler(Schedule),
}

impl WanSchedule {
    /// The points.
    #[must_use]
    pub fn course(&self) -> Course<'_> {
        match self {
            Self::UniPc(unipc, rule) => {
                Course { sampler: rule, sigmas: &unipc.sigmas, timesteps: &unipc.timesteps }
            }
            Self::Euler(schedule) => Course {
                sampler: "flow-match-euler\0text",
                sigmas: &schedule.sigmas,
                timesteps: &schedule.timesteps,
            },
        }
    }

    /// Goes step `index` with the model's output, and gives the clean latents that it predicts.
    pub(super) fn advance(&self, index: usize, state: &mut State, output: &Tensor) -> Result<Tensor, Error> {
        let sigma = f64::from(self.course().sigmas[index]);
        let predicted = (&state.latents - (output * sigma)?)?;
        state.latents = match self {
            Self::Euler(schedule) => schedule.step(index, &state.latents, output)?,
            Self::UniPc(unipc, _) => {
                let fault =
                    || Error::Checkpoint { reason: "its sampler's memory is of another form".to_owned() };
                for name in state.memory.keys() {
                    state.remembered(name)?;
                }
                let mut memory = UniPcState::from_memory(&state.memory).ok_or_else(fault)?;
                let next = unipc.step(&mut memory, index, &state.latents, output)?;
                state.memory = memory.into_memory();
                next
            }
        };
        Ok(predicted)
    }

    /// `change` where step `index` is `after = before + change * output`.
    pub(super) fn change(&self, index: usize) -> Option<f32> {
        match self {
            Self::UniPc(..) => None,
            Self::Euler(schedule) => Some(schedule.change(index)),
        }
    }
}

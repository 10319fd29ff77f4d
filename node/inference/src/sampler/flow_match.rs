//! Flow matching with Euler steps (diffusers' `FlowMatchEulerDiscreteScheduler`): sigmas fall from 1 to 0, a model
//! predicts the velocity `noise - data`, and a step is `x += (sigma_next - sigma) * v`.
//!
//! Sigmas are computed in f32 in the reference's order: given or evenly spaced, then shifted (by a constant, or by
//! `mu` from the number of tokens), then stretched so that the last one is `shift_terminal`, then closed with 0.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::SamplerError;

/// `scheduler_config.json`; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct FlowMatchConfig {
    /// The timestep at sigma 1.
    pub num_train_timesteps: usize,
    /// The constant shift, used without dynamic shifting.
    pub shift: f64,
    /// Whether the shift follows from the number of tokens.
    pub use_dynamic_shifting: bool,
    /// `mu` at `base_image_seq_len` tokens.
    pub base_shift: f64,
    /// `mu` at `max_image_seq_len` tokens.
    pub max_shift: f64,
    /// See `base_shift`.
    pub base_image_seq_len: usize,
    /// See `max_shift`.
    pub max_image_seq_len: usize,
    /// What the last sigma before 0 is stretched to.
    pub shift_terminal: Option<f64>,
    /// Whether sigmas rise from 0 to 1 instead.
    pub invert_sigmas: bool,
    /// `exponential` or `linear`.
    pub time_shift_type: String,
    /// Not computed here.
    pub use_karras_sigmas: bool,
    /// Not computed here.
    pub use_exponential_sigmas: bool,
    /// Not computed here.
    pub use_beta_sigmas: bool,
    /// Not computed here.
    pub stochastic_sampling: bool,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: serde_json::Map<String, serde_json::Value>,
}

impl Default for FlowMatchConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            shift_terminal: None,
            invert_sigmas: false,
            time_shift_type: "exponential".to_owned(),
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            stochastic_sampling: false,
            others: serde_json::Map::new(),
        }
    }
}

impl FlowMatchConfig {
    /// Refuses what this engine does not compute.
    ///
    /// # Errors
    /// The first such setting.
    pub fn check(&self) -> std::result::Result<(), SamplerError> {
        let unsupported = [
            ("use_karras_sigmas", self.use_karras_sigmas),
            ("use_exponential_sigmas", self.use_exponential_sigmas),
            ("use_beta_sigmas", self.use_beta_sigmas),
            ("stochastic_sampling", self.stochastic_sampling),
        ];
        for (key, on) in unsupported {
            if on {
                return Err(setting(key, "true", "only false is known"));
            }
        }
        if !matches!(self.time_shift_type.as_str(), "exponential" | "linear") {
            return Err(setting(
                "time_shift_type",
                &self.time_shift_type,
                "known are exponential and linear",
            ));
        }
        let class = self.others.get("_class_name").and_then(|v| v.as_str());
        if let Some(class) = class.filter(|&class| class != "FlowMatchEulerDiscreteScheduler") {
            return Err(setting("_class_name", class, "only FlowMatchEulerDiscreteScheduler is known"));
        }
        match self.others.iter().find(|(key, value)| !key.starts_with('_') && means_something(value)) {
            Some((key, value)) => Err(setting(key, &value.to_string(), "this setting is not known")),
            None => Ok(()),
        }
    }
}

/// Whether a configuration value that nobody reads could change what is computed.
#[must_use]
pub fn means_something(value: &serde_json::Value) -> bool {
    !(value.is_null() || value == &serde_json::Value::Bool(false))
}

fn setting(key: &str, value: &str, reason: &str) -> SamplerError {
    SamplerError::Setting { key: key.to_owned(), value: value.to_owned(), reason: reason.to_owned() }
}

/// Which points a schedule goes through.
#[derive(Debug, Clone, PartialEq)]
pub enum ScheduleRequest {
    /// Evenly spaced from 1 to `1 / steps`.
    Steps(usize),
    /// Evenly spaced between the largest and the least sigma that the model was trained with, which a constant shift
    /// has shifted already: the scheduler's own spacing, for pipelines that give no sigmas.
    Trained(usize),
    /// These sigmas, before shifting.
    Sigmas(Vec<f32>),
    /// These timesteps as they are; their sigmas are shifted all the same, as the reference does.
    Timesteps(Vec<f32>),
}

/// The points of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Noise levels, one more than there are steps.
    pub sigmas: Vec<f32>,
    /// What the model is told at each step.
    pub timesteps: Vec<f32>,
    train_timesteps: f32,
}

impl Schedule {
    /// Computes the points; `mu` is used with dynamic shifting only.
    ///
    /// # Errors
    /// When no step is asked for, or the configuration has a setting that is not computed here.
    pub fn new(
        config: &FlowMatchConfig,
        request: &ScheduleRequest,
        mu: f64,
    ) -> std::result::Result<Self, SamplerError> {
        config.check()?;
        let train = config.num_train_timesteps as f32;
        let (mut sigmas, given) = match request {
            ScheduleRequest::Steps(steps) => (even(*steps, 1.0, 1.0 / (*steps).max(1) as f64), None),
            ScheduleRequest::Trained(steps) => {
                let mut ends = [1.0, 1.0 / train];
                if !config.use_dynamic_shifting {
                    shift(config, mu, &mut ends);
                }
                (even(*steps, f64::from(ends[0]), f64::from(ends[1])), None)
            }
            ScheduleRequest::Sigmas(sigmas) => (sigmas.clone(), None),
            ScheduleRequest::Timesteps(given) => {
                (given.iter().map(|t| t / train).collect(), Some(given.clone()))
            }
        };
        if sigmas.is_empty() {
            return Err(SamplerError::Empty);
        }
        if let Some(given) = &given {
            check_timesteps(given, train)?;
        }
        shift(config, mu, &mut sigmas);
        if let Some(terminal) = config.shift_terminal.filter(|&terminal| terminal != 0.0) {
            stretch(&mut sigmas, terminal);
        }
        let mut timesteps = given.unwrap_or_else(|| sigmas.iter().map(|s| s * train).collect());
        if config.invert_sigmas {
            sigmas.iter_mut().for_each(|s| *s = 1.0 - *s);
            timesteps = sigmas.iter().map(|s| s * train).collect();
        }
        sigmas.push(if config.invert_sigmas { 1.0 } else { 0.0 });
        Ok(Self { sigmas, timesteps, train_timesteps: train })
    }

    /// The same without its first steps.
    #[must_use]
    pub fn without_first(mut self, steps: usize) -> Self {
        self.sigmas.drain(..steps);
        self.timesteps.drain(..steps);
        self
    }

    /// Steps of the run.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// The latents after step `index`; all in f32.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn step(&self, index: usize, sample: &Tensor, velocity: &Tensor) -> Result<Tensor> {
        sample + (velocity * f64::from(self.change(index)))?
    }

    /// By how much the noise level changes in step `index` under [`Schedule::step`]; negative where noise is taken away.
    #[must_use]
    pub fn change(&self, index: usize) -> f32 {
        self.sigmas[index + 1] - self.sigmas[index]
    }

    /// The latents after step `index` by the rule for per-token timesteps: from the timestep's own noise level to the
    /// largest sigma below it. It differs from [`Schedule::step`] where given timesteps and shifted sigmas differ.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn step_from_timestep(&self, index: usize, sample: &Tensor, velocity: &Tensor) -> Result<Tensor> {
        sample - (velocity * f64::from(-self.change_from_timestep(index)))?
    }

    /// By how much the noise level changes in step `index` under [`Schedule::step_from_timestep`].
    #[must_use]
    pub fn change_from_timestep(&self, index: usize) -> f32 {
        self.change_from(self.timesteps[index])
    }

    /// By how much the noise level changes from a timestep's own to the largest sigma below it.
    #[must_use]
    pub fn change_from(&self, timestep: f32) -> f32 {
        let current = timestep / self.train_timesteps;
        self.next_below(current) - current
    }

    /// The timestep at noise level 1.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.train_timesteps
    }

    /// The largest sigma below a noise level, 0 where there is none.
    fn next_below(&self, current: f32) -> f32 {
        self.sigmas.iter().copied().filter(|&s| s < current - 1e-6).fold(0.0, f32::max)
    }
}

/// `mu` from the number of tokens: a line through (`base_image_seq_len`, `base_shift`) and (`max_image_seq_len`,
/// `max_shift`), not clamped.
#[must_use]
pub fn calculate_shift(config: &FlowMatchConfig, tokens: usize) -> f64 {
    let (base, max) = (config.base_image_seq_len as f64, config.max_image_seq_len as f64);
    let slope = (config.max_shift - config.base_shift) / (max - base);
    tokens as f64 * slope + (config.base_shift - slope * base)
}

/// Sigmas that fall linearly for the first half of the steps, down to `1 - threshold`, and quadratically from there
/// (Genmo's Mochi, taken over by LTX's condition pipeline).
#[must_use]
pub fn linear_quadratic(steps: usize, threshold: f64) -> Vec<f32> {
    if steps < 2 {
        return vec![1.0; steps];
    }
    let linear = steps / 2;
    let (count, half) = (steps as f64, linear as f64);
    let rest = (steps - linear) as f64;
    let difference = half - threshold * count;
    let quadratic = difference / (half * rest * rest);
    let slope = threshold / half - 2.0 * difference / (rest * rest);
    let constant = quadratic * half * half;
    let point = |i: usize| {
        let x = i as f64;
        if i < linear { x * threshold / half } else { quadratic * x * x + slope * x + constant }
    };
    (0..steps).map(|i| (1.0 - point(i)) as f32).collect()
}

/// numpy's `linspace(start, end, steps)`, computed in f64 and rounded.
fn even(steps: usize, start: f64, end: f64) -> Vec<f32> {
    let stride = (end - start) / (steps.max(2) - 1) as f64;
    (0..steps)
        .map(|i| if i > 0 && i + 1 == steps { end as f32 } else { (start + i as f64 * stride) as f32 })
        .collect()
}

fn check_timesteps(given: &[f32], limit: f32) -> std::result::Result<(), SamplerError> {
    let mut last = f32::INFINITY;
    for (index, &value) in given.iter().enumerate() {
        if !(value.is_finite() && (0.0..=limit).contains(&value) && value < last) {
            return Err(SamplerError::Timesteps { index, value: f64::from(value), limit: f64::from(limit) });
        }
        last = value;
    }
    Ok(())
}

fn shift(config: &FlowMatchConfig, mu: f64, sigmas: &mut [f32]) {
    if config.use_dynamic_shifting {
        let exponential = config.time_shift_type == "exponential";
        let scale = if exponential { mu.exp() } else { mu } as f32;
        sigmas.iter_mut().for_each(|s| *s = scale / (scale + (1.0 / *s - 1.0)));
    } else {
        let (shift, less) = (config.shift as f32, (config.shift - 1.0) as f32);
        sigmas.iter_mut().for_each(|s| *s = shift * *s / (1.0 + less * *s));
    }
}

/// Stretches so that the last sigma is `terminal`. A single step has sigma 1 and nothing to stretch: the reference
/// divides 0 by 0 there, here it stays 1.
fn stretch(sigmas: &mut [f32], terminal: f64) {
    let last = sigmas.last().map_or(0.0, |s| 1.0 - s);
    let scale = last / (1.0 - terminal) as f32;
    if scale > 0.0 {
        sigmas.iter_mut().for_each(|s| *s = 1.0 - (1.0 - *s) / scale);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ltx() -> FlowMatchConfig {
        FlowMatchConfig {
            use_dynamic_shifting: true,
            base_shift: 0.95,
            max_shift: 2.05,
            base_image_seq_len: 1024,
            shift_terminal: Some(0.1),
            ..FlowMatchConfig::default()
        }
    }

    #[test]
    fn one_step_goes_from_pure_noise_to_the_end_without_nan() {
        let schedule = Schedule::new(&ltx(), &ScheduleRequest::Steps(1), 2.0).unwrap();
        assert_eq!(schedule.sigmas, [1.0, 0.0]);
        assert_eq!(schedule.timesteps, [1000.0]);
        assert_eq!(linear_quadratic(1, 0.025), [1.0]);
    }

    #[test]
    fn the_last_sigma_before_zero_is_the_terminal_one() {
        for steps in 2..40 {
            let schedule = Schedule::new(&ltx(), &ScheduleRequest::Steps(steps), 1.3).unwrap();
            assert!((schedule.sigmas[steps - 1] - 0.1).abs() < 1e-6);
            assert!(schedule.sigmas.windows(2).all(|pair| pair[0] > pair[1]), "{:?}", schedule.sigmas);
        }
    }

    #[test]
    fn both_step_rules_agree_where_timesteps_are_the_sigmas() {
        let schedule = Schedule::new(&ltx(), &ScheduleRequest::Steps(5), 1.3).unwrap();
        let device = candle_core::Device::Cpu;
        let x = Tensor::new(&[0.5f32, -1.0], &device).unwrap();
        let v = Tensor::new(&[0.25f32, 2.0], &device).unwrap();
        for index in 0..5 {
            let a = schedule.step(index, &x, &v).unwrap().to_vec1::<f32>().unwrap();
            let b = schedule.step_from_timestep(index, &x, &v).unwrap().to_vec1::<f32>().unwrap();
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
        }
    }

    #[test]
    fn settings_that_are_not_computed_are_refused_by_name() {
        let karras = FlowMatchConfig { use_karras_sigmas: true, ..ltx() };
        assert!(karras.check().unwrap_err().to_string().contains("use_karras_sigmas"));
        let shape = FlowMatchConfig { time_shift_type: "cubic".to_owned(), ..ltx() };
        assert!(shape.check().unwrap_err().to_string().contains("cubic"));
        let new: FlowMatchConfig = serde_json::from_str(r#"{"use_magic": 3}"#).unwrap();
        assert!(new.check().unwrap_err().to_string().contains("use_magic"));
        let off: FlowMatchConfig =
            serde_json::from_str(r#"{"use_magic": false, "_diffusers_version": "1"}"#).unwrap();
        assert!(off.check().is_ok());
    }

    #[test]
    fn timesteps_that_rise_or_lie_outside_are_refused() {
        for bad in [vec![500.0, 600.0], vec![1001.0], vec![f32::NAN], vec![500.0, 500.0]] {
            assert!(matches!(
                Schedule::new(&ltx(), &ScheduleRequest::Timesteps(bad), 1.0),
                Err(SamplerError::Timesteps { .. })
            ));
        }
        assert!(matches!(Schedule::new(&ltx(), &ScheduleRequest::Steps(0), 1.0), Err(SamplerError::Empty)));
    }
}

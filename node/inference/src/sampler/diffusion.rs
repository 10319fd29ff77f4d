//! Diffusion samplers over a table of 1000 noise levels, as CogVideoX has them: DDIM steps (diffusers'
//! `CogVideoXDDIMScheduler`) and second-order SDE steps of DPM-Solver++ (`CogVideoXDPMScheduler`).
//!
//! Level `t` has the signal's share `alpha(t)`: betas rise as the square of a line, `alpha` is the running product of
//! `1 - beta`, shifted in signal-to-noise ratio (`a / (c + (1 - c) a)`, Stable Diffusion 3) and stretched so that the
//! last level holds no signal ("Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1). Levels are
//! computed in f64, steps in f32.

use candle_core::{Result, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::SamplerError;
use super::flow_match::means_something;

/// `scheduler_config.json`; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct DiffusionConfig {
    /// Levels.
    pub num_train_timesteps: usize,
    /// The first level's.
    pub beta_start: f64,
    /// The last level's.
    pub beta_end: f64,
    /// `scaled_linear`.
    pub beta_schedule: String,
    /// Not computed here.
    pub trained_betas: Option<Vec<f64>>,
    /// Whether the last step ends without noise.
    pub set_alpha_to_one: bool,
    /// Added to timesteps that are spaced `leading`.
    pub steps_offset: usize,
    /// `v_prediction`, `epsilon` or `sample`.
    pub prediction_type: String,
    /// `trailing`, `leading` or `linspace`.
    pub timestep_spacing: String,
    /// Whether levels are stretched.
    pub rescale_betas_zero_snr: bool,
    /// The shift's `c`.
    pub snr_shift_scale: f64,
    /// The reference's steps do not look at it.
    pub clip_sample: bool,
    /// As `clip_sample`.
    pub clip_sample_range: f64,
    /// As `clip_sample`.
    pub sample_max_value: f64,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for DiffusionConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.000_85,
            beta_end: 0.012,
            beta_schedule: "scaled_linear".to_owned(),
            trained_betas: None,
            set_alpha_to_one: true,
            steps_offset: 0,
            prediction_type: "epsilon".to_owned(),
            timestep_spacing: "leading".to_owned(),
            rescale_betas_zero_snr: false,
            snr_shift_scale: 3.0,
            clip_sample: true,
            clip_sample_range: 1.0,
            sample_max_value: 1.0,
            others: Map::new(),
        }
    }
}

/// Which steps are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiffusionSampler {
    /// Deterministic.
    Ddim,
    /// Second order, with noise in every step but the last.
    Dpm,
}

impl DiffusionSampler {
    /// From the scheduler's class.
    #[must_use]
    pub fn from_class(class: &str) -> Option<Self> {
        match class {
            "CogVideoXDDIMScheduler" => Some(Self::Ddim),
            "CogVideoXDPMScheduler" => Some(Self::Dpm),
            _ => None,
        }
    }
}

impl DiffusionConfig {
    /// Refuses what this engine does not compute.
    ///
    /// # Errors
    /// The first such setting.
    pub fn check(&self) -> std::result::Result<(), SamplerError> {
        let known: [(&str, &str, &[&str]); 3] = [
            ("beta_schedule", &self.beta_schedule, &["scaled_linear"]),
            ("prediction_type", &self.prediction_type, &["v_prediction", "epsilon", "sample"]),
            ("timestep_spacing", &self.timestep_spacing, &["trailing", "leading", "linspace"]),
        ];
        for (key, value, known) in known {
            if !known.contains(&value) {
                return Err(setting(key, value, &format!("known are {}", known.join(", "))));
            }
        }
        if self.trained_betas.is_some() {
            return Err(setting("trained_betas", "a list", "only null is known"));
        }
        if self.num_train_timesteps < 2 {
            return Err(setting("num_train_timesteps", &self.num_train_timesteps.to_string(), "at least 2"));
        }
        let (first, last, shift) = (self.beta_start, self.beta_end, self.snr_shift_scale);
        if !(first > 0.0 && first < last && last < 1.0) {
            return Err(setting("beta_end", &last.to_string(), "betas rise and lie between 0 and 1"));
        }
        if !(shift > 0.0 && shift.is_finite()) {
            return Err(setting("snr_shift_scale", &shift.to_string(), "it must be above 0"));
        }
        let strange = self.others.iter().find(|(key, value)| !key.starts_with('_') && means_something(value));
        match strange {
            Some((key, value)) => Err(setting(key, &value.to_string(), "this setting is not known")),
            None => Ok(()),
        }
    }

    /// The class that the file names.
    #[must_use]
    pub fn class(&self) -> Option<&str> {
        self.others.get("_class_name").and_then(Value::as_str)
    }

    /// The signal's share at each level, falling.
    #[must_use]
    pub fn alphas(&self) -> Vec<f64> {
        let shift = self.snr_shift_scale;
        let (first, last) = (self.beta_start.sqrt(), self.beta_end.sqrt());
        let mut product = 1.0;
        let mut alphas: Vec<f64> = line(first, last, self.num_train_timesteps)
            .map(|root| {
                product *= 1.0 - root * root;
                product / (shift + (1.0 - shift) * product)
            })
            .collect();
        if self.rescale_betas_zero_snr {
            let root = |alpha: Option<&f64>| alpha.copied().unwrap_or(0.0).sqrt();
            let (first, last) = (root(alphas.first()), root(alphas.last()));
            let scale = first / (first - last);
            alphas.iter_mut().for_each(|alpha| *alpha = ((alpha.sqrt() - last) * scale).powi(2));
        }
        alphas
    }

    fn timesteps(&self, steps: usize) -> Vec<usize> {
        let (train, count) = (self.num_train_timesteps, steps as f64);
        match self.timestep_spacing.as_str() {
            "linspace" => {
                let all: Vec<usize> =
                    line(0.0, (train - 1) as f64, steps).map(|t| t.round_ties_even() as usize).collect();
                all.into_iter().rev().collect()
            }
            "leading" => (0..steps).rev().map(|i| i * (train / steps) + self.steps_offset).collect(),
            _ => {
                let place = |i: usize| (train as f64 - i as f64 * (train as f64 / count)).round_ties_even();
                (0..steps).map(|i| (place(i) as usize).saturating_sub(1)).collect()
            }
        }
    }
}

/// `count` points from `first` to `last`, computed from both ends inwards.
fn line(first: f64, last: f64, count: usize) -> impl Iterator<Item = f64> {
    let stride = (last - first) / (count.max(2) - 1) as f64;
    (0..count).map(move |i| {
        if i < count / 2 || count == 1 {
            first + stride * i as f64
        } else {
            last - stride * (count - 1 - i) as f64
        }
    })
}

fn setting(key: &str, value: &str, reason: &str) -> SamplerError {
    SamplerError::Setting { key: key.to_owned(), value: value.to_owned(), reason: reason.to_owned() }
}

/// The points of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct DiffusionSchedule {
    /// What the model is told at each step, 0 to 999, falling.
    pub timesteps: Vec<f32>,
    /// The noise's share of the latents, `sqrt(1 - alpha)`, before the first step and after each.
    pub sigmas: Vec<f32>,
    points: Vec<Point>,
    prediction: Prediction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prediction {
    Velocity,
    Noise,
    Sample,
}

/// The signal's share at one step.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    now: f64,
    next: f64,
    /// At the step before, where there is one.
    before: Option<f64>,
    last: bool,
}

/// What a step gives.
#[derive(Debug, Clone)]
pub struct DiffusionStep {
    /// The latents after it.
    pub sample: Tensor,
    /// The clean latents that the model predicts.
    pub predicted: Tensor,
}

impl DiffusionSchedule {
    /// Computes the points.
    ///
    /// # Errors
    /// When no step is asked for or more than there are levels, or the configuration has a setting that is not computed
    /// here.
    pub fn new(config: &DiffusionConfig, steps: usize) -> std::result::Result<Self, SamplerError> {
        config.check()?;
        let train = config.num_train_timesteps;
        if steps == 0 {
            return Err(SamplerError::Empty);
        }
        if steps > train {
            return Err(SamplerError::TooMany { steps, limit: train });
        }
        let alphas = config.alphas();
        let last = if config.set_alpha_to_one { 1.0 } else { alphas[0] };
        let timesteps = config.timesteps(steps);
        let at = |t: usize| alphas[t.min(train - 1)];
        let points: Vec<Point> = timesteps
            .iter()
            .enumerate()
            .map(|(i, &t)| {
                let next = t.checked_sub(train / steps);
                let before = i.checked_sub(1).map(|i| at(timesteps[i]));
                Point { now: at(t), next: next.map_or(last, at), before, last: next.is_none() }
            })
            .collect();
        let level = |alpha: f64| (1.0 - alpha).max(0.0).sqrt() as f32;
        let first = points.iter().take(1).map(|point| level(point.now));
        Ok(Self {
            sigmas: first.chain(points.iter().map(|point| level(point.next))).collect(),
            timesteps: timesteps.iter().map(|&t| t as f32).collect(),
            points,
            prediction: match config.prediction_type.as_str() {
                "epsilon" => Prediction::Noise,
                "sample" => Prediction::Sample,
                _ => Prediction::Velocity,
            },
        })
    }

    /// Steps of the run.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// The clean latents that a model's output at step `index` predicts.
    fn predicted(&self, index: usize, sample: &Tensor, output: &Tensor) -> Result<Tensor> {
        let alpha = self.points[index].now;
        let (signal, noise) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        match self.prediction {
            Prediction::Velocity => (sample * signal)? - (output * noise)?,
            Prediction::Noise => (sample - (output * noise)?)? / signal,
            Prediction::Sample => Ok(output.clone()),
        }
    }

    /// A DDIM step.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn ddim(&self, index: usize, sample: &Tensor, output: &Tensor) -> Result<DiffusionStep> {
        let predicted = self.predicted(index, sample, output)?;
        let Point { now, next, .. } = self.points[index];
        let old = ((1.0 - next) / (1.0 - now)).sqrt();
        let new = next.sqrt() - now.sqrt() * old;
        Ok(DiffusionStep { sample: ((sample * old)? + (&predicted * new)?)?, predicted })
    }

    /// A second-order step of DPM-Solver++ in its stochastic form; of first order in the first and the last step.
    /// `earlier` is what the step before predicted, `noise` standard normals of the sample's shape.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn dpm(
        &self,
        index: usize,
        sample: &Tensor,
        output: &Tensor,
        earlier: Option<&Tensor>,
        noise: &Tensor,
    ) -> Result<DiffusionStep> {
        let predicted = self.predicted(index, sample, output)?;
        let Point { now, next, before, last } = self.points[index];
        let lambda = |alpha: f64| (alpha / (1.0 - alpha)).sqrt().ln();
        let h = lambda(next) - lambda(now);
        let keep = ((1.0 - next) / (1.0 - now)).sqrt() * (-h).exp();
        let pull = (-2.0 * h).exp_m1() * next.sqrt();
        let spread = (1.0 - next).sqrt() * (1.0 - (-2.0 * h).exp()).sqrt();
        let target = match (earlier, before) {
            (Some(earlier), Some(before)) if !last => {
                let ratio = (lambda(now) - lambda(before)) / h;
                let beyond = 1.0 / (2.0 * ratio);
                ((&predicted * (1.0 + beyond))? - (earlier * beyond)?)?
            }
            _ => predicted.clone(),
        };
        let sample = (((sample * keep)? - (target * pull)?)? + (noise * spread)?)?;
        Ok(DiffusionStep { sample, predicted })
    }

    /// Which draw the reference uses at step `index`, counted from its first: it draws twice in every step of second
    /// order and uses the second.
    #[must_use]
    pub fn reference_draw(&self, index: usize) -> usize {
        let draws = |i: usize| if i == 0 || self.points[i].last { 1 } else { 2 };
        (0..=index).map(draws).sum::<usize>() - 1
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    fn config() -> DiffusionConfig {
        DiffusionConfig {
            prediction_type: "v_prediction".to_owned(),
            timestep_spacing: "trailing".to_owned(),
            rescale_betas_zero_snr: true,
            snr_shift_scale: 1.0,
            ..DiffusionConfig::default()
        }
    }

    #[test]
    fn levels_fall_to_no_signal_and_runs_go_from_pure_noise_to_almost_none() {
        let alphas = config().alphas();
        assert!(alphas.windows(2).all(|pair| pair[1] < pair[0]));
        assert_eq!(alphas[999], 0.0);
        for steps in [1, 2, 3, 7, 16, 50, 1000] {
            let schedule = DiffusionSchedule::new(&config(), steps).unwrap();
            assert_eq!((schedule.steps(), schedule.sigmas.len()), (steps, steps + 1));
            assert_eq!(schedule.sigmas[0], 1.0);
            // Where the steps do not divide the levels, the reference ends at level 0, not beyond it.
            assert!(schedule.sigmas[steps] < 0.03, "{steps}: {}", schedule.sigmas[steps]);
            assert!(schedule.sigmas[steps] == 0.0 || 1000 % steps != 0);
            assert_eq!(schedule.timesteps[0], 999.0);
            assert!(schedule.timesteps.windows(2).all(|pair| pair[1] < pair[0]));
        }
        assert!(DiffusionSchedule::new(&config(), 0).is_err());
        let error = DiffusionSchedule::new(&config(), 1001).unwrap_err().to_string();
        assert!(error.contains("1001") && error.contains("1000"), "{error}");
    }

    #[test]
    fn a_perfect_prediction_ends_in_the_data_with_either_sampler() {
        let device = Device::Cpu;
        let data = Tensor::new(&[0.5f32, -2.0, 3.0], &device).unwrap();
        let noise = Tensor::new(&[0.1f32, 0.7, -1.3], &device).unwrap();
        let schedule = DiffusionSchedule::new(&config(), 5).unwrap();
        for dpm in [false, true] {
            let (mut sample, mut earlier) = (noise.clone(), None);
            for index in 0..5 {
                let alpha = schedule.points[index].now;
                let (signal, spread) = (alpha.sqrt(), (1.0 - alpha).sqrt());
                // v of the data and whatever noise the sample holds.
                let held = ((&sample - (&data * signal).unwrap()).unwrap() / spread).unwrap();
                let v = ((held * signal).unwrap() - (&data * spread).unwrap()).unwrap();
                let step = if dpm {
                    schedule.dpm(index, &sample, &v, earlier.as_ref(), &noise).unwrap()
                } else {
                    schedule.ddim(index, &sample, &v).unwrap()
                };
                (sample, earlier) = (step.sample, Some(step.predicted));
            }
            let worst = (&sample - &data).unwrap().abs().unwrap().max_all().unwrap();
            assert!(worst.to_scalar::<f32>().unwrap() < 1e-4);
        }
        assert_eq!((0..5).map(|i| schedule.reference_draw(i)).collect::<Vec<_>>(), [0, 2, 4, 6, 7]);
    }

    #[test]
    fn settings_that_are_not_computed_are_named() {
        for value in [
            serde_json::json!({"beta_schedule": "squaredcos_cap_v2"}),
            serde_json::json!({"prediction_type": "flow"}),
            serde_json::json!({"timestep_spacing": "karras"}),
            serde_json::json!({"trained_betas": [0.1]}),
            serde_json::json!({"snr_shift_scale": -1.0}),
            serde_json::json!({"use_karras_sigmas": true}),
        ] {
            let key = value.as_object().unwrap().keys().next().unwrap().clone();
            let config: DiffusionConfig = serde_json::from_value(value).unwrap();
            assert!(config.check().unwrap_err().to_string().contains(&key));
        }
    }
}

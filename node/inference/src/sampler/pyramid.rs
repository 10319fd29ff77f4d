//! The schedule of pyramidal flow matching (Jin et al. 2024): a part of the clip is denoised in stages of growing size,
//! each a flow of its own from a noisier to a cleaner picture.
//!
//! A stage's flow goes from its local noise level 1 to 0, while the model is told timesteps of the whole flow. Between
//! stages the picture is enlarged by repeating pixels; what it then is in the next stage's flow is
//! `alpha * enlarged + beta * noise`, where the noise is correlated within each block of 2 x 2 (section 3.2 of the paper).

use serde::Deserialize;

use super::SamplerError;

/// The schedule's constants; what is left out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct PyramidConfig {
    /// Timesteps of the whole flow.
    pub num_train_timesteps: usize,
    /// Moves the noise levels towards noise.
    pub shift: f64,
    /// Where stages begin and end in the whole flow, 0 to 1, so one more than there are stages.
    pub stage_range: Vec<f64>,
    /// How strongly the noise of a block is correlated, above 0 and at most 1/3.
    pub gamma: f64,
}

impl Default for PyramidConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            stage_range: vec![0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0],
            gamma: 1.0 / 3.0,
        }
    }
}

/// A stage of the whole flow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// The noise level in the whole flow at which it begins, once it is corrected for the enlargement.
    pub start_sigma: f64,
    /// The noise level at which it ends.
    pub end_sigma: f64,
    /// `start_sigma` before the correction.
    pub original_start_sigma: f64,
    timesteps: (f64, f64),
    least_sigma: f64,
    gamma: f64,
}

/// The stages of a flow.
#[derive(Debug, Clone, PartialEq)]
pub struct PyramidSchedule {
    stages: Vec<Stage>,
    gamma: f64,
}

impl PyramidSchedule {
    /// The stages that a configuration describes.
    ///
    /// # Errors
    /// A setting with which there is no such flow.
    pub fn new(config: &PyramidConfig) -> Result<Self, SamplerError> {
        check(config)?;
        let count = config.num_train_timesteps;
        let sigmas: Vec<f32> = (1..=count).rev().map(|step| shifted(step, config)).collect();
        let bounds: Vec<usize> =
            config.stage_range.iter().map(|&at| ((at * count as f64) as usize).min(count)).collect();
        let mut ends = Vec::new();
        for (index, bound) in bounds.windows(2).enumerate() {
            let original = f64::from(sigmas[bound[0]]);
            let start = if index == 0 { original } else { corrected(original, config.gamma) };
            let end = sigmas.get(bound[1]).map_or(0.0, |&sigma| f64::from(sigma));
            ends.push((original, start, end));
        }
        let lengths: Vec<f64> = ends.iter().map(|(_, start, end)| start - end).collect();
        let whole: f64 = lengths.iter().sum();
        let timestep = |ratio: f64| {
            let place = ((ratio * count as f64) as usize).min(count - 1);
            f64::from(sigmas[place] * count as f32)
        };
        let last = ends.len() - 1;
        let stage = |(index, &(original, start, end)): (usize, &(f64, f64, f64))| {
            let share = |stages: usize| lengths[..stages].iter().sum::<f64>() / whole;
            let until = if index == last { 1.0 } else { share(index + 1) };
            let (high, low) = (timestep(share(index)), timestep(until));
            Stage {
                start_sigma: start,
                end_sigma: end,
                original_start_sigma: original,
                // The flow's last point belongs to the next stage.
                timesteps: (high, high + (low - high) / count as f64 * (count - 1) as f64),
                least_sigma: 1.0 / count as f64,
                gamma: config.gamma,
            }
        };
        Ok(Self { stages: ends.iter().enumerate().map(stage).collect(), gamma: config.gamma })
    }

    /// The stages, from the smallest and noisiest.
    #[must_use]
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// What makes four independent normals the noise of a block: they are `(spread, mean)` times their differences from
    /// their mean, and their mean.
    #[must_use]
    pub fn block_factors(&self) -> (f64, f64) {
        // Covariance (1 + g) I - g J has the value 1 - 3g along (1, 1, 1, 1) and 1 + g across.
        ((1.0 + self.gamma).sqrt(), (1.0 - 3.0 * self.gamma).max(0.0).sqrt())
    }
}

impl Stage {
    /// `steps` timesteps, 0 to 1000, from the stage's highest to its lowest.
    #[must_use]
    pub fn timesteps(&self, steps: usize) -> Vec<f64> {
        linspace(self.timesteps.0, self.timesteps.1, steps)
    }

    /// The stage's own noise levels at those timesteps, and 0.
    #[must_use]
    pub fn sigmas(&self, steps: usize) -> Vec<f64> {
        let mut sigmas = linspace(1.0, self.least_sigma, steps);
        sigmas.push(0.0);
        sigmas
    }

    /// The noise level in the whole flow of one of the stage's own.
    #[must_use]
    pub fn level(&self, sigma: f64) -> f64 {
        self.end_sigma + sigma * (self.start_sigma - self.end_sigma)
    }

    /// `alpha` and `beta`: what the enlarged picture of the stage before and block noise become part of the flow by.
    #[must_use]
    pub fn entry(&self) -> (f64, f64) {
        let signal = 1.0 - self.original_start_sigma;
        let alpha = 1.0 / ((1.0 + 1.0 / self.gamma).sqrt() * (1.0 - signal) + signal);
        (alpha, alpha * (1.0 - signal) / self.gamma.sqrt())
    }
}

fn check(config: &PyramidConfig) -> Result<(), SamplerError> {
    let fault = |key: &str, value: String, reason: &str| {
        Err(SamplerError::Setting { key: key.to_owned(), value, reason: reason.to_owned() })
    };
    if config.num_train_timesteps < 2 {
        return fault("num_train_timesteps", config.num_train_timesteps.to_string(), "at least 2 are needed");
    }
    if !(config.shift.is_finite() && config.shift > 0.0) {
        return fault("shift", config.shift.to_string(), "it must be above 0");
    }
    if !(config.gamma > 0.0 && config.gamma <= 1.0 / 3.0) {
        return fault("gamma", config.gamma.to_string(), "it must be above 0 and at most 1/3");
    }
    let range = &config.stage_range;
    let rises = range.windows(2).all(|pair| pair[0] < pair[1]);
    if range.len() < 2 || !rises || range.first() != Some(&0.0) || range.last() != Some(&1.0) {
        return fault("stage_range", format!("{range:?}"), "it must rise from 0 to 1");
    }
    Ok(())
}

/// The noise level of a timestep in the whole flow, in the reference's f32.
fn shifted(timestep: usize, config: &PyramidConfig) -> f32 {
    let sigma = timestep as f32 / config.num_train_timesteps as f32;
    let shift = config.shift as f32;
    shift * sigma / (1.0 + (config.shift - 1.0) as f32 * sigma)
}

/// A stage begins cleaner than it would in the whole flow: enlarging takes noise away.
fn corrected(sigma: f64, gamma: f64) -> f64 {
    let signal = 1.0 - sigma;
    1.0 - signal / ((1.0 + 1.0 / gamma).sqrt() * (1.0 - signal) + signal)
}

/// `count` numbers from `first` to `last`.
fn linspace(first: f64, last: f64, count: usize) -> Vec<f64> {
    let step = (last - first) / (count.max(2) - 1) as f64;
    let at = |index: usize| if index > 0 && index + 1 == count { last } else { first + step * index as f64 };
    (0..count).map(at).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_stage_begins_where_the_enlarged_end_of_the_one_before_lies() {
        let schedule = PyramidSchedule::new(&PyramidConfig::default()).unwrap();
        let stages = schedule.stages();
        assert_eq!(stages.len(), 3);
        for pair in stages.windows(2) {
            let (alpha, beta) = pair[1].entry();
            // The picture's own noise, now the same over a block, and the block noise add up as independent ones do.
            let signal = alpha * (1.0 - pair[0].end_sigma);
            assert!((signal - (1.0 - pair[1].start_sigma)).abs() < 1e-9);
            let noise = (alpha * pair[0].end_sigma).hypot(beta);
            assert!((noise - pair[1].start_sigma).abs() < 1e-6, "{noise} {}", pair[1].start_sigma);
        }
        assert_eq!(stages[2].end_sigma, 0.0);
    }

    #[test]
    fn block_noise_has_the_covariance_of_the_paper() {
        let (spread, mean) = PyramidSchedule::new(&PyramidConfig::default()).unwrap().block_factors();
        let factor = |i: usize, j: usize| spread * (f64::from(u8::from(i == j)) - 0.25) + mean * 0.25;
        let covariance = |i: usize, j: usize| (0..4).map(|k| factor(i, k) * factor(j, k)).sum::<f64>();
        assert!((covariance(0, 0) - 1.0).abs() < 1e-9);
        assert!((covariance(0, 3) + 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn settings_without_a_flow_are_refused_by_name() {
        let refused = |config: PyramidConfig, key: &str| {
            let error = PyramidSchedule::new(&config).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        };
        let usual = PyramidConfig::default();
        refused(PyramidConfig { gamma: 0.5, ..usual.clone() }, "gamma");
        refused(PyramidConfig { shift: f64::NAN, ..usual.clone() }, "shift");
        refused(PyramidConfig { num_train_timesteps: 1, ..usual.clone() }, "num_train_timesteps");
        refused(PyramidConfig { stage_range: vec![0.0, 0.5, 0.5, 1.0], ..usual }, "stage_range");
    }
}

//! `scheduler_config.json` of UniPC, and what of it this engine computes.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::sampler::SamplerError;
use crate::sampler::flow_match::means_something;

/// `scheduler_config.json`; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct UniPcConfig {
    /// The timestep at sigma 1.
    pub num_train_timesteps: usize,
    /// Clean samples that a prediction is made from, at most.
    pub solver_order: usize,
    /// `flow_prediction`.
    pub prediction_type: String,
    /// Whether the solver works on clean samples; true.
    pub predict_x0: bool,
    /// `bh1` or `bh2`: which `B(h)` of the paper.
    pub solver_type: String,
    /// Whether the order falls to 1 towards the end.
    pub lower_order_final: bool,
    /// Steps whose prediction is not corrected.
    pub disable_corrector: Vec<usize>,
    /// Whether sigmas are those of flow matching; true.
    pub use_flow_sigmas: bool,
    /// The constant shift of the sigmas.
    pub flow_shift: f64,
    /// What follows the last sigma: `zero`, or `sigma_min` for the same once more.
    pub final_sigmas_type: String,
    /// What this engine has no name for.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for UniPcConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            solver_order: 2,
            prediction_type: "epsilon".to_owned(),
            predict_x0: true,
            solver_type: "bh2".to_owned(),
            lower_order_final: true,
            disable_corrector: Vec::new(),
            use_flow_sigmas: false,
            flow_shift: 1.0,
            final_sigmas_type: "zero".to_owned(),
            others: Map::new(),
        }
    }
}

/// The highest order: the linear systems of higher ones are too ill-conditioned for f32.
pub(super) const MOST_ORDER: usize = 4;

/// Settings of other noise schedules and of thresholding, without effect where sigmas are those of flow matching.
const WITHOUT_EFFECT: [&str; 10] = [
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "time_shift_type",
];

impl UniPcConfig {
    /// Refuses what this engine does not compute.
    ///
    /// # Errors
    /// The first such setting.
    pub fn check(&self) -> std::result::Result<(), SamplerError> {
        let texts: [(&str, &str, &[&str]); 3] = [
            ("prediction_type", &self.prediction_type, &["flow_prediction"]),
            ("solver_type", &self.solver_type, &["bh1", "bh2"]),
            ("final_sigmas_type", &self.final_sigmas_type, &["zero", "sigma_min"]),
        ];
        for (key, value, known) in texts {
            if !known.contains(&value) {
                return Err(setting(key, value, format!("known are {}", known.join(", "))));
            }
        }
        for (key, on) in [("predict_x0", self.predict_x0), ("use_flow_sigmas", self.use_flow_sigmas)] {
            if !on {
                return Err(setting(key, "false", "only true is known"));
            }
        }
        if !(1..=MOST_ORDER).contains(&self.solver_order) {
            return Err(setting("solver_order", self.solver_order, format!("1 to {MOST_ORDER} are known")));
        }
        if self.num_train_timesteps == 0 || !(self.flow_shift.is_finite() && self.flow_shift > 0.0) {
            return Err(setting(
                "flow_shift",
                self.flow_shift,
                "it must be above 0, over at least 1 timestep",
            ));
        }
        let class = self.others.get("_class_name").and_then(Value::as_str);
        if let Some(class) = class.filter(|&class| class != "UniPCMultistepScheduler") {
            return Err(setting("_class_name", class, "only UniPCMultistepScheduler is known"));
        }
        let strange = self.others.iter().find(|(key, value)| {
            !key.starts_with('_') && !WITHOUT_EFFECT.contains(&key.as_str()) && means_something(value)
        });
        match strange {
            Some((key, value)) => Err(setting(key, value, "this setting is not known")),
            None => Ok(()),
        }
    }
}

fn setting(key: &str, value: impl ToString, reason: impl ToString) -> SamplerError {
    SamplerError::Setting { key: key.to_owned(), value: value.to_string(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn settings_that_are_not_computed_are_refused_by_name() {
        for (text, said) in [
            (r#"{"prediction_type": "epsilon"}"#, "prediction_type is epsilon"),
            (r#"{"solver_type": "bh3"}"#, "solver_type is bh3"),
            (r#"{"solver_order": 9}"#, "solver_order is 9"),
            (r#"{"use_karras_sigmas": true}"#, "use_karras_sigmas is true"),
            (r#"{"use_flow_sigmas": false}"#, "use_flow_sigmas is false"),
            (r#"{"thresholding": true}"#, "thresholding is true"),
        ] {
            let mut value =
                serde_json::json!({"prediction_type": "flow_prediction", "use_flow_sigmas": true});
            let changes: Map<String, Value> = serde_json::from_str(text).unwrap();
            value.as_object_mut().unwrap().extend(changes);
            let config: UniPcConfig = serde_json::from_value(value).unwrap();
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}

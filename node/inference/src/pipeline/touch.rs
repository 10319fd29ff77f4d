//! Latent space, open: what a request changes inside a run. Where the run begins, what of it comes back, which blocks are
//! computed how often, how strong guidance is at each step, what is done to the latents' channels, and what is mixed into
//! prompt and noise.
//!
//! Nothing here is kept within sensible bounds: a weight of 3 goes beyond the second prompt, a negative guidance flees the
//! prompt. Refused is what has no meaning at all: a block, a channel or a step that is not there.

mod channels;
mod check;
mod digest;
mod mix;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

pub use channels::Channels;
pub(crate) use check::check;
pub(crate) use digest::digest;
pub use mix::{Embeds, Way, mix};
pub(crate) use mix::{noise, prompt};

use super::GenerateRequest;
use crate::error::Error;
pub use crate::nn::route::Route;

/// Most bytes of steps' latents that come back from one run (256 MiB): as much as a job may bring.
pub const MAX_KEPT_BYTES: usize = 256 << 20;

/// What a request changes inside a run; nothing by default.
#[derive(Debug, Clone, Default)]
pub struct Touch {
    /// Go on within the schedule from given latents.
    pub start: Option<Start>,
    /// Compute no step: these final latents become frames, `[1, C, F, H, W]` or in the model's own shape.
    pub decode_only: Option<Tensor>,
    /// What comes back beside the final latents.
    pub keep: Keep,
    /// Points through which guidance goes from the first step to the last, evenly spread, on lines between them; as many
    /// as there are steps are one for each. Empty for the request's guidance. Unlike that, values below 1 are meant as
    /// they are: 0 is what the negative prompt gives alone.
    pub guidance: Vec<f64>,
    /// Which of the transformer's blocks are computed, and how often.
    pub route: Route,
    /// What is done to the latents' channels.
    pub channels: Channels,
    /// A second prompt, mixed into the embeddings of the first.
    pub prompt: Option<PromptMix>,
    /// A second seed, mixed into the noise of the first.
    pub noise: Option<NoiseMix>,
}

/// Latents from within a run.
#[derive(Debug, Clone)]
pub struct Start {
    /// Steps that lie behind them.
    pub done: usize,
    /// The latents, in the shape in which the model keeps them at that step.
    pub latents: Tensor,
    /// What the sampler remembers of the steps before; a sampler of several steps begins anew where it is empty.
    pub memory: BTreeMap<String, Tensor>,
}

/// What comes back beside the final latents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keep {
    /// The noise that the run begins with, as [`GenerateRequest::initial_latents`] takes it.
    pub noise: bool,
    /// The latents after so many steps, with what the sampler remembers then.
    pub steps: BTreeSet<usize>,
}

/// A second prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptMix {
    /// Its words.
    pub prompt: String,
    /// 0 is the first prompt alone, 1 the second.
    pub weight: f64,
    /// The way from one to the other.
    pub way: Way,
}

/// A second seed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseMix {
    /// Whose noise.
    pub seed: u64,
    /// 0 is the first noise alone, 1 the second.
    pub weight: f64,
    /// The way from one to the other: a sphere keeps noise as strong as noise is.
    pub way: Way,
}

/// The name of the noise among what comes back.
pub const NOISE: &str = "noise";
/// The name of the final latents beside it.
pub const FINAL: &str = "final";

/// The name of the latents after so many steps.
#[must_use]
pub fn step_name(done: usize) -> String {
    format!("step_{done}")
}

/// What comes before the names of what a sampler remembers after so many steps.
#[must_use]
pub fn memory_prefix(done: usize) -> String {
    format!("step_{done}.memory.")
}

impl GenerateRequest {
    /// Whether the negative prompt is used.
    #[must_use]
    pub fn is_guided(&self) -> bool {
        let curve = &self.touch.guidance;
        if curve.is_empty() { self.guidance > 1.0 } else { curve.iter().any(|point| *point != 1.0) }
    }

    /// The guidance of step `index` of so many: the curve's, where there is one, else `plain`.
    #[must_use]
    pub fn guidance_at(&self, index: usize, steps: usize, plain: f64) -> f64 {
        let curve = &self.touch.guidance;
        match curve.as_slice() {
            [] => plain,
            [only] => *only,
            _ if curve.len() == steps => curve[index],
            [.., last] => {
                let place = index as f64 * (curve.len() - 1) as f64 / (steps.max(2) - 1) as f64;
                let before = place as usize;
                let Some(next) = curve.get(before + 1) else { return *last };
                curve[before] + (next - curve[before]) * (place - before as f64)
            }
        }
    }

    /// The step at which a sampler of several steps has nothing behind it, in a run of so many steps.
    ///
    /// # Errors
    /// When a second pass is left without a step.
    pub(crate) fn fresh_at(&self, steps: usize) -> Result<usize, Error> {
        match (&self.touch.start, &self.second_pass) {
            (Some(start), _) if start.memory.is_empty() => Ok(start.done.min(steps)),
            (None, Some(second)) => Ok(steps - second.steps_of(steps)?),
            _ => Ok(0),
        }
    }
}

/// An operation that this request or model cannot have.
pub(crate) fn fault(op: &'static str, reason: impl Into<String>) -> Error {
    Error::Operation { op, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Defaults;

    const DEFAULTS: Defaults = Defaults { width: 8, height: 8, frames: 1, fps: 8.0, steps: 5, guidance: 4.0 };

    fn curve(points: &[f64], steps: usize) -> Vec<f64> {
        let mut request = GenerateRequest::new("", &DEFAULTS);
        request.touch.guidance = points.to_vec();
        (0..steps).map(|index| request.guidance_at(index, steps, request.guidance)).collect()
    }

    #[test]
    fn a_curve_goes_through_its_points_whatever_the_number_of_steps() {
        assert_eq!(curve(&[], 2), [4.0, 4.0]);
        assert_eq!(curve(&[7.0], 3), [7.0; 3]);
        assert_eq!(curve(&[6.0, 2.0], 5), [6.0, 5.0, 4.0, 3.0, 2.0]);
        assert_eq!(curve(&[1.0, -3.0, 9.0], 3), [1.0, -3.0, 9.0]);
        assert_eq!(curve(&[1.0, 2.0, 3.0, 4.0, 5.0], 3), [1.0, 3.0, 5.0]);
        assert_eq!(curve(&[0.1; 4], 7), [0.1; 7]);
        assert_eq!(curve(&[5.0, 9.0], 1), [5.0]);
    }

    #[test]
    fn a_curve_that_is_1_everywhere_is_no_guidance_and_one_below_1_is_meant() {
        let mut request = GenerateRequest::new("", &DEFAULTS);
        assert!(request.is_guided());
        request.touch.guidance = vec![1.0, 1.0];
        assert!(!request.is_guided());
        request.touch.guidance = vec![1.0, 0.5];
        assert!(request.is_guided());
    }
}

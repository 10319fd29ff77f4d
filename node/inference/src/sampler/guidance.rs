//! Classifier-free guidance: away from what the negative prompt gives, towards what the prompt gives.

use std::cell::Cell;
use std::rc::Rc;

use candle_core::{Device, Result, Tensor};

use crate::error::Error;

/// How a model that can do either computes guidance's two predictions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GuidancePasses {
    /// Together where a device gains by it and has the memory; on the CPU apart.
    #[default]
    Auto,
    /// In one batch, unless the device has not the memory.
    Together,
    /// One after the other, which takes less memory.
    Apart,
}

impl GuidancePasses {
    /// Whether they go together on the CPU or on another device.
    #[must_use]
    pub fn are_together(self, on_cpu: bool) -> bool {
        match self {
            Self::Auto => !on_cpu,
            Self::Together => true,
            Self::Apart => false,
        }
    }
}

/// Guidance's two predictions over a run. What the device has no memory for as one batch is computed one by one, from
/// then on; a clone knows of it.
#[derive(Debug, Clone)]
pub struct Passes {
    together: Rc<Cell<bool>>,
}

impl Passes {
    /// For a run on `device`.
    #[must_use]
    pub fn new(wanted: GuidancePasses, device: &Device) -> Self {
        Self { together: Rc::new(Cell::new(wanted.are_together(device.is_cpu()))) }
    }

    /// Whether the next predictions are tried as one batch.
    #[must_use]
    pub fn is_together(&self) -> bool {
        self.together.get()
    }

    /// Negative and positive prediction: the two entries of what `both` gives, or what `one` gives of 0 and 1.
    ///
    /// # Errors
    /// What they give, but for [`Error::OutOfMemory`] of `both`.
    pub fn predict(
        &self,
        both: impl FnOnce() -> std::result::Result<Tensor, Error>,
        one: impl Fn(usize) -> std::result::Result<Tensor, Error>,
    ) -> std::result::Result<[Tensor; 2], Error> {
        if self.together.get() {
            let both = both();
            #[cfg(test)]
            let both = simulated::room(both);
            match both {
                Ok(both) => return Ok([both.narrow(0, 0, 1)?, both.narrow(0, 1, 1)?]),
                Err(Error::OutOfMemory { .. }) => self.together.set(false),
                Err(other) => return Err(other),
            }
        }
        Ok([one(0)?, one(1)?])
    }
}

/// `negative + scale * (positive - negative)`.
///
/// # Errors
/// When the shapes differ.
pub fn guide(negative: &Tensor, positive: &Tensor, scale: f64) -> Result<Tensor> {
    negative + ((positive - negative)? * scale)?
}

/// Scales a guided prediction towards the spread of the unguided one, per sample ("Common Diffusion Noise Schedules and
/// Sample Steps are Flawed", section 3.4): `amount` 1 takes the spread over, 0 changes nothing.
///
/// # Errors
/// When the shapes differ.
pub fn rescale(guided: &Tensor, positive: &Tensor, amount: f64) -> Result<Tensor> {
    let ratio = spread(positive)?.div(&spread(guided)?)?;
    (guided.broadcast_mul(&ratio)? * amount)? + (guided * (1.0 - amount))?
}

/// The standard deviation (with n - 1) of each sample, `[B, 1, ...]`.
fn spread(x: &Tensor) -> Result<Tensor> {
    let batch = x.dim(0)?;
    let flat = x.flatten_from(1)?;
    let count = flat.dim(1)?;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
    let variance = (centred.sqr()?.sum_keepdim(1)? / (count.max(2) - 1) as f64)?;
    let mut shape = vec![1; x.rank()];
    shape[0] = batch;
    variance.sqrt()?.reshape(shape)
}

/// A device that has no room for two texts.
#[cfg(test)]
pub(crate) mod simulated {
    use super::{Cell, Error, Tensor};

    thread_local! {
        /// Where it is simulated in this thread, how often that was found out.
        pub(crate) static FULL: Cell<Option<usize>> = const { Cell::new(None) };
    }

    pub(super) fn room(both: Result<Tensor, Error>) -> Result<Tensor, Error> {
        let Some(found) = FULL.get() else { return both };
        FULL.set(Some(found + 1));
        both.and(Err(Error::OutOfMemory { during: "computing", detail: "no room for two".to_owned() }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_does_not_fit_as_one_batch_is_computed_apart_from_then_on() {
        let passes = Passes::new(GuidancePasses::Together, &Device::Cpu);
        let tried = Cell::new(0);
        let one = |entry: usize| Ok(Tensor::full(entry as f32, (1, 2), &Device::Cpu)?);
        for _ in 0..3 {
            let both = || {
                tried.set(tried.get() + 1);
                Err(Error::OutOfMemory { during: "computing", detail: "too much".to_owned() })
            };
            let [negative, positive] = passes.predict(both, one).unwrap();
            assert_eq!(negative.to_vec2::<f32>().unwrap(), [[0.0, 0.0]]);
            assert_eq!(positive.to_vec2::<f32>().unwrap(), [[1.0, 1.0]]);
        }
        assert_eq!(tried.get(), 1);
        let passes = Passes::new(GuidancePasses::Together, &Device::Cpu);
        let fails = || Err(Error::Cancelled { steps_done: 0, steps: 1 });
        assert!(passes.predict(fails, one).is_err(), "other failures are no reason to go on");
    }

    #[test]
    fn a_full_rescale_takes_the_spread_of_the_prediction_over() {
        let positive = Tensor::new(&[[1.0f32, 2.0, 4.0], [0.0, 1.0, -1.0]], &Device::Cpu).unwrap();
        let guided = (&positive * 7.0).unwrap();
        let back = rescale(&guided, &positive, 1.0).unwrap().to_vec2::<f32>().unwrap();
        let want = positive.to_vec2::<f32>().unwrap();
        for (a, b) in back.iter().flatten().zip(want.iter().flatten()) {
            assert!((a - b).abs() < 1e-5);
        }
        let same = rescale(&guided, &positive, 0.0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(same, guided.to_vec2::<f32>().unwrap());
    }
}

//! UniPC for flow matching (Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
//! Models", 2023; diffusers' `UniPCMultistepScheduler` with `flow_prediction` and `use_flow_sigmas`).
//!
//! A model predicts the velocity `noise - data`; the clean sample is `x - sigma * velocity`. With `alpha = 1 - sigma` and
//! `lambda = ln(alpha / sigma)`, a step first corrects the sample that the last step predicted, now that the model was
//! asked there ([`UniPc::step`], "UniC"), and then predicts the next one from the clean samples so far ("UniP"). The
//! first steps have too little behind them for the full order, and the last ones go down to order 1.
//!
//! The scalars are computed in f32 in the reference's order: `h_phi_k` cancels, so that a last bit shows.

mod config;

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use config::MOST_ORDER;
pub use config::UniPcConfig;

use super::SamplerError;

/// The points of one run, and the rule that goes from one to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct UniPc {
    /// Noise levels, one more than there are steps.
    pub sigmas: Vec<f32>,
    /// What the model is told at each step: whole numbers.
    pub timesteps: Vec<f32>,
    order: usize,
    bh1: bool,
    lower_order_final: bool,
    disable_corrector: Vec<usize>,
    /// The step before which nothing lies.
    first: usize,
}

/// What a step needs of the steps before.
#[derive(Debug, Clone, Default)]
pub struct UniPcState {
    /// The sample, corrected, that the last step predicted from.
    pub last_sample: Option<Tensor>,
    /// Clean samples that the model predicted, the newest last; as many as the order at most.
    pub clean: Vec<Tensor>,
}

impl UniPcState {
    /// The tensors with their names, for a checkpoint.
    #[must_use]
    pub fn into_memory(self) -> BTreeMap<String, Tensor> {
        let clean = self.clean.into_iter().enumerate().map(|(i, tensor)| (format!("clean.{i}"), tensor));
        clean.chain(self.last_sample.map(|last| (LAST_SAMPLE.to_owned(), last))).collect()
    }

    /// Takes what [`UniPcState::into_memory`] gave; `None` where it is not of that form.
    #[must_use]
    pub fn from_memory(memory: &BTreeMap<String, Tensor>) -> Option<Self> {
        let last_sample = memory.get(LAST_SAMPLE).cloned();
        let clean: Vec<Tensor> =
            (0..MOST_ORDER).map_while(|i| memory.get(&format!("clean.{i}")).cloned()).collect();
        let known = clean.len() + usize::from(last_sample.is_some());
        let goes_together = last_sample.is_some() != clean.is_empty();
        (known == memory.len() && goes_together).then_some(Self { last_sample, clean })
    }
}

const LAST_SAMPLE: &str = "last_sample";

impl UniPc {
    /// Computes the points of a run of `steps` steps.
    ///
    /// # Errors
    /// When no step is asked for, or the configuration has a setting that is not computed here.
    pub fn new(config: &UniPcConfig, steps: usize) -> std::result::Result<Self, SamplerError> {
        config.check()?;
        if steps == 0 {
            return Err(SamplerError::Empty);
        }
        let (train, shift) = (config.num_train_timesteps as f64, config.flow_shift);
        let stride = (1.0 / train - 1.0) / steps as f64;
        let point = |i: usize| {
            let alpha = if i == steps { 1.0 / train } else { 1.0 + i as f64 * stride };
            let sigma = 1.0 - alpha;
            shift * sigma / (1.0 + (shift - 1.0) * sigma)
        };
        let exact: Vec<f64> = (1..=steps).rev().map(point).collect();
        let timesteps = exact.iter().map(|sigma| (sigma * train).trunc() as f32).collect();
        let mut sigmas: Vec<f32> = exact.iter().map(|&sigma| sigma as f32).collect();
        let last = if config.final_sigmas_type == "zero" { 0.0 } else { sigmas[steps - 1] };
        sigmas.push(last);
        Ok(Self {
            sigmas,
            timesteps,
            order: config.solver_order,
            bh1: config.solver_type == "bh1",
            lower_order_final: config.lower_order_final,
            disable_corrector: config.disable_corrector.clone(),
            first: 0,
        })
    }

    /// The same points, of a run that begins at step `first` with nothing behind it.
    #[must_use]
    pub fn fresh_at(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// Steps of the run.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// The sample after step `index`, from the sample before it and the model's output there; all in f32. The state is
    /// that after step `index - 1`, empty before the first.
    ///
    /// # Errors
    /// When shapes differ or the state is not that of this step.
    pub fn step(
        &self,
        state: &mut UniPcState,
        index: usize,
        sample: &Tensor,
        output: &Tensor,
    ) -> Result<Tensor> {
        let held = index.saturating_sub(self.first).min(self.order);
        if state.clean.len() != held || state.last_sample.is_some() != (index > self.first) {
            candle_core::bail!("step {index} was given a state of {} clean samples", state.clean.len());
        }
        let clean = (sample - (output * f64::from(self.sigmas[index]))?)?;
        let sample = match &state.last_sample {
            Some(last) if !self.disable_corrector.contains(&(index - 1)) => {
                self.correct(index - 1, last, &clean, &state.clean)?
            }
            _ => sample.clone(),
        };
        if state.clean.len() == self.order {
            state.clean.remove(0);
        }
        state.clean.push(clean);
        let next = self.predict(index, &sample, &state.clean)?;
        state.last_sample = Some(sample);
        Ok(next)
    }

    /// How many clean samples step `index` goes by. With a last sigma of 0 the last step has one whatever the settings
    /// say: `lambda` is infinite there, and the reference divides by it.
    fn order_at(&self, index: usize) -> usize {
        let left = self.steps() - index;
        let falls = self.lower_order_final || (left == 1 && self.sigmas[index + 1] == 0.0);
        let most = if falls { self.order.min(left) } else { self.order };
        most.min((index + 1).saturating_sub(self.first).max(1))
    }

    /// UniP: from the newest clean sample and those before it to the sample at the next point.
    fn predict(&self, index: usize, sample: &Tensor, clean: &[Tensor]) -> Result<Tensor> {
        let order = self.order_at(index);
        let step = self.coefficients(index, order);
        let base = step.base(sample, &clean[clean.len() - 1])?;
        let Some(slopes) = slopes(&step, clean)? else { return Ok(base) };
        let weights = match order {
            // The paper's simplification for order 2.
            2 => vec![0.5],
            _ => solve(&step.powers(order - 1), &step.targets[..order - 1]),
        };
        base - (weighted(&slopes, &weights)? * f64::from(step.factor))?
    }

    /// UniC: step `index` once more, with the clean sample that the model predicted at its end.
    fn correct(&self, index: usize, last: &Tensor, at_end: &Tensor, clean: &[Tensor]) -> Result<Tensor> {
        let order = self.order_at(index);
        let step = self.coefficients(index, order);
        let newest = &clean[clean.len() - 1];
        let base = step.base(last, newest)?;
        let mut slopes = slopes(&step, clean)?.unwrap_or_default();
        slopes.push((at_end - newest)?);
        let weights = match order {
            1 => vec![0.5],
            _ => solve(&step.powers(order), &step.targets),
        };
        base - (weighted(&slopes, &weights)? * f64::from(step.factor))?
    }

    fn coefficients(&self, index: usize, order: usize) -> Coefficients {
        let lambda = |sigma: f32| (1.0 - sigma).ln() - sigma.ln();
        let (from, to) = (self.sigmas[index], self.sigmas[index + 1]);
        let start = lambda(from);
        let h = lambda(to) - start;
        let mut ratios: Vec<f32> =
            (1..order).map(|back| (lambda(self.sigmas[index - back]) - start) / h).collect();
        ratios.push(1.0);
        let negative = -h;
        let first = negative.exp_m1();
        let b = if self.bh1 { negative } else { negative.exp_m1() };
        let mut phi = first / negative - 1.0;
        let mut factorial = 1.0f32;
        let mut targets = Vec::with_capacity(order);
        for i in 1..=order {
            targets.push(phi * factorial / b);
            factorial *= (i + 1) as f32;
            phi = phi / negative - 1.0 / factorial;
        }
        Coefficients {
            of_sample: to / from,
            of_clean: (1.0 - to) * first,
            factor: (1.0 - to) * b,
            ratios,
            targets,
        }
    }
}

/// The scalars of one step.
struct Coefficients {
    of_sample: f32,
    of_clean: f32,
    factor: f32,
    /// Where the earlier clean samples lie, in steps, and 1 for the step's end.
    ratios: Vec<f32>,
    targets: Vec<f32>,
}

impl Coefficients {
    fn base(&self, sample: &Tensor, clean: &Tensor) -> Result<Tensor> {
        (sample * f64::from(self.of_sample))? - (clean * f64::from(self.of_clean))?
    }

    /// The powers 0 to `order - 1` of the first `order` ratios.
    fn powers(&self, order: usize) -> Vec<Vec<f32>> {
        (0..order).map(|power| self.ratios[..order].iter().map(|r| r.powi(power as i32)).collect()).collect()
    }
}

/// Differences of earlier clean samples from the newest, per step; `None` where the order needs none.
fn slopes(step: &Coefficients, clean: &[Tensor]) -> Result<Option<Vec<Tensor>>> {
    let newest = clean.len() - 1;
    let earlier = &step.ratios[..step.ratios.len() - 1];
    let slopes: Vec<Tensor> = earlier
        .iter()
        .enumerate()
        .map(|(i, &ratio)| (&clean[newest - 1 - i] - &clean[newest])? / f64::from(ratio))
        .collect::<Result<_>>()?;
    Ok((!slopes.is_empty()).then_some(slopes))
}

fn weighted(tensors: &[Tensor], weights: &[f32]) -> Result<Tensor> {
    let mut sum = (&tensors[0] * f64::from(weights[0]))?;
    for (tensor, &weight) in tensors[1..].iter().zip(&weights[1..]) {
        sum = (sum + (tensor * f64::from(weight))?)?;
    }
    Ok(sum)
}

/// Solves a small square system by elimination with row exchanges, in f32.
fn solve(matrix: &[Vec<f32>], right: &[f32]) -> Vec<f32> {
    let n = right.len();
    let mut rows: Vec<Vec<f32>> =
        matrix.iter().zip(right).map(|(row, &b)| row.iter().copied().chain([b]).collect()).collect();
    for column in 0..n {
        let pivot = (column..n).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
        rows.swap(column, pivot.unwrap_or(column));
        let (done, left) = rows.split_at_mut(column + 1);
        let pivot = &done[column];
        for row in left {
            let factor = row[column] / pivot[column];
            row.iter_mut().zip(pivot).for_each(|(x, p)| *x -= factor * p);
        }
    }
    let mut x = vec![0f32; n];
    for row in (0..n).rev() {
        let known: f32 = rows[row][row + 1..n].iter().zip(&x[row + 1..]).map(|(a, b)| a * b).sum();
        x[row] = (rows[row][n] - known) / rows[row][row];
    }
    x
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    fn wan(order: usize) -> UniPcConfig {
        UniPcConfig {
            prediction_type: "flow_prediction".to_owned(),
            use_flow_sigmas: true,
            flow_shift: 3.0,
            solver_order: order,
            ..UniPcConfig::default()
        }
    }

    /// Runs along `dx/dsigma = velocity` for a data point that does not depend on the noise: every order is exact.
    #[test]
    fn a_model_that_knows_the_clean_sample_is_followed_to_it() {
        let clean = Tensor::new(&[0.5f32, -1.0, 2.0], &Device::Cpu).unwrap();
        for (order, steps) in [(1, 4), (2, 1), (2, 7), (3, 8), (3, 2)] {
            let sampler = UniPc::new(&wan(order), steps).unwrap();
            let mut state = UniPcState::default();
            let mut x = Tensor::new(&[1.0f32, 1.0, 1.0], &Device::Cpu).unwrap();
            for index in 0..steps {
                let velocity = ((&x - &clean).unwrap() / f64::from(sampler.sigmas[index])).unwrap();
                x = sampler.step(&mut state, index, &x, &velocity).unwrap();
            }
            let (ours, want) = (x.to_vec1::<f32>().unwrap(), clean.to_vec1::<f32>().unwrap());
            assert!(ours.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-4), "{order} {steps}: {ours:?}");
        }
    }

    #[test]
    fn a_state_goes_on_from_its_tensors_and_strange_tensors_are_refused() {
        let sampler = UniPc::new(&wan(2), 5).unwrap();
        let mut state = UniPcState::default();
        let mut x = Tensor::new(&[1.0f32, -2.0], &Device::Cpu).unwrap();
        for index in 0..5 {
            let mut other = UniPcState::from_memory(&state.clone().into_memory()).unwrap();
            let output = (&x * 0.3).unwrap();
            let there = sampler.step(&mut other, index, &x, &output).unwrap();
            x = sampler.step(&mut state, index, &x, &output).unwrap();
            assert_eq!(there.to_vec1::<f32>().unwrap(), x.to_vec1::<f32>().unwrap());
        }
        assert!(matches!(UniPc::new(&wan(2), 0), Err(SamplerError::Empty)));
        for name in ["clean.1", "momentum", "last_sample"] {
            assert!(UniPcState::from_memory(&BTreeMap::from([(name.to_owned(), x.clone())])).is_none());
        }
        assert!(sampler.step(&mut UniPcState::default(), 3, &x, &x).is_err());
    }
}

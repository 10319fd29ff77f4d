//! Looking at one step of a run that somebody else computed: how far is it from what the model computes here?
//!
//! A step of a flow-matching sampler is `after = before + change * output`. So from the latents before and after a step
//! the model output that its maker used is recovered, and compared with the output computed here from the same latents:
//! [`deviation`], relative to the output's size. Errors do not add up over a run, because each step is looked at from its
//! maker's own latents. What is left between honest machines is rounding; [`tolerance`] says how much.

use candle_core::{DType, Tensor};

use crate::error::Error;
use crate::frames::RgbFrames;

/// What a run commits to beside its latents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commitment {
    /// blake3 of everything that the steps depend on, the model aside.
    pub conditioning: [u8; 32],
    /// blake3 of the sampler's state before the first step and after each: its schedule and the place in it.
    pub samplers: Vec<[u8; 32]>,
}

/// One step, computed here.
#[derive(Debug, Clone)]
pub struct Transition {
    /// The model's output, guided: packed `[1, tokens, C]`, f32, on the CPU.
    pub output: Tensor,
    /// By how much the noise level changes in the step.
    pub change: f32,
}

impl Transition {
    /// The latents after the step.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn apply(&self, before: &Tensor) -> Result<Tensor, Error> {
        Ok((before + (&self.output * f64::from(self.change))?)?)
    }

    /// How far the output that was used between these latents is from the one computed here: the norm of the difference
    /// over the norm of the latter. Infinite where that cannot be said.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn deviation(&self, before: &Tensor, after: &Tensor) -> Result<f64, Error> {
        let used = ((after.to_dtype(DType::F64)? - before.to_dtype(DType::F64)?)? / f64::from(self.change))?;
        let here = self.output.to_dtype(DType::F64)?;
        let norm = |tensor: &Tensor| tensor.sqr()?.sum_all()?.to_scalar::<f64>().map(f64::sqrt);
        let relative = norm(&(used - &here)?)? / norm(&here)?;
        Ok(if relative.is_finite() { relative } else { f64::INFINITY })
    }
}

/// Root mean square of the difference of two clips' pixels, of 255. Infinite where their sizes differ.
#[must_use]
pub fn frames_deviation(a: &RgbFrames, b: &RgbFrames) -> f64 {
    let is_same = (a.width, a.height, a.count) == (b.width, b.height, b.count);
    if !is_same || a.data.is_empty() {
        return f64::INFINITY;
    }
    let squares: f64 = a.data.iter().zip(&b.data).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
    (squares / a.data.len() as f64).sqrt()
}

/// In which numbers two machines compute: the coarser of maker's and auditor's decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Precision {
    /// f32 on both sides, whatever kernels.
    Full,
    /// bf16 or f16 on either side.
    Half,
}

impl Precision {
    /// That of two number formats.
    #[must_use]
    pub fn of(maker: DType, auditor: DType) -> Self {
        if maker == DType::F32 && auditor == DType::F32 { Self::Full } else { Self::Half }
    }
}

/// How far an honest step may be off ([`Transition::deviation`]).
///
/// | maker and auditor | honest, greatest | tolerance | least cheat that is caught |
/// |---|---|---|---|
/// | f32 and f32, CPU, 1 or 2 threads, either kernels | 3e-6 | 3e-5 | 7e-3, weights of 8 bits |
/// | f32 and bf16, CPU | 4e-2 | 1e-1 | 4e-1, a layer left out |
///
/// Measured with the bundled model by
/// `cargo test --workspace --test audit -- --ignored --nocapture calibration`, which prints the histograms. Between f32
/// and bf16 weights of 8 bits, a step skipped and every other step skipped lie within ten times of honest rounding and
/// count as undetectable: who wants to catch them audits in the maker's numbers. Device classes other than the CPU are not
/// measured; there is no entry for them, and f32 differs between them in the order of sums alone.
#[must_use]
pub fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::Full => 3e-5,
        Precision::Half => 1e-1,
    }
}

/// How far the decoded end of an honest run may be from the clip's frames ([`frames_deviation`]): what the encoder at its
/// archive quality loses, and a half-precision decode.
pub const FRAMES_TOLERANCE: f64 = 12.0;

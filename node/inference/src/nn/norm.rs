//! Norms over the last dimension, with an optional modulation and SiLU in the same pass.
//!
//! RMS: `x / sqrt(mean(x^2) + eps)`; layer: `(x - mean) / sqrt(var + eps)`. Then, each where given: `* factor`,
//! `* weight + bias`, `* (1 + scale) + shift`, SiLU. Sums are in f32 whatever the input is.

use candle_core::{D, DType, Result, Tensor};

use super::cpu::{View, fast, rows_per_task, written};
use super::simd::{self, simd_fn};

/// Which mean a norm divides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Root mean square.
    Rms,
    /// Mean and variance.
    Layer,
    /// Neither: only what follows is applied.
    None,
}

/// A norm with what follows it. Build it with [`Norm::rms`] or [`Norm::layer`] and add to it.
#[derive(Debug, Clone)]
pub struct Norm<'a> {
    kind: Kind,
    eps: f64,
    factor: Option<&'a Tensor>,
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    modulation: Option<(&'a Tensor, &'a Tensor)>,
    silu: bool,
}

impl<'a> Norm<'a> {
    /// Root mean square norm.
    #[must_use]
    pub fn rms(eps: f64) -> Self {
        Self { kind: Kind::Rms, eps, factor: None, weight: None, bias: None, modulation: None, silu: false }
    }

    /// Layer norm.
    #[must_use]
    pub fn layer(eps: f64) -> Self {
        Self { kind: Kind::Layer, ..Self::rms(eps) }
    }

    /// No norm: only modulation and activation.
    #[must_use]
    pub fn none() -> Self {
        Self { kind: Kind::None, ..Self::rms(0.0) }
    }

    /// `* factor` in f32, before the result is rounded to the input's type. It holds `batch x channels` elements (one row
    /// for each batch entry), whatever its shape says about dimensions of size one.
    #[must_use]
    pub fn factor(mut self, factor: &'a Tensor) -> Self {
        self.factor = Some(factor);
        self
    }

    /// `* weight`, `(channels)`.
    #[must_use]
    pub fn weight(mut self, weight: Option<&'a Tensor>) -> Self {
        self.weight = weight;
        self
    }

    /// `+ bias`, `(channels)`.
    #[must_use]
    pub fn bias(mut self, bias: Option<&'a Tensor>) -> Self {
        self.bias = bias;
        self
    }

    /// `* (1 + scale) + shift`: each holds `batch x channels` elements (one row for each batch entry) or as many as
    /// the input (one for each token), whatever their shape says about dimensions of size one.
    #[must_use]
    pub fn modulate(mut self, scale: &'a Tensor, shift: &'a Tensor) -> Self {
        self.modulation = Some((scale, shift));
        self
    }

    /// SiLU at the end.
    #[must_use]
    pub fn silu(mut self) -> Self {
        self.silu = true;
        self
    }

    /// Applies all of it to `x`, `(batch, .., channels)`, in `x`'s type.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let mut all = vec![x];
        all.extend(self.factor);
        all.extend(self.weight);
        all.extend(self.bias);
        if let Some((scale, shift)) = self.modulation {
            all.extend([scale, shift]);
        }
        if fast(&all) { self.apply_cpu(x) } else { self.apply_generic(x) }
    }

    fn apply_generic(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let mut y = match self.kind {
            Kind::None => x.clone(),
            Kind::Rms => {
                let x = x.to_dtype(DType::F32)?;
                let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
                x.broadcast_div(&(mean + self.eps)?.sqrt()?)?
            }
            Kind::Layer => {
                let x = x.to_dtype(DType::F32)?;
                let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
                let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
                x.broadcast_div(&(variance + self.eps)?.sqrt()?)?
            }
        };
        if let Some(factor) = self.factor {
            y = y.to_dtype(DType::F32)?.broadcast_mul(&spread(factor, x)?.to_dtype(DType::F32)?)?;
        }
        y = y.to_dtype(dtype)?;
        if let Some(weight) = self.weight {
            y = y.broadcast_mul(&weight.to_dtype(dtype)?)?;
        }
        if let Some(bias) = self.bias {
            y = y.broadcast_add(&bias.to_dtype(dtype)?)?;
        }
        if let Some((scale, shift)) = self.modulation {
            let scale = spread(scale, x)?.to_dtype(dtype)?;
            let shift = spread(shift, x)?.to_dtype(dtype)?;
            y = y.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(&shift)?;
        }
        if self.silu { y.silu() } else { Ok(y) }
    }

    fn apply_cpu(&self, x: &Tensor) -> Result<Tensor> {
        let width = x.dim(D::Minus1)?;
        let rows = x.elem_count() / width;
        let x = x.contiguous()?;
        let held = self.hold(x.dim(0)?, width)?;
        let steps = held.steps(rows)?;
        let view = View::new(&x)?;
        let source = view.slice()?;
        let task = rows_per_task(rows, width) * width;
        let out = written(source.len(), task, |index, out| {
            norm_rows(&steps, index * (task / width), &source[index * task..][..out.len()], out);
        });
        Tensor::from_vec(out, x.shape(), x.device())
    }

    /// Copies the small tensors into memory of its own, for a kernel over `width` channels.
    pub(crate) fn hold(&self, batch: usize, width: usize) -> Result<Held> {
        let read = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let affine = |tensor: Option<&Tensor>| -> Result<Option<Vec<f32>>> {
            let Some(tensor) = tensor else { return Ok(None) };
            if tensor.elem_count() != width {
                candle_core::bail!("a norm over {width} channels was given {:?}", tensor.shape());
            }
            read(tensor).map(Some)
        };
        let modulation = match self.modulation {
            None => None,
            Some((scale, shift)) => {
                if scale.elem_count() != shift.elem_count() || !scale.elem_count().is_multiple_of(width) {
                    let (scale, shift) = (scale.shape(), shift.shape());
                    candle_core::bail!("{width} channels were given scale {scale:?} and shift {shift:?}");
                }
                Some((read(scale)?, read(shift)?))
            }
        };
        let factor = self.factor.map(read).transpose()?;
        if let (Some(values), Some(factor)) = (&factor, self.factor)
            && !(values.len() == width || values.len() == batch * width)
        {
            let given = factor.shape();
            candle_core::bail!("{width} channels in {batch} entries were given a factor {given:?}");
        }
        Ok(Held {
            kind: self.kind,
            eps: self.eps as f32,
            silu: self.silu,
            batch,
            width,
            factor,
            weight: affine(self.weight)?,
            bias: affine(self.bias)?,
            modulation,
        })
    }
}

/// A [`Norm`] with its tensors read.
pub(crate) struct Held {
    kind: Kind,
    eps: f32,
    silu: bool,
    batch: usize,
    width: usize,
    factor: Option<Vec<f32>>,
    weight: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    modulation: Option<(Vec<f32>, Vec<f32>)>,
}

impl Held {
    /// The norm over `rows` rows in all.
    pub(crate) fn steps(&self, rows: usize) -> Result<Steps<'_>> {
        let given = self.modulation.as_ref().map_or(1, |m| m.0.len() / self.width);
        if given != 1 && given != self.batch && given != rows {
            candle_core::bail!("{rows} rows in {} entries were given {given} rows of modulation", self.batch);
        }
        Ok(Steps {
            kind: self.kind,
            eps: self.eps,
            silu: self.silu,
            width: self.width,
            rows_per_modulation: (rows / given).max(1),
            rows_per_factor: self.factor.as_ref().map_or(rows, |f| rows * self.width / f.len()).max(1),
            factor: self.factor.as_deref(),
            weight: self.weight.as_deref(),
            bias: self.bias.as_deref(),
            scale: self.modulation.as_ref().map(|m| m.0.as_slice()),
            shift: self.modulation.as_ref().map(|m| m.1.as_slice()),
        })
    }
}

/// RMS norm, `(.., channels)`.
///
/// # Errors
/// When shapes do not fit or the device fails.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    Norm::rms(eps).weight(weight).apply(x)
}

/// Layer norm, with `(weight, bias)` or without.
///
/// # Errors
/// When shapes do not fit or the device fails.
pub fn layer_norm(x: &Tensor, affine: Option<(&Tensor, &Tensor)>, eps: f64) -> Result<Tensor> {
    Norm::layer(eps).weight(affine.map(|a| a.0)).bias(affine.map(|a| a.1)).apply(x)
}

/// `x * (1 + scale) + shift`; see [`Norm::modulate`] for the shapes.
///
/// # Errors
/// When shapes do not fit or the device fails.
pub fn modulate(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    Norm::none().modulate(scale, shift).apply(x)
}

/// A modulation's tensor in a shape that broadcasts over `x`.
fn spread(m: &Tensor, x: &Tensor) -> Result<Tensor> {
    if m.elem_count() == x.elem_count() {
        return m.reshape(x.shape());
    }
    let mut shape = vec![1; x.rank()];
    shape[0] = x.dim(0)?;
    shape[x.rank() - 1] = x.dim(D::Minus1)?;
    if m.elem_count() == x.dim(D::Minus1)? {
        shape[0] = 1;
    }
    m.reshape(shape)
}

/// A [`Norm`] over slices.
#[derive(Clone, Copy)]
pub(crate) struct Steps<'a> {
    pub(crate) kind: Kind,
    pub(crate) eps: f32,
    pub(crate) silu: bool,
    pub(crate) width: usize,
    /// How many rows one row of `scale` and `shift` serves.
    pub(crate) rows_per_modulation: usize,
    /// How many rows one row of `factor` serves.
    pub(crate) rows_per_factor: usize,
    pub(crate) factor: Option<&'a [f32]>,
    pub(crate) weight: Option<&'a [f32]>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) scale: Option<&'a [f32]>,
    pub(crate) shift: Option<&'a [f32]>,
}

simd_fn! {
    /// Norms whole rows of `source` into `out`; `first` is the number of the first row within the tensor.
    pub(crate) fn norm_rows(steps: &Steps<'_>, first: usize, source: &[f32], out: &mut [f32]) {
        let width = steps.width;
        for (i, (out, source)) in out.chunks_exact_mut(width).zip(source.chunks_exact(width)).enumerate() {
            let (mean, factor) = statistics(steps, source);
            // The usual forms in one pass over the row, in the same order as the passes of the others.
            match (steps.factor, steps.weight, steps.bias) {
                (None, Some(weight), Some(bias)) => {
                    for (((o, &x), w), b) in out.iter_mut().zip(source).zip(weight).zip(bias) {
                        *o = (x - mean) * factor * w + b;
                    }
                }
                (None, Some(weight), None) => {
                    for ((o, &x), w) in out.iter_mut().zip(source).zip(weight) {
                        *o = (x - mean) * factor * w;
                    }
                }
                _ => {
                    for (o, &x) in out.iter_mut().zip(source) {
                        *o = (x - mean) * factor;
                    }
                    affine(steps, first + i, out);
                }
            }
            finish_row::<FUSED>(steps, first + i, out);
        }
    }
}

simd_fn! {
    /// Norms whole rows in place.
    pub(crate) fn norm_rows_in_place(steps: &Steps<'_>, first: usize, rows: &mut [f32]) {
        for (i, row) in rows.chunks_exact_mut(steps.width).enumerate() {
            let (mean, factor) = statistics(steps, row);
            for x in row.iter_mut() {
                *x = (*x - mean) * factor;
            }
            affine(steps, first + i, row);
            finish_row::<FUSED>(steps, first + i, row);
        }
    }
}

#[inline(always)]
fn statistics(steps: &Steps<'_>, row: &[f32]) -> (f32, f32) {
    let n = row.len() as f32;
    match steps.kind {
        Kind::None => (0.0, 1.0),
        Kind::Rms => (0.0, 1.0 / (simd::sum_squares(row) / n + steps.eps).sqrt()),
        Kind::Layer => {
            let mean = simd::sum(row) / n;
            let squares = simd::sum_of(row, |x| (x - mean) * (x - mean));
            (mean, 1.0 / (squares / n + steps.eps).sqrt())
        }
    }
}

/// Factor, weight and bias.
#[inline(always)]
fn affine(steps: &Steps<'_>, row: usize, out: &mut [f32]) {
    if let Some(factor) = steps.factor {
        let at = (row / steps.rows_per_factor) * steps.width;
        for (o, f) in out.iter_mut().zip(&factor[at..at + steps.width]) {
            *o *= f;
        }
    }
    if let Some(weight) = steps.weight {
        for (o, w) in out.iter_mut().zip(weight) {
            *o *= w;
        }
    }
    if let Some(bias) = steps.bias {
        for (o, b) in out.iter_mut().zip(bias) {
            *o += b;
        }
    }
}

/// Modulation and activation.
#[inline(always)]
fn finish_row<const FUSED: bool>(steps: &Steps<'_>, row: usize, out: &mut [f32]) {
    if let (Some(scale), Some(shift)) = (steps.scale, steps.shift) {
        let at = (row / steps.rows_per_modulation) * steps.width;
        let (scale, shift) = (&scale[at..at + steps.width], &shift[at..at + steps.width]);
        for ((o, s), b) in out.iter_mut().zip(scale).zip(shift) {
            *o = *o * (1.0 + s) + b;
        }
    }
    if steps.silu {
        for o in out.iter_mut() {
            *o = simd::silu::<FUSED>(*o);
        }
    }
}

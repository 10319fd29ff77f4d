//! Group norm on channels-last activations, with a modulation for each position and SiLU in the same pass.
//!
//! `(x - mean) / sqrt(var + eps) * weight + bias`, where mean and variance are over all positions and the channels of a
//! group, for each entry of the first dimension. Then, where given, `* scale + shift` with a row of values for each
//! position (the spatial norm of MoVQ decoders), then SiLU. Sums are in f64 on the CPU, in f32 elsewhere. For statistics of
//! each frame alone, fold time into the first dimension before.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

use super::cpu::{View, fast, rows_per_task};
use super::simd::{self, simd_fn};

/// A modulation that is coarser than the activation: rows of values, and which row serves a position.
#[derive(Debug, Clone, Copy)]
pub struct Spatial<'a> {
    /// `(batch, cells, channels)`.
    pub scale: &'a Tensor,
    /// `(batch, cells, channels)`.
    pub shift: &'a Tensor,
    /// The cell of each position of the activation, in its order.
    pub cells: &'a [u32],
}

/// A group norm with its weights.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    groups: usize,
    eps: f64,
    weight: Tensor,
    bias: Tensor,
}

impl GroupNorm {
    /// Loads `weight` and `bias`, `(channels)` each.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape, or the groups do not divide the channels.
    pub fn load(groups: usize, channels: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Self::new(groups, eps, vb.get(channels, "weight")?, vb.get(channels, "bias")?)
    }

    /// From tensors `(channels)`.
    ///
    /// # Errors
    /// When the groups do not divide the channels.
    pub fn new(groups: usize, eps: f64, weight: Tensor, bias: Tensor) -> Result<Self> {
        let channels = weight.dim(0)?;
        if groups == 0 || !channels.is_multiple_of(groups) || bias.dims() != [channels] {
            candle_core::bail!("{channels} channels, bias {:?}, have no {groups} groups", bias.shape());
        }
        Ok(Self { groups, eps, weight, bias })
    }

    /// Norms `x`, `(batch, .., channels)`, in `x`'s type.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, None, false)
    }

    /// [`GroupNorm::forward`], then SiLU.
    ///
    /// # Errors
    /// As [`GroupNorm::forward`].
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, None, true)
    }

    /// [`GroupNorm::forward`], then `* scale + shift`, then SiLU where asked for.
    ///
    /// # Errors
    /// As [`GroupNorm::forward`].
    pub fn forward_spatial(&self, x: &Tensor, spatial: &Spatial<'_>, silu: bool) -> Result<Tensor> {
        let (batch, cells, channels) = spatial.scale.dims3()?;
        let positions = x.elem_count() / (batch * channels).max(1);
        let fits = spatial.shift.dims() == [batch, cells, channels]
            && batch == x.dim(0)?
            && channels == x.dim(D::Minus1)?
            && spatial.cells.len() == positions
            && spatial.cells.iter().all(|&cell| (cell as usize) < cells);
        if !fits {
            let (x, scale, shift) = (x.shape(), spatial.scale.shape(), spatial.shift.shape());
            let places = spatial.cells.len();
            candle_core::bail!(
                "a spatial norm of {x:?} was given scale {scale:?}, shift {shift:?} and {places} places"
            );
        }
        self.apply(x, Some(spatial), silu)
    }

    fn apply(&self, x: &Tensor, spatial: Option<&Spatial<'_>>, silu: bool) -> Result<Tensor> {
        let channels = self.weight.dim(0)?;
        if x.rank() < 2 || x.dim(D::Minus1)? != channels {
            candle_core::bail!("a group norm over {channels} channels was given {:?}", x.shape());
        }
        let mut all = vec![x, &self.weight, &self.bias];
        all.extend(spatial.iter().flat_map(|spatial| [spatial.scale, spatial.shift]));
        if fast(&all) { self.apply_cpu(x, spatial, silu) } else { self.apply_generic(x, spatial, silu) }
    }

    fn apply_generic(&self, x: &Tensor, spatial: Option<&Spatial<'_>>, silu: bool) -> Result<Tensor> {
        let (dtype, batch, channels) = (x.dtype(), x.dim(0)?, self.weight.dim(0)?);
        let grouped = x.to_dtype(DType::F32)?.reshape((batch, (), self.groups, channels / self.groups))?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim((1, 3))?)?;
        let variance = centred.sqr()?.mean_keepdim((1, 3))?;
        let normed = centred.broadcast_div(&(variance + self.eps)?.sqrt()?)?.reshape(x.shape())?;
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let mut y = normed.broadcast_mul(&wide(&self.weight)?)?.broadcast_add(&wide(&self.bias)?)?;
        if let Some(spatial) = spatial {
            let cells = Tensor::new(spatial.cells, x.device())?;
            let spread =
                |values: &Tensor| wide(values)?.contiguous()?.index_select(&cells, 1)?.reshape(x.shape());
            y = ((y * spread(spatial.scale)?)? + spread(spatial.shift)?)?;
        }
        if silu { y.silu()?.to_dtype(dtype) } else { y.to_dtype(dtype) }
    }

    fn apply_cpu(&self, x: &Tensor, spatial: Option<&Spatial<'_>>, silu: bool) -> Result<Tensor> {
        let (batch, width) = (x.dim(0)?, self.weight.dim(0)?);
        let x = x.contiguous()?;
        let view = View::new(&x)?;
        let source = view.slice()?;
        let entry = source.len() / batch.max(1);
        let (weight, bias) = (self.weight.to_vec1::<f32>()?, self.bias.to_vec1::<f32>()?);
        let rows = match spatial {
            Some(spatial) => Some((spatial.scale.contiguous()?, spatial.shift.contiguous()?, spatial.cells)),
            None => None,
        };
        let views = match &rows {
            Some((scale, shift, cells)) => Some((View::new(scale)?, View::new(shift)?, *cells)),
            None => None,
        };
        let rows = match &views {
            Some((scale, shift, cells)) => Some((scale.slice()?, shift.slice()?, *cells)),
            None => None,
        };
        let mut out = vec![0f32; source.len()];
        let task = rows_per_task(entry / width, width) * width;
        for (index, (out, source)) in out.chunks_exact_mut(entry).zip(source.chunks_exact(entry)).enumerate()
        {
            let line = self.line(source, width, task, &weight, &bias);
            out.par_chunks_mut(task).zip(source.par_chunks(task)).enumerate().for_each(
                |(part, (out, source))| {
                    norm_rows(&line, source, out);
                    if let Some((scale, shift, cells)) = rows {
                        let per_entry = scale.len() / batch;
                        let range = index * per_entry..(index + 1) * per_entry;
                        let first = part * task / width;
                        let cells = &cells[first..first + out.len() / width];
                        scale_rows(&scale[range.clone()], &shift[range], cells, width, out);
                    }
                    if silu {
                        silu_rows(out);
                    }
                },
            );
        }
        Tensor::from_vec(out, x.shape(), x.device())
    }

    /// Slope and offset of each channel for one entry: the norm is `x * slope + offset`.
    fn line(&self, source: &[f32], width: usize, task: usize, weight: &[f32], bias: &[f32]) -> Line {
        let sums = source
            .par_chunks(task)
            .map(|rows| {
                let mut sums = vec![0f64; 2 * width];
                sum_rows(width, rows, &mut sums);
                sums
            })
            .collect::<Vec<_>>();
        let per_group = width / self.groups;
        let count = (source.len() / width * per_group) as f64;
        let mut line = Line { slope: vec![0f32; width], offset: vec![0f32; width] };
        for group in 0..self.groups {
            let channels = group * per_group..(group + 1) * per_group;
            let total = |half: usize| -> f64 {
                sums.iter().flat_map(|part| &part[half + channels.start..half + channels.end]).sum()
            };
            let mean = total(0) / count;
            let variance = (total(width) / count - mean * mean).max(0.0);
            let factor = 1.0 / (variance + self.eps).sqrt();
            for channel in channels {
                let slope = f64::from(weight[channel]) * factor;
                line.slope[channel] = slope as f32;
                line.offset[channel] = (f64::from(bias[channel]) - mean * slope) as f32;
            }
        }
        line
    }
}

struct Line {
    slope: Vec<f32>,
    offset: Vec<f32>,
}

simd_fn! {
    /// Adds each channel's values, then their squares, to `sums`.
    fn sum_rows(width: usize, rows: &[f32], sums: &mut [f64]) {
        let (first, second) = sums.split_at_mut(width);
        for row in rows.chunks_exact(width) {
            for ((a, b), &x) in first.iter_mut().zip(second.iter_mut()).zip(row) {
                let x = f64::from(x);
                *a += x;
                *b += x * x;
            }
        }
    }
}

simd_fn! {
    fn norm_rows(line: &Line, source: &[f32], out: &mut [f32]) {
        let width = line.slope.len();
        for (out, source) in out.chunks_exact_mut(width).zip(source.chunks_exact(width)) {
            for (((o, &x), a), b) in out.iter_mut().zip(source).zip(&line.slope).zip(&line.offset) {
                *o = x * a + b;
            }
        }
    }
}

simd_fn! {
    fn scale_rows(scale: &[f32], shift: &[f32], cells: &[u32], width: usize, out: &mut [f32]) {
        for (row, &cell) in out.chunks_exact_mut(width).zip(cells) {
            let at = cell as usize * width;
            for ((o, a), b) in row.iter_mut().zip(&scale[at..at + width]).zip(&shift[at..at + width]) {
                *o = *o * a + b;
            }
        }
    }
}

simd_fn! {
    fn silu_rows(out: &mut [f32]) {
        for o in out.iter_mut() {
            *o = simd::silu(*o);
        }
    }
}

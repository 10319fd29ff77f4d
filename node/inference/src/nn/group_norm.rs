//! Group norm on channels-last activations, with a modulation for each position and SiLU in the same pass.
//!
//! `(x - mean) / sqrt(var + eps) * weight + bias`, where mean and variance are over all positions and the channels of a
//! group, for each entry of the first dimension. Then, where given, `* scale + shift` with a row of values for each
//! position (the spatial norm of MoVQ decoders), then SiLU. Sums are in f64 on the CPU, of a few rows at a time in f32, and
//! in f32 elsewhere. For statistics of each frame alone, fold time into the first dimension before.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

use super::cpu::{View, fast, rows_per_task, written};
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
        let task = rows_per_task(entry / width, width) * width;
        let lines: Vec<Line> =
            source.chunks_exact(entry).map(|entry| self.line(entry, width, task, &weight, &bias)).collect();
        let norm = |index: usize, first: usize, source: &[f32], out: &mut [f32]| {
            if rows.is_none() && silu {
                return norm_silu_rows(&lines[index], source, out);
            }
            norm_rows(&lines[index], source, out);
            if let Some((scale, shift, cells)) = rows {
                let per_entry = scale.len() / batch;
                let range = index * per_entry..(index + 1) * per_entry;
                let cells = &cells[first..first + out.len() / width];
                scale_rows(&scale[range.clone()], &shift[range], cells, width, out);
            }
            if silu {
                silu_rows(out);
            }
        };
        // A task may reach over the end of an entry into the next one.
        let out = written(source.len(), task, |index, mut out| {
            let mut at = index * task;
            while !out.is_empty() {
                let (number, inside) = (at / entry, at % entry);
                let (piece, rest) = out.split_at_mut(out.len().min(entry - inside));
                norm(number, inside / width, &source[at..at + piece.len()], piece);
                at += piece.len();
                out = rest;
            }
        });
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

/// Channels whose sums stay in registers together.
const LANES: usize = 16;

simd_fn! {
    /// Adds each channel's values, then their squares, to `sums`. A few rows are summed in f32 before they are added.
    fn sum_rows(width: usize, rows: &[f32], sums: &mut [f64]) {
        const ROWS: usize = 8;
        let (first, second) = sums.split_at_mut(width);
        for rows in rows.chunks(ROWS * width) {
            for (group, (first, second)) in first.chunks_mut(LANES).zip(second.chunks_mut(LANES)).enumerate() {
                let (mut values, mut squares) = ([0f32; LANES], [0f32; LANES]);
                for row in rows.chunks_exact(width) {
                    let row = &row[group * LANES..][..first.len()];
                    match <&[f32; LANES]>::try_from(row) {
                        Ok(row) => add_lanes(row, &mut values, &mut squares),
                        Err(_) => {
                            for ((value, square), x) in values.iter_mut().zip(&mut squares).zip(row) {
                                *value += x;
                                *square += x * x;
                            }
                        }
                    }
                }
                for (sum, value) in first.iter_mut().zip(values) {
                    *sum += f64::from(value);
                }
                for (sum, square) in second.iter_mut().zip(squares) {
                    *sum += f64::from(square);
                }
            }
        }
    }
}

#[inline(always)]
fn add_lanes(row: &[f32; LANES], values: &mut [f32; LANES], squares: &mut [f32; LANES]) {
    for ((value, square), x) in values.iter_mut().zip(squares).zip(row) {
        *value += x;
        *square += x * x;
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
    fn norm_silu_rows(line: &Line, source: &[f32], out: &mut [f32]) {
        let width = line.slope.len();
        for (out, source) in out.chunks_exact_mut(width).zip(source.chunks_exact(width)) {
            for (((o, &x), a), b) in out.iter_mut().zip(source).zip(&line.slope).zip(&line.offset) {
                *o = simd::silu::<FUSED>(x * a + b);
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
            *o = simd::silu::<FUSED>(*o);
        }
    }
}

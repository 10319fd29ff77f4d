//! Activations over whole tensors.

use candle_core::{D, Result, Tensor};

use super::cpu::{View, fast, rows_per_task, written};
use super::simd::{self, simd_fn};

/// SiLU, `x sigmoid(x)`, elementwise.
///
/// # Errors
/// When the device fails.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { map(x, silu_slice) } else { x.silu() }
}

/// GELU by tanh (`gelu-approximate`, `gelu_new`), elementwise.
///
/// # Errors
/// When the device fails.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { map(x, gelu_slice) } else { x.gelu() }
}

/// A gated activation: the first half of the last dimension times SiLU of the second, `(.., 2 n)` to `(.., n)`
/// (diffusers' `swiglu`).
///
/// # Errors
/// When the last dimension is odd or the device fails.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if !width.is_multiple_of(2) {
        candle_core::bail!("{width} channels have no two halves");
    }
    let half = width / 2;
    if !fast(&[x]) {
        let gate = x.narrow(D::Minus1, half, half)?.contiguous()?.silu()?;
        return x.narrow(D::Minus1, 0, half)?.mul(&gate);
    }
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = half;
    }
    let x = x.contiguous()?;
    let view = View::new(&x)?;
    let input = view.slice()?;
    let rows = rows_per_task(input.len() / width, width);
    let out = written(input.len() / 2, rows * half, |index, out| {
        swiglu_rows(half, &input[index * rows * width..][..2 * out.len()], out);
    });
    Tensor::from_vec(out, shape, x.device())
}

/// `x W^T + b` over the last dimension: `x` is `(.., in)`, `weight` `(out, in)`, `bias` `(out)`.
///
/// For a layer that is used often [`super::linear::Linear`] is faster: it packs its weights once.
///
/// # Errors
/// When shapes do not fit or the device fails.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, width) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / width.max(1);
    let y = x.reshape((rows, width))?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    y.reshape(shape)
}

fn map(x: &Tensor, f: fn(&[f32], &mut [f32])) -> Result<Tensor> {
    let x = x.contiguous()?;
    let view = View::new(&x)?;
    let input = view.slice()?;
    let step = rows_per_task(input.len(), 1);
    let out = written(input.len(), step, |index, out| f(&input[index * step..][..out.len()], out));
    Tensor::from_vec(out, x.shape(), x.device())
}

simd_fn! {
    fn silu_slice(input: &[f32], out: &mut [f32]) {
        for (o, &x) in out.iter_mut().zip(input) {
            *o = simd::silu::<FUSED>(x);
        }
    }
}

simd_fn! {
    fn gelu_slice(input: &[f32], out: &mut [f32]) {
        for (o, &x) in out.iter_mut().zip(input) {
            *o = simd::gelu_tanh::<FUSED>(x);
        }
    }
}

simd_fn! {
    fn swiglu_rows(half: usize, input: &[f32], out: &mut [f32]) {
        for (out, row) in out.chunks_exact_mut(half).zip(input.chunks_exact(2 * half)) {
            let (values, gates) = row.split_at(half);
            for ((o, x), &gate) in out.iter_mut().zip(values).zip(gates) {
                *o = x * simd::silu::<FUSED>(gate);
            }
        }
    }
}

//! A linear layer that packs its weights once on the CPU.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::cpu::{View, generic_only};
use super::ops;
use super::pack::{Epilogue, Packed, product};

/// `x W^T + b` over the last dimension.
///
/// On the CPU weights that want no gradient are packed as f32 and inputs of other types are widened for the call;
/// load under [`super::set_generic_only`] to differentiate through the input there.
#[derive(Debug, Clone)]
pub struct Linear {
    inner: Inner,
    input: usize,
    output: usize,
}

#[derive(Debug, Clone)]
enum Inner {
    Packed { weight: Arc<Packed>, bias: Option<Arc<Vec<f32>>> },
    Plain { weight: Tensor, bias: Option<Tensor> },
}

impl Linear {
    /// Loads `weight` `(output, input)` and, where there is one, `bias` `(output)`.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(input: usize, output: usize, bias: bool, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get((output, input), "weight")?;
        let bias = if bias { Some(vb.get(output, "bias")?) } else { None };
        Self::new(weight, bias)
    }

    /// From tensors: `weight` `(output, input)`, `bias` `(output)`.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (output, input) = weight.dims2()?;
        if let Some(bias) = &bias
            && bias.dims() != [output]
        {
            candle_core::bail!(
                "a linear layer of {output} outputs was given a bias of shape {:?}",
                bias.shape()
            );
        }
        let tracked = weight.track_op() || bias.as_ref().is_some_and(Tensor::track_op);
        if !weight.device().is_cpu() || tracked || generic_only() {
            return Ok(Self { inner: Inner::Plain { weight, bias }, input, output });
        }
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        let view = View::new(&weight)?;
        let values = view.slice()?;
        let packed = Packed::new(1, input, output, |o, _, i| values[o * input + i]);
        let bias = match bias {
            Some(bias) => Some(Arc::new(bias.to_dtype(DType::F32)?.to_vec1::<f32>()?)),
            None => None,
        };
        Ok(Self { inner: Inner::Packed { weight: Arc::new(packed), bias }, input, output })
    }

    /// Channels in and out.
    #[must_use]
    pub fn channels(&self) -> (usize, usize) {
        (self.input, self.output)
    }

    /// `(.., input)` to `(.., output)`.
    ///
    /// # Errors
    /// When shapes do not fit, the device fails, or a gradient is asked for through packed weights.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, false, None)
    }

    /// [`Linear::forward`], then GELU by tanh.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, true, None)
    }

    /// [`Linear::forward`], then `+ residual`, which has the result's shape.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, false, Some(residual))
    }

    fn run(&self, x: &Tensor, gelu: bool, residual: Option<&Tensor>) -> Result<Tensor> {
        if x.dim(D::Minus1)? != self.input {
            candle_core::bail!("a linear layer of {} inputs was given {:?}", self.input, x.shape());
        }
        match &self.inner {
            Inner::Plain { weight, bias } => {
                let y = ops::linear(x, weight, bias.as_ref())?;
                let y = if gelu { y.gelu()? } else { y };
                match residual {
                    Some(residual) => y + residual,
                    None => Ok(y),
                }
            }
            Inner::Packed { weight, bias } => {
                self.run_packed(weight, bias.as_ref().map(|b| b.as_slice()), x, gelu, residual)
            }
        }
    }

    fn run_packed(
        &self,
        weight: &Packed,
        bias: Option<&[f32]>,
        x: &Tensor,
        gelu: bool,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        if x.track_op() || residual.is_some_and(Tensor::track_op) {
            candle_core::bail!(
                "packed weights have no gradient: load the layer under set_generic_only(true)"
            );
        }
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.output;
        }
        let source = x.to_dtype(DType::F32)?.contiguous()?;
        let residual = match residual {
            Some(r) if r.dims() != shape => {
                candle_core::bail!(
                    "a residual of shape {:?} was added to a result of shape {shape:?}",
                    r.shape()
                )
            }
            Some(r) => Some(r.to_dtype(DType::F32)?.contiguous()?),
            None => None,
        };
        let residual = residual.as_ref().map(View::new).transpose()?;
        let view = View::new(&source)?;
        let base = view.slice()?;
        let epilogue = Epilogue {
            bias,
            residual: residual.as_ref().map(View::slice).transpose()?,
            gelu,
            ..Epilogue::default()
        };
        let depth = self.input;
        let out = product(weight, base, base.len() / depth, |row, slots| slots[0] = row * depth, &epilogue);
        Tensor::from_vec(out, shape, x.device())?.to_dtype(x.dtype())
    }
}

//! A linear layer that packs its weights once on the CPU.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::beside::{self, Branch, Entered, Named, Place};
use super::cpu::{View, generic_only, note_repacked, shapes_only};
use super::ops;
use super::pack::{Epilogue, Packed, packed_len, product};
use crate::weights::held::planned_blocks;
use crate::weights::quantised;

/// `x W^T + b` over the last dimension.
///
/// On the CPU weights that want no gradient are packed as f32 and inputs of other types are widened for the call;
/// load under [`super::set_generic_only`] to differentiate through the input there.
///
/// Weights that their file holds in blocks of few bits stay so and are widened for each call. Candle's own product of
/// such weights is not used, because it rounds the inputs to 8 bits as well; beside the product of a clip's many tokens
/// widening takes little time.
#[derive(Debug, Clone)]
pub struct Linear {
    inner: Inner,
    input: usize,
    output: usize,
    /// Where an adapter may stand beside it.
    place: Option<Place>,
}

#[derive(Debug, Clone)]
enum Inner {
    Packed {
        weight: Arc<Packed>,
        bias: Option<Arc<Vec<f32>>>,
    },
    Plain {
        weight: Tensor,
        bias: Option<Tensor>,
    },
    /// With the numbers in which it computes.
    Quantised {
        weight: Arc<QTensor>,
        bias: Option<Tensor>,
        dtype: DType,
    },
}

impl Linear {
    /// Loads `weight` `(output, input)` and, where there is one, `bias` `(output)`.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(input: usize, output: usize, bias: bool, vb: VarBuilder) -> Result<Self> {
        let read_bias = || if bias { vb.get(output, "bias").map(Some) } else { Ok(None) };
        if let Some(weight) = planned_blocks(&vb, "weight", (output, input))? {
            let inner = Inner::Plain { weight, bias: read_bias()? };
            return Ok(Self { inner, input, output, place: None });
        }
        let Some(weight) = quantised(&vb, "weight", (output, input))? else {
            let weight = vb.get((output, input), "weight")?;
            return Self::placed(weight, read_bias()?, &vb, None);
        };
        let bias = read_bias()?;
        let (name, dtype, device) = (vb.prefix(), vb.dtype(), vb.device());
        let named = Named { name: &name, input, output, rows: None, dtype, device };
        match beside::enter(&named)? {
            // A sum in blocks of few bits would be rounded to them: such a layer is widened for good.
            Some(entered) if entered.weight.is_some() || entered.bias.is_some() => {
                Self::entered(weight.dequantize(device)?.to_dtype(dtype)?, bias, entered)
            }
            entered => {
                let inner = Inner::Quantised { weight, bias, dtype };
                Ok(Self { inner, input, output, place: entered.map(|entered| entered.place) })
            }
        }
    }

    /// From tensors that were read under the builder's name, so that adapters find the layer: `weight` `(output, input)`,
    /// `bias` `(output)`. Where its outputs are not in the file's order, `rows` tells which row of the file's each is.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn placed(
        weight: Tensor,
        bias: Option<Tensor>,
        vb: &VarBuilder<'_>,
        rows: Option<&[u32]>,
    ) -> Result<Self> {
        let (output, input) = weight.dims2()?;
        let (name, dtype) = (vb.prefix(), vb.dtype());
        let named = Named { name: &name, input, output, rows, dtype, device: weight.device() };
        match beside::enter(&named)? {
            Some(entered) => Self::entered(weight, bias, entered),
            None => Self::new(weight, bias),
        }
    }

    /// With its place, and with what is to be added at once.
    fn entered(weight: Tensor, bias: Option<Tensor>, entered: Entered) -> Result<Self> {
        let weight = beside::merged(weight, entered.weight.as_ref())?;
        let bias = match (bias, entered.bias) {
            (Some(bias), more) => Some(beside::merged(bias, more.as_ref())?),
            (None, Some(more)) => Some(more.to_dtype(weight.dtype())?.to_device(weight.device())?),
            (None, None) => None,
        };
        Ok(Self { place: Some(entered.place), ..Self::new(weight, bias)? })
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
        if shapes_only() {
            note_repacked(&weight, packed_len(1, input, output));
        }
        let tracked = weight.track_op() || bias.as_ref().is_some_and(Tensor::track_op);
        if !weight.device().is_cpu() || tracked || generic_only() || shapes_only() {
            return Ok(Self { inner: Inner::Plain { weight, bias }, input, output, place: None });
        }
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        let view = View::new(&weight)?;
        let values = view.slice()?;
        let packed = Packed::new(1, input, output, |o, _, i| values[o * input + i]);
        let bias = match bias {
            Some(bias) => Some(Arc::new(bias.to_dtype(DType::F32)?.to_vec1::<f32>()?)),
            None => None,
        };
        Ok(Self { inner: Inner::Packed { weight: Arc::new(packed), bias }, input, output, place: None })
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
        self.run(x, &After::default())
    }

    /// [`Linear::forward`], then GELU by tanh.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, &After { gelu: true, ..After::default() })
    }

    /// [`Linear::forward`], then `+ residual`, which has the result's shape.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, &After { residual: Some(residual), ..After::default() })
    }

    /// `residual + gate * forward(x)`; `gate` is `(batch, 1 or tokens, output)`.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_gated(&self, x: &Tensor, gate: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, &After { gate: Some(gate), residual: Some(residual), gelu: false })
    }

    fn run(&self, x: &Tensor, after: &After) -> Result<Tensor> {
        if x.dim(D::Minus1)? != self.input {
            candle_core::bail!("a linear layer of {} inputs was given {:?}", self.input, x.shape());
        }
        match self.place.as_ref().and_then(Place::get) {
            Some(branch) => self.run_beside(&branch, x, after),
            None => self.run_alone(x, after),
        }
    }

    /// What follows comes after the sum of both ways.
    fn run_beside(&self, branch: &Branch, x: &Tensor, after: &After) -> Result<Tensor> {
        let both = branch.add(x, &self.run_alone(x, &After::default())?)?;
        after.apply(both)
    }

    fn run_alone(&self, x: &Tensor, after: &After) -> Result<Tensor> {
        match &self.inner {
            Inner::Plain { weight, bias } => after.apply(ops::linear(x, weight, bias.as_ref())?),
            Inner::Quantised { weight, bias, dtype } => {
                let weight = weight.dequantize(x.device())?.to_dtype(*dtype)?;
                Self::new(weight, bias.clone())?.run(x, after)
            }
            Inner::Packed { weight, bias } => {
                self.run_packed(weight, bias.as_ref().map(|b| b.as_slice()), x, after)
            }
        }
    }

    fn run_packed(&self, weight: &Packed, bias: Option<&[f32]>, x: &Tensor, after: &After) -> Result<Tensor> {
        let extra = [after.residual, after.gate].into_iter().flatten();
        if x.track_op() || extra.into_iter().any(Tensor::track_op) {
            candle_core::bail!(
                "packed weights have no gradient: load the layer under set_generic_only(true)"
            );
        }
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.output;
        }
        let rows = x.elem_count() / self.input;
        let source = x.to_dtype(DType::F32)?.contiguous()?;
        let residual = match after.residual {
            Some(r) if r.dims() != shape => {
                candle_core::bail!(
                    "a residual of shape {:?} was added to a result of shape {shape:?}",
                    r.shape()
                )
            }
            Some(r) => Some(r.to_dtype(DType::F32)?.contiguous()?),
            None => None,
        };
        let gate = match after.gate {
            Some(gate) => {
                let given = gate.elem_count() / self.output;
                if gate.dim(D::Minus1)? != self.output || (given != rows && given != x.dim(0)?) {
                    candle_core::bail!(
                        "a gate of shape {:?} was put on a result of shape {shape:?}",
                        gate.shape()
                    );
                }
                Some((gate.to_dtype(DType::F32)?.contiguous()?, rows / given))
            }
            None => None,
        };
        let residual = residual.as_ref().map(View::new).transpose()?;
        let gate_view = gate.as_ref().map(|(gate, _)| View::new(gate)).transpose()?;
        let view = View::new(&source)?;
        let epilogue = Epilogue {
            bias,
            gate: match (&gate_view, &gate) {
                (Some(view), Some((_, rows))) => Some((view.slice()?, *rows)),
                _ => None,
            },
            residual: residual.as_ref().map(View::slice).transpose()?,
            gelu: after.gelu,
            norm: None,
        };
        let depth = self.input;
        let out = product(weight, view.slice()?, rows, |row, slots| slots[0] = row * depth, &epilogue);
        Tensor::from_vec(out, shape, x.device())?.to_dtype(x.dtype())
    }
}

/// What follows the product.
#[derive(Default)]
struct After<'a> {
    gelu: bool,
    gate: Option<&'a Tensor>,
    residual: Option<&'a Tensor>,
}

impl After<'_> {
    fn apply(&self, mut y: Tensor) -> Result<Tensor> {
        if self.gelu {
            y = ops::gelu_tanh(&y)?;
        }
        if let Some(gate) = self.gate {
            y = y.broadcast_mul(gate)?;
        }
        match self.residual {
            Some(residual) => residual + y,
            None => Ok(y),
        }
    }
}

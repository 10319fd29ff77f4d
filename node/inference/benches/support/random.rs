//! Random weights and activations, f32 on the CPU.

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use kinoflock_inference::measure::random_weights;

pub(crate) fn weights() -> VarBuilder<'static> {
    random_weights(DType::F32, &Device::Cpu)
}

pub(crate) fn random(shape: impl Into<Shape>) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

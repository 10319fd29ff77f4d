//! Published transformers of full size take one step, with weights of zeros: every layer of them fits the next one. Each
//! takes up to ten gigabytes, one at a time, so that they run on demand:
//! `cargo test --workspace --test full_size -- --ignored --test-threads 1`. Models of ten billion numbers and more are
//! known by their lists of tensors alone (`sizes.rs`).
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use kinoflock_inference::models::cogvideox::transformer::CogVideoXTransformer;
use kinoflock_inference::models::ltx::rope::Positions;
use kinoflock_inference::models::ltx::transformer::LtxTransformer;
use kinoflock_inference::models::pyramid::config::{FluxConfig, MmditConfig};
use kinoflock_inference::models::pyramid::transformer::PyramidTransformer;
use kinoflock_inference::models::wan::rope::RopeTables;
use kinoflock_inference::models::wan::transformer::WanTransformer;
use kinoflock_inference::models::{cogvideox, ltx, wan};

const CPU: Device = Device::Cpu;

fn zeros() -> VarBuilder<'static> {
    VarBuilder::zeros(DType::F32, &CPU)
}

fn noise(shape: impl Into<Shape>) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &CPU).unwrap()
}

fn ones(shape: impl Into<Shape>) -> Tensor {
    Tensor::ones(shape, DType::F32, &CPU).unwrap()
}

fn timesteps() -> Tensor {
    Tensor::new(&[500f32], &CPU).unwrap()
}

fn config<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// Weights of zeros predict nothing, in the shape of what they were given.
fn check(output: &Tensor, shape: &[usize]) {
    assert_eq!(output.dims(), shape);
    let greatest = output.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(greatest, 0.0);
}

#[test]
#[ignore = "takes 9 GB"]
fn ltx_video_2b() {
    let model =
        LtxTransformer::load(&config::<ltx::config::TransformerConfig>(serde_json::json!({})), &zeros())
            .unwrap();
    let places = Positions::Grid { size: [2, 4, 4], scale: Some([8.0 / 25.0, 32.0, 32.0]) };
    let rope = model.rope().tables(places, &CPU).unwrap();
    let text = model.text_context(&noise((1, 128, 4096)), Some(&ones((1, 128)))).unwrap();
    let output = model.forward(&noise((1, 32, 128)), &timesteps(), &text, &rope).unwrap();
    check(&output, &[1, 32, 128]);
}

#[test]
#[ignore = "takes 8 GB"]
fn cogvideox_2b() {
    let config: cogvideox::config::TransformerConfig = config(serde_json::json!({}));
    let model = CogVideoXTransformer::load(&config, &zeros()).unwrap();
    let places = model.positions([2, 8, 8], 226, &CPU).unwrap();
    let text = model.project_text(&noise((1, 226, 4096))).unwrap();
    let output = model.forward(&noise((1, 2, 16, 8, 8)), &timesteps(), &text, &places).unwrap();
    check(&output, &[1, 2, 16, 8, 8]);
}

#[test]
#[ignore = "takes 7 GB"]
fn wan_2_1_1_3b() {
    let config: wan::config::TransformerConfig =
        config(serde_json::json!({"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}));
    let model = WanTransformer::load(&config, &zeros()).unwrap();
    let rope = RopeTables::new(&config, [2, 4, 4], &CPU).unwrap();
    let text = model.text_context(&noise((1, 512, 4096)), None).unwrap();
    let output = model.forward(&noise((1, 32, 64)), &timesteps(), &text, &rope).unwrap();
    check(&output, &[1, 32, 64]);
}

fn pyramid(model: &PyramidTransformer, pooled: usize) {
    let text = model.text_context(&noise((1, 128, 4096)), &ones((1, 128)), &noise((1, pooled))).unwrap();
    let latents = noise((1, 16, 1, 16, 16));
    let output = model.forward(std::slice::from_ref(&latents), &timesteps(), &text).unwrap();
    check(&output, &[1, 16, 1, 16, 16]);
}

#[test]
#[ignore = "takes 9 GB"]
fn pyramid_flow_miniflux() {
    let config: FluxConfig = config(serde_json::json!({
        "num_layers": 8, "num_single_layers": 16, "num_attention_heads": 30, "in_channels": 64,
    }));
    pyramid(&PyramidTransformer::load(&config.settled(), &zeros()).unwrap(), 768);
}

#[test]
#[ignore = "takes 10 GB"]
fn pyramid_flow_sd3() {
    let config: MmditConfig = config(serde_json::json!({
        "caption_projection_dim": 1536, "pos_embed_type": "sincos", "num_layers": 24,
    }));
    pyramid(&PyramidTransformer::load(&config.settled(), &zeros()).unwrap(), 2048);
}

//! The published full-size configurations: every tensor that the engine takes, and how many numbers there are in all,
//! without a weight file.
#![allow(clippy::unwrap_used)]

use kinoflock_inference::models::ltx::config::TransformerConfig;
use kinoflock_inference::models::ltx::transformer::LtxTransformer;
use kinoflock_inference::text::{T5Config, T5Encoder};
use kinoflock_inference::weights::{count_parameters, tensor_shapes};

/// A class's defaults with some keys changed.
fn config<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

#[test]
fn ltx_video_2b() {
    let config: TransformerConfig = config(serde_json::json!({}));
    let shapes = tensor_shapes(|vb| LtxTransformer::load(&config, &vb)).unwrap();
    assert_eq!(shapes["transformer_blocks.27.attn2.to_k.weight"], [2048, 2048]);
    assert_eq!(shapes["caption_projection.linear_1.weight"], [2048, 4096]);
    assert_eq!(count_parameters(&shapes) / 1_000_000, 1_923);
}

#[test]
fn t5_xxl() {
    let config: T5Config = config(serde_json::json!({
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    }));
    let shapes = tensor_shapes(|vb| T5Encoder::load(&config, &vb)).unwrap();
    assert_eq!(shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"], [32, 64]);
    assert!(!shapes.contains_key("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"));
    assert_eq!(count_parameters(&shapes) / 1_000_000, 4_762);
}

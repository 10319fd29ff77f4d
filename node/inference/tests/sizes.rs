//! The published full-size configurations: every tensor that the engine takes, and how many numbers there are in all,
//! without a weight file.
#![allow(clippy::unwrap_used)]

use kinoflock_inference::models::cogvideox::config::{
    TransformerConfig as CogVideoXConfig, VaeConfig as CogVideoXVaeConfig,
};
use kinoflock_inference::models::cogvideox::transformer::CogVideoXTransformer;
use kinoflock_inference::models::cogvideox::vae::CogVideoXVae;
use kinoflock_inference::models::ltx::config::TransformerConfig;
use kinoflock_inference::models::ltx::transformer::LtxTransformer;
use kinoflock_inference::models::ltx::upsampler::{LtxUpsampler, UpsamplerConfig};
use kinoflock_inference::models::mochi;
use kinoflock_inference::models::pyramid::config::{FluxConfig, MmditConfig};
use kinoflock_inference::models::pyramid::transformer::PyramidTransformer;
use kinoflock_inference::models::pyramid::vae::{PyramidVae, PyramidVaeConfig};
use kinoflock_inference::models::wan;
use kinoflock_inference::models::wan::transformer::WanTransformer;
use kinoflock_inference::models::wan::vae::{WanVae, WanVaeConfig};
use kinoflock_inference::text::{ClipTextConfig, ClipTextEncoder, T5Config, T5Encoder};
use kinoflock_inference::vision::{ClipVisionConfig, ClipVisionEncoder};
use kinoflock_inference::weights::{count_parameters, tensor_shapes};

/// A class's defaults with some keys changed.
fn config<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn rounded(count: u64, unit: u64) -> u64 {
    (count + unit / 2) / unit
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
fn ltx_video_13b() {
    let config: TransformerConfig = config(serde_json::json!({
        "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096,
    }));
    let shapes = tensor_shapes(|vb| LtxTransformer::load(&config, &vb)).unwrap();
    assert_eq!(shapes["transformer_blocks.47.attn1.norm_q.weight"], [4096]);
    assert_eq!(shapes["transformer_blocks.0.ff.net.0.proj.weight"], [16384, 4096]);
    assert_eq!(shapes["proj_out.weight"], [128, 4096]);
    assert_eq!((shapes.len(), count_parameters(&shapes)), (1_215, 13_042_569_344));
}

#[test]
fn ltx_videos_latent_upsampler() {
    let config: UpsamplerConfig = config(serde_json::json!({}));
    let shapes = tensor_shapes(|vb| LtxUpsampler::load(&config, &vb)).unwrap();
    assert_eq!(shapes["upsampler.0.weight"], [2048, 512, 3, 3]);
    assert_eq!((shapes.len(), count_parameters(&shapes)), (72, 126_250_624));
}

#[test]
fn mochi_1_preview() {
    let transformer: mochi::config::TransformerConfig = config(serde_json::json!({}));
    let build = |vb| mochi::transformer::MochiTransformer::load(&transformer, &vb);
    let shapes = tensor_shapes(build).unwrap();
    assert_eq!(shapes["transformer_blocks.0.ff.net.0.proj.weight"], [16384, 3072]);
    assert_eq!(shapes["transformer_blocks.46.norm1_context.linear.weight"], [6144, 3072]);
    assert_eq!(shapes["transformer_blocks.47.norm1_context.linear_1.weight"], [1536, 3072]);
    assert!(!shapes.contains_key("transformer_blocks.47.ff_context.net.2.weight"));
    assert_eq!((shapes.len(), count_parameters(&shapes)), (1_071, 10_027_677_744));

    let vae: mochi::vae::MochiVaeConfig = config(serde_json::json!({}));
    let shapes = tensor_shapes(|vb| mochi::vae::MochiVae::load(&vae, &vb)).unwrap();
    assert_eq!(shapes.len(), 437);
    assert_eq!(shapes["decoder.up_blocks.0.proj.weight"], [6144, 768]);
    assert_eq!(shapes["encoder.down_blocks.2.conv_in.conv.weight"], [384, 256, 3, 2, 2]);
    let (encoder, decoder): (std::collections::BTreeMap<_, _>, std::collections::BTreeMap<_, _>) =
        shapes.into_iter().partition(|(name, _)| name.starts_with("encoder."));
    assert_eq!((count_parameters(&encoder), count_parameters(&decoder)), (97_222_016, 362_526_595));
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

/// The transformer of a published CogVideoX, and how many million parameters it has.
fn cogvideox(value: serde_json::Value) -> (std::collections::BTreeMap<String, Vec<usize>>, u64) {
    let config: CogVideoXConfig = config(value);
    let shapes = tensor_shapes(|vb| CogVideoXTransformer::load(&config, &vb)).unwrap();
    let count = rounded(count_parameters(&shapes), 1_000_000);
    (shapes, count)
}

#[test]
fn cogvideox_2b() {
    let (shapes, count) = cogvideox(serde_json::json!({}));
    assert_eq!(shapes["patch_embed.proj.weight"], [1920, 16, 2, 2]);
    assert_eq!(shapes["transformer_blocks.29.norm2.linear.weight"], [11520, 512]);
    assert_eq!(shapes["transformer_blocks.0.attn1.norm_q.weight"], [64]);
    assert_eq!(shapes["proj_out.weight"], [64, 1920]);
    assert_eq!(count, 1_694);
}

#[test]
fn cogvideox_5b_and_1_5() {
    let large = serde_json::json!({
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": true,
    });
    let (shapes, count) = cogvideox(large.clone());
    assert_eq!(shapes["patch_embed.text_proj.weight"], [3072, 4096]);
    assert_eq!(shapes["transformer_blocks.41.ff.net.0.proj.weight"], [12288, 3072]);
    assert_eq!(count, 5_570);
    let mut longer = large;
    longer["patch_size_t"] = 2.into();
    longer["patch_bias"] = false.into();
    let (shapes, count) = cogvideox(longer);
    assert_eq!(shapes["patch_embed.proj.weight"], [3072, 128]);
    assert_eq!(shapes["proj_out.weight"], [128, 3072]);
    assert_eq!(count, 5_571);
}

#[test]
fn cogvideox_image_to_video() {
    let large = serde_json::json!({
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": true, "in_channels": 32,
    });
    let mut table = large.clone();
    table["use_learned_positional_embeddings"] = true.into();
    let (shapes, _) = cogvideox(table);
    assert_eq!(shapes["patch_embed.pos_embedding"], [1, 226 + 13 * 30 * 45, 3072]);
    let mut longer = large;
    longer["patch_size_t"] = 2.into();
    longer["ofs_embed_dim"] = 512.into();
    let (shapes, _) = cogvideox(longer);
    assert_eq!(shapes["patch_embed.proj.weight"], [3072, 256]);
    assert_eq!(shapes["ofs_embedding.linear_2.weight"], [512, 512]);
}

#[test]
fn cogvideox_vae() {
    let config: CogVideoXVaeConfig = config(serde_json::json!({}));
    let both = tensor_shapes(|vb| CogVideoXVae::load(&config, vb)).unwrap();
    let decoder = tensor_shapes(|vb| CogVideoXVae::load_decoder(&config, vb)).unwrap();
    assert_eq!(both["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"], [256, 128, 1, 1, 1]);
    assert_eq!(both["decoder.up_blocks.3.resnets.3.norm2.conv_y.conv.weight"], [128, 16, 1, 1, 1]);
    assert!(!both.contains_key("decoder.up_blocks.3.upsamplers.0.conv.weight"));
    let decoder = count_parameters(&decoder);
    assert_eq!(rounded(decoder, 100_000), 1_234);
    assert_eq!(rounded(count_parameters(&both) - decoder, 100_000), 922);
}

#[test]
fn wan_2_1_14b_and_1_3b() {
    let large: wan::config::TransformerConfig = config(serde_json::json!({}));
    let shapes = tensor_shapes(|vb| WanTransformer::load(&large, &vb)).unwrap();
    assert_eq!(shapes["blocks.39.ffn.net.0.proj.weight"], [13824, 5120]);
    assert_eq!(shapes["patch_embedding.weight"], [5120, 16, 1, 2, 2]);
    assert_eq!(shapes["condition_embedder.time_proj.weight"], [30720, 5120]);
    assert_eq!(shapes["blocks.0.norm2.bias"], [5120]);
    assert_eq!((shapes.len(), count_parameters(&shapes) / 1_000_000), (1095, 14_288));
    let small: wan::config::TransformerConfig =
        config(serde_json::json!({"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}));
    let shapes = tensor_shapes(|vb| WanTransformer::load(&small, &vb)).unwrap();
    assert_eq!(shapes["condition_embedder.text_embedder.linear_1.weight"], [1536, 4096]);
    assert_eq!((shapes.len(), count_parameters(&shapes) / 1_000_000), (825, 1_418));
}

#[test]
fn wan_image_to_video() {
    let pictures = serde_json::json!({"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120});
    let count = |value: serde_json::Value| {
        let config: wan::config::TransformerConfig = config(value);
        let shapes = tensor_shapes(|vb| WanTransformer::load(&config, &vb)).unwrap();
        (shapes.len(), count_parameters(&shapes), shapes)
    };
    let (tensors, parameters, shapes) = count(pictures.clone());
    assert_eq!(shapes["patch_embedding.weight"], [5120, 36, 1, 2, 2]);
    assert_eq!(shapes["blocks.39.attn2.add_k_proj.weight"], [5120, 5120]);
    assert_eq!(shapes["condition_embedder.image_embedder.ff.net.2.weight"], [5120, 1280]);
    assert_eq!((tensors, parameters), (1_303, 16_394_878_784));
    let mut ends = pictures;
    ends["pos_embed_seq_len"] = 514.into();
    let (tensors, parameters, _) = count(ends);
    assert_eq!((tensors, parameters), (1_304, 16_395_536_704));
    // 2.2 A14B, whose two transformers read no states of CLIP.
    let (_, parameters, _) = count(serde_json::json!({"in_channels": 36}));
    assert_eq!(parameters, 14_288_901_184);
}

/// CLIP's ViT-H/14 without its last block and the norm after it, which nobody reads.
#[test]
fn clip_vision() {
    let config: ClipVisionConfig = config(serde_json::json!({
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "hidden_act": "gelu",
    }));
    assert_eq!(config.tokens(), 257);
    let shapes = tensor_shapes(|vb| ClipVisionEncoder::load(&config, &vb)).unwrap();
    assert_eq!(shapes["vision_model.embeddings.patch_embedding.weight"], [1280, 3, 14, 14]);
    assert_eq!(count_parameters(&shapes), 611_086_080);
}

#[test]
fn wan_2_1_vae() {
    let config: WanVaeConfig = config(serde_json::json!({}));
    let shapes = tensor_shapes(|vb| WanVae::load(&config, vb)).unwrap();
    assert_eq!(shapes["decoder.up_blocks.1.upsamplers.0.time_conv.weight"], [768, 384, 3, 1, 1]);
    assert_eq!(shapes["encoder.down_blocks.8.time_conv.weight"], [384, 384, 3, 1, 1]);
    assert_eq!((shapes.len(), count_parameters(&shapes) / 100_000), (194, 1_268));
}

#[test]
fn umt5_xxl() {
    let config: T5Config = config(serde_json::json!({
        "model_type": "umt5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "vocab_size": 256384, "feed_forward_proj": "gated-gelu",
    }));
    let shapes = tensor_shapes(|vb| T5Encoder::load(&config, &vb)).unwrap();
    assert_eq!(shapes["encoder.block.23.layer.0.SelfAttention.relative_attention_bias.weight"], [32, 64]);
    assert_eq!(count_parameters(&shapes) / 100_000, 56_809);
}

#[test]
fn wan_2_2_ti2v_5b() {
    let transformer: wan::config::TransformerConfig = config(serde_json::json!({
        "in_channels": 48, "out_channels": 48, "num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336,
    }));
    let shapes = tensor_shapes(|vb| WanTransformer::load(&transformer, &vb)).unwrap();
    assert_eq!(shapes["proj_out.weight"], [192, 3072]);
    assert_eq!((shapes.len(), count_parameters(&shapes) / 1_000_000), (825, 4_999));
    let config: WanVaeConfig = config(serde_json::json!({
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": true, "in_channels": 12,
        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    }));
    let shapes = tensor_shapes(|vb| WanVae::load(&config, vb)).unwrap();
    assert_eq!(shapes["decoder.up_blocks.2.upsampler.resample.1.weight"], [512, 512, 3, 3]);
    assert_eq!(shapes["encoder.down_blocks.1.downsampler.time_conv.weight"], [320, 320, 3, 1, 1]);
    assert_eq!(count_parameters(&shapes) / 1_000_000, 704);
}

#[test]
fn pyramid_flow_miniflux() {
    let config: FluxConfig = config(serde_json::json!({
        "num_layers": 8, "num_single_layers": 16, "num_attention_heads": 30, "in_channels": 64,
    }));
    let shapes = tensor_shapes(|vb| PyramidTransformer::load(&config.settled(), &vb)).unwrap();
    assert_eq!(shapes["transformer_blocks.7.attn.add_q_proj.weight"], [1920, 1920]);
    assert_eq!(shapes["single_transformer_blocks.15.proj_out.weight"], [1920, 9600]);
    assert_eq!(shapes["time_text_embed.text_embedder.linear_1.weight"], [1920, 768]);
    // The published file of 7.89 GB holds this many numbers in f32.
    assert_eq!(count_parameters(&shapes) / 10_000_000, 197);
}

/// The counts are those of the authors' own class with these values, on torch's meta device.
#[test]
fn pyramid_flow_sd3() {
    let config: MmditConfig = config(serde_json::json!({
        "caption_projection_dim": 1536, "pos_embed_type": "sincos", "num_layers": 24,
    }));
    let shapes = tensor_shapes(|vb| PyramidTransformer::load(&config.settled(), &vb)).unwrap();
    assert_eq!(shapes["pos_embed.pos_embed"], [1, 192 * 192, 1536]);
    assert_eq!(shapes["pos_embed.proj.weight"], [1536, 16, 2, 2]);
    assert_eq!(shapes["transformer_blocks.23.attn.norm_add_k.weight"], [64]);
    assert_eq!(shapes["transformer_blocks.22.norm1_context.linear.weight"], [9216, 1536]);
    assert_eq!(shapes["transformer_blocks.23.norm1_context.linear.weight"], [3072, 1536]);
    assert!(!shapes.contains_key("transformer_blocks.23.attn.to_add_out.weight"));
    assert!(!shapes.contains_key("transformer_blocks.23.ff_context.net.2.weight"));
    assert_eq!((shapes.len(), count_parameters(&shapes)), (779, 2_084_957_248));
}

#[test]
fn pyramid_flow_vae() {
    let config: PyramidVaeConfig =
        config(serde_json::json!({"encoder_out_channels": 16, "decoder_in_channels": 16}));
    let shapes = tensor_shapes(|vb| PyramidVae::load(&config, &vb)).unwrap();
    assert_eq!(shapes["decoder.up_blocks.0.upsamplers.0.conv.conv.weight"], [2048, 512, 3, 3, 3]);
    assert_eq!(shapes["decoder.up_blocks.1.resnets.2.conv2.conv.weight"], [512, 512, 3, 3, 3]);
    assert_eq!(shapes["encoder.down_blocks.2.temporal_downsamplers.0.conv.conv.weight"], [512, 512, 3, 3, 3]);
    // The published file of 1.34 GB holds this many numbers in f32.
    assert_eq!(count_parameters(&shapes) / 1_000_000, 335);
}

#[test]
fn clip_l_text() {
    let config: ClipTextConfig = config(serde_json::json!({
        "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2,
    }));
    let shapes = tensor_shapes(|vb| ClipTextEncoder::load(&config, &vb)).unwrap();
    assert_eq!(count_parameters(&shapes) / 1_000_000, 123);
}

/// Both text encoders of Stable Diffusion 3 but for T5, with their projections.
#[test]
fn clip_l_and_clip_g_text_with_projections() {
    let small = serde_json::json!({
        "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2, "projection_dim": 768,
    });
    let mut large = small.clone();
    for (key, value) in [("hidden_size", 1280), ("intermediate_size", 5120), ("num_hidden_layers", 32)] {
        large[key] = value.into();
    }
    (large["num_attention_heads"], large["projection_dim"], large["hidden_act"]) =
        (20.into(), 1280.into(), "gelu".into());
    for (value, tensors, parameters) in [(small, 197, 123_650_304), (large, 517, 694_659_840)] {
        let config: ClipTextConfig = config(value);
        let shapes = tensor_shapes(|vb| ClipTextEncoder::load_projected(&config, &vb)).unwrap();
        let width = config.projection_dim;
        assert_eq!(shapes["text_projection.weight"], [width, config.hidden_size]);
        assert_eq!((shapes.len(), count_parameters(&shapes)), (tensors, parameters));
    }
}

//! The speed of the operations that video models share, and of a few blocks and a small decoder of each family.
//!
//! `cargo bench -p kinoflock-inference --bench families` measures all of them; `beside_torch.py` runs the same shapes in
//! torch, turn by turn with this program, and prints one table. For that the program answers names of cases on its input
//! with milliseconds, when `KINOFLOCK_BESIDE` is set.

#![allow(clippy::unwrap_used, clippy::print_stdout)]
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::collections::BTreeMap;
use std::io::BufRead;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use criterion::Criterion;
use kinoflock_inference::models::{cogvideox, ltx, mochi, pyramid, wan};
use kinoflock_inference::nn::attention::attention;
use kinoflock_inference::nn::conv3d::{Conv3d, Conv3dConfig};
use kinoflock_inference::nn::group_norm::GroupNorm;
use kinoflock_inference::nn::linear::Linear;
use kinoflock_inference::nn::norm::{layer_norm, rms_norm};
use kinoflock_inference::nn::ops::{gelu_tanh, silu};
use kinoflock_inference::sink::Nowhere;
use kinoflock_inference::tiling::Tiling;

#[path = "support/random.rs"]
mod support;

use support::{random, weights};

type Run = Box<dyn FnMut()>;
type Build = fn() -> Run;

/// Names, as `beside_torch.py` has them, and what makes each ready to run.
const CASES: [(&str, Build); 18] = [
    ("gemm 1024x2048x2048", gemm),
    ("conv3d 3x3x3 128 to 128, 9x64x64", conv3d),
    ("attention 32 heads x 1024 x 64", attend),
    ("rms norm 1024x2048", rms),
    ("layer norm 1024x2048", layer),
    ("group norm 32 and SiLU, 128 x 9x64x64", group),
    ("GELU 1024x8192", gelu),
    ("SiLU 1024x8192", silu_case),
    ("LTX-Video transformer", ltx_transformer),
    ("LTX-Video VAE decode", ltx_vae),
    ("CogVideoX transformer", cogvideox_transformer),
    ("CogVideoX VAE decode", cogvideox_vae),
    ("Mochi transformer", mochi_transformer),
    ("Mochi VAE decode", mochi_vae),
    ("Pyramid Flow transformer", pyramid_transformer),
    ("Pyramid Flow VAE decode", pyramid_vae),
    ("Wan transformer", wan_transformer),
    ("Wan VAE decode", wan_vae),
];

fn gemm() -> Run {
    let layer = Linear::load(2048, 2048, false, weights()).unwrap();
    let x = random((1024, 2048));
    Box::new(move || drop(layer.forward(&x).unwrap()))
}

fn conv3d() -> Run {
    let conv = Conv3d::load(Conv3dConfig::cube(128, 128, 3, true), weights()).unwrap();
    let x = random((1, 9, 64, 64, 128));
    Box::new(move || drop(conv.forward(&x).unwrap()))
}

fn attend() -> Run {
    let [q, k, v] = std::array::from_fn(|_| random((1, 1024, 32, 64)));
    Box::new(move || drop(attention(&q, &k, &v, None, 0.125).unwrap()))
}

fn rms() -> Run {
    let (x, weight) = (random((1024, 2048)), random(2048));
    Box::new(move || drop(rms_norm(&x, Some(&weight), 1e-6).unwrap()))
}

fn layer() -> Run {
    let (x, weight, bias) = (random((1024, 2048)), random(2048), random(2048));
    Box::new(move || drop(layer_norm(&x, Some((&weight, &bias)), 1e-6).unwrap()))
}

fn group() -> Run {
    let norm = GroupNorm::new(32, 1e-6, random(128), random(128)).unwrap();
    let x = random((1, 9, 64, 64, 128));
    Box::new(move || drop(norm.forward_silu(&x).unwrap()))
}

fn gelu() -> Run {
    let x = random((1024, 8192));
    Box::new(move || drop(gelu_tanh(&x).unwrap()))
}

fn silu_case() -> Run {
    let x = random((1024, 8192));
    Box::new(move || drop(silu(&x).unwrap()))
}

fn timesteps() -> Tensor {
    Tensor::new(&[500f32], &Device::Cpu).unwrap()
}

fn ltx_transformer() -> Run {
    let config = ltx::config::TransformerConfig {
        num_attention_heads: 8,
        attention_head_dim: 64,
        cross_attention_dim: 512,
        num_layers: 3,
        caption_channels: 512,
        ..Default::default()
    };
    let model = ltx::transformer::LtxTransformer::load(&config, &weights()).unwrap();
    let positions = ltx::rope::Positions::Grid { size: [5, 16, 16], scale: Some([8.0 / 25.0, 32.0, 32.0]) };
    let rope = model.rope().tables(positions, &Device::Cpu).unwrap();
    let (x, text, mask) = (random((1, 1280, 128)), random((1, 128, 512)), ones((1, 128)));
    Box::new(move || {
        let text = model.text_context(&text, Some(&mask)).unwrap();
        drop(model.forward(&x, &timesteps(), &text, &rope).unwrap());
    })
}

fn ones(shape: (usize, usize)) -> Tensor {
    Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
}

fn ltx_vae() -> Run {
    use ltx::vae::{DecodeSettings, LtxVae, LtxVaeConfig, Noise};
    const CONFIG: &str = r#"{"block_out_channels": [32, 64, 128, 128], "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_block_out_channels": [32, 64, 128], "decoder_layers_per_block": [1, 1, 1, 1],
        "decoder_spatio_temporal_scaling": [true, true, true], "decoder_inject_noise": [false, false, false, false],
        "upsample_residual": [true, true, true], "upsample_factor": [2, 2, 2], "timestep_conditioning": true}"#;
    let vae = LtxVae::load_decoder(&LtxVaeConfig::from_json(CONFIG).unwrap(), weights()).unwrap();
    let z = random((1, 128, 5, 8, 8));
    let temb = Tensor::new(&[0.05f32], &Device::Cpu).unwrap();
    Box::new(move || {
        let settings =
            DecodeSettings { timestep: Some(&temb), noise: Noise::None, tiling: Tiling::default() };
        vae.decode(&z, &settings, &mut Nowhere, None).unwrap();
    })
}

fn cogvideox_transformer() -> Run {
    let config = cogvideox::config::TransformerConfig {
        num_attention_heads: 8,
        attention_head_dim: 64,
        num_layers: 3,
        text_embed_dim: 512,
        max_text_seq_length: 64,
        sample_width: 32,
        sample_height: 32,
        sample_frames: 17,
        use_rotary_positional_embeddings: true,
        ..Default::default()
    };
    let model = cogvideox::transformer::CogVideoXTransformer::load(&config, &weights()).unwrap();
    let positions = model.positions([5, 32, 32], 64, &Device::Cpu).unwrap();
    let (x, text) = (random((1, 5, 16, 32, 32)), random((1, 64, 512)));
    Box::new(move || {
        let text = model.project_text(&text).unwrap();
        drop(model.forward(&x, &timesteps(), &text, &positions).unwrap());
    })
}

fn cogvideox_vae() -> Run {
    let config = cogvideox::config::VaeConfig {
        block_out_channels: vec![32, 64, 64, 128],
        layers_per_block: 1,
        ..Default::default()
    };
    let vae = cogvideox::vae::CogVideoXVae::load_decoder(&config, weights()).unwrap();
    let z = random((1, 16, 3, 20, 20));
    Box::new(move || vae.decode(&z, None, &mut Nowhere, None).unwrap())
}

fn mochi_transformer() -> Run {
    let config = mochi::config::TransformerConfig {
        num_attention_heads: 4,
        num_layers: 3,
        pooled_projection_dim: 256,
        text_embed_dim: 512,
        ..Default::default()
    };
    let model = mochi::transformer::MochiTransformer::load(&config, &weights()).unwrap();
    let rope = model.rope([5, 16, 16]).unwrap();
    let (x, text, mask) = (random((1, 1280, 48)), random((1, 64, 512)), ones((1, 64)));
    Box::new(move || {
        let text = model.text_context(&text, &mask).unwrap();
        drop(model.forward(&x, &timesteps(), &text, &rope).unwrap());
    })
}

fn mochi_vae() -> Run {
    let config = mochi::vae::MochiVaeConfig {
        decoder_block_out_channels: vec![32, 64, 128, 192],
        layers_per_block: vec![1, 1, 1, 2, 1],
        ..Default::default()
    };
    let vae = mochi::vae::MochiVae::load_decoder(&config, &weights()).unwrap();
    let z = random((1, 12, 3, 20, 20));
    Box::new(move || vae.decode(&z, Tiling::default(), &mut Nowhere).unwrap())
}

fn pyramid_transformer() -> Run {
    let config = pyramid::config::FluxConfig {
        num_layers: 1,
        num_single_layers: 3,
        num_attention_heads: 8,
        joint_attention_dim: 512,
        ..Default::default()
    };
    let model = pyramid::transformer::PyramidTransformer::load(&config.settled(), &weights()).unwrap();
    let (x, text, mask) = (random((1, 16, 1, 64, 80)), random((1, 64, 512)), ones((1, 64)));
    let pooled = random((1, 768));
    Box::new(move || {
        let text = model.text_context(&text, &mask, &pooled).unwrap();
        drop(model.forward(std::slice::from_ref(&x), &timesteps(), &text).unwrap());
    })
}

fn pyramid_vae() -> Run {
    let config = pyramid::vae::PyramidVaeConfig {
        encoder_out_channels: 16,
        decoder_in_channels: 16,
        decoder_block_out_channels: vec![32, 64, 128, 128],
        decoder_layers_per_block: vec![2; 4],
        ..Default::default()
    };
    let vae = pyramid::vae::PyramidVae::load_decoder(&config, &weights()).unwrap();
    let z = random((1, 16, 2, 20, 20));
    Box::new(move || vae.decode(&z, Tiling::default(), &mut Nowhere).unwrap())
}

fn wan_transformer() -> Run {
    let config = wan::config::TransformerConfig {
        num_attention_heads: 4,
        text_dim: 512,
        ffn_dim: 2048,
        num_layers: 3,
        ..Default::default()
    };
    let model = wan::transformer::WanTransformer::load(&config, &weights()).unwrap();
    let rope = wan::rope::RopeTables::new(&config, [5, 16, 16], &Device::Cpu).unwrap();
    let (x, text) = (random((1, 1280, 64)), random((1, 128, 512)));
    Box::new(move || {
        let text = model.text_context(&text, None).unwrap();
        drop(model.forward(&x, &timesteps(), &text, &rope).unwrap());
    })
}

fn wan_vae() -> Run {
    let config = wan::vae::WanVaeConfig { base_dim: 32, ..Default::default() };
    let vae = wan::vae::WanVae::load_decoder(&config, weights()).unwrap();
    let z = random((1, 16, 3, 20, 20));
    Box::new(move || vae.decode(&z, Tiling::default(), &mut Nowhere).unwrap())
}

/// The least time of a few runs.
fn least(run: &mut Run) -> Duration {
    const RUNS: usize = 3;
    let times = (0..RUNS).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed()
    });
    times.min().unwrap_or_default()
}

/// Answers each name on the input with the least milliseconds of a few runs.
fn answer() {
    let mut ready = BTreeMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let Some(&(name, build)) = CASES.iter().find(|(name, _)| *name == line) else {
            println!("unknown");
            continue;
        };
        let run = ready.entry(name).or_insert_with(|| {
            let mut run = build();
            run();
            run
        });
        println!("{:.3}", least(run).as_secs_f64() * 1e3);
    }
}

fn main() {
    if std::env::var_os("KINOFLOCK_BESIDE").is_some() {
        return answer();
    }
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    for (name, build) in CASES {
        let mut run = build();
        criterion.bench_function(name, |bencher| bencher.iter(&mut run));
    }
    criterion.final_summary();
}

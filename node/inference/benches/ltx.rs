//! LTX-Video's speed on the very shapes on which the reference's is known: one transformer step, one VAE decode.
//!
//! Prints, before criterion's own numbers, the process CPU time and wall time of each (minimum over runs), as a script
//! for the reference does. `RAYON_NUM_THREADS=1 taskset -c 0 cargo bench -p kinoflock-inference` is one thread.

#![allow(clippy::unwrap_used, clippy::print_stdout)]
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use kinoflock_inference::models::ltx::config::TransformerConfig;
use kinoflock_inference::models::ltx::rope::Positions;
use kinoflock_inference::models::ltx::transformer::LtxTransformer;
use kinoflock_inference::models::ltx::vae::{DecodeSettings, LtxVae, LtxVaeConfig, Noise};
use kinoflock_inference::sink::Nowhere;
use kinoflock_inference::tiling::Tiling;

#[path = "support/random.rs"]
mod support;

use support::{random, weights};

/// CPU time of all of this process's threads, where the system tells.
fn cpu_time() -> Option<Duration> {
    let mut total = 0;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        total += text.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    Some(Duration::from_nanos(total))
}

/// This process's memory now and at its peak since `clear_refs` was written, MiB, where the system tells.
fn memory() -> Option<(f64, f64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<f64> {
        let line = status.lines().find(|line| line.starts_with(name))?;
        Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
    };
    Some((field("VmRSS:")?, field("VmHWM:")?))
}

/// Prints by how much a run raises the process's memory at its peak.
fn report_memory(name: &str, run: impl FnOnce()) {
    const RESET_PEAK: &str = "5";
    let reset = std::fs::write("/proc/self/clear_refs", RESET_PEAK).is_ok();
    let (before, start) = (memory(), Instant::now());
    run();
    match (before, memory()) {
        (Some((before, _)), Some((_, peak))) if reset => {
            println!("{name}: peak memory +{:.0} MiB, wall {:.1?}", peak - before, start.elapsed());
        }
        _ => println!("{name}: this system does not tell its peak memory"),
    }
}

fn report(criterion: &mut Criterion, name: &str, mut run: impl FnMut()) {
    const RUNS: usize = 8;
    run();
    let (mut cpu, mut wall) = (Duration::MAX, Duration::MAX);
    for _ in 0..RUNS {
        let (before, start) = (cpu_time(), Instant::now());
        run();
        wall = wall.min(start.elapsed());
        if let (Some(before), Some(after)) = (before, cpu_time()) {
            cpu = cpu.min(after.saturating_sub(before));
        }
    }
    let threads = rayon::current_num_threads();
    println!("{name}: threads {threads}, cpu min {cpu:.1?}, wall min {wall:.1?}, n={RUNS}");
    let mut group = criterion.benchmark_group("ltx");
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(4));
    group.bench_function(name, |bencher| bencher.iter(&mut run));
    group.finish();
}

fn transformer(criterion: &mut Criterion) {
    let config = TransformerConfig {
        num_attention_heads: 8,
        attention_head_dim: 32,
        cross_attention_dim: 256,
        num_layers: 8,
        caption_channels: 256,
        ..TransformerConfig::default()
    };
    let model = LtxTransformer::load(&config, &weights()).unwrap();
    let positions = Positions::Grid { size: [5, 8, 8], scale: Some([8.0 / 25.0, 32.0, 32.0]) };
    let rope = model.rope().tables(positions, &Device::Cpu).unwrap();
    for batch in [1, 2] {
        let (x, text) = (random((batch, 320, 128)), random((batch, 128, 256)));
        let mask = Tensor::ones((batch, 128), DType::F32, &Device::Cpu).unwrap();
        let timestep = Tensor::full(500f32, batch, &Device::Cpu).unwrap();
        report(criterion, &format!("transformer 8 layers 8x32, 320 tokens, batch {batch}"), || {
            // The reference projects the text in every step, so it is counted here, though a pipeline does it once.
            let text = model.text_context(&text, Some(&mask)).unwrap();
            model.forward(&x, &timestep, &text, &rope).unwrap();
        });
        let text = model.text_context(&text, Some(&mask)).unwrap();
        report(criterion, &format!("transformer, text prepared, batch {batch}"), || {
            model.forward(&x, &timestep, &text, &rope).unwrap();
        });
    }
}

const PLAIN: &str = r#"{"block_out_channels": [32, 64, 128, 128], "decoder_block_out_channels": [32, 64, 128, 128],
        "layers_per_block": [1, 1, 1, 1, 1], "decoder_layers_per_block": [1, 1, 1, 1, 1]}"#;
const TIMED: &str = r#"{"block_out_channels": [32, 64, 128, 128], "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_block_out_channels": [32, 64, 128], "decoder_layers_per_block": [1, 1, 1, 1],
        "decoder_spatio_temporal_scaling": [true, true, true], "decoder_inject_noise": [false, false, false, false],
        "upsample_residual": [true, true, true], "upsample_factor": [2, 2, 2], "timestep_conditioning": true}"#;

fn vae(criterion: &mut Criterion) {
    let z = random((1, 128, 5, 8, 8));
    let temb = Tensor::new(&[0.05f32], &Device::Cpu).unwrap();
    for (name, text) in [("0.9.0 form (32,64,128,128)", PLAIN), ("0.9.5 form (32,64,128)", TIMED)] {
        let vae = LtxVae::load_decoder(&LtxVaeConfig::from_json(text).unwrap(), weights()).unwrap();
        let mut settings =
            DecodeSettings { timestep: Some(&temb), noise: Noise::None, tiling: Tiling::default() };
        report(criterion, &format!("VAE {name}, 128x5x8x8 to 33x256x256"), || {
            vae.decode(&z, &settings, &mut Nowhere, None).unwrap();
        });
        settings.tiling = Tiling { tile: Some(128), chunk: Some(16) };
        report(criterion, &format!("VAE {name}, tiles of 128, runs of 16"), || {
            vae.decode(&z, &settings, &mut Nowhere, None).unwrap();
        });
    }
}

/// What tiles are for: 65 frames of 512x512, whole and cut.
fn vae_memory(_: &mut Criterion) {
    let z = random((1, 128, 9, 16, 16));
    let temb = Tensor::new(&[0.05f32], &Device::Cpu).unwrap();
    for (name, text) in [("0.9.0 form", PLAIN), ("0.9.5 form", TIMED)] {
        let vae = LtxVae::load_decoder(&LtxVaeConfig::from_json(text).unwrap(), weights()).unwrap();
        for (tile, chunk) in [(None, None), (Some(256), Some(32)), (Some(128), Some(16))] {
            let tiling = Tiling { tile, chunk };
            let settings = DecodeSettings { timestep: Some(&temb), noise: Noise::None, tiling };
            report_memory(&format!("VAE {name}, 128x9x16x16 to 65x512x512, {tiling:?}"), || {
                vae.decode(&z, &settings, &mut Nowhere, None).unwrap();
            });
        }
    }
}

criterion_group!(benches, vae_memory, transformer, vae);
criterion_main!(benches);

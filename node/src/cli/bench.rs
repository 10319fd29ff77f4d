//! `kinoflockd bench`: what this machine makes of a job, through the very worker that runs jobs.

mod compare;

use clap::Args;
use kinoflock_protocol::id::JobId;

use super::say;
use crate::config::Config;
use crate::engine::supervisor::{self, WorkerConfig};
use crate::engine::{bench, wire};
use crate::models::{Model, ModelStore, selftest};

/// Flags of `bench`.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Only this model, by name or id.
    #[arg(long)]
    model: Option<String>,
    /// Runs of each model; the fastest counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// As JSON lines.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compare: compare::CompareArgs,
}

pub(super) fn run(args: &BenchArgs, config: &Config) -> anyhow::Result<()> {
    if args.compare.compare {
        return compare::run(&args.compare, args.runs as usize, args.json);
    }
    let store = ModelStore::open(&config.storage.models, config.storage.models_limit)?;
    store.import_bundled()?;
    let wanted = |model: &Model| {
        args.model.as_ref().is_none_or(|name| model.name == *name || model.id.to_string() == *name)
    };
    let models: Vec<_> = store.list()?.into_iter().filter(|model| wanted(model)).collect();
    anyhow::ensure!(!models.is_empty(), "no such model here; see `kinoflockd model list`");
    tokio::runtime::Runtime::new()?.block_on(all(args, config, &models))
}

async fn all(args: &BenchArgs, config: &Config, models: &[Model]) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut result = Ok(());
    for device in &config.devices {
        let (engine, mut events) = supervisor::spawn(WorkerConfig::of_device(device, &config.engine)?);
        for model in models {
            let mut best: Option<(wire::DoneReport, bench::Speed)> = None;
            for _ in 0..args.runs {
                let request = default_job(model, folder)?;
                match bench::run_to_end(&engine, &mut events, request.clone(), |_| {}).await {
                    Ok(report) => {
                        let speed = bench::speed(&model.manifest.work, &request, &report);
                        if best.as_ref().is_none_or(|(_, fastest)| speed.seconds < fastest.seconds) {
                            best = Some((report, speed));
                        }
                    }
                    Err(failure) => {
                        result = Err(anyhow::anyhow!("{} on {}: {}", model.name, device.name, failure.text))
                    }
                }
            }
            if let Some((report, speed)) = best {
                show(args.json, &device.name, model, &report, speed);
            }
        }
        engine.shutdown().await;
    }
    result
}

/// The model's fixed job, with its files in this folder.
pub(super) fn fixed_job(model: &Model, folder: &std::path::Path) -> anyhow::Result<wire::RunRequest> {
    let path = |name: &str| wire::WirePath::new(folder.join(name).display().to_string());
    let load =
        wire::LoadRequest { model: model.id, dir: wire::WirePath::new(model.dir.display().to_string())? };
    let output = wire::Output { clip: path("clip.mp4")?, latents: None, checkpoint: None, states: None };
    Ok(selftest::request(model, JobId::from_bytes([0xbe; 32]), load, output))
}

/// The model's own default clip.
fn default_job(model: &Model, folder: &std::path::Path) -> anyhow::Result<wire::RunRequest> {
    let mut request = fixed_job(model, folder)?;
    let defaults = &model.manifest.defaults;
    (request.frames, request.width, request.height) = (defaults.frames, defaults.width, defaults.height);
    (request.steps, request.guidance) = (defaults.steps, defaults.guidance.to_f64());
    Ok(request)
}

fn show(json: bool, device: &str, model: &Model, report: &wire::DoneReport, speed: bench::Speed) {
    let took = report.timings;
    let step = took.steps / f64::from(report.steps_done.max(1));
    let tflops = speed.per_second as f64 / 1e6;
    if json {
        let row = serde_json::json!({
            "schema": 1, "device": device, "model": model.name, "frames": report.frames, "width": report.width,
            "height": report.height, "steps": report.steps_done, "text_s": took.text, "step_s": step,
            "decode_s": took.decode, "encode_s": took.encode, "total_s": speed.seconds, "tflop_per_s": tflops,
        });
        return say::data(&row.to_string());
    }
    say::data(&format!(
        "{device}: {} {}x{}, {} frames, {} steps: {:.2} s (text {:.3}, step {step:.3}, decode {:.3}, encode {:.3}), {tflops:.4} TFLOP/s",
        model.name,
        report.width,
        report.height,
        report.frames,
        report.steps_done,
        speed.seconds,
        took.text,
        took.decode,
        took.encode,
    ));
}

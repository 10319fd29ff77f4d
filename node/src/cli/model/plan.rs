//! `kinoflockd model show --plan`: what a clip needs in memory, phase by phase, and how it fits the devices.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use kinoflock_inference::plan::{Fit, MemoryPlan, PhaseMemory};
use kinoflock_inference::sampler::guidance::GuidancePasses;
use kinoflock_inference::{Adapter, DType, Device, GenerateRequest, Lora, SecondPass, Tensor};
use kinoflock_protocol::work::JobShape;

use super::super::say;
use super::words::size;
use crate::config::{Config, DeviceConfig};
use crate::memory;
use crate::models::Model;

/// What is planned.
#[derive(Debug, Args)]
pub(in crate::cli) struct PlanArgs {
    /// Print instead what a clip needs in memory, and whether it fits the devices of the configuration.
    #[arg(long)]
    plan: bool,
    /// Width and height, such as 768x512; the model's default if not given.
    #[arg(long, requires = "plan", value_name = "WxH")]
    size: Option<String>,
    /// Frames; the model's default if not given.
    #[arg(long, requires = "plan")]
    frames: Option<u32>,
    /// With an adapter (LoRA) out of this file beside the model's layers; several may be given.
    #[arg(long, requires = "plan", value_name = "FILE")]
    lora: Vec<PathBuf>,
    /// As a second pass over latents of half the size, which the model's upsampler makes larger first.
    #[arg(long, requires = "plan")]
    second_pass: bool,
}

impl PlanArgs {
    pub(super) fn is_wanted(&self) -> bool {
        self.plan
    }

    fn shape(&self, model: &Model) -> anyhow::Result<JobShape> {
        let defaults = &model.manifest.defaults;
        let (width, height) = match &self.size {
            Some(text) => {
                let sides = text.split_once(['x', 'X']);
                let sides =
                    sides.and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
                sides.with_context(|| format!("--size {text}: write it as 768x512"))?
            }
            None => (defaults.width, defaults.height),
        };
        Ok(JobShape {
            frames: self.frames.unwrap_or(defaults.frames),
            width,
            height,
            steps: defaults.steps,
            guided: defaults.guidance.to_f64() > 1.0,
        })
    }
}

impl PlanArgs {
    /// The request that is planned.
    fn request(&self, model: &Model, shape: &JobShape, most: u64) -> anyhow::Result<GenerateRequest> {
        let mut request = memory::request(model, shape)?;
        for file in &self.lora {
            let lora = Lora::read(file, &file.display().to_string(), most)?;
            request.adapters.push(Adapter { lora: Arc::new(lora), scale: 1.0 });
        }
        if self.second_pass {
            let work = kinoflock_inference::registry::facts(&model.dir)?.info.work;
            let half = |side: usize| side / work.spatial_ratio / 2;
            let frames = request.frames.saturating_sub(1) / work.temporal_ratio + 1;
            let latents = (1, work.latent_channels, frames, half(request.height), half(request.width));
            request.initial_latents = Some(Tensor::zeros(latents, DType::F32, &Device::Cpu)?);
            request.second_pass = Some(SecondPass::new(1.0));
        }
        Ok(request)
    }
}

pub(super) fn show(model: &Model, args: &PlanArgs, config: &Config, json: bool) -> anyhow::Result<()> {
    let shape = args.shape(model)?;
    let request = args.request(model, &shape, config.policy.adapter_bytes)?;
    let each = |device| Planned::new(device, model, &request);
    let plans = config.devices.iter().map(each).collect::<anyhow::Result<Vec<_>>>()?;
    if json {
        let rows: Vec<_> = plans.iter().map(Planned::as_json).collect();
        say::data(&serde_json::to_string_pretty(&serde_json::json!({
            "schema": 1, "model": model.id.to_string(), "width": shape.width, "height": shape.height,
            "frames": shape.frames, "guided": shape.guided, "devices": rows,
        }))?);
        return Ok(());
    }
    let guided = if shape.guided { "guided" } else { "not guided" };
    let mut lines =
        vec![format!("{}: {}x{}, {} frames, {guided}", model.name, shape.width, shape.height, shape.frames)];
    for planned in &plans {
        lines.extend(planned.table());
    }
    say::data(&lines.join("\n"));
    Ok(())
}

/// A device's plan.
struct Planned<'a> {
    device: &'a DeviceConfig,
    limit: Option<u64>,
    plan: MemoryPlan,
    fit: Fit,
}

impl<'a> Planned<'a> {
    fn new(device: &'a DeviceConfig, model: &Model, request: &GenerateRequest) -> anyhow::Result<Self> {
        let (mut options, limit) = (memory::plan_options(device), memory::limit(device));
        let mut request = request.clone();
        options.merges = device.merge_adapters && !request.adapters.is_empty();
        if options.merges {
            request.adapters.clear();
        }
        let how = (memory::offload(device.offload), limit);
        let plan = MemoryPlan::new(&model.dir, &request, &options)?;
        Ok(Self { device, limit, plan, fit: Fit::of(&model.dir, &request, &options, how)? })
    }

    fn as_json(&self) -> serde_json::Value {
        serde_json::json!({
            "device": self.device.name, "plan": self.plan, "loaded": self.plan.peak(false),
            "in_turn": self.plan.peak(true), "limit": self.limit, "needs": self.fit.needs,
            "decode_tile": self.fit.decode.tile, "decode_chunk": self.fit.decode.chunk,
            "guidance_apart": self.is_apart(),
        })
    }

    fn table(&self) -> Vec<String> {
        let (options, plan) = (memory::plan_options(self.device), &self.plan);
        let numbers = format!("{:?}", options.dtype).to_lowercase();
        /// The least width of a phase's components.
        const USES: usize = 32;
        let longest = plan.phases.iter().map(|phase| uses(plan, phase).len() + 1).max();
        let width = longest.unwrap_or(0).max(USES);
        let mut lines = vec![
            String::new(),
            format!("on {} in {numbers}", self.device.name),
            row(
                "phase",
                ("uses", width),
                ["its weights", "tensors", "if in turn", "if all loaded"].map(str::to_owned),
            ),
        ];
        for phase in &plan.phases {
            let in_turn = plan.weights_in(phase, true);
            let tensors = if phase.on_host { 0 } else { phase.activations };
            let sum = |weights: u64| size(weights.saturating_add(tensors));
            let figures =
                [size(in_turn), size(phase.activations), sum(in_turn), sum(plan.weights_in(phase, false))];
            lines.push(row(phase.phase.name(), (&uses(plan, phase), width), figures));
        }
        let peaks = [String::new(), String::new(), size(plan.peak(true)), size(plan.peak(false))];
        lines.push(row("at most", ("", width), peaks));
        for component in plan.components.iter().filter(|component| component.in_blocks > 0) {
            let (name, blocks) = (component.name, size(component.in_blocks));
            lines.push(format!(
                "  {blocks} of the {name} stay in blocks of few bits, and each is widened for its call"
            ));
        }
        if options.text_on_cpu {
            let host = size(plan.host_peak());
            lines.push(format!("  and {host} of the machine's memory for the text encoder"));
        }
        lines.push(format!("  {}", self.verdict()));
        lines
    }

    /// Whether guidance's predictions, which would go in one batch, do not because of the limit.
    fn is_apart(&self) -> bool {
        self.fit.passes == GuidancePasses::Apart
    }

    fn verdict(&self) -> String {
        let Some(limit) = self.limit else {
            return "no limit is set or known here: device.memory_limit".to_owned();
        };
        let needs = self.fit.needs;
        let how = if needs.in_turn { "loaded in turn" } else { "all loaded" };
        let pieces = match (self.fit.decode.tile, self.fit.decode.chunk) {
            (None, None) => String::new(),
            (None, Some(run)) => format!(", decoded in runs of {run} frames"),
            (Some(tile), None) => format!(", decoded in tiles of {tile} pixels"),
            (Some(tile), Some(run)) => {
                format!(", decoded in tiles of {tile} pixels and runs of {run} frames")
            }
        };
        let passes = if self.is_apart() { ", guidance's two predictions one after the other" } else { "" };
        let fits = if needs.fits { "fits" } else { "does not fit" };
        let (needed, limit) = (size(needs.bytes), size(limit));
        format!(
            "offload {}: {how}{pieces}{passes}, it needs {needed} and {fits} into {limit}",
            self.device.offload
        )
    }
}

fn uses(plan: &MemoryPlan, phase: &PhaseMemory) -> String {
    let names = phase.uses.iter().map(|&index| plan.components[index].name);
    names.collect::<Vec<_>>().join(", ")
}

fn row(phase: &str, (uses, width): (&str, usize), [own, tensors, in_turn, all]: [String; 4]) -> String {
    format!("  {phase:<11}{uses:<width$}{own:>12}{tensors:>10}{in_turn:>12}{all:>15}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_of_a_plan_stand_below_each_other() {
        let figures = ["1.2 GB", "300 MB", "1.5 GB", "9.9 GB"].map(str::to_owned);
        let line = row("text", ("text encoder, clip text encoder", 33), figures.clone());
        assert_eq!(line.len(), row("conditions", ("vae", 33), figures).len());
    }
}

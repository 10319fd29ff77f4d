//! Wan: UniPC, flow matching with the scheduler's own spacing, transformer, VAE, whole runs.

use kinoflock_inference::models::wan::pipeline::{WanPipeline, WanSampler, load_transformer, load_vae};
use kinoflock_inference::models::wan::rope::RopeTables;
use kinoflock_inference::pipeline::latents::{pack, unpack};
use kinoflock_inference::pipeline::run::decoded;
use kinoflock_inference::registry::ModelIndex;
use kinoflock_inference::sampler::{
    FlowMatchConfig, Schedule, ScheduleRequest, UniPc, UniPcConfig, UniPcState,
};
use kinoflock_inference::sink::whole;
use kinoflock_inference::tiling::Tiling;
use kinoflock_inference::{Device, GenerateRequest, LoadOptions, Tensor};

use super::common::{self, numbers, record, request, text};
use super::golden::{Case, Outputs};
use super::{Adapter, Kind};

/// Wan's goldens.
pub(crate) const ADAPTER: Adapter = Adapter { names: &["Wan"], compute };

fn compute(case: &Case, kind: Kind) -> Result<Option<Outputs>, String> {
    Ok(Some(match kind {
        Kind::EndToEnd => run(case)?,
        Kind::Scheduler if case.params.contains_key("config") => euler(case)?,
        Kind::Scheduler => unipc(case)?,
        Kind::PromptEmbeds => prompt_embeds(case)?,
        Kind::Transformer => transformer(case)?,
        Kind::VaeEncode => vae_encode(case)?,
        Kind::VaeDecode => vae_decode(case)?,
        _ => return Ok(None),
    }))
}

#[derive(serde::Deserialize)]
struct Combo {
    steps: usize,
    #[serde(default)]
    flow_shift: Option<f64>,
}

/// Sigmas and timesteps of every combination, and a chain of steps along the first.
fn euler(case: &Case) -> Result<Outputs, String> {
    let config: FlowMatchConfig = case.param("config")?;
    let mut outputs = Vec::new();
    for (index, combo) in case.param::<Vec<Combo>>("combos")?.iter().enumerate() {
        let schedule = Schedule::new(&config, &ScheduleRequest::Trained(combo.steps), 0.0).map_err(text)?;
        outputs.push((format!("out.sigmas.{index}"), "", numbers(&schedule.sigmas)?));
        outputs.push((format!("out.timesteps.{index}"), "", numbers(&schedule.timesteps)?));
        let Some(mut sample) = case.tensors.get("in.sample").filter(|_| index == 0).cloned() else {
            continue;
        };
        for (step, velocity) in case.numbered("in.model_output.").iter().enumerate().take(schedule.steps()) {
            sample = schedule.step(step, &sample, velocity).map_err(text)?;
            outputs.push((format!("out.prev_sample.{step}"), "", sample.clone()));
        }
    }
    Ok(outputs)
}

/// Sigmas, timesteps and a chain of steps of every combination.
fn unipc(case: &Case) -> Result<Outputs, String> {
    let WanSampler::UniPc(config) = WanSampler::load(&case.pipeline).map_err(text)? else {
        return Err("the folder's scheduler is not UniPC".to_owned());
    };
    let mut outputs = Vec::new();
    for (index, combo) in case.param::<Vec<Combo>>("combos")?.iter().enumerate() {
        let flow_shift = combo.flow_shift.unwrap_or(config.flow_shift);
        let config = UniPcConfig { flow_shift, ..config.clone() };
        let sampler = UniPc::new(&config, combo.steps).map_err(text)?;
        outputs.push((format!("out.sigmas.{index}"), "", numbers(&sampler.sigmas)?));
        outputs.push((format!("out.timesteps.{index}"), "", numbers(&sampler.timesteps)?));
        let mut sample = case.input(&format!("in.sample.{index}"))?.clone();
        let mut state = UniPcState::default();
        let model_outputs = case.numbered(&format!("in.model_output.{index}."));
        for (step, output) in model_outputs.iter().enumerate().take(sampler.steps()) {
            sample = sampler.step(&mut state, step, &sample, output).map_err(text)?;
            outputs.push((format!("out.prev_sample.{index}.{step}"), "", sample.clone()));
        }
    }
    Ok(outputs)
}

/// A forward pass with every module's result.
fn transformer(case: &Case) -> Result<Outputs, String> {
    let (transformer, _) =
        load_transformer(&case.pipeline, "transformer", &LoadOptions::default()).map_err(text)?;
    let (latents, timesteps) = (case.input("in.hidden_states")?, case.input("in.timestep")?);
    let patch = transformer.config().patch_size;
    let (_, _, frames, height, width) = latents.dims5().map_err(text)?;
    let cells = [frames, height, width];
    let grid = std::array::from_fn(|axis| cells[axis] / patch[axis]);
    let rope = RopeTables::new(transformer.config(), grid, &Device::Cpu).map_err(text)?;
    let context = transformer.text_context(case.input("in.encoder_hidden_states")?, None).map_err(text)?;
    let mut outputs = Vec::new();
    let latents = pack(latents, patch).map_err(text)?;
    let sample = transformer
        .forward_probed(&latents, timesteps, &context, &rope, &mut record(&mut outputs))
        .map_err(text)?;
    outputs.push(("out.sample".to_owned(), "", unpack(&sample, cells, patch).map_err(text)?));
    Ok(outputs)
}

/// The moments of a video.
fn vae_encode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), true).map_err(text)?;
    let moments = vae.encode(case.input("in.x")?).map_err(text)?;
    Ok(common::moments(moments))
}

/// A decode of latents that are already denormalised, in runs of one latent frame and of three.
fn vae_decode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), false).map_err(text)?;
    let z = case.input("in.z")?;
    let ways = [("", None), ("runs of 12 frames", Some(12))];
    let decoded = ways.map(|(label, chunk)| {
        let video = whole(|sink| vae.decode(z, Tiling { chunk, ..Tiling::default() }, sink)).map_err(text)?;
        Ok(("out.decoded".to_owned(), label, video))
    });
    decoded.into_iter().collect()
}

/// What the pipeline makes of a prompt and a negative prompt.
fn prompt_embeds(case: &Case) -> Result<Outputs, String> {
    let pipeline = load_pipeline(case)?;
    common::prompt_embeds(case, |prompt| Ok((pipeline.encode_prompt(prompt, true).map_err(text)?, None)))
}

/// The folder's pipeline, told what the manifest says of this golden.
fn load_pipeline(case: &Case) -> Result<WanPipeline, String> {
    let index = ModelIndex::read(&case.pipeline).map_err(text)?;
    let mut pipeline = WanPipeline::load(&case.pipeline, &index, &LoadOptions::default()).map_err(text)?;
    if let Some(limit) = case.maybe("max_sequence_length")? {
        pipeline.set_token_limit(limit);
    }
    pipeline.set_low_noise_guidance(case.maybe("guidance_scale_2")?);
    let own = match pipeline.sampler() {
        WanSampler::UniPc(config) => ("UniPCMultistepScheduler", config.flow_shift),
        WanSampler::Euler(config) => ("FlowMatchEulerDiscreteScheduler", config.shift),
    };
    match case.maybe::<String>("scheduler")? {
        Some(class) if class == "FlowMatchEulerDiscreteScheduler" && class != own.0 => {
            let config = case.maybe("scheduler_config")?;
            let with_shift = || FlowMatchConfig { shift: own.1, ..FlowMatchConfig::default() };
            pipeline.set_sampler(WanSampler::Euler(config.unwrap_or_else(with_shift)));
        }
        Some(class) if class != own.0 => return Err(format!("scheduler {class} is not known")),
        _ => {}
    }
    Ok(pipeline)
}

/// Latents step by step, the schedule, and the frames where the golden has them.
fn run(case: &Case) -> Result<Outputs, String> {
    let mut pipeline = load_pipeline(case)?;
    let request = GenerateRequest { conditions: common::conditions(case)?, ..request(case, &pipeline)? };
    let schedule = pipeline.schedule(&request).map_err(text)?;
    let (mut outputs, latents) = common::run(&mut pipeline, &request)?;
    outputs.push(("out.sigmas".to_owned(), "", numbers(schedule.course().sigmas)?));
    outputs.push(("out.timesteps".to_owned(), "", numbers(schedule.course().timesteps)?));
    outputs.push(("out.latents".to_owned(), "", latents.clone()));
    if case.wanted().iter().any(|name| name == "out.frames") {
        let video: Tensor = decoded(&pipeline, &request, &latents).map_err(text)?;
        outputs.push(("out.frames".to_owned(), "", video.unsqueeze(0).map_err(text)?));
    }
    Ok(outputs)
}

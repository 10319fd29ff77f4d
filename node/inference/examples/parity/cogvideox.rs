//! CogVideoX: samplers, rotary tables, transformer, VAE, whole runs.

use kinoflock_inference::models::cogvideox::CogVideoXPipeline;
use kinoflock_inference::models::cogvideox::config::TransformerConfig;
use kinoflock_inference::models::cogvideox::pipeline::{load_transformer, load_vae};
use kinoflock_inference::models::cogvideox::positions::RopeTables;
use kinoflock_inference::models::cogvideox::transformer::Positions;
use kinoflock_inference::pipeline::run::decoded;
use kinoflock_inference::registry::ModelIndex;
use kinoflock_inference::sampler::{DiffusionConfig, DiffusionSampler, DiffusionSchedule};
use kinoflock_inference::sink::whole;
use kinoflock_inference::{Device, GenerateRequest, LoadOptions, Tensor};

use super::common::{self, numbers, record, text};
use super::golden::{Case, Outputs};
use super::{Adapter, Kind};

/// CogVideoX's goldens.
pub(crate) const ADAPTER: Adapter = Adapter { names: &["CogVideoX"], compute };

fn compute(case: &Case, kind: Kind) -> Result<Option<Outputs>, String> {
    Ok(Some(match kind {
        Kind::EndToEnd => run(case)?,
        Kind::Rope => rotary(case)?,
        Kind::Scheduler => scheduler(case)?,
        Kind::PromptEmbeds => prompt_embeds(case)?,
        Kind::Transformer => transformer(case)?,
        Kind::VaeEncode => vae_encode(case)?,
        Kind::VaeDecode => vae_decode(case)?,
        _ => return Ok(None),
    }))
}

#[derive(serde::Deserialize)]
struct Size {
    height: usize,
    width: usize,
    latent_frames: usize,
}

/// Latent cells: frames, rows, columns.
fn cells(size: &Size) -> [usize; 3] {
    const RATIO: usize = 8;
    [size.latent_frames, size.height / RATIO, size.width / RATIO]
}

fn rotary(case: &Case) -> Result<Outputs, String> {
    let config = TransformerConfig::read(&case.pipeline.join("transformer/config.json")).map_err(text)?;
    let mut outputs = Vec::new();
    for (index, size) in case.param::<Vec<Size>>("combos")?.iter().enumerate() {
        let (patch, cells) = (config.patch(), cells(size));
        let grid = std::array::from_fn(|axis| cells[axis] / patch[axis]);
        let tables = RopeTables::new(&config, grid, &Device::Cpu).map_err(text)?;
        let (cos, sin) = tables.full().map_err(text)?;
        outputs.push((format!("out.cos.{index}"), "", cos));
        outputs.push((format!("out.sin.{index}"), "", sin));
    }
    Ok(outputs)
}

#[derive(serde::Deserialize)]
struct Combo {
    steps: usize,
}

/// Levels, timesteps, and a chain of steps along every combination that has inputs.
fn scheduler(case: &Case) -> Result<Outputs, String> {
    let config: DiffusionConfig = case.param("config")?;
    let class: String = case.param("class")?;
    let sampler =
        DiffusionSampler::from_class(&class).ok_or_else(|| format!("scheduler {class} is not known"))?;
    let alphas = config.alphas();
    let levels = Tensor::from_slice(&alphas, alphas.len(), &Device::Cpu).map_err(text)?;
    let mut outputs = vec![("f64.alphas_cumprod".to_owned(), "", levels)];
    for (index, combo) in case.param::<Vec<Combo>>("combos")?.iter().enumerate() {
        let schedule = DiffusionSchedule::new(&config, combo.steps).map_err(text)?;
        outputs.push((format!("out.timesteps.{index}"), "", numbers(&schedule.timesteps)?));
        if let Some(sample) = case.tensors.get(&format!("in.sample.{index}")) {
            chain(case, index, sampler, &schedule, sample, &mut outputs)?;
        }
    }
    Ok(outputs)
}

fn chain(
    case: &Case,
    index: usize,
    sampler: DiffusionSampler,
    schedule: &DiffusionSchedule,
    sample: &Tensor,
    outputs: &mut Outputs,
) -> Result<(), String> {
    let (mut sample, mut earlier) = (sample.clone(), None);
    for i in 0..schedule.steps() {
        let output = case.input(&format!("in.model_output.{index}.{i}"))?;
        let step = match sampler {
            DiffusionSampler::Ddim => schedule.ddim(i, &sample, output),
            DiffusionSampler::Dpm => {
                let drawn = case.numbered(&format!("noise.{index}.{i}."));
                let noise = drawn.last().ok_or_else(|| format!("noise.{index}.{i} is missing"))?;
                schedule.dpm(i, &sample, output, earlier.as_ref(), noise)
            }
        };
        let step = step.map_err(text)?;
        outputs.push((format!("out.prev_sample.{index}.{i}"), "", step.sample.clone()));
        outputs.push((format!("out.pred_x0.{index}.{i}"), "", step.predicted.clone()));
        (sample, earlier) = (step.sample, Some(step.predicted));
    }
    Ok(())
}

fn prompt_embeds(case: &Case) -> Result<Outputs, String> {
    let pipeline = load_pipeline(case)?;
    common::prompt_embeds(case, |prompt| Ok((pipeline.encode_prompt(prompt, true).map_err(text)?, None)))
}

/// A forward pass with every module's result; where the golden has rotary tables, with those as well as with our own.
fn transformer(case: &Case) -> Result<Outputs, String> {
    let (transformer, _) = load_transformer(&case.pipeline, &LoadOptions::default()).map_err(text)?;
    let (latents, timesteps) = (case.input("in.hidden_states")?, case.input("in.timestep")?);
    let (_, frames, _, rows, columns) = latents.dims5().map_err(text)?;
    let words = transformer.project_text(case.input("in.encoder_hidden_states")?).map_err(text)?;
    let tokens = words.dim(1).map_err(text)?;
    let own = transformer.positions([frames, rows, columns], tokens, &Device::Cpu).map_err(text)?;
    let mut outputs = Vec::new();
    let forward = |positions: &Positions, outputs: &mut Outputs| {
        transformer.forward_probed(latents, timesteps, &words, positions, &mut record(outputs)).map_err(text)
    };
    let sample = forward(&own, &mut outputs)?;
    outputs.push(("out.sample".to_owned(), "", sample));
    if let Some(cos) = case.tensors.get("in.image_rotary_emb.0") {
        let given = RopeTables { cos: halved(cos)?, sin: halved(case.input("in.image_rotary_emb.1")?)? };
        let rotary = Some(given.after(tokens).map_err(text)?);
        let given = Positions { rotary, ..own };
        let sample = forward(&given, &mut Vec::new())?;
        outputs.push(("out.sample".to_owned(), "given tables", sample));
    }
    Ok(outputs)
}

/// Every other column of a table that holds each value twice.
fn halved(table: &Tensor) -> Result<Tensor, String> {
    let (tokens, width) = table.dims2().map_err(text)?;
    let pairs = table.reshape((tokens, width / 2, 2)).map_err(text)?;
    pairs.narrow(2, 0, 1).and_then(|first| first.squeeze(2)?.contiguous()).map_err(text)
}

fn vae_encode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), true).map_err(text)?;
    let mut outputs = Vec::new();
    let moments = vae.encode(case.input("in.x")?, Some(&mut record(&mut outputs))).map_err(text)?;
    outputs.extend(common::moments(moments));
    Ok(outputs)
}

fn vae_decode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), false).map_err(text)?;
    let mut outputs = Vec::new();
    let z = case.input("in.z")?;
    let tile = case.maybe("tile")?;
    let decoded = whole(|sink| vae.decode(z, tile, sink, Some(&mut record(&mut outputs)))).map_err(text)?;
    outputs.push(("out.decoded".to_owned(), "", decoded));
    Ok(outputs)
}

/// The folder's pipeline, told what the manifest says of this golden.
fn load_pipeline(case: &Case) -> Result<CogVideoXPipeline, String> {
    let index = ModelIndex::read(&case.pipeline).map_err(text)?;
    let mut pipeline =
        CogVideoXPipeline::load(&case.pipeline, &index, &LoadOptions::default()).map_err(text)?;
    if let Some(limit) = case.maybe("max_sequence_length")? {
        pipeline.set_token_limit(limit);
    }
    if let Some(class) = case.maybe::<String>("scheduler")? {
        let sampler =
            DiffusionSampler::from_class(&class).ok_or_else(|| format!("scheduler {class} is not known"))?;
        let config = std::fs::read_to_string(case.pipeline.join("scheduler/scheduler_config.json"));
        let config = serde_json::from_str(&config.map_err(text)?).map_err(text)?;
        pipeline.set_sampler(sampler, case.maybe("scheduler_config")?.unwrap_or(config));
    }
    Ok(pipeline)
}

/// Latents step by step, the schedule, and the frames where the golden has them.
fn run(case: &Case) -> Result<Outputs, String> {
    let mut pipeline = load_pipeline(case)?;
    let mut request = GenerateRequest {
        dynamic_guidance: case.maybe("use_dynamic_cfg")?.unwrap_or(false),
        step_noise: case.numbered("noise."),
        conditions: common::conditions(case)?,
        ..common::request(case, &pipeline)?
    };
    // The reference draws the picture's latents before everything else.
    if !request.conditions.is_empty() && !request.step_noise.is_empty() {
        request.condition_noise = vec![request.step_noise.remove(0)];
    }
    let schedule = pipeline.schedule(&request).map_err(text)?;
    let (mut outputs, latents) = common::run(&mut pipeline, &request)?;
    outputs.push(("out.timesteps".to_owned(), "", numbers(&schedule.timesteps)?));
    if let Some((_, _, last)) = outputs.iter().rfind(|(name, ..)| name.starts_with("out.latents_step.")) {
        outputs.push(("out.latents".to_owned(), "", last.clone()));
    }
    if case.wanted().iter().any(|name| name == "out.frames") {
        let video = decoded(&pipeline, &request, &latents).map_err(text)?;
        outputs.push(("out.frames".to_owned(), "", video.unsqueeze(0).map_err(text)?));
    }
    Ok(outputs)
}

//! Mochi: schedules, prompts, transformer, VAE whole and in runs, whole runs of the pipeline.

use kinoflock_inference::models::mochi::pipeline::{MochiPipeline, load_transformer, load_vae};
use kinoflock_inference::pipeline::latents::{pack, unpack};
use kinoflock_inference::pipeline::run::decoded;
use kinoflock_inference::registry::ModelIndex;
use kinoflock_inference::sampler::{ScheduleRequest, linear_quadratic};
use kinoflock_inference::sink::whole;
use kinoflock_inference::tiling::Tiling;
use kinoflock_inference::{LoadOptions, Pipeline, Tensor};

use super::common::{self, numbers, record, text};
use super::golden::{Case, Outputs};
use super::{Adapter, Kind};

/// Mochi's goldens.
pub(crate) const ADAPTER: Adapter = Adapter { names: &["Mochi"], compute };

/// Noise that is taken away in the linear half of the steps.
const THRESHOLD: f64 = 0.025;

fn compute(case: &Case, kind: Kind) -> Result<Option<Outputs>, String> {
    Ok(Some(match kind {
        Kind::EndToEnd => run(case)?,
        Kind::Scheduler => common::flow_match(case, points)?,
        Kind::Other if case.name.starts_with("linear_quadratic") => sigmas(case)?,
        Kind::PromptEmbeds => prompt_embeds(case)?,
        Kind::Transformer => transformer(case)?,
        Kind::VaeEncode => vae_encode(case)?,
        Kind::VaeDecode => vae_decode(case)?,
        _ => return Ok(None),
    }))
}

fn points(steps: usize) -> ScheduleRequest {
    ScheduleRequest::Sigmas(linear_quadratic(steps, THRESHOLD))
}

/// The noise levels that the schedule is given.
fn sigmas(case: &Case) -> Result<Outputs, String> {
    #[derive(serde::Deserialize)]
    struct Combo {
        steps: usize,
    }
    let combos: Vec<Combo> = case.param("combos")?;
    let row = |(index, combo): (usize, &Combo)| {
        Ok((format!("out.lq.{index}"), "", numbers(&linear_quadratic(combo.steps, THRESHOLD))?))
    };
    combos.iter().enumerate().map(row).collect()
}

/// A forward pass with every module's result.
fn transformer(case: &Case) -> Result<Outputs, String> {
    let (transformer, _) = load_transformer(&case.pipeline, &LoadOptions::default()).map_err(text)?;
    let latents = case.input("in.hidden_states")?;
    let (_, _, frames, height, width) = latents.dims5().map_err(text)?;
    let side = transformer.config().patch_size;
    let patch = [1, side, side];
    let (words, mask) = (case.input("in.encoder_hidden_states")?, case.input("in.encoder_attention_mask")?);
    let context = transformer.text_context(words, mask).map_err(text)?;
    let rope = transformer.rope([frames, height / side, width / side]).map_err(text)?;
    let mut outputs = Vec::new();
    let packed = pack(latents, patch).map_err(text)?;
    let sample = transformer
        .forward_probed(&packed, case.input("in.timestep")?, &context, &rope, &mut record(&mut outputs))
        .map_err(text)?;
    for (name, _, values) in &mut outputs {
        // The reference embeds each frame as a picture of its own.
        if name == "out.act.patch_embed" {
            let (batch, tokens, channels) = values.dims3().map_err(text)?;
            *values = values.reshape((batch * frames, tokens / frames, channels)).map_err(text)?;
        }
    }
    let sample = unpack(&sample, [frames, height, width], patch).map_err(text)?;
    outputs.push(("out.sample".to_owned(), "", sample));
    Ok(outputs)
}

/// The moments of a video.
fn vae_encode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), true).map_err(text)?;
    let mut outputs = Vec::new();
    let moments = vae.encode(case.input("in.x")?, Some(&mut record(&mut outputs))).map_err(text)?;
    outputs.extend(common::moments(moments));
    Ok(outputs)
}

/// A decode of latents that are already denormalised, whole and latent frame by latent frame.
fn vae_decode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), false).map_err(text)?;
    let z = case.input("in.z")?;
    let mut outputs = Vec::new();
    let decoded = vae.decode_traced(z, &mut record(&mut outputs)).map_err(text)?;
    outputs.push(("out.decoded".to_owned(), "", decoded));
    let tiling = Tiling { tile: None, chunk: Some(1) };
    let decoded = whole(|sink| vae.decode(z, tiling, sink)).map_err(text)?;
    outputs.push(("out.decoded".to_owned(), "in runs", decoded));
    Ok(outputs)
}

/// What the pipeline makes of a prompt and a negative prompt.
fn prompt_embeds(case: &Case) -> Result<Outputs, String> {
    let pipeline = load_pipeline(case)?;
    common::prompt_embeds(case, |prompt| {
        pipeline.encode_prompt(prompt, true).map(|(embeds, mask)| (embeds, Some(mask))).map_err(text)
    })
}

/// The folder's pipeline, told what the manifest says of this golden.
fn load_pipeline(case: &Case) -> Result<MochiPipeline, String> {
    let index = ModelIndex::read(&case.pipeline).map_err(text)?;
    let mut pipeline = MochiPipeline::load(&case.pipeline, &index, &LoadOptions::default()).map_err(text)?;
    if let Some(limit) = case.maybe("max_sequence_length")? {
        pipeline.set_token_limit(limit);
    }
    let scheduler = case.maybe::<String>("scheduler")?;
    if let Some(class) = scheduler.filter(|class| class != "FlowMatchEulerDiscreteScheduler") {
        return Err(format!("scheduler {class} is not known"));
    }
    if let Some(scheduler) = case.maybe("scheduler_config")? {
        pipeline.set_scheduler(scheduler);
    }
    Ok(pipeline)
}

/// Latents step by step, the schedule, and the frames where the golden has them.
fn run(case: &Case) -> Result<Outputs, String> {
    let mut pipeline = load_pipeline(case)?;
    let mut request = common::request(case, &pipeline)?;
    if request.initial_latents.is_none() {
        let noise = case.numbered("noise.").into_iter().next();
        request.initial_latents = Some(noise.ok_or("neither in.latents nor noise.000 is there")?);
    }
    let schedule = pipeline.schedule(&request).map_err(text)?;
    let (mut outputs, latents) = common::run(&mut pipeline, &request)?;
    let (_, _, frames, height, width) = latents.dims5().map_err(text)?;
    let patch = pipeline.info().work.patch;
    for (_, _, values) in &mut outputs {
        *values = unpack(values, [frames, height, width], patch).map_err(text)?;
    }
    outputs.push(("out.sigmas".to_owned(), "", numbers(&schedule.sigmas)?));
    outputs.push(("out.timesteps".to_owned(), "", numbers(&schedule.timesteps)?));
    if case.wanted().iter().any(|name| name == "out.frames") {
        let video: Tensor = decoded(&pipeline, &request, &latents).map_err(text)?;
        outputs.push(("out.frames".to_owned(), "", video.unsqueeze(0).map_err(text)?));
    }
    outputs.push(("out.latents".to_owned(), "", latents));
    Ok(outputs)
}

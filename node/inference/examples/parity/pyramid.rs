//! Pyramid Flow, miniFLUX and SD3: all text encoders, schedule, transformer, VAE, whole runs from words and from a
//! picture.

use kinoflock_inference::models::pyramid::PyramidPipeline;
use kinoflock_inference::models::pyramid::pipeline::{
    LatentScale, find_transformer, load_transformer, load_vae,
};
use kinoflock_inference::pipeline::Pipeline;
use kinoflock_inference::pipeline::run::decoded;
use kinoflock_inference::sampler::{PyramidConfig, PyramidSchedule};
use kinoflock_inference::sink::whole;
use kinoflock_inference::tiling::Tiling;
use kinoflock_inference::{Device, GenerateRequest, LoadOptions, Tensor};

use super::common::{self, numbers, record, row, text};
use super::golden::{Case, Outputs};
use super::{Adapter, Kind};

/// Pyramid Flow's goldens.
pub(crate) const ADAPTER: Adapter = Adapter { names: &["Pyramid"], compute };

fn compute(case: &Case, kind: Kind) -> Result<Option<Outputs>, String> {
    let both_encoders = case.wanted().iter().any(|name| name == "out.pooled");
    Ok(Some(match kind {
        Kind::EndToEnd => run(case)?,
        Kind::Scheduler => scheduler(case)?,
        Kind::Tokenizer => common::tokenizer(case, "tokenizer_2")?,
        Kind::TextEncoder if both_encoders => text_encoders(case)?,
        Kind::TextEncoder => common::encoder(case, "text_encoder_2")?,
        Kind::Transformer => transformer(case)?,
        Kind::VaeEncode => vae_encode(case)?,
        Kind::VaeDecode => vae_decode(case)?,
        _ => return Ok(None),
    }))
}

/// The stages' bounds, and timesteps and noise levels for every stage and number of steps that the golden has.
fn scheduler(case: &Case) -> Result<Outputs, String> {
    let config: PyramidConfig = case.maybe("config")?.unwrap_or_default();
    let schedule = PyramidSchedule::new(&config).map_err(text)?;
    let stages = schedule.stages();
    let bounds = |name: &str, of: fn(&kinoflock_inference::sampler::pyramid::Stage) -> f64| {
        let values: Vec<f32> = stages.iter().map(|stage| of(stage) as f32).collect();
        Ok::<_, String>((format!("out.{name}"), "", numbers(&values)?))
    };
    let mut outputs = vec![
        bounds("start_sigmas", |stage| stage.start_sigma)?,
        bounds("end_sigmas", |stage| stage.end_sigma)?,
        bounds("ori_start_sigmas", |stage| stage.original_start_sigma)?,
    ];
    for name in case.wanted() {
        let mut parts = name.split('.').skip(1);
        let (what, stage, steps) = (parts.next(), parts.next(), parts.next());
        let number = |text: Option<&str>| text.and_then(|text| text.parse::<usize>().ok());
        let (Some(stage), Some(steps)) = (number(stage).and_then(|n| stages.get(n)), number(steps)) else {
            continue;
        };
        let values = match what {
            Some("timesteps") => stage.timesteps(steps),
            Some("sigmas") => stage.sigmas(steps),
            _ => continue,
        };
        let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        outputs.push((name, "", numbers(&values)?));
    }
    Ok(outputs)
}

/// The ids that each CLIP reads, and what all encoders make of as many prompts as the golden has results.
fn text_encoders(case: &Case) -> Result<Outputs, String> {
    let pipeline = PyramidPipeline::load(&case.pipeline, &LoadOptions::default()).map_err(text)?;
    let prompts: Vec<String> = case.param("prompts")?;
    let limit: usize = case.param("clip_max_length")?;
    let mut outputs = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let all = pipeline.clip_ids(prompt).map_err(text)?;
        for (name, ids) in ["clip_ids", "clip_ids_2"].into_iter().zip(all) {
            if ids.len() != limit {
                return Err(format!("CLIP reads {} ids here and {limit} in the reference", ids.len()));
            }
            outputs.push((format!("out.{name}.{index}"), "", row(&ids)?));
        }
    }
    let count = case.input("out.pooled")?.dim(0).map_err(text)?;
    let mut each = [Vec::new(), Vec::new(), Vec::new()];
    for prompt in prompts.iter().take(count) {
        let made = pipeline.encode_prompt(prompt, true).map_err(text)?;
        each.iter_mut().zip([made.embeds, made.mask, made.pooled]).for_each(|(all, one)| all.push(one));
    }
    for (name, all) in ["prompt_embeds", "prompt_mask", "pooled"].into_iter().zip(each) {
        outputs.push((format!("out.{name}"), "", Tensor::cat(&all, 0).map_err(text)?));
    }
    Ok(outputs)
}

/// A forward pass with every module's result.
fn transformer(case: &Case) -> Result<Outputs, String> {
    let part = find_transformer(&case.pipeline).map_err(text)?;
    let (transformer, _) = load_transformer(&part, &LoadOptions::default()).map_err(text)?;
    let embeds = case.input("in.encoder_hidden_states")?;
    let mask = case.input("in.encoder_attention_mask")?;
    let context =
        transformer.text_context(embeds, mask, case.input("in.pooled_projections")?).map_err(text)?;
    let clips = case.numbered("in.sample.");
    let mut outputs = Vec::new();
    let timesteps = case.input("in.timestep_ratio")?;
    let sample =
        transformer.forward_probed(&clips, timesteps, &context, &mut record(&mut outputs)).map_err(text)?;
    outputs.push(("out.sample".to_owned(), "", sample));
    Ok(outputs)
}

/// The moments of a video.
fn vae_encode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), true).map_err(text)?;
    let moments = vae.encode(case.input("in.x")?).map_err(text)?;
    Ok(common::moments(moments))
}

/// Latents decoded whole, run by run, and the first of them alone.
fn vae_decode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), false).map_err(text)?;
    let z = case.input("in.z")?;
    let mut outputs = Vec::new();
    for name in case.wanted() {
        let kind = name.strip_prefix("out.decoded").unwrap_or_default();
        let window = kind.strip_prefix("_chunk").and_then(|frames| frames.parse::<usize>().ok());
        let chunk = window.map(|frames| frames * vae.config().downsample_scale);
        let z = if kind == "_1frame" { z.narrow(2, 0, 1).map_err(text)? } else { z.clone() };
        let decoded = whole(|sink| vae.decode(&z, Tiling { tile: None, chunk }, sink)).map_err(text)?;
        outputs.push((name, "", decoded));
    }
    Ok(outputs)
}

/// The folder's pipeline, with the constants that the manifest tells of.
fn load_pipeline(case: &Case) -> Result<PyramidPipeline, String> {
    let mut pipeline = PyramidPipeline::load(&case.pipeline, &LoadOptions::default()).map_err(text)?;
    let mut settings = pipeline.settings().clone();
    settings.frames_per_unit = case.maybe("frame_per_unit")?.unwrap_or(settings.frames_per_unit);
    settings.prompt_suffix = case.maybe("prompt_suffix")?.unwrap_or(settings.prompt_suffix);
    let scale = |usual: LatentScale, shift: &str, scale: &str| {
        Ok::<_, String>(LatentScale {
            shift: case.maybe(shift)?.unwrap_or(usual.shift),
            scale: case.maybe(scale)?.unwrap_or(usual.scale),
        })
    };
    settings.first_frame = scale(settings.first_frame, "vae_shift_factor", "vae_scale_factor")?;
    settings.later_frames = scale(settings.later_frames, "vae_video_shift_factor", "vae_video_scale_factor")?;
    let stages = settings.scheduler.stage_range.len() - 1;
    let doubled: Vec<usize> = (0..stages).map(|stage| 1 << stage).collect();
    if let Some(given) = case.maybe::<Vec<usize>>("stages")?.filter(|given| *given != doubled) {
        return Err(format!("stages are {doubled:?} here and {given:?} in the reference"));
    }
    pipeline.set_settings(settings).map_err(text)?;
    Ok(pipeline)
}

/// Latents at the end, as the VAE takes them, and as frames.
fn run(case: &Case) -> Result<Outputs, String> {
    let mut pipeline = load_pipeline(case)?;
    let request = request(case, &pipeline)?;
    let (mut outputs, latents) = common::run(&mut pipeline, &request)?;
    outputs.push(("out.denorm_latents".to_owned(), "", pipeline.denormalize(&latents).map_err(text)?));
    let shown = case.tensors.contains_key("out.frames");
    for chunk in [None, Some(pipeline.info().work.temporal_ratio)].into_iter().filter(|_| shown) {
        let mut request = request.clone();
        request.decode.chunk = chunk;
        let label = if chunk.is_some() { "run by run" } else { "" };
        let video = decoded(&pipeline, &request, &latents).map_err(text)?;
        outputs.push(("out.frames".to_owned(), label, video.unsqueeze(0).map_err(text)?));
    }
    outputs.push(("out.latents".to_owned(), "", latents.to_device(&Device::Cpu).map_err(text)?));
    Ok(outputs)
}

fn request(case: &Case, pipeline: &PyramidPipeline) -> Result<GenerateRequest, String> {
    let prompt = case.param::<String>("prompt")?;
    let mut request = GenerateRequest::new(prompt, &pipeline.info().defaults);
    request.negative_prompt = case.maybe("negative_prompt")?.unwrap_or_default();
    let frames: usize = case.param("temp")?;
    request.frames = (frames - 1) * pipeline.info().work.temporal_ratio + 1;
    request.width = case.param("width")?;
    request.height = case.param("height")?;
    request.guidance = case.param("guidance_scale")?;
    request.later_guidance = case.maybe("video_guidance_scale")?;
    let stages = pipeline.settings().scheduler.stage_range.len() - 1;
    // The reference takes one number for all stages, too.
    let steps = |name: &str| match case.param::<usize>(name) {
        Ok(steps) => Ok(vec![steps; stages]),
        Err(_) => case.param::<Vec<usize>>(name),
    };
    request.stage_steps = Some([steps("num_inference_steps")?, steps("video_num_inference_steps")?]);
    request.initial_latents = Some(case.input("in.latents")?.clone());
    request.step_noise = case.numbered("noise.block.");
    request.conditions = common::conditions(case)?;
    request.condition_noise = case.numbered("noise.condition.");
    request.truncate_prompt = true;
    request.decode.skip = true;
    Ok(request)
}

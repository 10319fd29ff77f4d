//! LTX-Video: rotary tables, transformer, VAE, whole runs.

use kinoflock_inference::models::ltx::config::TransformerConfig;
use kinoflock_inference::models::ltx::pipeline::{LtxClass, LtxPipeline, load_transformer, load_vae, pack};
use kinoflock_inference::models::ltx::rope::{Positions, Rope, RopeTables};
use kinoflock_inference::models::ltx::vae::{DecodeSettings, Noise};
use kinoflock_inference::pipeline::run::decoded;
use kinoflock_inference::registry::ModelIndex;
use kinoflock_inference::sink::whole;
use kinoflock_inference::{Device, GenerateRequest, LoadOptions, Pipeline, SecondPass, Tensor};

use super::common::{self, numbers, record, text};
use super::golden::{Case, Outputs};
use super::{Adapter, Kind};

/// LTX-Video's goldens.
pub(crate) const ADAPTER: Adapter = Adapter { names: &["LTX"], compute };

fn compute(case: &Case, kind: Kind) -> Result<Option<Outputs>, String> {
    Ok(Some(match kind {
        Kind::EndToEnd => run(case)?,
        Kind::Rope => rope(case)?,
        Kind::PromptEmbeds => prompt_embeds(case)?,
        Kind::Transformer => transformer(case)?,
        Kind::VaeEncode => vae_encode(case)?,
        Kind::VaeDecode => vae_decode(case)?,
        Kind::Other if case.name.starts_with("upsampler") => upsample(case)?,
        _ => return Ok(None),
    }))
}

/// The tables for a grid, as the reference keeps them.
fn rope(case: &Case) -> Result<Outputs, String> {
    let config = TransformerConfig::read(&case.pipeline.join("transformer/config.json")).map_err(text)?;
    let rope = Rope::new(config.inner(), config.patch_size, config.patch_size_t);
    let tables = tables(case, &rope)?;
    let (cos, sin) = tables.full().map_err(text)?;
    Ok(vec![("out.cos".to_owned(), "", cos), ("out.sin".to_owned(), "", sin)])
}

fn tables(case: &Case, rope: &Rope) -> Result<RopeTables, String> {
    let positions = match case.tensors.get("in.video_coords") {
        Some(coordinates) => Positions::Coordinates(coordinates),
        None => Positions::Grid {
            size: [case.param("num_frames")?, case.param("height")?, case.param("width")?],
            scale: case.maybe("rope_interpolation_scale")?,
        },
    };
    rope.tables(positions, &Device::Cpu).map_err(text)
}

/// A forward pass with every module's result.
fn transformer(case: &Case) -> Result<Outputs, String> {
    let (transformer, _) = load_transformer(&case.pipeline, &LoadOptions::default()).map_err(text)?;
    let rope = tables(case, transformer.rope())?;
    let mask = case.tensors.get("in.encoder_attention_mask");
    let context = transformer.text_context(case.input("in.encoder_hidden_states")?, mask).map_err(text)?;
    let mut outputs = Vec::new();
    let (latents, timesteps) = (case.input("in.hidden_states")?, case.input("in.timestep")?);
    let sample = transformer
        .forward_probed(latents, timesteps, &context, &rope, &mut record(&mut outputs))
        .map_err(text)?;
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

/// A decode of latents that are already denormalised, with the recorded noise or with none.
fn vae_decode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), false).map_err(text)?;
    let draws = case.numbered("noise.");
    let noise = if draws.is_empty() { Noise::None } else { Noise::Given(&draws) };
    let timestep = match case.tensors.get("in.temb") {
        Some(timestep) => Some(timestep.clone()),
        None => case.maybe::<f64>("decode_timestep")?.map(scalar).transpose()?,
    };
    let settings = DecodeSettings { timestep: timestep.as_ref(), noise, ..DecodeSettings::default() };
    let (mut outputs, z) = (Vec::new(), case.input("in.z")?);
    let decoded =
        whole(|sink| vae.decode(z, &settings, sink, Some(&mut record(&mut outputs)))).map_err(text)?;
    outputs.push(("out.decoded".to_owned(), "", decoded));
    Ok(outputs)
}

fn scalar(value: f64) -> Result<Tensor, String> {
    Tensor::new(&[value as f32], &Device::Cpu).map_err(text)
}

/// What the pipeline makes of a prompt and a negative prompt.
fn prompt_embeds(case: &Case) -> Result<Outputs, String> {
    let pipeline = load_pipeline(case)?;
    common::prompt_embeds(case, |prompt| {
        pipeline.encode_prompt(prompt, true).map(|(embeds, mask)| (embeds, Some(mask))).map_err(text)
    })
}

/// The folder's pipeline, told what the manifest says of this golden.
fn load_pipeline(case: &Case) -> Result<LtxPipeline, String> {
    let index = ModelIndex::read(&case.pipeline).map_err(text)?;
    let mut pipeline = LtxPipeline::load(&case.pipeline, &index, &LoadOptions::default()).map_err(text)?;
    if let Some(limit) = case.maybe("max_sequence_length")? {
        pipeline.set_token_limit(limit);
    }
    if let Some(class) = case.maybe::<String>("pipeline")? {
        pipeline.set_class(LtxClass::from_name(&class).ok_or(format!("pipeline {class} is not known"))?);
    }
    if let Some(class) =
        case.maybe::<String>("scheduler")?.filter(|class| class != "FlowMatchEulerDiscreteScheduler")
    {
        return Err(format!("scheduler {class} is not known"));
    }
    if let Some(scheduler) = case.maybe("scheduler_config")? {
        pipeline.set_scheduler(scheduler);
    }
    Ok(pipeline)
}

/// Latents at twice the size.
fn upsample(case: &Case) -> Result<Outputs, String> {
    let large = load_pipeline(case)?.upsample(&second_pass(case, 1.0)?, case.input("in.latents")?);
    Ok(vec![("out.latents".to_owned(), "", large.map_err(text)?)])
}

fn second_pass(case: &Case, strength: f64) -> Result<SecondPass, String> {
    Ok(SecondPass {
        noise: case.tensors.get("noise.initial").cloned(),
        adain: case.maybe("adain_factor")?.unwrap_or(0.0),
        tone_map: case.maybe("tone_map_compression_ratio")?.unwrap_or(0.0),
        ..SecondPass::new(strength)
    })
}

/// Latents step by step, the schedule, and the frames where the golden has them.
fn run(case: &Case) -> Result<Outputs, String> {
    let mut pipeline = load_pipeline(case)?;
    let request = request(case, &pipeline)?;
    let schedule = pipeline.schedule(&request).map_err(text)?;
    let (mut outputs, latents) = common::run(&mut pipeline, &request)?;
    outputs.push(("out.sigmas".to_owned(), "", numbers(&schedule.sigmas)?));
    outputs.push(("out.timesteps".to_owned(), "", numbers(&schedule.timesteps)?));
    let packed = case.tensors.get("out.latents").is_some_and(|golden| golden.rank() == 3);
    let own =
        if packed { pack(&latents, pipeline.info().work.patch).map_err(text)? } else { latents.clone() };
    outputs.push(("out.latents".to_owned(), "", own));
    if case.wanted().iter().any(|name| name == "out.frames") {
        let video = decoded(&pipeline, &request, &latents).map_err(text)?;
        outputs.push(("out.frames".to_owned(), "", video.unsqueeze(0).map_err(text)?));
    }
    Ok(outputs)
}

fn request(case: &Case, pipeline: &LtxPipeline) -> Result<GenerateRequest, String> {
    let mut request = common::request(case, pipeline)?;
    request.fps = case.maybe("frame_rate")?.unwrap_or(25.0);
    request.guidance = case.maybe("guidance_scale")?.unwrap_or(3.0);
    request.guidance_rescale = case.maybe("guidance_rescale")?.unwrap_or(0.0);
    request.decode_timestep = case.maybe("decode_timestep")?.unwrap_or(0.0);
    request.decode_noise_scale = case.maybe("decode_noise_scale")?;
    request.conditions = common::conditions(case)?;
    request.condition_noise = case.numbered("noise.condition.");
    request.condition_noise_scale = case.maybe("image_cond_noise_scale")?.unwrap_or(0.0);
    request.step_noise = case.numbered("noise.step.");
    let strength = case.maybe::<f64>("denoise_strength")?;
    request.second_pass = strength.map(|strength| second_pass(case, strength)).transpose()?;
    let mut noise = case.numbered("noise.");
    if noise.is_empty() {
        noise = case.numbered("noise.decode.");
    }
    if request.initial_latents.is_none() {
        if noise.is_empty() {
            return Err("neither in.latents nor noise.000 is there".to_owned());
        }
        request.initial_latents = Some(noise.remove(0));
    }
    request.decode_noise = noise;
    Ok(request)
}

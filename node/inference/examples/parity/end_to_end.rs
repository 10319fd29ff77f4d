//! Whole runs, from the reference's own noise.

use kinoflock_inference::models::ltx::pipeline::{LtxClass, LtxPipeline, pack};
use kinoflock_inference::registry::ModelIndex;
use kinoflock_inference::{
    Device, GenerateRequest, LoadOptions, Observer, Pipeline, Silent, StepEvent, Tensor,
};

use super::golden::{Case, Outputs};

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The folder's pipeline, told what the manifest says of this golden.
pub(crate) fn load_pipeline(case: &Case) -> Result<LtxPipeline, String> {
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

/// Latents after every step.
#[derive(Default)]
struct Steps {
    latents: Vec<Tensor>,
}

impl Observer for Steps {
    fn step(&mut self, event: &StepEvent<'_>) {
        self.latents.push(event.latents.clone());
    }
}

/// Latents step by step, the schedule, and the frames where the golden has them.
pub(crate) fn run(case: &Case) -> Result<Outputs, String> {
    let mut pipeline = load_pipeline(case)?;
    let request = request(case, &pipeline)?;
    let schedule = pipeline.schedule(&request).map_err(text)?;
    let mut steps = Steps::default();
    let made = pipeline.generate(&request, &mut steps).map_err(text)?;
    let mut outputs = Vec::new();
    let row = |values: &[f32]| Tensor::from_slice(values, values.len(), &Device::Cpu).map_err(text);
    outputs.push(("out.sigmas".to_owned(), "", row(&schedule.sigmas)?));
    outputs.push(("out.timesteps".to_owned(), "", row(&schedule.timesteps)?));
    for (index, latents) in steps.latents.iter().enumerate() {
        outputs.push((format!("out.latents_step.{index}"), "", latents.clone()));
    }
    let packed = case.tensors.get("out.latents").is_some_and(|golden| golden.rank() == 3);
    let latents = if packed {
        pack(&made.latents, pipeline.info().work.patch).map_err(text)?
    } else {
        made.latents.clone()
    };
    outputs.push(("out.latents".to_owned(), "", latents));
    if case.wanted().iter().any(|name| name == "out.frames") {
        let video = pipeline.decode_video(&made.latents, &request, &Silent).map_err(text)?;
        outputs.push(("out.frames".to_owned(), "", video.unsqueeze(0).map_err(text)?));
    }
    Ok(outputs)
}

fn request(case: &Case, pipeline: &LtxPipeline) -> Result<GenerateRequest, String> {
    let mut request = GenerateRequest::new(case.param::<String>("prompt")?, &pipeline.info().defaults);
    request.negative_prompt = case.maybe("negative_prompt")?.unwrap_or_default();
    request.frames = case.param("num_frames")?;
    request.width = case.param("width")?;
    request.height = case.param("height")?;
    request.fps = case.maybe("frame_rate")?.unwrap_or(25.0);
    request.guidance = case.maybe("guidance_scale")?.unwrap_or(3.0);
    request.guidance_rescale = case.maybe("guidance_rescale")?.unwrap_or(0.0);
    request.timesteps = case.maybe("timesteps")?;
    request.steps = case.maybe("num_inference_steps")?.unwrap_or(request.steps);
    request.decode_timestep = case.maybe("decode_timestep")?.unwrap_or(0.0);
    request.decode_noise_scale = case.maybe("decode_noise_scale")?;
    request.truncate_prompt = true;
    request.decode.skip = true;
    let mut noise = case.numbered("noise.");
    request.initial_latents = Some(match case.tensors.get("in.latents") {
        Some(latents) => latents.clone(),
        None if noise.is_empty() => return Err("neither in.latents nor noise.000 is there".to_owned()),
        None => noise.remove(0),
    });
    request.decode_noise = noise;
    Ok(request)
}

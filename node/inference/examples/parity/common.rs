//! What several models have: tokenizer, T5 encoder, flow-matching schedules. And whole runs.

use kinoflock_inference::folder::load_t5;
use kinoflock_inference::nn::moments::Moments;
use kinoflock_inference::pipeline::Pipeline;
use kinoflock_inference::sampler::{FlowMatchConfig, Schedule, ScheduleRequest, calculate_shift};
use kinoflock_inference::text::PromptTokenizer;
use kinoflock_inference::{
    Condition, DType, Device, GenerateRequest, LoadOptions, Observer, StepEvent, Tensor,
};

use super::Kind;
use super::golden::{Case, Outputs};

pub(crate) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Kinds that need nothing of a model's own.
pub(crate) fn compute(case: &Case, kind: Kind) -> Result<Outputs, String> {
    match kind {
        Kind::Tokenizer => tokenizer(case, "tokenizer"),
        Kind::TextEncoder => encoder(case, "text_encoder"),
        Kind::Scheduler => flow_match(case, ScheduleRequest::Steps),
        _ => Err("this kind of golden is not known".to_owned()),
    }
}

/// Ids and masks of every prompt, from each form of T5's tokenizer that this part of the pipeline holds.
pub(crate) fn tokenizer(case: &Case, part: &str) -> Result<Outputs, String> {
    let folder = case.pipeline.join(part);
    let limit: usize = case.param("max_length")?;
    let prompts: Vec<String> = case.param("prompts")?;
    let (json, spiece) = (folder.join("tokenizer.json").exists(), folder.join("spiece.model").exists());
    let mut ways = Vec::new();
    if json || !spiece {
        ways.push(("", PromptTokenizer::load(&folder)));
    }
    if spiece {
        ways.push((if json { "spiece.model" } else { "" }, PromptTokenizer::load_spiece(&folder)));
    }
    let mut outputs = Vec::new();
    for (label, tokenizer) in ways {
        let tokenizer = tokenizer.map_err(text)?;
        check_id(case, "pad_id", tokenizer.pad_id)?;
        check_id(case, "eos_id", tokenizer.eos_id)?;
        for (index, prompt) in prompts.iter().enumerate() {
            let encoded = tokenizer.encode(prompt, limit).map_err(text)?;
            let raw = tokenizer.ids(prompt).map_err(text)?;
            let mask: Vec<u32> = encoded.mask.iter().map(|&bit| u32::from(bit)).collect();
            outputs.push((format!("out.ids_padded.{index}"), label, row(&encoded.ids)?));
            outputs.push((format!("out.ids_raw.{index}"), label, row(&raw)?));
            outputs.push((format!("out.mask.{index}"), label, row(&mask)?));
        }
    }
    Ok(outputs)
}

fn check_id(case: &Case, name: &str, ours: u32) -> Result<(), String> {
    match case.maybe::<u32>(name)? {
        Some(theirs) if theirs != ours => Err(format!("{name} is {ours} here and {theirs} in the reference")),
        _ => Ok(()),
    }
}

pub(crate) fn row(ids: &[u32]) -> Result<Tensor, String> {
    Tensor::from_slice(ids, ids.len(), &Device::Cpu).map_err(text)
}

/// The last hidden state of the T5 encoder in this part of the pipeline, with and without the mask.
pub(crate) fn encoder(case: &Case, part: &str) -> Result<Outputs, String> {
    let (encoder, _) = load_t5(&case.pipeline.join(part), &LoadOptions::default()).map_err(text)?;
    let ids = case.input("in.input_ids")?.to_dtype(DType::U32).map_err(text)?;
    let forward = |mask: Option<&Tensor>| encoder.forward(&ids, mask).map_err(text);
    let mut outputs = vec![("out.no_mask".to_owned(), "", forward(None)?)];
    if let Ok(mask) = case.input("in.attention_mask") {
        outputs.push(("out.masked".to_owned(), "", forward(Some(mask))?));
    }
    Ok(outputs)
}

#[derive(serde::Deserialize)]
struct Combo {
    #[serde(default)]
    mu: Option<f64>,
    #[serde(default)]
    seq_len: Option<usize>,
    steps: usize,
}

/// Sigmas and timesteps of every combination, and a chain of steps along the first; `points` says which points a number
/// of steps has.
pub(crate) fn flow_match(case: &Case, points: fn(usize) -> ScheduleRequest) -> Result<Outputs, String> {
    let config: FlowMatchConfig = case.param("config")?;
    let combos: Vec<Combo> = case.param("combos")?;
    let mut outputs = Vec::new();
    for (index, combo) in combos.iter().enumerate() {
        let schedule = schedule(&config, combo, points)?;
        outputs.push((format!("out.sigmas.{index}"), "", numbers(&schedule.sigmas)?));
        outputs.push((format!("out.timesteps.{index}"), "", numbers(&schedule.timesteps)?));
    }
    if let (Ok(sample), Some(combo)) = (case.input("in.sample"), combos.first()) {
        let schedule = schedule(&config, combo, points)?;
        let mut sample = sample.clone();
        for (index, velocity) in case.numbered("in.model_output.").iter().enumerate().take(schedule.steps()) {
            sample = schedule.step(index, &sample, velocity).map_err(text)?;
            outputs.push((format!("out.prev_sample.{index}"), "", sample.clone()));
        }
    }
    Ok(outputs)
}

fn schedule(
    config: &FlowMatchConfig,
    combo: &Combo,
    points: fn(usize) -> ScheduleRequest,
) -> Result<Schedule, String> {
    let ours = combo.seq_len.map(|tokens| calculate_shift(config, tokens));
    if let (Some(ours), Some(theirs)) = (ours, combo.mu)
        && (ours - theirs).abs() > 1e-9
    {
        return Err(format!("mu is {ours} here and {theirs} in the reference"));
    }
    let mu = combo.mu.or(ours).unwrap_or(0.0);
    Schedule::new(config, &points(combo.steps), mu).map_err(text)
}

/// What a pipeline makes of a golden's prompt and its negative prompt: embeddings, and a mask where it keeps one.
pub(crate) fn prompt_embeds(
    case: &Case,
    encode: impl Fn(&str) -> Result<(Tensor, Option<Tensor>), String>,
) -> Result<Outputs, String> {
    let mut outputs = Vec::new();
    for (param, name) in [("prompt", "prompt"), ("negative_prompt", "negative")] {
        if let Some(prompt) = case.maybe::<String>(param)? {
            let (embeds, mask) = encode(&prompt)?;
            outputs.push((format!("out.{name}_embeds"), "", embeds));
            outputs.extend(mask.map(|mask| (format!("out.{name}_mask"), "", mask)));
        }
    }
    Ok(outputs)
}

/// What a VAE's encoder says of a video.
pub(crate) fn moments(made: Moments) -> Outputs {
    vec![("out.enc_mean".to_owned(), "", made.mean), ("out.enc_logvar".to_owned(), "", made.logvar)]
}

/// A row of numbers.
pub(crate) fn numbers(values: &[f32]) -> Result<Tensor, String> {
    Tensor::from_slice(values, values.len(), &Device::Cpu).map_err(text)
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

/// A run without its decode: `out.latents_step.N` in the shape in which the model keeps its latents, and the latents at
/// the end, `[1, C, F, H, W]`.
pub(crate) fn run(
    pipeline: &mut dyn Pipeline,
    request: &GenerateRequest,
) -> Result<(Outputs, Tensor), String> {
    let mut steps = Steps::default();
    let made = pipeline.generate(request, &mut steps).map_err(text)?;
    let name = |(index, latents)| (format!("out.latents_step.{index}"), "", latents);
    Ok((steps.latents.into_iter().enumerate().map(name).collect(), made.latents))
}

/// A request with what all manifests tell of a run.
pub(crate) fn request(case: &Case, pipeline: &dyn Pipeline) -> Result<GenerateRequest, String> {
    let mut request = GenerateRequest::new(case.param::<String>("prompt")?, &pipeline.info().defaults);
    request.negative_prompt = case.maybe("negative_prompt")?.unwrap_or_default();
    request.frames = case.param("num_frames")?;
    request.width = case.param("width")?;
    request.height = case.param("height")?;
    request.fps = case.maybe("frame_rate")?.unwrap_or(request.fps);
    request.guidance = case.maybe("guidance_scale")?.unwrap_or(request.guidance);
    request.timesteps = case.maybe("timesteps")?;
    request.steps = case.maybe("num_inference_steps")?.unwrap_or(request.steps);
    request.truncate_prompt = true;
    request.decode.skip = true;
    request.initial_latents = case.tensors.get("in.latents").cloned();
    Ok(request)
}

#[derive(serde::Deserialize)]
struct Shown {
    frame: usize,
    strength: f64,
}

/// The pictures of a run: `in.image` for its beginning, or `in.condition.N` with what the manifest says of each.
pub(crate) fn conditions(case: &Case) -> Result<Vec<Condition>, String> {
    let pictures = |tensor: &Tensor| tensor.to_dtype(DType::F32).map_err(text);
    if let Some(image) = case.tensors.get("in.image") {
        return Ok(vec![Condition::new(pictures(image)?.unsqueeze(0).map_err(text)?, 0)]);
    }
    let shown: Vec<Shown> = case.maybe("conditions")?.unwrap_or_default();
    let given = case.numbered("in.condition.");
    if given.len() != shown.len() {
        return Err(format!("{} pictures, and {} are told of", given.len(), shown.len()));
    }
    let condition = |(tensor, shown): (&Tensor, &Shown)| {
        Ok(Condition { pictures: pictures(tensor)?, frame: shown.frame, strength: shown.strength })
    };
    given.iter().zip(&shown).map(condition).collect()
}

/// Probes and traces: every module's result, as the golden names it.
pub(crate) fn record(outputs: &mut Outputs) -> impl FnMut(&str, &Tensor) -> candle_core::Result<()> + '_ {
    |name, values| {
        outputs.push((format!("out.act.{name}"), "", values.clone()));
        Ok(())
    }
}

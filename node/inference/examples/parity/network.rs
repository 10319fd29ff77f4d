//! Schedule, rotary tables, transformer and VAE.

use kinoflock_inference::models::ltx::config::TransformerConfig;
use kinoflock_inference::models::ltx::pipeline::{load_transformer, load_vae};
use kinoflock_inference::models::ltx::rope::{Positions, Rope, RopeTables};
use kinoflock_inference::models::ltx::vae::{DecodeSettings, Noise};
use kinoflock_inference::sampler::{FlowMatchConfig, Schedule, ScheduleRequest, calculate_shift};
use kinoflock_inference::{Device, LoadOptions, Tensor};

use super::golden::{Case, Outputs};

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The tables for a grid, as the reference keeps them.
pub(crate) fn rope(case: &Case) -> Result<Outputs, String> {
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

#[derive(serde::Deserialize)]
struct Combo {
    #[serde(default)]
    mu: Option<f64>,
    #[serde(default)]
    seq_len: Option<usize>,
    steps: usize,
}

/// Sigmas and timesteps of every combination, and a chain of steps along the first.
pub(crate) fn scheduler(case: &Case) -> Result<Outputs, String> {
    let config: FlowMatchConfig = case.param("config")?;
    let combos: Vec<Combo> = case.param("combos")?;
    let mut outputs = Vec::new();
    for (index, combo) in combos.iter().enumerate() {
        let schedule = schedule(&config, combo)?;
        let row = |values: &[f32]| Tensor::from_slice(values, values.len(), &Device::Cpu).map_err(text);
        outputs.push((format!("out.sigmas.{index}"), "", row(&schedule.sigmas)?));
        outputs.push((format!("out.timesteps.{index}"), "", row(&schedule.timesteps)?));
    }
    if let (Ok(sample), Some(combo)) = (case.input("in.sample"), combos.first()) {
        let schedule = schedule(&config, combo)?;
        let mut sample = sample.clone();
        for (index, velocity) in case.numbered("in.model_output.").iter().enumerate().take(schedule.steps()) {
            sample = schedule.step(index, &sample, velocity).map_err(text)?;
            outputs.push((format!("out.prev_sample.{index}"), "", sample.clone()));
        }
    }
    Ok(outputs)
}

fn schedule(config: &FlowMatchConfig, combo: &Combo) -> Result<Schedule, String> {
    let ours = combo.seq_len.map(|tokens| calculate_shift(config, tokens));
    if let (Some(ours), Some(theirs)) = (ours, combo.mu)
        && (ours - theirs).abs() > 1e-9
    {
        return Err(format!("mu is {ours} here and {theirs} in the reference"));
    }
    let mu = combo.mu.or(ours).unwrap_or(0.0);
    Schedule::new(config, &ScheduleRequest::Steps(combo.steps), mu).map_err(text)
}

/// A forward pass with every module's result.
pub(crate) fn transformer(case: &Case) -> Result<Outputs, String> {
    let (transformer, _) = load_transformer(&case.pipeline, &LoadOptions::default()).map_err(text)?;
    let rope = tables(case, transformer.rope())?;
    let mask = case.tensors.get("in.encoder_attention_mask");
    let context = transformer.text_context(case.input("in.encoder_hidden_states")?, mask).map_err(text)?;
    let mut outputs = Vec::new();
    let mut probe = |name: &str, values: &Tensor| {
        outputs.push((format!("out.act.{name}"), "", values.clone()));
        Ok(())
    };
    let (latents, timesteps) = (case.input("in.hidden_states")?, case.input("in.timestep")?);
    let sample = transformer.forward_probed(latents, timesteps, &context, &rope, &mut probe).map_err(text)?;
    outputs.push(("out.sample".to_owned(), "", sample));
    Ok(outputs)
}

/// The moments of a video.
pub(crate) fn vae_encode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), true).map_err(text)?;
    let mut outputs = Vec::new();
    let mut trace = |name: &str, values: &Tensor| {
        outputs.push((format!("out.act.{name}"), "", values.clone()));
        Ok(())
    };
    let moments = vae.encode(case.input("in.x")?, Some(&mut trace)).map_err(text)?;
    outputs.push(("out.enc_mean".to_owned(), "", moments.mean));
    outputs.push(("out.enc_logvar".to_owned(), "", moments.logvar));
    Ok(outputs)
}

/// A decode of latents that are already denormalised, with the recorded noise or with none.
pub(crate) fn vae_decode(case: &Case) -> Result<Outputs, String> {
    let (vae, _) = load_vae(&case.pipeline, &LoadOptions::default(), false).map_err(text)?;
    let draws = case.numbered("noise.");
    let noise = if draws.is_empty() { Noise::None } else { Noise::Given(&draws) };
    let timestep = match case.tensors.get("in.temb") {
        Some(timestep) => Some(timestep.clone()),
        None => case.maybe::<f64>("decode_timestep")?.map(scalar).transpose()?,
    };
    let settings = DecodeSettings { timestep: timestep.as_ref(), noise, ..DecodeSettings::default() };
    let mut outputs = Vec::new();
    let mut trace = |name: &str, values: &Tensor| {
        outputs.push((format!("out.act.{name}"), "", values.clone()));
        Ok(())
    };
    let decoded = vae.decode(case.input("in.z")?, &settings, Some(&mut trace)).map_err(text)?;
    outputs.push(("out.decoded".to_owned(), "", decoded));
    Ok(outputs)
}

fn scalar(value: f64) -> Result<Tensor, String> {
    Tensor::new(&[value as f32], &Device::Cpu).map_err(text)
}

//! What a run's result follows from, in one hash.

use super::Course;
use crate::error::Error;
use crate::pipeline::{GenerateRequest, touch};
use crate::sampler::checkpoint::latents_bytes;

/// blake3 of everything that the latents depend on, the model aside.
pub(super) fn digest(request: &GenerateRequest, course: &Course<'_>) -> Result<[u8; 32], Error> {
    let mut hasher = blake3::Hasher::new();
    for text in [&request.prompt, &request.negative_prompt] {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    let counts = [request.seed, request.frames as u64, request.width as u64, request.height as u64];
    counts.iter().for_each(|count| {
        hasher.update(&count.to_le_bytes());
    });
    [request.fps, request.guidance, request.guidance_rescale].iter().for_each(|number| {
        hasher.update(&number.to_bits().to_le_bytes());
    });
    course.sigmas.iter().chain(course.timesteps).for_each(|point| {
        hasher.update(&point.to_bits().to_le_bytes());
    });
    if let Some(latents) = &request.initial_latents {
        hasher.update(&latents_bytes(latents)?);
    }
    if let Some(guidance) = request.later_guidance {
        hasher.update(b"later guidance").update(&guidance.to_bits().to_le_bytes());
    }
    if request.dynamic_guidance {
        hasher.update(b"dynamic guidance");
    }
    for condition in &request.conditions {
        hasher.update(b"pictures").update(&(condition.frame as u64).to_le_bytes());
        for number in [condition.strength, request.condition_noise_scale] {
            hasher.update(&number.to_bits().to_le_bytes());
        }
        hasher.update(&(condition.count() as u64).to_le_bytes()).update(&latents_bytes(&condition.pictures)?);
    }
    for noise in &request.condition_noise {
        hasher.update(b"condition noise").update(&latents_bytes(noise)?);
    }
    if let Some(second) = &request.second_pass {
        hasher.update(b"second pass");
        for number in [second.strength, second.adain, second.tone_map] {
            hasher.update(&number.to_bits().to_le_bytes());
        }
        if let Some(noise) = &second.noise {
            hasher.update(&latents_bytes(noise)?);
        }
    }
    for noise in &request.step_noise {
        hasher.update(b"step noise").update(&latents_bytes(noise)?);
    }
    for adapter in &request.adapters {
        hasher.update(b"adapter").update(adapter.lora.hash()).update(&adapter.scale.to_bits().to_le_bytes());
    }
    touch::digest(&request.touch, &mut hasher)?;
    Ok(*hasher.finalize().as_bytes())
}

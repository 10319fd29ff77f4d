//! Everything about a request that can be known without computing.

use super::VideoModel;
use crate::error::Error;
use crate::pipeline::{GenerateRequest, PipelineInfo, conditions, touch};
use crate::sampler::checkpoint::MAX_STEPS;
use crate::text::PromptTokenizer;

/// Checks a request and gives its plan.
pub(super) fn check<M: VideoModel>(model: &M, request: &GenerateRequest) -> Result<M::Plan, Error> {
    check_sizes(model.facts(), request)?;
    if request.steps == 0 && request.timesteps.is_none() {
        return Err(Error::ZeroSteps);
    }
    check_numbers(request)?;
    check_second_pass(model, request)?;
    // Where nothing is computed, neither words nor pictures are looked at.
    if request.touch.decode_only.is_none() {
        conditions::check(&model.facts().architecture, model.takes(), request)?;
        let negative = model.is_guided(request).then_some(&request.negative_prompt);
        let second = request.touch.prompt.as_ref().map(|second| &second.prompt);
        for prompt in [Some(&request.prompt), second, negative].into_iter().flatten() {
            model.prompt_fits(prompt, request.truncate_prompt)?;
        }
    }
    let plan = model.plan(request)?;
    let shape = |done: usize| model.latents_shape(&plan, done);
    touch::check(request, &model.facts().work, model.course(&plan).steps(), &shape)?;
    Ok(plan)
}

/// Refuses a prompt of more than `limit` tokens, with the end mark, unless it may be cut.
///
/// # Errors
/// [`Error::PromptTooLong`], or when the tokenizer fails.
pub fn check_prompt(
    tokenizer: &PromptTokenizer,
    prompt: &str,
    limit: usize,
    truncate: bool,
) -> Result<(), Error> {
    let encoded = tokenizer.encode(prompt, limit)?;
    match encoded.cut_text.filter(|_| !truncate) {
        Some(cut_text) => Err(Error::PromptTooLong { tokens: encoded.tokens, limit, cut_text }),
        None => Ok(()),
    }
}

/// Refuses sides and frame counts that a model cannot make.
///
/// # Errors
/// [`Error::Size`] or [`Error::Frames`] with the nearest that it can.
pub fn check_sizes(info: &PipelineInfo, request: &GenerateRequest) -> Result<(), Error> {
    check_size(info.size_multiple, "width", request.width)?;
    check_size(info.size_multiple, "height", request.height)?;
    if info.frame_rule.allows(request.frames) {
        return Ok(());
    }
    let (multiple, offset) = (info.frame_rule.multiple, info.frame_rule.offset);
    let nearest = info.frame_rule.nearest(request.frames);
    Err(Error::Frames { given: request.frames, multiple, offset, nearest })
}

fn check_size(multiple: usize, side: &'static str, given: usize) -> Result<(), Error> {
    if given > 0 && given.is_multiple_of(multiple) {
        return Ok(());
    }
    let nearest = ((given + multiple / 2) / multiple).max(1) * multiple;
    Err(Error::Size { side, given, multiple, nearest })
}

fn check_second_pass<M: VideoModel>(model: &M, request: &GenerateRequest) -> Result<(), Error> {
    let Some(second) = &request.second_pass else { return Ok(()) };
    let fault = |rule| Err(Error::SecondPass { architecture: model.facts().architecture.clone(), rule });
    if !model.makes_second_pass() {
        return fault("makes no second pass from given latents");
    }
    if request.initial_latents.is_none() {
        return fault("makes a second pass from given latents, and none were given");
    }
    if model.hides() && (second.adain != 0.0 || second.tone_map != 0.0) {
        return fault("makes no latents larger, so that upsample_adain and upsample_tone_map say nothing");
    }
    if !(second.strength > 0.0 && second.strength <= 1.0) {
        let (given, rule) = (second.strength, "it must be above 0 and at most 1");
        return Err(Error::Number { field: "denoise_strength", given, rule });
    }
    let numbers = [("upsample_adain", second.adain), ("upsample_tone_map", second.tone_map)];
    match numbers.into_iter().find(|(_, value)| !value.is_finite()) {
        Some((field, given)) => Err(Error::Number { field, given, rule: "it must be a finite number" }),
        None => Ok(()),
    }
}

fn check_numbers(request: &GenerateRequest) -> Result<(), Error> {
    let finite = [
        ("guidance", request.guidance),
        ("later_guidance", request.later_guidance.unwrap_or(0.0)),
        ("guidance_rescale", request.guidance_rescale),
        ("decode_timestep", request.decode_timestep),
        ("decode_noise_scale", request.decode_noise_scale.unwrap_or(0.0)),
    ];
    if !(request.fps.is_finite() && request.fps > 0.0) {
        return Err(Error::Number { field: "fps", given: request.fps, rule: "it must be above 0" });
    }
    if request.steps > MAX_STEPS {
        let given = request.steps as f64;
        return Err(Error::Number { field: "steps", given, rule: "it must be at most 100000" });
    }
    match finite.into_iter().find(|(_, value)| !value.is_finite()) {
        Some((field, given)) => Err(Error::Number { field, given, rule: "it must be a finite number" }),
        None => Ok(()),
    }
}

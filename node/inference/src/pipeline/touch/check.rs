//! What of a request's changes has a meaning for this model.

use candle_core::Tensor;

use super::{Channels, MAX_KEPT_BYTES, Touch, fault};
use crate::error::Error;
use crate::pipeline::latents::Volume;
use crate::pipeline::{GenerateRequest, WorkConfig};
use crate::sampler::checkpoint::latents_bytes;

/// Checks a request's changes for a model of this size, a run of so many steps, and the latents' shape after each.
pub(crate) fn check(
    request: &GenerateRequest,
    work: &WorkConfig,
    steps: usize,
    shape: &dyn Fn(usize) -> Vec<usize>,
) -> Result<(), Error> {
    let touch = &request.touch;
    check_place(request, work, steps, shape)?;
    check_kept(touch, steps, shape)?;
    check_route(touch, work.layers)?;
    check_channels(&touch.channels, work.latent_channels, steps)?;
    let weights = [
        ("prompt.weight", touch.prompt.as_ref().map(|second| second.weight)),
        ("noise.weight", touch.noise.map(|second| second.weight)),
    ];
    let weights = weights.into_iter().filter_map(|(op, weight)| Some((op, weight?)));
    let points = touch.guidance.iter().map(|point| ("guidance.curve", *point));
    let scales = touch.channels.scale.iter().map(|factor| ("channels.scale", *factor));
    let shifts = touch.channels.shift.iter().map(|added| ("channels.shift", *added));
    match weights.chain(points).chain(scales).chain(shifts).find(|(_, value)| !value.is_finite()) {
        Some((op, value)) => Err(fault(op, format!("{value} is no finite number"))),
        None => Ok(()),
    }
}

/// Where the run begins.
fn check_place(
    request: &GenerateRequest,
    work: &WorkConfig,
    steps: usize,
    shape: &dyn Fn(usize) -> Vec<usize>,
) -> Result<(), Error> {
    let touch = &request.touch;
    if let Some(latents) = &touch.decode_only {
        if touch.start.is_some() || request.second_pass.is_some() {
            return Err(fault("decode_only", "nothing is computed, so there is no step to begin with"));
        }
        let needed = Volume::new(work, request).shape();
        if latents.dims() != needed && latents.dims() != shape(steps) {
            let given = latents.dims().to_vec();
            return Err(Error::LatentShape { what: "decode_only's latents", given, needed });
        }
        return check_finite("decode_only", latents);
    }
    let Some(start) = &touch.start else { return Ok(()) };
    if request.second_pass.is_some() {
        return Err(fault("latents.start_step", "a strength begins elsewhere: leave one of the two out"));
    }
    if start.done == 0 || start.done >= steps {
        let reason =
            format!("{} is none of the steps 1 to {} after which a run goes on", start.done, steps - 1);
        return Err(fault("latents.start_step", reason));
    }
    let needed = shape(start.done);
    if start.latents.dims() != needed {
        let given = start.latents.dims().to_vec();
        return Err(Error::LatentShape { what: "the latents to go on from", given, needed });
    }
    check_finite("latents.start_step", &start.latents)?;
    start.memory.values().try_for_each(|tensor| check_finite("latents.start_step", tensor))
}

fn check_finite(op: &'static str, latents: &Tensor) -> Result<(), Error> {
    let bytes = latents_bytes(latents)?;
    let is_finite = |word: &[u8; 4]| f32::from_le_bytes(*word).is_finite();
    match bytes.as_chunks::<4>().0.iter().all(is_finite) {
        true => Ok(()),
        false => Err(fault(op, "the given latents hold values that are no finite numbers")),
    }
}

/// What comes back.
fn check_kept(touch: &Touch, steps: usize, shape: &dyn Fn(usize) -> Vec<usize>) -> Result<(), Error> {
    const OP: &str = "latents.return_steps";
    let kept = &touch.keep.steps;
    if touch.decode_only.is_some() && (touch.keep.noise || !kept.is_empty()) {
        return Err(fault("decode_only", "no step is computed whose latents could come back"));
    }
    let first = touch.start.as_ref().map_or(1, |start| start.done + 1);
    if let Some(none) = kept.iter().find(|step| !(first..=steps).contains(*step)) {
        return Err(fault(OP, format!("{none} is none of the steps {first} to {steps} of this run")));
    }
    let bytes: usize = kept.iter().map(|step| shape(*step).iter().product::<usize>() * 4).sum();
    if bytes > MAX_KEPT_BYTES {
        let reason = format!("{bytes} bytes of latents exceed the limit of {MAX_KEPT_BYTES} bytes");
        return Err(fault(OP, reason));
    }
    Ok(())
}

fn check_route(touch: &Touch, layers: usize) -> Result<(), Error> {
    let route = &touch.route;
    let all = [("layers.skip", &route.skip), ("layers.repeat", &route.repeat)];
    for (op, blocks) in all {
        if let Some(block) = blocks.iter().find(|block| **block >= layers) {
            let reason = format!("there is no block {block}: the model has {layers}, counted from 0");
            return Err(fault(op, reason));
        }
    }
    if route.repeat.len() > layers {
        let given = route.repeat.len();
        let reason =
            format!("{given} repetitions exceed the limit of {layers}, the blocks that the model has");
        return Err(fault("layers.repeat", reason));
    }
    match route.repeat.iter().find(|block| route.skip.contains(block)) {
        Some(block) => Err(fault("layers.repeat", format!("block {block} is skipped too: leave one out"))),
        None => Ok(()),
    }
}

fn check_channels(channels: &Channels, count: usize, steps: usize) -> Result<(), Error> {
    let order = &channels.permute;
    if !order.is_empty() && order.len() != count {
        let reason = format!("{} channels are named, the latents have {count}", order.len());
        return Err(fault("channels.permute", reason));
    }
    if let Some(channel) = order.iter().find(|channel| **channel >= count) {
        let reason = format!("there is no channel {channel}: the latents have {count}, counted from 0");
        return Err(fault("channels.permute", reason));
    }
    for (op, values) in [("channels.scale", &channels.scale), ("channels.shift", &channels.shift)] {
        if !values.is_empty() && values.len() != 1 && values.len() != count {
            let reason = format!("{} numbers are given: one is needed, or {count}, one each", values.len());
            return Err(fault(op, reason));
        }
    }
    match channels.after {
        Some(_) if channels.is_empty() => {
            Err(fault("channels.after", "there is nothing that could be done to the channels then"))
        }
        Some(after) if after >= steps => {
            let reason =
                format!("{after} is beyond step {}; leave it out to change the final latents", steps - 1);
            Err(fault("channels.after", reason))
        }
        _ => Ok(()),
    }
}

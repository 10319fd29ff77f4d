//! A job's named operations: what they mean to a worker, and what of them cannot be here, said when the order comes.

use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::job::{JobSpec, OpValue};
use kinoflock_protocol::limits::MAX_PROMPT;
use kinoflock_protocol::ops::{self, OpInfo};
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::units::Micro;
use kinoflock_protocol::work::WorkModel;

use super::refuse::unsupported;
use crate::engine::wire::{Extra, Mixed, Numbers, Places, Touch};

/// Between two, where a job does not say.
const HALF: f64 = 0.5;

/// An operation that cannot be had.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OpFault {
    /// Its name.
    pub(super) name: String,
    /// What is needed of it; nothing where it is not known at all.
    pub(super) needed: Option<String>,
}

impl std::fmt::Display for OpFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.needed {
            None => write!(f, "operation {} is not known here", self.name),
            Some(needed) => write!(f, "operation {}: {needed}", self.name),
        }
    }
}

impl OpFault {
    fn of(name: &str, needed: &str) -> Self {
        Self { name: name.to_owned(), needed: Some(needed.to_owned()) }
    }

    /// What the artist is told.
    pub(super) fn refusal(&self) -> Box<Refusal> {
        match &self.needed {
            None => {
                let known: Vec<_> = ops::OPS.iter().map(|op| op.name).collect();
                unsupported(&self.name, &format!("known are {}", known.join(" ")))
            }
            Some(needed) => lacking(&self.name, needed),
        }
    }
}

/// What a job's named operations and lesser numbers mean to a worker.
///
/// # Errors
/// The first operation that is not known here, or whose value is of another kind than it takes.
pub(super) fn extra(spec: &JobSpec) -> Result<Extra, OpFault> {
    let rescale = spec.guidance_rescale;
    let mut extra =
        Extra { guidance_rescale: (rescale != Micro::ZERO).then(|| rescale.to_f64()), ..Extra::default() };
    let mut mixes = Mixes::default();
    for op in spec.ops.iter() {
        let name = op.name.as_str();
        let known = ops::find(name).ok_or_else(|| OpFault { name: name.to_owned(), needed: None })?;
        if !known.kind.takes(&op.value) {
            return Err(OpFault::of(name, &format!("it takes {}", known.kind.name())));
        }
        enter(known, &op.value, &mut extra, &mut mixes)?;
    }
    mixes.enter(&mut extra.touch)?;
    Ok(extra)
}

/// Puts one operation where a worker reads it.
fn enter(op: &OpInfo, value: &OpValue, extra: &mut Extra, mixes: &mut Mixes) -> Result<(), OpFault> {
    let touch = &mut extra.touch;
    match op.name {
        "timesteps" => extra.timesteps = Some(List::first_of(numbers(value).iter().copied())),
        "decode_timestep" => extra.decode_timestep = number(value),
        "decode_noise_scale" => extra.decode_noise_scale = number(value),
        "decode_tile" => extra.decode_tile = Some(place(op, value)?),
        "decode_chunk" => extra.decode_chunk = Some(place(op, value)?),
        "extend_frames" => extra.extend_frames = Some(place(op, value)?),
        "denoise_strength" => extra.denoise_strength = number(value),
        "upsample_adain" => extra.upsample_adain = number(value),
        "upsample_tone_map" => extra.upsample_tone_map = number(value),
        "picture_noise_scale" => extra.picture_noise_scale = number(value),
        "truncate_prompt" => extra.truncate_prompt = flag(value),
        "guidance.curve" => touch.guidance = numbers(value),
        "layers.skip" => touch.skip = places(op, value)?,
        "layers.repeat" => touch.repeat = places(op, value)?,
        "channels.permute" => touch.permute = places(op, value)?,
        "channels.scale" => touch.scale = numbers(value),
        "channels.shift" => touch.shift = numbers(value),
        "channels.after" => touch.channels_after = Some(place(op, value)?),
        "latents.return_noise" => touch.return_noise = flag(value),
        "latents.return_steps" => touch.return_steps = places(op, value)?,
        "latents.start_step" => touch.start_step = Some(place(op, value)?),
        "decode_only" => touch.decode_only = flag(value),
        _ => return mixes.take(op, value),
    }
    Ok(())
}

/// What several operations say of one mix.
#[derive(Default)]
struct Mixes {
    prompt: Option<String>,
    prompt_weight: Option<f64>,
    prompt_spherical: Option<bool>,
    seed: Option<u64>,
    noise_weight: Option<f64>,
    noise_linear: Option<bool>,
}

impl Mixes {
    fn take(&mut self, op: &OpInfo, value: &OpValue) -> Result<(), OpFault> {
        match (op.name, value) {
            ("prompt.mix", OpValue::Text(text)) => {
                self.prompt.get_or_insert_default().push_str(text.as_str());
            }
            ("prompt.weight", value) => self.prompt_weight = number(value),
            ("prompt.spherical", value) => self.prompt_spherical = Some(flag(value)),
            // A seed has 64 bits without a sign.
            ("noise.mix", OpValue::Whole(seed)) => self.seed = Some(*seed as u64),
            ("noise.weight", value) => self.noise_weight = number(value),
            ("noise.linear", value) => self.noise_linear = Some(flag(value)),
            _ => return Err(OpFault { name: op.name.to_owned(), needed: None }),
        }
        Ok(())
    }

    fn enter(self, touch: &mut Touch) -> Result<(), OpFault> {
        let without = [
            ("prompt.weight", self.prompt.is_none() && self.prompt_weight.is_some(), "it needs prompt.mix"),
            (
                "prompt.spherical",
                self.prompt.is_none() && self.prompt_spherical.is_some(),
                "it needs prompt.mix",
            ),
            ("noise.weight", self.seed.is_none() && self.noise_weight.is_some(), "it needs noise.mix"),
            ("noise.linear", self.seed.is_none() && self.noise_linear.is_some(), "it needs noise.mix"),
        ];
        if let Some((name, _, needed)) = without.into_iter().find(|(_, wrong, _)| *wrong) {
            return Err(OpFault::of(name, needed));
        }
        touch.prompt = match self.prompt {
            None => None,
            Some(prompt) => {
                let given = prompt.len();
                let too_long = |_| {
                    let needed = format!("{given} bytes exceed the limit of {MAX_PROMPT} bytes");
                    OpFault::of("prompt.mix", &needed)
                };
                let weight = self.prompt_weight.unwrap_or(HALF);
                let spherical = self.prompt_spherical.unwrap_or(false);
                Some(Mixed { with: Text::new(prompt).map_err(too_long)?, weight, spherical })
            }
        };
        touch.noise = self.seed.map(|with| Mixed {
            with,
            weight: self.noise_weight.unwrap_or(HALF),
            spherical: !self.noise_linear.unwrap_or(false),
        });
        Ok(())
    }
}

/// Refuses operations that the job's other parts or the model cannot have, as far as that can be told without it.
pub(super) fn check(spec: &JobSpec, extra: &Extra, work: &WorkModel) -> Result<(), Box<Refusal>> {
    let touch = &extra.touch;
    check_inputs(spec, extra)?;
    check_counted(spec, extra)?;
    let layers = work.transformer.layers.saturating_add(work.transformer.single_layers);
    below("layers.skip", &touch.skip, layers)?;
    below("layers.repeat", &touch.repeat, layers)?;
    at_most(
        "layers.repeat",
        layers,
        touch.repeat.len(),
        "so many blocks more are what a job's work leaves room for",
    )?;
    let channels = work.transformer.channels;
    below("channels.permute", &touch.permute, channels)?;
    let each = [
        ("channels.permute", touch.permute.len(), false),
        ("channels.scale", touch.scale.len(), true),
        ("channels.shift", touch.shift.len(), true),
    ];
    for (name, given, one_is_enough) in each {
        if given != 0 && given != channels as usize && !(one_is_enough && given == 1) {
            return Err(beyond(name, channels, given, "the latents have so many channels"));
        }
    }
    if work.counts_by_steps() && !touch.decode_only {
        check_steps(spec, touch)?;
    }
    match ops::reaching_in(spec) {
        Some(op) if spec.returns.step_root => {
            Err(unsupported("step_root", &format!("a run with {op} cannot be audited step by step")))
        }
        _ => Ok(()),
    }
}

/// What is done to given latents needs some, and what comes back must be asked for.
fn check_inputs(spec: &JobSpec, extra: &Extra) -> Result<(), Box<Refusal>> {
    let touch = &extra.touch;
    let none = spec.initial_latents.is_none();
    let from = [
        ("decode_only", touch.decode_only),
        ("latents.start_step", touch.start_step.is_some()),
        ("denoise_strength", extra.denoise_strength.is_some()),
    ];
    if let Some((name, _)) = from.into_iter().find(|(_, asked)| *asked && none) {
        return Err(lacking(name, "give latents to begin from"));
    }
    let asked: Vec<_> = from.into_iter().filter(|(_, asked)| *asked).collect();
    if let [_, (name, _), ..] = asked.as_slice() {
        return Err(lacking(name, "latents are decoded, or gone on from, or hidden under noise: choose one"));
    }
    let back = [
        ("latents.return_noise", touch.return_noise),
        ("latents.return_steps", !touch.return_steps.is_empty()),
    ];
    match back.into_iter().find(|(_, asked)| *asked && !spec.returns.latents) {
        Some((name, _)) => Err(lacking(name, "ask for the final latents too: they come in one file")),
        None => Ok(()),
    }
}

/// A job's work is counted from its steps and its guidance: they must be those that are computed.
fn check_counted(spec: &JobSpec, extra: &Extra) -> Result<(), Box<Refusal>> {
    let touch = &extra.touch;
    if let Some(timesteps) = extra.timesteps.as_ref().filter(|named| named.len() != spec.steps as usize) {
        return Err(beyond(
            "timesteps",
            spec.steps,
            timesteps.len(),
            "name as many timesteps as the job has steps",
        ));
    }
    if touch.decode_only && spec.steps != 1 {
        return Err(beyond(
            "decode_only",
            1,
            spec.steps as usize,
            "nothing is computed: let the job have 1 step",
        ));
    }
    if !touch.guidance.is_empty() && spec.guidance == Micro::ONE {
        return Err(lacking(
            "guidance.curve",
            "let the job's guidance be another than 1, so that its work is counted",
        ));
    }
    Ok(())
}

/// Places in a run whose states are counted by the job's steps.
fn check_steps(spec: &JobSpec, touch: &Touch) -> Result<(), Box<Refusal>> {
    let last = spec.steps;
    let start = touch.start_step.unwrap_or(0);
    if touch.start_step.is_some() && (start == 0 || start >= last) {
        return Err(beyond(
            "latents.start_step",
            last - 1,
            start as usize,
            "name a step from 1 on, before the last",
        ));
    }
    if let Some(after) = touch.channels_after.filter(|after| *after >= last) {
        return Err(beyond(
            "channels.after",
            last - 1,
            after as usize,
            "leave it out to change the final latents",
        ));
    }
    match touch.return_steps.iter().find(|step| **step <= start || **step > last) {
        Some(step) => Err(beyond(
            "latents.return_steps",
            last,
            *step as usize,
            "name steps that the run computes, from 1 on",
        )),
        None => Ok(()),
    }
}

fn below(name: &str, given: &Places, count: u32) -> Result<(), Box<Refusal>> {
    match given.iter().find(|place| **place >= count) {
        Some(place) => Err(beyond(name, count.saturating_sub(1), *place as usize, "they are counted from 0")),
        None => Ok(()),
    }
}

fn at_most(name: &str, limit: u32, given: usize, advice: &str) -> Result<(), Box<Refusal>> {
    if given <= limit as usize { Ok(()) } else { Err(beyond(name, limit, given, advice)) }
}

fn beyond(name: &str, limit: u32, given: usize, advice: &str) -> Box<Refusal> {
    Box::new(Refusal::new(Reason::Impossible, name).limit(limit, given).advice(advice))
}

fn lacking(name: &str, advice: &str) -> Box<Refusal> {
    Box::new(Refusal::new(Reason::Invalid, name).given(name).advice(advice))
}

fn flag(value: &OpValue) -> bool {
    matches!(value, OpValue::Flag(true))
}

fn number(value: &OpValue) -> Option<f64> {
    match value {
        OpValue::Number(number) => Some(number.to_f64()),
        OpValue::Whole(whole) => Some(*whole as f64),
        _ => None,
    }
}

fn numbers(value: &OpValue) -> Numbers {
    match value {
        OpValue::Numbers(numbers) => List::first_of(numbers.iter().map(|number| number.to_f64())),
        one => List::first_of(number(one)),
    }
}

fn places(op: &OpInfo, value: &OpValue) -> Result<Places, OpFault> {
    let needed = || OpFault::of(op.name, "it takes whole numbers from 0 on, below 4294967296");
    let all: Option<Vec<u32>> = numbers(value)
        .iter()
        .map(|number| (*number >= 0.0 && *number <= f64::from(u32::MAX)).then_some(*number as u32))
        .collect();
    Ok(List::first_of(all.ok_or_else(needed)?))
}

fn place(op: &OpInfo, value: &OpValue) -> Result<u32, OpFault> {
    let needed = || OpFault::of(op.name, "it takes a whole number from 0 on, below 4294967296");
    places(op, value).map_err(|_| needed())?.first().copied().ok_or_else(needed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kinoflock_protocol::id::{ModelId, Nonce};
    use kinoflock_protocol::job::{Op, Prompt};
    use kinoflock_protocol::ops::{OPS, OpKind};
    use kinoflock_protocol::units::UnixMillis;
    use kinoflock_protocol::work::JobShape;

    use super::*;

    fn spec(ops: &[(&str, OpValue)]) -> JobSpec {
        let shape = JobShape { frames: 9, width: 64, height: 64, steps: 4, guided: true };
        let (model, nonce) = (ModelId::from_bytes([1; 32]), Nonce::from_bytes([2; 16]));
        let ops = ops.iter().map(|(name, value)| Op { name: Text::truncated(name), value: value.clone() });
        let plain = JobSpec::generate(model, Prompt::default(), nonce, UnixMillis::default(), shape);
        JobSpec { ops: List::first_of(ops), ..plain }
    }

    fn value(kind: OpKind) -> OpValue {
        match kind {
            OpKind::Flag => OpValue::Flag(true),
            OpKind::Whole => OpValue::Whole(3),
            OpKind::Number => OpValue::Number(Micro(250_000)),
            OpKind::Numbers => OpValue::Numbers(List::first_of([Micro(1_500_000), Micro(-2)])),
            OpKind::Wholes => OpValue::Numbers(List::first_of([Micro(1_000_000), Micro(0)])),
            OpKind::Text => OpValue::Text(Text::truncated("rain")),
        }
    }

    #[test]
    fn every_operation_that_is_told_of_is_known_here_and_reaches_the_worker() {
        for op in OPS {
            // What weighs a mix needs one.
            let base = match op.name {
                "noise.weight" | "noise.linear" => vec![("noise.mix", OpValue::Whole(8))],
                "prompt.weight" | "prompt.spherical" => vec![("prompt.mix", value(OpKind::Text))],
                _ => Vec::new(),
            };
            let without = extra(&spec(&base)).unwrap();
            let with = extra(&spec(&[base, vec![(op.name, value(op.kind))]].concat())).unwrap();
            assert!(with != without, "{} changes nothing", op.name);
        }
        let unknown = extra(&spec(&[("latents.eat", OpValue::Flag(true))])).unwrap_err();
        assert_eq!(unknown, OpFault { name: "latents.eat".to_owned(), needed: None });
        assert_eq!(unknown.refusal().reason, Reason::UnknownOperation);
    }

    #[test]
    fn a_long_second_prompt_comes_in_parts_and_a_seed_keeps_its_64_bits() {
        let parts = ["a red ", "circle"].map(|part| ("prompt.mix", OpValue::Text(Text::truncated(part))));
        let seed = ("noise.mix", OpValue::Whole(-1));
        let touch = extra(&spec(&[parts.to_vec(), vec![seed]].concat())).unwrap().touch;
        let prompt = touch.prompt.unwrap();
        assert_eq!((prompt.with.as_str(), prompt.weight, prompt.spherical), ("a red circle", 0.5, false));
        let noise = touch.noise.unwrap();
        assert_eq!((noise.with, noise.weight, noise.spherical), (u64::MAX, 0.5, true));
    }

    #[test]
    fn places_are_whole_numbers_that_can_be_counted_to() {
        let fault = |name, value| extra(&spec(&[(name, value)])).unwrap_err().to_string();
        assert!(fault("layers.skip", OpValue::Whole(-1)).contains("whole numbers from 0 on"));
        assert!(fault("channels.after", OpValue::Whole(1 << 33)).contains("a whole number from 0 on"));
        assert!(fault("layers.skip", OpValue::Number(Micro(500_000))).contains("it takes whole numbers"));
        assert!(fault("noise.weight", OpValue::Whole(1)).contains("it needs noise.mix"));
    }
}

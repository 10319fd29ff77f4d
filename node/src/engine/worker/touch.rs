//! Given latents, and what a run changes inside itself, as a model takes it.
//!
//! A file of latents is a safetensors file from a stranger: read within bounds, its shapes checked by the pipeline. It
//! holds one tensor `latents`, or what a job gave back: `noise`, `step_N` with `step_N.memory.NAME` for each thing that
//! the sampler remembers there, and `final`. Which of them is meant follows from what the job does with it.

use std::collections::BTreeMap;

use kinoflock_inference::pipeline::touch::{
    Channels, FINAL, Keep, NOISE, NoiseMix, PromptMix, Route, Start, Touch, Way, memory_prefix, step_name,
};
use kinoflock_inference::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::local::read_state;
use super::output::LATENTS;
use crate::engine::wire::{self, Extra, Failure, Places};

/// Most tensors of a given file.
const MAX_TENSORS: usize = 4096;

/// What is done to a run, and the latents that it begins with as noise or goes on from.
pub(super) fn read(extra: &Extra) -> Result<(Touch, Option<Tensor>), Failure> {
    let touch = plain(&extra.touch);
    let Some(path) = &extra.initial_latents else { return Ok((touch, None)) };
    let bytes = read_state(path)?;
    let file = File::of(&bytes)?;
    let asked = &extra.touch;
    if asked.decode_only {
        let latents = file.tensor(&[FINAL, LATENTS])?;
        return Ok((Touch { decode_only: Some(latents), ..touch }, None));
    }
    if let Some(done) = asked.start_step {
        let done = done as usize;
        let latents = file.tensor(&[&step_name(done), LATENTS])?;
        let start = Some(Start { done, latents, memory: file.memory(done)? });
        // What begins later in the run needs the noise that it began with.
        let noise = if file.has(NOISE) { Some(file.tensor(&[NOISE])?) } else { None };
        return Ok((Touch { start, ..touch }, noise));
    }
    let names = if extra.denoise_strength.is_some() { [FINAL, LATENTS] } else { [NOISE, LATENTS] };
    Ok((touch, Some(file.tensor(&names)?)))
}

/// A file's one tensor `latents`.
pub(super) fn read_latents(path: &str) -> Result<Tensor, Failure> {
    File::of(&read_state(path)?)?.tensor(&[LATENTS])
}

fn plain(asked: &wire::Touch) -> Touch {
    let places = |places: &Places| places.iter().map(|place| *place as usize).collect::<Vec<_>>();
    let way = |spherical: bool| if spherical { Way::Sphere } else { Way::Line };
    Touch {
        keep: Keep { noise: asked.return_noise, steps: places(&asked.return_steps).into_iter().collect() },
        guidance: asked.guidance.to_vec(),
        route: Route { skip: places(&asked.skip), repeat: places(&asked.repeat) },
        channels: Channels {
            permute: places(&asked.permute),
            scale: asked.scale.to_vec(),
            shift: asked.shift.to_vec(),
            after: asked.channels_after.map(|after| after as usize),
        },
        prompt: asked.prompt.as_ref().map(|mixed| PromptMix {
            prompt: mixed.with.as_str().to_owned(),
            weight: mixed.weight,
            way: way(mixed.spherical),
        }),
        noise: asked.noise.as_ref().map(|mixed| NoiseMix {
            seed: mixed.with,
            weight: mixed.weight,
            way: way(mixed.spherical),
        }),
        ..Touch::default()
    }
}

/// A given file.
struct File<'a>(SafeTensors<'a>);

impl<'a> File<'a> {
    fn of(bytes: &'a [u8]) -> Result<Self, Failure> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| fault(&error))?;
        if tensors.len() > MAX_TENSORS {
            let given = tensors.len();
            return Err(fault(&format!("the file holds {given} tensors, the limit is {MAX_TENSORS}")));
        }
        Ok(Self(tensors))
    }

    fn has(&self, name: &str) -> bool {
        self.0.tensor(name).is_ok()
    }

    /// The first of these that is there, f32 on the CPU.
    fn tensor(&self, names: &[&str]) -> Result<Tensor, Failure> {
        let found = names.iter().find_map(|name| self.0.tensor(name).ok());
        let named = names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" or ");
        widened(&found.ok_or_else(|| fault(&format!("the file has no tensor {named}")))?)
    }

    /// What the sampler remembers after so many steps.
    fn memory(&self, done: usize) -> Result<BTreeMap<String, Tensor>, Failure> {
        let prefix = memory_prefix(done);
        let mut memory = BTreeMap::new();
        for (name, view) in self.0.iter() {
            if let Some(name) = name.strip_prefix(&prefix) {
                memory.insert(name.to_owned(), widened(&view)?);
            }
        }
        Ok(memory)
    }
}

fn widened(view: &TensorView<'_>) -> Result<Tensor, Failure> {
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => return Err(fault(&format!("a tensor is {other:?}: F32, F16 or BF16 is needed"))),
    };
    Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(DType::F32))
        .map_err(|error| fault(&error))
}

fn fault(reason: &impl std::fmt::Display) -> Failure {
    Failure::new("initial_latents", &format!("initial latents: {reason}"), false)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::engine::wire::WirePath;

    fn file(folder: &tempfile::TempDir, tensors: &[(&str, f32)]) -> WirePath {
        let data: Vec<_> = tensors.iter().map(|(name, value)| (*name, value.to_le_bytes())).collect();
        let views =
            data.iter().map(|(name, data)| (*name, TensorView::new(Dtype::F32, vec![1], data).unwrap()));
        let path = folder.path().join("latents.safetensors");
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        WirePath::new(path.to_str().unwrap()).unwrap()
    }

    fn value(tensor: &Tensor) -> f32 {
        tensor.to_vec1::<f32>().unwrap()[0]
    }

    #[test]
    fn what_a_job_does_with_a_file_says_which_of_its_tensors_is_meant() {
        let folder = tempfile::tempdir().unwrap();
        let all =
            [(NOISE, 1.0), ("step_2", 2.0), ("step_2.memory.clean.0", 3.0), (FINAL, 4.0), ("step_20", 5.0)];
        let with = |touch: wire::Touch, strength| {
            let initial_latents = Some(file(&folder, &all));
            read(&Extra { touch, initial_latents, denoise_strength: strength, ..Extra::default() }).unwrap()
        };
        let noise = with(wire::Touch::default(), None);
        assert_eq!(noise.1.as_ref().map(value), Some(1.0));
        let strength = with(wire::Touch::default(), Some(0.5));
        assert_eq!(strength.1.as_ref().map(value), Some(4.0));
        let (touch, noise) = with(wire::Touch { start_step: Some(2), ..wire::Touch::default() }, None);
        let start = touch.start.unwrap();
        assert_eq!((start.done, value(&start.latents), noise.as_ref().map(value)), (2, 2.0, Some(1.0)));
        assert_eq!(
            start.memory.iter().map(|(name, at)| (name.as_str(), value(at))).collect::<Vec<_>>(),
            [("clean.0", 3.0)]
        );
        let (touch, none) = with(wire::Touch { decode_only: true, ..wire::Touch::default() }, None);
        assert!(none.is_none() && touch.decode_only.as_ref().map(value) == Some(4.0));
    }

    #[test]
    fn a_file_without_what_is_needed_is_refused_by_the_names_that_would_do() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |touch: wire::Touch| {
            let initial_latents = Some(file(&folder, &[("x", 1.0)]));
            read(&Extra { touch, initial_latents, ..Extra::default() }).unwrap_err().text.to_string()
        };
        assert!(refused(wire::Touch::default()).contains("no tensor \"noise\" or \"latents\""));
        let from = wire::Touch { start_step: Some(3), ..wire::Touch::default() };
        assert!(refused(from).contains("no tensor \"step_3\" or \"latents\""));
        assert!(File::of(b"no latents").is_err());
    }
}

//! The way of a run through units and stages: which step belongs where, the noise that each begins with, and what of the
//! units before it a unit sees.

use candle_core::{DType, Device, Tensor};

use super::resize::shrink;
use super::{PyramidPipeline, PyramidSettings};
use crate::error::Error;
use crate::models::pyramid::config::PATCH;
use crate::pipeline::{GenerateRequest, touch};
use crate::rng::{Stream, normal_tensor};
use crate::sampler::PyramidSchedule;
use crate::sampler::checkpoint::MAX_STEPS;

/// What follows from a request without the network.
pub struct Plan {
    /// Every step in order.
    pub(super) places: Vec<Place>,
    pub(super) sigmas: Vec<f32>,
    pub(super) timesteps: Vec<f32>,
    /// Latent frames, rows and columns of the clip.
    cells: [usize; 3],
    channels: usize,
    stages: usize,
    /// The first unit that is made: 1 where a picture is the first.
    first: usize,
    frames_per_unit: usize,
    block_factors: (f64, f64),
    entries: Vec<(f64, f64)>,
}

/// Where a step belongs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Place {
    pub(super) unit: usize,
    pub(super) stage: usize,
    /// The stage's own noise level before the step.
    pub(super) sigma: f64,
    /// `after = before + change * output`.
    pub(super) change: f64,
    /// Whether it is its stage's last step.
    pub(super) ends_stage: bool,
}

impl Plan {
    pub(super) fn new(model: &PyramidPipeline, request: &GenerateRequest) -> Result<Self, Error> {
        let (work, settings) = (&model.base.info.work, &model.settings);
        let stages = model.schedule.stages().len();
        let frames = request.frames.saturating_sub(1) / work.temporal_ratio + 1;
        let cells = [frames, request.height / work.spatial_ratio, request.width / work.spatial_ratio];
        let mut plan = Self {
            places: Vec::new(),
            sigmas: Vec::new(),
            timesteps: Vec::new(),
            cells,
            channels: work.latent_channels,
            stages,
            first: usize::from(!request.conditions.is_empty()),
            frames_per_unit: settings.frames_per_unit,
            block_factors: model.schedule.block_factors(),
            entries: model.schedule.stages().iter().map(|stage| stage.entry()).collect(),
        };
        plan.check_sizes(model, request)?;
        let [first, later] = steps(request, stages)?;
        let sum = |steps: &[usize]| steps.iter().fold(0, |all: usize, &steps| all.saturating_add(steps));
        let of_first = if plan.first == 0 { sum(&first) } else { 0 };
        let all = of_first.saturating_add((plan.units() - 1).saturating_mul(sum(&later)));
        if all > MAX_STEPS {
            let rule = "all stages of all units together may have at most 100000";
            return Err(Error::Number { field: "steps", given: all as f64, rule });
        }
        for unit in plan.first..plan.units() {
            plan.add_unit(&model.schedule, unit, if unit == 0 { &first } else { &later });
        }
        plan.sigmas.push(0.0);
        plan.check_noise(request)?;
        Ok(plan)
    }

    fn add_unit(&mut self, schedule: &PyramidSchedule, unit: usize, steps: &[usize]) {
        for (stage, (facts, &steps)) in schedule.stages().iter().zip(steps).enumerate() {
            let sigmas = facts.sigmas(steps);
            self.timesteps.extend(facts.timesteps(steps).iter().map(|&timestep| timestep as f32));
            for (step, pair) in sigmas.windows(2).enumerate() {
                let (sigma, change) = (pair[0], pair[1] - pair[0]);
                self.sigmas.push(facts.level(sigma) as f32);
                self.places.push(Place { unit, stage, sigma, change, ends_stage: step + 1 == steps });
            }
        }
    }

    /// What a model's positions reach to, and that something is left to be made.
    fn check_sizes(&self, model: &PyramidPipeline, request: &GenerateRequest) -> Result<(), Error> {
        let side = model.config.positions.unwrap_or(usize::MAX);
        let sides = [("height", request.height, self.cells[1]), ("width", request.width, self.cells[2])];
        if let Some((field, given, _)) = sides.into_iter().find(|(_, _, cells)| cells / PATCH > side) {
            let rule = "the model has no positions for so large a picture";
            return Err(Error::Number { field, given: given as f64, rule });
        }
        if self.first == self.units() {
            let rule = "the picture that is given is the whole clip: ask for more frames";
            return Err(Error::Number { field: "frames", given: request.frames as f64, rule });
        }
        Ok(())
    }

    /// The first unit that is made.
    pub(super) fn first(&self) -> usize {
        self.first
    }

    pub(super) fn units(&self) -> usize {
        1 + (self.cells[0] - 1).div_ceil(self.frames_per_unit)
    }

    /// Whether a step of this unit and stage is followed by another stage of it.
    pub(super) fn is_last_stage(&self, stage: usize) -> bool {
        stage + 1 == self.stages
    }

    /// How many times smaller than the clip a stage's pictures are, along a side.
    pub(super) fn factor(&self, stage: usize) -> usize {
        1 << (self.stages - 1 - stage)
    }

    /// The clip's latents.
    pub(super) fn whole_shape(&self) -> Vec<usize> {
        let [frames, height, width] = self.cells;
        vec![1, self.channels, frames, height, width]
    }

    /// A unit's latents in a stage.
    pub(super) fn shape(&self, unit: usize, stage: usize) -> Vec<usize> {
        let factor = self.factor(stage);
        vec![1, self.channels, self.frames(unit).1, self.cells[1] / factor, self.cells[2] / factor]
    }

    /// A unit's first latent frame and how many it has.
    pub(super) fn frames(&self, unit: usize) -> (usize, usize) {
        match unit {
            0 => (0, 1),
            _ => (1 + (unit - 1) * self.frames_per_unit, self.frames_per_unit),
        }
    }

    /// The clip's noise, on the CPU.
    pub(super) fn whole_noise(&self, request: &GenerateRequest) -> Result<Tensor, Error> {
        match &request.initial_latents {
            None => Ok(touch::noise(request, &self.whole_shape())?),
            Some(given) => Ok(given.to_dtype(DType::F32)?.to_device(&Device::Cpu)?),
        }
    }

    /// What a unit begins with, on the CPU: its part of the clip's noise, made small with its spread kept.
    pub(super) fn noise(&self, request: &GenerateRequest, unit: usize) -> Result<Tensor, Error> {
        let whole = self.whole_noise(request)?;
        let (start, length) = self.frames(unit);
        let mut noise = whole.narrow(2, start, length)?.contiguous()?;
        for _ in 1..self.stages {
            noise = (shrink(&noise)? * 2.0)?;
        }
        Ok(noise)
    }

    /// The picture of the stage before, enlarged, as part of the flow of `stage`.
    pub(super) fn enter(
        &self,
        request: &GenerateRequest,
        unit: usize,
        stage: usize,
        enlarged: &Tensor,
    ) -> Result<Tensor, Error> {
        let noise = match request.step_noise.get(self.draw(unit, stage)) {
            Some(given) => given.to_dtype(DType::F32)?,
            None => self.block_noise(request.seed, unit, stage)?,
        };
        let (alpha, beta) = self.entries[stage];
        Ok(((enlarged * alpha)? + (noise.to_device(enlarged.device())? * beta)?)?)
    }

    /// Which of the request's draws a stage's block noise is.
    fn draw(&self, unit: usize, stage: usize) -> usize {
        (unit - self.first) * (self.stages - 1) + stage - 1
    }

    /// Noise that is correlated within each block of 2 x 2, on the CPU.
    fn block_noise(&self, seed: u64, unit: usize, stage: usize) -> Result<Tensor, Error> {
        let shape = self.shape(unit, stage);
        let (frames, rows, columns) = (shape[1] * shape[2], shape[3] / 2, shape[4] / 2);
        let stream = Stream::Block { unit: unit as u32, stage: stage as u32 };
        let normals = normal_tensor(seed, stream, (frames * rows * columns, 4), &Device::Cpu)?;
        let mean = normals.mean_keepdim(1)?;
        let (spread, along) = self.block_factors;
        let blocks = (normals.broadcast_sub(&mean)? * spread)?.broadcast_add(&(mean * along)?)?;
        let cells = blocks.reshape((frames, rows, columns, 2, 2))?.permute((0, 1, 3, 2, 4))?;
        Ok(cells.contiguous()?.reshape(shape)?)
    }

    fn check_noise(&self, request: &GenerateRequest) -> Result<(), Error> {
        let fits = |what, given: &Tensor, needed: Vec<usize>| match given.dims() == needed {
            true => Ok(()),
            false => Err(Error::LatentShape { what, given: given.dims().to_vec(), needed }),
        };
        if let Some(given) = &request.initial_latents {
            fits("initial_latents", given, self.whole_shape())?;
        }
        let given = &request.step_noise;
        if !given.is_empty() && given.len() != (self.units() - self.first) * (self.stages - 1) {
            let rule = "every stage but the first of every unit that is made needs one";
            return Err(Error::Number { field: "step_noise", given: given.len() as f64, rule });
        }
        for unit in self.first..self.units() {
            for stage in 1..self.stages {
                if let Some(noise) = given.get(self.draw(unit, stage)) {
                    fits("step_noise", noise, self.shape(unit, stage))?;
                }
            }
        }
        Ok(())
    }

    /// What a unit sees in a stage of the finished units, from the earliest: the last one in the stage's size, those
    /// before it one size smaller each, and all that are left in the smallest.
    pub(super) fn conditions(
        &self,
        finished: &Tensor,
        unit: usize,
        stage: usize,
    ) -> candle_core::Result<Vec<Tensor>> {
        let mut sizes = vec![finished.clone()];
        for _ in 1..self.stages {
            let smaller = sizes.last().map(shrink).transpose()?;
            sizes.extend(smaller);
        }
        sizes.reverse();
        let frames = finished.dim(2)?;
        let mut seen = Vec::new();
        let (mut end, mut size) = (frames, stage);
        for back in 0..unit {
            let all_left = back > 0 && size == 0;
            let length = if all_left { end } else { self.frames_per_unit.min(end) };
            seen.push(sizes[size].narrow(2, end - length, length)?.contiguous()?);
            end -= length;
            if end == 0 {
                break;
            }
            size = size.saturating_sub(1);
        }
        seen.reverse();
        Ok(seen)
    }
}

/// Steps of each stage of the first unit and of the later ones: where the request does not say, the first unit, which has
/// nothing to go by, gets twice as many, as the reference recommends.
fn steps(request: &GenerateRequest, stages: usize) -> Result<[Vec<usize>; 2], Error> {
    if let Some(timesteps) = &request.timesteps {
        let rule = "the stages of this model have timesteps of their own: leave them out";
        return Err(Error::Number { field: "timesteps", given: timesteps.len() as f64, rule });
    }
    let Some(given) = &request.stage_steps else {
        return Ok([vec![request.steps.saturating_mul(2); stages], vec![request.steps; stages]]);
    };
    for steps in given {
        if steps.len() != stages {
            let rule = "each stage needs its number of steps";
            return Err(Error::Number { field: "stage_steps", given: steps.len() as f64, rule });
        }
        if let Some(&few) = steps.iter().find(|&&steps| steps == 0 || steps > MAX_STEPS) {
            let rule = "a stage has 1 to 100000 steps";
            return Err(Error::Number { field: "stage_steps", given: few as f64, rule });
        }
    }
    Ok(given.clone())
}

impl PyramidSettings {
    /// The guidance of a unit.
    pub(super) fn guidance(&self, request: &GenerateRequest, unit: usize) -> f64 {
        match unit {
            0 => request.guidance,
            _ => request.later_guidance.unwrap_or(request.guidance * self.later_guidance),
        }
    }
}

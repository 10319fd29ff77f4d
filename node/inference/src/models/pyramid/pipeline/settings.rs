//! What the reference has in its code and no file tells, and how a folder's `kinoflock.json` replaces it.

use std::path::Path;

use serde::Deserialize;

use super::folder::Usual;
use crate::error::Error;
use crate::folder::EXTRAS_FILE;
use crate::models::pyramid::config::Variant;
use crate::pipeline::{config_error, read_json};
use crate::sampler::{PyramidConfig, PyramidSchedule};

/// Guidance of later units where a request has the usual one.
const LATER_GUIDANCE: f64 = 5.0;

/// A latent as the VAE gives it is `z / scale + shift`, where `z` is what the transformer knows.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct LatentScale {
    /// Added.
    pub shift: f64,
    /// Divided by.
    pub scale: f64,
}

/// What a run is made with beside the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct PyramidSettings {
    /// The stages.
    pub scheduler: PyramidConfig,
    /// Latent frames of every unit but the first, which has one.
    pub frames_per_unit: usize,
    /// Put behind every prompt, not behind negative ones.
    pub prompt_suffix: String,
    /// Of the first latent frame.
    pub first_frame: LatentScale,
    /// Of the others.
    pub later_frames: LatentScale,
    /// The part of a request's guidance that later units have, where it does not say.
    pub later_guidance: f64,
}

impl PyramidSettings {
    /// The reference's for a transformer.
    pub(super) fn usual(usual: &Usual) -> Self {
        let first_frame = match usual.variant {
            Variant::Flux => LatentScale { shift: -0.04, scale: 1.0 / 1.8726 },
            Variant::Mmdit => LatentScale { shift: 0.1490, scale: 1.0 / 1.8415 },
        };
        Self {
            scheduler: PyramidConfig::default(),
            frames_per_unit: 1,
            prompt_suffix: ", hyper quality, Ultra HD, 8K".to_owned(),
            first_frame,
            later_frames: LatentScale { shift: -0.2343, scale: 1.0 / 3.0986 },
            later_guidance: LATER_GUIDANCE / usual.defaults.guidance,
        }
    }

    /// The stages, if all of it can be computed.
    pub(super) fn check(&self, file: &Path) -> Result<PyramidSchedule, Error> {
        let numbers =
            [("first_frame.scale", self.first_frame.scale), ("later_frames.scale", self.later_frames.scale)];
        if let Some((key, value)) =
            numbers.into_iter().find(|(_, value)| !(value.is_finite() && *value > 0.0))
        {
            return Err(config_error(file, key, value, "it must be above 0"));
        }
        if self.frames_per_unit == 0 {
            return Err(config_error(file, "frames_per_unit", 0, "it must be at least 1"));
        }
        Ok(PyramidSchedule::new(&self.scheduler)?)
    }
}

/// `kinoflock.json` as far as it is this model's own.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(in crate::models::pyramid) struct OwnExtras {
    /// The folder of the transformer, where there are several.
    pub(in crate::models::pyramid) transformer: Option<String>,
    pyramid: Given,
}

/// What of the settings is replaced.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Given {
    scheduler: Option<PyramidConfig>,
    frames_per_unit: Option<usize>,
    prompt_suffix: Option<String>,
    first_frame: Option<LatentScale>,
    later_frames: Option<LatentScale>,
    later_guidance: Option<f64>,
}

impl OwnExtras {
    /// Reads a folder's, which may be missing.
    pub(in crate::models::pyramid) fn read(folder: &Path) -> Result<Self, Error> {
        let file = folder.join(EXTRAS_FILE);
        let own: Self = if file.exists() { read_json(&file)? } else { Self::default() };
        if let Some(name) = own.transformer.as_ref().filter(|name| name.contains(['/', '\\'])) {
            return Err(config_error(file, "transformer", name, "it must be a folder's plain name"));
        }
        Ok(own)
    }

    /// The settings of a folder with this transformer, and their stages.
    pub(in crate::models::pyramid) fn settle(
        self,
        folder: &Path,
        usual: &Usual,
    ) -> Result<(PyramidSettings, PyramidSchedule), Error> {
        let (given, usual) = (self.pyramid, PyramidSettings::usual(usual));
        let settings = PyramidSettings {
            scheduler: given.scheduler.unwrap_or(usual.scheduler),
            frames_per_unit: given.frames_per_unit.unwrap_or(usual.frames_per_unit),
            prompt_suffix: given.prompt_suffix.unwrap_or(usual.prompt_suffix),
            first_frame: given.first_frame.unwrap_or(usual.first_frame),
            later_frames: given.later_frames.unwrap_or(usual.later_frames),
            later_guidance: given.later_guidance.unwrap_or(usual.later_guidance),
        };
        let schedule = settings.check(&folder.join(EXTRAS_FILE))?;
        Ok((settings, schedule))
    }
}

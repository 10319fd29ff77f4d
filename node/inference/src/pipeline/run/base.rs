//! What every loaded model has.

use std::path::Path;

use candle_core::{DType, Device};

use crate::adapter::Places;
use crate::error::Error;
use crate::folder::Extras;
use crate::offload::Placement;
use crate::pipeline::latents::LatentRgb;
use crate::pipeline::{LoadOptions, PipelineInfo};

/// What every loaded model has beside its components.
pub struct Base {
    /// Facts about the model.
    pub info: PipelineInfo,
    /// Where it computes.
    pub device: Device,
    /// In which numbers.
    pub dtype: DType,
    /// Where its components are.
    pub placement: Placement,
    /// Its layers that adapters may change.
    pub places: Places,
    /// How latents are shown before they are decoded, as the folder says it.
    pub latent_rgb: LatentRgb,
}

impl Base {
    /// Of a model out of a folder; `parameters` are those of transformer, VAE and text encoder.
    ///
    /// # Errors
    /// When the folder's extras cannot be read.
    pub fn new(
        folder: &Path,
        mut info: PipelineInfo,
        parameters: [u64; 3],
        placement: Placement,
        options: &LoadOptions,
    ) -> Result<Self, Error> {
        info.work = info.work.with_parameters(parameters);
        let latent_rgb = Extras::read(folder, info.work.latent_channels)?.latent_rgb.unwrap_or_default();
        let (device, dtype, places) = (options.device.clone(), options.dtype, options.places.clone());
        Ok(Self { info, device, dtype, placement, places, latent_rgb })
    }
}

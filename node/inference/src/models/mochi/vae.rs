//! Mochi's variational autoencoder: causal 3D convolutions, norms over each frame, 8x in space and 6x in time.
//!
//! Inside, activations are `(batch, time, height, width, channels)`; at the interface videos and latents are
//! `(batch, channels, time, height, width)`. A decode in runs of frames has the very values of the whole, because every
//! convolution remembers the frames that it looks back on; so a clip that is too long to be decoded at once goes in runs
//! even when nobody asks. A decode in tiles is close to the whole and not equal, because norms are over whole frames: see
//! [`crate::tiling::blend`].

pub mod config;
mod decoder;
mod encoder;
mod resnet;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

pub use self::config::MochiVaeConfig;
use self::decoder::Decoder;
use self::encoder::Encoder;
pub use crate::models::ltx::vae::Trace;
use crate::nn::moments::Moments;
use crate::sink::Sink;
use crate::tiling::Tiling;
use crate::tiling::blend::BlendPlan;

/// Shows a channels-last activation to whoever looks.
fn show(trace: &mut Option<Trace<'_>>, name: &str, x: &Tensor) -> Result<()> {
    match trace {
        Some(trace) => trace(name, &x.permute((0, 4, 1, 2, 3))?.contiguous()?),
        None => Ok(()),
    }
}

/// The autoencoder.
#[derive(Debug, Clone)]
pub struct MochiVae {
    config: MochiVaeConfig,
    encoder: Option<Encoder>,
    decoder: Decoder,
    /// Mean and spread of the latents, `(1, channels, 1, 1, 1)`, f32.
    statistics: Option<(Tensor, Tensor)>,
}

impl MochiVae {
    /// Loads encoder and decoder.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(config: &MochiVaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let encoder = Some(Encoder::load(config, &vb.pp("encoder"))?);
        Ok(Self { encoder, ..Self::load_decoder(config, vb)? })
    }

    /// Loads the decoder alone, which is all that text to video needs.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load_decoder(config: &MochiVaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let row = |values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            let count = values.len();
            Tensor::from_vec(values, (1, count, 1, 1, 1), &Device::Cpu)?.to_device(vb.device())
        };
        let statistics = match (&config.latents_mean, &config.latents_std) {
            (Some(mean), Some(std)) => Some((row(mean)?, row(std)?)),
            _ => None,
        };
        let decoder = Decoder::load(config, &vb.pp("decoder"))?;
        Ok(Self { config: config.clone(), encoder: None, decoder, statistics })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &MochiVaeConfig {
        &self.config
    }

    /// Latents as the encoder gives them to latents as the transformer knows them, f32.
    ///
    /// # Errors
    /// When the channels differ or the device fails.
    pub fn normalize(&self, z: &Tensor) -> Result<Tensor> {
        let wide = z.to_dtype(DType::F32)?;
        match &self.statistics {
            Some((mean, std)) => (wide.broadcast_sub(mean)? * self.config.scaling_factor)?.broadcast_div(std),
            None => wide * self.config.scaling_factor,
        }
    }

    /// Latents as the transformer gives them to latents as the decoder takes them, f32.
    ///
    /// # Errors
    /// When the channels differ or the device fails.
    pub fn denormalize(&self, z: &Tensor) -> Result<Tensor> {
        let wide = z.to_dtype(DType::F32)?;
        match &self.statistics {
            Some((mean, std)) => (wide.broadcast_mul(std)? / self.config.scaling_factor)?.broadcast_add(mean),
            None => wide / self.config.scaling_factor,
        }
    }

    /// Denormalised latents `(batch, channels, time, height, width)` to a video `(batch, 3, frames, height, width)`
    /// of about -1 to 1, which `sink` is given run by run.
    ///
    /// # Errors
    /// When shapes do not fit, the device fails, or `sink` does.
    pub fn decode(&self, z: &Tensor, tiling: Tiling, sink: &mut dyn Sink) -> Result<()> {
        self.check_latents(z)?;
        let (_, _, _, rows, columns) = z.dims5()?;
        if let Some(pixels) = tiling.tile {
            let plan = BlendPlan::new(pixels, self.config.spatial_ratio(), [rows, columns]);
            if plan.tiles() > 1 {
                return plan.decode(z, sink, |tile, sink| self.decoder.decode(tile, tiling.chunk, sink));
            }
        }
        self.decoder.decode(z, tiling.chunk, sink)
    }

    /// [`MochiVae::decode`] of the whole clip at once, which shows every block's result.
    ///
    /// # Errors
    /// As [`MochiVae::decode`], and what the trace gives.
    pub fn decode_traced(&self, z: &Tensor, trace: Trace<'_>) -> Result<Tensor> {
        self.check_latents(z)?;
        self.decoder.decode_traced(z, trace)
    }

    /// Latent frames of `z` that a decode has in one run.
    pub(super) fn frames_at_once(&self, z: &Tensor, chunk: Option<usize>) -> Result<usize> {
        self.decoder.run_length(z, chunk)
    }

    fn check_latents(&self, z: &Tensor) -> Result<()> {
        let (_, channels, ..) = z.dims5()?;
        if channels != self.config.latent_channels {
            candle_core::bail!("latents {:?} have not {} channels", z.shape(), self.config.latent_channels);
        }
        Ok(())
    }

    /// A video `(batch, 3, frames, height, width)` of -1 to 1 to its latents' distribution, not normalised.
    ///
    /// # Errors
    /// When the encoder was not loaded, the video's sizes are no multiples, or the device fails.
    pub fn encode(&self, video: &Tensor, mut trace: Option<Trace<'_>>) -> Result<Moments> {
        let Some(encoder) = &self.encoder else {
            candle_core::bail!("this VAE was loaded without its encoder")
        };
        let (_, channels, frames, height, width) = video.dims5()?;
        let (time, space) = (self.config.temporal_ratio(), self.config.spatial_ratio());
        let fits = height.is_multiple_of(space) && width.is_multiple_of(space) && frames % time == 1 % time;
        if !fits || channels != self.config.picture_channels() {
            candle_core::bail!(
                "a video of {channels} channels, {frames} frames, {height}x{width}, cannot be encoded: it must have \
                 {} channels, {time}k+1 frames, sides that are multiples of {space}",
                self.config.picture_channels()
            );
        }
        let moments = encoder.forward(video, &mut trace)?;
        Moments::new(&moments, self.config.latent_channels)
    }
}

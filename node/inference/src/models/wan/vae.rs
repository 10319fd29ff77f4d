//! Wan's variational autoencoder: causal 3D convolutions, RMS norm over channels, 8x in space and 4x in time. Wan 2.2's
//! TI2V-5B has a form of its own with patches of pixels and shortcuts around levels, 16x in space.
//!
//! Inside, activations are `(batch, time, height, width, channels)`; at the interface videos and latents are
//! `(batch, channels, time, height, width)`. Frames depend on earlier ones alone, and a clip is always encoded and
//! decoded in runs of frames that remember what the runs before them left: memory grows with a run, not with the clip,
//! and the result is that of the whole.

mod blocks;
pub mod config;
mod decoder;
mod encoder;
mod shortcut;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

pub use config::WanVaeConfig;
use decoder::Decoder;
use encoder::Encoder;

use crate::nn::conv3d::Conv3d;
use crate::nn::moments::Moments;
use crate::sink::Sink;
use crate::tiling::{Cut, Tiling};

/// The autoencoder.
#[derive(Debug, Clone)]
pub struct WanVae {
    config: WanVaeConfig,
    encoder: Option<(Encoder, Conv3d)>,
    post_quant: Conv3d,
    decoder: Decoder,
}

impl WanVae {
    /// Loads encoder and decoder.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(config: &WanVaeConfig, vb: VarBuilder) -> Result<Self> {
        let moments = 2 * config.z_dim;
        let encoder = Encoder::load(config, vb.pp("encoder"))?;
        let quant = Conv3d::load(blocks::causal(moments, moments, [1; 3]), vb.pp("quant_conv"))?;
        Ok(Self { encoder: Some((encoder, quant)), ..Self::load_decoder(config, vb)? })
    }

    /// Loads the decoder alone, which is all that text to video needs.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load_decoder(config: &WanVaeConfig, vb: VarBuilder) -> Result<Self> {
        let channels = config.z_dim;
        Ok(Self {
            config: config.clone(),
            encoder: None,
            post_quant: Conv3d::load(blocks::causal(channels, channels, [1; 3]), vb.pp("post_quant_conv"))?,
            decoder: Decoder::load(config, vb.pp("decoder"))?,
        })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &WanVaeConfig {
        &self.config
    }

    /// Latents as the encoder gives them to latents as the transformer knows them: `(z - mean) / std`, in f32.
    ///
    /// # Errors
    /// When the channels differ or the device fails.
    pub fn normalize(&self, z: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.statistics(z.device())?;
        z.to_dtype(DType::F32)?.broadcast_sub(&mean)?.broadcast_div(&std)
    }

    /// Latents as the transformer gives them to latents as the decoder takes them: `z std + mean`, in f32.
    ///
    /// # Errors
    /// When the channels differ or the device fails.
    pub fn denormalize(&self, z: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.statistics(z.device())?;
        z.to_dtype(DType::F32)?.broadcast_mul(&std)?.broadcast_add(&mean)
    }

    /// `(1, channels, 1, 1, 1)` each. The reference keeps the inverse of a deviation and divides by it.
    fn statistics(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        let shape = (1, self.config.z_dim, 1, 1, 1);
        let mean: Vec<f32> = self.config.latents_mean.iter().map(|&mean| mean as f32).collect();
        let std: Vec<f32> = self.config.latents_std.iter().map(|&std| 1.0 / (1.0 / std as f32)).collect();
        Ok((Tensor::from_vec(mean, shape, device)?, Tensor::from_vec(std, shape, device)?))
    }

    /// Denormalised latents `(batch, channels, time, height, width)` to a video `(batch, 3, frames, height, width)` of
    /// -1 to 1, which `sink` is given run by run.
    ///
    /// # Errors
    /// When shapes do not fit, the device fails, or `sink` does.
    pub fn decode(&self, z: &Tensor, tiling: Tiling, sink: &mut dyn Sink) -> Result<()> {
        let (_, channels, ..) = z.dims5()?;
        if channels != self.config.z_dim {
            candle_core::bail!("latents {:?} have not {} channels", z.shape(), self.config.z_dim);
        }
        let x = self.post_quant.forward(&z.permute((0, 2, 3, 4, 1))?.contiguous()?)?;
        self.decoder.forward(&x, tiling, sink)
    }

    /// How a decode of so many latent cells goes in tiles, from which level on; `None` where pictures stay whole.
    pub(crate) fn cut(&self, tiling: Tiling, cells: [usize; 3]) -> Option<Cut> {
        let (first, plan) = self.decoder.plan(Tiling { chunk: None, ..tiling }, cells)?;
        Some(plan.cut(first))
    }

    /// A video `(batch, 3, frames, height, width)` of -1 to 1 to its latents' distribution, not normalised.
    ///
    /// # Errors
    /// When the encoder was not loaded, the video's sizes cannot be encoded, or the device fails.
    pub fn encode(&self, video: &Tensor) -> Result<Moments> {
        let Some((encoder, quant)) = &self.encoder else {
            candle_core::bail!("this VAE was loaded without its encoder")
        };
        let (_, _, frames, height, width) = video.dims5()?;
        let (space, time) = (self.config.spatial_ratio(), self.config.temporal_ratio());
        if frames % time != 1 % time || !height.is_multiple_of(space) || !width.is_multiple_of(space) {
            candle_core::bail!(
                "a video of {frames} frames, {height}x{width}, cannot be encoded: frames must be {time}k+1, sides \
                 multiples of {space}"
            );
        }
        let x = encoder.forward(video, time)?;
        let x = quant.forward(&x)?.permute((0, 4, 1, 2, 3))?.contiguous()?;
        Moments::new(&x, self.config.z_dim)
    }
}

//! LTX-Video's variational autoencoder: 3D convolutions, RMS norm over channels, 32x in space and 8x in time.
//!
//! The forms of 0.9.0, 0.9.1 and 0.9.5 and later differ in their configuration alone ([`LtxVaeConfig`]): how many
//! blocks of which width, how the encoder shrinks (a convolution with stride, or a convolution and pixels into
//! channels), whether the decoder is told a noise level, whether it injects noise, and whether its upsampling has a
//! residual. Inside, activations are `(batch, time, height, width, channels)`; at the interface videos and latents are
//! `(batch, channels, time, height, width)`.

mod blocks;
pub mod config;
mod decoder;
mod encoder;
mod resnet;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

pub use config::{LtxVaeConfig, VaeConfigError};
use decoder::Decoder;
use encoder::Encoder;

use crate::nn::moments::Moments;
use crate::rng::{Stream, normal_tensor};
use crate::sink::Sink;
use crate::tiling::{Cut, Place, Tiling};

/// Where a decoder's injected noise comes from.
#[derive(Debug, Clone)]
pub enum Noise<'a> {
    /// From a job's seed: draw `n` is stream [`Stream::Inject`]`(n)`.
    Seed(u64),
    /// These, `(height, width)` each, in the order in which the reference draws: middle block, then upward, two for
    /// each residual block.
    Given(&'a [Tensor]),
    /// Zeros.
    None,
}

/// The noise of one pass through a decoder, with a count of what has been drawn.
#[derive(Clone)]
pub(super) struct Draws<'a> {
    noise: &'a Noise<'a>,
    drawn: usize,
    place: Option<Place>,
}

impl<'a> Draws<'a> {
    /// For whole pictures.
    fn whole(noise: &'a Noise<'a>) -> Self {
        Self { noise, drawn: 0, place: None }
    }

    /// For a tile that goes on from here: it gets its part of the whole picture's noise.
    fn within(&self, place: Place) -> Self {
        Self { place: Some(place), ..self.clone() }
    }

    /// The next `(height, width)` of noise; `None` for zeros.
    fn next(&mut self, height: usize, width: usize, device: &Device) -> Result<Option<Tensor>> {
        let index = self.drawn;
        self.drawn += 1;
        let (size, start) = match self.place {
            None => ([height, width], [0, 0]),
            Some(place) => {
                let scale = height / place.len[1].max(1);
                let scaled = |cells: [usize; 3]| [cells[1] * scale, cells[2] * scale];
                (scaled(place.whole), scaled(place.start))
            }
        };
        let whole = match self.noise {
            Noise::None => return Ok(None),
            Noise::Seed(seed) => {
                normal_tensor(*seed, Stream::Inject(index as u32), (size[0], size[1]), device)?
            }
            Noise::Given(all) => match all.get(index) {
                Some(noise) if noise.dims() == size => noise.clone(),
                Some(noise) => {
                    candle_core::bail!("noise {index} has shape {:?}, needed {size:?}", noise.shape())
                }
                None => candle_core::bail!("the decoder draws noise {index}, only {} were given", all.len()),
            },
        };
        whole.narrow(0, start[0], height)?.narrow(1, start[1], width)?.contiguous().map(Some)
    }
}

/// Sees each block's result by the name that the reference gives the block, such as `decoder.up_blocks.0`, as
/// `(batch, channels, time, height, width)`.
pub type Trace<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

/// Shows a channels-last activation to whoever looks.
pub(super) fn show(trace: &mut Option<Trace<'_>>, name: &str, x: &Tensor) -> Result<()> {
    match trace {
        Some(trace) => trace(name, &x.permute((0, 4, 1, 2, 3))?.contiguous()?),
        None => Ok(()),
    }
}

/// How a decode goes.
#[derive(Debug, Clone)]
pub struct DecodeSettings<'a> {
    /// The noise level that a timestep-conditioned decoder is told, `(batch)` or `(1)`; ignored by the others.
    pub timestep: Option<&'a Tensor>,
    /// Injected noise.
    pub noise: Noise<'a>,
    /// Whole, or in tiles and runs of frames.
    pub tiling: Tiling,
}

impl Default for DecodeSettings<'_> {
    fn default() -> Self {
        Self { timestep: None, noise: Noise::None, tiling: Tiling::default() }
    }
}

/// The autoencoder.
#[derive(Debug, Clone)]
pub struct LtxVae {
    config: LtxVaeConfig,
    encoder: Option<Encoder>,
    decoder: Option<Decoder>,
    mean: Tensor,
    std: Tensor,
}

impl LtxVae {
    /// Loads encoder, decoder and the latents' statistics.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(config: &LtxVaeConfig, vb: VarBuilder) -> Result<Self> {
        Self::load_parts(config, vb, true, true)
    }

    /// Loads the decoder alone, which is all that text to video needs.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load_decoder(config: &LtxVaeConfig, vb: VarBuilder) -> Result<Self> {
        Self::load_parts(config, vb, false, true)
    }

    /// Loads the encoder alone, for pictures that a clip is to show.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load_encoder(config: &LtxVaeConfig, vb: VarBuilder) -> Result<Self> {
        Self::load_parts(config, vb, true, false)
    }

    fn load_parts(config: &LtxVaeConfig, vb: VarBuilder, encoder: bool, decoder: bool) -> Result<Self> {
        let channels = config.latent_channels;
        let statistics =
            |name: &str| vb.get(channels, name)?.to_dtype(DType::F32)?.reshape((1, channels, 1, 1, 1));
        Ok(Self {
            encoder: if encoder { Some(Encoder::load(config, vb.pp("encoder"))?) } else { None },
            decoder: if decoder { Some(Decoder::load(config, vb.pp("decoder"))?) } else { None },
            mean: statistics("latents_mean")?,
            std: statistics("latents_std")?,
            config: config.clone(),
        })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &LtxVaeConfig {
        &self.config
    }

    /// Latents as the encoder gives them to latents as the transformer knows them.
    ///
    /// # Errors
    /// When the channels differ or the device fails.
    pub fn normalize(&self, z: &Tensor) -> Result<Tensor> {
        let dtype = z.dtype();
        let z = z.to_dtype(DType::F32)?.broadcast_sub(&self.mean)?;
        (z * self.config.scaling_factor)?.broadcast_div(&self.std)?.to_dtype(dtype)
    }

    /// Latents as the transformer gives them to latents as the decoder takes them.
    ///
    /// # Errors
    /// When the channels differ or the device fails.
    pub fn denormalize(&self, z: &Tensor) -> Result<Tensor> {
        let dtype = z.dtype();
        let z = z.to_dtype(DType::F32)?.broadcast_mul(&self.std)?;
        (z / self.config.scaling_factor)?.broadcast_add(&self.mean)?.to_dtype(dtype)
    }

    /// Denormalised latents `(batch, channels, time, height, width)` to a video `(batch, 3, frames, height, width)`
    /// of about -1 to 1, which `sink` is given at once or, in tiles, run by run. In a tiled decode a trace sees the blocks
    /// that run whole.
    ///
    /// # Errors
    /// When a timestep-conditioned decoder gets no timestep, shapes do not fit, the device fails, or `sink` does.
    pub fn decode(
        &self,
        z: &Tensor,
        settings: &DecodeSettings,
        sink: &mut dyn Sink,
        mut trace: Option<Trace<'_>>,
    ) -> Result<()> {
        let (_, channels, ..) = z.dims5()?;
        if channels != self.config.latent_channels {
            candle_core::bail!("latents {:?} have not {} channels", z.shape(), self.config.latent_channels);
        }
        let Some(decoder) = &self.decoder else {
            candle_core::bail!("this VAE was loaded without its decoder")
        };
        decoder.decode(z, settings, sink, &mut trace)
    }

    /// How a decode of so many latent cells goes in tiles, from which upward block on; `None` where it stays whole.
    pub(crate) fn cut(&self, tiling: Tiling, cells: [usize; 3]) -> Option<Cut> {
        let (first, plan) = self.decoder.as_ref()?.plan(tiling, cells)?;
        Some(plan.cut(first))
    }

    /// A video `(batch, 3, frames, height, width)` of -1 to 1 to its latents' distribution, not normalised.
    ///
    /// # Errors
    /// When the encoder was not loaded, the video's sizes are no multiples, or the device fails.
    pub fn encode(&self, video: &Tensor, mut trace: Option<Trace<'_>>) -> Result<Moments> {
        let Some(encoder) = &self.encoder else {
            candle_core::bail!("this VAE was loaded without its encoder")
        };
        let moments = encoder.forward(video, &mut trace)?;
        Moments::new(&moments, self.config.latent_channels)
    }
}

//! Pyramid Flow's variational autoencoder (the authors' `CausalVideoVAE`): causal 3D convolutions with zeros beyond every
//! edge, group norms of each frame alone, 8x in space and time, the first frame a latent frame of its own.
//!
//! Nothing looks ahead in time, so a clip that is decoded run by run, the convolutions remembering, has the very values of
//! one that is decoded whole; one that is too long to be decoded at once goes in runs even when nobody asks. Norms and the middle's attention look at a whole picture, so tiles of a picture have values
//! of their own: they overlap and are faded into each other, as in the reference. Inside, activations are `(batch, time, height, width,
//! channels)`; at the interface videos and latents are `(batch, channels, time, height, width)`.

mod blocks;
pub mod config;
mod decoder;
mod encoder;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use blocks::Pass;
pub use config::PyramidVaeConfig;
use decoder::Decoder;
use encoder::Encoder;

use crate::nn::frame_cache::FrameCache;
use crate::nn::moments::Moments;
use crate::sink::Sink;
use crate::tiling::blend::BlendPlan;
use crate::tiling::{Tiling, frames_at_once};

/// The autoencoder.
#[derive(Debug, Clone)]
pub struct PyramidVae {
    config: PyramidVaeConfig,
    encoder: Option<Encoder>,
    decoder: Decoder,
}

impl PyramidVae {
    /// Loads encoder and decoder.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(config: &PyramidVaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let encoder = Some(Encoder::load(config, vb)?);
        Ok(Self { encoder, ..Self::load_decoder(config, vb)? })
    }

    /// Loads the decoder alone, which is all that text to video needs.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load_decoder(config: &PyramidVaeConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self { config: config.clone(), encoder: None, decoder: Decoder::load(config, vb)? })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &PyramidVaeConfig {
        &self.config
    }

    /// Denormalised latents `(batch, channels, time, height, width)` to a video `(batch, 3, frames, height, width)` of
    /// about -1 to 1, which `sink` is given run by run.
    ///
    /// # Errors
    /// When the channels differ, the device fails, or `sink` does.
    pub fn decode(&self, z: &Tensor, tiling: Tiling, sink: &mut dyn Sink) -> Result<()> {
        let (_, channels, _, height, width) = z.dims5()?;
        if channels != self.config.latent_channels() {
            candle_core::bail!("latents {:?} have not {} channels", z.shape(), self.config.latent_channels());
        }
        let plan =
            tiling.tile.map(|side| BlendPlan::new(side, self.config.downsample_scale, [height, width]));
        match plan.filter(|plan| plan.tiles() > 1) {
            None => self.decode_tile(z, tiling.chunk, sink),
            Some(plan) => plan.decode(z, sink, |tile, sink| self.decode_tile(tile, tiling.chunk, sink)),
        }
    }

    /// A whole picture or a tile of it, at once or in runs of frames: [`PyramidVae::window`]. The first run has one latent
    /// frame more, which is its first frame.
    fn decode_tile(&self, z: &Tensor, chunk: Option<usize>, sink: &mut dyn Sink) -> Result<()> {
        let (_, _, frames, height, width) = z.dims5()?;
        let z = z.permute((0, 2, 3, 4, 1))?.contiguous()?;
        let Some(window) = self.window([frames, height, width], chunk) else {
            return sink.put(channels_first(&self.decoder.forward(&z, true, &mut Pass::Whole)?)?);
        };
        let mut cache = FrameCache::default();
        let mut start = 0;
        while start < frames {
            sink.go_on()?;
            let length = if start == 0 { window + 1 } else { window }.min(frames - start);
            cache.rewind();
            let run = z.narrow(1, start, length)?.contiguous()?;
            let video = self.decoder.forward(&run, start == 0, &mut Pass::Runs(&mut cache))?;
            sink.put(channels_first(&video)?)?;
            start += length;
        }
        Ok(())
    }

    /// Latent frames in a run of a decode of so many latent cells; `None` where it goes at once.
    pub(super) fn window(&self, [frames, height, width]: [usize; 3], chunk: Option<usize>) -> Option<usize> {
        let scale = self.config.downsample_scale;
        if let Some(chunk) = chunk {
            return Some((chunk / scale).max(1));
        }
        let finest = self.config.decoder_block_out_channels.first().copied().unwrap_or(1);
        Some(frames_at_once(&[scale, height, scale, width, scale, finest])).filter(|&most| most < frames)
    }

    /// A video `(batch, 3, frames, height, width)` of -1 to 1 to its latents' distribution, not normalised.
    ///
    /// # Errors
    /// When the encoder was not loaded, the video's sizes are no multiples, or the device fails.
    pub fn encode(&self, video: &Tensor) -> Result<Moments> {
        let Some(encoder) = &self.encoder else {
            candle_core::bail!("this VAE was loaded without its encoder")
        };
        let (_, _, frames, height, width) = video.dims5()?;
        let scale = self.config.downsample_scale;
        if !frames.saturating_sub(1).is_multiple_of(scale)
            || !height.is_multiple_of(scale)
            || !width.is_multiple_of(scale)
        {
            candle_core::bail!(
                "a video {:?} has not {scale}k+1 frames of multiples of {scale}",
                video.shape()
            );
        }
        let moments = encoder.forward(&video.permute((0, 2, 3, 4, 1))?.contiguous()?)?;
        Moments::new(&channels_first(&moments)?, self.config.latent_channels())
    }
}

fn channels_first(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 4, 1, 2, 3))?.contiguous()
}

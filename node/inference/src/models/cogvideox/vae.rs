//! CogVideoX's variational autoencoder (diffusers' `AutoencoderKLCogVideoX`): causal 3D convolutions, group norms, 8x in
//! space and 4x in time.
//!
//! Clips go through in runs of frames: eight of a video, two of latents, and what is left over together with the first
//! run. Causal convolutions remember the frames before a run ([`FrameCache`]); the group norms look at a run alone, so
//! the runs' length is a part of the model. The decoder's norms are modulated by the latents themselves. Inside,
//! activations are `(batch, time, height, width, channels)`; at the interface videos and latents are
//! `(batch, channels, time, height, width)`.

mod blocks;
mod tiles;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::config::VaeConfig;
use crate::nn::frame_cache::FrameCache;
use crate::nn::moments::Moments;
use crate::sink::Sink;
use blocks::{Decoder, Encoder};

/// Frames of a video in a run of the encoder.
const ENCODE_RUN: usize = 8;
/// Latent frames in a run of the decoder.
pub(crate) const DECODE_RUN: usize = 2;

/// Sees each block's result in a run by the name that the reference gives the block, such as `decoder.mid_block.0`, as
/// `(batch, channels, time, height, width)`.
pub type Trace<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

/// Shows a channels-last activation to whoever looks.
fn show(trace: &mut Option<Trace<'_>>, name: &str, x: &Tensor) -> Result<()> {
    match trace {
        Some(trace) => trace(name, &channels_first(x)?),
        None => Ok(()),
    }
}

fn channels_first(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 4, 1, 2, 3))?.contiguous()
}

fn channels_last(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 2, 3, 4, 1))?.contiguous()
}

/// The autoencoder.
#[derive(Debug)]
pub struct CogVideoXVae {
    config: VaeConfig,
    encoder: Option<Encoder>,
    decoder: Decoder,
}

impl CogVideoXVae {
    /// Loads encoder and decoder.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load(config: &VaeConfig, vb: VarBuilder) -> Result<Self> {
        let encoder = Some(Encoder::load(config, &vb.pp("encoder"))?);
        Ok(Self { encoder, ..Self::load_decoder(config, vb)? })
    }

    /// Loads the decoder alone, which is all that text to video needs.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn load_decoder(config: &VaeConfig, vb: VarBuilder) -> Result<Self> {
        let decoder = Decoder::load(config, &vb.pp("decoder"))?;
        Ok(Self { config: config.clone(), encoder: None, decoder })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Latents as the transformer gives them to latents as the decoder takes them.
    ///
    /// # Errors
    /// When the device fails.
    pub fn denormalize(&self, z: &Tensor) -> Result<Tensor> {
        z * (1.0 / self.config.scaling_factor)
    }

    /// A picture's latents as the encoder gives them to those that the transformer is shown beside its own.
    ///
    /// # Errors
    /// When the device fails.
    pub fn scale_image(&self, z: &Tensor) -> Result<Tensor> {
        let factor = self.config.scaling_factor;
        z * if self.config.invert_scale_latents { 1.0 / factor } else { factor }
    }

    /// Denormalised latents to a video `(batch, 3, frames, height, width)` of about -1 to 1, which `sink` is given run by
    /// run.
    ///
    /// With `tile`, pictures are decoded in overlapping squares of about that many pixels, and overlaps are blended, as
    /// the reference does. The group norms then look at a tile alone: a tiled decode is near the whole one, not the same.
    ///
    /// # Errors
    /// When shapes do not fit, the device fails, or `sink` does.
    pub fn decode(
        &self,
        z: &Tensor,
        tile: Option<usize>,
        sink: &mut dyn Sink,
        mut trace: Option<Trace<'_>>,
    ) -> Result<()> {
        let (_, channels, _, height, width) = z.dims5()?;
        if channels != self.config.latent_channels {
            candle_core::bail!("latents {:?} have not {} channels", z.shape(), self.config.latent_channels);
        }
        let ratio = self.config.spatial_ratio();
        match square(tile, ratio) {
            Some(cells) if height > cells || width > cells => {
                tiles::decode(z, cells, ratio, sink, |tile, sink| self.decode_runs(tile, sink, &mut None))
            }
            _ => self.decode_runs(z, sink, &mut trace),
        }
    }

    fn decode_runs(&self, z: &Tensor, sink: &mut dyn Sink, trace: &mut Option<Trace<'_>>) -> Result<()> {
        let mut cache = FrameCache::default();
        for (start, len) in runs(z.dim(2)?, DECODE_RUN) {
            sink.go_on()?;
            cache.rewind();
            let run = channels_last(&z.narrow(2, start, len)?)?;
            sink.put(channels_first(&self.decoder.forward(&run, &mut cache, trace)?)?)?;
        }
        Ok(())
    }

    /// A video `(batch, 3, frames, height, width)` of -1 to 1 to its latents' distribution, not scaled.
    ///
    /// # Errors
    /// When the encoder was not loaded, the video's sides are no multiples, or the device fails.
    pub fn encode(&self, video: &Tensor, mut trace: Option<Trace<'_>>) -> Result<Moments> {
        let Some(encoder) = &self.encoder else {
            candle_core::bail!("this VAE was loaded without its encoder")
        };
        let (_, _, frames, height, width) = video.dims5()?;
        let ratio = self.config.spatial_ratio();
        if !(height.is_multiple_of(ratio) && width.is_multiple_of(ratio)) {
            candle_core::bail!(
                "a video of {height}x{width} cannot be encoded: sides must be multiples of {ratio}"
            );
        }
        let mut cache = FrameCache::default();
        let parts = runs(frames, ENCODE_RUN).into_iter().map(|(start, len)| {
            cache.rewind();
            let run = channels_last(&video.narrow(2, start, len)?)?;
            channels_first(&encoder.forward(&run, &mut cache, &mut trace)?)
        });
        let moments = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 2)?;
        Moments::new(&moments, self.config.latent_channels)
    }
}

/// Latent cells along the side of a tile of about so many pixels.
pub(crate) fn square(tile: Option<usize>, ratio: usize) -> Option<usize> {
    tile.map(|pixels| (pixels / ratio).max(tiles::LEAST))
}

/// Starts and lengths of runs of `len` frames; the first has what is left over as well.
pub(crate) fn runs(frames: usize, len: usize) -> Vec<(usize, usize)> {
    let rest = if frames < len { 0 } else { frames % len };
    let first = (len + rest).min(frames);
    std::iter::once((0, first)).chain((first..frames).step_by(len).map(|start| (start, len))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_a_clip_and_the_first_takes_the_rest() {
        assert_eq!(runs(1, 2), [(0, 1)]);
        assert_eq!(runs(2, 2), [(0, 2)]);
        assert_eq!(runs(3, 2), [(0, 3)]);
        assert_eq!(runs(13, 2)[..3], [(0, 3), (3, 2), (5, 2)]);
        assert_eq!(runs(9, 8), [(0, 9)]);
        assert_eq!(runs(17, 8), [(0, 9), (9, 8)]);
        assert_eq!(runs(5, 8), [(0, 5)]);
    }
}

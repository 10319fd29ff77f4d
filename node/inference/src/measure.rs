//! Published models with weights out of thin air, timed on a device: a guided step and a decode, in the same
//! configuration files' words from which the reference can be built, so that both can be measured side by side.
//!
//! What a step costs does not depend on what the weights say, so nothing has to be fetched to measure.

use std::time::Instant;

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use serde_json::{Value, json};

use crate::error::Error;
use crate::models::ltx::rope::Positions;
use crate::models::ltx::transformer::LtxTransformer;
use crate::models::ltx::vae::{DecodeSettings, LtxVae, LtxVaeConfig, Noise};
use crate::models::wan::rope::RopeTables;
use crate::models::wan::transformer::{TextContext, WanTransformer};
use crate::models::wan::vae::{WanVae, WanVaeConfig};
use crate::pipeline::FrameRule;
use crate::sampler::guidance::{GuidancePasses, Passes};
use crate::sink::Nowhere;
use crate::tiling::Tiling;

/// Frames a second, on which LTX-Video's positions depend.
pub const FPS: f64 = 25.0;
const TIMESTEP: f32 = 500.0;

/// Which model's code computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// LTX-Video.
    Ltx,
    /// Wan.
    Wan,
}

/// A model that is measured.
#[derive(Debug, Clone)]
pub struct Subject {
    /// As people call it.
    pub name: &'static str,
    /// Whose code computes.
    pub family: Family,
    /// `transformer/config.json`.
    pub transformer: Value,
    /// `vae/config.json`.
    pub vae: Value,
    /// Text tokens.
    pub text_tokens: usize,
    /// Pixels and frames of the clip that is measured where nobody says another.
    pub size: Size,
}

/// A clip's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Frames.
    pub frames: usize,
}

/// Seconds, the least of all runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Of a step with guidance: two predictions.
    pub step: f64,
    /// Of the decode of the whole clip.
    pub decode: f64,
}

/// LTX-Video 2B (0.9.5) and Wan 2.1 1.3B; or small models of their forms, to try the way.
#[must_use]
pub fn subjects(small: bool) -> [Subject; 2] {
    let (ltx_size, wan_size) = match small {
        false => ([768, 512, 97], [832, 480, 81]),
        true => ([64, 64, 9], [64, 64, 5]),
    };
    let size = |[width, height, frames]: [usize; 3]| Size { width, height, frames };
    let (heads, layers, wide, deep) = if small { (2, 2, 64, 1) } else { (32, 28, 4096, 5) };
    let widths = if small { [32, 64, 128] } else { [256, 512, 1024] };
    let ltx = Subject {
        name: if small { "LTX-Video, small" } else { "LTX-Video 2B" },
        family: Family::Ltx,
        transformer: json!({
            "num_attention_heads": heads, "attention_head_dim": 64, "cross_attention_dim": heads * 64,
            "num_layers": layers, "caption_channels": wide,
        }),
        vae: json!({
            "decoder_block_out_channels": widths, "decoder_layers_per_block": [deep, deep, deep, deep],
            "decoder_spatio_temporal_scaling": [true, true, true],
            "decoder_inject_noise": [false, false, false, false], "upsample_residual": [true, true, true],
            "upsample_factor": [2, 2, 2], "timestep_conditioning": true,
        }),
        text_tokens: 128,
        size: size(ltx_size),
    };
    let (heads, layers, inner, base) = if small { (2, 2, 256, 8) } else { (12, 30, 8960, 96) };
    let wan = Subject {
        name: if small { "Wan 2.1, small" } else { "Wan 2.1 1.3B" },
        family: Family::Wan,
        transformer: json!({
            "num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": inner,
            "text_dim": wide,
        }),
        vae: json!({ "base_dim": base }),
        text_tokens: 512,
        size: size(wan_size),
    };
    [ltx, wan]
}

impl Subject {
    /// Pixels along a side of a token, and which frame counts there are.
    fn grain(&self) -> (usize, FrameRule) {
        match self.family {
            Family::Ltx => (32, FrameRule { multiple: 8, offset: 1 }),
            Family::Wan => (16, FrameRule { multiple: 4, offset: 1 }),
        }
    }

    /// Refuses a size that the model cannot make.
    ///
    /// # Errors
    /// [`Error::Size`] or [`Error::Frames`] with the nearest that it can.
    pub fn check(&self, size: Size) -> std::result::Result<(), Error> {
        let (multiple, rule) = self.grain();
        for (side, given) in [("width", size.width), ("height", size.height)] {
            if given == 0 || !given.is_multiple_of(multiple) {
                let nearest = ((given + multiple / 2) / multiple).max(1) * multiple;
                return Err(Error::Size { side, given, multiple, nearest });
            }
        }
        if rule.allows(size.frames) {
            return Ok(());
        }
        let (given, nearest) = (size.frames, rule.nearest(size.frames));
        Err(Error::Frames { given, multiple: rule.multiple, offset: rule.offset, nearest })
    }

    /// Times a guided step and a decode of a clip of `size`, each the least of `runs` after one that does not count.
    ///
    /// # Errors
    /// What [`Subject::check`] finds, or what the device reports.
    pub fn measure(
        &self,
        size: Size,
        device: &Device,
        dtype: DType,
        runs: usize,
    ) -> std::result::Result<Figures, Error> {
        self.check(size)?;
        let bench = Bench { subject: self, size, device, dtype, runs };
        match self.family {
            Family::Ltx => bench.ltx(),
            Family::Wan => bench.wan(),
        }
    }
}

/// One subject on one device.
struct Bench<'a> {
    subject: &'a Subject,
    size: Size,
    device: &'a Device,
    dtype: DType,
    runs: usize,
}

impl Bench<'_> {
    fn ltx(&self) -> std::result::Result<Figures, Error> {
        let Size { width, height, frames } = self.size;
        let cells = [(frames - 1) / 8 + 1, height / 32, width / 32];
        let tokens = cells.iter().product::<usize>();
        let step = {
            let config = parse(&self.subject.transformer)?;
            let model = LtxTransformer::load(&config, &random_weights(self.dtype, self.device))?;
            let scale = Some([8.0 / FPS, 32.0, 32.0]);
            let rope = model.rope().tables(Positions::Grid { size: cells, scale }, self.device)?;
            let text = self.random((2, self.subject.text_tokens, config.caption_channels))?;
            let mask = Tensor::ones((2, self.subject.text_tokens), DType::F32, self.device)?;
            let text = model.text_context(&text, Some(&mask))?;
            let latents = self.random((2, tokens, config.in_channels))?;
            let timesteps = Tensor::full(TIMESTEP, (2, 1), &Device::Cpu)?;
            self.least(|| model.forward(&latents, &timesteps, &text, &rope))?
        };
        let config = LtxVaeConfig::from_value(&self.subject.vae)
            .map_err(|error| candle_core::Error::Msg(error.to_string()))?;
        let vae = LtxVae::load_decoder(&config, random_weights(self.dtype, self.device))?;
        let z = self.random((1, config.latent_channels, cells[0], cells[1], cells[2]))?;
        let timestep = Tensor::new(&[0.05f32], &Device::Cpu)?;
        let settings =
            DecodeSettings { timestep: Some(&timestep), noise: Noise::None, tiling: Tiling::default() };
        Ok(Figures { step, decode: self.least(|| vae.decode(&z, &settings, &mut Nowhere, None))? })
    }

    fn wan(&self) -> std::result::Result<Figures, Error> {
        let Size { width, height, frames } = self.size;
        let cells = [(frames - 1) / 4 + 1, height / 8, width / 8];
        let grid = [cells[0], cells[1] / 2, cells[2] / 2];
        let step = {
            let config = parse(&self.subject.transformer)?;
            let model = WanTransformer::load(&config, &random_weights(self.dtype, self.device))?;
            let rope = RopeTables::new(&config, grid, self.device)?;
            let text = self.random((1, self.subject.text_tokens, config.text_dim))?;
            let one = model.text_context(&text, None)?;
            let both = TextContext::join(&one, &one)?;
            let tokens = grid.iter().product::<usize>();
            let latents = self.random((1, tokens, config.in_channels * config.cells()))?;
            let timestep = Tensor::full(TIMESTEP, (1, 1), &Device::Cpu)?;
            let passes = Passes::new(GuidancePasses::Auto, self.device);
            let predict = |text: &TextContext, batch: usize| -> std::result::Result<Tensor, Error> {
                let each = |tensor: &Tensor| Tensor::cat(&vec![tensor; batch], 0);
                Ok(model.forward(&each(&latents)?, &each(&timestep)?, text, &rope)?)
            };
            self.least(|| {
                let predictions = passes.predict(|| predict(&both, 2), |_| predict(&one, 1));
                predictions.map_err(|error| candle_core::Error::Msg(error.to_string()))
            })?
        };
        let config: WanVaeConfig = parse(&self.subject.vae)?;
        // As pipelines do: this autoencoder is f32 whatever the rest is.
        let vae = WanVae::load_decoder(&config, random_weights(DType::F32, self.device))?;
        let z = self.random((1, config.z_dim, cells[0], cells[1], cells[2]))?.to_dtype(DType::F32)?;
        Ok(Figures { step, decode: self.least(|| vae.decode(&z, Tiling::default(), &mut Nowhere))? })
    }

    fn random(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::randn(0f32, 1.0, shape, self.device)?.to_dtype(self.dtype)
    }

    /// The least seconds of some runs after one that does not count, each waited for to its end.
    fn least<T>(&self, mut run: impl FnMut() -> Result<T>) -> Result<f64> {
        let mut least = f64::INFINITY;
        for index in 0..=self.runs {
            self.device.synchronize()?;
            let start = Instant::now();
            drop(run()?);
            self.device.synchronize()?;
            if index > 0 {
                least = least.min(start.elapsed().as_secs_f64());
            }
        }
        Ok(least)
    }
}

fn parse<T: serde::de::DeserializeOwned>(config: &Value) -> Result<T> {
    serde_json::from_value(config.clone()).map_err(|error| candle_core::Error::Msg(error.to_string()))
}

/// Weights of any name and shape, random and small enough that nothing overflows.
#[must_use]
pub fn random_weights(dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(Random), dtype, device.clone())
}

struct Random;

impl SimpleBackend for Random {
    fn get(
        &self,
        shape: Shape,
        _: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let fan_in: usize = shape.dims().iter().skip(1).product::<usize>().max(1);
        let most = (3.0 / fan_in as f32).sqrt();
        Tensor::rand(-most, most, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("no shape is known for {name}")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn small_models_of_both_forms_are_measured() {
        for subject in subjects(true) {
            let figures = subject.measure(subject.size, &Device::Cpu, DType::F32, 1).unwrap();
            assert!(figures.step > 0.0 && figures.step.is_finite(), "{}", subject.name);
            assert!(figures.decode > 0.0 && figures.decode.is_finite(), "{}", subject.name);
        }
    }

    #[test]
    fn a_size_that_cannot_be_made_is_refused_with_the_nearest() {
        let [ltx, wan] = subjects(true);
        let refused = |subject: &Subject, width, frames| {
            subject.check(Size { width, height: 64, frames }).unwrap_err().to_string()
        };
        assert!(refused(&ltx, 100, 9).contains("the nearest is 96"));
        assert!(refused(&wan, 64, 7).contains("the nearest is 9"));
        for subject in subjects(false) {
            assert!(subject.check(subject.size).is_ok());
        }
    }
}

//! Given pictures in a run of Wan: which forms take them, and how they reach the transformer.

use std::path::Path;

use candle_core::{DType, Tensor};

use super::WanPipeline;
use crate::error::Error;
use crate::models::wan::config::TransformerConfig;
use crate::models::wan::facts::Form;
use crate::offload::{InTurn, Slot};
use crate::pipeline::conditions::Takes;
use crate::pipeline::{GenerateRequest, LoadOptions};
use crate::vision::{ClipVisionEncoder, Preprocessor, load_vision, read_vision};

/// How a model takes pictures.
pub(super) enum Pictures {
    /// Not at all.
    None,
    /// As further channels of the latents: a mask of the frames that are given, and the latents of a video that holds
    /// them and is grey elsewhere. Some forms also read what CLIP sees in them.
    Channels(Option<Box<Clip>>),
    /// Its latents are the first latent frame, whose tokens are told that they are without noise (Wan 2.2 TI2V-5B).
    First,
}

/// CLIP's encoder.
pub(super) struct Clip {
    encoder: Slot<ClipVisionEncoder>,
    preprocessor: Preprocessor,
}

impl Pictures {
    /// What a form needs, and how many parameters the image encoder's files hold.
    ///
    /// # Errors
    /// What reading the image encoder reports.
    pub(super) fn load(
        folder: &Path,
        form: Form,
        options: &LoadOptions,
        turns: &InTurn,
    ) -> Result<(Self, u64), Error> {
        Ok(match form {
            Form::Text => (Self::None, 0),
            Form::First => (Self::First, 0),
            Form::Channels => (Self::Channels(None), 0),
            Form::Clip => {
                let (_, preprocessor) = read_vision(folder)?;
                let (from, with) = (folder.to_owned(), options.clone());
                let read = move || load_vision(&from, &with).map(|(encoder, _, count)| (encoder, count));
                let (encoder, parameters) = Slot::new(turns, read)?;
                (Self::Channels(Some(Box::new(Clip { encoder, preprocessor }))), parameters)
            }
        })
    }

    /// Whether the VAE's encoder is needed.
    pub(super) fn encodes(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// Gives the encoder of whole pictures back where components go in turn.
    pub(super) fn give_back(&self) {
        if let Self::Channels(Some(clip)) = self {
            clip.encoder.give_back();
        }
    }

    /// Which pictures may be given.
    pub(super) fn takes(&self, config: &TransformerConfig) -> Takes {
        match self {
            Self::None => Takes::NOTHING,
            Self::First => Takes::First { needed: false },
            // CLIP's states have places for two pictures, or for one.
            Self::Channels(Some(_)) if config.pos_embed_seq_len.is_some() => Takes::Both,
            Self::Channels(Some(_)) => Takes::First { needed: true },
            Self::Channels(None) => Takes::Ends { needed: true },
        }
    }

    /// The states `[pictures, tokens, width]` of what CLIP sees, where the model reads them.
    pub(super) fn states(
        &self,
        request: &GenerateRequest,
        model: &WanPipeline,
    ) -> Result<Option<Tensor>, Error> {
        let Self::Channels(Some(clip)) = self else { return Ok(None) };
        let prepare = |picture: &Tensor| {
            clip.preprocessor.prepare(&picture.squeeze(0)?.contiguous()?, &model.base.device)
        };
        let pixels = request.conditions.iter().map(|given| prepare(&given.pictures));
        let pixels = Tensor::cat(&pixels.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        Ok(Some(clip.encoder.get()?.forward(&pixels)?))
    }
}

/// The pictures' latents, f32 on the model's device: with the mask before them, `[1, ratio + C, F, H, W]`, for a model that
/// reads them as channels; `[1, C, 1, H, W]` for one that takes the first frame.
pub(super) fn latents(model: &WanPipeline, request: &GenerateRequest) -> Result<Option<Tensor>, Error> {
    let Some(first) = request.conditions.first() else { return Ok(None) };
    let vae = model.vae.get()?;
    let encode = |video: &Tensor| vae.normalize(&vae.encode(video)?.mean);
    let picture = first.video(1, &model.base.device, DType::F32)?;
    if let Pictures::First = model.pictures {
        return Ok(Some(encode(&picture)?));
    }
    let last =
        request.conditions.get(1).map(|given| given.video(1, &model.base.device, DType::F32)).transpose()?;
    let between = request.frames - 1 - usize::from(last.is_some());
    let mut video = picture.pad_with_zeros(2, 0, between)?;
    if let Some(last) = &last {
        video = Tensor::cat(&[&video, last], 2)?;
    }
    let latents = encode(&video)?;
    let (_, _, frames, height, width) = latents.dims5()?;
    let ratio = model.base.info.work.temporal_ratio;
    // The mask says of each frame whether it is given; the first, which alone makes a latent frame, stands there
    // `ratio` times.
    let given = |channel: usize, frame: usize| {
        frame == 0 || last.is_some() && frame + 1 == frames && channel + 1 == ratio
    };
    let mask: Vec<f32> = (0..ratio * frames)
        .flat_map(|at| {
            let value = if given(at / frames, at % frames) { 1.0 } else { 0.0 };
            std::iter::repeat_n(value, height * width)
        })
        .collect();
    let mask = Tensor::from_vec(mask, (1, ratio, frames, height, width), &model.base.device)?;
    Ok(Some(Tensor::cat(&[mask, latents], 1)?))
}

/// The latents with the first latent frame as it is given.
pub(super) fn with_first(latents: &Tensor, first: &Tensor) -> candle_core::Result<Tensor> {
    match latents.dim(2)? {
        1 => Ok(first.clone()),
        frames => Tensor::cat(&[first, &latents.narrow(2, 1, frames - 1)?], 2),
    }
}

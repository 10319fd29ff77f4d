//! Pictures as CLIP's encoder reads them (Radford et al. 2021): scaled, cut to a square, split into patches, and the
//! states of its last block but one.

mod resample;

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;
use serde_json::{Map, Value};

pub use resample::{Bytes, resize};

use crate::error::Error;
use crate::folder::{TEXT_STEM, check_counts, check_only, open_weights};
use crate::nn::clip::{ClipBlock, ClipForm, ClipNorm};
use crate::nn::linear::Linear;
use crate::pipeline::{LoadOptions, config_error, read_json};
use crate::weights::Weights;

/// `config.json` of a CLIP vision model; what a file leaves out has the reference's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    /// `clip_vision_model`.
    pub model_type: String,
    /// Width of a token.
    pub hidden_size: usize,
    /// Inner width of a feed-forward.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Colours.
    pub num_channels: usize,
    /// Pixels along a side.
    pub image_size: usize,
    /// Pixels along a side of a patch.
    pub patch_size: usize,
    /// `quick_gelu` or `gelu`.
    pub hidden_act: String,
    /// Added to the variance.
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            model_type: "clip_vision_model".to_owned(),
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".to_owned(),
            layer_norm_eps: 1e-5,
        }
    }
}

impl ClipVisionConfig {
    /// Refuses what this encoder does not compute.
    ///
    /// # Errors
    /// The first such setting, with file, key and value.
    pub fn check(&self, file: &Path) -> std::result::Result<(), Error> {
        check_only(file, "model_type", &self.model_type.as_str(), &"clip_vision_model")?;
        check_only(file, "num_channels", &self.num_channels, &3)?;
        let counts = [
            ("patch_size", self.patch_size),
            ("image_size", self.image_size / self.patch_size.max(1)),
            ("num_attention_heads", self.num_attention_heads),
            ("num_hidden_layers", self.num_hidden_layers),
        ];
        check_counts(file, &counts)?;
        if !ClipForm::ACTIVATIONS.contains(&self.hidden_act.as_str()) {
            return Err(config_error(file, "hidden_act", &self.hidden_act, "known are quick_gelu and gelu"));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let value = self.num_attention_heads;
            return Err(config_error(file, "num_attention_heads", value, "it must divide hidden_size"));
        }
        Ok(())
    }

    /// Tokens of a picture: its patches, and one before them for the whole.
    #[must_use]
    pub fn tokens(&self) -> usize {
        let side = self.image_size / self.patch_size;
        side * side + 1
    }

    fn form(&self) -> ClipForm {
        let sizes = [self.hidden_size, self.intermediate_size, self.num_attention_heads];
        ClipForm::new(sizes, &self.hidden_act, self.layer_norm_eps)
    }
}

/// `preprocessor_config.json`: how a picture is brought before the encoder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Preprocessor {
    size: ShortestEdge,
    crop_size: Crop,
    image_mean: [f32; 3],
    image_std: [f32; 3],
    rescale_factor: f64,
    /// 3 is bicubic.
    resample: u32,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct ShortestEdge {
    shortest_edge: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Crop {
    height: usize,
    width: usize,
}

impl Preprocessor {
    /// Reads and checks a file; `side` is how many pixels the encoder sees along a side.
    ///
    /// # Errors
    /// When it cannot be read, or asks for something that is not computed here.
    pub fn read(file: &Path, side: usize) -> std::result::Result<Self, Error> {
        const BICUBIC: u32 = 3;
        let this: Self = read_json(file)?;
        check_only(file, "resample", &this.resample, &BICUBIC)?;
        for key in ["do_resize", "do_center_crop", "do_rescale", "do_normalize"] {
            if let Some(off) = this.others.get(key).filter(|value| *value != &Value::Bool(true)) {
                return Err(config_error(file, key, off, "only true is known"));
            }
        }
        check_only(file, "crop_size", &[this.crop_size.height, this.crop_size.width], &[side, side])?;
        if this.size.shortest_edge < side {
            let reason = format!("the encoder sees {side} pixels along a side");
            return Err(config_error(file, "shortest_edge", this.size.shortest_edge, reason));
        }
        Ok(this)
    }

    /// A picture `[3, height, width]` with values in 0 to 1 as the encoder takes it, `[1, 3, side, side]` on `device`.
    /// As in the reference it is whole bytes until it has been scaled and cut.
    ///
    /// # Errors
    /// When it cannot be read back from its device.
    pub fn prepare(&self, picture: &Tensor, device: &Device) -> Result<Tensor> {
        let (_, height, width) = picture.dims3()?;
        let bytes = (picture.to_dtype(DType::F32)? * 255.0)?.round()?.clamp(0f32, 255f32)?;
        let bytes = bytes.permute((1, 2, 0))?.to_dtype(DType::U8)?.flatten_all()?.to_vec1::<u8>()?;
        let (edge, short) = (self.size.shortest_edge, height.min(width));
        let long = |side: usize| if side == short { edge } else { edge * side / short };
        let whole = resize(&Bytes { width, height, data: bytes }, long(width), long(height));
        let (top, left) =
            ((whole.height - self.crop_size.height) / 2, (whole.width - self.crop_size.width) / 2);
        let pixels = Tensor::from_vec(whole.data, (whole.height, whole.width, 3), &Device::Cpu)?;
        let pixels = pixels.narrow(0, top, self.crop_size.height)?.narrow(1, left, self.crop_size.width)?;
        let unit = (pixels.to_dtype(DType::F32)? * self.rescale_factor)?;
        let mean = Tensor::new(&self.image_mean, &Device::Cpu)?;
        let std = Tensor::new(&self.image_std, &Device::Cpu)?;
        let normed = unit.broadcast_sub(&mean)?.broadcast_div(&std)?;
        normed.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()?.to_device(device)
    }
}

/// A CLIP vision encoder without its last block, on a device.
pub struct ClipVisionEncoder {
    config: ClipVisionConfig,
    class: Tensor,
    patches: Linear,
    positions: Tensor,
    norm: ClipNorm,
    blocks: Vec<ClipBlock>,
}

impl ClipVisionEncoder {
    /// Reads the weights.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(config: &ClipVisionConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let vb = vb.pp("vision_model");
        let embeddings = vb.pp("embeddings");
        let (width, side) = (config.hidden_size, config.patch_size);
        let weight = embeddings.get((width, config.num_channels, side, side), "patch_embedding.weight")?;
        let blocks = (0..config.num_hidden_layers - 1)
            .map(|index| ClipBlock::load(config.form(), &vb.pp("encoder").pp("layers").pp(index)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            class: embeddings.get(width, "class_embedding")?.reshape((1, 1, width))?,
            patches: Linear::new(weight.reshape((width, ()))?, None)?,
            positions: embeddings.get((config.tokens(), width), "position_embedding.weight")?,
            norm: ClipNorm::load(config.form(), &vb.pp("pre_layrnorm"))?,
            blocks,
            config: config.clone(),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ClipVisionConfig {
        &self.config
    }

    /// The hidden state before the last block, `[B, tokens, width]`, of prepared pictures `[B, 3, side, side]`.
    ///
    /// # Errors
    /// When the pictures have another size, or the device has no room.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = pixels.dims4()?;
        let (side, patch) = (self.config.image_size, self.config.patch_size);
        if (channels, height, width) != (3, side, side) {
            candle_core::bail!("a picture {:?} is not of {side}x{side} pixels", pixels.shape());
        }
        let count = side / patch;
        let cut = pixels.narrow(2, 0, count * patch)?.narrow(3, 0, count * patch)?.contiguous()?;
        let cells = cut
            .reshape((batch, 3, count, patch, count, patch))?
            .permute((0, 2, 4, 1, 3, 5))?
            .contiguous()?
            .reshape((batch, count * count, 3 * patch * patch))?;
        let cells = self.patches.forward(&cells.to_dtype(self.positions.dtype())?)?;
        let class = self.class.broadcast_as((batch, 1, self.config.hidden_size))?.contiguous()?;
        let x = Tensor::cat(&[class, cells], 1)?.broadcast_add(&self.positions)?;
        let mut x = self.norm.forward(&x)?;
        for block in &self.blocks {
            x = block.forward(&x, None)?;
        }
        Ok(x)
    }
}

/// The folder of the encoder, within a model's.
pub const PART: &str = "image_encoder";
/// The folder of what is done to a picture first.
pub const PROCESSOR_PART: &str = "image_processor";

/// The configurations of a folder's `image_encoder` and `image_processor`, checked.
///
/// # Errors
/// When they cannot be read, or hold something that is not computed here.
pub fn read_vision(folder: &Path) -> std::result::Result<(ClipVisionConfig, Preprocessor), Error> {
    let file = folder.join(PART).join("config.json");
    let config: ClipVisionConfig = read_json(&file)?;
    config.check(&file)?;
    let file = folder.join(PROCESSOR_PART).join("preprocessor_config.json");
    let preprocessor = Preprocessor::read(&file, config.image_size)?;
    Ok((config, preprocessor))
}

/// Opens the weights of a folder's `image_encoder`.
///
/// # Errors
/// When a file is missing, cut short or corrupt.
pub(crate) fn open_vision(folder: &Path, options: &LoadOptions) -> std::result::Result<Weights, Error> {
    open_weights(&folder.join(PART), TEXT_STEM, options, DType::F32)
}

/// A folder's `image_encoder` and `image_processor`, and how many parameters the encoder's files hold. They are small, and
/// f32 in whatever numbers the rest is, as the reference recommends.
///
/// # Errors
/// See [`crate::load`].
pub fn load_vision(
    folder: &Path,
    options: &LoadOptions,
) -> std::result::Result<(ClipVisionEncoder, Preprocessor, u64), Error> {
    let (config, preprocessor) = read_vision(folder)?;
    let weights = open_vision(folder, options)?;
    let encoder = weights.build(|vb| ClipVisionEncoder::load(&config, &vb))?;
    Ok((encoder, preprocessor, weights.parameters()))
}

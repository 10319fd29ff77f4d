//! The autoencoder's `config.json`, read and checked: a key or value that is not known here is refused by name.
//!
//! Keys that older files lack have the values that the format gives them (diffusers 0.36's `AutoencoderKLLTXVideo`).
//! Lists for the decoder are written from the encoder's side, so the decoder reads them backwards.

use serde::Deserialize;
use serde_json::Value;

/// What is wrong with an autoencoder's configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {value}: {reason}")]
#[non_exhaustive]
pub struct VaeConfigError {
    /// The key within the file, empty for the whole file.
    pub key: String,
    /// The value found.
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
}

impl VaeConfigError {
    fn new(key: &str, value: impl std::fmt::Debug, reason: impl Into<String>) -> Self {
        Self { key: key.to_owned(), value: format!("{value:?}"), reason: reason.into() }
    }

    /// A short stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        "vae_config"
    }
}

/// How a block of the encoder is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownBlock {
    /// Residual blocks, a convolution with stride, a widening residual block (`LTXVideoDownBlock3D`).
    Strided,
    /// Residual blocks, then a [`Downsample`] that also widens (`LTXVideo095DownBlock3D`).
    Folded(Downsample),
}

/// How `LTXVideo095DownBlock3D` shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Downsample {
    /// A convolution with stride 2.
    Conv,
    /// A convolution, then blocks of time, height, width into channels.
    Fold([usize; 3]),
}

/// The autoencoder's form.
#[derive(Debug, Clone, PartialEq)]
pub struct LtxVaeConfig {
    /// Channels of a video to encode.
    pub in_channels: usize,
    /// Channels of a decoded video.
    pub out_channels: usize,
    /// Channels of a latent cell.
    pub latent_channels: usize,
    /// Widths of the encoder's blocks.
    pub block_out_channels: Vec<usize>,
    /// Kinds of the encoder's blocks.
    pub down_blocks: Vec<DownBlock>,
    /// Residual blocks in each of the encoder's blocks and, last, in its middle.
    pub layers_per_block: Vec<usize>,
    /// Whether each of the encoder's blocks shrinks.
    pub spatio_temporal_scaling: Vec<bool>,
    /// Whether the encoder's kind is 0.9.5's, in which the first width belongs to no block.
    pub folded: bool,
    /// The decoder's middle and upward blocks, in the order in which it runs them.
    pub decoder: DecoderConfig,
    /// Pixels along a side of a patch.
    pub patch_size: usize,
    /// Frames in a patch.
    pub patch_size_t: usize,
    /// Added to the variance in the shortcut's layer norm.
    pub resnet_norm_eps: f64,
    /// Factor of normalised latents.
    pub scaling_factor: f64,
    /// Whether the encoder's frames depend on earlier ones alone.
    pub encoder_causal: bool,
    /// Given in the file, else computed.
    pub spatial_compression_ratio: Option<usize>,
    /// Given in the file, else computed.
    pub temporal_compression_ratio: Option<usize>,
}

/// The decoder's form, in the order in which it runs.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Width of the middle.
    pub width: usize,
    /// Residual blocks in the middle.
    pub layers: usize,
    /// Whether the middle injects noise.
    pub inject_noise: bool,
    /// The upward blocks.
    pub blocks: Vec<UpBlockConfig>,
    /// Whether its frames depend on earlier ones alone.
    pub causal: bool,
    /// Whether it is told a noise level.
    pub timestep_conditioning: bool,
}

/// One upward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpBlockConfig {
    /// Channels before, divided by `factor`.
    pub input: usize,
    /// Channels after.
    pub output: usize,
    /// Residual blocks.
    pub layers: usize,
    /// Whether it doubles time, height and width.
    pub scale: bool,
    /// Whether it injects noise.
    pub inject_noise: bool,
    /// Whether upsampling has a residual.
    pub residual: bool,
    /// By how much upsampling divides the channels.
    pub factor: usize,
}

impl LtxVaeConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// When it is no JSON, a key is not known, or a value is not one that can be built.
    pub fn from_json(text: &str) -> Result<Self, VaeConfigError> {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| VaeConfigError::new("", "no JSON object", e.to_string()))?;
        Self::from_value(&value)
    }

    /// Reads a parsed `config.json`.
    ///
    /// # Errors
    /// As [`LtxVaeConfig::from_json`].
    pub fn from_value(value: &Value) -> Result<Self, VaeConfigError> {
        let Value::Object(object) = value else {
            return Err(VaeConfigError::new("", value, "it must be an object"));
        };
        let mut object = object.clone();
        if let Some(class) = object.get("_class_name")
            && class != CLASS
        {
            return Err(VaeConfigError::new("_class_name", class, format!("known is {CLASS}")));
        }
        object.retain(|key, _| !key.starts_with('_'));
        for (key, value) in &object {
            if !KEYS.contains(&key.as_str()) {
                return Err(VaeConfigError::new(
                    key,
                    value,
                    format!("unknown key; known: {}", KEYS.join(", ")),
                ));
            }
            let one = Value::Object(std::iter::once((key.clone(), value.clone())).collect());
            if let Err(error) = serde_json::from_value::<Raw>(one) {
                return Err(VaeConfigError::new(key, value, error.to_string()));
            }
        }
        let raw: Raw = serde_json::from_value(Value::Object(object))
            .map_err(|e| VaeConfigError::new("", "malformed", e.to_string()))?;
        raw.check()
    }

    /// Pixels along a side of a latent cell.
    #[must_use]
    pub fn spatial_ratio(&self) -> usize {
        self.spatial_compression_ratio.unwrap_or_else(|| self.patch_size << self.shrinks())
    }

    /// Frames in a latent frame after the first.
    #[must_use]
    pub fn temporal_ratio(&self) -> usize {
        self.temporal_compression_ratio.unwrap_or_else(|| self.patch_size_t << self.shrinks())
    }

    fn shrinks(&self) -> usize {
        self.spatio_temporal_scaling.iter().filter(|&&scales| scales).count()
    }
}

/// The class that is known here.
const CLASS: &str = "AutoencoderKLLTXVideo";
/// The widest layer, the most blocks and the largest factor that are believed.
const MOST_CHANNELS: usize = 1 << 16;
const MOST_BLOCKS: usize = 16;
const MOST_LAYERS: usize = 256;
const MOST_PATCH: usize = 64;

const KEYS: [&str; 23] = [
    "block_out_channels",
    "decoder_block_out_channels",
    "decoder_causal",
    "decoder_inject_noise",
    "decoder_layers_per_block",
    "decoder_spatio_temporal_scaling",
    "down_block_types",
    "downsample_type",
    "encoder_causal",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "out_channels",
    "patch_size",
    "patch_size_t",
    "resnet_norm_eps",
    "scaling_factor",
    "spatial_compression_ratio",
    "spatio_temporal_scaling",
    "temporal_compression_ratio",
    "timestep_conditioning",
    "upsample_factor",
    "upsample_residual",
];

/// The file as it is written, with the format's own defaults.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Raw {
    in_channels: usize,
    out_channels: usize,
    latent_channels: usize,
    block_out_channels: Vec<usize>,
    down_block_types: Vec<String>,
    decoder_block_out_channels: Vec<usize>,
    layers_per_block: Vec<usize>,
    decoder_layers_per_block: Vec<usize>,
    spatio_temporal_scaling: Vec<bool>,
    decoder_spatio_temporal_scaling: Vec<bool>,
    decoder_inject_noise: Vec<bool>,
    downsample_type: Vec<String>,
    upsample_residual: Vec<bool>,
    upsample_factor: Vec<usize>,
    timestep_conditioning: bool,
    patch_size: usize,
    patch_size_t: usize,
    resnet_norm_eps: f64,
    scaling_factor: f64,
    encoder_causal: bool,
    decoder_causal: bool,
    spatial_compression_ratio: Option<usize>,
    temporal_compression_ratio: Option<usize>,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 128,
            block_out_channels: vec![128, 256, 512, 512],
            down_block_types: vec!["LTXVideoDownBlock3D".to_owned(); 4],
            decoder_block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: vec![4, 3, 3, 3, 4],
            decoder_layers_per_block: vec![4, 3, 3, 3, 4],
            spatio_temporal_scaling: vec![true, true, true, false],
            decoder_spatio_temporal_scaling: vec![true, true, true, false],
            decoder_inject_noise: vec![false; 5],
            downsample_type: vec!["conv".to_owned(); 4],
            upsample_residual: vec![false; 4],
            upsample_factor: vec![1; 4],
            timestep_conditioning: false,
            patch_size: 4,
            patch_size_t: 1,
            resnet_norm_eps: 1e-6,
            scaling_factor: 1.0,
            encoder_causal: true,
            decoder_causal: false,
            spatial_compression_ratio: None,
            temporal_compression_ratio: None,
        }
    }
}

impl Raw {
    fn check(self) -> Result<LtxVaeConfig, VaeConfigError> {
        self.check_numbers()?;
        let folded = self.down_block_types.last().is_some_and(|t| t == FOLDED);
        let blocks = self.block_out_channels.len() - usize::from(folded);
        for (key, len, needed) in [
            ("down_block_types", self.down_block_types.len(), blocks),
            ("layers_per_block", self.layers_per_block.len(), blocks + 1),
            ("spatio_temporal_scaling", self.spatio_temporal_scaling.len(), blocks),
            ("downsample_type", self.downsample_type.len(), if folded { blocks } else { 0 }),
        ] {
            if len < needed || blocks == 0 {
                return Err(VaeConfigError::new(key, len, format!("{blocks} blocks need {needed} entries")));
            }
        }
        let down_blocks =
            (0..blocks).map(|i| self.down_block(i)).collect::<Result<Vec<_>, VaeConfigError>>()?;
        let decoder = self.decoder()?;
        Ok(LtxVaeConfig {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            latent_channels: self.latent_channels,
            block_out_channels: self.block_out_channels,
            down_blocks,
            layers_per_block: self.layers_per_block,
            spatio_temporal_scaling: self.spatio_temporal_scaling,
            folded,
            decoder,
            patch_size: self.patch_size,
            patch_size_t: self.patch_size_t,
            resnet_norm_eps: self.resnet_norm_eps,
            scaling_factor: self.scaling_factor,
            encoder_causal: self.encoder_causal,
            spatial_compression_ratio: self.spatial_compression_ratio,
            temporal_compression_ratio: self.temporal_compression_ratio,
        })
    }

    fn check_numbers(&self) -> Result<(), VaeConfigError> {
        let lists = [
            ("block_out_channels", &self.block_out_channels, 1, MOST_CHANNELS),
            ("decoder_block_out_channels", &self.decoder_block_out_channels, 1, MOST_CHANNELS),
            ("layers_per_block", &self.layers_per_block, 0, MOST_LAYERS),
            ("decoder_layers_per_block", &self.decoder_layers_per_block, 0, MOST_LAYERS),
            ("upsample_factor", &self.upsample_factor, 1, 8),
        ];
        for (key, list, least, most) in lists {
            if list.is_empty() || list.len() > MOST_BLOCKS {
                return Err(VaeConfigError::new(key, list, format!("1 to {MOST_BLOCKS} entries")));
            }
            if list.iter().any(|n| !(least..=most).contains(n)) {
                return Err(VaeConfigError::new(key, list, format!("each must be {least} to {most}")));
            }
        }
        let numbers = [
            ("in_channels", self.in_channels, MOST_CHANNELS),
            ("out_channels", self.out_channels, MOST_CHANNELS),
            ("latent_channels", self.latent_channels, MOST_CHANNELS),
            ("patch_size", self.patch_size, MOST_PATCH),
            ("patch_size_t", self.patch_size_t, MOST_PATCH),
            ("spatial_compression_ratio", self.spatial_compression_ratio.unwrap_or(1), MOST_CHANNELS),
            ("temporal_compression_ratio", self.temporal_compression_ratio.unwrap_or(1), MOST_CHANNELS),
        ];
        for (key, number, most) in numbers {
            if !(1..=most).contains(&number) {
                return Err(VaeConfigError::new(key, number, format!("it must be 1 to {most}")));
            }
        }
        if self.patch_size_t != 1 && self.temporal_compression_ratio.is_none() {
            // The reference's encoder counts spatial patches only, so it cannot run such a configuration itself.
            return Err(VaeConfigError::new("patch_size_t", self.patch_size_t, "known is 1"));
        }
        for (key, number) in
            [("resnet_norm_eps", self.resnet_norm_eps), ("scaling_factor", self.scaling_factor)]
        {
            if !(number.is_finite() && number > 0.0) {
                return Err(VaeConfigError::new(key, number, "it must be finite and above 0"));
            }
        }
        Ok(())
    }

    fn down_block(&self, index: usize) -> Result<DownBlock, VaeConfigError> {
        let kind = self.down_block_types[index].as_str();
        if kind == STRIDED {
            return Ok(DownBlock::Strided);
        }
        if kind != FOLDED {
            return Err(VaeConfigError::new("down_block_types", kind, format!("known: {STRIDED}, {FOLDED}")));
        }
        let name = self.downsample_type.get(index).map_or("", String::as_str);
        let downsample = match name {
            "conv" => Downsample::Conv,
            "spatial" => Downsample::Fold([1, 2, 2]),
            "temporal" => Downsample::Fold([2, 1, 1]),
            "spatiotemporal" => Downsample::Fold([2, 2, 2]),
            _ => {
                let known = "known: conv, spatial, temporal, spatiotemporal";
                return Err(VaeConfigError::new("downsample_type", name, known));
            }
        };
        Ok(DownBlock::Folded(downsample))
    }

    fn decoder(&self) -> Result<DecoderConfig, VaeConfigError> {
        let widths = &self.decoder_block_out_channels;
        let count = widths.len();
        for (key, len, needed) in [
            ("decoder_layers_per_block", self.decoder_layers_per_block.len(), count + 1),
            ("decoder_spatio_temporal_scaling", self.decoder_spatio_temporal_scaling.len(), count),
            ("decoder_inject_noise", self.decoder_inject_noise.len(), count + 1),
            ("upsample_residual", self.upsample_residual.len(), count),
            ("upsample_factor", self.upsample_factor.len(), count),
        ] {
            if len < needed {
                return Err(VaeConfigError::new(key, len, format!("{count} blocks need {needed} entries")));
            }
        }
        let back = |i: usize, len: usize| len - 1 - i;
        let mut width = widths[count - 1];
        let mut blocks = Vec::with_capacity(count);
        for i in 0..count {
            let factor = self.upsample_factor[back(i, self.upsample_factor.len())];
            let block = UpBlockConfig {
                input: width / factor,
                output: widths[back(i, count)] / factor,
                layers: self.decoder_layers_per_block[back(i + 1, self.decoder_layers_per_block.len())],
                scale: self.decoder_spatio_temporal_scaling
                    [back(i, self.decoder_spatio_temporal_scaling.len())],
                inject_noise: self.decoder_inject_noise[back(i + 1, self.decoder_inject_noise.len())],
                residual: self.upsample_residual[back(i, self.upsample_residual.len())],
                factor,
            };
            self.check_up_block(&block)?;
            width = block.output;
            blocks.push(block);
        }
        Ok(DecoderConfig {
            width: widths[count - 1],
            layers: self.decoder_layers_per_block[back(0, self.decoder_layers_per_block.len())],
            inject_noise: self.decoder_inject_noise[back(0, self.decoder_inject_noise.len())],
            blocks,
            causal: self.decoder_causal,
            timestep_conditioning: self.timestep_conditioning,
        })
    }

    fn check_up_block(&self, block: &UpBlockConfig) -> Result<(), VaeConfigError> {
        let widens = block.input != block.output;
        let fault = |key: &str, value: String, reason: &str| Err(VaeConfigError::new(key, value, reason));
        if block.output == 0 || block.input == 0 {
            return fault("upsample_factor", block.factor.to_string(), "it divides a width to 0");
        }
        if widens && (self.timestep_conditioning || block.inject_noise) {
            let widths = format!("{:?}", self.decoder_block_out_channels);
            let reason = "a block that changes its width can neither be told a timestep nor inject noise";
            return fault("decoder_block_out_channels", widths, reason);
        }
        if block.scale && !UPSAMPLING.is_multiple_of(block.factor) {
            return fault("upsample_factor", block.factor.to_string(), "known: 1, 2, 4, 8");
        }
        if block.scale && block.residual && !(block.output * block.factor).is_multiple_of(UPSAMPLING) {
            let widths = format!("{:?}", self.decoder_block_out_channels);
            return fault("decoder_block_out_channels", widths, "a residual upsampling needs multiples of 8");
        }
        Ok(())
    }
}

/// Positions that one position becomes: two each in time, height and width.
const UPSAMPLING: usize = 8;
const STRIDED: &str = "LTXVideoDownBlock3D";
const FOLDED: &str = "LTXVideo095DownBlock3D";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn fault(text: &str) -> VaeConfigError {
        LtxVaeConfig::from_json(text).unwrap_err()
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let error = fault(r#"{"decoder_spatial_padding_mode": "reflect"}"#);
        assert_eq!(
            (error.key.as_str(), error.value.contains("reflect")),
            ("decoder_spatial_padding_mode", true)
        );
        assert!(fault(r#"{"down_block_types": ["A", "A", "A", "A"]}"#).to_string().contains("\"A\""));
        let types = r#"["LTXVideo095DownBlock3D", "LTXVideo095DownBlock3D", "LTXVideo095DownBlock3D"]"#;
        let text =
            format!(r#"{{"down_block_types": {types}, "downsample_type": ["spatial", "odd", "conv"]}}"#);
        assert!(fault(&text).to_string().contains("odd"));
        assert!(fault(r#"{"patch_size": "four"}"#).to_string().contains("patch_size"));
        assert!(fault(r#"{"patch_size": 0}"#).to_string().contains("patch_size is 0"));
        assert!(fault(r#"{"_class_name": "AutoencoderKL"}"#).to_string().contains("AutoencoderKL"));
        assert!(fault("[]").to_string().contains("object"));
    }

    #[test]
    fn lists_that_are_too_short_are_refused_with_the_length_needed() {
        assert!(fault(r#"{"decoder_layers_per_block": [1, 1]}"#).to_string().contains("need 5 entries"));
        assert!(fault(r#"{"upsample_factor": [3, 3, 3, 3]}"#).to_string().contains("upsample_factor"));
    }

    #[test]
    fn decoder_lists_are_read_backwards() {
        let config = LtxVaeConfig::from_json(
            r#"{"decoder_block_out_channels": [256, 512, 1024], "decoder_layers_per_block": [5, 6, 7, 8],
                "decoder_spatio_temporal_scaling": [true, true, true], "timestep_conditioning": true,
                "decoder_inject_noise": [true, true, true, false], "upsample_residual": [true, true, true],
                "upsample_factor": [2, 2, 2]}"#,
        )
        .unwrap();
        let decoder = config.decoder;
        assert_eq!((decoder.width, decoder.layers, decoder.inject_noise), (1024, 8, false));
        let widths: Vec<_> =
            decoder.blocks.iter().map(|b| (b.input, b.output, b.layers, b.inject_noise)).collect();
        assert_eq!(widths, [(512, 512, 7, true), (256, 256, 6, true), (128, 128, 5, true)]);
    }
}

//! LTX-Video as its makers publish it in one file: transformer and VAE under the names of their own repository, with their
//! configuration in the file's metadata, and a folder with text encoder and tokenizer around it.
//!
//! ```text
//! NAME.safetensors           the only such file there
//! text_encoder/ tokenizer/   in the published layout
//! model_index.json           may be missing, as may scheduler/: they follow from the file
//! ```
//!
//! A folder with a `transformer` folder is no such folder, whatever else lies in it. The makers' description of the VAE is
//! a list of blocks; from it follow both diffusers' configuration, which is then read like any other, and where in
//! diffusers' order each block's tensors belong. The reference goes by the sizes of some tensors instead and knows three
//! lists by heart; for those both come to the same.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::config::TransformerConfig;
use super::names::{transformer_name, vae_name};
use super::vae::LtxVaeConfig;
use crate::adapter::names::TRANSFORMER;
use crate::error::Error;
use crate::pipeline::{LoadOptions, config_error};
use crate::sampler::FlowMatchConfig;
use crate::weights::{self, Weights, WeightsError};

/// The metadata's key.
const CONFIG: &str = "config";
/// Settings of the transformer that have the same name in diffusers.
const SAME: &[&str] = &[
    "activation_fn",
    "attention_bias",
    "attention_head_dim",
    "caption_channels",
    "cross_attention_dim",
    "in_channels",
    "norm_elementwise_affine",
    "norm_eps",
    "num_attention_heads",
    "num_layers",
    "out_channels",
];
/// Width of the finest level where the description does not say.
const USUAL_WIDTH: u64 = 128;

/// A folder's single file.
#[derive(Debug, Clone)]
pub(super) struct Checkpoint {
    file: PathBuf,
    transformer: TransformerConfig,
    vae: LtxVaeConfig,
    places: VaePlaces,
}

/// Where the blocks of encoder and decoder belong in diffusers' order, such as `up_blocks.1.upsamplers.0`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct VaePlaces {
    pub(super) encoder: Vec<String>,
    pub(super) decoder: Vec<String>,
}

/// A folder's single file, where it is such a folder.
pub(super) fn file(folder: &Path) -> Result<Option<PathBuf>, Error> {
    if folder.join("transformer").is_dir() {
        return Ok(None);
    }
    Ok(weights::find::only(folder, "safetensors", None)?)
}

impl Checkpoint {
    /// Reads a folder's single file's description, where it is such a folder.
    pub(super) fn find(folder: &Path) -> Result<Option<Self>, Error> {
        file(folder)?.map(Self::read).transpose()
    }

    fn read(file: PathBuf) -> Result<Self, Error> {
        let metadata = weights::metadata(&file)?;
        let fault = |key: &str, value: &str, reason: &str| config_error(&file, key, value, reason);
        let text = metadata.get(CONFIG).ok_or_else(|| {
            fault(CONFIG, "missing", "a single file is read by the configuration in its metadata")
        })?;
        let whole: Value = serde_json::from_str(text)
            .map_err(|error| config_error(&file, CONFIG, "no JSON", error.to_string()))?;
        let part = |key: &str| {
            whole.get(key).and_then(Value::as_object).ok_or_else(|| fault(key, "missing", "it is needed"))
        };
        let transformer = transformer(&file, part("transformer")?)?;
        let (vae, places) = vae(&file, part("vae")?)?;
        Ok(Self { transformer, vae, places, file })
    }

    /// The file.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    pub(super) fn transformer(&self) -> TransformerConfig {
        self.transformer.clone()
    }

    pub(super) fn vae(&self) -> LtxVaeConfig {
        self.vae.clone()
    }

    pub(super) fn open_transformer(&self, options: &LoadOptions) -> Result<Weights, WeightsError> {
        let weights = self.open(&transformer_name, options)?;
        Ok(weights.entering(options.places.of_component(Path::new(TRANSFORMER))))
    }

    pub(super) fn open_vae(&self, options: &LoadOptions) -> Result<Weights, WeightsError> {
        self.open(&|name| vae_name(name, &self.places), options)
    }

    fn open(&self, rename: weights::Rename<'_>, options: &LoadOptions) -> Result<Weights, WeightsError> {
        Weights::of_files(vec![self.file.clone()], rename, options.dtype, &options.device)
    }

    /// The class that computes it: the VAE of 0.9.5 came with `LTXConditionPipeline`.
    pub(super) fn class(&self) -> &'static str {
        if self.vae.folded { "LTXConditionPipeline" } else { "LTXPipeline" }
    }

    /// The scheduler that the reference makes for that class.
    pub(super) fn scheduler(&self) -> FlowMatchConfig {
        if self.vae.folded {
            return FlowMatchConfig::default();
        }
        FlowMatchConfig {
            use_dynamic_shifting: true,
            base_shift: 0.95,
            max_shift: 2.05,
            base_image_seq_len: 1024,
            max_image_seq_len: 4096,
            shift_terminal: Some(0.1),
            ..FlowMatchConfig::default()
        }
    }
}

/// The transformer's configuration from its makers' one. What that says beside is left aside, as the reference leaves
/// aside all of it.
fn transformer(file: &Path, theirs: &Map<String, Value>) -> Result<TransformerConfig, Error> {
    for (key, only) in [
        ("qk_norm", json!("rms_norm")),
        ("standardization_norm", json!("rms_norm")),
        ("positional_embedding_type", json!("rope")),
        ("positional_embedding_theta", json!(10_000.0)),
        ("positional_embedding_max_pos", json!([20, 2048, 2048])),
        ("timestep_scale_multiplier", json!(1000)),
    ] {
        check_only(file, theirs, "transformer", key, &only)?;
    }
    let same = |key: &&str| Some(((*key).to_owned(), theirs.get(*key)?.clone()));
    let ours: Map<String, Value> = SAME.iter().filter_map(same).collect();
    TransformerConfig::of_value(file, Value::Object(ours))
}

/// A setting that may be missing has the only value that is known. Numbers are compared as numbers.
fn check_only(
    file: &Path,
    theirs: &Map<String, Value>,
    part: &str,
    key: &str,
    only: &Value,
) -> Result<(), Error> {
    let same = |found: &Value| found == only || (found.is_number() && found.as_f64() == only.as_f64());
    match theirs.get(key).filter(|found| !found.is_null() && !same(found)) {
        Some(found) => {
            Err(config_error(file, &format!("{part}.{key}"), found, format!("only {only} is known")))
        }
        None => Ok(()),
    }
}

/// A block of the makers' lists.
struct Block<'a> {
    kind: &'a str,
    settings: Map<String, Value>,
}

impl Block<'_> {
    fn number(&self, key: &str, usual: u64) -> u64 {
        self.settings.get(key).and_then(Value::as_u64).unwrap_or(usual)
    }

    fn flag(&self, key: &str) -> bool {
        self.settings.get(key).and_then(Value::as_bool).unwrap_or(false)
    }
}

fn vae(file: &Path, theirs: &Map<String, Value>) -> Result<(LtxVaeConfig, VaePlaces), Error> {
    for (key, only) in [
        ("_class_name", json!("CausalVideoAutoencoder")),
        ("dims", json!(3)),
        ("norm_layer", json!("pixel_norm")),
        ("latent_log_var", json!("uniform")),
        ("use_quant_conv", json!(false)),
        ("normalize_latent_channels", json!(false)),
        ("spatial_padding_mode", json!("zeros")),
    ] {
        check_only(file, theirs, "vae", key, &only)?;
    }
    let patch = theirs.get("patch_size").and_then(Value::as_u64).unwrap_or(1);
    let encoder = encoder(file, &blocks(file, theirs, "encoder_blocks")?, width(theirs, "encoder"), patch)?;
    let decoder = decoder(file, &blocks(file, theirs, "decoder_blocks")?, width(theirs, "decoder"))?;
    let mut ours = Map::from_iter([("patch_size".to_owned(), json!(patch))]);
    ours.extend(encoder.settings.into_iter().chain(decoder.settings));
    for (from, to) in [
        ("in_channels", "in_channels"),
        ("out_channels", "out_channels"),
        ("latent_channels", "latent_channels"),
        ("scaling_factor", "scaling_factor"),
        ("causal_decoder", "decoder_causal"),
        ("timestep_conditioning", "timestep_conditioning"),
    ] {
        if let Some(value) = theirs.get(from).filter(|value| !value.is_null()) {
            ours.insert(to.to_owned(), value.clone());
        }
    }
    let config = LtxVaeConfig::from_value(&Value::Object(ours))
        .map_err(|error| config_error(file, &format!("vae.{}", error.key), &error.value, error.reason))?;
    Ok((config, VaePlaces { encoder: encoder.places, decoder: decoder.places }))
}

fn width(theirs: &Map<String, Value>, side: &str) -> u64 {
    theirs.get(&format!("{side}_base_channels")).and_then(Value::as_u64).unwrap_or(USUAL_WIDTH)
}

/// The list of one side, or the one of both.
fn blocks<'a>(file: &Path, theirs: &'a Map<String, Value>, key: &str) -> Result<Vec<Block<'a>>, Error> {
    let fault = |value: &Value, reason: &str| config_error(file, &format!("vae.{key}"), value, reason);
    let list = theirs.get(key).or_else(|| theirs.get("blocks")).unwrap_or(&Value::Null);
    let entries = list.as_array().ok_or_else(|| fault(list, "a list of blocks is needed"))?;
    let read = |entry: &'a Value| {
        let kind = entry.get(0).and_then(Value::as_str)?;
        let settings = match entry.get(1)? {
            Value::Object(settings) => settings.clone(),
            count @ Value::Number(_) => Map::from_iter([("num_layers".to_owned(), count.clone())]),
            _ => return None,
        };
        Some(Block { kind, settings })
    };
    entries.iter().map(|entry| read(entry).ok_or_else(|| fault(entry, "no block is written so"))).collect()
}

/// One side's settings by diffusers' names, and where its blocks belong.
struct Side {
    settings: Vec<(String, Value)>,
    places: Vec<String>,
}

impl Side {
    fn new<const N: usize>(settings: [(&str, Value); N], places: Vec<String>) -> Self {
        Self { settings: settings.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(), places }
    }
}

/// Blocks downward: residual blocks and what shrinks after them, and residual blocks in the middle at last.
fn encoder(file: &Path, blocks: &[Block<'_>], width: u64, patch: u64) -> Result<Side, Error> {
    let unknown = |kind: &str| config_error(file, "vae.encoder_blocks", kind, "no such block is known there");
    let Some((middle, downward)) = blocks.split_last() else { return Err(unknown("nothing")) };
    if middle.kind != "res_x" {
        return Err(unknown(middle.kind));
    }
    let (mut space, mut time) = (patch, 1u64);
    let (mut widths, mut layers, mut kinds, mut scaling, mut places) =
        (vec![width], vec![], vec![], vec![], vec![]);
    let mut width = width;
    let mut rest = downward.iter().peekable();
    while let Some(block) = rest.next() {
        if block.kind != "res_x" {
            return Err(unknown(block.kind));
        }
        let level = layers.len();
        layers.push(block.number("num_layers", 1));
        places.push(format!("down_blocks.{level}"));
        let mut kind = "conv";
        let mut scales = false;
        if let Some(shrink) = rest.next_if(|next| next.kind.starts_with("compress_")) {
            scales = true;
            kind = match shrink.kind {
                "compress_all" => "conv",
                "compress_all_res" => "spatiotemporal",
                "compress_space_res" => "spatial",
                "compress_time_res" => "temporal",
                other => return Err(unknown(other)),
            };
            let factor = if kind == "conv" { 1 } else { shrink.number("multiplier", 2) };
            width = width.saturating_mul(factor);
            space = space.saturating_mul(if kind == "temporal" { 1 } else { 2 });
            time = time.saturating_mul(if kind == "spatial" { 1 } else { 2 });
            places.push(format!("down_blocks.{level}.downsamplers.0"));
        }
        if let Some(wider) = rest.next_if(|next| next.kind == "res_x_y") {
            width = width.saturating_mul(wider.number("multiplier", 2));
            places.push(format!("down_blocks.{level}.conv_out"));
        }
        widths.push(width);
        kinds.push(kind);
        scaling.push(scales);
    }
    layers.push(middle.number("num_layers", 1));
    places.push("mid_block".to_owned());
    let folded = kinds.iter().any(|&kind| kind != "conv");
    if !folded {
        // There the width of the last block is that of the one before.
        let last = widths.pop();
        if last != widths.last().copied() {
            return Err(unknown("res_x_y in the last level"));
        }
    }
    let class = if folded { "LTXVideo095DownBlock3D" } else { "LTXVideoDownBlock3D" };
    let settings = [
        ("block_out_channels", json!(widths)),
        ("layers_per_block", json!(layers)),
        ("down_block_types", json!(vec![class; kinds.len()])),
        ("downsample_type", json!(kinds)),
        ("spatio_temporal_scaling", json!(scaling)),
        ("spatial_compression_ratio", json!(space)),
        ("temporal_compression_ratio", json!(time)),
    ];
    Ok(Side::new(settings, places))
}

/// Blocks upward, which the list holds from the last to the first: residual blocks in the middle, then what grows and
/// residual blocks after it. Diffusers' lists are also written from the last to the first.
fn decoder(file: &Path, blocks: &[Block<'_>], width: u64) -> Result<Side, Error> {
    let unknown = |kind: &str| config_error(file, "vae.decoder_blocks", kind, "no such block is known there");
    let narrower = |block: &Block<'_>| match block.kind {
        "res_x_y" => block.number("multiplier", 2),
        "compress_all" => block.number("multiplier", 1),
        _ => 1,
    };
    let mut width = blocks.iter().fold(width, |width, block| width.saturating_mul(narrower(block)));
    let mut rest = blocks.iter().rev().peekable();
    let Some(middle) = rest.next().filter(|middle| middle.kind == "res_x") else {
        return Err(unknown("a list that does not end with res_x"));
    };
    let mut layers = vec![middle.number("num_layers", 1)];
    let mut noise = vec![middle.flag("inject_noise")];
    let mut places = vec!["mid_block".to_owned()];
    let (mut widths, mut scaling, mut residual, mut factors) = (vec![], vec![], vec![], vec![]);
    while rest.peek().is_some() {
        let level = widths.len();
        if let Some(block) = rest.next_if(|next| next.kind == "res_x_y") {
            width /= narrower(block).max(1);
            places.push(format!("up_blocks.{level}.conv_in"));
        }
        let grow = rest.next_if(|next| next.kind == "compress_all");
        let factor = grow.map_or(1, narrower).max(1);
        width /= factor;
        if grow.is_some() {
            places.push(format!("up_blocks.{level}.upsamplers.0"));
        }
        let Some(block) = rest.next().filter(|block| block.kind == "res_x") else {
            return Err(unknown("a level without res_x"));
        };
        places.push(format!("up_blocks.{level}"));
        layers.push(block.number("num_layers", 1));
        noise.push(block.flag("inject_noise"));
        widths.push(width.saturating_mul(factor));
        scaling.push(grow.is_some());
        residual.push(grow.is_some_and(|grow| grow.flag("residual")));
        factors.push(factor);
    }
    layers.reverse();
    noise.reverse();
    widths.reverse();
    scaling.reverse();
    residual.reverse();
    factors.reverse();
    let settings = [
        ("decoder_block_out_channels", json!(widths)),
        ("decoder_layers_per_block", json!(layers)),
        ("decoder_inject_noise", json!(noise)),
        ("decoder_spatio_temporal_scaling", json!(scaling)),
        ("upsample_residual", json!(residual)),
        ("upsample_factor", json!(factors)),
    ];
    Ok(Side::new(settings, places))
}

//! What a run of LTX-Video holds in memory: its computation gone through without values.

use std::path::Path;

use candle_core::DType;
use candle_nn::VarBuilder;

use super::conditions::Layout;
use super::second;
use super::{open_transformer, open_vae, read_transformer_config, read_vae_config};
use crate::error::Error;
use crate::folder::{WEIGHTS_STEM, open_weights, read_t5};
use crate::models::ltx::config::TransformerConfig;
use crate::models::ltx::facts::{class, facts};
use crate::models::ltx::transformer::LtxTransformer;
use crate::models::ltx::upsampler::{GROWTH, LtxUpsampler, PART, UpsamplerConfig, cube, grow_form};
use crate::models::ltx::vae::config::{DownBlock, Downsample, UpBlockConfig};
use crate::models::ltx::vae::{LtxVae, LtxVaeConfig};
use crate::pipeline::latents::Volume;
use crate::pipeline::{GenerateRequest, LoadOptions};
use crate::plan::guided::Texts;
use crate::plan::ledger::{Ghost, Ledger, attention};
use crate::plan::text::t5;
use crate::plan::{Draft, GhostFilm, MemoryPlan, PlanOptions, PlanPhase, text_dtype};
use crate::registry::ModelIndex;
use crate::tiling::{Cut, Tiling};

/// The plan of a request.
///
/// # Errors
/// See [`crate::registry::plan`].
pub(crate) fn plan(
    folder: &Path,
    index: &ModelIndex,
    request: &GenerateRequest,
    options: &PlanOptions,
) -> Result<MemoryPlan, Error> {
    let info = facts(folder, index)?.info;
    let masked = class(folder, index)? == super::LtxClass::Condition || !request.conditions.is_empty();
    let text = read_t5(&folder.join("text_encoder"))?;
    let config = read_transformer_config(folder)?;
    let vae_config = read_vae_config(folder)?;
    let volume = Volume::new(&info.work, request);
    let layout = Layout::new(request, volume.cells[0], info.work.temporal_ratio);
    let (dtype, texts) = (options.dtype, Texts::new(request.is_guided(), request, options));
    let tokens = info.token_limit;
    let [_, rows, columns] = volume.grid();
    let all = volume.packed_shape()[1] + layout.extra() * rows * columns;
    let latents = [1, all, volume.packed_shape()[2]];

    let opened = LoadOptions::default();
    let mut draft = Draft::new(options, request);
    let encoder = draft.t5(&folder.join("text_encoder"), &text)?;
    let (transformer, _) =
        draft.component("transformer", dtype, open_transformer(folder, &opened), |vb| {
            LtxTransformer::load(&config, &vb)
        })?;
    let vae_files = || open_vae(folder, &opened).map(|(_, files)| files);
    let (vae, decoder) =
        draft.component("vae", dtype, vae_files(), |vb| LtxVae::load_decoder(&vae_config, vb))?;
    draft.phase(PlanPhase::Text, &[encoder], |ledger| {
        let _start = ledger.wide(&latents);
        let each = || t5(ledger, &text, tokens, masked, text_dtype(dtype));
        let _all: Vec<_> = (0..texts.count).map(|_| each()).collect();
    });
    if let Some(most) = layout.longest() {
        let (part, _) = draft
            .brief_component("vae encoder", dtype, vae_files(), |vb| LtxVae::load_encoder(&vae_config, vb))?;
        draft.phase(PlanPhase::Conditions, &[part], |ledger| {
            let _start = ledger.wide(&latents);
            let _text = ledger.ghost(&[texts.count, tokens, config.caption_channels], dtype);
            let video = ledger.wide(&[1, 3, most, request.height, request.width]).to(dtype);
            encode(&vae_config, &video);
        });
    }
    if let Some(upsampler) = second::needed(folder, request, &volume)? {
        let files = open_weights(&folder.join(PART), WEIGHTS_STEM, &opened, dtype);
        let load = |vb: VarBuilder<'static>| LtxUpsampler::load(&upsampler, &vb);
        let (part, _) = draft.brief_component("latent upsampler", dtype, files, load)?;
        draft.phase(PlanPhase::Conditions, &[part, vae], |ledger| {
            let _start = ledger.wide(&latents);
            let _text = ledger.ghost(&[texts.count, tokens, config.caption_channels], dtype);
            upsample(ledger, &upsampler, volume.cells, dtype);
        });
    }
    let sizes = Sizes { texts, tokens, text: text.d_model, per_token: !layout.is_empty() };
    draft.phase(PlanPhase::Denoise, &[transformer], |ledger| {
        denoise(ledger, &config, &latents, &sizes, dtype);
    });
    let tiling = Tiling { tile: request.decode.tile, chunk: request.decode.chunk };
    draft.phase(PlanPhase::Decode, &[vae], |ledger| {
        let cut = decoder.cut(tiling, volume.cells);
        let z = ledger.wide(&volume.shape());
        let z = z.same().same().to(dtype);
        decode(&vae_config, &z, cut, &GhostFilm::new(ledger, request));
    });
    Ok(draft.finish(request))
}

/// The upsampler's way to latents of these cells.
fn upsample(ledger: &Ledger, config: &UpsamplerConfig, [t, h, w]: [usize; 3], dtype: DType) {
    let (channels, width) = (config.in_channels, config.mid_channels);
    let small = [t / GROWTH[0], h / GROWTH[1], w / GROWTH[2]];
    let given = ledger.wide(&[1, channels, small[0], small[1], small[2]]);
    let denormalised = { given.same().same() };
    let large = {
        let read = denormalised.to(dtype).turned(&[1, small[0], small[1], small[2], channels]);
        let mut x = read.conv3d(&cube(channels, width)).group_norm();
        for _ in 0..config.num_blocks_per_stage.min(2) {
            x = upsample_block(&x);
        }
        x = x.conv3d(&grow_form(width)).turned(&[1, t, h, w, width]);
        for _ in 0..config.num_blocks_per_stage.min(2) {
            x = upsample_block(&x);
        }
        x.conv3d(&cube(width, channels)).turned(&[1, channels, t, h, w])
    };
    let large = large.to(DType::F32);
    let _adapted = (large.same(), large.same(), large.same());
}

fn upsample_block(x: &Ghost) -> Ghost {
    let form = cube(x.dim(4), x.dim(4));
    let h = { x.conv3d(&form).group_norm() };
    let inner = h.conv3d(&form);
    let normed = inner.group_norm();
    let sum = normed.same();
    sum.activated()
}

struct Sizes {
    texts: Texts,
    /// Text tokens.
    tokens: usize,
    /// Width of the text encoder's output.
    text: usize,
    /// Whether every token has a timestep of its own.
    per_token: bool,
}

fn denoise(ledger: &Ledger, config: &TransformerConfig, latents: &[usize; 3], sizes: &Sizes, dtype: DType) {
    let (width, texts) = (config.inner(), sizes.texts);
    let state = ledger.wide(latents);
    let words = ledger.ghost(&[texts.count, sizes.tokens, sizes.text], dtype);
    let projected = words.linear(width).linear(width);
    drop(words);
    let _keys_and_values = ledger.ghost(&[2 * config.num_layers, texts.count, sizes.tokens, width], dtype);
    let _rope = ledger.wide(&[latents[1], width]);
    let input = if sizes.per_token { state.same() } else { state.clone() };
    let each = if sizes.per_token { latents[1] } else { 1 };
    texts.guided(latents, || {
        let input = texts.each(&input);
        let embedded = ledger.ghost(&[texts.batch, each, width], dtype);
        forward(config, &input.to(dtype), &embedded, &texts.at_once(&projected)).to(DType::F32)
    });
}

fn forward(config: &TransformerConfig, input: &Ghost, embedded: &Ghost, text: &Ghost) -> Ghost {
    let width = config.inner();
    let mut x = input.linear(width);
    let modulation = embedded.same().linear(6 * width);
    for _ in 0..config.num_layers.min(2) {
        x = block(config, &x, &modulation, text);
    }
    let values = embedded.linear(2 * width);
    let (shift, scale) = (values.turned(embedded.dims()), values.turned(embedded.dims()));
    let normed = modulated(&x, &shift, &scale);
    normed.linear(config.outputs())
}

/// A norm with a scale and a shift, which the CPU copies for its kernel.
fn modulated(x: &Ghost, shift: &Ghost, scale: &Ghost) -> Ghost {
    let _held = (scale.to(DType::F32).same(), shift.to(DType::F32).same());
    x.norm()
}

fn block(config: &TransformerConfig, x: &Ghost, modulation: &Ghost, text: &Ghost) -> Ghost {
    const FEED_FACTOR: usize = 4;
    let width = config.inner();
    let values = modulation.same();
    let part = || values.turned(&[values.dim(0), values.dim(1), width]);
    let normed = modulated(x, &part(), &part());
    let own = attend(config, &normed);
    let x = {
        let _gate = part();
        own.linear(width)
    };
    let x = attend_text(config, &x, text).linear(width);
    let normed = modulated(&x, &part(), &part());
    let _gate = part();
    normed.linear(FEED_FACTOR * width).linear(width)
}

fn attend(config: &TransformerConfig, x: &Ghost) -> Ghost {
    let width = config.inner();
    let query = x.linear(width).norm().rotated();
    let key = x.linear(width).norm().rotated();
    mix(config, &query, &key, &x.linear(width))
}

fn attend_text(config: &TransformerConfig, x: &Ghost, text: &Ghost) -> Ghost {
    let query = x.linear(config.inner()).norm();
    mix(config, &query, text, text)
}

fn mix(config: &TransformerConfig, query: &Ghost, key: &Ghost, value: &Ghost) -> Ghost {
    let heads =
        |x: &Ghost| x.view(&[x.dim(0), x.dim(1), config.num_attention_heads, config.attention_head_dim]);
    attention(&heads(query), &heads(key), &heads(value)).view(query.dims())
}

/// The decoder's way from denormalised latents, `(1, channels, time, height, width)`, to a video of the same order.
fn decode(config: &LtxVaeConfig, z: &Ghost, cut: Option<Cut>, film: &GhostFilm) {
    let decoder = &config.decoder;
    let [_, channels, t, h, w] = z.dims()[..] else { return };
    let mut x = z.turned(&[1, t, h, w, channels]).cube(decoder.width, 3);
    x = resnets(&x, decoder.layers, decoder.inject_noise);
    let whole = cut.map_or(decoder.blocks.len(), |cut| cut.first);
    for block in &decoder.blocks[..whole] {
        x = up(block, &x);
    }
    let Some(Cut { first, tile: [t, rows, columns], frames }) = cut else {
        return film.put(&finish(config, x));
    };
    let space = config.patch_size << decoder.blocks.iter().filter(|block| block.scale).count();
    film.fill_before(frames);
    // The frames that the tiles are put into, from the second tile on.
    let canvas = film.canvas(&[1, 3, frames, h * space, w * space]);
    let tile = x.turned(&[1, t, rows, columns, x.dim(4)]);
    let mut part = tile.clone();
    for block in &decoder.blocks[first..] {
        part = up(block, &part);
    }
    drop(finish(config, part).to(DType::F32));
    drop(tile);
    film.put(&canvas);
}

fn finish(config: &LtxVaeConfig, x: Ghost) -> Ghost {
    let normed = x.norm();
    drop(x);
    let (p, pt) = (config.patch_size, config.patch_size_t);
    let x = normed.cube(config.out_channels * p * p * pt, 3);
    x.turned(&[1, config.out_channels, x.dim(1) * pt, x.dim(2) * p, x.dim(3) * p])
}

fn up(config: &UpBlockConfig, x: &Ghost) -> Ghost {
    let mut x = if config.input == config.output { x.clone() } else { resnet(x, config.output, false) };
    if config.scale {
        let (grown, output) = ([2 * x.dim(1) - 1, 2 * x.dim(2), 2 * x.dim(3)], config.output);
        let cells = x.cube(output * 8, 3);
        x = cells.turned(&[1, grown[0], grown[1], grown[2], output]);
    }
    resnets(&x, config.layers, config.inject_noise)
}

fn resnets(x: &Ghost, layers: usize, noise: bool) -> Ghost {
    let mut x = x.clone();
    for _ in 0..layers {
        x = resnet(&x, x.dim(4), noise);
    }
    x
}

fn resnet(x: &Ghost, output: usize, noise: bool) -> Ghost {
    let shortcut = if x.dim(4) == output { x.clone() } else { x.norm().cube(output, 1) };
    let h = x.norm();
    if !noise {
        let h = h.cube(output, 3);
        return h.cube(shortcut.dim(4), 3);
    }
    let noised = |x: Ghost| {
        let _noise = x.turned(&[1, 1, x.dim(2), x.dim(3), x.dim(4)]);
        x.same()
    };
    let h = noised(h.cube(output, 3));
    let h = h.norm();
    noised(h.cube(output, 3))
}

/// The encoder's way from a video `(1, 3, frames, height, width)` to moments.
fn encode(config: &LtxVaeConfig, video: &Ghost) {
    let [_, channels, frames, height, width] = video.dims()[..] else { return };
    let (p, pt) = (config.patch_size, config.patch_size_t);
    let cells = video.turned(&[1, frames / pt, height / p, width / p, channels * p * p * pt]);
    let widths = &config.block_out_channels;
    let mut x = cells.cube(widths[0], 3);
    drop(cells);
    for (i, kind) in config.down_blocks.iter().enumerate() {
        let output = widths.get(i + 1).copied().unwrap_or(widths[i]);
        let scale = config.spatio_temporal_scaling[i].then_some(*kind);
        x = down(scale, &x, output, config.layers_per_block[i]);
    }
    x = resnets(&x, config.layers_per_block.last().copied().unwrap_or(0), false);
    let _moments = x.norm().cube(config.latent_channels + 1, 3);
}

fn down(kind: Option<DownBlock>, x: &Ghost, output: usize, layers: usize) -> Ghost {
    let mut x = resnets(x, layers, false);
    let half = |x: &Ghost| [x.dim(1).div_ceil(2), x.dim(2).div_ceil(2), x.dim(3).div_ceil(2)];
    x = match kind {
        None => x,
        Some(DownBlock::Strided | DownBlock::Folded(Downsample::Conv)) => x.conv(x.dim(4), [3; 3], half(&x)),
        Some(DownBlock::Folded(Downsample::Fold([st, sh, sw]))) => {
            let (t, cells) = (x.dim(1) + st - 1, st * sh * sw);
            let padded = if st > 1 { x.turned(&[1, t, x.dim(2), x.dim(3), x.dim(4)]) } else { x.clone() };
            let size = [1, t / st, x.dim(2) / sh, x.dim(3) / sw];
            let folded = |channels: usize| [&size[..], &[channels]].concat();
            let residual = x.turned(&folded(x.dim(4) * cells)).turned(&folded(output));
            let grown = padded.cube(output / cells, 3).turned(&folded(output));
            drop(residual);
            grown.same()
        }
    };
    let widens = kind == Some(DownBlock::Strided) && x.dim(4) != output;
    if widens { resnet(&x, output, false) } else { x }
}

//! What a run of CogVideoX holds in memory: its computation gone through without values.

use std::path::Path;

use candle_core::DType;

use super::IMAGE_CLASS;
use crate::error::Error;
use crate::folder::{WEIGHTS_STEM, open_weights, read_t5};
use crate::models::cogvideox::config::{TransformerConfig, VaeConfig};
use crate::models::cogvideox::facts::facts;
use crate::models::cogvideox::transformer::CogVideoXTransformer;
use crate::models::cogvideox::vae::{CogVideoXVae, DECODE_RUN, runs, square};
use crate::nn::conv3d::Conv3dConfig;
use crate::pipeline::{GenerateRequest, LoadOptions};
use crate::plan::guided::Texts;
use crate::plan::ledger::{Ghost, GhostCache, Ledger, attention, cat, each_run};
use crate::plan::text::t5;
use crate::plan::{Draft, GhostFilm, MemoryPlan, PlanOptions, PlanPhase, text_dtype};
use crate::registry::ModelIndex;

/// Residual blocks in the middle.
const MIDDLE: usize = 2;

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
    let (work, image) = (info.work, index.class == IMAGE_CLASS);
    let text = read_t5(&folder.join("text_encoder"))?;
    let config = TransformerConfig::read(&folder.join("transformer").join("config.json"))?;
    let vae_config = VaeConfig::read(&folder.join("vae").join("config.json"))?;
    let frames = (request.frames - 1) / work.temporal_ratio + 1;
    let (rows, columns) = (request.height / work.spatial_ratio, request.width / work.spatial_ratio);
    let cells = [frames.next_multiple_of(work.patch[0]), rows, columns];
    let latents = [1, cells[0], work.latent_channels, rows, columns];
    let (dtype, tokens) = (options.dtype, info.token_limit);
    let texts = Texts::new(request.is_guided(), request, options);

    let opened = LoadOptions::default();
    let mut draft = Draft::new(options, request);
    let encoder = draft.t5(&folder.join("text_encoder"), &text)?;
    draft.phase(PlanPhase::Text, &[encoder], |ledger| {
        let _start = ledger.wide(&latents);
        let each = || t5(ledger, &text, tokens, false, text_dtype(dtype));
        let _all: Vec<_> = (0..texts.count).map(|_| each()).collect();
    });
    let load = |vb| {
        if image { CogVideoXVae::load(&vae_config, vb) } else { CogVideoXVae::load_decoder(&vae_config, vb) }
    };
    let files = |part: &str| open_weights(&folder.join(part), WEIGHTS_STEM, &opened, dtype);
    let (vae, _) = draft.component("vae", dtype, files("vae"), load)?;
    if !request.conditions.is_empty() {
        draft.phase(PlanPhase::Conditions, &[vae], |ledger| {
            let _held = (ledger.wide(&latents), ledger.ghost(&[texts.count, tokens, text.d_model], dtype));
            let video = ledger.wide(&[1, 3, 1, request.height, request.width]).to(dtype);
            encode(&vae_config, &video);
            let _image = ledger.wide(&latents);
        });
    }
    let (transformer, _) = draft.component("transformer", dtype, files("transformer"), |vb| {
        CogVideoXTransformer::load(&config, &vb)
    })?;
    draft.phase(PlanPhase::Denoise, &[transformer], |ledger| {
        denoise(ledger, &config, &latents, (texts, [tokens, work.patch[0]]), dtype);
    });
    draft.phase(PlanPhase::Decode, &[vae], |ledger| {
        let volume = ledger.wide(&[1, work.latent_channels, frames, rows, columns]);
        let z = volume.same().to(dtype);
        decode(&vae_config, &z, request.decode.tile, &GhostFilm::new(ledger, request));
    });
    Ok(draft.finish(request))
}

fn denoise(
    ledger: &Ledger,
    config: &TransformerConfig,
    latents: &[usize; 5],
    (texts, [words, patch_t]): (Texts, [usize; 2]),
    dtype: DType,
) {
    let (width, p) = (config.inner(), config.patch_size);
    let [_, frames, channels, rows, columns] = *latents;
    let tokens = frames / patch_t * (rows / p) * (columns / p);
    let state = ledger.wide(latents);
    // What the samplers keep between steps, and what a step makes of it.
    let _memory = (state.same(), state.same());
    let text = ledger.ghost(&[texts.count, words, width], dtype);
    let _rotary = config
        .use_rotary_positional_embeddings
        .then(|| ledger.wide(&[words + tokens, config.attention_head_dim]));
    let is_added = !config.use_rotary_positional_embeddings || config.use_learned_positional_embeddings;
    let _added = is_added.then(|| ledger.ghost(&[words + tokens, width], dtype));
    let given = config.in_channels.max(channels);
    let image = given > channels;
    let _image = image.then(|| state.same());
    let input = if image { state.turned(&[1, frames, given, rows, columns]) } else { state.clone() };
    texts.guided(latents, || {
        let input = texts.each(&input);
        let wide = input.to(dtype);
        let packed = wide.turned(&[texts.batch, tokens, given * p * p * patch_t]);
        let mut video = packed.linear(width);
        drop((packed, wide));
        let mut words = texts.at_once(&text);
        if is_added {
            words = words.same();
            video = video.same();
        }
        let time = ledger.ghost(&[texts.batch, config.time_embed_dim], dtype);
        for _ in 0..config.num_layers.min(2) {
            (video, words) = block(config, &video, &words, &time);
        }
        let normed = video.norm();
        let out = { normed.norm() }.linear(config.outputs() * p * p * patch_t);
        let volume = out.turned(&[texts.batch, frames, channels, rows, columns]);
        volume.same().to(DType::F32)
    });
}

fn block(config: &TransformerConfig, video: &Ghost, text: &Ghost, time: &Ghost) -> (Ghost, Ghost) {
    const FEED_FACTOR: usize = 4;
    let before = |video: &Ghost, text: &Ghost| {
        let _values = time.linear(6 * config.inner());
        cat(&[&text.norm(), &video.norm()], 1)
    };
    let all = before(video, text);
    let mixed = attend(config, &all);
    let (video, text) = gated(&mixed, video, text);
    let all = before(&video, &text);
    let inner = all.linear(FEED_FACTOR * config.inner());
    gated(&inner, &video, &text)
}

fn gated(all: &Ghost, video: &Ghost, text: &Ghost) -> (Ghost, Ghost) {
    let part = |like: &Ghost| all.narrow(1, like.dim(1)).linear(like.dim(2));
    (part(video), part(text))
}

fn attend(config: &TransformerConfig, x: &Ghost) -> Ghost {
    let width = config.inner();
    let heads = [x.dim(0), x.dim(1), config.num_attention_heads, config.attention_head_dim];
    let turned = || {
        let normed = x.linear(width).view(&heads).norm();
        if config.use_rotary_positional_embeddings { normed.rotated() } else { normed }
    };
    let (query, key) = (turned(), turned());
    let value = x.linear(width).view(&heads);
    attention(&query, &key, &value).view(x.dims())
}

fn cube(output: usize) -> Conv3dConfig {
    Conv3dConfig::cube(1, output, 3, true)
}

/// From denormalised latents `(1, channels, time, height, width)` to a video of the same order.
fn decode(config: &VaeConfig, z: &Ghost, tile: Option<usize>, film: &GhostFilm) {
    let [_, _, t, h, w] = z.dims()[..] else { return };
    let ratio = config.spatial_ratio();
    let Some(cells) = square(tile, ratio).filter(|&cells| h > cells || w > cells) else {
        return decode_runs(config, z, |part| film.put(&part));
    };
    let (rows, columns) = (cells.min(h), cells.min(w));
    let part = z.narrow(3, rows).narrow(4, columns);
    let frames = (t - 1) * config.temporal_ratio() + 1;
    // Finished bands, the row above and this one; the last square's frames finish the video's.
    let _bands = z.turned(&[1, config.out_channels, frames, h.saturating_sub(rows) * ratio, w * ratio]);
    let row = || z.turned(&[1, config.out_channels, frames, rows * ratio, w * ratio]);
    let _squares = (row(), row());
    decode_runs(config, &part, |part| {
        film.put(&part.turned(&[1, config.out_channels, part.dim(2), h * ratio, w * ratio]));
    });
}

fn decode_runs(config: &VaeConfig, z: &Ghost, put: impl Fn(Ghost)) {
    let mut cache = GhostCache::default();
    let first = runs(z.dim(2), DECODE_RUN)[0].1;
    each_run(z.dim(2), (first, DECODE_RUN), |len, _| {
        cache.rewind();
        let run = z.turned(&[1, len, z.dim(3), z.dim(4), z.dim(1)]);
        let video = decoder(config, &run, &mut cache);
        put(video.turned(&[1, video.dim(4), video.dim(1), video.dim(2), video.dim(3)]));
    });
}

fn decoder(config: &VaeConfig, z: &Ghost, cache: &mut GhostCache) -> Ghost {
    let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
    let mut x = cache.conv(&cube(widths[0]), z);
    x = resnets(&x, widths[0], MIDDLE, Some(z), cache);
    for (i, &output) in widths.iter().enumerate() {
        x = resnets(&x, output, config.layers_per_block + 1, Some(z), cache);
        if i + 1 < widths.len() {
            let alone = x.dim(1) % 2 == 1;
            let frames = match (i < config.temporal_levels(), alone) {
                (false, _) => x.dim(1),
                (true, false) => 2 * x.dim(1),
                (true, true) => 2 * x.dim(1) - 1,
            };
            let size = [frames, 2 * x.dim(2), 2 * x.dim(3)];
            let repeated = x.turned(&[1, size[0], size[1], size[2], output]);
            x = repeated.conv(output, [1, 3, 3], size);
        }
    }
    let places = places(&x);
    let normed = guided(&x, Some(z));
    drop((x, places));
    cache.conv(&cube(config.out_channels), &normed)
}

/// Which latent cell each position reads.
fn places(x: &Ghost) -> Ghost {
    x.another(&x.dims()[..4], DType::U32)
}

fn guided(x: &Ghost, guide: Option<&Ghost>) -> Ghost {
    let _rows = guide.map(|z| (z.linear(x.dim(4)), z.linear(x.dim(4))));
    x.group_norm()
}

fn resnets(x: &Ghost, output: usize, layers: usize, guide: Option<&Ghost>, cache: &mut GhostCache) -> Ghost {
    let _places = guide.map(|_| x.another(&[x.dim(1), x.dim(2), x.dim(3)], DType::U32));
    let mut x = x.clone();
    for _ in 0..layers {
        x = resnet(&x, output, guide, cache);
    }
    x
}

fn resnet(x: &Ghost, output: usize, guide: Option<&Ghost>, cache: &mut GhostCache) -> Ghost {
    let h = {
        let normed = guided(x, guide);
        cache.conv(&cube(output), &normed)
    };
    let normed = guided(&h, guide);
    let _shortcut = if x.dim(4) == output { x.clone() } else { x.linear(output) };
    cache.conv(&cube(output), &normed)
}

/// From a video `(1, 3, frames, height, width)` to moments.
fn encode(config: &VaeConfig, video: &Ghost) {
    let mut cache = GhostCache::default();
    // A picture is one run.
    let run = video.turned(&[1, video.dim(2), video.dim(3), video.dim(4), video.dim(1)]);
    let all = encoder(config, &run, &mut cache).same();
    let _moments = (all.same(), all.same(), all.same());
}

fn encoder(config: &VaeConfig, x: &Ghost, cache: &mut GhostCache) -> Ghost {
    let widths = &config.block_out_channels;
    let mut x = cache.conv(&cube(widths[0]), x);
    for (i, &output) in widths.iter().enumerate() {
        x = resnets(&x, output, config.layers_per_block, None, cache);
        if i + 1 < widths.len() {
            let frames = if i < config.temporal_levels() { x.dim(1).div_ceil(2) } else { x.dim(1) };
            let shorter = x.turned(&[1, frames, x.dim(2), x.dim(3), output]);
            x = shorter.conv(output, [1, 3, 3], [frames, x.dim(2) / 2, x.dim(3) / 2]);
        }
    }
    let last = widths[widths.len() - 1];
    x = resnets(&x, last, MIDDLE, None, cache);
    let normed = x.group_norm();
    cache.conv(&cube(2 * config.latent_channels), &normed)
}

//! What a run of Wan holds in memory: its computation gone through without values.

use std::ops::Range;
use std::path::Path;

use candle_core::DType;

use super::{SECOND, WanSampler, boundary};
use crate::error::Error;
use crate::folder::{WEIGHTS_STEM, open_renamed, open_weights, read_t5};
use crate::models::wan::config::TransformerConfig;
use crate::models::wan::facts::{Form, facts, form};
use crate::models::wan::names::transformer_name;
use crate::models::wan::transformer::WanTransformer;
use crate::models::wan::vae::{WanVae, WanVaeConfig};
use crate::nn::conv3d::{Conv3dConfig, Edge, TimePad};
use crate::pipeline::{GenerateRequest, LoadOptions};
use crate::plan::guided::Texts;
use crate::plan::ledger::{Ghost, GhostCache, Ledger, attention, cat, each_run, in_runs};
use crate::plan::text::{t5, vision};
use crate::plan::{Draft, GhostFilm, MemoryPlan, PlanOptions, PlanPhase, text_dtype};
use crate::registry::ModelIndex;
use crate::tiling::{Cut, Tiling};
use crate::vision::{ClipVisionEncoder, open_vision, read_vision};

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
    let (form, work) = (form(folder, index)?, info.work);
    let text = read_t5(&folder.join("text_encoder"))?;
    let vae_config = WanVaeConfig::read(&folder.join("vae").join("config.json"))?;
    let config = |part: &str| TransformerConfig::read(&folder.join(part).join("config.json"));
    let frames = request.frames.saturating_sub(1) / work.temporal_ratio + 1;
    let cells = [frames, request.height / work.spatial_ratio, request.width / work.spatial_ratio];
    let texts = Texts::new(request.is_guided(), request, options);
    let (dtype, tokens) = (options.dtype, info.token_limit);
    let latents = [1, work.latent_channels, cells[0], cells[1], cells[2]];
    let given = request.conditions.len();

    let opened = LoadOptions::default();
    let mut draft = Draft::new(options, request);
    let encoder = draft.t5(&folder.join("text_encoder"), &text)?;
    draft.phase(PlanPhase::Text, &[encoder], |ledger| {
        let _start = ledger.wide(&latents);
        let each = || t5(ledger, &text, tokens, true, text_dtype(dtype)).same();
        let _all: Vec<_> = (0..texts.count).map(|_| each()).collect();
    });
    if form == Form::Clip {
        let (seen, _) = read_vision(folder)?;
        let load = |vb| ClipVisionEncoder::load(&seen, &vb);
        let (eye, _) = draft.component("image encoder", DType::F32, open_vision(folder, &opened), load)?;
        draft.phase(PlanPhase::Conditions, &[eye], |ledger| {
            let _held = (ledger.wide(&latents), ledger.ghost(&[texts.count, tokens, text.d_model], dtype));
            vision(ledger, &seen, given.max(1));
        });
    }
    let encodes = form != Form::Text;
    let load =
        |vb| if encodes { WanVae::load(&vae_config, vb) } else { WanVae::load_decoder(&vae_config, vb) };
    let files = open_weights(&folder.join("vae"), WEIGHTS_STEM, &opened, DType::F32);
    let (vae, decoder) = draft.component("vae", DType::F32, files, load)?;
    if given > 0 {
        draft.phase(PlanPhase::Conditions, &[vae], |ledger| {
            let _held = (ledger.wide(&latents), ledger.ghost(&[texts.count, tokens, text.d_model], dtype));
            let frames = if form == Form::First { 1 } else { request.frames };
            let picture = ledger.wide(&[1, 3, 1, request.height, request.width]);
            let mut video = picture.clone();
            if form != Form::First {
                video = picture.turned(&[1, 3, frames, request.height, request.width]);
            }
            if given > 1 {
                video = video.same();
            }
            encode(&vae_config, &video);
        });
    }
    let run = Run { cells, patch: work.patch, tokens, texts, given, form };
    let mut transformers = vec![("transformer", "transformer", config("transformer")?)];
    if boundary(folder, index, WanSampler::load(folder)?.train_timesteps())?.is_some() {
        transformers.push(("transformer 2", SECOND, config(SECOND)?));
    }
    for (name, part, config) in &transformers {
        let files = open_renamed(&folder.join(part), WEIGHTS_STEM, &opened, dtype, &transformer_name);
        let (part, _) = draft.component(name, dtype, files, |vb| WanTransformer::load(config, &vb))?;
        draft.phase(PlanPhase::Denoise, &[part], |ledger| {
            denoise(ledger, config, &latents, &run, transformers.len(), dtype);
        });
    }
    let tiling = Tiling { tile: request.decode.tile, chunk: request.decode.chunk };
    draft.phase(PlanPhase::Decode, &[vae], |ledger| {
        let volume = ledger.wide(&latents);
        let z = volume.same().same();
        let cut = decoder.cut(tiling, cells);
        let x = z.turned(&[1, cells[0], cells[1], cells[2], work.latent_channels]);
        let x = x.conv3d(&point(work.latent_channels));
        decode(&vae_config, &x, (tiling, cut), &GhostFilm::new(ledger, request));
    });
    Ok(draft.finish(request))
}

struct Run {
    cells: [usize; 3],
    patch: [usize; 3],
    /// Text tokens.
    tokens: usize,
    texts: Texts,
    /// Pictures.
    given: usize,
    form: Form,
}

fn denoise(
    ledger: &Ledger,
    config: &TransformerConfig,
    latents: &[usize; 5],
    run: &Run,
    transformers: usize,
    dtype: DType,
) {
    let width = config.inner();
    let grid: [usize; 3] = std::array::from_fn(|axis| run.cells[axis] / run.patch[axis]);
    let tokens = grid.iter().product::<usize>();
    let state = ledger.wide(latents);
    // What a sampler of several steps remembers.
    let _memory = ledger.wide(&[2, latents[1], latents[2], latents[3], latents[4]]);
    let texts = run.texts;
    let read = transformers * texts.count;
    let _projected = ledger.ghost(&[read, run.tokens, width], dtype);
    let _keys_and_values = ledger.ghost(&[2 * read * config.num_layers, run.tokens, width], dtype);
    let text = ledger.ghost(&[texts.batch, run.tokens, width], dtype);
    let seen = config.pos_embed_seq_len.or(config.image_dim.map(|_| run.tokens)).unwrap_or(0);
    let _seen = ledger.ghost(&[2 * read * config.num_layers, seen, width], dtype);
    let _rope = ledger.wide(&[tokens, config.attention_head_dim]);
    let mut channels = latents[1];
    if run.given > 0 && run.form != Form::First {
        channels = config.in_channels;
    }
    let volume = [1, channels, latents[2], latents[3], latents[4]];
    let _pictures = ledger.wide(&[1, channels - latents[1], latents[2], latents[3], latents[4]]);
    let input = if run.given > 0 { state.turned(&volume) } else { state.clone() };
    let packed = input.turned(&[1, tokens, channels * run.patch.iter().product::<usize>()]);
    drop(input);
    let each = if run.given > 0 && run.form == Form::First { tokens } else { 1 };
    texts.guided(latents, || {
        let out = forward(config, &texts.each(&packed), each, &text, dtype).to(DType::F32);
        out.turned(&[texts.batch, latents[1], latents[2], latents[3], latents[4]])
    });
}

fn forward(config: &TransformerConfig, latents: &Ghost, each: usize, text: &Ghost, dtype: DType) -> Ghost {
    let width = config.inner();
    let mut x = latents.to(dtype).linear(width);
    let embedded = x.turned(&[x.dim(0), each, width]);
    let modulation = embedded.linear(6 * width).to(DType::F32);
    for _ in 0..config.num_layers.min(2) {
        x = block(config, &x, &modulation, text, dtype);
    }
    let values = embedded.to(DType::F32).linear(2 * width).to(dtype);
    let (shift, scale) = (values.turned(embedded.dims()), values.turned(embedded.dims()));
    modulated(&x, &shift, &scale).linear(config.outputs() * config.cells())
}

/// A norm with a scale and a shift, which the CPU copies for its kernel.
fn modulated(x: &Ghost, shift: &Ghost, scale: &Ghost) -> Ghost {
    let _held = (scale.to(DType::F32).same(), shift.to(DType::F32).same());
    x.norm()
}

fn block(config: &TransformerConfig, x: &Ghost, modulation: &Ghost, text: &Ghost, dtype: DType) -> Ghost {
    let width = config.inner();
    let values = modulation.same().to(dtype);
    let part = || values.turned(&[values.dim(0), values.dim(1), width]);
    let own = attend(config, &modulated(x, &part(), &part()));
    let x = {
        let _gate = part();
        own.linear(width)
    };
    let asking = if config.cross_attn_norm { x.norm() } else { x.clone() };
    let x = attend_text(config, &asking, text).linear(width);
    let inner = modulated(&x, &part(), &part()).linear(config.ffn_dim);
    let _gate = part();
    inner.linear(width)
}

fn attend(config: &TransformerConfig, x: &Ghost) -> Ghost {
    let width = config.inner();
    let query = x.linear(width).norm();
    let key = x.linear(width).norm();
    let (turned_query, turned_key) = (split(config, &query).rotated(), split(config, &key).rotated());
    attention(&turned_query, &turned_key, &split(config, &x.linear(width))).view(x.dims())
}

fn attend_text(config: &TransformerConfig, x: &Ghost, text: &Ghost) -> Ghost {
    let query = x.linear(config.inner()).norm();
    let text = split(config, text);
    let words = attention(&split(config, &query), &text, &text);
    if config.added_kv_proj_dim.is_none() {
        return words.view(x.dims());
    }
    let _pictures = attention(&split(config, &query), &text, &text);
    words.same().view(x.dims())
}

fn split(config: &TransformerConfig, x: &Ghost) -> Ghost {
    x.view(&[x.dim(0), x.dim(1), config.num_attention_heads, config.attention_head_dim])
}

/// A causal convolution.
fn causal(output: usize, kernel: [usize; 3]) -> Conv3dConfig {
    let time = TimePad::Causal(Edge::Zeros);
    Conv3dConfig { kernel, time, ..Conv3dConfig::cube(1, output, 3, true) }
}

fn point(output: usize) -> Conv3dConfig {
    causal(output, [1; 3])
}

fn cube(output: usize) -> Conv3dConfig {
    causal(output, [3; 3])
}

/// The decoder's way from latents, channels last, to a video `(1, 3, frames, height, width)`.
fn decode(config: &WanVaeConfig, z: &Ghost, (tiling, cut): (Tiling, Option<Cut>), film: &GhostFilm) {
    let widths = config.decoder_widths();
    let x = {
        let mut cache = GhostCache::default();
        middle(&z.conv3d(&cube(widths[0])), &mut cache)
    };
    let run = (tiling.chunk.unwrap_or(0) / config.temporal_ratio()).max(1);
    let Some(Cut { first, tile: [t, h, w], frames }) = cut else {
        return decode_run(config, &x, 0, run, |part| film.put(&part));
    };
    let x = if first == 0 {
        x
    } else {
        let mut cache = GhostCache::default();
        in_runs(x.dim(1), (run, run), 1, |len, _| go_levels(config, &x, (0..first, len), &mut cache))
    };
    let grown = config.temperal_downsample.iter().rev().take(first).filter(|&&doubles| doubles).count();
    let space = config.spatial_ratio();
    let canvas = film.canvas(&[1, 3, frames, z.dim(2) * space, z.dim(3) * space]);
    let tile = x.turned(&[1, t, h, w, x.dim(4)]);
    // What the last tile finishes leaves the canvas.
    decode_run(config, &tile, first, run << grown, |part| {
        let few = [1, 3, part.dim(2), canvas.dim(3), canvas.dim(4)];
        film.put(&film.canvas(&few));
    });
}

/// Levels from one on to the end, in runs of frames that are handed on.
fn decode_run(config: &WanVaeConfig, x: &Ghost, first: usize, run: usize, put: impl Fn(Ghost)) {
    let mut cache = GhostCache::default();
    each_run(x.dim(1), (run, run), |len, _| {
        let part = go_levels(config, x, (first..config.dim_mult.len(), len), &mut cache);
        let normed = part.norm();
        drop(part);
        let pixels = cache.conv(&cube(config.out_channels), &normed);
        let p = config.patch();
        let size = [1, config.out_channels / (p * p), pixels.dim(1), pixels.dim(2) * p, pixels.dim(3) * p];
        let raw = pixels.turned(&size);
        drop(pixels);
        let raised = raw.same();
        drop(raw);
        put(raised.same());
    });
}

/// Some levels of the next run.
fn go_levels(
    config: &WanVaeConfig,
    x: &Ghost,
    (levels, len): (Range<usize>, usize),
    cache: &mut GhostCache,
) -> Ghost {
    cache.rewind();
    let mut part = x.narrow(1, len).solid();
    for index in levels {
        part = level(config, index, &part, cache);
    }
    part
}

fn level(config: &WanVaeConfig, index: usize, before: &Ghost, cache: &mut GhostCache) -> Ghost {
    let output = config.decoder_widths()[index + 1];
    let mut x = before.clone();
    for _ in 0..=config.num_res_blocks {
        x = residual(&x, output, cache);
    }
    let Some(&doubles) = config.temperal_downsample.iter().rev().nth(index) else { return x };
    let shortcut = config.is_residual.then(|| {
        let is_first = cache.place().replace(before.turned(&[1])).is_none();
        let times = if doubles { 2 } else { 1 };
        let cells = 4 * times;
        let copies = before.turned(&[1, before.dim(1), before.dim(2), before.dim(3), output * cells]);
        let frames = before.dim(1) * times - if is_first { times - 1 } else { 0 };
        copies.turned(&[1, frames, before.dim(2) * 2, before.dim(3) * 2, output])
    });
    let narrow = if config.is_residual { output } else { output / 2 };
    let x = if doubles { grow_time(&x, cache) } else { x };
    let repeated = x.turned(&[1, x.dim(1), 2 * x.dim(2), 2 * x.dim(3), x.dim(4)]);
    let out = repeated.conv3d(&causal(narrow, [1, 3, 3]));
    drop(shortcut);
    out
}

fn grow_time(x: &Ghost, cache: &mut GhostCache) -> Ghost {
    let [_, frames, h, w, channels] = x.dims()[..] else { return x.clone() };
    let double = |x: &Ghost, cache: &mut GhostCache| {
        let twice = cache.conv(&causal(2 * channels, [3, 1, 1]), x);
        twice.turned(&[1, 2 * x.dim(1), h, w, channels])
    };
    let is_first = cache.place().replace(x.turned(&[1])).is_none();
    if !is_first {
        return double(x, cache);
    }
    if frames == 1 {
        cache.place();
        return x.clone();
    }
    let rest = x.narrow(1, frames - 1);
    cat(&[&x.narrow(1, 1), &double(&rest, cache)], 1)
}

fn residual(x: &Ghost, output: usize, cache: &mut GhostCache) -> Ghost {
    let normed = x.norm();
    let inner = cache.conv(&cube(output), &normed);
    drop(normed);
    let _shortcut = if x.dim(4) == output { x.clone() } else { x.conv3d(&point(output)) };
    cache.conv(&cube(output), &inner)
}

fn middle(x: &Ghost, cache: &mut GhostCache) -> Ghost {
    let width = x.dim(4);
    let x = residual(x, width, cache);
    let attended = {
        let tokens = x.view(&[x.dim(1), x.dim(2) * x.dim(3), width]);
        let normed = tokens.norm();
        let part = || normed.linear(width).view(&[tokens.dim(0), tokens.dim(1), 1, width]);
        let (query, key, value) = (part(), part(), part());
        let mixed = attention(&query, &key, &value);
        mixed.view(tokens.dims()).linear(width).view(x.dims())
    };
    residual(&attended, width, cache)
}

/// The encoder's way from a video `(1, 3, frames, height, width)` to latents.
fn encode(config: &WanVaeConfig, video: &Ghost) {
    let [_, channels, frames, height, width] = video.dims()[..] else { return };
    let (p, run) = (config.patch(), config.temporal_ratio());
    let x = video.turned(&[1, frames, height / p, width / p, channels * p * p]);
    let mut cache = GhostCache::default();
    let all = in_runs(frames, (1, run), 1, |len, _| {
        cache.rewind();
        encode_run(config, &x.narrow(1, len), &mut cache)
    });
    let _moments = all.same().same();
}

fn encode_run(config: &WanVaeConfig, x: &Ghost, cache: &mut GhostCache) -> Ghost {
    let widths = config.encoder_widths();
    let mut x = cache.conv(&cube(widths[0]), x);
    for (index, pair) in widths.windows(2).enumerate() {
        let halves = config.temperal_downsample.get(index).copied();
        let fold = config.is_residual.then(|| {
            let divide = |by: usize, n: usize| n.div_ceil(by);
            let time = if halves == Some(true) { 2 } else { 1 };
            let space = if halves.is_some() { 2 } else { 1 };
            let padded = if x.dim(1).is_multiple_of(time) { x.clone() } else { x.same() };
            let size = [1, divide(time, x.dim(1)), divide(space, x.dim(2)), divide(space, x.dim(3)), pair[1]];
            padded.same().turned(&size)
        });
        for _ in 0..config.num_res_blocks {
            x = residual(&x, pair[1], cache);
        }
        if let Some(time) = halves {
            x = shrink(&x, time, cache);
        }
        if fold.is_some() {
            x = x.same();
        }
    }
    x = middle(&x, cache);
    let normed = x.norm();
    cache.conv(&cube(2 * config.z_dim), &normed)
}

fn shrink(x: &Ghost, time: bool, cache: &mut GhostCache) -> Ghost {
    let width = x.dim(4);
    let x = x.conv(width, [1, 3, 3], [x.dim(1), x.dim(2) / 2, x.dim(3) / 2]);
    if !time {
        return x;
    }
    let few = [1, 1, x.dim(2), x.dim(3), width];
    let last = x.turned(&few);
    match cache.place().replace(last) {
        Some(before) => {
            let both = cat(&[&before, &x], 1);
            both.conv(width, [3, 1, 1], [x.dim(1) / 2, x.dim(2), x.dim(3)])
        }
        None if x.dim(1) == 1 => x,
        None => {
            let rest = x.conv(width, [3, 1, 1], [(x.dim(1) - 1) / 2, x.dim(2), x.dim(3)]);
            cat(&[&x.narrow(1, 1), &rest], 1)
        }
    }
}

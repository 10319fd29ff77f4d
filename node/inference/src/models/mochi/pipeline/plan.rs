//! What a run of Mochi holds in memory: its computation gone through without values.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::error::Error;
use crate::folder::{WEIGHTS_STEM, open_weights, read_t5};
use crate::models::mochi::config::TransformerConfig;
use crate::models::mochi::facts::facts;
use crate::models::mochi::transformer::MochiTransformer;
use crate::models::mochi::vae::{MochiVae, MochiVaeConfig};
use crate::nn::conv3d::Conv3dConfig;
use crate::pipeline::latents::Volume;
use crate::pipeline::{GenerateRequest, LoadOptions};
use crate::plan::guided::Texts;
use crate::plan::ledger::{Ghost, GhostCache, Ledger, attention, cat, each_run};
use crate::plan::text::t5;
use crate::plan::{Draft, GhostFilm, MemoryPlan, PlanOptions, PlanPhase, text_dtype};
use crate::registry::ModelIndex;
use crate::tiling::blend::BlendPlan;

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
    let text = read_t5(&folder.join("text_encoder"))?;
    let config = TransformerConfig::read(&folder.join("transformer").join("config.json"))?;
    let vae_config = MochiVaeConfig::read(&folder.join("vae").join("config.json"))?;
    let volume = Volume::new(&info.work, request);
    let (dtype, tokens) = (options.dtype, info.token_limit);
    let texts = Texts::new(request.is_guided(), request, options);
    let latents = volume.packed_shape();

    let opened = LoadOptions::default();
    let mut draft = Draft::new(options, request);
    let files = |part: &str| open_weights(&folder.join(part), WEIGHTS_STEM, &opened, dtype);
    let (transformer, _) = draft
        .component("transformer", dtype, files("transformer"), |vb| MochiTransformer::load(&config, &vb))?;
    let encoder = draft.t5(&folder.join("text_encoder"), &text)?;
    let (vae, decoder) =
        draft.component("vae", dtype, files("vae"), |vb| MochiVae::load_decoder(&vae_config, &vb))?;
    draft.phase(PlanPhase::Text, &[encoder], |ledger| {
        let _start = ledger.wide(&latents);
        let each = || t5(ledger, &text, tokens, true, text_dtype(dtype));
        let _all: Vec<_> = (0..texts.count).map(|_| each()).collect();
    });
    draft.phase(PlanPhase::Denoise, &[transformer], |ledger| {
        denoise(ledger, &config, &latents, (texts, [tokens, text.d_model]), dtype);
    });
    let z = Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(volume.shape())?;
    let run = decoder.frames_at_once(&z, request.decode.chunk)?;
    draft.phase(PlanPhase::Decode, &[vae], |ledger| {
        let state = ledger.wide(&volume.shape());
        let z = state.same().same().to(dtype);
        decode(&vae_config, &z, (request.decode.tile, run), &GhostFilm::new(ledger, request));
    });
    Ok(draft.finish(request))
}

fn denoise(
    ledger: &Ledger,
    config: &TransformerConfig,
    latents: &[usize],
    (texts, [words, text_width]): (Texts, [usize; 2]),
    dtype: DType,
) {
    let (width, tokens) = (config.inner(), latents[1]);
    let state = ledger.wide(latents);
    let text = ledger.ghost(&[texts.count, words, text_width], dtype);
    {
        // The pooled text.
        let both = ledger.ghost(&[texts.batch, words + 1, text_width], dtype);
        let _mixed = both.linear(2 * text_width).same();
    }
    let tokens_of_text = text.linear(config.pooled_projection_dim);
    drop(text);
    let heads = config.num_attention_heads;
    let _rope = {
        let angles = ledger.wide(&[tokens * heads, config.attention_head_dim / 2]);
        (angles.same(), angles.same())
    };
    texts.guided(latents, || {
        let input = texts.each(&state);
        let mut video = input.to(dtype).linear(width);
        let mut read = texts.at_once(&tokens_of_text);
        for _ in 0..config.num_layers.min(2) {
            (video, read) = block(config, &video, &read);
        }
        let out = { video.norm() }.linear(config.patch_size * config.patch_size * config.outputs());
        out.to(DType::F32)
    });
}

fn block(config: &TransformerConfig, video: &Ghost, words: &Ghost) -> (Ghost, Ghost) {
    let normed = video.norm();
    let (attended, answered) = {
        let read = words.norm();
        attend(config, &normed, &read)
    };
    let words = absorb(words, &answered);
    (absorb(video, &attended), words)
}

fn absorb(x: &Ghost, attended: &Ghost) -> Ghost {
    let x = {
        let _normed = attended.norm();
        x.same()
    };
    let inner = {
        let normed = x.norm();
        normed.linear(2 * TransformerConfig::feed_forward(x.dim(2))).gated_half()
    };
    let fed = inner.linear(x.dim(2));
    let _normed = fed.norm();
    x.same()
}

fn attend(config: &TransformerConfig, video: &Ghost, words: &Ghost) -> (Ghost, Ghost) {
    let (heads, head, width) = (config.num_attention_heads, config.attention_head_dim, config.inner());
    let parts = |x: &Ghost| {
        let split = |x: Ghost| x.view(&[x.dim(0), x.dim(1), heads, head]);
        let query = split(x.linear(width)).norm();
        let key = split(x.linear(width)).norm();
        [query, key, split(x.linear(width))]
    };
    let [query, key, value] = parts(video);
    let seen = [query.rotated(), key.rotated(), value];
    let read = parts(words);
    let (mut videos, mut answers) = (Vec::new(), Vec::new());
    for _ in 0..video.dim(0) {
        let one = |x: &Ghost| x.view(&[1, x.dim(1), heads, head]);
        let joined: Vec<_> =
            seen.iter().zip(&read).map(|(seen, read)| cat(&[&one(seen), &one(read)], 1)).collect();
        let mixed = attention(&joined[0], &joined[1], &joined[2]);
        let mixed = mixed.view(&[1, mixed.dim(1), width]);
        answers.push(mixed.turned(&[1, words.dim(1), width]));
        videos.push(mixed.narrow(1, video.dim(1)));
    }
    let joined = |all: &[Ghost]| cat(&all.iter().collect::<Vec<_>>(), 0);
    let answer = { joined(&answers) }.linear(words.dim(2));
    let attended = { joined(&videos) }.linear(width);
    (attended, answer)
}

fn cube(output: usize) -> Conv3dConfig {
    Conv3dConfig::cube(1, output, 3, true)
}

/// From denormalised latents `(1, channels, time, height, width)` to a video of the same order.
fn decode(config: &MochiVaeConfig, z: &Ghost, (tile, run): (Option<usize>, usize), film: &GhostFilm) {
    let [_, _, t, h, w] = z.dims()[..] else { return };
    let (time, space) = (config.temporal_ratio(), config.spatial_ratio());
    let plan = tile.map(|pixels| BlendPlan::new(pixels, space, [h, w])).filter(|plan| plan.tiles() > 1);
    let Some(plan) = plan else { return decode_runs(config, z, run, |part| film.put(&part)) };
    let canvas = film.canvas(&[1, config.out_channels, (t - 1) * time + 1, h * space, w * space]);
    let [rows, columns] = plan.tile();
    let part = z.turned(&[1, z.dim(1), t, rows, columns]);
    decode_runs(config, &part, run, |part| {
        film.put(&film.canvas(&[1, 3, part.dim(2), canvas.dim(3), canvas.dim(4)]));
    });
}

fn decode_runs(config: &MochiVaeConfig, z: &Ghost, run: usize, put: impl Fn(Ghost)) {
    let frames = z.dim(2);
    let cut = |video: &Ghost| {
        let mut dims = video.dims().to_vec();
        dims[2] -= config.temporal_ratio() - 1;
        video.turned(&dims)
    };
    if run >= frames {
        return put(cut(&forward(config, z, None)));
    }
    let mut cache = GhostCache::default();
    each_run(frames, (run, run), |len, is_first| {
        cache.rewind();
        let part = forward(config, &z.narrow(2, len), Some(&mut cache));
        put(if is_first { cut(&part) } else { part });
    });
}

fn forward(config: &MochiVaeConfig, z: &Ghost, mut cache: Option<&mut GhostCache>) -> Ghost {
    let widths = &config.decoder_block_out_channels;
    let layers = &config.layers_per_block;
    let (finest, coarsest) = (widths[0], widths[widths.len() - 1]);
    let [_, channels, t, h, w] = z.dims()[..] else { return z.clone() };
    let mut x = { z.turned(&[1, t, h, w, channels]) }.cube(coarsest, 1);
    x = resnets(&x, layers[layers.len() - 1], cache.as_deref_mut());
    for level in (1..widths.len()).rev() {
        let (time, space) = (config.temporal_expansions[level - 1], config.spatial_expansions[level - 1]);
        x = {
            let x = resnets(&x, layers[level], cache.as_deref_mut());
            let grown = x.linear(widths[level - 1] * time * space * space);
            let size = [1, x.dim(1) * time, x.dim(2) * space, x.dim(3) * space, widths[level - 1]];
            grown.turned(&size)
        };
    }
    x = resnets(&x, layers[0], cache);
    debug_assert_eq!(x.dim(4), finest, "invariant: the last width is the finest");
    let active = x.activated();
    let out = active.linear(config.out_channels);
    out.turned(&[1, config.out_channels, x.dim(1), x.dim(2), x.dim(3)])
}

fn resnets(x: &Ghost, layers: usize, mut cache: Option<&mut GhostCache>) -> Ghost {
    let width = x.dim(4);
    let mut x = x.clone();
    for _ in 0..layers {
        let mut conv = |x: &Ghost| match cache.as_deref_mut() {
            Some(cache) => cache.conv(&cube(width), x),
            None => x.cube(width, 3),
        };
        x = {
            let normed = x.group_norm();
            let inner = conv(&normed);
            let renormed = inner.group_norm();
            conv(&renormed)
        };
    }
    x
}

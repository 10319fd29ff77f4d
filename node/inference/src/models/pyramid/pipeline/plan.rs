//! What a run of Pyramid Flow holds in memory: its computation gone through without values.
//!
//! Of the steps the last unit's at full size counts, which sees most.

use std::path::Path;

use candle_core::DType;

use super::parts::is_guided;
use super::{OwnExtras, Usual, VAE_FOLDER, read_clip, transformer_folder};
use crate::error::Error;
use crate::folder::{TEXT_STEM, WEIGHTS_STEM, open_weights, read_t5};
use crate::models::pyramid::config::{PATCH, TransformerConfig};
use crate::models::pyramid::facts::facts;
use crate::models::pyramid::transformer::PyramidTransformer;
use crate::models::pyramid::vae::{PyramidVae, PyramidVaeConfig};
use crate::nn::conv3d::{Conv3dConfig, Edge, TimePad};
use crate::pipeline::{DecodeOptions, GenerateRequest, LoadOptions};
use crate::plan::guided::Texts;
use crate::plan::ledger::{Ghost, GhostCache, Ledger, attention, cat, each_run};
use crate::plan::text::{clip_text, t5};
use crate::plan::{Draft, GhostFilm, MemoryPlan, PlanOptions, PlanPhase, text_dtype};
use crate::text::ClipTextEncoder;
use crate::tiling::blend::BlendPlan;

/// The plan of a request.
///
/// # Errors
/// See [`crate::registry::plan`].
pub(crate) fn plan(
    folder: &Path,
    request: &GenerateRequest,
    options: &PlanOptions,
) -> Result<MemoryPlan, Error> {
    let info = facts(folder)?.info;
    let (own, work) = (OwnExtras::read(folder)?, info.work);
    let part = transformer_folder(folder, own.transformer.as_deref())?;
    let config = TransformerConfig::read(&part.join("config.json"))?;
    let variant = config.variant;
    let (settings, _) = own.settle(folder, &Usual::of(variant, &part))?;
    let vae_config = PyramidVaeConfig::read(&folder.join(VAE_FOLDER).join("config.json"))?;
    let text = read_t5(&folder.join(variant.t5().encoder))?;
    let clips = variant.clips().iter().map(|parts| read_clip(&folder.join(parts.encoder)));
    let clips = clips.collect::<Result<Vec<_>, Error>>()?;
    let frames = request.frames.saturating_sub(1) / work.temporal_ratio + 1;
    let cells = [frames, request.height / work.spatial_ratio, request.width / work.spatial_ratio];
    let stages = settings.scheduler.stage_range.len() - 1;
    let texts = Texts::new(is_guided(request), request, options);
    let (dtype, tokens) = (options.dtype, info.token_limit);
    let volume = [1, work.latent_channels, cells[0], cells[1], cells[2]];

    let opened = LoadOptions::default();
    let mut draft = Draft::new(options, request);
    let files = |part: &Path| open_weights(part, WEIGHTS_STEM, &opened, dtype);
    let encoder = draft.t5(&folder.join(variant.t5().encoder), &text)?;
    let load = if variant.projects() { ClipTextEncoder::load_projected } else { ClipTextEncoder::load };
    let mut encoders = vec![encoder];
    for (clip, parts) in clips.iter().zip(variant.clips()) {
        let files = open_weights(&folder.join(parts.encoder), TEXT_STEM, &opened, dtype);
        encoders.push(draft.text_component("clip text encoder", dtype, files, |vb| load(clip, &vb))?.0);
    }
    let (transformer, _) =
        draft.component("transformer", dtype, files(&part), |vb| PyramidTransformer::load(&config, &vb))?;
    let (vae, decoder) = draft
        .component("vae", dtype, files(&folder.join(VAE_FOLDER)), |vb| PyramidVae::load(&vae_config, &vb))?;
    draft.phase(PlanPhase::Text, &encoders, |ledger| {
        let _start = ledger.wide(&volume);
        let each = || {
            let embeds = t5(ledger, &text, tokens, true, text_dtype(dtype));
            for clip in &clips {
                clip_text(ledger, clip, clip.max_position_embeddings, dtype);
            }
            embeds
        };
        let _all: Vec<_> = (0..texts.count).map(|_| each()).collect();
    });
    if !request.conditions.is_empty() {
        draft.phase(PlanPhase::Conditions, &[vae], |ledger| {
            let _held = (ledger.wide(&volume), ledger.ghost(&[texts.count, tokens, text.d_model], dtype));
            encode(&vae_config, &ledger.wide(&[1, 1, request.height, request.width, 3]).to(dtype));
        });
    }
    draft.phase(PlanPhase::Denoise, &[transformer], |ledger| {
        let seen = Seen::new(cells, stages, settings.frames_per_unit);
        denoise(ledger, &config, (&seen, volume), (texts, tokens), dtype);
    });
    draft.phase(PlanPhase::Decode, &[vae], |ledger| {
        let state = ledger.wide(&volume);
        let z = state.same().to(dtype);
        let decode = Decode { config: &vae_config, vae: &decoder, options: request.decode };
        decode.go(&z, &GhostFilm::new(ledger, request));
    });
    Ok(draft.finish(request))
}

/// The frames that the last unit sees, each with its rows and columns of cells, its own last.
struct Seen {
    frames: Vec<[usize; 2]>,
    own: usize,
}

impl Seen {
    fn new([frames, rows, columns]: [usize; 3], stages: usize, frames_per_unit: usize) -> Self {
        let units = 1 + (frames - 1).div_ceil(frames_per_unit);
        let own = if units == 1 { 1 } else { frames_per_unit };
        let mut end = frames.saturating_sub(own);
        let (mut size, mut seen) = (stages - 1, Vec::new());
        for back in 0..units - 1 {
            let all_left = back > 0 && size == 0;
            let length = if all_left { end } else { frames_per_unit.min(end) };
            let factor = 1 << (stages - 1 - size);
            seen.extend(std::iter::repeat_n([rows / factor, columns / factor], length));
            end -= length;
            if end == 0 {
                break;
            }
            size = size.saturating_sub(1);
        }
        seen.reverse();
        seen.extend(std::iter::repeat_n([rows, columns], own));
        Self { frames: seen, own }
    }

    /// Tokens of each frame.
    fn tokens(&self) -> Vec<usize> {
        self.frames.iter().map(|[rows, columns]| rows / PATCH * (columns / PATCH)).collect()
    }
}

fn denoise(
    ledger: &Ledger,
    config: &TransformerConfig,
    (seen, volume): (&Seen, [usize; 5]),
    (texts, words): (Texts, usize),
    dtype: DType,
) {
    let frames = seen.tokens();
    let (width, tokens) = (config.inner(), frames.iter().sum::<usize>());
    let own: usize = frames[frames.len() - seen.own..].iter().sum();
    let [_, channels, all, rows, columns] = volume;
    let _finished = ledger.wide(&[1, channels, all.saturating_sub(seen.own), rows, columns]);
    let state = ledger.wide(&[1, own, config.token_channels()]);
    let context = ledger.ghost(&[texts.count, words, config.joint_attention_dim], dtype);
    let text = context.linear(width);
    drop(context);
    let before = ledger.wide(&[1, tokens - own, config.token_channels()]);
    texts.guided(state.dims(), || {
        let _clips = (texts.each(&before), texts.each(&state));
        forward(ledger, config, texts.at_once(&text), (&frames, seen.own), dtype).to(DType::F32)
    });
}

fn forward(
    ledger: &Ledger,
    config: &TransformerConfig,
    mut text: Ghost,
    (frames, own): (&[usize], usize),
    dtype: DType,
) -> Ghost {
    let (width, tokens) = (config.inner(), frames.iter().sum::<usize>());
    let (batch, words) = (text.dim(0), text.dim(1));
    let pairs = config.axes.iter().sum::<usize>() / 2;
    let all = words + tokens;
    let heads = config.num_attention_heads;
    let _rope = {
        let tables = (ledger.wide(&[all, pairs]), ledger.wide(&[all, pairs]));
        let spread = (ledger.wide(&[all * heads, pairs]), ledger.wide(&[all * heads, pairs]));
        drop(tables);
        spread
    };
    let mut x = {
        let packed = ledger.wide(&[batch, tokens, config.token_channels()]);
        let joined = if frames.len() > own { packed.same() } else { packed.clone() };
        let x = joined.to(dtype).linear(width);
        if config.positions.is_some() { x.same() } else { x }
    };
    let layout = Layout { words, frames };
    for _ in 0..config.num_layers.min(2) {
        (text, x) = double_block(config, &text, &x, &layout);
    }
    let mut y = cat(&[&text, &x], 1);
    for _ in 0..config.num_single_layers.min(2) {
        y = single_block(config, &y, &layout);
    }
    let last = y.narrow(1, frames[frames.len() - own..].iter().sum()).solid();
    let out = { last.norm() }.linear(config.token_channels());
    out.same()
}

struct Layout<'a> {
    words: usize,
    frames: &'a [usize],
}

fn double_block(
    config: &TransformerConfig,
    context: &Ghost,
    video: &Ghost,
    layout: &Layout<'_>,
) -> (Ghost, Ghost) {
    let (of_context, of_video) = {
        let (context, video) = (context.norm(), video.norm());
        let (context, video) = (projected(config, &context), projected(config, &video));
        let joined = |part: usize| cat(&[&context[part], &video[part]], 1);
        let mixed = mix(&joined(0), &joined(1), &joined(2), layout);
        let part = |tokens: usize| mixed.turned(&[mixed.dim(0), tokens, mixed.dim(2)]);
        (part(layout.words), part(mixed.dim(1) - layout.words))
    };
    let width = config.inner();
    let context = of_context.linear(width);
    let video = of_video.linear(width);
    let context = feed(&context);
    (context, feed(&video))
}

fn feed(x: &Ghost) -> Ghost {
    const FEED_FACTOR: usize = 4;
    let width = x.dim(2);
    let normed = x.norm();
    normed.linear(FEED_FACTOR * width).linear(width)
}

fn single_block(config: &TransformerConfig, x: &Ghost, layout: &Layout<'_>) -> Ghost {
    const FEED_FACTOR: usize = 4;
    let width = config.inner();
    let normed = x.norm();
    let mixed = {
        let [query, key, value] = projected(config, &normed);
        mix(&query, &key, &value, layout)
    };
    let both = {
        let fed = normed.linear(FEED_FACTOR * width);
        cat(&[&mixed, &fed], 2)
    };
    both.linear(width)
}

fn projected(config: &TransformerConfig, x: &Ghost) -> [Ghost; 3] {
    let split =
        |x: Ghost| x.view(&[x.dim(0), x.dim(1), config.num_attention_heads, config.attention_head_dim]);
    let width = config.inner();
    // The three are one expression: what the norms are of lives until its end.
    let (query, key) = (split(x.linear(width)), split(x.linear(width)));
    [query.norm(), key.norm(), split(x.linear(width))]
}

fn mix(query: &Ghost, key: &Ghost, value: &Ghost, layout: &Layout<'_>) -> Ghost {
    let (query, key) = (query.rotated(), key.rotated());
    let first = layout.words + layout.frames.first().copied().unwrap_or(0);
    let mut pieces =
        vec![attention(&query.narrow(1, layout.words), &key.narrow(1, first), &value.narrow(1, first))];
    let mut start = layout.words;
    for &length in layout.frames {
        let keys = start + length;
        pieces.push(attention(&query.narrow(1, length), &key.narrow(1, keys), &value.narrow(1, keys)));
        start = keys;
    }
    let whole = cat(&pieces.iter().collect::<Vec<_>>(), 1);
    whole.view(&[whole.dim(0), whole.dim(1), whole.dim(2) * whole.dim(3)])
}

fn cube(output: usize) -> Conv3dConfig {
    Conv3dConfig { time: TimePad::Causal(Edge::Zeros), ..Conv3dConfig::cube(1, output, 3, true) }
}

/// From denormalised latents `(1, channels, time, height, width)` to a video of the same order.
struct Decode<'a> {
    config: &'a PyramidVaeConfig,
    vae: &'a PyramidVae,
    options: DecodeOptions,
}

impl Decode<'_> {
    fn go(&self, z: &Ghost, film: &GhostFilm) {
        let [_, channels, t, h, w] = z.dims()[..] else { return };
        let scale = self.config.downsample_scale;
        let plan = self.options.tile.map(|side| BlendPlan::new(side, scale, [h, w]));
        let Some(plan) = plan.filter(|plan| plan.tiles() > 1) else {
            return self.tile(z, |part| film.put(&part));
        };
        let canvas = film.canvas(&[1, 3, (t - 1) * scale + 1, h * scale, w * scale]);
        let [rows, columns] = plan.tile();
        let part = z.turned(&[1, channels, t, rows, columns]);
        self.tile(&part, |part| {
            film.put(&film.canvas(&[1, 3, part.dim(2), canvas.dim(3), canvas.dim(4)]));
        });
    }

    fn tile(&self, z: &Ghost, put: impl Fn(Ghost)) {
        let [_, channels, frames, h, w] = z.dims()[..] else { return };
        let z = z.turned(&[1, frames, h, w, channels]);
        let channels_first = |x: &Ghost| x.turned(&[1, x.dim(4), x.dim(1), x.dim(2), x.dim(3)]);
        let Some(window) = self.vae.window([frames, h, w], self.options.chunk) else {
            return put(channels_first(&decoder(self.config, &z, true, None)));
        };
        let mut cache = GhostCache::default();
        each_run(frames, (window + 1, window), |len, begins| {
            cache.rewind();
            put(channels_first(&decoder(self.config, &z.narrow(1, len), begins, Some(&mut cache))));
        });
    }
}

fn decoder(config: &PyramidVaeConfig, z: &Ghost, begins: bool, mut cache: Option<&mut GhostCache>) -> Ghost {
    let widths: Vec<usize> = config.decoder_block_out_channels.iter().rev().copied().collect();
    let mut conv = |x: &Ghost, output: usize| match cache.as_deref_mut() {
        Some(cache) => cache.conv(&cube(output), x),
        None => x.cube(output, 3),
    };
    let mut x = {
        let z = z.cube(z.dim(4), 1);
        conv(&z, widths[0])
    };
    x = {
        let x = resnet(&x, widths[0], &mut conv);
        let attended = attend(&x);
        resnet(&attended, widths[0], &mut conv)
    };
    for (index, &width) in widths.iter().enumerate() {
        for _ in 0..config.decoder_layers_per_block[index] {
            x = resnet(&x, width, &mut conv);
        }
        if config.decoder_spatial_up_sample[index] {
            let grown = conv(&x, 4 * width);
            x = grown.turned(&[1, x.dim(1), 2 * x.dim(2), 2 * x.dim(3), width]);
        }
        if config.decoder_temporal_up_sample[index] {
            let grown = conv(&x, 2 * width);
            x = grown.turned(&[1, 2 * x.dim(1) - usize::from(begins), x.dim(2), x.dim(3), width]);
        }
    }
    let normed = x.group_norm();
    conv(&normed, config.decoder_out_channels)
}

fn attend(x: &Ghost) -> Ghost {
    let width = x.dim(4);
    let tokens = x.view(&[x.dim(1), x.dim(2) * x.dim(3), width]);
    let normed = tokens.group_norm();
    let part = || normed.linear(width).view(&[tokens.dim(0), tokens.dim(1), 1, width]);
    let (query, key, value) = (part(), part(), part());
    let mixed = attention(&query, &key, &value);
    mixed.view(tokens.dims()).linear(width).view(x.dims())
}

fn resnet(x: &Ghost, output: usize, conv: &mut impl FnMut(&Ghost, usize) -> Ghost) -> Ghost {
    let inner = {
        let normed = x.group_norm();
        conv(&normed, output)
    };
    let normed = inner.group_norm();
    let _shortcut = if x.dim(4) == output { x.clone() } else { x.cube(output, 1) };
    conv(&normed, output)
}

/// A picture `(1, 1, height, width, 3)` to its moments.
fn encode(config: &PyramidVaeConfig, picture: &Ghost) {
    let widths = &config.encoder_block_out_channels;
    let mut conv = |x: &Ghost, output: usize| x.cube(output, 3);
    let mut x = { picture.same() }.cube(widths[0], 3);
    for (index, &width) in widths.iter().enumerate() {
        for _ in 0..config.encoder_layers_per_block[index] {
            x = resnet(&x, width, &mut conv);
        }
        if config.encoder_spatial_down_sample[index] {
            x = x.conv(width, [3; 3], [1, x.dim(2).div_ceil(2), x.dim(3).div_ceil(2)]);
        }
        if config.encoder_temporal_down_sample[index] {
            x = x.cube(width, 3);
        }
    }
    let last = x.dim(4);
    x = {
        let x = resnet(&x, last, &mut conv);
        let attended = attend(&x);
        resnet(&attended, last, &mut conv)
    };
    let moments = { x.group_norm() }.cube(2 * config.encoder_out_channels, 3);
    let _quantised = moments.same().same();
}

//! Attention on the CPU: parallel over batch, heads and blocks of queries, never more scores than a block's.
//!
//! For each batch entry and head the keys are packed as panels of 16 keys and the values as panels of 16 channels. A
//! task takes a block of queries over blocks of keys and keeps a running maximum and sum (Milakov and Gimelshein,
//! "Online normalizer calculation for softmax", 2018; the order of FlashAttention).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::nn::cpu::{View, written};
use crate::nn::pack::{PANEL, Source, TILE, Tile, micro};
use crate::nn::simd::{self, simd_fn};

/// Queries in a task.
const QUERIES: usize = 8 * TILE;
/// Keys in a block: a whole number of panels.
const KEYS: usize = 512;

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    queries: usize,
    keys: usize,
    heads: usize,
    /// Channels of queries and keys.
    depth: usize,
    /// Channels of values.
    width: usize,
    scale: f32,
}

/// The additive mask and how many elements one step of batch, head and query goes on in it.
#[derive(Clone, Copy)]
struct Mask<'a> {
    values: &'a [f32],
    batch: usize,
    head: usize,
    query: usize,
}

/// See [`super::attention`].
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    scale: f32,
) -> Result<Tensor> {
    let (batch, queries, heads, depth) = q.dims4()?;
    let (_, keys, _, width) = v.dims4()?;
    let sizes = Sizes { queries, keys, heads, depth, width, scale };
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let mask = mask.map(Tensor::contiguous).transpose()?;
    let steps = match &mask {
        Some(mask) => strides(mask)?,
        None => (0, 0, 0),
    };
    let mask_view = mask.as_ref().map(View::new).transpose()?;
    let mask = match &mask_view {
        Some(view) => Some(Mask { values: view.slice()?, batch: steps.0, head: steps.1, query: steps.2 }),
        None => None,
    };
    let (q_view, k_view, v_view) = (View::new(&q)?, View::new(&k)?, View::new(&v)?);
    let (q_all, k_all, v_all) = (q_view.slice()?, k_view.slice()?, v_view.slice()?);
    let blocks = queries.div_ceil(QUERIES);
    let packed: Vec<Sides> =
        (0..batch * heads).into_par_iter().map(|pair| Sides::new(&sizes, pair, k_all, v_all)).collect();
    let parts: Vec<Vec<f32>> = (0..batch * heads * blocks)
        .into_par_iter()
        .map(|task| {
            let (pair, block) = (task / blocks, task % blocks);
            attend(&sizes, pair, block * QUERIES, q_all, &packed[pair], mask)
        })
        .collect();
    let out = written(batch * queries * heads * width, heads * width, |query, out| {
        let (b, query) = (query / queries, query % queries);
        for (h, out) in out.chunks_exact_mut(width).enumerate() {
            let part = &parts[(b * heads + h) * blocks + query / QUERIES];
            out.copy_from_slice(&part[query % QUERIES * width..][..width]);
        }
    });
    Tensor::from_vec(out, (batch, queries, heads, width), q.device())
}

fn strides(mask: &Tensor) -> Result<(usize, usize, usize)> {
    let (b, h, s, t) = mask.dims4()?;
    let step = |size: usize, stride: usize| if size == 1 { 0 } else { stride };
    Ok((step(b, h * s * t), step(h, s * t), step(s, t)))
}

/// One head's keys and values, packed.
struct Sides {
    /// `[panel of keys][depth][PANEL]`.
    keys: Vec<f32>,
    /// `[panel of channels][key][PANEL]`.
    values: Vec<f32>,
}

impl Sides {
    fn new(sizes: &Sizes, pair: usize, k: &[f32], v: &[f32]) -> Self {
        let (b, h) = (pair / sizes.heads, pair % sizes.heads);
        let row = |key: usize| (b * sizes.keys + key) * sizes.heads + h;
        let mut keys = vec![0f32; sizes.keys.div_ceil(PANEL) * sizes.depth * PANEL];
        for key in 0..sizes.keys {
            let source = &k[row(key) * sizes.depth..][..sizes.depth];
            let panel = &mut keys[key / PANEL * sizes.depth * PANEL..][..sizes.depth * PANEL];
            for (column, x) in panel[key % PANEL..].iter_mut().step_by(PANEL).zip(source) {
                *column = *x;
            }
        }
        let mut values = vec![0f32; sizes.width.div_ceil(PANEL) * sizes.keys * PANEL];
        for key in 0..sizes.keys {
            let source = &v[row(key) * sizes.width..][..sizes.width];
            for (panel, part) in source.chunks(PANEL).enumerate() {
                values[(panel * sizes.keys + key) * PANEL..][..part.len()].copy_from_slice(part);
            }
        }
        Self { keys, values }
    }
}

/// One block of queries against all keys: `(queries in block, width)`.
fn attend(
    sizes: &Sizes,
    pair: usize,
    first: usize,
    q: &[f32],
    sides: &Sides,
    mask: Option<Mask<'_>>,
) -> Vec<f32> {
    let (b, h) = (pair / sizes.heads, pair % sizes.heads);
    let count = QUERIES.min(sizes.queries - first);
    let tiles = count.div_ceil(TILE);
    let columns = sizes.width.next_multiple_of(PANEL);
    let stride = KEYS.min(sizes.keys).next_multiple_of(PANEL);
    let mut scores = vec![0f32; tiles * TILE * stride];
    let mut out = vec![0f32; tiles * TILE * columns];
    let mut maxima = vec![f32::NEG_INFINITY; count];
    let mut sums = vec![0f32; count];
    let slots: Vec<usize> = (0..tiles * TILE)
        .map(|i| ((b * sizes.queries + first + i.min(count - 1)) * sizes.heads + h) * sizes.depth)
        .collect();
    for start in (0..sizes.keys).step_by(KEYS) {
        let len = KEYS.min(sizes.keys - start);
        score(sizes, q, &slots, sides, start, len, &mut scores, stride);
        for (i, row) in scores.chunks_exact_mut(stride).enumerate().take(count) {
            let masked =
                mask.map(|m| &m.values[b * m.batch + h * m.head + (first + i) * m.query + start..][..len]);
            let out = &mut out[i * columns..(i + 1) * columns];
            soften(sizes.scale, masked, &mut row[..len], &mut maxima[i], &mut sums[i], out);
        }
        weigh(sizes, &scores, stride, sides, start, len, &mut out, columns);
    }
    let mut dense = vec![0f32; count * sizes.width];
    for (i, row) in dense.chunks_exact_mut(sizes.width).enumerate() {
        let factor = 1.0 / sums[i];
        for (o, x) in row.iter_mut().zip(&out[i * columns..]) {
            *o = x * factor;
        }
    }
    dense
}

/// Unscaled scores of every query in the block against `len` keys.
#[expect(clippy::too_many_arguments, reason = "the loop nest's variables")]
fn score(
    sizes: &Sizes,
    q: &[f32],
    slots: &[usize],
    sides: &Sides,
    start: usize,
    len: usize,
    scores: &mut [f32],
    stride: usize,
) {
    let source = Source { base: q, zeros: &vec![0f32; sizes.depth] };
    for panel in 0..len.div_ceil(PANEL) {
        let keys = &sides.keys[(start / PANEL + panel) * sizes.depth * PANEL..][..sizes.depth * PANEL];
        for (tile, slots) in slots.chunks_exact(TILE).enumerate() {
            let mut sums: Tile = [[0.0; PANEL]; TILE];
            micro(&source, slots, 0, sizes.depth, keys, &mut sums);
            for (row, sum) in sums.iter().enumerate() {
                scores[(tile * TILE + row) * stride + panel * PANEL..][..PANEL].copy_from_slice(sum);
            }
        }
    }
}

simd_fn! {
    /// Turns one query's scores into weights relative to its running maximum, and rescales what it has so far.
    fn soften(
        scale: f32,
        mask: Option<&[f32]>,
        row: &mut [f32],
        maximum: &mut f32,
        sum: &mut f32,
        out: &mut [f32],
    ) {
        match mask {
            Some(mask) => {
                for (x, m) in row.iter_mut().zip(mask) {
                    *x = *x * scale + m;
                }
            }
            None => {
                for x in row.iter_mut() {
                    *x *= scale;
                }
            }
        }
        let top = simd::max(row);
        if top > *maximum {
            let factor = if *maximum == f32::NEG_INFINITY { 0.0 } else { simd::exp::<FUSED>(*maximum - top) };
            *sum *= factor;
            for x in out.iter_mut() {
                *x *= factor;
            }
            *maximum = top;
        }
        let base = if *maximum == f32::NEG_INFINITY { 0.0 } else { *maximum };
        for x in row.iter_mut() {
            let weight = simd::exp::<FUSED>(*x - base);
            *x = if *x == f32::NEG_INFINITY { 0.0 } else { weight };
        }
        *sum += simd::sum(row);
    }
}

/// `out += weights x values` over `len` keys.
#[expect(clippy::too_many_arguments, reason = "the loop nest's variables")]
fn weigh(
    sizes: &Sizes,
    scores: &[f32],
    stride: usize,
    sides: &Sides,
    start: usize,
    len: usize,
    out: &mut [f32],
    columns: usize,
) {
    let source = Source { base: scores, zeros: &vec![0f32; len] };
    for panel in 0..sizes.width.div_ceil(PANEL) {
        let values = &sides.values[(panel * sizes.keys + start) * PANEL..][..len * PANEL];
        for tile in 0..scores.len() / stride / TILE {
            let slots: [usize; TILE] = std::array::from_fn(|i| (tile * TILE + i) * stride);
            let place = |row: usize| (tile * TILE + row) * columns + panel * PANEL;
            let mut sums: Tile = [[0.0; PANEL]; TILE];
            for (row, sum) in sums.iter_mut().enumerate() {
                sum.copy_from_slice(&out[place(row)..][..PANEL]);
            }
            micro(&source, &slots, 0, len, values, &mut sums);
            for (row, sum) in sums.iter().enumerate() {
                out[place(row)..][..PANEL].copy_from_slice(sum);
            }
        }
    }
}

//! Matrix products whose right side is packed once and whose left side is read where it lies.
//!
//! The right side, weights of `taps x depth x width`, is cut into panels of [`PANEL`] columns, each panel contiguous
//! as `[tap][depth][PANEL]`. The left side is a list of offsets, one for each row and tap, to `depth` contiguous
//! floats or to zeros; so a convolution needs no column buffer (Dukhan, "The Indirect Convolution Algorithm", 2019),
//! and a linear layer is a convolution of one tap. A tile of [`TILE`] rows by one panel stays in registers over a
//! block of the inner dimension; blocks are small enough that a panel's part of the weights stays in the cache.

use rayon::prelude::*;

use super::cpu::written;
use super::norm::{Steps, norm_rows_in_place};
use super::simd::{self, simd_fn};

/// Columns in a panel: two AVX2 registers.
pub(crate) const PANEL: usize = 16;
/// Rows in a tile: six rows of two registers leave four registers for operands.
pub(crate) const TILE: usize = 6;
/// An offset from here on stands for a row of zeros.
pub(crate) const ZERO: usize = 1 << 60;
/// Inner positions in one block: its weights take 64 KiB.
const BLOCK: usize = 1024;

/// A tile of results.
pub(crate) type Tile = [[f32; PANEL]; TILE];

/// The right side of a product.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    data: Vec<f32>,
    pub(crate) taps: usize,
    pub(crate) depth: usize,
    pub(crate) width: usize,
}

impl Packed {
    /// Packs weights given as `weight(column, tap, depth index)`.
    pub(crate) fn new(
        taps: usize,
        depth: usize,
        width: usize,
        weight: impl Fn(usize, usize, usize) -> f32 + Sync,
    ) -> Self {
        let mut data = vec![0f32; packed_len(taps, depth, width)];
        data.par_chunks_mut((taps * depth * PANEL).max(1)).enumerate().for_each(|(panel, out)| {
            for (at, columns) in out.chunks_exact_mut(PANEL).enumerate() {
                for (j, column) in columns.iter_mut().enumerate().take(width - (panel * PANEL).min(width)) {
                    *column = weight(panel * PANEL + j, at / depth, at % depth);
                }
            }
        });
        Self { data, taps, depth, width }
    }

    fn panels(&self) -> usize {
        self.width.div_ceil(PANEL)
    }

    /// A panel's weights of `block`.
    fn block(&self, panel: usize, block: &Block) -> &[f32] {
        let start = ((panel * self.taps + block.tap) * self.depth + block.start) * PANEL;
        &self.data[start..start + block.taps * block.len * PANEL]
    }

    /// The inner dimension in blocks: several whole taps, or a part of one.
    fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        if self.depth > BLOCK {
            for tap in 0..self.taps {
                for start in (0..self.depth).step_by(BLOCK) {
                    blocks.push(Block { tap, taps: 1, start, len: BLOCK.min(self.depth - start) });
                }
            }
        } else {
            let step = (BLOCK / self.depth.max(1)).max(1);
            for tap in (0..self.taps).step_by(step) {
                blocks.push(Block { tap, taps: step.min(self.taps - tap), start: 0, len: self.depth });
            }
        }
        blocks
    }
}

/// Floats that packed weights take.
pub(crate) fn packed_len(taps: usize, depth: usize, width: usize) -> usize {
    width.div_ceil(PANEL) * taps * depth * PANEL
}

/// A part of the inner dimension: `taps` taps from `tap` on, `len` positions from `start` on in each.
struct Block {
    tap: usize,
    taps: usize,
    start: usize,
    len: usize,
}

/// What is done with results while they are in the cache, in this order.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// Added to each row, `width` long.
    pub(crate) bias: Option<&'a [f32]>,
    /// The result is multiplied by it: rows of `width`, and how many rows of the result one serves.
    pub(crate) gate: Option<(&'a [f32], usize)>,
    /// Added to the result, as large as it is.
    pub(crate) residual: Option<&'a [f32]>,
    /// Norm, modulation, SiLU.
    pub(crate) norm: Option<Steps<'a>>,
    /// GELU by tanh.
    pub(crate) gelu: bool,
}

/// `rows x taps x depth` times packed weights, row-major.
///
/// `fill(row, slots)` writes row `row`'s offset into `base` for tap `i` at `slots[i * TILE]`.
///
/// # Panics
/// When an offset reaches beyond `base`.
pub(crate) fn product(
    packed: &Packed,
    base: &[f32],
    rows: usize,
    fill: impl Fn(usize, &mut [usize]) + Sync,
    epilogue: &Epilogue<'_>,
) -> Vec<f32> {
    let zeros = vec![0f32; packed.depth];
    let source = Source { base, zeros: &zeros };
    let blocks = packed.blocks();
    if rows <= TILE {
        return narrow(packed, &source, rows, &blocks, fill, epilogue);
    }
    let step = task_rows(rows);
    written(rows * packed.width, step * packed.width, |task, out| {
        let first = task * step;
        let count = out.len() / packed.width;
        let offsets = offsets(packed.taps, first, count, &fill, &source, packed.depth);
        for block in &blocks {
            for panel in 0..packed.panels() {
                let weights = packed.block(panel, block);
                for (tile, slots) in offsets.chunks_exact(packed.taps * TILE).enumerate() {
                    let slots = &slots[block.tap * TILE..(block.tap + block.taps) * TILE];
                    step_tile(packed, &source, block, panel, tile, slots, weights, epilogue.bias, out);
                }
            }
        }
        finish(epilogue, first, packed.width, out);
    })
}

/// Few rows: the panels are shared out instead of the rows.
fn narrow(
    packed: &Packed,
    source: &Source<'_>,
    rows: usize,
    blocks: &[Block],
    fill: impl Fn(usize, &mut [usize]) + Sync,
    epilogue: &Epilogue<'_>,
) -> Vec<f32> {
    let mut out = vec![0f32; rows * packed.width];
    let offsets = offsets(packed.taps, 0, rows, &fill, source, packed.depth);
    let tiles: Vec<Tile> = (0..packed.panels())
        .into_par_iter()
        .map(|panel| {
            let mut tile = start_tile(epilogue.bias, panel, packed.width);
            for block in blocks {
                let slots = &offsets[block.tap * TILE..(block.tap + block.taps) * TILE];
                micro(source, slots, block.start, block.len, packed.block(panel, block), &mut tile);
            }
            tile
        })
        .collect();
    for (panel, tile) in tiles.iter().enumerate() {
        let columns = PANEL.min(packed.width - panel * PANEL);
        for (row, values) in tile.iter().enumerate().take(rows) {
            let at = row * packed.width + panel * PANEL;
            out[at..at + columns].copy_from_slice(&values[..columns]);
        }
    }
    finish(epilogue, 0, packed.width, &mut out);
    out
}

/// Rows that one task takes: whole tiles, several tasks for each thread, and enough rows to use a panel well.
fn task_rows(rows: usize) -> usize {
    const MOST: usize = 16 * TILE;
    const LEAST: usize = 4 * TILE;
    const TASKS_PER_THREAD: usize = 4;
    let tasks = rayon::current_num_threads() * TASKS_PER_THREAD;
    rows.div_ceil(tasks).next_multiple_of(TILE).clamp(LEAST, MOST)
}

/// Offsets of `count` rows as `[tile][tap][TILE]`; the last tile repeats its last row.
fn offsets(
    taps: usize,
    first: usize,
    count: usize,
    fill: &(impl Fn(usize, &mut [usize]) + Sync),
    source: &Source<'_>,
    depth: usize,
) -> Vec<usize> {
    let mut all = vec![0usize; count.div_ceil(TILE) * taps * TILE];
    for (tile, slots) in all.chunks_exact_mut(taps * TILE).enumerate() {
        for row in 0..TILE {
            let index = (tile * TILE + row).min(count - 1);
            fill(first + index, &mut slots[row..]);
        }
    }
    for &offset in &all {
        assert!(
            offset >= ZERO || offset + depth <= source.base.len(),
            "invariant: an offset lies within its source"
        );
    }
    all
}

fn start_tile(bias: Option<&[f32]>, panel: usize, width: usize) -> Tile {
    let mut row = [0f32; PANEL];
    if let Some(bias) = bias {
        let columns = PANEL.min(width - panel * PANEL);
        row[..columns].copy_from_slice(&bias[panel * PANEL..panel * PANEL + columns]);
    }
    [row; TILE]
}

/// Adds one block's part to one tile of `out`; the first block starts from the bias.
#[expect(clippy::too_many_arguments, reason = "the loop nest's variables")]
fn step_tile(
    packed: &Packed,
    source: &Source<'_>,
    block: &Block,
    panel: usize,
    tile: usize,
    slots: &[usize],
    weights: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let columns = PANEL.min(packed.width - panel * PANEL);
    let first = tile * TILE;
    let rows = TILE.min(out.len() / packed.width - first);
    let place = |row: usize| (first + row) * packed.width + panel * PANEL;
    let mut sums = start_tile(bias, panel, packed.width);
    if block.tap + block.start > 0 {
        for (row, sum) in sums.iter_mut().enumerate().take(rows) {
            sum[..columns].copy_from_slice(&out[place(row)..place(row) + columns]);
        }
    }
    micro(source, slots, block.start, block.len, weights, &mut sums);
    for (row, sum) in sums.iter().enumerate().take(rows) {
        out[place(row)..place(row) + columns].copy_from_slice(&sum[..columns]);
    }
}

fn finish(epilogue: &Epilogue<'_>, first: usize, width: usize, out: &mut [f32]) {
    if let Some((gate, rows)) = epilogue.gate {
        for (i, row) in out.chunks_exact_mut(width).enumerate() {
            multiply(&gate[(first + i) / rows * width..][..width], row);
        }
    }
    if let Some(residual) = epilogue.residual {
        add(&residual[first * width..first * width + out.len()], out);
    }
    if let Some(steps) = &epilogue.norm {
        norm_rows_in_place(steps, first, out);
    }
    if epilogue.gelu {
        gelu(out);
    }
}

simd_fn! {
    fn add(other: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(other) {
            *o += x;
        }
    }
}

simd_fn! {
    fn multiply(other: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(other) {
            *o *= x;
        }
    }
}

simd_fn! {
    fn gelu(out: &mut [f32]) {
        for o in out.iter_mut() {
            *o = simd::gelu_tanh::<FUSED>(*o);
        }
    }
}

/// Where the left side's rows lie.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) base: &'a [f32],
    /// At least as long as a row's longest block.
    pub(crate) zeros: &'a [f32],
}

/// `tile += rows x weights` over `slots.len() / TILE` taps of `len` positions from `start` on.
///
/// # Panics
/// When an offset or the weights reach beyond their slice.
pub(crate) fn micro(
    source: &Source<'_>,
    slots: &[usize],
    start: usize,
    len: usize,
    weights: &[f32],
    tile: &mut Tile,
) {
    if len == 0 {
        return;
    }
    assert!(weights.len() >= slots.len() / TILE * len * PANEL, "invariant: a block has its weights");
    assert!(source.zeros.len() >= len, "invariant: the row of zeros is as long as a block");
    let mut reach = 0;
    for &slot in slots {
        reach = reach.max(if slot >= ZERO { 0 } else { slot + start + len });
    }
    assert!(reach <= source.base.len(), "invariant: a row lies within its source");
    #[cfg(target_arch = "x86_64")]
    if simd::has_avx2_fma() {
        #[expect(unsafe_code, reason = "the kernel reads rows through pointers")]
        // SAFETY: AVX2 and FMA are there; weights, zeros and every row were just checked to be long enough.
        unsafe {
            avx2::micro(source, slots, start, len, weights, tile);
        }
        return;
    }
    portable(source, slots, start, len, weights, tile);
}

/// The same in plain Rust, which compilers turn into whatever vectors the machine's baseline has.
fn portable(
    source: &Source<'_>,
    slots: &[usize],
    start: usize,
    len: usize,
    weights: &[f32],
    tile: &mut Tile,
) {
    for (slots, weights) in slots.chunks_exact(TILE).zip(weights.chunks_exact((len * PANEL).max(1))) {
        let rows: [&[f32]; TILE] = std::array::from_fn(|i| match slots[i] {
            ZERO.. => &source.zeros[..len],
            slot => &source.base[slot + start..slot + start + len],
        });
        let (weights, _) = weights.as_chunks::<PANEL>();
        for (k, columns) in weights.iter().enumerate() {
            for (sums, row) in tile.iter_mut().zip(rows) {
                let x = row[k];
                for (sum, w) in sums.iter_mut().zip(columns) {
                    *sum += x * w;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! The kernel for AVX2 with FMA: twelve accumulators, two weights, one broadcast.

    use std::arch::x86_64::{
        __m256, _mm_load_ss, _mm256_broadcastss_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps,
        _mm256_storeu_ps,
    };

    use super::{PANEL, Source, TILE, Tile, ZERO};

    /// See [`super::micro`].
    ///
    /// # Safety
    /// The machine has AVX2 and FMA; `weights` holds `slots.len() / TILE * len * PANEL` floats, `source.zeros` `len`,
    /// and for every slot below [`ZERO`] `slot + start + len <= source.base.len()`.
    #[target_feature(enable = "avx2,fma")]
    #[expect(
        unsafe_code,
        reason = "rows and weights are read through pointers, without a check for each element"
    )]
    pub(super) unsafe fn micro(
        source: &Source<'_>,
        slots: &[usize],
        start: usize,
        len: usize,
        weights: &[f32],
        tile: &mut Tile,
    ) {
        // SAFETY: by this function's contract every row pointer has `len` floats before it, and `k < len`; tiles and
        // weights are read through references of their own size.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; TILE];
            for (sum, row) in sums.iter_mut().zip(tile.iter()) {
                *sum = [_mm256_loadu_ps(row.as_ptr()), _mm256_loadu_ps(row.as_ptr().add(8))];
            }
            let (positions, _) = weights.as_chunks::<PANEL>();
            for (slots, positions) in slots.chunks_exact(TILE).zip(positions.chunks_exact(len)) {
                let mut rows = [source.zeros.as_ptr(); TILE];
                for (row, &slot) in rows.iter_mut().zip(slots) {
                    if slot < ZERO {
                        *row = source.base.as_ptr().add(slot + start);
                    }
                }
                let (pairs, last) = positions.as_chunks::<2>();
                for (k, [even, odd]) in pairs.iter().enumerate() {
                    position(&mut sums, &rows, 2 * k, even);
                    position(&mut sums, &rows, 2 * k + 1, odd);
                }
                if let [columns] = last {
                    position(&mut sums, &rows, len - 1, columns);
                }
            }
            for (sum, row) in sums.iter().zip(tile.iter_mut()) {
                _mm256_storeu_ps(row.as_mut_ptr(), sum[0]);
                _mm256_storeu_ps(row.as_mut_ptr().add(8), sum[1]);
            }
        }
    }

    /// One position: a panel's columns times each row's value.
    ///
    /// # Safety
    /// The machine has AVX2 and FMA; every row holds more than `k` floats.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    #[expect(unsafe_code, reason = "rows are read through pointers, without a check for each element")]
    unsafe fn position(
        sums: &mut [[__m256; 2]; TILE],
        rows: &[*const f32; TILE],
        k: usize,
        columns: &[f32; PANEL],
    ) {
        // SAFETY: a panel has sixteen columns; the rows are as long as this function's contract says.
        unsafe {
            let columns = [_mm256_loadu_ps(columns.as_ptr()), _mm256_loadu_ps(columns.as_ptr().add(8))];
            for (sum, row) in sums.iter_mut().zip(rows) {
                let x = _mm256_broadcastss_ps(_mm_load_ss(row.add(k)));
                sum[0] = _mm256_fmadd_ps(x, columns[0], sum[0]);
                sum[1] = _mm256_fmadd_ps(x, columns[1], sum[1]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value(i: usize) -> f32 {
        ((i.wrapping_mul(2_654_435_761) >> 7) % 2_001) as f32 / 1_000.0 - 1.0
    }

    proptest! {
        #[test]
        fn the_product_is_the_sum_of_products(
            rows in 1usize..60, taps in 1usize..5, depth in 1usize..70, width in 1usize..50, gap in 0usize..3,
        ) {
            let base: Vec<f32> = (0..rows * depth + taps * gap + depth * taps).map(value).collect();
            let weight = |o: usize, t: usize, d: usize| value(o * 7919 + t * 104_729 + d * 31 + 5);
            let place = |r: usize, t: usize| if (r + t) % 5 == 4 { ZERO } else { r * depth + t * gap };
            let bias: Vec<f32> = (0..width).map(value).collect();
            let packed = Packed::new(taps, depth, width, weight);
            let fill = |r: usize, slots: &mut [usize]| (0..taps).for_each(|t| slots[t * TILE] = place(r, t));
            let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
            let out = product(&packed, &base, rows, fill, &epilogue);
            for r in 0..rows {
                for o in 0..width {
                    let mut sum = f64::from(bias[o]);
                    for t in 0..taps {
                        for d in 0..depth {
                            let x = if place(r, t) == ZERO { 0.0 } else { base[place(r, t) + d] };
                            sum += f64::from(x) * f64::from(weight(o, t, d));
                        }
                    }
                    let got = f64::from(out[r * width + o]);
                    prop_assert!((got - sum).abs() < 1e-4, "row {r} column {o}: {got} instead of {sum}");
                }
            }
        }

        #[test]
        fn the_portable_kernel_and_the_dispatched_one_agree(taps in 1usize..4, len in 1usize..40, start in 0usize..5) {
            let base: Vec<f32> = (0..400).map(value).collect();
            let zeros = vec![0f32; len];
            let slots: Vec<usize> = (0..taps * TILE).map(|i| if i % 7 == 3 { ZERO } else { i * 11 }).collect();
            let weights: Vec<f32> = (0..taps * len * PANEL).map(|i| value(i + 17)).collect();
            let source = Source { base: &base, zeros: &zeros };
            let (mut a, mut b) = ([[0.5f32; PANEL]; TILE], [[0.5f32; PANEL]; TILE]);
            micro(&source, &slots, start, len, &weights, &mut a);
            portable(&source, &slots, start, len, &weights, &mut b);
            for (x, y) in a.iter().flatten().zip(b.iter().flatten()) {
                prop_assert!((x - y).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_deep_product_is_cut_into_blocks() {
        let depth = 2 * BLOCK + 77;
        let packed = Packed::new(1, depth, 3, |o, _, d| value(o + d * 3));
        let base: Vec<f32> = (0..9 * depth).map(|i| value(i + 3)).collect();
        let out = product(&packed, &base, 9, |r, slots| slots[0] = r * depth, &Epilogue::default());
        for (r, row) in out.chunks_exact(3).enumerate() {
            for (o, &got) in row.iter().enumerate() {
                let sum: f64 =
                    (0..depth).map(|d| f64::from(base[r * depth + d]) * f64::from(value(o + d * 3))).sum();
                assert!((f64::from(got) - sum).abs() < 2e-3, "{got} instead of {sum}");
            }
        }
    }
}

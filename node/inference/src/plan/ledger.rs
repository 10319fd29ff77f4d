//! Tensors without values: a computation that is gone through with them tells how much memory the real one holds.
//!
//! A plan goes the way of a model's computation with a [`Ghost`] wherever that has a tensor. A ghost's bytes are in the
//! [`Ledger`] as long as it or a view of it lives, so a plan that keeps and drops its ghosts where the computation keeps
//! and drops its tensors has the same greatest sum. Each operation here holds what the operation of the same name in
//! [`crate::nn`] holds: exactly on the CPU in f32; elsewhere with candle's own operations, roughly.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use candle_core::DType;

use crate::nn::attention::SCORES_AT_ONCE;
use crate::nn::conv3d::{Conv3dConfig, Edge, TimePad};
use crate::nn::pack::{PANEL, packed_len};

/// What is held now, and the most that was.
#[derive(Debug, Clone)]
pub(crate) struct Ledger(Rc<Books>);

#[derive(Debug)]
struct Books {
    now: Cell<u64>,
    most: Cell<u64>,
    /// Whether the kernels of the CPU compute.
    cpu: bool,
    special: Special,
}

/// Linear layers that hold more than others while they compute, by their channels in and out.
#[derive(Debug, Clone, Default)]
pub(crate) struct Special {
    /// Their weights are held in blocks of few bits, and widened for each call.
    pub(crate) in_blocks: BTreeSet<(usize, usize)>,
    /// An adapter of this rank stands beside them.
    pub(crate) beside: BTreeMap<(usize, usize), usize>,
}

/// A tensor's size and type. Views share their bytes.
#[derive(Debug, Clone)]
pub(crate) struct Ghost {
    held: Rc<Held>,
    dims: Vec<usize>,
    dtype: DType,
    /// Whether an operation that wants its rows side by side makes a copy first.
    strided: bool,
}

#[derive(Debug)]
struct Held {
    books: Rc<Books>,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.books.now.set(self.books.now.get().saturating_sub(self.bytes));
    }
}

impl Ledger {
    #[cfg(test)]
    fn new(cpu: bool) -> Self {
        Self::with(cpu, Special::default())
    }

    /// An empty one, for the CPU's kernels or for candle's operations on another device; some layers may be special.
    pub(crate) fn with(cpu: bool, special: Special) -> Self {
        Self(Rc::new(Books { now: Cell::new(0), most: Cell::new(0), cpu, special }))
    }

    /// The most that was held at once, bytes.
    pub(crate) fn most(&self) -> u64 {
        self.0.most.get()
    }

    /// A new tensor.
    pub(crate) fn ghost(&self, dims: &[usize], dtype: DType) -> Ghost {
        let bytes = count(dims).saturating_mul(dtype.size_in_bytes() as u64);
        let now = self.0.now.get().saturating_add(bytes);
        self.0.now.set(now);
        self.0.most.set(self.0.most.get().max(now));
        Ghost {
            held: Rc::new(Held { books: Rc::clone(&self.0), bytes }),
            dims: dims.to_vec(),
            dtype,
            strided: false,
        }
    }

    /// Values in the machine's memory, which are not here if the tensors are on another device.
    pub(crate) fn at_home(&self, dims: &[usize], dtype: DType) -> Ghost {
        self.ghost(if self.0.cpu { dims } else { &[0] }, dtype)
    }

    /// A new tensor of f32.
    pub(crate) fn wide(&self, dims: &[usize]) -> Ghost {
        self.ghost(dims, DType::F32)
    }
}

/// Elements of a shape.
pub(crate) fn count(dims: &[usize]) -> u64 {
    dims.iter().fold(1, |all, &n| all.saturating_mul(n as u64))
}

impl Ghost {
    pub(crate) fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub(crate) fn dim(&self, axis: usize) -> usize {
        self.dims[axis]
    }

    /// Another tensor, of this shape and type.
    pub(crate) fn another(&self, dims: &[usize], dtype: DType) -> Self {
        Ledger(Rc::clone(&self.held.books)).ghost(dims, dtype)
    }

    fn cpu(&self) -> bool {
        self.held.books.cpu
    }

    fn fast(&self) -> bool {
        self.cpu() && self.dtype == DType::F32
    }

    /// The same bytes under another shape.
    pub(crate) fn view(&self, dims: &[usize]) -> Self {
        Self { dims: dims.to_vec(), ..self.clone() }
    }

    /// The first or last `len` of an axis, without a copy.
    pub(crate) fn narrow(&self, axis: usize, len: usize) -> Self {
        let mut part = self.clone();
        part.dims[axis] = len;
        part.strided = part.strided || len != self.dims[axis] && self.dims[..axis].iter().any(|&n| n > 1);
        part
    }

    /// A result of this shape and type: of an operation on each element, or of a copy.
    pub(crate) fn same(&self) -> Self {
        self.another(&self.dims, self.dtype)
    }

    /// A copy in another order of axes.
    pub(crate) fn turned(&self, dims: &[usize]) -> Self {
        self.another(dims, self.dtype)
    }

    /// `contiguous`: a copy where rows do not lie side by side.
    pub(crate) fn solid(&self) -> Self {
        if self.strided { self.same() } else { self.clone() }
    }

    /// `to_dtype`.
    pub(crate) fn to(&self, dtype: DType) -> Self {
        if dtype == self.dtype { self.clone() } else { self.another(&self.dims, dtype) }
    }

    /// Another last dimension.
    fn last(&self, width: usize) -> Vec<usize> {
        let mut dims = self.dims.clone();
        if let Some(last) = dims.last_mut() {
            *last = width;
        }
        dims
    }

    /// A linear layer with whatever follows it in the same pass, and with what stands beside it.
    pub(crate) fn linear(&self, width: usize) -> Self {
        let channels = (self.dims.last().copied().unwrap_or(0), width);
        let special = &self.held.books.special;
        let own = {
            let _weight = special.in_blocks.contains(&channels).then(|| self.widened(channels));
            self.alone(width)
        };
        match special.beside.get(&channels) {
            // What follows is done to the sum, when the layer's own result is gone.
            Some(&rank) => self.alone(rank).alone(width),
            None => own,
        }
    }

    /// A layer's weights out of blocks of few bits, as it computes with them.
    fn widened(&self, (input, output): (usize, usize)) -> Self {
        let weight = self.another(&[input, output], DType::F32).to(self.dtype);
        if !self.cpu() {
            return weight;
        }
        let _wide = weight.to(DType::F32);
        self.another(&[packed_len(1, input, output)], DType::F32)
    }

    fn alone(&self, width: usize) -> Self {
        let dims = self.last(width);
        if self.cpu() {
            let _source = self.to(DType::F32).solid();
            return self.another(&dims, DType::F32).to(self.dtype);
        }
        let _source = self.solid();
        self.another(&dims, self.dtype).same()
    }

    /// A norm over the last dimension with all that follows it.
    pub(crate) fn norm(&self) -> Self {
        if self.fast() {
            let _source = self.solid();
            return self.same();
        }
        let wide = self.to(DType::F32);
        let normed = wide.same().same();
        normed.to(self.dtype).same()
    }

    /// A norm over groups of channels.
    pub(crate) fn group_norm(&self) -> Self {
        self.norm()
    }

    /// An activation of the kernels.
    pub(crate) fn activated(&self) -> Self {
        let _source = self.solid();
        self.same()
    }

    /// `swiglu`.
    pub(crate) fn gated_half(&self) -> Self {
        let half = self.last(self.dims.last().copied().unwrap_or(0) / 2);
        if self.fast() {
            return self.another(&half, self.dtype);
        }
        let gate = self.another(&half, self.dtype).same();
        gate.same()
    }

    /// Rotary positions: computed in f32.
    pub(crate) fn rotated(&self) -> Self {
        let wide = self.to(DType::F32).solid();
        wide.same().to(self.dtype)
    }

    /// A convolution of `(batch, time, height, width, channels)` to `size` with whatever follows it in the same pass.
    pub(crate) fn conv(&self, output: usize, kernel: [usize; 3], size: [usize; 3]) -> Self {
        let dims = [self.dims[0], size[0], size[1], size[2], output];
        if self.cpu() {
            let _source = self.to(DType::F32).solid();
            return self.another(&dims, DType::F32).to(self.dtype);
        }
        let padded = if kernel == [1; 3] { self.solid() } else { self.same() };
        let mut columns = dims;
        columns[4] = kernel[2].saturating_mul(self.dims.last().copied().unwrap_or(0));
        let columns = padded.another(&columns, self.dtype);
        let sum = columns.another(&dims, self.dtype).same();
        drop(columns);
        drop(padded);
        sum.same()
    }

    /// [`Ghost::conv`] of a whole activation by its configuration; a size that cannot be is left as it is.
    pub(crate) fn conv3d(&self, config: &Conv3dConfig) -> Self {
        let given = [self.dims[1], self.dims[2], self.dims[3]];
        self.conv(config.output, config.kernel, config.output_size(given).unwrap_or(given))
    }

    /// A convolution of stride 1 that keeps the size.
    pub(crate) fn cube(&self, output: usize, kernel: usize) -> Self {
        self.conv(output, [kernel; 3], [self.dims[1], self.dims[2], self.dims[3]])
    }
}

/// `Tensor::cat`.
pub(crate) fn cat(parts: &[&Ghost], axis: usize) -> Ghost {
    let [first, rest @ ..] = parts else { unreachable!("invariant: something is joined") };
    if rest.is_empty() {
        return (*first).clone();
    }
    let mut dims = first.dims.clone();
    dims[axis] = parts.iter().map(|part| part.dims[axis]).sum();
    first.another(&dims, first.dtype)
}

/// Attention of `(batch, tokens, heads, channels)`.
pub(crate) fn attention(query: &Ghost, key: &Ghost, value: &Ghost) -> Ghost {
    let [batch, queries, heads, _] = query.dims[..] else { return query.same() };
    let [_, keys, _, depth] = key.dims[..] else { return query.same() };
    let width = value.dims.last().copied().unwrap_or(0);
    let out = [batch, queries, heads, width];
    if query.cpu() {
        let wide = |x: &Ghost| x.to(DType::F32).solid();
        let (query_wide, key, value) = (wide(query), wide(key), wide(value));
        let _keys = key.another(&[batch, heads, keys.next_multiple_of(PANEL), depth], DType::F32);
        let _values = value.another(&[batch, heads, keys, width.next_multiple_of(PANEL)], DType::F32);
        let parts = query_wide.another(&out, DType::F32);
        return parts.same().to(query.dtype);
    }
    let scaled = query.same().same();
    let (_key, _value) = (key.same(), value.same());
    let each = (batch * heads * keys).max(1);
    let step = (SCORES_AT_ONCE / each).clamp(1, queries.max(1));
    let scores = scaled.another(&[batch, heads, step, keys], DType::F32);
    let _softmax = (scores.to(query.dtype).same(), scores.same(), scores.same());
    scaled.another(&out, query.dtype).same()
}

/// Runs of frames that a loop goes through: how many frames, and how many runs like the one before it stand for, of which
/// none has to be gone through.
fn runs(total: usize, (first, len): (usize, usize)) -> Vec<(usize, Option<usize>)> {
    /// Runs after which all are alike, but for the last.
    const SETTLED: usize = 3;
    let (first, len) = (first.clamp(1, total.max(1)), len.max(1));
    let count = (total - first.min(total)).div_ceil(len);
    let mut all = vec![(first, None)];
    all.extend((0..count.min(SETTLED)).map(|index| (len.min(total - first - index * len), None)));
    if count > SETTLED + 1 {
        all.push((len, Some(count - 1 - SETTLED)));
    }
    if count > SETTLED {
        all.push((total - first - (count - 1) * len, None));
    }
    all
}

/// Goes through a loop over runs of frames: `first` frames, then `len` each. `go` is told how many and whether they are the
/// first. Runs that are like the one before them are gone through once, so that the longest clip costs no more than a short
/// one.
pub(crate) fn each_run(total: usize, sizes: (usize, usize), mut go: impl FnMut(usize, bool)) {
    let gone = runs(total, sizes).into_iter().filter(|(_, alike)| alike.is_none());
    for (index, (frames, _)) in gone.enumerate() {
        go(frames, index == 0);
    }
}

/// [`each_run`], with results that are kept and joined along `axis`.
pub(crate) fn in_runs(
    total: usize,
    sizes: (usize, usize),
    axis: usize,
    mut go: impl FnMut(usize, bool) -> Ghost,
) -> Ghost {
    let mut parts: Vec<Ghost> = Vec::new();
    for (frames, alike) in runs(total, sizes) {
        let part = match (alike, parts.last()) {
            (Some(count), Some(last)) => {
                let mut dims = last.dims.clone();
                dims[axis] *= count;
                last.turned(&dims)
            }
            _ => go(frames, parts.is_empty()),
        };
        parts.push(part);
    }
    cat(&parts.iter().collect::<Vec<_>>(), axis)
}

/// What causal convolutions remember between runs of frames: [`crate::nn::frame_cache::FrameCache`].
#[derive(Debug, Default)]
pub(crate) struct GhostCache {
    places: Vec<Option<Ghost>>,
    at: usize,
}

impl GhostCache {
    pub(crate) fn rewind(&mut self) {
        self.at = 0;
    }

    pub(crate) fn place(&mut self) -> &mut Option<Ghost> {
        if self.at == self.places.len() {
            self.places.push(None);
        }
        self.at += 1;
        &mut self.places[self.at - 1]
    }

    pub(crate) fn conv(&mut self, config: &Conv3dConfig, x: &Ghost) -> Ghost {
        let kept = config.kernel[0] - 1;
        if kept == 0 {
            return x.conv3d(config);
        }
        let place = self.place();
        let few = [x.dims[0], kept, x.dims[2], x.dims[3], x.dims[4]];
        // Zeros that are only read take no memory of the machine: the system gives them no pages.
        let nothing = x.cpu() && config.time == TimePad::Causal(Edge::Zeros);
        let begin = || if nothing { x.turned(&[0]).view(&few) } else { x.turned(&few) };
        let before = place.take().unwrap_or_else(begin);
        let padded = cat(&[&before, x], 1);
        *place = Some(padded.turned(&few));
        let rows = config.output_size([x.dims[1], x.dims[2], x.dims[3]]).unwrap_or([0; 3]);
        let frames = x.dims[1].div_ceil(config.stride[0]);
        padded.conv(config.output, config.kernel, [frames, rows[1], rows[2]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_is_what_lives_at_once() {
        let ledger = Ledger::new(true);
        let x = ledger.wide(&[2, 4, 16]);
        let view = x.view(&[8, 16]);
        assert_eq!(ledger.most(), 512);
        drop(x);
        let y = view.linear(32);
        assert_eq!(ledger.most(), 512 + 1024, "a view keeps its bytes");
        drop((view, y));
        drop(ledger.wide(&[16]));
        assert_eq!(ledger.most(), 1536, "what was dropped makes room");
    }

    #[test]
    fn a_layer_in_blocks_is_widened_for_its_call_and_an_adapter_holds_a_result_of_its_own() {
        let special = Special { in_blocks: [(16, 32)].into(), beside: [((32, 16), 4)].into() };
        let ledger = Ledger::with(true, special);
        let x = ledger.wide(&[4, 16]);
        let weight = 16 * 32 * 4;
        let y = x.linear(32);
        assert_eq!(ledger.most(), 256 + 2 * weight, "as it comes out of its blocks, and packed");
        let ledger = Ledger::with(true, Special { in_blocks: [].into(), ..y.held.books.special.clone() });
        let y = ledger.wide(&[4, 32]);
        drop(y.linear(16));
        assert_eq!(ledger.most(), 512 + 256 + 64 + 256, "its own result, the narrow one, the sum");
    }

    #[test]
    fn rows_that_do_not_lie_side_by_side_are_copied_for_a_kernel() {
        let ledger = Ledger::new(true);
        let x = ledger.wide(&[2, 4, 16]);
        drop(x.narrow(1, 2).linear(16));
        assert_eq!(ledger.most(), 512 + 256 + 256);
        let ledger = Ledger::new(true);
        let x = ledger.wide(&[1, 4, 16]);
        drop(x.narrow(1, 2).linear(16));
        assert_eq!(ledger.most(), 256 + 128);
    }

    #[test]
    fn a_long_loop_is_gone_through_as_a_short_one_and_holds_as_much_as_it_makes() {
        let ledger = Ledger::new(true);
        let mut runs = 0;
        let joined = in_runs(1_000_001, (3, 2), 1, |len, _| {
            runs += 1;
            ledger.wide(&[1, len, 4])
        });
        assert_eq!((joined.dim(1), runs), (1_000_001, 5));
        assert_eq!(ledger.most(), 2 * 16 * 1_000_001);
        assert_eq!(in_runs(1, (3, 2), 1, |len, _| ledger.wide(&[1, len, 4])).dim(1), 1);
    }

    #[test]
    fn sizes_beyond_every_machine_do_not_wrap() {
        let ledger = Ledger::new(true);
        let many = 1 << 24;
        let _x = ledger.wide(&[many, many, many]);
        assert_eq!(ledger.most(), u64::MAX);
    }
}

//! Decoding in tiles and runs of frames, so that memory has a bound, with the very values of the whole decode.
//!
//! The first, small part of a decoder runs over the whole clip; what follows, where positions multiply and the memory
//! goes, runs tile by tile. A convolution sees a few positions around its own, and everything else in these decoders
//! looks at one position alone; so a tile that is cut with a margin as wide as all of its convolutions see together
//! has in its core exactly the values that the whole would have. The margins are thrown away: there is no seam, and
//! the price is that margins are computed more than once.
//!
//! A decoder that norms over whole pictures has no such tiles: [`blend`] fades overlapping ones into each other.
//!
//! Frames are handed on as the last tile of their run finishes them. Peak memory is one run of finished frames, the
//! activations of the part that runs whole, and one tile with its margins.

pub mod blend;
mod canvas;

use std::ops::Range;

use candle_core::{Result, Tensor};

use crate::sink::Sink;
use canvas::Canvas;

/// Latent frames of a decoder that remembers which go at once where nobody asks for runs, each with an activation of these
/// sizes at its finest: as many as keep it within 2^30 elements, and one at least.
pub(crate) fn frames_at_once(finest: &[usize]) -> usize {
    const MOST_ELEMENTS: usize = 1 << 30;
    let each = finest.iter().fold(1usize, |product, &size| product.saturating_mul(size));
    (MOST_ELEMENTS / each.max(1)).max(1)
}

/// How to cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tiling {
    /// Side of a tile's core, pixels; `None` leaves pictures whole.
    pub tile: Option<usize>,
    /// Frames in a run's core; `None` leaves the clip whole.
    pub chunk: Option<usize>,
}

impl Tiling {
    /// Whether everything stays whole.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.tile.is_none() && self.chunk.is_none()
    }
}

/// What a position of an activation becomes: frames and pixels along a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ratio {
    /// Frames of every position but the first, which becomes one frame.
    pub time: usize,
    /// Pixels.
    pub space: usize,
}

/// Positions around a tile's core that its values depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Margin {
    /// Frames of the activation.
    pub time: usize,
    /// Rows and columns of the activation.
    pub space: usize,
}

/// Where an activation is cut.
#[derive(Debug, Clone)]
pub struct Plan {
    axes: [Vec<Segment>; 3],
    ratio: Ratio,
    size: [usize; 3],
}

/// A tile's place with its margins, in positions of the activation: time, height, width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where it begins.
    pub start: [usize; 3],
    /// How long it is.
    pub len: [usize; 3],
    /// How long the whole is.
    pub whole: [usize; 3],
}

/// A piece of one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    core: (usize, usize),
    outer: (usize, usize),
}

impl Segment {
    fn len(&self) -> usize {
        self.outer.1 - self.outer.0
    }
}

impl Plan {
    /// A plan for an activation of `size` frames, rows and columns.
    #[must_use]
    pub fn new(tiling: Tiling, ratio: Ratio, margin: Margin, size: [usize; 3]) -> Self {
        let side = tiling.tile.map(|pixels| (pixels / ratio.space).max(1));
        let run = tiling.chunk.map(|frames| (frames / ratio.time).max(1));
        let axes = [
            cut(size[0], run, margin.time),
            cut(size[1], side, margin.space),
            cut(size[2], side, margin.space),
        ];
        Self { axes, ratio, size }
    }

    /// How many tiles there are.
    #[must_use]
    pub fn tiles(&self) -> usize {
        self.axes.iter().map(Vec::len).product()
    }

    /// The greatest tile with its margins: frames, rows and columns.
    #[must_use]
    pub fn greatest(&self) -> [usize; 3] {
        [0, 1, 2].map(|axis| self.axes[axis].iter().map(Segment::len).max().unwrap_or(0))
    }

    /// How many times as many positions are computed as there are.
    #[must_use]
    pub fn overhead(&self) -> f64 {
        let computed = |axis: &Vec<Segment>| axis.iter().map(Segment::len).sum::<usize>() as f64;
        self.axes.iter().zip(self.size).map(|(axis, size)| computed(axis) / size.max(1) as f64).product()
    }

    /// Frames of the longest run.
    fn longest(&self) -> usize {
        self.axes[0].iter().map(|segment| self.frames(segment).len()).max().unwrap_or(0)
    }

    /// The frames that a core's positions become.
    fn frames(&self, segment: &Segment) -> Range<usize> {
        let first = |position: usize| if position == 0 { 0 } else { (position - 1) * self.ratio.time + 1 };
        first(segment.core.0)..first(segment.core.1)
    }

    /// Runs `decode` on every tile of `x`, `(batch, time, height, width, channels)`, and hands on the frames of their
    /// cores. A tile may be decoded in runs of frames.
    ///
    /// # Errors
    /// What `decode`, `sink` or the device reports.
    pub fn decode(
        &self,
        x: &Tensor,
        sink: &mut dyn Sink,
        mut decode: impl FnMut(&Tensor, Place, &mut dyn Sink) -> Result<()>,
    ) -> Result<()> {
        let ends = |axis: usize| self.axes[axis].len().saturating_sub(1);
        let size = [1, 2].map(|axis| self.size[axis] * self.ratio.space);
        for t in &self.axes[0] {
            let mut canvas = Canvas::new(size);
            for (row, h) in self.axes[1].iter().enumerate() {
                for (column, w) in self.axes[2].iter().enumerate() {
                    let segments = [*t, *h, *w];
                    let place = Place {
                        start: segments.map(|s| s.outer.0),
                        len: segments.map(|s| s.len()),
                        whole: self.size,
                    };
                    let mut tile = x.clone();
                    for (axis, segment) in segments.iter().enumerate() {
                        tile = tile.narrow(axis + 1, segment.outer.0, segment.len())?;
                    }
                    sink.go_on()?;
                    let is_last = row == ends(1) && column == ends(2);
                    let mut core = Core {
                        plan: self,
                        segments,
                        canvas: &mut canvas,
                        done: 0,
                        is_last,
                        sink: &mut *sink,
                    };
                    decode(&tile.contiguous()?, place, &mut core)?;
                    core.check()?;
                }
            }
        }
        Ok(())
    }

    /// What a memory plan needs to know of a decode that goes in these tiles from block `first` on.
    #[must_use]
    pub fn cut(&self, first: usize) -> Cut {
        Cut { first, tile: self.greatest(), frames: self.longest() }
    }
}

/// A decode that goes in tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The block from which on it does.
    pub first: usize,
    /// The greatest tile with its margins: frames, rows and columns of the activation there.
    pub tile: [usize; 3],
    /// Frames that come together before they are handed on, at most.
    pub frames: usize,
}

/// Takes a tile's frames, and lays their core down where it belongs.
struct Core<'a> {
    plan: &'a Plan,
    segments: [Segment; 3],
    canvas: &'a mut Canvas,
    /// Frames of the tile that have come.
    done: usize,
    /// Whether frames are finished with this tile.
    is_last: bool,
    sink: &'a mut dyn Sink,
}

impl Core<'_> {
    /// Frames, rows and columns that the tile becomes.
    fn planned(&self) -> [usize; 3] {
        let ([t, h, w], ratio) = (self.segments.map(|s| s.len()), self.plan.ratio);
        [(t - 1) * ratio.time + 1, h * ratio.space, w * ratio.space]
    }

    fn check(&self) -> Result<()> {
        let planned = self.planned()[0];
        if self.done != planned {
            candle_core::bail!("a tile decoded to {} frames, planned were {planned}", self.done);
        }
        Ok(())
    }
}

impl Sink for Core<'_> {
    fn go_on(&mut self) -> Result<()> {
        self.sink.go_on()
    }

    /// Position `g > 0` in time becomes frames `(g - 1) time + 1` to `g time`.
    fn put(&mut self, tile: Tensor) -> Result<()> {
        let (batch, channels, frames, rows, columns) = tile.dims5()?;
        let planned = self.planned();
        if [rows, columns] != planned[1..] || self.done + frames > planned[0] {
            candle_core::bail!("a tile decoded to {:?}, planned was {planned:?}", tile.shape());
        }
        let ([t, h, w], ratio) = (self.segments, self.plan.ratio);
        let wanted = self.plan.frames(&t);
        // The frames of this part, counted from the clip's first.
        let from = t.outer.0 * ratio.time + self.done;
        self.done += frames;
        let first = wanted.start.max(from);
        if first >= wanted.end.min(from + frames) {
            return Ok(());
        }
        let down = (h.core.0 * ratio.space)..(h.core.1 * ratio.space);
        let across = (w.core.0 * ratio.space)..(w.core.1 * ratio.space);
        let (top, left) = (h.outer.0 * ratio.space, w.outer.0 * ratio.space);
        let width = self.plan.size[2] * ratio.space;
        self.canvas.reach([batch, channels], wanted.len());
        self.canvas.paint(first - wanted.start, (&tile, first - from), |plane, tile| {
            for y in down.clone() {
                let row = (y - top) * columns + across.start - left;
                plane[y * width..][across.clone()].copy_from_slice(&tile[row..row + across.len()]);
            }
        })?;
        drop(tile);
        if !self.is_last {
            return Ok(());
        }
        self.canvas.hand_on(from + frames - wanted.start, self.sink)
    }
}

/// Cores of `len` positions side by side, each with a margin where there is room.
fn cut(size: usize, len: Option<usize>, margin: usize) -> Vec<Segment> {
    let len = len.unwrap_or(size).max(1);
    (0..size)
        .step_by(len)
        .map(|start| {
            let end = (start + len).min(size);
            Segment { core: (start, end), outer: (start.saturating_sub(margin), (end + margin).min(size)) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::sink::whole;

    /// Every position becomes `ratio` frames and pixels that hold its own value.
    fn grow(x: &Tensor, ratio: Ratio) -> Tensor {
        let (b, t, h, w, c) = x.dims5().unwrap();
        let x = x.permute((0, 4, 1, 2, 3)).unwrap().contiguous().unwrap();
        let r = ratio.space;
        let x = x.reshape(vec![b, c, t, 1, h, 1, w, 1]).unwrap();
        let x = x.broadcast_as(vec![b, c, t, ratio.time, h, r, w, r]).unwrap().contiguous().unwrap();
        let x = x.reshape((b, c, t * ratio.time, h * r, w * r)).unwrap();
        x.narrow(2, ratio.time - 1, (t - 1) * ratio.time + 1).unwrap().contiguous().unwrap()
    }

    proptest! {
        #[test]
        fn tiles_of_a_local_decoder_join_to_the_whole(
            (t, h, w) in (1usize..6, 1usize..6, 1usize..6),
            (tile, chunk) in (prop::option::of(1usize..12), prop::option::of(1usize..12)),
            (time, space, margin) in (1usize..3, 1usize..4, 0usize..3),
        ) {
            let ratio = Ratio { time, space };
            // A tile's first frame stands for a whole position only where a margin lies before it.
            let margin = Margin { time: margin + 1, space: margin };
            let x = Tensor::randn(0f32, 1.0, (2, t, h, w, 3), &Device::Cpu).unwrap();
            let plan = Plan::new(Tiling { tile, chunk }, ratio, margin, [t, h, w]);
            // Frame by frame, as a decoder that goes in runs gives them.
            let by_frames = |tile: &Tensor, _: Place, sink: &mut dyn Sink| {
                let grown = grow(tile, ratio);
                (0..grown.dim(2)?).try_for_each(|frame| sink.put(grown.narrow(2, frame, 1)?))
            };
            let joined = whole(|sink| plan.decode(&x, sink, by_frames)).unwrap();
            let at_once = whole(|sink| plan.decode(&x, sink, |tile, _, sink| sink.put(grow(tile, ratio)))).unwrap();
            let plain = grow(&x, ratio);
            prop_assert_eq!(joined.dims(), plain.dims());
            prop_assert_eq!(
                joined.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                at_once.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            );
            let difference = (joined - plain).unwrap().abs().unwrap().sum_all().unwrap();
            prop_assert_eq!(difference.to_scalar::<f32>().unwrap(), 0.0);
            prop_assert!(plan.overhead() >= 1.0);
        }
    }
}

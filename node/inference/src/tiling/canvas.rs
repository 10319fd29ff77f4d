//! Frames that come together from tiles, f32 in the machine's memory.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::nn::cpu::View;
use crate::sink::Sink;

/// Frames of one size, frame after frame, each with all planes of its batch and channels.
#[derive(Debug)]
pub(super) struct Canvas {
    data: Vec<f32>,
    /// Batch and channels, once the first tile tells them.
    planes: [usize; 2],
    /// Height and width, pixels.
    size: [usize; 2],
    frames: usize,
    /// Frames that have been handed on.
    handed: usize,
}

impl Canvas {
    /// One without frames.
    pub(super) fn new(size: [usize; 2]) -> Self {
        Self { data: Vec::new(), planes: [0; 2], size, frames: 0, handed: 0 }
    }

    /// Makes it `frames` long if it is shorter: what is new is zero.
    pub(super) fn reach(&mut self, planes: [usize; 2], frames: usize) {
        self.planes = planes;
        if frames > self.frames {
            self.frames = frames;
            let values = frames * self.frame();
            // Room for what there is, and no more, as memory plans say.
            self.data.reserve_exact(values.saturating_sub(self.data.len()));
            self.data.resize(values, 0.0);
        }
    }

    /// Values of a frame.
    fn frame(&self) -> usize {
        self.planes.iter().chain(&self.size).product()
    }

    /// Calls `paint` with every plane from frame `start` on and its rows of the tile's `frames`, of which frame `start` is
    /// at `skip`, as far as both go.
    pub(super) fn paint(
        &mut self,
        start: usize,
        (tile, skip): (&Tensor, usize),
        paint: impl Fn(&mut [f32], &[f32]) + Sync,
    ) -> Result<()> {
        let (_, _, frames, rows, columns) = tile.dims5()?;
        let tile = tile.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        let view = View::new(&tile)?;
        let source = view.slice()?;
        let ([batch, channels], [height, width]) = (self.planes, self.size);
        let planes = batch * channels;
        let count = self.frames.saturating_sub(start).min(frames.saturating_sub(skip));
        let first = start * self.frame();
        let last = first + count * self.frame();
        self.data[first..last].par_chunks_mut(height * width).enumerate().for_each(|(index, plane)| {
            let (frame, volume) = (index / planes, index % planes);
            let at = volume * frames + skip + frame;
            paint(plane, &source[at * rows * columns..][..rows * columns]);
        });
        Ok(())
    }

    /// Hands on the frames before frame `until` that have not been.
    pub(super) fn hand_on(&mut self, until: usize, sink: &mut dyn Sink) -> Result<()> {
        let until = until.min(self.frames);
        if until <= self.handed {
            return Ok(());
        }
        let ([batch, channels], [height, width]) = (self.planes, self.size);
        let (count, each) = (until - self.handed, self.frame());
        let values = match count == self.frames {
            true => std::mem::take(&mut self.data),
            false => self.data[self.handed * each..until * each].to_vec(),
        };
        self.handed = until;
        let shape = (count, batch, channels, height, width);
        let frames = Tensor::from_vec(values, shape, &Device::Cpu)?.permute((1, 2, 0, 3, 4))?;
        sink.put(frames)
    }
}

//! What causal convolutions remember from one run of frames to the next, so that a clip that is decoded run by run has
//! the very values of one that is decoded whole.
//!
//! A decoder calls its convolutions in the same order for every run. [`FrameCache::rewind`] begins a run; each call of
//! [`FrameCache::conv`] takes the next place. A decoder that does something else with remembered frames asks for
//! [`FrameCache::place`] itself.

use candle_core::{Result, Tensor};

use super::conv3d::{Conv3d, Edge, TimePad};
use super::norm::Norm;

/// Remembered frames, one place for each convolution in the order of calls.
#[derive(Debug, Clone, Default)]
pub struct FrameCache {
    places: Vec<Option<Tensor>>,
    at: usize,
}

impl FrameCache {
    /// Begins a run of frames: the next place is the first.
    pub fn rewind(&mut self) {
        self.at = 0;
    }

    /// The next place: `None` in the first run.
    pub fn place(&mut self) -> &mut Option<Tensor> {
        if self.at == self.places.len() {
            self.places.push(None);
        }
        self.at += 1;
        &mut self.places[self.at - 1]
    }

    /// The convolution of `x`, `(batch, time, height, width, channels)`, with the frames before it from the next place.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn conv(&mut self, conv: &Conv3d, x: &Tensor) -> Result<Tensor> {
        self.conv_with(conv, x, None, None)
    }

    /// [`FrameCache::conv`], then `+ residual`, then the norm with all that follows it.
    ///
    /// # Errors
    /// As [`FrameCache::conv`].
    pub fn conv_with(
        &mut self,
        conv: &Conv3d,
        x: &Tensor,
        residual: Option<&Tensor>,
        norm: Option<&Norm>,
    ) -> Result<Tensor> {
        let kept = conv.config().kernel[0] - 1;
        if kept == 0 {
            return conv.forward_with(x, residual, norm);
        }
        let TimePad::Causal(edge) = conv.config().time else {
            candle_core::bail!("a convolution that looks ahead in time cannot go run by run")
        };
        let place = self.place();
        let before = match place.take() {
            Some(before) => before,
            None => beginning(x, kept, edge)?,
        };
        let padded = Tensor::cat(&[&before, x], 1)?;
        let frames = padded.dim(1)?;
        *place = Some(padded.narrow(1, frames - kept, kept)?.force_contiguous()?);
        conv.forward_unpadded(&padded, residual, norm)
    }
}

/// What lies before the first frame.
fn beginning(x: &Tensor, frames: usize, edge: Edge) -> Result<Tensor> {
    let first = x.narrow(1, 0, 1)?;
    match edge {
        Edge::Repeat => Tensor::cat(&vec![first; frames], 1),
        Edge::Zeros => {
            let mut shape = x.dims().to_vec();
            shape[1] = frames;
            Tensor::zeros(shape, x.dtype(), x.device())
        }
    }
}

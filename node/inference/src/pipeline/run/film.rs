//! What becomes of decoded frames: bytes, which the observer is shown as they are finished, and which the run keeps.

use candle_core::{Result, Tensor};

use crate::error::Error;
use crate::frames::RgbFrames;
use crate::pipeline::{GenerateRequest, Observer};
use crate::sink::Sink;

/// Frames that the observer is shown at once at most, so that it can begin while the others become bytes.
pub(crate) const AT_ONCE: usize = 8;

/// The frames of a run, and who looks on.
pub(super) struct Film<'a> {
    observer: &'a mut dyn Observer,
    frames: RgbFrames,
    /// Whether the observer wants to stop.
    stopped: bool,
}

impl<'a> Film<'a> {
    /// One with room for a request's frames.
    pub(super) fn new(request: &GenerateRequest, observer: &'a mut dyn Observer) -> Self {
        let (width, height) = (request.width, request.height);
        let data = Vec::with_capacity(request.frames * height * width * 3);
        Self { observer, frames: RgbFrames { width, height, count: 0, data }, stopped: false }
    }

    /// All frames, or why there are none: a decode that was stopped failed for that alone.
    pub(super) fn develop(
        self,
        decoded: std::result::Result<(), Error>,
    ) -> std::result::Result<RgbFrames, Error> {
        match decoded {
            Err(_) if self.stopped => Err(Error::Cancelled { steps_done: 0, steps: 0 }),
            Err(error) => Err(error),
            Ok(()) => Ok(self.frames),
        }
    }
}

impl Sink for Film<'_> {
    fn go_on(&mut self) -> Result<()> {
        self.stopped = self.stopped || self.observer.cancelled();
        if self.stopped { candle_core::bail!("cancelled") } else { Ok(()) }
    }

    fn put(&mut self, video: Tensor) -> Result<()> {
        let frames = video.squeeze(0)?.transpose(0, 1)?;
        drop(video);
        let count = frames.dim(0)?;
        for start in (0..count).step_by(AT_ONCE) {
            let some = RgbFrames::from_signed(&frames.narrow(0, start, AT_ONCE.min(count - start))?)?;
            if (some.width, some.height) != (self.frames.width, self.frames.height) {
                let RgbFrames { width, height, .. } = self.frames;
                candle_core::bail!(
                    "frames of {}x{}, asked for were {width}x{height}",
                    some.width,
                    some.height
                );
            }
            self.frames.data.extend_from_slice(&some.data);
            self.frames.count += some.count;
            self.observer.frames(some);
        }
        Ok(())
    }
}

//! What becomes of decoded frames: bytes, which the observer is given as they are finished, and which the run keeps where
//! the observer gives them back.

use candle_core::{Result, Tensor};

use crate::error::Error;
use crate::frames::RgbFrames;
use crate::pipeline::{GenerateRequest, Observer};
use crate::sink::Sink;

/// Frames that become bytes at once, so that the observer can begin while the others wait.
pub(crate) const FRAMES_AT_ONCE: usize = 8;

/// The frames of a run, and who looks on.
pub(super) struct Film<'a> {
    observer: &'a mut dyn Observer,
    /// What was given back.
    kept: RgbFrames,
    /// Frames that came.
    count: usize,
    /// Frames that are to come.
    needed: usize,
    /// Whether the observer wants to stop.
    stopped: bool,
}

impl<'a> Film<'a> {
    /// For a request's frames.
    pub(super) fn new(request: &GenerateRequest, observer: &'a mut dyn Observer) -> Self {
        let kept = RgbFrames { width: request.width, height: request.height, count: 0, data: Vec::new() };
        Self { observer, kept, count: 0, needed: request.frames, stopped: false }
    }

    /// All frames that are kept, or why there are none: a decode that was stopped failed for that alone. `steps` is how
    /// many were done before it.
    pub(super) fn develop(
        self,
        decoded: std::result::Result<(), Error>,
        steps: usize,
    ) -> std::result::Result<RgbFrames, Error> {
        match decoded {
            Err(_) if self.stopped => Err(Error::Cancelled { steps_done: steps, steps }),
            Err(error) => Err(error),
            Ok(()) if self.count != self.needed => {
                let text = format!("{} frames were decoded, asked for were {}", self.count, self.needed);
                Err(candle_core::Error::Msg(text).into())
            }
            Ok(()) => Ok(self.kept),
        }
    }

    fn keep(&mut self, frames: &RgbFrames) {
        if self.kept.count == 0 {
            self.kept.data.reserve_exact(self.needed * self.kept.width * self.kept.height * 3);
        }
        self.kept.data.extend_from_slice(&frames.data);
        self.kept.count += frames.count;
    }
}

impl Sink for Film<'_> {
    fn go_on(&mut self) -> Result<()> {
        self.stopped = self.stopped || self.observer.cancelled();
        if self.stopped { candle_core::bail!("cancelled") } else { Ok(()) }
    }

    fn put(&mut self, video: Tensor) -> Result<()> {
        let video = video.squeeze(0)?.transpose(0, 1)?;
        let count = video.dim(0)?;
        for start in (0..count).step_by(FRAMES_AT_ONCE) {
            if start > 0 {
                self.go_on()?;
            }
            let len = FRAMES_AT_ONCE.min(count - start);
            let some = RgbFrames::from_signed(&video.narrow(0, start, len)?)?;
            let (width, height) = (self.kept.width, self.kept.height);
            if (some.width, some.height) != (width, height) {
                candle_core::bail!(
                    "frames of {}x{}, asked for were {width}x{height}",
                    some.width,
                    some.height
                );
            }
            self.count += some.count;
            if let Some(back) = self.observer.frames(some) {
                self.keep(&back);
            }
        }
        Ok(())
    }
}

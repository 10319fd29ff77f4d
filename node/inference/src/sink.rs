//! Where the frames of a decode go: on, as they are finished, so that whoever encodes them works while the decoder does.

use candle_core::{Result, Tensor};

/// Takes the frames of a decode.
pub trait Sink {
    /// Asked between the pieces of a decode; an error ends it.
    ///
    /// # Errors
    /// When the decode is to stop.
    fn go_on(&mut self) -> Result<()>;

    /// The frames that follow on those before, `(batch, channels, frames, height, width)`.
    ///
    /// # Errors
    /// What becomes of them reports.
    fn put(&mut self, frames: Tensor) -> Result<()>;
}

/// All frames of a decode as one tensor: `decode` is told where to put them.
///
/// # Errors
/// What `decode` reports, or a decode without frames.
pub fn whole<E: From<candle_core::Error>>(
    decode: impl FnOnce(&mut dyn Sink) -> std::result::Result<(), E>,
) -> std::result::Result<Tensor, E> {
    let mut kept = Kept(Vec::new());
    decode(&mut kept)?;
    Ok(Tensor::cat(&kept.0, 2)?)
}

struct Kept(Vec<Tensor>);

impl Sink for Kept {
    fn go_on(&mut self) -> Result<()> {
        Ok(())
    }

    fn put(&mut self, frames: Tensor) -> Result<()> {
        self.0.push(frames);
        Ok(())
    }
}

/// Where frames go that nobody wants: a decode is measured without what becomes of its frames.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nowhere;

impl Sink for Nowhere {
    fn go_on(&mut self) -> Result<()> {
        Ok(())
    }

    fn put(&mut self, _frames: Tensor) -> Result<()> {
        Ok(())
    }
}

//! Pictures as bytes: what a decode and a preview hand out.

use candle_core::{DType, Result, Tensor};

/// Frames of one size, 8 bits a channel, red green blue, row by row, frame after frame.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbFrames {
    /// Pixels in a row.
    pub width: usize,
    /// Rows in a frame.
    pub height: usize,
    /// Frames.
    pub count: usize,
    /// `count * height * width * 3` bytes.
    pub data: Vec<u8>,
}

impl std::fmt::Debug for RgbFrames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RgbFrames({}x{}, {} frames)", self.width, self.height, self.count)
    }
}

impl RgbFrames {
    /// Frames from a tensor `[frames, 3, height, width]` with values in 0 to 1; what lies outside is clamped.
    ///
    /// # Errors
    /// When the tensor has another rank or cannot be read back from its device.
    pub fn from_unit(video: &Tensor) -> Result<Self> {
        let (count, channels, height, width) = video.dims4()?;
        if channels != 3 {
            candle_core::bail!("frames have {channels} channels, 3 are needed");
        }
        let pixels = video.permute((0, 2, 3, 1))?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let data = pixels.into_iter().map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8).collect();
        Ok(Self { width, height, count, data })
    }

    /// The bytes of frame `index`, if there is one.
    #[must_use]
    pub fn frame(&self, index: usize) -> Option<&[u8]> {
        let size = self.width * self.height * 3;
        self.data.get(index * size..(index + 1) * size)
    }
}

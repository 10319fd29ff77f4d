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
        let mut data = Vec::with_capacity(count * height * width * channels);
        // One by one, so that besides the video only the bytes are held.
        for index in 0..count {
            let frame = video.get(index)?.permute((1, 2, 0))?.to_dtype(DType::F32)?;
            let pixels = frame.flatten_all()?.to_vec1::<f32>()?;
            data.extend(pixels.into_iter().map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8));
        }
        Ok(Self { width, height, count, data })
    }

    /// The bytes of frame `index`, if there is one.
    #[must_use]
    pub fn frame(&self, index: usize) -> Option<&[u8]> {
        let size = self.width * self.height * 3;
        self.data.get(index * size..(index + 1) * size)
    }
}

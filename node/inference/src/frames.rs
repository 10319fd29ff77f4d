//! Pictures as bytes: what a decode and a preview hand out.

use candle_core::{DType, Result, Tensor};

/// The values of a picture: `value * scale + offset` is from 0 to 1.
#[derive(Clone, Copy)]
struct Range {
    scale: f32,
    offset: f32,
}

impl Range {
    /// Appends a picture's bytes.
    fn read(self, frame: &Tensor, data: &mut Vec<u8>) -> Result<()> {
        let values = frame.flatten_all()?.to_vec1::<f32>()?;
        let unit = |value: f32| (value * self.scale + self.offset).clamp(0.0, 1.0);
        data.extend(values.into_iter().map(|value| (unit(value) * 255.0).round() as u8));
        Ok(())
    }

    /// The same bytes, made where the picture is: a quarter of what would have to be brought home.
    fn bytes(self, frame: &Tensor) -> Result<Tensor> {
        let unit = frame.affine(self.scale.into(), self.offset.into())?.clamp(0f32, 1f32)?;
        (unit * 255.0)?.round()?.to_dtype(DType::U8)?.flatten_all()
    }
}

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
        Self::from_values(video, Range { scale: 1.0, offset: 0.0 })
    }

    /// Frames from a tensor `[frames, 3, height, width]` with values in -1 to 1; what lies outside is clamped.
    ///
    /// # Errors
    /// As [`RgbFrames::from_unit`].
    pub fn from_signed(video: &Tensor) -> Result<Self> {
        Self::from_values(video, Range { scale: 0.5, offset: 0.5 })
    }

    fn from_values(video: &Tensor, range: Range) -> Result<Self> {
        let (count, channels, height, width) = video.dims4()?;
        if channels != 3 {
            candle_core::bail!("frames have {channels} channels, 3 are needed");
        }
        let mut data = Vec::with_capacity(count * height * width * channels);
        // One by one, so that besides the video only the bytes are held.
        for index in 0..count {
            let frame = video.get(index)?.permute((1, 2, 0))?.to_dtype(DType::F32)?;
            if frame.device().is_cpu() {
                range.read(&frame, &mut data)?;
            } else {
                data.extend(range.bytes(&frame)?.to_vec1::<u8>()?);
            }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    #[test]
    fn bytes_made_on_a_device_are_those_that_are_made_here() {
        let values: Vec<f32> = (0..3 * 700).map(|i| i as f32 / 700.0 - 1.5).chain([-1.0, 1.0, 0.0]).collect();
        let count = values.len();
        let frame = Tensor::from_vec(values, (1, count / 3, 3), &Device::Cpu).unwrap();
        for range in [Range { scale: 1.0, offset: 0.0 }, Range { scale: 0.5, offset: 0.5 }] {
            let mut here = Vec::new();
            range.read(&frame, &mut here).unwrap();
            assert_eq!(here, range.bytes(&frame).unwrap().to_vec1::<u8>().unwrap());
            assert_eq!((here[0], here[3 * 700 + 1]), (0, 255));
        }
    }
}

//! Frames as pictures: PNG files, one strip of a whole clip, and the frames of a finished MP4.

use std::path::{Path, PathBuf};

pub use kinoflock_inference::RgbFrames;

pub use super::mp4::{ClipInfo, MAX_CLIP_BYTES, Mp4Error, clip_info, decode_mp4, decode_mp4_bytes};

/// Why pictures could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FramesError {
    /// There is no frame to write.
    #[error("no frames: at least 1 is needed")]
    Empty,
    /// The data does not fit the size.
    #[error("{given} bytes for {count} frames of {width}x{height}: {needed} are needed")]
    Length {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
        /// Frames.
        count: usize,
        /// Bytes needed.
        needed: usize,
        /// Bytes given.
        given: usize,
    },
    /// The picture could not be encoded.
    #[error("png of {width}x{height}: {reason}")]
    Png {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
        /// What the encoder said.
        reason: String,
    },
    /// The file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl FramesError {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Empty => "no_frames",
            Self::Length { .. } => "frame_length",
            Self::Png { .. } => "png",
            Self::Write { .. } => "write",
        }
    }
}

/// Checks that there are frames and that their bytes are as many as their size says.
///
/// # Errors
/// [`FramesError::Empty`] or [`FramesError::Length`].
pub fn check(frames: &RgbFrames) -> Result<(), FramesError> {
    let RgbFrames { width, height, count, ref data } = *frames;
    if count == 0 || width == 0 || height == 0 {
        return Err(FramesError::Empty);
    }
    let needed = width.saturating_mul(height).saturating_mul(count).saturating_mul(3);
    if data.len() != needed {
        return Err(FramesError::Length { width, height, count, needed, given: data.len() });
    }
    Ok(())
}

/// The bytes of a PNG from RGB bytes.
///
/// # Errors
/// [`FramesError::Png`] when size and bytes do not fit.
pub fn png(rgb: &[u8], width: usize, height: usize) -> Result<Vec<u8>, FramesError> {
    let fault = |reason: String| FramesError::Png { width, height, reason };
    let side = |pixels: usize| u32::try_from(pixels).map_err(|_| fault("a side is too long".to_owned()));
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, side(width)?, side(height)?);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_source_srgb(png::SrgbRenderingIntent::Perceptual);
    let mut writer = encoder.write_header().map_err(|error| fault(error.to_string()))?;
    writer.write_image_data(rgb).map_err(|error| fault(error.to_string()))?;
    writer.finish().map_err(|error| fault(error.to_string()))?;
    Ok(bytes)
}

/// Writes `frame-0000.png` and on into a folder, which is made if it is not there. Answers the files in order.
///
/// # Errors
/// When there are no frames, or a file cannot be written.
pub fn write_pngs(frames: &RgbFrames, folder: &Path) -> Result<Vec<PathBuf>, FramesError> {
    check(frames)?;
    std::fs::create_dir_all(folder)
        .map_err(|source| FramesError::Write { path: folder.to_owned(), source })?;
    let mut paths = Vec::with_capacity(frames.count);
    for index in 0..frames.count {
        let rgb = frames.frame(index).expect("invariant: index is below the count that was checked");
        let path = folder.join(format!("frame-{index:04}.png"));
        write(&path, &png(rgb, frames.width, frames.height)?)?;
        paths.push(path);
    }
    Ok(paths)
}

/// Some frames side by side: every frame if there are at most `most`, else `most` of them, first and last included.
///
/// # Errors
/// When there are no frames, or `most` is 0.
pub fn strip(frames: &RgbFrames, most: usize) -> Result<RgbFrames, FramesError> {
    check(frames)?;
    let shown = most.min(frames.count);
    if shown == 0 {
        return Err(FramesError::Empty);
    }
    let picked: Vec<usize> = match shown {
        1 => vec![frames.count / 2],
        _ => (0..shown).map(|i| (i * (frames.count - 1) + (shown - 1) / 2) / (shown - 1)).collect(),
    };
    let row = frames.width * 3;
    let mut data = Vec::with_capacity(row * frames.height * shown);
    for y in 0..frames.height {
        for &index in &picked {
            let start = (index * frames.height + y) * row;
            data.extend_from_slice(&frames.data[start..start + row]);
        }
    }
    Ok(RgbFrames { width: frames.width * shown, height: frames.height, count: 1, data })
}

/// Writes a strip of at most `most` frames as one PNG.
///
/// # Errors
/// As [`strip`], and when the file cannot be written.
pub fn write_strip(frames: &RgbFrames, most: usize, path: &Path) -> Result<(), FramesError> {
    let strip = strip(frames, most)?;
    write(path, &png(&strip.data, strip.width, strip.height)?)
}

/// A PNG of at most `limit` bytes that shows the clip as a strip, with fewer frames where all do not fit; `None` where
/// not even one does.
#[must_use]
pub fn preview_png(frames: &RgbFrames, limit: usize) -> Option<Vec<u8>> {
    let mut most = frames.count;
    while most > 0 {
        let strip = strip(frames, most).ok()?;
        let bytes = png(&strip.data, strip.width, strip.height).ok()?;
        if bytes.len() <= limit {
            return Some(bytes);
        }
        most /= 2;
    }
    None
}

/// Peak signal-to-noise ratio of two sets of frames of one size, in dB; infinite when they are equal, `None` when their
/// sizes differ.
#[must_use]
pub fn psnr(a: &RgbFrames, b: &RgbFrames) -> Option<f64> {
    if (a.width, a.height, a.count) != (b.width, b.height, b.count) || a.data.len() != b.data.len() {
        return None;
    }
    let squares: u64 = a.data.iter().zip(&b.data).map(|(x, y)| u64::from(x.abs_diff(*y)).pow(2)).sum();
    let mean = squares as f64 / a.data.len().max(1) as f64;
    Some(10.0 * (255.0f64 * 255.0 / mean).log10())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), FramesError> {
    std::fs::write(path, bytes).map_err(|source| FramesError::Write { path: path.to_owned(), source })
}

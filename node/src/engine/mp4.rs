//! A clip back to frames, and what a clip file says of itself.
//!
//! Reads MP4 files with one H.264 track. Nothing in the file is believed before it is checked against the file's own
//! length and the limits here: a damaged clip is an error, never a panic.

use std::path::{Path, PathBuf};

use kinoflock_inference::RgbFrames;
use openh264::OpenH264API;
use openh264::decoder::{Decoder, DecoderConfig, Flush};
use openh264::formats::YUVSource;
use re_mp4::{Mp4, StsdBoxContent, Track, TrackKind};

use super::color::planes_to_rgb;

/// Greatest clip file that is read into memory, bytes (1 GiB).
pub const MAX_CLIP_BYTES: u64 = 1 << 30;
/// Greatest decoded clip, bytes of RGB (8 GiB).
const MAX_RGB_BYTES: u64 = 8 << 30;
/// The start code that separates NAL units in a byte stream.
const START_CODE: [u8; 4] = [0, 0, 0, 1];

/// Why a clip could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Mp4Error {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// More bytes than are read into memory.
    #[error("clip of {given} bytes exceeds the limit of {limit} bytes")]
    TooLarge {
        /// Bytes.
        given: u64,
        /// Greatest number of bytes.
        limit: u64,
    },
    /// The container is damaged, or holds no H.264 video.
    #[error("not a clip: {0}")]
    Container(String),
    /// The video stream is damaged.
    #[error("frame {index} cannot be decoded: {reason}")]
    Stream {
        /// Zero-based.
        index: usize,
        /// What the decoder said.
        reason: String,
    },
}

impl Mp4Error {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::TooLarge { .. } => "clip_too_large",
            Self::Container(_) => "container",
            Self::Stream { .. } => "stream",
        }
    }
}

/// What a clip file says of itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipInfo {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Frames.
    pub frames: usize,
    /// Frames a second, from the second frame's time; 0 for a clip of one frame.
    pub fps: f64,
}

/// Reads what a clip says of itself, without decoding it.
///
/// # Errors
/// When the bytes are no MP4 with an H.264 track.
pub fn clip_info(bytes: &[u8]) -> Result<ClipInfo, Mp4Error> {
    let mp4 = parse(bytes)?;
    let track = video(&mp4)?;
    let fps = match track.samples.get(1) {
        Some(second) if second.composition_timestamp > 0 && track.timescale > 0 => {
            track.timescale as f64 / second.composition_timestamp as f64
        }
        _ => 0.0,
    };
    Ok(ClipInfo { width: track.width.into(), height: track.height.into(), frames: track.samples.len(), fps })
}

/// The frames of a clip file.
///
/// # Errors
/// When the file cannot be read or is no clip, or its stream is damaged.
pub fn decode_mp4(path: &Path) -> Result<RgbFrames, Mp4Error> {
    let fault = |source| Mp4Error::Read { path: path.to_owned(), source };
    let given = std::fs::metadata(path).map_err(fault)?.len();
    if given > MAX_CLIP_BYTES {
        return Err(Mp4Error::TooLarge { given, limit: MAX_CLIP_BYTES });
    }
    decode_mp4_bytes(&std::fs::read(path).map_err(fault)?)
}

/// The frames of a clip's bytes.
///
/// # Errors
/// When the bytes are no clip, or its stream is damaged.
pub fn decode_mp4_bytes(bytes: &[u8]) -> Result<RgbFrames, Mp4Error> {
    let mp4 = parse(bytes)?;
    let track = video(&mp4)?;
    let (width, height) = (usize::from(track.width), usize::from(track.height));
    let rgb_bytes = (width * height * 3) as u64 * track.samples.len() as u64;
    if rgb_bytes > MAX_RGB_BYTES {
        return Err(Mp4Error::TooLarge { given: rgb_bytes, limit: MAX_RGB_BYTES });
    }
    let (prefix, mut stream) = parameter_sets(track, &mp4)?;
    let mut decoder = Decoder::with_api_config(
        OpenH264API::from_source(),
        DecoderConfig::new().flush_after_decode(Flush::NoFlush),
    )
    .map_err(|error| Mp4Error::Container(error.to_string()))?;
    let mut out = RgbFrames { width, height, count: 0, data: Vec::new() };
    for (index, sample) in track.samples.iter().enumerate() {
        let fault = |reason: String| Mp4Error::Stream { index, reason };
        let start = usize::try_from(sample.offset).ok();
        let end = sample.offset.checked_add(sample.size).and_then(|end| usize::try_from(end).ok());
        let nals = start.zip(end).and_then(|(start, end)| bytes.get(start..end));
        let nals = nals.ok_or_else(|| fault("it lies outside the file".to_owned()))?;
        append_byte_stream(&mut stream, nals, prefix).ok_or_else(|| fault("a unit is cut".to_owned()))?;
        if let Some(picture) = decoder.decode(&stream).map_err(|error| fault(error.to_string()))? {
            push(&mut out, &picture).map_err(fault)?;
        }
        stream.clear();
    }
    let count = track.samples.len();
    let rest = decoder
        .flush_remaining()
        .map_err(|error| Mp4Error::Stream { index: count, reason: error.to_string() })?;
    for picture in &rest {
        push(&mut out, picture).map_err(|reason| Mp4Error::Stream { index: count, reason })?;
    }
    if out.count != count {
        let reason = format!("{} of {count} frames came out of the decoder", out.count);
        return Err(Mp4Error::Stream { index: out.count, reason });
    }
    Ok(out)
}

fn parse(bytes: &[u8]) -> Result<Mp4, Mp4Error> {
    // The parser multiplies 64-bit sizes from the file; a damaged one must not take the process along.
    std::panic::catch_unwind(|| Mp4::read_bytes(bytes))
        .map_err(|_| Mp4Error::Container("its boxes contradict each other".to_owned()))?
        .map_err(|error| Mp4Error::Container(error.to_string()))
}

fn video(mp4: &Mp4) -> Result<&Track, Mp4Error> {
    let track = mp4.tracks().values().find(|track| matches!(track.kind, Some(TrackKind::Video)));
    let track = track.ok_or_else(|| Mp4Error::Container("it has no video track".to_owned()))?;
    if track.samples.is_empty() || track.width == 0 || track.height == 0 {
        return Err(Mp4Error::Container("its video track is empty".to_owned()));
    }
    Ok(track)
}

/// The bytes of a NAL length prefix, and the parameter sets as a byte stream (ISO/IEC 14496-15, `avcC`).
fn parameter_sets(track: &Track, mp4: &Mp4) -> Result<(usize, Vec<u8>), Mp4Error> {
    let StsdBoxContent::Avc1(avc1) = &track.trak(mp4).mdia.minf.stbl.stsd.contents else {
        return Err(Mp4Error::Container("its video is not H.264".to_owned()));
    };
    let mut stream = Vec::new();
    let sets = avc1.avcc.sequence_parameter_sets.iter().chain(&avc1.avcc.picture_parameter_sets);
    for set in sets {
        stream.extend_from_slice(&START_CODE);
        stream.extend_from_slice(&set.bytes);
    }
    Ok((usize::from(avc1.avcc.length_size_minus_one & 3) + 1, stream))
}

fn append_byte_stream(stream: &mut Vec<u8>, mut nals: &[u8], prefix: usize) -> Option<()> {
    while !nals.is_empty() {
        let (head, rest) = nals.split_at_checked(prefix)?;
        let length = head.iter().fold(0usize, |length, byte| length << 8 | usize::from(*byte));
        let (unit, rest) = rest.split_at_checked(length)?;
        stream.extend_from_slice(&START_CODE);
        stream.extend_from_slice(unit);
        nals = rest;
    }
    Some(())
}

fn push(out: &mut RgbFrames, picture: &openh264::decoder::DecodedYUV<'_>) -> Result<(), String> {
    let (width, height) = picture.dimensions();
    if (width, height) != (out.width, out.height) {
        return Err(format!("it is {width}x{height}, the file says {}x{}", out.width, out.height));
    }
    let (y_stride, u_stride, _) = picture.strides();
    let start = out.data.len();
    out.data.resize(start + width * height * 3, 0);
    let planes = (picture.y(), picture.u(), picture.v());
    planes_to_rgb(planes, (y_stride, u_stride), width, height, &mut out.data[start..]);
    out.count += 1;
    Ok(())
}

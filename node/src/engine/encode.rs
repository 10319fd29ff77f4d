//! Frames to a clip: H.264 by openh264 in MP4 by muxide, the index first so that it plays while it loads.
//!
//! One thread, whole-number colours and no clock: the same frames give the same bytes, so a `ClipId` is stable.
//! Colours are BT.709, limited range, and the stream says so.

use kinoflock_inference::RgbFrames;
use muxide::api::{Muxer, MuxerBuilder, VideoCodec};
use openh264::encoder::{
    BitRate, Encoder, EncoderConfig, FrameRate, FrameType, IntraFramePeriod, QpRange, RateControlMode,
    UsageType, VuiConfig,
};
use openh264::formats::YUVSlices;
use openh264::{OpenH264API, Timestamp};

use super::color::Yuv420;
use super::frames::{self, FramesError};

/// Shortest side that the encoder takes, pixels: one macroblock.
pub const MIN_SIDE: usize = 16;
/// Longer side, pixels, that the encoder takes (H.264 level 5.2).
pub const MAX_LONG_SIDE: usize = 3840;
/// Shorter side, pixels, that the encoder takes.
pub const MAX_SHORT_SIDE: usize = 2160;
/// Seconds between two pictures from which a player can start.
const KEYFRAME_SECONDS: f64 = 4.0;
/// Frames a second that the encoder's rate control is told at most; the file's times are exact whatever it is.
const MAX_CONTROL_RATE: f64 = 60.0;

/// How much of the picture is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quality {
    /// Quantiser 18 to 22: what is kept and shared.
    #[default]
    Archive,
    /// Quantiser 26 to 30: about a third of the bytes.
    Preview,
}

/// Why frames could not become a clip.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// No frames, or data that does not fit them.
    #[error(transparent)]
    Frames(#[from] FramesError),
    /// A side that 4:2:0 cannot hold.
    #[error("{width}x{height} cannot be encoded: both sides must be even; the nearest is {}x{}", width & !1, height & !1)]
    Odd {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
    },
    /// A side below one macroblock.
    #[error("{width}x{height} cannot be encoded: both sides must be at least {MIN_SIDE} pixels")]
    TooSmall {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
    },
    /// A side beyond what the encoder takes.
    #[error(
        "{width}x{height} cannot be encoded: the limit is {MAX_LONG_SIDE}x{MAX_SHORT_SIDE}, either way up"
    )]
    TooLarge {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
    },
    /// Frames of another size than the ones before.
    #[error(
        "a frame of {}x{} does not belong into a clip of {}x{}", given.0, given.1, needed.0, needed.1
    )]
    Size {
        /// Width and height, pixels.
        given: (usize, usize),
        /// Those of the clip.
        needed: (usize, usize),
    },
    /// A frame rate that gives no times.
    #[error("{given} frames per second cannot be encoded: it must be a number above 0 and at most {limit}")]
    Rate {
        /// Frames a second.
        given: f64,
        /// Greatest frame rate of the container's clock.
        limit: f64,
    },
    /// The encoder failed.
    #[error("h264 encoder: {0}")]
    Encoder(String),
    /// The container could not be written.
    #[error("mp4 writer: {0}")]
    Container(String),
}

impl EncodeError {
    /// Stable name for the wire and for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Frames(error) => error.code(),
            Self::Odd { .. } => "odd_size",
            Self::TooSmall { .. } => "size_too_small",
            Self::TooLarge { .. } => "size_too_large",
            Self::Size { .. } => "frame_size",
            Self::Rate { .. } => "frame_rate",
            Self::Encoder(_) => "encoder",
            Self::Container(_) => "container",
        }
    }
}

/// Greatest frame rate: a tick of the container's 90 kHz clock per frame, with room for rounding.
const MAX_RATE: f64 = 10_000.0;

/// Says whether a clip of this size and rate can be encoded, before anything is computed for it.
///
/// # Errors
/// What [`encode_mp4`] would answer for such frames.
pub fn check_size(width: usize, height: usize, fps: f64) -> Result<(), EncodeError> {
    if !(fps > 0.0 && fps <= MAX_RATE) {
        return Err(EncodeError::Rate { given: fps, limit: MAX_RATE });
    }
    if width < MIN_SIDE || height < MIN_SIDE {
        return Err(EncodeError::TooSmall { width, height });
    }
    if !width.is_multiple_of(2) || !height.is_multiple_of(2) {
        return Err(EncodeError::Odd { width, height });
    }
    if width.max(height) > MAX_LONG_SIDE || width.min(height) > MAX_SHORT_SIDE {
        return Err(EncodeError::TooLarge { width, height });
    }
    Ok(())
}

/// The bytes of an MP4 file with these frames at `fps` frames a second.
///
/// # Errors
/// When the frames are none, of a size that H.264 4:2:0 cannot hold, or the rate is no positive number.
pub fn encode_mp4(frames: &RgbFrames, fps: f64, quality: Quality) -> Result<Vec<u8>, EncodeError> {
    let mut encoder = ClipEncoder::new((frames.width, frames.height), fps, quality)?;
    encoder.push(frames)?;
    encoder.finish()
}

/// A clip whose frames come one after the other.
pub struct ClipEncoder {
    encoder: Encoder,
    muxer: Muxer<Vec<u8>>,
    yuv: Yuv420,
    fps: f64,
    /// Frames that are encoded.
    count: usize,
}

impl ClipEncoder {
    /// One for frames of this width and height.
    ///
    /// # Errors
    /// What [`check_size`] finds, or what the encoder reports.
    pub fn new((width, height): (usize, usize), fps: f64, quality: Quality) -> Result<Self, EncodeError> {
        check_size(width, height, fps)?;
        let muxer = MuxerBuilder::new(Vec::new())
            .video(VideoCodec::H264, width as u32, height as u32, fps)
            .build()
            .map_err(container)?;
        Ok(Self { encoder: encoder(fps, quality)?, muxer, yuv: Yuv420::new(width, height), fps, count: 0 })
    }

    /// Encodes the frames that follow.
    ///
    /// # Errors
    /// When they are none, of another size than the clip, or the encoder fails.
    pub fn push(&mut self, frames: &RgbFrames) -> Result<(), EncodeError> {
        frames::check(frames)?;
        let size = (self.yuv.width, self.yuv.height);
        if (frames.width, frames.height) != size {
            let given = (frames.width, frames.height);
            return Err(EncodeError::Size { given, needed: size });
        }
        let strides = (size.0, size.0 / 2, size.0 / 2);
        for index in 0..frames.count {
            self.yuv.set_rgb(frames.frame(index).expect("invariant: the frames were checked"));
            let seconds = self.count as f64 / self.fps;
            let source = YUVSlices::new((&self.yuv.y, &self.yuv.u, &self.yuv.v), size, strides);
            let time = Timestamp::from_millis((seconds * 1000.0).round() as u64);
            let packet = self
                .encoder
                .encode_at(&source, time)
                .map_err(|error| EncodeError::Encoder(error.to_string()))?;
            let key = matches!(packet.frame_type(), FrameType::IDR | FrameType::I);
            self.muxer.write_video(seconds, &packet.to_vec(), key).map_err(container)?;
            self.count += 1;
        }
        Ok(())
    }

    /// The bytes of the clip's file.
    ///
    /// # Errors
    /// When there is no frame, or the container cannot be written.
    pub fn finish(mut self) -> Result<Vec<u8>, EncodeError> {
        if self.count == 0 {
            return Err(FramesError::Empty.into());
        }
        self.muxer.finish_in_place().map_err(container)?;
        Ok(self.muxer.into_writer())
    }
}

fn encoder(fps: f64, quality: Quality) -> Result<Encoder, EncodeError> {
    let qp = match quality {
        Quality::Archive => QpRange::new(18, 22),
        Quality::Preview => QpRange::new(26, 30),
    };
    // Without a target the rate control pushes every frame to the coarse end of the range, which is the point.
    let config = EncoderConfig::new()
        .usage_type(UsageType::CameraVideoRealTime)
        .rate_control_mode(RateControlMode::Quality)
        .bitrate(BitRate::from_bps(120_000))
        .max_frame_rate(FrameRate::from_hz(fps.clamp(1.0, MAX_CONTROL_RATE) as f32))
        .qp(qp)
        .skip_frames(false)
        .num_threads(1)
        .intra_frame_period(
            IntraFramePeriod::from_num_frames((fps * KEYFRAME_SECONDS).ceil().max(1.0) as u32),
        )
        .vui(VuiConfig::bt709());
    Encoder::with_api_config(OpenH264API::from_source(), config)
        .map_err(|error| EncodeError::Encoder(error.to_string()))
}

fn container(error: impl std::fmt::Display) -> EncodeError {
    EncodeError::Container(error.to_string())
}

//! The pictures of a job, and the clip that it goes on from, as a model takes them.
//!
//! They come from strangers, and are read here, in the worker's process, within bounds. A picture is scaled until it
//! covers the clip's size, and what then juts out is cut off on both sides alike.

use std::io::Cursor;
use std::path::Path;

use image::imageops::FilterType;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage};
use kinoflock_inference::pipeline::conditions::{Condition, Takes};
use kinoflock_inference::{Device, Pipeline, RgbFrames, Tensor};
use kinoflock_protocol::id::BlobId;

use crate::engine::mp4;
use crate::engine::wire::{Failure, RunRequest, input_name};

/// Longest side of a picture that is read, pixels.
const MAX_SIDE: u32 = 16_384;
/// Memory for reading a picture, bytes (512 MiB).
const MAX_DECODED: u64 = 512 << 20;

/// What a run's frames are to show, in the order in which models expect it: the beginning first, the end last.
pub(super) fn conditions(request: &RunRequest, pipeline: &dyn Pipeline) -> Result<Vec<Condition>, Failure> {
    let extra = &request.extra;
    if extra.grey_pictures && extra.inputs.is_none() {
        return grey(pipeline.pictures(), request.frames, (request.width, request.height));
    }
    let Some(folder) = &extra.inputs else { return Ok(Vec::new()) };
    let read = |blob: &BlobId| super::local::read_state(&input_path(folder, blob));
    let size = (request.width, request.height);
    let mut conditions = Vec::with_capacity(extra.pictures.len() + 1);
    if let Some(clip) = &extra.extend {
        let clip = mp4::decode_mp4_bytes(&read(clip)?).map_err(|error| fault(error.to_string()))?;
        let frames = last_frames(&clip, going_on(request, pipeline))?;
        conditions.push(Condition::new(tensor(frames, size)?, 0));
    }
    for picture in extra.pictures.iter() {
        let pixels = tensor(vec![decode(&read(&picture.image)?)?], size)?;
        conditions
            .push(Condition { strength: picture.strength, ..Condition::new(pixels, picture.frame as usize) });
    }
    conditions.sort_by_key(|condition| condition.frame);
    Ok(conditions)
}

/// Grey pictures where a model cannot do without.
fn grey(takes: Takes, frames: u32, size: (u32, u32)) -> Result<Vec<Condition>, Failure> {
    let places = match takes {
        Takes::First { needed: true } | Takes::Ends { needed: true } => vec![0],
        Takes::Both => vec![0, frames.saturating_sub(1) as usize],
        _ => Vec::new(),
    };
    let picture = |frame: usize| {
        let grey = RgbImage::from_pixel(size.0, size.1, image::Rgb([128; 3]));
        Ok(Condition::new(tensor(vec![grey], size)?, frame))
    };
    places.into_iter().map(picture).collect()
}

/// How many frames of a clip a new one begins with where it goes on: whole latent frames, where the model takes so many.
fn going_on(request: &RunRequest, pipeline: &dyn Pipeline) -> usize {
    let ratio = pipeline.info().work.temporal_ratio;
    match (request.extra.extend_frames, pipeline.pictures()) {
        (Some(frames), _) => frames as usize,
        (None, Takes::Any) => ratio + 1,
        (None, _) => 1,
    }
}

/// The last of a clip's frames.
fn last_frames(clip: &RgbFrames, count: usize) -> Result<Vec<RgbImage>, Failure> {
    let count = count.clamp(1, clip.count);
    let frame = |index: usize| {
        let bytes = clip.frame(index).map(<[u8]>::to_vec);
        bytes.and_then(|bytes| RgbImage::from_raw(clip.width as u32, clip.height as u32, bytes))
    };
    let frames: Option<Vec<_>> = (clip.count - count..clip.count).map(frame).collect();
    frames.ok_or_else(|| fault("a frame of the clip is cut".to_owned()))
}

/// A PNG's or JPEG's pixels, upright.
fn decode(bytes: &[u8]) -> Result<RgbImage, Failure> {
    let read = || -> image::ImageResult<RgbImage> {
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
        let mut limits = Limits::default();
        (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
        limits.max_alloc = Some(MAX_DECODED);
        reader.limits(limits);
        let mut decoder = reader.into_decoder()?;
        let orientation = decoder.orientation()?;
        let mut picture = DynamicImage::from_decoder(decoder)?;
        picture.apply_orientation(orientation);
        Ok(picture.to_rgb8())
    };
    read().map_err(|error| fault(format!("it is no PNG or JPEG that can be read: {error}")))
}

/// Pictures as `[n, 3, height, width]` with values in 0 to 1.
fn tensor(pictures: Vec<RgbImage>, (width, height): (u32, u32)) -> Result<Tensor, Failure> {
    let count = pictures.len();
    let mut bytes = Vec::with_capacity(count * (width * height * 3) as usize);
    for picture in pictures {
        bytes.extend_from_slice(&fitted(picture, width, height));
    }
    let shape = (count, height as usize, width as usize, 3);
    let made = Tensor::from_vec(bytes, shape, &Device::Cpu).and_then(|pixels| {
        let pixels = pixels.to_dtype(kinoflock_inference::DType::F32)?.affine(1.0 / 255.0, 0.0)?;
        pixels.permute((0, 3, 1, 2))?.contiguous()
    });
    made.map_err(|error| fault(error.to_string()))
}

fn fitted(picture: RgbImage, width: u32, height: u32) -> RgbImage {
    if picture.dimensions() == (width, height) {
        return picture;
    }
    DynamicImage::ImageRgb8(picture).resize_to_fill(width, height, FilterType::Lanczos3).to_rgb8()
}

/// Where an input lies.
fn input_path(folder: &str, blob: &BlobId) -> String {
    Path::new(folder).join(input_name(blob)).to_string_lossy().into_owned()
}

fn fault(reason: String) -> Failure {
    Failure::new("picture", &format!("a given picture: {reason}"), false)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn png(width: u32, height: u32, pixel: impl Fn(u32, u32) -> [u8; 3]) -> Vec<u8> {
        let picture = RgbImage::from_fn(width, height, |x, y| image::Rgb(pixel(x, y)));
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn a_picture_is_scaled_to_cover_and_cut_on_both_sides() {
        // Three squares side by side; the middle one is what a square clip shows.
        let bytes = png(96, 32, |x, _| [[255, 0, 0], [0, 255, 0], [0, 0, 255]][(x / 32) as usize]);
        let pixels = tensor(vec![decode(&bytes).unwrap()], (16, 16)).unwrap();
        assert_eq!(pixels.dims(), [1, 3, 16, 16]);
        let middle = pixels.narrow(3, 4, 8).unwrap().mean((2, 3)).unwrap().to_vec2::<f32>().unwrap();
        assert!(middle[0][1] > 0.99 && middle[0][0] < 0.01 && middle[0][2] < 0.01, "{middle:?}");
    }

    #[test]
    fn what_is_no_picture_or_too_large_is_said() {
        assert!(decode(b"GIF89a").unwrap_err().text.contains("no PNG or JPEG"));
        let mut cut = png(8, 8, |_, _| [1, 2, 3]);
        cut.truncate(40);
        assert_eq!(decode(&cut).unwrap_err().code.as_str(), "picture");
        let wide = png(MAX_SIDE + 1, 1, |_, _| [0; 3]);
        assert!(decode(&wide).is_err(), "a picture wider than {MAX_SIDE} pixels is read");
    }

    #[test]
    fn a_self_test_shows_grey_pictures_to_models_that_need_some() {
        let places = |takes| -> Vec<usize> {
            grey(takes, 9, (32, 16)).unwrap().iter().map(|condition| condition.frame).collect()
        };
        assert_eq!(places(Takes::Both), [0, 8]);
        assert_eq!(places(Takes::First { needed: true }), [0]);
        assert_eq!(places(Takes::Ends { needed: true }), [0]);
        for takes in [Takes::NOTHING, Takes::Any, Takes::First { needed: false }] {
            assert!(places(takes).is_empty());
        }
        assert_eq!(grey(Takes::Both, 9, (32, 16)).unwrap()[0].pictures.dims(), [1, 3, 16, 32]);
    }

    #[test]
    fn a_clip_gives_its_last_frames() {
        let data = (0u8..5).flat_map(|frame| [frame; 12]).collect();
        let clip = RgbFrames { width: 2, height: 2, count: 5, data };
        let values = |count| -> Vec<u8> {
            last_frames(&clip, count).unwrap().iter().map(|frame| frame.as_raw()[0]).collect()
        };
        assert_eq!(values(2), [3, 4]);
        assert_eq!(values(9), [0, 1, 2, 3, 4]);
    }
}

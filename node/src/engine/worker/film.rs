//! The clip of a run: encoded on a thread of its own, while its later frames are still decoded.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use kinoflock_inference::RgbFrames;

use crate::engine::encode::{ClipEncoder, EncodeError, Quality};
use crate::engine::wire::Failure;

/// Handfuls of frames that wait for the encoder; who decodes waits while there are so many.
const WAITING: usize = 4;

/// Takes a clip's frames.
pub(super) struct Film {
    feed: SyncSender<RgbFrames>,
    encoder: JoinHandle<Result<Clip, EncodeError>>,
}

/// An encoded clip.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Clip {
    /// The file.
    pub bytes: Vec<u8>,
    /// Frames.
    pub frames: usize,
    /// Whether every pixel of every frame has the same colour.
    pub constant: bool,
}

impl Film {
    /// Begins a clip of this width and height.
    pub(super) fn new(size: (usize, usize), fps: f64) -> Result<Self, Failure> {
        let (feed, frames) = sync_channel(WAITING);
        let encoder = Builder::new().name("encode".to_owned()).spawn(move || encode(&frames, size, fps));
        let encoder = encoder.map_err(|error| {
            Failure::new("encoder", &format!("the encoder's thread cannot be started: {error}"), true)
        })?;
        Ok(Self { feed, encoder })
    }

    /// The frames that follow. An encoder that has failed takes no more; [`Film::develop`] tells why.
    pub(super) fn push(&self, frames: RgbFrames) {
        let _told_at_the_end = self.feed.send(frames);
    }

    /// Waits for the encoder.
    pub(super) fn develop(self) -> Result<Clip, Failure> {
        drop(self.feed);
        let ended = self.encoder.join().map_err(|_| Failure::new("encoder", "the encoder panicked", true))?;
        ended.map_err(|error| Failure::new(error.code(), &error.to_string(), false))
    }
}

fn encode(frames: &Receiver<RgbFrames>, size: (usize, usize), fps: f64) -> Result<Clip, EncodeError> {
    let mut encoder = ClipEncoder::new(size, fps, Quality::Archive)?;
    let (mut count, mut colour, mut constant) = (0, None, true);
    for some in frames {
        let pixels = some.data.as_chunks::<3>().0;
        let first = *colour.get_or_insert(pixels.first().copied().unwrap_or_default());
        constant = constant && pixels.iter().all(|pixel| *pixel == first);
        count += some.count;
        encoder.push(&some)?;
    }
    Ok(Clip { bytes: encoder.finish()?, frames: count, constant })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::engine::encode::encode_mp4;

    fn frames(range: std::ops::Range<usize>) -> RgbFrames {
        let pixel = |i: usize, frame: usize| [(i * 3 + frame * 40) as u8, (i * 7) as u8, 90];
        let data = range.clone().flat_map(|frame| (0..32 * 16).flat_map(move |i| pixel(i, frame)));
        RgbFrames { width: 32, height: 16, count: range.len(), data: data.collect() }
    }

    #[test]
    fn a_clip_in_handfuls_has_the_bytes_of_the_clip_at_once() {
        let bytes = encode_mp4(&frames(0..25), 8.0, Quality::Archive).unwrap();
        for size in [1, 3, 8, 25] {
            let film = Film::new((32, 16), 8.0).unwrap();
            // More of them than wait: were nothing encoded before the end, this would never end.
            for start in (0..25).step_by(size) {
                film.push(frames(start..(start + size).min(25)));
            }
            let clip = film.develop().unwrap();
            assert_eq!(clip, Clip { bytes: bytes.clone(), frames: 25, constant: false });
        }
    }

    #[test]
    fn frames_of_one_colour_are_told_from_others_across_handfuls() {
        let clip = |colours: [u8; 2]| {
            let film = Film::new((16, 16), 8.0).unwrap();
            for colour in colours {
                film.push(RgbFrames { width: 16, height: 16, count: 1, data: vec![colour; 16 * 16 * 3] });
            }
            film.develop().unwrap().constant
        };
        assert!(clip([70, 70]));
        assert!(!clip([70, 71]));
    }

    #[test]
    fn what_cannot_be_encoded_is_told_at_the_end() {
        let film = Film::new((64, 16), 8.0).unwrap();
        for _ in 0..20 {
            film.push(frames(0..1));
        }
        let failure = film.develop().unwrap_err();
        assert_eq!(failure.code.as_str(), "frame_size");
        assert!(failure.text.as_str().contains("32x16"), "{failure:?}");
        assert_eq!(Film::new((16, 16), 8.0).unwrap().develop().unwrap_err().code.as_str(), "no_frames");
    }
}

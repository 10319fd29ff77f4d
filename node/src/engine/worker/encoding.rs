//! The clip of a run: encoded on a thread of its own, while its later frames are still decoded.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use kinoflock_inference::RgbFrames;

use crate::engine::encode::{ClipEncoder, EncodeError, Quality};
use crate::engine::wire::Failure;

/// Handfuls of frames that wait for the encoder: all of most clips, whose bytes a memory plan counts, so that a device does
/// not wait for the processor. Who decodes a longer clip waits while there are so many.
const WAITING: usize = 64;

/// Takes a clip's frames. Dropped before its end, it stops the encoder and waits for it.
pub(super) struct Encoding {
    feed: Option<SyncSender<RgbFrames>>,
    encoder: Option<JoinHandle<Result<Clip, EncodeError>>>,
    stop: Arc<AtomicBool>,
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

impl Encoding {
    /// Begins a clip of this width and height.
    pub(super) fn new(size: (usize, usize), fps: f64) -> Result<Self, Failure> {
        let (feed, frames) = sync_channel(WAITING);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let encode = move || encode(&frames, size, fps, &stopped);
        let encoder = Builder::new().name("encode".to_owned()).spawn(encode).map_err(|error| {
            Failure::new("encoder", &format!("the encoder's thread cannot be started: {error}"), true)
        })?;
        Ok(Self { feed: Some(feed), encoder: Some(encoder), stop })
    }

    /// The frames that follow; false where the encoder has failed and takes no more: [`Encoding::finish`] tells why.
    pub(super) fn push(&self, frames: RgbFrames) -> bool {
        self.feed.as_ref().is_some_and(|feed| feed.send(frames).is_ok())
    }

    /// Waits for the encoder.
    pub(super) fn finish(mut self) -> Result<Clip, Failure> {
        self.feed = None;
        let encoder = self.encoder.take().expect("invariant: it is taken here and where this is dropped");
        let ended = encoder.join().map_err(|_| Failure::new("encoder", "the encoder panicked", true))?;
        ended.map_err(|error| Failure::new(error.code(), &error.to_string(), false))
    }
}

impl Drop for Encoding {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.feed = None;
        if let Some(encoder) = self.encoder.take() {
            // The clip is for nobody; what it would have been does not matter.
            drop(encoder.join());
        }
    }
}

fn encode(
    frames: &Receiver<RgbFrames>,
    size: (usize, usize),
    fps: f64,
    stop: &AtomicBool,
) -> Result<Clip, EncodeError> {
    let mut encoder = ClipEncoder::new(size, fps, Quality::Archive)?;
    let (mut count, mut colour, mut constant) = (0, None, true);
    for some in frames {
        if stop.load(Ordering::Relaxed) {
            break;
        }
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
            let encoding = Encoding::new((32, 16), 8.0).unwrap();
            for start in (0..25).step_by(size) {
                assert!(encoding.push(frames(start..(start + size).min(25))));
            }
            let clip = encoding.finish().unwrap();
            assert_eq!(clip, Clip { bytes: bytes.clone(), frames: 25, constant: false });
        }
    }

    #[test]
    fn frames_of_one_colour_are_told_from_others_across_handfuls() {
        let clip = |colours: [u8; 2]| {
            let encoding = Encoding::new((16, 16), 8.0).unwrap();
            for colour in colours {
                assert!(encoding.push(RgbFrames {
                    width: 16,
                    height: 16,
                    count: 1,
                    data: vec![colour; 16 * 16 * 3]
                }));
            }
            encoding.finish().unwrap().constant
        };
        assert!(clip([70, 70]));
        assert!(!clip([70, 71]));
    }

    #[test]
    fn an_encoder_that_fails_takes_no_more_and_tells_why() {
        let encoding = Encoding::new((64, 16), 8.0).unwrap();
        // Taken until the encoder has looked at one.
        while encoding.push(frames(0..1)) {
            std::thread::yield_now();
        }
        let failure = encoding.finish().unwrap_err();
        assert_eq!(failure.code.as_str(), "frame_size");
        assert!(failure.text.as_str().contains("32x16"), "{failure:?}");
        assert_eq!(Encoding::new((16, 16), 8.0).unwrap().finish().unwrap_err().code.as_str(), "no_frames");
    }

    #[test]
    fn frames_are_encoded_before_the_last_one_is_there() {
        let encoding = Encoding::new((32, 16), 8.0).unwrap();
        assert!(encoding.push(frames(0..1)));
        assert!(encoding.push(RgbFrames { count: 2, ..frames(0..1) }));
        // Only a look at the second handful, whose bytes are too few, lets it fail while the feed is open.
        while encoding.push(frames(0..1)) {
            std::thread::yield_now();
        }
        assert_eq!(encoding.finish().unwrap_err().code.as_str(), "frame_length");
    }

    #[test]
    fn a_clip_that_is_given_up_leaves_no_thread_behind() {
        let encoding = Encoding::new((32, 16), 8.0).unwrap();
        for _ in 0..20 {
            encoding.push(frames(0..25));
        }
        let stop = Arc::clone(&encoding.stop);
        drop(encoding);
        assert_eq!(Arc::strong_count(&stop), 1);
    }
}

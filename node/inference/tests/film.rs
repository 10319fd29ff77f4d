//! Frames on their way: every family hands them on while it still decodes, in runs and in tiles, and they are the clip's.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;

use kinoflock_inference::{
    DecodeOptions, Device, Error, GenerateRequest, Observer, Pipeline, RgbFrames, Tensor,
};

#[path = "support/tiny.rs"]
mod tiny;
use tiny::{golden, open};

/// A golden folder, a clip that it decodes, and a tile and a run of it.
struct Family {
    folder: &'static str,
    size: (usize, usize),
    frames: usize,
    latents: [usize; 5],
    tile: usize,
    chunk: usize,
}

const fn family(
    folder: &'static str,
    size: (usize, usize),
    frames: usize,
    latents: [usize; 5],
    (tile, chunk): (usize, usize),
) -> Family {
    Family { folder, size, frames, latents, tile, chunk }
}

const FAMILIES: [Family; 5] = [
    family("ltx-video-0.9.0", (192, 96), 25, [1, 8, 4, 3, 6], (64, 8)),
    family("cogvideox-5b", (48, 32), 25, [1, 4, 7, 4, 6], (24, 8)),
    family("mochi-1", (64, 48), 25, [1, 12, 5, 6, 8], (32, 6)),
    family("wan2.1", (96, 64), 25, [1, 4, 7, 8, 12], (32, 4)),
    family("pyramid-flow-miniflux", (128, 64), 25, [1, 4, 4, 8, 16], (64, 8)),
];

/// What an observer of a decode was told and asked, in order.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Frames(usize),
    Asked,
}

/// Writes down, and may want to stop once it has frames.
struct Clerk {
    events: RefCell<Vec<Event>>,
    data: Vec<u8>,
    stops: bool,
    gives_back: bool,
}

impl Clerk {
    fn new(stops: bool, gives_back: bool) -> Self {
        Self { events: RefCell::default(), data: Vec::new(), stops, gives_back }
    }
}

impl Observer for Clerk {
    fn frames(&mut self, frames: RgbFrames) -> Option<RgbFrames> {
        self.events.borrow_mut().push(Event::Frames(frames.count));
        self.data.extend_from_slice(&frames.data);
        self.gives_back.then_some(frames)
    }
    fn cancelled(&self) -> bool {
        self.events.borrow_mut().push(Event::Asked);
        self.stops && !self.data.is_empty()
    }
}

fn request(family: &Family, pipeline: &dyn Pipeline, tile: bool) -> GenerateRequest {
    let count: usize = family.latents.iter().product();
    let latents = Tensor::arange(0f32, count as f32, &Device::Cpu).unwrap();
    let latents = latents.sin().unwrap().reshape(&family.latents[..]).unwrap();
    let mut request = GenerateRequest {
        width: family.size.0,
        height: family.size.1,
        frames: family.frames,
        steps: 4,
        decode: DecodeOptions { tile: tile.then_some(family.tile), chunk: Some(family.chunk), skip: false },
        ..GenerateRequest::new("", &pipeline.info().defaults)
    };
    request.touch.decode_only = Some(latents);
    request
}

#[test]
fn frames_are_handed_on_while_others_are_decoded() {
    for (family, tile) in FAMILIES.iter().flat_map(|family| [(family, false), (family, true)]) {
        let name = format!("{} {}", family.folder, if tile { "in tiles" } else { "in runs" });
        let mut pipeline = open(&golden(family.folder));
        let request = request(family, &*pipeline, tile);
        let mut clerk = Clerk::new(false, true);
        let made = pipeline.generate(&request, &mut clerk).unwrap();
        assert_eq!((made.frames.count, &made.frames.data), (family.frames, &clerk.data), "{name}");
        let events = clerk.events.into_inner();
        let is_frames = |event: &Event| matches!(event, Event::Frames(_));
        let first = events.iter().position(is_frames).unwrap();
        let last = events.iter().rposition(is_frames).unwrap();
        assert!(events[first..last].contains(&Event::Asked), "{name}: {events:?}");
    }
}

#[test]
fn a_cancel_between_two_handfuls_stops_a_decode() {
    for (family, tile) in FAMILIES.iter().flat_map(|family| [(family, false), (family, true)]) {
        let mut pipeline = open(&golden(family.folder));
        let request = request(family, &*pipeline, tile);
        let mut clerk = Clerk::new(true, false);
        match pipeline.generate(&request, &mut clerk) {
            Err(Error::Cancelled { steps_done, steps }) => assert_eq!(steps_done, steps),
            other => panic!("{} {tile}: {other:?}", family.folder),
        }
        let whole = request.width * request.height * request.frames * 3;
        assert!(!clerk.data.is_empty() && clerk.data.len() < whole, "{} {tile}", family.folder);
    }
}

#[test]
fn a_decode_at_once_is_handed_on_in_handfuls_and_stops_between_them() {
    let family = &FAMILIES[0];
    let mut pipeline = open(&golden(family.folder));
    let mut request = request(family, &*pipeline, false);
    request.decode.chunk = None;
    let mut clerk = Clerk::new(false, false);
    let made = pipeline.generate(&request, &mut clerk).unwrap();
    assert_eq!((made.frames.count, made.frames.data.len()), (0, 0), "what is taken is not kept");
    let handfuls: Vec<_> = clerk.events.into_inner();
    let handfuls = handfuls.iter().filter_map(|event| match event {
        Event::Frames(count) => Some(*count),
        Event::Asked => None,
    });
    assert_eq!(handfuls.collect::<Vec<_>>(), [8, 8, 8, 1]);
    let mut clerk = Clerk::new(true, false);
    let error = pipeline.generate(&request, &mut clerk).unwrap_err();
    assert_eq!((error.code(), clerk.data.len()), ("cancelled", 8 * request.width * request.height * 3));
}

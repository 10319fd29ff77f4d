//! The bundled model makes what the reference makes of it: `fixtures/motif-golden.safetensors` was written by the
//! reference from the same weights, and tells in its metadata how.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;

use kinoflock_inference::models::ltx::pipeline::pack;
use kinoflock_inference::{Device, GenerateRequest, LoadOptions, RgbFrames, Silent, Tensor, load, motif};

/// Latents of about unit spread, after all steps; both sides compute in f32.
const LATENTS_TOLERANCE: f32 = 2e-3;
/// Of 255: a rounding, and what the latents' difference does to a pixel.
const PIXEL_TOLERANCE: u8 = 2;

fn golden() -> (HashMap<String, Tensor>, HashMap<String, String>) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/motif-golden.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    (candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap(), metadata)
}

fn number<T: std::str::FromStr>(metadata: &HashMap<String, String>, key: &str) -> T {
    metadata[key].parse().ok().unwrap_or_else(|| panic!("{key} is {:?}", metadata[key]))
}

#[test]
fn the_bundled_model_reproduces_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let mut pipeline = load(folder.path(), &LoadOptions::default()).unwrap();
    let (tensors, metadata) = golden();
    let mut request = GenerateRequest::new(metadata["prompt"].clone(), &pipeline.info().defaults);
    request.negative_prompt = metadata["negative_prompt"].clone();
    request.width = number(&metadata, "width");
    request.height = number(&metadata, "height");
    request.frames = number(&metadata, "frames");
    request.fps = number(&metadata, "fps");
    request.steps = number(&metadata, "steps");
    request.guidance = number(&metadata, "guidance");
    request.initial_latents = Some(tensors["in.latents"].clone());
    let made = pipeline.generate(&request, &mut Silent).unwrap();

    let latents = pack(&made.latents, pipeline.info().work.patch).unwrap();
    let difference = (&latents - &tensors["out.latents"]).unwrap().abs().unwrap().flatten_all().unwrap();
    let worst = difference.max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(worst < LATENTS_TOLERANCE, "latents differ by {worst}");

    let wanted = RgbFrames::from_unit(&tensors["out.frames"]).unwrap();
    let indices: Vec<usize> =
        metadata["frame_indices"].split(',').map(|index| index.parse().unwrap()).collect();
    assert_eq!(indices.len(), wanted.count);
    for (row, &index) in indices.iter().enumerate() {
        let (ours, theirs) = (made.frames.frame(index).unwrap(), wanted.frame(row).unwrap());
        let worst = ours.iter().zip(theirs).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= PIXEL_TOLERANCE, "frame {index} differs by {worst}");
    }
}

#[test]
fn the_bundled_model_takes_a_prompt_at_its_defaults() {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let mut pipeline = load(folder.path(), &LoadOptions::default()).unwrap();
    let defaults = pipeline.info().defaults;
    let request = GenerateRequest::new("a red circle drifts left over a blue field", &defaults);
    let made = pipeline.generate(&request, &mut Silent).unwrap();
    assert_eq!((made.frames.width, made.frames.height, made.frames.count), (64, 64, 17));
    let (low, high) = (made.frames.data.iter().min().unwrap(), made.frames.data.iter().max().unwrap());
    assert!(high - low > 50, "the clip is flat: {low} to {high}");
}

/// Keeps the last preview.
#[derive(Default)]
struct Preview(Option<RgbFrames>);

impl kinoflock_inference::Observer for Preview {
    fn preview(&mut self, frames: &RgbFrames) {
        self.0 = Some(frames.clone());
    }
}

/// How far a preview is from its clip, of 255: over the cells of the first frame, which is a latent frame of its own.
fn distance(preview: &RgbFrames, clip: &RgbFrames) -> f64 {
    let side = clip.width / preview.width;
    let (small, large) = (preview.frame(0).unwrap(), clip.frame(0).unwrap());
    let mut sum = 0.0;
    for (index, shown) in small.iter().enumerate() {
        let (cell, colour) = (index / 3, index % 3);
        let (row, column) = (cell / preview.width * side, cell % preview.width * side);
        let pixel = |at: usize| {
            let (y, x) = (row + at / side, column + at % side);
            f64::from(large[(y * clip.width + x) * 3 + colour])
        };
        let mean = (0..side * side).map(pixel).sum::<f64>() / (side * side) as f64;
        sum += (mean - f64::from(*shown)).abs();
    }
    sum / small.len() as f64
}

#[test]
fn a_preview_has_the_colours_of_the_clip() {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let mut pipeline = load(folder.path(), &LoadOptions::default()).unwrap();
    for (prompt, seed) in [
        ("a red circle drifts left over a blue field", 7),
        ("a yellow star floats up over a purple ground", 3),
    ] {
        let mut request = GenerateRequest::new(prompt, &pipeline.info().defaults);
        (request.seed, request.preview_every) = (seed, request.steps);
        let mut seen = Preview::default();
        let made = pipeline.generate(&request, &mut seen).unwrap();
        let far = distance(&seen.0.unwrap(), &made.frames);
        let plain =
            kinoflock_inference::pipeline::latents::LatentRgb::default().project(&made.latents).unwrap();
        let without = distance(&plain, &made.frames);
        assert!(far < 0.5 * without, "{prompt}: {far} against {without}");
    }
}

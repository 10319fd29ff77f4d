//! What is computed once instead of twice: the text's embeddings, and guidance's predictions as one batch.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use kinoflock_inference::offload::InTurn;
use kinoflock_inference::sampler::guidance::GuidancePasses;
use kinoflock_inference::text::PromptEncoder;
use kinoflock_inference::{Condition, Device, GenerateRequest, LoadOptions, Silent, Tensor, load, registry};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("pipeline")
}

/// A small guided request, with as many pictures as are wanted: at the beginning, and at the end.
fn request(folder: &Path, pictures: usize) -> GenerateRequest {
    let mut request = registry::facts(folder).unwrap().smallest();
    (request.prompt, request.negative_prompt) = ("a red dog".to_owned(), "cold fog".to_owned());
    (request.steps, request.guidance, request.truncate_prompt) = (2, 4.0, true);
    request.decode.skip = true;
    let shape = (1, 3, request.height, request.width);
    let picture = || Tensor::full(0.5f32, shape, &Device::Cpu).unwrap();
    let frames = [0, request.frames - 1];
    request.conditions =
        frames.iter().take(pictures).map(|&frame| Condition::new(picture(), frame)).collect();
    request
}

#[test]
fn a_prompt_is_encoded_once_however_often_it_is_asked_for() {
    let (encoder, _) =
        PromptEncoder::load(&golden("wan2.1"), &LoadOptions::default(), 24, &InTurn::default()).unwrap();
    let (first, mask) = encoder.encode("a red dog", false, true).unwrap();
    let (again, same_mask) = encoder.encode("a red dog", false, true).unwrap();
    assert_eq!(encoder.encodings(), 1);
    assert_eq!(
        first.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        again.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
    assert_eq!(mask.to_vec2::<u8>().unwrap(), same_mask.to_vec2::<u8>().unwrap());
    // Another text, and the same one read otherwise.
    encoder.encode("cold fog", false, true).unwrap();
    encoder.encode("a red dog", false, false).unwrap();
    assert_eq!(encoder.encodings(), 3);
    for _ in 0..3 {
        encoder.encode("a red dog", false, true).unwrap();
        encoder.encode("cold fog", false, true).unwrap();
    }
    assert_eq!(encoder.encodings(), 3);
}

#[test]
fn guidance_in_one_batch_gives_what_two_passes_give() {
    for (name, pictures) in [
        ("ltx-video-0.9.0", 0),
        ("ltx-video-0.9.5", 0),
        ("ltx-video-0.9.5", 1),
        ("cogvideox-2b", 0),
        ("cogvideox-5b-i2v", 1),
        ("cogvideox-1.5", 0),
        ("mochi-1", 0),
        ("pyramid-flow-miniflux", 1),
        ("pyramid-flow-sd3", 0),
        ("wan2.1", 0),
        ("wan2.1-flf2v", 2),
        ("wan2.2-a14b", 0),
        ("wan2.2-ti2v-5b", 1),
    ] {
        let folder = golden(name);
        let mut pipeline = load(&folder, &LoadOptions::default()).unwrap();
        let request = GenerateRequest { guidance_rescale: 0.3, ..request(&folder, pictures) };
        let mut run = |guidance_passes| {
            let request = GenerateRequest { guidance_passes, ..request.clone() };
            (pipeline.generate(&request, &mut Silent).unwrap(), pipeline.commitment(&request).unwrap())
        };
        let (together, apart) = (run(GuidancePasses::Together), run(GuidancePasses::Apart));
        // On the CPU a row's sums do not depend on the rows beside it.
        assert_eq!(together.0.step_hashes, apart.0.step_hashes, "{name}");
        assert_eq!(together.1, apart.1, "{name}: both are the same run");
        assert_eq!(run(GuidancePasses::Auto).0.step_hashes, apart.0.step_hashes, "{name}");
        let unguided = GenerateRequest { guidance: 1.0, ..request.clone() };
        let unguided = pipeline.generate(&unguided, &mut Silent).unwrap();
        assert_ne!(unguided.step_hashes, apart.0.step_hashes, "{name}: guidance changes something");
    }
}

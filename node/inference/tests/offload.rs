//! Components that go in turn: what is computed is the same bit for bit, and what does not fit is refused with figures.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use kinoflock_inference::offload::Offload;
use kinoflock_inference::plan::{Fit, MemoryPlan, PlanOptions};
use kinoflock_inference::{
    Condition, DType, Device, Error, GenerateRequest, Generated, LoadOptions, Silent, Tensor, load, registry,
};

/// Every form of every family, with as many pictures as it takes.
const PIPELINES: &[(&str, usize)] = &[
    ("ltx-video-0.9.0", 0),
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
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("pipeline")
}

fn request(folder: &Path, pictures: usize) -> GenerateRequest {
    let facts = registry::facts(folder).unwrap();
    let mut request = facts.smallest();
    request.prompt = "a red dog".to_owned();
    request.negative_prompt = "cold fog".to_owned();
    (request.steps, request.guidance, request.seed, request.truncate_prompt) = (4, 3.0, 7, true);
    let shape = (1, 3, request.height, request.width);
    let picture = || Tensor::full(0.5f32, shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let frames = [0, request.frames - 1];
    request.conditions =
        frames.iter().take(pictures).map(|&frame| Condition::new(picture(), frame)).collect();
    request
}

fn made(folder: &Path, request: &GenerateRequest, offload: Offload, memory: Option<u64>) -> Generated {
    let options = LoadOptions { offload, memory, ..LoadOptions::default() };
    let mut pipeline = load(folder, &options).unwrap();
    let first = pipeline.generate(request, &mut Silent).unwrap();
    // A second clip finds the components given back, and reads them again.
    let again = pipeline.generate(request, &mut Silent).unwrap();
    assert_eq!(first.frames, again.frames);
    first
}

#[test]
fn the_clip_and_its_latents_are_the_same_whatever_is_loaded_in_turn() {
    for &(name, pictures) in PIPELINES {
        let folder = golden(name);
        let request = request(&folder, pictures);
        let whole = made(&folder, &request, Offload::None, None);
        let plan = MemoryPlan::new(&folder, &request, &PlanOptions::default()).unwrap();
        assert!(plan.peak(true) < plan.peak(false), "{name}: in turn less is needed");
        let between = plan.peak(false) - 1;
        assert!(plan.needs(Offload::Auto, Some(between)).in_turn);
        assert!(!plan.needs(Offload::Auto, Some(plan.peak(false))).in_turn);
        for (offload, memory) in
            [(Offload::InTurn, None), (Offload::Auto, Some(between)), (Offload::Auto, None)]
        {
            let other = made(&folder, &request, offload, memory);
            assert_eq!(whole.step_hashes, other.step_hashes, "{name} {offload:?}");
            assert_eq!(whole.frames, other.frames, "{name} {offload:?}");
        }
    }
}

#[test]
fn a_clip_whose_decode_does_not_fit_is_decoded_in_pieces_with_the_very_same_pixels() {
    for (name, size) in [
        ("ltx-video-0.9.0", [256, 192, 33]),
        ("ltx-video-0.9.5", [256, 192, 33]),
        ("mochi-1", [64, 64, 49]),
        ("pyramid-flow-miniflux", [64, 64, 33]),
        ("wan2.1", [256, 192, 17]),
    ] {
        let folder = golden(name);
        let mut request = request(&folder, 0);
        [request.width, request.height, request.frames] = size;
        let options = PlanOptions::default();
        let whole = MemoryPlan::new(&folder, &request, &options).unwrap();
        let mut tiled = request.clone();
        (tiled.decode.tile, tiled.decode.chunk) = (Some(128), Some(8));
        if name.starts_with("mochi") || name.starts_with("pyramid") {
            tiled.decode.tile = None;
        }
        let least = MemoryPlan::new(&folder, &tiled, &options).unwrap().peak(true);
        let memory = Some(least.min(whole.peak(true) - 1));
        let fit = Fit::of(&folder, &request, &options, (Offload::Auto, memory)).unwrap();
        if least >= whole.peak(true) {
            assert!(!fit.needs.fits, "{name}: pieces help nothing here");
            continue;
        }
        assert!(fit.needs.fits && fit.decode.chunk.is_some(), "{name} {fit:?}");
        let one = made(&folder, &request, Offload::None, None);
        let other = made(&folder, &request, Offload::Auto, memory);
        assert!(one.frames == other.frames, "{name}: other pixels");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_bytes_needed_and_the_bytes_there_are() {
    let folder = golden("ltx-video-0.9.0");
    let small = request(&folder, 0);
    let plan = MemoryPlan::new(&folder, &small, &PlanOptions::default()).unwrap();
    let memory = plan.peak(true);
    let options = LoadOptions { memory: Some(memory), ..LoadOptions::default() };
    let mut pipeline = load(&folder, &options).unwrap();
    pipeline.generate(&small, &mut Silent).unwrap();
    let larger = GenerateRequest { frames: small.frames + 400, ..small.clone() };
    let needed = MemoryPlan::new(&folder, &larger, &PlanOptions::default()).unwrap().peak(true);
    let error = pipeline.generate(&larger, &mut Silent).unwrap_err();
    assert!(
        matches!(error, Error::DoesNotFit { needed: n, available } if (n, available) == (needed, memory))
    );
    assert_eq!(error.code(), "memory_limit");
    let said = error.to_string();
    assert!(said.contains(&needed.to_string()) && said.contains(&memory.to_string()), "{said}");
    // With everything loaded not even the small one fits.
    let options = LoadOptions { offload: Offload::None, memory: Some(memory), ..LoadOptions::default() };
    let error = load(&folder, &options).unwrap().generate(&small, &mut Silent).unwrap_err();
    assert!(matches!(error, Error::DoesNotFit { .. }), "{error}");
}

#[test]
fn tiles_and_half_numbers_need_less() {
    let folder = golden("ltx-video-0.9.0");
    let mut request = request(&folder, 0);
    (request.width, request.height, request.frames) = (1024, 1024, 65);
    let decode = |request: &GenerateRequest| {
        let plan = MemoryPlan::new(&folder, request, &PlanOptions::default()).unwrap();
        plan.phases.iter().rev().nth(1).unwrap().activations
    };
    let whole = decode(&request);
    (request.decode.tile, request.decode.chunk) = (Some(128), Some(16));
    assert!(decode(&request) <= whole);
    let gpu = |dtype| PlanOptions { cpu: false, dtype, ..PlanOptions::default() };
    let weights = |options: &PlanOptions| MemoryPlan::new(&folder, &request, options).unwrap().weights();
    assert_eq!(weights(&gpu(DType::F32)), 2 * weights(&gpu(DType::BF16)));
    let apart = PlanOptions { text_on_cpu: true, ..gpu(DType::BF16) };
    let plan = MemoryPlan::new(&folder, &request, &apart).unwrap();
    assert!(plan.host_peak() > 0 && plan.weights() < weights(&gpu(DType::BF16)));
}

#[test]
fn a_plan_of_the_longest_clip_is_made_at_once_and_a_longer_one_is_refused() {
    for &(name, _) in PIPELINES {
        let folder = golden(name);
        let mut request = request(&folder, 0);
        let rule = registry::facts(&folder).unwrap().info.frame_rule;
        request.frames = rule.offset + rule.multiple * ((1 << 19) / rule.multiple);
        let plan = MemoryPlan::new(&folder, &request, &PlanOptions::default()).unwrap();
        assert!(plan.peak(true) > 1 << 28, "{name}");
        request.frames = rule.offset + rule.multiple * ((1 << 22) / rule.multiple);
        assert!(MemoryPlan::new(&folder, &request, &PlanOptions::default()).is_err());
    }
}

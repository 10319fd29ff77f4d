//! Components that go in turn: what is computed is the same bit for bit, and what does not fit is refused with figures.
#![allow(clippy::unwrap_used)]

#[path = "support/forms.rs"]
mod forms;

use std::path::Path;

use forms::{PIPELINES, golden, request};
use kinoflock_inference::offload::Offload;
use kinoflock_inference::plan::{Fit, MemoryPlan, PlanOptions, PlanPhase};
use kinoflock_inference::sampler::guidance::GuidancePasses;
use kinoflock_inference::{DType, Error, GenerateRequest, Generated, LoadOptions, Silent, load, registry};

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

fn gpu(dtype: DType) -> PlanOptions {
    PlanOptions { cpu: false, dtype, ..PlanOptions::default() }
}

fn planned(folder: &Path, request: &GenerateRequest, passes: GuidancePasses, cpu: bool) -> MemoryPlan {
    let request = GenerateRequest { guidance_passes: passes, ..request.clone() };
    let options = if cpu { PlanOptions::default() } else { gpu(DType::F32) };
    MemoryPlan::new(folder, &request, &options).unwrap()
}

#[test]
fn both_predictions_at_once_take_more_and_are_planned_where_they_go_so() {
    for &(name, _) in PIPELINES {
        let folder = golden(name);
        let request = request(&folder, 0);
        let steps = |passes, cpu| {
            let plan = planned(&folder, &request, passes, cpu);
            let steps = plan.phases.iter().filter(|phase| phase.phase == PlanPhase::Denoise);
            steps.map(|phase| phase.activations).max().unwrap()
        };
        for cpu in [true, false] {
            let (apart, together) = (steps(GuidancePasses::Apart, cpu), steps(GuidancePasses::Together, cpu));
            assert!(apart < together, "{name}: {apart} and {together}");
            assert_eq!(steps(GuidancePasses::Auto, cpu), if cpu { apart } else { together }, "{name}");
        }
    }
}

#[test]
fn where_both_predictions_do_not_fit_at_once_they_are_computed_one_after_the_other() {
    // Clips whose steps take more than their decode.
    for (name, size) in
        [("ltx-video-0.9.0", [1024, 1024, 33]), ("cogvideox-2b", [512, 512, 25]), ("wan2.1", [512, 512, 33])]
    {
        let folder = golden(name);
        let mut request = request(&folder, 0);
        [request.width, request.height, request.frames] = size;
        let together = planned(&folder, &request, GuidancePasses::Together, false).peak(false);
        let apart = planned(&folder, &request, GuidancePasses::Apart, false).peak(false);
        assert!(apart < together, "{name}: {apart} and {together}");
        let fit = |guidance_passes, offload, memory| {
            let request = GenerateRequest { guidance_passes, ..request.clone() };
            Fit::of(&folder, &request, &gpu(DType::F32), (offload, Some(memory))).unwrap()
        };
        for offload in [Offload::None, Offload::Auto] {
            let roomy = fit(GuidancePasses::Auto, offload, together);
            assert!(roomy.needs.fits && roomy.passes == GuidancePasses::Auto, "{name} {roomy:?}");
            let tight = fit(GuidancePasses::Auto, offload, apart);
            assert!(tight.needs.fits && !tight.needs.in_turn, "{name} {tight:?}");
            assert_eq!(tight.passes, GuidancePasses::Apart, "{name}");
        }
        let asked = fit(GuidancePasses::Together, Offload::None, apart);
        assert_eq!(asked.passes, GuidancePasses::Together, "{name}: it is left as it says");
        assert!(!asked.needs.fits, "{name} {asked:?}");
    }
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

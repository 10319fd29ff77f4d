//! Memory plans beside what runs really hold: each case in a process of its own, which reads its greatest resident memory
//! from the system.
//!
//! What is measured: the process runs a small clip first and drops the model, so that code pages and threads are there;
//! its resident memory then is the baseline. After the model is loaded the system's mark is set back (the mapped weight
//! files are gone by then), the clip is made, and the mark less the baseline is what the run held, weights included. The
//! allocator gives every large buffer back to the system at once (`MALLOC_MMAP_THRESHOLD_`); with its own default it keeps
//! some, which is not in the plan. Sizes are such that activations are tens of MB.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use kinoflock_inference::offload::Offload;
use kinoflock_inference::plan::{MemoryPlan, PlanOptions, PlanPhase};
use kinoflock_inference::{Condition, DType, Device, GenerateRequest, LoadOptions, Silent, Tensor, load, registry};

/// How far a plan may be from what is measured.
const TOLERANCE: f64 = 0.15;
const CASE: &str = "KINOFLOCK_MEMORY_CASE";

/// A golden's pipeline, the clip's size and frames, and how many pictures are given.
struct Case {
    golden: &'static str,
    size: [usize; 3],
    pictures: usize,
    tile: usize,
    chunk: usize,
}

const fn case(golden: &'static str, size: [usize; 3]) -> Case {
    Case { golden, size, pictures: 0, tile: 0, chunk: 0 }
}

const CASES: &[Case] = &[
    case("ltx-video-0.9.0", [256, 256, 65]),
    case("ltx-video-0.9.5", [256, 256, 65]),
    Case { tile: 64, chunk: 16, ..case("ltx-video-0.9.5", [256, 256, 65]) },
    Case { pictures: 1, ..case("ltx-video-0.9.5", [256, 256, 65]) },
    case("cogvideox-2b", [256, 256, 49]),
    case("cogvideox-5b", [256, 256, 49]),
    case("cogvideox-1.5", [160, 160, 81]),
    Case { pictures: 1, ..case("cogvideox-1.5-i2v", [160, 160, 81]) },
    Case { pictures: 1, ..case("cogvideox-5b-i2v", [48, 32, 801]) },
    case("mochi-1", [128, 128, 61]),
    Case { chunk: 12, ..case("mochi-1", [128, 128, 61]) },
    case("pyramid-flow-miniflux", [256, 256, 25]),
    case("wan2.1", [256, 256, 49]),
    Case { pictures: 1, ..case("wan2.1-i2v", [256, 256, 49]) },
    Case { pictures: 2, ..case("wan2.1-flf2v", [256, 256, 49]) },
    case("wan2.2-a14b", [256, 256, 49]),
    Case { pictures: 1, ..case("wan2.2-i2v-a14b", [256, 256, 49]) },
    case("wan2.2-ti2v-5b", [256, 256, 49]),
    Case { pictures: 1, ..case("wan2.2-ti2v-5b", [256, 256, 49]) },
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("pipeline")
}

/// What a child was told and found, bytes.
#[derive(Debug, Default)]
struct Found {
    planned: u64,
    measured: u64,
    weights: u64,
}

impl Found {
    fn off(&self) -> f64 {
        self.planned as f64 / self.measured as f64 - 1.0
    }
}

/// Runs this very test binary for one case and reads what it prints: up to the last step, then to the frames.
fn measure(folder: &Path, case: &Case, offload: Offload) -> [Found; 2] {
    let [width, height, frames] = case.size;
    let text = format!(
        "{} {width} {height} {frames} {} {} {} {offload:?}",
        folder.display(),
        case.pictures,
        case.tile,
        case.chunk
    );
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(CASE, &text)
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .env("RAYON_NUM_THREADS", "2")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let rows: Vec<Vec<u64>> = said
        .lines()
        .filter_map(|line| line.split_once("memory:"))
        .map(|(_, row)| row.split_whitespace().map(|number| number.parse().unwrap()).collect())
        .collect();
    assert_eq!(rows.len(), 2, "{text}: {said}\n{}", String::from_utf8_lossy(&output.stderr));
    [0, 1].map(|row| Found { planned: rows[row][0], measured: rows[row][1], weights: rows[row][2] })
}

fn check(name: &str, found: &[Found; 2], faults: &mut Vec<String>) {
    for (part, found) in ["steps", "frames"].iter().zip(found) {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let line = format!(
            "{name:<44} {part:<6} planned {:7.1} MiB, measured {:7.1} MiB, {:+5.1} % (weights {:.1} MiB)",
            mib(found.planned),
            mib(found.measured),
            100.0 * found.off(),
            mib(found.weights)
        );
        println!("{line}");
        if found.off().abs() > TOLERANCE {
            faults.push(line);
        }
    }
}

#[test]
fn the_plans_of_all_small_pipelines_are_what_their_runs_hold() {
    let mut faults = Vec::new();
    for case in CASES {
        let found = measure(&golden(case.golden), case, Offload::None);
        let [width, height, frames] = case.size;
        let name = format!("{} {width}x{height}x{frames} p{} t{}", case.golden, case.pictures, case.tile);
        check(&name, &found, &mut faults);
    }
    assert!(faults.is_empty(), "off by more than {TOLERANCE}:\n{}", faults.join("\n"));
}

/// Not a test of its own: what [`measure`] runs.
#[test]
#[ignore = "run by the other tests of this file in a process of its own"]
fn child() {
    let Ok(text) = std::env::var(CASE) else { return };
    let words: Vec<&str> = text.split(' ').collect();
    let folder = Path::new(words[0]);
    let [width, height, frames, pictures, tile, chunk] =
        std::array::from_fn(|index| words[index + 1].parse::<usize>().unwrap());
    let offload = match words[7] {
        "InTurn" => Offload::InTurn,
        _ => Offload::None,
    };
    let facts = registry::facts(folder).unwrap();
    let mut request = GenerateRequest::new("a red dog", &facts.info.defaults);
    (request.width, request.height, request.frames, request.steps) = (width, height, frames, 2);
    request.truncate_prompt = true;
    request.negative_prompt = "cold fog".to_owned();
    request.guidance = 3.0;
    request.decode.tile = (tile > 0).then_some(tile);
    request.decode.chunk = (chunk > 0).then_some(chunk);
    let mut small = request.clone();
    small.frames = facts.info.frame_rule.offset + facts.info.frame_rule.multiple;
    if !facts.one_size && small.width > 64 {
        let multiple = facts.info.size_multiple;
        (small.width, small.height) = (2 * multiple, 2 * multiple);
    }
    let options = LoadOptions { offload, ..LoadOptions::default() };
    load(folder, &options).unwrap().generate(&given(small, pictures), &mut Silent).unwrap();
    let baseline = status("VmRSS");
    let request = given(request, pictures);
    let plan = MemoryPlan::new(folder, &request, &PlanOptions::default()).unwrap();
    let own = status("VmRSS") - baseline;
    let mut pipeline = load(folder, &options).unwrap();
    let in_turn = offload == Offload::InTurn;
    let pictures_held = plan.phases.iter().any(|phase| phase.phase == PlanPhase::Conditions);
    let _ = pictures_held;
    for skip in [true, false] {
        let mut request = request.clone();
        request.decode.skip = skip;
        let mut plan = plan.clone();
        if skip {
            plan.phases.retain(|phase| phase.phase < PlanPhase::Decode);
        }
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        pipeline.generate(&request, &mut Silent).unwrap();
        println!("memory: {} {} {} {own}", plan.peak(in_turn), status("VmHWM") - baseline, plan.weights());
    }
    if std::env::var("KINOFLOCK_MEMORY_PLAN").is_ok() {
        println!("{plan:#?}");
    }
}

/// With as many pictures as a case gives: at the beginning, and at the end.
fn given(mut request: GenerateRequest, pictures: usize) -> GenerateRequest {
    let picture = || {
        Tensor::full(0.5f32, (1, 3, request.height, request.width), &Device::Cpu).unwrap().to_dtype(DType::F32)
    };
    let frames = [0, request.frames - 1];
    request.conditions =
        frames.iter().take(pictures).map(|&frame| Condition::new(picture().unwrap(), frame)).collect();
    request
}

/// A figure of this process, bytes.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

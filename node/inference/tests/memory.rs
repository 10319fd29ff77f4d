//! Memory plans beside what runs really hold: each case in a process of its own, whose memory the system tells.
//!
//! What is measured: the process makes a small clip first and drops the model, so that code pages and threads are there;
//! its resident memory then is the baseline. After the model is loaded the system's mark (`VmHWM`) is set back; mapped
//! weight files are gone by then. The clip is made, and the mark less the baseline is what the run held, weights included.
//! Where components are read in the run, in turn or for it alone, weight files are mapped meanwhile, so there the process's own memory
//! (`RssAnon`) is looked at every millisecond instead. The allocator gives every large buffer back to the system at once
//! (`MALLOC_MMAP_THRESHOLD_`); with its own default it keeps some, which is not in the plan. Sizes are such that
//! activations are tens of MB: for the steps another one than for the decode, which is cheaper to run.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use kinoflock_inference::models::ltx::config::TransformerConfig;
use kinoflock_inference::models::ltx::transformer::LtxTransformer;
use kinoflock_inference::models::ltx::upsampler::{LtxUpsampler, PART as UPSAMPLER, UpsamplerConfig};
use kinoflock_inference::models::ltx::vae::{LtxVae, LtxVaeConfig};
use kinoflock_inference::offload::Offload;
use kinoflock_inference::plan::{MemoryPlan, PlanOptions, PlanPhase};
use kinoflock_inference::weights::tensor_shapes;
use kinoflock_inference::{
    Adapter, Condition, DType, Device, GenerateRequest, LoadOptions, Lora, SecondPass, Silent, Tensor, load,
    registry,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// How far a plan may be from what is measured.
const TOLERANCE: f64 = 0.15;
/// Where a case's adapter lies.
const ADAPTER: &str = "adapter.safetensors";
const TRANSFORMER: &str = "transformer/diffusion_pytorch_model.safetensors";
const SMALL: &str = "transformer/small.gguf";
/// What a child is told.
const CASE: &str = "KINOFLOCK_MEMORY_CASE";

/// A golden's pipeline with sizes and frames: of a run up to the last step, and of one to the frames.
#[derive(Clone, Copy)]
struct Case {
    golden: &'static str,
    steps: [usize; 3],
    frames: [usize; 3],
    /// Pictures that are given.
    pictures: usize,
    /// Of the decode; 0 for none.
    tile: usize,
    chunk: usize,
}

const fn case(golden: &'static str, steps: [usize; 3], frames: [usize; 3]) -> Case {
    Case { golden, steps, frames, pictures: 0, tile: 0, chunk: 0 }
}

const CASES: &[Case] = &[
    case("ltx-video-0.9.0", [1024, 1024, 33], [192, 192, 33]),
    Case { tile: 64, chunk: 16, ..case("ltx-video-0.9.0", [0; 3], [192, 192, 33]) },
    case("ltx-video-0.9.5", [1024, 1024, 33], [192, 192, 33]),
    Case { pictures: 1, ..case("ltx-video-0.9.5", [1024, 1024, 33], [0; 3]) },
    case("cogvideox-2b", [512, 512, 25], [128, 128, 25]),
    case("cogvideox-5b", [512, 512, 25], [128, 128, 25]),
    case("cogvideox-1.5", [160, 160, 241], [160, 160, 33]),
    Case { pictures: 1, ..case("cogvideox-1.5-i2v", [160, 160, 401], [160, 160, 33]) },
    Case { pictures: 1, ..case("cogvideox-5b-i2v", [48, 32, 4801], [48, 32, 1201]) },
    case("mochi-1", [512, 512, 25], [64, 64, 31]),
    Case { chunk: 12, ..case("mochi-1", [0; 3], [64, 64, 31]) },
    case("pyramid-flow-miniflux", [768, 768, 25], [128, 128, 17]),
    Case { pictures: 1, ..case("pyramid-flow-miniflux", [512, 512, 25], [0; 3]) },
    // Its table of positions ends at 192 pixels, where a step takes less than two MB: too little to be told from the rest.
    case("pyramid-flow-sd3", [0; 3], [128, 128, 17]),
    case("wan2.1", [512, 512, 33], [192, 192, 33]),
    Case { pictures: 1, ..case("wan2.1-i2v", [256, 256, 33], [192, 192, 33]) },
    Case { pictures: 2, ..case("wan2.1-flf2v", [256, 256, 33], [192, 192, 33]) },
    case("wan2.2-a14b", [512, 512, 33], [192, 192, 33]),
    Case { pictures: 1, ..case("wan2.2-i2v-a14b", [256, 256, 33], [192, 192, 33]) },
    case("wan2.2-ti2v-5b", [1024, 1024, 65], [192, 192, 33]),
    Case { pictures: 1, ..case("wan2.2-ti2v-5b", [512, 512, 33], [0; 3]) },
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("pipeline")
}

/// What a child found, bytes.
#[derive(Debug)]
struct Found {
    planned: u64,
    measured: u64,
    weights: u64,
}

impl Found {
    /// Says it, and complains where the two are too far from each other.
    fn check(&self, name: &str, faults: &mut Vec<String>) {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let off = self.planned as f64 / self.measured as f64 - 1.0;
        let line = format!(
            "{name:<58} planned {:7.1} MiB, measured {:7.1} MiB, {:+5.1} % (weights {:.1} MiB)",
            mib(self.planned),
            mib(self.measured),
            100.0 * off,
            mib(self.weights)
        );
        println!("{line}");
        if off.abs() > TOLERANCE {
            faults.push(line);
        }
    }
}

/// Runs this very test binary for one case and reads what it prints.
fn measure(folder: &Path, case: &Case, skip: bool, offload: Offload) -> Found {
    let [width, height, frames] = if skip { case.steps } else { case.frames };
    let text = format!(
        "{} {width} {height} {frames} {} {} {} {skip} {offload:?}",
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
    let row = said.lines().find_map(|line| line.split_once("memory:")).map(|(_, row)| row);
    let Some(row) = row else { panic!("{text}: {said}\n{}", String::from_utf8_lossy(&output.stderr)) };
    let numbers: Vec<u64> = row.split_whitespace().map(|number| number.parse().unwrap()).collect();
    Found { planned: numbers[0], measured: numbers[1], weights: numbers[2] }
}

#[test]
fn the_plans_of_all_small_pipelines_are_what_their_runs_hold() {
    let mut faults = Vec::new();
    for case in CASES {
        for (skip, size) in [(true, case.steps), (false, case.frames)] {
            if size == [0; 3] {
                continue;
            }
            let found = measure(&golden(case.golden), case, skip, Offload::None);
            let [width, height, frames] = size;
            let part = if skip { "steps" } else { "frames" };
            let more = format!("pictures {}, tile {}, chunk {}", case.pictures, case.tile, case.chunk);
            found.check(&format!("{} {part} {width}x{height}x{frames} {more}", case.golden), &mut faults);
        }
    }
    assert!(faults.is_empty(), "off by more than {TOLERANCE}:\n{}", faults.join("\n"));
}

#[test]
fn the_plan_of_a_larger_pipeline_is_what_its_run_holds_whole_and_in_turn() {
    let folder = tempfile::tempdir().unwrap();
    make_larger(folder.path());
    let larger = case("larger", [512, 512, 33], [256, 256, 33]);
    let mut faults = Vec::new();
    let mut peaks = Vec::new();
    for (skip, offload) in
        [(true, Offload::None), (false, Offload::None), (true, Offload::InTurn), (false, Offload::InTurn)]
    {
        let found = measure(folder.path(), &larger, skip, offload);
        found.check(&format!("larger, {offload:?}, {}", if skip { "steps" } else { "frames" }), &mut faults);
        peaks.push(found);
    }
    assert!(faults.is_empty(), "off by more than {TOLERANCE}:\n{}", faults.join("\n"));
    assert!(peaks[0].weights > 150 << 20, "{peaks:?}");
    assert!(peaks[3].measured < peaks[1].measured, "in turn less is held: {peaks:?}");
}

#[test]
fn the_plans_of_small_weights_and_of_adapters_are_what_their_runs_hold() {
    let whole = tempfile::tempdir().unwrap();
    make_larger(whole.path());
    let file = whole.path().join(TRANSFORMER);
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let changed = |make: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        place(whole.path(), folder.path(), &|from, to| std::fs::hard_link(from, to).unwrap());
        make(folder.path());
        folder
    };
    let blocks = |folder: &Path| {
        std::fs::remove_file(folder.join(TRANSFORMER)).unwrap();
        write_blocks(&folder.join(SMALL), &tensors);
    };
    let adapter = |folder: &Path| write_adapter(&folder.join(ADAPTER), &tensors);
    let eighths = |folder: &Path| {
        std::fs::remove_file(folder.join(TRANSFORMER)).unwrap();
        write_eighths(&folder.join(TRANSFORMER), &tensors);
    };
    let gguf = changed(&blocks);
    let both = changed(&|folder| {
        std::fs::remove_file(folder.join(TRANSFORMER)).unwrap();
        std::fs::hard_link(gguf.path().join(SMALL), folder.join(SMALL)).unwrap();
        adapter(folder);
    });
    let (wide, with) = (changed(&eighths), changed(&adapter));
    let cases = [
        ("GGUF", &gguf, Offload::None),
        ("GGUF", &gguf, Offload::InTurn),
        ("8 bits", &wide, Offload::InTurn),
        ("an adapter", &with, Offload::None),
        ("GGUF and an adapter", &both, Offload::InTurn),
    ];
    let larger = case("larger", [256, 256, 33], [0; 3]);
    let (mut faults, mut found) = (Vec::new(), Vec::new());
    for (name, folder, offload) in cases {
        let run = measure(folder.path(), &larger, true, offload);
        run.check(&format!("{name}, {offload:?}, steps"), &mut faults);
        found.push(run);
    }
    assert!(faults.is_empty(), "off by more than {TOLERANCE}:\n{}", faults.join("\n"));
    let [gguf, wide, with] = [1, 2, 3].map(|index| &found[index]);
    assert!(gguf.measured + (120 << 20) < wide.measured, "blocks stay as they are: {found:?}");
    assert!(with.weights > wide.weights + (20 << 20), "the adapter is much: {found:?}");
}

#[test]
fn the_plan_of_a_second_pass_at_twice_the_size_has_the_upsampler_of_latents() {
    let folder = tempfile::tempdir().unwrap();
    copy(&golden("ltx-video-0.9.5"), folder.path());
    let part = folder.path().join(UPSAMPLER);
    std::fs::create_dir_all(&part).unwrap();
    let channels = registry::facts(folder.path()).unwrap().info.work.latent_channels;
    let config = serde_json::json!({ "in_channels": channels, "mid_channels": 128 });
    std::fs::write(part.join("config.json"), config.to_string()).unwrap();
    let config = UpsamplerConfig::read(&part.join("config.json")).unwrap();
    let shapes = tensor_shapes(|vb| LtxUpsampler::load(&config, &vb)).unwrap();
    write_random(&part, &shapes);
    let mut faults = Vec::new();
    for offload in [Offload::None, Offload::InTurn] {
        let found = measure(folder.path(), &case("second pass", [1024, 1024, 33], [0; 3]), true, offload);
        found.check(&format!("a second pass, {offload:?}, steps"), &mut faults);
        assert!(found.planned > found.weights + (30 << 20), "the upsampler is much, and brief: {found:?}");
    }
    assert!(faults.is_empty(), "off by more than {TOLERANCE}:\n{}", faults.join("\n"));
}

/// The transformer's matrices as GGUF in blocks of 8 bits.
fn write_blocks(file: &Path, tensors: &HashMap<String, Tensor>) {
    let each = |(name, tensor): (&String, &Tensor)| {
        let fits = is_matrix(name, tensor) && tensor.dims()[1].is_multiple_of(GgmlDType::Q8_0.block_size());
        let kind = if fits { GgmlDType::Q8_0 } else { GgmlDType::F32 };
        (name.clone(), QTensor::quantize(tensor, kind).unwrap())
    };
    let blocks: Vec<_> = tensors.iter().map(each).collect();
    let blocks: Vec<_> = blocks.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(file).unwrap(), &[], &blocks).unwrap();
}

/// Its matrices in 8 bits, of other values.
fn write_eighths(file: &Path, tensors: &HashMap<String, Tensor>) {
    let each = |(name, tensor): (&String, &Tensor)| {
        let (dtype, bytes) = if is_matrix(name, tensor) {
            // Small numbers of both signs.
            let codes = (0..tensor.elem_count()).map(|index| (index.wrapping_mul(0x9e37) >> 7) as u8 & 0x9f);
            (Dtype::F8_E4M3, codes.collect::<Vec<_>>())
        } else {
            let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (Dtype::F32, values.into_iter().flat_map(f32::to_le_bytes).collect())
        };
        (name.clone(), dtype, tensor.dims().to_vec(), bytes)
    };
    save(file, &tensors.iter().map(each).collect::<Vec<_>>());
}

/// An adapter of rank 96 for every layer of the blocks, f16.
fn write_adapter(file: &Path, tensors: &HashMap<String, Tensor>) {
    const RANK: usize = 96;
    let layers = tensors
        .iter()
        .filter(|(name, tensor)| is_matrix(name, tensor) && name.starts_with("transformer_blocks."));
    let parts = layers.flat_map(|(name, tensor)| {
        let layer = name.strip_suffix(".weight").unwrap();
        let (output, input) = tensor.dims2().unwrap();
        [("A", [RANK, input]), ("B", [output, RANK])].map(|(part, shape)| {
            let name = format!("transformer.{layer}.lora_{part}.weight");
            (name, Dtype::F16, shape.to_vec(), vec![0u8; 2 * shape[0] * shape[1]])
        })
    });
    save(file, &parts.collect::<Vec<_>>());
}

fn is_matrix(name: &str, tensor: &Tensor) -> bool {
    name.ends_with(".weight") && tensor.rank() == 2
}

fn save(file: &Path, tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, file).unwrap();
}

/// LTX-Video of some 50 million random parameters, beside a golden's small text encoder.
fn make_larger(folder: &Path) {
    copy(&golden("ltx-video-0.9.0"), folder);
    let edit = |file: &Path, changes: serde_json::Value| -> serde_json::Value {
        let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        std::fs::write(file, value.to_string()).unwrap();
        value
    };
    let part = folder.join("transformer");
    let changes = serde_json::json!({
        "num_attention_heads": 12, "attention_head_dim": 64, "cross_attention_dim": 768, "num_layers": 5,
    });
    edit(&part.join("config.json"), changes);
    let config = TransformerConfig::read(&part.join("config.json")).unwrap();
    let shapes = tensor_shapes(|vb| LtxTransformer::load(&config, &vb)).unwrap();
    write_random(&part, &shapes);
    let part = folder.join("vae");
    let value = edit(
        &part.join("config.json"),
        serde_json::json!({
            "block_out_channels": [16, 32, 64, 64], "decoder_block_out_channels": [16, 32, 64, 64],
        }),
    );
    let config = LtxVaeConfig::from_value(&value).unwrap();
    let shapes = tensor_shapes(|vb| LtxVae::load(&config, vb)).unwrap();
    write_random(&part, &shapes);
}

fn write_random(part: &Path, shapes: &std::collections::BTreeMap<String, Vec<usize>>) {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 * 0.08 - 0.04
    };
    let tensors = shapes.iter().map(|(name, shape)| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        (name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap())
    });
    let tensors: HashMap<String, Tensor> = tensors.collect();
    let file = part.join("diffusion_pytorch_model.safetensors");
    let _ = std::fs::remove_file(&file);
    candle_core::safetensors::save(&tensors, file).unwrap();
}

fn copy(from: &Path, to: &Path) {
    place(from, to, &|from, to| assert!(std::fs::copy(from, to).is_ok()));
}

/// Puts a folder's files at another place.
fn place(from: &Path, to: &Path, put: &dyn Fn(&Path, &Path)) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            place(&entry.path(), &to.join(entry.file_name()), put);
        } else {
            put(&entry.path(), &to.join(entry.file_name()));
        }
    }
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
    let in_turn = words[8] == "InTurn";
    let offload = if in_turn { Offload::InTurn } else { Offload::None };
    let facts = registry::facts(folder).unwrap();
    let mut request = GenerateRequest::new("a red dog", &facts.info.defaults);
    (request.width, request.height, request.frames, request.steps) = (width, height, frames, 2);
    request.truncate_prompt = true;
    request.negative_prompt = "cold fog".to_owned();
    request.guidance = 3.0;
    request.decode.tile = (tile > 0).then_some(tile);
    request.decode.chunk = (chunk > 0).then_some(chunk);
    let smallest = facts.smallest();
    let mut small = request.clone();
    (small.width, small.height, small.frames) = (smallest.width, smallest.height, smallest.frames);
    request.decode.skip = words[7] == "true";
    let options = LoadOptions { offload, ..LoadOptions::default() };
    load(folder, &options).unwrap().generate(&given(small, pictures), &mut Silent).unwrap();

    // What is read while the run goes on is mapped meanwhile.
    let reads = in_turn || folder.join(UPSAMPLER).exists();
    let key = if reads { "RssAnon" } else { "VmRSS" };
    let baseline = status(key);
    let request = given(request, pictures);
    let request = with_files(request, folder, facts.info.work.latent_channels);
    let mut plan = MemoryPlan::new(folder, &request, &PlanOptions::default()).unwrap();
    if request.decode.skip {
        plan.phases.retain(|phase| phase.phase < PlanPhase::Decode);
    }
    let mut pipeline = load(folder, &options).unwrap();
    let watch = Watch::begin();
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    pipeline.generate(&request, &mut Silent).unwrap();
    let most = if reads { watch.end() } else { status("VmHWM") };
    println!("memory: {} {} {}", plan.peak(in_turn), most - baseline, plan.weights());
    if std::env::var("KINOFLOCK_MEMORY_PLAN").is_ok() {
        eprintln!("{plan:#?}");
    }
}

/// Looks at the process's own memory until it is told to stop.
struct Watch {
    on: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn begin() -> Self {
        let (on, most) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
        let (still, seen) = (Arc::clone(&on), Arc::clone(&most));
        let thread = std::thread::spawn(move || {
            while still.load(Ordering::Relaxed) {
                seen.fetch_max(status("RssAnon"), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { on, most, thread }
    }

    fn end(self) -> u64 {
        self.on.store(false, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.most.load(Ordering::Relaxed)
    }
}

/// With as many pictures as a case gives: at the beginning, and at the end.
fn given(mut request: GenerateRequest, pictures: usize) -> GenerateRequest {
    let shape = (1, 3, request.height, request.width);
    let picture = || Tensor::full(0.5f32, shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let frames = [0, request.frames - 1];
    request.conditions =
        frames.iter().take(pictures).map(|&frame| Condition::new(picture(), frame)).collect();
    request
}

/// With the adapter that lies in the folder, and as a second pass where that has an upsampler.
fn with_files(mut request: GenerateRequest, folder: &Path, channels: usize) -> GenerateRequest {
    let file = folder.join(ADAPTER);
    if file.exists() {
        let lora = Lora::read(&file, "the adapter", 1 << 30).unwrap();
        request.adapters = vec![Adapter { lora: Arc::new(lora), scale: 0.5 }];
    }
    if folder.join(UPSAMPLER).exists() {
        let half = (1, channels, (request.frames - 1) / 8 + 1, request.height / 64, request.width / 64);
        request.second_pass = Some(SecondPass::new(0.5));
        request.initial_latents = Some(Tensor::ones(half, DType::F32, &Device::Cpu).unwrap());
    }
    request
}

/// A figure of this process, bytes.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

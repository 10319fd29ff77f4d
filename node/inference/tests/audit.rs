//! The step audit with the bundled model: auditors unlike the maker, honest jobs, and every cheat that we could think of.
//!
//! The short form runs with all tests. The long form makes 1,000 audits of honest jobs and of each cheat, and prints the
//! histogram and the table from which `audit::tolerance` comes:
//! `cargo test --workspace --test audit -- --ignored --nocapture`
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::Path;

use kinoflock_inference::audit::{FRAMES_TOLERANCE, Precision, frames_deviation, tolerance};
use kinoflock_inference::nn::set_generic_only;
use kinoflock_inference::sampler::checkpoint::latents_bytes;
use kinoflock_inference::{
    DType, Device, GenerateRequest, LoadOptions, Observer, Pipeline, RgbFrames, StepEvent, Tensor, load,
    motif,
};

const PROMPTS: [&str; 4] = [
    "a red circle drifts left over a blue field",
    "a green square spins over a white field",
    "a yellow star grows over a black field",
    "a blue triangle bounces over a grey field",
];
/// Histogram bins: powers of ten of the deviation.
const BINS: std::ops::RangeInclusive<i32> = -8..=0;
/// Honest and cheating deviations lie at least so far apart, or the cheat counts as undetectable.
const GAP: f64 = 10.0;

struct Auditor {
    name: &'static str,
    precision: Precision,
    threads: usize,
    generic: bool,
    pipeline: Box<dyn Pipeline>,
}

impl Auditor {
    fn new(folder: &Path, name: &'static str, dtype: DType, threads: usize, generic: bool) -> Self {
        let options = LoadOptions { dtype, ..LoadOptions::default() };
        let precision = Precision::of(DType::F32, dtype);
        // The other kernels want their weights otherwise.
        set_generic_only(generic);
        let pipeline = load(folder, &options).unwrap();
        set_generic_only(false);
        Self { name, precision, threads, generic, pipeline }
    }

    /// Computes as this auditor's machine does.
    fn with<R: Send>(&mut self, act: impl FnOnce(&mut dyn Pipeline) -> R + Send) -> R {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads).build().unwrap();
        let (generic, pipeline) = (self.generic, &mut self.pipeline);
        pool.install(move || {
            set_generic_only(generic);
            act(pipeline.as_mut())
        })
    }
}

/// What a maker claims: the states of its run, and its clip.
struct Claim {
    states: Vec<Tensor>,
    frames: RgbFrames,
    /// Steps that were not computed as claimed.
    wrong: Vec<usize>,
}

#[derive(Default)]
struct Recorded(Vec<Tensor>);

impl Observer for Recorded {
    fn step(&mut self, event: &StepEvent<'_>) {
        self.0.push(event.latents.copy().unwrap());
    }
}

fn states(pipeline: &mut dyn Pipeline, request: &GenerateRequest) -> (Vec<Tensor>, RgbFrames) {
    let mut recorded = Recorded(vec![pipeline.start(request).unwrap()]);
    let made = pipeline.generate(request, &mut recorded).unwrap();
    assert_eq!(made.start_hash, *blake3::hash(&latents_bytes(&recorded.0[0]).unwrap()).as_bytes());
    (recorded.0, made.frames)
}

fn honest(pipeline: &mut dyn Pipeline, request: &GenerateRequest) -> Claim {
    let (states, frames) = states(pipeline, request);
    Claim { states, frames, wrong: Vec::new() }
}

/// Every other step goes on with the output of the one before: half of the work.
fn fewer_steps(pipeline: &mut dyn Pipeline, request: &GenerateRequest) -> Claim {
    reusing(pipeline, request, |index| index % 2 == 1)
}

/// One step goes on with the output of the one before.
fn one_skipped(pipeline: &mut dyn Pipeline, request: &GenerateRequest) -> Claim {
    let skipped = 1 + request.seed as usize * 5 % (request.steps - 1);
    reusing(pipeline, request, |index| index == skipped)
}

fn reusing(pipeline: &mut dyn Pipeline, request: &GenerateRequest, reuses: impl Fn(usize) -> bool) -> Claim {
    let mut states = vec![pipeline.start(request).unwrap()];
    let mut output = None;
    for index in 0..request.steps {
        let last = &states[index];
        let mut step = pipeline.transition(request, index, last).unwrap();
        if reuses(index) {
            step.output = output.take().unwrap();
        }
        let next = step.apply(last).unwrap();
        output = Some(step.output);
        states.push(next);
    }
    let frames = pipeline.frames(request, &states[request.steps]).unwrap();
    Claim { states, frames, wrong: (0..request.steps).filter(|index| reuses(*index)).collect() }
}

fn other_seed(request: &GenerateRequest) -> GenerateRequest {
    GenerateRequest { seed: request.seed + 1000, ..request.clone() }
}

/// An honest run of another seed.
fn another_seed(pipeline: &mut dyn Pipeline, request: &GenerateRequest) -> Claim {
    honest(pipeline, &other_seed(request))
}

/// A true beginning, then from one step on the states of a run of another seed that was made before.
fn spliced(pipeline: &mut dyn Pipeline, request: &GenerateRequest) -> Claim {
    let at = request.seed as usize * 7 % request.steps;
    let (mut states, _) = states(pipeline, request);
    let (cached, frames) = self::states(pipeline, &other_seed(request));
    states.truncate(at + 1);
    states.extend_from_slice(&cached[at + 1..]);
    Claim { states, frames, wrong: vec![at] }
}

fn foreign_clip(pipeline: &mut dyn Pipeline, request: &GenerateRequest) -> Claim {
    let mut claim = honest(pipeline, request);
    let prompt = PROMPTS[(PROMPTS.iter().position(|p| *p == request.prompt).unwrap() + 1) % PROMPTS.len()];
    let other = GenerateRequest { prompt: prompt.to_owned(), ..other_seed(request) };
    claim.frames = pipeline.generate(&other, &mut kinoflock_inference::Silent).unwrap().frames;
    claim
}

fn all_wrong(mut claim: Claim) -> Claim {
    claim.wrong = (0..claim.states.len() - 1).collect();
    claim
}

/// What one auditor finds about a claim: everything that any draw could show.
struct Findings {
    starts_well: bool,
    deviations: Vec<f64>,
    frames: f64,
    wrong: Vec<usize>,
}

fn look(auditor: &mut Auditor, request: &GenerateRequest, claim: &Claim) -> Findings {
    auditor.with(|pipeline| {
        let start = pipeline.start(request).unwrap();
        let deviation = |index: usize| {
            let (before, after) = (&claim.states[index], &claim.states[index + 1]);
            pipeline.transition(request, index, before).unwrap().deviation(before, after).unwrap()
        };
        let deviations = (0..request.steps).map(deviation).collect();
        let end = pipeline.frames(request, claim.states.last().unwrap()).unwrap();
        Findings {
            starts_well: latents_bytes(&start).unwrap() == latents_bytes(&claim.states[0]).unwrap(),
            deviations,
            frames: frames_deviation(&end, &claim.frames),
            wrong: claim.wrong.clone(),
        }
    })
}

/// The three checks of an audit that drew this step.
fn is_caught(found: &Findings, step: usize, limit: f64) -> bool {
    !found.starts_well || found.deviations[step] > limit || found.frames > FRAMES_TOLERANCE
}

/// A folder of the bundled model whose transformer was changed.
fn changed_model(change: impl Fn(&str, Tensor) -> Option<Tensor>, layers: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let file = folder.path().join("transformer/diffusion_pytorch_model.safetensors");
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let changed =
        tensors.into_iter().filter_map(|(name, tensor)| Some((name.clone(), change(&name, tensor)?)));
    candle_core::safetensors::save(&changed.collect(), &file).unwrap();
    let config = folder.path().join("transformer/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text.replace("\"num_layers\": 4", &format!("\"num_layers\": {layers}"));
    std::fs::write(&config, text).unwrap();
    folder
}

/// Matrices rounded to 8 bits a weight, with a scale for each row.
fn in_8_bits(_: &str, tensor: Tensor) -> Option<Tensor> {
    let tensor = tensor.to_dtype(DType::F32).unwrap();
    if tensor.rank() != 2 {
        return Some(tensor);
    }
    let scale = (tensor.abs().unwrap().max_keepdim(1).unwrap() / 127.0).unwrap();
    let scale = scale.maximum(1e-12).unwrap();
    Some(tensor.broadcast_div(&scale).unwrap().round().unwrap().broadcast_mul(&scale).unwrap())
}

fn without_last_layer(name: &str, tensor: Tensor) -> Option<Tensor> {
    (!name.starts_with("transformer_blocks.3.")).then_some(tensor)
}

type Cheat = fn(&mut dyn Pipeline, &GenerateRequest) -> Claim;

/// Each kind of maker, honest first: which model it loads, and how it works.
fn makers() -> Vec<(&'static str, usize, Cheat)> {
    vec![
        ("honest", 0, honest),
        ("fewer steps", 0, fewer_steps),
        ("one step skipped", 0, one_skipped),
        ("another seed", 0, another_seed),
        ("8-bit weights", 1, |pipeline, request| all_wrong(honest(pipeline, request))),
        ("a layer fewer", 2, |pipeline, request| all_wrong(honest(pipeline, request))),
        ("spliced once", 0, spliced),
        ("foreign clip", 0, foreign_clip),
    ]
}

/// Findings by kind of maker and auditor, of all jobs.
type Table = BTreeMap<(usize, usize), Vec<Findings>>;

fn measure(jobs: usize, steps: usize, auditors: &mut [Auditor]) -> Table {
    let models = [
        changed_model(|_, tensor| Some(tensor), 4),
        changed_model(in_8_bits, 4),
        changed_model(without_last_layer, 3),
    ];
    let mut made: Vec<_> =
        models.iter().map(|folder| load(folder.path(), &LoadOptions::default()).unwrap()).collect();
    let mut table = Table::new();
    for job in 0..jobs {
        let defaults = made[0].info().defaults;
        let request = GenerateRequest {
            seed: job as u64 + 1,
            steps,
            ..GenerateRequest::new(PROMPTS[job % PROMPTS.len()], &defaults)
        };
        for (kind, (_, model, cheat)) in makers().into_iter().enumerate() {
            let claim = cheat(made[model].as_mut(), &request);
            for (number, auditor) in auditors.iter_mut().enumerate() {
                table.entry((kind, number)).or_default().push(look(auditor, &request, &claim));
            }
        }
    }
    table
}

/// The deviations of the steps that are as they should be, or of those that are not.
fn deviations(found: &[Findings], wrong: bool) -> Vec<f64> {
    let of = |one: &Findings| {
        let picked = one.deviations.iter().enumerate().filter(|(step, _)| one.wrong.contains(step) == wrong);
        picked.map(|(_, deviation)| *deviation).collect::<Vec<_>>()
    };
    found.iter().flat_map(of).collect()
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn greatest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

fn row(name: &str, values: &[f64]) -> String {
    let bin = |value: &f64| (value.max(1e-12).log10().floor() as i32).clamp(*BINS.start(), *BINS.end());
    let counts = BINS.map(|edge| values.iter().filter(|value| bin(value) == edge).count());
    let counts: Vec<String> =
        counts.map(|count| if count == 0 { format!("{:>6}", ".") } else { format!("{count:>6}") }).collect();
    format!("{name:<28}{}  {:>9.2e} {:>9.2e}", counts.join(""), least(values), greatest(values))
}

fn print(table: &Table, auditors: &[Auditor]) {
    let edges: Vec<String> = BINS.map(|edge| format!("{:>6}", format!("1e{edge}"))).collect();
    for (number, auditor) in auditors.iter().enumerate() {
        println!("\nauditor: {}; steps by deviation of the model output", auditor.name);
        println!("{:<28}{}  {:>9} {:>9}", "maker", edges.join(""), "least", "greatest");
        for (kind, (name, ..)) in makers().iter().enumerate() {
            let found = &table[&(kind, number)];
            for (what, wrong) in [("", false), (", wrong steps", true)] {
                let values = deviations(found, wrong);
                if !values.is_empty() {
                    println!("{}", row(&format!("{name}{what}"), &values));
                }
            }
        }
    }
}

/// A stream of draws from a seed (SplitMix64).
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

/// The share of audits that must catch a maker: the share of its wrong steps, or all where an end is wrong.
fn expected_rate(found: &[Findings]) -> f64 {
    let of = |one: &Findings| {
        let ends = !one.starts_well || one.frames > FRAMES_TOLERANCE;
        if ends { 1.0 } else { one.wrong.len() as f64 / one.deviations.len() as f64 }
    };
    found.iter().map(of).sum::<f64>() / found.len() as f64
}

/// Draws audits, prints how many were caught, and asserts what theory says.
fn audit(table: &Table, auditors: &[Auditor], audits: usize) {
    println!("\n{:<20}{:<28}{:>9} {:>9} {:>9}", "maker", "auditor", "gap", "caught", "theory");
    for (kind, (name, ..)) in makers().iter().enumerate() {
        for (number, auditor) in auditors.iter().enumerate() {
            let (found, limit) = (&table[&(kind, number)], tolerance(auditor.precision));
            let honest = greatest(&deviations(&table[&(0, number)], false));
            let wrong = deviations(found, true);
            let gap = least(&wrong) / honest;
            let mut draw = Draw(kind as u64 * 100 + number as u64);
            let caught = (0..audits).filter(|_| {
                let one = &found[draw.below(found.len())];
                is_caught(one, draw.below(one.deviations.len()), limit)
            });
            let (rate, theory) = (caught.count() as f64 / audits as f64, expected_rate(found));
            let undetectable = UNDETECTABLE.contains(&(name, auditor.precision));
            let note = if undetectable { "  undetectable" } else { "" };
            let gap_shown = if wrong.is_empty() { "-".to_owned() } else { format!("{gap:.1}") };
            println!("{name:<20}{:<28}{gap_shown:>9} {rate:>9.3} {theory:>9.3}{note}", auditor.name);
            if undetectable {
                continue;
            }
            assert!(wrong.is_empty() || gap >= GAP, "{name}, {}: the gap is {gap}", auditor.name);
            // Five standard deviations of so many draws.
            let spread = 5.0 * (theory * (1.0 - theory) / audits as f64).sqrt();
            assert!((rate - theory).abs() <= spread + 1e-9, "{name}, {}: {rate}, not {theory}", auditor.name);
            assert!(name != &"honest" || rate == 0.0, "an honest maker is accused");
        }
    }
}

/// Cheats that an auditor of this precision cannot tell from rounding, as `audit::tolerance` says.
const UNDETECTABLE: [(&str, Precision); 3] = [
    ("fewer steps", Precision::Half),
    ("one step skipped", Precision::Half),
    ("8-bit weights", Precision::Half),
];

fn auditors(folder: &Path) -> Vec<Auditor> {
    vec![
        Auditor::new(folder, "f32, 1 thread", DType::F32, 1, false),
        Auditor::new(folder, "f32, 2 threads", DType::F32, 2, false),
        Auditor::new(folder, "f32, other kernels", DType::F32, 2, true),
        Auditor::new(folder, "bf16", DType::BF16, 2, false),
    ]
}

#[test]
fn every_cheat_is_caught_as_often_as_theory_says_and_no_honest_maker_is() {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let mut auditors = auditors(folder.path());
    let mut few = vec![auditors.remove(2), auditors.remove(2)];
    let table = measure(1, 8, &mut few);
    print(&table, &few);
    audit(&table, &few, 1000);
}

#[test]
#[ignore = "minutes: the calibration, on demand"]
fn calibration_of_a_thousand_audits_of_each_maker() {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let mut auditors = auditors(folder.path());
    let table = measure(4, 16, &mut auditors);
    print(&table, &auditors);
    audit(&table, &auditors, 1000);
}

#[test]
fn what_is_committed_to_names_every_state_and_everything_that_a_step_depends_on() {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let pipeline = load(folder.path(), &LoadOptions::default()).unwrap();
    let request = GenerateRequest::new(PROMPTS[0], &pipeline.info().defaults);
    let committed = pipeline.commitment(&request).unwrap();
    assert_eq!(committed.samplers.len(), request.steps + 1);
    let distinct: std::collections::BTreeSet<_> = committed.samplers.iter().collect();
    assert_eq!(distinct.len(), request.steps + 1);
    let other = GenerateRequest { prompt: PROMPTS[1].to_owned(), ..request.clone() };
    let other = pipeline.commitment(&other).unwrap();
    assert_ne!(other.conditioning, committed.conditioning);
    assert_eq!(other.samplers, committed.samplers);
    let fewer = GenerateRequest { steps: request.steps - 1, ..request };
    assert_ne!(pipeline.commitment(&fewer).unwrap().samplers[0], committed.samplers[0]);
}

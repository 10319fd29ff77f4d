//! The real worker process with a real, tiny model.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kinoflock_inference::plan::{MemoryPlan, PlanOptions};
use kinoflock_node::engine::Deadlines;
use kinoflock_node::engine::bench::{run_to_end, speed};
use kinoflock_node::engine::frames::decode_mp4;
use kinoflock_node::engine::supervisor::{EngineEvent, WorkerConfig, spawn};
use kinoflock_node::engine::wire::{
    self, Extra, FromWorker, Greeting, LoadRequest, Name, OpenRequest, Output, RunRequest, ToWorker, WirePath,
};
use kinoflock_node::models::{Model, ModelStore, selftest};
use kinoflock_protocol::capacity::SelfTest;
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::id::{BlobId, JobId, ModelId};
use kinoflock_protocol::units::UnixMillis;
use safetensors::tensor::{Dtype, TensorView};

fn pipeline() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("inference/tests/goldens/ltx-video-0.9.0/pipeline")
}

fn worker() -> WorkerConfig {
    let mut config = WorkerConfig::program(env!("CARGO_BIN_EXE_kinoflockd").into(), &["worker"]);
    // A busy test machine is no reason to kill a worker.
    config.deadlines = Deadlines {
        shortest: Duration::from_secs(300),
        greeting: Duration::from_secs(120),
        cancel: Duration::from_secs(120),
        ..Deadlines::default()
    };
    config
}

fn request(folder: &Path) -> RunRequest {
    let path = |name: &str| WirePath::new(folder.join(name).display().to_string()).unwrap();
    RunRequest {
        job: JobId::from_bytes([1; 32]),
        model: LoadRequest {
            model: ModelId::from_bytes([7; 32]),
            dir: WirePath::new(pipeline().display().to_string()).unwrap(),
        },
        prompt: Text::new("a cat").unwrap(),
        negative: Text::default(),
        seed: 5,
        frames: 9,
        width: 64,
        height: 64,
        fps: 8.0,
        steps: 3,
        guidance: 3.0,
        extra: Extra::default(),
        output: Output {
            clip: path("clip.mp4"),
            latents: Some(path("latents.safetensors")),
            checkpoint: Some(path("checkpoints")),
            states: None,
        },
        checkpoint_every: 2,
        preview_every: 1,
    }
}

#[tokio::test]
async fn a_real_worker_makes_the_same_clip_twice_and_resumes_from_its_checkpoint() {
    let (a, b, c) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (engine, mut events) = spawn(worker());
    let (mut previews, mut loads) = (0, Vec::new());
    let first = run_to_end(&engine, &mut events, request(a.path()), |event| match event {
        EngineEvent::Preview { .. } => previews += 1,
        EngineEvent::Loaded(report) => loads.push(report.seconds),
        _ => {}
    })
    .await
    .unwrap();
    assert!(previews >= 1 && first.steps_done == 3 && first.frames == 9);
    let bytes = std::fs::read(a.path().join("clip.mp4")).unwrap();
    assert_eq!(first.clip.blake3, BlobId::of(&bytes));
    let frames = decode_mp4(&a.path().join("clip.mp4")).unwrap();
    assert_eq!((frames.width, frames.height, frames.count), (64, 64, 9));
    assert!(!first.constant && first.latents_summary.finite);

    let again = run_to_end(&engine, &mut events, request(b.path()), |event| {
        if let EngineEvent::Loaded(report) = event {
            loads.push(report.seconds);
        }
    })
    .await
    .unwrap();
    assert_eq!(again.clip.blake3, first.clip.blake3);
    assert_eq!(
        again.latents,
        first.latents.clone().map(|file| wire::FileReport {
            path: WirePath::new(b.path().join("latents.safetensors").display().to_string()).unwrap(),
            ..file
        })
    );
    assert!(loads[0] > 0.0 && loads[1] == 0.0, "the model stays loaded: {loads:?}");

    let mut resumed = request(c.path());
    resumed.extra.resume =
        Some(WirePath::new(a.path().join("checkpoints/step-2.safetensors").display().to_string()).unwrap());
    let resumed = run_to_end(&engine, &mut events, resumed, |_| {}).await.unwrap();
    assert_eq!(resumed.steps_done, 1);
    assert_eq!((resumed.clip.blake3, resumed.step_root), (first.clip.blake3, first.step_root));
    engine.shutdown().await;
}

#[tokio::test]
async fn a_request_that_the_model_cannot_make_fails_with_the_reason_and_leaves_the_worker() {
    type Change = fn(&mut RunRequest);

    let folder = tempfile::tempdir().unwrap();
    let (engine, mut events) = spawn(worker());
    let mut starts = 0;
    let long = "cat ".repeat(100);
    let cases: [(&str, &str, Change); 4] = [
        ("size", "48", |request| request.width = 48),
        ("frames", "10", |request| request.frames = 10),
        ("zero_steps", "at least 1 step", |request| request.steps = 0),
        ("config", "", |request| request.model.dir = WirePath::new("/nowhere").unwrap()),
    ];
    for (code, text, change) in cases {
        let mut request = request(folder.path());
        change(&mut request);
        if code == "config" {
            request.model.model = ModelId::from_bytes([8; 32]);
        }
        let failure = run_to_end(&engine, &mut events, request, |event| {
            starts += u32::from(matches!(event, EngineEvent::Ready(_)));
        })
        .await
        .unwrap_err();
        assert!(failure.text.contains(text), "{code}: {} {}", failure.code, failure.text);
        if code != "config" {
            assert_eq!(failure.code.as_str(), code, "{}", failure.text);
        }
    }
    let mut request = request(folder.path());
    request.prompt = Text::new(long).unwrap();
    let failure = run_to_end(&engine, &mut events, request, |_| {}).await.unwrap_err();
    assert!(failure.code.contains("prompt") && !failure.retryable, "{} {}", failure.code, failure.text);
    assert_eq!(starts, 1);
    engine.shutdown().await;
}

#[tokio::test]
async fn a_cancel_stops_the_real_worker_between_steps() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, mut events) = spawn(worker());
    let mut job = request(folder.path());
    job.steps = 10_000;
    engine.run(job.clone()).unwrap();
    let mut last = 0;
    let done = loop {
        match events.recv().await.unwrap() {
            EngineEvent::Step(step) => {
                last = step.done;
                if step.done == 2 {
                    engine.cancel(job.job).unwrap();
                }
            }
            EngineEvent::Cancelled { steps_done, .. } => break steps_done,
            EngineEvent::Failed { failure, .. } => panic!("{}", failure.text),
            _ => {}
        }
    };
    assert_eq!(done, last);
    assert!(done < 10_000 && !folder.path().join("clip.mp4").exists());
    engine.shutdown().await;
}

#[tokio::test]
async fn a_job_whose_adapters_do_not_fit_is_refused_before_its_model_is_loaded() {
    const WIDTH: usize = 32;
    const RANK: usize = 2048;
    let folder = tempfile::tempdir().unwrap();
    let bytes = vec![0u8; 4 * WIDTH * RANK];
    let tensors = [("lora_A", vec![RANK, WIDTH]), ("lora_B", vec![WIDTH, RANK])].map(|(part, shape)| {
        let view = TensorView::new(Dtype::F32, shape, &bytes).unwrap();
        (format!("transformer.transformer_blocks.0.attn1.to_q.{part}.weight"), view)
    });
    let file = safetensors::serialize(tensors, None).unwrap();
    let weights = BlobId::of(&file);
    std::fs::write(folder.path().join(wire::input_name(&weights)), &file).unwrap();
    let mut with = request(folder.path());
    with.extra.inputs = Some(WirePath::new(folder.path().display().to_string()).unwrap());
    with.extra.adapters = List::first_of([wire::AdapterUse { weights, scale: 1.0 }]);

    let defaults = kinoflock_inference::registry::facts(&pipeline()).unwrap().info.defaults;
    let mut plain = kinoflock_inference::GenerateRequest::new("", &defaults);
    (plain.width, plain.height, plain.frames, plain.guidance) = (64, 64, 9, 3.0);
    let plan = MemoryPlan::new(&pipeline(), &plain, &PlanOptions::default()).unwrap();
    let mut config = worker();
    // Room for the adapter's file, not for what becomes of it as well.
    config.open.memory = plan.peak(true) + file.len() as u64;
    let (engine, mut events) = spawn(config.clone());
    let mut loads = 0;
    let refused = run_to_end(&engine, &mut events, with.clone(), |event| {
        loads += usize::from(matches!(event, EngineEvent::Loaded(_)));
    });
    let failure = refused.await.unwrap_err();
    assert_eq!(&*failure.code, "memory_limit");
    assert!(failure.text.contains(&config.open.memory.to_string()), "{}", failure.text);
    assert_eq!(loads, 0, "it was loaded first");
    run_to_end(&engine, &mut events, request(folder.path()), |_| {}).await.unwrap();
    engine.shutdown().await;
    config.open.merge_adapters = true;
    let (engine, mut events) = spawn(config);
    run_to_end(&engine, &mut events, with, |_| {}).await.unwrap();
    engine.shutdown().await;
}

#[test]
fn an_orphan_exits_within_two_seconds_even_in_the_middle_of_a_step() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_kinoflockd"))
        .arg("worker")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdin.write_all(&Greeting::OURS.to_bytes()).unwrap();
    let mut greeting = [0; Greeting::LEN];
    stdout.read_exact(&mut greeting).unwrap();
    Greeting::check(greeting).unwrap();
    let open = OpenRequest {
        device: Name::truncated("cpu"),
        dtype: Name::truncated("auto"),
        merge_adapters: false,
        threads: 0,
        memory_limit: 0,
        memory: 0,
        offload: Name::truncated("auto"),
    };
    wire::write_message(&mut stdin, &ToWorker::Open(open)).unwrap();
    let mut job = request(folder.path());
    (job.steps, job.preview_every, job.checkpoint_every) = (10_000, 0, 0);
    (job.frames, job.width, job.height) = (25, 256, 256);
    wire::write_message(&mut stdin, &ToWorker::Run(Box::new(job))).unwrap();
    loop {
        match wire::read_message(&mut stdout).unwrap() {
            Some(FromWorker::Step(_)) => break,
            Some(FromWorker::Failed { failure, .. }) => panic!("{}", failure.text),
            Some(_) => {}
            None => panic!("the worker ended"),
        }
    }
    // As at the daemon's death: its end of the pipe is gone.
    let since = Instant::now();
    drop(stdin);
    child.wait().unwrap();
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
}

#[tokio::test]
async fn a_model_passes_its_self_test_against_its_own_fingerprint_and_fails_against_another() {
    let folder = tempfile::tempdir().unwrap();
    let store = ModelStore::open(&folder.path().join("models"), None).unwrap();
    let mut model: Model = store.import(&pipeline(), "tiny").unwrap();
    let (engine, mut events) = spawn(worker());
    let at = UnixMillis(1);
    let path = |name: &str| WirePath::new(folder.path().join(name).display().to_string()).unwrap();
    let make = |model: &Model| {
        let load =
            LoadRequest { model: model.id, dir: WirePath::new(model.dir.display().to_string()).unwrap() };
        let output = Output { clip: path("clip.mp4"), latents: None, checkpoint: None, states: None };
        selftest::request(model, JobId::from_bytes([3; 32]), load, output)
    };
    let request = make(&model);
    assert_eq!(request.steps, 2);
    let report = run_to_end(&engine, &mut events, request.clone(), |_| {}).await.unwrap();
    assert_eq!(selftest::judge(&model, &report, at), Ok(SelfTest::Unreferenced { at }));
    assert!(speed(&model.manifest.work, &request, &report).per_second > 0);

    let print = selftest::fingerprint(&request, &report, 0.001).unwrap();
    model.card = Some(card(&model, print.clone()));
    assert_eq!(make(&model), RunRequest { prompt: request.prompt.clone(), ..request.clone() });
    assert!(matches!(selftest::judge(&model, &report, at), Ok(SelfTest::Passed { .. })));

    let mut other = request.clone();
    other.seed += 1;
    let other = run_to_end(&engine, &mut events, other, |_| {}).await.unwrap();
    assert_eq!(selftest::judge(&model, &other, at).unwrap_err().code(), "selftest_differs");
    let mut broken = report;
    broken.constant = true;
    assert_eq!(selftest::judge(&model, &broken, at).unwrap_err().code(), "selftest_constant");
    engine.shutdown().await;
}

fn card(model: &Model, print: kinoflock_protocol::card::Fingerprint) -> kinoflock_protocol::card::Card {
    use kinoflock_protocol::card::{
        Card, Consent, ConsentGiven, CreditShare, Licence, Subject, TrainingData,
    };
    use kinoflock_protocol::codec::List;
    let share =
        CreditShare { name: Text::truncated("nobody"), key: None, role: Text::default(), bps: 10_000 };
    Card {
        subject: Subject::Model(model.id),
        name: Text::truncated("tiny"),
        summary: Text::default(),
        version: 1,
        previous: None,
        issued_at: UnixMillis(0),
        authors: List::empty(),
        licence: Licence { name: Text::truncated("MIT"), url: Text::default(), conditions: Text::default() },
        training_data: TrainingData {
            disclosed: true,
            statement: Text::truncated("none"),
            sources: List::empty(),
        },
        consent: Consent { given: ConsentGiven::OwnWork, statement: Text::default() },
        shares: List::new(vec![share]).unwrap(),
        upstreams: List::empty(),
        fingerprint: Some(print),
    }
}

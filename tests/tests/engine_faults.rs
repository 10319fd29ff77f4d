//! The supervisor against workers that crash, wedge, babble and lie, as real processes.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::time::Duration;

use kinoflock_node::engine::Deadlines;
use kinoflock_node::engine::bench::run_to_end;
use kinoflock_node::engine::frames::decode_mp4;
use kinoflock_node::engine::supervisor::{EngineEvent, EngineHandle, WorkerConfig, spawn};
use kinoflock_node::engine::wire::{DoneReport, Extra, Failure, LoadRequest, Output, RunRequest, WirePath};
use kinoflock_protocol::codec::Text;
use kinoflock_protocol::id::{BlobId, JobId, ModelId};
use tokio::sync::mpsc::Receiver;

const PROMPT: &str = "a violet heron over the reservoir at dawn";

fn config(args: &[&str]) -> WorkerConfig {
    let mut config = WorkerConfig::program(env!("CARGO_BIN_EXE_kinoflock-test-engine").into(), args);
    let short = Duration::from_secs(5);
    config.deadlines = Deadlines {
        shortest: short,
        first: short,
        greeting: Duration::from_secs(60),
        cancel: Duration::from_millis(500),
        ..Deadlines::default()
    };
    config
}

fn request(folder: &Path, number: u8) -> RunRequest {
    let path = |name: &str| WirePath::new(folder.join(name).display().to_string()).unwrap();
    RunRequest {
        job: JobId::from_bytes([number; 32]),
        model: LoadRequest { model: ModelId::from_bytes([7; 32]), dir: path("model") },
        prompt: Text::new(PROMPT).unwrap(),
        negative: Text::default(),
        seed: 5,
        frames: 9,
        width: 64,
        height: 64,
        fps: 8.0,
        steps: 4,
        guidance: 1.0,
        extra: Extra::default(),
        output: Output {
            clip: path("clip.mp4"),
            latents: Some(path("latents.safetensors")),
            checkpoint: Some(path("checkpoint")),
            states: None,
        },
        checkpoint_every: 2,
        preview_every: 2,
    }
}

/// Waits until the first worker is in its fault: from then on no other has it.
fn wait_for_mark(once: &str) {
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while !Path::new(once).exists() {
        assert!(std::time::Instant::now() < until, "the worker never came to its fault");
        std::thread::sleep(Duration::from_millis(2));
    }
}

async fn run(args: &[&str], folder: &Path) -> Result<DoneReport, Failure> {
    let (engine, mut events) = spawn(config(args));
    let result = run_to_end(&engine, &mut events, request(folder, 1), |_| {}).await;
    engine.shutdown().await;
    result
}

async fn next_job(engine: &EngineHandle, events: &mut Receiver<EngineEvent>, folder: &Path) -> DoneReport {
    run_to_end(engine, events, request(folder, 2), |_| {}).await.unwrap()
}

#[tokio::test]
async fn a_job_gives_a_real_clip_and_every_event_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, mut events) = spawn(config(&[]));
    let mut seen = Vec::new();
    let report = run_to_end(&engine, &mut events, request(folder.path(), 1), |event| {
        seen.push(match event {
            EngineEvent::Ready(_) => "ready".to_owned(),
            EngineEvent::Loaded(_) => "loaded".to_owned(),
            EngineEvent::Phase { phase, .. } => phase.name().to_owned(),
            EngineEvent::Step(step) => format!("{}/{}", step.done, step.total),
            EngineEvent::Preview { png, .. } => String::from_utf8_lossy(&png[1..4]).into_owned(),
            EngineEvent::Checkpoint { step, .. } => format!("checkpoint {step}"),
            EngineEvent::Done(_) => "done".to_owned(),
            other => format!("{other:?}"),
        });
    })
    .await
    .unwrap();
    let expected = "ready load loaded text step 1/4 2/4 PNG checkpoint 2 3/4 4/4 PNG decode encode done";
    assert_eq!(seen.join(" "), expected);
    let bytes = std::fs::read(folder.path().join("clip.mp4")).unwrap();
    assert_eq!((report.clip.len, report.clip.blake3), (bytes.len() as u64, BlobId::of(&bytes)));
    let frames = decode_mp4(&folder.path().join("clip.mp4")).unwrap();
    assert_eq!((frames.width, frames.height, frames.count), (64, 64, 9));
    assert!(!report.constant && report.latents_summary.finite && report.step_root.is_some());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "no partial file is left");
    engine.shutdown().await;
}

#[tokio::test]
async fn stray_prints_do_no_harm_and_the_same_job_gives_the_same_bytes() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let quiet = run(&[], a.path()).await.unwrap();
    let loud = run(&["--stray", "1"], b.path()).await.unwrap();
    assert_eq!(quiet.clip.blake3, loud.clip.blake3);
    assert_eq!(quiet.latents.unwrap().blake3, loud.latents.unwrap().blake3);
}

#[tokio::test]
async fn a_worker_that_dies_says_of_what_and_the_next_job_has_a_new_one() {
    for (fault, code, text) in [
        ("--crash-at", "worker_crashed", "signal 6"),
        ("--exit-at", "worker_crashed", "code 9"),
        ("--oom-at", "out_of_memory", "an allocation failed"),
        ("--kill-at", "out_of_memory", "signal 9"),
        ("--panic-at", "worker_panic", "never should"),
        ("--fail-at", "test_failure", "told to fail"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let once = folder.path().join("once").display().to_string();
        let (engine, mut events) = spawn(config(&[fault, "2", "--once", &once]));
        let failure = run_to_end(&engine, &mut events, request(folder.path(), 1), |_| {}).await.unwrap_err();
        assert_eq!(failure.code.as_str(), code, "{fault}: {}", failure.text);
        assert!(failure.text.contains(text) && failure.retryable, "{fault}: {}", failure.text);
        next_job(&engine, &mut events, folder.path()).await;
        engine.shutdown().await;
    }
}

#[tokio::test]
async fn a_wedged_step_is_killed_at_its_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let once = folder.path().join("once").display().to_string();
    let (engine, mut events) = spawn(config(&["--wedge-at", "2", "--once", &once]));
    let failure = run_to_end(&engine, &mut events, request(folder.path(), 1), |_| {}).await.unwrap_err();
    assert_eq!(failure.code.as_str(), "worker_deadline");
    assert!(failure.text.contains("phase step took more than its limit of 5.0 s"), "{}", failure.text);
    next_job(&engine, &mut events, folder.path()).await;
    engine.shutdown().await;
}

#[tokio::test]
async fn a_stopped_process_is_killed_and_replaced() {
    use rustix::process::{Pid, Signal, kill_process};
    let folder = tempfile::tempdir().unwrap();
    let hold = folder.path().join("never").display().to_string();
    let once = folder.path().join("once").display().to_string();
    let (engine, mut events) = spawn(config(&["--hold-at", "2", "--hold-file", &hold, "--once", &once]));
    let mut pid = None;
    let failure = run_to_end(&engine, &mut events, request(folder.path(), 1), |event| match event {
        EngineEvent::Ready(info) => pid = Pid::from_raw(info.pid as i32),
        EngineEvent::Step(_) => {
            wait_for_mark(&once);
            kill_process(pid.unwrap(), Signal::STOP).unwrap();
        }
        _ => {}
    })
    .await
    .unwrap_err();
    assert_eq!(failure.code.as_str(), "worker_deadline");
    next_job(&engine, &mut events, folder.path()).await;
    engine.shutdown().await;
}

#[tokio::test]
async fn a_cancel_stops_within_the_step_and_keeps_the_worker() {
    let folder = tempfile::tempdir().unwrap();
    let hold = folder.path().join("go on").display().to_string();
    let (engine, mut events) = spawn(config(&["--hold-at", "3", "--hold-file", &hold]));
    let job = request(folder.path(), 1);
    engine.run(job.clone()).unwrap();
    let (mut starts, mut cancelled) = (0, None);
    while cancelled.is_none() {
        match events.recv().await.unwrap() {
            EngineEvent::Ready(_) => starts += 1,
            EngineEvent::Step(step) if step.done == 2 => {
                engine.cancel(JobId::from_bytes([99; 32])).unwrap();
                engine.cancel(job.job).unwrap();
            }
            EngineEvent::Cancelled { job: of, steps_done } if of == job.job => cancelled = Some(steps_done),
            _ => {}
        }
    }
    assert_eq!(cancelled, Some(2));
    std::fs::write(&hold, b"").unwrap();
    run_to_end(&engine, &mut events, request(folder.path(), 2), |event| {
        starts += u32::from(matches!(event, EngineEvent::Ready(_)));
    })
    .await
    .unwrap();
    assert_eq!(starts, 1, "the worker that obeyed is kept");
    engine.shutdown().await;
}

#[tokio::test]
async fn a_cancel_that_is_not_heard_kills_the_worker() {
    let folder = tempfile::tempdir().unwrap();
    let once = folder.path().join("once").display().to_string();
    let mut config = config(&["--wedge-at", "1", "--once", &once]);
    config.deadlines.shortest = Duration::from_secs(600);
    config.deadlines.first = Duration::from_secs(600);
    let (engine, mut events) = spawn(config);
    let job = request(folder.path(), 1);
    engine.run(job.clone()).unwrap();
    loop {
        match events.recv().await.unwrap() {
            EngineEvent::Phase { phase: kinoflock_node::engine::wire::Phase::Step, .. } => {
                wait_for_mark(&once);
                engine.cancel(job.job).unwrap();
            }
            EngineEvent::Cancelled { job: of, .. } => {
                assert_eq!(of, job.job);
                break;
            }
            _ => {}
        }
    }
    next_job(&engine, &mut events, folder.path()).await;
    engine.shutdown().await;
}

#[tokio::test]
async fn another_version_or_another_program_is_named_as_such() {
    for (args, code, text) in [
        (
            ["--wire-version", "9"],
            "worker_version",
            "speaks version 9 of the engine's language, this daemon speaks 5",
        ),
        (["--babble", "1"], "not_a_worker", "no kinoflock worker"),
        (["--refuse-device", "1"], "device", "cuda:7"),
    ] {
        let (engine, mut events) = spawn(config(&args));
        match events.recv().await.unwrap() {
            EngineEvent::Lost(failure) => {
                assert_eq!(failure.code.as_str(), code);
                assert!(failure.text.contains(text), "{}", failure.text);
            }
            other => panic!("{other:?}"),
        }
        engine.shutdown().await;
    }
    let (engine, mut events) = spawn(WorkerConfig::program("/nowhere/kinoflockd".into(), &[]));
    let EngineEvent::Lost(failure) = events.recv().await.unwrap() else { panic!("it cannot start") };
    assert_eq!(failure.code.as_str(), "worker_program");
    assert!(failure.text.contains("/nowhere/kinoflockd"));
    engine.shutdown().await;
}

#[tokio::test]
async fn a_full_or_missing_output_folder_fails_the_job_and_not_the_worker() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, mut events) = spawn(config(&[]));
    let mut job = request(folder.path(), 1);
    job.output.clip = WirePath::new(folder.path().join("missing/clip.mp4").display().to_string()).unwrap();
    let failure = run_to_end(&engine, &mut events, job, |_| {}).await.unwrap_err();
    assert_eq!(failure.code.as_str(), "write");
    let mut job = request(folder.path(), 3);
    job.width = 33;
    let failure = run_to_end(&engine, &mut events, job, |_| {}).await.unwrap_err();
    assert_eq!(failure.code.as_str(), "odd_size");
    next_job(&engine, &mut events, folder.path()).await;
    engine.shutdown().await;
}

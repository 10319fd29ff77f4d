//! What an operator commands and sets: pauses that end by themselves, one device drained while another works, ceilings
//! of upload and download, and disk limits that do not touch each other.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually, said};

const PROMPT: &str = "a paper boat in the rain";

/// Runs a command of the node's operator; gives what it said.
fn operator(node: &Node, arguments: &[&str]) -> String {
    let output = node.command().args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

fn fetch(client: &Client, node: &Node, job: &str) {
    let file = format!("{job}.mp4");
    client.must(["wait", job, "-o", &file]);
    invariants::delivered(&client.path(&file), node);
}

#[test]
fn a_pause_with_an_end_takes_jobs_for_later_and_ends_when_it_is_told_to() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    says(&operator(node, &["pause", "--for", "2h"]), &["paused all devices for 2 h", "kinoflockd resume"]);
    says(&operator(node, &["status"]), &["takes jobs", "device cpu: paused, for another "]);
    let job = client.detach(&node.ticket(), PROMPT, &[]);
    let status = node.status();
    assert_eq!((status.jobs.len(), status.jobs[0].state.as_str()), (1, "queued"), "{:?}", status.jobs);
    assert!(
        status.jobs[0].eta_seconds.unwrap() > 3600.0,
        "the wait is not in the estimate: {:?}",
        status.jobs
    );
    says(&operator(node, &["resume"]), &["resumed all devices"]);
    fetch(&client, node, &job);
}

#[test]
fn a_pause_ends_by_itself() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let before = Instant::now();
    operator(node, &["pause", "--for", "3s"]);
    let job = client.detach(&node.ticket(), PROMPT, &[]);
    fetch(&client, node, &job);
    assert!(before.elapsed() >= Duration::from_secs(3), "it began during the pause");
    says(&operator(node, &["status"]), &["device cpu: idle"]);
}

#[test]
fn a_pause_without_an_end_refuses_new_jobs_and_keeps_those_that_wait() {
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("go on");
    sandbox.add(&Worker::test(&["--hold-at", "3", "--hold-file", file.to_str().unwrap()]), "");
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let jobs: Vec<_> = (0..2).map(|_| client.detach(&node.ticket(), PROMPT, &["--steps", "4"])).collect();
    eventually("the first runs", || {
        node.status().jobs.iter().any(|job| job.state == "running").then_some(())
    });
    says(&operator(node, &["pause"]), &["no new jobs are taken", "kinoflockd resume"]);
    says(&operator(node, &["status"]), &["takes no jobs", "device cpu: paused"]);
    let refused = client.run(["generate", PROMPT, "--node", &node.ticket()]);
    assert_eq!(refused.status.code(), Some(4), "{}", said(&refused));
    says(&said(&refused), &["is paused by its operator"]);
    fs::write(&file, b"").unwrap();
    fetch(&client, node, &jobs[0]);
    assert_eq!(node.status().jobs[0].state, "queued", "a job began during the pause");
    operator(node, &["resume"]);
    fetch(&client, node, &jobs[1]);
}

#[test]
fn a_drained_device_starts_nothing_while_the_other_works() {
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("go on");
    let devices = "[[device]]\nname = \"left\"\n[[device]]\nname = \"right\"\n";
    sandbox.add(&Worker::test(&["--hold-at", "3", "--hold-file", file.to_str().unwrap()]), devices);
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    eventually("both devices are there", || {
        node.status().devices.iter().all(|device| device.state == "idle").then_some(())
    });
    says(
        &operator(node, &["drain", "--device", "left"]),
        &["draining left until: kinoflockd resume --device left", "none is started"],
    );
    let jobs: Vec<_> = (0..2).map(|_| client.detach(&node.ticket(), PROMPT, &["--steps", "4"])).collect();
    let on = |device: &str| node.status().jobs.iter().any(|job| job.device.as_deref() == Some(device));
    eventually("one runs on the right", || on("right").then_some(()));
    let status = operator(node, &["status"]);
    says(&status, &["takes jobs", "device left: draining", "device right: running"]);
    assert!(!on("left"), "{status}");
    let unknown = node.command().args(["drain", "--device", "middle"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(1));
    says(&said(&unknown), &["no device \"middle\"; this node has left, right"]);
    operator(node, &["resume", "--device", "left"]);
    eventually("the other runs on the left", || on("left").then_some(()));
    fs::write(&file, b"").unwrap();
    jobs.iter().for_each(|job| fetch(&client, node, job));
}

#[test]
fn a_drain_of_everything_is_told_as_about_to_stop() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    operator(node, &["drain"]);
    let refused = client.run(["generate", PROMPT, "--node", &node.ticket()]);
    assert_eq!(refused.status.code(), Some(4), "{}", said(&refused));
    says(&said(&refused), &["takes no new jobs"]);
    operator(node, &["resume"]);
    client.must(["generate", PROMPT, "--node", &node.ticket(), "-o", "clip.mp4"]);
}

/// Runs a job to its end; gives the time between two of its events, and the last one's record.
fn between(client: &Client, arguments: &[&str], from: &str, to: &str) -> (Duration, serde_json::Value) {
    let mut child = client.command(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let (mut begun, mut took) = (None, None);
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let record: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
        match record["event"].as_str() {
            Some(event) if event == from => begun = Some((Instant::now(), record)),
            Some(event) if event == to && took.is_none() => {
                took = begun.as_ref().map(|(since, record)| (since.elapsed(), record.clone()));
            }
            _ => {}
        }
    }
    assert!(child.wait().unwrap().success());
    took.unwrap_or_else(|| panic!("no {from} before {to}"))
}

#[test]
fn upload_and_download_keep_to_their_ceilings() {
    const RATE: f64 = 2048.0;
    // The bucket holds a quarter of a second, and events come a little late.
    const SLACK: f64 = 0.5;
    let mut sandbox = Sandbox::new();
    let ceilings = ["KINOFLOCKD_NETWORK_UPLOAD=2 KiB", "KINOFLOCKD_NETWORK_DOWNLOAD=2 KiB"];
    sandbox.add_prepared(&Worker::test(&[]), "", |node| node.wrap(&["env", ceilings[0], ceilings[1]]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    let generate = ["generate", PROMPT, "--node", &ticket, "--json", "--steps", "2", "-o", "clip.mp4"];

    let large = generate
        .iter()
        .copied()
        .chain(["--size", "512x512", "--frames", "33", "--seed", "5"])
        .collect::<Vec<_>>();
    let (took, made) = between(&client, &large, "made", "verified");
    let bytes = made["len"].as_u64().unwrap() as f64;
    assert!(bytes > 2.0 * RATE, "the clip is too small to tell: {bytes} bytes");
    assert!(took.as_secs_f64() > bytes / RATE - SLACK, "{bytes} bytes went up in {took:?}");

    let latents = vec![7; 3 * RATE as usize];
    fs::write(client.path("latents.safetensors"), &latents).unwrap();
    let with_latents = generate.iter().copied().chain(["--init-latents", "latents.safetensors"]);
    let (took, _) = between(&client, &with_latents.collect::<Vec<_>>(), "accepted", "made");
    let bytes = latents.len() as f64;
    assert!(took.as_secs_f64() > bytes / RATE - SLACK, "{bytes} bytes came down in {took:?}");
}

fn tiny_model() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    root.join("node/inference/tests/goldens/ltx-video-0.9.0/pipeline")
}

#[test]
fn the_disk_limits_of_models_clips_and_replicas_do_not_touch_each_other() {
    let mut sandbox = Sandbox::new();
    let import = |node: &Node| {
        node.command().args(["model", "import", "--name", "tiny"]).arg(tiny_model()).output().unwrap()
    };
    // Room for clips, none for another model, and nothing at all for replicas.
    let used: usize = kinoflock_node::models::embedded::FILES
        .iter()
        .filter(|(path, _)| *path != "card.json")
        .map(|(_, bytes)| bytes.len())
        .sum();
    let storage = format!("[storage]\nmodels_limit = \"{used} B\"\nreplicas_limit = \"0 B\"\n");
    let node = sandbox.add(&Worker::Real, &storage);
    let refused = import(node);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    says(
        &said(&refused),
        &["does not fit", &format!("{used} of its limit of {used} bytes"), "storage.models_limit"],
    );
    let ticket = node.ticket();
    let client = sandbox.client("artist");
    client.must(["generate", PROMPT, "--node", &ticket, "-o", "clip.mp4"]);

    // Room for models, none for a clip.
    let node = sandbox.add(&Worker::Real, "[storage]\nclips_limit = \"1 KiB\"\n");
    let ticket = node.ticket();
    let refused = client.run(["generate", PROMPT, "--node", &ticket]);
    assert_eq!(refused.status.code(), Some(6), "{}", said(&refused));
    says(&said(&refused), &["no room for another clip (rule storage.clips_limit)", "beyond the limit of"]);
    let imported = import(&sandbox.nodes[1]);
    assert!(imported.status.success(), "{}", said(&imported));
}

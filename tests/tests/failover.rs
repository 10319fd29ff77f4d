//! A node that is lost loses its jobs to another one; the artist sees one line and gets one clip.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::{Child, Stdio};

use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Sandbox, Worker, eventually, send};
use rustix::process::Signal;

const PROMPT: &str = "a green square drifts up over a black field";

/// Two nodes whose jobs wait in their third step for a file, and an artist who knows both. Self-tests have two steps.
fn two_that_hold() -> (Sandbox, Client, std::path::PathBuf) {
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("go-on");
    let worker = Worker::test(&["--hold-at", "3", "--hold-file", &file.display().to_string()]);
    for _ in 0..2 {
        sandbox.add(&worker, "");
    }
    let client = sandbox.client("artist");
    for node in &sandbox.nodes {
        client.must(["join", &node.ticket()]);
    }
    (sandbox, client, file)
}

fn generate(client: &Client) -> Child {
    let mut command = client.command(["generate", PROMPT, "--custodians", "0", "-o", "clip.mp4"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The place of the node that runs the job.
fn runner(sandbox: &Sandbox) -> usize {
    let holds = |node: &kinoflock_tests::sandbox::Node| {
        node.runs() && node.status().jobs.iter().any(|job| job.step.is_some_and(|step| step.0 >= 1))
    };
    eventually("a node runs the job", || sandbox.nodes.iter().position(holds))
}

fn ends_at_the_other(sandbox: &Sandbox, client: &Client, artist: Child, lost: usize, file: &std::path::Path) {
    let other = &sandbox.nodes[1 - lost];
    eventually("the other node has the job", || (!other.status().jobs.is_empty()).then_some(()));
    fs::write(file, b"").unwrap();
    let output = artist.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("loses the job").count(), 1, "one line says so: {said}");
    invariants::delivered(&client.path("clip.mp4"), other);
}

#[test]
fn the_next_node_goes_on_from_the_last_checkpoint_and_the_receipt_credits_both() {
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("go-on");
    let worker = Worker::test(&["--hold-at", "15", "--hold-file", &file.display().to_string()]);
    for _ in 0..2 {
        sandbox.add(&worker, "");
    }
    let client = sandbox.client("artist");
    for node in &sandbox.nodes {
        client.must(["join", &node.ticket()]);
    }
    let plain = ["generate", PROMPT, "--custodians", "0", "-o", "clip.mp4", "--steps", "16"];
    let artist = client.command(plain).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let holds = |node: &kinoflock_tests::sandbox::Node| {
        node.status().jobs.iter().any(|job| job.step.is_some_and(|step| step.0 == 14))
    };
    let lost = eventually("a node waits in its fifteenth step", || sandbox.nodes.iter().position(holds));
    let record = client.path(".local/share/kinoflock/client/jobs");
    eventually("the artist has the checkpoint of step 14", || {
        let job = fs::read_dir(&record).ok()?.next()?.ok()?.path();
        let record: serde_json::Value = serde_json::from_slice(&fs::read(job).ok()?).ok()?;
        let envelope: kinoflock_protocol::Envelope =
            serde_json::from_value(record["checkpoint"].clone()).ok()?;
        let opened = envelope.open::<kinoflock_protocol::progress::Checkpoint>(&sandbox.network()).ok()?;
        (opened.value.step == 14).then_some(())
    });
    let maker = sandbox.nodes[lost].local().node_id;
    sandbox.nodes[lost].kill();
    fs::write(&file, b"").unwrap();
    let output = artist.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("takes it from step 14"), "{said}");
    let verified = invariants::delivered(&client.path("clip.mp4"), &sandbox.nodes[1 - lost]);
    let segments = &verified.receipt.receipt().segments;
    let credited: Vec<_> = segments.iter().map(|part| (part.node, part.first_step, part.steps)).collect();
    let other = sandbox.nodes[1 - lost].local().node_id;
    assert_eq!(credited, [(maker, 0, 14), (other, 14, 2)]);
}

#[test]
fn a_node_that_is_killed_loses_its_job_to_another() {
    let (mut sandbox, client, file) = two_that_hold();
    let artist = generate(&client);
    let lost = runner(&sandbox);
    sandbox.nodes[lost].kill();
    ends_at_the_other(&sandbox, &client, artist, lost, &file);
}

#[test]
fn a_node_that_looks_alive_and_does_nothing_loses_its_job_and_is_called_off_when_it_wakes() {
    let (sandbox, client, file) = two_that_hold();
    let artist = generate(&client);
    let lost = runner(&sandbox);
    send(sandbox.nodes[lost].pid(), Signal::STOP);
    let other = &sandbox.nodes[1 - lost];
    eventually("the other node has the job", || (!other.status().jobs.is_empty()).then_some(()));
    send(sandbox.nodes[lost].pid(), Signal::CONT);
    ends_at_the_other(&sandbox, &client, artist, lost, &file);
    let woken = &sandbox.nodes[lost];
    eventually("the former node does nothing for it any more", || {
        woken.status().jobs.is_empty().then_some(())
    });
}

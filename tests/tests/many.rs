//! Many jobs of one artist on several nodes: variations of one prompt, and a batch that survives its process.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use kinoflock_client::provenance;
use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Sandbox, Worker, eventually, said};

const PROMPT: &str = "an amber comet over the tiled roofs";

/// So many nodes whose jobs wait in step 3 until the file is there; a step is long enough for speeds to be alike.
fn held(sandbox: &mut Sandbox, count: usize) -> PathBuf {
    let file = sandbox.path("go on");
    let hold = file.to_str().unwrap();
    for _ in 0..count {
        sandbox.add(&Worker::test(&["--step-ms", "30", "--hold-at", "3", "--hold-file", hold]), "");
    }
    file
}

/// A client that knows all nodes.
fn joined(sandbox: &Sandbox) -> Client {
    let client = sandbox.client("artist");
    for node in &sandbox.nodes {
        client.must(["join", &node.ticket()]);
    }
    client
}

fn jobs_on(sandbox: &Sandbox) -> Vec<usize> {
    sandbox.nodes.iter().map(|node| node.status().jobs.len()).collect()
}

fn done_on(sandbox: &Sandbox) -> u64 {
    sandbox.nodes.iter().map(|node| node.status().jobs_done).sum()
}

/// Checks a file by itself, whichever node made it.
fn checked(file: &Path) -> provenance::Verified {
    provenance::check(&fs::read(file).unwrap()).unwrap()
}

#[test]
fn variations_are_spread_over_the_nodes_and_each_seed_has_its_file() {
    let mut sandbox = Sandbox::new();
    let file = held(&mut sandbox, 3);
    let client = joined(&sandbox);
    let arguments =
        ["generate", PROMPT, "--variations", "6", "--seed", "7", "--steps", "6", "-o", "clip.mp4"];
    let mut command = client.command(arguments);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let spread = eventually("all six are placed", || {
        let jobs = jobs_on(&sandbox);
        (jobs.iter().sum::<usize>() == 6).then_some(jobs)
    });
    let used = spread.iter().filter(|jobs| **jobs > 0).count();
    assert!(used > 1, "each placement sees the queues that the former ones left: {spread:?}");
    fs::write(&file, b"").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains(&format!("6 of 6 clips came, from {used} nodes, in ")), "{words}");
    assert!(words.contains("\nseed 9: step 6 of 6"), "lines say whose they are: {words}");
    let made: Vec<_> =
        (7..13).map(|seed| (seed, checked(&client.path(&format!("clip-{seed}.mp4"))))).collect();
    assert!(made.iter().all(|(seed, one)| one.receipt.receipt().seed == *seed));
    let nodes: BTreeSet<_> = made.iter().map(|(_, one)| one.receipt.receipt().node).collect();
    assert_eq!(nodes.len(), used);
    invariants::one_outcome_each(&made.into_iter().map(|(_, one)| one).collect::<Vec<_>>());
    for node in &sandbox.nodes {
        invariants::discreet(node, PROMPT);
    }
}

#[test]
fn variations_that_fail_are_told_one_by_one() {
    let sandbox = Sandbox::start(1, &Worker::test(&["--fail-at", "3"]));
    let client = sandbox.client("artist");
    let ticket = sandbox.nodes[0].ticket();
    let arguments =
        ["generate", PROMPT, "--variations", "2", "--seed", "7", "--steps", "6", "--node", &ticket];
    let output = client.run(arguments);
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    let words = said(&output);
    assert!(words.contains("2 of 2 clips did not come:\n  seed 7: job "), "{words}");
    assert!(words.contains("\n  seed 8: job "), "{words}");
    assert!(!client.path("kinoflock-7.mp4").exists());
}

#[test]
fn a_batch_killed_in_the_middle_and_started_again_ends_complete_with_nothing_made_twice() {
    let mut sandbox = Sandbox::new();
    let file = held(&mut sandbox, 2);
    let client = joined(&sandbox);
    let line = |number: usize, steps: u32| {
        format!("{{\"prompt\": \"{PROMPT}, {number}\", \"steps\": {steps}, \"output\": \"{number}.mp4\"}}\n")
    };
    // The first has too few steps to be held.
    let lines: String = (1..=5).map(|number| line(number, if number == 1 { 2 } else { 6 })).collect();
    fs::write(client.path("jobs.jsonl"), lines).unwrap();
    let batch = ["generate", "--batch", "jobs.jsonl", "--in-flight", "3"];
    let mut command = client.command(batch);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually("one is done and three are under way", || {
        let under_way = jobs_on(&sandbox).iter().sum::<usize>() == 3;
        (client.path("1.mp4").exists() && under_way).then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    fs::remove_file(client.path("1.mp4")).unwrap();
    fs::write(&file, b"").unwrap();

    let output = client.run(batch);
    assert!(output.status.success(), "{}", said(&output));
    let words = said(&output);
    assert!(words.contains("4 of 5 jobs were handed over before"), "{words}");
    assert!(words.contains("5 of 5 clips came"), "{words}");
    assert_eq!(done_on(&sandbox), 5, "{words}");
    let files = |number: usize| client.path(&format!("{number}.mp4"));
    let made: Vec<_> = (1..=5).map(|number| checked(&files(number))).collect();
    invariants::one_outcome_each(&made);

    let output = client.run(batch);
    assert!(output.status.success() && said(&output).contains("5 of 5 jobs were handed over before"));
    assert_eq!(done_on(&sandbox), 5, "what is done is not made again");
    assert_eq!(client.must(["ps", "--all"]).lines().count(), 5);
    for node in &sandbox.nodes {
        invariants::discreet(node, PROMPT);
    }
}

#[test]
fn a_wrong_line_is_told_before_anything_is_sent() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let client = joined(&sandbox);
    let lines = "{\"prompt\": \"a\", \"output\": \"a.mp4\"}\n{\"prompt\": \"b\", \"frame\": 9}\n\
                 {\"prompt\": \"c\", \"frames\": 0}\n{\"prompt\": \"d\", \"output\": \"a.mp4\"}\n";
    fs::write(client.path("jobs.jsonl"), lines).unwrap();
    let output = client.run(["generate", "--batch", "jobs.jsonl"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(
        said(&output).contains("line 2: unknown name \"frame\"; did you mean \"frames\"?"),
        "{}",
        said(&output)
    );
    let good_names = lines.replace("\"frame\"", "\"frames\"");
    fs::write(client.path("jobs.jsonl"), good_names).unwrap();
    let output = client.run(["generate", "--batch", "jobs.jsonl"]);
    let words = said(&output);
    assert_eq!(output.status.code(), Some(2), "{words}");
    assert!(words.contains("line 3: frames: 0 is below the least possible, 1"), "{words}");
    assert!(words.contains("line 4: a.mp4 is the output of line 1 too"), "{words}");
    assert!(client.must(["ps", "--all"]).is_empty());
    assert_eq!(sandbox.nodes[0].status().jobs_done, 0);
}

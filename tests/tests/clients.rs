//! Clients that share a node, are killed, come back, meet a tampered clip or a node that refuses, or are ten at once.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use kinoflock_client::provenance::Verified;
use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually, said};

const PROMPT: &str = "a violet heron over the reservoir at dawn";
const STEPS: &[&str] = &["--steps", "6"];

/// A node whose jobs wait in step 3 until the file is there; the self-test has two steps.
fn held(sandbox: &mut Sandbox, config: &str) -> PathBuf {
    let file = sandbox.path("go on");
    sandbox.add(&Worker::test(&["--hold-at", "3", "--hold-file", file.to_str().unwrap()]), config);
    file
}

fn go_on(file: &Path) {
    fs::write(file, b"").unwrap();
}

/// Waits for a job by its id and checks what it brought.
fn fetched(client: &Client, node: &Node, job: &str) -> Verified {
    let file = format!("{job}.mp4");
    client.must(["wait", job, "-o", &file]);
    let verified = invariants::delivered(&client.path(&file), node);
    assert_eq!(verified.receipt.receipt().job.to_string(), job);
    verified
}

fn running(node: &Node) -> Option<String> {
    node.status().jobs.iter().find(|job| job.state == "running").map(|job| job.job.clone())
}

#[test]
fn two_clients_share_a_node_and_each_gets_its_own_clips() {
    let mut sandbox = Sandbox::new();
    let file = held(&mut sandbox, "");
    let node = &sandbox.nodes[0];
    let (many, one) = (sandbox.client("many"), sandbox.client("one"));
    let ticket = node.ticket();
    let theirs: Vec<_> = (0..3).map(|n| many.detach(&ticket, &format!("{PROMPT}, {n}"), STEPS)).collect();
    let other = one.detach(&ticket, "one fox alone", STEPS);
    go_on(&file);
    let made: Vec<_> = theirs.iter().map(|job| fetched(&many, node, job)).collect();
    let alone = fetched(&one, node, &other);
    let key = |client: &Client| client.must(["key", "show"]);
    for verified in &made {
        assert!(key(&many).contains(&verified.receipt.receipt().requester.to_string()));
    }
    assert!(key(&one).contains(&alone.receipt.receipt().requester.to_string()));
    let sequence = |verified: &Verified| verified.receipt.receipt().sequence;
    assert!(sequence(&alone) < sequence(&made[2]), "one job waited for all three of another");
    // Neither can touch the other's.
    let output = one.run(["status", &theirs[0]]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    let all: Vec<_> = made.into_iter().chain([alone]).collect();
    invariants::one_outcome_each(&all);
    invariants::one_chain(&all);
    invariants::discreet(node, "one fox alone");
    invariants::discreet(node, PROMPT);
}

/// Starts a job and kills the client the moment that it has said `accepted`; gives the job's id.
fn killed_after_accepted(client: &Client, node: &Node) -> String {
    let ticket = node.ticket();
    let arguments = ["generate", PROMPT, "--node", &ticket, "--json", "-o", "never.mp4", "--steps", "6"];
    let mut child = client.command(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let event = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
    let accepted =
        lines.map(|line| event(&line.unwrap())).find(|event| event["event"] == "accepted").unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!client.path("never.mp4").exists());
    accepted["job"].as_str().unwrap().to_owned()
}

#[test]
fn a_killed_client_finds_its_running_job_again_by_its_id() {
    let mut sandbox = Sandbox::new();
    let file = held(&mut sandbox, "");
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let job = killed_after_accepted(&client, node);
    eventually("the job runs, with nobody there", || running(node).filter(|id| *id == job));
    assert!(client.must(["ps", "--json"]).contains(&job));
    let waiting = client.command(["wait", &job, "-o", "clip.mp4"]).stderr(Stdio::piped()).spawn().unwrap();
    go_on(&file);
    let output = waiting.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let verified = invariants::delivered(&client.path("clip.mp4"), node);
    assert_eq!(verified.receipt.receipt().job.to_string(), job);
    assert_eq!(node.status().jobs_done, 1);
    invariants::discreet(node, PROMPT);
}

#[test]
fn a_killed_client_finds_what_was_made_while_nobody_was_there() {
    let mut sandbox = Sandbox::new();
    let file = held(&mut sandbox, "");
    let client = sandbox.client("artist");
    let job = killed_after_accepted(&client, &sandbox.nodes[0]);
    go_on(&file);
    eventually("the clip is made", || (sandbox.nodes[0].status().jobs_done == 1).then_some(()));
    // The node restarts as well: what it made is on its disk.
    let node = &mut sandbox.nodes[0];
    node.kill();
    node.start();
    node.ready();
    let verified = fetched(&client, node, &job);
    // Once it is here it is here: again, with nobody to ask.
    sandbox.nodes[0].kill();
    client.must(["wait", &job, "-o", "again.mp4"]);
    let again = kinoflock_client::provenance::check(&fs::read(client.path("again.mp4")).unwrap()).unwrap();
    assert_eq!(again.clip, verified.clip);
}

/// The files of a node's clip store.
fn stored(node: &Node) -> Vec<PathBuf> {
    let folders = fs::read_dir(node.path("state/clips")).unwrap().map(|entry| entry.unwrap().path());
    let folders = folders.filter(|path| path.is_dir() && !path.ends_with("tmp"));
    folders.flat_map(|folder| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path())).collect()
}

#[test]
fn a_clip_that_was_tampered_with_on_the_nodes_disk_is_refused_and_nothing_is_written() {
    type Tamper = fn(&mut Vec<u8>);
    let ways: [Tamper; 3] = [
        |bytes| bytes[0] ^= 1,
        |bytes| {
            let last = bytes.len() - 1;
            bytes[last] ^= 0x80;
        },
        |bytes| bytes.truncate(bytes.len() / 2),
    ];
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    for (number, tamper) in ways.into_iter().enumerate() {
        let job = client.detach(&node.ticket(), &format!("{PROMPT}, {number}"), STEPS);
        eventually("the clip is made", || (node.status().jobs_done == number as u64 + 1).then_some(()));
        let before: Vec<_> = stored(node);
        let newest =
            before.iter().max_by_key(|path| fs::metadata(path).unwrap().modified().unwrap()).unwrap();
        let whole = fs::read(newest).unwrap();
        let mut bytes = whole.clone();
        tamper(&mut bytes);
        fs::write(newest, &bytes).unwrap();
        let output = client.run(["wait", &job, "-o", "clip.mp4"]);
        assert_eq!(output.status.code(), Some(7), "{}", said(&output));
        assert!(said(&output).contains("damaged"), "{}", said(&output));
        assert!(!client.path("clip.mp4").exists());
        assert!(!client.must(["ls", "--json"]).contains("\"here\":true"), "{}", client.must(["ls"]));
        assert!(node.log().contains("was changed on disk"), "the operator is not told");
        // Nothing is lost for good: with the right bytes back, the same job gives its clip.
        fs::write(newest, &whole).unwrap();
        fetched(&client, node, &job);
        client.must(["rm", &job]);
    }
    invariants::discreet(node, PROMPT);
}

#[test]
fn a_node_that_refuses_is_named_with_its_reason_and_another_makes_the_clip() {
    let mut sandbox = Sandbox::new();
    let client = sandbox.client("artist");
    let key = client.must(["key", "show", "--json"]);
    let key: serde_json::Value = serde_json::from_str(&key).unwrap();
    let key = key["requester"].as_str().unwrap();
    sandbox.add(&Worker::test(&[]), &format!("[node]\nname = \"doorkeeper\"\n[policy]\ndeny = [{key:?}]\n"));
    sandbox.add(&Worker::test(&[]), "[node]\nname = \"small\"\n[policy]\nmax_frames = 1\n");
    let tickets: Vec<_> = sandbox.nodes.iter().map(Node::ticket).collect();
    tickets.iter().for_each(|ticket| drop(client.must(["join", ticket])));

    // Nobody takes it: every node is named with its own reason, and the exit code says that rules stand against it.
    let output = client.run(["generate", PROMPT, "-o", "clip.mp4"]);
    assert_eq!(output.status.code(), Some(6), "{}", said(&output));
    for words in ["doorkeeper", "policy.deny", "small", "at most 1 frames"] {
        assert!(said(&output).contains(words), "{words} is missing in:\n{}", said(&output));
    }
    assert!(!client.path("clip.mp4").exists());

    // A third one does, and still it is told why the first did not.
    sandbox.add(&Worker::test(&[]), "[node]\nname = \"open\"\n");
    client.must(["join", &sandbox.nodes[2].ticket()]);
    let output = client.run(["generate", PROMPT, "-o", "clip.mp4"]);
    assert!(output.status.success(), "{}", said(&output));
    for words in ["doorkeeper", "policy.deny", "node open"] {
        assert!(said(&output).contains(words), "{words} is missing in:\n{}", said(&output));
    }
    invariants::delivered(&client.path("clip.mp4"), &sandbox.nodes[2]);
    assert_eq!(sandbox.nodes.iter().map(|node| node.status().jobs_done).collect::<Vec<_>>(), [0, 0, 1]);
    sandbox.nodes.iter().for_each(|node| invariants::discreet(node, PROMPT));
}

#[test]
fn a_veto_after_the_quote_sends_the_job_elsewhere_and_is_told_in_the_operators_words() {
    let mut sandbox = Sandbox::new();
    let hook =
        "[policy]\nhook = [\"/bin/sh\", \"-c\", \"echo not on a Sunday; exit 1\"]\nhook_sees_prompt = true\n";
    sandbox.add(&Worker::test(&[]), &format!("[node]\nname = \"strict\"\n{hook}"));
    // The other is slower, so that the one with the hook is asked to do it first.
    sandbox.add(&Worker::test(&["--step-ms", "300"]), "[node]\nname = \"patient\"\n");
    let client = sandbox.client("artist");
    sandbox.nodes.iter().for_each(|node| drop(client.must(["join", &node.ticket()])));
    let output = client.run(["generate", PROMPT, "--steps", "3", "-o", "clip.mp4"]);
    assert!(output.status.success(), "{}", said(&output));
    for words in ["rules about content", "policy.hook", "not on a Sunday"] {
        assert!(said(&output).contains(words), "{words} is missing in:\n{}", said(&output));
    }
    invariants::delivered(&client.path("clip.mp4"), &sandbox.nodes[1]);
    assert_eq!(sandbox.nodes[0].status().jobs_done, 0);
    invariants::discreet(&sandbox.nodes[0], PROMPT);
}

#[test]
fn ten_client_processes_at_once_on_one_home_do_no_harm() {
    const PROCESSES: usize = 10;
    let mut sandbox = Sandbox::new();
    sandbox.add(&Worker::test(&[]), "[policy]\nqueued_jobs = 10\n");
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    client.must(["join", &node.ticket()]);
    let name = |number: usize| format!("clip-{number}.mp4");
    let children: Vec<_> = (0..PROCESSES)
        .map(|number| {
            let prompt = format!("{PROMPT}, number {number}");
            let mut command = client.command(["generate", &prompt, "--steps", "3", "-o", &name(number)]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}\n{}", output.status, said(&output));
    }
    let made: Vec<_> =
        (0..PROCESSES).map(|number| invariants::delivered(&client.path(&name(number)), node)).collect();
    let clips: BTreeSet<_> = made.iter().map(|verified| verified.clip).collect();
    assert_eq!(clips.len(), PROCESSES, "two prompts gave one clip");
    invariants::one_outcome_each(&made);
    invariants::one_chain(&made);

    // The store is whole: every job and clip once, all of them done, and nothing left over.
    let rows = |command: &[&str]| -> Vec<serde_json::Value> {
        let text = client.must(command);
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let jobs = rows(&["ps", "--all", "--json"]);
    let ids: BTreeSet<_> = jobs.iter().map(|job| job["job"].as_str().unwrap().to_owned()).collect();
    let expected: BTreeSet<_> = made.iter().map(|one| one.receipt.receipt().job.to_string()).collect();
    assert_eq!((ids, jobs.len()), (expected, PROCESSES));
    assert!(jobs.iter().all(|job| job["state"] == "done"), "{jobs:?}");
    assert!(rows(&["ps", "--json"]).is_empty());
    let listed = rows(&["ls", "--json"]);
    let found: BTreeSet<_> = listed.iter().map(|clip| clip["clip"].as_str().unwrap().to_owned()).collect();
    assert_eq!(found, clips.iter().map(ToString::to_string).collect());
    assert!(listed.iter().all(|clip| clip["here"] == true), "{listed:?}");
    for clip in &clips {
        client.must(["get", &clip.to_string(), "-o", "again.mp4"]);
        invariants::delivered(&client.path("again.mp4"), node);
    }
    invariants::discreet(node, PROMPT);
}

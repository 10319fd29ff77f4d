//! What an artist is told when something stands in the way: what, which limit, which value, and what to do; and that
//! nothing is lost by it.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Output, Stdio};

use kinoflock_net::{NetConfig, NetEvents, NetHandle};
use kinoflock_protocol::Keypair;
use kinoflock_tests::bound::by_permissions;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually, said};
use kinoflock_tests::{clock, invariants};

const PROMPT: &str = "a red circle drifts left over a blue field";

/// What a command says that must end with this exit code.
fn fails(output: &Output, code: i32) -> String {
    let text = said(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

fn generate(client: &Client, more: &[&str]) -> Output {
    client.run(["generate", PROMPT].iter().chain(more))
}

/// The node had nothing to do and the client remembers nothing.
fn nothing_happened(client: &Client, node: &Node) {
    let status = node.status();
    assert_eq!((status.jobs.len(), status.jobs_done, status.jobs_failed), (0, 0, 0));
    says(&said(&client.run(["ps", "--all"])), &["no jobs"]);
}

#[test]
fn without_a_node_the_artist_is_told_of_tickets_and_of_this_machine() {
    let sandbox = Sandbox::new();
    let client = sandbox.client("artist");
    let text = fails(&generate(&client, &[]), 4);
    says(
        &text,
        &["no node found", "paste a ticket: kinoflock join TICKET", "or use this machine: kinoflockd try"],
    );
    let text = fails(&generate(&client, &["--node", "127.0.0.1:1"]), 4);
    says(&text, &["no node found", "tried /ip4/127.0.0.1/tcp/1: Connection refused", "kinoflockd try"]);
}

#[test]
fn a_node_that_is_named_and_away_is_not_replaced_by_one_that_is_near() {
    let mut sandbox = Sandbox::new();
    sandbox.add_prepared(&Worker::test(&[]), "", |node| node.wrap(&["env", "KINOFLOCKD_NETWORK_MDNS=true"]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    client.must(["join", &node.ticket()]);
    let mut command = client.command(["generate", PROMPT, "--node", "127.0.0.1:1"]);
    fails(&command.env("KINOFLOCK_MDNS", "true").output().unwrap(), 4);
    nothing_happened(&client, node);
    // Its id alone is enough where its addresses are known.
    let id = node.local().node_id.to_string();
    client.must(["generate", PROMPT, "--node", &id, "-o", "clip.mp4"]);
    invariants::delivered(&client.path("clip.mp4"), node);
}

#[test]
fn what_no_model_can_make_is_refused_with_the_nearest_that_it_can() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    for (flag, value, parts) in [
        ("--frames", "0", ["frames: 0", "least possible, 1"]),
        ("--steps", "0", ["steps: 0", "least possible, 1"]),
        ("--size", "0x64", ["width: 0", "least possible, 1"]),
        ("--seconds", "0", ["seconds: 0", "not above 0"]),
        ("--fps", "0", ["fps: 0", "not above 0"]),
        ("--frames", "16", ["16 frames: this model makes 4k+1", "nearest it can make are 17 and 13"]),
        (
            "--size",
            "65x64",
            ["width 65 is not a multiple of 32", "nearest this model can make are 64x64 and 96x64"],
        ),
    ] {
        says(&fails(&generate(&client, &["--node", &ticket, flag, value]), 2), &parts);
    }
    nothing_happened(&client, node);
}

#[test]
fn a_prompt_that_is_too_long_is_refused_at_once_with_its_tokens_and_what_would_be_cut() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    let long = format!("{PROMPT} and {}a green square", "then ".repeat(20));
    let text = fails(&client.run(["generate", &long, "--node", &ticket]), 6);
    says(
        &text,
        &["max_prompt_tokens", "a prompt of ", "beyond the limit of 16 tokens", "this would be cut: "],
    );
    says(&text, &["a green square", "shorten the prompt", "--set truncate_prompt=true"]);
    let text = fails(&generate(&client, &["--node", &ticket, "--guidance", "3", "--negative", &long]), 6);
    says(&text, &["a negative prompt of ", "shorten the negative prompt"]);
    // A refused order holds no place: the next try need not wait for one.
    for _ in 0..3 {
        says(&fails(&client.run(["generate", &long, "--node", &ticket]), 6), &["max_prompt_tokens"]);
    }
    nothing_happened(&client, node);
    invariants::discreet(node, "a green square");
    client.must(["generate", &long, "--node", &ticket, "--set", "truncate_prompt=true", "-o", "clip.mp4"]);
    invariants::delivered(&client.path("clip.mp4"), node);
}

#[test]
fn a_clip_beyond_a_nodes_memory_is_refused_with_the_bytes_needed_and_the_bytes_there_are() {
    let mut sandbox = Sandbox::new();
    sandbox.add(&Worker::test(&[]), "[[device]]\nmemory_limit = \"1 GiB\"\n");
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    let text = fails(&generate(&client, &["--node", &ticket, "--size", "2048x2048", "--frames", "65"]), 6);
    says(&text, &["device.memory_limit", " bytes is beyond the limit of 1073741824 bytes"]);
    says(&text, &["ask another node, or for a smaller or shorter clip"]);
    nothing_happened(&client, node);
    client.must(["generate", PROMPT, "--node", &ticket, "-o", "clip.mp4"]);
    invariants::delivered(&client.path("clip.mp4"), node);
}

#[test]
fn when_nobody_takes_a_job_every_node_says_why() {
    let mut sandbox = Sandbox::new();
    sandbox.add(&Worker::test(&[]), "[node]\nname = \"resting\"\n");
    sandbox.add(&Worker::test(&[]), "[node]\nname = \"small\"\n[policy]\nmax_frames = 9\n");
    sandbox.add(&Worker::test(&[]), "[node]\nname = \"private\"\n[serve]\npublic = false\n");
    let client = sandbox.client("artist");
    for node in &sandbox.nodes {
        client.must(["join", &node.ticket()]);
    }
    assert!(sandbox.nodes[0].command().arg("pause").status().unwrap().success());
    let text = fails(&generate(&client, &[]), 6);
    says(&text, &["no node takes this job with model motif"]);
    says(&text, &["node resting (...", "is paused by its operator"]);
    says(&text, &["node small (...", "takes at most 9 frames, this job has 17"]);
    says(&text, &["node private (...", "serve.public", "ask another node"]);
    let text = fails(&generate(&client, &["--model", "mtoif"]), 4);
    says(&text, &["unknown model \"mtoif\"", "with --model: motif; did you mean \"motif\"?"]);
    for name in ["resting", "small", "private"] {
        says(&text, &[&format!("node {name} (..."), "serves motif only"]);
    }
    let text = fails(
        &generate(&client, &["--set", "foo=3", "--node", &sandbox.nodes[1].ticket(), "--frames", "9"]),
        6,
    );
    says(&text, &["does not know that operation (rule foo)", "truncate_prompt"]);
    for node in &sandbox.nodes {
        nothing_happened(&client, node);
    }
}

#[test]
fn a_key_that_is_open_closed_or_damaged_is_refused_before_anything_is_sent() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    client.must(["key", "export", "-o", "copy.key"]);
    let key = client.path("copy.key");
    let with_key = |client: &Client| generate(client, &["--node", &node.ticket(), "--key", "copy.key"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    says(&fails(&with_key(&client), 3), &["open to others", "mode 640, at most 600", "chmod 600 copy.key"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o000)).unwrap();
    let command = client.command(["generate", PROMPT, "--node", &node.ticket(), "--key", "copy.key"]);
    let output = by_permissions(&command).stdin(Stdio::null()).output().unwrap();
    says(&fails(&output, 3), &["copy.key", "Permission denied"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&key, b"too short").unwrap();
    says(&fails(&with_key(&client), 3), &["has 9 bytes, a key has 32", "kinoflock key restore"]);
    fs::remove_file(&key).unwrap();
    fs::create_dir(&key).unwrap();
    says(&fails(&with_key(&client), 3), &["copy.key is no regular file"]);
    nothing_happened(&client, node);
}

#[test]
fn a_place_where_no_file_can_be_is_said_before_a_clip_is_made() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    let text = fails(&generate(&client, &["--node", &ticket, "-o", "nowhere/clip.mp4"]), 2);
    says(&text, &["there is no folder nowhere"]);
    fs::create_dir(client.path("folder")).unwrap();
    says(&fails(&generate(&client, &["--node", &ticket, "-o", "folder"]), 2), &["folder is a folder"]);
    let text = fails(&generate(&client, &["--node", &ticket, "-o", "-", "--json"]), 2);
    says(&text, &["-o - and --json both want standard output"]);
    nothing_happened(&client, node);
}

#[test]
fn a_worker_out_of_memory_fails_its_job_with_the_cause_and_the_next_job_is_made() {
    let sandbox = Sandbox::start(1, &Worker::test(&["--oom-at", "3"]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    let text = fails(&generate(&client, &["--node", &ticket, "--steps", "4"]), 5);
    says(&text, &["failed at its node", "allocation failed", "fewer frames, a smaller size"]);
    client.must(["generate", PROMPT, "--node", &ticket, "--steps", "2", "-o", "clip.mp4"]);
    invariants::delivered(&client.path("clip.mp4"), node);
    assert_eq!((node.status().jobs_done, node.status().jobs_failed), (1, 1));
    invariants::discreet(node, PROMPT);
}

/// A node whose clock is so many seconds ahead, and a client whose clock is.
fn with_clocks(of_node: i64, of_client: i64, parts: &[&str]) {
    let mut sandbox = Sandbox::new();
    let folder = sandbox.path("");
    let shifted = clock::ahead(&folder, of_node).map(|(name, value)| format!("{name}={value}"));
    sandbox.add_prepared(&Worker::test(&[]), "", |node| node.wrap(&["env", &shifted[0], &shifted[1]]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let run = |arguments: &[&str]| {
        let output = client.command(arguments).envs(clock::ahead(&folder, of_client)).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        output
    };
    let ticket = node.ticket();
    says(&said(&run(&["generate", PROMPT, "--node", &ticket, "-o", "clip.mp4"])), parts);
    invariants::delivered(&client.path("clip.mp4"), node);
    let job = run(&["generate", PROMPT, "--node", &ticket, "--detach"]);
    let job = String::from_utf8(job.stdout).unwrap().trim().to_owned();
    run(&["status", &job]);
    run(&["wait", &job, "-o", "later.mp4"]);
    invariants::delivered(&client.path("later.mp4"), node);
}

#[test]
fn a_client_whose_clock_is_an_hour_ahead_is_told_so_and_gets_its_clip() {
    with_clocks(0, 3600, &["ahead of that of node", "limit 5 min 0 s", "set the clock"]);
}

#[test]
fn a_client_of_a_node_whose_clock_is_an_hour_ahead_is_told_so_and_gets_its_clip() {
    with_clocks(3600, 0, &["behind that of node", "limit 5 min 0 s", "set the clock"]);
}

/// Somebody who speaks the protocol's next version.
async fn of_the_future(sandbox: &Sandbox) -> (NetHandle, NetEvents) {
    let mut config = NetConfig::node(Keypair::from_seed(&[9; 32]), sandbox.network(), 0).on_loopback();
    config.version = kinoflock_protocol::limits::PROTOCOL_VERSION + 1;
    kinoflock_net::start(config).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_version_is_told_apart_by_both_versions() {
    let mut sandbox = Sandbox::new();
    let (other, mut events) = of_the_future(&sandbox).await;
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let address = other.dialable_addrs()[0].to_string();
    let client = sandbox.client("artist");
    let text = fails(&generate(&client, &["--node", &address]), 4);
    says(&text, &["speaks version [2] of the protocol, we speak 1", "the older one should update"]);

    let bootstrap = format!("KINOFLOCKD_NETWORK_BOOTSTRAP={address}");
    let node = sandbox.add_prepared(&Worker::test(&[]), "", |node| node.wrap(&["env", &bootstrap]));
    let line = eventually("the daemon says so", || {
        node.log().lines().find(|line| line.contains("speaks another version")).map(str::to_owned)
    });
    says(&line, &["speaks=[2]", "ours=1", "the older one should update"]);
    let ticket = node.ticket();
    client.must(["generate", PROMPT, "--node", &ticket, "-o", "clip.mp4"]);
}

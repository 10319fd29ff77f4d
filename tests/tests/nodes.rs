//! What can happen to a daemon: killed with jobs in its queue, two devices at once, a full store, a full disk.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kinoflock_client::provenance::Verified;
use kinoflock_protocol::order::ValidQuote;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_tests::invariants;
use kinoflock_tests::requester::Requester;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually, said};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

const PROMPT: &str = "a violet heron over the reservoir at dawn";
const STEPS: &[&str] = &["--steps", "6"];

fn go_on(file: &Path) {
    fs::write(file, b"").unwrap();
}

/// A worker whose jobs wait in step 3 until the file is there; the self-test has two steps.
fn held_by(file: &Path) -> Worker {
    Worker::test(&["--hold-at", "3", "--hold-file", file.to_str().unwrap()])
}

fn fetched(client: &Client, node: &Node, job: &str) -> Verified {
    let file = format!("{job}.mp4");
    client.must(["wait", job, "-o", &file]);
    let verified = invariants::delivered(&client.path(&file), node);
    assert_eq!(verified.receipt.receipt().job.to_string(), job);
    verified
}

fn sequence(verified: &Verified) -> u64 {
    verified.receipt.receipt().sequence
}

/// Jobs that wait, first the one that is next.
fn queue(node: &Node) -> Vec<String> {
    let mut waiting: Vec<_> = node.status().jobs.into_iter().filter(|job| job.state == "queued").collect();
    waiting.sort_by_key(|job| job.position);
    waiting.into_iter().map(|job| job.job).collect()
}

fn operator(node: &Node, arguments: &[&str]) -> String {
    let output = node.command().args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

#[test]
fn a_node_killed_while_jobs_only_wait_has_them_in_order_when_it_is_back() {
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("go on");
    sandbox.add(&held_by(&file), "");
    let client = sandbox.client("artist");
    let node = &mut sandbox.nodes[0];
    let ticket = node.ticket();
    let job = |number: usize| client.detach(&ticket, &format!("{PROMPT}, {number}"), STEPS);
    let first = job(0);
    eventually("the first job runs", || {
        node.status().jobs.iter().any(|job| job.step.is_some()).then_some(())
    });
    let waiting: Vec<_> = (1..4).map(job).collect();
    assert_eq!(queue(node), waiting);
    // Now nothing runs any more, and what waits may not begin.
    operator(node, &["pause"]);
    client.must(["cancel", &first]);
    eventually("only waiting jobs are left", || (node.status().jobs.len() == 3).then_some(()));
    assert_eq!(queue(node), waiting);
    assert!(node.status().jobs.iter().all(|job| job.state == "queued"));

    node.kill();
    node.start();
    node.ready();
    let next = eventually("the first of them runs", || {
        node.status().jobs.into_iter().find(|job| job.state == "running").map(|job| job.job)
    });
    assert_eq!((next.as_str(), queue(node)), (waiting[0].as_str(), waiting[1..].to_vec()));
    go_on(&file);
    let made: Vec<_> = waiting.iter().map(|job| fetched(&client, node, job)).collect();
    assert!(made.is_sorted_by_key(sequence), "the order of the queue was lost");
    invariants::one_outcome_each(&made);
    invariants::one_chain(&made);
    invariants::discreet(node, PROMPT);
    let output = client.run(["wait", &first, "-o", "first.mp4"]);
    assert_eq!(output.status.code(), Some(5), "the cancelled one came back: {}", said(&output));
}

/// A daemon with the devices `left`, which takes clips of 9 frames at most, and `right`; each is held by a file.
fn two_devices(sandbox: &mut Sandbox) -> [PathBuf; 2] {
    let files = ["left", "right"].map(|name| sandbox.path(&format!("{name} goes on")));
    let section = |name: &str, file: &Path, more: &str| {
        let arguments = ["--hold-at", "3", "--hold-file", file.to_str().unwrap()];
        format!("[[device]]\nname = {name:?}\nworker_args = {arguments:?}\n{more}\n")
    };
    let left = section("left", &files[0], "max_frames = 9");
    sandbox.add(&Worker::test(&[]), &format!("{left}{}", section("right", &files[1], "")));
    files
}

/// The job that each device runs, by the status.
fn on(node: &Node, device: &str) -> Option<String> {
    node.status().jobs.into_iter().find(|job| job.device.as_deref() == Some(device)).map(|job| job.job)
}

#[test]
fn two_devices_of_one_daemon_run_jobs_at_once_each_within_its_limits() {
    let mut sandbox = Sandbox::new();
    let [left, right] = two_devices(&mut sandbox);
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    eventually("both devices are ready", || {
        node.status().devices.iter().all(|device| device.state == "idle").then_some(())
    });
    let ticket = node.ticket();
    let job = |frames: &str| client.detach(&ticket, PROMPT, &["--steps", "6", "--frames", frames]);
    let long = job("17");
    eventually("the long clip is on the only device that makes it", || {
        on(node, "right").filter(|id| *id == long)
    });
    let second_long = job("17");
    let short = job("9");
    eventually("the short one passes the long one that cannot run yet", || {
        on(node, "left").filter(|id| *id == short)
    });
    assert_eq!(queue(node), std::slice::from_ref(&second_long));
    let metrics = eventually("the metrics say so too", || {
        let metrics = node.metrics();
        let both =
            ["left", "right"].iter().all(|device| metrics.contains(&format!("{{device=\"{device}\"}} 1")));
        both.then_some(metrics)
    });
    assert!(metrics.contains("kinoflock_jobs_in_progress{device=\"left\"} 1"), "{metrics}");
    assert!(node.status().devices.iter().all(|device| device.state == "running"));

    go_on(&left);
    let first = fetched(&client, node, &short);
    assert_eq!((on(node, "left"), on(node, "right")), (None, Some(long.clone())));
    go_on(&right);
    let made: Vec<_> =
        [first].into_iter().chain([&long, &second_long].map(|job| fetched(&client, node, job))).collect();
    let metrics = node.metrics();
    for device in ["left", "right"] {
        assert!(
            metrics.contains(&format!("kinoflock_denoise_step_seconds_count{{device={device:?}}}")),
            "{metrics}"
        );
    }
    invariants::one_outcome_each(&made);
    invariants::one_chain(&made);
    invariants::discreet(node, PROMPT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quote_is_for_the_device_that_would_run_the_job() {
    let mut sandbox = Sandbox::new();
    let [left, right] = two_devices(&mut sandbox);
    let node = &sandbox.nodes[0];
    eventually("both devices are ready", || {
        node.status().devices.iter().all(|device| device.state == "idle").then_some(())
    });
    let artist = Requester::new(&sandbox).await;
    for _ in 0..2 {
        let mut spec = artist.spec(node, PROMPT, 6);
        spec.frames = 17;
        let ordered = artist.order(node.local().node_id, &spec, artist.lease(node, &spec).await);
        let response = artist.submit(node, &ordered).await;
        assert!(matches!(response, Response::Accepted { .. }), "{response:?}");
    }
    eventually("one runs, one waits", || {
        (on(node, "right").is_some() && queue(node).len() == 1).then_some(())
    });
    let mut etas = Vec::new();
    for frames in [9, 17] {
        let mut spec = artist.spec(node, PROMPT, 6);
        spec.frames = frames;
        let question = artist.question(node, &spec).await;
        let Response::Quote(quote) = artist.ask(node, Request::Quote(question.clone())).await else {
            panic!("no quote")
        };
        let id = node.local().node_id;
        let quote = ValidQuote::parse(&quote, &sandbox.network(), &id, &question).unwrap();
        etas.push(quote.quote().eta);
    }
    // The small clip finds a free device; the large one waits for the held job, and for the one behind that.
    assert!(etas[0] < etas[1], "{etas:?}");

    operator(node, &["pause", "--device", "left"]);
    assert_eq!(
        node.status().devices.iter().map(|d| d.state.as_str()).collect::<Vec<_>>(),
        ["paused", "running"]
    );
    go_on(&left);
    go_on(&right);
    eventually("both are done", || (node.status().jobs_done == 2).then_some(()));
    invariants::discreet(node, PROMPT);
}

#[test]
fn a_full_clip_store_refuses_admission_until_its_clips_are_fetched() {
    let mut sandbox = Sandbox::new();
    // The public's three quarters of it hold what one clip of 64x64 and 9 frames may need, and no finished one beside it.
    sandbox.add(&Worker::test(&[]), "[storage]\nclips_limit = \"112500 B\"\n");
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    let small = ["--steps", "3", "--frames", "9", "--size", "64x64"];
    let job = client.detach(&ticket, PROMPT, &small);
    eventually("its clip is stored", || (node.status().jobs_done == 1).then_some(()));
    let again = |file: &str| {
        let arguments = ["generate", PROMPT, "--node", &ticket, "-o", file];
        client.run(arguments.iter().chain(&small))
    };
    let refused = again("refused.mp4");
    assert_eq!(refused.status.code(), Some(6), "{}", said(&refused));
    assert!(said(&refused).contains("storage.clips_limit"), "{}", said(&refused));
    assert!(!client.path("refused.mp4").exists());
    let first = fetched(&client, node, &job);
    eventually("what was fetched makes room", || again("clip.mp4").status.success().then_some(()));
    let second = invariants::delivered(&client.path("clip.mp4"), node);
    invariants::one_chain(&[first, second]);
    invariants::discreet(node, PROMPT);
}

/// The largest file that a daemon may write.
fn limit_files(node: &Node, bytes: Option<u64>) {
    let pid = Pid::from_raw(node.pid());
    prlimit(pid, Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
}

/// Hands over a job whose clip cannot be kept; what the artist hears.
fn told(client: &Client, node: &Node) -> String {
    let output = client.run(["generate", PROMPT, "--node", &node.ticket(), "-o", "lost.mp4", "--steps", "3"]);
    assert!(!output.status.success(), "{}", said(&output));
    assert!(!client.path("lost.mp4").exists());
    said(&output)
}

#[test]
fn a_disk_that_takes_no_more_is_an_error_to_the_job_and_the_next_one_is_served() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let pid = node.pid();
    // Nothing more can be written, not even that a job was admitted.
    limit_files(node, Some(0));
    let said = told(&client, node);
    assert!(said.contains("no space is left"), "{said}");
    assert!(client.must(["ps"]).is_empty(), "a job that was never admitted is in the list");
    assert!(node.runs() && node.status().jobs.is_empty());
    limit_files(node, None);
    client.must(["generate", PROMPT, "--node", &node.ticket(), "-o", "clip.mp4", "--steps", "3"]);
    let made = invariants::delivered(&client.path("clip.mp4"), node);
    assert_eq!((node.pid(), made.receipt.receipt().sequence), (pid, 0), "not the same daemon, or a gap");
    invariants::discreet(node, PROMPT);
}

/// A daemon whose state lies on a disk of so many MiB that only it sees; `None` where the system lets nobody mount one.
fn on_a_small_disk<'a>(sandbox: &'a mut Sandbox, worker: &Worker, mib: u32) -> Option<&'a mut Node> {
    let mut attempt = Command::new("unshare");
    attempt.args(["--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]);
    if !attempt.output().is_ok_and(|output| output.status.success()) {
        return None;
    }
    Some(sandbox.add_prepared(worker, "", |node| {
        let state = node.path("state");
        fs::create_dir_all(&state).unwrap();
        let script = format!("mount -t tmpfs -o size={mib}m tmpfs \"$0\" && exec \"$@\"");
        let state = state.to_str().unwrap();
        node.wrap(&["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", &script, state]);
    }))
}

#[test]
fn a_disk_that_is_full_when_a_clip_is_made_fails_that_job_and_not_the_daemon() {
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("go on");
    let has_disk = on_a_small_disk(&mut sandbox, &held_by(&file), 16).is_some();
    if !has_disk {
        sandbox.add(&held_by(&file), "");
    }
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let pid = node.pid();
    let disk = PathBuf::from(format!("/proc/{pid}/root")).join(node.path("state").strip_prefix("/").unwrap());
    let ballast = disk.join("ballast");
    let job = client.detach(&node.ticket(), PROMPT, STEPS);
    eventually("the job runs", || node.status().jobs.iter().any(|job| job.step.is_some()).then_some(()));
    if has_disk {
        // Until not a byte more can be written.
        let mut full = fs::File::create(&ballast).unwrap();
        let error = std::io::copy(&mut std::io::repeat(1), &mut full).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    } else {
        limit_files(node, Some(0));
    }
    go_on(&file);
    eventually("the job has failed", || (node.status().jobs_failed == 1).then_some(()));
    if !has_disk {
        limit_files(node, None);
    }
    let output = client.run(["wait", &job, "-o", "lost.mp4"]);
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(said(&output).to_lowercase().contains("space"), "{}", said(&output));
    assert!(!client.path("lost.mp4").exists());
    assert_eq!((node.status().jobs_failed, node.status().jobs.len()), (1, 0));

    if has_disk {
        fs::remove_file(&ballast).unwrap();
    }
    client.must(["generate", PROMPT, "--node", &node.ticket(), "-o", "clip.mp4", "--steps", "6"]);
    let made = invariants::delivered(&client.path("clip.mp4"), node);
    invariants::one_chain(&[made]);
    assert_eq!(node.pid(), pid);
    // Nothing of the failed job takes room.
    let left = fs::read_dir(disk.join("work")).map_or(0, Iterator::count);
    assert_eq!(left, 0);
    invariants::discreet(node, PROMPT);
}

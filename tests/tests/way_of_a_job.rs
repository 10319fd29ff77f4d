//! The way of a job, with the bundled model: from words to a verified clip, and what can happen in between.
#![allow(clippy::unwrap_used)]

use std::fs;

use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Sandbox, Worker, eventually, said, send};
use rustix::process::Signal;

const PROMPT: &str = "a red circle drifts left over a blue field";
/// Steps of a job that runs for a while.
const LONG: &str = "4000";

fn over(transport: &str) {
    let sandbox = Sandbox::start(1, &Worker::Real);
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let address = node.address(transport);
    client.must(["generate", PROMPT, "--seed", "7", "--node", &address, "-o", "clip.mp4"]);
    let verified = invariants::delivered(&client.path("clip.mp4"), node);
    assert_eq!((verified.info.frames, verified.info.width, verified.info.height), (17, 64, 64));
    assert!(verified.job.is_none(), "the prompt is in the file although nobody asked for that");
    invariants::discreet(node, PROMPT);
    assert!(!node.metrics().contains("circle"));
    assert!(node.metrics().contains("kinoflock_jobs_total{outcome=\"done\",model=\"motif\"} 1"));

    // The same seed draws the same clip, byte for byte; it is the artist's, offline too.
    client.must(["generate", PROMPT, "--seed", "7", "--node", &address, "-o", "again.mp4", "--bare"]);
    client.must(["generate", PROMPT, "--seed", "7", "--node", &address, "-o", "bare.mp4", "--bare"]);
    assert_eq!(fs::read(client.path("again.mp4")).unwrap(), fs::read(client.path("bare.mp4")).unwrap());
    assert!(client.must(["ls"]).contains(&verified.clip.short()), "{}", client.must(["ls"]));
}

#[test]
fn a_prompt_becomes_a_verified_clip_over_tcp() {
    over("tcp");
}

#[test]
fn a_prompt_becomes_a_verified_clip_over_quic() {
    over("udp");
}

/// A picture of one colour.
fn picture(client: &kinoflock_tests::sandbox::Client, name: &str, colour: [u8; 3]) {
    const SIDE: usize = 96;
    let rgb: Vec<u8> = std::iter::repeat_n(colour, SIDE * SIDE).flatten().collect();
    fs::write(client.path(name), kinoflock_node::engine::frames::png(&rgb, SIDE, SIDE).unwrap()).unwrap();
}

/// The mean of a frame's red, green and blue.
fn colour(file: &std::path::Path, frame: usize) -> [f64; 3] {
    let clip = kinoflock_node::engine::mp4::decode_mp4(file).unwrap();
    let pixels = clip.frame(frame).unwrap();
    let sum = |channel: usize| pixels.iter().skip(channel).step_by(3).map(|&v| f64::from(v)).sum::<f64>();
    std::array::from_fn(|channel| sum(channel) / (pixels.len() / 3) as f64)
}

#[test]
fn pictures_and_a_clip_reach_the_model_over_the_network() {
    let sandbox = Sandbox::start(1, &Worker::Real);
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    picture(&client, "red.png", [200, 30, 30]);
    picture(&client, "blue.png", [30, 30, 200]);
    let make = |flags: &[&str], file: &str| {
        let fixed = ["generate", PROMPT, "--seed", "7", "--steps", "2", "--node", &ticket, "-o", file];
        client.must(fixed.iter().chain(flags).copied());
        invariants::delivered(&client.path(file), node).clip
    };
    let begun = make(&["--image", "red.png"], "begun.mp4");
    let [red, _, blue] = colour(&client.path("begun.mp4"), 0);
    assert!(red > 120.0 && blue < 90.0, "a clip that begins with a red picture begins with {red}, {blue}");
    let flags = ["--image", "red.png", "--keyframe", "8=blue.png", "--end-image", "blue.png"];
    assert!(make(&flags, "between.mp4") != begun, "a keyframe and an end change nothing");
    make(&["--extend", &begun.to_string(), "--set", "extend_frames=1"], "on.mp4");
    let (last, first) = (colour(&client.path("begun.mp4"), 16), colour(&client.path("on.mp4"), 0));
    let apart = last.iter().zip(first).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart < 25.0, "the clip went on from {last:?} with {first:?}");
    let output = client.run(["generate", PROMPT, "--node", &ticket, "--keyframe", "17=red.png"]);
    assert!(said(&output).contains("keyframe 17 lies beyond the last frame, 16"), "{}", said(&output));
}

#[test]
fn a_changed_byte_is_named_and_the_exit_code_is_7() {
    let sandbox = Sandbox::start(1, &Worker::Real);
    let client = sandbox.client("artist");
    client.must(["join", &sandbox.nodes[0].ticket()]);
    client.must(["generate", PROMPT, "-o", "clip.mp4"]);
    client.must(["verify", "clip.mp4"]);
    let mut bytes = fs::read(client.path("clip.mp4")).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 1;
    fs::write(client.path("clip.mp4"), bytes).unwrap();
    let output = client.run(["verify", "clip.mp4"]);
    assert_eq!(output.status.code(), Some(7), "{}", said(&output));
}

#[test]
fn a_cancel_stops_a_running_job_and_frees_the_device() {
    let sandbox = Sandbox::start(1, &Worker::Real);
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let job = client.detach(&node.ticket(), PROMPT, &["--steps", LONG]);
    eventually("the job runs", || {
        node.status().jobs.iter().any(|job| job.step.is_some_and(|s| s.0 > 0)).then_some(())
    });
    client.must(["cancel", &job]);
    eventually("the job is gone", || node.status().jobs.is_empty().then_some(()));
    assert_eq!(node.status().jobs_cancelled, 1);
    client.must(["generate", PROMPT, "--node", &node.ticket(), "-o", "clip.mp4"]);
    invariants::delivered(&client.path("clip.mp4"), node);
}

#[test]
fn after_a_power_cut_the_queue_is_there_in_order_and_the_running_job_starts_again() {
    let mut sandbox = Sandbox::start(1, &Worker::Real);
    let client = sandbox.client("artist");
    let ticket = sandbox.nodes[0].ticket();
    let jobs: Vec<_> =
        [LONG, "3", "2"].iter().map(|s| client.detach(&ticket, PROMPT, &["--steps", s])).collect();
    let node = &mut sandbox.nodes[0];
    eventually("the first job runs", || {
        node.status().jobs.iter().any(|j| j.step.is_some_and(|s| s.0 > 0)).then_some(())
    });
    let before: Vec<_> = node.status().jobs.iter().map(|job| job.job.clone()).collect();
    node.kill();
    node.start();
    let after = eventually("the jobs are back", || {
        let jobs = kinoflock_node::admin::call::status(&node.socket()).ok()?.jobs;
        (jobs.len() == 3).then(|| jobs.iter().map(|job| job.job.clone()).collect::<Vec<_>>())
    });
    node.ready();
    let sorted = |mut jobs: Vec<String>| {
        jobs.sort();
        jobs
    };
    assert_eq!(sorted(before), sorted(after));
    client.must(["cancel", &jobs[0]]);
    let mut made = Vec::new();
    for (number, job) in jobs.iter().enumerate().skip(1) {
        let file = format!("{number}.mp4");
        client.must(["wait", job, "-o", &file]);
        made.push(invariants::delivered(&client.path(&file), node));
    }
    invariants::one_chain(&made);
    let sequence = |number: usize| made[number].receipt.receipt().sequence;
    assert!(sequence(0) < sequence(1), "the order of the queue was lost");
}

#[test]
fn a_job_outlives_its_worker() {
    let sandbox = Sandbox::start(1, &Worker::Real);
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let job = client.detach(&node.ticket(), PROMPT, &["--steps", "600"]);
    eventually("the job runs", || {
        node.status().jobs.iter().any(|job| job.step.is_some_and(|s| s.0 > 0)).then_some(())
    });
    send(node.worker_pid(), Signal::KILL);
    client.must(["wait", &job, "-o", "clip.mp4"]);
    invariants::delivered(&client.path("clip.mp4"), node);
}

#[test]
fn a_worker_that_does_nothing_is_killed_and_the_job_done_by_another() {
    let mut sandbox = Sandbox::new();
    sandbox.add(&Worker::Real, "[engine]\nphase_deadline = \"2 s\"\nphase_factor = 1\n");
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let job = client.detach(&node.ticket(), PROMPT, &["--steps", "600"]);
    eventually("the job runs", || {
        node.status().jobs.iter().any(|job| job.step.is_some_and(|s| s.0 > 0)).then_some(())
    });
    send(node.worker_pid(), Signal::STOP);
    client.must(["wait", &job, "-o", "clip.mp4"]);
    invariants::delivered(&client.path("clip.mp4"), node);
}

#[test]
fn sigterm_puts_a_long_job_back_and_a_second_one_ends_at_once() {
    let mut sandbox = Sandbox::start(1, &Worker::Real);
    let client = sandbox.client("artist");
    client.detach(&sandbox.nodes[0].ticket(), PROMPT, &["--steps", "100000"]);
    let node = &mut sandbox.nodes[0];
    eventually("the job runs", || {
        node.status().jobs.iter().any(|job| job.step.is_some_and(|s| s.0 > 0)).then_some(())
    });
    node.signal(Signal::TERM);
    eventually("it takes no more jobs", || node.status().accepting.is_err().then_some(()));
    let refused = client.run(["generate", PROMPT, "--node", &node.ticket(), "-o", "late.mp4"]);
    assert!(!refused.status.success());
    assert!(said(&refused).contains("stop"), "{}", said(&refused));
    node.signal(Signal::TERM);
    assert!(node.wait().success());
    node.start();
    eventually("the job is back", || {
        kinoflock_node::admin::call::status(&node.socket()).ok().filter(|report| report.jobs.len() == 1)
    });
}

#[test]
fn a_second_daemon_on_one_store_is_refused_in_one_clear_line() {
    let sandbox = Sandbox::start(1, &Worker::Real);
    let output = sandbox.nodes[0].command().arg("run").output().unwrap();
    assert!(!output.status.success());
    assert!(said(&output).contains("in use by another kinoflockd"), "{}", said(&output));
}

#[test]
fn try_makes_a_clip_from_nothing_and_leaves_nothing_behind() {
    let sandbox = Sandbox::new();
    let (clip, frames) = (sandbox.path("clip.mp4"), sandbox.path("frames"));
    let scratch = sandbox.path("scratch");
    fs::create_dir(&scratch).unwrap();
    let mut command = std::process::Command::new(kinoflock_tests::sandbox::programs().join("kinoflockd"));
    command.args(["try", PROMPT, "--seed", "3", "-o"]).arg(&clip).arg("--frames-png").arg(&frames);
    let output = command.env("TMPDIR", &scratch).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(fs::read_dir(&frames).unwrap().count(), 17);
    assert!(frames.join("frame-0000.png").is_file());
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0, "something was left behind");
    let verified = kinoflock_client::provenance::check(&fs::read(&clip).unwrap()).unwrap();
    assert_eq!(verified.receipt.receipt().seed, 3);
}

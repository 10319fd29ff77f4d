//! One daemon serves every family of models: its tiny folder goes in by `kinoflockd model import`, a signed job over the
//! network, and a verified clip comes back.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::job::Returns;
use kinoflock_protocol::order::Resume;
use kinoflock_protocol::{JobSpec, Micro};
use kinoflock_tests::invariants;
use kinoflock_tests::requester::{Requester, refused};
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually, programs, said};

#[path = "../../node/inference/tests/support/torch.rs"]
mod torch;

const PROMPT: &str = "a red dog";

/// A family with its tiny model and a small clip that this can make.
struct Family {
    name: &'static str,
    architecture: &'static str,
    folder: &'static str,
    size: (u32, u32),
    frames: u32,
    /// A number of frames that it cannot make, and what it says of the nearest.
    wrong: (&'static str, &'static str),
}

const fn family(
    name: &'static str,
    architecture: &'static str,
    folder: &'static str,
    (width, height, frames): (u32, u32, u32),
    wrong: (&'static str, &'static str),
) -> Family {
    Family { name, architecture, folder, size: (width, height), frames, wrong }
}

const FAMILIES: [Family; 11] = [
    family("ltx", "ltx-video", "ltx-video-0.9.0", (64, 64, 9), ("10", "are 9 and 17")),
    family("ltx-095", "ltx-video", "ltx-video-0.9.5", (64, 32, 9), ("10", "are 9 and 17")),
    family("cogvideox", "cogvideox", "cogvideox-2b", (64, 48, 9), ("12", "are 9 and 17")),
    family("cogvideox-5b", "cogvideox", "cogvideox-5b", (48, 32, 9), ("12", "are 9 and 17")),
    family("cogvideox-1.5", "cogvideox", "cogvideox-1.5", (32, 32, 9), ("5", "are 1 and 9")),
    family("mochi", "mochi", "mochi-1", (32, 48, 7), ("8", "are 7 and 13")),
    family("pyramid", "pyramid-flow", "pyramid-flow-miniflux", (64, 64, 9), ("10", "are 9 and 17")),
    family("pyramid-sd3", "pyramid-flow", "pyramid-flow-sd3", (64, 64, 9), ("10", "are 9 and 17")),
    family("wan", "wan", "wan2.1", (48, 32, 5), ("6", "are 5 and 9")),
    family("wan-a14b", "wan", "wan2.2-a14b", (32, 32, 5), ("6", "are 5 and 9")),
    family("wan-5b", "wan", "wan2.2-ti2v-5b", (64, 32, 5), ("6", "are 5 and 9")),
];

fn folder(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    root.join("node/inference/tests/goldens").join(name).join("pipeline")
}

/// A copy in which Pyramid Flow is as it is published: with its VAE in PyTorch's own form.
fn published(family: &Family, sandbox: &Path) -> PathBuf {
    let tiny = folder(family.folder);
    if family.architecture != "pyramid-flow" {
        return tiny;
    }
    let copied = sandbox.join(family.name);
    for part in fs::read_dir(&tiny).unwrap().map(|part| part.unwrap().path()) {
        let target = copied.join(part.file_name().unwrap());
        fs::create_dir_all(&target).unwrap();
        for file in fs::read_dir(part).unwrap().map(|file| file.unwrap().path()) {
            fs::copy(&file, target.join(file.file_name().unwrap())).unwrap();
        }
    }
    torch::turn(&copied.join("causal_video_vae"), "diffusion_pytorch_model");
    copied
}

/// Takes a model in before the daemon runs, and gives its id.
fn import(node: &Node, name: &str, folder: &Path) -> String {
    let mut command = Command::new(programs().join("kinoflockd"));
    command.arg("--models").arg(node.models()).args(["model", "import", "--name", name]).arg(folder);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{name}: {}", said(&output));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn generate(client: &Client, family: &Family, frames: &str, more: &[&str]) -> std::process::Output {
    let size = format!("{}x{}", family.size.0, family.size.1);
    let plain = ["generate", PROMPT, "--model", family.name, "--size", &size, "--frames", frames];
    let numbers = ["--fps", "8", "--steps", "2", "--guidance", "3"];
    let mut command = client.command(plain.iter().chain(&numbers).chain(more));
    // As artists have it: a job that could be audited commits to its steps.
    command.env("KINOFLOCK_AUDIT_SHARE", "5").output().unwrap()
}

#[test]
fn every_family_of_models_goes_from_its_folder_to_a_verified_clip() {
    let mut sandbox = Sandbox::new();
    let (mut ids, copies) = (Vec::new(), sandbox.path("copies"));
    sandbox.add_prepared(&Worker::Real, "", |node| {
        ids = FAMILIES.iter().map(|one| import(node, one.name, &published(one, &copies))).collect();
    });
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    client.must(["join", &node.ticket()]);
    let listed = client.must(["models"]);
    let told = node.status().devices.remove(0).models;
    for (family, id) in FAMILIES.iter().zip(&ids) {
        let name = family.name;
        let offered = told.iter().find(|model| model.name == name).unwrap();
        assert_eq!((&offered.id, offered.self_test.as_str()), (id, "unreferenced"), "{name}");
        let line = listed.lines().find(|line| line.split_whitespace().next() == Some(name));
        assert!(line.is_some_and(|line| line.contains(family.architecture)), "{name}: {listed}");

        let file = format!("{name}.mp4");
        let output = generate(&client, family, &family.frames.to_string(), &["-o", &file]);
        assert!(output.status.success(), "{name}: {}", said(&output));
        let made = invariants::delivered(&client.path(&file), node);
        let receipt = made.receipt.receipt();
        assert_eq!((receipt.model.to_string(), receipt.steps), (id.clone(), 2), "{name}");
        let info = made.info;
        assert_eq!(
            (info.width, info.height, info.frames),
            (family.size.0, family.size.1, family.frames),
            "{name}"
        );
        let fps = info.fps.unwrap_or_default();
        assert!(fps.0.abs_diff(Micro(8_000_000).0) < 80_000, "{name}: {fps}");

        let (frames, nearest) = family.wrong;
        let refused = generate(&client, family, frames, &["--dry-run"]);
        assert!(!refused.status.success() && said(&refused).contains(nearest), "{name}: {}", said(&refused));
    }
    invariants::discreet(node, PROMPT);
    let verified = node.command().args(["model", "verify"]).output().unwrap();
    assert!(verified.status.success(), "{}", said(&verified));
    // The fixed job of a model that works in stages is told in a job's steps, not in those of its stages.
    let print = node.command().args(["model", "fingerprint", "pyramid"]).output().unwrap();
    assert!(print.status.success(), "{}", said(&print));
    let print: serde_json::Value = serde_json::from_slice(&print.stdout).unwrap();
    assert_eq!((&print["steps"], &print["frames"]), (&2.into(), &9.into()));
}

/// Models that make nothing without a picture.
const FROM_PICTURES: [Family; 3] = [
    family("wan-ends", "wan", "wan2.1-flf2v", (64, 48, 5), ("6", "are 5 and 9")),
    family("cogvideox-i2v", "cogvideox", "cogvideox-1.5-i2v", (48, 32, 9), ("12", "are 9 and 17")),
    // It knows one size alone, so its self-test is of that size.
    family("cogvideox-5b-i2v", "cogvideox", "cogvideox-5b-i2v", (48, 32, 9), ("12", "are 9 and 17")),
];

#[test]
fn models_that_need_pictures_pass_their_self_test_and_make_clips_from_them() {
    const SIDE: usize = 16;
    let mut sandbox = Sandbox::new();
    sandbox.add_prepared(&Worker::Real, "", |node| {
        for one in &FROM_PICTURES {
            import(node, one.name, &folder(one.folder));
        }
    });
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    client.must(["join", &node.ticket()]);
    let red: Vec<u8> = [200, 30, 30].repeat(SIDE * SIDE);
    let red = kinoflock_node::engine::frames::png(&red, SIDE, SIDE).unwrap();
    fs::write(client.path("red.png"), red).unwrap();
    for (family, flags, said_without) in [
        (&FROM_PICTURES[0], &["--image", "red.png", "--end-image", "red.png"][..], "one to end with"),
        (&FROM_PICTURES[1], &["--image", "red.png"], "needs a picture to begin with"),
        (&FROM_PICTURES[2], &["--image", "red.png"], "needs a picture to begin with"),
    ] {
        let (name, frames) = (family.name, family.frames.to_string());
        let file = format!("{name}.mp4");
        let output = generate(&client, family, &frames, &[flags, &["-o", &file]].concat());
        assert!(output.status.success(), "{name}: {}", said(&output));
        let receipt = invariants::delivered(&client.path(&file), node).receipt;
        assert!(
            receipt.receipt().step_root.is_none(),
            "{name}: steps that pictures reach into are committed to"
        );
        let refused = generate(&client, family, &frames, &[]);
        assert!(!refused.status.success() && said(&refused).contains(said_without), "{}", said(&refused));
    }
}

/// How often weights were read.
fn loads(node: &Node) -> u64 {
    let metrics = node.metrics();
    let counter = "kinoflock_job_duration_seconds_count{phase=\"load\"} ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(counter));
    line.unwrap().parse().unwrap()
}

#[test]
fn jobs_that_wait_together_are_done_model_by_model_as_far_as_nobody_waits_for_more_than_two() {
    let mut sandbox = Sandbox::new();
    sandbox.add_prepared(&Worker::Real, "[policy]\nqueued_jobs = 8\n", |node| {
        for one in [&FAMILIES[0], &FAMILIES[7]] {
            import(node, one.name, &folder(one.folder));
        }
    });
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let ticket = node.ticket();
    let job = |family: &Family, steps: &str| {
        let (size, frames) = (format!("{}x{}", family.size.0, family.size.1), family.frames.to_string());
        let more = ["--model", family.name, "--size", &size, "--frames", &frames, "--steps", steps];
        client.detach(&ticket, PROMPT, &more)
    };
    // The first one has the device until the others wait.
    let first = job(&FAMILIES[0], "4000");
    eventually("it runs", || node.status().jobs.iter().any(|job| job.step.is_some()).then_some(()));
    let before = loads(node);
    let others: Vec<_> = [7, 0, 7, 0, 7, 0].iter().map(|family| job(&FAMILIES[*family], "1")).collect();
    client.must(["cancel", &first]);
    for other in &others {
        client.must(["wait", other, "-o", &format!("{other}.mp4")]);
    }
    // In the order in which they came it would be six.
    assert_eq!(loads(node) - before, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_takes_its_steps_for_states_is_refused_where_a_model_works_in_stages() {
    let (mut sandbox, mut id) = (Sandbox::new(), String::new());
    sandbox.add_prepared(&Worker::Real, "", |node| {
        id = import(node, FAMILIES[6].name, &folder(FAMILIES[6].folder))
    });
    let (node, requester) = (&sandbox.nodes[0], Requester::new(&sandbox).await);
    let spec = JobSpec { model: id.parse().unwrap(), ..requester.spec(node, PROMPT, 2) };
    let committed = JobSpec { returns: Returns { step_root: true, ..spec.returns }, ..spec.clone() };
    let lease = requester.lease(node, &committed).await;
    let ordered = requester.order(node.local().node_id, &committed, lease);
    let answer = requester.submit(node, &ordered).await;
    assert_eq!(refused(&answer), ("unknown_operation", "step_root".to_owned()));

    let lease = requester.lease(node, &spec).await;
    let ordered = requester.order(node.local().node_id, &spec, lease);
    let blob = BlobRef::of(b"a checkpoint");
    let resume = Resume { step: 1, checkpoint: blob };
    let resumed = requester.order_to_resume(node.local().node_id, &ordered.job, lease, resume);
    let answer = requester.submit(node, &resumed).await;
    assert_eq!(refused(&answer), ("unknown_operation", "resume".to_owned()));
}

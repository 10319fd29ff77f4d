//! Latent space, open, by the artist's command over real daemons with the bundled model: what a job gives back is
//! mixed, walked through, gone on from and decoded; what has no meaning is refused with its limit.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use kinoflock_client::latents::{Latents, Way, mix};
use kinoflock_protocol::ClipId;
use kinoflock_protocol::ops::OPS;
use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, said};

const PROMPT: &str = "a red circle drifts left over a blue field";
const OTHER: &str = "a green square grows over a black field";
/// Steps of the test's clips.
const STEPS: usize = 4;

struct Place {
    sandbox: Sandbox,
    client: Client,
}

impl Place {
    fn new() -> Self {
        let sandbox = Sandbox::start(1, &Worker::Real);
        let client = sandbox.client("artist");
        client.must(["join", &sandbox.nodes[0].ticket()]);
        Self { sandbox, client }
    }

    fn node(&self) -> &Node {
        &self.sandbox.nodes[0]
    }

    /// A small clip with this seed and these flags.
    fn make(&self, file: &str, seed: &str, more: &[&str]) -> ClipId {
        let plain = ["generate", PROMPT, "--steps", "4", "--frames", "9", "--seed", seed, "-o", file];
        let output = self.client.run(plain.iter().chain(more));
        assert!(output.status.success(), "{file} {more:?}: {}", said(&output));
        self.clip(file)
    }

    /// A clip that came, by its id: equal frames of one encoder are equal bytes.
    fn clip(&self, file: &str) -> ClipId {
        invariants::delivered(&self.client.path(file), self.node()).clip
    }

    fn latents(&self, file: &str) -> Latents {
        Latents::read(&self.client.path(file)).unwrap()
    }

    /// What is said to a job that is refused.
    fn refused(&self, more: &[&str]) -> String {
        let plain = ["generate", PROMPT, "--steps", "4", "--frames", "9", "--seed", "1", "-o", "none.mp4"];
        let output = self.client.run(plain.iter().chain(more));
        assert!(!output.status.success(), "{more:?} is made: {}", said(&output));
        said(&output)
    }
}

#[test]
fn what_a_job_gives_back_can_be_given_back_and_decoded() {
    let place = Place::new();
    let plain = place.make("plain.mp4", "7", &[]);
    let whole = place.make("whole.mp4", "7", &["--return-noise", "--return-steps", "1,3"]);
    assert_eq!(whole, plain, "to give latents back changes the clip");
    let file = "whole.latents.safetensors";
    let names: Vec<String> = place.latents(file).0.into_keys().collect();
    assert_eq!(names, ["final", "noise", "step_1", "step_3"]);
    let shown = place.client.must(["latents", "show", file]);
    assert!(shown.contains("step_3") && shown.contains("1x64x3x2x2"), "{shown}");

    assert_eq!(place.make("noise.mp4", "99", &["--init-latents", file]), plain, "from its noise");
    let from_3 = ["--init-latents", file, "--start-step", "3"];
    assert_eq!(place.make("from-3.mp4", "99", &from_3), plain, "from step 3");
    let decoded = |more: &[&str], file: &str| {
        let plain = ["latents", "decode", "--fps", "8", "-o", file];
        place.client.must(plain.iter().chain(more));
        place.clip(file)
    };
    assert_eq!(
        decoded(&[file, "--seed", "7"], "decoded.mp4"),
        plain,
        "its final latents through the VAE alone"
    );
    // A clip in the store stands for its latents.
    let of_clip = whole.to_string();
    assert_eq!(decoded(&[&of_clip, "--seed", "7"], "of-clip.mp4"), plain);
    assert_ne!(decoded(&[file, "--set", "channels.scale=-1"], "negative.mp4"), plain);

    let half = place.make("half.mp4", "8", &["--init-latents", file, "--strength", "0.5"]);
    assert_ne!(half, plain);
    let half = invariants::delivered(&place.client.path("half.mp4"), place.node()).receipt;
    assert_eq!((half.receipt().steps, half.receipt().step_root), (STEPS as u32, None));
    let constant = place.make("constant.mp4", "7", &["--guidance-curve", "2"]);
    assert_eq!(constant, plain, "a curve that stays where guidance is anyway");
    assert_ne!(place.make("curve.mp4", "7", &["--guidance-curve", "6,2,-1"]), plain);
    assert_ne!(place.make("skip.mp4", "7", &["--skip-layers", "2"]), plain);
    assert_ne!(place.make("again.mp4", "7", &["--repeat-layers", "1,1"]), plain);
    assert_ne!(place.make("shift.mp4", "7", &["--shift-channels=0.5", "--channels-after", "2"]), plain);
    invariants::discreet(place.node(), PROMPT);
}

#[test]
fn ways_between_two_ends_begin_and_end_there() {
    let place = Place::new();
    let first = place.make("1.mp4", "1", &["--return-noise"]);
    let second = place.make("2.mp4", "2", &["--return-noise"]);
    let ends = ["1.latents.safetensors", "2.latents.safetensors"];
    place.client.must([
        "latents",
        "interpolate",
        ends[0],
        ends[1],
        "--steps",
        "3",
        "--spherical",
        "-o",
        "between",
    ]);
    let at = |index: usize| place.latents(&format!("between/latents-{index}.safetensors"));
    let [from, to] = ends.map(|end| place.latents(end));
    assert_eq!((at(0), at(2)), (from.clone(), to.clone()));
    let middle = mix(&from.0["noise"].values, &to.0["noise"].values, 0.5, Way::Arc);
    assert_eq!(at(1).0["noise"].values, middle);

    let walk = |folder: &str, more: &[&str]| {
        let plain = [
            "latents", "walk", PROMPT, "--steps", "4", "--frames", "9", "--seed", "1", "--clips", "3", "-o",
            folder,
        ];
        let output = place.client.run(plain.iter().chain(more));
        assert!(output.status.success(), "{more:?}: {}", said(&output));
        let listed = fs::read_to_string(place.client.path(folder).join("walk.txt")).unwrap();
        assert_eq!(listed, "file 'walk-0.mp4'\nfile 'walk-1.mp4'\nfile 'walk-2.mp4'\n");
        [0, 1, 2].map(|index| place.clip(&format!("{folder}/walk-{index}.mp4")))
    };
    let seeds = walk("seeds", &["--to-seed", "2"]);
    assert_eq!((&seeds[0], &seeds[2]), (&first, &second));
    assert!(seeds[1] != first && seeds[1] != second);
    let files = walk("files", &["--init-latents", ends[0], "--to-latents", ends[1]]);
    assert_eq!((&files[0], &files[2]), (&first, &second));
    assert_eq!(files[1], seeds[1], "the same noise, mixed here or there");
    let prompts = walk("prompts", &["--to-prompt", OTHER]);
    assert_eq!(prompts[0], first);
    assert!(prompts[1] != prompts[0] && prompts[1] != prompts[2]);
    let output = place.client.run([
        "generate",
        OTHER,
        "--steps",
        "4",
        "--frames",
        "9",
        "--seed",
        "1",
        "-o",
        "other.mp4",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(prompts[2], place.clip("other.mp4"));
    for prompt in [PROMPT, OTHER] {
        invariants::discreet(place.node(), prompt);
    }
}

#[test]
fn what_cannot_be_is_refused_when_the_order_comes_with_limit_and_value() {
    let place = Place::new();
    place.make("1.mp4", "1", &["--return-noise"]);
    let file = "1.latents.safetensors";
    let cases: [(&[&str], &str); 15] = [
        (&["--set", "latents.eat=1"], "latents.eat"),
        (&["--set", "layers.skip=0.5"], "it takes whole numbers"),
        (&["--set", "decode_only=yes"], "it takes true or false"),
        (&["--skip-layers", "4"], "4 is beyond the limit of 3"),
        (&["--repeat-layers", "0,0,0,0,0"], "5 is beyond the limit of 4"),
        (&["--permute-channels", "1,0"], "2 is beyond the limit of 64"),
        (&["--permute-channels", "64"], "64 is beyond the limit of 63"),
        (&["--scale-channels", "1,2,3"], "3 is beyond the limit of 64"),
        (&["--channels-after", "4", "--scale-channels", "2"], "4 is beyond the limit of 3"),
        (&["--return-steps", "5"], "5 is beyond the limit of 4"),
        (&["--init-latents", file, "--start-step", "4"], "4 is beyond the limit of 3"),
        (&["--set", "latents.start_step=1"], "give latents to begin from"),
        (&["--init-latents", file, "--strength", "0.5", "--set", "decode_only=true"], "choose one"),
        (&["--set", "noise.weight=0.5"], "it needs noise.mix"),
        (&["--guidance", "1", "--guidance-curve", "3,1"], "another than 1"),
    ];
    for (flags, wanted) in cases {
        let text = place.refused(flags);
        assert!(text.contains(wanted), "{flags:?}: {text:?} does not say {wanted:?}");
    }
    // What only the worker can tell, it tells with the job.
    let text = place.refused(&["--init-latents", file, "--start-step", "2"]);
    assert!(text.contains("no tensor \"step_2\" or \"latents\""), "{text}");
    let text = place.refused(&["--init-latents", file, "--size", "128x64"]);
    assert!(text.contains("initial_latents has shape"), "{text}");
    let node = place.node().status();
    assert_eq!((node.jobs_done, node.jobs_failed), (1, 2), "what is refused costs no device's time");
}

#[test]
fn every_operation_is_told_by_the_command_and_in_the_document() {
    let sandbox = Sandbox::new();
    let listed = sandbox.client("artist").must(["ops"]);
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    for op in OPS {
        assert!(listed.lines().any(|line| line.split_whitespace().next() == Some(op.name)), "{}", op.name);
        let row = format!("| `{}` | {} | {} |", op.name, op.kind.name(), op.help);
        assert!(document.lines().any(|line| line == row), "README.md lacks the line\n{row}");
    }
    let rows =
        document.lines().filter(|line| OPS.iter().any(|op| line.starts_with(&format!("| `{}` |", op.name))));
    assert_eq!(rows.count(), OPS.len());
}

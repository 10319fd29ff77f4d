//! Adapters from the artist's file to the receipt: a job with two LoRAs, what its clip says of them, who refuses them, and
//! what becomes of files that are none.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kinoflock_client::provenance::Verified;
use kinoflock_protocol::BlobId;
use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually, programs, said, send};
use rustix::process::Signal;
use safetensors::tensor::{Dtype, TensorView};

const PROMPT: &str = "a red dog";
const FOG: [&str; 2] = ["--lora", "fog@0.8"];
const BOTH: [&str; 4] = ["--lora", "fog@0.8", "--lora", "rain.safetensors@-0.6"];

fn inference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("node/inference/tests")
}

fn import(node: &Node, name: &str, folder: &str) {
    let mut command = Command::new(programs().join("kinoflockd"));
    command.arg("--models").arg(node.models()).args(["model", "import", "--name", name]);
    let output = command.arg(inference().join("goldens").join(folder).join("pipeline")).output().unwrap();
    assert!(output.status.success(), "{name}: {}", said(&output));
}

/// A daemon with the tiny Wan, and one of another architecture.
fn add(sandbox: &mut Sandbox, config: &str) {
    sandbox.add_prepared(&Worker::Real, config, |node| {
        import(node, "wan", "wan2.1");
        import(node, "ltx", "ltx-video-0.9.0");
    });
}

/// An artist with the two adapters of the tiny Wan, the first with a card, the second a file.
fn artist(sandbox: &Sandbox, name: &str) -> Client {
    let client = sandbox.client(name);
    for node in &sandbox.nodes {
        client.must(["join", &node.ticket()]);
    }
    for (from, to) in [("a", "fog"), ("b", "rain")] {
        let file = inference().join(format!("fixtures/lora/wan2.1/{from}.safetensors"));
        fs::copy(file, client.path(&format!("{to}.safetensors"))).unwrap();
    }
    client.must([
        "adapter",
        "add",
        "fog.safetensors",
        "--author",
        "Ada",
        "--author",
        "Ben",
        "--licence",
        "CC-BY-4.0",
        "--trained-on",
        "600 photographs of fog, all my own",
        "--consent",
        "own-work",
        "--credit",
        "Ada=62.5",
        "--credit",
        "Ben=37.5",
    ]);
    client
}

fn generate(client: &Client, model: &str, more: &[&str]) -> Command {
    let fixed = ["generate", PROMPT, "--model", model, "--size", "64x32", "--frames", "9", "--steps", "3"];
    client.command(fixed.iter().chain(&["--seed", "7", "--fps", "8"]).chain(more))
}

fn make(client: &Client, node: &Node, file: &str, more: &[&str]) -> Verified {
    let output = generate(client, "wan", &[more, &["-o", file]].concat()).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    invariants::delivered(&client.path(file), node)
}

#[test]
fn a_job_with_two_adapters_becomes_a_clip_whose_receipt_names_both_and_whose_file_names_their_authors() {
    let mut sandbox = Sandbox::new();
    add(&mut sandbox, "");
    let client = artist(&sandbox, "artist");
    let node = &sandbox.nodes[0];
    let plain = make(&client, node, "plain.mp4", &[]);
    let with = make(&client, node, "with.mp4", &BOTH);
    let used = |made: &Verified| -> Vec<(BlobId, String)> {
        let used = made.receipt.receipt().adapters.iter();
        used.map(|used| (used.weights, used.scale.to_string())).collect()
    };
    let ids = ["fog", "rain"]
        .map(|name| BlobId::of(&fs::read(client.path(&format!("{name}.safetensors"))).unwrap()));
    assert_eq!(used(&with), [(ids[0], "0.8".to_owned()), (ids[1], "-0.6".to_owned())]);
    assert!(used(&plain).is_empty());
    assert!(plain.clip != with.clip, "two adapters change nothing");
    assert!(make(&client, node, "fog.mp4", &FOG).clip != with.clip, "the second adapter changes nothing");
    assert!(make(&client, node, "again.mp4", &BOTH).clip == with.clip, "the same again is another clip");
    assert!(make(&client, node, "after.mp4", &[]).clip == plain.clip, "a job's adapters outlive it");

    // The card is one of the receipt's, and stands in the file: who has that alone sees whose work went in.
    let [card] = &with.cards[..] else { panic!("one card: {:?}", with.cards) };
    assert!(with.receipt.receipt().cards.contains(&card.id));
    let stranger = sandbox.client("stranger");
    fs::copy(client.path("with.mp4"), stranger.path("with.mp4")).unwrap();
    for (whose, arguments) in
        [(&stranger, ["verify", "with.mp4"]), (&client, ["show", &with.clip.to_string()])]
    {
        let words = whose.must(arguments);
        for part in
            ["at 0.8", "at -0.6", "Ada, Ben", "Ada 62.5 %, Ben 37.5 %", "CC-BY-4.0", "photographs of fog"]
        {
            assert!(words.contains(part), "no {part:?} in {words}");
        }
        assert!(words.contains("no card: nobody says who made it"), "{words}");
    }
    let facts: serde_json::Value =
        serde_json::from_str(&stranger.must(["verify", "with.mp4", "--json"])).unwrap();
    assert_eq!(facts["adapters"][0]["credit"][1], serde_json::json!({ "name": "Ben", "percent": "37.5" }));
    assert_eq!(facts["adapters"][0]["card"], card.id.to_string());
    assert_eq!(facts["adapters"][1]["scale"], "-0.6");

    // In a batch too.
    let lines = "{\"prompt\": \"a red dog\", \"model\": \"wan\", \"size\": \"64x32\", \"frames\": 9, \"steps\": 3, \
                 \"seed\": 7, \"fps\": 8, \"lora\": [\"fog@0.8\", \"rain.safetensors@-0.6\"], \"output\": \"batch.mp4\"}";
    fs::write(client.path("jobs.jsonl"), lines).unwrap();
    client.must(["generate", "--batch", "jobs.jsonl"]);
    assert!(invariants::delivered(&client.path("batch.mp4"), node).clip == with.clip);
    invariants::discreet(node, PROMPT);
}

#[test]
fn a_device_that_adds_adapters_to_the_weights_leaves_none_of_them_to_the_next_job() {
    let mut sandbox = Sandbox::new();
    add(&mut sandbox, "[[device]]\nmerge_adapters = true\n");
    let client = artist(&sandbox, "artist");
    let node = &sandbox.nodes[0];
    let clips: Vec<_> = [&[][..], &BOTH, &FOG, &BOTH, &[]]
        .iter()
        .enumerate()
        .map(|(number, flags)| make(&client, node, &format!("{number}.mp4"), flags).clip)
        .collect();
    assert!(clips[0] != clips[1] && clips[1] != clips[2] && clips[0] != clips[2]);
    assert!(clips[3] == clips[1] && clips[4] == clips[0], "adapters stay in the weights");
}

#[test]
fn adapters_that_do_not_fit_or_are_none_fail_their_job_alone_and_say_why() {
    let mut sandbox = Sandbox::new();
    add(&mut sandbox, "");
    let client = artist(&sandbox, "artist");
    let node = &sandbox.nodes[0];
    let failed = |model: &str, lora: &str| -> Output {
        let output = generate(&client, model, &["--lora", lora, "-o", "no.mp4"]).output().unwrap();
        assert!(!output.status.success(), "{lora}: {}", said(&output));
        output
    };
    let other = failed("ltx", "fog");
    assert_eq!(other.status.code(), Some(5), "{}", said(&other));
    assert!(
        said(&other).contains("fits no layer of this model: it was trained on another one"),
        "{}",
        said(&other)
    );
    assert!(said(&other).contains("blocks.0.attn1"), "{}", said(&other));

    let whole = fs::read(client.path("fog.safetensors")).unwrap();
    fs::write(client.path("cut.safetensors"), &whole[..whole.len() - 4]).unwrap();
    assert!(said(&failed("wan", "cut.safetensors")).contains("no safetensors file"));
    let mut infinite = whole.clone();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    fs::write(client.path("infinite.safetensors"), infinite).unwrap();
    assert!(said(&failed("wan", "infinite.safetensors")).contains("not finite"));
    // What is clearly none does not leave the artist's machine.
    for (bytes, why) in [(&b"GIF89a"[..], "too short"), (&[255; 64], "its header would have")] {
        fs::write(client.path("none.safetensors"), bytes).unwrap();
        let none = failed("wan", "none.safetensors");
        assert_eq!(none.status.code(), Some(2));
        assert!(said(&none).contains(why), "{}", said(&none));
    }
    assert!(said(&failed("wan", "nobody@1")).contains("adapter list"));
    make(&client, node, "after.mp4", &FOG);
}

/// How often the node had to fetch an adapter, and had one.
fn adapters_of(node: &Node) -> [u64; 2] {
    let metrics = node.metrics();
    ["fetched", "kept"].map(|result| {
        let counter = format!("kinoflock_adapters_total{{result=\"{result}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&counter)).map_or(0, |count| count.parse().unwrap())
    })
}

#[test]
fn variations_with_one_adapter_fetch_it_once_until_their_artist_has_the_node_forget() {
    let mut sandbox = Sandbox::new();
    add(&mut sandbox, "[policy]\nqueued_jobs = 16\n");
    let client = artist(&sandbox, "artist");
    let node = &sandbox.nodes[0];
    let line = |seed: usize| {
        format!(
            "{{\"prompt\": \"a red dog\", \"model\": \"wan\", \"size\": \"64x32\", \"frames\": 9, \"steps\": 2, \
             \"seed\": {seed}, \"fps\": 8, \"lora\": [\"fog@0.8\"], \"output\": \"{seed}.mp4\"}}\n"
        )
    };
    fs::write(client.path("jobs.jsonl"), (0..10).map(line).collect::<String>()).unwrap();
    client.must(["generate", "--batch", "jobs.jsonl"]);
    assert_eq!(adapters_of(node), [1, 9]);

    // Another artist's is another's, though the bytes are the same.
    let other = artist(&sandbox, "other");
    make(&other, node, "other.mp4", &FOG);
    assert_eq!(adapters_of(node), [2, 9]);
    let kept = || fs::read_dir(node.path("state/adapters")).unwrap().count();
    assert_eq!(kept(), 2);
    client.must(["forget", &invariants::delivered(&client.path("3.mp4"), node).clip.to_string()]);
    assert_eq!(kept(), 1);
    make(&client, node, "again.mp4", &FOG);
    assert_eq!(adapters_of(node), [3, 9]);
}

#[test]
fn an_operator_says_how_much_of_adapters_is_taken_and_who_brings_more_hears_the_limit() {
    let mut sandbox = Sandbox::new();
    add(&mut sandbox, "[policy]\nadapter_bytes = \"4 KiB\"\n");
    add(&mut sandbox, "[policy]\nadapter_bytes = \"0 B\"\n");
    let client = artist(&sandbox, "artist");
    for (node, limit) in sandbox.nodes.iter().zip(["4 KiB", "no adapters"]) {
        let at = ["--node", &node.ticket()];
        let refused =
            generate(&client, "wan", &[&FOG[..], &at, &["-o", "no.mp4"]].concat()).output().unwrap();
        assert_eq!(refused.status.code(), Some(6), "{}", said(&refused));
        assert!(said(&refused).contains(limit), "{}", said(&refused));
        let output = generate(&client, "wan", &[&at[..], &["-o", "plain.mp4"]].concat()).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
}

#[test]
fn a_job_with_adapters_goes_on_after_its_worker_died_and_another_node_can_audit_it() {
    let mut sandbox = Sandbox::new();
    add(&mut sandbox, "");
    add(&mut sandbox, "");
    let client = artist(&sandbox, "artist");
    let node = &sandbox.nodes[0];
    // The tiny LTX-Video's steps can be computed anew; its adapters are those of its own fixtures.
    for name in ["a", "b"] {
        let file = inference().join(format!("fixtures/lora/ltx-video-0.9.0/{name}.safetensors"));
        fs::copy(file, client.path(&format!("{name}.safetensors"))).unwrap();
    }
    let flags = ["--lora", "a.safetensors@1.5", "--lora", "b.safetensors@-0.7"];
    let fixed = ["generate", PROMPT, "--model", "ltx", "--size", "64x32", "--frames", "9", "--seed", "7"];
    let long = ["--steps", "800", "--node", &node.ticket()];
    let command = |file: &'static str| {
        let mut command = client.command(fixed.iter().chain(&flags).chain(&long).chain(&["-o", file]));
        command.stderr(std::process::Stdio::null()).spawn().unwrap()
    };
    assert!(command("whole.mp4").wait().unwrap().success());
    let mut broken = command("broken.mp4");
    eventually("a checkpoint is there", || {
        node.status().jobs.iter().any(|job| job.step.is_some_and(|step| step.0 > 250)).then_some(())
    });
    send(node.worker_pid(), Signal::KILL);
    assert!(broken.wait().unwrap().success());
    let clip = |file: &str| invariants::delivered(&client.path(file), node).clip;
    assert!(clip("whole.mp4") == clip("broken.mp4"), "what went on from a checkpoint is another clip");

    // What the encoder loses of a picture is little where it is one: the bundled model draws some.
    fs::write(client.path("motif.safetensors"), lora_of_motif()).unwrap();
    let mut audited =
        client.command(["generate", "a red circle drifts left over a blue field", "--seed", "7"]);
    audited.args(["--model", "motif", "--steps", "6", "--custodians", "0", "-o", "audited.mp4"]);
    audited.args(["--lora", "motif.safetensors@-0.5"]).env("KINOFLOCK_AUDIT_SHARE", "100");
    let output = audited.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains(" computed what it signed"), "{}", said(&output));
}

/// A LoRA of the bundled model: small numbers for the first projection of each block.
fn lora_of_motif() -> Vec<u8> {
    const WIDTH: usize = 192;
    const RANK: usize = 4;
    let mut state = 7u32;
    let mut values = |count: usize| -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.2
        };
        (0..count).flat_map(|_| next().to_le_bytes()).collect()
    };
    let mut tensors = Vec::new();
    for block in 0..4 {
        for (part, shape) in [("lora_A", vec![RANK, WIDTH]), ("lora_B", vec![WIDTH, RANK])] {
            let name = format!("transformer.transformer_blocks.{block}.attn1.to_q.{part}.weight");
            tensors.push((name, shape, values(WIDTH * RANK)));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

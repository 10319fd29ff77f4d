//! Models from a hub: redirects, ranges, broken connections, wrong bytes, tokens, limits; and the command itself.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use kinoflock_node::models::hub::{Hub, HubError};
use kinoflock_node::models::pull::{self, Event, Plan, PullError};
use kinoflock_node::models::{Model, ModelStore, ModelsError, known};

use self::server::{COMMIT, Server};

#[path = "pull/server.rs"]
mod server;

const NAME: &str = "ltx-2b-0.9.5";
const WEIGHTS: &str = "transformer/diffusion_pytorch_model.safetensors";
const AT_ONCE: &[Duration] = &[Duration::ZERO; 3];

fn pipeline() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("inference/tests/goldens/ltx-video-0.9.0/pipeline")
}

struct World {
    server: Server,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { server: Server::of(&pipeline()), folder: tempfile::tempdir().unwrap() }
    }

    fn store(&self, limit: Option<u64>) -> ModelStore {
        ModelStore::open(&self.folder.path().join("models"), limit).unwrap()
    }

    fn hub(&self, token: Option<&str>) -> Hub {
        Hub::new(&self.server.address, token.map(str::to_owned)).unwrap()
    }

    fn pull(&self, pauses: &[Duration]) -> Result<Model, PullError> {
        self.pull_telling(pauses, &mut |_| {})
    }

    fn pull_telling(&self, pauses: &[Duration], tell: &mut dyn FnMut(Event<'_>)) -> Result<Model, PullError> {
        let (hub, store) = (self.hub(None), self.store(None));
        let plan = Plan::new(&hub, known::find(NAME).unwrap(), None)?;
        pull::pull(&hub, &store, &plan, pauses, tell)
    }

    /// The model as it is imported from the folder itself.
    fn wanted(&self) -> Model {
        let store = ModelStore::open(&self.folder.path().join("other"), None).unwrap();
        store.import(&pipeline(), "tiny").unwrap()
    }

    /// What of a file came to where large files lie.
    fn ranges(&self, file: &str) -> Vec<Option<u64>> {
        let asked = self.server.asked();
        asked
            .into_iter()
            .filter(|asked| asked.far && asked.path.ends_with(file))
            .map(|asked| asked.range)
            .collect()
    }

    fn left(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join("models")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[test]
fn a_pulled_model_is_the_imported_one_with_its_card_and_origin() {
    let world = World::new();
    for (path, bytes) in [
        ("README.md", &b"# LTX"[..]),
        ("ltx-video-2b-v0.9.5.safetensors", b"the same weights in one file"),
        ("transformer/diffusion_pytorch_model.fp16.safetensors", b"a variant"),
        ("transformer/../../escape.json", b"{}"),
        ("media/trailer.json", b"{}"),
    ] {
        world.server.put(path, bytes);
    }
    let mut came = 0;
    let model = world
        .pull_telling(AT_ONCE, &mut |event| {
            if let Event::Bytes(more) = event {
                came += more;
            }
        })
        .unwrap();
    assert_eq!(model.id, world.wanted().id);
    assert_eq!(came.unsigned_abs(), model.manifest.total_len());
    assert!(world.store(None).verify(&model).unwrap().is_empty());
    let card = model.card.as_ref().unwrap();
    assert_eq!(card.licence.name.as_str(), "LTXV Open Weights License");
    assert_eq!((card.training_data.disclosed, card.training_data.statement.as_str()), (false, "undisclosed"));
    let origin = pull::origin(&model).unwrap();
    assert_eq!((origin.repository.as_str(), origin.commit.as_str()), ("Lightricks/LTX-Video-0.9.5", COMMIT));
    assert_eq!(world.left(), [model.id.to_string()], "nothing of the pull is left");
    let asked = world.server.asked();
    let unneeded = ["README", "ltx-video-2b", "fp16", "escape", "media"];
    assert!(!asked.iter().any(|asked| unneeded.iter().any(|part| asked.path.contains(part))), "{asked:?}");
}

#[test]
fn a_broken_connection_is_taken_up_at_the_byte_where_it_broke() {
    let world = World::new();
    world.server.faults(|faults| faults.cuts = vec![(WEIGHTS.into(), 70_000), (WEIGHTS.into(), 50_000)]);
    let mut again = Vec::new();
    let model = world.pull_telling(AT_ONCE, &mut |event| {
        if let Event::Again { error, .. } = event {
            again.push(error.to_string());
        }
    });
    assert_eq!(model.unwrap().id, world.wanted().id);
    assert_eq!(world.ranges(WEIGHTS), [None, Some(70_000), Some(120_000)]);
    assert!(again.len() == 2 && again[0].contains("broke off after 70000 of"), "{again:?}");
}

#[test]
fn an_interrupted_pull_goes_on_in_the_next_one() {
    let world = World::new();
    world.server.faults(|faults| faults.cuts = vec![(WEIGHTS.into(), 70_000)]);
    let error = world.pull(&[]).unwrap_err();
    assert!(matches!(&error, PullError::Cut { path, given: 70_000, .. } if path == WEIGHTS), "{error}");
    let unfinished = pull::unfinished(&world.store(None)).unwrap();
    assert!(unfinished.len() == 1 && unfinished[0].0 == NAME && unfinished[0].1 > 70_000, "{unfinished:?}");
    assert!(world.store(None).list().unwrap().is_empty(), "half a model is none");
    world.server.asked();
    let plan = Plan::new(&world.hub(None), known::find(NAME).unwrap(), None).unwrap();
    assert!(plan.had(&world.store(None)) > 70_000);
    assert_eq!(world.pull(&[]).unwrap().id, world.wanted().id);
    let asked = world.server.asked();
    let of = |part: &str| asked.iter().filter(|asked| asked.path.contains(part)).collect::<Vec<_>>();
    assert!(of("text_encoder").is_empty() && of("config").is_empty(), "fetched twice: {asked:?}");
    assert_eq!(of("/blobs/transformer")[0].range, Some(70_000));
}

#[test]
fn a_damaged_beginning_is_dropped_and_fetched_again() {
    let world = World::new();
    world.server.faults(|faults| faults.cuts = vec![(WEIGHTS.into(), 70_000)]);
    world.pull(&[]).unwrap_err();
    let folder = world.folder.path().join(format!("models/.pull-{NAME}/files/transformer"));
    let part = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let part = part.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "part")).unwrap();
    let mut bytes = std::fs::read(&part).unwrap();
    assert_eq!(bytes.len(), 70_000);
    bytes[9] ^= 1;
    std::fs::write(&part, bytes).unwrap();
    world.server.asked();
    assert_eq!(world.pull(&[]).unwrap().id, world.wanted().id);
    assert_eq!(world.ranges(WEIGHTS), [Some(70_000), None]);
}

#[test]
fn a_hub_without_ranges_begins_anew() {
    let world = World::new();
    world.server.faults(|faults| {
        faults.cuts = vec![(WEIGHTS.into(), 70_000)];
        faults.no_ranges = true;
    });
    let mut came = 0;
    let model = world.pull_telling(AT_ONCE, &mut |event| {
        if let Event::Bytes(more) = event {
            came += more;
        }
    });
    let model = model.unwrap();
    assert_eq!(model.id, world.wanted().id);
    assert_eq!(came.unsigned_abs(), model.manifest.total_len(), "what was dropped counts no more");
}

#[test]
fn wrong_bytes_are_named_and_not_kept() {
    for file in [WEIGHTS, "vae/config.json"] {
        let world = World::new();
        world.server.faults(|faults| faults.wrong.push(file.into()));
        let error = world.pull(AT_ONCE).unwrap_err();
        assert!(matches!(&error, PullError::Wrong { path, .. } if path == file), "{error}");
        assert!(error.to_string().contains("nothing of it is kept"), "{error}");
        let path = world.folder.path().join(format!("models/.pull-{NAME}/files/{file}"));
        let beside = std::fs::read_dir(path.parent().unwrap()).unwrap();
        let kept: Vec<_> = beside.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(!kept.iter().any(|kept| kept.starts_with(name)), "{kept:?}");
        world.server.faults(|faults| faults.wrong.clear());
        assert_eq!(world.pull(AT_ONCE).unwrap().id, world.wanted().id);
    }
}

#[test]
fn more_bytes_than_told_are_refused() {
    let world = World::new();
    world.server.faults(|faults| faults.longer.push(WEIGHTS.into()));
    let error = world.pull(AT_ONCE).unwrap_err();
    assert!(matches!(&error, PullError::TooLong { path, .. } if path == WEIGHTS), "{error}");
}

#[test]
fn a_hub_that_contradicts_its_listing_or_the_known_hash_is_not_believed() {
    let world = World::new();
    world.server.faults(|faults| faults.other_tag.push(WEIGHTS.into()));
    let error = world.pull(AT_ONCE).unwrap_err();
    assert!(matches!(&error, PullError::OtherFile { path, .. } if path == WEIGHTS), "{error}");
    assert!(world.ranges(WEIGHTS).len() <= 1, "it was tried again");

    world.server.faults(|faults| {
        faults.other_tag.clear();
        faults.other_commit = Some("f".repeat(40));
    });
    let error = world.pull(AT_ONCE).unwrap_err();
    assert!(matches!(&error, PullError::Hub(HubError::Answer { .. })), "{error}");

    // Of this one the list knows the shards' hashes.
    let shard = "transformer/diffusion_pytorch_model-00002-of-00006.safetensors";
    let known = known::find("ltx-13b-0.9.7-dev").unwrap();
    assert!(known.sha256.contains_key(shard));
    let other = Server::of_repository(&pipeline(), &known.repository);
    other.put(shard, b"weights of somebody else");
    let hub = Hub::new(&other.address, None).unwrap();
    let error = Plan::new(&hub, known, None).unwrap_err();
    assert!(matches!(&error, PullError::OtherFile { path, .. } if path == shard), "{error}");
    assert!(error.to_string().contains("list of known models"), "{error}");
    Plan::new(&hub, known, Some("main")).unwrap();
}

#[test]
fn a_token_opens_a_gated_model_and_is_shown_to_the_hub_alone() {
    let world = World::new();
    world.server.faults(|faults| faults.token = Some("hf_secret".into()));
    let known = known::find(NAME).unwrap();
    let error = Plan::new(&world.hub(None), known, None).unwrap_err();
    assert!(matches!(error, PullError::Hub(HubError::Denied { status: 401, token: false, .. })), "{error}");
    assert!(error.to_string().contains("set HF_TOKEN"), "{error}");
    let error = Plan::new(&world.hub(Some("wrong")), known, None).unwrap_err();
    assert!(error.to_string().contains("the token does not open it"), "{error}");
    world.server.asked();
    let (hub, store) = (world.hub(Some(" hf_secret\n")), world.store(None));
    let plan = Plan::new(&hub, known, None).unwrap();
    assert!(plan.gated);
    pull::pull(&hub, &store, &plan, AT_ONCE, &mut |_| {}).unwrap();
    for asked in world.server.asked() {
        let shown = asked.token.as_deref() == Some("hf_secret");
        assert_eq!(shown, !asked.far, "{asked:?}");
    }
}

#[test]
fn the_stores_limit_and_the_disk_are_checked_before_anything_comes() {
    let world = World::new();
    let (hub, known) = (world.hub(None), known::find(NAME).unwrap());
    let plan = Plan::new(&hub, known, None).unwrap();
    world.server.asked();
    let error = pull::pull(&hub, &world.store(Some(1000)), &plan, AT_ONCE, &mut |_| {}).unwrap_err();
    assert!(matches!(error, PullError::Models(ModelsError::StoreFull { limit: 1000, .. })), "{error}");
    world.server.faults(|faults| faults.told_len.extend([(WEIGHTS.to_owned(), 1 << 60)]));
    let plan = Plan::new(&hub, known, None).unwrap();
    let error = pull::pull(&hub, &world.store(None), &plan, AT_ONCE, &mut |_| {}).unwrap_err();
    assert!(matches!(error, PullError::Space { needed, .. } if needed > 1 << 60), "{error}");
    let asked = world.server.asked();
    assert!(asked.iter().all(|asked| asked.path.starts_with("/api/models/")), "{asked:?}");
}

#[test]
fn a_model_that_nobody_here_can_run_is_refused_before_its_weights() {
    let world = World::new();
    world.server.put("model_index.json", br#"{"_class_name": "SomethingElsePipeline"}"#);
    let error = world.pull(AT_ONCE).unwrap_err();
    assert!(matches!(error, PullError::Hindered { .. }), "{error}");
    assert!(error.to_string().contains("SomethingElsePipeline"), "{error}");
    let asked = world.server.asked();
    assert!(!asked.iter().any(|asked| asked.path.ends_with(".safetensors")), "{asked:?}");
    let single = known::find("ltx-13b-0.9.8-dev").unwrap();
    let error = Plan::new(&world.hub(None), single, None).unwrap_err();
    assert!(matches!(error, PullError::Hindered { .. }), "{error}");
    assert_eq!(known::find("pyramid-flow-sd3").unwrap().hindrance(), None);
}

#[test]
fn a_hub_that_is_ill_for_a_moment_is_asked_again_and_a_circle_is_not_walked_for_ever() {
    let world = World::new();
    let (hub, store) = (world.hub(None), world.store(None));
    let plan = Plan::new(&hub, known::find(NAME).unwrap(), None).unwrap();
    world.server.faults(|faults| faults.unavailable = 2);
    let model = pull::pull(&hub, &store, &plan, AT_ONCE, &mut |_| {}).unwrap();
    assert_eq!(model.id, world.wanted().id);
    world.server.faults(|faults| faults.circle = true);
    let error = Plan::new(&hub, known::find(NAME).unwrap(), None).unwrap_err();
    assert!(error.to_string().contains("redirects more than"), "{error}");
    let gone = Hub::new("http://127.0.0.1:1", None).unwrap();
    let error = Plan::new(&gone, known::find(NAME).unwrap(), None).unwrap_err();
    assert!(matches!(error, PullError::Hub(HubError::Unreachable { .. })), "{error}");
    for given in ["ftp://example.org", "no address", "file:///etc"] {
        assert!(matches!(Hub::new(given, None), Err(HubError::Endpoint { .. })), "{given}");
    }
}

/// Runs the command in a folder of its own; standard output, and standard error.
fn kinoflockd(world: &World, arguments: &[&str]) -> (Output, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kinoflockd"));
    command.arg("--models").arg(world.folder.path().join("models"));
    command.arg("--state").arg(world.folder.path().join("state")).args(arguments);
    command.env("HF_ENDPOINT", &world.server.address).env("HOME", world.folder.path());
    command.env_remove("HF_TOKEN").env_remove("HF_HOME").stdin(std::process::Stdio::null());
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.clone(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_command_asks_for_the_licence_pulls_shows_and_removes() {
    let world = World::new();
    let (output, _, said) = kinoflockd(&world, &["model", "pull", NAME]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("LTXV Open Weights License") && said.contains("--accept-licence"), "{said}");
    assert!(world.server.asked().is_empty(), "the hub was asked before the licence was accepted");

    world.server.faults(|faults| faults.wrong.push(WEIGHTS.into()));
    let pull = ["model", "pull", NAME, "--accept-licence"];
    let (output, _, said) = kinoflockd(&world, &pull);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("wrong bytes") && said.contains("goes on from there"), "{said}");
    let (_, _, said) = kinoflockd(&world, &["model", "list"]);
    assert!(said.contains("is not here as a whole"), "{said}");

    world.server.faults(|faults| faults.wrong.clear());
    let (output, id, said) = kinoflockd(&world, &pull);
    assert!(output.status.success(), "{said}");
    assert_eq!(id.trim(), world.wanted().id.to_string());
    assert!(said.contains("training data  undisclosed") && said.contains("are here, from"), "{said}");
    let (_, _, said) = kinoflockd(&world, &pull);
    assert!(said.contains("is here already"), "{said}");
    let (_, listed, said) = kinoflockd(&world, &["model", "list"]);
    assert!(listed.contains("licence LTXV Open Weights License") && said.is_empty(), "{listed}{said}");
    let (_, shown, _) = kinoflockd(&world, &["model", "show", NAME]);
    for part in ["pulled from    Lightricks/LTX-Video-0.9.5 at", "blake3 ", WEIGHTS, "k+1 frames"] {
        assert!(shown.contains(part), "{part:?} is missing in {shown}");
    }
    let (_, shown, _) = kinoflockd(&world, &["model", "show", NAME, "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["card"]["training_data"]["disclosed"], false);
    assert_eq!(shown["origin"]["commit"], COMMIT);

    let (output, _, said) = kinoflockd(&world, &["model", "remove", NAME]);
    assert!(output.status.success() && said.contains("is gone"), "{said}");
    let (_, listed, _) = kinoflockd(&world, &["model", "list"]);
    assert!(!listed.contains(NAME), "{listed}");
    let (output, _, said) = kinoflockd(&world, &["model", "remove", "motif"]);
    assert!(!output.status.success() && said.contains("is in this program"), "{said}");
}

#[test]
fn the_list_of_known_models_shows_five_families_with_their_terms() {
    let world = World::new();
    let (_, listed, _) = kinoflockd(&world, &["model", "list", "--known"]);
    for part in [
        "CogVideoX, by",
        "Mochi 1, by",
        "Pyramid Flow, by",
        "Wan, by",
        "LTX-Video, by",
        "undisclosed",
        "wan2.1-t2v-1.3b",
        "CogVideoX License*",
        "Apache-2.0",
    ] {
        assert!(listed.contains(part), "{part:?} is missing in {listed}");
    }
    assert!(listed.lines().all(|line| line.chars().count() <= 80), "{listed}");
    let (_, json, _) = kinoflockd(&world, &["model", "list", "--known", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let models = json["models"].as_array().unwrap();
    assert!(models.len() > 20 && models.iter().all(|model| model["training_data"].is_string()));
    let (_, shown, _) = kinoflockd(&world, &["model", "show", "pyramid-flow-miniflux"]);
    assert!(shown.contains("not here") && shown.contains("WebVid-10M"), "{shown}");
    let (output, _, said) = kinoflockd(&world, &["model", "pull", "cogvideo-2b"]);
    assert!(!output.status.success() && said.contains("like it are cogvideox-2b"), "{said}");
    assert!(world.server.asked().is_empty());
}

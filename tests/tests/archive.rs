//! Weights from node to node: an archive without devices, a model that outlives the node that had it, licences, damage.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

use kinoflock_node::admin::call;
use kinoflock_node::admin::report::ArchiveReport;
use kinoflock_node::models::{Model, ModelStore, known};
use kinoflock_protocol::id::ModelId;
use kinoflock_protocol::units::UnixMillis;
use kinoflock_tests::sandbox::{Node, Sandbox, Worker, eventually, said};

fn pipeline() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    root.join("node/inference/tests/goldens/ltx-video-0.9.0/pipeline")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// A tiny model in a node's store, with a card by which it is under this licence.
fn tiny(node: &Node, licence: &str) -> Model {
    let folder = node.path("tiny");
    copy(&pipeline(), &folder);
    let card = known::find("mochi-1-preview").unwrap().card(ModelId::of(b"any"), UnixMillis(1));
    let mut card = serde_json::to_value(card).unwrap();
    card.as_object_mut().unwrap().remove("subject");
    card["licence"]["name"] = licence.into();
    fs::write(folder.join("card.json"), card.to_string()).unwrap();
    ModelStore::open(node.models(), None).unwrap().import(&folder, "tiny").unwrap()
}

/// A network of one node, which has a tiny model and gives it to others, if its licence lets it.
fn with_tiny(licence: &str) -> (Sandbox, Model) {
    let (mut sandbox, mut model) = (Sandbox::new(), None);
    sandbox.add_prepared(&Worker::Real, "", |node| model = Some(tiny(node, licence)));
    (sandbox, model.unwrap())
}

/// Adds an archive of this model that knows the node at this place.
fn add_archive(sandbox: &mut Sandbox, model: &str, knows: usize) {
    let bootstrap = format!("bootstrap = [{:?}]", sandbox.nodes[knows].address("tcp"));
    sandbox.begin(&Worker::Real, "", |node| {
        node.keep(&[model]);
        node.set_network(&bootstrap);
    });
}

fn told(node: &Node, name: &str) -> Option<ArchiveReport> {
    let report = call::status(&node.socket()).ok()?;
    report.archive.into_iter().find(|model| model.name == name)
}

fn holds(node: &Node, name: &str) {
    eventually("it holds the model", || told(node, name).filter(|told| told.state == "held"));
}

fn operator(node: &Node, arguments: &[&str]) -> String {
    let output = node.command().args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

fn in_store(node: &Node, id: &str) -> Option<Model> {
    ModelStore::open(node.models(), None).unwrap().find(id).unwrap()
}

#[test]
fn a_model_outlives_the_node_that_had_it() {
    let (mut sandbox, model) = with_tiny("MIT");
    let id = model.id.to_string();
    let alone = operator(&sandbox.nodes[0], &["model", "list"]);
    assert!(alone.contains("at risk: no other node is known to hold it"), "{alone}");
    assert_eq!(alone.matches("at risk").count(), 1, "the bundled model is in every program: {alone}");

    // By the name under which the node offers it.
    add_archive(&mut sandbox, "tiny", 0);
    let archive = &sandbox.nodes[1];
    holds(archive, "tiny");
    let held = in_store(archive, &id).unwrap();
    assert!(ModelStore::open(archive.models(), None).unwrap().verify(&held).unwrap().is_empty());
    assert_eq!(held.card.unwrap().licence.name.as_str(), "MIT");
    let status = archive.status();
    assert!(status.devices.is_empty() && status.accepting.unwrap_err().contains("archive"));
    let client = sandbox.client("artist");
    let refused = client.run(["generate", "a paper boat", "--node", &archive.ticket()]);
    assert!(!refused.status.success(), "an archive computed: {}", said(&refused));
    eventually("two holders are known", || {
        let listed = operator(&sandbox.nodes[0], &["model", "list"]);
        listed.contains("at risk: 2 nodes are known to hold it").then_some(())
    });

    sandbox.nodes[0].kill();
    let bootstrap = format!("bootstrap = [{:?}]", sandbox.nodes[1].address("tcp"));
    sandbox.add_prepared(&Worker::Real, "", |node| node.set_network(&bootstrap));
    let third = &sandbox.nodes[2];
    assert!(in_store(third, &id).is_none());
    let pulled = operator(third, &["model", "pull", &id, "--from-peers"]);
    assert!(pulled.contains(&id) && pulled.contains("given to others"), "{pulled}");
    let twice = third.command().args(["model", "pull", &id, "--from-peers"]).output().unwrap();
    assert!(said(&twice).contains("is here already"), "{}", said(&twice));

    sandbox.nodes[0].set_network(&bootstrap);
    sandbox.nodes[0].start();
    sandbox.nodes[0].ready();
    eventually("three holders are known", || {
        let listed = operator(&sandbox.nodes[2], &["model", "list"]);
        listed.contains("3 nodes are known to hold it").then_some(())
    });
    let listed = operator(&sandbox.nodes[2], &["model", "list", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let row = listed["models"].as_array().unwrap().iter().find(|row| row["id"] == id.as_str()).unwrap();
    assert_eq!((row["holders"].as_u64(), row["at_risk"].as_bool()), (Some(3), Some(false)));
}

#[test]
fn a_model_under_other_terms_stays_where_it_is() {
    let (mut sandbox, model) = with_tiny("LTXV Open Weights License");
    let id = model.id.to_string();
    add_archive(&mut sandbox, &id, 0);
    let archive = &sandbox.nodes[1];
    let reason =
        eventually("it tells why not", || told(archive, &id).filter(|told| told.text.contains("licence")));
    assert!(reason.text.contains("LTXV Open Weights License"), "{reason:?}");
    assert!(reason.text.contains("open licences only"), "{reason:?}");
    assert!(in_store(archive, &id).is_none());
    let log = sandbox.nodes[0].log();
    let given = log.lines().filter(|line| line.contains("can have the model's files"));
    assert!(!given.into_iter().any(|line| line.contains(&id)), "it would have been given");
}

#[test]
fn a_damaged_file_does_not_spread_and_comes_once_it_is_sound() {
    let (mut sandbox, model) = with_tiny("MIT");
    let id = model.id.to_string();
    eventually("the node gives it to others", || {
        let log = sandbox.nodes[0].log();
        let mut given = log.lines().filter(|line| line.contains("can have the model's files"));
        given.any(|line| line.contains(&id)).then_some(())
    });
    let file = model.dir.join("vae/diffusion_pytorch_model.safetensors");
    let sound = fs::read(&file).unwrap();
    let mut damaged = sound.clone();
    damaged[sound.len() / 2] ^= 1;
    fs::write(&file, damaged).unwrap();
    add_archive(&mut sandbox, &id, 0);
    let archive = &sandbox.nodes[1];
    let reason = eventually("it tells what is wrong", || {
        told(archive, &id).filter(|told| told.text.contains("vae/diffusion_pytorch_model.safetensors"))
    });
    assert_eq!(reason.state, "waits");
    assert!(in_store(archive, &id).is_none());
    fs::write(&file, sound).unwrap();
    holds(archive, &id);
    assert_eq!(in_store(archive, &id).unwrap().name, "tiny", "it has the name under which it is offered");
}

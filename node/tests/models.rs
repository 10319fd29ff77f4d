//! The model store: importing, naming, verifying, limits.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

use kinoflock_inference::LoadOptions;
use kinoflock_node::models::{Fault, ModelStore, ModelsError, embedded, manifest, selftest};
use kinoflock_protocol::capacity::SelfTest;
use kinoflock_protocol::id::{BlobId, ModelId};
use kinoflock_protocol::units::UnixMillis;

fn pipeline() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("inference/tests/goldens/ltx-video-0.9.0/pipeline")
}

/// A copy that a test may damage.
fn copy_of_pipeline(to: &Path) {
    for file in walk(&pipeline()) {
        let target = to.join(file.strip_prefix(pipeline()).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(&file, &target).unwrap();
    }
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}

#[test]
fn a_manifest_says_what_the_loaded_model_says() {
    let manifest = manifest::of_folder(&pipeline()).unwrap();
    let loaded = kinoflock_inference::load(&pipeline(), &LoadOptions::default()).unwrap();
    let info = loaded.info();
    assert_eq!(manifest.architecture.as_str(), info.architecture);
    assert_eq!(manifest.rules.size_multiple as usize, info.size_multiple);
    assert_eq!(manifest.rules.frames_multiple as usize, info.frame_rule.multiple);
    assert_eq!(manifest.rules.frames_offset as usize, info.frame_rule.offset);
    assert_eq!(manifest.rules.max_prompt_tokens as usize, info.token_limit);
    assert_eq!(manifest.defaults.width as usize, info.defaults.width);
    assert_eq!(manifest.defaults.frames as usize, info.defaults.frames);
    assert_eq!(manifest.work.transformer.layers as usize, info.work.layers);
    let paths: Vec<_> = manifest.files.iter().map(|file| file.path.to_string()).collect();
    assert!(paths.contains(&"vae/diffusion_pytorch_model.safetensors".to_owned()), "{paths:?}");
    assert!(paths.contains(&"tokenizer/spiece.model".to_owned()), "{paths:?}");
}

#[test]
fn importing_is_whole_and_the_same_model_has_one_place() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    copy_of_pipeline(&source);
    fs::write(source.join("README.md"), "not part of the model").unwrap();
    let store = ModelStore::open(&folder.path().join("models"), None).unwrap();
    let model = store.import(&source, "tiny").unwrap();
    assert_eq!(model.id, ModelId::of(&model.manifest.encode()));
    assert!(store.verify(&model).unwrap().is_empty());
    assert!(!model.dir.join("README.md").exists());
    assert_eq!(store.import(&pipeline(), "other-name").unwrap().id, model.id);
    let listed = store.list().unwrap();
    assert_eq!((listed.len(), listed[0].name.as_str()), (1, "other-name"));
    assert_eq!(store.find(&model.id.to_string()).unwrap().unwrap().id, model.id);
    assert!(store.find("tiny").unwrap().is_none());
    let left: Vec<_> = fs::read_dir(folder.path().join("models")).unwrap().collect();
    assert_eq!(left.len(), 1, "no half model is left");
    assert!(matches!(store.import(&source, "../x"), Err(ModelsError::Name { .. })));
}

#[test]
fn a_name_goes_to_the_newest_model() {
    let folder = tempfile::tempdir().unwrap();
    let store = ModelStore::open(&folder.path().join("models"), None).unwrap();
    let old = store.import(&pipeline(), "tiny").unwrap();
    let source = folder.path().join("source");
    copy_of_pipeline(&source);
    fs::write(
        source.join("kinoflock.json"),
        r#"{"defaults":{"width":64,"height":64,"frames":9,"fps":8,"steps":2,"guidance":1}}"#,
    )
    .unwrap();
    let new = store.import(&source, "tiny").unwrap();
    assert_ne!(old.id, new.id);
    assert_eq!(new.manifest.defaults.frames, 9);
    assert_eq!(store.find("tiny").unwrap().unwrap().id, new.id);
    assert_eq!(store.list().unwrap().len(), 2);
}

#[test]
fn verification_names_the_file_what_was_expected_and_what_was_found() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    copy_of_pipeline(&source);
    let store = ModelStore::open(&folder.path().join("models"), None).unwrap();
    let model = store.import(&source, "tiny").unwrap();
    let file = |name: &str| model.dir.join(name);
    let weights = file("transformer/diffusion_pytorch_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::remove_file(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    let vae = file("vae/diffusion_pytorch_model.safetensors");
    let mut changed = fs::read(&vae).unwrap();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    fs::remove_file(&vae).unwrap();
    fs::write(&vae, &changed).unwrap();
    fs::remove_file(file("text_encoder/model.safetensors")).unwrap();
    let faults = store.verify(&model).unwrap();
    assert_eq!(faults.len(), 3);
    assert!(
        matches!(&faults[0], Fault::Missing { path, .. } if path.ends_with("text_encoder/model.safetensors"))
    );
    let Fault::Length { path, expected, found } = &faults[1] else { panic!("{faults:?}") };
    assert_eq!((path, *expected, *found), (&weights, bytes.len() as u64, bytes.len() as u64 - 100));
    assert!(matches!(&faults[2], Fault::Hash { path, .. } if *path == vae));
    for fault in &faults {
        assert!(fault.to_string().contains("import the model again"), "{fault}");
    }
}

#[test]
fn a_store_at_its_limit_and_a_folder_that_is_no_model_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = ModelStore::open(&folder.path().join("models"), Some(1000)).unwrap();
    let full = store.import(&pipeline(), "tiny").unwrap_err();
    assert!(matches!(full, ModelsError::StoreFull { limit: 1000, used: 0, .. }), "{full}");
    assert!(fs::read_dir(folder.path().join("models")).unwrap().next().is_none());

    let source = folder.path().join("source");
    fs::create_dir(&source).unwrap();
    assert_eq!(store.import(&source, "x").unwrap_err().code(), "model_file_missing");
    copy_of_pipeline(&source);
    fs::write(source.join("model_index.json"), r#"{"_class_name":"DreamPipeline"}"#).unwrap();
    let unknown = store.import(&source, "x").unwrap_err();
    assert!(
        unknown.to_string().contains("DreamPipeline") && unknown.to_string().contains("LTXPipeline"),
        "{unknown}"
    );
}

#[test]
fn a_card_beside_the_model_is_read_and_a_card_of_another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    copy_of_pipeline(&source);
    let card = serde_json::json!({
        "name": "tiny", "summary": "a test", "version": 1, "previous": null, "issued_at": "0", "authors": [],
        "licence": { "name": "MIT", "url": "", "conditions": "" },
        "training_data": { "disclosed": true, "statement": "random numbers", "sources": [] },
        "consent": { "given": "OwnWork", "statement": "" },
        "shares": [{ "name": "nobody", "key": null, "role": "author", "bps": 10000 }],
        "upstreams": [], "fingerprint": null
    });
    fs::write(source.join("card.json"), card.to_string()).unwrap();
    let store = ModelStore::open(&folder.path().join("models"), None).unwrap();
    let model = store.import(&source, "tiny").unwrap();
    assert_eq!(model.card.as_ref().unwrap().summary.as_str(), "a test");
    assert_eq!(
        model.id,
        manifest::of_folder(&pipeline()).map(|m| m.id()).unwrap(),
        "a card is not part of the model"
    );
    let mut other = card;
    other["subject"] = serde_json::json!({ "Model": ModelId::from_bytes([9; 32]).to_string() });
    fs::write(source.join("card.json"), other.to_string()).unwrap();
    assert_eq!(store.import(&source, "tiny").unwrap_err().code(), "card");
}

#[test]
fn the_bundled_model_is_imported_once_and_is_sound() {
    let folder = tempfile::tempdir().unwrap();
    let store = ModelStore::open(folder.path(), None).unwrap();
    let model = store.import_bundled().unwrap().unwrap();
    assert_eq!(model.name, embedded::NAME);
    assert!(store.verify(&model).unwrap().is_empty());
    assert!(model.manifest.total_len() <= 24 << 20);
    let card = model.card.as_ref().unwrap();
    assert!(card.training_data.disclosed && card.fingerprint.is_some(), "{card:?}");
    let again = store.import_bundled().unwrap().unwrap();
    assert_eq!((again.id, store.list().unwrap().len()), (model.id, 1));
}

#[test]
fn results_of_self_tests_are_kept_per_model_files_worker_and_device() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("self-tests.json");
    let store = ModelStore::open(&folder.path().join("models"), None).unwrap();
    let model = store.import_bundled().unwrap().unwrap();
    let key = |worker: u8, device: &str| {
        selftest::ResultKey::new(&model, BlobId::from_bytes([worker; 32]), device.to_owned()).unwrap()
    };
    let kept = selftest::Kept { result: SelfTest::Unreferenced { at: UnixMillis(5) }, speed: 42 };
    let old = key(1, "cpu");
    selftest::Results::open(&path).put(&old, kept).unwrap();
    let results = selftest::Results::open(&path);
    assert_eq!(results.get(&key(1, "cpu")), Some(kept));
    assert_eq!(results.get(&key(1, "cuda:0")), None);
    assert_eq!(results.get(&key(2, "cpu")), None, "another worker binary");
    let weights = model.dir.join("vae/diffusion_pytorch_model.safetensors");
    let file = fs::File::options().append(true).open(&weights).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(results.get(&key(1, "cpu")), None, "files that were touched");
    fs::write(&path, b"{ broken").unwrap();
    assert_eq!(selftest::Results::open(&path).get(&old), None);
}

//! The model store: importing, naming, verifying, limits.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

use kinoflock_inference::LoadOptions;
use kinoflock_inference::facts::PromptCounter;
use kinoflock_node::models::{Fault, ModelStore, ModelsError, embedded, manifest, selftest};
use kinoflock_protocol::capacity::SelfTest;
use kinoflock_protocol::id::{BlobId, ModelId};
use kinoflock_protocol::model::ModelDefaults;
use kinoflock_protocol::units::UnixMillis;

#[path = "../inference/tests/support/torch.rs"]
mod torch;

fn pipeline() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("inference/tests/goldens/ltx-video-0.9.0/pipeline")
}

/// A copy that a test may damage.
fn copy_of_pipeline(to: &Path) {
    copy_to(&pipeline(), to);
}

fn copy_to(from: &Path, to: &Path) {
    for file in walk(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
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

/// The tiny folders of all families.
const FOLDERS: [&str; 17] = [
    "cogvideox-1.5",
    "cogvideox-1.5-i2v",
    "cogvideox-2b",
    "cogvideox-5b",
    "cogvideox-5b-i2v",
    "ltx-video-0.9.0",
    "ltx-video-0.9.5",
    "mochi-1",
    "pyramid-flow-miniflux",
    "pyramid-flow-sd3",
    "wan2.1",
    "wan2.1-flf2v",
    "wan2.1-i2v",
    "wan2.2-a14b",
    "wan2.2-i2v-a14b",
    "wan2.2-ti2v-5b",
    "../../models/motif",
];

fn tiny(name: &str) -> PathBuf {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("inference/tests/goldens");
    if name.starts_with("..") { goldens.join(name) } else { goldens.join(name).join("pipeline") }
}

#[test]
fn a_manifest_says_what_the_loaded_model_says_for_every_family() {
    for name in FOLDERS {
        let manifest = manifest::of_folder(&tiny(name)).unwrap();
        let loaded = kinoflock_inference::load(&tiny(name), &LoadOptions::default()).unwrap();
        let info = loaded.info();
        let (rules, defaults) = (&manifest.rules, &manifest.defaults);
        assert_eq!(manifest.architecture.as_str(), info.architecture, "{name}");
        let made = [rules.size_multiple, rules.frames_multiple, rules.frames_offset, rules.max_prompt_tokens];
        let rule = info.frame_rule;
        let known = [info.size_multiple, rule.multiple, rule.offset, info.token_limit];
        assert_eq!(made.map(|value| value as usize), known, "{name}");
        let (asked, known) =
            ([defaults.width, defaults.height, defaults.frames, defaults.steps], info.defaults);
        assert_eq!(asked, [known.width, known.height, known.frames, known.steps].map(|v| v as u32), "{name}");
        assert_eq!(
            (defaults.fps.to_f64(), defaults.guidance.to_f64()),
            (known.fps, known.guidance),
            "{name}"
        );
        let transformer = manifest.work.transformer;
        let blocks = transformer.layers + transformer.single_layers;
        assert_eq!(blocks as usize, info.work.layers, "{name}");
        assert_eq!(manifest.work.counts_by_steps(), info.architecture != "pyramid-flow", "{name}");
    }
}

#[test]
fn each_family_has_defaults_of_its_own() {
    for (name, size, frames, fps) in [
        ("ltx-video-0.9.5", (704, 512), 161, 25.0),
        ("cogvideox-2b", (64, 48), 9, 8.0),
        ("cogvideox-1.5", (1360, 768), 81, 16.0),
        ("mochi-1", (848, 480), 19, 30.0),
        ("pyramid-flow-miniflux", (640, 384), 121, 24.0),
        ("pyramid-flow-sd3", (1280, 768), 121, 24.0),
        ("wan2.1", (832, 480), 81, 16.0),
        ("wan2.2-ti2v-5b", (1280, 704), 121, 24.0),
    ] {
        let manifest = manifest::of_folder(&tiny(name)).unwrap();
        let ModelDefaults { width, height, frames: made, fps: rate, .. } = manifest.defaults;
        assert_eq!(((width, height), made, rate.to_f64()), (size, frames, fps), "{name}");
        assert_eq!(manifest.rules.check(made, width, height), Ok(()), "{name}: its own defaults");
    }
}

#[test]
fn prompts_are_counted_without_a_model_as_by_it_for_every_family() {
    for name in FOLDERS {
        let facts = kinoflock_inference::registry::facts(&tiny(name)).unwrap();
        let limit = facts.info.token_limit;
        let counter = PromptCounter::open(&tiny(name), facts.prompts).unwrap();
        let loaded = kinoflock_inference::load(&tiny(name), &LoadOptions::default()).unwrap();
        for prompt in ["a red dog", " a &amp;amp;  dog\u{a0}and \u{fb01}re ", "", &"a red dog ".repeat(99)] {
            let counted = counter.encode(prompt, false, limit).unwrap();
            assert_eq!(counted.tokens, loaded.count_tokens(prompt).unwrap(), "{name}: {prompt:?}");
            assert_eq!(counted.cut_text.is_some(), counted.tokens > limit, "{name}: {prompt:?}");
        }
    }
}

#[test]
fn the_ids_of_models_that_were_known_before_stay() {
    let id = |name: &str| manifest::of_folder(&tiny(name)).unwrap().id().to_string();
    assert_eq!(id("../../models/motif"), "model1qgo4flkjjlhkcypm76wlxawal52enhjixfea5xywylzo6vmfelnceo22");
    assert_eq!(id("ltx-video-0.9.0"), "model1eri5dwdzu2zwa3vhsztlsxtuncoa6fmhtd5r55pkoyacenyj353lr73q");
}

#[test]
fn a_model_is_the_files_that_are_read_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    copy_to(&tiny("wan2.2-a14b"), &source);
    let weights = source.join("transformer/diffusion_pytorch_model.safetensors");
    fs::copy(&weights, source.join("transformer/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    fs::copy(&weights, source.join("single_file.safetensors")).unwrap();
    fs::create_dir(source.join("assets")).unwrap();
    fs::write(source.join("assets/notes.txt"), "not part of the model").unwrap();
    let manifest = manifest::of_folder(&source).unwrap();
    assert_eq!(manifest.id(), manifest::of_folder(&tiny("wan2.2-a14b")).unwrap().id());
    let paths: Vec<_> = manifest.files.iter().map(|file| file.path.to_string()).collect();
    assert!(paths.contains(&"transformer_2/diffusion_pytorch_model.safetensors".to_owned()), "{paths:?}");
    assert!(paths.contains(&"tokenizer/spiece.model".to_owned()), "{paths:?}");
    fs::remove_dir_all(source.join("transformer_2")).unwrap();
    let missing = manifest::of_folder(&source).unwrap_err();
    assert!(missing.to_string().contains("transformer_2/config.json is missing"), "{missing}");
}

/// Pyramid Flow is published without an index, its VAE as a pickle, and with a transformer for each size of picture.
#[test]
fn pyramid_flow_is_taken_as_it_is_published() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    copy_to(&tiny("pyramid-flow-miniflux"), &source);
    let vae = source.join("causal_video_vae");
    torch::turn(&vae, "diffusion_pytorch_model");
    copy_to(&source.join("diffusion_transformer_384p"), &source.join("diffusion_transformer_image"));
    let store = ModelStore::open(&folder.path().join("models"), None).unwrap();
    let model = store.import(&source, "pyramid").unwrap();
    let paths: Vec<_> = model.manifest.files.iter().map(|file| file.path.to_string()).collect();
    assert!(paths.contains(&"causal_video_vae/diffusion_pytorch_model.bin".to_owned()), "{paths:?}");
    assert!(!paths.iter().any(|path| path.contains("image") || path.contains("index")), "{paths:?}");
    assert!(store.verify(&model).unwrap().is_empty());
    assert_eq!((model.manifest.defaults.width, model.manifest.rules.size_multiple), (640, 64));
    let loaded = kinoflock_inference::load(&model.dir, &LoadOptions::default()).unwrap();
    assert_eq!(loaded.info().architecture, "pyramid-flow");
}

#[test]
fn a_value_that_is_not_known_is_told_with_file_and_key_for_every_family() {
    let folder = tempfile::tempdir().unwrap();
    for (name, file, key, value) in [
        ("ltx-video-0.9.0", "transformer/config.json", "qk_norm", "layer_norm"),
        ("ltx-video-0.9.5", "vae/config.json", "_class_name", "AutoencoderKL"),
        ("cogvideox-2b", "transformer/config.json", "activation_fn", "relu"),
        ("cogvideox-5b", "scheduler/scheduler_config.json", "_class_name", "EulerDiscreteScheduler"),
        ("mochi-1", "vae/config.json", "act_fn", "relu"),
        ("pyramid-flow-miniflux", "causal_video_vae/config.json", "decoder_type", "plain"),
        ("wan2.1", "text_encoder/config.json", "feed_forward_proj", "swish"),
        ("wan2.2-ti2v-5b", "model_index.json", "vae", "AutoencoderKL"),
    ] {
        let source = folder.path().join(name);
        copy_to(&tiny(name), &source);
        let path = source.join(file);
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = if key == "vae" { serde_json::json!(["diffusers", value]) } else { value.into() };
        fs::write(&path, config.to_string()).unwrap();
        let error = manifest::of_folder(&source).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(key) && error.contains(value), "{name}: {error}");
    }
}

#[test]
fn the_work_of_published_models_is_that_of_their_published_configurations() {
    use kinoflock_protocol::work::WorkModel;
    let folder = tempfile::tempdir().unwrap();
    let published = |like: &str, changes: &[(&str, serde_json::Value)]| {
        let source = folder.path().join(format!("{like}-{}", changes.len()));
        copy_to(&tiny(like), &source);
        for (file, value) in changes {
            let path = source.join(file);
            let class = serde_json::from_slice::<serde_json::Value>(&fs::read(&path).unwrap()).unwrap();
            let mut value = value.clone();
            if let Some(class) = class.get("_class_name") {
                value["_class_name"] = class.clone();
            }
            fs::write(path, value.to_string()).unwrap();
        }
        let tokens = serde_json::json!({ "model_max_length": 512 });
        fs::write(source.join("tokenizer/tokenizer_config.json"), tokens.to_string()).unwrap();
        manifest::work_of(&source).unwrap()
    };
    let xxl = serde_json::json!({
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    });
    let (transformer, vae, text) = ("transformer/config.json", "vae/config.json", "text_encoder/config.json");
    let none = serde_json::json!({});
    let cog_5b = serde_json::json!({
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": true,
    });
    let wan_1_3b = serde_json::json!({ "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960 });
    let all = |config: &serde_json::Value| {
        vec![(transformer, config.clone()), (vae, none.clone()), (text, xxl.clone())]
    };
    for (like, config, known) in [
        ("cogvideox-2b", none.clone(), WorkModel::cogvideox_2b()),
        ("cogvideox-5b", cog_5b, WorkModel::cogvideox_5b()),
        ("wan2.1", wan_1_3b, WorkModel::wan_1_3b()),
        ("mochi-1", none.clone(), WorkModel::mochi_1()),
    ] {
        let found = published(like, &all(&config));
        assert_eq!(found.transformer, known.transformer, "{like}");
        assert_eq!(
            (found.vae.spatial, found.vae.temporal),
            (known.vae.spatial, known.vae.temporal),
            "{like}"
        );
        // What is known by its name counts the vocabulary, which no token meets.
        let share = found.text.parameters as f64 / known.text.parameters as f64;
        assert!((0.8..1.0).contains(&share), "{like}: {share}");
        if like != "mochi-1" {
            assert_eq!(found.vae, known.vae, "{like}");
        }
    }
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

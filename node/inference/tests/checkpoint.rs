//! LTX-Video in one file under its makers' names: the same clip as from the folder, bit by bit, in each of its forms.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use kinoflock_inference::registry::{self, ModelIndex};
use kinoflock_inference::{DType, Device, Error, LoadOptions, Tensor, load};
use serde_json::{Value, json};

#[path = "support/folders.rs"]
mod folders;
#[path = "support/single.rs"]
mod single;

use folders::{Named, copied, here, run};
use single::{FILE, FIRST, Form, SECOND, STEM, THIRD};

/// The folder with the form's VAE.
fn whole(form: &Form) -> tempfile::TempDir {
    let folder = copied("ltx-video-0.9.0");
    for file in [STEM, "config.json"] {
        let from = here("goldens").join(form.vae).join("pipeline/vae").join(file);
        std::fs::copy(from, folder.path().join("vae").join(file)).unwrap();
    }
    folder
}

fn remove(folder: &Path) {
    std::fs::remove_dir_all(folder.join("scheduler")).unwrap();
    std::fs::remove_file(folder.join("model_index.json")).unwrap();
}

#[test]
fn one_file_makes_the_clip_of_its_folder_in_every_form() {
    for form in [FIRST, SECOND, THIRD] {
        let (folder, single) = (whole(&form), whole(&form));
        form.turn(&here("goldens"), single.path(), |_| {});
        assert!(run(single.path()) == run(folder.path()), "{}: another clip", form.vae);
        let facts = registry::facts(single.path()).unwrap();
        let mut expected = registry::facts(folder.path()).unwrap();
        assert_eq!(format!("{:?}", facts.figures), format!("{:?}", expected.figures));
        expected.info.work.vae_parameters = facts.info.work.vae_parameters;
        assert_eq!(facts.info, expected.info);
        let files = facts.files(single.path()).unwrap();
        assert!(files.contains(FILE) && files.contains("text_encoder/model.safetensors"), "{files:?}");
        assert!(!files.iter().any(|file| file.starts_with("transformer") || file.starts_with("vae")));
        facts.check_weights(single.path()).unwrap();
    }
}

#[test]
fn without_an_index_class_and_schedule_follow_from_the_file() {
    for (form, class) in [(FIRST, "LTXPipeline"), (SECOND, "LTXPipeline"), (THIRD, "LTXConditionPipeline")] {
        let (folder, single) = (whole(&form), whole(&form));
        form.turn(&here("goldens"), single.path(), |_| {});
        remove(single.path());
        assert_eq!(ModelIndex::read(single.path()).unwrap().class, class);
        // The golden's index and schedule are those of LTXPipeline.
        if form.vae == THIRD.vae {
            let index = json!({ "_class_name": class });
            std::fs::write(folder.path().join("model_index.json"), index.to_string()).unwrap();
            let schedule = json!({ "_class_name": "FlowMatchEulerDiscreteScheduler" });
            let file = folder.path().join("scheduler/scheduler_config.json");
            std::fs::write(file, schedule.to_string()).unwrap();
        }
        assert!(run(single.path()) == run(folder.path()), "{}: another clip", form.vae);
    }
}

fn refused(form: &Form, change: impl FnOnce(&mut Value)) -> String {
    let folder = whole(form);
    form.turn(&here("goldens"), folder.path(), change);
    remove(folder.path());
    match load(folder.path(), &LoadOptions::default()) {
        Ok(_) => panic!("it loads"),
        Err(error @ (Error::Config { .. } | Error::Weights(_))) => error.to_string(),
        Err(other) => panic!("another error: {other}"),
    }
}

#[test]
fn what_a_description_says_otherwise_is_refused_by_name() {
    for (words, change) in [
        (
            ["transformer.qk_norm", "only \"rms_norm\""],
            (|c| c["transformer"]["qk_norm"] = json!("layer_norm")) as fn(&mut Value),
        ),
        (["vae.norm_layer", "group_norm"], |c| c["vae"]["norm_layer"] = json!("group_norm")),
        (["vae.encoder_blocks", "attn_res_x"], |c| c["vae"]["encoder_blocks"][0] = json!(["attn_res_x", 1])),
        (["vae.encoder_blocks", "no block is written so"], |c| c["vae"]["encoder_blocks"][0] = json!(7)),
        (["vae.decoder_blocks", "does not end with res_x"], |c| {
            c["vae"]["decoder_blocks"] = json!([["compress_all", {}]])
        }),
        (["vae.decoder_blocks", "a list of blocks is needed"], |c| {
            c["vae"]["decoder_blocks"] = json!("none")
        }),
        (["vae.encoder_blocks", "no such block"], |c| c["vae"]["encoder_blocks"] = json!([])),
        (["vae is missing", "needed"], |c| c["vae"] = json!(null)),
        (["num_layers", "at least 1"], |c| c["transformer"]["num_layers"] = json!(0)),
        (["vae.block_out_channels", FILE], |c| c["vae"]["encoder_base_channels"] = json!(u64::MAX)),
        (["tensor decoder.", "has shape"], |c| c["vae"]["decoder_base_channels"] = json!(8)),
    ] {
        let error = refused(&THIRD, change);
        assert!(words.iter().all(|word| error.contains(word)) && error.contains(FILE), "{words:?}: {error}");
    }
}

#[test]
fn one_file_is_told_from_a_folder_and_from_others() {
    let folder = whole(&THIRD);
    THIRD.turn(&here("goldens"), folder.path(), |_| {});
    let two = folder.path().join("ltxv-other.safetensors");
    std::fs::copy(folder.path().join(FILE), &two).unwrap();
    let error = registry::facts(folder.path()).unwrap_err().to_string();
    assert!(error.contains("ltxv-other.safetensors, ltxv-tiny.safetensors; leave one"), "{error}");
    std::fs::remove_file(two).unwrap();
    let bytes = std::fs::read(folder.path().join(FILE)).unwrap();
    std::fs::write(folder.path().join(FILE), &bytes[..bytes.len() - 1]).unwrap();
    let error = registry::facts(folder.path()).unwrap_err().to_string();
    assert!(error.contains("truncated") && error.contains(FILE), "{error}");
    let plain = folder.path().join("plain.safetensors");
    std::fs::rename(folder.path().join(FILE), &plain).unwrap();
    let tensors = Named::from([("a".to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap())]);
    safetensors::serialize_to_file(&tensors, None, &plain).unwrap();
    let error = registry::facts(folder.path()).unwrap_err().to_string();
    assert!(error.contains("configuration in its metadata"), "{error}");
    // Beside the parts of a folder a single file is only another file.
    let whole = whole(&THIRD);
    std::fs::copy(&plain, whole.path().join("plain.safetensors")).unwrap();
    assert!(
        !registry::facts(whole.path()).unwrap().files(whole.path()).unwrap().contains("plain.safetensors")
    );
}

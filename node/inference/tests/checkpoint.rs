//! LTX-Video in one file under its makers' names: the same clip as from the folder, bit by bit, in each of its forms.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;

use kinoflock_inference::registry::{self, ModelIndex};
use kinoflock_inference::{DType, Device, Error, LoadOptions, Tensor, load};
use serde_json::{Value, json};

#[path = "support/folders.rs"]
mod folders;

use folders::{Named, copied, here, read, run};

const STEM: &str = "diffusion_pytorch_model.safetensors";
const FILE: &str = "ltxv-tiny.safetensors";

/// Of the VAE's names, the reference's and the makers', for each form.
struct Form {
    vae: &'static str,
    encoder: &'static [&'static str],
    decoder: &'static [&'static str],
    description: fn() -> Value,
}

const STRIDED: &[&str] = &[
    "down_blocks.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.0.conv_out",
    "down_blocks.1",
    "down_blocks.1.downsamplers.0",
    "down_blocks.1.conv_out",
    "down_blocks.2",
    "down_blocks.2.downsamplers.0",
    "down_blocks.3",
    "mid_block",
];
const RESIDUAL: &[&str] = &[
    "mid_block",
    "up_blocks.0.upsamplers.0",
    "up_blocks.0",
    "up_blocks.1.upsamplers.0",
    "up_blocks.1",
    "up_blocks.2.upsamplers.0",
    "up_blocks.2",
];

/// 0.9.0, where one list is both sides' and an old way of writing it. In the tiny golden, and as here, the first widening
/// is none.
const FIRST: Form = Form {
    vae: "ltx-video-0.9.0",
    encoder: STRIDED,
    decoder: &[
        "mid_block",
        "up_blocks.0",
        "up_blocks.1.upsamplers.0",
        "up_blocks.1",
        "up_blocks.2.conv_in",
        "up_blocks.2.upsamplers.0",
        "up_blocks.2",
        "up_blocks.3.conv_in",
        "up_blocks.3.upsamplers.0",
        "up_blocks.3",
    ],
    description: || {
        json!({ "encoder_base_channels": 8, "decoder_base_channels": 8, "blocks": [
            ["res_x", 1], ["compress_all", 1], ["res_x_y", { "multiplier": 1 }],
            ["res_x", 1], ["compress_all", 1], ["res_x_y", 1],
            ["res_x", 1], ["compress_all", 1], ["res_x", 1], ["res_x", 1],
        ] })
    },
};

/// 0.9.1: the decoder is told a noise level and injects noise.
const SECOND: Form = Form {
    vae: "ltx-video-0.9.1",
    encoder: STRIDED,
    decoder: RESIDUAL,
    description: || {
        let up =
            |layers: usize, noise: bool| json!(["res_x", { "num_layers": layers, "inject_noise": noise }]);
        let grow = json!(["compress_all", { "residual": true, "multiplier": 2 }]);
        json!({
            "encoder_base_channels": 8, "decoder_base_channels": 4, "timestep_conditioning": true,
            "encoder_blocks": (FIRST.description)()["blocks"],
            "decoder_blocks": [up(1, true), grow, up(1, true), grow, up(1, true), grow, up(2, false)],
        })
    },
};

/// 0.9.5 and later.
const THIRD: Form = Form {
    vae: "ltx-video-0.9.5",
    encoder: &[
        "down_blocks.0",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1",
        "down_blocks.1.downsamplers.0",
        "down_blocks.2",
        "down_blocks.2.downsamplers.0",
        "down_blocks.3",
        "down_blocks.3.downsamplers.0",
        "mid_block",
    ],
    decoder: RESIDUAL,
    description: || {
        let one = json!(["res_x", { "num_layers": 1 }]);
        let shrink = |kind: &str, factor: usize| json!([kind, { "multiplier": factor }]);
        let grow = json!(["compress_all", { "residual": true, "multiplier": 2 }]);
        json!({
            "encoder_base_channels": 4, "decoder_base_channels": 4, "timestep_conditioning": true,
            "encoder_blocks": [
                one, shrink("compress_space_res", 2), one, shrink("compress_time_res", 1),
                one, shrink("compress_all_res", 2), one, shrink("compress_all_res", 1), one,
            ],
            "decoder_blocks": [one, grow, one, grow, one, grow, one],
        })
    },
};

impl Form {
    /// The makers' name of a tensor of the VAE.
    fn name(&self, name: &str) -> String {
        match name {
            "latents_mean" => return "vae.per_channel_statistics.mean-of-means".to_owned(),
            "latents_std" => return "vae.per_channel_statistics.std-of-means".to_owned(),
            _ => {}
        }
        let (side, rest) = name.split_once('.').unwrap();
        let (places, blocks) =
            if side == "encoder" { (self.encoder, "down_blocks") } else { (self.decoder, "up_blocks") };
        // The longest place that fits: a block's sampler lies within it.
        let fitting = |(_, place): &(usize, &&str)| rest.starts_with(&format!("{place}."));
        let found = places.iter().enumerate().filter(fitting).max_by_key(|(_, place)| place.len());
        let rest = match found {
            Some((index, place)) => format!("{blocks}.{index}{}", &rest[place.len()..]),
            None => rest.replace("scale_shift_table", "last_scale_shift_table"),
        };
        let rest =
            if found.is_none() && rest.starts_with("time_embedder") { format!("last_{rest}") } else { rest };
        let rest = rest.replace(".resnets.", ".res_blocks.").replace("conv_shortcut.conv.", "conv_shortcut.");
        format!("vae.{side}.{}", rest.replace("norm3.", "norm3.norm."))
    }

    /// A folder's transformer and VAE in one file, in their stead.
    fn turn(&self, folder: &Path, change: impl FnOnce(&mut Value)) {
        let vae = here("goldens").join(self.vae).join("pipeline/vae");
        let mut tensors = Named::new();
        for (name, tensor) in read(&vae.join(STEM)) {
            let theirs = self.name(&name);
            assert!(tensors.insert(theirs.clone(), tensor).is_none(), "{theirs} twice");
        }
        assert!(tensors.keys().any(|name| name.contains("conv_shortcut")) || self.vae != FIRST.vae);
        for other in ["channel", "mean-of-stds", "mean-of-stds_over_std-of-means"] {
            let unused = Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap();
            tensors.insert(format!("vae.per_channel_statistics.{other}"), unused);
        }
        for (name, tensor) in read(&folder.join("transformer").join(STEM)) {
            let theirs = name.replace("proj_in", "patchify_proj").replace("time_embed.", "adaln_single.");
            let theirs = theirs.replace("norm_q", "q_norm").replace("norm_k", "k_norm");
            tensors.insert(format!("model.diffusion_model.{theirs}"), tensor);
        }
        let mut vae = (self.description)();
        let common = json!({
            "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3,
            "latent_channels": 8, "scaling_factor": 1.0, "norm_layer": "pixel_norm", "patch_size": 4,
            "latent_log_var": "uniform", "use_quant_conv": false, "causal_decoder": false,
        });
        vae.as_object_mut().unwrap().extend(common.as_object().unwrap().clone());
        let mut config = json!({ "vae": vae, "transformer": transformer(), "scheduler": {
            "_class_name": "RectifiedFlowScheduler", "sampler": "LinearQuadratic",
        } });
        change(&mut config);
        let metadata = HashMap::from([("config".to_owned(), config.to_string())]);
        safetensors::serialize_to_file(&tensors, Some(metadata), &folder.join(FILE)).unwrap();
        for part in ["transformer", "vae"] {
            std::fs::remove_dir_all(folder.join(part)).unwrap();
        }
    }
}

fn transformer() -> Value {
    json!({
        "_class_name": "Transformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": true,
        "attention_head_dim": 8, "attention_type": "default", "caption_channels": 32,
        "cross_attention_dim": 32, "double_self_attention": false, "dropout": 0.0, "in_channels": 8,
        "norm_elementwise_affine": false, "norm_eps": 1e-6, "norm_num_groups": 32, "num_attention_heads": 4,
        "num_embeds_ada_norm": 1000, "num_layers": 2, "num_vector_embeds": null, "out_channels": 8,
        "project_to_2d_pos": true, "qk_norm": "rms_norm", "standardization_norm": "rms_norm",
        "positional_embedding_type": "rope", "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048], "timestep_scale_multiplier": 1000,
        "causal_temporal_positioning": true, "use_tpu_flash_attention": false,
    })
}

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
        form.turn(single.path(), |_| {});
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
        form.turn(single.path(), |_| {});
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
    form.turn(folder.path(), change);
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
        (["tensor decoder.conv_in.conv.weight", FILE], |c| c["vae"]["decoder_base_channels"] = json!(8)),
    ] {
        let error = refused(&THIRD, change);
        assert!(words.iter().all(|word| error.contains(word)) && error.contains(FILE), "{words:?}: {error}");
    }
}

#[test]
fn one_file_is_told_from_a_folder_and_from_others() {
    let folder = whole(&THIRD);
    THIRD.turn(folder.path(), |_| {});
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

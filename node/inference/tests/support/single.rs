//! LTX-Video in one file under its makers' names, made from the goldens' folders.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

pub(crate) const STEM: &str = "diffusion_pytorch_model.safetensors";
pub(crate) const FILE: &str = "ltxv-tiny.safetensors";

/// Of the VAE's names, the reference's and the makers', for each form.
pub(crate) struct Form {
    pub(crate) vae: &'static str,
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
pub(crate) const FIRST: Form = Form {
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
pub(crate) const SECOND: Form = Form {
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
pub(crate) const THIRD: Form = Form {
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

    /// A folder's transformer and VAE in one file, in their stead. The VAE is that of this form's golden.
    pub(crate) fn turn(&self, goldens: &Path, folder: &Path, change: impl FnOnce(&mut Value)) {
        let vae = std::fs::read(goldens.join(self.vae).join("pipeline/vae").join(STEM)).unwrap();
        let transformer = std::fs::read(folder.join("transformer").join(STEM)).unwrap();
        let [vae, transformer] = [&vae, &transformer].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        let zeros = [0u8; 32];
        let unused = || TensorView::new(Dtype::F32, vec![8], &zeros).unwrap();
        let mut tensors = BTreeMap::new();
        for (name, tensor) in vae.tensors() {
            let theirs = self.name(&name);
            assert!(tensors.insert(theirs.clone(), tensor).is_none(), "{theirs} twice");
        }
        assert!(tensors.keys().any(|name| name.contains("conv_shortcut")) || self.vae != FIRST.vae);
        for other in ["channel", "mean-of-stds", "mean-of-stds_over_std-of-means"] {
            tensors.insert(format!("vae.per_channel_statistics.{other}"), unused());
        }
        for (name, tensor) in transformer.tensors() {
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
        let mut config = json!({ "vae": vae, "transformer": description(), "scheduler": {
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

fn description() -> Value {
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

//! Pyramid Flow's SD3 variant from the outside, and clips from a picture with both variants.
#![allow(clippy::unwrap_used)]

use kinoflock_inference::{Condition, DType, Device, GenerateRequest, Pipeline, Silent, Tensor};
use serde_json::json;

#[path = "support/tiny.rs"]
mod tiny;
#[path = "support/torch.rs"]
mod torch;

use tiny::{
    Watch, assert_halves_near, assert_resumes, copied, difference, edit, error_of, golden, load_error, mean,
    open, refusals,
};

const SD3: &str = "pyramid-flow-sd3";
const BOTH: [&str; 2] = ["pyramid-flow-miniflux", SD3];
const TRANSFORMER: &str = "diffusion_transformer_768p/config.json";

/// One step a stage in the first unit, and one in later ones.
fn request(pipeline: &dyn Pipeline, size: (usize, usize, usize)) -> GenerateRequest {
    let mut request = tiny::request(pipeline, (size.0, size.1, size.2, 1));
    request.stage_steps = Some([vec![1; 3], vec![1; 3]]);
    request
}

fn picture(value: f32) -> Vec<Condition> {
    vec![Condition::new(Tensor::full(value, (1, 3, 64, 64), &Device::Cpu).unwrap(), 0)]
}

#[test]
fn it_is_known_by_its_transformer_and_has_the_references_defaults() {
    let pipeline = open(&golden(SD3));
    let info = pipeline.info();
    assert_eq!((info.architecture.as_str(), info.size_multiple, info.token_limit), ("pyramid-flow", 64, 128));
    let defaults = info.defaults;
    assert_eq!((defaults.width, defaults.height, defaults.steps, defaults.guidance), (1280, 768, 10, 9.0));
    assert!(info.work.text_parameters > 0);
    let small = copied(&golden(SD3));
    let part = |name: &str| small.path().join(name);
    std::fs::rename(part("diffusion_transformer_768p"), part("diffusion_transformer_384p")).unwrap();
    let defaults = open(small.path()).info().defaults;
    assert_eq!((defaults.width, defaults.guidance), (640, 7.0));
}

#[test]
fn one_seed_makes_one_clip_and_a_run_goes_on_from_any_checkpoint_bit_for_bit() {
    for conditions in [Vec::new(), picture(0.3)] {
        let mut pipeline = open(&golden(SD3));
        let steps = if conditions.is_empty() { 9 } else { 6 };
        let request = GenerateRequest { conditions, ..request(&*pipeline, (64, 64, 17)) };
        let (whole, checkpoints) = assert_resumes(&mut *pipeline, &request);
        assert_eq!((whole.latents.dims(), whole.step_hashes.len()), (&[1, 4, 3, 8, 8][..], steps));
        assert_eq!(checkpoints.len(), steps - 1);
    }
}

#[test]
fn a_clip_from_a_picture_begins_with_it_and_makes_the_later_units_alone() {
    for name in BOTH {
        let mut pipeline = open(&golden(name));
        let words = request(&*pipeline, (64, 64, 9));
        let first = |pipeline: &mut dyn Pipeline, conditions: Vec<Condition>| {
            let mut watch = Watch::default();
            let request = GenerateRequest { conditions, ..words.clone() };
            let made = pipeline.generate(&request, &mut watch).unwrap();
            assert_eq!(made.frames.count, 9);
            (watch.total, made.latents.narrow(2, 0, 1).unwrap(), made.latents)
        };
        let (steps, dark, whole) = first(&mut *pipeline, picture(0.1));
        assert_eq!(steps, 3, "{name}");
        let (_, light, other) = first(&mut *pipeline, picture(0.9));
        assert!(difference(&dark, &light) > 0.05, "{name}");
        assert!(difference(&whole.narrow(2, 1, 1).unwrap(), &other.narrow(2, 1, 1).unwrap()) > 1e-3);
        let (steps, _, _) = first(&mut *pipeline, Vec::new());
        assert_eq!(steps, 6, "{name}");
        // Given noise is drawn with instead of the seed's.
        let zeros = Tensor::zeros((1, 4, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
        let still = |seed: u64| GenerateRequest {
            seed,
            condition_noise: vec![zeros.clone()],
            conditions: picture(0.1),
            ..words.clone()
        };
        let made = |pipeline: &mut dyn Pipeline, seed| pipeline.generate(&still(seed), &mut Silent).unwrap();
        let pictures = [1, 2].map(|seed| made(&mut *pipeline, seed).latents.narrow(2, 0, 1).unwrap());
        assert_eq!(difference(&pictures[0], &pictures[1]), 0.0, "{name}");
    }
}

#[test]
fn what_cannot_be_made_is_refused_with_the_limit() {
    for name in BOTH {
        let pipeline = open(&golden(name));
        let good = GenerateRequest { conditions: picture(0.5), ..request(&*pipeline, (64, 64, 9)) };
        assert!(pipeline.check(&good).is_ok());
        let refused = refusals(&*pipeline, &good);
        assert!(refused(&|r| r.frames = 1).starts_with("frames is 1: the picture that is given"), "{name}");
        assert!(refused(&|r| r.conditions[0].frame = 3).contains("which a clip begins with"), "{name}");
        assert!(refused(&|r| r.conditions[0].strength = 0.5).contains("fully"), "{name}");
        let zeros = Tensor::zeros((1, 4, 1, 4, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(refused(&|r| r.step_noise = vec![zeros.clone()]).starts_with("step_noise is 1:"), "{name}");
    }
    // The tiny table of positions has 12 rows and columns of tokens of 16 pixels.
    let pipeline = open(&golden(SD3));
    let wide = request(&*pipeline, (256, 64, 9));
    let said = pipeline.check(&wide).unwrap_err().to_string();
    assert!(said.starts_with("width is 256: the model has no positions"), "{said}");
    assert!(pipeline.check(&GenerateRequest { width: 192, ..wide }).is_ok());
}

#[test]
fn configuration_values_that_are_not_known_are_named() {
    let clip = "text_encoder_2/config.json";
    for (file, key, value) in [
        (TRANSFORMER, "_class_name", json!("SD3Transformer2DModel")),
        (TRANSFORMER, "patch_size", json!(1)),
        (TRANSFORMER, "pos_embed_type", json!("rope")),
        (TRANSFORMER, "qk_norm", json!("layer_norm")),
        (TRANSFORMER, "caption_projection_dim", json!(64)),
        (TRANSFORMER, "attention_head_dim", json!(15)),
        (TRANSFORMER, "in_channels", json!(8)),
        (TRANSFORMER, "pooled_projection_dim", json!(20)),
        (TRANSFORMER, "joint_attention_dim", json!(64)),
        (TRANSFORMER, "pos_embed_max_size", json!(0)),
        (TRANSFORMER, "dual_attention_layers", json!([0])),
        (clip, "hidden_act", json!("relu")),
        ("text_encoder_3/config.json", "feed_forward_proj", json!("gated-mish")),
    ] {
        let said = error_of(&golden(SD3), file, key, value);
        // A class that no index names is an architecture that is not known.
        assert!(
            said.contains("SD3Transformer2DModel") || (said.contains(file) && said.contains(key)),
            "{said}"
        );
    }
    let said = error_of(&golden(SD3), TRANSFORMER, "pos_embed_max_size", json!(10));
    assert!(said.contains("pos_embed.pos_embed") && said.contains("[1, 144, 48]"), "{said}");
    // What the reference's pipeline sets itself does not matter.
    let folder = copied(&golden(SD3));
    edit(&folder.path().join(TRANSFORMER), |config| {
        config["use_temporal_causal"] = json!(false);
        config["temp_pos_embed_type"] = json!("sincos");
    });
    open(folder.path());
    for file in ["vocab.json", "merges.txt"] {
        let folder = copied(&golden(SD3));
        std::fs::write(folder.path().join("tokenizer_2").join(file), "{\nx").unwrap();
        assert!(load_error(folder.path()).to_string().contains(file));
    }
}

/// As it is published: VAE and transformer in PyTorch's own form.
#[test]
fn weights_in_pytorchs_form_make_the_same_clip() {
    let folder = copied(&golden(SD3));
    for part in ["causal_video_vae", "diffusion_transformer_768p"] {
        torch::turn(&folder.path().join(part), "diffusion_pytorch_model");
    }
    let mut pipeline = open(&golden(SD3));
    let request = GenerateRequest { conditions: picture(0.4), ..request(&*pipeline, (64, 64, 9)) };
    let made = pipeline.generate(&request, &mut Silent).unwrap();
    let same = open(folder.path()).generate(&request, &mut Silent).unwrap();
    assert_eq!((made.step_hashes, made.frames), (same.step_hashes, same.frames));
}

#[test]
fn half_types_stay_near_f32() {
    let mut pipeline = open(&golden(SD3));
    let request = request(&*pipeline, (64, 64, 9));
    let exact = pipeline.generate(&request, &mut Silent).unwrap().latents;
    assert_halves_near(&golden(SD3), &request, &exact, 0.1 * mean(&exact));
}

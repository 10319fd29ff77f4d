//! Clips from pictures: what a run begins with, checkpoints, and what is said of pictures that a model cannot take.
#![allow(clippy::unwrap_used)]

use kinoflock_inference::{
    Condition, DType, Device, GenerateRequest, LoadOptions, Pipeline, Silent, Tensor, load, motif,
};

#[path = "support/tiny.rs"]
mod tiny;

use tiny::{assert_resumes, error_of, golden, mean, open};

fn pictures(count: usize, value: f32) -> Tensor {
    Tensor::full(value, (count, 3, 32, 64), &Device::Cpu).unwrap()
}

fn request(pipeline: &dyn Pipeline, conditions: Vec<Condition>) -> GenerateRequest {
    GenerateRequest { conditions, ..tiny::request(pipeline, (64, 32, 17, 3)) }
}

#[test]
fn a_run_with_pictures_goes_on_from_any_checkpoint_bit_for_bit() {
    for name in ["ltx-video-0.9.0", "ltx-video-0.9.5"] {
        let mut pipeline = open(&golden(name));
        let given = vec![Condition::new(pictures(1, 0.2), 0), Condition::new(pictures(1, 0.8), 11)];
        for conditions in [given[..1].to_vec(), given] {
            let request = request(&*pipeline, conditions);
            let (whole, checkpoints) = assert_resumes(&mut *pipeline, &request);
            assert_eq!((whole.latents.dims(), whole.frames.count), (&[1, 8, 3, 1, 2][..], 17));
            assert_eq!(checkpoints.len(), 2);
        }
    }
}

#[test]
fn half_types_stay_near_f32() {
    for name in ["ltx-video-0.9.5", "wan2.1-i2v", "wan2.2-i2v-a14b"] {
        let first = vec![Condition::new(pictures(1, 0.3), 0)];
        let made = |dtype: DType| {
            let options = LoadOptions { dtype, ..LoadOptions::default() };
            let mut pipeline = load(&golden(name), &options).unwrap();
            let request = GenerateRequest { steps: 2, ..request(&*pipeline, first.clone()) };
            pipeline.generate(&request, &mut Silent).unwrap().latents
        };
        let off = mean(&(made(DType::F32) - made(DType::BF16)).unwrap());
        assert!(off < 0.1, "{name}: {off}");
    }
}

#[test]
fn every_part_of_what_is_given_changes_the_run_and_its_commitment() {
    let mut pipeline = open(&golden("ltx-video-0.9.5"));
    let one = |value: f32, frame: usize, strength: f64| {
        vec![Condition { strength, ..Condition::new(pictures(1, value), frame) }]
    };
    let mut seen = std::collections::BTreeSet::new();
    for conditions in
        [vec![], one(0.2, 0, 1.0), one(0.9, 0, 1.0), one(0.2, 8, 1.0), one(0.2, 9, 1.0), one(0.2, 8, 0.5)]
    {
        let request = request(&*pipeline, conditions);
        let commitment = pipeline.commitment(&request).unwrap().conditioning;
        let last = *pipeline.generate(&request, &mut Silent).unwrap().step_hashes.last().unwrap();
        assert!(seen.insert(commitment) && seen.insert(last), "{:?}", request.conditions);
    }
    let noisier = GenerateRequest { condition_noise_scale: 0.5, ..request(&*pipeline, one(0.2, 0, 1.0)) };
    assert!(seen.insert(pipeline.commitment(&noisier).unwrap().conditioning));
}

#[test]
fn motif_begins_with_the_picture_that_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let mut pipeline = open(folder.path());
    let defaults = pipeline.info().defaults;
    let made = pipeline.generate(&GenerateRequest::new("a blue square", &defaults), &mut Silent).unwrap();
    // A frame of a clip is a picture such as the model knows.
    let frame: Vec<f32> = made.frames.frame(8).unwrap().iter().map(|&v| f32::from(v) / 255.0).collect();
    let picture = Tensor::from_vec(frame, (1, 64, 64, 3), &Device::Cpu).unwrap();
    let picture = picture.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
    let error = |conditions: Vec<Condition>, pipeline: &mut dyn Pipeline| {
        let request =
            GenerateRequest { conditions, seed: 3, ..GenerateRequest::new("a red circle", &defaults) };
        let first = pipeline.generate(&request, &mut Silent).unwrap().frames.frame(0).unwrap().to_vec();
        let wanted = made.frames.frame(8).unwrap();
        let squares = first.iter().zip(wanted).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum::<f64>();
        (squares / wanted.len() as f64).sqrt()
    };
    let with = error(vec![Condition::new(picture, 0)], &mut *pipeline);
    let without = error(vec![], &mut *pipeline);
    assert!(with < 12.0 && without > 3.0 * with, "off by {with} with the picture, {without} without");
}

#[test]
fn pictures_that_do_not_fit_are_refused_with_the_reason() {
    let pipeline = open(&golden("ltx-video-0.9.5"));
    let refused = |pipeline: &dyn Pipeline, condition: Condition| {
        pipeline.check(&request(pipeline, vec![condition])).unwrap_err().to_string()
    };
    let whole = Condition::new(pictures(1, 0.5), 0);
    let late = Condition { frame: 17, ..whole.clone() };
    assert!(refused(&*pipeline, late).contains("frame of a picture is 17: the clip does not reach it"));
    for strength in [-0.1, 1.1, f64::NAN] {
        let text = refused(&*pipeline, Condition { strength, ..whole.clone() });
        assert!(text.contains("strength of a picture"), "{text}");
    }
    let flat = Condition::new(Tensor::zeros((1, 3, 32, 32), DType::F32, &Device::Cpu).unwrap(), 0);
    assert!(refused(&*pipeline, flat).contains("a picture has shape [1, 3, 32, 32]"));
    let none = Condition::new(Tensor::zeros((0, 3, 32, 64), DType::F32, &Device::Cpu).unwrap(), 0);
    assert!(refused(&*pipeline, none).contains("a picture has shape [0, 3, 32, 64]"));
    assert!(refused(&*open(&golden("wan2.1")), whole).contains("wan takes no picture"));
}

#[test]
fn each_form_of_wan_says_which_pictures_it_needs() {
    let wan = |name: &str| {
        let pipeline = open(&golden(name));
        move |frames: &[usize]| {
            let conditions = frames.iter().map(|&frame| Condition::new(pictures(1, 0.4), frame)).collect();
            pipeline.check(&request(&*pipeline, conditions)).err().map(|error| error.to_string())
        }
    };
    let first = wan("wan2.1-i2v");
    assert!(first(&[]).unwrap().contains("wan needs a picture to begin with"));
    assert!(first(&[0]).is_none());
    assert!(first(&[0, 16]).unwrap().contains("takes one picture, fully, which a clip begins with"));
    let both = wan("wan2.1-flf2v");
    for frames in [&[][..], &[0], &[0, 8]] {
        assert!(both(frames).unwrap().contains("needs a picture to begin with and one to end with"));
    }
    assert!(both(&[0, 16]).is_none());
    let ends = wan("wan2.2-i2v-a14b");
    assert!(ends(&[0]).is_none() && ends(&[0, 16]).is_none());
    assert!(ends(&[16]).unwrap().contains("takes one picture that a clip begins with and one"));
    let pipeline = open(&golden("wan2.2-ti2v-5b"));
    let large = Condition::new(Tensor::zeros((1, 3, 64, 96), DType::F32, &Device::Cpu).unwrap(), 0);
    for conditions in [vec![], vec![large]] {
        let request = GenerateRequest { width: 96, height: 64, ..request(&*pipeline, conditions) };
        pipeline.check(&request).unwrap();
    }
}

#[test]
fn a_folder_whose_parts_disagree_about_pictures_is_refused() {
    use serde_json::json;
    let cases = [
        ("model_index.json", "_class_name", json!("WanPipeline"), "in_channels is 12: WanPipeline reads 4"),
        ("transformer/config.json", "image_dim", json!(24), "image_dim is 24: the image encoder's states"),
        ("transformer/config.json", "added_kv_proj_dim", json!(null), "added_kv_proj_dim is None"),
        ("transformer/config.json", "pos_embed_seq_len", json!(36), "two pictures have 34 tokens"),
        ("image_encoder/config.json", "hidden_act", json!("relu"), "hidden_act is relu"),
        ("image_encoder/config.json", "patch_size", json!(0), "patch_size is 0"),
        ("image_processor/preprocessor_config.json", "resample", json!(2), "resample is 2"),
        (
            "image_processor/preprocessor_config.json",
            "do_center_crop",
            json!(false),
            "do_center_crop is false",
        ),
        (
            "image_processor/preprocessor_config.json",
            "crop_size",
            json!({"height": 14, "width": 28}),
            "crop_size is [14, 28]",
        ),
    ];
    for (file, key, value, said) in cases {
        let error = error_of(&golden("wan2.1-i2v"), file, key, value);
        assert!(error.contains(said), "{key}: {error}");
    }
}

#[test]
fn a_model_without_an_encoder_says_so_and_makes_clips_from_words() {
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let file = folder.path().join("vae/diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    tensors.retain(|name, _| !name.starts_with("encoder."));
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let mut pipeline = open(folder.path());
    let mut request = GenerateRequest::new("a blue square", &pipeline.info().defaults);
    request.steps = 1;
    pipeline.generate(&request, &mut Silent).unwrap();
    let picture = Tensor::zeros((1, 3, 64, 64), DType::F32, &Device::Cpu).unwrap();
    request.conditions = vec![Condition::new(picture, 0)];
    let error = pipeline.check(&request).unwrap_err();
    assert!(
        error.to_string().contains("ltx-video takes no picture, and one was given: its autoencoder has no")
    );
    assert_eq!(error.code(), "image");
}

#[test]
fn steps_that_pictures_reach_into_are_not_audited_alone() {
    let mut pipeline = open(&golden("ltx-video-0.9.0"));
    let request = request(&*pipeline, vec![Condition::new(pictures(1, 0.2), 0)]);
    let start = pipeline.start(&request).unwrap();
    assert_eq!(pipeline.transition(&request, 0, &start).unwrap_err().code(), "not_auditable");
}

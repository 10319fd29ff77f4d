//! Pyramid Flow from the outside: units and stages, resumes, previews, cancels, requests and folders that are refused.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use kinoflock_inference::models::pyramid::PyramidPipeline;
use kinoflock_inference::pipeline::run::decoded;
use kinoflock_inference::{
    Checkpoint, DType, Device, Error, GenerateRequest, LoadOptions, Observer, Phase, Pipeline, Silent, Tensor,
};
use serde_json::json;

#[path = "support/tiny.rs"]
mod tiny;

use tiny::{
    Watch, assert_cancels, assert_foreign, assert_halves_near, assert_resumes, edit, load_error, mean, open,
};

const NAME: &str = "pyramid-flow-miniflux";
/// 3 stages: one step each in the first unit and two in the later one.
const STEPS: usize = 9;

fn golden() -> PathBuf {
    tiny::golden(NAME)
}

fn request(pipeline: &dyn Pipeline) -> GenerateRequest {
    let mut request = tiny::request(pipeline, (128, 64, 9, 10));
    request.stage_steps = Some([vec![1; 3], vec![2; 3]]);
    request
}

fn copied() -> tempfile::TempDir {
    tiny::copied(&golden())
}

#[test]
fn a_folder_without_an_index_is_known_by_its_parts() {
    let info = open(&golden()).info().clone();
    assert_eq!((info.architecture.as_str(), info.size_multiple, info.token_limit), ("pyramid-flow", 64, 128));
    assert_eq!((info.defaults.width, info.defaults.height, info.defaults.steps), (640, 384, 10));
    assert_eq!((info.frame_rule.multiple, info.frame_rule.offset), (8, 1));
    let folder = copied();
    let config = folder.path().join("diffusion_transformer_384p/config.json");
    edit(&config, |config| config["_class_name"] = json!("PyramidDiffusionXL"));
    let error = load_error(folder.path());
    assert_eq!(error.code(), "unknown_architecture");
    assert!(error.to_string().contains("PyramidDiffusionXL"), "{error}");
    std::fs::remove_dir_all(folder.path().join("diffusion_transformer_384p")).unwrap();
    assert!(load_error(folder.path()).to_string().contains("model_index.json"));
}

#[test]
fn one_of_several_transformers_is_taken_by_name_or_the_largest() {
    let folder = copied();
    let small = folder.path().join("diffusion_transformer_384p");
    let large = folder.path().join("diffusion_transformer_768p");
    std::fs::create_dir(&large).unwrap();
    for entry in std::fs::read_dir(&small).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), large.join(entry.file_name())).unwrap();
    }
    assert_eq!(open(folder.path()).info().defaults.width, 1280);
    let extras = folder.path().join("kinoflock.json");
    std::fs::write(&extras, json!({"transformer": "diffusion_transformer_384p"}).to_string()).unwrap();
    assert_eq!(open(folder.path()).info().defaults.width, 640);
    std::fs::write(&extras, json!({"transformer": "diffusion_transformer_8k"}).to_string()).unwrap();
    assert!(load_error(folder.path()).to_string().contains("diffusion_transformer_8k"));
}

#[test]
fn one_seed_makes_one_clip_and_another_seed_another() {
    let mut pipeline = open(&golden());
    let mut request = request(&*pipeline);
    let first = pipeline.generate(&request, &mut Silent).unwrap();
    let again = open(&golden()).generate(&request, &mut Silent).unwrap();
    assert_eq!((&first.step_hashes, &first.frames), (&again.step_hashes, &again.frames));
    assert_eq!((first.frames.width, first.frames.height, first.frames.count), (128, 64, 9));
    assert_eq!((first.latents.dims(), first.steps_done), (&[1, 4, 2, 8, 16][..], STEPS));
    request.seed = 8;
    assert_ne!(pipeline.generate(&request, &mut Silent).unwrap().step_hashes[0], first.step_hashes[0]);
}

#[test]
fn steps_go_through_the_stages_of_each_unit_and_previews_grow() {
    let mut pipeline = open(&golden());
    let mut request = request(&*pipeline);
    request.preview_every = 1;
    let mut watch = Watch::default();
    pipeline.generate(&request, &mut watch).unwrap();
    assert_eq!(watch.phases, [Phase::Text, Phase::Step, Phase::Decode]);
    // After a stage's last step the latents are those that the next stage begins with.
    let shape = |latents: &Tensor| latents.dims()[2..].to_vec();
    let sizes: Vec<_> = watch.latents.iter().map(shape).collect();
    let (small, middle, large) = ([1, 2, 4], [1, 4, 8], [1, 8, 16]);
    assert_eq!(sizes, [middle, large, small, small, middle, middle, large, large, [2, 8, 16]]);
    assert_eq!(watch.total, STEPS);
    assert!((watch.sigmas[2] - 1.0).abs() < 1e-6 && watch.sigmas[STEPS - 1] == 0.0, "{:?}", watch.sigmas);
    let shown: Vec<_> = watch.previews.iter().map(|p| (p.width, p.height, p.count)).collect();
    assert_eq!(shown[..3], [(16, 8, 1); 3]);
    assert_eq!(shown[3..], [(16, 8, 2); 6]);
    // The published numbers: twice the steps for the first unit.
    let usual = GenerateRequest { stage_steps: None, steps: 1, ..request };
    assert_eq!(pipeline.generate(&usual, &mut Silent).unwrap().step_hashes.len(), 3 * 2 + 3);
}

#[test]
fn a_cancel_stops_before_the_next_step_and_within_a_decode_in_pieces() {
    let mut pipeline = open(&golden());
    let mut request = request(&*pipeline);
    assert_cancels(&mut *pipeline, &request, STEPS);
    /// Wants to stop at the n-th question during the decode.
    struct Impatient(std::cell::Cell<usize>, bool);
    impl Observer for Impatient {
        fn phase(&mut self, phase: Phase) {
            self.1 = phase == Phase::Decode;
        }
        fn cancelled(&self) -> bool {
            self.0.set(self.0.get() - usize::from(self.1));
            self.0.get() == 0
        }
    }
    request.frames = 25;
    request.decode.chunk = Some(8);
    let stopped = pipeline.generate(&request, &mut Impatient(3.into(), false)).unwrap_err();
    assert_eq!(stopped.code(), "cancelled");
}

#[test]
fn a_run_goes_on_from_any_checkpoint_bit_for_bit() {
    let mut pipeline = open(&golden());
    let request = GenerateRequest { frames: 17, ..request(&*pipeline) };
    let (_, checkpoints) = assert_resumes(&mut *pipeline, &request);
    assert_eq!(checkpoints.len(), 14);
    for checkpoint in &checkpoints {
        let units = checkpoint.memory.get("units").map(|units| units.dim(2).unwrap());
        let done = checkpoint.steps_done;
        assert_eq!(units, if done < 3 { None } else { Some(1 + (done - 3) / 6) });
    }
    let late = checkpoints[10].clone();
    let mut resumed = |checkpoint: Checkpoint| {
        let request = GenerateRequest { resume: Some(checkpoint), ..request.clone() };
        pipeline.generate(&request, &mut Silent).unwrap_err().code()
    };
    let without = Checkpoint { memory: Default::default(), ..late.clone() };
    assert_eq!(resumed(without), "checkpoint");
    let mut wrong = late.clone();
    let part = wrong.memory["units"].narrow(3, 0, 4).unwrap();
    wrong.memory.insert("units".to_owned(), part);
    assert_eq!(resumed(wrong), "latent_shape");
    let others = [
        GenerateRequest { seed: 8, ..request.clone() },
        GenerateRequest { later_guidance: Some(2.0), ..request.clone() },
        GenerateRequest { stage_steps: Some([vec![1; 3], vec![1; 3]]), ..request },
    ];
    assert_foreign(&mut *pipeline, &late, &others);
}

#[test]
fn what_cannot_be_made_is_refused_with_the_nearest_that_can() {
    let pipeline = open(&golden());
    let good = request(&*pipeline);
    let refused = tiny::refusals(&*pipeline, &good);
    assert_eq!(
        refused(&|r| r.width = 360),
        "width 360 cannot be made: it must be a multiple of 64; the nearest is 384"
    );
    assert_eq!(
        refused(&|r| r.frames = 24),
        "24 frames cannot be made: the count must be 8k+1; the nearest is 25"
    );
    assert!(refused(&|r| r.timesteps = Some(vec![900.0, 400.0])).starts_with("timesteps is 2:"));
    assert!(refused(&|r| r.stage_steps = Some([vec![1; 3], vec![1; 2]])).starts_with("stage_steps is 2:"));
    assert!(refused(&|r| r.stage_steps = Some([vec![1, 0, 1], vec![1; 3]])).starts_with("stage_steps is 0:"));
    assert!(
        refused(&|r| r.stage_steps = Some([vec![90_000; 3], vec![1; 3]])).starts_with("steps is 270003:")
    );
    assert!(refused(&|r| (r.stage_steps, r.steps) = (None, 100_000)).starts_with("steps is 900000:"));
    assert!(refused(&|r| r.later_guidance = Some(f64::NAN)).starts_with("later_guidance is NaN:"));
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    assert!(refused(&|r| r.initial_latents = Some(zeros(&[1, 4, 1, 8, 16]))).contains("initial_latents"));
    assert!(refused(&|r| r.step_noise = vec![zeros(&[1, 4, 1, 4, 8])]).starts_with("step_noise is 1:"));
    assert!(refused(&|r| r.step_noise = vec![zeros(&[1, 4, 1, 4, 8]); 4]).contains("[1, 4, 1, 8, 16]"));
    for frames in [1, 9, 241] {
        assert!(pipeline.check(&GenerateRequest { frames, ..good.clone() }).is_ok());
    }
}

#[test]
fn a_prompt_counts_with_what_is_put_behind_it() {
    let mut pipeline = open(&golden());
    let bare = pipeline.count_tokens("").unwrap();
    assert!(bare > 8, "{bare}");
    let prompt = "fog ".repeat(200);
    let mut request = GenerateRequest { prompt, ..request(&*pipeline) };
    match pipeline.check(&request).unwrap_err() {
        Error::PromptTooLong { limit: 128, cut_text, .. } => assert!(cut_text.ends_with("Ultra HD, 8K")),
        other => panic!("{other}"),
    }
    request.truncate_prompt = true;
    pipeline.generate(&request, &mut Silent).unwrap();
}

#[test]
fn noise_that_is_given_and_noise_from_the_seed_are_used_alike() {
    let mut pipeline = open(&golden());
    let request = request(&*pipeline);
    let first = pipeline.generate(&request, &mut Silent).unwrap();
    let given = Tensor::ones((1, 4, 2, 8, 16), DType::F32, &Device::Cpu).unwrap();
    let given = GenerateRequest { initial_latents: Some(given), ..request.clone() };
    assert_ne!(pipeline.generate(&given, &mut Silent).unwrap().step_hashes[0], first.step_hashes[0]);
    let zeros = |shape: [usize; 5]| Tensor::zeros(&shape, DType::F32, &Device::Cpu).unwrap();
    let step_noise = [[1, 4, 1, 4, 8], [1, 4, 1, 8, 16]].repeat(2).into_iter().map(zeros).collect();
    let calm = GenerateRequest { step_noise, ..request };
    assert_ne!(pipeline.generate(&calm, &mut Silent).unwrap().step_hashes[0], first.step_hashes[0]);
}

#[test]
fn one_frame_no_guidance_and_full_rescale_give_finite_frames() {
    let mut pipeline = open(&golden());
    let good = request(&*pipeline);
    for request in [
        GenerateRequest { frames: 1, ..good.clone() },
        GenerateRequest { guidance: 1.0, ..good.clone() },
        GenerateRequest { guidance: 1.0, later_guidance: Some(4.0), ..good.clone() },
        GenerateRequest { guidance_rescale: 1.0, ..good },
    ] {
        let made = pipeline.generate(&request, &mut Silent).unwrap();
        assert_eq!(made.frames.count, request.frames);
    }
}

#[test]
fn half_types_stay_near_f32() {
    let mut pipeline = open(&golden());
    let request = request(&*pipeline);
    let exact = pipeline.generate(&request, &mut Silent).unwrap();
    assert_halves_near(&golden(), &request, &exact.latents, 0.1 * mean(&exact.latents));
}

#[test]
fn runs_of_frames_give_the_whole_decode_and_tiles_nearly() {
    let pipeline = PyramidPipeline::load(&golden(), &LoadOptions::default()).unwrap();
    let mut request = request(&pipeline);
    let latents = Tensor::arange(0f32, 4.0 * 4.0 * 128.0, &Device::Cpu).unwrap().sin().unwrap();
    let latents = latents.reshape((1, 4, 4, 8, 16)).unwrap();
    let whole = decoded(&pipeline, &request, &latents).unwrap();
    assert_eq!(whole.dims(), [25, 3, 64, 128]);
    let mut difference = |tile, chunk| {
        (request.decode.tile, request.decode.chunk) = (tile, chunk);
        let made = decoded(&pipeline, &request, &latents).unwrap();
        let difference = (made - &whole).unwrap().abs().unwrap();
        let largest = difference.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        (largest, difference.mean_all().unwrap().to_scalar::<f32>().unwrap())
    };
    for chunk in [1, 8, 16, 1000] {
        assert!(difference(None, Some(chunk)).0 < 1e-5);
    }
    assert_eq!(difference(Some(256), None).0, 0.0);
    assert!(difference(Some(64), Some(8)).1 < 0.1);
}

#[test]
fn a_step_alone_cannot_be_audited_but_the_frames_can_be_made_again() {
    let mut pipeline = open(&golden());
    let request = request(&*pipeline);
    let made = pipeline.generate(&request, &mut Silent).unwrap();
    let start = pipeline.start(&request).unwrap();
    assert_eq!(start.dims(), [1, 4, 1, 2, 4]);
    assert_eq!(pipeline.transition(&request, 0, &start).unwrap_err().code(), "not_auditable");
    assert_eq!(pipeline.commitment(&request).unwrap().samplers.len(), STEPS + 1);
    assert_eq!(pipeline.frames(&request, &made.latents).unwrap(), made.frames);
}

#[test]
fn configuration_values_that_are_not_known_are_named() {
    let transformer = "diffusion_transformer_384p/config.json";
    let vae = "causal_video_vae/config.json";
    let cases = [
        (transformer, "patch_size", json!(2)),
        (transformer, "use_temporal_causal", json!(false)),
        (transformer, "interp_condition_pos", json!(false)),
        (transformer, "axes_dims_rope", json!([4, 6, 8])),
        (transformer, "in_channels", json!(18)),
        (transformer, "in_channels", json!(64)),
        (transformer, "pooled_projection_dim", json!(24)),
        (transformer, "joint_attention_dim", json!(64)),
        (transformer, "num_single_layers", json!(0)),
        (transformer, "guidance_embeds", json!(true)),
        (vae, "_class_name", json!("AutoencoderKL")),
        (vae, "encoder_act_fn", json!("gelu")),
        (vae, "decoder_type", json!("vae_conv")),
        (vae, "interpolate", json!(true)),
        (vae, "add_post_quant_conv", json!(false)),
        (vae, "decoder_up_block_types", json!(["UpDecoderBlock2D"])),
        (vae, "decoder_layers_per_block", json!([1, 1, 1])),
        (vae, "decoder_norm_num_groups", json!(5)),
        (vae, "decoder_temporal_up_sample", json!([true, true, false, false])),
        (vae, "shift_factor", json!(0.5)),
        ("text_encoder/config.json", "hidden_act", json!("relu")),
        ("text_encoder/config.json", "model_type", json!("bert")),
        ("text_encoder_2/config.json", "feed_forward_proj", json!("gated-mish")),
    ];
    for (file, key, value) in cases {
        let error = tiny::error_of(&golden(), file, key, value);
        assert!(error.contains(file) && error.contains(key), "{file} {key}: {error}");
    }
    let settings = [
        ("gamma", json!({"scheduler": {"gamma": 0.9}})),
        ("frames_per_unit", json!({"frames_per_unit": 0})),
        ("later_frames.scale", json!({"later_frames": {"shift": 0.0, "scale": 0.0}})),
    ];
    for (key, value) in settings {
        let folder = copied();
        std::fs::write(folder.path().join("kinoflock.json"), json!({"pyramid": value}).to_string()).unwrap();
        let error = load_error(folder.path()).to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
    for file in ["vocab.json", "merges.txt"] {
        let folder = copied();
        std::fs::write(folder.path().join("tokenizer").join(file), "{\nx").unwrap();
        assert!(load_error(folder.path()).to_string().contains(file));
    }
}

#[test]
fn units_of_several_frames_are_made_and_counted() {
    let folder = copied();
    let settings = json!({"pyramid": {"frames_per_unit": 2}});
    std::fs::write(folder.path().join("kinoflock.json"), settings.to_string()).unwrap();
    let mut pipeline = open(folder.path());
    let mut request = request(&*pipeline);
    assert!(pipeline.check(&request).unwrap_err().to_string().contains("16k+1"));
    request.frames = 49;
    let made = pipeline.generate(&request, &mut Silent).unwrap();
    assert_eq!(made.frames.count, 49);
    assert_eq!(made.step_hashes.len(), 3 + 3 * 6);
}

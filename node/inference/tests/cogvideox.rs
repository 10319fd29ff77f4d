//! CogVideoX from the outside: seeds, cancels, checkpoints of a sampler that remembers and draws noise, previews, sizes,
//! tiles, and each error's text.
#![allow(clippy::unwrap_used)]

use kinoflock_inference::audit::frames_deviation;
use kinoflock_inference::{
    Condition, DType, Device, Error, GenerateRequest, Observer, Phase, Pipeline, Silent, Tensor,
};

#[path = "support/tiny.rs"]
mod tiny;

use tiny::{
    Watch, assert_cancels, assert_foreign, assert_halves_near, assert_resumes, error_of, golden, refusals,
};

const FORMS: [&str; 3] = ["cogvideox-2b", "cogvideox-5b", "cogvideox-1.5"];

fn open(name: &str) -> Box<dyn Pipeline> {
    tiny::open(&golden(name))
}

fn request(pipeline: &dyn Pipeline) -> GenerateRequest {
    tiny::request(pipeline, (48, 32, 9, 4))
}

#[test]
fn one_seed_makes_one_clip_and_another_seed_another() {
    for name in FORMS {
        let mut pipeline = open(name);
        let mut request = request(&*pipeline);
        let first = pipeline.generate(&request, &mut Silent).unwrap();
        let again = open(name).generate(&request, &mut Silent).unwrap();
        assert_eq!(first.step_hashes, again.step_hashes);
        assert_eq!(first.frames, again.frames);
        assert_eq!((first.frames.width, first.frames.height, first.frames.count), (48, 32, 9));
        // What fills up a token of two latent frames is not part of the result.
        assert_eq!(first.latents.dims(), [1, 4, 3, 4, 6]);
        request.seed = 8;
        let other = pipeline.generate(&request, &mut Silent).unwrap();
        assert_ne!(first.step_hashes[0], other.step_hashes[0]);
    }
}

#[test]
fn a_run_goes_on_from_any_checkpoint_bit_for_bit() {
    for name in FORMS {
        let mut pipeline = open(name);
        let request = GenerateRequest { dynamic_guidance: true, ..request(&*pipeline) };
        let (_, checkpoints) = assert_resumes(&mut *pipeline, &request);
        assert_eq!(checkpoints.len(), 3);
        for checkpoint in &checkpoints {
            let remembered: Vec<_> = checkpoint.memory.keys().map(String::as_str).collect();
            assert_eq!(remembered, if name == "cogvideox-2b" { vec![] } else { vec!["earlier"] });
        }
        let other = GenerateRequest { dynamic_guidance: false, ..request };
        assert_foreign(&mut *pipeline, &checkpoints[0], &[other]);
    }
}

#[test]
fn a_cancel_stops_before_the_next_step_and_between_the_runs_of_a_decode() {
    let mut pipeline = open("cogvideox-5b");
    let request = GenerateRequest { frames: 17, ..request(&*pipeline) };
    assert_cancels(&mut *pipeline, &request, 4);
    /// Wants to stop once it was asked twice during the decode.
    #[derive(Default)]
    struct Late {
        decodes: bool,
        asked: std::cell::Cell<usize>,
    }
    impl Observer for Late {
        fn phase(&mut self, phase: Phase) {
            self.decodes = phase == Phase::Decode;
        }
        fn cancelled(&self) -> bool {
            self.asked.set(self.asked.get() + usize::from(self.decodes));
            self.asked.get() > 2
        }
    }
    let mut late = Late::default();
    match pipeline.generate(&request, &mut late) {
        Err(Error::Cancelled { steps_done: 4, steps: 4 }) => {}
        other => panic!("{other:?}"),
    }
    // Once before the decode, once before each of its two runs.
    assert_eq!(late.asked.get(), 3);
}

#[test]
fn previews_have_a_pixel_a_cell_and_leave_out_what_fills_up() {
    for name in FORMS {
        let mut pipeline = open(name);
        let request = GenerateRequest { preview_every: 2, ..request(&*pipeline) };
        let mut watch = Watch::default();
        pipeline.generate(&request, &mut watch).unwrap();
        let sizes: Vec<_> = watch.previews.iter().map(|p| (p.width, p.height, p.count)).collect();
        assert_eq!(sizes, [(6, 4, 3); 2]);
        assert!(watch.sigmas.iter().all(|sigma| (0.0..=1.0).contains(sigma)), "{:?}", watch.sigmas);
        assert_eq!(watch.phases, [Phase::Text, Phase::Step, Phase::Decode]);
    }
}

#[test]
fn what_cannot_be_made_is_refused_with_the_nearest_that_can() {
    let pipeline = open("cogvideox-1.5");
    let good = request(&*pipeline);
    let refused = refusals(&*pipeline, &good);
    assert_eq!(
        refused(&|r| r.width = 100),
        "width 100 cannot be made: it must be a multiple of 16; the nearest is 96"
    );
    assert_eq!(
        refused(&|r| r.frames = 12),
        "12 frames cannot be made: the count must be 8k+1; the nearest is 9"
    );
    assert_eq!(
        refused(&|r| r.frames = 0),
        "0 frames cannot be made: the count must be 8k+1; the nearest is 1"
    );
    assert_eq!(
        refused(&|r| r.width = 176),
        "width is 176: the model has no positions for so large a picture"
    );
    assert!(refused(&|r| r.steps = 1001).contains("1001 steps are too many: the model has 1000"));
    assert!(refused(&|r| r.timesteps = Some(vec![999.0, 500.0])).contains("its own timesteps"));
    assert!(refused(&|r| r.steps = 0).contains("steps is 0"));
    let noise = Tensor::zeros((1, 4, 4, 4, 6), DType::F32, &Device::Cpu).unwrap();
    assert!(refused(&|r| r.step_noise = vec![noise.clone(); 5]).contains("number of step_noise is 5"));
    let flat = noise.flatten_all().unwrap();
    assert!(refused(&|r| r.step_noise = vec![flat.clone(); 6]).contains("step_noise has shape"));
    for frames in [1, 9, 17, 81] {
        assert!(pipeline.check(&GenerateRequest { frames, ..good.clone() }).is_ok());
    }
}

#[test]
fn one_step_one_frame_and_no_guidance_give_finite_frames() {
    for name in FORMS {
        let mut pipeline = open(name);
        let good = request(&*pipeline);
        for request in [
            GenerateRequest { steps: 1, ..good.clone() },
            GenerateRequest { guidance: 1.0, ..good.clone() },
            GenerateRequest { guidance_rescale: 0.7, ..good.clone() },
            GenerateRequest { frames: 1, steps: 3, ..good },
        ] {
            let made = pipeline.generate(&request, &mut Silent).unwrap();
            assert_eq!(made.frames.count, request.frames);
        }
    }
}

#[test]
fn latents_that_are_given_are_used_as_a_volume_or_as_the_model_keeps_them() {
    let mut pipeline = open("cogvideox-2b");
    let mut request = request(&*pipeline);
    let volume = Tensor::arange(0f32, 288.0, &Device::Cpu).unwrap().reshape((1, 4, 3, 4, 6)).unwrap();
    let volume = (volume / 288.0).unwrap();
    request.initial_latents = Some(volume.clone());
    let first = pipeline.generate(&request, &mut Silent).unwrap();
    let own = volume.transpose(1, 2).unwrap().contiguous().unwrap();
    assert_eq!(pipeline.start(&request).unwrap().dims(), own.dims());
    request.initial_latents = Some(own);
    let second = pipeline.generate(&request, &mut Silent).unwrap();
    assert_eq!(first.step_hashes, second.step_hashes);
    request.initial_latents = Some(volume.narrow(2, 0, 2).unwrap());
    assert_eq!(pipeline.generate(&request, &mut Silent).unwrap_err().code(), "latent_shape");
}

#[test]
fn a_step_of_its_samplers_says_that_it_cannot_be_audited() {
    for name in FORMS {
        let mut pipeline = open(name);
        let request = request(&*pipeline);
        let start = pipeline.start(&request).unwrap();
        let error = pipeline.transition(&request, 0, &start).unwrap_err();
        assert_eq!(error.code(), "not_auditable");
        assert!(error.to_string().contains("cogvideox"), "{error}");
        assert_eq!(pipeline.commitment(&request).unwrap().samplers.len(), 5);
        let mut watch = Watch::default();
        let made = pipeline.generate(&request, &mut watch).unwrap();
        assert_eq!(
            made.start_hash,
            *blake3::hash(&kinoflock_inference::sampler::checkpoint::latents_bytes(&start).unwrap())
                .as_bytes()
        );
    }
}

#[test]
fn a_tiled_decode_is_near_the_whole_one() {
    let mut pipeline = open("cogvideox-2b");
    let mut request = GenerateRequest { width: 160, height: 96, steps: 2, ..request(&*pipeline) };
    let whole = pipeline.generate(&request, &mut Silent).unwrap();
    request.decode.tile = Some(80);
    let tiled = pipeline.generate(&request, &mut Silent).unwrap();
    assert_eq!(whole.step_hashes, tiled.step_hashes);
    assert_eq!((tiled.frames.width, tiled.frames.height, tiled.frames.count), (160, 96, 9));
    let deviation = frames_deviation(&whole.frames, &tiled.frames);
    assert!(deviation > 0.0 && deviation < 40.0, "{deviation}");
    request.decode.tile = Some(1000);
    assert_eq!(pipeline.generate(&request, &mut Silent).unwrap().frames, whole.frames);
}

#[test]
fn half_types_stay_near_f32() {
    let mut pipeline = open("cogvideox-5b");
    let request = GenerateRequest { steps: 2, ..request(&*pipeline) };
    let exact = pipeline.generate(&request, &mut Silent).unwrap();
    assert_halves_near(&golden("cogvideox-5b"), &request, &exact.latents, 0.1);
}

#[test]
fn a_clip_begins_with_a_picture_where_the_model_takes_one() {
    for name in ["cogvideox-5b-i2v", "cogvideox-1.5-i2v"] {
        let mut pipeline = open(name);
        let without = request(&*pipeline);
        let error = pipeline.check(&without).unwrap_err();
        assert_eq!(error.code(), "image");
        assert!(error.to_string().contains("needs a picture"), "{error}");
        let picture =
            |value: f32| vec![Condition::new(Tensor::full(value, (1, 3, 32, 48), &Device::Cpu).unwrap(), 0)];
        let with = GenerateRequest { conditions: picture(0.2), checkpoint_every: 2, ..without };
        let mut watch = Watch::default();
        let whole = pipeline.generate(&with, &mut watch).unwrap();
        assert_eq!((whole.frames.count, whole.latents.dims()), (9, &[1, 4, 3, 4, 6][..]));
        let resume = watch.checkpoints.first().cloned();
        let resumed = GenerateRequest { resume: resume.clone(), ..with.clone() };
        assert_eq!(pipeline.generate(&resumed, &mut Silent).unwrap().step_hashes, whole.step_hashes);
        let other = GenerateRequest { conditions: picture(0.9), resume, ..with.clone() };
        assert_eq!(pipeline.generate(&other, &mut Silent).unwrap_err().code(), "checkpoint");
        let other = GenerateRequest { resume: None, ..other };
        assert_ne!(pipeline.generate(&other, &mut Silent).unwrap().step_hashes, whole.step_hashes);
        let with_pictures = |pictures: Vec<Condition>| {
            let other = GenerateRequest { conditions: pictures, ..with.clone() };
            pipeline.check(&other).unwrap_err().to_string()
        };
        let small = Tensor::zeros((1, 3, 16, 48), DType::F32, &Device::Cpu).unwrap();
        assert!(with_pictures(vec![Condition::new(small, 0)]).contains("a picture has shape [1, 3, 16, 48]"));
        let late = Condition { frame: 4, ..picture(0.2).remove(0) };
        assert!(with_pictures(vec![late]).contains("takes one picture, fully, which a clip begins with"));
    }
    let pipeline = open("cogvideox-5b");
    let pictures = Tensor::zeros((1, 3, 32, 48), DType::F32, &Device::Cpu).unwrap();
    let conditions = vec![Condition::new(pictures, 0)];
    let error = pipeline.check(&GenerateRequest { conditions, ..request(&*pipeline) }).unwrap_err();
    assert!(error.to_string().contains("takes no picture"), "{error}");
    let pipeline = open("cogvideox-5b-i2v");
    let pictures = Tensor::zeros((1, 3, 48, 48), DType::F32, &Device::Cpu).unwrap();
    let conditions = vec![Condition::new(pictures, 0)];
    let tall = GenerateRequest { conditions, height: 48, ..request(&*pipeline) };
    assert!(pipeline.check(&tall).unwrap_err().to_string().contains("positions for the size"));
}

#[test]
fn configuration_values_that_are_not_known_are_named() {
    use serde_json::json;
    let cases = [
        ("model_index.json", "vae", json!(["diffusers", "AutoencoderKLWan"]), "AutoencoderKLWan"),
        ("model_index.json", "scheduler", json!(["diffusers", "DDIMScheduler"]), "DDIMScheduler"),
        ("transformer/config.json", "activation_fn", json!("swiglu"), "swiglu"),
        ("transformer/config.json", "ofs_embed_dim", json!(512), "ofs_embed_dim"),
        ("transformer/config.json", "use_learned_positional_embeddings", json!(true), "pos_embedding"),
        ("transformer/config.json", "num_layers", json!(0), "num_layers"),
        ("transformer/config.json", "attention_head_dim", json!(12), "attention_head_dim"),
        ("transformer/config.json", "in_channels", json!(8), "in_channels"),
        ("transformer/config.json", "temporal_compression_ratio", json!(8), "temporal_compression_ratio"),
        ("transformer/config.json", "rope_type", json!("split"), "rope_type"),
        ("scheduler/scheduler_config.json", "_class_name", json!("PNDMScheduler"), "PNDMScheduler"),
        ("scheduler/scheduler_config.json", "beta_schedule", json!("linear"), "beta_schedule"),
        ("scheduler/scheduler_config.json", "prediction_type", json!("flow"), "prediction_type"),
        ("vae/config.json", "act_fn", json!("relu"), "relu"),
        ("vae/config.json", "use_quant_conv", json!(true), "use_quant_conv"),
        ("vae/config.json", "temporal_compression_ratio", json!(3), "temporal_compression_ratio"),
        ("vae/config.json", "norm_num_groups", json!(3), "block_out_channels"),
        ("vae/config.json", "up_block_types", json!(["CogVideoXUpBlock3D"]), "up_block_types"),
        ("vae/config.json", "latents_mean", json!([0.0]), "latents_mean"),
    ];
    for (file, key, value, said) in cases {
        let error = error_of(&golden("cogvideox-5b"), file, key, value);
        assert!(error.contains(said), "{file} {key}: {error}");
    }
}

#[test]
fn facts_and_defaults_come_from_the_folder() {
    let info = open("cogvideox-2b").info().clone();
    assert_eq!((info.architecture.as_str(), info.size_multiple), ("cogvideox", 16));
    assert_eq!((info.frame_rule.multiple, info.frame_rule.offset, info.token_limit), (8, 1, 16));
    let defaults = info.defaults;
    assert_eq!((defaults.width, defaults.height, defaults.frames, defaults.fps), (64, 48, 9, 8.0));
    let longer = open("cogvideox-1.5").info().defaults;
    assert_eq!((longer.width, longer.height, longer.frames, longer.fps), (1360, 768, 81, 16.0));
    assert_eq!(info.work.patch, [1, 2, 2]);
    assert!(info.work.transformer_parameters > 0 && info.work.vae_parameters > 0);
}

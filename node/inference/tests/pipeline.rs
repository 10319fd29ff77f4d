//! A pipeline from the outside: seeds, cancels, checkpoints, previews, layouts of weight files, and each error's text.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;

use kinoflock_inference::{
    Device, Error, GenerateRequest, LoadOptions, Phase, Pipeline, SecondPass, Silent, Tensor, load,
};

#[path = "support/tiny.rs"]
mod tiny;

use tiny::{
    Watch, assert_cancels, assert_foreign, assert_halves_near, assert_resumes, edit, golden, load_error,
    open, refusals,
};

fn request(pipeline: &dyn Pipeline) -> GenerateRequest {
    tiny::request(pipeline, (96, 32, 9, 4))
}

fn copied(name: &str) -> tempfile::TempDir {
    tiny::copied(&golden(name))
}

#[test]
fn one_seed_makes_one_clip_and_another_seed_another() {
    for name in ["ltx-video-0.9.0", "ltx-video-0.9.5"] {
        let mut pipeline = open(&golden(name));
        let mut request = request(&*pipeline);
        let first = pipeline.generate(&request, &mut Silent).unwrap();
        let again = open(&golden(name)).generate(&request, &mut Silent).unwrap();
        assert_eq!(first.step_hashes, again.step_hashes);
        assert_eq!(first.frames, again.frames);
        assert_eq!((first.frames.width, first.frames.height, first.frames.count), (96, 32, 9));
        assert_eq!(first.frames.data.len(), 96 * 32 * 9 * 3);
        assert_eq!((first.latents.dims(), first.steps_done), (&[1, 8, 2, 1, 3][..], 4));
        request.seed = 8;
        let other = pipeline.generate(&request, &mut Silent).unwrap();
        assert_ne!(first.step_hashes[0], other.step_hashes[0]);
    }
}

#[test]
fn the_observer_sees_phases_steps_and_previews() {
    let mut pipeline = open(&golden("ltx-video-0.9.0"));
    let mut request = request(&*pipeline);
    request.preview_every = 2;
    let mut watch = Watch::default();
    let made = pipeline.generate(&request, &mut watch).unwrap();
    assert_eq!(watch.phases, [Phase::Text, Phase::Step, Phase::Decode]);
    assert_eq!(watch.hashes, made.step_hashes);
    let sizes: Vec<_> = watch.previews.iter().map(|p| (p.width, p.height, p.count, p.data.len())).collect();
    assert_eq!(sizes, [(3, 1, 2, 18); 2]);
}

#[test]
fn a_cancel_stops_before_the_next_step_and_before_the_decode() {
    let mut pipeline = open(&golden("ltx-video-0.9.0"));
    let request = request(&*pipeline);
    assert_cancels(&mut *pipeline, &request, 4);
}

#[test]
fn a_run_goes_on_from_any_checkpoint_bit_for_bit() {
    let mut pipeline = open(&golden("ltx-video-0.9.5"));
    let request = request(&*pipeline);
    let (_, checkpoints) = assert_resumes(&mut *pipeline, &request);
    assert_eq!(checkpoints.len(), 3);
    let others = [
        GenerateRequest { seed: 8, ..request.clone() },
        GenerateRequest { prompt: "a blue dog".to_owned(), ..request.clone() },
        GenerateRequest { steps: 5, ..request },
    ];
    assert_foreign(&mut *pipeline, &checkpoints[0], &others);
}

#[test]
fn what_cannot_be_made_is_refused_with_the_nearest_that_can() {
    let pipeline = open(&golden("ltx-video-0.9.0"));
    let good = request(&*pipeline);
    let refused = refusals(&*pipeline, &good);
    assert_eq!(
        refused(&|r| r.width = 100),
        "width 100 cannot be made: it must be a multiple of 32; the nearest is 96"
    );
    assert_eq!(
        refused(&|r| r.height = 0),
        "height 0 cannot be made: it must be a multiple of 32; the nearest is 32"
    );
    assert_eq!(
        refused(&|r| r.frames = 0),
        "0 frames cannot be made: the count must be 8k+1; the nearest is 1"
    );
    assert_eq!(
        refused(&|r| r.frames = 24),
        "24 frames cannot be made: the count must be 8k+1; the nearest is 25"
    );
    assert_eq!(refused(&|r| r.steps = 0), "steps is 0: at least 1 step is needed");
    assert_eq!(refused(&|r| r.fps = f64::NAN), "fps is NaN: it must be above 0");
    assert_eq!(refused(&|r| r.guidance = f64::INFINITY), "guidance is inf: it must be a finite number");
    assert!(refused(&|r| r.timesteps = Some(vec![10.0, 20.0])).contains("timestep 1 is 20"));
    assert!(refused(&|r| r.timesteps = Some(vec![])).contains("at least 1 step"));
    for frames in [1, 9, 161] {
        assert!(pipeline.check(&GenerateRequest { frames, ..good.clone() }).is_ok());
    }
}

#[test]
fn a_prompt_that_is_too_long_says_how_many_tokens_and_what_would_be_cut() {
    let mut pipeline = open(&golden("ltx-video-0.9.0"));
    let long = "a small blue bird flying through fog and rain and snow over the old city street at night";
    let mut request = GenerateRequest { prompt: long.to_owned(), ..request(&*pipeline) };
    let tokens = pipeline.count_tokens(long).unwrap();
    match pipeline.check(&request).unwrap_err() {
        Error::PromptTooLong { tokens: said, limit, cut_text } => {
            assert_eq!((said, limit), (tokens, 16));
            assert!(!cut_text.is_empty() && long.ends_with(&cut_text), "{cut_text:?}");
            assert!(pipeline.count_tokens(&long[..long.len() - cut_text.len()]).unwrap() <= 16);
        }
        other => panic!("{other}"),
    }
    request.truncate_prompt = true;
    pipeline.generate(&request, &mut Silent).unwrap();
}

#[test]
fn latents_that_are_given_are_used_in_either_shape_and_others_are_refused() {
    let mut pipeline = open(&golden("ltx-video-0.9.0"));
    let mut request = request(&*pipeline);
    let volume = Tensor::arange(0f32, 48.0, &Device::Cpu).unwrap().reshape((1, 8, 2, 1, 3)).unwrap();
    let volume = (volume / 48.0).unwrap();
    request.initial_latents = Some(volume.clone());
    let first = pipeline.generate(&request, &mut Silent).unwrap();
    request.initial_latents = Some(volume.flatten_from(2).unwrap().transpose(1, 2).unwrap());
    let packed = pipeline.generate(&request, &mut Silent).unwrap();
    assert_eq!(first.step_hashes, packed.step_hashes);
    request.initial_latents = Some(volume.narrow(2, 0, 1).unwrap());
    assert_eq!(pipeline.generate(&request, &mut Silent).unwrap_err().code(), "latent_shape");
}

#[test]
fn one_step_and_no_guidance_and_full_rescale_give_finite_frames() {
    let mut pipeline = open(&golden("ltx-video-0.9.5"));
    let good = request(&*pipeline);
    for request in [
        GenerateRequest { steps: 1, ..good.clone() },
        GenerateRequest { guidance: 1.0, ..good.clone() },
        GenerateRequest { guidance_rescale: 1.0, ..good.clone() },
        GenerateRequest { timesteps: Some(vec![1000.0, 725.0, 0.03]), ..good.clone() },
        GenerateRequest { frames: 1, ..good },
    ] {
        let made = pipeline.generate(&request, &mut Silent).unwrap();
        assert_eq!(made.frames.count, request.frames);
    }
}

#[test]
fn half_types_stay_near_f32() {
    let folder = golden("ltx-video-0.9.5");
    let mut pipeline = open(&folder);
    let mut request = request(&*pipeline);
    request.steps = 2;
    let exact = pipeline.generate(&request, &mut Silent).unwrap();
    assert_halves_near(&folder, &request, &exact.latents, 0.1);
}

#[test]
fn a_tokenizer_from_spiece_model_alone_makes_the_same_clip() {
    for name in ["ltx-video-0.9.0", "ltx-video-0.9.5"] {
        let folder = copied(name);
        let mut pipeline = open(folder.path());
        let request = request(&*pipeline);
        let with = pipeline.generate(&request, &mut Silent).unwrap();
        std::fs::remove_file(folder.path().join("tokenizer/tokenizer.json")).unwrap();
        let without = open(folder.path()).generate(&request, &mut Silent).unwrap();
        assert_eq!(with.step_hashes, without.step_hashes);
    }
}

/// Splits a weight file into two shards with an index, with an infix where one is given.
fn shard(part: &Path, infix: &str) {
    let single = part.join("diffusion_pytorch_model.safetensors");
    let tensors = candle_core::safetensors::load(&single, &Device::Cpu).unwrap();
    let mut shards = [HashMap::new(), HashMap::new()];
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in tensors.into_iter().enumerate() {
        map.insert(name.clone(), shard_name(infix, index % 2).into());
        shards[index % 2].insert(name, tensor);
    }
    for (index, shard) in shards.iter().enumerate() {
        candle_core::safetensors::save(shard, part.join(shard_name(infix, index))).unwrap();
    }
    let dotted = if infix.is_empty() { String::new() } else { format!(".{infix}") };
    let index = part.join(format!("diffusion_pytorch_model.safetensors.index{dotted}.json"));
    std::fs::write(index, serde_json::json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    std::fs::remove_file(single).unwrap();
}

fn shard_name(infix: &str, index: usize) -> String {
    let dotted = if infix.is_empty() { String::new() } else { format!(".{infix}") };
    format!("diffusion_pytorch_model{dotted}-0000{}-of-00002.safetensors", index + 1)
}

#[test]
fn shards_and_infixes_load_like_a_single_file() {
    let reference = golden("ltx-video-0.9.0");
    let mut pipeline = open(&reference);
    let request = request(&*pipeline);
    let expected = pipeline.generate(&request, &mut Silent).unwrap().step_hashes;
    for infix in ["", "bf16", "fp16"] {
        let folder = copied("ltx-video-0.9.0");
        shard(&folder.path().join("transformer"), infix);
        assert_eq!(open(folder.path()).generate(&request, &mut Silent).unwrap().step_hashes, expected);
        let missing = folder.path().join("transformer").join(shard_name(infix, 1));
        std::fs::remove_file(&missing).unwrap();
        let error = load_error(folder.path());
        assert_eq!(error.code(), "weights_missing_shard");
        assert!(error.to_string().contains(missing.to_str().unwrap()), "{error}");
    }
    let folder = copied("ltx-video-0.9.0");
    let part = folder.path().join("transformer");
    let name = |infix: &str| part.join(format!("diffusion_pytorch_model{infix}.safetensors"));
    std::fs::rename(name(""), name(".custom")).unwrap();
    assert_eq!(load_error(folder.path()).code(), "weights_not_found");
    let options = LoadOptions { variant: Some("custom".to_owned()), ..LoadOptions::default() };
    assert!(load(folder.path(), &options).is_ok());
}

#[test]
fn weights_that_are_missing_cut_or_corrupt_are_named() {
    let folder = copied("ltx-video-0.9.0");
    let file = folder.path().join("transformer/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for length in [bytes.len() - 1, 300, 12, 3, 0] {
        std::fs::write(&file, &bytes[..length]).unwrap();
        let error = load_error(folder.path());
        assert_eq!(error.code(), "weights_truncated", "{error}");
        assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
    }
    let mut corrupt = bytes.clone();
    corrupt[8] = b'x';
    std::fs::write(&file, &corrupt).unwrap();
    assert_eq!(load_error(folder.path()).code(), "weights_corrupt");
    std::fs::write(&file, [&bytes[..], b"more"].concat()).unwrap();
    assert_eq!(load_error(folder.path()).code(), "weights_corrupt");

    std::fs::write(&file, &bytes).unwrap();
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let taken = tensors.remove("transformer_blocks.1.attn2.norm_k.weight").unwrap();
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let error = load_error(folder.path());
    let text = format!("tensor transformer_blocks.1.attn2.norm_k.weight is missing in {}", file.display());
    assert_eq!(error.to_string(), text);
    tensors.insert("transformer_blocks.1.attn2.norm_k.weight".to_owned(), taken.narrow(0, 0, 5).unwrap());
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let error = load_error(folder.path()).to_string();
    assert!(error.contains("transformer_blocks.1.attn2.norm_k.weight") && error.contains("[5]"), "{error}");

    std::fs::remove_file(&file).unwrap();
    let error = load_error(folder.path());
    assert_eq!(error.code(), "weights_not_found");
    assert!(error.to_string().contains("diffusion_pytorch_model.safetensors"), "{error}");
}

#[test]
fn configuration_values_that_are_not_known_are_named() {
    let cases = [
        ("model_index.json", "_class_name", serde_json::json!("SoraPipeline"), "SoraPipeline"),
        ("model_index.json", "vae", serde_json::json!(["diffusers", "AutoencoderKLWan"]), "AutoencoderKLWan"),
        ("transformer/config.json", "activation_fn", serde_json::json!("swiglu"), "swiglu"),
        ("transformer/config.json", "qk_norm", serde_json::json!("layer_norm"), "layer_norm"),
        ("transformer/config.json", "num_layers", serde_json::json!(0), "num_layers"),
        ("transformer/config.json", "rope_type", serde_json::json!("split"), "rope_type"),
        ("transformer/config.json", "cross_attention_dim", serde_json::json!(64), "cross_attention_dim"),
        (
            "scheduler/scheduler_config.json",
            "use_karras_sigmas",
            serde_json::json!(true),
            "use_karras_sigmas",
        ),
        ("scheduler/scheduler_config.json", "time_shift_type", serde_json::json!("cubic"), "cubic"),
        ("text_encoder/config.json", "feed_forward_proj", serde_json::json!("gated-mish"), "gated-mish"),
        ("text_encoder/config.json", "model_type", serde_json::json!("bert"), "bert"),
        ("vae/config.json", "downsample_type", serde_json::json!(3), "downsample_type"),
    ];
    for (file, key, value, said) in cases {
        let folder = copied("ltx-video-0.9.0");
        edit(&folder.path().join(file), |config| config[key] = value);
        let error = load_error(folder.path()).to_string();
        assert!(error.contains(said), "{file} {key}: {error}");
    }
    let folder = copied("ltx-video-0.9.0");
    std::fs::remove_file(folder.path().join("model_index.json")).unwrap();
    assert!(load_error(folder.path()).to_string().contains("model_index.json"));
    let folder = copied("ltx-video-0.9.0");
    std::fs::write(folder.path().join("vae/config.json"), "{").unwrap();
    assert!(load_error(folder.path()).to_string().contains("vae/config.json"));
    let folder = copied("ltx-video-0.9.0");
    std::fs::remove_file(folder.path().join("tokenizer/tokenizer.json")).unwrap();
    std::fs::write(folder.path().join("tokenizer/spiece.model"), b"\x0a\xff").unwrap();
    assert!(load_error(folder.path()).to_string().contains("spiece.model"));
    std::fs::remove_file(folder.path().join("tokenizer/spiece.model")).unwrap();
    assert_eq!(load_error(folder.path()).code(), "no_tokenizer");
}

#[test]
fn defaults_and_preview_factors_come_from_the_folder() {
    let folder = copied("ltx-video-0.9.0");
    let file = folder.path().join("kinoflock.json");
    let defaults =
        serde_json::json!({"width": 64, "height": 64, "frames": 17, "fps": 8.0, "steps": 3, "guidance": 2.0});
    std::fs::write(&file, serde_json::json!({"defaults": defaults}).to_string()).unwrap();
    let info = open(folder.path()).info().clone();
    assert_eq!((info.defaults.width, info.defaults.frames, info.defaults.steps), (64, 17, 3));
    assert_eq!((info.size_multiple, info.frame_rule.multiple, info.token_limit), (32, 8, 16));
    assert!(
        info.work.transformer_parameters > 0 && info.work.text_parameters > 0 && info.work.vae_parameters > 0
    );
    let wrong = serde_json::json!({"latent_rgb": {"factors": [[1.0, 0.0, 0.0]]}});
    std::fs::write(&file, wrong.to_string()).unwrap();
    assert!(load_error(folder.path()).to_string().contains("latent_rgb"));
}

/// Latents of a finished clip, of so many rows and columns.
fn finished(rows: usize, columns: usize) -> Option<Tensor> {
    let count = 8 * 2 * rows * columns;
    let values = (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect::<Vec<_>>();
    Some(Tensor::from_vec(values, (1, 8, 2, rows, columns), &Device::Cpu).unwrap())
}

#[test]
fn a_second_pass_goes_on_from_latents_of_the_clips_size_or_of_half_of_it() {
    let mut pipeline = open(&golden("ltx-video-0.9.5"));
    let mut seen = std::collections::BTreeSet::new();
    for (rows, columns, strength, steps) in [(2, 6, 0.5, 2), (1, 3, 0.5, 2), (1, 3, 0.8, 3), (1, 3, 1.0, 4)] {
        let request = GenerateRequest {
            height: 64,
            width: 192,
            initial_latents: finished(rows, columns),
            second_pass: Some(SecondPass::new(strength)),
            ..request(&*pipeline)
        };
        let (made, _) = assert_resumes(&mut *pipeline, &request);
        assert_eq!((made.latents.dims(), made.step_hashes.len()), (&[1, 8, 2, 2, 6][..], steps));
        assert!(seen.insert(*made.step_hashes.last().unwrap()));
        let start = pipeline.start(&request).unwrap();
        assert_eq!(pipeline.transition(&request, 0, &start).unwrap_err().code(), "not_auditable");
    }
}

#[test]
fn a_second_pass_that_cannot_be_made_is_refused_with_the_reason() {
    let refused = |name: &str, initial_latents: Option<Tensor>, second: SecondPass| {
        let pipeline = open(&golden(name));
        let request = GenerateRequest {
            height: 64,
            width: 192,
            initial_latents,
            second_pass: Some(second),
            ..request(&*pipeline)
        };
        pipeline.check(&request).unwrap_err().to_string()
    };
    let half = SecondPass::new(0.5);
    let text = refused("ltx-video-0.9.5", None, half.clone());
    assert!(text.contains("second pass from given latents, and none were given"), "{text}");
    let text = refused("ltx-video-0.9.5", finished(2, 3), half.clone());
    assert!(text.contains("initial_latents has shape [1, 8, 2, 2, 3]"), "{text}");
    // This folder has no upsampler.
    let text = refused("ltx-video-0.9.0", finished(1, 3), half.clone());
    assert!(text.contains("initial_latents has shape [1, 8, 2, 1, 3]"), "{text}");
    for strength in [0.0, -1.0, 1.5, f64::NAN] {
        let text = refused("ltx-video-0.9.5", finished(2, 6), SecondPass::new(strength));
        assert!(text.contains("denoise_strength is"), "{text}");
    }
    let text = refused("ltx-video-0.9.5", finished(2, 6), SecondPass::new(0.2));
    assert!(text.contains("of so few steps no whole one is left"), "{text}");
    let text =
        refused("ltx-video-0.9.5", finished(2, 6), SecondPass { adain: f64::INFINITY, ..half.clone() });
    assert!(text.contains("upsample_adain is inf"), "{text}");
    assert!(refused("pyramid-flow-miniflux", None, half).contains("pyramid-flow makes no second pass"));
}

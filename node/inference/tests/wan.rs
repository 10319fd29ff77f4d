//! Wan from the outside: what cannot be made, cancels, checkpoints of a sampler with a memory, previews, tiles, and each
//! configuration error's text.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use kinoflock_inference::models::wan::WanPipeline;
use kinoflock_inference::models::wan::pipeline::{WanSampler, load_vae};
use kinoflock_inference::registry::ModelIndex;
use kinoflock_inference::rng::{Stream, normal_tensor};
use kinoflock_inference::sampler::FlowMatchConfig;
use kinoflock_inference::sink::whole;
use kinoflock_inference::tiling::Tiling;
use kinoflock_inference::{
    DecodeOptions, Device, GenerateRequest, LoadOptions, Phase, Pipeline, Silent, Tensor,
};

#[path = "support/tiny.rs"]
mod tiny;

use tiny::{
    Watch, assert_cancels, assert_halves_near, assert_resumes, edit, error_of, golden, load_error, mean,
    open, refusals,
};

fn folder() -> PathBuf {
    golden("wan2.1")
}

/// With Euler steps instead of UniPC.
fn open_euler() -> WanPipeline {
    let index = ModelIndex::read(&folder()).unwrap();
    let mut pipeline = WanPipeline::load(&folder(), &index, &LoadOptions::default()).unwrap();
    pipeline.set_sampler(WanSampler::Euler(FlowMatchConfig { shift: 3.0, ..FlowMatchConfig::default() }));
    pipeline
}

fn request(pipeline: &dyn Pipeline) -> GenerateRequest {
    tiny::request(pipeline, (48, 32, 9, 5))
}

#[test]
fn one_seed_makes_one_clip_and_previews_have_a_pixel_a_cell() {
    let mut pipeline = open(&folder());
    let mut request = GenerateRequest { preview_every: 2, ..request(&*pipeline) };
    let mut watch = Watch::default();
    let first = pipeline.generate(&request, &mut watch).unwrap();
    assert_eq!((first.frames.width, first.frames.height, first.frames.count), (48, 32, 9));
    assert_eq!((first.latents.dims(), first.steps_done), (&[1, 4, 3, 4, 6][..], 5));
    assert_eq!(watch.phases, [Phase::Text, Phase::Step, Phase::Decode]);
    let sizes: Vec<_> = watch.previews.iter().map(|p| (p.width, p.height, p.count)).collect();
    assert_eq!(sizes, [(6, 4, 3); 2]);
    let again = open(&folder()).generate(&request, &mut Silent).unwrap();
    assert_eq!((first.step_hashes, first.frames), (again.step_hashes.clone(), again.frames));
    request.seed = 8;
    let other = pipeline.generate(&request, &mut Silent).unwrap();
    assert_ne!(other.step_hashes[0], again.step_hashes[0]);
}

#[test]
fn a_cancel_stops_before_the_next_step_and_between_the_pieces_of_a_decode() {
    let mut pipeline = open(&folder());
    let request = request(&*pipeline);
    assert_cancels(&mut *pipeline, &request, 5);
}

#[test]
fn a_run_goes_on_from_any_checkpoint_bit_for_bit_with_either_sampler() {
    let unipc: Box<dyn Pipeline> = open(&folder());
    for (mut pipeline, remembered) in [(unipc, 3), (Box::new(open_euler()) as Box<dyn Pipeline>, 0)] {
        let request = request(&*pipeline);
        let (_, checkpoints) = assert_resumes(&mut *pipeline, &request);
        assert_eq!((checkpoints.len(), checkpoints[2].memory.len()), (4, remembered));
        let mut strange = checkpoints[1].clone();
        strange.memory.insert("momentum".to_owned(), strange.latents.clone());
        let resume = Some(strange);
        if remembered > 0 {
            let error = pipeline.generate(&GenerateRequest { resume, ..request }, &mut Silent).unwrap_err();
            assert_eq!(error.code(), "checkpoint");
        }
    }
}

#[test]
fn a_step_of_euler_can_be_audited_and_one_of_unipc_says_that_it_cannot() {
    let mut euler = open_euler();
    let mut request = request(&euler);
    request.checkpoint_every = 1;
    let mut watch = Watch::default();
    let made = euler.generate(&request, &mut watch).unwrap();
    let before = euler.start(&request).unwrap();
    let step = euler.transition(&request, 0, &before).unwrap();
    assert!(step.deviation(&before, &watch.checkpoints[0].latents).unwrap() < 1e-5);
    assert_eq!(euler.frames(&request, &made.latents).unwrap(), made.frames);
    let mut unipc = open(&folder());
    assert_eq!(unipc.transition(&request, 0, &before).unwrap_err().code(), "not_auditable");
    let (a, b) = (euler.commitment(&request).unwrap(), unipc.commitment(&request).unwrap());
    assert_ne!(a.samplers[0], b.samplers[0]);
}

#[test]
fn what_cannot_be_made_is_refused_with_the_nearest_that_can() {
    let pipeline = open(&folder());
    let good = request(&*pipeline);
    let refused = refusals(&*pipeline, &good);
    assert_eq!(
        refused(&|r| r.width = 40),
        "width 40 cannot be made: it must be a multiple of 16; the nearest is 48"
    );
    assert_eq!(
        refused(&|r| r.frames = 11),
        "11 frames cannot be made: the count must be 4k+1; the nearest is 13"
    );
    // The model of these tests has 64 positions along an axis.
    assert!(refused(&|r| r.height = 65 * 16).ends_with("the nearest is 1024"));
    assert!(refused(&|r| r.frames = 4 * 64 + 1).ends_with("the nearest is 253"));
    assert!(pipeline.check(&GenerateRequest { frames: 253, height: 1024, ..good.clone() }).is_ok());
    assert!(refused(&|r| r.timesteps = Some(vec![999.0, 500.0])).contains("timesteps is given"));
    let timesteps = Some(vec![999.0, 500.0]);
    assert!(open_euler().check(&GenerateRequest { timesteps, ..good.clone() }).is_ok());
    let long = "word ".repeat(40);
    assert!(refused(&|r| r.prompt.clone_from(&long)).contains("prompt too long"));
}

#[test]
fn a_prompt_is_counted_and_read_as_it_is_after_cleaning() {
    let mut pipeline = open(&folder());
    let plain = "a \"red\" dog & fish";
    let curled = " a\u{a0}\u{201c}red\u{201d}   dog &amp;amp; \u{fb01}sh ";
    assert_eq!(pipeline.count_tokens(plain).unwrap(), pipeline.count_tokens(curled).unwrap());
    let mut request = request(&*pipeline);
    (request.steps, request.decode.skip) = (1, true);
    let mut hashes = |prompt: &str| {
        let request = GenerateRequest { prompt: prompt.to_owned(), ..request.clone() };
        pipeline.generate(&request, &mut Silent).unwrap().step_hashes
    };
    assert_eq!(hashes(plain), hashes(curled));
    assert_ne!(hashes(plain), hashes("a blue dog"));
}

#[test]
fn a_decode_in_tiles_and_runs_has_the_pixels_of_the_whole() {
    // Tiles from the third level on, from the second, and from the first.
    let tiles = [(None, None), (None, Some(8)), (Some(32), None), (Some(64), None), (Some(96), Some(8))];
    for (folder, channels, ratio) in [("wan2.1", 4, 8), ("wan2.2-ti2v-5b", 6, 16)] {
        let (vae, _) = load_vae(&golden(folder), &LoadOptions::default(), true).unwrap();
        let shape = (1, channels, 3, 9, 23);
        let z = normal_tensor(3, Stream::Initial, shape, &Device::Cpu).unwrap();
        let decode = |tile, chunk| whole(|sink| vae.decode(&z, Tiling { tile, chunk }, sink)).unwrap();
        let worst = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let whole = decode(None, Some(1000));
        assert_eq!(whole.dims(), [1, 3, 9, 9 * ratio, 23 * ratio]);
        for (tile, chunk) in tiles {
            let tile = tile.map(|pixels: usize| pixels * ratio / 8);
            assert_eq!(worst((decode(tile, chunk) - &whole).unwrap()), 0.0, "{folder} {tile:?} {chunk:?}");
        }
        let short = vae.encode(&whole.narrow(2, 0, 5).unwrap()).unwrap().mean;
        let long = vae.encode(&whole).unwrap().mean;
        let change = worst((long.narrow(2, 0, 2).unwrap() - short).unwrap());
        assert!(change < 1e-5, "{folder}: later frames change earlier latents by {change}");
        assert!(vae.encode(&whole.narrow(2, 0, 8).unwrap()).is_err());
        let back = vae.denormalize(&vae.normalize(&z).unwrap()).unwrap();
        assert!(worst((back - &z).unwrap()) < 1e-5);
    }
}

#[test]
fn half_types_stay_near_f32_and_the_generic_way_agrees() {
    let mut pipeline = open(&folder());
    let mut request = request(&*pipeline);
    request.steps = 2;
    let exact = pipeline.generate(&request, &mut Silent).unwrap();
    assert_halves_near(&folder(), &request, &exact.latents, 0.1);
    kinoflock_inference::nn::set_generic_only(true);
    let made = open(&folder()).generate(&request, &mut Silent);
    kinoflock_inference::nn::set_generic_only(false);
    let made = made.unwrap();
    let off = mean(&(&made.latents - &exact.latents).unwrap());
    assert!(off < 1e-5, "{off}");
    let pixels = made.frames.data.iter().zip(&exact.frames.data).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(pixels <= Some(1));
}

#[test]
fn no_guidance_one_step_one_frame_and_tiles_make_frames() {
    let mut pipeline = open(&folder());
    let good = request(&*pipeline);
    let decode = DecodeOptions { tile: Some(16), chunk: Some(4), skip: false };
    for request in [
        GenerateRequest { steps: 1, ..good.clone() },
        GenerateRequest { guidance: 1.0, ..good.clone() },
        GenerateRequest { guidance_rescale: 1.0, ..good.clone() },
        GenerateRequest { frames: 1, ..good.clone() },
        GenerateRequest { decode, ..good },
    ] {
        let made = pipeline.generate(&request, &mut Silent).unwrap();
        assert_eq!(made.frames.count, request.frames);
    }
}

#[test]
fn configuration_values_that_are_not_known_are_named() {
    let cases = [
        (
            "model_index.json",
            "transformer",
            serde_json::json!(["diffusers", "FluxTransformer"]),
            "FluxTransformer",
        ),
        ("model_index.json", "boundary_ratio", serde_json::json!(0.9), "transformer_2"),
        ("model_index.json", "scheduler", serde_json::json!(["diffusers", "DDIM"]), "DDIM"),
        ("transformer/config.json", "_class_name", serde_json::json!("WanVACE"), "WanVACE"),
        ("transformer/config.json", "qk_norm", serde_json::json!("layer_norm"), "layer_norm"),
        ("transformer/config.json", "added_kv_proj_dim", serde_json::json!(48), "norm_added_k"),
        ("transformer/config.json", "added_kv_proj_dim", serde_json::json!(40), "which is 48"),
        ("transformer/config.json", "num_layers", serde_json::json!(0), "num_layers"),
        ("transformer/config.json", "attention_head_dim", serde_json::json!(5), "attention_head_dim"),
        ("transformer/config.json", "patch_size", serde_json::json!([1, 2, 4]), "patch_size"),
        ("transformer/config.json", "gate", serde_json::json!(true), "gate is true"),
        ("transformer/config.json", "out_channels", serde_json::json!(8), "out_channels"),
        ("transformer/config.json", "ffn_dim", serde_json::json!(65), "ffn.net.0.proj.weight"),
        ("scheduler/scheduler_config.json", "_class_name", serde_json::json!("DDIM"), "DDIM"),
        ("scheduler/scheduler_config.json", "solver_type", serde_json::json!("bh3"), "solver_type is bh3"),
        ("scheduler/scheduler_config.json", "use_beta_sigmas", serde_json::json!(true), "use_beta_sigmas"),
        ("vae/config.json", "_class_name", serde_json::json!("AutoencoderKL"), "AutoencoderKL"),
        ("vae/config.json", "attn_scales", serde_json::json!([0.5]), "attn_scales"),
        ("vae/config.json", "temperal_downsample", serde_json::json!([true]), "temperal_downsample"),
        ("vae/config.json", "latents_mean", serde_json::json!([0.0]), "latents_mean is 1 values"),
        ("vae/config.json", "scale_factor_spatial", serde_json::json!(16), "the levels make it 8"),
        ("vae/config.json", "dim_mult", serde_json::json!([]), "dim_mult"),
        ("vae/config.json", "patch_size", serde_json::json!(2), "in_channels is 3"),
        ("vae/config.json", "base_dim", serde_json::json!(9), "halves them"),
        ("vae/config.json", "wavelet", serde_json::json!(2), "wavelet is 2"),
        ("text_encoder/config.json", "feed_forward_proj", serde_json::json!("gated-mish"), "gated-mish"),
    ];
    for (file, key, value, said) in cases {
        let error = error_of(&folder(), file, key, value);
        assert!(error.contains(said), "{file} {key}: {error}");
    }
}

/// The reference builds these layers, which do nothing in a pipeline without states of pictures; it also runs without the
/// embedding's weights, and not without those of keys and values.
#[test]
fn settings_for_pictures_change_nothing_where_there_are_none() {
    use serde_json::json;
    for (name, width) in [("wan2.1", 48), ("wan2.2-ti2v-5b", 28)] {
        let folder = tiny::copied(&golden(name));
        let run = || {
            let mut pipeline = open(folder.path());
            let mut request = request(&*pipeline);
            (request.width, request.height, request.steps) = (64, 32, 2);
            pipeline.generate(&request, &mut Silent).unwrap().step_hashes
        };
        let expected = run();
        let config = folder.path().join("transformer/config.json");
        edit(&config, |config| config["image_dim"] = json!(1280));
        assert_eq!(run(), expected, "{name}");
        edit(&config, |config| config["added_kv_proj_dim"] = json!(5120));
        let error = load_error(folder.path()).to_string();
        assert!(
            error.contains(&format!(
                "added_kv_proj_dim is 5120: it can be the width of a token alone, which is {width}"
            )),
            "{error}"
        );
        edit(&config, |config| config["added_kv_proj_dim"] = json!(width));
        let error = load_error(folder.path()).to_string();
        assert!(error.contains("attn2.norm_added_k.weight is missing"), "{error}");
        let file = folder.path().join("transformer/diffusion_pytorch_model.safetensors");
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let mut put = |name: String, shape: &[usize]| {
            let values = normal_tensor(tensors.len() as u64, Stream::Initial, shape, &Device::Cpu).unwrap();
            tensors.insert(name, values);
        };
        for block in 0..if name == "wan2.1" { 2 } else { 1 } {
            for layer in ["add_k_proj", "add_v_proj"] {
                put(format!("blocks.{block}.attn2.{layer}.weight"), &[width, width]);
                put(format!("blocks.{block}.attn2.{layer}.bias"), &[width]);
            }
            put(format!("blocks.{block}.attn2.norm_added_k.weight"), &[width]);
        }
        candle_core::safetensors::save(&tensors, &file).unwrap();
        edit(&config, |config| config["image_dim"] = json!(null));
        assert_eq!(run(), expected, "{name}");
    }
}

#[test]
fn a_second_transformer_computes_below_the_boundary_and_may_have_a_guidance_of_its_own() {
    let folder = tiny::copied(&folder());
    let second = folder.path().join("transformer_2");
    std::fs::create_dir(&second).unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        std::fs::copy(folder.path().join("transformer").join(file), second.join(file)).unwrap();
    }
    edit(&folder.path().join("model_index.json"), |index| {
        index["transformer_2"] = serde_json::json!(["diffusers", "WanTransformer3DModel"]);
    });
    assert!(load_error(folder.path()).to_string().contains("boundary_ratio is null"));
    edit(&folder.path().join("model_index.json"), |index| index["boundary_ratio"] = serde_json::json!(0.8));
    let request = request(&*open(folder.path()));
    let hashes = |folder: &Path| open(folder).generate(&request, &mut Silent).unwrap().step_hashes;
    let one = hashes(&self::folder());
    assert_eq!(hashes(folder.path()), one);
    // Timesteps are 999, 922, 817, 666, 428.
    let extras = folder.path().join("kinoflock.json");
    std::fs::write(&extras, r#"{"low_noise_guidance": 2.5}"#).unwrap();
    let guided = hashes(folder.path());
    assert_eq!((&guided[..3], guided[3] == one[3]), (&one[..3], false));
    std::fs::remove_file(extras).unwrap();
    let file = second.join("diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let bias = tensors.remove("proj_out.bias").unwrap();
    tensors.insert("proj_out.bias".to_owned(), (bias + 0.5).unwrap());
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let two = hashes(folder.path());
    assert_eq!((&two[..3], two[3] == one[3]), (&one[..3], false));
}

#[test]
fn wan_2_2_folders_load_by_their_index_and_make_clips() {
    for (name, multiple) in [("wan2.2-a14b", 16), ("wan2.2-ti2v-5b", 32)] {
        let mut pipeline = open(&golden(name));
        assert_eq!((pipeline.info().architecture.as_str(), pipeline.info().size_multiple), ("wan", multiple));
        let mut request = request(&*pipeline);
        (request.width, request.height, request.frames) = (64, 32, 5);
        let made = pipeline.generate(&request, &mut Silent).unwrap();
        assert_eq!((made.frames.width, made.frames.height, made.frames.count), (64, 32, 5));
    }
}

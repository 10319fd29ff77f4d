//! Mochi from the outside: what it refuses, cancels, checkpoints, previews, decodes in pieces, and number formats.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use kinoflock_inference::models::mochi::pipeline::{load_transformer, load_vae};
use kinoflock_inference::sink::{Sink, whole};
use kinoflock_inference::tiling::Tiling;
use kinoflock_inference::{
    DType, Device, GenerateRequest, LoadOptions, Phase, Pipeline, RgbFrames, Silent, Tensor,
};

#[path = "support/tiny.rs"]
mod tiny;

use tiny::{
    Watch, assert_cancels, assert_foreign, assert_halves_near, assert_resumes, difference, error_of, open,
    refusals,
};

fn golden() -> PathBuf {
    tiny::golden("mochi-1")
}

fn request(pipeline: &dyn Pipeline) -> GenerateRequest {
    tiny::request(pipeline, (48, 32, 13, 4))
}

#[test]
fn values_that_are_not_known_are_refused_by_file_key_and_value() {
    use serde_json::json;
    let cases = [
        ("model_index.json", "force_zeros_for_empty_prompt", json!("yes")),
        ("model_index.json", "vae", json!(["diffusers", "AutoencoderKLOther"])),
        ("transformer/config.json", "_class_name", json!("OtherTransformer")),
        ("transformer/config.json", "activation_fn", json!("gelu")),
        ("transformer/config.json", "qk_norm", json!("layer_norm")),
        ("transformer/config.json", "attention_head_dim", json!(7)),
        ("transformer/config.json", "text_embed_dim", json!(36)),
        ("transformer/config.json", "time_embed_dim", json!(0)),
        ("transformer/config.json", "text_embed_dim", json!(64)),
        ("transformer/config.json", "out_channels", json!(8)),
        ("transformer/config.json", "in_channels", json!(16)),
        ("transformer/config.json", "num_layers", json!(0)),
        ("transformer/config.json", "use_magic", json!(3)),
        ("vae/config.json", "act_fn", json!("mish")),
        ("vae/config.json", "in_channels", json!(16)),
        ("vae/config.json", "decoder_block_out_channels", json!([32, 32, 32, 40])),
        ("vae/config.json", "encoder_block_out_channels", json!([32, 32, 32])),
        ("vae/config.json", "layers_per_block", json!([1, 1, 1, 1])),
        ("vae/config.json", "temporal_expansions", json!([1, 2, 0])),
        ("vae/config.json", "add_attention_block", json!([true])),
        ("vae/config.json", "latents_mean", json!([0.0])),
        ("vae/config.json", "latents_std", json!(vec![0.0; 12])),
        ("vae/config.json", "scaling_factor", json!(0.0)),
        ("vae/config.json", "use_magic", json!("on")),
        ("scheduler/scheduler_config.json", "use_dynamic_shifting", json!(true)),
    ];
    for (file, key, value) in cases {
        let error = error_of(&golden(), file, key, value.clone());
        let name = file.rsplit('/').next().unwrap();
        assert!(error.contains(key) && error.contains(name), "{file} {key} {value}: {error}");
    }
}

#[test]
fn what_cannot_be_made_is_refused_with_the_nearest_that_can() {
    let pipeline = open(&golden());
    let good = request(&*pipeline);
    let refused = refusals(&*pipeline, &good);
    assert_eq!(
        refused(&|r| r.width = 40),
        "width 40 cannot be made: it must be a multiple of 16; the nearest is 48"
    );
    assert_eq!(
        refused(&|r| r.height = 0),
        "height 0 cannot be made: it must be a multiple of 16; the nearest is 16"
    );
    assert_eq!(
        refused(&|r| r.frames = 20),
        "20 frames cannot be made: the count must be 6k+1; the nearest is 19"
    );
    assert_eq!(
        refused(&|r| r.frames = 0),
        "0 frames cannot be made: the count must be 6k+1; the nearest is 1"
    );
    assert_eq!(refused(&|r| r.steps = 0), "steps is 0: at least 1 step is needed");
    assert!(refused(&|r| r.timesteps = Some(vec![900.0, 100.0])).contains("number of given timesteps is 2"));
    for frames in [1, 7, 163] {
        assert!(pipeline.check(&GenerateRequest { frames, ..good.clone() }).is_ok());
    }
    let info = pipeline.info();
    assert_eq!((info.architecture.as_str(), info.token_limit), ("mochi", 16));
    assert_eq!((info.defaults.width, info.defaults.height, info.defaults.steps), (848, 480, 64));
    assert!(info.work.transformer_parameters > 0 && info.work.vae_parameters > 0);
}

#[test]
fn one_seed_makes_one_clip_and_noise_falls_from_step_to_step() {
    let mut pipeline = open(&golden());
    let mut request = request(&*pipeline);
    request.preview_every = 2;
    let mut watch = Watch::default();
    let first = pipeline.generate(&request, &mut watch).unwrap();
    let again = open(&golden()).generate(&request, &mut Silent).unwrap();
    assert_eq!(first.step_hashes, again.step_hashes);
    assert_eq!(first.frames, again.frames);
    assert_eq!((first.frames.width, first.frames.height, first.frames.count), (48, 32, 13));
    assert_eq!((first.latents.dims(), first.steps_done), (&[1, 12, 3, 4, 6][..], 4));
    assert_eq!(watch.phases, [Phase::Text, Phase::Step, Phase::Decode]);
    assert!(watch.sigmas.windows(2).all(|pair| pair[0] > pair[1]) && watch.sigmas[3] == 0.0);
    let sizes: Vec<_> = watch.previews.iter().map(|p| (p.width, p.height, p.count)).collect();
    assert_eq!(sizes, [(6, 4, 3); 2]);
    request.seed = 8;
    assert_ne!(pipeline.generate(&request, &mut Silent).unwrap().step_hashes, first.step_hashes);
}

#[test]
fn the_last_preview_shows_the_latents_that_are_decoded() {
    let factors: Vec<[f32; 3]> = (0..12).map(|i| [0.1 * i as f32, 0.2, -0.1]).collect();
    let folder = tiny::copied(&golden());
    let extras = serde_json::json!({"latent_rgb": {"factors": factors, "bias": [0.5, 0.5, 0.5]}});
    std::fs::write(folder.path().join("kinoflock.json"), extras.to_string()).unwrap();
    let mut pipeline = open(folder.path());
    let request = GenerateRequest { preview_every: 1, ..request(&*pipeline) };
    let mut watch = Watch::default();
    let made = pipeline.generate(&request, &mut watch).unwrap();
    let latents = made.latents.reshape((12, 3 * 4 * 6)).unwrap();
    let factors = Tensor::from_vec(factors.concat(), (12, 3), &Device::Cpu).unwrap();
    let colours = (factors.t().unwrap().matmul(&latents).unwrap() + 0.5).unwrap();
    let video = colours.reshape((3, 3, 4, 6)).unwrap().transpose(0, 1).unwrap();
    // The last step goes all the way to the prediction, up to rounding.
    let shown = RgbFrames::from_unit(&video).unwrap();
    let last = watch.previews.last().unwrap();
    assert!(shown.data.iter().zip(&last.data).all(|(a, b)| a.abs_diff(*b) <= 1));
}

#[test]
fn a_cancel_stops_before_the_next_step_and_before_the_decode() {
    let mut pipeline = open(&golden());
    let request = request(&*pipeline);
    assert_cancels(&mut *pipeline, &request, 4);
}

#[test]
fn a_run_goes_on_from_any_checkpoint_bit_for_bit() {
    let mut pipeline = open(&golden());
    let request = request(&*pipeline);
    let (_, checkpoints) = assert_resumes(&mut *pipeline, &request);
    assert_eq!(checkpoints.len(), 3);
    assert_foreign(&mut *pipeline, &checkpoints[0], &[GenerateRequest { guidance: 5.0, ..request }]);
}

#[test]
fn a_step_that_is_computed_anew_is_the_step() {
    let mut pipeline = open(&golden());
    let request = request(&*pipeline);
    let mut watch = Watch::default();
    pipeline.generate(&request, &mut watch).unwrap();
    let mut before = pipeline.start(&request).unwrap();
    for (index, after) in watch.latents.iter().enumerate() {
        let transition = pipeline.transition(&request, index, &before).unwrap();
        assert_eq!(difference(&transition.apply(&before).unwrap(), after), 0.0);
        assert!(transition.deviation(&before, after).unwrap() < 1e-4);
        before = after.clone();
    }
    assert_eq!(pipeline.commitment(&request).unwrap().samplers.len(), 5);
}

#[test]
fn an_empty_prompt_is_no_token_where_the_index_says_so() {
    let folder =
        tiny::changed(&golden(), "model_index.json", "force_zeros_for_empty_prompt", serde_json::json!(true));
    let mut empty = request(&*open(&golden()));
    empty.negative_prompt.clear();
    let plain = open(&golden()).generate(&empty, &mut Silent).unwrap();
    let nothing = open(folder.path()).generate(&empty, &mut Silent).unwrap();
    assert_ne!(plain.step_hashes, nothing.step_hashes);
    let full = request(&*open(&golden()));
    let plain = open(&golden()).generate(&full, &mut Silent).unwrap();
    let same = open(folder.path()).generate(&full, &mut Silent).unwrap();
    assert_eq!(plain.step_hashes, same.step_hashes);
    empty.prompt.clear();
    open(folder.path()).generate(&empty, &mut Silent).unwrap();
}

#[test]
fn a_decode_in_runs_is_the_whole_decode_and_one_in_tiles_is_near_it() {
    let (vae, _) = load_vae(&golden(), &LoadOptions::default(), false).unwrap();
    let z = Tensor::randn(0f32, 1.0, (2, 12, 5, 8, 9), &Device::Cpu).unwrap();
    let decode = |tile, chunk| whole(|sink| vae.decode(&z, Tiling { tile, chunk }, sink)).unwrap();
    let whole = decode(None, None);
    assert_eq!(whole.dims(), [2, 3, 25, 64, 72]);
    for chunk in [1, 6, 12, 18, 100] {
        assert_eq!(difference(&decode(None, Some(chunk)), &whole), 0.0, "{chunk}");
    }
    for (tile, chunk) in [(48, None), (32, Some(6)), (1000, None)] {
        let tiled = decode(Some(tile), chunk);
        assert_eq!(tiled.dims(), whole.dims());
        let off = (&tiled - &whole).unwrap().abs().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(off < 0.25, "{tile}: {off}");
    }
    assert_eq!(difference(&decode(Some(1000), None), &whole), 0.0);
}

#[test]
fn a_decode_in_runs_can_be_cancelled_between_them() {
    let (vae, _) = load_vae(&golden(), &LoadOptions::default(), false).unwrap();
    let z = Tensor::randn(0f32, 1.0, (1, 12, 4, 2, 2), &Device::Cpu).unwrap();
    struct Stop(usize);
    impl Sink for Stop {
        fn go_on(&mut self) -> candle_core::Result<()> {
            self.0 += 1;
            if self.0 > 2 { Err(candle_core::Error::Msg("stop".to_owned())) } else { Ok(()) }
        }
        fn put(&mut self, _frames: Tensor) -> candle_core::Result<()> {
            Ok(())
        }
    }
    let mut stop = Stop(0);
    assert!(vae.decode(&z, Tiling { tile: None, chunk: Some(6) }, &mut stop).is_err());
    assert_eq!(stop.0, 3);
}

#[test]
fn latents_come_back_from_normalising() {
    let (vae, _) = load_vae(&golden(), &LoadOptions::default(), false).unwrap();
    let z = Tensor::randn(0f32, 1.0, (2, 12, 3, 2, 2), &Device::Cpu).unwrap();
    let back = vae.denormalize(&vae.normalize(&z).unwrap()).unwrap();
    assert!(difference(&z, &back) < 1e-5);
    let error = vae.encode(&Tensor::zeros((1, 3, 7, 16, 16), DType::F32, &Device::Cpu).unwrap(), None);
    assert!(error.unwrap_err().to_string().contains("without its encoder"));
}

#[test]
fn filling_between_the_words_takes_no_part() {
    let (transformer, _) = load_transformer(&golden(), &LoadOptions::default()).unwrap();
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    let (latents, text) = (random(&[1, 12, 48]), random(&[1, 3, 32]));
    let rope = transformer.rope([2, 2, 3]).unwrap();
    let timesteps = Tensor::new(&[300f32], &Device::Cpu).unwrap();
    let run = |text: &Tensor, mask: &[u8]| {
        let mask = Tensor::new(mask, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let context = transformer.text_context(text, &mask).unwrap();
        transformer.forward(&latents, &timesteps, &context, &rope).unwrap()
    };
    let alone = run(&text.narrow(1, 0, 2).unwrap(), &[1, 1]);
    assert!(difference(&run(&text, &[1, 1, 0]), &alone) < 1e-5);
    let (first, second) = (text.narrow(1, 0, 1).unwrap(), text.narrow(1, 1, 1).unwrap());
    let filling = random(&[1, 1, 32]);
    let apart = Tensor::cat(&[&filling, &first, &second], 1).unwrap();
    assert_eq!(run(&apart, &[0, 1, 1]).dims(), alone.dims());
    let none = run(&text, &[0, 0, 0]);
    assert!(difference(&run(&random(&[1, 3, 32]), &[0, 0, 0]), &none) < 1e-6);
}

#[test]
fn half_types_stay_near_f32() {
    let mut pipeline = open(&golden());
    let mut request = request(&*pipeline);
    request.steps = 2;
    request.guidance = 2.0;
    let exact = pipeline.generate(&request, &mut Silent).unwrap();
    assert_halves_near(&golden(), &request, &exact.latents, 0.1);
}

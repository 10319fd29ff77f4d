//! The autoencoder against the reference's goldens, on both ways of computing, and the tiled decode against the whole.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use kinoflock_inference::models::ltx::vae::{DecodeSettings, LtxVae, LtxVaeConfig, Noise};
use kinoflock_inference::nn::set_generic_only;
use kinoflock_inference::sink::whole;
use kinoflock_inference::tiling::Tiling;
use serde_json::Value;

const FOLDERS: [&str; 3] = ["ltx-video-0.9.0", "ltx-video-0.9.1", "ltx-video-0.9.5"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn load(name: &str) -> LtxVae {
    let vae = folder(name).join("pipeline/vae");
    let config = LtxVaeConfig::from_json(&std::fs::read_to_string(vae.join("config.json")).unwrap()).unwrap();
    let weights = std::fs::read(vae.join("diffusion_pytorch_model.safetensors")).unwrap();
    let vb = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu).unwrap();
    LtxVae::load(&config, vb).unwrap()
}

fn read(name: &str, file: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder(name).join(file), &Device::Cpu).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let difference =
        (a.to_dtype(DType::F32).unwrap() - b.to_dtype(DType::F32).unwrap()).unwrap().abs().unwrap();
    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Computes one golden and gives every result by its name in the file.
fn compute(vae: &LtxVae, golden: &str, inputs: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let mut results = HashMap::new();
    let mut trace = |name: &str, x: &Tensor| {
        results.insert(format!("out.act.{name}"), x.clone());
        Ok(())
    };
    if golden == "vae_encode" {
        let moments = vae.encode(&inputs["in.x"], Some(&mut trace)).unwrap();
        results.insert("out.enc_mean".to_owned(), moments.mean);
        results.insert("out.enc_logvar".to_owned(), moments.logvar);
        return results;
    }
    let mut names: Vec<_> = inputs.keys().filter(|key| key.starts_with("noise.")).collect();
    names.sort();
    let noise: Vec<Tensor> = names.into_iter().map(|name| inputs[name].clone()).collect();
    let settings = DecodeSettings {
        timestep: inputs.get("in.temb"),
        noise: if noise.is_empty() { Noise::None } else { Noise::Given(&noise) },
        tiling: Tiling::default(),
    };
    let decoded = whole(|sink| vae.decode(&inputs["in.z"], &settings, sink, Some(&mut trace))).unwrap();
    results.insert("out.decoded".to_owned(), decoded);
    results
}

/// Compares every `out.` tensor of every `vae_` golden; answers how many there were.
fn compare(name: &str) -> usize {
    let vae = load(name);
    let manifest = std::fs::read_to_string(folder(name).join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let mut compared = 0;
    for (golden, entry) in manifest["goldens"].as_object().unwrap() {
        if !golden.starts_with("vae_") {
            continue;
        }
        let file = read(name, entry["file"].as_str().unwrap());
        let results = compute(&vae, golden, &file);
        for (key, facts) in entry["tensors"].as_object().unwrap() {
            if !key.starts_with("out.") {
                continue;
            }
            let found = difference(&results[key], &file[key]);
            let tolerance = facts["atol"].as_f64().unwrap() as f32;
            println!("{name} {golden} {key}: {found:.2e} of {tolerance:.2e}");
            assert!(found <= tolerance, "{name} {golden} {key}: {found} is above {tolerance}");
            compared += 1;
        }
    }
    compared
}

#[test]
fn every_golden_is_met_by_the_cpu_kernels() {
    assert_eq!(FOLDERS.map(compare), [6, 3, 6]);
}

#[test]
fn every_golden_is_met_by_candles_own_operations() {
    set_generic_only(true);
    let compared = FOLDERS.map(compare);
    set_generic_only(false);
    assert_eq!(compared, [6, 3, 6]);
}

#[test]
fn latents_come_back_from_normalising() {
    let vae = load("ltx-video-0.9.5");
    let z = Tensor::randn(0f32, 1.0, (2, 8, 3, 2, 2), &Device::Cpu).unwrap();
    let back = vae.denormalize(&vae.normalize(&z).unwrap()).unwrap();
    assert!(difference(&z, &back) < 1e-5);
}

#[test]
fn a_decoder_that_needs_a_timestep_says_so() {
    let vae = load("ltx-video-0.9.5");
    let z = Tensor::zeros((1, 8, 1, 1, 1), DType::F32, &Device::Cpu).unwrap();
    let error = whole(|sink| vae.decode(&z, &DecodeSettings::default(), sink, None)).unwrap_err().to_string();
    assert!(error.contains("timestep"), "{error}");
}

#[test]
fn half_types_stay_near_the_float_result() {
    let vae = load("ltx-video-0.9.0");
    let inputs = read("ltx-video-0.9.0", "goldens/vae_decode.safetensors");
    for (dtype, limit) in [(DType::F16, 0.02), (DType::BF16, 0.2)] {
        let z = inputs["in.z"].to_dtype(dtype).unwrap();
        let out = whole(|sink| vae.decode(&z, &DecodeSettings::default(), sink, None)).unwrap();
        assert_eq!(out.dtype(), dtype);
        let found = difference(&out, &inputs["out.decoded"]);
        assert!(found < limit, "{dtype:?} is off by {found}");
    }
}

/// Decodes whole and in tiles; gives the largest difference.
fn tiled(vae: &LtxVae, z: &Tensor, noise: Noise, tiling: Tiling) -> f32 {
    let temb = Tensor::new(&[0.05f32], &Device::Cpu).unwrap();
    let mut settings = DecodeSettings { timestep: Some(&temb), noise, tiling: Tiling::default() };
    let untiled = whole(|sink| vae.decode(z, &settings, sink, None)).unwrap();
    settings.tiling = tiling;
    difference(&whole(|sink| vae.decode(z, &settings, sink, None)).unwrap(), &untiled)
}

#[test]
fn a_tiled_decode_is_the_whole_decode() {
    for (name, frames) in [("ltx-video-0.9.0", 5), ("ltx-video-0.9.1", 3), ("ltx-video-0.9.5", 5)] {
        let vae = load(name);
        let z = Tensor::randn(0f32, 1.0, (1, 8, frames, 4, 3), &Device::Cpu).unwrap();
        for tiling in [
            Tiling { tile: Some(64), chunk: None },
            Tiling { tile: None, chunk: Some(16) },
            Tiling { tile: Some(128), chunk: Some(32) },
            Tiling { tile: Some(1_000_000), chunk: Some(1) },
        ] {
            assert_eq!(tiled(&vae, &z, Noise::Seed(3), tiling), 0.0, "{name}, {tiling:?}");
        }
    }
}

//! Weights in PyTorch's own form: read as what they say, never run, and refused by name where they are broken.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kinoflock_inference::models::pyramid::pipeline::load_vae;
use kinoflock_inference::sink::whole;
use kinoflock_inference::tiling::Tiling;
use kinoflock_inference::weights::{self, Weights};
use kinoflock_inference::{DType, Device, LoadOptions, Tensor};

#[path = "support/torch.rs"]
mod torch;

use torch::written;

const STEM: &str = "diffusion_pytorch_model";

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(path)
}

fn folder_with(bytes: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(format!("{STEM}.bin")), bytes).unwrap();
    folder
}

fn open(folder: &Path, dtype: DType) -> Result<Weights, weights::WeightsError> {
    Weights::open(folder, STEM, None, dtype, &Device::Cpu)
}

/// A file as `torch.save` writes a state dictionary, made by Python's pickler: memo, persistent ids, metadata of modules,
/// two tensors in one storage, a half tensor and one in column order.
#[test]
fn a_file_by_pythons_pickler_gives_its_tensors() {
    let folder = folder_with(&std::fs::read(here("fixtures/pickle.bin")).unwrap());
    weights::check(folder.path(), STEM, None).unwrap();
    let weights = open(folder.path(), DType::F32).unwrap();
    assert_eq!(weights.parameters(), 12 + 12 + 3 + 6);
    let vb = weights.builder();
    let values = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let quarters = |from: usize| (from..from + 12).map(|i| i as f32 / 4.0).collect::<Vec<_>>();
    assert_eq!(values(vb.get((2, 3, 2), "whole.weight").unwrap()), quarters(0));
    assert_eq!(values(vb.get((3, 4), "second.weight").unwrap()), quarters(12));
    assert_eq!(values(vb.get(3, "half.bias").unwrap()), [1.0, -2.0, 0.5]);
    assert_eq!(values(vb.get((3, 2), "turned.weight").unwrap()), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert!(vb.contains_tensor("half.bias") && !vb.contains_tensor("_metadata"));
    let missing = weights.build(|vb| vb.get(1, "nothing")).unwrap_err().to_string();
    assert!(missing.contains("nothing") && missing.contains(".bin"), "{missing}");
    let shape = weights.build(|vb| vb.get(4, "half.bias")).unwrap_err().to_string();
    assert!(shape.contains("half.bias") && shape.contains("[3]"), "{shape}");
}

#[test]
fn a_file_that_is_cut_or_strange_is_named_and_never_a_panic() {
    let bytes = std::fs::read(here("fixtures/pickle.bin")).unwrap();
    let refused = |bytes: &[u8]| {
        let folder = folder_with(bytes);
        let error = open(folder.path(), DType::F32).err().map(|error| error.to_string());
        assert!(error.as_ref().is_none_or(|error| error.contains(".bin")), "{error:?}");
        error.is_some()
    };
    for end in (0..bytes.len()).step_by(7) {
        assert!(refused(&bytes[..end]), "cut at {end}");
    }
    assert!(refused(b"\x80\x02}q\x00."), "a pickle without its zip file");
    // Whatever a changed byte does, it is an error or other tensors.
    for at in (0..bytes.len()).step_by(3) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x15;
        refused(&changed);
    }
    let longer_than_the_file = |shape: Vec<usize>| {
        let tensors = BTreeMap::from([("long".to_owned(), (shape, vec![1.0; 4]))]);
        refused(&written(&tensors))
    };
    assert!(!longer_than_the_file(vec![4]));
    assert!(longer_than_the_file(vec![1_000_000_000]));
    assert!(longer_than_the_file(vec![2_000_000_000; 4]));
}

/// The published VAE is such a file.
#[test]
fn the_vae_decodes_alike_from_both_forms() {
    let source = here("goldens/pyramid-flow-miniflux/pipeline/causal_video_vae");
    let folder = tempfile::tempdir().unwrap();
    let part = folder.path().join("causal_video_vae");
    std::fs::create_dir(&part).unwrap();
    for file in ["config.json", &format!("{STEM}.safetensors")] {
        std::fs::copy(source.join(file), part.join(file)).unwrap();
    }
    torch::turn(&part, STEM);
    let z =
        Tensor::arange(0f32, 48.0, &Device::Cpu).unwrap().cos().unwrap().reshape((1, 4, 2, 2, 3)).unwrap();
    let decoded = |folder: &Path| {
        let (vae, parameters) = load_vae(folder, &LoadOptions::default(), true).unwrap();
        let video = whole(|sink| vae.decode(&z, Tiling::default(), sink)).unwrap();
        (parameters, video.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    assert_eq!(decoded(folder.path()), decoded(source.parent().unwrap()));
}

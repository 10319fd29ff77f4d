//! Weights in PyTorch's own form: read as what they say, never run, and refused by name where they are broken.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use kinoflock_inference::models::pyramid::pipeline::load_vae;
use kinoflock_inference::tiling::Tiling;
use kinoflock_inference::weights::{self, Weights};
use kinoflock_inference::{DType, Device, LoadOptions, Tensor};

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
    std::fs::copy(source.join("config.json"), part.join("config.json")).unwrap();
    let tensors = candle_core::safetensors::load(source.join(format!("{STEM}.safetensors")), &Device::Cpu);
    let tensors = tensors.unwrap().into_iter().map(|(name, tensor)| {
        (name, (tensor.dims().to_vec(), tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()))
    });
    std::fs::write(part.join(format!("{STEM}.bin")), written(&tensors.collect())).unwrap();
    let z =
        Tensor::arange(0f32, 48.0, &Device::Cpu).unwrap().cos().unwrap().reshape((1, 4, 2, 2, 3)).unwrap();
    let decoded = |folder: &Path| {
        let (vae, parameters) = load_vae(folder, &LoadOptions::default(), true).unwrap();
        let video = vae.decode(&z, Tiling::default(), &mut || Ok(())).unwrap();
        (parameters, video.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    assert_eq!(decoded(folder.path()), decoded(source.parent().unwrap()));
}

/// Tensors in the form of `torch.save`: an uncompressed zip file of a pickle and one file for each tensor.
fn written(tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) -> Vec<u8> {
    let mut files = Vec::new();
    let mut pickle = b"\x80\x02}(".to_vec();
    for (index, (name, (shape, values))) in tensors.iter().enumerate() {
        text(&mut pickle, name);
        pickle.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend_from_slice(b"ctorch\nFloatStorage\n");
        text(&mut pickle, &index.to_string());
        text(&mut pickle, "cpu");
        number(&mut pickle, values.len());
        pickle.extend_from_slice(b"tQK\0(");
        shape.iter().for_each(|&size| number(&mut pickle, size));
        pickle.extend_from_slice(b"t(");
        for axis in 0..shape.len() {
            number(
                &mut pickle,
                shape[axis + 1..].iter().fold(1, |all: usize, &size| all.saturating_mul(size)),
            );
        }
        pickle.extend_from_slice(b"t\x89ccollections\nOrderedDict\n)RtR");
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        files.push((format!("archive/data/{index}"), bytes));
    }
    pickle.extend_from_slice(b"u.");
    files.insert(0, ("archive/data.pkl".to_owned(), pickle));
    zip(&files)
}

fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend_from_slice(&(text.len() as u32).to_le_bytes());
    pickle.extend_from_slice(text.as_bytes());
}

/// A whole number of up to 31 bits, as Python's pickler writes most of them.
fn number(pickle: &mut Vec<u8>, number: usize) {
    pickle.push(b'J');
    pickle.extend_from_slice(&i32::try_from(number).unwrap_or(i32::MAX).to_le_bytes());
}

fn zip(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    for (name, bytes) in files {
        let start = out.len() as u32;
        let mut facts = Vec::new();
        let length = (bytes.len() as u32).to_le_bytes();
        facts.write_all(&[20, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        facts.write_all(&crc32(bytes).to_le_bytes()).unwrap();
        facts.write_all(&[length, length].concat()).unwrap();
        facts.write_all(&(name.len() as u16).to_le_bytes()).unwrap();
        facts.write_all(&[0, 0]).unwrap();
        out.extend_from_slice(&[b"PK\x03\x04", &facts[..], name.as_bytes(), bytes].concat());
        directory.extend_from_slice(&[b"PK\x01\x02\x14\0", &facts[..], &[0; 10]].concat());
        directory.extend_from_slice(&[&start.to_le_bytes(), name.as_bytes()].concat());
    }
    let (start, length) = (out.len() as u32, directory.len() as u32);
    out.extend_from_slice(&directory);
    let count = (files.len() as u16).to_le_bytes();
    out.extend_from_slice(&[&b"PK\x05\x06\0\0\0\0"[..], &count, &count].concat());
    out.extend_from_slice(&[&length.to_le_bytes()[..], &start.to_le_bytes(), &[0, 0]].concat());
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, &byte: &u8| {
        let shift = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        (0..8).fold(crc ^ u32::from(byte), shift)
    };
    !bytes.iter().fold(!0, step)
}

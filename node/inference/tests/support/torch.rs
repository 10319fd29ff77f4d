//! Weights in PyTorch's own form, made from safetensors.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Puts `STEM.bin` in the place of a folder's `STEM.safetensors`, whose tensors are all f32.
pub(crate) fn turn(folder: &Path, stem: &str) {
    let file = folder.join(format!("{stem}.safetensors"));
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = tensors.tensors().into_iter().map(|(name, view)| {
        assert_eq!(view.dtype(), safetensors::Dtype::F32);
        let values = view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        (name, (view.shape().to_vec(), values.collect()))
    });
    std::fs::write(folder.join(format!("{stem}.bin")), written(&tensors.collect())).unwrap();
    std::fs::remove_file(file).unwrap();
}

/// Tensors in the form of `torch.save`: an uncompressed zip file of a pickle and one file for each tensor.
pub(crate) fn written(tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) -> Vec<u8> {
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

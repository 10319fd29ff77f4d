//! From frames to files: encodes, writes, syncs, and reports hash and length.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use kinoflock_inference::RgbFrames;
use kinoflock_protocol::id::BlobId;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::{Context, Made, Stop};
use crate::engine::encode::{self, Quality};
use crate::engine::wire::{self, DoneReport, Failure, FileReport, LatentsSummary, Phase, WirePath};

/// The tensor's name in a latents file.
pub(crate) const LATENTS: &str = "latents";

/// Encodes what was made, writes the files that the job wants, and reports.
pub(super) fn finish(made: &Made, context: &mut Context<'_>) -> Result<DoneReport, Stop> {
    if context.cancelled() {
        return Err(Stop::Cancelled);
    }
    context.phase(Phase::Encode);
    let request = context.request;
    let clip = encode::encode_mp4(&made.frames, request.fps, Quality::Archive)
        .map_err(|error| Failure::new(error.code(), &error.to_string(), false))?;
    let clip = write(&request.output.clip, &clip)?;
    let latents = match &request.output.latents {
        Some(path) => Some(write(path, &latents_file(&made.latents, &made.latents_shape)?)?),
        None => None,
    };
    context.close_phase();
    Ok(DoneReport {
        job: request.job,
        clip,
        latents,
        step_root: wire::step_root(&made.step_hashes),
        steps_done: made.steps_done,
        frames: made.frames.count as u32,
        width: made.frames.width as u32,
        height: made.frames.height as u32,
        timings: context.timings,
        constant: is_constant(&made.frames),
        latents_summary: LatentsSummary::of(&made.latents),
    })
}

/// Writes a file under a temporary name, syncs it, and gives it its name.
pub(super) fn write(path: &WirePath, bytes: &[u8]) -> Result<FileReport, Failure> {
    let target = Path::new(path.as_str());
    let part = target.with_added_extension("part");
    let written = (|| {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&part, target)?;
        match target.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    })();
    match written {
        Ok(()) => Ok(FileReport { path: path.clone(), len: bytes.len() as u64, blake3: BlobId::of(bytes) }),
        Err(error) => {
            let _never_made = std::fs::remove_file(&part);
            Err(not_written(&error, bytes.len()))
        }
    }
}

fn not_written(error: &std::io::Error, bytes: usize) -> Failure {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            let text = format!("the node's disk is full: {bytes} bytes of the result could not be written");
            Failure::new("disk_full", &text, true)
        }
        _ => {
            Failure::new("write", &format!("the result of {bytes} bytes could not be written: {error}"), true)
        }
    }
}

/// One safetensors file with the tensor `latents`, f32. Byte for byte the same for the same values.
fn latents_file(values: &[f32], shape: &[usize]) -> Result<Vec<u8>, Failure> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let fault = |error: safetensors::SafeTensorError| Failure::new("latents", &error.to_string(), false);
    let view = TensorView::new(Dtype::F32, shape.to_vec(), &bytes).map_err(fault)?;
    // One entry only: the order of several is not fixed.
    let metadata = HashMap::from([("format".to_owned(), "kinoflock-latents-1".to_owned())]);
    safetensors::serialize([(LATENTS, view)], Some(metadata)).map_err(fault)
}

/// Whether every pixel of every frame has the same colour.
fn is_constant(frames: &RgbFrames) -> bool {
    let pixels = frames.data.as_chunks::<3>().0;
    pixels.windows(2).all(|pair| pair[0] == pair[1])
}

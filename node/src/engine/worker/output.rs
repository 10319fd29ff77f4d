//! From frames to files: waits for the encoder, writes, syncs, and reports hash and length.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use kinoflock_inference::pipeline::touch::FINAL;
use kinoflock_protocol::id::BlobId;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::encoding::Clip;
use super::{Context, Made, Stop};
use crate::engine::wire::{self, DoneReport, Failure, FileReport, LatentsSummary, Phase, WirePath};

/// The tensor's name in a latents file.
pub(crate) const LATENTS: &str = "latents";

/// Ends the clip, writes the files that the job wants, and reports.
pub(super) fn finish(made: &Made, context: &mut Context<'_>) -> Result<DoneReport, Stop> {
    if context.cancelled() {
        return Err(Stop::Cancelled);
    }
    context.phase(Phase::Encode);
    let request = context.request;
    let Some(encoding) = context.encoding.take() else {
        return Err(Failure::new("no_frames", "the engine made no frames", false).into());
    };
    let Clip { bytes, frames, constant } = encoding.finish()?;
    let clip = write(Path::new(request.output.clip.as_str()), &bytes)?;
    let latents = match &request.output.latents {
        Some(path) => Some(write(Path::new(path.as_str()), &latents_file(&tensors(made))?)?),
        None => None,
    };
    let steps = wire::StepRecord::new(&made.state_hashes, &made.commitment);
    if let Some(folder) = &request.output.states {
        let folder = Path::new(folder.as_str());
        std::fs::create_dir_all(folder).map_err(|error| not_written(&error, 0))?;
        write(&folder.join(wire::STEPS), &kinoflock_protocol::codec::encode(&steps))?;
    }
    context.close_phase();
    Ok(DoneReport {
        job: request.job,
        clip,
        latents,
        step_root: kinoflock_protocol::audit::root(&steps.leaves),
        steps_done: made.steps_done,
        frames: frames as u32,
        width: request.width,
        height: request.height,
        timings: context.timings,
        constant,
        latents_summary: LatentsSummary::of(&made.latents),
    })
}

/// Writes a file under a temporary name, syncs it, and gives it its name.
pub(super) fn write(target: &Path, bytes: &[u8]) -> Result<FileReport, Failure> {
    let name = target.to_str().and_then(|path| WirePath::new(path).ok());
    let path =
        name.ok_or_else(|| Failure::new("write", "the result's path is too long or not UTF-8", false))?;
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
        Ok(()) => Ok(FileReport { path, len: bytes.len() as u64, blake3: BlobId::of(bytes) }),
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

/// A tensor's name, shape and values.
type Named<'a> = (&'a str, &'a [usize], &'a [f32]);

/// The final latents alone as `latents`; or, beside what else comes back, as `final`.
fn tensors(made: &Made) -> Vec<Named<'_>> {
    let name = if made.kept.is_empty() { LATENTS } else { FINAL };
    let kept = made.kept.iter().map(|(name, (shape, values))| (name.as_str(), &shape[..], &values[..]));
    kept.chain([(name, &made.latents_shape[..], &made.latents[..])]).collect()
}

/// One safetensors file of f32 tensors. Byte for byte the same for the same values.
pub(super) fn latents_file(tensors: &[Named<'_>]) -> Result<Vec<u8>, Failure> {
    let fault = |error: safetensors::SafeTensorError| Failure::new("latents", &error.to_string(), false);
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, _, values)| bytes(values)).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for ((name, shape, _), data) in tensors.iter().zip(&data) {
        views.push((*name, TensorView::new(Dtype::F32, shape.to_vec(), data).map_err(fault)?));
    }
    // One entry only: the order of several is not fixed.
    let metadata = HashMap::from([("format".to_owned(), "kinoflock-latents-1".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(fault)
}

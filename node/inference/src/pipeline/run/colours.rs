//! Colours of previews for a model whose folder names none: learnt from what its own decoder makes of a small field of
//! noise, in which every cell has latents of its own. No figure of another program is taken on trust.

use candle_core::Device;

use super::{VideoModel, decoded};
use crate::error::Error;
use crate::pipeline::GenerateRequest;
use crate::pipeline::latents::LatentRgb;
use crate::rng::{Stream, normal_tensor};

/// Cells for each unknown of the map.
const CELLS_EACH: usize = 4;
/// The smallest side of the field, cells.
const LEAST_SIDE: usize = 8;
/// The field's seed: the colours of a model are the same in every run.
const SEED: u64 = 0;

/// The linear map from latents to colours that comes nearest to the model's decoder.
pub(super) fn learnt<M: VideoModel>(model: &M, request: &GenerateRequest) -> Result<LatentRgb, Error> {
    let work = &model.facts().work;
    let channels = work.latent_channels;
    let cells = (CELLS_EACH * (channels + 1)) as f64;
    // Patches of tokens do not matter to a decoder; an even side is what some of them need.
    let side = (cells.sqrt().ceil() as usize).max(LEAST_SIDE).next_multiple_of(2);
    let field = normal_tensor(SEED, Stream::Initial, (1, channels, 1, side, side), &Device::Cpu)?;
    let request = GenerateRequest { decode_noise: Vec::new(), ..request.clone() };
    let picture = decoded(model, &request, &field)?.narrow(0, 0, 1)?.to_device(&Device::Cpu)?;
    let colours = picture.avg_pool2d(work.spatial_ratio)?;
    Ok(LatentRgb::fitted(&field.reshape((channels, side * side))?, &colours.reshape((3, side * side))?)?)
}

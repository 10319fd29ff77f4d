//! Tensors in the naming of LTX-Video's own repository, which single and GGUF files have, by diffusers' names.

use super::checkpoint::VaePlaces;

/// Before the transformer's names in a file that holds more.
const TRANSFORMER: &str = "model.diffusion_model.";
/// Before the VAE's.
const VAE: &str = "vae.";
const STATISTICS: &str = "per_channel_statistics.";

/// The name by which [`super::transformer::LtxTransformer`] asks for a tensor, `None` for the VAE's. Diffusers' names stay
/// as they are.
#[must_use]
pub fn transformer_name(name: &str) -> Option<String> {
    if name.starts_with(VAE) {
        return None;
    }
    let name = name.strip_prefix(TRANSFORMER).unwrap_or(name);
    let parts = name.split('.').map(|part| match part {
        "patchify_proj" => "proj_in",
        "adaln_single" => "time_embed",
        "q_norm" => "norm_q",
        "k_norm" => "norm_k",
        part => part,
    });
    Some(parts.collect::<Vec<_>>().join("."))
}

/// The name by which [`super::vae::LtxVae`] asks for a tensor of a single file, `None` for the transformer's and for
/// statistics that nobody asks for.
#[must_use]
pub(super) fn vae_name(name: &str, places: &VaePlaces) -> Option<String> {
    let name = name.strip_prefix(VAE)?;
    if let Some(statistic) = name.strip_prefix(STATISTICS) {
        return match statistic {
            "mean-of-means" => Some("latents_mean".to_owned()),
            "std-of-means" => Some("latents_std".to_owned()),
            _ => None,
        };
    }
    let mut parts = name.split('.');
    let side = parts.next()?;
    let mut new = vec![side.to_owned()];
    let mut rest = parts.peekable();
    if let Some(blocks @ ("down_blocks" | "up_blocks")) = rest.peek().copied() {
        rest.next();
        let index = rest.next()?.parse::<usize>().ok()?;
        let places = if blocks == "down_blocks" { &places.encoder } else { &places.decoder };
        new.push(places.get(index)?.clone());
    }
    while let Some(part) = rest.next() {
        match part {
            "res_blocks" => new.push("resnets".to_owned()),
            "last_time_embedder" => new.push("time_embedder".to_owned()),
            "last_scale_shift_table" => new.push("scale_shift_table".to_owned()),
            "conv_shortcut" => new.extend(["conv_shortcut".to_owned(), "conv".to_owned()]),
            "norm3" if rest.peek() == Some(&"norm") => {
                rest.next();
                new.push("norm3".to_owned());
            }
            part => new.push(part.to_owned()),
        }
    }
    Some(new.join("."))
}

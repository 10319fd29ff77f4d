//! What the tensors of a LoRA are called: `PREFIX.LAYER.PART`, in the diffusers naming (PEFT's) and in those of the models'
//! own repositories, of kohya's tools and of musubi-tuner (diffusers' `loaders/lora_conversion_utils.py`).

/// What a tensor is to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `A`, `(rank, input)`.
    Down,
    /// `B`, `(output, rank)`.
    Up,
    /// A bias that belongs to `B` and is scaled as it is.
    UpBias,
    /// What is added to the layer's bias.
    Bias,
    /// What is added to the layer's weights.
    Whole,
    /// The number that is divided by the rank.
    Alpha,
}

/// A tensor's name, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// A part of a layer.
    Part {
        /// Which component the layer is of: `transformer`, or `transformer_2` where there are two.
        component: String,
        /// The layer, as the file names it.
        layer: String,
        /// Which part.
        part: Part,
    },
    /// What the reference passes over too.
    Ignored,
}

/// The ends of names, and what they mean.
const PARTS: [(&str, Part); 11] = [
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_A.default.weight", Part::Down),
    (".lora_B.default.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora_B.bias", Part::UpBias),
    (".lora_B.default.bias", Part::UpBias),
    (".diff_b", Part::Bias),
    (".diff", Part::Whole),
    (".alpha", Part::Alpha),
];
/// Prefixes of the transformer's layers; the longest that fits is taken off.
const PREFIXES: [&str; 5] =
    ["base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", FLAT];
/// Of musubi-tuner, which writes `_` for every dot.
const FLAT: &str = "lora_unet_";
/// The component that a file speaks of without saying so.
pub const TRANSFORMER: &str = "transformer";
const SECOND: &str = "transformer_2";
/// Prefixes of components that no adapter changes here, nor in the reference.
const OTHERS: [&str; 3] = ["text_encoder.", "text_encoder_2.", "lora_te"];
/// What DoRA adds, which the reference takes off.
const DORA: &str = ".dora_scale";

/// Understands a tensor's name; `None` if it is no name of a LoRA's tensor.
#[must_use]
pub fn parse(key: &str) -> Option<Key> {
    if OTHERS.iter().any(|prefix| key.starts_with(prefix)) || key.ends_with(DORA) {
        return Some(Key::Ignored);
    }
    let (layer, part) = PARTS.iter().find_map(|(end, part)| Some((key.strip_suffix(end)?, *part)))?;
    let (component, layer) = match layer.strip_prefix(SECOND).and_then(|rest| rest.strip_prefix('.')) {
        Some(layer) => (SECOND, layer.to_owned()),
        None => (TRANSFORMER, without_prefix(layer)?),
    };
    // The reference leaves out differences of norms, and whole weights but those of Wan's last layer.
    let is_norm = matches!(part, Part::Bias | Part::Whole) && layer.contains("norm");
    if is_norm || (part == Part::Whole && layer != HEAD) {
        return Some(Key::Ignored);
    }
    Some(Key::Part { component: component.to_owned(), layer, part })
}

fn without_prefix(layer: &str) -> Option<String> {
    match PREFIXES.iter().find_map(|prefix| Some((*prefix, layer.strip_prefix(prefix)?))) {
        Some((FLAT, flat)) => unflattened(flat),
        Some((_, rest)) => Some(rest.to_owned()),
        None => Some(layer.to_owned()),
    }
}

/// `blocks_3_self_attn_q` with its dots again.
fn unflattened(flat: &str) -> Option<String> {
    let (number, rest) = flat.strip_prefix("blocks_")?.split_once('_')?;
    let parts = ["self_attn", "cross_attn", "ffn"];
    let (part, name) =
        parts.iter().find_map(|part| Some((part, rest.strip_prefix(part)?.strip_prefix('_')?)))?;
    Some(format!("blocks.{number}.{part}.{name}"))
}

/// Wan's last layer in its own naming.
const HEAD: &str = "head.head";

/// Layers outside the blocks: the own repositories' names, and the diffusers names.
const RENAMED: [(&str, &str); 11] = [
    // Wan
    (HEAD, "proj_out"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    // LTX-Video
    ("patchify_proj", "proj_in"),
    ("adaln_single.linear", "time_embed.linear"),
    ("adaln_single.emb", "time_embed.emb"),
];
/// Layers of Wan's blocks.
const WAN_BLOCK: [(&str, &str); 12] = [
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
];

/// The diffusers name of a layer that is named as in its model's own repository; `None` where that is no other.
#[must_use]
pub fn diffusers_name(layer: &str) -> Option<String> {
    if let Some((block, name)) = layer.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
        let (_, theirs) = WAN_BLOCK.iter().find(|(own, _)| *own == name)?;
        return Some(format!("blocks.{block}.{theirs}"));
    }
    RENAMED.iter().find_map(|(own, theirs)| {
        let rest = layer.strip_prefix(own)?;
        (rest.is_empty() || rest.starts_with('.')).then(|| format!("{theirs}{rest}"))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn part(key: &str) -> (String, String, Part) {
        match parse(key).unwrap() {
            Key::Part { component, layer, part } => (component, layer, part),
            Key::Ignored => panic!("{key} is passed over"),
        }
    }

    #[test]
    fn both_namings_mean_the_same_layers() {
        for (key, component, layer, what) in [
            ("transformer.blocks.3.attn1.to_q.lora_A.weight", TRANSFORMER, "blocks.3.attn1.to_q", Part::Down),
            (
                "diffusion_model.blocks.3.self_attn.q.lora_down.weight",
                TRANSFORMER,
                "blocks.3.attn1.to_q",
                Part::Down,
            ),
            (
                "lora_unet_blocks_3_cross_attn_k_img.lora_up.weight",
                TRANSFORMER,
                "blocks.3.attn2.add_k_proj",
                Part::Up,
            ),
            ("lora_unet_blocks_12_ffn_0.alpha", TRANSFORMER, "blocks.12.ffn.net.0.proj", Part::Alpha),
            ("transformer_2.proj_out.lora_B.weight", SECOND, "proj_out", Part::Up),
            ("diffusion_model.head.head.diff", TRANSFORMER, "proj_out", Part::Whole),
            (
                "diffusion_model.adaln_single.emb.timestep_embedder.linear_1.lora_A.weight",
                TRANSFORMER,
                "time_embed.emb.timestep_embedder.linear_1",
                Part::Down,
            ),
            ("base_model.model.proj_in.lora_B.bias", TRANSFORMER, "proj_in", Part::UpBias),
            (
                "transformer_blocks.0.attn1.to_v.lora_A.default.weight",
                TRANSFORMER,
                "transformer_blocks.0.attn1.to_v",
                Part::Down,
            ),
        ] {
            let (found, own, part) = part(key);
            assert_eq!((found.as_str(), part), (component, what), "{key}");
            assert_eq!(diffusers_name(&own).unwrap_or(own), layer, "{key}");
        }
    }

    #[test]
    fn what_the_reference_passes_over_is_passed_over_and_the_rest_is_unknown() {
        for key in [
            "text_encoder.layers.0.q.lora_A.weight",
            "lora_te_layers_0.lora_down.weight",
            "transformer.proj_out.dora_scale",
            "diffusion_model.blocks.0.norm3.diff",
            "diffusion_model.blocks.0.norm3.diff_b",
            "diffusion_model.blocks.0.ffn.0.diff",
        ] {
            assert_eq!(parse(key), Some(Key::Ignored), "{key}");
        }
        for key in
            ["", "weight", "transformer.proj_out.weight", "lora_unet_x.alpha", "a.hada_w1_a", "a.lokr_w1"]
        {
            assert_eq!(parse(key), None, "{key}");
        }
    }
}

//! The transformer's tensors in the naming of Wan's own repository, which GGUF and single files have, by diffusers' names.

/// Before every name in some files.
const PREFIX: &str = "model.diffusion_model.";
/// Of the names outside the blocks.
const OUTER: &[(&str, &str)] = &[
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"),
];
/// Of what is within a block. Its third norm has weights there, and is the second here; neither naming's other norms have.
const INNER: &[(&str, &str)] = &[
    ("modulation", "scale_shift_table"),
    ("norm3.", "norm2."),
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
];
/// Of what is within an attention.
const ATTENTION: &[(&str, &str)] = &[
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("o.", "to_out.0."),
    ("k_img.", "add_k_proj."),
    ("v_img.", "add_v_proj."),
    ("norm_k_img.", "norm_added_k."),
];

/// The name by which [`super::transformer::WanTransformer`] asks for a tensor. Diffusers' names stay as they are.
#[must_use]
pub fn transformer_name(name: &str) -> Option<String> {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    let block = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
    let Some((index, rest)) = block else { return Some(begun(name, OUTER)) };
    let attention = [("self_attn.", "attn1."), ("cross_attn.", "attn2.")];
    let inner = match attention.iter().find_map(|(theirs, ours)| Some((ours, rest.strip_prefix(theirs)?))) {
        Some((ours, rest)) => format!("{ours}{}", begun(rest, ATTENTION)),
        None => begun(rest, INNER),
    };
    Some(format!("blocks.{index}.{inner}"))
}

/// With the first of these beginnings exchanged that the name has.
fn begun(name: &str, beginnings: &[(&str, &str)]) -> String {
    let found = beginnings.iter().find_map(|(theirs, ours)| Some((ours, name.strip_prefix(theirs)?)));
    found.map_or_else(|| name.to_owned(), |(ours, rest)| format!("{ours}{rest}"))
}

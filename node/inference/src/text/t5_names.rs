//! T5's tensors in llama.cpp's naming, which its GGUF files have, by the names of the published folders.

/// The name by which [`super::T5Encoder`] asks for a tensor; `None` for the decoder's. `gated` says whether the
/// feed-forward is. Other namings stay as they are.
#[must_use]
pub fn t5_name(name: &str, gated: bool) -> Option<String> {
    if name.starts_with("dec.") {
        return None;
    }
    let renamed = match name.strip_prefix("enc.") {
        Some("output_norm.weight") => "encoder.final_layer_norm.weight".to_owned(),
        Some(rest) => in_block(rest, gated).unwrap_or_else(|| name.to_owned()),
        None if name == "token_embd.weight" => "shared.weight".to_owned(),
        None => name.to_owned(),
    };
    Some(renamed)
}

/// Of `blk.N.PART.weight` and the like.
fn in_block(rest: &str, gated: bool) -> Option<String> {
    let (index, rest) = rest.strip_prefix("blk.")?.split_once('.')?;
    let (part, last) = rest.split_once('.')?;
    let part = match part {
        "attn_q" => "layer.0.SelfAttention.q",
        "attn_k" => "layer.0.SelfAttention.k",
        "attn_v" => "layer.0.SelfAttention.v",
        "attn_o" => "layer.0.SelfAttention.o",
        "attn_rel_b" => "layer.0.SelfAttention.relative_attention_bias",
        "attn_norm" => "layer.0.layer_norm",
        "ffn_gate" => "layer.1.DenseReluDense.wi_0",
        "ffn_up" if gated => "layer.1.DenseReluDense.wi_1",
        "ffn_up" => "layer.1.DenseReluDense.wi",
        "ffn_down" => "layer.1.DenseReluDense.wo",
        "ffn_norm" => "layer.1.layer_norm",
        _ => return None,
    };
    Some(format!("encoder.block.{index}.{part}.{last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_namings_come_to_the_published_one() {
        let name = |name: &str| t5_name(name, true).unwrap_or_default();
        for (theirs, ours) in [
            ("token_embd.weight", "shared.weight"),
            ("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
            ("enc.blk.11.attn_q.weight", "encoder.block.11.layer.0.SelfAttention.q.weight"),
            (
                "enc.blk.0.attn_rel_b.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            ),
            ("enc.blk.3.ffn_up.weight", "encoder.block.3.layer.1.DenseReluDense.wi_1.weight"),
            ("enc.blk.3.ffn_down.weight", "encoder.block.3.layer.1.DenseReluDense.wo.weight"),
        ] {
            assert_eq!(name(theirs), ours);
            assert_eq!(name(ours), ours);
        }
        assert_eq!(t5_name("dec.blk.0.attn_q.weight", true), None);
        let plain = t5_name("enc.blk.3.ffn_up.weight", false).unwrap_or_default();
        assert_eq!(plain, "encoder.block.3.layer.1.DenseReluDense.wi.weight");
    }
}

//! What text and picture encoders hold while they compute.

use candle_core::DType;

use super::ledger::{Ghost, Ledger, attention, cat};
use crate::text::{ClipTextConfig, T5Config};
use crate::vision::ClipVisionConfig;

/// Blocks that are gone through where all are alike: what the first leaves is there while the second computes.
const ALIKE: usize = 2;

/// The embeddings that [`crate::text::T5Encoder`] makes of one prompt, `[1, tokens, width]`.
pub(crate) fn t5(ledger: &Ledger, config: &T5Config, tokens: usize, masked: bool, dtype: DType) -> Ghost {
    let mut x = ledger.ghost(&[1, tokens, config.d_model], dtype);
    let _buckets = ledger.ghost(&[tokens, tokens], DType::U32);
    let own_bias = || {
        let rows = ledger.ghost(&[tokens, tokens, config.num_heads], dtype).to(DType::F32);
        let own = rows.turned(&[1, config.num_heads, tokens, tokens]);
        drop(rows);
        if masked { own.same() } else { own }
    };
    let mut bias = own_bias();
    for index in 0..config.num_layers.min(ALIKE) {
        if index > 0 && config.model_type == "umt5" {
            bias = own_bias();
        }
        x = t5_block(config, &x);
    }
    drop(bias);
    x.norm()
}

fn t5_block(config: &T5Config, x: &Ghost) -> Ghost {
    let x = {
        let _mixed = t5_attend(config, &x.norm());
        x.same()
    };
    let _fed = t5_feed(config, &x.norm());
    x.same()
}

fn t5_attend(config: &T5Config, x: &Ghost) -> Ghost {
    let inner = config.num_heads * config.d_kv;
    let heads = |x: Ghost| x.view(&[x.dim(0), x.dim(1), config.num_heads, config.d_kv]);
    let (query, key) = (heads(x.linear(inner)), heads(x.linear(inner)));
    let mixed = attention(&query, &key, &heads(x.linear(inner)));
    mixed.view(&[x.dim(0), x.dim(1), inner]).linear(config.d_model)
}

fn t5_feed(config: &T5Config, x: &Ghost) -> Ghost {
    let mut inner = x.linear(config.d_ff).activated();
    if config.feed_forward_proj.starts_with("gated-") {
        let _other = x.linear(config.d_ff);
        inner = inner.same();
    }
    inner.linear(config.d_model)
}

/// What [`crate::text::ClipTextEncoder`] makes of one prompt.
pub(crate) fn clip_text(ledger: &Ledger, config: &ClipTextConfig, tokens: usize, dtype: DType) -> Ghost {
    let width = config.hidden_size;
    let mut x = ledger.ghost(&[1, tokens, width], dtype).same();
    let _mask = ledger.wide(&[1, 1, tokens, tokens]);
    for _ in 0..config.num_hidden_layers.min(ALIKE) {
        x = clip_block(&x, config.intermediate_size, config.num_attention_heads);
    }
    x.norm()
}

/// What [`crate::vision::ClipVisionEncoder`] makes of so many pictures.
pub(crate) fn vision(ledger: &Ledger, config: &ClipVisionConfig, pictures: usize) -> Ghost {
    let (side, patch, width) = (config.image_size, config.patch_size, config.hidden_size);
    let pixels = ledger.wide(&[pictures, 3, side, side]);
    let count = (side / patch) * (side / patch);
    let cells = pixels.turned(&[pictures, count, 3 * patch * patch]).linear(width);
    let mut x = cat(&[&ledger.wide(&[pictures, 1, width]), &cells], 1).same();
    drop((pixels, cells));
    x = x.norm();
    for _ in 0..config.num_hidden_layers.saturating_sub(1).min(ALIKE) {
        x = clip_block(&x, config.intermediate_size, config.num_attention_heads);
    }
    x
}

fn clip_block(x: &Ghost, inner: usize, heads: usize) -> Ghost {
    let width = x.dim(2);
    let split = |x: Ghost| x.view(&[x.dim(0), x.dim(1), heads, width / heads.max(1)]);
    let normed = x.norm();
    let query = split(normed.linear(width));
    let (key, value) = (split(normed.linear(width)), split(normed.linear(width)));
    let mixed = attention(&query, &key, &value).view(x.dims());
    let x = mixed.linear(width);
    let inner = x.norm().linear(inner);
    let inner = inner.same().same().same();
    inner.linear(width)
}

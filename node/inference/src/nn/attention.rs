//! Scaled dot-product attention, dispatched here and nowhere else.
//!
//! Queries, keys and values are `(batch, tokens, heads, channels)`, as projections leave them, so nothing is
//! transposed on the CPU.

mod cpu;

use candle_core::{D, DType, Result, Tensor};

use super::cpu::fast;

/// The generic way makes scores of at most this many elements at once.
pub(crate) const SCORES_AT_ONCE: usize = 1 << 28;

/// `softmax(q k^T scale + mask) v`.
///
/// `q` is `(batch, queries, heads, channels)`; `k` and `v` are `(batch, keys, heads, channels)`, where `v` may have
/// other channels. `mask` is added to the scores: `(batch or 1, heads or 1, queries or 1, keys)`. The result is
/// `(batch, queries, heads, channels of v)` in `q`'s type. Scores and softmax are in f32 for half types as well.
///
/// # Errors
/// When shapes do not fit or the device fails.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    check(q, k, v, mask)?;
    let mut all = vec![q, k, v];
    all.extend(mask);
    if fast(&all) {
        return cpu::attention(q, k, v, mask, scale as f32);
    }
    if q.device().is_cpu() && q.dtype() != DType::F32 && !all.iter().any(|t| t.track_op()) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let mask = mask.map(wide).transpose()?;
        return attention(&wide(q)?, &wide(k)?, &wide(v)?, mask.as_ref(), scale)?.to_dtype(q.dtype());
    }
    #[cfg(feature = "flash-attn")]
    if mask.is_none() && q.device().is_cuda() && matches!(q.dtype(), DType::F16 | DType::BF16) {
        return flash(q, k, v, scale);
    }
    generic(q, k, v, mask, scale)
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<()> {
    let (batch, queries, heads, channels) = q.dims4()?;
    let (_, keys, _, _) = k.dims4()?;
    let (v_batch, v_keys, v_heads, _) = v.dims4()?;
    if k.dims() != [batch, keys, heads, channels] || (v_batch, v_keys, v_heads) != (batch, keys, heads) {
        candle_core::bail!(
            "attention of queries {:?} over keys {:?} and values {:?}: shapes do not fit",
            q.shape(),
            k.shape(),
            v.shape()
        );
    }
    if let Some(mask) = mask {
        let (b, h, s, t) = mask.dims4()?;
        let fits = (b == 1 || b == batch) && (h == 1 || h == heads) && (s == 1 || s == queries) && t == keys;
        if !fits {
            candle_core::bail!(
                "mask {:?} does not broadcast to ({batch}, {heads}, {queries}, {keys})",
                mask.shape()
            );
        }
    }
    Ok(())
}

/// FlashAttention-2, which knows no mask and no f32.
#[cfg(feature = "flash-attn")]
fn flash(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    candle_flash_attn::flash_attn(&q.contiguous()?, &k.contiguous()?, &v.contiguous()?, scale as f32, false)
}

/// Matrix products over blocks of queries, so that the scores have a bound.
fn generic(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    let dtype = q.dtype();
    let (batch, queries, heads, _) = q.dims4()?;
    let keys = k.dim(1)?;
    let q = (q.transpose(1, 2)?.contiguous()? * scale)?;
    let k = k.permute((0, 2, 3, 1))?.contiguous()?;
    let v = v.transpose(1, 2)?.contiguous()?;
    let step = (SCORES_AT_ONCE / (batch * heads * keys).max(1)).clamp(1, queries.max(1));
    let mut parts = Vec::new();
    for start in (0..queries).step_by(step) {
        let len = step.min(queries - start);
        let mut scores = q.narrow(2, start, len)?.matmul(&k)?.to_dtype(DType::F32)?;
        if let Some(mask) = mask {
            let mask = if mask.dim(2)? == 1 { mask.clone() } else { mask.narrow(2, start, len)? };
            scores = scores.broadcast_add(&mask.to_dtype(DType::F32)?)?;
        }
        parts.push(candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(dtype)?.matmul(&v)?);
    }
    let out = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 2)? };
    out.transpose(1, 2)?.contiguous()
}

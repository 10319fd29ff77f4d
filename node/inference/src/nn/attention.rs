//! Scaled dot-product attention, dispatched here and nowhere else.
//!
//! Queries, keys and values are `(batch, tokens, heads, channels)`, as projections leave them, so nothing is
//! transposed on the CPU.

mod cpu;

use candle_core::{D, DType, Result, Tensor};

use super::cpu::fast;

/// The generic way makes at most this many scores at once.
pub(crate) const SCORES_AT_ONCE: usize = 1 << 27;

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
    generic(q, k, v, mask, scale, SCORES_AT_ONCE)
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

/// Matrix products over blocks of queries, so that no more than `at_once` scores are there at a time.
///
/// Where nobody wants a gradient the softmax is one kernel, which sums in f32 whatever the scores are; a mask is added to
/// scores in f32, since its smallest number is none of a half type's.
fn generic(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    scale: f64,
    at_once: usize,
) -> Result<Tensor> {
    let dtype = q.dtype();
    let tracked = [q, k, v].into_iter().chain(mask).any(Tensor::track_op);
    let (batch, queries, heads, _) = q.dims4()?;
    let keys = k.dim(1)?;
    let q = (q.transpose(1, 2)?.contiguous()? * scale)?;
    let k = k.permute((0, 2, 3, 1))?.contiguous()?;
    let v = v.transpose(1, 2)?.contiguous()?;
    let step = (at_once / (batch * heads * keys).max(1)).clamp(1, queries.max(1));
    let mut parts = Vec::with_capacity(queries.div_ceil(step));
    for start in (0..queries).step_by(step) {
        let len = step.min(queries - start);
        let mut scores = q.narrow(2, start, len)?.matmul(&k)?;
        if tracked || mask.is_some() {
            scores = scores.to_dtype(DType::F32)?;
        }
        if let Some(mask) = mask {
            let mask = if mask.dim(2)? == 1 { mask.clone() } else { mask.narrow(2, start, len)? };
            scores = scores.broadcast_add(&mask.to_dtype(DType::F32)?)?;
        }
        let weights = match tracked {
            true => candle_nn::ops::softmax(&scores, D::Minus1)?,
            false => candle_nn::ops::softmax_last_dim(&scores)?,
        };
        parts.push(weights.to_dtype(dtype)?.matmul(&v)?);
    }
    let out = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 2)? };
    out.transpose(1, 2)?.contiguous()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    fn random(shape: [usize; 4]) -> Tensor {
        Tensor::randn(0f32, 1.0, &shape[..], &Device::Cpu).unwrap()
    }

    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        let difference = (a.to_dtype(DType::F32).unwrap() - b.to_dtype(DType::F32).unwrap()).unwrap();
        difference.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn blocks_of_queries_give_what_the_cpu_kernel_gives() {
        let (q, k, v) = (random([2, 37, 3, 16]), random([2, 50, 3, 16]), random([2, 50, 3, 8]));
        let masks = [None, Some(random([1, 1, 1, 50])), Some(random([2, 3, 37, 50]))];
        for mask in masks.iter().map(Option::as_ref) {
            let fast = attention(&q, &k, &v, mask, 0.25).unwrap();
            // One query at a time, some with a shorter last block, all at once.
            for at_once in [1, 2 * 3 * 50 * 5, usize::MAX] {
                let blocks = generic(&q, &k, &v, mask, 0.25, at_once).unwrap();
                assert_eq!(blocks.dims(), fast.dims());
                assert!(worst(&blocks, &fast) < 1e-5, "{at_once} scores at once");
            }
        }
    }

    #[test]
    fn half_types_go_through_blocks_and_come_near() {
        let half = |t: Tensor| t.to_dtype(DType::BF16).unwrap();
        let (q, k, v) =
            (half(random([1, 40, 2, 32])), half(random([1, 60, 2, 32])), half(random([1, 60, 2, 32])));
        let fast = attention(&q, &k, &v, None, 0.18).unwrap();
        let blocks = generic(&q, &k, &v, None, 0.18, 2 * 60 * 7).unwrap();
        assert_eq!((fast.dtype(), blocks.dtype()), (DType::BF16, DType::BF16));
        assert!(worst(&blocks, &fast) < 0.03);
    }
}

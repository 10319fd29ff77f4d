//! Rotary position embedding on neighbouring pairs of channels, heads side by side.

use candle_core::{DType, Result, Tensor};

use super::cpu::{View, fast, rows_per_task, written};

/// Turns each pair of channels `(2i, 2i + 1)` of `x` `(batch, tokens, heads, channels)` by an angle, in f32, and gives
/// `x`'s own type back. `cos` and `sin` are `(tokens, channels / 2)` where heads share angles, or
/// `(tokens, heads, channels / 2)`.
///
/// # Errors
/// When shapes do not fit or the device fails.
pub fn rotate_pairs(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (batch, tokens, heads, channels) = x.dims4()?;
    let shared = [tokens, channels / 2];
    let own = [tokens, heads, channels / 2];
    if cos.dims() != sin.dims() || (cos.dims() != shared && cos.dims() != own) || !channels.is_multiple_of(2)
    {
        let (x, cos, sin) = (x.shape(), cos.shape(), sin.shape());
        candle_core::bail!("{x:?} cannot be turned by tables {cos:?} and {sin:?}");
    }
    if fast(&[x, cos, sin]) {
        return rotate_cpu(x, cos, sin);
    }
    // A token is a batch entry of one position, so that nothing is transposed.
    let (entries, lanes) = if cos.rank() == 2 { (tokens, heads) } else { (tokens * heads, 1) };
    let spread = |table: &Tensor| -> Result<Tensor> {
        let table = table.to_dtype(DType::F32)?.reshape((1, entries, channels / 2))?;
        table.broadcast_as((batch, entries, channels / 2))?.contiguous()?.reshape((
            batch * entries,
            1,
            channels / 2,
        ))
    };
    let wide = x.to_dtype(DType::F32)?.contiguous()?.reshape((batch * entries, lanes, 1, channels))?;
    let turned = candle_nn::rotary_emb::rope_i(&wide, &spread(cos)?, &spread(sin)?)?;
    turned.reshape((batch, tokens, heads, channels))?.to_dtype(x.dtype())
}

fn rotate_cpu(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, tokens, heads, channels) = x.dims4()?;
    let (x, cos, sin) = (x.contiguous()?, cos.contiguous()?, sin.contiguous()?);
    let (source, cos_view, sin_view) = (View::new(&x)?, View::new(&cos)?, View::new(&sin)?);
    let (source, cosines, sines) = (source.slice()?, cos_view.slice()?, sin_view.slice()?);
    let (half, width) = (channels / 2, heads * channels);
    let own = if cos.rank() == 2 { 0 } else { half };
    let row = cosines.len() / tokens;
    let task = rows_per_task(source.len() / width, width);
    let out = written(source.len(), task * width, |index, out| {
        let source = &source[index * task * width..][..out.len()];
        for (i, (out, x)) in out.chunks_exact_mut(width).zip(source.chunks_exact(width)).enumerate() {
            let at = (index * task + i) % tokens * row;
            for (head, (out, x)) in out.chunks_exact_mut(channels).zip(x.chunks_exact(channels)).enumerate() {
                let start = at + head * own;
                turn(x, &cosines[start..start + half], &sines[start..start + half], out);
            }
        }
    });
    Tensor::from_vec(out, x.shape(), x.device())
}

fn turn(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let pairs = out.as_chunks_mut::<2>().0.iter_mut().zip(x.as_chunks::<2>().0);
    for ((out, [a, b]), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
        *out = [a * cos - b * sin, a * sin + b * cos];
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;
    use crate::nn::set_generic_only;

    #[test]
    fn both_ways_agree_and_keep_every_pairs_length() {
        let device = Device::Cpu;
        let x = Tensor::randn(0f32, 1.0, (2, 5, 3, 8), &device).unwrap();
        for shape in [vec![5, 4], vec![5, 3, 4]] {
            let angles = Tensor::randn(0f32, 2.0, shape, &device).unwrap();
            let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
            let fast = rotate_pairs(&x, &cos, &sin).unwrap();
            set_generic_only(true);
            let generic = rotate_pairs(&x, &cos, &sin).unwrap();
            set_generic_only(false);
            let worst = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(worst((&fast - &generic).unwrap()) < 1e-6);
            let length = |t: &Tensor| t.sqr().unwrap().reshape((2, 5, 3, 4, 2)).unwrap().sum(4).unwrap();
            assert!(worst((length(&fast) - length(&x)).unwrap()) < 1e-4);
            assert!(worst((&fast - &x).unwrap()) > 0.1);
        }
        assert!(rotate_pairs(&x, &x, &x).is_err());
    }
}

//! Moving values between channels and positions, channels-last.
//!
//! candle copies a permuted tensor one element at a time where the channels move; here whole rows of channels stay
//! together, or threads share the work.

use candle_core::{Result, Tensor};

use super::cpu::{View, fast, written};

/// `(b, t, h, w, st sh sw c)` to `(b, t st - skip, h sh, w sw, c)`: channels are ordered with the block's position
/// first; the first `skip` frames are left out.
///
/// # Errors
/// When the channels are not a multiple of the block or the device fails.
pub fn depth_to_space(x: &Tensor, block: [usize; 3], skip: usize) -> Result<Tensor> {
    let (b, t, h, w, channels) = x.dims5()?;
    let [st, sh, sw] = block;
    let c = channels / (st * sh * sw);
    if fast(&[x]) && skip < t * st {
        return grow(x, None, block, skip);
    }
    x.reshape(vec![b, t, h, w, st, sh, sw, c])?
        .permute(vec![0, 1, 4, 2, 5, 3, 6, 7])?
        .contiguous()?
        .reshape((b, t * st, h * sh, w * sw, c))?
        .narrow(1, skip, t * st - skip)?
        .contiguous()
}

/// [`depth_to_space`] of `x` without its first `st - 1` frames, plus the same of `residual` `(b, t, h, w, c)`, whose
/// channels are ordered with the block's position last and are repeated `repeats` times.
///
/// # Errors
/// When the channels do not fit or the device fails.
pub fn grow_channels(x: &Tensor, residual: &Tensor, block: [usize; 3], repeats: usize) -> Result<Tensor> {
    let (b, t, h, w, channels) = residual.dims5()?;
    let [st, sh, sw] = block;
    let cells = st * sh * sw;
    let skip = st - 1;
    let c = channels / cells;
    if x.dims() != [b, t, h, w, c * repeats * cells] {
        candle_core::bail!(
            "{:?} cannot grow by {block:?} beside a residual of {:?}",
            x.shape(),
            residual.shape()
        );
    }
    if fast(&[x, residual]) {
        return grow(x, Some(residual), block, skip);
    }
    let residual = residual
        .reshape(vec![b, t, h, w, c, st, sh, sw])?
        .permute(vec![0, 1, 5, 2, 6, 3, 7, 4])?
        .contiguous()?
        .reshape((b, t * st, h * sh, w * sw, c))?
        .narrow(1, skip, t * st - skip)?;
    depth_to_space(x, block, skip)? + Tensor::cat(&vec![residual; repeats], 4)?
}

/// Both of the above on the CPU, rows shared out to threads.
fn grow(x: &Tensor, residual: Option<&Tensor>, block: [usize; 3], skip: usize) -> Result<Tensor> {
    let (b, t, h, w, channels) = x.dims5()?;
    let [st, sh, sw] = block;
    let c = channels / (st * sh * sw);
    let x = x.contiguous()?;
    let residual = residual.map(Tensor::contiguous).transpose()?;
    let (view, residual_view) = (View::new(&x)?, residual.as_ref().map(View::new).transpose()?);
    let source = view.slice()?;
    let added = residual_view.as_ref().map(View::slice).transpose()?;
    let (frames, height, width) = (t * st - skip, h * sh, w * sw);
    let out = written(b * frames * height * width * c, width * c, |index, row| {
        let (y, rest) = (index % height, index / height);
        let (frame, entry) = (rest % frames + skip, rest / frames);
        let line = (entry * t + frame / st) * h + y / sh;
        let corner = (frame % st * sh + y % sh) * sw;
        for (column, out) in row.chunks_exact_mut(c).enumerate() {
            let (cell, position) = (line * w + column / sw, corner + column % sw);
            out.copy_from_slice(&source[cell * channels + position * c..][..c]);
            if let Some(added) = added {
                let held = added.len() / (b * t * h * w);
                let values = &added[cell * held..][..held];
                for out in out.chunks_exact_mut(held / (st * sh * sw)) {
                    for (o, x) in out.iter_mut().zip(values[position..].iter().step_by(st * sh * sw)) {
                        *o += x;
                    }
                }
            }
        }
    });
    Tensor::from_vec(out, (b, frames, height, width, c), x.device())
}

/// Nearest positions: `(b, t, h, w, c)` to `(b, t', h rows, w columns, c)` where each frame stands `frames` times, or the
/// first one once where `first_alone`.
///
/// # Errors
/// When the device fails.
pub fn repeat(x: &Tensor, [frames, rows, columns]: [usize; 3], first_alone: bool) -> Result<Tensor> {
    let (_, t, h, w, _) = x.dims5()?;
    let times = |count: usize, factor: usize| (0..count * factor).map(move |i| (i / factor) as u32);
    let skip = if first_alone { frames.saturating_sub(1) } else { 0 };
    if fast(&[x]) {
        return repeat_cpu(x, [frames, rows, columns], skip);
    }
    let axes: [(usize, Vec<u32>, bool); 3] = [
        (1, times(t, frames).skip(skip).collect(), frames > 1),
        (2, times(h, rows).collect(), rows > 1),
        (3, times(w, columns).collect(), columns > 1),
    ];
    let mut x = x.contiguous()?;
    for (axis, index, _) in axes.into_iter().filter(|(_, _, grows)| *grows) {
        x = x.index_select(&Tensor::new(index, x.device())?, axis)?;
    }
    Ok(x)
}

/// [`repeat`] without the first `skip` frames on the CPU, rows shared out to threads.
fn repeat_cpu(x: &Tensor, [frames, rows, columns]: [usize; 3], skip: usize) -> Result<Tensor> {
    let (b, t, h, w, c) = x.dims5()?;
    let x = x.contiguous()?;
    let view = View::new(&x)?;
    let source = view.slice()?;
    let (count, height, width) = (t * frames - skip, h * rows, w * columns);
    let out = written(b * count * height * width * c, width * c, |index, row| {
        let (y, rest) = (index % height, index / height);
        let (frame, entry) = ((rest % count + skip) / frames, rest / count);
        let line = &source[((entry * t + frame) * h + y / rows) * w * c..][..w * c];
        for (cell, copies) in line.chunks_exact(c).zip(row.chunks_exact_mut(columns * c)) {
            copies.chunks_exact_mut(c).for_each(|copy| copy.copy_from_slice(cell));
        }
    });
    Tensor::from_vec(out, (b, count, height, width, c), x.device())
}

/// `(b, t st, h sh, w sw, c)` to `(b, t, h, w, c st sh sw)`: channels are ordered with the block's position last.
///
/// # Errors
/// When a size is not a multiple of the block or the device fails.
pub fn space_to_depth(x: &Tensor, block: [usize; 3]) -> Result<Tensor> {
    let (b, t, h, w, c) = x.dims5()?;
    let [st, sh, sw] = block;
    x.reshape(vec![b, t / st, st, h / sh, sh, w / sw, sw, c])?
        .permute(vec![0, 1, 3, 5, 7, 2, 4, 6])?
        .contiguous()?
        .reshape((b, t / st, h / sh, w / sw, c * st * sh * sw))
}

/// The order of output channels that turns a convolution's `c st sh sw` into the `st sh sw c` of [`depth_to_space`].
#[must_use]
pub fn block_first(channels: usize, block: usize) -> Vec<u32> {
    let c = channels / block;
    (0..block).flat_map(|position| (0..c).map(move |i| (i * block + position) as u32)).collect()
}

/// Patches to pixels: `(b, t, h, w, c pt pw ph)` to `(b, c, t pt, h p, w p)`, LTX-Video's order of a patch.
///
/// # Errors
/// When the channels are not a multiple of the patch or the device fails.
pub fn unpatchify(x: &Tensor, p: usize, pt: usize) -> Result<Tensor> {
    let (b, t, h, w, channels) = x.dims5()?;
    let c = channels / (p * p * pt);
    if !fast(&[x]) {
        return x
            .reshape(vec![b, t, h, w, c, pt, p, p])?
            .permute(vec![0, 4, 1, 5, 2, 7, 3, 6])?
            .contiguous()?
            .reshape((b, c, t * pt, h * p, w * p));
    }
    let x = x.contiguous()?;
    let view = View::new(&x)?;
    let source = view.slice()?;
    let (frames, height, width) = (t * pt, h * p, w * p);
    let out = written(b * c * frames * height * width, height * width, |plane, out| {
        let (frame, channel, entry) = (plane % frames, plane / frames % c, plane / frames / c);
        for (y, row) in out.chunks_exact_mut(width).enumerate() {
            let cells = ((entry * t + frame / pt) * h + y / p) * w * channels;
            let cells = &source[cells..cells + w * channels];
            let first = (channel * pt + frame % pt) * p * p + y % p;
            for (cell, pixels) in cells.chunks_exact(channels).zip(row.chunks_exact_mut(p)) {
                for (i, pixel) in pixels.iter_mut().enumerate() {
                    *pixel = cell[first + i * p];
                }
            }
        }
    });
    Tensor::from_vec(out, (b, c, frames, height, width), x.device())
}

/// Pixels to patches, the inverse of [`unpatchify`].
///
/// # Errors
/// When a size is not a multiple of the patch or the device fails.
pub fn patchify(x: &Tensor, p: usize, pt: usize) -> Result<Tensor> {
    let (b, c, t, h, w) = x.dims5()?;
    x.reshape(vec![b, c, t / pt, pt, h / p, p, w / p, p])?
        .permute(vec![0, 2, 4, 6, 1, 3, 7, 5])?
        .contiguous()?
        .reshape((b, t / pt, h / p, w / p, c * pt * p * p))
}

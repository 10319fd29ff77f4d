//! Bicubic scaling of bytes, bit for bit as Pillow computes it (`Resample.c`): the kernel, with a slope of -0.5, is
//! widened where a picture shrinks, its weights are whole numbers of 22 bits behind the point, and rows are done first.

use std::ops::Range;

/// Bits behind the point.
const BITS: u32 = 22;
/// Half of the kernel's width, pixels.
const SUPPORT: f64 = 2.0;

/// A picture, red green blue, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub data: Vec<u8>,
}

/// The picture in another size.
#[must_use]
pub fn resize(picture: &Bytes, width: usize, height: usize) -> Bytes {
    let mut data = picture.data.clone();
    if width != picture.width {
        let taps = taps(picture.width, width);
        let place = |y: usize, x: usize| (y * picture.width + x) * 3;
        data = scaled(&data, picture.height, width, |y, x| (&taps[x], move |from| place(y, from)));
    }
    if height != picture.height {
        let taps = taps(picture.height, height);
        let place = move |y: usize, x: usize| (y * width + x) * 3;
        data = scaled(&data, height, width, |y, x| (&taps[y], move |from| place(from, x)));
    }
    Bytes { width, height, data }
}

/// The source pixels of one of the result, and their weights.
struct Taps {
    range: Range<usize>,
    weights: Vec<i32>,
}

fn taps(input: usize, output: usize) -> Vec<Taps> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let support = SUPPORT * stretch;
    let one = |index: usize| {
        let centre = (index as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(input);
        let weight = |place: usize| kernel((place as f64 - centre + 0.5) / stretch);
        let weights: Vec<f64> = (first..end).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        let whole = |weight: &f64| (weight / sum * f64::from(1u32 << BITS)).round() as i32;
        Taps { range: first..end, weights: weights.iter().map(whole).collect() }
    };
    (0..output).map(one).collect()
}

/// Keys' cubic convolution.
fn kernel(x: f64) -> f64 {
    const SLOPE: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((SLOPE + 2.0) * x - (SLOPE + 3.0)) * x * x + 1.0
    } else if x < SUPPORT {
        (((x - 5.0) * x + 8.0) * x - 4.0) * SLOPE
    } else {
        0.0
    }
}

/// Every pixel of a result from the taps at it and where in `data` a tap's pixel begins.
fn scaled<'a, P: Fn(usize) -> usize>(
    data: &[u8],
    height: usize,
    width: usize,
    at: impl Fn(usize, usize) -> (&'a Taps, P),
) -> Vec<u8> {
    let mut out = Vec::with_capacity(height * width * 3);
    for y in 0..height {
        for x in 0..width {
            let (taps, place) = at(y, x);
            let mut sums = [1i64 << (BITS - 1); 3];
            for (from, &weight) in taps.range.clone().zip(&taps.weights) {
                let pixel = &data[place(from)..][..3];
                sums.iter_mut().zip(pixel).for_each(|(sum, &v)| *sum += i64::from(v) * i64::from(weight));
            }
            out.extend(sums.map(|sum| (sum >> BITS).clamp(0, 255) as u8));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Pillow 13.0.0 gives for `Image.resize((5, 3), Image.BICUBIC)` and `((12, 9), ..)` of the same picture.
    #[test]
    fn pictures_are_scaled_bit_for_bit_as_pillow_scales_them() {
        let data = (0..8 * 6 * 3).map(|i| ((i * i * 7 + i * 31) % 251) as u8).collect();
        let picture = Bytes { width: 8, height: 6, data };
        assert_eq!(hash(&resize(&picture, 5, 3)), SMALL);
        assert_eq!(hash(&resize(&picture, 12, 9)), LARGE);
        assert_eq!(resize(&picture, 8, 6), picture);
    }

    const SMALL: u32 = 4_268_883_974;
    const LARGE: u32 = 2_069_297_924;

    /// Every byte counts, and its place.
    fn hash(picture: &Bytes) -> u32 {
        picture
            .data
            .iter()
            .fold(picture.width as u32, |sum, &v| sum.wrapping_mul(31).wrapping_add(u32::from(v)))
    }
}

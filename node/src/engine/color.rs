//! RGB to BT.709 limited-range YUV 4:2:0 and back, in whole numbers that round, so that the bytes are the same on every
//! processor.
//!
//! Coefficients: ITU-R BT.709-6, section 3; limited range ("narrow") of 8 bits: luma 16 to 235, chroma 16 to 240.
//! A chroma sample is the mean of its four pixels.

/// Fraction bits of the fixed-point coefficients. Products of 8-bit values stay far inside `i32`.
const BITS: u32 = 16;
const HALF: i32 = 1 << (BITS - 1);

/// Luma weights of red, green and blue.
const KR: f64 = 0.2126;
const KB: f64 = 0.0722;
const KG: f64 = 1.0 - KR - KB;
/// Full-range steps to limited-range steps.
const LUMA: f64 = 219.0 / 255.0;
const CHROMA: f64 = 224.0 / 255.0;
/// Width of the colour differences: `2 * (1 - K)`.
const WIDTH_B: f64 = 2.0 * (1.0 - KB);
const WIDTH_R: f64 = 2.0 * (1.0 - KR);

const fn fixed(value: f64) -> i32 {
    let scaled = value * (1u32 << BITS) as f64;
    (if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

const Y_OF_RGB: [i32; 3] = [fixed(KR * LUMA), fixed(KG * LUMA), fixed(KB * LUMA)];
const U_OF_RGB: [i32; 3] =
    [fixed(-KR / WIDTH_B * CHROMA), fixed(-KG / WIDTH_B * CHROMA), fixed((1.0 - KB) / WIDTH_B * CHROMA)];
const V_OF_RGB: [i32; 3] =
    [fixed((1.0 - KR) / WIDTH_R * CHROMA), fixed(-KG / WIDTH_R * CHROMA), fixed(-KB / WIDTH_R * CHROMA)];

const RGB_OF_Y: i32 = fixed(1.0 / LUMA);
const R_OF_V: i32 = fixed(WIDTH_R / CHROMA);
const B_OF_U: i32 = fixed(WIDTH_B / CHROMA);
const G_OF_U: i32 = fixed(-KB * WIDTH_B / KG / CHROMA);
const G_OF_V: i32 = fixed(-KR * WIDTH_R / KG / CHROMA);

/// One frame in planes: luma `width x height`, chroma half of that both ways.
#[derive(Clone, PartialEq, Eq)]
pub struct Yuv420 {
    /// Pixels in a row, even.
    pub width: usize,
    /// Rows, even.
    pub height: usize,
    /// Luma, row by row.
    pub y: Vec<u8>,
    /// Blue difference, row by row.
    pub u: Vec<u8>,
    /// Red difference, row by row.
    pub v: Vec<u8>,
}

impl std::fmt::Debug for Yuv420 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Yuv420({}x{})", self.width, self.height)
    }
}

impl Yuv420 {
    /// A black frame. Width and height are even.
    #[must_use]
    pub fn new(width: usize, height: usize) -> Self {
        let quarter = (width / 2) * (height / 2);
        Self { width, height, y: vec![16; width * height], u: vec![128; quarter], v: vec![128; quarter] }
    }

    /// Replaces the frame by RGB bytes of `width * height * 3`.
    pub fn set_rgb(&mut self, rgb: &[u8]) {
        let (width, half) = (self.width, self.width / 2);
        for (luma, pixel) in self.y.iter_mut().zip(rgb.as_chunks::<3>().0) {
            *luma = clamp(((dot(Y_OF_RGB, pixel.map(i32::from)) + HALF) >> BITS) + 16);
        }
        for (row, (u_row, v_row)) in self.u.chunks_mut(half).zip(self.v.chunks_mut(half)).enumerate() {
            let (upper, lower) = rgb[row * 2 * width * 3..(row * 2 + 2) * width * 3].split_at(width * 3);
            let (upper, lower) = (upper.as_chunks::<6>().0, lower.as_chunks::<6>().0);
            for (column, (u, v)) in u_row.iter_mut().zip(v_row).enumerate() {
                let (a, b) = (&upper[column], &lower[column]);
                let sum = [0, 1, 2]
                    .map(|c| i32::from(a[c]) + i32::from(a[c + 3]) + i32::from(b[c]) + i32::from(b[c + 3]));
                // The sum of four pixels carries two more bits.
                *u = clamp(((dot(U_OF_RGB, sum) + 4 * HALF) >> (BITS + 2)) + 128);
                *v = clamp(((dot(V_OF_RGB, sum) + 4 * HALF) >> (BITS + 2)) + 128);
            }
        }
    }

    /// The frame as RGB bytes, `width * height * 3`.
    #[must_use]
    pub fn to_rgb(&self) -> Vec<u8> {
        let mut rgb = vec![0; self.width * self.height * 3];
        planes_to_rgb(
            (&self.y, &self.u, &self.v),
            (self.width, self.width / 2),
            self.width,
            self.height,
            &mut rgb,
        );
        rgb
    }
}

/// Planes with strides `(luma, chroma)` to RGB bytes of `width * height * 3`.
pub(super) fn planes_to_rgb(
    (y, u, v): (&[u8], &[u8], &[u8]),
    (y_stride, uv_stride): (usize, usize),
    width: usize,
    height: usize,
    rgb: &mut [u8],
) {
    for (row, out) in rgb.chunks_mut(width * 3).take(height).enumerate() {
        let luma = &y[row * y_stride..][..width];
        let blue = &u[row / 2 * uv_stride..];
        let red = &v[row / 2 * uv_stride..];
        for (column, pixel) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let grey = (i32::from(luma[column]) - 16) * RGB_OF_Y + HALF;
            let (u, v) = (i32::from(blue[column / 2]) - 128, i32::from(red[column / 2]) - 128);
            *pixel = [
                clamp((grey + R_OF_V * v) >> BITS),
                clamp((grey + G_OF_U * u + G_OF_V * v) >> BITS),
                clamp((grey + B_OF_U * u) >> BITS),
            ];
        }
    }
}

fn dot(weights: [i32; 3], values: [i32; 3]) -> i32 {
    weights[0] * values[0] + weights[1] * values[1] + weights[2] * values[2]
}

fn clamp(value: i32) -> u8 {
    value.clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn flat(color: [u8; 3]) -> Yuv420 {
        let mut yuv = Yuv420::new(4, 2);
        yuv.set_rgb(&color.repeat(8));
        yuv
    }

    #[test]
    fn primaries_have_the_values_of_the_standard() {
        // Values of 8-bit BT.709 colour bars at full amplitude.
        let bars = [
            ([255, 255, 255], [235, 128, 128]),
            ([0, 0, 0], [16, 128, 128]),
            ([255, 0, 0], [63, 102, 240]),
            ([0, 255, 0], [173, 42, 26]),
            ([0, 0, 255], [32, 240, 118]),
            ([255, 255, 0], [219, 16, 138]),
        ];
        for (rgb, yuv) in bars {
            let frame = flat(rgb);
            assert_eq!([frame.y[0], frame.u[0], frame.v[0]], yuv, "{rgb:?}");
        }
    }

    #[test]
    fn flat_colours_come_back_within_two_steps() {
        for r in (0..=255).step_by(15) {
            for g in (0..=255).step_by(15) {
                for b in (0..=255).step_by(15) {
                    let color = [r as u8, g as u8, b as u8];
                    let back = flat(color).to_rgb();
                    for c in 0..3 {
                        assert!(back[c].abs_diff(color[c]) <= 2, "{color:?} came back as {:?}", &back[..3]);
                    }
                }
            }
        }
    }
}

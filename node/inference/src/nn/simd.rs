//! Elementwise mathematics that the compiler vectorises, built once for the baseline and once for AVX2 with FMA.

/// Whether this machine has AVX2 and FMA; the standard library remembers the answer.
#[cfg(target_arch = "x86_64")]
#[inline]
#[must_use]
pub(crate) fn has_avx2_fma() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

/// Declares a function whose body is compiled twice; the AVX2 one runs where the machine has it. The body's `FUSED` says
/// whether products and sums are one instruction there.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn wide($($arg: $ty),*) $(-> $ret)? {
                    #[allow(dead_code, reason = "not every body multiplies")]
                    const FUSED: bool = true;
                    $body
                }

                if $crate::nn::simd::has_avx2_fma() {
                    #[expect(unsafe_code, reason = "calls the same safe code compiled for more instructions")]
                    // SAFETY: the machine has AVX2 and FMA, as was just asked.
                    return unsafe { wide($($arg),*) };
                }
            }
            #[allow(dead_code, reason = "not every body multiplies")]
            const FUSED: bool = cfg!(target_arch = "aarch64");
            $body
        }
    };
}
pub(crate) use simd_fn;

/// `e^x` to about 1e-7 relative, without a branch; below -87 it is tiny, above 88 huge, and NaN stays NaN.
///
/// Cody and Waite's reduction to `[-ln 2 / 2, ln 2 / 2]` and Cephes' polynomial (`expf`).
///
/// With `FUSED` a product and a sum are rounded once: for where that is one instruction, elsewhere it is slow.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "the published coefficients, digit for digit")]
pub(crate) fn exp<const FUSED: bool>(x: f32) -> f32 {
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.0;
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_375;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < LOW { LOW } else { x };
    let x = if x > HIGH { HIGH } else { x };
    let shifted = mul_add::<FUSED>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = mul_add::<FUSED>(n, -LN2_LOW, mul_add::<FUSED>(n, -LN2_HIGH, x));
    let mut p = 1.987_569_15e-4;
    p = mul_add::<FUSED>(p, r, 1.398_199_95e-3);
    p = mul_add::<FUSED>(p, r, 8.333_451_9e-3);
    p = mul_add::<FUSED>(p, r, 4.166_579_6e-2);
    p = mul_add::<FUSED>(p, r, 1.666_666_55e-1);
    p = mul_add::<FUSED>(p, r, 0.5);
    let y = mul_add::<FUSED>(p * r, r, r) + 1.0;
    let power = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127) << 23;
    y * f32::from_bits(power)
}

#[inline(always)]
fn mul_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<const FUSED: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FUSED>(-x))
}

/// GELU by tanh, `x/2 (1 + tanh u)` with `u = sqrt(2/pi) (x + 0.044715 x^3)`, which equals `x sigmoid(2u)`.
#[inline(always)]
pub(crate) fn gelu_tanh<const FUSED: bool>(x: f32) -> f32 {
    const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
    let u = TWO_SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x);
    x / (1.0 + exp::<FUSED>(-u))
}

/// Partial sums that a reduction keeps: as many registers of them as an addition takes cycles.
pub(crate) const LANES: usize = 32;

/// Sum of squares, in [`LANES`].
#[inline(always)]
pub(crate) fn sum_squares(x: &[f32]) -> f32 {
    sum_of(x, |x| x * x)
}

/// Sum, in [`LANES`].
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    sum_of(x, |x| x)
}

/// Sum of what `f` makes of each element, in [`LANES`].
#[inline(always)]
pub(crate) fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f(*value);
        }
    }
    let tail: f32 = rest.iter().map(|value| f(*value)).sum();
    fold(lanes) + tail
}

/// The largest element, in sixteen lanes; `-inf` of nothing. A NaN may be passed over.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_exp<const FUSED: bool>() {
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).exp();
            let error = ((f64::from(exp::<FUSED>(x)) - truth) / truth).abs();
            assert!(error < 2.5e-7, "exp({x}) is off by {error}");
        }
        assert!(exp::<FUSED>(f32::NAN).is_nan());
        assert!(exp::<FUSED>(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn exp_is_right_to_two_units_in_a_float() {
        check_exp::<false>();
        check_exp::<true>();
    }

    #[test]
    fn activations_keep_their_limits() {
        let (silu, gelu) = (silu::<false>, gelu_tanh::<false>);
        assert!(silu(-200.0).abs() < 1e-30 && (silu(200.0) - 200.0).abs() < 1e-4);
        assert!(gelu(-50.0).abs() < 1e-30 && (gelu(50.0) - 50.0).abs() < 1e-4);
        assert!(silu(f32::NAN).is_nan() && gelu(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_element() {
        for n in 0..70 {
            let x: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            let n = n as f32;
            assert_eq!(sum(&x), n * (n + 1.0) / 2.0);
            assert_eq!(sum_squares(&x), n * (n + 1.0) * (2.0 * n + 1.0) / 6.0);
            assert_eq!(max(&x), if n > 0.0 { n } else { f32::NEG_INFINITY });
        }
    }
}

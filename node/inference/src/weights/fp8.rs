//! Weights of 8 bits, widened: the numbers of OCP's 8-bit floating point formats (Micikevicius et al. 2022) and the
//! scales that files give for them, one a tensor or one a row.

use candle_core::Result;
use rayon::prelude::*;
use safetensors::Dtype;

/// Sign, exponent and mantissa.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// 1, 4, 3 bits, bias 7: no infinities, and only all ones are no number (`float8_e4m3fn`).
    E4M3,
    /// 1, 5, 2 bits, bias 15: the upper half of an f16 (`float8_e5m2`).
    E5M2,
}

impl Kind {
    pub(super) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F8_E4M3 => Some(Self::E4M3),
            Dtype::F8_E5M2 => Some(Self::E5M2),
            _ => None,
        }
    }

    /// The value of a code.
    fn value(self, code: u8) -> f32 {
        match self {
            Self::E5M2 => half::f16::from_bits(u16::from(code) << 8).to_f32(),
            Self::E4M3 => {
                let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
                let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f32::from(code & 7));
                sign * match (exponent, code & 7) {
                    (0xf, 7) => f32::NAN,
                    // A mantissa of 3 bits below 2^-6.
                    (0, _) => mantissa * 2f32.powi(-9),
                    _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
                }
            }
        }
    }
}

/// By what a weight's values are to be multiplied.
pub(super) struct Scales {
    name: String,
    /// One, or one for each row.
    values: Vec<f32>,
}

impl Default for Scales {
    fn default() -> Self {
        Self { name: String::new(), values: vec![1.0] }
    }
}

impl Scales {
    /// From the tensor `name`.
    pub(super) fn new(name: &str, values: Vec<f32>) -> Self {
        Self { name: name.to_owned(), values }
    }

    /// Whether they are one, or one for each of the weight's rows.
    pub(super) fn check(self, weight: &str, rows: usize) -> Result<Self> {
        let given = self.values.len();
        if given == 1 || given == rows {
            return Ok(self);
        }
        candle_core::bail!("{} holds {given} scales; {weight} takes 1, or {rows} for its rows", self.name)
    }

    /// Multiplies values, row after row.
    pub(super) fn apply(&self, values: &mut [f32]) {
        let row = self.row(values.len());
        for (values, scale) in values.chunks_mut(row).zip(&self.values) {
            values.iter_mut().for_each(|value| *value *= scale);
        }
    }

    /// Values that have the same scale.
    fn row(&self, values: usize) -> usize {
        (values / self.values.len().max(1)).max(1)
    }
}

/// A tensor's values, times its scales.
pub(super) fn widen(kind: Kind, codes: &[u8], scales: &Scales) -> Vec<f32> {
    let table: [f32; 256] = std::array::from_fn(|code| kind.value(code as u8));
    let mut values = vec![0f32; codes.len()];
    let row = scales.row(codes.len());
    let rows = values.par_chunks_mut(row).zip(codes.par_chunks(row)).zip(&scales.values);
    rows.for_each(|((values, codes), scale)| {
        let scaled = table.map(|value| value * scale);
        for (value, &code) in values.iter_mut().zip(codes) {
            *value = scaled[usize::from(code)];
        }
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition, in whole numbers: the value times 2^16.
    fn by_definition(code: u8, mantissa_bits: u32, bias: i32) -> f64 {
        let (exponent, mantissa) =
            (i32::from(code & 0x7f) >> mantissa_bits, i64::from(code) & ((1 << mantissa_bits) - 1));
        let (whole, power) = match exponent {
            0 => (mantissa, 1),
            _ => (mantissa + (1 << mantissa_bits), exponent),
        };
        let scaled = whole as f64 * 2f64.powi(power - bias - mantissa_bits as i32);
        if code < 0x80 { scaled } else { -scaled }
    }

    #[test]
    fn every_code_has_its_value() {
        for code in 0..=u8::MAX {
            let (e4m3, e5m2) = (Kind::E4M3.value(code), Kind::E5M2.value(code));
            if code & 0x7f == 0x7f {
                assert!(e4m3.is_nan(), "{code:#x}");
            } else {
                let expected = by_definition(code, 3, 7);
                assert!(
                    f64::from(e4m3) == expected && e4m3.is_sign_negative() == (code >= 0x80),
                    "{code:#x}"
                );
            }
            match code & 0x7f {
                0x7c => assert!(e5m2.is_infinite() && e5m2.is_sign_negative() == (code >= 0x80)),
                0x7d.. => assert!(e5m2.is_nan(), "{code:#x}"),
                _ => {
                    let expected = by_definition(code, 2, 15);
                    let sign = e5m2.is_sign_negative() == (code >= 0x80);
                    assert!(f64::from(e5m2) == expected && sign, "{code:#x}");
                }
            }
        }
        let extremes = [Kind::E4M3.value(0x7e), Kind::E4M3.value(1), Kind::E5M2.value(0x7b)];
        assert_eq!(extremes, [448.0, 0.001_953_125, 57_344.0]);
    }

    #[test]
    fn scales_are_for_all_values_or_for_a_row_each() {
        let codes = [0x38, 0x40, 0x44, 0xb8];
        let by = |values: Vec<f32>| widen(Kind::E4M3, &codes, &Scales::new("s", values));
        assert_eq!(by(vec![0.5]), [0.5, 1.0, 1.5, -0.5]);
        assert_eq!(by(vec![2.0, 4.0]), [2.0, 4.0, 12.0, -4.0]);
        let error = Scales::new("a.scale_weight", vec![1.0; 3]).check("a.weight", 2).err();
        let text = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(text.contains("a.scale_weight holds 3 scales; a.weight takes 1, or 2"), "{text}");
    }
}

//! Points in time, durations and fixed-point numbers: what signed bodies hold instead of floats and clocks.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::codec::text_u64;

/// Why a number is not a fixed-point number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnitError {
    /// NaN or infinity.
    #[error("not a finite number")]
    NotFinite,
    /// Beyond what 64 bits of millionths hold.
    #[error("number beyond the limit of +-9223372036854 of a fixed-point number")]
    OutOfRange,
    /// No decimal number.
    #[error("not a decimal number with at most 6 digits after the point")]
    NotDecimal,
}

impl UnitError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFinite => "not_finite",
            Self::OutOfRange => "out_of_range",
            Self::NotDecimal => "not_decimal",
        }
    }
}

/// A point in time: milliseconds since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(#[serde(with = "text_u64")] pub u64);

impl UnixMillis {
    /// Converts a reading of a clock that the caller made.
    pub fn from_system_time(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// This much later.
    pub fn plus(self, duration: Millis) -> Self {
        Self(self.0.saturating_add(duration.0))
    }

    /// This much earlier.
    pub fn minus(self, duration: Millis) -> Self {
        Self(self.0.saturating_sub(duration.0))
    }

    /// Time since `earlier`, zero if that is later.
    pub fn since(self, earlier: Self) -> Millis {
        Millis(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for UnixMillis {
    /// `2026-11-22T21:40:05.123Z`, by Howard Hinnant's civil-from-days algorithm.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, of_day) = ((self.0 / 86_400_000) as i64, self.0 % 86_400_000);
        let z = days + 719_468;
        let era = z.div_euclid(146_097);
        let doe = z.rem_euclid(146_097);
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let day = doy - (153 * mp + 2) / 5 + 1;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        let year = yoe + era * 400 + i64::from(month <= 2);
        let (h, m, s, ms) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1000 % 60, of_day % 1000);
        write!(f, "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{ms:03}Z")
    }
}

/// A duration in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(#[serde(with = "text_u64")] pub u64);

impl From<Duration> for Millis {
    fn from(duration: Duration) -> Self {
        Self(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    }
}

impl From<Millis> for Duration {
    fn from(millis: Millis) -> Self {
        Self::from_millis(millis.0)
    }
}

impl fmt::Display for Millis {
    /// `850 ms`, `12.3 s`, `4 min 5 s`, `2 h 3 min`, `7 days`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0 / 1000;
        match s {
            0 => write!(f, "{} ms", self.0),
            1..60 => write!(f, "{}.{} s", s, self.0 % 1000 / 100),
            60..3600 => write!(f, "{} min {} s", s / 60, s % 60),
            3600..172_800 => write!(f, "{} h {} min", s / 3600, s % 3600 / 60),
            _ => write!(f, "{} days", s / 86_400),
        }
    }
}

/// A fixed-point number in millionths; a decimal string in human-readable formats.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Micro(pub i64);

impl Micro {
    /// Zero.
    pub const ZERO: Self = Self(0);
    /// One.
    pub const ONE: Self = Self(1_000_000);

    /// A whole number.
    pub const fn whole(value: i32) -> Self {
        Self(value as i64 * 1_000_000)
    }

    /// The nearest fixed-point number; NaN, infinity and what does not fit are refused.
    pub fn from_f64(value: f64) -> Result<Self, UnitError> {
        if !value.is_finite() {
            return Err(UnitError::NotFinite);
        }
        let scaled = (value * 1e6).round();
        if scaled.abs() >= 9.2e18 {
            return Err(UnitError::OutOfRange);
        }
        Ok(Self(scaled as i64))
    }

    /// The number as a float, for computing only.
    pub fn to_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }
}

impl fmt::Display for Micro {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, abs) = (if self.0 < 0 { "-" } else { "" }, self.0.unsigned_abs());
        let (whole, part) = (abs / 1_000_000, abs % 1_000_000);
        if part == 0 {
            return write!(f, "{sign}{whole}");
        }
        let digits = format!("{part:06}");
        write!(f, "{sign}{whole}.{}", digits.trim_end_matches('0'))
    }
}

impl FromStr for Micro {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
        let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if part.len() > 6 || (whole.is_empty() && part.is_empty()) || !all_digits(whole) || !all_digits(part)
        {
            return Err(UnitError::NotDecimal);
        }
        let whole: i128 =
            if whole.is_empty() { 0 } else { whole.parse().map_err(|_| UnitError::OutOfRange)? };
        let part: i128 = format!("{part:0<6}").parse().map_err(|_| UnitError::NotDecimal)?;
        let value = whole.checked_mul(1_000_000).ok_or(UnitError::OutOfRange)? + part;
        let value = if negative { -value } else { value };
        i64::try_from(value).map(Self).map_err(|_| UnitError::OutOfRange)
    }
}

impl Serialize for Micro {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_str(self) } else { s.serialize_i64(self.0) }
    }
}

impl<'de> Deserialize<'de> for Micro {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            String::deserialize(d)?.parse().map_err(de::Error::custom)
        } else {
            i64::deserialize(d).map(Self)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn fixed_point_numbers_survive_their_text() {
        for (text, value) in
            [("0", 0), ("25", 25_000_000), ("-0.8", -800_000), ("23.976", 23_976_000), ("0.000001", 1)]
        {
            assert_eq!(text.parse::<Micro>().unwrap(), Micro(value));
            assert_eq!(Micro(value).to_string(), text);
        }
        for value in [i64::MIN, i64::MAX] {
            assert_eq!(Micro(value).to_string().parse::<Micro>().unwrap(), Micro(value));
        }
        for text in ["", ".", "-", "1e3", "0.0000001", "١", "1.-5", "99999999999999"] {
            assert!(text.parse::<Micro>().is_err(), "{text}");
        }
    }

    #[test]
    fn floats_that_are_no_numbers_are_refused() {
        assert_eq!(Micro::from_f64(f64::NAN), Err(UnitError::NotFinite));
        assert_eq!(Micro::from_f64(f64::INFINITY), Err(UnitError::NotFinite));
        assert_eq!(Micro::from_f64(1e300), Err(UnitError::OutOfRange));
        assert_eq!(Micro::from_f64(0.8).unwrap(), Micro(800_000));
    }

    #[test]
    fn times_are_readable() {
        assert_eq!(UnixMillis(0).to_string(), "1970-01-01T00:00:00.000Z");
        assert_eq!(UnixMillis(1_709_164_799_999).to_string(), "2024-02-28T23:59:59.999Z");
        assert_eq!(UnixMillis(1_709_164_800_000).to_string(), "2024-02-29T00:00:00.000Z");
        assert_eq!(Millis(65_000).to_string(), "1 min 5 s");
        assert_eq!(Millis(12_345).to_string(), "12.3 s");
    }
}

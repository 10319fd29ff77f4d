//! The units people write in the configuration: sizes (`20 GiB`), times (`90 s`, `2 h`), and ceilings that may be
//! `unlimited`.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

const SIZE_UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

const TIME_UNITS: &[(&str, u64)] =
    &[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Why a size, time or ceiling could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnitError {
    /// The text is not a whole number followed by a known unit.
    #[error("'{given}' is not {what}, for example {example}")]
    Malformed {
        /// What was expected.
        what: &'static str,
        /// A value that would be taken.
        example: &'static str,
        /// What was given.
        given: String,
    },
    /// The number does not fit.
    #[error("'{given}' is larger than the largest {what}, {limit}")]
    TooLarge {
        /// What was expected.
        what: &'static str,
        /// The largest value, in base units.
        limit: u64,
        /// What was given.
        given: String,
    },
}

/// A number of bytes, written `20 GiB`, `500 MB` or as a bare number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

/// A length of time in whole milliseconds, written `90 s`, `2 h`, `7 d` or as a bare number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span(pub u64);

/// An upper bound that may be absent, written `unlimited`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Ceiling<T>(pub Option<T>);

/// How much memory may be taken, written as a size, `auto` for what there is less a reserve, or `unlimited`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MemoryLimit {
    /// What there is, less a reserve.
    #[default]
    Auto,
    /// Whatever a job needs.
    Unlimited,
    /// So much.
    At(ByteSize),
}

impl ByteSize {
    /// A whole number of MiB.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// A whole number of GiB.
    #[must_use]
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }
}

impl Span {
    /// A whole number of seconds.
    #[must_use]
    pub const fn seconds(count: u64) -> Self {
        Self(count * 1_000)
    }

    /// As the standard library's type.
    #[must_use]
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl<T> Ceiling<T> {
    /// No bound.
    pub const UNLIMITED: Self = Self(None);

    /// A bound.
    pub const fn at(limit: T) -> Self {
        Self(Some(limit))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary =
            SIZE_UNITS[..5].iter().rev().find(|(_, unit)| self.0 != 0 && self.0.is_multiple_of(*unit));
        let (name, unit) = binary.copied().unwrap_or(("B", 1));
        write!(f, "{} {name}", self.0 / unit)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = TIME_UNITS.iter().rev().find(|(_, unit)| self.0 != 0 && self.0.is_multiple_of(*unit));
        let (name, unit) = exact.copied().unwrap_or(("s", 1_000));
        write!(f, "{} {name}", self.0 / unit)
    }
}

impl<T: fmt::Display> fmt::Display for Ceiling<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(limit) => limit.fmt(f),
            None => f.write_str("unlimited"),
        }
    }
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Unlimited => f.write_str("unlimited"),
            Self::At(size) => size.fmt(f),
        }
    }
}

impl FromStr for MemoryLimit {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            "unlimited" => Ok(Self::Unlimited),
            size => size.parse().map(Self::At),
        }
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        number_with_unit(text, SIZE_UNITS, 1, "a size", "\"20 GiB\"").map(Self)
    }
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        number_with_unit(text, TIME_UNITS, 1_000, "a length of time", "\"90 s\", \"2 h\" or \"7 d\"")
            .map(Self)
    }
}

impl<T: FromStr> FromStr for Ceiling<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text.trim() == "unlimited" {
            Ok(Self(None))
        } else {
            text.trim().parse().map(|limit| Self(Some(limit)))
        }
    }
}

fn number_with_unit(
    text: &str,
    units: &[(&str, u64)],
    bare: u64,
    what: &'static str,
    example: &'static str,
) -> Result<u64, UnitError> {
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (digits, unit) = (&trimmed[..split], trimmed[split..].trim());
    let malformed = || UnitError::Malformed { what, example, given: text.to_owned() };
    if digits.is_empty() {
        return Err(malformed());
    }
    let too_large = || UnitError::TooLarge { what, limit: u64::MAX, given: text.to_owned() };
    let count: u64 = digits.parse().map_err(|_| too_large())?;
    let unit = if unit.is_empty() {
        bare
    } else {
        units.iter().find(|(name, _)| *name == unit).map(|(_, size)| *size).ok_or_else(malformed)?
    };
    count.checked_mul(unit).ok_or_else(too_large)
}

macro_rules! text_serde {
    ($type:ty, $expecting:expr) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(TextVisitor { expecting: $expecting, reads: PhantomData })
            }
        }
    };
}

text_serde!(ByteSize, "a size such as \"20 GiB\"");
text_serde!(Span, "a length of time such as \"90 s\", \"2 h\" or \"7 d\"");
text_serde!(Ceiling<ByteSize>, "a size such as \"20 GiB\", or \"unlimited\"");
text_serde!(MemoryLimit, "a size such as \"20 GiB\", \"auto\" or \"unlimited\"");
text_serde!(Ceiling<u32>, "a whole number up to 4294967295, or \"unlimited\"");
text_serde!(Ceiling<u64>, "a whole number, or \"unlimited\"");

/// Reads a value from its text, or from a bare whole number.
struct TextVisitor<T> {
    expecting: &'static str,
    reads: PhantomData<T>,
}

impl<T> Visitor<'_> for TextVisitor<T>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(|_| E::custom(format_args!("'{text}' is not {}", self.expecting)))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_and_times_read_what_they_write() {
        for bytes in [0, 1, 1 << 10, 20 << 30, 3_000_000, 7 << 40] {
            assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
        for millis in [0, 1, 90_000, 7_200_000, 604_800_000, 1_500] {
            assert_eq!(Span(millis).to_string().parse(), Ok(Span(millis)));
        }
        assert_eq!("5".parse(), Ok(Span::seconds(5)));
        assert_eq!("500 MB".parse(), Ok(ByteSize(500_000_000)));
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_given_text() {
        for bad in ["", "GiB", "-1", "1.5 GiB", "3 parsecs", "20 gib"] {
            assert!(bad.parse::<ByteSize>().unwrap_err().to_string().contains(&format!("'{bad}'")));
        }
        let error = "99999999999999999999 TiB".parse::<ByteSize>().unwrap_err();
        assert!(error.to_string().contains("18446744073709551615"), "{error}");
    }

    #[test]
    fn memory_may_be_limited_by_what_there_is() {
        for limit in [MemoryLimit::Auto, MemoryLimit::Unlimited, MemoryLimit::At(ByteSize::gib(3))] {
            assert_eq!(limit.to_string().parse(), Ok(limit));
        }
        assert!("much".parse::<MemoryLimit>().is_err());
    }

    #[test]
    fn a_ceiling_may_be_unlimited() {
        assert_eq!("unlimited".parse(), Ok(Ceiling::<u32>::UNLIMITED));
        assert_eq!("12".parse(), Ok(Ceiling::at(12_u32)));
        assert!("some".parse::<Ceiling<u32>>().is_err());
    }
}

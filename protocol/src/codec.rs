//! Bytes to values and back: the only file that names bincode.
//!
//! Fixed-width little-endian integers, exact length, no trailing bytes, one encoding per value. Wire lists, bytes
//! and texts carry their greatest length in their type and refuse a longer length prefix before they reserve
//! memory, so that a hostile frame costs no more than it sent. In human-readable formats (the JSON twin) 64-bit
//! numbers are strings and bytes are base64.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::de::{self, DeserializeOwned, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes that a list reserves at once on the word of a length prefix; beyond it, it grows as items arrive.
const RESERVE_BYTES: usize = 1024;

/// Why bytes are not a value of the asked type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// More bytes than this message may have.
    #[error("message of {given} bytes exceeds the limit of {limit} bytes")]
    TooLarge {
        /// Greatest length in bytes.
        limit: usize,
        /// Length received in bytes.
        given: usize,
    },
    /// The bytes end inside a value.
    #[error("message of {given} bytes ends inside a value")]
    Truncated {
        /// Length received in bytes.
        given: usize,
    },
    /// Bytes follow the value.
    #[error("{left} bytes follow the end of the message")]
    Trailing {
        /// Bytes left over.
        left: usize,
    },
    /// A value that no encoder writes.
    #[error("malformed message: {what}")]
    Malformed {
        /// What was wrong, without the received content.
        what: String,
    },
    /// A second spelling of a value whose first spelling differs.
    #[error("message is not in its one canonical encoding")]
    NotCanonical,
}

impl CodecError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::Truncated { .. } => "truncated",
            Self::Trailing { .. } => "trailing",
            Self::Malformed { .. } => "malformed",
            Self::NotCanonical => "not_canonical",
        }
    }
}

/// A text, list or byte string longer than its type allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} of {given} exceeds the limit of {limit}")]
pub struct TooLong {
    /// `text`, `bytes` or `list`, with its unit.
    pub what: &'static str,
    /// Greatest length.
    pub limit: usize,
    /// Length given.
    pub given: usize,
}

/// The one encoding of a wire value.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, config()).expect("invariant: wire types always encode")
}

/// Decodes exactly `bytes`, which may be at most `max` bytes long.
pub fn decode<'de, T: Deserialize<'de>>(bytes: &'de [u8], max: usize) -> Result<T, CodecError> {
    if bytes.len() > max {
        return Err(CodecError::TooLarge { limit: max, given: bytes.len() });
    }
    let (value, used) = bincode::serde::borrow_decode_from_slice(bytes, config()).map_err(|e| match e {
        bincode::error::DecodeError::UnexpectedEnd { .. } => CodecError::Truncated { given: bytes.len() },
        bincode::error::DecodeError::OtherString(what) => CodecError::Malformed { what },
        other => CodecError::Malformed { what: other.to_string() },
    })?;
    if used != bytes.len() {
        return Err(CodecError::Trailing { left: bytes.len() - used });
    }
    Ok(value)
}

/// [`decode`], and then checks that encoding the value again gives the same bytes: for bodies whose hash is an id.
pub fn decode_canonical<T: Serialize + DeserializeOwned>(bytes: &[u8], max: usize) -> Result<T, CodecError> {
    let value: T = decode(bytes, max)?;
    if encode(&value) != bytes {
        return Err(CodecError::NotCanonical);
    }
    Ok(value)
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_fixed_int_encoding().with_little_endian()
}

/// A UTF-8 text of at most `MAX` bytes.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    /// Takes a text of at most `MAX` bytes.
    pub fn new(text: impl Into<String>) -> Result<Self, TooLong> {
        let text = text.into();
        if text.len() > MAX {
            return Err(TooLong { what: "text (in bytes)", limit: MAX, given: text.len() });
        }
        Ok(Self(text))
    }

    /// Takes as many whole characters of a text as fit: for messages to people, never for what is hashed.
    pub fn truncated(text: &str) -> Self {
        let mut end = text.len().min(MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self(text[..end].to_owned())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> Deref for Text<MAX> {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> fmt::Display for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<const MAX: usize> fmt::Debug for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<const MAX: usize> TryFrom<&str> for Text<MAX> {
    type Error = TooLong;
    fn try_from(text: &str) -> Result<Self, TooLong> {
        Self::new(text)
    }
}

impl<const MAX: usize> TryFrom<String> for Text<MAX> {
    type Error = TooLong;
    fn try_from(text: String) -> Result<Self, TooLong> {
        Self::new(text)
    }
}

impl<const MAX: usize> Serialize for Text<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Text<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for V<MAX> {
            type Value = Text<MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a text of at most {MAX} bytes")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                if text.len() > MAX {
                    return Err(too_long("text (in bytes)", MAX, text.len()));
                }
                Ok(Text(text.to_owned()))
            }
        }
        deserializer.deserialize_str(V)
    }
}

/// A byte string of at most `MAX` bytes; base64 in human-readable formats.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes<const MAX: usize>(Vec<u8>);

impl<const MAX: usize> Bytes<MAX> {
    /// Takes at most `MAX` bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, TooLong> {
        let bytes = bytes.into();
        if bytes.len() > MAX {
            return Err(TooLong { what: "byte string (in bytes)", limit: MAX, given: bytes.len() });
        }
        Ok(Self(bytes))
    }

    /// Gives the bytes back.
    pub fn into_vec(self) -> Vec<u8> {
        self.0
    }
}

impl<const MAX: usize> Deref for Bytes<MAX> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl<const MAX: usize> fmt::Debug for Bytes<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

impl<const MAX: usize> Serialize for Bytes<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.serialize_str(&data_encoding::BASE64.encode(&self.0))
        } else {
            serializer.serialize_bytes(&self.0)
        }
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Bytes<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for V<MAX> {
            type Value = Bytes<MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                if bytes.len() > MAX {
                    return Err(too_long("byte string (in bytes)", MAX, bytes.len()));
                }
                Ok(Bytes(bytes.to_vec()))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                if text.len() / 4 * 3 > MAX + 3 {
                    return Err(too_long("byte string (in bytes)", MAX, text.len() / 4 * 3));
                }
                let bytes =
                    data_encoding::BASE64.decode(text.as_bytes()).map_err(|e| E::custom(e.to_string()))?;
                self.visit_bytes(&bytes)
            }
        }
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(V)
        } else {
            deserializer.deserialize_bytes(V)
        }
    }
}

/// A list of at most `MAX` items. Items are never zero-sized on the wire.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct List<T, const MAX: usize>(Vec<T>);

impl<T, const MAX: usize> List<T, MAX> {
    /// Takes at most `MAX` items.
    pub fn new(items: impl Into<Vec<T>>) -> Result<Self, TooLong> {
        let items = items.into();
        if items.len() > MAX {
            return Err(TooLong { what: "list (in items)", limit: MAX, given: items.len() });
        }
        Ok(Self(items))
    }

    /// A list without items.
    pub const fn empty() -> Self {
        Self(Vec::new())
    }

    /// The first `MAX` items of any number, and nothing of the rest.
    pub fn first_of(items: impl IntoIterator<Item = T>) -> Self {
        Self(items.into_iter().take(MAX).collect())
    }

    /// Adds an item if there is room.
    pub fn push(&mut self, item: T) -> Result<(), TooLong> {
        if self.0.len() >= MAX {
            return Err(TooLong { what: "list (in items)", limit: MAX, given: self.0.len() + 1 });
        }
        self.0.push(item);
        Ok(())
    }

    /// Gives the items back.
    pub fn into_vec(self) -> Vec<T> {
        self.0
    }
}

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        Self::empty()
    }
}

impl<T, const MAX: usize> Deref for List<T, MAX> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T, const MAX: usize> IntoIterator for List<T, MAX> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, T, const MAX: usize> IntoIterator for &'a List<T, MAX> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<T, const MAX: usize> TryFrom<Vec<T>> for List<T, MAX> {
    type Error = TooLong;
    fn try_from(items: Vec<T>) -> Result<Self, TooLong> {
        Self::new(items)
    }
}

impl<T: Serialize, const MAX: usize> Serialize for List<T, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for V<T, MAX> {
            type Value = List<T, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX} items")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                const { assert!(size_of::<T>() > 0, "wire lists have no zero-sized items") };
                let hint = seq.size_hint().unwrap_or(0);
                if hint > MAX {
                    return Err(too_long("list (in items)", MAX, hint));
                }
                let mut items = Vec::with_capacity(hint.min(RESERVE_BYTES / size_of::<T>()));
                while let Some(item) = seq.next_element()? {
                    if items.len() == MAX {
                        return Err(too_long("list (in items)", MAX, MAX + 1));
                    }
                    items.push(item);
                }
                Ok(List(items))
            }
        }
        deserializer.deserialize_seq(V(PhantomData))
    }
}

/// Fixed-length bytes: raw on the wire, hexadecimal in human-readable formats. For `#[serde(with = ...)]`.
pub(crate) mod array {
    use super::*;

    pub(crate) fn serialize<S: Serializer, const N: usize>(bytes: &[u8; N], s: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeTuple;
        if s.is_human_readable() {
            return s.serialize_str(&hex::encode(bytes));
        }
        let mut tuple = s.serialize_tuple(N)?;
        for byte in bytes {
            tuple.serialize_element(byte)?;
        }
        tuple.end()
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(d: D) -> Result<[u8; N], D::Error> {
        struct V<const N: usize>;
        impl<'de, const N: usize> Visitor<'de> for V<N> {
            type Value = [u8; N];
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{N} bytes")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut bytes = [0; N];
                for (i, byte) in bytes.iter_mut().enumerate() {
                    *byte = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(i, &self))?;
                }
                Ok(bytes)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let mut bytes = [0; N];
                hex::decode_to_slice(text, &mut bytes).map_err(|e| E::custom(e.to_string()))?;
                Ok(bytes)
            }
        }
        if d.is_human_readable() { d.deserialize_str(V) } else { d.deserialize_tuple(N, V) }
    }
}

/// `u64` that is a string in human-readable formats, because JavaScript's numbers end at 2^53.
pub(crate) mod text_u64 {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(value: &u64, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_str(value) } else { s.serialize_u64(*value) }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = u64;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number, as a string")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<u64, E> {
                Ok(value)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Other("text"), &self))
            }
        }
        if d.is_human_readable() { d.deserialize_any(V) } else { d.deserialize_u64(V) }
    }
}

/// `i64` that is a string in human-readable formats.
pub(crate) mod text_i64 {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(value: &i64, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_str(value) } else { s.serialize_i64(*value) }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<i64, D::Error> {
        if d.is_human_readable() {
            let text = String::deserialize(d)?;
            text.parse().map_err(|_| de::Error::custom("not a whole number"))
        } else {
            i64::deserialize(d)
        }
    }
}

fn too_long<E: de::Error>(what: &'static str, limit: usize, given: usize) -> E {
    E::custom(TooLong { what, limit, given })
}

//! How the hub names a file's content: SHA-256 for large files, git's own hash for small ones.

use std::fmt;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The hash by which the hub names a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileHash {
    /// SHA-256 of its bytes.
    Sha256([u8; 32]),
    /// Git's blob hash: SHA-1 of a header with its length, and its bytes.
    Git([u8; 20]),
}

impl FileHash {
    /// From 64 or 40 hex digits.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let (mut long, mut short) = ([0; 32], [0; 20]);
        match text.len() {
            64 => hex::decode_to_slice(text, &mut long).ok().map(|()| Self::Sha256(long)),
            40 => hex::decode_to_slice(text, &mut short).ok().map(|()| Self::Git(short)),
            _ => None,
        }
    }

    /// From an entity tag.
    #[must_use]
    pub fn from_tag(tag: &str) -> Option<Self> {
        Self::from_hex(tag.trim().trim_start_matches("W/").trim_matches('"'))
    }

    /// The digits alone.
    #[must_use]
    pub fn hex(&self) -> String {
        match self {
            Self::Sha256(bytes) => hex::encode(bytes),
            Self::Git(bytes) => hex::encode(bytes),
        }
    }
}

impl fmt::Display for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Sha256(_) => "sha256",
            Self::Git(_) => "git",
        };
        write!(f, "{kind} {}", self.hex())
    }
}

/// A file's hash, as its bytes come.
#[derive(Debug, Clone)]
pub enum Hashing {
    /// SHA-256.
    Sha256(Sha256),
    /// Git's.
    Git(Sha1),
}

impl Hashing {
    /// Of the same kind as `wanted`, for a file of `len` bytes.
    #[must_use]
    pub fn like(wanted: &FileHash, len: u64) -> Self {
        match wanted {
            FileHash::Sha256(_) => Self::Sha256(Sha256::new()),
            FileHash::Git(_) => Self::Git(Sha1::new().chain_update(format!("blob {len}\0"))),
        }
    }

    /// Takes in more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Git(hasher) => hasher.update(bytes),
        }
    }

    /// The hash.
    #[must_use]
    pub fn finish(self) -> FileHash {
        match self {
            Self::Sha256(hasher) => FileHash::Sha256(hasher.finalize().into()),
            Self::Git(hasher) => FileHash::Git(hasher.finalize().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_of_sha256() {
        // `printf 'hello\n' | git hash-object --stdin` and `| sha256sum`.
        for hex in [
            "ce013625030ba8dba906f756967f9e9ca394464a",
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
        ] {
            let wanted = FileHash::from_hex(hex).expect("hash");
            let mut hashing = Hashing::like(&wanted, 6);
            hashing.update(b"hel");
            hashing.update(b"lo\n");
            assert_eq!(hashing.finish(), wanted);
            assert_eq!(FileHash::from_tag(&format!("W/\"{hex}\"")), Some(wanted));
        }
        assert_eq!(FileHash::from_hex("not a hash"), None);
        assert_eq!(FileHash::from_hex(&"g".repeat(40)), None);
    }
}

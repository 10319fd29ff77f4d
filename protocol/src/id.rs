//! Names of things: keys, hashes and nonces as types of their own, with a text form for people.
//!
//! On the wire an id is its raw bytes. As text it is a prefix that says what it is, then lowercase base32 of the
//! bytes and a short checksum, so that a mistyped or mixed-up id is told apart from an unknown one. Nodes are the
//! exception: their text is the libp2p PeerId of the same key (`12D3Koo...`).

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signer, SigningKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use crate::codec::array;

/// Head of the PeerId of an ed25519 key: identity multihash of 36 bytes, protobuf key type 1, 32 bytes of key.
const PEER_ID_HEAD: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// The text is an id of another sort, or none.
    #[error("not a {what}: expected text that begins with \"{prefix}\"")]
    Prefix {
        /// What was asked for.
        what: &'static str,
        /// How its text begins.
        prefix: &'static str,
    },
    /// Wrong number of characters.
    #[error("not a {what}: expected {expected} characters, found {given}")]
    Length {
        /// What was asked for.
        what: &'static str,
        /// Characters that it has.
        expected: usize,
        /// Characters given.
        given: usize,
    },
    /// A character that the alphabet lacks.
    #[error("not a {what}: it holds a character that no {what} has")]
    Alphabet {
        /// What was asked for.
        what: &'static str,
    },
    /// The checksum says that it was mistyped.
    #[error("mistyped {what}: its checksum does not match")]
    Checksum {
        /// What was asked for.
        what: &'static str,
    },
}

impl IdError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Prefix { .. } => "id_prefix",
            Self::Length { .. } => "id_length",
            Self::Alphabet { .. } => "id_alphabet",
            Self::Checksum { .. } => "id_checksum",
        }
    }
}

macro_rules! raw_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $len]);

        impl $name {
            /// From its raw bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }
            /// Its raw bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() { s.collect_str(self) } else { array::serialize(&self.0, s) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    String::deserialize(d)?.parse().map_err(de::Error::custom)
                } else {
                    array::deserialize(d).map(Self)
                }
            }
        }
    };
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $check:literal, $prefix:literal, $what:literal) => {
        raw_id!($(#[$doc])* $name, $len);

        impl $name {
            /// How the text form begins.
            pub const PREFIX: &'static str = $prefix;

            /// The first characters of the text form: for a line of progress, never to look something up.
            pub fn short(&self) -> String {
                self.to_string()[..$prefix.len() + 10].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&to_text::<$check>($prefix, &self.0))
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                from_text::<$len, $check>($what, $prefix, text).map(Self)
            }
        }
    };
}

raw_id!(
    /// A node: its ed25519 public key. Its text is the libp2p PeerId of that key.
    NodeId, 32);
raw_id!(
    /// An ed25519 public key that signed something, before it is known as whose. Its text is hexadecimal.
    PublicKey, 32);
raw_id!(
    /// blake3 of a signed body. Its text is hexadecimal.
    BodyHash, 32);
raw_id!(
    /// A random number that makes a body unique. Its text is hexadecimal.
    Nonce, 16);
text_id!(
    /// An artist: the ed25519 public key that signs jobs.
    RequesterId, 32, 3, "kf1", "requester key");
text_id!(
    /// A job: blake3 over domain, network, signer and body of the signed job.
    JobId, 32, 3, "job1", "job id");
text_id!(
    /// A clip: blake3 of the video file's bytes. Who knows it may fetch the clip.
    ClipId, 32, 3, "clip1", "clip id");
text_id!(
    /// Any content: blake3 of its bytes.
    BlobId, 32, 3, "blob1", "blob id");
text_id!(
    /// A model: blake3 of its encoded manifest.
    ModelId, 32, 3, "model1", "model id");
text_id!(
    /// A card: blake3 over domain, network, signer and body of the signed card.
    CardId, 32, 3, "card1", "card id");
text_id!(
    /// A receipt: blake3 over domain, network, signer and body of the signed receipt.
    ReceiptId, 32, 3, "receipt1", "receipt id");
text_id!(
    /// A collective: blake3 of its founding charter.
    CollectiveId, 32, 3, "coll1", "collective id");
text_id!(
    /// A network: blake3 of its name. Signatures of one network mean nothing in another.
    NetworkId, 32, 3, "net1", "network id");
text_id!(
    /// A node's chain of receipts: blake3 of its key and a random epoch made at `init`.
    ChainId, 32, 3, "chain1", "chain id");
text_id!(
    /// A place that a node holds for a job for some seconds.
    LeaseId, 16, 4, "lease1", "lease id");

macro_rules! hex_text {
    ($name:ident, $len:literal, $what:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                if text.len() != 2 * $len {
                    return Err(IdError::Length { what: $what, expected: 2 * $len, given: text.len() });
                }
                let mut bytes = [0; $len];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| IdError::Alphabet { what: $what })?;
                Ok(Self(bytes))
            }
        }
    };
}
hex_text!(PublicKey, 32, "public key");
hex_text!(BodyHash, 32, "body hash");
hex_text!(Nonce, 16, "nonce");

impl NodeId {
    /// The bytes of the libp2p PeerId of this key.
    pub fn to_peer_id_bytes(&self) -> [u8; 38] {
        let mut bytes = [0; 38];
        bytes[..6].copy_from_slice(&PEER_ID_HEAD);
        bytes[6..].copy_from_slice(&self.0);
        bytes
    }

    /// The node of a libp2p PeerId, if that holds an ed25519 key inline.
    pub fn from_peer_id_bytes(bytes: &[u8]) -> Option<Self> {
        let key = bytes.strip_prefix(&PEER_ID_HEAD)?;
        key.try_into().ok().map(Self)
    }

    /// The last characters of the text form: for a line of progress, never to look something up.
    pub fn short(&self) -> String {
        let text = self.to_string();
        text[text.len() - 8..].to_owned()
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.to_peer_id_bytes()).into_string())
    }
}

impl FromStr for NodeId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let what = "node id";
        if !text.starts_with("12D3Koo") {
            return Err(IdError::Prefix { what, prefix: "12D3Koo" });
        }
        let mut bytes = [0; 64];
        if text.len() > 64 {
            return Err(IdError::Length { what, expected: 52, given: text.len() });
        }
        let len = bs58::decode(text).onto(&mut bytes[..]).map_err(|_| IdError::Alphabet { what })?;
        Self::from_peer_id_bytes(&bytes[..len]).ok_or(IdError::Length {
            what,
            expected: 52,
            given: text.len(),
        })
    }
}

impl From<PublicKey> for NodeId {
    fn from(key: PublicKey) -> Self {
        Self(key.0)
    }
}
impl From<PublicKey> for RequesterId {
    fn from(key: PublicKey) -> Self {
        Self(key.0)
    }
}
impl From<NodeId> for PublicKey {
    fn from(id: NodeId) -> Self {
        Self(id.0)
    }
}
impl From<RequesterId> for PublicKey {
    fn from(id: RequesterId) -> Self {
        Self(id.0)
    }
}
impl From<ClipId> for BlobId {
    fn from(id: ClipId) -> Self {
        Self(id.0)
    }
}
impl From<BlobId> for ClipId {
    fn from(id: BlobId) -> Self {
        Self(id.0)
    }
}

impl BlobId {
    /// The id of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Hexadecimal of the hash, as `b3sum` prints it.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl ClipId {
    /// The id of a clip with these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        BlobId::of(bytes).into()
    }

    /// Hexadecimal of the hash, as `b3sum` prints it.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl BodyHash {
    /// blake3 of a body.
    pub fn of(body: &[u8]) -> Self {
        Self(*blake3::hash(body).as_bytes())
    }
}

impl NetworkId {
    /// The network of this name. The public one is [`crate::names::PUBLIC_NETWORK`].
    pub fn named(name: &str) -> Self {
        Self(hash_parts("kinoflock/1/network", &[name.as_bytes()]))
    }

    /// The first 8 bytes, which every envelope shows so that a stray one is told apart from a forged one.
    pub fn hint(&self) -> [u8; 8] {
        let mut hint = [0; 8];
        hint.copy_from_slice(&self.0[..8]);
        hint
    }
}

impl ChainId {
    /// The chain of a node for a random epoch that it made at `init`.
    pub fn new(node: &NodeId, epoch: &[u8; 32]) -> Self {
        Self(hash_parts("kinoflock/1/chain", &[&node.0, epoch]))
    }
}

/// An ed25519 key pair. The seed is wiped from memory when it is dropped, and never shown.
#[derive(Clone)]
pub struct Keypair(SigningKey);

impl Keypair {
    /// The key pair of a 32-byte seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// The seed, to be written to the key file.
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    /// The public key.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// The node that this key is, if it is a node's.
    pub fn node_id(&self) -> NodeId {
        self.public().into()
    }

    /// The artist that this key is, if it is an artist's.
    pub fn requester_id(&self) -> RequesterId {
        self.public().into()
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for Keypair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keypair({})", self.public())
    }
}

/// blake3 over a domain, a zero byte, and the parts one after the other: each but the last has a fixed length.
pub(crate) fn hash_parts(domain: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(domain.as_bytes()).update(&[0]);
    for part in parts {
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

pub(crate) fn to_text<const CHECK: usize>(prefix: &str, bytes: &[u8]) -> String {
    let mut all = bytes.to_vec();
    all.extend_from_slice(&hash_parts(prefix, &[bytes])[..CHECK]);
    let mut text = prefix.to_owned();
    data_encoding::BASE32_NOPAD.encode_append(&all, &mut text);
    text.make_ascii_lowercase();
    text
}

pub(crate) fn from_text<const LEN: usize, const CHECK: usize>(
    what: &'static str,
    prefix: &'static str,
    text: &str,
) -> Result<[u8; LEN], IdError> {
    let digits = text.strip_prefix(prefix).ok_or(IdError::Prefix { what, prefix })?;
    let expected = (LEN + CHECK) * 8 / 5;
    if digits.len() != expected {
        return Err(IdError::Length { what, expected: prefix.len() + expected, given: text.len() });
    }
    if digits.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(IdError::Alphabet { what });
    }
    let all = data_encoding::BASE32_NOPAD
        .decode(digits.to_ascii_uppercase().as_bytes())
        .map_err(|_| IdError::Alphabet { what })?;
    let (bytes, check) = all.split_at(LEN);
    if check != &hash_parts(prefix, &[bytes])[..CHECK] {
        return Err(IdError::Checksum { what });
    }
    Ok(bytes.try_into().expect("invariant: split at LEN"))
}

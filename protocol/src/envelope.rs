//! Signed statements: what is signed is bytes.
//!
//! An [`Envelope`] shows its kind, version, network hint and signer, and holds the body as bytes. The signature
//! covers `kinoflock/<version>/<kind>\0`, the network id and blake3(body). Opening checks, in this order: kind,
//! version, length, network, key, signature (`verify_strict`; weak keys refused), and only then decodes the body,
//! which must be in its one canonical encoding. What cannot be told apart by arithmetic, a forged signature and
//! one made for another purpose, is [`EnvelopeError::BadSignature`].

use std::fmt;

use ed25519_dalek::VerifyingKey;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::codec::{self, Bytes, CodecError, array};
use crate::id::{BodyHash, Keypair, NetworkId, PublicKey, hash_parts};
use crate::limits::{MAX_ENVELOPE, MAX_ENVELOPE_BODY};

/// What a signed body is. The number is on the wire, the name is in the signed tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Kind {
    /// A [`crate::job::JobSpec`].
    Job = 1,
    /// An [`crate::order::Order`].
    Order = 2,
    /// A [`crate::capacity::Capacity`].
    Capacity = 3,
    /// A [`crate::order::Quote`].
    Quote = 4,
    /// A [`crate::receipt::Receipt`].
    Receipt = 5,
    /// A [`crate::receipt::ReceiptAnswer`].
    ReceiptAnswer = 6,
    /// A [`crate::card::Card`].
    Card = 7,
    /// A [`crate::query::JobQuery`].
    JobQuery = 8,
    /// A [`crate::progress::Checkpoint`].
    Checkpoint = 9,
    /// A [`crate::custody::Custody`].
    Custody = 10,
    /// A [`crate::custody::Keep`].
    Keep = 11,
    /// A [`crate::list::NodeList`].
    NodeList = 12,
    /// A [`crate::list::ModelList`].
    ModelList = 13,
    /// A [`crate::audit::AuditRequest`].
    AuditRequest = 14,
    /// A [`crate::audit::AuditGrant`].
    AuditGrant = 15,
    /// A [`crate::audit::AuditVerdict`].
    AuditVerdict = 16,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 16] = [
        Self::Job,
        Self::Order,
        Self::Capacity,
        Self::Quote,
        Self::Receipt,
        Self::ReceiptAnswer,
        Self::Card,
        Self::JobQuery,
        Self::Checkpoint,
        Self::Custody,
        Self::Keep,
        Self::NodeList,
        Self::ModelList,
        Self::AuditRequest,
        Self::AuditGrant,
        Self::AuditVerdict,
    ];

    /// The kind of this number.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == code)
    }

    /// The name in the signed tag.
    pub fn name(self) -> &'static str {
        match self {
            Self::Job => "job",
            Self::Order => "order",
            Self::Capacity => "capacity",
            Self::Quote => "quote",
            Self::Receipt => "receipt",
            Self::ReceiptAnswer => "receipt-answer",
            Self::Card => "card",
            Self::JobQuery => "job-query",
            Self::Checkpoint => "checkpoint",
            Self::Custody => "custody",
            Self::Keep => "keep",
            Self::NodeList => "node-list",
            Self::ModelList => "model-list",
            Self::AuditRequest => "audit-request",
            Self::AuditGrant => "audit-grant",
            Self::AuditVerdict => "audit-verdict",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A body that can be signed.
pub trait Message: Serialize + DeserializeOwned {
    /// What it is.
    const KIND: Kind;
    /// The version of its body.
    const VERSION: u8;
    /// Greatest body in bytes.
    const MAX_BODY: usize;
}

/// An ed25519 signature; hexadecimal in human-readable formats.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Signature(#[serde(with = "array")] pub [u8; 64]);

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..", hex::encode(&self.0[..4]))
    }
}

/// A signed statement whose signature is not yet checked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Envelope {
    /// Version of the body.
    pub version: u8,
    /// Number of the [`Kind`], as it came.
    pub kind: u16,
    /// First 8 bytes of the network id.
    #[serde(with = "array")]
    pub network: [u8; 8],
    /// Who says that they signed.
    pub signer: PublicKey,
    /// The encoded body.
    pub body: Bytes<MAX_ENVELOPE_BODY>,
    /// Signature over tag, network id and blake3(body).
    pub signature: Signature,
}

/// Why an envelope is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvelopeError {
    /// Signed as something else.
    #[error("expected a signed {expected}, got {given}")]
    WrongKind {
        /// What was asked for.
        expected: &'static str,
        /// What came.
        given: String,
    },
    /// Another version of the body.
    #[error("speaks {what} version {speaks}, you sent {sent}")]
    UnsupportedVersion {
        /// Which body.
        what: &'static str,
        /// Version spoken here.
        speaks: u8,
        /// Version sent.
        sent: u8,
    },
    /// A body longer than its kind may be.
    #[error("{what} of {given} bytes exceeds the limit of {limit} bytes")]
    TooLarge {
        /// Which body.
        what: &'static str,
        /// Greatest length in bytes.
        limit: usize,
        /// Length given in bytes.
        given: usize,
    },
    /// Signed for another network.
    #[error("signed for network {given}, this is network {expected}")]
    WrongNetwork {
        /// This network's hint.
        expected: String,
        /// The envelope's hint.
        given: String,
    },
    /// The signer's key is no point of the curve.
    #[error("signer key {key} is not an ed25519 key")]
    InvalidKey {
        /// The key.
        key: PublicKey,
    },
    /// The signer's key is of small order: anybody can sign for it.
    #[error("signer key {key} is weak: anybody can sign for it")]
    WeakKey {
        /// The key.
        key: PublicKey,
    },
    /// The signature is forged, or made for another purpose or network.
    #[error("signature of {key} does not match this {what}")]
    BadSignature {
        /// The key that it claims.
        key: PublicKey,
        /// Which body.
        what: &'static str,
    },
    /// Well signed, but no such body.
    #[error("cannot read the signed {what}: {error}")]
    Decode {
        /// Which body.
        what: &'static str,
        /// Why.
        error: CodecError,
    },
}

impl EnvelopeError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::WrongKind { .. } => "wrong_kind",
            Self::UnsupportedVersion { .. } => "unsupported_version",
            Self::TooLarge { .. } => "too_large",
            Self::WrongNetwork { .. } => "wrong_network",
            Self::InvalidKey { .. } => "invalid_key",
            Self::WeakKey { .. } => "weak_key",
            Self::BadSignature { .. } => "bad_signature",
            Self::Decode { .. } => "decode",
        }
    }
}

/// A body whose signature was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened<T> {
    /// Who signed.
    pub signer: PublicKey,
    /// blake3 of the body as it was signed.
    pub body_hash: BodyHash,
    /// The body.
    pub value: T,
}

impl Envelope {
    /// Signs a body for a network.
    pub fn seal<T: Message>(
        keypair: &Keypair,
        network: &NetworkId,
        value: &T,
    ) -> Result<Self, EnvelopeError> {
        let body = codec::encode(value);
        let too_large =
            EnvelopeError::TooLarge { what: T::KIND.name(), limit: T::MAX_BODY, given: body.len() };
        if body.len() > T::MAX_BODY {
            return Err(too_large);
        }
        let signature =
            Signature(keypair.sign(&signed_bytes(T::KIND, T::VERSION, network, &BodyHash::of(&body))));
        Ok(Self {
            version: T::VERSION,
            kind: T::KIND as u16,
            network: network.hint(),
            signer: keypair.public(),
            body: Bytes::new(body).map_err(|_| too_large)?,
            signature,
        })
    }

    /// Checks everything that can be checked without a clock, and gives the body.
    pub fn open<T: Message>(&self, network: &NetworkId) -> Result<Opened<T>, EnvelopeError> {
        let body_hash = self.verify::<T>(network)?;
        let value = codec::decode_canonical(&self.body, T::MAX_BODY)
            .map_err(|error| EnvelopeError::Decode { what: T::KIND.name(), error })?;
        Ok(Opened { signer: self.signer, body_hash, value })
    }

    /// Checks kind, version, length, network, key and signature; leaves the body alone.
    pub fn verify<T: Message>(&self, network: &NetworkId) -> Result<BodyHash, EnvelopeError> {
        let what = T::KIND.name();
        if self.kind != T::KIND as u16 {
            let given = self.known_kind().map_or_else(|| format!("kind {}", self.kind), |k| k.to_string());
            return Err(EnvelopeError::WrongKind { expected: what, given });
        }
        if self.version != T::VERSION {
            return Err(EnvelopeError::UnsupportedVersion { what, speaks: T::VERSION, sent: self.version });
        }
        if self.body.len() > T::MAX_BODY {
            return Err(EnvelopeError::TooLarge { what, limit: T::MAX_BODY, given: self.body.len() });
        }
        if self.network != network.hint() {
            let (expected, given) = (hex::encode(network.hint()), hex::encode(self.network));
            return Err(EnvelopeError::WrongNetwork { expected, given });
        }
        let key = check_key(&self.signer)?;
        let body_hash = BodyHash::of(&self.body);
        let signature = ed25519_dalek::Signature::from_bytes(&self.signature.0);
        key.verify_strict(&signed_bytes(T::KIND, T::VERSION, network, &body_hash), &signature)
            .map_err(|_| EnvelopeError::BadSignature { key: self.signer, what })?;
        Ok(body_hash)
    }

    /// The kind, if this release knows it.
    pub fn known_kind(&self) -> Option<Kind> {
        Kind::from_code(self.kind)
    }

    /// The envelope's bytes.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// An envelope from exactly these bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode(bytes, MAX_ENVELOPE)
    }

    /// The hash that names the signed thing: over `domain`, network, signer and body.
    pub(crate) fn content_hash(&self, domain: &str, network: &NetworkId) -> [u8; 32] {
        hash_parts(domain, &[network.as_bytes(), self.signer.as_bytes(), &self.body])
    }
}

/// The key, unless it is none or of small order.
pub fn check_key(key: &PublicKey) -> Result<VerifyingKeyChecked, EnvelopeError> {
    let point =
        VerifyingKey::from_bytes(key.as_bytes()).map_err(|_| EnvelopeError::InvalidKey { key: *key })?;
    if point.is_weak() {
        return Err(EnvelopeError::WeakKey { key: *key });
    }
    Ok(VerifyingKeyChecked(point))
}

/// A public key that is a point of the curve and not of small order.
#[derive(Debug, Clone, Copy)]
pub struct VerifyingKeyChecked(VerifyingKey);

impl VerifyingKeyChecked {
    fn verify_strict(&self, message: &[u8], signature: &ed25519_dalek::Signature) -> Result<(), ()> {
        self.0.verify_strict(message, signature).map_err(|_| ())
    }
}

fn signed_bytes(kind: Kind, version: u8, network: &NetworkId, body: &BodyHash) -> Vec<u8> {
    let mut bytes = format!("kinoflock/{version}/{kind}\0").into_bytes();
    bytes.extend_from_slice(network.as_bytes());
    bytes.extend_from_slice(body.as_bytes());
    bytes
}

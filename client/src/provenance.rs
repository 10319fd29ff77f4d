//! Provenance in the file: what is added to a clip when it is exported, and what a file alone can prove.
//!
//! The clip that the node signed stays as it is; behind it goes one `uuid` box with an XMP packet, which players skip
//! and tools read. The packet says that the picture was made by a trained algorithm (IPTC digital source type) and
//! holds the node's signed receipt. So the receipt speaks of the bare clip and there is no circle: whoever checks
//! takes the box off again and hashes the rest.
//!
//! What is proven by signatures: node, model, job, requester, seed, steps, times, the clip's bytes; the requester's
//! acceptance, if it is in; the prompt and all parameters, if the artist put the signed job in. Everything else in the
//! packet is the word of whoever exported it, and a checksum tells an accident or a careless edit.

use kinoflock_protocol::card::Card;
use kinoflock_protocol::names::PUBLIC_NETWORK;
use kinoflock_protocol::receipt::{ReceiptAnswer, ReceiptError, ValidReceipt, Verdict};
use kinoflock_protocol::{CardId, ClipId, Envelope, JobSpec, NetworkId, PublicKey, RequesterId, ValidJob};

use crate::mp4;
use crate::verify::{self, ClipInfo, VerifyError};

mod xmp;

pub use xmp::Facts;

/// The UUID of a box with XMP (Adobe XMP specification, part 3).
pub const XMP_UUID: [u8; 16] =
    [0xBE, 0x7A, 0xCF, 0xCB, 0x97, 0xA9, 0x42, 0xE8, 0x9C, 0x71, 0x99, 0x94, 0x91, 0xE3, 0xAF, 0xAC];
/// IPTC's name for what a model made from words.
pub const SOURCE_TYPE: &str = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";
/// IPTC's name for what a model made from words and another's picture.
pub const SOURCE_TYPE_COMPOSITE: &str =
    "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia";
/// Head of the box: length, `uuid`, the UUID.
const BOX_HEAD: usize = 24;

/// Why a file does not verify.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProvenanceError {
    /// The file's boxes are damaged.
    #[error("the file was changed or cut: {reason}")]
    Structure {
        /// Where and how.
        reason: String,
    },
    /// No box of ours.
    #[error(
        "the file carries no Kinoflock receipt: it was not exported by kinoflock, or its provenance was taken out or changed"
    )]
    None,
    /// Something stands behind the box.
    #[error(
        "the file was changed: {given} bytes stand behind its provenance, which ends every exported file"
    )]
    Behind {
        /// How many.
        given: usize,
    },
    /// The packet was changed.
    #[error("the provenance in the file was changed: {reason}")]
    Packet {
        /// Where and how.
        reason: String,
    },
    /// The receipt is refused.
    #[error("the receipt in the file is not valid: {0}")]
    Receipt(#[from] ReceiptError),
    /// The video's bytes changed.
    #[error("the video's bytes were changed: their hash is {given}, the receipt was signed for {expected}")]
    WrongBytes {
        /// What the receipt says.
        expected: ClipId,
        /// What the bytes are.
        given: ClipId,
    },
    /// The bytes are signed, but no clip.
    #[error(transparent)]
    Clip(#[from] VerifyError),
}

impl ProvenanceError {
    /// Stable name for `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Structure { .. } => "file_structure",
            Self::None => "no_provenance",
            Self::Behind { .. } => "bytes_behind",
            Self::Packet { .. } => "provenance_changed",
            Self::Receipt(error) => error.code(),
            Self::WrongBytes { .. } => "wrong_bytes",
            Self::Clip(error) => error.code(),
        }
    }
}

/// What goes into an exported file.
#[derive(Debug, Clone)]
pub struct Statement<'a> {
    /// In which network.
    pub network: NetworkId,
    /// The node's signed receipt.
    pub receipt: &'a Envelope,
    /// The requester's signed answer to it.
    pub answer: Option<&'a Envelope>,
    /// The signed job.
    pub job: &'a Envelope,
    /// Name by which the node offered the model.
    pub model_name: &'a str,
    /// Whether the prompt goes in, and with it the signed job that proves it.
    pub with_prompt: bool,
    /// Signed cards of the adapters that went in.
    pub cards: &'a [Envelope],
}

/// A signed card that a receipt names.
#[derive(Debug, Clone)]
pub struct Cited {
    /// Its id.
    pub id: CardId,
    /// Who signed it.
    pub signer: PublicKey,
    /// What it says.
    pub card: Card,
}

/// Opens a signed card.
///
/// # Errors
/// When its signature or its shares are wrong.
pub fn cited(envelope: &Envelope, network: &NetworkId) -> Result<Cited, ProvenanceError> {
    let changed = |reason: String| ProvenanceError::Packet { reason };
    let opened = envelope.open::<Card>(network).map_err(|error| changed(error.to_string()))?;
    opened.value.check().map_err(|error| changed(error.to_string()))?;
    Ok(Cited { id: CardId::of(envelope, network), signer: opened.signer, card: opened.value })
}

/// What a file proves.
#[derive(Debug, Clone)]
pub struct Verified {
    /// In which network.
    pub network: NetworkId,
    /// The receipt, whose signature holds.
    pub receipt: ValidReceipt,
    /// The bare clip, which is the receipt's.
    pub clip: ClipId,
    /// What the clip says of itself.
    pub info: ClipInfo,
    /// The requester's acceptance or dispute, signed.
    pub verdict: Option<Verdict>,
    /// The signed job, if the artist put it in.
    pub job: Option<JobSpec>,
    /// The signed cards of the adapters, as far as they are in.
    pub cards: Vec<Cited>,
    /// What else the packet says: the exporter's word.
    pub facts: Facts,
}

/// The clip with its provenance.
///
/// # Errors
/// When receipt or job are not valid, or `bare` is not the receipt's clip.
pub fn export(bare: &[u8], statement: &Statement<'_>) -> Result<Vec<u8>, ProvenanceError> {
    let receipt = ValidReceipt::parse(statement.receipt, &statement.network)?;
    check_bytes(bare, &receipt.receipt().clip)?;
    let info = verify::clip_info(bare)?;
    let job = ValidJob::parse_stored(statement.job, &statement.network)
        .map_err(|error| ProvenanceError::Packet { reason: error.to_string() })?;
    let facts = Facts::of(job.spec(), &info, statement.model_name, statement.with_prompt);
    let packet = xmp::write(statement, receipt.receipt(), &facts);
    let len = u32::try_from(BOX_HEAD + packet.len())
        .map_err(|_| ProvenanceError::Packet { reason: "it is longer than a box can be".to_owned() })?;
    let mut file = Vec::with_capacity(bare.len() + BOX_HEAD + packet.len());
    file.extend_from_slice(bare);
    file.extend_from_slice(&len.to_be_bytes());
    file.extend_from_slice(b"uuid");
    file.extend_from_slice(&XMP_UUID);
    file.extend_from_slice(packet.as_bytes());
    Ok(file)
}

/// Checks a file by itself.
///
/// # Errors
/// The first thing that is wrong with it; a changed byte is always one.
pub fn check(file: &[u8]) -> Result<Verified, ProvenanceError> {
    let (bare, packet) = split(file)?;
    let packet = xmp::read(packet).map_err(|reason| ProvenanceError::Packet { reason })?;
    let receipt = ValidReceipt::parse(&packet.receipt, &packet.network)?;
    check_bytes(bare, &receipt.receipt().clip)?;
    let info = verify::clip_info(bare)?;
    let changed = |reason: &str| ProvenanceError::Packet { reason: reason.to_owned() };
    packet.check_facts(receipt.receipt(), &info).map_err(|reason| changed(&reason))?;
    let job = match &packet.job {
        Some(envelope) => {
            let job = ValidJob::parse_stored(envelope, &packet.network)
                .map_err(|error| changed(&error.to_string()))?;
            if job.id() != receipt.receipt().job {
                return Err(changed("the job in it is not the receipt's"));
            }
            Some(job.into_spec())
        }
        None => None,
    };
    let verdict = match &packet.answer {
        Some(envelope) => Some(check_answer(envelope, &packet.network, &receipt).map_err(|r| changed(&r))?),
        None => None,
    };
    let cards = packet.cards.iter().map(|envelope| cited(envelope, &packet.network));
    let cards = cards.collect::<Result<Vec<_>, _>>()?;
    if cards.iter().any(|cited| !receipt.receipt().cards.contains(&cited.id)) {
        return Err(changed("a card in it is none of the receipt's"));
    }
    let (network, clip, facts) = (packet.network, receipt.receipt().clip, packet.facts);
    Ok(Verified { network, receipt, clip, info, verdict, job, cards, facts })
}

/// The bare clip of an exported file, unverified; the whole file if it carries no provenance.
#[must_use]
pub fn bare(file: &[u8]) -> &[u8] {
    split(file).map_or(file, |(bare, _)| bare)
}

/// Name of a network for people: the public one by its name, others by their id.
#[must_use]
pub fn network_name(network: &NetworkId) -> String {
    if *network == NetworkId::named(PUBLIC_NETWORK) { PUBLIC_NETWORK.to_owned() } else { network.to_string() }
}

fn split(file: &[u8]) -> Result<(&[u8], &[u8]), ProvenanceError> {
    let boxes = mp4::boxes(file, 0..file.len()).map_err(|reason| ProvenanceError::Structure { reason })?;
    let is_ours = |found: &&mp4::Mp4Box| {
        &found.name == b"uuid"
            && found.content.len() >= 16
            && file[found.content.clone()].starts_with(&XMP_UUID)
            && xmp::is_ours(&file[found.content.start + 16..found.content.end])
    };
    let found = boxes.iter().rfind(is_ours).ok_or(ProvenanceError::None)?;
    if found.range.end != file.len() {
        return Err(ProvenanceError::Behind { given: file.len() - found.range.end });
    }
    Ok((&file[..found.range.start], &file[found.content.start + 16..found.content.end]))
}

fn check_bytes(bare: &[u8], expected: &ClipId) -> Result<(), ProvenanceError> {
    let given = ClipId::of(bare);
    if given == *expected { Ok(()) } else { Err(ProvenanceError::WrongBytes { expected: *expected, given }) }
}

fn check_answer(envelope: &Envelope, network: &NetworkId, receipt: &ValidReceipt) -> Result<Verdict, String> {
    let answer = envelope.open::<ReceiptAnswer>(network).map_err(|error| error.to_string())?;
    if RequesterId::from(answer.signer) != receipt.receipt().requester || answer.value.receipt != receipt.id()
    {
        return Err("the answer in it is not the requester's answer to this receipt".to_owned());
    }
    Ok(answer.value.verdict)
}

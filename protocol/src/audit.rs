//! The step audit: how a node commits to every step of a job, and how one of them is later looked at.
//!
//! While a job runs, its node makes a [`Leaf`] of every state of the latents, the beginning included, and puts the
//! [`root`] of their Merkle tree (RFC 6962's shape, with domains of our own) into the signed receipt. Only afterwards the
//! requester, or an auditor whom the requester named in a signed [`AuditGrant`], draws one step uniformly and asks for it
//! in a signed [`AuditRequest`]. The node answers with [`AuditReply`]: proofs for the beginning, for the state before and
//! after that step, and for the end, and where to fetch the states themselves, sealed with the job's key. Who holds the
//! job recomputes that one step; a node that did not compute it as it says is caught once in as many audits as the
//! job has steps for each step that is wrong.
//!
//! How another node is asked to do that, and what it answers, is told in [`verdict`].
//!
//! The leaf binds the latents, the sampler's state (its schedule and place in it) and the hash of everything that the
//! steps depend on beside the model.

use serde::{Deserialize, Serialize};

use crate::clip::BlobRef;
use crate::codec::{List, array, text_u64};
use crate::envelope::{Envelope, Kind, Message};
use crate::id::{BlobId, JobId, NetworkId, NodeId, Nonce, PublicKey, ReceiptId, RequesterId, hash_parts};
use crate::limits::{MAX_CLOCK_SKEW_MS, QUERY_LIFE_MS};
use crate::order::{OrderError, check_times};
use crate::units::{Millis, UnixMillis};

pub mod verdict;

pub use verdict::{
    AuditDifference, AuditError, AuditId, AuditObstacle, AuditOrder, AuditOutcome, AuditPrecision,
    AuditState, AuditVerdict, ValidAuditOrder, own_steps,
};

/// Most siblings in a proof: trees of up to 2^32 leaves.
pub const MAX_PROOF: usize = 32;
/// Most states that one answer opens: the beginning, two in the middle, the end.
pub const MAX_OPENINGS: usize = 4;

/// The commitment to the state before the first step, or after one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Leaf(#[serde(with = "array")] pub [u8; 32]);

impl Leaf {
    /// The leaf of latents (the hash of their little-endian f32 values), sampler state and conditioning.
    pub fn new(latents: &BlobId, sampler: &[u8; 32], conditioning: &[u8; 32]) -> Self {
        Self(hash_parts("kinoflock/1/step-leaf", &[latents.as_bytes(), sampler, conditioning]))
    }
}

fn parent(left: &[u8; 32], right: &[u8; 32]) -> [u8; 32] {
    hash_parts("kinoflock/1/step-node", &[left, right])
}

/// The root is bound to the number of leaves, so that a proof cannot be read in another tree's shape.
fn close(leaves: u64, top: &[u8; 32]) -> BlobId {
    BlobId::from_bytes(hash_parts("kinoflock/1/step-root", &[&leaves.to_le_bytes(), top]))
}

/// The next level of a tree; an odd last one moves up as it is.
fn next_level(level: &[[u8; 32]]) -> Vec<[u8; 32]> {
    level.chunks(2).map(|pair| if let [a, b] = pair { parent(a, b) } else { pair[0] }).collect()
}

/// The root over the leaves of a job; `None` without any.
pub fn root(leaves: &[Leaf]) -> Option<BlobId> {
    let mut level: Vec<_> = leaves.iter().map(|leaf| leaf.0).collect();
    while level.len() > 1 {
        level = next_level(&level);
    }
    level.first().map(|top| close(leaves.len() as u64, top))
}

/// A leaf's siblings on the way to the root, the lowest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Proof(pub List<Leaf, MAX_PROOF>);

/// The proof for a leaf; `None` if there is no such leaf.
pub fn prove(leaves: &[Leaf], index: usize) -> Option<Proof> {
    leaves.get(index)?;
    let mut level: Vec<_> = leaves.iter().map(|leaf| leaf.0).collect();
    let (mut at, mut siblings) = (index, Vec::new());
    while level.len() > 1 {
        siblings.extend(level.get(at ^ 1).copied().map(Leaf));
        level = next_level(&level);
        at /= 2;
    }
    Some(Proof(List::new(siblings).ok()?))
}

impl Proof {
    /// Whether `leaf` is number `index` of the `leaves` under `root`.
    pub fn holds(&self, root: &BlobId, leaves: u64, index: u64, leaf: &Leaf) -> bool {
        if index >= leaves {
            return false;
        }
        let (mut top, mut at, mut width) = (leaf.0, index, leaves);
        let mut siblings = self.0.iter();
        while width > 1 {
            let has_sibling = at ^ 1 < width;
            if has_sibling {
                let Some(sibling) = siblings.next() else { return false };
                top = if at % 2 == 0 { parent(&top, &sibling.0) } else { parent(&sibling.0, &top) };
            }
            at /= 2;
            width = width.div_ceil(2);
        }
        siblings.next().is_none() && close(leaves, &top) == *root
    }
}

/// A requester's word that somebody may audit a job. Who audits it sees the prompt and four states of the latents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditGrant {
    /// Which job.
    pub job: JobId,
    /// Which receipt.
    pub receipt: ReceiptId,
    /// Who may audit it.
    pub auditor: PublicKey,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// Until when it holds.
    pub expires_at: UnixMillis,
}

impl Message for AuditGrant {
    const KIND: Kind = Kind::AuditGrant;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 256;
}

/// "Show me this step." Signed by the requester or a granted auditor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRequest {
    /// Which job.
    pub job: JobId,
    /// Which receipt.
    pub receipt: ReceiptId,
    /// Which node is asked.
    pub node: NodeId,
    /// Which step, from 0, drawn uniformly after the receipt was signed.
    pub step: u32,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// Random: makes two otherwise equal requests two.
    pub nonce: Nonce,
}

impl Message for AuditRequest {
    const KIND: Kind = Kind::AuditRequest;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 256;
}

/// A state that the node committed to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opening {
    /// Steps done in that state.
    pub index: u32,
    /// Hash of the latents' little-endian f32 values.
    pub latents: BlobId,
    /// The latents, a safetensors file, sealed with the job's key.
    pub sealed: BlobRef,
    /// That its leaf is under the receipt's root.
    pub proof: Proof,
}

/// What a node shows of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditReply {
    /// Leaves under the root: one more than steps.
    #[serde(with = "text_u64")]
    pub leaves: u64,
    /// The states, by rising index.
    pub openings: List<Opening, MAX_OPENINGS>,
}

/// Indexes of the states that an audit of this step opens.
pub fn opened(step: u32, steps: u32) -> Vec<u32> {
    let mut indexes = vec![0, step, step + 1, steps];
    indexes.dedup();
    indexes
}

/// An audit request that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidAudit {
    /// Who asks.
    pub auditor: PublicKey,
    /// What is asked.
    pub request: AuditRequest,
}

impl ValidAudit {
    /// Checks a signed request to `here`, and the grant where another than the requester of the job asks. `requester` and
    /// `receipt` are those of the job.
    ///
    /// # Errors
    /// See [`OrderError`].
    pub fn parse(
        envelope: &Envelope,
        grant: Option<&Envelope>,
        network: &NetworkId,
        now: UnixMillis,
        here: &NodeId,
        requester: &RequesterId,
    ) -> Result<Self, OrderError> {
        let opened = envelope.open::<AuditRequest>(network)?;
        let (auditor, request) = (opened.signer, opened.value);
        if request.node != *here {
            return Err(OrderError::OrderForAnotherNode { addressed: request.node, here: *here });
        }
        let expires_at = request.issued_at.plus(Millis(QUERY_LIFE_MS + MAX_CLOCK_SKEW_MS));
        check_times("audit request", request.issued_at, expires_at, now)?;
        if auditor == PublicKey::from(*requester) {
            return Ok(Self { auditor, request });
        }
        let granted = grant.ok_or(OrderError::WrongSigner { signer: auditor })?;
        let granted = granted.open::<AuditGrant>(network)?;
        let named = granted.value;
        let by_requester = RequesterId::from(granted.signer) == *requester;
        if !by_requester || named.auditor != auditor || named.receipt != request.receipt {
            return Err(OrderError::WrongSigner { signer: auditor });
        }
        if named.job != request.job {
            return Err(OrderError::WrongJob { ordered: named.job, given: request.job });
        }
        check_times("audit grant", named.issued_at, named.expires_at, now)?;
        Ok(Self { auditor, request })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn leaves(count: usize) -> Vec<Leaf> {
        let state = |index: usize| BlobId::of(&index.to_le_bytes());
        (0..count).map(|index| Leaf::new(&state(index), &[1; 32], &[2; 32])).collect()
    }

    #[test]
    fn a_leaf_binds_all_its_parts_and_a_root_the_number_of_leaves() {
        let id = BlobId::of(b"latents");
        let leaf = Leaf::new(&id, &[1; 32], &[2; 32]);
        assert_ne!(leaf, Leaf::new(&BlobId::of(b"others"), &[1; 32], &[2; 32]));
        assert_ne!(leaf, Leaf::new(&id, &[3; 32], &[2; 32]));
        assert_ne!(leaf, Leaf::new(&id, &[1; 32], &[3; 32]));
        assert_eq!(root(&[]), None);
        let one = root(&leaves(1)).unwrap();
        assert!(Proof::default().holds(&one, 1, 0, &leaves(1)[0]));
        assert_ne!(one, BlobId::from_bytes(leaves(1)[0].0));
    }

    #[test]
    fn the_roots_of_some_trees_never_change() {
        let roots: Vec<String> = [1, 2, 3, 17]
            .iter()
            .map(|count| root(&leaves(*count)).unwrap().to_hex()[..16].to_owned())
            .collect();
        assert_eq!(roots, GOLDEN_ROOTS);
    }

    const GOLDEN_ROOTS: [&str; 4] =
        ["693455a0c495d8aa", "bcc468637ca9d96c", "d132b218dffbbf49", "9fb15960499e1324"];

    proptest! {
        #[test]
        fn every_proof_holds_for_its_leaf_alone(count in 1usize..70, index in 0usize..70, other in 0usize..70) {
            let (index, other, leaves) = (index % count, other % count, leaves(count));
            let root = root(&leaves).unwrap();
            let proof = prove(&leaves, index).unwrap();
            let n = count as u64;
            prop_assert!(proof.holds(&root, n, index as u64, &leaves[index]));
            if other != index {
                prop_assert!(!proof.holds(&root, n, other as u64, &leaves[other]));
                prop_assert!(!proof.holds(&root, n, index as u64, &leaves[other]));
            }
            prop_assert!(!proof.holds(&root, n + 1, index as u64, &leaves[index]));
            prop_assert!(!proof.holds(&BlobId::of(b""), n, index as u64, &leaves[index]));
            prop_assert!(!proof.holds(&root, n, n, &leaves[index]));
            prop_assert_eq!(prove(&leaves, count), None);
        }
    }

    #[test]
    fn an_audit_opens_the_two_ends_and_both_sides_of_its_step() {
        assert_eq!(opened(5, 16), [0, 5, 6, 16]);
        assert_eq!(opened(0, 16), [0, 1, 16]);
        assert_eq!(opened(15, 16), [0, 15, 16]);
        assert_eq!(opened(0, 1), [0, 1]);
    }
}

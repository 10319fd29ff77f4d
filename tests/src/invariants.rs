//! What must hold whatever a test is about.

use std::path::Path;

use kinoflock_client::provenance::{self, Verified};

use crate::sandbox::Node;

/// A delivered file is a whole clip with a receipt by this node, for the bytes that are in it.
///
/// # Panics
/// When it is not.
pub fn delivered(file: &Path, node: &Node) -> Verified {
    let bytes = std::fs::read(file).expect("the file is there");
    let verified = provenance::check(&bytes).expect("the file proves what it is");
    let receipt = verified.receipt.receipt();
    assert_eq!(receipt.node, node.local().node_id, "the receipt is another node's");
    assert_eq!(receipt.clip, verified.clip, "the receipt is for other bytes");
    assert!(receipt.started_at >= receipt.accepted_at && receipt.finished_at >= receipt.started_at);
    assert!(receipt.steps > 0 && receipt.work.0 > 0);
    verified
}

/// Nothing of a prompt or a frame is in a node's log or metrics, and nothing of it panicked.
///
/// # Panics
/// When something is.
pub fn discreet(node: &Node, secret: &str) {
    let log = node.log();
    assert!(!log.contains(secret), "the log tells a prompt");
    assert!(!log.contains("panicked at"), "something panicked:\n{log}");
}

/// The node's receipts are one chain without a gap: as many as jobs were done.
///
/// # Panics
/// When they are not.
pub fn one_chain(receipts: &[Verified]) {
    let mut links: Vec<_> = receipts.iter().map(|one| one.receipt.receipt()).collect();
    links.sort_by_key(|receipt| receipt.sequence);
    for (before, after) in links.iter().zip(links.iter().skip(1)) {
        assert_eq!(before.sequence + 1, after.sequence, "a gap in the chain");
        assert_eq!(before.chain, after.chain, "two chains");
    }
    for (number, one) in receipts.iter().enumerate() {
        let previous = one.receipt.receipt().previous;
        let known = receipts.iter().any(|other| Some(other.receipt.id()) == previous);
        assert!(previous.is_none() || known || number == 0, "a receipt names an unknown one before it");
    }
}

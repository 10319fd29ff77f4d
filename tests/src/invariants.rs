//! What must hold whatever a test is about.

use std::collections::BTreeSet;
use std::path::Path;

use kinoflock_client::provenance::{self, Verified};
use kinoflock_protocol::receipt::Verdict;

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

/// Nothing of a prompt or a frame is in anything that a node tells or leaves lying about: its log, its metrics, its
/// status, its runtime folder. And nothing of it panicked.
///
/// # Panics
/// When something is.
pub fn discreet(node: &Node, secret: &str) {
    assert_eq!(found_in(node, secret), Vec::<String>::new(), "a prompt is told");
    let log = node.log();
    assert!(!log.contains("panicked at"), "something panicked:\n{log}");
}

/// Where outside its store a node tells these words.
#[must_use]
pub fn found_in(node: &Node, secret: &str) -> Vec<String> {
    let mut places: Vec<(String, Vec<u8>)> = vec![("log".to_owned(), node.log().into_bytes())];
    if node.runs() {
        let status = serde_json::to_vec(&node.status()).expect("a report encodes");
        places.push(("status".to_owned(), status));
        places.push(("metrics".to_owned(), node.metrics().into_bytes()));
    }
    places.extend(files_below(&node.path("run")));
    let tells = |content: &[u8]| String::from_utf8_lossy(content).contains(secret);
    places.into_iter().filter(|(_, content)| tells(content)).map(|(place, _)| place).collect()
}

/// Every regular file below a folder, with its content.
fn files_below(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path()),
            Ok(kind) if kind.is_file() => {
                let path = entry.path();
                let content = std::fs::read(&path).unwrap_or_default();
                vec![(path.display().to_string(), content)]
            }
            _ => Vec::new(),
        })
        .collect()
}

/// Each job came to one outcome: no two receipts are for one job, and no job is in two receipts.
///
/// # Panics
/// When they are.
pub fn one_outcome_each(made: &[Verified]) {
    let jobs: BTreeSet<_> = made.iter().map(|one| one.receipt.receipt().job).collect();
    let receipts: BTreeSet<_> = made.iter().map(|one| one.receipt.id()).collect();
    assert_eq!((jobs.len(), receipts.len()), (made.len(), made.len()), "a job has two outcomes");
    let disputed = |one: &Verified| matches!(one.verdict, Some(Verdict::Dispute { .. }));
    assert!(!made.iter().any(disputed), "a delivered clip is disputed");
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

//! The model inside this program: the one place that knows where its files come from.

/// The name by which it is offered.
pub const NAME: &str = "motif";

/// Path within the folder, and content, of every file of the bundled model.
pub const FILES: &[(&str, &[u8])] = kinoflock_inference::motif::FILES;

/// Says which bundled model this is: a hash over all paths and contents; `None` if none is bundled.
#[must_use]
pub fn stamp() -> Option<String> {
    if FILES.is_empty() {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    for (path, bytes) in FILES {
        hasher.update(&(path.len() as u64).to_le_bytes()).update(path.as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }
    Some(hasher.finalize().to_hex().to_string())
}

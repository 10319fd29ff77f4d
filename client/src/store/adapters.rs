//! Adapters of the artist: their weights are blobs, and of each there is a record; and signed cards, by their ids.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::{BlobId, CardId, Envelope, UnixMillis};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, by_prefix, file_names, private, read_json, remove, sync_folder, unique};

/// Name of the folder of records.
pub(super) const FOLDER: &str = "adapters";
/// Name of the folder of cards.
pub(super) const CARDS: &str = "cards";
/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;

/// What is kept of an adapter beside its weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// Its weights.
    pub weights: BlobRef,
    /// The name by which the artist knows it.
    pub name: String,
    /// When it was added, by this machine's clock.
    pub added_at: UnixMillis,
    /// Its card, if it has one.
    pub card: Option<CardId>,
}

impl Store {
    /// Copies a file into the store.
    ///
    /// # Errors
    /// When it cannot be read, or the disk refuses.
    pub fn insert_file(&self, file: &Path) -> Result<BlobRef, StoreError> {
        let temporary = self.root.join("tmp").join(unique());
        let copied = copy(file, &temporary).and_then(|blob| {
            if self.has_blob(&blob.id) {
                remove(&temporary)?;
            } else {
                self.adopt_blob(&blob.id, &temporary)?;
            }
            Ok(blob)
        });
        if copied.is_err() {
            // What could not be copied whole is of no use.
            let _ = fs::remove_file(&temporary);
        }
        copied
    }

    /// Keeps an adapter's record.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn insert_adapter(&self, record: &AdapterRecord) -> Result<(), StoreError> {
        self.write_json(&self.adapter_path(&record.weights.id), record)
    }

    /// What is kept of an adapter.
    ///
    /// # Errors
    /// A damaged record, or a disk that refuses.
    pub fn adapter(&self, weights: &BlobId) -> Result<Option<AdapterRecord>, StoreError> {
        read_json(&self.adapter_path(weights))
    }

    /// All adapters, by their names. A damaged record is passed over.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn adapters(&self) -> Result<Vec<AdapterRecord>, StoreError> {
        let folder = self.root.join(FOLDER);
        let read = |name: &String| read_json::<AdapterRecord>(&folder.join(name)).ok().flatten();
        let mut records: Vec<_> = file_names(&folder)?.iter().filter_map(read).collect();
        records.sort_by(|a, b| (&a.name, a.weights).cmp(&(&b.name, b.weights)));
        Ok(records)
    }

    /// The adapter of this name, or whose id is, or begins with, `text`.
    ///
    /// # Errors
    /// `NotFound`, `Ambiguous`.
    pub fn find_adapter(&self, text: &str) -> Result<AdapterRecord, StoreError> {
        let records = self.adapters()?;
        let named: Vec<_> = records.iter().filter(|record| record.name == text).collect();
        let (what, given, list) = ("adapter", text.to_owned(), "adapter list");
        match named[..] {
            [one] => return Ok(one.clone()),
            [] => {}
            _ => return Err(StoreError::Ambiguous { what, given, matches: named.len() }),
        }
        let ids = records.iter().map(|record| record.weights.id);
        let id = by_prefix(what, list, BlobId::PREFIX, text, ids)?;
        let found = records.into_iter().find(|record| record.weights.id == id);
        found.ok_or(StoreError::NotFound { what, given, list })
    }

    /// Removes an adapter's record and weights; its card stays, for the clips that were made with it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove_adapter(&self, weights: &BlobId) -> Result<(), StoreError> {
        remove(&self.adapter_path(weights))?;
        self.remove_blob(weights)
    }

    /// Keeps a signed card.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn insert_card(&self, id: &CardId, card: &Envelope) -> Result<(), StoreError> {
        self.write_json(&self.card_path(id), card)
    }

    /// A signed card.
    ///
    /// # Errors
    /// A damaged file, or a disk that refuses.
    pub fn card(&self, id: &CardId) -> Result<Option<Envelope>, StoreError> {
        read_json(&self.card_path(id))
    }

    fn adapter_path(&self, weights: &BlobId) -> PathBuf {
        self.root.join(FOLDER).join(format!("{weights}.json"))
    }

    fn card_path(&self, id: &CardId) -> PathBuf {
        self.root.join(CARDS).join(format!("{id}.json"))
    }
}

fn copy(from: &Path, to: &Path) -> Result<BlobRef, StoreError> {
    let mut source = File::open(from).map_err(StoreError::io("read", from))?;
    let mut target = private(OpenOptions::new().create_new(true).write(true))
        .open(to)
        .map_err(StoreError::io("write", to))?;
    let (mut hasher, mut len, mut piece) = (blake3::Hasher::new(), 0, vec![0; PIECE]);
    loop {
        let read = source.read(&mut piece).map_err(StoreError::io("read", from))?;
        if read == 0 {
            break;
        }
        hasher.update(&piece[..read]);
        target.write_all(&piece[..read]).map_err(StoreError::io("write", to))?;
        len += read as u64;
    }
    target.sync_all().map_err(StoreError::io("write", to))?;
    sync_folder(to);
    Ok(BlobRef { id: BlobId::from_bytes(*hasher.finalize().as_bytes()), len })
}

//! Adapters that stay here for a while after their job, so that the next job with one does not fetch it again.
//!
//! An adapter is kept for the requester who brought it and given to no other: its hash stands in receipts, and who knows
//! that has not the adapter. Nothing outlives the daemon, an hour without use, or its requester's word to forget; the
//! least recently used ones make room. A file that is used again is hashed again. Jobs that want the same one at once wait
//! for whoever fetches it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::id::{BlobId, RequesterId};
use tokio::sync::OwnedMutexGuard;

/// The folder, in the daemon's own.
const FOLDER: &str = "adapters";
/// How long an adapter stays without use.
const KEPT_FOR: Duration = Duration::from_secs(3600);
/// Most adapters that are kept.
const MAX_KEPT: usize = 4096;

/// Whose, and which.
type Key = (RequesterId, BlobId);

/// The adapters that are kept. Clones mean the same ones.
#[derive(Debug, Clone)]
pub(in crate::run) struct Kept(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    /// Bytes.
    limit: u64,
    rows: BTreeMap<Key, Row>,
    /// Who fetches what now, or waits for it; as many as jobs wait for inputs at most.
    fetching: BTreeMap<Key, Arc<tokio::sync::Mutex<()>>>,
    /// Files that were made.
    made: u64,
    /// How often somebody said to forget.
    forgotten: u64,
}

#[derive(Debug)]
struct Row {
    file: PathBuf,
    len: u64,
    used: Instant,
}

impl Kept {
    /// An empty store below the daemon's folder, for so many bytes; what an earlier daemon left is removed.
    pub(in crate::run) fn open(state: &Path, limit: u64) -> io::Result<Self> {
        let folder = state.join(FOLDER);
        crate::run::jobs::remove_folder(&folder)?;
        let (rows, fetching) = (BTreeMap::new(), BTreeMap::new());
        let (made, forgotten) = (0, 0);
        Ok(Self(Arc::new(Mutex::new(Inner { folder, limit, rows, fetching, made, forgotten }))))
    }

    /// Waits until nobody else fetches the same for the same requester. Others wait until what it gives is dropped.
    pub(in crate::run) async fn turn(&self, requester: RequesterId, blob: BlobId) -> OwnedMutexGuard<()> {
        let turn = {
            let mut inner = self.lock();
            inner.fetching.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(inner.fetching.entry((requester, blob)).or_default())
        };
        turn.lock_owned().await
    }

    /// Puts a requester's adapter at `to`, if it is here. One whose bytes are not what they were is dropped.
    pub(in crate::run) fn take(&self, requester: RequesterId, blob: BlobRef, to: &Path) -> bool {
        let key = (requester, blob.id);
        let file = {
            let mut inner = self.lock();
            inner.expire(Instant::now());
            let Some(row) = inner.rows.get_mut(&key).filter(|row| row.len == blob.len) else { return false };
            row.used = Instant::now();
            row.file.clone()
        };
        if let Err(error) = same_file(&file, to) {
            tracing::debug!(blob = %blob.id.short(), %error, "a kept adapter was not taken");
            let _gone = std::fs::remove_file(to);
            // The job's folder goes when it is cancelled, a disk may be full: that is not the adapter's fault.
            if File::open(&file).is_err() {
                self.lock().drop_row(&key);
            }
            return false;
        }
        match hash(to) {
            Ok(found) if found == blob.id => true,
            result => {
                tracing::warn!(blob = %blob.id.short(), error = ?result.err(), "a kept adapter is not what it was");
                let _gone = std::fs::remove_file(to);
                self.lock().drop_row(&key);
                false
            }
        }
    }

    /// Keeps a requester's adapter, which was fetched and checked, where it has room. Whoever calls it has the turn.
    pub(in crate::run) fn keep(&self, requester: RequesterId, blob: BlobRef, from: &Path) {
        let key = (requester, blob.id);
        // What was asked for may be said to be longer than it is.
        let is_whole = std::fs::metadata(from).is_ok_and(|found| found.len() == blob.len);
        let (folder, file, forgotten) = {
            let mut inner = self.lock();
            let has_room = blob.len > 0 && blob.len <= inner.limit;
            if !is_whole || !has_room || inner.rows.contains_key(&key) {
                return;
            }
            inner.make_room(blob.len);
            inner.made += 1;
            (inner.folder.clone(), inner.folder.join(inner.made.to_string()), inner.forgotten)
        };
        match std::fs::create_dir_all(folder).and_then(|()| same_file(from, &file)) {
            Ok(()) => {
                let mut inner = self.lock();
                if inner.forgotten != forgotten {
                    // It may have been the requester's word; what is not kept is fetched again.
                    let _gone = std::fs::remove_file(file);
                    return;
                }
                // Others may have come meanwhile.
                inner.make_room(blob.len);
                inner.rows.insert(key, Row { file, len: blob.len, used: Instant::now() });
            }
            Err(error) => {
                tracing::warn!(blob = %blob.id.short(), %error, "an adapter could not be kept");
                let _gone = std::fs::remove_file(file);
            }
        }
    }

    /// Drops all adapters of a requester.
    pub(in crate::run) fn forget(&self, requester: &RequesterId) {
        let mut inner = self.lock();
        inner.forgotten += 1;
        inner.drop_where(|(whose, _), _| whose == requester);
    }

    /// Drops what nobody has used for long.
    pub(in crate::run) fn expire(&self, now: Instant) {
        self.lock().expire(now);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn bytes(&self) -> u64 {
        self.rows.values().map(|row| row.len).sum()
    }

    /// Drops the least recently used until one more of so many bytes fits.
    fn make_room(&mut self, len: u64) {
        while self.bytes().saturating_add(len) > self.limit || self.rows.len() >= MAX_KEPT {
            let oldest = self.rows.iter().min_by_key(|(_, row)| row.used).map(|(key, _)| *key);
            let Some(key) = oldest else { return };
            self.drop_row(&key);
        }
    }

    fn expire(&mut self, now: Instant) {
        self.drop_where(|_, row| now.saturating_duration_since(row.used) >= KEPT_FOR);
    }

    fn drop_where(&mut self, which: impl Fn(&Key, &Row) -> bool) {
        let gone: Vec<Key> =
            self.rows.iter().filter(|(key, row)| which(key, row)).map(|(key, _)| *key).collect();
        gone.iter().for_each(|key| self.drop_row(key));
    }

    fn drop_row(&mut self, key: &Key) {
        let Some(row) = self.rows.remove(key) else { return };
        if let Err(error) = std::fs::remove_file(&row.file) {
            tracing::warn!(%error, "a kept adapter could not be removed");
        }
    }
}

/// The same bytes at a second place, which either may lose without the other; nobody writes into them.
fn same_file(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::hard_link(from, to).or_else(|_| std::fs::copy(from, to).map(drop))
}

fn hash(file: &Path) -> io::Result<BlobId> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(file)?)?;
    Ok(BlobId::from_bytes(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ADA: RequesterId = RequesterId::from_bytes([1; 32]);
    const BEN: RequesterId = RequesterId::from_bytes([2; 32]);

    struct Place {
        folder: tempfile::TempDir,
        kept: Kept,
    }

    impl Place {
        fn new(limit: u64) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let kept = Kept::open(folder.path(), limit).unwrap();
            Self { folder, kept }
        }

        /// Fetches a file of ten bytes and keeps it.
        fn fetched(&self, whose: RequesterId, letter: char) -> BlobRef {
            let bytes = letter.to_string().repeat(10);
            let file = self.folder.path().join("fetched");
            std::fs::write(&file, &bytes).unwrap();
            let blob = BlobRef { id: BlobId::of(bytes.as_bytes()), len: 10 };
            self.kept.keep(whose, blob, &file);
            std::fs::remove_file(&file).unwrap();
            blob
        }

        fn takes(&self, whose: RequesterId, blob: BlobRef) -> bool {
            let to = self.folder.path().join("taken");
            let found = self.kept.take(whose, blob, &to);
            assert_eq!(found, to.exists());
            let _gone = std::fs::remove_file(to);
            found
        }

        fn files(&self) -> usize {
            std::fs::read_dir(self.folder.path().join(FOLDER)).map_or(0, Iterator::count)
        }
    }

    #[test]
    fn the_least_recently_used_make_room_and_what_is_larger_than_all_room_is_not_kept() {
        let place = Place::new(25);
        let (a, b) = (place.fetched(ADA, 'a'), place.fetched(ADA, 'b'));
        assert!(place.takes(ADA, a));
        let c = place.fetched(ADA, 'c');
        assert!(!place.takes(ADA, b) && place.takes(ADA, a) && place.takes(ADA, c));
        assert_eq!(place.files(), 2);
        let small = Place::new(9);
        let a = small.fetched(ADA, 'a');
        assert!(!small.takes(ADA, a) && small.files() == 0);
    }

    #[test]
    fn an_adapter_is_its_requesters_alone_until_that_says_to_forget_or_an_hour_is_over() {
        let place = Place::new(100);
        let a = place.fetched(ADA, 'a');
        assert!(!place.takes(BEN, a), "by its hash alone");
        assert_eq!(place.fetched(BEN, 'a'), a);
        place.kept.forget(&ADA);
        assert!(!place.takes(ADA, a) && place.takes(BEN, a));
        assert_eq!(place.files(), 1);
        place.kept.expire(Instant::now() + KEPT_FOR);
        assert_eq!(place.files(), 0);
        place.fetched(ADA, 'a');
        Kept::open(place.folder.path(), 100).unwrap();
        assert_eq!(place.files(), 0, "an earlier daemon's");
    }

    #[test]
    fn a_file_that_was_changed_or_is_gone_is_dropped_and_not_used() {
        let place = Place::new(100);
        let a = place.fetched(ADA, 'a');
        let file = std::fs::read_dir(place.folder.path().join(FOLDER)).unwrap().next().unwrap().unwrap();
        std::fs::write(file.path(), "aaaaabaaaa").unwrap();
        assert!(!place.takes(ADA, a));
        assert_eq!(place.files(), 0);
        place.fetched(ADA, 'a');
        std::fs::remove_dir_all(place.folder.path().join(FOLDER)).unwrap();
        assert!(!place.takes(ADA, a));
        assert_eq!(place.fetched(ADA, 'a'), a);
        assert!(place.takes(ADA, a), "it is fetched again and kept");
    }

    #[test]
    fn a_place_that_is_gone_costs_no_adapter_and_a_wrong_length_takes_no_room() {
        let place = Place::new(25);
        let a = place.fetched(ADA, 'a');
        assert!(!place.kept.take(ADA, a, &place.folder.path().join("gone/taken")));
        assert!(place.takes(ADA, a));
        let file = place.folder.path().join("short");
        std::fs::write(&file, "b").unwrap();
        place.kept.keep(ADA, BlobRef { id: BlobId::of(b"b"), len: 25 }, &file);
        assert!(place.takes(ADA, a), "it made no room for what was said to be long");
        assert_eq!(place.files(), 1);
    }

    #[tokio::test]
    async fn who_wants_what_another_fetches_waits_for_it() {
        let place = Place::new(100);
        let blob = BlobId::of(b"a");
        let first = place.kept.turn(ADA, blob).await;
        let other = place.kept.turn(BEN, blob).await;
        let mut second = std::pin::pin!(place.kept.turn(ADA, blob));
        let waits = tokio::time::timeout(Duration::from_millis(20), second.as_mut()).await;
        assert!(waits.is_err());
        drop((first, other));
        let _second = second.await;
        let _third = place.kept.turn(BEN, BlobId::of(b"b")).await;
        assert_eq!(place.kept.lock().fetching.len(), 2, "who has fetched is forgotten");
    }
}

//! Content: chaining values merge to the ordinary hash, and a wrong chunk, outline or length is named.
#![allow(clippy::unwrap_used, missing_docs)]

use kinoflock_protocol::BlobId;
use kinoflock_protocol::clip::*;
use kinoflock_protocol::limits::{CHUNK_BYTES, MAX_BLOB_BYTES};
use proptest::prelude::*;

const FIVE_MIB: usize = 5 * CHUNK_BYTES;

fn content(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn check(bytes: &[u8], pieces: &[usize]) {
    let id = BlobId::of(bytes);
    let outline = Outline::of(bytes).unwrap();
    assert_eq!(outline.values.len() as u64, chunk_count(outline.len));
    assert_eq!(merge(outline.len, &outline.values).unwrap(), id, "{} bytes", bytes.len());
    assert_eq!(*id.as_bytes(), *blake3::hash(bytes).as_bytes());
    let mut at = 0;
    for index in 0..chunk_count(outline.len) {
        let len = chunk_len(index, outline.len).unwrap();
        outline.check_chunk(index, &bytes[at..at + len]).unwrap();
        at += len;
    }
    assert_eq!(at, bytes.len());

    let mut hasher = ChunkHasher::new();
    let mut rest = bytes;
    for piece in pieces {
        let (head, tail) = rest.split_at((*piece).min(rest.len()));
        hasher.update(head).unwrap();
        rest = tail;
    }
    hasher.update(rest).unwrap();
    assert_eq!(hasher.len(), bytes.len() as u64);
    assert_eq!(hasher.finish(), (id, outline));
}

#[test]
fn chaining_values_merge_to_the_hash_around_every_boundary() {
    let whole = content(FIVE_MIB + 2, 0);
    let boundaries = (0..=5).map(|mib| mib * CHUNK_BYTES).chain([1024, 2048, 64 * 1024, CHUNK_BYTES / 2]);
    for boundary in boundaries {
        for off in [-1025i64, -1024, -1, 0, 1, 2] {
            let Ok(len) = usize::try_from(boundary as i64 + off) else { continue };
            check(&whole[..len.min(whole.len())], &[1, CHUNK_BYTES - 1, CHUNK_BYTES + 1]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn chaining_values_merge_to_the_hash_of_any_length(
        len in prop_oneof![0..=FIVE_MIB, 0..3000usize, CHUNK_BYTES - 2..CHUNK_BYTES + 3],
        seed in any::<u8>(),
        pieces in prop::collection::vec(0..2 * CHUNK_BYTES, 0..6),
    ) {
        check(&content(len, seed), &pieces);
    }

    #[test]
    fn a_changed_byte_is_found_in_its_chunk_and_only_there(len in 1..3 * CHUNK_BYTES, at in any::<prop::sample::Index>()) {
        let good = content(len, 1);
        let outline = Outline::of(&good).unwrap();
        let at = at.index(len);
        let mut bad = good.clone();
        bad[at] ^= 1;
        for (index, chunk) in (0..).zip(bad.chunks(CHUNK_BYTES)) {
            let found = outline.check_chunk(index, chunk);
            if index == (at / CHUNK_BYTES) as u64 {
                prop_assert_eq!(found, Err(ClipError::WrongChunk { index }));
            } else {
                prop_assert_eq!(found, Ok(()));
            }
        }
        prop_assert!(Outline::of(&bad).unwrap().check(&BlobId::of(&good)).is_err());
    }
}

#[test]
fn outlines_and_chunks_that_cannot_be_are_refused() {
    let bytes = content(2 * CHUNK_BYTES + 5, 2);
    let outline = Outline::of(&bytes).unwrap();
    let id = BlobId::of(&bytes);
    outline.check(&id).unwrap();
    assert_eq!(merge(outline.len, &outline.values[..2]).unwrap_err().code(), "outline_length");
    assert_eq!(merge(u64::MAX, &outline.values).unwrap_err().code(), "blob_too_large");
    assert_eq!(merge(MAX_BLOB_BYTES + 1, &[]).unwrap_err().code(), "blob_too_large");
    assert_eq!(merge(0, &[]).unwrap_err().code(), "outline_length");
    assert_eq!(outline.check_chunk(3, &[]).unwrap_err().code(), "no_such_chunk");
    assert_eq!(outline.check_chunk(u64::MAX, &[]).unwrap_err().code(), "no_such_chunk");
    assert_eq!(outline.check_chunk(2, &bytes[..6]).unwrap_err().code(), "chunk_length");
    assert_eq!(outline.check_chunk(1, &bytes[..CHUNK_BYTES]), Err(ClipError::WrongChunk { index: 1 }));
    let shorter = Outline { len: outline.len - 1, ..outline };
    assert!(shorter.check(&id).is_err() || shorter.check_chunk(2, &bytes[2 * CHUNK_BYTES..]).is_err());
}

//! Memory: what a hostile frame makes us reserve, and what an honest one costs at its peak, by a counting allocator.
#![allow(clippy::unwrap_used, missing_docs, dead_code)]

#[path = "support/samples.rs"]
mod samples;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Debug;

use kinoflock_protocol::codec::{decode, encode};
use kinoflock_protocol::frame::{Class, FrameReader};
use kinoflock_protocol::limits::*;
use samples::{Draw, Visit, every_message};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Peak memory that decoding may take for each byte received, and beside it: values are a few times wider in memory
/// than on the wire (an `Option` of a text is 24 bytes, its absence one), and a growing list doubles.
const PER_BYTE: usize = 24;
const BESIDE: usize = 16 * 1024;
/// About how many places of a message are tried as a length prefix.
const PLACES: usize = 800;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting what each thread holds.
struct Counting;

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is passed on unchanged to the system's allocator, and counting neither allocates nor unwinds:
// the counters are const-initialised thread locals of plain cells.
#[expect(unsafe_code, reason = "a global allocator is the one way to count allocations")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same here.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: `memory` came from `System.alloc` with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Greatest number of bytes that `act` held at once beyond what was held before.
fn peak_of<R>(act: impl FnOnce() -> R) -> (usize, R) {
    let before = HELD.get();
    PEAK.set(before);
    let result = act();
    ((PEAK.get() - before) as usize, result)
}

struct Hostile {
    lengths: usize,
}

impl Visit for Hostile {
    fn message<T>(&mut self, name: &str, max: usize, make: fn(&mut Draw) -> T)
    where
        T: Serialize + DeserializeOwned + PartialEq + Debug + Clone,
    {
        for seed in 0..2 {
            let bytes = encode(&make(&mut Draw(seed)));
            let (peak, value) = peak_of(|| decode::<T>(&bytes, max));
            drop(value.unwrap());
            let allowed = bytes.len() * PER_BYTE + BESIDE;
            assert!(peak <= allowed, "{name}: {peak} bytes held to read {}", bytes.len());
            // Every place of the message (of long ones, evenly spread ones) as a length prefix of 8 GiB and more.
            for at in (0..bytes.len().saturating_sub(8)).step_by(1 + bytes.len() / PLACES) {
                for length in [8u64 << 30, u64::MAX, MAX_CHUNKS as u64] {
                    let mut bad = bytes.clone();
                    bad[at..at + 8].copy_from_slice(&length.to_le_bytes());
                    let (peak, _) = peak_of(|| decode::<T>(&bad, max).is_ok());
                    assert!(peak <= allowed, "{name}: {peak} bytes held for length {length} at byte {at}");
                    self.lengths += 1;
                }
            }
        }
    }
}

#[test]
fn no_length_prefix_makes_any_message_reserve_more_than_was_sent() {
    let mut hostile = Hostile { lengths: 0 };
    every_message(&mut hostile);
    assert!(hostile.lengths > 10_000, "only {} lengths were tried", hostile.lengths);
}

#[test]
fn a_message_over_its_limit_costs_nothing() {
    let huge = vec![0; MAX_OUTLINE_FRAME + 1];
    let (peak, result) = peak_of(|| decode::<kinoflock_protocol::Envelope>(&huge, MAX_ENVELOPE));
    assert!(result.is_err());
    assert_eq!(peak, 0);
}

#[test]
fn the_greatest_outline_costs_little_more_than_its_bytes() {
    let mut bytes = (MAX_BLOB_BYTES).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(MAX_CHUNKS as u64).to_le_bytes());
    bytes.resize(16 + 32 * MAX_CHUNKS, 7);
    let (peak, outline) = peak_of(|| decode::<kinoflock_protocol::clip::Outline>(&bytes, MAX_OUTLINE_FRAME));
    assert_eq!(outline.unwrap().values.len(), MAX_CHUNKS);
    assert!(peak <= bytes.len() * 3, "{peak} bytes held for {}", bytes.len());
}

#[test]
fn a_frame_reader_holds_no_more_than_arrived() {
    for class in [Class::Control, Class::Progress, Class::Open, Class::Blob, Class::Outline] {
        let (peak, refused) = peak_of(|| {
            let mut reader = FrameReader::new(class.limit());
            reader.push(&u32::MAX.to_le_bytes());
            reader.next_frame().is_err()
        });
        assert!(refused && peak < 64, "{class:?}: {peak}");
        let (peak, _) = peak_of(|| {
            let mut reader = FrameReader::new(class.limit());
            reader.push(&(class.limit() as u32).to_le_bytes());
            for _ in 0..100 {
                reader.push(&[0; 10]);
                assert_eq!(reader.next_frame(), Ok(None));
            }
            reader.pending()
        });
        assert!(peak <= 3 * 1004, "{class:?}: {peak} bytes held for 1004");
    }
}

//! What the clip store promises: whole files, bounded room, honest reads.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use kinoflock_node::clips::{Clips, ClipsError, Owner, OwnerClass};
use kinoflock_protocol::id::{BlobId, JobId, RequesterId};
use kinoflock_protocol::units::UnixMillis;
use tempfile::TempDir;

const MIB: usize = 1 << 20;

fn owner(job: u8, requester: u8) -> Owner {
    Owner {
        job: JobId::from_bytes([job; 32]),
        requester: RequesterId::from_bytes([requester; 32]),
        class: OwnerClass::Public,
    }
}

fn at(millis: u64) -> UnixMillis {
    UnixMillis(millis)
}

fn bytes(fill: u8, len: usize) -> Vec<u8> {
    (0..len).map(|index| fill.wrapping_add((index / 7) as u8)).collect()
}

fn store(limit: u64) -> (TempDir, Clips) {
    let dir = tempfile::tempdir().unwrap();
    let clips = Clips::open(dir.path(), limit).unwrap();
    (dir, clips)
}

fn file_of(dir: &Path, id: &BlobId) -> std::path::PathBuf {
    let hex = id.to_hex();
    dir.join(&hex[..2]).join(hex)
}

fn files_in(dir: &Path) -> usize {
    let folders =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    folders.map(|folder| std::fs::read_dir(folder).unwrap().count()).sum()
}

#[test]
fn what_is_put_is_read_back_and_survives_a_restart() {
    let (dir, clips) = store(64 << 20);
    for len in [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 5] {
        let content = bytes(1, len);
        let blob = clips.put(&content, owner(1, 1), at(1)).unwrap();
        assert_eq!((blob.id, blob.len), (BlobId::of(&content), len as u64));
        assert_eq!(clips.read(&blob.id).unwrap(), content);
        clips.outline(&blob.id).unwrap().check(&blob.id).unwrap();
    }
    let fill = clips.fill();
    drop(clips);
    let clips = Clips::open(dir.path(), 64 << 20).unwrap();
    assert_eq!(clips.fill(), fill);
    assert_eq!(clips.read(&BlobId::of(&bytes(1, MIB + 1))).unwrap(), bytes(1, MIB + 1));
}

#[test]
fn a_file_is_taken_in_by_content() {
    let (dir, clips) = store(64 << 20);
    let made = dir.path().join("made.mp4");
    std::fs::write(&made, bytes(5, 2 * MIB + 1)).unwrap();
    let blob = clips.put_file(&made, owner(1, 1), at(1)).unwrap();
    assert_eq!(clips.read(&blob.id).unwrap(), bytes(5, 2 * MIB + 1));
    assert!(made.exists());
}

#[test]
fn a_changed_file_is_named_as_changed_and_only_where_it_is() {
    let (dir, clips) = store(64 << 20);
    let content = bytes(1, 3 * MIB);
    let id = clips.put(&content, owner(1, 1), at(1)).unwrap().id;
    let path = file_of(dir.path(), &id);
    let mut changed = content.clone();
    changed[MIB + 7] ^= 1;
    std::fs::write(&path, &changed).unwrap();
    assert_eq!(clips.read_chunk(&id, 0).unwrap(), content[..MIB]);
    let error = clips.read_chunk(&id, 1).unwrap_err();
    assert_eq!(error.code(), "blob_tampered");
    assert!(error.to_string().contains(&id.to_string()), "{error}");
    std::fs::write(&path, &content[..2 * MIB + 9]).unwrap();
    assert_eq!(clips.read_chunk(&id, 2).unwrap_err().code(), "blob_tampered", "a shortened file");
    assert_eq!(clips.read_chunk(&id, 3).unwrap_err().code(), "no_such_chunk");
}

#[test]
fn room_is_made_by_evicting_the_oldest_acknowledged() {
    let (_dir, clips) = store(3 * MIB as u64);
    let blobs: Vec<_> = (1..=3)
        .map(|number| clips.put(&bytes(number * 60, MIB), owner(number, 1), at(1)).unwrap().id)
        .collect();
    clips.acknowledge(&blobs[1], &owner(2, 1).job, at(5)).unwrap();
    clips.acknowledge(&blobs[0], &owner(1, 1).job, at(9)).unwrap();
    clips.put(&bytes(4, MIB), owner(4, 1), at(10)).unwrap();
    assert_eq!(blobs.iter().map(|id| clips.contains(id)).collect::<Vec<_>>(), [true, false, true]);
    clips.put(&bytes(5, MIB), owner(5, 1), at(11)).unwrap();
    assert_eq!(blobs.iter().map(|id| clips.contains(id)).collect::<Vec<_>>(), [false, false, true]);
}

#[test]
fn what_nobody_fetched_is_not_evicted_and_the_store_says_full() {
    let (dir, clips) = store(2 * MIB as u64);
    for number in 1..=2 {
        clips.put(&bytes(number * 60, MIB), owner(number, 1), at(1)).unwrap();
    }
    let error = clips.put(&bytes(9, 10), owner(9, 9), at(2)).unwrap_err();
    assert!(
        matches!(error, ClipsError::StoreFull { needed: 10, available: 0, limit } if limit == 2 * MIB as u64)
    );
    assert_eq!(files_in(dir.path()), 2, "nothing is left of the refused one");
    let room = clips.room(&owner(1, 1).requester, OwnerClass::Public, 10);
    assert_eq!((room.available, room.needed, room.unacknowledged), (0, 10, 2 * MIB as u64));
    assert_eq!(clips.room(&owner(9, 9).requester, OwnerClass::Public, 10).unacknowledged, 0);
    assert_eq!(clips.unacknowledged_of(OwnerClass::Public), 2 * MIB as u64);
    assert_eq!(clips.unacknowledged_of(OwnerClass::Own), 0);
}

#[test]
fn the_public_s_unfetched_clips_leave_a_quarter_of_the_store_to_own_keys_and_collectives() {
    let (_dir, clips) = store(4 * MIB as u64);
    for number in 1..=2 {
        clips.put(&bytes(number * 60, MIB), owner(number, 1), at(1)).unwrap();
    }
    let available = |class| clips.room(&owner(9, 9).requester, class, 10).available;
    assert_eq!(available(OwnerClass::Public), MIB as u64);
    assert_eq!(available(OwnerClass::Collective), 2 * MIB as u64);
    clips.put(&bytes(3, MIB), owner(3, 1), at(1)).unwrap();
    assert_eq!((available(OwnerClass::Public), available(OwnerClass::Own)), (0, MIB as u64));
}

#[test]
fn room_that_a_running_write_holds_is_not_given_twice() {
    let (_dir, clips) = store(2 * MIB as u64);
    let writer = clips.writer(owner(1, 1), 2 * MIB as u64, at(1)).unwrap();
    assert_eq!(clips.put(&bytes(1, 10), owner(2, 2), at(1)).unwrap_err().code(), "store_full");
    drop(writer);
    clips.put(&bytes(1, 10), owner(2, 2), at(1)).unwrap();
    let mut writer = clips.writer(owner(3, 3), 0, at(1)).unwrap();
    let error = writer.append(&bytes(3, 3 * MIB)).unwrap_err();
    assert_eq!(error.code(), "store_full", "more than was announced takes room too");
}

#[test]
fn one_clip_of_two_jobs_stays_until_both_acknowledged_it() {
    let (_dir, clips) = store(4 * MIB as u64);
    let id = clips.put(&bytes(1, MIB), owner(1, 1), at(1)).unwrap().id;
    clips.put(&bytes(1, MIB), owner(2, 2), at(1)).unwrap();
    assert_eq!(clips.fill().used, MIB as u64);
    clips.acknowledge(&id, &owner(1, 1).job, at(2)).unwrap();
    assert_eq!(clips.fill().evictable, 0);
    assert_eq!(clips.room(&owner(1, 1).requester, OwnerClass::Public, 0).unacknowledged, 0);
    assert_eq!(clips.room(&owner(2, 2).requester, OwnerClass::Public, 0).unacknowledged, MIB as u64);
    clips.acknowledge(&id, &owner(2, 2).job, at(3)).unwrap();
    assert_eq!(clips.fill().evictable, MIB as u64);
}

#[test]
fn terms_end_acknowledged_blobs_and_old_ones() {
    let (_dir, clips) = store(8 * MIB as u64);
    let ids: Vec<_> = (1..=3)
        .map(|number| {
            clips.put(&bytes(number * 50, 100), owner(number, 1), at(u64::from(number) * 100)).unwrap().id
        })
        .collect();
    clips.acknowledge(&ids[1], &owner(2, 1).job, at(400)).unwrap();
    assert_eq!(clips.sweep(at(400), at(100)).unwrap(), []);
    assert_eq!(clips.sweep(at(401), at(100)).unwrap(), [ids[1]]);
    assert_eq!(clips.sweep(at(0), at(200)).unwrap(), [ids[0]]);
    assert_eq!(clips.read(&ids[0]).unwrap_err().code(), "blob_unknown");
    assert!(clips.contains(&ids[2]));
}

#[test]
fn what_a_crash_left_behind_is_removed_at_the_start() {
    let (dir, clips) = store(8 * MIB as u64);
    let [kept, lost] =
        [1, 2].map(|number| clips.put(&bytes(number * 90, 100), owner(number, 1), at(1)).unwrap().id);
    drop(clips);
    std::fs::write(dir.path().join("tmp/77"), b"half").unwrap();
    let stray = BlobId::of(b"stray");
    std::fs::create_dir_all(file_of(dir.path(), &stray).parent().unwrap()).unwrap();
    std::fs::write(file_of(dir.path(), &stray), b"stray").unwrap();
    std::fs::remove_file(file_of(dir.path(), &lost)).unwrap();
    let clips = Clips::open(dir.path(), 8 * MIB as u64).unwrap();
    assert_eq!(files_in(dir.path()), 1);
    assert_eq!((clips.contains(&kept), clips.contains(&lost)), (true, false));
    assert_eq!(clips.fill().blobs, 1);
}

#[test]
fn a_second_daemon_on_one_clip_store_is_refused() {
    let (dir, _clips) = store(1);
    assert_eq!(Clips::open(dir.path(), 1).unwrap_err().code(), "store_in_use");
}

/// Set for the child process of the test below: its folder.
const CHILD: &str = "KINOFLOCK_TEST_FULL_DISK";

#[test]
fn a_full_disk_is_an_error_to_the_job_and_the_store_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    // A limit on file sizes fails a write as a full disk does, without needing a disk to fill.
    let script = "trap '' XFSZ; ulimit -f 4096; exec \"$0\" --exact --ignored full_disk_child --nocapture";
    let output = Command::new("bash")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "run by a_full_disk_is_an_error_to_the_job_and_the_store_goes_on in a process with a file size limit"]
fn full_disk_child() {
    let dir = std::path::PathBuf::from(std::env::var_os(CHILD).unwrap());
    let clips = Clips::open(&dir, 1 << 30).unwrap();
    let before = clips.put(&bytes(1, 1000), owner(1, 1), at(1)).unwrap();
    let error = clips.put(&bytes(2, 8 * MIB), owner(2, 2), at(2)).unwrap_err();
    assert_eq!(error.code(), "disk_full", "{error}");
    assert_eq!(files_in(&dir), 1, "nothing is left of it");
    assert_eq!(clips.fill().used, 1000);
    assert_eq!(clips.read(&before.id).unwrap(), bytes(1, 1000));
    clips.put(&bytes(3, 1000), owner(3, 3), at(3)).unwrap();
}

//! The store under many processes, damage, and other versions.
#![allow(clippy::unwrap_used)]

#[path = "support/home.rs"]
mod support;

use std::process::Command;

use kinoflock_client::store::{RecordState, Store, StoreError};
use kinoflock_protocol::BlobId;
use support::{Home, job_record};

/// Processes that use one store at once.
const PROCESSES: usize = 10;
/// Jobs that each of them writes.
const JOBS: usize = 12;

/// Not a test by itself: what one of the ten processes does, if it is told where the store is.
#[test]
fn one_process_of_many() {
    let (Ok(root), Ok(number)) = (std::env::var("STORE_TEST_ROOT"), std::env::var("STORE_TEST_NUMBER"))
    else {
        return;
    };
    let number: usize = number.parse().unwrap();
    let store = Store::open(root).unwrap();
    let shared = job_record(u64::MAX);
    for job in 0..JOBS {
        let record = job_record((number * JOBS + job) as u64);
        store.insert_job(&record).unwrap();
        store.insert_blob(format!("the same from all {job}").as_bytes()).unwrap();
        store.insert_ticket(&format!("ticket {job}")).unwrap();
        store.update_job(&shared.job, |record| record.next_seq += 1).unwrap();
        let listed = store.jobs().unwrap();
        assert!(listed.iter().any(|entry| entry.job == record.job), "what I wrote is in my listing");
        store.update_job(&record.job, |record| record.state = RecordState::Failed).unwrap();
        assert_eq!(store.job(&record.job).unwrap().state, RecordState::Failed);
    }
}

#[test]
fn ten_processes_at_once_lose_nothing() {
    let home = Home::new();
    let root = home.path().join("store");
    let store = Store::open(&root).unwrap();
    let shared = job_record(u64::MAX);
    store.insert_job(&shared).unwrap();
    let start = |number: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "one_process_of_many"])
            .env("STORE_TEST_ROOT", &root)
            .env("STORE_TEST_NUMBER", number.to_string())
            .output()
    };
    let outputs: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..PROCESSES).map(|number| scope.spawn(move || start(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
    });
    for output in outputs {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let jobs = store.jobs().unwrap();
    assert_eq!(jobs.len(), PROCESSES * JOBS + 1);
    assert!(jobs.iter().all(|entry| entry.job == shared.job || entry.state == RecordState::Failed));
    assert_eq!(store.job(&shared.job).unwrap().next_seq, (PROCESSES * JOBS) as u64, "no change is lost");
    assert_eq!(store.tickets().unwrap().len(), JOBS);
    for job in 0..JOBS {
        let bytes = format!("the same from all {job}").into_bytes();
        assert_eq!(store.read_blob(&BlobId::of(&bytes)).unwrap(), bytes);
    }
    assert_eq!(std::fs::read_dir(root.join("tmp")).unwrap().count(), 0, "nothing is left half written");
}

#[test]
fn the_index_is_made_again_whatever_became_of_it() {
    let home = Home::new();
    let store = Store::open(home.path()).unwrap();
    for number in 0..5 {
        store.insert_job(&job_record(number)).unwrap();
    }
    let before = store.jobs().unwrap();
    let index = home.path().join("index.json");
    for damage in [&b""[..], b"{\"jobs\":", b"null"] {
        std::fs::write(&index, damage).unwrap();
        assert_eq!(store.jobs().unwrap(), before);
    }
    std::fs::remove_file(&index).unwrap();
    assert_eq!(store.jobs().unwrap(), before);
    // A record that another program changed is read again.
    store.update_job(&before[0].job, |record| record.state = RecordState::Cancelled).unwrap();
    assert_eq!(store.jobs().unwrap()[0].state, RecordState::Cancelled);
    store.remove_job(&before[0].job).unwrap();
    assert_eq!(store.jobs().unwrap().len(), 4);
}

#[test]
fn damage_is_named_and_passed_over_in_listings() {
    let home = Home::new();
    let store = Store::open(home.path()).unwrap();
    let (good, bad) = (job_record(1), job_record(2));
    store.insert_job(&good).unwrap();
    store.insert_job(&bad).unwrap();
    std::fs::write(home.path().join("jobs").join(format!("{}.json", bad.job)), b"{ half").unwrap();
    assert_eq!(store.jobs().unwrap().len(), 1);
    assert!(matches!(store.job(&bad.job), Err(StoreError::Record { .. })));
    let id = store.insert_blob(b"a clip").unwrap();
    std::fs::write(store.blob_path(&id), b"a c1ip").unwrap();
    assert!(matches!(store.read_blob(&id), Err(StoreError::Damaged { expected, .. }) if expected == id));
    assert_eq!(store.insert_blob(b"a clip").unwrap(), id, "storing it again repairs it");
    assert_eq!(store.read_blob(&id).unwrap(), b"a clip");
}

#[test]
fn a_store_of_a_newer_version_is_left_alone() {
    let home = Home::new();
    Store::open(home.path()).unwrap();
    std::fs::write(home.path().join("VERSION"), "2\n").unwrap();
    let error = Store::open(home.path()).unwrap_err();
    assert!(matches!(error, StoreError::Newer { given: 2, limit: 1, .. }));
    assert!(error.to_string().contains("update kinoflock"), "{error}");
    std::fs::write(home.path().join("VERSION"), "a lot").unwrap();
    assert_eq!(Store::open(home.path()).unwrap_err().code(), "store_no_version");
}

#[test]
fn jobs_are_found_by_a_beginning_that_only_one_has() {
    let home = Home::new();
    let store = Store::open(home.path()).unwrap();
    let records: Vec<_> = (0..40).map(job_record).collect();
    for record in &records {
        store.insert_job(record).unwrap();
    }
    let id = records[7].job.to_string();
    assert_eq!(store.find_job(&id).unwrap(), records[7].job);
    assert_eq!(store.find_job(&id[..16]).unwrap(), records[7].job);
    assert_eq!(store.find_job(&id["job1".len()..16]).unwrap(), records[7].job, "the head may be left out");
    assert!(matches!(store.find_job("job1"), Err(StoreError::NotFound { .. })), "too short to mean one");
    assert!(matches!(store.find_job("job1zzzzzzzz"), Err(StoreError::NotFound { .. })));
}

#[cfg(unix)]
#[test]
fn only_the_owner_may_read_records() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    let root = home.path().join("store");
    let store = Store::open(&root).unwrap();
    let record = job_record(1);
    store.insert_job(&record).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&root), 0o700);
    assert_eq!(mode(&root.join("jobs").join(format!("{}.json", record.job))), 0o600);
}

//! What the job store promises: durable before it answers, in order, one owner, a chain without gaps.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use kinoflock_node::policy::Class;
use kinoflock_node::queue::{End, JobRecord, Link, Queue, StoredState};
use kinoflock_node::scheduler::{NetPrefix, Origin, Outcome};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{ChainId, JobId, Keypair, ModelId, NetworkId, NodeId, Nonce, ReceiptId};
use kinoflock_protocol::job::{JobSpec, Prompt};
use kinoflock_protocol::order::Order;
use kinoflock_protocol::units::UnixMillis;
use kinoflock_protocol::work::{JobShape, Work};

const SHAPE: JobShape = JobShape { frames: 17, width: 64, height: 64, steps: 8, guided: false };

fn network() -> NetworkId {
    NetworkId::named("test")
}

fn key() -> Keypair {
    Keypair::from_seed(&[3; 32])
}

fn chain(epoch: u8) -> ChainId {
    ChainId::new(&NodeId::from_bytes([1; 32]), &[epoch; 32])
}

fn record(number: u8) -> JobRecord {
    with_prompt(number, "a red circle")
}

fn with_prompt(number: u8, prompt: &str) -> JobRecord {
    let model = ModelId::from_bytes([9; 32]);
    let nonce = Nonce::from_bytes([number; 16]);
    let prompt = Prompt::new(prompt).unwrap();
    let spec = JobSpec::generate(model, prompt, nonce, UnixMillis(1_000), SHAPE);
    let job = Envelope::seal(&key(), &network(), &spec).unwrap();
    let id = JobId::of(&job, &network());
    let order = Order {
        job: id,
        node: NodeId::from_bytes([1; 32]),
        lease: kinoflock_protocol::id::LeaseId::from_bytes([2; 16]),
        issued_at: UnixMillis(1_000),
        resume: None,
    };
    let origin = Origin {
        requester: key().requester_id(),
        class: Class::Public,
        prefix: NetPrefix::V4([10, 0, number]),
    };
    JobRecord {
        id,
        seq: u64::from(number),
        nonce,
        origin: origin.into(),
        model,
        shape: SHAPE,
        work: Work(10),
        job,
        order: Envelope::seal(&key(), &network(), &order).unwrap(),
        admitted_at: UnixMillis(2_000),
        deadline: None,
        needs_inputs: false,
        started_at: None,
        starts: 0,
        state: StoredState::Waiting,
        answer: None,
    }
}

/// Any signed message does for the store; it never opens receipts.
fn receipt(link: Link) -> (ReceiptId, Envelope) {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&(link.sequence + 1).to_be_bytes());
    (ReceiptId::from_bytes(id), record(200).job)
}

fn open(dir: &Path) -> Queue {
    Queue::open(dir, chain(1)).unwrap()
}

#[tokio::test]
async fn what_was_admitted_is_there_after_a_restart_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let queue = open(dir.path());
    for number in [3, 1, 2] {
        queue.admit(record(number)).await.unwrap();
    }
    assert_eq!(queue.start(record(1).id, UnixMillis(5_000)).await.unwrap(), 1);
    drop(queue);
    let queue = open_soon(dir.path()).await;
    let records = queue.restore().unwrap();
    assert_eq!(records.iter().map(|record| record.seq).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!((records[0].state.clone(), records[0].starts), (StoredState::Running, 1));
    assert_eq!(records[1], record(2));
    assert_eq!(queue.start(record(1).id, UnixMillis(6_000)).await.unwrap(), 2, "attempts go on counting");
}

/// The writer's thread lets go of the file a moment after the last handle is dropped.
async fn open_soon(dir: &Path) -> Queue {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        match Queue::open(dir, chain(1)) {
            Ok(queue) => return queue,
            Err(error) if error.code() == "store_in_use" && std::time::Instant::now() < deadline => {
                tokio::task::yield_now().await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_second_daemon_on_one_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open(dir.path());
    let error = Queue::open(dir.path(), chain(1)).unwrap_err();
    assert_eq!(error.code(), "store_in_use");
    assert!(error.to_string().contains("in use by another kinoflockd"), "{error}");
}

#[test]
fn a_store_of_a_newer_release_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(kinoflock_node::queue::FILE_NAME);
    let db = redb::Database::create(&path).unwrap();
    let tx = db.begin_write().unwrap();
    let meta: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("meta");
    tx.open_table(meta).unwrap().insert("schema", kinoflock_node::queue::SCHEMA + 1).unwrap();
    tx.commit().unwrap();
    drop(db);
    let error = Queue::open(dir.path(), chain(1)).unwrap_err();
    assert_eq!(error.code(), "store_newer");
    assert!(error.to_string().contains("schema 2, this release reads up to 1"), "{error}");
}

#[test]
fn a_file_that_is_no_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(kinoflock_node::queue::FILE_NAME), [7; 5_000]).unwrap();
    assert_eq!(Queue::open(dir.path(), chain(1)).unwrap_err().code(), "store_failed");
}

#[tokio::test]
async fn the_same_job_again_changes_nothing_and_a_used_nonce_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let queue = open(dir.path());
    queue.admit(record(1)).await.unwrap();
    queue.start(record(1).id, UnixMillis(5_000)).await.unwrap();
    queue.admit(record(1)).await.unwrap();
    assert_eq!(queue.find(&record(1).id).unwrap().unwrap().starts, 1);
    let mut other = record(2);
    other.nonce = record(1).nonce;
    let error = queue.admit(other).await.unwrap_err();
    assert_eq!(error.code(), "nonce_used");
    assert_eq!(queue.find(&record(2).id).unwrap(), None);
    let holder = queue.nonce_holder(&key().requester_id(), &record(1).nonce).unwrap();
    assert_eq!(holder, Some(record(1).id));
}

#[tokio::test]
async fn receipts_form_a_chain_that_survives_restarts_and_failed_signing() {
    let dir = tempfile::tempdir().unwrap();
    let queue = open(dir.path());
    for number in 1..=3 {
        queue.admit(record(number)).await.unwrap();
    }
    let (links, seen) = std::sync::mpsc::sync_channel(8);
    let make = |links: &std::sync::mpsc::SyncSender<Link>| {
        let links = links.clone();
        Box::new(move |link| {
            links.send(link).unwrap();
            Ok(receipt(link))
        })
    };
    queue.finish(record(1).id, UnixMillis(7_000), make(&links)).await.unwrap();
    let failed = queue.finish(record(2).id, UnixMillis(7_000), Box::new(|_| Err("no".to_owned()))).await;
    assert_eq!(failed.unwrap_err().code(), "receipt");
    assert_eq!(queue.find(&record(2).id).unwrap().unwrap().state, StoredState::Waiting, "all or nothing");
    drop(queue);
    let queue = open_soon(dir.path()).await;
    queue.finish(record(2).id, UnixMillis(8_000), make(&links)).await.unwrap();
    let [first, second] = [seen.recv().unwrap(), seen.recv().unwrap()];
    assert_eq!((first.sequence, first.previous), (0, None));
    assert_eq!((second.sequence, second.previous), (1, Some(receipt(first).0)));
    assert_eq!(queue.receipt(1).unwrap(), Some(receipt(second).1));
    assert_eq!(queue.receipt(2).unwrap(), None);
    let again = queue.finish(record(1).id, UnixMillis(9_000), make(&links)).await.unwrap_err();
    assert_eq!(again.code(), "job_over", "one receipt a job");
    assert_eq!(queue.next_link().unwrap().sequence, 2);
}

#[tokio::test]
async fn a_new_epoch_begins_a_new_chain() {
    let dir = tempfile::tempdir().unwrap();
    let queue = open(dir.path());
    queue.admit(record(1)).await.unwrap();
    queue.finish(record(1).id, UnixMillis(1), Box::new(|link| Ok(receipt(link)))).await.unwrap();
    drop(queue);
    drop(open_soon(dir.path()).await);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let queue = loop {
        match Queue::open(dir.path(), chain(2)) {
            Ok(queue) => break queue,
            Err(_) if std::time::Instant::now() < deadline => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    let link = queue.next_link().unwrap();
    assert_eq!((link.chain, link.sequence, link.previous), (chain(2), 0, None));
}

#[tokio::test]
async fn ends_are_kept_until_their_retention_is_over_and_live_jobs_always() {
    let dir = tempfile::tempdir().unwrap();
    let queue = open(dir.path());
    for number in 1..=4 {
        queue.admit(record(number)).await.unwrap();
    }
    let failed = End::Failed { code: "oom".to_owned(), text: "out of memory".to_owned(), retryable: true };
    queue.end(record(1).id, End::Cancelled, UnixMillis(100)).await.unwrap();
    queue.end(record(2).id, failed, UnixMillis(900)).await.unwrap();
    queue.finish(record(3).id, UnixMillis(900), Box::new(|link| Ok(receipt(link)))).await.unwrap();
    queue.acknowledge(record(3).id, record(3).job, UnixMillis(950)).await.unwrap();
    assert_eq!(queue.find(&record(1).id).unwrap().unwrap().outcome(), Some(Outcome::Cancelled));
    assert_eq!(queue.sweep(UnixMillis(900), UnixMillis(500)).await.unwrap(), [record(1).id]);
    assert_eq!(queue.sweep(UnixMillis(951), UnixMillis(500)).await.unwrap(), [record(3).id]);
    let left: Vec<_> = queue.restore().unwrap().iter().map(|record| record.seq).collect();
    assert_eq!(left, [2, 4]);
    assert!(queue.receipt(0).unwrap().is_some(), "receipts outlive their jobs");
    queue.admit(record(1)).await.unwrap();
}

#[tokio::test]
async fn a_drain_gives_the_start_back_and_a_failure_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let queue = open(dir.path());
    queue.admit(JobRecord { needs_inputs: true, ..record(1) }).await.unwrap();
    queue.inputs_ready(record(1).id).await.unwrap();
    for (counts, starts) in [(false, 0), (true, 1), (true, 2)] {
        queue.start(record(1).id, UnixMillis(1)).await.unwrap();
        queue.requeue(record(1).id, counts).await.unwrap();
        let stored = queue.find(&record(1).id).unwrap().unwrap();
        assert_eq!((stored.state, stored.starts, stored.needs_inputs), (StoredState::Waiting, starts, false));
    }
    let unknown = queue.start(JobId::from_bytes([0; 32]), UnixMillis(1)).await.unwrap_err();
    assert_eq!(unknown.code(), "job_unknown");
}

#[tokio::test]
async fn writes_from_many_tasks_all_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let queue = open(dir.path());
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..40 {
        let queue = queue.clone();
        tasks.spawn(async move { queue.admit(record(number)).await });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(queue.restore().unwrap().len(), 40);
}

/// Set for the child process of the test below: its folder.
const CHILD: &str = "KINOFLOCK_TEST_FULL_DISK";

#[test]
fn a_full_disk_refuses_the_job_and_keeps_the_others() {
    let dir = tempfile::tempdir().unwrap();
    // A limit on file sizes fails a write as a full disk does, without needing a disk to fill.
    let script = "trap '' XFSZ; ulimit -f 4096; exec \"$0\" --exact --ignored full_disk_child --nocapture";
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

#[tokio::test]
#[ignore = "run by a_full_disk_refuses_the_job_and_keeps_the_others in a process with a file size limit"]
async fn full_disk_child() {
    let dir = std::path::PathBuf::from(std::env::var_os(CHILD).unwrap());
    let queue = open(&dir);
    let long = "x".repeat(8_000);
    let mut admitted = 0;
    let error = loop {
        let record = with_prompt(admitted, &long);
        match queue.admit(JobRecord { order: with_prompt(250, &long).job, ..record }).await {
            Ok(()) => admitted += 1,
            Err(error) => break error,
        }
        assert!(admitted < 255, "the limit was never met");
    };
    assert_eq!(error.code(), "disk_full", "{error}");
    assert_eq!(
        queue.restore().unwrap().len(),
        usize::from(admitted),
        "nothing is lost and nothing half there"
    );
    let first = queue.restore().unwrap().remove(0);
    assert_eq!(queue.find(&first.id).unwrap(), Some(first));
}

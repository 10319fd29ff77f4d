//! Jobs that outlive their worker or their node: what a killed one left is taken up again, here and elsewhere.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::job::Returns;
use kinoflock_protocol::order::Resume;
use kinoflock_protocol::progress::{Checkpoint, JobEvent};
use kinoflock_protocol::receipt::{Receipt, ValidReceipt};
use kinoflock_protocol::rpc::Response;
use kinoflock_protocol::seal::{SealKey, open_bytes, seal_bytes};
use kinoflock_protocol::{BlobId, Envelope, JobId, JobSpec, Micro, ModelId};
use kinoflock_tests::invariants;
use kinoflock_tests::requester::{Ordered, Requester, refused};
use kinoflock_tests::sandbox::{Node, PATIENCE, Sandbox, Worker, send};
use rustix::process::Signal;

const PROMPT: &str = "a violet heron over the reservoir at dawn";
const MOTIF_PROMPT: &str = "a red circle drifts left over a blue field";
const STEPS: u32 = 30;
/// As many as a node leaves for itself, where nobody asks for checkpoints.
const EVERY: u32 = 8;
/// The step in which workers die: 24 steps are in a checkpoint by then.
const DIES_AT: u32 = 27;
const SAVED: u32 = 24;
/// Leases last as long as any may, so that a busy machine does not end them in the middle of a test.
const PATIENT: &str = "[queue]\nlease = \"60 s\"\n";

fn returns(checkpoint_every: u32) -> Returns {
    Returns { latents: true, checkpoint_every, ..Returns::default() }
}

fn spec(artist: &Requester, node: &Node, checkpoint_every: u32) -> JobSpec {
    JobSpec { returns: returns(checkpoint_every), seed: 5, ..artist.spec(node, PROMPT, STEPS) }
}

async fn submitted(artist: &Requester, node: &Node, spec: &JobSpec) -> Ordered {
    let lease = artist.lease(node, spec).await;
    let ordered = artist.order(node.local().node_id, spec, lease);
    accepted(&artist.submit(node, &ordered).await);
    ordered
}

fn accepted(response: &Response) -> JobId {
    match response {
        Response::Accepted { job, .. } => *job,
        other => panic!("not accepted: {other:?}"),
    }
}

/// What a follower saw until it saw enough.
#[derive(Debug, Default)]
struct Seen {
    steps: Vec<u32>,
    checkpoints: Vec<Envelope>,
    receipt: Option<Envelope>,
    failed: Option<(String, bool)>,
}

async fn watch(artist: &Requester, node: &Node, job: JobId, enough: impl Fn(&Seen) -> bool) -> Seen {
    let watching = async {
        let mut stream = artist.follow(node, job).await;
        let mut seen = Seen::default();
        while let Some(Ok(progress)) = stream.next().await {
            match progress.event {
                JobEvent::Step { done, .. } => seen.steps.push(done),
                JobEvent::Checkpoint { checkpoint } => seen.checkpoints.push(checkpoint),
                JobEvent::Done { receipt } => seen.receipt = Some(receipt),
                JobEvent::Failed { code, retryable, .. } => seen.failed = Some((code.to_string(), retryable)),
                _ => {}
            }
            if enough(&seen) {
                break;
            }
        }
        seen
    };
    tokio::time::timeout(PATIENCE, watching).await.unwrap()
}

fn has_checkpoint(sandbox: &Sandbox, step: u32) -> impl Fn(&Seen) -> bool + use<> {
    let network = sandbox.network();
    move |seen| {
        let steps = seen.checkpoints.iter().map(|one| one.open::<Checkpoint>(&network).unwrap().value.step);
        steps.max() == Some(step)
    }
}

fn receipt(sandbox: &Sandbox, seen: &Seen) -> Receipt {
    let receipt = seen.receipt.as_ref().unwrap_or_else(|| panic!("no receipt: {seen:?}"));
    ValidReceipt::parse(receipt, &sandbox.network()).unwrap().receipt().clone()
}

fn over(seen: &Seen) -> bool {
    seen.receipt.is_some() || seen.failed.is_some()
}

fn held_by(file: &Path, at: u32) -> Worker {
    Worker::test(&["--hold-at", &at.to_string(), "--hold-file", file.to_str().unwrap()])
}

/// The newest checkpoint of a job, and its sealed state as the node serves it.
async fn checkpoint(
    sandbox: &Sandbox,
    artist: &Requester,
    node: &Node,
    seen: &Seen,
) -> (Vec<u8>, Checkpoint, Vec<u8>) {
    let envelope = seen.checkpoints.last().unwrap();
    let opened = envelope.open::<Checkpoint>(&sandbox.network()).unwrap();
    assert_eq!(opened.signer, node.local().node_id.into());
    let state = artist.fetch(node, opened.value.state.id).await.unwrap();
    assert_eq!(BlobRef::of(&state), opened.value.state);
    (envelope.encode(), opened.value, state)
}

fn resume(statement: &[u8], step: u32) -> Resume {
    Resume { checkpoint: BlobRef::of(statement), step }
}

/// Hands the job to another node, to go on from there.
async fn resumed(artist: &Requester, node: &Node, spec: &JobSpec, job: &Envelope, from: Resume) -> Response {
    let lease = artist.lease(node, spec).await;
    let ordered = artist.order_to_resume(node.local().node_id, job, lease, from);
    artist.submit(node, &ordered).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_at_step_27_of_30_goes_on_at_its_own_checkpoint_asked_for_or_not() {
    for asked in [EVERY, 0] {
        let mut sandbox = Sandbox::new();
        let once = sandbox.path("once").display().to_string();
        let worker = Worker::test(&["--kill-at", &DIES_AT.to_string(), "--once", &once]);
        sandbox.add(&worker, PATIENT);
        let node = &sandbox.nodes[0];
        let artist = Requester::new(&sandbox).await;
        let spec = spec(&artist, node, asked);
        let id = artist.id(&submitted(&artist, node, &spec).await.job);
        let seen = watch(&artist, node, id, over).await;
        let twice: Vec<u32> = (SAVED + 1..DIES_AT).collect();
        let expected: Vec<u32> = (1..DIES_AT).chain(twice).chain(DIES_AT..=STEPS).collect();
        assert_eq!(seen.steps, expected, "at most {EVERY} steps are done again");
        let receipt = receipt(&sandbox, &seen);
        assert_eq!((receipt.steps, receipt.segments.len()), (STEPS, 0));
        assert_eq!(
            seen.checkpoints.is_empty(),
            asked == 0,
            "what nobody asked for leaves the node for nobody"
        );
        for statement in &seen.checkpoints {
            let state = statement.open::<Checkpoint>(&sandbox.network()).unwrap().value.state;
            assert!(artist.fetch(node, state.id).await.is_none(), "a done job's checkpoints are gone");
        }
        invariants::discreet(node, PROMPT);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_killed_at_step_27_of_30_goes_on_at_its_own_checkpoint_and_tells_of_it_again() {
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("go on");
    sandbox.add(&held_by(&file, DIES_AT), PATIENT);
    let artist = Requester::new(&sandbox).await;
    let node = &sandbox.nodes[0];
    let spec = spec(&artist, node, EVERY);
    let id = artist.id(&submitted(&artist, node, &spec).await.job);
    let saved = has_checkpoint(&sandbox, SAVED);
    let node = &mut sandbox.nodes[0];
    let before = watch(&artist, node, id, |seen| seen.steps.contains(&(DIES_AT - 1)) && saved(seen)).await;
    node.kill();
    std::fs::write(&file, b"").unwrap();
    node.start();
    node.ready();
    let node = &sandbox.nodes[0];
    let seen = watch(&artist, node, id, over).await;
    assert!(seen.steps.iter().all(|step| *step > SAVED), "{seen:?}");
    if let Some(newest) = seen.checkpoints.last() {
        assert_eq!(Some(newest), before.checkpoints.last());
    }
    assert_eq!(receipt(&sandbox, &seen).steps, STEPS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_goes_on_where_a_lost_one_stopped_and_the_receipt_credits_all() {
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("never");
    for at in [10, DIES_AT, 100] {
        sandbox.add(&held_by(&file, at), PATIENT);
    }
    let artist = Requester::new(&sandbox).await;
    let spec = spec(&artist, &sandbox.nodes[0], EVERY);
    let job = submitted(&artist, &sandbox.nodes[0], &spec).await.job;
    let id = artist.id(&job);
    let mut credited = Vec::new();
    let mut done = 0;
    for (number, step) in [(0, EVERY), (1, SAVED)] {
        let node = &sandbox.nodes[number];
        let seen = watch(&artist, node, id, has_checkpoint(&sandbox, step)).await;
        let (statement, made, state) = checkpoint(&sandbox, &artist, node, &seen).await;
        assert_eq!((made.step, made.total), (step, STEPS));
        assert!(safetensors_like(&open_bytes(&SealKey::of_job(&job), &state).unwrap()));
        assert!(!safetensors_like(&state), "what leaves the node is sealed");
        credited.push((node.local().node_id, done, step - done, Some(BlobId::of(&statement))));
        done = step;
        sandbox.nodes[number].kill();
        artist.serve(&[&statement, &state]);
        let next = &sandbox.nodes[number + 1];
        accepted(&resumed(&artist, next, &spec, &job, resume(&statement, step)).await);
    }
    let last = &sandbox.nodes[2];
    let seen = watch(&artist, last, id, over).await;
    assert_eq!(seen.steps, (SAVED + 1..=STEPS).collect::<Vec<_>>());
    credited.push((last.local().node_id, SAVED, STEPS - SAVED, None));
    let receipt = receipt(&sandbox, &seen);
    let segments = receipt.segments.iter().map(|s| (s.node, s.first_step, s.steps, s.checkpoint));
    assert_eq!(segments.collect::<Vec<_>>(), credited);
    assert_eq!(receipt.steps, STEPS);
    invariants::discreet(last, PROMPT);
}

/// Whether these are the bytes of a safetensors file: its header's length, and JSON.
fn safetensors_like(bytes: &[u8]) -> bool {
    bytes.get(8) == Some(&b'{')
}

/// A job of its own with a checkpoint that somebody made of this state.
struct Forged {
    job: Envelope,
    made: Checkpoint,
    sealed: Vec<u8>,
}

fn forge(artist: &Requester, spec: &JobSpec, like: &Checkpoint, state: &[u8]) -> Forged {
    let job = artist.seal(spec);
    let sealed = seal_bytes(&SealKey::of_job(&job), state);
    let made = Checkpoint { job: artist.id(&job), state: BlobRef::of(&sealed), ..like.clone() };
    Forged { job, made, sealed }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_another_job_or_model_or_state_or_with_a_wrong_signature_is_not_gone_on_from() {
    type Bend = fn(&mut Forged);
    let mut sandbox = Sandbox::new();
    let file = sandbox.path("never");
    sandbox.add(&held_by(&file, 10), PATIENT);
    sandbox.add(&Worker::test(&[]), PATIENT);
    let (node, next) = (&sandbox.nodes[0], &sandbox.nodes[1]);
    let artist = Requester::new(&sandbox).await;
    let first = spec(&artist, node, EVERY);
    let job = submitted(&artist, node, &first).await.job;
    let seen = watch(&artist, node, artist.id(&job), has_checkpoint(&sandbox, EVERY)).await;
    let (_, like, state) = checkpoint(&sandbox, &artist, node, &seen).await;
    let state = open_bytes(&SealKey::of_job(&job), &state).unwrap();
    let cases: [(&str, Bend); 8] = [
        ("", |_| {}),
        ("job", |forged| forged.made.job = JobId::from_bytes([1; 32])),
        ("model", |forged| forged.made.model = ModelId::from_bytes([1; 32])),
        ("step", |forged| forged.made.step = 7),
        ("steps", |forged| forged.made.total = 31),
        ("latents", |forged| forged.made.latents = BlobId::of(b"other latents")),
        ("sealed bytes", |forged| {
            forged.sealed[100] ^= 1;
            forged.made.state = BlobRef::of(&forged.sealed);
        }),
        ("signature", |_| {}),
    ];
    for (what, bend) in cases {
        let spec = JobSpec { seed: 5, ..spec(&artist, next, EVERY) };
        let mut forged = forge(&artist, &spec, &like, &state);
        bend(&mut forged);
        let mut statement = artist.seal(&forged.made).encode();
        if what == "signature" {
            *statement.last_mut().unwrap() ^= 1;
        }
        artist.serve(&[&statement, &forged.sealed]);
        let answer = resumed(&artist, next, &spec, &forged.job, resume(&statement, EVERY)).await;
        let seen = watch(&artist, next, accepted(&answer), over).await;
        match what {
            "" => assert_eq!(receipt(&sandbox, &seen).segments.len(), 2, "{seen:?}"),
            _ => {
                assert_eq!(seen.failed, Some(("inputs".to_owned(), true)), "{what}: {seen:?}");
                assert!(seen.steps.is_empty(), "{what}");
            }
        }
    }
    let lease = artist.lease(next, &first).await;
    for step in [0, STEPS, STEPS + 1] {
        let ordered = artist.order_to_resume(next.local().node_id, &job, lease, resume(b"", step));
        let answer = artist.submit(next, &ordered).await;
        assert_eq!(refused(&answer), ("invalid", "resume.step".to_owned()));
    }
    invariants::discreet(next, PROMPT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_motif_a_resumed_clip_and_its_latents_are_those_of_an_uninterrupted_run_bit_for_bit() {
    let mut sandbox = Sandbox::start(2, &Worker::Real);
    let artist = Requester::new(&sandbox).await;
    let shape = artist.spec(&sandbox.nodes[0], MOTIF_PROMPT, 60);
    let spec = JobSpec { returns: returns(20), seed: 11, guidance: Micro::whole(2), ..shape };
    let job = submitted(&artist, &sandbox.nodes[0], &spec).await.job;
    let node = &sandbox.nodes[0];
    let seen = watch(&artist, node, artist.id(&job), has_checkpoint(&sandbox, 20)).await;
    send(node.worker_pid(), Signal::STOP);
    let (statement, made, state) = checkpoint(&sandbox, &artist, node, &seen).await;
    send(node.worker_pid(), Signal::KILL);
    sandbox.nodes[0].kill();

    artist.serve(&[&statement, &state]);
    let next = &sandbox.nodes[1];
    let answer = resumed(&artist, next, &spec, &job, resume(&statement, made.step)).await;
    let seen = watch(&artist, next, accepted(&answer), over).await;
    assert_eq!(seen.steps, (made.step + 1..=60).collect::<Vec<_>>());
    let resumed = receipt(&sandbox, &seen);

    let again = JobSpec { nonce: artist.spec(next, MOTIF_PROMPT, 60).nonce, ..spec };
    let id = artist.id(&submitted(&artist, next, &again).await.job);
    let whole = receipt(&sandbox, &watch(&artist, next, id, over).await);
    assert_eq!(whole.steps, resumed.steps);
    assert_eq!((resumed.clip, resumed.latents), (whole.clip, whole.latents));
    assert!(resumed.latents.is_some());
}

//! A job whose node committed to its steps is audited: by its requester, by whom the requester named, and by nobody else.
#![allow(clippy::unwrap_used, missing_docs)]

use kinoflock_inference::audit::{FRAMES_TOLERANCE, Precision, frames_deviation, tolerance};
use kinoflock_inference::sampler::checkpoint::latents_bytes;
use kinoflock_inference::{Device, GenerateRequest, LoadOptions, Pipeline, Tensor, load, motif};
use kinoflock_node::engine::mp4::decode_mp4_bytes;
use kinoflock_protocol::audit::{AuditGrant, AuditReply, AuditRequest, Leaf, Opening};
use kinoflock_protocol::job::Returns;
use kinoflock_protocol::progress::JobEvent;
use kinoflock_protocol::receipt::{Receipt, ValidReceipt};
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::seal::{SealKey, open_bytes};
use kinoflock_protocol::{BlobId, Envelope, JobId, JobSpec, Micro, Millis, Nonce, PublicKey, ReceiptId};
use kinoflock_tests::invariants;
use kinoflock_tests::requester::{Requester, now, refused};
use kinoflock_tests::sandbox::{Node, PATIENCE, Sandbox, Worker};

const PROMPT: &str = "a red circle drifts left over a blue field";
const STEPS: u32 = 16;

/// A finished job.
struct Finished {
    spec: JobSpec,
    job: Envelope,
    receipt: Receipt,
    id: ReceiptId,
}

async fn finished(sandbox: &Sandbox, artist: &Requester, node: &Node) -> Finished {
    let returns = Returns { step_root: true, ..Returns::default() };
    let spec = JobSpec { returns, seed: 3, guidance: Micro::whole(2), ..artist.spec(node, PROMPT, STEPS) };
    let ordered = artist.order(node.local().node_id, &spec, artist.lease(node, &spec).await);
    assert!(matches!(artist.submit(node, &ordered).await, Response::Accepted { .. }));
    let job = artist.id(&ordered.job);
    let watching = async {
        let mut stream = artist.follow(node, job).await;
        while let Some(event) = stream.next().await {
            match event.unwrap().event {
                JobEvent::Done { receipt } => return receipt,
                JobEvent::Failed { text, .. } => panic!("{text}"),
                _ => {}
            }
        }
        panic!("no receipt")
    };
    let receipt = tokio::time::timeout(PATIENCE, watching).await.unwrap();
    let valid = ValidReceipt::parse(&receipt, &sandbox.network()).unwrap();
    Finished { spec, job: ordered.job, receipt: valid.receipt().clone(), id: valid.id() }
}

fn request(who: &Requester, node: &Node, of: &Finished, step: u32) -> Envelope {
    who.seal(&AuditRequest {
        job: of.receipt.job,
        receipt: of.id,
        node: node.local().node_id,
        step,
        issued_at: now(),
        nonce: Nonce::from_bytes([step as u8; 16]),
    })
}

fn grant(to: PublicKey, of: &Finished) -> AuditGrant {
    let (issued_at, expires_at) = (now(), now().plus(Millis(600_000)));
    AuditGrant { job: of.receipt.job, receipt: of.id, auditor: to, issued_at, expires_at }
}

async fn audit(who: &Requester, node: &Node, request: Envelope, grant: Option<Envelope>) -> Response {
    who.ask(node, Request::Audit { request, grant }).await
}

fn shown(response: Response) -> AuditReply {
    match response {
        Response::Audit(reply) => reply,
        other => panic!("not shown: {other:?}"),
    }
}

/// Fetches an opened state and opens its seal.
async fn state(who: &Requester, node: &Node, of: &Finished, opening: &Opening) -> Tensor {
    let sealed = who.fetch(node, opening.sealed.id).await.unwrap();
    let file = open_bytes(&SealKey::of_job(&of.job), &sealed).unwrap();
    let tensors = candle_tensors(&file);
    assert_eq!(BlobId::of(&latents_bytes(&tensors).unwrap()), opening.latents);
    tensors
}

fn candle_tensors(file: &[u8]) -> Tensor {
    let file = safetensors::SafeTensors::deserialize(file).unwrap();
    let view = file.tensor("latents").unwrap();
    let values: Vec<f32> =
        view.data().as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    Tensor::from_vec(values, view.shape().to_vec(), &Device::Cpu).unwrap()
}

fn motif_request(pipeline: &dyn Pipeline, spec: &JobSpec) -> GenerateRequest {
    GenerateRequest {
        seed: spec.seed,
        frames: spec.frames as usize,
        width: spec.width as usize,
        height: spec.height as usize,
        fps: spec.fps.to_f64(),
        steps: spec.steps as usize,
        guidance: spec.guidance.to_f64(),
        ..GenerateRequest::new(spec.prompt.as_str(), &pipeline.info().defaults)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_job_stands_an_audit_of_any_step_and_its_clip_is_what_its_last_state_decodes_to() {
    let sandbox = Sandbox::start(1, &Worker::Real);
    let node = &sandbox.nodes[0];
    let artist = Requester::new(&sandbox).await;
    let done = finished(&sandbox, &artist, node).await;
    let root = done.receipt.step_root.unwrap();
    let folder = tempfile::tempdir().unwrap();
    motif::write_to(folder.path()).unwrap();
    let mut pipeline = load(folder.path(), &LoadOptions::default()).unwrap();
    let generate = motif_request(pipeline.as_ref(), &done.spec);
    let committed = pipeline.commitment(&generate).unwrap();
    for step in [0, 7, STEPS - 1] {
        let reply = shown(audit(&artist, node, request(&artist, node, &done, step), None).await);
        assert_eq!(reply.leaves, u64::from(STEPS) + 1);
        let mut states = Vec::new();
        for opening in reply.openings.iter() {
            let sampler = &committed.samplers[opening.index as usize];
            let leaf = Leaf::new(&opening.latents, sampler, &committed.conditioning);
            assert!(opening.proof.holds(&root, reply.leaves, opening.index.into(), &leaf));
            states.push((opening.index, state(&artist, node, &done, opening).await));
        }
        let at = |index: u32| states.iter().find(|(found, _)| *found == index).unwrap().1.clone();
        let start = pipeline.start(&generate).unwrap();
        assert_eq!(latents_bytes(&at(0)).unwrap(), latents_bytes(&start).unwrap());
        let here = pipeline.transition(&generate, step as usize, &at(step)).unwrap();
        let deviation = here.deviation(&at(step), &at(step + 1)).unwrap();
        assert!(deviation < tolerance(Precision::Full), "step {step} is off by {deviation}");
        let frames = pipeline.frames(&generate, &at(STEPS)).unwrap();
        let clip = artist.fetch(node, done.receipt.clip.into()).await.unwrap();
        let off = frames_deviation(&frames, &decode_mp4_bytes(&clip).unwrap());
        assert!(off < FRAMES_TOLERANCE, "the clip is off by {off}");
    }
    invariants::discreet(node, PROMPT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_the_requester_and_whom_they_named_is_shown_anything() {
    let mut sandbox = Sandbox::start(1, &Worker::Real);
    let artist = Requester::new(&sandbox).await;
    let (auditor, stranger) = (Requester::new(&sandbox).await, Requester::new(&sandbox).await);
    let done = finished(&sandbox, &artist, &sandbox.nodes[0]).await;
    let node = &sandbox.nodes[0];
    let named = grant(auditor.key.public(), &done);
    let signed = artist.seal(&named);
    let reply = shown(audit(&auditor, node, request(&auditor, node, &done, 4), Some(signed.clone())).await);
    assert_eq!(reply.openings.iter().map(|one| one.index).collect::<Vec<_>>(), [0, 4, 5, STEPS]);

    let not_yours = ("not_yours", "audit.signer".to_owned());
    let by_stranger = || request(&stranger, node, &done, 4);
    let of_other = AuditGrant { receipt: ReceiptId::from_bytes([1; 32]), ..named.clone() };
    let cases = [
        (by_stranger(), None),
        (by_stranger(), Some(signed.clone())),
        (by_stranger(), Some(stranger.seal(&grant(stranger.key.public(), &done)))),
        (request(&auditor, node, &done, 4), Some(artist.seal(&of_other))),
        (request(&auditor, node, &done, 4), None),
    ];
    for (number, (request, grant)) in cases.into_iter().enumerate() {
        assert_eq!(refused(&audit(&stranger, node, request, grant).await), not_yours, "case {number}");
    }
    let over = AuditGrant { expires_at: now().minus(Millis(1000)), ..named };
    let late = audit(&auditor, node, request(&auditor, node, &done, 4), Some(artist.seal(&over))).await;
    assert_eq!(refused(&late), ("invalid", "expired".to_owned()));
    let beyond = audit(&artist, node, request(&artist, node, &done, STEPS), None).await;
    assert_eq!(refused(&beyond), ("invalid", "audit.step".to_owned()));
    let other = Finished { id: ReceiptId::from_bytes([1; 32]), ..done };
    let wrong = audit(&artist, node, request(&artist, node, &other, 4), None).await;
    assert_eq!(refused(&wrong), ("invalid", "audit.receipt".to_owned()));
    let mut unknown = other;
    unknown.receipt.job = JobId::from_bytes([1; 32]);
    let wrong = audit(&artist, node, request(&artist, node, &unknown, 4), None).await;
    assert_eq!(refused(&wrong), ("job_unknown", "audit.job".to_owned()));

    // What is kept lies sealed, also on this node's own disk, and outlives a restart.
    let latents = b"\"latents\"";
    for file in files(&node.path("state/audits")) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(latents.len()).any(|window| window == latents), "{}", file.display());
    }
    sandbox.nodes[0].kill();
    sandbox.nodes[0].start();
    sandbox.nodes[0].ready();
    let node = &sandbox.nodes[0];
    let job = reply.openings[0].sealed.id;
    assert!(auditor.fetch(node, job).await.is_some());
}

fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

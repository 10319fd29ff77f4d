//! What each fuzz target does with its bytes. The fuzzer calls these by name, and the ordinary test
//! `cargo test -p kinoflock-protocol --test corpus` replays the committed corpus through the same functions.

use kinoflock_protocol::audit::{AuditGrant, AuditOrder, AuditRequest, AuditVerdict, ValidAuditOrder};
use kinoflock_protocol::capacity::Capacity;
use kinoflock_protocol::card::Card;
use kinoflock_protocol::clip::{self, ChainingValue, ChunkHasher, Outline};
use kinoflock_protocol::codec::{decode, encode};
use kinoflock_protocol::custody::{Custody, Keep};
use kinoflock_protocol::frame::FrameReader;
use kinoflock_protocol::job::{Addressee, JobSpec, ValidJob};
use kinoflock_protocol::limits::*;
use kinoflock_protocol::list::{ModelList, NodeList};
use kinoflock_protocol::model::ModelManifest;
use kinoflock_protocol::names::{ClipTicket, NodeTicket};
use kinoflock_protocol::order::{Order, Quote, QuoteRequest};
use kinoflock_protocol::progress::{Checkpoint, Progress, ProgressFrame, ProgressOpen};
use kinoflock_protocol::query::JobQuery;
use kinoflock_protocol::receipt::{Receipt, ReceiptAnswer};
use kinoflock_protocol::refusal::Refusal;
use kinoflock_protocol::rpc::{BlobReply, BlobRequest, Request, Response, decode_request, decode_response};
use kinoflock_protocol::{BlobId, Envelope, List, NetworkId, NodeId, UnixMillis, seal, work};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A target: takes any bytes, and panics if something that must hold does not.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also the name of its folder in the corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("envelope", envelope),
    ("frame_reader", frame_reader),
    ("chaining_values", chaining_values),
    ("job", job),
    ("job_train", job),
    ("order", message::<Order>),
    ("capacity", message::<Capacity>),
    ("quote", message::<Quote>),
    ("receipt", message::<Receipt>),
    ("receipt_answer", message::<ReceiptAnswer>),
    ("card", card),
    ("job_query", message::<JobQuery>),
    ("checkpoint", message::<Checkpoint>),
    ("quote_request", message::<QuoteRequest>),
    ("model_manifest", model_manifest),
    ("node_ticket", node_ticket),
    ("clip_ticket", clip_ticket),
    ("outline", outline),
    ("refusal", message::<Refusal>),
    ("blob_request", message::<BlobRequest>),
    ("blob_reply", message::<BlobReply>),
    ("blob_replies", message::<List<BlobReply, 8>>),
    ("progress_open", message::<ProgressOpen>),
    ("progress_frame", message::<ProgressFrame>),
    ("progress_frames", message::<List<ProgressFrame, 8>>),
    ("event", message::<Progress>),
    ("events", message::<List<Progress, 16>>),
    ("request", request),
    ("requests", message::<List<Request, 16>>),
    ("response", response),
    ("responses", message::<List<Response, 16>>),
    ("custody", message::<Custody>),
    ("keep", message::<Keep>),
    ("node_list", message::<NodeList>),
    ("model_list", message::<ModelList>),
    ("requests_custody", message::<List<Request, 16>>),
    ("responses_custody", message::<List<Response, 16>>),
    ("audit_request", message::<AuditRequest>),
    ("audit_grant", message::<AuditGrant>),
    ("requests_audit", message::<List<Request, 16>>),
    ("responses_audit", message::<List<Response, 16>>),
    ("requests_lists", message::<List<Request, 16>>),
    ("audit_verdict", message::<AuditVerdict>),
    ("audit_order", audit_order),
    ("requests_order_audit", message::<List<Request, 16>>),
    ("responses_order_audit", message::<List<Response, 16>>),
    ("sealed", sealed),
];

/// Runs the target of this name.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a known target");
    target(data);
}

/// Whatever is read is written again as the same bytes.
fn message<T: Serialize + DeserializeOwned>(data: &[u8]) {
    if let Ok(value) = decode::<T>(data, MAX_OUTLINE_FRAME) {
        assert_eq!(encode(&value), data, "a second encoding of one value");
    }
}

/// Nothing opens but what this key sealed.
fn sealed(data: &[u8]) {
    let keypair = kinoflock_protocol::Keypair::from_seed(&[1; 32]);
    let network = NetworkId::named("fuzz");
    let query = JobQuery {
        job: kinoflock_protocol::JobId::from_bytes([2; 32]),
        action: kinoflock_protocol::query::QueryAction::Status,
        node: NodeId::from_bytes([1; 32]),
        issued_at: UnixMillis(1),
        nonce: kinoflock_protocol::Nonce::from_bytes([3; 16]),
    };
    let Ok(job) = Envelope::seal(&keypair, &network, &query) else { return };
    let key = seal::SealKey::of_job(&job);
    assert!(seal::open_bytes(&key, data).is_err(), "opened what was never sealed");
    let whole = seal::seal_bytes(&key, data);
    assert_eq!(seal::open_bytes(&key, &whole).as_deref(), Ok(data));
}

fn envelope(data: &[u8]) {
    message::<Envelope>(data);
    let network = NetworkId::named("fuzz");
    let node = NodeId::from_bytes([1; 32]);
    if let Ok(envelope) = Envelope::decode(data) {
        let addressee = Addressee { node: &node, collectives: &[] };
        let parsed = ValidJob::parse(&envelope, &network, UnixMillis(1), Some(addressee));
        assert!(parsed.is_err(), "nobody has signed for the fuzzer's network");
    }
}

fn audit_order(data: &[u8]) {
    message::<AuditOrder>(data);
    if let Ok(order) = decode::<AuditOrder>(data, MAX_CONTROL_FRAME) {
        let (network, here) = (NetworkId::named("fuzz"), NodeId::from_bytes([1; 32]));
        let parsed = ValidAuditOrder::parse(&order, &network, UnixMillis(1), &here);
        assert!(parsed.is_err(), "nobody has signed for the fuzzer's network");
    }
}

/// However the bytes are cut, the same frames come out, and none is over the limit.
fn frame_reader(data: &[u8]) {
    const LIMIT: usize = 1000;
    let all = frames(data, data.len().max(1), LIMIT);
    assert_eq!(all, frames(data, 1, LIMIT));
    assert_eq!(all, frames(data, 7, LIMIT));
    assert!(all.iter().all(|frame| frame.len() <= LIMIT));
}

fn frames(data: &[u8], piece: usize, limit: usize) -> Vec<Vec<u8>> {
    let mut reader = FrameReader::new(limit);
    let mut out = Vec::new();
    for piece in data.chunks(piece) {
        reader.push(piece);
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => out.push(frame),
                Ok(None) => break,
                Err(_) => return out,
            }
        }
    }
    out
}

/// Merging agrees with hashing, and merging a stranger's values never panics. The first two bytes stretch the input
/// to some MiB, so that the tree has several leaves.
fn chaining_values(data: &[u8]) {
    let (stretch, pattern) = data.split_at(data.len().min(2));
    let factor = stretch.iter().fold(0usize, |sum, byte| sum * 256 + usize::from(*byte)) % 600;
    let pattern = if pattern.is_empty() { &b"kinoflock"[..] } else { pattern };
    let len = (pattern.len() * factor * 16).min(3 * CHUNK_BYTES + 5);
    let bytes: Vec<u8> = pattern.iter().copied().cycle().take(len).collect();
    let values = clip::chaining_values(&bytes).expect("within the limit");
    let id = BlobId::of(&bytes);
    assert_eq!(clip::merge(len as u64, &values), Ok(id));
    let mut hasher = ChunkHasher::new();
    for piece in bytes.chunks(factor * 1000 + 1) {
        hasher.update(piece).expect("within the limit");
    }
    assert_eq!(hasher.finish().0, id);

    let values: Vec<_> = data.as_chunks::<32>().0.iter().copied().map(ChainingValue).collect();
    for len in [0, 1, values.len() as u64 * CHUNK_BYTES as u64, u64::MAX] {
        let _ = clip::merge(len, &values);
    }
}

fn job(data: &[u8]) {
    message::<JobSpec>(data);
    if let Ok(spec) = decode::<JobSpec>(data, JOB_MAX) {
        let _ = spec.check(UnixMillis(0));
        let _ = spec.check(UnixMillis(u64::MAX));
        for model in [work::WorkModel::ltx_2b(), work::WorkModel::pyramid_flow_miniflux()] {
            work::work(&model, &spec.shape());
        }
        let prompt = spec.prompt.as_str();
        assert!(prompt.len() < 12 || !format!("{spec:?}").contains(prompt), "a prompt is shown");
    }
}

const JOB_MAX: usize = MAX_ENVELOPE_BODY;

fn card(data: &[u8]) {
    message::<Card>(data);
    if let Ok(card) = decode::<Card>(data, MAX_ENVELOPE_BODY) {
        let _ = card.check();
    }
}

fn model_manifest(data: &[u8]) {
    message::<ModelManifest>(data);
    if let Ok(manifest) = decode::<ModelManifest>(data, MAX_MANIFEST) {
        let _ = manifest.check();
        let shape = work::JobShape { frames: 97, width: 512, height: 320, steps: 40, guided: true };
        work::work(&manifest.work, &shape);
        let _ = manifest.rules.check(shape.frames, shape.width, shape.height);
    }
}

fn outline(data: &[u8]) {
    message::<Outline>(data);
    if let Ok(outline) = decode::<Outline>(data, MAX_OUTLINE_FRAME) {
        let _ = outline.check(&BlobId::from_bytes([0; 32]));
        let _ = outline.check_chunk(0, &[]);
        let _ = outline.check_chunk(u64::MAX, &[]);
    }
}

fn node_ticket(data: &[u8]) {
    if let Ok(ticket) = NodeTicket::decode(data) {
        assert_eq!(ticket.encode(), data, "a second form of one ticket");
    }
    if let Ok(ticket) = String::from_utf8_lossy(data).parse::<NodeTicket>() {
        assert_eq!(ticket.to_string().parse(), Ok(ticket));
    }
}

fn clip_ticket(data: &[u8]) {
    if let Ok(ticket) = ClipTicket::decode(data) {
        assert_eq!(ticket.encode(), data, "a second form of one ticket");
    }
    if let Ok(ticket) = String::from_utf8_lossy(data).parse::<ClipTicket>() {
        assert_eq!(ticket.to_string().parse(), Ok(ticket));
    }
}

fn request(data: &[u8]) {
    message::<Request>(data);
    let _ = decode_request(data);
}

fn response(data: &[u8]) {
    message::<Response>(data);
    let _ = decode_response(data);
}

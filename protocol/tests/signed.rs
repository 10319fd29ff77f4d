//! Signed messages: any flipped bit is refused, and each way of being wrong has its own error.
#![allow(clippy::unwrap_used, missing_docs, dead_code)]

#[path = "support/samples.rs"]
mod samples;

use std::fmt::Debug;

use kinoflock_protocol::envelope::Signature;
use kinoflock_protocol::job::{Addressee, Audience, JobError};
use kinoflock_protocol::limits::*;
use kinoflock_protocol::order::{Order, OrderError, Quote, QuoteRequest, ValidOrder, ValidQuote};
use kinoflock_protocol::query::{JobQuery, QueryAction, ValidQuery};
use kinoflock_protocol::receipt::{Receipt, ReceiptError, ValidReceipt};
use kinoflock_protocol::*;
use proptest::prelude::*;
use samples::{Draw, VisitSigned, every_signed};
use serde::{Deserialize, Serialize};

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

fn network() -> NetworkId {
    NetworkId::named("test")
}
fn artist() -> Keypair {
    Keypair::from_seed(&[1; 32])
}
fn node() -> Keypair {
    Keypair::from_seed(&[2; 32])
}
fn stranger() -> Keypair {
    Keypair::from_seed(&[3; 32])
}

/// Whether bytes are an envelope that opens as `T`.
fn opens<T: Message>(bytes: &[u8]) -> bool {
    Envelope::decode(bytes).is_ok_and(|envelope| envelope.open::<T>(&network()).is_ok())
}

struct EveryBit;

impl VisitSigned for EveryBit {
    fn signed<T: Message + PartialEq + Debug + Clone>(&mut self, make: fn(&mut Draw) -> T) {
        let value = make(&mut Draw(7));
        let envelope = Envelope::seal(&artist(), &network(), &value).unwrap();
        assert_eq!(envelope.open::<T>(&network()).unwrap().value, value);
        let mut bytes = envelope.encode();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!opens::<T>(&bytes), "{}: bit {bit} flipped and still good", T::KIND);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(opens::<T>(&bytes));
    }
}

#[test]
fn any_flipped_bit_in_any_signed_message_is_refused() {
    every_signed(&mut EveryBit);
}

struct Tamper(u64);

impl VisitSigned for Tamper {
    fn signed<T: Message + PartialEq + Debug + Clone>(&mut self, make: fn(&mut Draw) -> T) {
        let mut draw = Draw(self.0);
        let value = make(&mut draw);
        let keypair = draw.keypair();
        let envelope = Envelope::seal(&keypair, &network(), &value).unwrap();
        let opened = envelope.open::<T>(&network()).unwrap();
        assert_eq!((opened.value, opened.signer), (value, keypair.public()));
        let bytes = envelope.encode();
        for _ in 0..4 {
            let mut other = bytes.clone();
            let at = draw.below(other.len() as u64) as usize;
            other[at] ^= (draw.below(255) + 1) as u8;
            assert!(!opens::<T>(&other), "{}: byte {at} changed and still good", T::KIND);
            let cut = draw.below(bytes.len() as u64) as usize;
            assert!(!opens::<T>(&bytes[..cut]));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn changed_bytes_in_any_signed_message_are_refused(seed in any::<u64>()) {
        every_signed(&mut Tamper(seed));
    }
}

struct Crossed;

impl VisitSigned for Crossed {
    fn signed<T: Message + PartialEq + Debug + Clone>(&mut self, make: fn(&mut Draw) -> T) {
        let sealed = Envelope::seal(&artist(), &network(), &make(&mut Draw(3))).unwrap();
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != T::KIND) {
            let relabelled = Envelope { kind: kind as u16, ..sealed.clone() };
            let error = relabelled.open::<T>(&network()).unwrap_err();
            assert!(matches!(error, EnvelopeError::WrongKind { .. }), "{error}");
        }
        let newer = Envelope { version: T::VERSION + 1, ..sealed.clone() };
        let error = newer.open::<T>(&network()).unwrap_err();
        assert_eq!(error.to_string(), format!("speaks {} version 1, you sent 2", T::KIND));

        let error = sealed.open::<T>(&NetworkId::named("another")).unwrap_err();
        assert!(matches!(error, EnvelopeError::WrongNetwork { .. }), "{error}");
        let mut network_hidden = sealed.clone();
        network_hidden.network = NetworkId::named("another").hint();
        let error = network_hidden.open::<T>(&NetworkId::named("another")).unwrap_err();
        assert!(matches!(error, EnvelopeError::BadSignature { .. }), "{error}");

        let claimed = Envelope { signer: stranger().public(), ..sealed.clone() };
        let error = claimed.open::<T>(&network()).unwrap_err();
        assert_eq!(error.code(), "bad_signature");
    }
}

#[test]
fn another_kind_version_network_or_signer_is_refused_by_its_own_error() {
    every_signed(&mut Crossed);
}

/// A body that claims to be an order and is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Junk(u64);

impl Message for Junk {
    const KIND: Kind = Kind::Order;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 64;
}

/// A body under the tag of an order that is longer than an order may be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Long(Bytes<4096>);

impl Message for Long {
    const KIND: Kind = Kind::Order;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 8192;
}

#[test]
fn a_well_signed_body_that_is_no_such_message_is_a_decode_error() {
    let sealed = Envelope::seal(&artist(), &network(), &Junk(9)).unwrap();
    let error = sealed.open::<Order>(&network()).unwrap_err();
    assert!(matches!(error, EnvelopeError::Decode { .. }), "{error}");
    assert_eq!(error.code(), "decode");
}

#[test]
fn a_body_over_the_limit_of_its_kind_is_refused_before_its_signature_is_checked() {
    let mut sealed =
        Envelope::seal(&artist(), &network(), &Long(Bytes::new(vec![0; 4000]).unwrap())).unwrap();
    sealed.signature = Signature([0; 64]);
    let error = sealed.open::<Order>(&network()).unwrap_err();
    assert_eq!(error.to_string(), "order of 4008 bytes exceeds the limit of 1024 bytes");
    let error = Envelope::seal(&artist(), &network(), &Long(Bytes::new(vec![0; 4000]).unwrap()));
    assert!(error.is_ok());
}

/// The small-order points of curve25519 in compressed form.
const SMALL_ORDER: [&str; 8] = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
];

#[test]
fn a_weak_key_is_refused_even_where_lax_verification_would_accept_it() {
    let sealed = Envelope::seal(&artist(), &network(), &samples::order(&mut Draw(1))).unwrap();
    for key in SMALL_ORDER {
        let mut signature = [0; 64];
        signature[0] = 1; // R is the identity, s is zero: lax verification accepts this for any message.
        let weak =
            Envelope { signer: key.parse().unwrap(), signature: Signature(signature), ..sealed.clone() };
        let error = weak.open::<Order>(&network()).unwrap_err();
        assert!(matches!(error, EnvelopeError::WeakKey { .. }), "{key}: {error}");
    }
    let none = Envelope { signer: PublicKey::from_bytes([2; 32]), ..sealed.clone() };
    assert_eq!(none.open::<Order>(&network()).unwrap_err().code(), "invalid_key");
}

fn good_job() -> JobSpec {
    let shape = JobShape { frames: 17, width: 64, height: 64, steps: 8, guided: true };
    let prompt = Prompt::new("a red circle drifts left").unwrap();
    JobSpec::generate(ModelId::from_bytes([5; 32]), prompt, Nonce::from_bytes([6; 16]), NOW, shape)
}

fn parse(spec: &JobSpec, now: UnixMillis) -> Result<ValidJob, JobError> {
    let here = node().node_id();
    let addressee = Addressee { node: &here, collectives: &[] };
    ValidJob::parse(&Envelope::seal(&artist(), &network(), spec).unwrap(), &network(), now, Some(addressee))
}

#[test]
fn a_good_job_is_valid_and_its_id_is_its_own() {
    let one = parse(&good_job(), NOW).unwrap();
    let other = parse(&JobSpec { nonce: Nonce::from_bytes([7; 16]), ..good_job() }, NOW).unwrap();
    assert_eq!(one.requester(), artist().requester_id());
    assert_ne!(one.id(), other.id());
    let by_stranger = Envelope::seal(&stranger(), &network(), &good_job()).unwrap();
    assert_ne!(one.id(), JobId::of(&by_stranger, &network()));
}

#[test]
fn what_no_model_could_compute_is_refused_with_limit_and_value() {
    let message = |spec: JobSpec| parse(&spec, NOW).unwrap_err().to_string();
    assert_eq!(message(JobSpec { frames: 0, ..good_job() }), "frames: 0 is below the least possible, 1");
    assert_eq!(message(JobSpec { width: 0, ..good_job() }), "width: 0 is below the least possible, 1");
    assert_eq!(message(JobSpec { steps: 0, ..good_job() }), "steps: 0 is below the least possible, 1");
    assert_eq!(message(JobSpec { fps: Micro(-1), ..good_job() }), "fps: -0.000001 is not above 0");
    let image = clip::BlobRef::of(b"image");
    let keyframe = job::Keyframe { frame: 17, image, strength: Micro::ONE };
    let late = JobSpec { keyframes: List::first_of([keyframe]), ..good_job() };
    assert_eq!(message(late), "keyframe 17 lies beyond the last frame, 16");
    let vast = JobSpec { start_image: Some(clip::BlobRef { len: u64::MAX, ..image }), ..good_job() };
    assert_eq!(parse(&vast, NOW).unwrap_err().code(), "input_too_large");
    let orphan = JobSpec { extend: Some(image), ..good_job() };
    assert_eq!(parse(&orphan, NOW).unwrap_err().code(), "no_parent");
    let lineage = JobSpec { parents: List::first_of([ClipId::from(image.id)]), ..orphan };
    assert!(parse(&lineage, NOW).is_ok());
    let odd = JobSpec { frames: u32::MAX, width: 1, guidance: Micro(i64::MIN), ..good_job() };
    assert!(parse(&odd, NOW).is_ok(), "odd numbers are no business of the protocol");
}

#[test]
fn a_job_out_of_its_time_is_refused_and_the_skew_is_named() {
    let late = JobSpec { deadline: Some(NOW), ..good_job() };
    assert_eq!(parse(&late, NOW).unwrap_err().code(), "expired");
    assert!(parse(&good_job(), NOW.plus(Millis(JOB_LIFE_MS - 1))).is_ok());
    assert_eq!(parse(&good_job(), NOW.plus(Millis(JOB_LIFE_MS))).unwrap_err().code(), "expired");
    let error = parse(&good_job(), NOW.minus(Millis(3_600_000))).unwrap_err();
    assert!(error.to_string().contains("issued 1 h 0 min in the future"), "{error}");
    assert!(parse(&good_job(), NOW.minus(Millis(MAX_CLOCK_SKEW_MS))).is_ok());
}

#[test]
fn a_job_for_another_node_or_collective_is_refused() {
    let addressed = |to| JobSpec { addressed_to: to, ..good_job() };
    assert!(parse(&addressed(Audience::Node(node().node_id())), NOW).is_ok());
    let error = parse(&addressed(Audience::Node(stranger().node_id())), NOW).unwrap_err();
    assert_eq!(error.code(), "for_another_node");
    let error = parse(&addressed(Audience::Collective(CollectiveId::from_bytes([1; 32]))), NOW).unwrap_err();
    assert_eq!(error.code(), "for_another_collective");
}

fn order_for(job: &ValidJob) -> Order {
    let lease = LeaseId::from_bytes([4; 16]);
    Order { job: job.id(), node: node().node_id(), lease, issued_at: NOW, resume: None }
}

#[test]
fn an_order_holds_for_one_node_one_job_and_a_short_time() {
    let job = parse(&good_job(), NOW).unwrap();
    let good = order_for(&job);
    let here = node().node_id();
    let check = |order: &Order, by: &Keypair, now, here: &NodeId| {
        let sealed = Envelope::seal(by, &network(), order).unwrap();
        ValidOrder::parse(&sealed, &network(), now, here, &job).map(|_| ()).map_err(|e: OrderError| e.code())
    };
    assert_eq!(check(&good, &artist(), NOW, &here), Ok(()));
    assert_eq!(check(&good, &artist(), NOW, &stranger().node_id()), Err("order_for_another_node"));
    assert_eq!(check(&good, &stranger(), NOW, &here), Err("wrong_signer"));
    let other = Order { job: JobId::from_bytes([8; 32]), ..good.clone() };
    assert_eq!(check(&other, &artist(), NOW, &here), Err("wrong_job"));
    assert_eq!(check(&good, &artist(), NOW.plus(Millis(3_600_000)), &here), Err("expired"));
    assert_eq!(check(&good, &artist(), NOW.minus(Millis(3_600_000)), &here), Err("clock_skew"));
}

#[test]
fn a_custodian_that_the_job_names_may_order_it() {
    let spec = JobSpec { custodians: List::first_of([stranger().node_id()]), ..good_job() };
    let job = parse(&spec, NOW).unwrap();
    let sealed = Envelope::seal(&stranger(), &network(), &order_for(&job)).unwrap();
    assert!(ValidOrder::parse(&sealed, &network(), NOW, &node().node_id(), &job).is_ok());
}

#[test]
fn a_quote_answers_one_question_of_one_requester() {
    let request =
        QuoteRequest::for_job(&good_job(), artist().requester_id(), Nonce::from_bytes([1; 16]), Work(5));
    let quote = Quote {
        request: request.hash(),
        requester: request.requester,
        lease: LeaseId::from_bytes([4; 16]),
        issued_at: NOW.plus(Millis(90_000)),
        expires_at: NOW.plus(Millis(90_000 + LEASE_MS)),
        ..samples::quote(&mut Draw(1))
    };
    let check = |quote: &Quote, by: &Keypair, request: &QuoteRequest| {
        let sealed = Envelope::seal(by, &network(), quote).unwrap();
        ValidQuote::parse(&sealed, &network(), &node().node_id(), request).map_err(|e| e.code())
    };
    let valid = check(&quote, &node(), &request).unwrap();
    assert_eq!((valid.held_for(), valid.skew(NOW)), (Millis(LEASE_MS), 90_000));
    assert_eq!(check(&quote, &stranger(), &request), Err("quote_from_another_node"));
    let other = QuoteRequest { nonce: Nonce::from_bytes([2; 16]), ..request.clone() };
    assert_eq!(check(&quote, &node(), &other), Err("quote_for_another_request"));
    let greedy = Quote { expires_at: NOW.plus(Millis(3_600_000)), ..quote };
    assert_eq!(check(&greedy, &node(), &request), Err("lease_too_long"));
}

#[test]
fn a_query_holds_for_one_node_and_a_short_time() {
    let query = JobQuery {
        job: JobId::from_bytes([1; 32]),
        action: QueryAction::Cancel,
        node: node().node_id(),
        issued_at: NOW,
        nonce: Nonce::from_bytes([1; 16]),
    };
    let sealed = Envelope::seal(&artist(), &network(), &query).unwrap();
    let check = |now, here: &NodeId| ValidQuery::parse(&sealed, &network(), now, here).map_err(|e| e.code());
    assert_eq!(check(NOW, &node().node_id()).unwrap().signer, artist().public());
    assert_eq!(check(NOW, &stranger().node_id()), Err("order_for_another_node"));
    assert_eq!(check(NOW.plus(Millis(3_600_000)), &node().node_id()), Err("expired"));
}

#[test]
fn a_receipt_is_signed_by_the_node_that_it_names_and_keeps_its_chain() {
    let good = Receipt {
        node: node().node_id(),
        accepted_at: NOW,
        started_at: NOW,
        finished_at: NOW.plus(Millis(5)),
        sequence: 0,
        previous: None,
        ..samples::receipt(&mut Draw(1))
    };
    let check = |receipt: &Receipt, by: &Keypair| {
        let sealed = Envelope::seal(by, &network(), receipt).unwrap();
        ValidReceipt::parse(&sealed, &network()).map(|r| r.id()).map_err(|e: ReceiptError| e.code())
    };
    let first = check(&good, &node()).unwrap();
    assert_eq!(check(&good, &stranger()), Err("wrong_signer"));
    assert_eq!(check(&Receipt { sequence: 1, ..good.clone() }, &node()), Err("chain"));
    assert_eq!(check(&Receipt { previous: Some(first), ..good.clone() }, &node()), Err("chain"));
    assert!(check(&Receipt { sequence: 1, previous: Some(first), ..good.clone() }, &node()).is_ok());
    assert_eq!(check(&Receipt { started_at: NOW.plus(Millis(9)), ..good }, &node()), Err("times"));
}

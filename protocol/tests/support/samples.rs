//! Values of every message, drawn from a seed: every field filled, lists of several items, every variant reached.

use kinoflock_protocol::audit::*;
use kinoflock_protocol::capacity::*;
use kinoflock_protocol::card::*;
use kinoflock_protocol::clip::*;
use kinoflock_protocol::custody::*;
use kinoflock_protocol::job::*;
use kinoflock_protocol::limits::*;
use kinoflock_protocol::list::*;
use kinoflock_protocol::model::*;
use kinoflock_protocol::names::*;
use kinoflock_protocol::order::*;
use kinoflock_protocol::progress::*;
use kinoflock_protocol::query::*;
use kinoflock_protocol::receipt::*;
use kinoflock_protocol::rpc::*;
use kinoflock_protocol::work::*;
use kinoflock_protocol::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

#[path = "samples/audits.rs"]
mod audits;
#[path = "samples/custody.rs"]
mod custody;
#[path = "samples/rpc.rs"]
mod rpc;
use audits::*;
use custody::*;
use rpc::*;
pub(crate) use rpc::{requests, responses};

/// A stream of values from a seed (SplitMix64).
pub(crate) struct Draw(pub(crate) u64);

/// Something that is done with every message.
pub(crate) trait Visit {
    /// `make(draw, variant)`: the variants of an enum are told apart by number, and a struct ignores it.
    fn message<T>(&mut self, name: &str, max: usize, make: fn(&mut Draw) -> T)
    where
        T: Serialize + DeserializeOwned + PartialEq + Debug + Clone;
}

/// Something that is done with every message that is signed.
pub(crate) trait VisitSigned {
    fn signed<T>(&mut self, make: fn(&mut Draw) -> T)
    where
        T: Message + PartialEq + Debug + Clone;
}

pub(crate) fn every_signed(visit: &mut impl VisitSigned) {
    visit.signed(job);
    visit.signed(order);
    visit.signed(capacity);
    visit.signed(quote);
    visit.signed(receipt);
    visit.signed(receipt_answer);
    visit.signed(card);
    visit.signed(job_query);
    visit.signed(checkpoint);
    visit.signed(custody);
    visit.signed(keep);
    visit.signed(node_list);
    visit.signed(model_list);
    visit.signed(audit_request);
    visit.signed(audit_grant);
    visit.signed(audit_verdict);
}

pub(crate) fn every_message(visit: &mut impl Visit) {
    visit.message("job", JobSpec::MAX_BODY, job);
    visit.message("job-train", JobSpec::MAX_BODY, train_job);
    visit.message("order", Order::MAX_BODY, order);
    visit.message("capacity", Capacity::MAX_BODY, capacity);
    visit.message("quote", Quote::MAX_BODY, quote);
    visit.message("receipt", Receipt::MAX_BODY, receipt);
    visit.message("receipt-answer", ReceiptAnswer::MAX_BODY, receipt_answer);
    visit.message("card", Card::MAX_BODY, card);
    visit.message("job-query", JobQuery::MAX_BODY, job_query);
    visit.message("checkpoint", Checkpoint::MAX_BODY, checkpoint);
    visit.message("custody", Custody::MAX_BODY, custody);
    visit.message("keep", Keep::MAX_BODY, keep);
    visit.message("node-list", NodeList::MAX_BODY, node_list);
    visit.message("model-list", ModelList::MAX_BODY, model_list);
    visit.message("envelope", MAX_ENVELOPE, envelope);
    visit.message("quote-request", MAX_CONTROL_FRAME, quote_request);
    visit.message("model-manifest", MAX_MANIFEST, manifest);
    visit.message("outline", MAX_OUTLINE_FRAME, outline);
    visit.message("refusal", MAX_CONTROL_FRAME, refusal);
    visit.message("blob-request", MAX_OPEN_FRAME, blob_request);
    visit.message("blob-reply", MAX_OUTLINE_FRAME, |d| one_of(d, blob_replies));
    visit
        .message("progress-open", MAX_OPEN_FRAME, |d| ProgressOpen { query: envelope(d), from_seq: d.u64() });
    visit.message("progress-frame", MAX_PROGRESS_FRAME, |d| one_of(d, progress_frames));
    visit.message("event", MAX_PROGRESS_FRAME, |d| one_of(d, events));
    visit.message("request", MAX_CONTROL_FRAME, |d| one_of(d, requests));
    visit.message("response", MAX_CONTROL_FRAME, |d| one_of(d, responses));
    // Every variant by itself, all in one list, so that the golden bytes hold each.
    visit.message("requests", MAX_CONTROL_FRAME, requests);
    visit.message("responses", MAX_CONTROL_FRAME, responses);
    visit.message("events", MAX_CONTROL_FRAME, events);
    visit.message("progress-frames", MAX_CONTROL_FRAME, progress_frames);
    visit.message("blob-replies", MAX_CONTROL_FRAME, blob_replies);
    // Those that joined later stand apart: golden bytes do not change.
    visit.message("requests-custody", MAX_CONTROL_FRAME, requests_of_custody);
    visit.message("responses-custody", MAX_CONTROL_FRAME, responses_of_custody);
    visit.message("audit-request", AuditRequest::MAX_BODY, audit_request);
    visit.message("audit-grant", AuditGrant::MAX_BODY, audit_grant);
    visit.message("requests-audit", MAX_CONTROL_FRAME, requests_of_audit);
    visit.message("responses-audit", MAX_CONTROL_FRAME, responses_of_audit);
    visit.message("requests-lists", MAX_CONTROL_FRAME, requests_of_lists);
    visit.message("audit-verdict", AuditVerdict::MAX_BODY, audit_verdict);
    visit.message("audit-order", MAX_CONTROL_FRAME, audit_order);
    visit.message("requests-order-audit", MAX_CONTROL_FRAME, requests_of_order_audit);
    visit.message("responses-order-audit", MAX_CONTROL_FRAME, responses_of_order_audit);
}

impl Draw {
    pub(crate) fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub(crate) fn u32(&mut self) -> u32 {
        self.u64() as u32
    }
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.u64() % end
    }
    pub(crate) fn flag(&mut self) -> bool {
        self.below(2) == 1
    }
    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.u64() as u8)
    }
    pub(crate) fn text<const MAX: usize>(&mut self) -> Text<MAX> {
        const WORDS: [&str; 8] = ["red", "Kreis", "тает", "円", "🜂", "a b", "\u{200f}", "blue\nfield"];
        let words: Vec<_> = (0..self.below(5)).map(|_| WORDS[self.below(8) as usize]).collect();
        Text::truncated(&words.join(" "))
    }
    pub(crate) fn some<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        if self.flag() { Some(make(self)) } else { None }
    }
    pub(crate) fn list<T, const MAX: usize>(&mut self, make: impl Fn(&mut Self) -> T) -> List<T, MAX> {
        let count = self.below(4);
        List::first_of((0..count).map(|_| make(self)))
    }
    fn micro(&mut self) -> Micro {
        Micro(self.u64() as i64)
    }
    fn at(&mut self) -> UnixMillis {
        UnixMillis(self.u64())
    }
    fn millis(&mut self) -> Millis {
        Millis(self.u64())
    }
    pub(crate) fn keypair(&mut self) -> Keypair {
        Keypair::from_seed(&self.bytes())
    }
}

fn one_of<T: Clone, const MAX: usize>(d: &mut Draw, all: fn(&mut Draw) -> List<T, MAX>) -> T {
    let all = all(d);
    all[d.below(all.len() as u64) as usize].clone()
}

macro_rules! drawn_ids {
    ($($name:ident: $id:ty,)*) => { $(fn $name(d: &mut Draw) -> $id { <$id>::from_bytes(d.bytes()) })* };
}
drawn_ids! {
    node: NodeId, requester: RequesterId, job_id: JobId, clip_id: ClipId, blob_id: BlobId, model_id: ModelId,
    card_id: CardId, receipt_id: ReceiptId, collective: CollectiveId, network: NetworkId, chain: ChainId, lease: LeaseId,
    nonce: Nonce, body_hash: BodyHash,
}

fn blob(d: &mut Draw) -> BlobRef {
    BlobRef { id: blob_id(d), len: d.u64() }
}

fn shape(d: &mut Draw) -> JobShape {
    JobShape { frames: d.u32(), width: d.u32(), height: d.u32(), steps: d.u32(), guided: d.flag() }
}

pub(crate) fn job(d: &mut Draw) -> JobSpec {
    JobSpec {
        nonce: nonce(d),
        issued_at: d.at(),
        deadline: d.some(Draw::at),
        kind: JobKind::Generate,
        model: model_id(d),
        adapters: d.list(|d| Adapter { weights: blob(d), scale: d.micro(), card: d.some(card_id) }),
        prompt: Prompt::new(d.text::<MAX_PROMPT>().to_string()).unwrap(),
        negative_prompt: Prompt::new(d.text::<MAX_PROMPT>().to_string()).unwrap(),
        seed: d.u64(),
        frames: d.u32(),
        width: d.u32(),
        height: d.u32(),
        fps: d.micro(),
        steps: d.u32(),
        guidance: d.micro(),
        guidance_rescale: d.micro(),
        start_image: d.some(blob),
        end_image: d.some(blob),
        keyframes: d.list(|d| Keyframe { frame: d.u32(), image: blob(d), strength: d.micro() }),
        initial_latents: d.some(blob),
        extend: d.some(blob),
        parents: d.list(clip_id),
        returns: Returns {
            latents: d.flag(),
            checkpoint_every: d.u32(),
            previews: d.flag(),
            step_root: d.flag(),
        },
        share: [Share::None, Share::Collective, Share::Public][d.below(3) as usize],
        addressed_to: audience(d),
        custodians: d.list(node),
        membership: d.some(|d| Membership {
            collective: collective(d),
            proof: Bytes::new(d.bytes::<40>().to_vec()).unwrap(),
        }),
        ops: d.list(|d| Op { name: d.text(), value: op_value(d) }),
        artist: d.some(Draw::text),
        licence: d.some(Draw::text),
    }
}

fn train_job(d: &mut Draw) -> JobSpec {
    let train = TrainSpec {
        dataset: blob(d),
        card: d.some(card_id),
        rank: d.u32(),
        alpha: d.micro(),
        learning_rate_nano: d.u64(),
        batch: d.u32(),
    };
    JobSpec { kind: JobKind::Train(train), ..job(d) }
}

fn audience(d: &mut Draw) -> Audience {
    match d.below(3) {
        0 => Audience::Anyone,
        1 => Audience::Node(node(d)),
        _ => Audience::Collective(collective(d)),
    }
}

fn op_value(d: &mut Draw) -> OpValue {
    match d.below(6) {
        0 => OpValue::Flag(d.flag()),
        1 => OpValue::Whole(d.u64() as i64),
        2 => OpValue::Number(d.micro()),
        3 => OpValue::Numbers(d.list(Draw::micro)),
        4 => OpValue::Text(d.text()),
        _ => OpValue::Blob(blob(d)),
    }
}

pub(crate) fn quote_request(d: &mut Draw) -> QuoteRequest {
    QuoteRequest {
        nonce: nonce(d),
        requester: requester(d),
        model: model_id(d),
        train: d.flag(),
        adapters: d.list(blob_id),
        shape: shape(d),
        work: Work(d.u64()),
        input_bytes: d.u64(),
        collective: d.some(collective),
        addressed_to: audience(d),
        deadline: d.some(Draw::at),
    }
}

pub(crate) fn quote(d: &mut Draw) -> Quote {
    Quote {
        request: body_hash(d),
        requester: requester(d),
        lease: lease(d),
        issued_at: d.at(),
        expires_at: d.at(),
        position: d.u32(),
        eta: d.millis(),
        work: Work(d.u64()),
        speed: d.u64(),
        max_input_bytes: d.u64(),
    }
}

pub(crate) fn order(d: &mut Draw) -> Order {
    Order {
        job: job_id(d),
        node: node(d),
        lease: lease(d),
        issued_at: d.at(),
        resume: d.some(|d| Resume { checkpoint: blob(d), step: d.u32() }),
    }
}

pub(crate) fn capacity(d: &mut Draw) -> Capacity {
    Capacity {
        issued_at: d.at(),
        sequence: d.u64(),
        name: d.text(),
        addresses: d.list(Draw::text),
        models: d.list(|d| Offer {
            model: model_id(d),
            name: d.text(),
            architecture: d.text(),
            speed: d.u64(),
            devices: d.u32(),
            loaded: d.flag(),
            self_test: match d.flag() {
                true => SelfTest::Passed { deviation: d.micro(), at: d.at() },
                false => SelfTest::Unreferenced { at: d.at() },
            },
        }),
        devices: d.list(|d| Device { class: device(d), name: d.text(), memory: d.u64() }),
        limits: OfferLimits {
            max_frames: d.u32(),
            max_width: d.u32(),
            max_height: d.u32(),
            max_steps: d.u32(),
            max_work: Work(d.u64()),
            max_input_bytes: d.u64(),
            max_queue: d.u32(),
        },
        queue: QueueState { jobs: d.u32(), work: Work(d.u64()), wait: d.millis() },
        state: [NodeState::Open, NodeState::Paused, NodeState::Draining][d.below(3) as usize],
        serves: Serves { public_bps: d.u32() as u16, collectives: d.list(collective), listed_only: d.flag() },
        terms: Terms {
            keeps_prompts: d.millis(),
            keeps_clips: d.millis(),
            keeps_latents: d.millis(),
            keeps_unacknowledged: d.millis(),
            trains_on_them: d.flag(),
            claims_rights: d.flag(),
            note: d.text(),
        },
        content_rules: d.flag(),
        protocol_versions: List::first_of([1, 2]),
        engine: d.text(),
    }
}

fn device(d: &mut Draw) -> DeviceClass {
    [DeviceClass::Cpu, DeviceClass::Cuda, DeviceClass::Metal, DeviceClass::Other][d.below(4) as usize]
}

pub(crate) fn receipt(d: &mut Draw) -> Receipt {
    Receipt {
        job: job_id(d),
        requester: requester(d),
        node: node(d),
        collective: d.some(collective),
        model: model_id(d),
        cards: d.list(card_id),
        adapters: d.list(|d| UsedAdapter { weights: blob_id(d), scale: d.micro() }),
        clip: clip_id(d),
        clip_len: d.u64(),
        latents: d.some(blob),
        parents: d.list(clip_id),
        inputs: d.list(blob_id),
        seed: d.u64(),
        steps: d.u32(),
        step_root: d.some(blob_id),
        segments: d.list(|d| Segment {
            node: node(d),
            first_step: d.u32(),
            steps: d.u32(),
            checkpoint: d.some(blob_id),
        }),
        work: Work(d.u64()),
        device: device(d),
        engine: d.text(),
        accepted_at: d.at(),
        started_at: d.at(),
        finished_at: d.at(),
        claimed_joules: d.some(|d| Joules(d.u64())),
        chain: chain(d),
        sequence: d.u64(),
        previous: d.some(receipt_id),
    }
}

pub(crate) fn receipt_answer(d: &mut Draw) -> ReceiptAnswer {
    ReceiptAnswer {
        receipt: receipt_id(d),
        job: job_id(d),
        verdict: if d.flag() { Verdict::Accept } else { Verdict::Dispute { code: d.text(), text: d.text() } },
        answered_at: d.at(),
    }
}

fn subject(d: &mut Draw) -> Subject {
    match d.below(3) {
        0 => Subject::Model(model_id(d)),
        1 => Subject::Adapter(blob_id(d)),
        _ => Subject::Dataset(blob_id(d)),
    }
}

pub(crate) fn card(d: &mut Draw) -> Card {
    use ConsentGiven as C;
    Card {
        subject: subject(d),
        name: d.text(),
        summary: d.text(),
        version: d.u32(),
        previous: d.some(card_id),
        issued_at: d.at(),
        authors: d.list(|d| Author {
            name: d.text(),
            key: d.some(requester),
            role: d.text(),
            contact: d.text(),
        }),
        licence: Licence { name: d.text(), url: d.text(), conditions: d.text() },
        training_data: TrainingData {
            disclosed: d.flag(),
            statement: d.text(),
            sources: d.list(|d| Source {
                name: d.text(),
                url: d.text(),
                licence: d.text(),
                items: d.u64(),
                dataset: d.some(blob_id),
            }),
        },
        consent: Consent {
            given: [C::OwnWork, C::All, C::ByLicence, C::Some, C::None, C::Unknown][d.below(6) as usize],
            statement: d.text(),
        },
        shares: d.list(|d| CreditShare {
            name: d.text(),
            key: d.some(requester),
            role: d.text(),
            bps: d.u32() as u16,
        }),
        upstreams: d.list(|d| Upstream { subject: subject(d), name: d.text(), bps: d.u32() as u16 }),
        fingerprint: d.some(|d| Fingerprint {
            prompt: Prompt::new("a red circle").unwrap(),
            seed: d.u64(),
            frames: d.u32(),
            width: d.u32(),
            height: d.u32(),
            fps: d.micro(),
            steps: d.u32(),
            guidance: d.micro(),
            mean: d.micro(),
            deviation: d.micro(),
            count: d.u64(),
            samples: d.list(Draw::micro),
            tolerance: d.micro(),
        }),
    }
}

pub(crate) fn job_query(d: &mut Draw) -> JobQuery {
    use QueryAction as A;
    JobQuery {
        job: job_id(d),
        action: [A::Status, A::Cancel, A::Progress, A::Previews][d.below(4) as usize],
        node: node(d),
        issued_at: d.at(),
        nonce: nonce(d),
    }
}

pub(crate) fn checkpoint(d: &mut Draw) -> Checkpoint {
    Checkpoint {
        job: job_id(d),
        model: model_id(d),
        step: d.u32(),
        total: d.u32(),
        state: blob(d),
        latents: blob_id(d),
        made_at: d.at(),
    }
}

pub(crate) fn node_list(d: &mut Draw) -> NodeList {
    NodeList {
        name: d.text(),
        sequence: d.u64(),
        issued_at: d.at(),
        expires_at: d.at(),
        nodes: d.list(node_address),
        addresses: d.list(Draw::text),
    }
}

pub(crate) fn model_list(d: &mut Draw) -> ModelList {
    let model = |d: &mut Draw| ListedModel {
        model: model_id(d),
        name: d.text(),
        architecture: d.text(),
        licence: d.text(),
        source: d.text(),
    };
    ModelList {
        name: d.text(),
        sequence: d.u64(),
        issued_at: d.at(),
        expires_at: d.at(),
        models: d.list(model),
    }
}

pub(crate) fn envelope(d: &mut Draw) -> Envelope {
    let (keypair, network, value) = (d.keypair(), network(d), job_query(d));
    Envelope::seal(&keypair, &network, &value).unwrap()
}

pub(crate) fn manifest(d: &mut Draw) -> ModelManifest {
    ModelManifest {
        architecture: d.text(),
        files: d.list(|d| ModelFile { path: d.text(), len: d.u64(), blake3: blob_id(d) }),
        rules: ModelRules {
            size_multiple: d.u32(),
            frames_multiple: d.u32(),
            frames_offset: d.u32(),
            max_prompt_tokens: d.u32(),
        },
        defaults: ModelDefaults {
            frames: d.u32(),
            width: d.u32(),
            height: d.u32(),
            fps: d.micro(),
            steps: d.u32(),
            guidance: d.micro(),
        },
        work: [WorkModel::ltx_2b(), WorkModel::mochi_1(), WorkModel::pyramid_flow_miniflux()]
            [d.below(3) as usize]
            .clone(),
    }
}

fn node_address(d: &mut Draw) -> NodeAddress {
    NodeAddress { id: node(d), addresses: d.list(Draw::text) }
}

/// An address of every sort: those that tickets pack, and texts that they keep as they are.
fn address(d: &mut Draw) -> Text<MAX_ADDRESS> {
    let (ip, six) = (std::net::Ipv4Addr::from(d.u32()), std::net::Ipv6Addr::from(d.bytes::<16>()));
    let (port, relay) = (d.u64() as u16, node(d));
    let text = match d.below(9) {
        0 => format!("/ip4/{ip}/udp/{port}/quic-v1"),
        1 => format!("/ip4/{ip}/tcp/{port}"),
        2 => format!("/ip6/{six}/tcp/{port}"),
        3 => format!("/dns/node{port}.example.org/udp/{port}/quic-v1"),
        4 => format!("/dnsaddr/node{port}.example.org"),
        5 => format!("/ip4/{ip}/tcp/{port}/p2p/{relay}/p2p-circuit"),
        6 => format!("/ip4/0{ip}/tcp/0{port}"),
        7 => format!("/dns6/a/udp/{port}"),
        _ => return d.text(),
    };
    Text::new(text).unwrap()
}

fn ticket_address(d: &mut Draw) -> NodeAddress {
    NodeAddress { id: node(d), addresses: d.list(address) }
}

fn ticket_network(d: &mut Draw) -> NetworkId {
    if d.flag() { NetworkId::named(PUBLIC_NETWORK) } else { network(d) }
}

pub(crate) fn node_ticket(d: &mut Draw) -> NodeTicket {
    NodeTicket { network: ticket_network(d), nodes: d.list(ticket_address), collective: d.some(collective) }
}

pub(crate) fn clip_ticket(d: &mut Draw) -> ClipTicket {
    ClipTicket { network: ticket_network(d), clip: clip_id(d), len: d.u64(), holders: d.list(ticket_address) }
}

fn outline(d: &mut Draw) -> Outline {
    Outline { len: d.u64(), values: d.list(|d| ChainingValue(d.bytes())) }
}

/// Reasons when the golden bytes were written: one that joins later must not change what is drawn for them.
const GOLDEN_REASONS: u64 = 29;

pub(crate) fn refusal(d: &mut Draw) -> Refusal {
    let reason = Reason::ALL[d.below(GOLDEN_REASONS) as usize];
    Refusal { reason, rule: d.text(), limit: d.text(), given: d.text(), advice: d.text() }
}

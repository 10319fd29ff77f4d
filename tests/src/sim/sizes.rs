//! Bytes of the real messages, each signed and encoded once.

use kinoflock_protocol::capacity::{
    Capacity, Device, DeviceClass, NodeState, Offer, OfferLimits, QueueState, SelfTest, Serves, Terms,
};
use kinoflock_protocol::job::Prompt;
use kinoflock_protocol::order::{Order, Quote, QuoteRequest};
use kinoflock_protocol::rpc::{FindNodes, ReleaseReason, Request, Response, encode_request, encode_response};
use kinoflock_protocol::*;

/// Bytes that the transport adds to a message: headers, tags, a stream's beginning and end.
const TRANSPORT: usize = 120;

/// Bytes of each message on the wire.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "each field is named after its message")]
pub struct Sizes {
    pub advert: usize,
    pub ask: usize,
    pub find: usize,
    pub nodes: usize,
    pub quote: usize,
    pub promise: usize,
    pub release: usize,
    pub submit: usize,
    pub accepted: usize,
    pub refused: usize,
}

impl Sizes {
    /// Encodes one of each.
    ///
    /// # Panics
    /// Never: the messages are within their limits.
    #[must_use]
    pub fn measure(model: ModelId) -> Self {
        let (key, network) = (Keypair::from_seed(&[1; 32]), NetworkId::named("sim"));
        let seal = |body: &Capacity| Envelope::seal(&key, &network, body).expect("an advert fits");
        let advert = seal(&full(model));
        let shape = shape();
        let nonce = Nonce::from_bytes([3; 16]);
        let prompt = Prompt::new("a red circle drifts left over a blue field, ".repeat(8)).expect("a prompt");
        let spec = JobSpec::generate(model, prompt, nonce, UnixMillis(1), shape);
        let job = Envelope::seal(&key, &network, &spec).expect("a job fits");
        let id = JobId::of(&job, &network);
        let question = QuoteRequest::for_job(&spec, key.requester_id(), nonce, Work(1 << 30));
        let lease = LeaseId::from_bytes([7; 16]);
        let quote = Quote {
            request: question.hash(),
            requester: key.requester_id(),
            lease,
            issued_at: UnixMillis(1 << 40),
            expires_at: UnixMillis(1 << 40),
            position: 3,
            eta: Millis(100_000),
            work: Work(1 << 30),
            speed: 1 << 20,
            max_input_bytes: 1 << 30,
        };
        let quote = Envelope::seal(&key, &network, &quote).expect("a quote fits");
        let order =
            Order { job: id, node: key.node_id(), lease, issued_at: UnixMillis(1 << 40), resume: None };
        let order = Envelope::seal(&key, &network, &order).expect("an order fits");
        let request = |request: &Request| encode_request(request).len() + TRANSPORT;
        let response = |response: &Response| encode_response(response).len() + TRANSPORT;
        let find = FindNodes { model: Some(model), shape: Some(shape), limit: 16, forward: true };
        Self {
            advert: advert.encode().len() + TRANSPORT,
            ask: request(&Request::Capacity),
            find: request(&Request::FindNodes(find)),
            nodes: response(&Response::Nodes(List::first_of(vec![advert; limits::MAX_NODES]))),
            quote: request(&Request::Quote(question)),
            promise: response(&Response::Quote(quote)),
            release: request(&Request::Release { lease, reason: ReleaseReason::Sooner(Millis(40_000)) }),
            submit: request(&Request::Submit { order, job, mirrored: None }),
            accepted: response(&Response::Accepted { job: id, position: 3, eta: Millis(100_000) }),
            refused: response(&Response::error("queue_full", "the queue is full")) + 64,
        }
    }
}

/// The shape of every job here.
#[must_use]
pub fn shape() -> JobShape {
    JobShape { frames: 97, width: 704, height: 480, steps: 30, guided: true }
}

/// An advert as a well-connected node sends it: two addresses, two models, one card.
fn full(model: ModelId) -> Capacity {
    let offer = |model| Offer { model, ..offer(model, 1 << 20) };
    Capacity {
        name: Text::truncated("attic-of-the-cinema"),
        addresses: List::first_of(
            ["/ip4/192.0.2.201/udp/4710/quic-v1", "/ip4/192.0.2.201/tcp/4710"].map(Text::truncated),
        ),
        models: List::first_of([offer(model), offer(ModelId::from_bytes([8; 32]))]),
        devices: List::first_of([Device {
            class: DeviceClass::Cuda,
            name: Text::truncated("NVIDIA GeForce RTX 4090"),
            memory: 24 << 30,
        }]),
        ..advert(model, 1 << 20, QueueState::default())
    }
}

/// What routing reads of an advert.
#[must_use]
pub fn advert(model: ModelId, speed: u64, queue: QueueState) -> Capacity {
    Capacity {
        issued_at: UnixMillis(1 << 40),
        sequence: 1,
        name: Text::default(),
        addresses: List::empty(),
        models: List::first_of([offer(model, speed)]),
        devices: List::empty(),
        limits: OfferLimits::default(),
        queue,
        state: NodeState::Open,
        serves: Serves::default(),
        terms: Terms::default(),
        content_rules: false,
        protocol_versions: List::first_of([1]),
        engine: Text::truncated("kinoflock 0.1.0"),
    }
}

fn offer(model: ModelId, speed: u64) -> Offer {
    Offer {
        model,
        name: Text::truncated("ltx-video-0.9.5"),
        architecture: Text::truncated("ltx-video"),
        speed,
        devices: 1,
        loaded: true,
        self_test: SelfTest::Passed { deviation: Micro(10), at: UnixMillis(1 << 40) },
    }
}

//! A peer that answers by a script, over loopback: enough of a node to see what the client makes of its answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kinoflock_net::blobs::MemoryBlobs;
use kinoflock_net::{NetConfig, NetEvent, NetEvents, NetHandle, ProgressSink};
use kinoflock_protocol::capacity::{Capacity, Offer, OfferLimits, QueueState, SelfTest, Serves, Terms};
use kinoflock_protocol::model::{ModelDefaults, ModelFile, ModelManifest, ModelRules};
use kinoflock_protocol::order::{Quote, QuoteRequest, ValidOrder};
use kinoflock_protocol::progress::{JobEvent, Progress};
use kinoflock_protocol::query::ValidQuery;
use kinoflock_protocol::receipt::{ReceiptAnswer, Verdict};
use kinoflock_protocol::rpc::{JobFailure, JobState, JobStatus, ReleaseReason, Request, Response};
use kinoflock_protocol::work::WorkModel;
use kinoflock_protocol::*;
use tokio::sync::mpsc;

use crate::support::{CLIP, network, receipt};

/// How the peer behaves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Script {
    /// Its clock is so far ahead, in milliseconds.
    pub(crate) ahead_ms: i64,
    /// It refuses every quote.
    pub(crate) refuses: bool,
    /// It ends the first so many progress streams after one event.
    pub(crate) breaks: u32,
    /// Its receipt names another seed.
    pub(crate) wrong_seed: bool,
    /// Its receipt is a true one, of the first job that it did.
    pub(crate) old_receipt: bool,
    /// Its receipt is a true one, of another node for the same job.
    pub(crate) borrowed_receipt: bool,
    /// It answers with the advert of another node.
    pub(crate) borrowed_advert: bool,
    /// Its quotes are signed by another node.
    pub(crate) borrowed_quote: bool,
    /// Its jobs fail.
    pub(crate) fails: bool,
    /// Its jobs have failed when it is asked how they stand.
    pub(crate) failed: bool,
    /// Its jobs stand still after the first step.
    pub(crate) holds: bool,
    /// Time that its quotes tell, in milliseconds; 1000 if zero.
    pub(crate) eta_ms: u64,
    /// The collective that it serves.
    pub(crate) collective: Option<CollectiveId>,
}

/// A peer and what it heard.
pub(crate) struct Peer {
    pub(crate) handle: NetHandle,
    pub(crate) answers: mpsc::Receiver<Verdict>,
    pub(crate) cancels: mpsc::Receiver<JobId>,
    pub(crate) releases: mpsc::Receiver<ReleaseReason>,
}

impl Peer {
    pub(crate) fn address(&self) -> String {
        self.handle.dialable_addrs()[0].to_string()
    }
}

pub(crate) fn manifest() -> ModelManifest {
    ModelManifest {
        architecture: Text::new("ltx-video").unwrap(),
        files: List::first_of([ModelFile {
            path: Text::new("model.safetensors").unwrap(),
            len: 1,
            blake3: BlobId::of(b"x"),
        }]),
        rules: ModelRules { size_multiple: 32, frames_multiple: 8, frames_offset: 1, max_prompt_tokens: 128 },
        defaults: ModelDefaults {
            frames: 17,
            width: 64,
            height: 64,
            fps: Micro::whole(8),
            steps: 4,
            guidance: Micro::whole(3),
        },
        work: WorkModel::ltx_2b(),
    }
}

/// Starts a peer with this key that does as the script says.
pub(crate) async fn start(seed: u8, script: Script) -> Peer {
    let key = Keypair::from_seed(&[seed; 32]);
    let config = NetConfig::node(key.clone(), network(), 0).on_loopback();
    let (handle, events) = kinoflock_net::start(config).await.unwrap();
    let blobs = MemoryBlobs::new();
    blobs.insert(CLIP.to_vec()).unwrap();
    handle.serve_blobs(Arc::new(blobs));
    let (heard, answers) = mpsc::channel(8);
    let (cancelled, cancels) = mpsc::channel(8);
    let (released, releases) = mpsc::channel(8);
    let streams = Arc::new(AtomicU32::new(0));
    let state = State { key, script, job: None, first_job: None, streams, heard, cancelled, released };
    tokio::spawn(state.serve(events));
    Peer { handle, answers, cancels, releases }
}

fn out_of_memory<const CODE: usize, const TEXT: usize>() -> (Text<CODE>, Text<TEXT>) {
    (Text::new("out_of_memory").unwrap(), Text::new("device memory is full").unwrap())
}

/// A node that is not there.
fn other() -> Keypair {
    Keypair::from_seed(&[200; 32])
}

struct State {
    key: Keypair,
    script: Script,
    job: Option<Envelope>,
    first_job: Option<Envelope>,
    streams: Arc<AtomicU32>,
    heard: mpsc::Sender<Verdict>,
    cancelled: mpsc::Sender<JobId>,
    released: mpsc::Sender<ReleaseReason>,
}

impl State {
    async fn serve(mut self, mut events: NetEvents) {
        while let Some(event) = events.recv().await {
            match event {
                NetEvent::Request { request, responder, .. } => {
                    let response = self.answer(*request);
                    responder.send(response).unwrap();
                }
                NetEvent::Progress { query, from_seq, sink, .. } => {
                    let node = self.key.node_id();
                    ValidQuery::parse(&query, &network(), self.now(), &node).unwrap();
                    self.tell(sink, from_seq);
                }
                _ => {}
            }
        }
    }

    fn now(&self) -> UnixMillis {
        UnixMillis(kinoflock_client::now().0.saturating_add_signed(self.script.ahead_ms))
    }

    fn seal<T: Message>(&self, value: &T) -> Envelope {
        Envelope::seal(&self.key, &network(), value).unwrap()
    }

    fn answer(&mut self, request: Request) -> Response {
        match request {
            Request::Capacity if self.script.borrowed_advert => {
                Response::Capacity(Envelope::seal(&other(), &network(), &self.capacity()).unwrap())
            }
            Request::Capacity => Response::Capacity(self.seal(&self.capacity())),
            Request::FindNodes(_) => Response::Nodes(List::empty()),
            Request::Manifest(_) => Response::Manifest(Bytes::new(manifest().encode()).unwrap()),
            Request::Quote(_) if self.script.refuses => {
                Response::Refused(Refusal::new(Reason::TooLarge, "max_frames").limit(9, 17))
            }
            Request::Quote(request) if self.script.borrowed_quote => {
                Response::Quote(Envelope::seal(&other(), &network(), &self.quote(&request)).unwrap())
            }
            Request::Quote(request) => Response::Quote(self.seal(&self.quote(&request))),
            Request::Submit { order, job, .. } => self.take(&order, job),
            Request::Status(query) => {
                let job =
                    ValidQuery::parse(&query, &network(), self.now(), &self.key.node_id()).unwrap().query.job;
                if self.job.is_none() {
                    return Response::Refused(Refusal::new(Reason::JobUnknown, ""));
                }
                let failed = self.script.failed;
                let state = if failed { JobState::Failed } else { JobState::Running };
                let error = failed.then(|| {
                    let (code, text) = out_of_memory();
                    JobFailure { code, text, retryable: true }
                });
                let (seq, position) = (0, 0);
                let (eta, receipt, replicas) = (Millis(1), None, List::empty());
                Response::Status(JobStatus { job, state, seq, position, eta, receipt, replicas, error })
            }
            Request::Answer(envelope) => {
                let answer = envelope.open::<ReceiptAnswer>(&network()).unwrap();
                self.heard.try_send(answer.value.verdict).unwrap();
                Response::Acknowledged
            }
            Request::Cancel(query) => {
                let query = ValidQuery::parse(&query, &network(), self.now(), &self.key.node_id()).unwrap();
                self.cancelled.try_send(query.query.job).unwrap();
                Response::Cancelled { job: query.query.job }
            }
            Request::Release { reason, .. } => {
                self.released.try_send(reason).unwrap();
                Response::Acknowledged
            }
            _ => Response::Acknowledged,
        }
    }

    fn take(&mut self, order: &Envelope, job: Envelope) -> Response {
        let valid = match ValidJob::parse(&job, &network(), self.now(), None) {
            Ok(valid) => valid,
            Err(error) => return Response::error(error.code(), &error.to_string()),
        };
        if let Err(error) = ValidOrder::parse(order, &network(), self.now(), &self.key.node_id(), &valid) {
            return Response::error(error.code(), &error.to_string());
        }
        self.first_job.get_or_insert_with(|| job.clone());
        self.job = Some(job);
        Response::Accepted { job: valid.id(), position: 0, eta: Millis(1000) }
    }

    fn quote(&self, request: &QuoteRequest) -> Quote {
        Quote {
            request: request.hash(),
            requester: request.requester,
            lease: LeaseId::from_bytes([1; 16]),
            issued_at: self.now(),
            expires_at: self.now().plus(Millis(15_000)),
            position: 0,
            eta: Millis(if self.script.eta_ms == 0 { 1000 } else { self.script.eta_ms }),
            work: request.work,
            speed: 1000,
            max_input_bytes: 0,
        }
    }

    fn tell(&self, sink: ProgressSink, from_seq: u64) {
        let Some(job) = self.job.clone() else {
            return sink.refuse(Refusal::new(Reason::JobUnknown, ""));
        };
        let breaks = self.streams.fetch_add(1, Ordering::SeqCst) < self.script.breaks;
        let done = self.first_job.as_ref().filter(|_| self.script.old_receipt).unwrap_or(&job);
        let number = receipt(&job).job;
        let mut made = receipt(done);
        made.node = self.key.node_id();
        if self.script.wrong_seed {
            made.seed += 1;
        }
        let last = if self.script.fails {
            let (code, text) = out_of_memory();
            JobEvent::Failed { code, text, retryable: true }
        } else {
            let signer = if self.script.borrowed_receipt { other() } else { self.key.clone() };
            made.node = signer.node_id();
            JobEvent::Done { receipt: Envelope::seal(&signer, &network(), &made).unwrap() }
        };
        let step = |done| JobEvent::Step { done, total: 4, eta: Millis(1) };
        let events = [JobEvent::Loading, step(1), step(2), step(3), step(4), JobEvent::Encoding, last];
        let sender = sink.accept();
        let holds = self.script.holds;
        tokio::spawn(async move {
            for (seq, event) in (0..).zip(events).filter(|(seq, _)| *seq >= from_seq) {
                let told = sender.send(Progress { job: number, seq, event }).await;
                if told.is_err() || breaks {
                    return;
                }
                if holds {
                    return sender.closed().await;
                }
            }
        });
    }

    fn capacity(&self) -> Capacity {
        Capacity {
            issued_at: self.now(),
            sequence: 1,
            name: Text::new("attic").unwrap(),
            addresses: List::empty(),
            models: List::first_of([Offer {
                model: manifest().id(),
                name: Text::new("motif").unwrap(),
                architecture: Text::new("ltx-video").unwrap(),
                speed: 1000,
                devices: 1,
                loaded: true,
                self_test: SelfTest::Unreferenced { at: UnixMillis(1) },
            }]),
            devices: List::empty(),
            limits: OfferLimits::default(),
            queue: QueueState::default(),
            state: Default::default(),
            serves: Serves {
                public_bps: 2500,
                collectives: List::first_of(self.script.collective),
                ..Serves::default()
            },
            terms: Terms::default(),
            content_rules: false,
            protocol_versions: List::empty(),
            engine: Text::default(),
        }
    }
}

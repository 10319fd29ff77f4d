//! What several tests of the client need: a home folder, the real command, a signed job and receipt for a real clip.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Output};

use kinoflock_client::store::{JobRecord, RecordState};
use kinoflock_protocol::capacity::DeviceClass;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::receipt::{Receipt, ReceiptAnswer, ValidReceipt, Verdict};
use kinoflock_protocol::*;

/// 17 frames of 64x64 at 8 a second, H.264: `ffmpeg -f lavfi -i testsrc=size=64x64:rate=8 -frames:v 17`.
pub const CLIP: &[u8] = include_bytes!("../data/clip.mp4");
pub const PROMPT: &str = "a paper boat <drifts> & turns";

pub fn network() -> NetworkId {
    NetworkId::named("test")
}

pub fn artist() -> Keypair {
    Keypair::from_seed(&[1; 32])
}

pub fn node() -> Keypair {
    Keypair::from_seed(&[2; 32])
}

/// A folder for configuration, keys and store.
pub struct Home(tempfile::TempDir);

impl Home {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The real command in this home, with no network but loopback.
    pub fn kinoflock(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kinoflock"));
        command.args(arguments).current_dir(self.path()).env_clear();
        command.env("KINOFLOCK_HOME", self.path()).env("KINOFLOCK_NETWORK", "test");
        command.env("KINOFLOCK_MDNS", "off").env("KINOFLOCK_LOCAL", "off").env("KINOFLOCK_AUDIT_SHARE", "0");
        command
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A signed job for [`CLIP`].
pub fn job(number: u64) -> Envelope {
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    let shape = JobShape { frames: 17, width: 64, height: 64, steps: 4, guided: true };
    let prompt = Prompt::new(PROMPT).unwrap();
    let model = ModelId::from_bytes([9; 32]);
    let at = UnixMillis(1_800_000_000_000);
    let mut spec = JobSpec::generate(model, prompt, Nonce::from_bytes(nonce), at, shape);
    spec.fps = Micro::whole(8);
    spec.seed = 7;
    spec.artist = Some(Text::new("Ada & Co").unwrap());
    Envelope::seal(&artist(), &network(), &spec).unwrap()
}

/// The receipt for a job that made [`CLIP`].
pub fn receipt(job: &Envelope) -> Receipt {
    let spec = job.open::<JobSpec>(&network()).unwrap().value;
    let at = |ms: u64| UnixMillis(1_800_000_000_000 + ms);
    Receipt {
        job: JobId::of(job, &network()),
        requester: artist().requester_id(),
        node: node().node_id(),
        collective: None,
        model: spec.model,
        cards: List::empty(),
        adapters: List::empty(),
        clip: ClipId::of(CLIP),
        clip_len: CLIP.len() as u64,
        latents: None,
        parents: List::empty(),
        inputs: List::empty(),
        seed: spec.seed,
        steps: spec.steps,
        step_root: None,
        segments: List::empty(),
        work: Work(1000),
        device: DeviceClass::Cpu,
        engine: Text::new("kinoflock 0.1.0").unwrap(),
        accepted_at: at(0),
        started_at: at(10),
        finished_at: at(2000),
        claimed_joules: None,
        chain: ChainId::from_bytes([5; 32]),
        sequence: 0,
        previous: None,
    }
}

pub fn signed_receipt(job: &Envelope) -> Envelope {
    Envelope::seal(&node(), &network(), &receipt(job)).unwrap()
}

pub fn answer(receipt: &Envelope) -> Envelope {
    let valid = ValidReceipt::parse(receipt, &network()).unwrap();
    let answer = ReceiptAnswer {
        receipt: valid.id(),
        job: valid.receipt().job,
        verdict: Verdict::Accept,
        answered_at: UnixMillis(1_800_000_003_000),
    };
    Envelope::seal(&artist(), &network(), &answer).unwrap()
}

/// The record of a job that is under way.
pub fn job_record(number: u64) -> JobRecord {
    let envelope = job(number);
    JobRecord {
        job: JobId::of(&envelope, &network()),
        network: network(),
        envelope,
        order: None,
        node: node().node_id(),
        node_name: "attic".to_owned(),
        addresses: vec!["/ip4/127.0.0.1/tcp/1".to_owned()],
        model: ModelId::from_bytes([9; 32]),
        model_name: "motif".to_owned(),
        created_at: UnixMillis(1_800_000_000_000 + number % 1000),
        updated_at: UnixMillis(1_800_000_000_000),
        clock_skew_ms: 0,
        told: None,
        state: RecordState::Queued,
        next_seq: 0,
        error: None,
        receipt: None,
        clip: None,
        latents: None,
        answer: None,
        answered: false,
        require_terms: false,
        pinned: false,
        former: Vec::new(),
        checkpoint: None,
        custodians: Vec::new(),
        holders: Vec::new(),
        batch: None,
        audits: Default::default(),
    }
}

/// The record of a job whose clip is here.
pub fn done_record() -> JobRecord {
    let mut record = job_record(1);
    let receipt = signed_receipt(&record.envelope);
    record.answer = Some(answer(&receipt));
    record.receipt = Some(receipt);
    record.clip = Some(BlobRef::of(CLIP));
    record.state = RecordState::Done;
    record.answered = true;
    record
}

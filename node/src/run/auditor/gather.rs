//! What an audit needs from others: the states around one step from their maker, the clip, and latents that were given.
//!
//! Each is bounded by what the job can need, and is written to a folder of its own, which is erased with the audit.

use std::path::PathBuf;
use std::time::Duration;

use kinoflock_net::{FetchError, FetchOptions, FileSink, HolderFault, MemorySink, Multiaddr, NetHandle};
use kinoflock_protocol::audit::{
    AuditDifference, AuditObstacle, AuditOrder, AuditOutcome, AuditReply, AuditRequest, Opening,
    ValidAuditOrder, opened, own_steps,
};
use kinoflock_protocol::codec::Text;
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{BlobId, Keypair, NetworkId, NodeId, Nonce};
use kinoflock_protocol::ops::reaching_in;
use kinoflock_protocol::refusal::Reason;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::seal::{SealKey, open_bytes, sealed_len};

use super::super::adapters;
use super::super::inputs::pictures;
use super::super::jobs::wire_path;
use super::super::unix_now;
use crate::engine::wire::{StatePaths, WirePath, input_name};

/// Longest wait for the maker's answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// Time for everything that is fetched.
const WITHIN: Duration = Duration::from_secs(300);
/// Bytes of a file beyond its pixels.
const OVERHEAD: u64 = 64 * 1024;
/// Bytes of latents or of a clip per pixel, at most: one f32 value.
const BYTES_PER_PIXEL: u64 = 4;
/// Greatest file whatever the job's size, in bytes (1 GiB).
const MAX_FILE: u64 = 1 << 30;

/// What is to be had for an audit, and how.
pub(super) struct Gather {
    pub(super) net: NetHandle,
    pub(super) keypair: Keypair,
    pub(super) network: NetworkId,
    pub(super) addresses: Vec<Multiaddr>,
    pub(super) valid: ValidAuditOrder,
    pub(super) order: AuditOrder,
    /// Who ordered it, and serves the clip and what was given with the job.
    pub(super) asker: NodeId,
    pub(super) folder: PathBuf,
}

/// What was had.
#[derive(Debug)]
pub(in super::super) struct Gathered {
    pub(super) step: u32,
    pub(super) openings: Vec<Opening>,
    pub(super) states: StatePaths,
    pub(super) clip: WirePath,
    pub(super) initial_latents: Option<WirePath>,
    /// The folder of adapters, where there are some.
    pub(super) inputs: Option<WirePath>,
}

/// Why nothing can be computed: what is to be signed then.
#[derive(Debug)]
pub(in super::super) struct Missed {
    pub(super) step: u32,
    pub(super) outcome: AuditOutcome,
}

impl Gather {
    /// Draws a step and fetches what is needed to look at it.
    pub(super) async fn run(self) -> Result<Gathered, Missed> {
        if let Some(op) = reaching_in(self.valid.job.spec()) {
            let why = format!("the steps of a run with {op} do not follow from each other");
            return Err(Missed { step: 0, outcome: could_not(AuditObstacle::Auditor, why) });
        }
        if pictures(self.valid.job.spec()).next().is_some() {
            let why = "the steps of a clip from pictures are no change along the model's output alone";
            return Err(Missed { step: 0, outcome: could_not(AuditObstacle::Auditor, why) });
        }
        let step = self.draw().map_err(|outcome| Missed { step: 0, outcome })?;
        let late = || could_not(AuditObstacle::Unreachable, format!("not had within {} s", WITHIN.as_secs()));
        let gathered = tokio::time::timeout(WITHIN, self.fetch(step)).await;
        gathered.unwrap_or_else(|_| Err(late())).map_err(|outcome| Missed { step, outcome })
    }

    /// One of the steps that the maker did itself, each as likely as every other.
    fn draw(&self) -> Result<u32, AuditOutcome> {
        let (first, count) = own_steps(self.valid.receipt.receipt());
        if count == 0 || first.checked_add(count).is_none_or(|end| end > self.valid.job.spec().steps) {
            // Signed by the maker, and no steps of this job.
            return Err(AuditOutcome::Differs(AuditDifference::Opening));
        }
        let random = random::<8>()?;
        Ok(first + (u64::from_le_bytes(random) % u64::from(count)) as u32)
    }

    async fn fetch(&self, step: u32) -> Result<Gathered, AuditOutcome> {
        let maker = self.order.maker.id;
        let reached = self.net.connect(maker, self.addresses.clone()).await;
        reached.map_err(|error| could_not(AuditObstacle::Unreachable, error))?;
        let openings = self.openings(self.ask(step).await?, step)?;
        let made = tokio::fs::create_dir_all(&self.folder).await;
        made.map_err(|error| could_not(AuditObstacle::Auditor, error))?;
        let mut files = Vec::with_capacity(openings.len());
        for opening in &openings {
            files.push((opening.index, self.state(opening).await?));
        }
        let at = |index: u32| {
            let found = files.iter().find(|(place, _)| *place == index).map(|(_, file)| file.clone());
            found.ok_or(AuditOutcome::Differs(AuditDifference::Opening))
        };
        let steps = self.valid.job.spec().steps;
        let states = StatePaths { start: at(0)?, before: at(step)?, after: at(step + 1)?, end: at(steps)? };
        let (clip, given) = (self.valid.receipt.receipt().clip, self.valid.job.spec().initial_latents);
        let clip = self.given(clip.into(), "clip.mp4").await?;
        let initial_latents = match given {
            Some(blob) => Some(self.given(blob.id, "given.safetensors").await?),
            None => None,
        };
        let inputs = self.adapters().await?;
        Ok(Gathered { step, openings, states, clip, initial_latents, inputs })
    }

    /// Fetches the job's adapters; gives their folder. Their sizes were checked with the order.
    async fn adapters(&self) -> Result<Option<WirePath>, AuditOutcome> {
        let files = adapters::files(self.valid.job.spec());
        for (id, len) in &files {
            let name = input_name(id);
            let options = FetchOptions { max_len: *len, ..FetchOptions::default() };
            let (holders, sink) = ([self.asker, self.order.maker.id], FileSink::new(self.folder.join(&name)));
            let fetched = self.net.fetch_blob(*id, &holders, sink, options).await;
            fetched.map_err(|error| could_not(AuditObstacle::Unreachable, format!("{name}: {error}")))?;
        }
        let folder = (!files.is_empty()).then(|| wire_path(&self.folder)).transpose();
        folder.map_err(|error| could_not(AuditObstacle::Auditor, error))
    }

    /// Asks the maker for a step.
    async fn ask(&self, step: u32) -> Result<AuditReply, AuditOutcome> {
        let receipt = &self.valid.receipt;
        let request = AuditRequest {
            job: receipt.receipt().job,
            receipt: receipt.id(),
            node: receipt.receipt().node,
            step,
            issued_at: unix_now(),
            nonce: Nonce::from_bytes(random()?),
        };
        let request = Envelope::seal(&self.keypair, &self.network, &request)
            .map_err(|error| could_not(AuditObstacle::Auditor, error))?;
        let request = Request::Audit { request, grant: Some(self.order.grant.clone()) };
        match self.net.request_within(receipt.receipt().node, request, ANSWER_WITHIN).await {
            Ok(Response::Audit(reply)) => Ok(reply),
            Ok(Response::Refused(refusal)) => Err(match refusal.reason {
                Reason::Busy | Reason::ClockSkew => could_not(AuditObstacle::Unreachable, refusal),
                _ => could_not(AuditObstacle::Withheld, refusal),
            }),
            Ok(Response::Busy { .. }) => Err(could_not(AuditObstacle::Unreachable, "it is busy")),
            Ok(other) => {
                Err(could_not(AuditObstacle::Withheld, format!("the maker answered {}", other.name())))
            }
            Err(error) => Err(could_not(AuditObstacle::Unreachable, error)),
        }
    }

    /// The openings, if they are those that belong to this step.
    fn openings(&self, reply: AuditReply, step: u32) -> Result<Vec<Opening>, AuditOutcome> {
        let steps = self.valid.job.spec().steps;
        let indexes = reply.openings.iter().map(|opening| opening.index);
        if reply.leaves != u64::from(steps) + 1 || !indexes.eq(opened(step, steps)) {
            return Err(AuditOutcome::Differs(AuditDifference::Opening));
        }
        Ok(reply.openings.into_vec())
    }

    /// One state, its seal opened.
    async fn state(&self, opening: &Opening) -> Result<WirePath, AuditOutcome> {
        let sealed = self.blob(opening.sealed.id, &[self.order.maker.id], sealed_len(self.most())).await;
        let sealed = sealed.map_err(|error| {
            let obstacle = if is_no(&error) { AuditObstacle::Withheld } else { AuditObstacle::Unreachable };
            could_not(obstacle, format!("a state of the latents: {error}"))
        })?;
        let key = SealKey::of_job(&self.order.job);
        let plain = open_bytes(&key, &sealed);
        let plain = plain.map_err(|_| AuditOutcome::Differs(AuditDifference::Opening))?;
        self.write(&format!("state-{}.safetensors", opening.index), plain).await
    }

    /// What the one who ordered the audit has, and perhaps the maker.
    async fn given(&self, id: BlobId, name: &str) -> Result<WirePath, AuditOutcome> {
        let bytes = self.blob(id, &[self.asker, self.order.maker.id], self.most()).await;
        let bytes =
            bytes.map_err(|error| could_not(AuditObstacle::Unreachable, format!("{name}: {error}")))?;
        self.write(name, bytes).await
    }

    async fn blob(&self, id: BlobId, holders: &[NodeId], max_len: u64) -> Result<Vec<u8>, FetchError> {
        let options = FetchOptions { max_len, ..FetchOptions::default() };
        let fetched = self.net.fetch_blob(id, holders, MemorySink::new(), options).await;
        fetched.map(|(sink, _)| sink.into_bytes())
    }

    async fn write(&self, name: &str, bytes: Vec<u8>) -> Result<WirePath, AuditOutcome> {
        let path = self.folder.join(name);
        let written = tokio::fs::write(&path, bytes).await.map_err(|error| error.to_string());
        written.and_then(|()| wire_path(&path)).map_err(|error| could_not(AuditObstacle::Auditor, error))
    }

    /// Most bytes that any file of this job can have.
    fn most(&self) -> u64 {
        let shape = self.valid.job.spec().shape();
        // Latents have as many values as there are pixels at most, some frames at the end filled up.
        let pixels = u64::from(shape.width)
            .saturating_mul(u64::from(shape.height))
            .saturating_mul(u64::from(shape.frames).saturating_add(8));
        pixels.saturating_mul(BYTES_PER_PIXEL).saturating_add(OVERHEAD).min(MAX_FILE)
    }
}

/// Whether a holder was reached and does not give it, as opposed to one that was not reached.
fn is_no(error: &FetchError) -> bool {
    let faults = match error {
        FetchError::AllFailed { holders, .. } => holders,
        FetchError::TooLarge { .. } => return true,
        _ => return false,
    };
    let no = |fault: &HolderFault| {
        fault.is_lie()
            || matches!(fault, HolderFault::NotFound | HolderFault::Refused(_) | HolderFault::TooLarge { .. })
    };
    faults.iter().any(|holder| holder.fault.as_ref().is_some_and(no))
}

fn random<const N: usize>() -> Result<[u8; N], AuditOutcome> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| could_not(AuditObstacle::Auditor, error))?;
    Ok(bytes)
}

fn could_not(obstacle: AuditObstacle, why: impl std::fmt::Display) -> AuditOutcome {
    AuditOutcome::CouldNotLook { obstacle, why: Text::truncated(&why.to_string()) }
}

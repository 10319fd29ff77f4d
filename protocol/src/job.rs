//! What an artist asks for: [`JobSpec`] as it was signed, and [`ValidJob`], which alone a node or client acts on.
//!
//! `JobSpec` is untrusted content; [`ValidJob::parse`] checks the signature, the time, whom it is addressed to, and
//! what no model could ever compute (zero frames, zero steps). What a given model can make is asked of its
//! [`crate::model::ModelRules`], and what an operator allows is the operator's own policy. Nothing is clamped.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::clip::BlobRef;
use crate::codec::{List, Text, TooLong, text_i64, text_u64};
use crate::envelope::{Envelope, EnvelopeError, Kind, Message};
use crate::id::{
    BlobId, BodyHash, CardId, ClipId, CollectiveId, JobId, ModelId, NetworkId, NodeId, Nonce, RequesterId,
};
use crate::limits::*;
use crate::units::{Micro, Millis, UnixMillis};
use crate::work::JobShape;

/// A prompt. It is shown to nobody by accident: its `Debug` form tells only its length.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Prompt(Text<MAX_PROMPT>);

impl Prompt {
    /// Takes a prompt of at most [`MAX_PROMPT`] bytes.
    pub fn new(text: impl Into<String>) -> Result<Self, TooLong> {
        Text::new(text).map(Self)
    }

    /// The words.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl fmt::Debug for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<prompt of {} bytes>", self.0.len())
    }
}

/// A signed request for one clip, or for one adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Random: makes two otherwise equal jobs two.
    pub nonce: Nonce,
    /// When it was signed, by the requester's clock.
    pub issued_at: UnixMillis,
    /// When its result is of no more use.
    pub deadline: Option<UnixMillis>,
    /// What is to be done.
    pub kind: JobKind,
    /// The model that does it.
    pub model: ModelId,
    /// Adapters on top of the model, in order.
    pub adapters: List<Adapter, MAX_ADAPTERS>,
    /// What is to be seen.
    pub prompt: Prompt,
    /// What is not to be seen.
    pub negative_prompt: Prompt,
    /// Seed of the initial noise.
    #[serde(with = "text_u64")]
    pub seed: u64,
    /// Number of frames.
    pub frames: u32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Frames per second.
    pub fps: Micro,
    /// Number of denoising steps.
    pub steps: u32,
    /// Classifier-free guidance scale; 1 means none.
    pub guidance: Micro,
    /// Guidance rescale (Lin et al. 2023); 0 means none.
    pub guidance_rescale: Micro,
    /// Image that the clip begins with.
    pub start_image: Option<BlobRef>,
    /// Image that the clip ends with.
    pub end_image: Option<BlobRef>,
    /// Images at given frames.
    pub keyframes: List<Keyframe, MAX_KEYFRAMES>,
    /// Latents to begin from, a safetensors file, instead of noise from the seed.
    pub initial_latents: Option<BlobRef>,
    /// Clip to be continued.
    pub extend: Option<BlobRef>,
    /// Clips that this one comes from.
    pub parents: List<ClipId, MAX_PARENTS>,
    /// What is to come back beside the clip.
    pub returns: Returns,
    /// How wide the clip may be announced.
    pub share: Share,
    /// Who may run it.
    pub addressed_to: Audience,
    /// Nodes that may hand the job on while the requester is away.
    pub custodians: List<NodeId, MAX_CUSTODIANS>,
    /// Proof that the requester belongs to a collective.
    pub membership: Option<Membership>,
    /// Further operations by name. A node that does not know one refuses the job and says which.
    pub ops: List<Op, MAX_OPS>,
    /// Name that the clip is to carry.
    pub artist: Option<Text<MAX_NAME>>,
    /// Licence that the clip is to carry.
    pub licence: Option<Text<MAX_NAME>>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobKind {
    /// Make a clip.
    Generate,
    /// Train an adapter.
    Train(TrainSpec),
}

/// How an adapter is to be trained; seed, frames, size and steps are those of the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// The dataset's index file.
    pub dataset: BlobRef,
    /// The dataset's card.
    pub card: Option<CardId>,
    /// Rank of the adapter's matrices.
    pub rank: u32,
    /// Scale of the adapter.
    pub alpha: Micro,
    /// Learning rate in billionths.
    #[serde(with = "text_u64")]
    pub learning_rate_nano: u64,
    /// Clips for each step.
    pub batch: u32,
}

/// An adapter and how strongly it acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapter {
    /// Its weights.
    pub weights: BlobRef,
    /// How strongly it acts; any number, 1 is as trained.
    pub scale: Micro,
    /// Its card, if it has one.
    pub card: Option<CardId>,
}

/// An image that a given frame is to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyframe {
    /// Which frame, from 0.
    pub frame: u32,
    /// The image.
    pub image: BlobRef,
    /// How strongly, 1 is fully.
    pub strength: Micro,
}

/// What is to come back beside the clip.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Returns {
    /// The final latents.
    pub latents: bool,
    /// Signed checkpoints every so many steps; 0 means none.
    pub checkpoint_every: u32,
    /// Small previews while it runs.
    pub previews: bool,
    /// The root over the hashes of each step's latents.
    pub step_root: bool,
}

/// How wide a clip may be announced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Share {
    /// To nobody.
    #[default]
    None,
    /// To the collective's nodes.
    Collective,
    /// To everybody.
    Public,
}

/// Who may run a job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Audience {
    /// Any node.
    #[default]
    Anyone,
    /// This node only.
    Node(NodeId),
    /// Nodes of this collective only.
    Collective(CollectiveId),
}

/// A claim to belong to a collective, with what proves it to that collective's nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Which collective.
    pub collective: CollectiveId,
    /// The proof, in the form that the collective's charter asks for.
    pub proof: crate::codec::Bytes<MAX_MEMBERSHIP>,
}

/// A further operation by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Op {
    /// Its name, such as `timesteps` or `latents.shift`.
    pub name: Text<MAX_NAME>,
    /// Its value.
    pub value: OpValue,
}

/// The value of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum OpValue {
    /// Yes or no.
    Flag(bool),
    /// A whole number.
    Whole(#[serde(with = "text_i64")] i64),
    /// A number.
    Number(Micro),
    /// Several numbers.
    Numbers(List<Micro, MAX_OP_NUMBERS>),
    /// A text.
    Text(Text<MAX_LINE>),
    /// A blob.
    Blob(BlobRef),
}

impl Message for JobSpec {
    const KIND: Kind = Kind::Job;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = MAX_ENVELOPE_BODY;
}

impl JobSpec {
    /// A job to generate a clip of this shape, with everything else left open: no guidance, no inputs, anyone.
    pub fn generate(
        model: ModelId,
        prompt: Prompt,
        nonce: Nonce,
        issued_at: UnixMillis,
        shape: JobShape,
    ) -> Self {
        Self {
            nonce,
            issued_at,
            deadline: None,
            kind: JobKind::Generate,
            model,
            adapters: List::empty(),
            prompt,
            negative_prompt: Prompt::default(),
            seed: 0,
            frames: shape.frames,
            width: shape.width,
            height: shape.height,
            fps: Micro::whole(24),
            steps: shape.steps,
            guidance: if shape.guided { Micro::whole(3) } else { Micro::ONE },
            guidance_rescale: Micro::ZERO,
            start_image: None,
            end_image: None,
            keyframes: List::empty(),
            initial_latents: None,
            extend: None,
            parents: List::empty(),
            returns: Returns::default(),
            share: Share::None,
            addressed_to: Audience::Anyone,
            custodians: List::empty(),
            membership: None,
            ops: List::empty(),
            artist: None,
            licence: None,
        }
    }

    /// What decides how much the job costs.
    pub fn shape(&self) -> JobShape {
        JobShape {
            frames: self.frames,
            width: self.width,
            height: self.height,
            steps: self.steps,
            guided: self.guidance != Micro::ONE,
        }
    }

    /// Every blob that a node must have before it can run the job.
    pub fn inputs(&self) -> Vec<BlobRef> {
        let images = [self.start_image, self.end_image, self.initial_latents, self.extend];
        let mut inputs: Vec<_> = images.into_iter().flatten().collect();
        inputs.extend(self.keyframes.iter().map(|k| k.image));
        inputs.extend(self.adapters.iter().map(|a| a.weights));
        inputs.extend(self.ops.iter().filter_map(|op| match op.value {
            OpValue::Blob(blob) => Some(blob),
            _ => None,
        }));
        if let JobKind::Train(train) = &self.kind {
            inputs.push(train.dataset);
        }
        inputs.sort_unstable();
        inputs.dedup();
        inputs
    }

    /// Ids of the adapters' weights.
    pub fn adapter_ids(&self) -> Vec<BlobId> {
        self.adapters.iter().map(|a| a.weights.id).collect()
    }

    /// When the job is over if nothing came of it.
    pub fn expires_at(&self) -> UnixMillis {
        self.deadline.unwrap_or(self.issued_at.plus(Millis(JOB_LIFE_MS)))
    }

    /// Checks what no model could compute and no clock could meet.
    pub fn check(&self, now: UnixMillis) -> Result<(), JobError> {
        let least = |what: &'static str, given: u32| match given {
            0 => Err(JobError::Zero { what }),
            _ => Ok(()),
        };
        least("frames", self.frames)?;
        least("width", self.width)?;
        least("height", self.height)?;
        least("steps", self.steps)?;
        if self.fps <= Micro::ZERO {
            return Err(JobError::Fps { given: self.fps });
        }
        if let Some(late) = self.keyframes.iter().find(|k| k.frame >= self.frames) {
            return Err(JobError::KeyframeBeyondEnd { frames: self.frames, given: late.frame });
        }
        if self.extend.is_some_and(|clip| !self.parents.contains(&ClipId::from(clip.id))) {
            return Err(JobError::NoParent);
        }
        if let Some(large) = self.inputs().into_iter().find(|blob| blob.len > MAX_BLOB_BYTES) {
            return Err(JobError::InputTooLarge { limit: MAX_BLOB_BYTES, given: large.len });
        }
        if let JobKind::Train(train) = &self.kind {
            least("rank", train.rank)?;
            least("batch", train.batch)?;
        }
        check_issued(self.issued_at, now)
            .map_err(|skew| JobError::ClockSkew { skew, limit: Millis(MAX_CLOCK_SKEW_MS) })?;
        let expired_at = self.expires_at();
        if expired_at <= now {
            return Err(JobError::Expired { expired_at, now });
        }
        Ok(())
    }
}

/// Who asks whether a job is theirs to run.
#[derive(Debug, Clone, Copy)]
pub struct Addressee<'a> {
    /// The node.
    pub node: &'a NodeId,
    /// The collectives that it belongs to.
    pub collectives: &'a [CollectiveId],
}

/// Why a job is no job for here and now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The signed envelope is refused.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// A count that must be at least one.
    #[error("{what}: 0 is below the least possible, 1")]
    Zero {
        /// Which field.
        what: &'static str,
    },
    /// Frames per second of zero or less.
    #[error("fps: {given} is not above 0")]
    Fps {
        /// Value given.
        given: Micro,
    },
    /// A keyframe that the clip does not reach.
    #[error("keyframe {given} lies beyond the last frame, {}", frames.saturating_sub(1))]
    KeyframeBeyondEnd {
        /// Frames of the clip.
        frames: u32,
        /// Frame given, from 0.
        given: u32,
    },
    /// A continued clip without lineage.
    #[error("a job that extends a clip must name it among its parents")]
    NoParent,
    /// An input beyond the protocol's limit.
    #[error("input of {given} bytes exceeds the limit of {limit} bytes")]
    InputTooLarge {
        /// Greatest length in bytes.
        limit: u64,
        /// Length given in bytes.
        given: u64,
    },
    /// Signed in the future.
    #[error("issued {skew} in the future, more than the limit of {limit}: one of the two clocks is wrong")]
    ClockSkew {
        /// How far in the future.
        skew: Millis,
        /// How far it may be.
        limit: Millis,
    },
    /// Its deadline, or the life of a job without one, is over.
    #[error("job expired at {expired_at}, it is now {now}")]
    Expired {
        /// When it expired.
        expired_at: UnixMillis,
        /// The time here.
        now: UnixMillis,
    },
    /// For another node.
    #[error("job is addressed to node {addressed}, this is {here}")]
    ForAnotherNode {
        /// Whom it is for.
        addressed: NodeId,
        /// This node.
        here: NodeId,
    },
    /// For a collective that this node does not belong to.
    #[error("job is addressed to collective {addressed}, to which this node does not belong")]
    ForAnotherCollective {
        /// Which collective.
        addressed: CollectiveId,
    },
}

impl JobError {
    /// Stable name for the wire and for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Envelope(error) => error.code(),
            Self::Zero { .. } => "zero",
            Self::Fps { .. } => "fps",
            Self::KeyframeBeyondEnd { .. } => "keyframe_beyond_end",
            Self::NoParent => "no_parent",
            Self::InputTooLarge { .. } => "input_too_large",
            Self::ClockSkew { .. } => "clock_skew",
            Self::Expired { .. } => "expired",
            Self::ForAnotherNode { .. } => "for_another_node",
            Self::ForAnotherCollective { .. } => "for_another_collective",
        }
    }
}

/// A job whose signature, time, addressee and arithmetic were checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidJob {
    id: JobId,
    requester: RequesterId,
    body_hash: BodyHash,
    spec: JobSpec,
}

impl ValidJob {
    /// Checks a signed job against the time and, on a node, against who that node is.
    pub fn parse(
        envelope: &Envelope,
        network: &NetworkId,
        now: UnixMillis,
        addressee: Option<Addressee<'_>>,
    ) -> Result<Self, JobError> {
        let job = Self::parse_stored(envelope, network)?;
        if let Some(here) = addressee {
            job.check_addressee(here)?;
        }
        job.spec.check(now)?;
        Ok(job)
    }

    /// A job from one's own store, which was checked when it came and whose time may be over.
    pub fn parse_stored(envelope: &Envelope, network: &NetworkId) -> Result<Self, JobError> {
        let opened = envelope.open::<JobSpec>(network)?;
        Ok(Self {
            id: JobId::of(envelope, network),
            requester: opened.signer.into(),
            body_hash: opened.body_hash,
            spec: opened.value,
        })
    }

    /// Its id.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// Who asks.
    pub fn requester(&self) -> RequesterId {
        self.requester
    }

    /// blake3 of the signed body.
    pub fn body_hash(&self) -> BodyHash {
        self.body_hash
    }

    /// What is asked.
    pub fn spec(&self) -> &JobSpec {
        &self.spec
    }

    /// Gives the spec back.
    pub fn into_spec(self) -> JobSpec {
        self.spec
    }

    fn check_addressee(&self, here: Addressee<'_>) -> Result<(), JobError> {
        match self.spec.addressed_to {
            Audience::Node(addressed) if addressed != *here.node => {
                Err(JobError::ForAnotherNode { addressed, here: *here.node })
            }
            Audience::Collective(addressed) if !here.collectives.contains(&addressed) => {
                Err(JobError::ForAnotherCollective { addressed })
            }
            _ => Ok(()),
        }
    }
}

impl JobId {
    /// The id of a signed job.
    pub fn of(envelope: &Envelope, network: &NetworkId) -> Self {
        Self::from_bytes(envelope.content_hash("kinoflock/1/job-id", network))
    }
}

/// `Err(how far)` if `issued_at` lies further in the future than clocks may differ.
pub(crate) fn check_issued(issued_at: UnixMillis, now: UnixMillis) -> Result<(), Millis> {
    let ahead = issued_at.since(now);
    if ahead.0 > MAX_CLOCK_SKEW_MS { Err(ahead) } else { Ok(()) }
}

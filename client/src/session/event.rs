//! What a session tells while it works.

use std::fmt;

use kinoflock_protocol::capacity::Terms;
use kinoflock_protocol::{ClipId, JobId, Millis, NodeId};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::route::{Declined, called, terms_sentence};

/// Something that happened. The `Display` form is a line for people; serde gives the form for programs, tagged `event`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// A way led nowhere.
    Unreachable {
        /// The way.
        way: String,
        /// Why.
        why: String,
    },
    /// A node was reached.
    Reached {
        /// Which node.
        node: NodeId,
        /// The name that it gave itself.
        name: String,
    },
    /// A node cannot or will not take the job.
    Declined {
        /// Which node.
        node: NodeId,
        /// The name that it gave itself.
        name: String,
        /// Why, for people.
        why: String,
    },
    /// This node will have the job, and see it: told before anything is sent.
    Chosen {
        /// Which node.
        node: NodeId,
        /// The name that it gave itself.
        name: String,
        /// Name of the model.
        model: String,
        /// Jobs ahead.
        position: u32,
        /// Time until the clip would be done.
        eta: Millis,
        /// Seed of the job, as text because it has 64 bits.
        seed: String,
        /// What it will be able to see.
        sees: &'static str,
        /// What it promises about it.
        terms: Terms,
        /// Whether rules about content may refuse the job.
        content_rules: bool,
        /// Nodes that will hold the signed job too, and watch it while this machine is away.
        custodians: Vec<String>,
        /// Percent of such jobs that are audited afterwards.
        audit_share: u8,
        /// Nodes one of which then sees the prompt and some latents.
        auditors: Vec<String>,
    },
    /// A node does not watch the job.
    NoCustodian {
        /// Which node.
        node: NodeId,
        /// Why.
        why: String,
    },
    /// The two clocks differ more than the protocol allows. The job's times go by the node's clock.
    ClockSkew {
        /// Which node.
        node: NodeId,
        /// How far the node's clock is ahead, in milliseconds; negative if behind.
        ahead_ms: i64,
        /// How far it may be.
        limit: Millis,
    },
    /// The node has the job durably.
    Accepted {
        /// Which job.
        job: JobId,
        /// Jobs ahead.
        position: u32,
        /// Time until the clip would be done.
        eta: Millis,
    },
    /// The node fetches the job's inputs from here.
    AwaitingInputs {
        /// How many are missing.
        missing: usize,
    },
    /// The job waits.
    Queued {
        /// Jobs ahead.
        position: u32,
        /// Time until the clip would be done.
        eta: Millis,
    },
    /// The node loads the model.
    Loading,
    /// A step was done.
    Step {
        /// Steps done.
        done: u32,
        /// Steps in all.
        total: u32,
        /// Time until the clip would be done.
        eta: Millis,
    },
    /// A small picture of how it looks.
    Preview {
        /// After how many steps.
        step: u32,
        /// PNG.
        #[serde(skip)]
        png: Vec<u8>,
    },
    /// The node decodes and encodes.
    Encoding,
    /// The connection broke; it is taken up again.
    Reconnecting {
        /// Which node.
        node: NodeId,
        /// Why.
        why: String,
        /// After how long.
        after: Millis,
    },
    /// The node is lost or did wrong: this one will have the job, and see it. Told before anything is sent.
    Moved {
        /// The node that loses it.
        from: NodeId,
        /// The name that it gave itself.
        from_name: String,
        /// Why it loses it.
        why: String,
        /// The node that will have it.
        node: NodeId,
        /// The name that it gave itself.
        name: String,
        /// From which step it goes on; from the beginning if none.
        step: Option<u32>,
        /// Time until the clip would be done.
        eta: Millis,
        /// What it will be able to see.
        sees: &'static str,
    },
    /// The clip is there, its receipt is good.
    Made {
        /// Which clip.
        clip: ClipId,
        /// Its length in bytes.
        len: u64,
    },
    /// The maker is reached over a relay only, which carries no clip: it comes sealed over this node.
    Mirrored {
        /// Which node.
        node: NodeId,
    },
    /// The node is reached over a relay only, which carries no large file: the job's files come to it sealed over this one.
    InputsMirrored {
        /// Which node.
        node: NodeId,
    },
    /// Bytes of the clip that came and were checked.
    Transfer {
        /// So many.
        done: u64,
        /// Of so many.
        len: u64,
    },
    /// The clip is here and is what was asked for.
    Verified {
        /// Which clip.
        clip: ClipId,
        /// Number of frames.
        frames: u32,
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
    },
    /// The node heard that the clip was accepted.
    Answered,
    /// The node could not be told; it will be when it is next asked something.
    NotAnswered {
        /// Why.
        why: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { way, why } => write!(f, "could not reach {way}: {why}"),
            Self::Reached { node, name } => write!(f, "reached node {}", called(name, node)),
            Self::Declined { node, name, why } => write!(f, "node {}: {why}", called(name, node)),
            Self::Chosen {
                node,
                name,
                model,
                position,
                eta,
                seed,
                sees,
                terms,
                content_rules,
                custodians,
                audit_share,
                auditors,
            } => {
                let name = if name.is_empty() { node.to_string() } else { format!("{name} ({node})") };
                write!(f, "node {name} will make it with {model}, seed {seed}: ")?;
                writeln!(f, "{position} ahead, about {eta}")?;
                write!(f, "that node will see {sees}; {}", terms_sentence(terms))?;
                if *content_rules {
                    write!(f, "\nits operator has rules about content")?;
                }
                if !custodians.is_empty() {
                    let (who, verb) =
                        (custodians.join(" and "), if custodians.len() == 1 { "watches" } else { "watch" });
                    write!(
                        f,
                        "\n{who} {verb} the job while this machine is away, and could read the prompt too"
                    )?;
                }
                if !auditors.is_empty() {
                    write!(
                        f,
                        "\n{audit_share} of 100 such jobs are audited when the clip is here: {} would then see the prompt, the clip \
                         and four states of its latents",
                        auditors.join(" or ")
                    )?;
                }
                Ok(())
            }
            Self::NoCustodian { node, why } => {
                write!(f, "node ...{} does not watch the job: {why}", node.short())
            }
            Self::ClockSkew { node, ahead_ms, limit } => {
                let (by, which) =
                    (Millis(ahead_ms.unsigned_abs()), if *ahead_ms > 0 { "behind" } else { "ahead of" });
                write!(
                    f,
                    "this machine's clock is {by} {which} that of node ...{} (limit {limit}): ",
                    node.short()
                )?;
                f.write_str("set the clock; this job's times go by the node's")
            }
            Self::Accepted { job, position, eta } => {
                write!(f, "job {} accepted: {position} ahead, about {eta}", job.short())
            }
            Self::AwaitingInputs { missing } => write!(f, "the node fetches {missing} inputs"),
            Self::Queued { position, eta } => write!(f, "waiting: {position} ahead, about {eta}"),
            Self::Loading => f.write_str("loading the model"),
            Self::Step { done, total, eta } => write!(f, "step {done} of {total}, about {eta} left"),
            Self::Preview { step, .. } => write!(f, "preview after step {step}"),
            Self::Encoding => f.write_str("decoding and encoding the clip"),
            Self::Reconnecting { node, why, after } => {
                write!(f, "lost node ...{} ({why}); trying again in {after}", node.short())
            }
            Self::Moved { from, from_name, why, node, name, step, eta, sees } => {
                let from_step =
                    step.map_or_else(|| "from the beginning".to_owned(), |step| format!("from step {step}"));
                write!(f, "node {} loses the job ({why}): ", called(from_name, from))?;
                write!(
                    f,
                    "node {} takes it {from_step}, about {eta}, and will see {sees}",
                    called(name, node)
                )
            }
            Self::Made { clip, len } => write!(f, "made: {} ({len} bytes)", clip.short()),
            Self::Mirrored { node } => {
                let node = node.short();
                write!(
                    f,
                    "no direct way to the maker: the clip comes sealed over node ...{node}, which cannot see it"
                )
            }
            Self::InputsMirrored { node } => {
                let node = node.short();
                write!(
                    f,
                    "no direct way to the node: your files go sealed over node ...{node}, which cannot see them"
                )
            }
            Self::Transfer { done, len } => write!(f, "fetched {done} of {len} bytes"),
            Self::Verified { frames, width, height, .. } => {
                write!(f, "verified: {frames} frames, {width}x{height}, the bytes that the node signed")
            }
            Self::Answered => f.write_str("the node knows that you have the clip"),
            Self::NotAnswered { why } => {
                write!(f, "the node could not be told that you have the clip: {why}")
            }
        }
    }
}

impl From<&Declined> for Event {
    fn from(declined: &Declined) -> Self {
        Self::Declined { node: declined.node, name: declined.name.clone(), why: declined.why.to_string() }
    }
}

/// Where events go.
#[derive(Debug, Clone)]
pub struct Events(Option<mpsc::Sender<Event>>);

impl Events {
    /// To whoever renders them.
    #[must_use]
    pub fn to(sender: mpsc::Sender<Event>) -> Self {
        Self(Some(sender))
    }

    /// Nowhere.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// Tells an event, waiting while the channel is full. Nobody listening is no error.
    pub(crate) async fn tell(&self, event: Event) {
        if let Some(sender) = &self.0 {
            let _ = sender.send(event).await;
        }
    }

    /// Tells an event that may be missed.
    pub(crate) fn hint(&self, event: Event) {
        if let Some(sender) = &self.0 {
            let _ = sender.try_send(event);
        }
    }
}

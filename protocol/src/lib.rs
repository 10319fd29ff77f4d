//! What Kinoflock peers say to each other: pure types, signatures, limits. No IO, no clock, no randomness.
//!
//! # The way of a job, told by its messages
//!
//! A node states what it can do in a signed [`capacity::Capacity`], gossiped and short-lived. A client asks any node
//! for matching adverts ([`rpc::Request::FindNodes`]), ranks them, and asks the best few "could you, and when?"
//! ([`order::QuoteRequest`], which holds no prompt). A node answers with a signed [`order::Quote`], which holds a
//! place for some seconds, or with a [`refusal::Refusal`] that names the rule, its limit and the given value.
//!
//! The artist's key signs a [`job::JobSpec`] and an [`order::Order`] that names one node and its lease. Both travel
//! as [`envelope::Envelope`]s in [`rpc::Request::Submit`]. The node verifies the signatures over the received bytes
//! and only then reads them, as [`job::ValidJob`] and [`order::ValidOrder`]; "accepted" means durably queued. The
//! same order again gives the same job.
//!
//! [`progress::Progress`] events stream back, numbered, so that a broken stream goes on where it was. Who asks shows
//! a signed [`query::JobQuery`]. Every few steps the node leaves a signed [`progress::Checkpoint`] from which another
//! can go on. At the end stands a signed [`receipt::Receipt`]: what was made for whom, with what, at which cost in
//! [`work::Work`], without the prompt. The client fetches the [clip](clip) by its hash, verifying each MiB before
//! it is written, and answers with a signed [`receipt::ReceiptAnswer`].
//!
//! A job may name custodians, nodes that watch it while its client is away and can hand it on; finished clips are held by
//! others too, [sealed](seal) ([`custody`]). [Lists](list) of nodes and models can be published by anybody.
//!
//! A receipt may hold the root of a tree over every step; anybody whom the requester names may then [audit](audit) one.
//!
//! What computes is a [`model::ModelManifest`], whose hash is the model's id; what people say about it is on signed
//! [`card::Card`]s.
//!
//! # How it is written down
//!
//! [`codec`] has one encoding for each value and refuses everything else; [`frame`] puts it on streams; [`limits`]
//! bounds every size, count and time; [`names`] has protocol names and tickets; [`id`] names keys and hashes. Every
//! type also has a JSON form for people and tools, with ids as text and 64-bit numbers as strings.

pub mod audit;
pub mod capacity;
pub mod card;
pub mod clip;
pub mod codec;
pub mod custody;
pub mod envelope;
pub mod frame;
pub mod id;
pub mod job;
pub mod limits;
pub mod list;
pub mod model;
pub mod names;
pub mod ops;
pub mod order;
pub mod progress;
pub mod query;
pub mod receipt;
pub mod refusal;
pub mod rpc;
pub mod seal;
pub mod units;
pub mod work;

pub use codec::{Bytes, CodecError, List, Text};
pub use envelope::{Envelope, EnvelopeError, Kind, Message, Opened};
pub use id::{
    BlobId, BodyHash, CardId, ChainId, ClipId, CollectiveId, JobId, Keypair, LeaseId, ModelId, NetworkId,
    NodeId, Nonce, PublicKey, ReceiptId, RequesterId,
};
pub use job::{Addressee, JobSpec, Prompt, ValidJob};
pub use refusal::{Reason, Refusal};
pub use units::{Micro, Millis, UnixMillis};
pub use work::{JobShape, Work, WorkModel};

//! The libp2p swarm that Kinoflock node and client share.
//!
//! [`start`] builds one swarm from a [`NetConfig`] and hands it to one driver task. What comes back is a
//! [`NetHandle`] (clone it freely; every method talks to the driver over a bounded channel or works on a
//! stream that the driver handed out) and the receiver of [`NetEvent`]s.
//!
//! The pieces, in the order in which a byte meets them:
//! - [`config`]: what the swarm is told; roles (kad, gossip, mDNS) are toggles;
//! - `swarm` and `behaviour`: transports and sub-behaviours;
//! - `driver`: the task that owns the swarm. It never verifies, reads a disk or infers;
//! - [`rpc`]: short requests and answers, 64 KiB each, with our own codec;
//! - [`streams`]: long-lived streams. A queue with a bound, and `Busy` above it;
//! - [`progress`]: the events of a job over one stream;
//! - [`blobs`]: content by its hash, verified MiB by MiB;
//! - [`reach`]: how others get in past routers: addresses that were tested, places at relays;
//! - [`rejoin`]: staying connected with nodes that were named, met or heard of;
//! - [`dnsaddr`]: lists of nodes that are kept in DNS;
//! - [`discovery`]: mDNS, Kademlia's bootstrap, signed adverts over gossip;
//! - [`slices`]: the parts of a large network in which adverts stay.

pub mod blobs;
pub mod config;
pub mod discovery;
pub mod dnsaddr;
pub mod error;
pub mod event;
pub mod handle;
pub mod limits;
pub mod peer;
pub mod progress;
pub mod rate;
pub mod reach;
pub mod rejoin;
pub mod rpc;
pub mod sealed;
pub mod slices;
pub mod streams;

mod arrivals;
mod behaviour;
mod driver;
mod framed;
mod inbound;
mod names;
mod opener;
mod slots;
mod swarm;

pub use blobs::{
    BlobReader, BlobSink, BlobSource, FetchError, FetchOptions, FetchProgress, FetchReport, FileSink,
    HolderFault, MemorySink,
};
pub use config::{CircuitLimits, Identity, KadRole, NetConfig, Rates, Reach, RelayRole, Reserve};
pub use discovery::{Advert, Published, Verdict};
pub use error::NetError;
pub use event::{NetEvent, NetEvents};
pub use handle::NetHandle;
pub use libp2p::{Multiaddr, PeerId, multiaddr};
pub use peer::PeerInfo;
pub use progress::{ProgressSender, ProgressSink, ProgressStream};
pub use reach::Reachability;
pub use rejoin::KnownNode;
pub use rpc::Responder;
pub use slices::Slice;
pub use swarm::{start, start_with_metrics};

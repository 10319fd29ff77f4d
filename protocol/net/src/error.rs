//! What can go wrong between this process and a peer.

use kinoflock_protocol::NodeId;
use kinoflock_protocol::limits::PROTOCOL_VERSION;
use kinoflock_protocol::refusal::Refusal;
use libp2p::Multiaddr;

/// A network operation that did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The swarm could not be built.
    #[error("cannot start the network: {why}")]
    Start {
        /// The cause.
        why: String,
    },
    /// An address could not be listened on.
    #[error("cannot listen on {addr}: {why}")]
    Listen {
        /// The address.
        addr: Multiaddr,
        /// The cause.
        why: String,
    },
    /// The driver task has ended.
    #[error("the network of this process has shut down")]
    Closed,
    /// The node is not connected and none of its addresses is known.
    #[error("no address is known for node {node}")]
    NoAddress {
        /// The node.
        node: NodeId,
    },
    /// The address is not one that a node can be reached at.
    #[error("{addr} is not an address of a node: {why}")]
    BadAddress {
        /// The address.
        addr: Multiaddr,
        /// The cause.
        why: &'static str,
    },
    /// No connection came about.
    #[error("cannot reach {target}: {why}")]
    Dial {
        /// The node or address.
        target: String,
        /// The cause, as the transports told it.
        why: String,
    },
    /// A list of nodes in DNS could not be looked up.
    #[error("cannot look up {addr}: {why}")]
    Names {
        /// The list.
        addr: Multiaddr,
        /// The cause.
        why: String,
    },
    /// The connection ended before the operation did.
    #[error("the connection to node {node} was lost: {why}")]
    ConnectionLost {
        /// The node.
        node: NodeId,
        /// The cause.
        why: String,
    },
    /// The peer speaks another version of our protocol.
    #[error(
        "node {node} speaks version {speaks:?} of the protocol, we speak {ours}; the older one should update"
    )]
    PeerSpeaks {
        /// The node.
        node: NodeId,
        /// The versions that it speaks.
        speaks: Vec<u8>,
        /// The version that we speak.
        ours: u8,
    },
    /// The peer belongs to another network: it speaks our protocols under another network's name.
    #[error("node {node} belongs to another kinoflock network")]
    OtherNetwork {
        /// The node.
        node: NodeId,
    },
    /// The peer speaks none of our protocols.
    #[error("peer {node} is not a kinoflock node (it calls itself {agent:?})")]
    NotKinoflock {
        /// The peer.
        node: NodeId,
        /// What it calls itself.
        agent: String,
    },
    /// The peer does not offer this, in any version.
    #[error("node {node} does not offer {what}")]
    NotOffered {
        /// The node.
        node: NodeId,
        /// What was asked for.
        what: &'static str,
    },
    /// The peer is at a limit of its own; try again later or elsewhere.
    #[error("node {node} is busy")]
    Busy {
        /// The node.
        node: NodeId,
    },
    /// The peer answered the open of a stream with a refusal.
    #[error("node {node} refused: {refusal}")]
    Refused {
        /// The node.
        node: NodeId,
        /// Its reason.
        refusal: Box<Refusal>,
    },
    /// We are at a limit of our own.
    #[error("{limit} {what} are under way already")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// Time ran out.
    #[error("node {node} did not {what} within {limit_ms} ms")]
    TimedOut {
        /// The node.
        node: NodeId,
        /// What it did not do.
        what: &'static str,
        /// The limit, milliseconds.
        limit_ms: u64,
    },
    /// There is no way to the peer but over a relay, which carries no content of this size.
    #[error(
        "node {node} is reached over a relay only, which carries at most {limit} bytes of a blob, this one has {given}; no direct connection came about within {waited_ms} ms"
    )]
    OnlyRelayed {
        /// The node.
        node: NodeId,
        /// What may come over a relay, bytes.
        limit: u64,
        /// Length of the blob, bytes.
        given: u64,
        /// How long was waited, milliseconds.
        waited_ms: u64,
    },
    /// A message of ours is too long to be sent.
    #[error("{what} may have {limit} bytes, this one has {given}")]
    TooLong {
        /// Which message.
        what: &'static str,
        /// The limit, bytes.
        limit: usize,
        /// The message's length, bytes.
        given: usize,
    },
    /// The peer sent something that the protocol does not allow.
    #[error("node {node} broke the protocol: {why}")]
    Garbage {
        /// The node.
        node: NodeId,
        /// What it sent.
        why: String,
    },
    /// This role is switched off in the configuration.
    #[error("{role} is switched off in this process")]
    RoleOff {
        /// The role.
        role: &'static str,
    },
}

impl NetError {
    /// The peer speaks another version, by a version report of either side: the one who reported names its own
    /// version as `speaks` and the other's as `sent`.
    pub(crate) fn other_version(node: NodeId, speaks: u8, sent: u8) -> Self {
        let (theirs, ours) = if speaks == PROTOCOL_VERSION { (sent, speaks) } else { (speaks, sent) };
        Self::PeerSpeaks { node, speaks: vec![theirs], ours }
    }

    /// A short name for metrics and for the wire.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Start { .. } => "net_start",
            Self::Listen { .. } => "net_listen",
            Self::Closed => "net_closed",
            Self::NoAddress { .. } => "net_no_address",
            Self::BadAddress { .. } => "net_bad_address",
            Self::Dial { .. } => "net_dial",
            Self::Names { .. } => "net_names",
            Self::ConnectionLost { .. } => "net_connection_lost",
            Self::PeerSpeaks { .. } => "net_peer_speaks",
            Self::OtherNetwork { .. } => "net_other_network",
            Self::NotKinoflock { .. } => "net_not_kinoflock",
            Self::NotOffered { .. } => "net_not_offered",
            Self::Busy { .. } => "net_busy",
            Self::Refused { .. } => "net_refused",
            Self::TooMany { .. } => "net_too_many",
            Self::TimedOut { .. } => "net_timed_out",
            Self::OnlyRelayed { .. } => "net_only_relayed",
            Self::TooLong { .. } => "net_too_long",
            Self::Garbage { .. } => "net_garbage",
            Self::RoleOff { .. } => "net_role_off",
        }
    }

    /// Whether the same call may succeed later or the peer is merely out of reach for now.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Dial { .. }
                | Self::Names { .. }
                | Self::ConnectionLost { .. }
                | Self::Busy { .. }
                | Self::TooMany { .. }
                | Self::TimedOut { .. }
                | Self::OnlyRelayed { .. }
        )
    }
}

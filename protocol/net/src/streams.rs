//! Streams with a queue: our own stream behaviour, for any number of protocols under one set of limits.
//!
//! Opening: [`Behaviour::open`] queues an open at one of the peer's connections. The handler negotiates at
//! most [`limits::NEGOTIATING_STREAMS`] at a time, so that a burst neither starves control and identify nor
//! runs into the muxer's own limits, at which it would end the connection.
//!
//! Accepting: a negotiated inbound stream takes one permit of its peer and one of the process and goes to the
//! acceptor's channel, which is as long as there are permits and so is never full. Without a permit the far
//! side is told `Busy`; when too many of these answers are being written already, the stream is reset. No
//! inbound stream is dropped without one or the other, and the opener takes a stream for open only when the
//! acceptor's answer frame has come.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler, Stream,
    THandler, THandlerInEvent, THandlerOutEvent, ToSwarm, behaviour::ConnectionEstablished,
};
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::limits;
use crate::peer::is_relayed;
use crate::slots::PeerSlots;

mod handler;

pub use handler::Handler;

/// Why an open came to nothing.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no connection with the peer.
    #[error("not connected")]
    NotConnected,
    /// Too many opens wait already.
    #[error("{limit} opens wait already")]
    QueueFull {
        /// The limit.
        limit: usize,
    },
    /// The peer does not speak the protocol.
    #[error("the peer does not speak the protocol")]
    Unsupported,
    /// Negotiation took too long.
    #[error("negotiation took longer than {limit_ms} ms")]
    TimedOut {
        /// The limit, milliseconds.
        limit_ms: u64,
    },
    /// The stream or its connection broke.
    #[error("the stream broke: {why}")]
    Broken {
        /// The cause.
        why: String,
    },
}

impl OpenError {
    /// A short name for metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotConnected => "stream_not_connected",
            Self::QueueFull { .. } => "stream_queue_full",
            Self::Unsupported => "stream_unsupported",
            Self::TimedOut { .. } => "stream_timed_out",
            Self::Broken { .. } => "stream_broken",
        }
    }
}

/// One protocol of a behaviour.
#[derive(Debug, Clone)]
pub struct Offer {
    /// Its name.
    pub protocol: StreamProtocol,
    /// The bytes that say `Busy` to whoever opens it.
    pub busy: Vec<u8>,
}

/// A request to open one stream. If its connection ends first, the reply is dropped.
#[derive(Debug)]
pub struct Open {
    pub(crate) protocol: StreamProtocol,
    pub(crate) relayed: bool,
    pub(crate) reply: oneshot::Sender<Result<Opened, OpenError>>,
}

/// A negotiated stream of ours.
#[derive(Debug)]
pub struct Opened {
    /// The stream, nothing written yet.
    pub stream: Stream,
    /// Whether it runs over a relay.
    pub relayed: bool,
}

/// An inbound stream with the permits that it holds until dropped.
#[derive(Debug)]
pub struct Incoming {
    /// Who opened it.
    pub peer: PeerId,
    /// The protocol that was agreed on.
    pub protocol: StreamProtocol,
    /// Whether it runs over a relay.
    pub relayed: bool,
    /// The negotiated stream, nothing read yet.
    pub stream: Stream,
    /// The stream's share of its peer's and of the process's limit.
    pub permits: [OwnedSemaphorePermit; 2],
}

/// What all handlers of one behaviour share.
#[derive(Debug)]
struct Inbound {
    offers: Vec<Offer>,
    per_peer: PeerSlots<PeerId>,
    total: Arc<Semaphore>,
    /// As long as there are permits in `total`, and each entry holds one: never full.
    accepted: mpsc::Sender<Incoming>,
}

/// The behaviour: opens streams and queues inbound ones.
#[derive(Debug)]
pub struct Behaviour {
    inbound: Arc<Inbound>,
    /// Connections of each peer, direct ones first, then oldest first.
    connections: HashMap<PeerId, Vec<Connection>>,
    /// Bounded by the commands that the driver takes between two polls.
    pending: VecDeque<ToSwarm<Infallible, Open>>,
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy)]
struct Connection {
    id: ConnectionId,
    relayed: bool,
}

impl Behaviour {
    /// A behaviour for these protocols, and the queue of what it accepts.
    #[must_use]
    pub fn new(offers: Vec<Offer>) -> (Self, mpsc::Receiver<Incoming>) {
        Self::with_limits(offers, limits::INBOUND_STREAMS_PER_PEER, limits::INBOUND_STREAMS)
    }

    /// As [`Behaviour::new`], with other limits on inbound streams.
    #[must_use]
    pub fn with_limits(
        offers: Vec<Offer>,
        per_peer: usize,
        total: usize,
    ) -> (Self, mpsc::Receiver<Incoming>) {
        let (accepted, queue) = mpsc::channel(total);
        let inbound = Arc::new(Inbound {
            offers,
            per_peer: PeerSlots::new(per_peer),
            total: Arc::new(Semaphore::new(total)),
            accepted,
        });
        let behaviour = Self { inbound, connections: HashMap::new(), pending: VecDeque::new(), waker: None };
        (behaviour, queue)
    }

    /// Whether there is a connection with the peer that does not run over a relay.
    #[must_use]
    pub fn is_direct(&self, peer: &PeerId) -> bool {
        self.connections.get(peer).is_some_and(|all| all.iter().any(|connection| !connection.relayed))
    }

    /// Opens a stream to a connected peer, over a relay only where there is no direct connection.
    pub fn open(
        &mut self,
        peer: PeerId,
        protocol: StreamProtocol,
        reply: oneshot::Sender<Result<Opened, OpenError>>,
    ) {
        let Some(connection) = self.connections.get(&peer).and_then(|all| all.first()) else {
            // The caller may have gone; then nobody needs the answer.
            let _ = reply.send(Err(OpenError::NotConnected));
            return;
        };
        self.pending.push_back(ToSwarm::NotifyHandler {
            peer_id: peer,
            handler: NotifyHandler::One(connection.id),
            event: Open { protocol, relayed: connection.relayed, reply },
        });
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(Handler::new(peer, is_relayed(local), Arc::clone(&self.inbound)))
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        addr: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(Handler::new(peer, is_relayed(addr), Arc::clone(&self.inbound)))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            }) => {
                let all = self.connections.entry(peer_id).or_default();
                all.push(Connection { id: connection_id, relayed: endpoint.is_relayed() });
                all.sort_by_key(|connection| connection.relayed);
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, connection_id, .. }) => {
                if let Some(all) = self.connections.get_mut(&peer_id) {
                    all.retain(|connection| connection.id != connection_id);
                    if all.is_empty() {
                        self.connections.remove(&peer_id);
                    }
                }
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        if let Some(event) = self.pending.pop_front() {
            return Poll::Ready(event);
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

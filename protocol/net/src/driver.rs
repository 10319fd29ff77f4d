//! The one task that owns the swarm.
//!
//! It only moves things: commands in, events out. Signatures are verified, disks read and models run
//! elsewhere. No channel here can stop it: what it cannot hand on at once is dropped if it is news, and
//! answered `Busy` if somebody waits for it.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

use futures::{FutureExt, StreamExt};
use kinoflock_protocol::rpc::Request;
use kinoflock_protocol::{BlobId, NodeId};
use libp2p::core::transport::PortUse;
use libp2p::gossipsub::PublishError;
use libp2p::kad::QueryId;
use libp2p::metrics::Metrics;
use libp2p::request_response::OutboundRequestId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError};
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::behaviour::Behaviour;
use crate::config::NetConfig;
use crate::discovery::{Judged, Published};
use crate::error::NetError;
use crate::event::NetEvent;
use crate::limits;
use crate::names::Names;
use crate::peer::{self, PeerInfo};
use crate::reach::Reachability;
use crate::rejoin::KnownNode;
use crate::rpc::{Answered, WireResponse};
use crate::slices::Slice;
use crate::slots::PeerSlots;
use crate::streams::{OpenError, Opened};

mod book;
mod events;
mod reach;
mod slices;

use book::Book;
use reach::Reached;
use slices::{Seeking, Slices};

/// Events of the swarm that are handled at most before a command counts as carried out.
const SETTLED_EVENTS: usize = 256;

/// What the handle asks of the driver.
#[derive(Debug)]
pub(crate) enum Command {
    /// Make sure that there is a connection.
    Connect { target: Target, reply: Reply<Result<NodeId, NetError>> },
    /// Ask a connected peer.
    Request { peer: PeerId, request: Box<Request>, reply: Reply<Result<WireResponse, RequestFailure>> },
    /// Open a stream to a connected peer.
    Open { peer: PeerId, protocol: StreamProtocol, reply: Reply<Result<Opened, OpenError>> },
    /// Say when there is a connection with a peer that does not run over a relay. `again`: what was tried did not lead
    /// to one.
    Direct { peer: PeerId, again: bool, reply: Reply<()> },
    /// Remember addresses of a node.
    Learn { peer: PeerId, addrs: Vec<Multiaddr> },
    /// What identify told about a connected peer, now or as soon as it has.
    Identify { peer: PeerId, reply: Reply<PeerInfo> },
    /// What identify told about all connected peers.
    Peers { reply: Reply<Vec<PeerInfo>> },
    /// The nodes that were met or heard of.
    Known { reply: Reply<Vec<KnownNode>> },
    /// Gossip an advert.
    Publish { bytes: Vec<u8>, reply: Reply<Result<Published, NetError>> },
    /// Tell adverts in one slice and hear those of some.
    SetSlices { told: Slice, heard: BTreeSet<Slice>, reply: Reply<Result<(), NetError>> },
    /// How deep the slices of the connected peers are.
    Depths { reply: Reply<Vec<u8>> },
    /// Tell the DHT that we have something, or have it no longer.
    Provide { key: BlobId, on: bool, reply: Reply<Result<(), NetError>> },
    /// Ask the DHT who has something.
    Seek { key: BlobId, reply: Reply<Vec<NodeId>> },
    /// Refresh the DHT's routing table.
    Bootstrap { reply: Reply<Result<(), NetError>> },
    /// End all connections with a peer.
    Disconnect { peer: PeerId },
    /// Refuse connections with a peer, or no longer.
    Block { peer: PeerId, blocked: bool },
    /// End the driver and all connections.
    Shutdown { reply: Reply<()> },
}

/// Where a command's answer goes; dropped when the driver cannot give one.
pub(crate) type Reply<T> = oneshot::Sender<T>;

/// Whom to connect to.
#[derive(Debug)]
pub(crate) enum Target {
    /// A node, at these addresses and those already known.
    Peer(PeerId, Vec<Multiaddr>),
    /// Whoever answers at an address.
    Address(Multiaddr),
}

/// Why a request got no answer.
#[derive(Debug)]
pub(crate) enum RequestFailure {
    /// The peer does not speak the protocol in our version.
    Unsupported,
    /// No answer within [`limits::RPC_TIMEOUT`].
    TimedOut,
    /// Too many requests wait.
    TooMany,
    /// The connection or the stream ended.
    Lost(String),
}

/// The addresses on which this process listens.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listening {
    pub(crate) addrs: Vec<Multiaddr>,
    /// Listeners that have not told an address yet.
    pub(crate) pending: usize,
    /// Addresses at which others get in, as far as is known.
    pub(crate) open: Vec<Multiaddr>,
    pub(crate) reachability: Reachability,
}

/// The ends of the channels that the driver holds.
pub(crate) struct Channels {
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) events: mpsc::Sender<NetEvent>,
    pub(crate) listening: watch::Sender<Listening>,
}

/// The driver's state.
pub(crate) struct Driver {
    swarm: Swarm<Behaviour>,
    names: Names,
    metrics: Option<Metrics>,
    slices: Slices,
    channels: Channels,
    book: Book,
    /// Callers that wait for a connection; at most [`limits::WAITERS`].
    connecting: HashMap<PeerId, Vec<Reply<Result<NodeId, NetError>>>>,
    /// Dials to all known addresses of a peer; as many as there are unfinished connections.
    dialed: HashMap<ConnectionId, (PeerId, PortUse)>,
    /// Dials to addresses whose node is not known; at most [`limits::WAITERS`].
    dialing: HashMap<ConnectionId, (Multiaddr, Reply<Result<NodeId, NetError>>)>,
    /// Callers that wait for an identify record; at most [`limits::WAITERS`].
    identifying: HashMap<PeerId, Vec<Reply<PeerInfo>>>,
    /// Callers that wait for a direct connection; at most [`limits::WAITERS`].
    directing: HashMap<PeerId, Vec<Reply<()>>>,
    /// Callers that wait for the providers of a key; at most [`limits::WAITERS`].
    seeking: HashMap<QueryId, Seeking>,
    reached: Reached,
    /// Requests that wait for their answer; at most [`limits::OUTBOUND_REQUESTS`].
    requests: HashMap<OutboundRequestId, Reply<Result<WireResponse, RequestFailure>>>,
    /// Places for inbound requests, of each peer and of all.
    inbound_per_peer: PeerSlots<PeerId>,
    inbound: Arc<Semaphore>,
    /// Answers from the owner. Each holds one of the places, so the channel is never full.
    answers: (mpsc::Sender<Answered>, mpsc::Receiver<Answered>),
    /// Places for adverts that wait for their verdict.
    adverts: Arc<Semaphore>,
    /// Verdicts from the owner. Each holds one of the places, so the channel is never full.
    verdicts: (mpsc::Sender<Judged>, mpsc::Receiver<Judged>),
}

impl Driver {
    pub(crate) fn new(
        config: &NetConfig,
        swarm: Swarm<Behaviour>,
        names: Names,
        metrics: Option<Metrics>,
        channels: Channels,
    ) -> Self {
        let reach = config.reach;
        Self {
            swarm,
            slices: Slices::default(),
            seeking: HashMap::new(),
            names,
            metrics,
            channels,
            book: Book::default(),
            connecting: HashMap::new(),
            dialed: HashMap::new(),
            dialing: HashMap::new(),
            identifying: HashMap::new(),
            directing: HashMap::new(),
            reached: Reached::new(reach.relay, reach.reserve, &config.external),
            requests: HashMap::new(),
            inbound_per_peer: PeerSlots::new(limits::INBOUND_REQUESTS_PER_PEER),
            inbound: Arc::new(Semaphore::new(limits::INBOUND_REQUESTS)),
            answers: mpsc::channel(limits::INBOUND_REQUESTS),
            adverts: Arc::new(Semaphore::new(limits::ADVERTS)),
            verdicts: mpsc::channel(limits::ADVERTS),
        }
    }

    /// Runs until [`Command::Shutdown`] or until every handle is gone.
    pub(crate) async fn run(mut self) {
        if self.channels.listening.borrow().pending == 0 {
            self.all_listen();
        }
        loop {
            let relays_due = self.reached.places.poll_timeout();
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                Some(answered) = self.answers.1.recv() => self.on_answer(answered),
                Some(judged) = self.verdicts.1.recv() => self.on_verdict(&judged),
                () = sleep_until(relays_due) => self.ask_relays(),
                command = self.channels.commands.recv() => match command {
                    None => return,
                    Some(Command::Shutdown { reply }) => {
                        drop(self);
                        let _ = reply.send(());
                        return;
                    }
                    Some(command) => self.on_command(command),
                },
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Connect { target: Target::Peer(peer, addrs), reply } => self.connect(peer, addrs, reply),
            Command::Connect { target: Target::Address(addr), reply } => self.dial(addr, reply),
            Command::Request { peer, request, reply } => self.request(peer, request, reply),
            Command::Open { peer, protocol, reply } => {
                self.swarm.behaviour_mut().streams.open(peer, protocol, reply);
            }
            Command::Direct { peer, again, reply } => self.direct(peer, again, reply),
            Command::Learn { peer, addrs } => self.book.learn(peer, addrs),
            Command::Identify { peer, reply } => self.identify(peer, reply),
            Command::Peers { reply } => {
                let _ = reply.send(self.book.connected_peers());
            }
            Command::Known { reply } => {
                let _ = reply.send(self.book.known_nodes());
            }
            Command::Publish { bytes, reply } => {
                let _ = reply.send(self.publish(bytes));
            }
            Command::SetSlices { told, heard, reply } => {
                let _ = reply.send(self.set_slices(told, heard));
            }
            Command::Depths { reply } => {
                let _ = reply.send(self.depths());
            }
            Command::Provide { key, on, reply } => {
                let _ = reply.send(self.provide(&key, on));
            }
            Command::Seek { key, reply } => self.seek(&key, reply),
            Command::Bootstrap { reply } => {
                let _ = reply.send(self.bootstrap());
            }
            Command::Disconnect { peer } => {
                // An error means that it was not connected.
                let _ = self.swarm.disconnect_peer_id(peer);
            }
            Command::Block { peer, blocked: true } => {
                self.swarm.behaviour_mut().blocked.block_peer(peer);
                self.settle();
            }
            Command::Block { peer, blocked: false } => {
                self.swarm.behaviour_mut().blocked.unblock_peer(peer);
            }
            Command::Shutdown { .. } => {}
        }
    }

    /// Lets the swarm do what it was told before the next command. A block that is carried out only after it was lifted
    /// would end the attempt to connect that followed.
    fn settle(&mut self) {
        for _ in 0..SETTLED_EVENTS {
            match self.swarm.select_next_some().now_or_never() {
                Some(event) => self.on_swarm_event(event),
                None => return,
            }
        }
    }

    fn connect(&mut self, peer: PeerId, addrs: Vec<Multiaddr>, reply: Reply<Result<NodeId, NetError>>) {
        let Some(node) = peer::node_id(&peer) else { return };
        if self.swarm.is_connected(&peer) {
            let _ = reply.send(Ok(node));
            return;
        }
        if !make_room(&mut self.connecting) {
            let _ = reply.send(Err(too_many_waiters()));
            return;
        }
        self.book.learn(peer, addrs);
        match self.dial_known(peer) {
            Ok(()) => self.connecting.entry(peer).or_default().push(reply),
            Err(DialError::NoAddresses) => {
                let _ = reply.send(Err(NetError::NoAddress { node }));
            }
            Err(error) => {
                let _ = reply.send(Err(dial_error(&node.to_string(), &error)));
            }
        }
    }

    /// Dials a peer at the addresses that are known, unless that is under way already. A sub-behaviour's dial to some
    /// address is not waited for: it may take its time to fail.
    fn dial_known(&mut self, peer: PeerId) -> Result<(), DialError> {
        self.dial_known_from(peer, PortUse::Reuse)
    }

    /// As [`Self::dial_known`], from the port that we listen on or from a new one.
    fn dial_known_from(&mut self, peer: PeerId, port: PortUse) -> Result<(), DialError> {
        if self.dialed.values().any(|(dialed, _)| *dialed == peer) {
            return Ok(());
        }
        let opts = DialOpts::peer_id(peer)
            .condition(PeerCondition::Disconnected)
            .addresses(self.book.addresses(&peer))
            .extend_addresses_through_behaviour();
        let opts = match port {
            PortUse::Reuse => opts.build(),
            PortUse::New => opts.allocate_new_port().build(),
        };
        let id = opts.connection_id();
        match self.swarm.dial(opts) {
            Ok(()) => {
                self.dialed.insert(id, (peer, port));
                Ok(())
            }
            Err(DialError::DialPeerConditionFalse(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn dial(&mut self, addr: Multiaddr, reply: Reply<Result<NodeId, NetError>>) {
        self.dialing.retain(|_, (_, reply)| !reply.is_closed());
        if self.dialing.len() >= limits::WAITERS {
            let _ = reply.send(Err(too_many_waiters()));
            return;
        }
        let opts = DialOpts::unknown_peer_id().address(addr.clone()).build();
        let id = opts.connection_id();
        match self.swarm.dial(opts) {
            Ok(()) => {
                self.dialing.insert(id, (addr, reply));
            }
            Err(error) => {
                let _ = reply.send(Err(dial_error(&addr.to_string(), &error)));
            }
        }
    }

    fn request(
        &mut self,
        peer: PeerId,
        request: Box<Request>,
        reply: Reply<Result<WireResponse, RequestFailure>>,
    ) {
        if self.requests.len() >= limits::OUTBOUND_REQUESTS {
            let _ = reply.send(Err(RequestFailure::TooMany));
            return;
        }
        if !self.swarm.is_connected(&peer) {
            let _ = reply.send(Err(RequestFailure::Lost("it has just ended".into())));
            return;
        }
        let id = self.swarm.behaviour_mut().control.send_request(&peer, Ok(request));
        self.requests.insert(id, reply);
    }

    fn identify(&mut self, peer: PeerId, reply: Reply<PeerInfo>) {
        if let Some(info) = self.book.info(&peer) {
            let _ = reply.send(info.clone());
        } else if self.swarm.is_connected(&peer) && make_room(&mut self.identifying) {
            self.identifying.entry(peer).or_default().push(reply);
        }
    }

    fn publish(&mut self, bytes: Vec<u8>) -> Result<Published, NetError> {
        let topic = self.names.topic_of(&self.slices.told);
        let gossip =
            self.swarm.behaviour_mut().gossip.as_mut().ok_or(NetError::RoleOff { role: "gossip" })?;
        let given = bytes.len();
        match gossip.publish(topic, bytes) {
            Ok(_) => Ok(Published::Sent),
            Err(PublishError::NoPeersSubscribedToTopic) => Ok(Published::NobodyListens),
            Err(PublishError::Duplicate) => Ok(Published::Duplicate),
            Err(PublishError::AllQueuesFull(limit)) => {
                Err(NetError::TooMany { what: "adverts to all peers", limit })
            }
            Err(_) => Err(NetError::TooLong { what: "an advert", limit: limits::ADVERT_BYTES, given }),
        }
    }

    fn bootstrap(&mut self) -> Result<(), NetError> {
        let kad = self.swarm.behaviour_mut().kad.as_mut().ok_or(NetError::RoleOff { role: "kad" })?;
        // An error means that no peer is known yet; the first identified one starts it.
        let _ = kad.bootstrap();
        Ok(())
    }

    fn on_answer(&mut self, answered: Answered) {
        // The peer may have gone or its time may be up; then nobody reads the answer.
        let _ = self.swarm.behaviour_mut().control.send_response(answered.channel, Ok(answered.response));
    }

    fn on_verdict(&mut self, judged: &Judged) {
        if let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() {
            gossip.report_message_validation_result(&judged.id, &judged.source, judged.verdict.into());
        }
    }

    /// Tells the owner. When it does not keep up, this is dropped; whoever waits inside of it hears `Busy`.
    fn tell(&self, event: NetEvent) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.channels.events.try_send(event) {
            tracing::debug!(limit = limits::EVENTS, "net_event_dropped");
        }
    }
}

async fn sleep_until(moment: Option<std::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Whether one more may wait, after those that gave up have been forgotten.
fn make_room<T>(waiting: &mut HashMap<PeerId, Vec<Reply<T>>>) -> bool {
    waiting.retain(|_, replies| {
        replies.retain(|reply| !reply.is_closed());
        !replies.is_empty()
    });
    waiting.values().map(Vec::len).sum::<usize>() < limits::WAITERS
}

fn too_many_waiters() -> NetError {
    NetError::TooMany { what: "connection attempts", limit: limits::WAITERS }
}

/// A failed dial in words: each address with its innermost cause.
fn dial_error(target: &str, error: &DialError) -> NetError {
    let why = match error {
        DialError::Transport(tried) => tried
            .iter()
            .map(|(addr, error)| format!("{addr}: {}", innermost(error)))
            .collect::<Vec<_>>()
            .join("; "),
        DialError::Denied { cause } => innermost(cause),
        DialError::WrongPeerId { obtained, address } => {
            format!("at {address} there is {obtained} instead")
        }
        DialError::LocalPeerId { .. } => "that is this process itself".into(),
        other => other.to_string(),
    };
    NetError::Dial { target: target.to_owned(), why }
}

/// Whether a dial failed for want of our own port: an attempt of a sub-behaviour may go from it to the same address.
fn own_port_in_use(error: &DialError) -> bool {
    let DialError::Transport(tried) = error else { return false };
    tried.iter().any(|(_, error)| {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = cause {
            if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::AddrInUse)
            {
                return true;
            }
            cause = error.source();
        }
        false
    })
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

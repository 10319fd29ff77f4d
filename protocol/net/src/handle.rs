//! The owner's side of the driver: every operation of the network as an async method.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kinoflock_protocol::progress::ProgressOpen;
use kinoflock_protocol::rpc::{Request, Response, RpcError, encode_request};
use kinoflock_protocol::{BlobId, Envelope, NodeId};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::blobs::{self, BlobSink, BlobSource, FetchError, FetchOptions, FetchReport, serve};
use crate::config::{NetConfig, Rates};
use crate::discovery::Published;
use crate::dnsaddr::{self, Lists, is_dnsaddr};
use crate::driver::{Command, Listening, RequestFailure, Target};
use crate::error::NetError;
use crate::event::NetEvent;
use crate::inbound::Acceptor;
use crate::limits;
use crate::names::Names;
use crate::peer::{self, PeerInfo};
use crate::progress::{self, ProgressStream};
use crate::rate::RateLimit;
use crate::reach::Reachability;
use crate::rejoin::KnownNode;
use crate::rpc::check_length;
use crate::slices::Slice;
use crate::slots::PeerSlots;

/// A handle on a running swarm. Clones are cheap and all mean the same swarm.
#[derive(Debug, Clone)]
pub struct NetHandle {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) local: NodeId,
    pub(crate) names: Names,
    pub(crate) commands: mpsc::Sender<Command>,
    listening: watch::Receiver<Listening>,
    /// Places for requests under way, of each peer.
    requests: PeerSlots<NodeId>,
    /// Requests sent, by their names.
    asked: Mutex<BTreeMap<&'static str, u64>>,
    /// Places for streams held open by us, of each peer.
    pub(crate) streams: PeerSlots<NodeId>,
    pub(crate) server: Arc<serve::Server>,
    pub(crate) download: RateLimit,
    lists: Lists,
}

impl Inner {
    fn asked(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NetHandle {
    pub(crate) fn new(
        config: &NetConfig,
        local: PeerId,
        names: Names,
        commands: mpsc::Sender<Command>,
        listening: watch::Receiver<Listening>,
    ) -> Self {
        let local = peer::node_id(&local).expect("invariant: our own key is ed25519");
        let inner = Inner {
            local,
            names,
            commands,
            listening,
            requests: PeerSlots::new(limits::OUTBOUND_REQUESTS_PER_PEER),
            asked: Mutex::default(),
            streams: PeerSlots::new(limits::OUTBOUND_STREAMS_PER_PEER),
            server: Arc::new(serve::Server::new(config.rates.upload)),
            download: RateLimit::new(config.rates.download),
            lists: Lists::new(dnsaddr::settings(config.resolver)),
        };
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn acceptor(&self, events: mpsc::Sender<NetEvent>) -> Acceptor {
        Acceptor { events, server: Arc::clone(&self.inner.server) }
    }

    /// This process's own id on the network.
    #[must_use]
    pub fn local_node(&self) -> NodeId {
        self.inner.local
    }

    /// The addresses on which this process listens now, without `/p2p`.
    #[must_use]
    pub fn listen_addrs(&self) -> Vec<Multiaddr> {
        self.inner.listening.borrow().addrs.clone()
    }

    /// The addresses on which this process listens now, each with `/p2p/<id>`: what a ticket holds.
    #[must_use]
    pub fn dialable_addrs(&self) -> Vec<Multiaddr> {
        let own = Protocol::P2p(peer::peer_id(&self.inner.local));
        let named =
            |addr: Multiaddr| if addr.ends_with(&own.clone().into()) { addr } else { addr.with(own.clone()) };
        self.listen_addrs().into_iter().map(named).collect()
    }

    /// Whether others can dial this process, as far as is known.
    #[must_use]
    pub fn reachability(&self) -> Reachability {
        self.inner.listening.borrow().reachability
    }

    /// The addresses at which others get in, as far as is known: configured, confirmed by others, or forwarded by the
    /// router. Those over relays are among [`NetHandle::listen_addrs`].
    #[must_use]
    pub fn open_addrs(&self) -> Vec<Multiaddr> {
        self.inner.listening.borrow().open.clone()
    }

    /// Waits until there is a connection with a node that does not run over a relay; says whether one came. It is tried
    /// again when a part of the time is over: a relayed connection tries with the addresses that both sides knew of
    /// themselves when it was made, which may have been none.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn direct(&self, node: NodeId, within: Duration) -> Result<bool, NetError> {
        for attempt in 0..limits::DIRECT_ATTEMPTS {
            let (reply, answer) = oneshot::channel();
            let peer = peer::peer_id(&node);
            self.send(Command::Direct { peer, again: attempt > 0, reply }).await?;
            if matches!(timeout(within / limits::DIRECT_ATTEMPTS, answer).await, Ok(Ok(()))) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits until every configured listener has told its address.
    pub(crate) async fn listening(&self) -> Result<(), NetError> {
        let mut listening = self.inner.listening.clone();
        listening.wait_for(|state| state.pending == 0).await.map_err(|_| NetError::Closed)?;
        Ok(())
    }

    /// The addresses of a `/dnsaddr/...` list; an address that is no list is its own only one.
    ///
    /// # Errors
    /// `Names`.
    pub async fn look_up(&self, addr: &Multiaddr) -> Result<Vec<Multiaddr>, NetError> {
        self.inner.lists.look_up(addr).await
    }

    /// Connects to whoever answers at an address, with or without `/p2p/...`. Of a `/dnsaddr/...` list all are dialed at
    /// once, the first to answer is given, and the others are remembered.
    ///
    /// # Errors
    /// `Dial`, `Names`, `TooMany`, `Closed`.
    pub async fn dial(&self, addr: Multiaddr) -> Result<NodeId, NetError> {
        if !is_dnsaddr(&addr) {
            return self.dial_one(addr).await;
        }
        let listed = self.look_up(&addr).await?;
        for addr in &listed {
            if let Some(node) = peer::node_of(addr) {
                self.add_addresses(node, vec![addr.clone()]).await?;
            }
        }
        let mut dials: FuturesUnordered<_> = listed.into_iter().map(|addr| self.dial_one(addr)).collect();
        let mut why = Vec::new();
        while let Some(dialed) = dials.next().await {
            match dialed {
                Ok(node) => return Ok(node),
                Err(error) => why.push(error.to_string()),
            }
        }
        Err(NetError::Dial { target: addr.to_string(), why: why.join("; ") })
    }

    async fn dial_one(&self, addr: Multiaddr) -> Result<NodeId, NetError> {
        match peer::node_of(&addr) {
            Some(node) => self.connect(node, vec![addr]).await,
            None => self.reach(addr.to_string(), Target::Address(addr)).await,
        }
    }

    /// Makes sure that there is a connection with a node, at these addresses or those known from before.
    ///
    /// # Errors
    /// `NoAddress`, `Dial`, `TooMany`, `Closed`.
    pub async fn connect(&self, node: NodeId, addrs: Vec<Multiaddr>) -> Result<NodeId, NetError> {
        self.reach(node.to_string(), Target::Peer(peer::peer_id(&node), addrs)).await
    }

    async fn reach(&self, name: String, target: Target) -> Result<NodeId, NetError> {
        let asked = self.ask(|reply| Command::Connect { target, reply });
        match timeout(limits::DIAL_TIMEOUT, asked).await {
            Ok(answer) => answer?,
            Err(_) => {
                let why = format!("no answer within {} s", limits::DIAL_TIMEOUT.as_secs());
                Err(NetError::Dial { target: name, why })
            }
        }
    }

    /// Remembers addresses of a node for later connections.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn add_addresses(&self, node: NodeId, addrs: Vec<Multiaddr>) -> Result<(), NetError> {
        self.send(Command::Learn { peer: peer::peer_id(&node), addrs }).await
    }

    /// Ends all connections with a node.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn disconnect(&self, node: NodeId) -> Result<(), NetError> {
        self.send(Command::Disconnect { peer: peer::peer_id(&node) }).await
    }

    /// Refuses all connections with a node, or no longer.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn set_blocked(&self, node: NodeId, blocked: bool) -> Result<(), NetError> {
        self.send(Command::Block { peer: peer::peer_id(&node), blocked }).await
    }

    /// What a connected peer says of itself; waits for it where it has not come yet.
    ///
    /// # Errors
    /// `TimedOut`, `ConnectionLost` when it is not connected, `Closed`.
    pub async fn peer_info(&self, node: NodeId) -> Result<PeerInfo, NetError> {
        let peer = peer::peer_id(&node);
        let (reply, answer) = oneshot::channel();
        self.send(Command::Identify { peer, reply }).await?;
        match timeout(limits::IDENTIFY_WAIT, answer).await {
            Ok(Ok(info)) => Ok(info),
            Ok(Err(_)) => Err(NetError::ConnectionLost { node, why: "it is not connected".into() }),
            Err(_) => Err(timed_out(node, "say what it is", limits::IDENTIFY_WAIT)),
        }
    }

    /// What all connected and identified peers say of themselves.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn peers(&self) -> Result<Vec<PeerInfo>, NetError> {
        self.ask(|reply| Command::Peers { reply }).await
    }

    /// Asks a node something, within the usual deadline.
    ///
    /// # Errors
    /// See [`NetHandle::request_within`].
    pub async fn request(&self, node: NodeId, request: Request) -> Result<Response, NetError> {
        self.request_within(node, request, limits::RPC_DEADLINE).await
    }

    /// How many requests were sent so far, by their names.
    #[must_use]
    pub fn asked(&self) -> BTreeMap<&'static str, u64> {
        self.inner.asked().clone()
    }

    /// Asks a node something. Connects first where needed. The deadline covers everything; it is at most
    /// [`limits::RPC_TIMEOUT`] once the request is on its way. A `Busy` or refusal by the node is a response,
    /// not an error.
    ///
    /// # Errors
    /// `TimedOut`, `TooLong`, `TooMany`, `PeerSpeaks` and its kin, `ConnectionLost`, those of
    /// [`NetHandle::connect`], `Closed`.
    pub async fn request_within(
        &self,
        node: NodeId,
        request: Request,
        deadline: Duration,
    ) -> Result<Response, NetError> {
        check_length("a request", &encode_request(&request))?;
        let asking = async {
            self.connect(node, Vec::new()).await?;
            let _place = self.inner.requests.take(&node).await;
            let peer = peer::peer_id(&node);
            *self.inner.asked().entry(request.name()).or_default() += 1;
            self.ask(|reply| Command::Request { peer, request: Box::new(request), reply }).await
        };
        let answer = timeout(deadline, asking).await.map_err(|_| timed_out(node, "answer", deadline))??;
        match answer {
            Ok(Ok(response)) => match *response {
                Response::UnsupportedVersion { speaks, sent } => {
                    Err(NetError::other_version(node, speaks, sent))
                }
                response => Ok(response),
            },
            Ok(Err(RpcError::UnsupportedVersion { speaks, sent })) => {
                Err(NetError::other_version(node, speaks, sent))
            }
            Ok(Err(error)) => Err(NetError::Garbage { node, why: error.to_string() }),
            Err(RequestFailure::Unsupported) => Err(self.why_unsupported(node, "control requests").await),
            Err(RequestFailure::TimedOut) => Err(timed_out(node, "answer", limits::RPC_TIMEOUT)),
            Err(RequestFailure::TooMany) => {
                Err(NetError::TooMany { what: "control requests", limit: limits::OUTBOUND_REQUESTS })
            }
            Err(RequestFailure::Lost(why)) => Err(NetError::ConnectionLost { node, why }),
        }
    }

    /// Dials an address and asks whoever answers there.
    ///
    /// # Errors
    /// Those of [`NetHandle::dial`] and [`NetHandle::request`].
    pub async fn request_at(
        &self,
        addr: Multiaddr,
        request: Request,
    ) -> Result<(NodeId, Response), NetError> {
        let node = self.dial(addr).await?;
        Ok((node, self.request(node, request).await?))
    }

    /// Follows a job from an event on: the signed query says which one. Events come in order; the stream
    /// ends when the node ends it. A stream that broke is taken up again by calling this with the next number.
    ///
    /// # Errors
    /// `Busy`, `Refused`, `TimedOut`, `PeerSpeaks` and its kin, `ConnectionLost`, those of
    /// [`NetHandle::connect`], `Closed`.
    pub async fn open_progress(
        &self,
        node: NodeId,
        query: Envelope,
        from_seq: u64,
    ) -> Result<ProgressStream, NetError> {
        progress::open(self, node, &ProgressOpen { query, from_seq }).await
    }

    /// From now on, serves blobs from here; knowing a blob's id is the permission to fetch it.
    pub fn serve_blobs(&self, source: Arc<dyn BlobSource>) {
        self.inner.server.set_source(source);
    }

    /// Fetches a blob from several holders at once. Every MiB is verified before the sink sees it; chunks
    /// that the sink has already are not fetched again; a holder that lies or stalls is dropped and the
    /// report says so. Gives the sink back, finished.
    ///
    /// # Errors
    /// See [`FetchError`].
    pub async fn fetch_blob<S: BlobSink>(
        &self,
        id: BlobId,
        holders: &[NodeId],
        sink: S,
        options: FetchOptions,
    ) -> Result<(S, FetchReport), FetchError> {
        blobs::fetch::fetch(self, id, holders, sink, options).await
    }

    /// Changes the ceilings of blob transfer.
    pub fn set_rates(&self, rates: Rates) {
        self.inner.server.upload.set(rates.upload);
        self.inner.download.set(rates.download);
    }

    /// Gossips an advert: the bytes of a signed envelope.
    ///
    /// # Errors
    /// `TooLong`, `TooMany`, `RoleOff`, `Closed`.
    pub async fn publish_advert(&self, bytes: Vec<u8>) -> Result<Published, NetError> {
        if bytes.len() > limits::ADVERT_BYTES {
            let given = bytes.len();
            return Err(NetError::TooLong { what: "an advert", limit: limits::ADVERT_BYTES, given });
        }
        self.ask(|reply| Command::Publish { bytes, reply }).await?
    }

    /// From now on tells adverts in one slice of the network and hears those of some. At the start both are
    /// [`Slice::ALL`].
    ///
    /// # Errors
    /// `RoleOff`, `Closed`.
    pub async fn set_slices(&self, told: Slice, heard: BTreeSet<Slice>) -> Result<(), NetError> {
        self.ask(|reply| Command::SetSlices { told, heard, reply }).await?
    }

    /// How deep the slices are that connected peers listen to, each peer's deepest one.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn depths(&self) -> Result<Vec<u8>, NetError> {
        self.ask(|reply| Command::Depths { reply }).await
    }

    /// Tells the DHT that this process has what a key means, from now on, or no longer. Others forget it some time
    /// after the last time that they were told.
    ///
    /// # Errors
    /// `RoleOff`, `TooMany`, `Closed`.
    pub async fn provide(&self, key: BlobId, on: bool) -> Result<(), NetError> {
        self.ask(|reply| Command::Provide { key, on, reply }).await?
    }

    /// Nodes that told the DHT that they have what a key means, at most [`limits::PROVIDERS`]; nobody checked it. None
    /// when nobody is found within [`limits::SEEK_TIMEOUT`], or without that role.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn providers(&self, key: BlobId) -> Result<Vec<NodeId>, NetError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Seek { key, reply }).await?;
        Ok(timeout(limits::SEEK_TIMEOUT, answer).await.ok().and_then(Result::ok).unwrap_or_default())
    }

    /// Refreshes the DHT's routing table from the peers that are known.
    ///
    /// # Errors
    /// `RoleOff`, `Closed`.
    pub async fn bootstrap(&self) -> Result<(), NetError> {
        self.ask(|reply| Command::Bootstrap { reply }).await?
    }

    /// Ends the swarm and all its connections; returns when its ports are free.
    pub async fn shutdown(&self) {
        // An error means that it has ended already.
        let _ = self.ask(|reply| Command::Shutdown { reply }).await;
    }

    /// The nodes that were met or heard of, connected ones first, at most [`limits::KNOWN_NODES`].
    ///
    /// # Errors
    /// `Closed`.
    pub async fn known_nodes(&self) -> Result<Vec<KnownNode>, NetError> {
        self.ask(|reply| Command::Known { reply }).await
    }

    /// Dials the bootstrap nodes in the background; one that cannot be reached is only logged.
    pub(crate) fn join_bootstrap(&self, addrs: Vec<Multiaddr>) {
        if addrs.is_empty() {
            return;
        }
        let handle = self.clone();
        tokio::spawn(async move {
            for addr in addrs {
                if let Err(error) = handle.dial(addr.clone()).await {
                    tracing::warn!(%addr, %error, "bootstrap_failed");
                }
            }
            // Without the role there is no table to refresh.
            let _ = handle.bootstrap().await;
        });
    }

    /// Says in the peer's own words why it does not speak a protocol of ours.
    pub(crate) async fn why_unsupported(&self, node: NodeId, what: &'static str) -> NetError {
        let info = match self.peer_info(node).await {
            Ok(info) => info,
            Err(error) => return error,
        };
        let ours = self.inner.names.version;
        if info.versions.contains(&ours) {
            NetError::NotOffered { node, what }
        } else if !info.versions.is_empty() {
            NetError::PeerSpeaks { node, speaks: info.versions, ours }
        } else if info.other_network {
            NetError::OtherNetwork { node }
        } else {
            NetError::NotKinoflock { node, agent: info.agent }
        }
    }

    pub(crate) async fn send(&self, command: Command) -> Result<(), NetError> {
        self.inner.commands.send(command).await.map_err(|_| NetError::Closed)
    }

    /// Sends a command and waits for its answer.
    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, NetError> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| NetError::Closed)
    }
}

pub(crate) fn timed_out(node: NodeId, what: &'static str, limit: Duration) -> NetError {
    NetError::TimedOut { node, what, limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX) }
}

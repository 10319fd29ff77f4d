//! Swarms for tests: quick to start, on loopback, at free ports; and a raw peer that can say anything.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use kinoflock_net::streams::{self, OpenError, Opened};
use kinoflock_net::{Multiaddr, NetConfig, NetEvent, NetEvents, NetHandle, PeerId, start};
use kinoflock_protocol::progress::{JobEvent, Progress};
use kinoflock_protocol::query::{JobQuery, QueryAction};
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::{Envelope, JobId, Keypair, NetworkId, NodeId, Nonce, UnixMillis};
use libp2p::swarm::SwarmEvent;
use libp2p::swarm::{Stream, dial_opts::DialOpts};
use libp2p::{StreamProtocol, SwarmBuilder, noise, tcp, yamux};
use tokio::sync::{mpsc, oneshot};

/// Far longer than anything here takes; a hang ends as a failure that says where.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The transport under test.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Over {
    Tcp,
    Quic,
}

impl Over {
    pub(crate) fn listen(self) -> Multiaddr {
        match self {
            Self::Tcp => "/ip4/127.0.0.1/tcp/0".parse().unwrap(),
            Self::Quic => "/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap(),
        }
    }
}

/// Runs one async body over TCP and over QUIC.
macro_rules! over_both {
    ($($(#[$meta:meta])* $name:ident => $body:expr;)*) => {$(
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $(#[$meta])*
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn tcp() { $crate::support::patient($body($crate::support::Over::Tcp)).await; }
            $(#[$meta])*
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn quic() { $crate::support::patient($body($crate::support::Over::Quic)).await; }
        }
    )*};
}
pub(crate) use over_both;

/// Fails instead of hanging.
pub(crate) async fn patient<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("it must not hang")
}

pub(crate) fn network() -> NetworkId {
    NetworkId::named("kinoflock-net-tests")
}

/// A key that no other call gets.
pub(crate) fn fresh_key() -> Keypair {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut seed = [7; 32];
    seed[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    seed[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    Keypair::from_seed(&seed)
}

/// A swarm under test.
pub(crate) struct Peer {
    pub(crate) net: NetHandle,
    pub(crate) events: NetEvents,
}

pub(crate) fn node_config(over: Over) -> NetConfig {
    NetConfig {
        listen: vec![over.listen()],
        gossip: false,
        kad: kinoflock_net::KadRole::Off,
        ..NetConfig::node(fresh_key(), network(), 0)
    }
}

pub(crate) async fn peer(config: NetConfig) -> Peer {
    let (net, events) = start(config).await.unwrap();
    Peer { net, events }
}

/// A node that listens over one transport.
pub(crate) async fn node(over: Over) -> Peer {
    peer(node_config(over)).await
}

/// A client, connected to a node.
pub(crate) async fn client_of(node: &Peer) -> Peer {
    let client = peer(NetConfig::client(network())).await;
    client.net.dial(node.addr()).await.unwrap();
    client
}

impl Peer {
    pub(crate) fn id(&self) -> NodeId {
        self.net.local_node()
    }

    pub(crate) fn addr(&self) -> Multiaddr {
        self.net.dialable_addrs().first().unwrap().clone()
    }

    /// The first event that `pick` takes; others are dropped.
    pub(crate) async fn wait_for<T>(&mut self, mut pick: impl FnMut(NetEvent) -> Option<T>) -> T {
        let picked = async {
            loop {
                let event = self.events.recv().await.expect("the swarm is alive");
                if let Some(found) = pick(event) {
                    return found;
                }
            }
        };
        patient(picked).await
    }

    /// Answers every request with `Acknowledged` in the background; gives the handle.
    pub(crate) fn acknowledging(self) -> NetHandle {
        let Self { net, mut events } = self;
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if let NetEvent::Request { responder, .. } = event {
                    responder.send(Response::Acknowledged).unwrap();
                }
            }
        });
        net
    }
}

/// Asks, with patience for a machine that has other things to do, and hears `Acknowledged`.
pub(crate) async fn acknowledged(client: &NetHandle, node: NodeId) {
    let response = client.request_within(node, Request::Capacity, PATIENCE).await.unwrap();
    assert_eq!(response, Response::Acknowledged);
}

pub(crate) fn job() -> JobId {
    JobId::from_bytes([5; 32])
}

pub(crate) fn event(seq: u64, event: JobEvent) -> Progress {
    Progress { job: job(), seq, event }
}

pub(crate) fn query(node: NodeId) -> Envelope {
    let query = JobQuery {
        job: job(),
        action: QueryAction::Progress,
        node,
        issued_at: UnixMillis(1_700_000_000_000),
        nonce: Nonce::from_bytes([1; 16]),
    };
    Envelope::seal(&fresh_key(), &network(), &query).unwrap()
}

/// `len` bytes without a pattern that repeats within a chunk.
pub(crate) fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut filled = Vec::with_capacity(len + 8);
    while filled.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        filled.extend_from_slice(&state.to_le_bytes());
    }
    filled.truncate(len);
    filled
}

type Answer = Result<Opened, OpenError>;

/// A peer without manners: opens streams of any protocol and leaves every byte on them to the test.
pub(crate) struct Raw {
    open: mpsc::Sender<(StreamProtocol, oneshot::Sender<Answer>)>,
    pub(crate) closed: oneshot::Receiver<()>,
}

impl Raw {
    /// A raw peer, connected to this address.
    pub(crate) async fn connect(addr: &Multiaddr) -> Self {
        let quic = |mut config: libp2p::quic::Config| {
            config.max_concurrent_stream_limit = 2048;
            config
        };
        let mut swarm = SwarmBuilder::with_new_identity()
            .with_tokio()
            .with_tcp(tcp::Config::default(), noise::Config::new, || {
                let mut config = yamux::Config::default();
                config.set_max_num_streams(2048);
                config
            })
            .unwrap()
            .with_quic_config(quic)
            .with_behaviour(|_| streams::Behaviour::new(Vec::new()).0)
            .unwrap()
            .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
            .build();
        let peer = peer_of(addr);
        swarm.dial(DialOpts::peer_id(peer).addresses(vec![addr.clone()]).build()).unwrap();
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionEstablished { .. } => break,
                SwarmEvent::OutgoingConnectionError { error, .. } => panic!("cannot dial: {error}"),
                _ => {}
            }
        }
        let (open, mut opens) = mpsc::channel::<(StreamProtocol, oneshot::Sender<Answer>)>(64);
        let (gone, closed) = oneshot::channel();
        tokio::spawn(async move {
            let mut gone = Some(gone);
            loop {
                tokio::select! {
                    event = swarm.select_next_some() => {
                        if let SwarmEvent::ConnectionClosed { .. } = event
                            && let Some(gone) = gone.take()
                        {
                            let _ = gone.send(());
                        }
                    }
                    asked = opens.recv() => match asked {
                        Some((protocol, reply)) => swarm.behaviour_mut().open(peer, protocol, reply),
                        None => return,
                    },
                }
            }
        });
        Self { open, closed }
    }

    pub(crate) async fn open(&self, protocol: &str) -> Result<Stream, OpenError> {
        let protocol = StreamProtocol::try_from_owned(protocol.to_owned()).unwrap();
        let (reply, opened) = oneshot::channel();
        self.open.send((protocol, reply)).await.unwrap();
        patient(opened).await.unwrap_or(Err(OpenError::NotConnected)).map(|opened| opened.stream)
    }
}

pub(crate) fn peer_of(addr: &Multiaddr) -> PeerId {
    addr.iter()
        .find_map(|part| match part {
            libp2p::multiaddr::Protocol::P2p(peer) => Some(peer),
            _ => None,
        })
        .unwrap()
}

//! A peer without manners: it connects as every peer does, then opens streams of any protocol and leaves every byte on
//! them to the test.

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use kinoflock_net::streams::{self, OpenError, Opened};
use kinoflock_net::{Multiaddr, PeerId};
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{Stream, SwarmEvent};
use libp2p::{StreamProtocol, Swarm, SwarmBuilder, noise, tcp, yamux};
use tokio::sync::{mpsc, oneshot};

use crate::sandbox::PATIENCE;

/// Streams that one connection may hold, by its own limits: more than any honest peer opens.
const STREAMS: usize = 2048;
/// Opens under way at once; further ones wait.
const OPENS: usize = 64;

type Answer = Result<Opened, OpenError>;

/// The peer. It hangs up when it is dropped.
#[derive(Debug)]
pub struct Raw {
    open: mpsc::Sender<(StreamProtocol, oneshot::Sender<Answer>)>,
}

impl Raw {
    /// Connects; `None` where the other side does not want that.
    ///
    /// # Panics
    /// When the address names no peer.
    pub async fn connect(address: &str) -> Option<Self> {
        let address: Multiaddr = address.parse().expect("an address");
        let peer = address.iter().find_map(|part| match part {
            libp2p::multiaddr::Protocol::P2p(peer) => Some(peer),
            _ => None,
        });
        let peer = peer.expect("the address names a peer");
        let mut swarm = swarm();
        swarm.dial(DialOpts::peer_id(peer).addresses(vec![address]).build()).ok()?;
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionEstablished { .. } => break,
                SwarmEvent::OutgoingConnectionError { .. } => return None,
                _ => {}
            }
        }
        let (open, opens) = mpsc::channel(OPENS);
        tokio::spawn(drive(swarm, peer, opens));
        Some(Self { open })
    }

    /// Opens a stream; `None` where the other side does not want that.
    pub async fn open(&self, protocol: &str) -> Option<Stream> {
        let protocol = StreamProtocol::try_from_owned(protocol.to_owned()).ok()?;
        let (reply, opened) = oneshot::channel();
        self.open.send((protocol, reply)).await.ok()?;
        tokio::time::timeout(PATIENCE, opened).await.ok()?.ok()?.ok().map(|opened| opened.stream)
    }

    /// Opens a stream and writes this onto it; gives the stream, still open.
    pub async fn say(&self, protocol: &str, bytes: &[u8]) -> Option<Stream> {
        let mut stream = self.open(protocol).await?;
        stream.write_all(bytes).await.ok()?;
        stream.flush().await.ok()?;
        Some(stream)
    }
}

/// What the far side says until it ends the stream; an abort is an end, too.
///
/// # Panics
/// When it does not end it.
pub async fn until_end(stream: &mut Stream) -> Vec<u8> {
    let reading = async {
        let (mut said, mut buffer) = (Vec::new(), [0; 1024]);
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return said,
                Ok(read) => said.extend_from_slice(&buffer[..read]),
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("the far side ends the stream")
}

fn swarm() -> Swarm<streams::Behaviour> {
    let muxer = || {
        let mut config = yamux::Config::default();
        config.set_max_num_streams(STREAMS);
        config
    };
    let quic = |mut config: libp2p::quic::Config| {
        config.max_concurrent_stream_limit = STREAMS as u32;
        config
    };
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, muxer)
        .expect("a transport")
        .with_quic_config(quic)
        .with_behaviour(|_| streams::Behaviour::new(Vec::new()).0)
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
        .build()
}

async fn drive(
    mut swarm: Swarm<streams::Behaviour>,
    peer: PeerId,
    mut opens: mpsc::Receiver<(StreamProtocol, oneshot::Sender<Answer>)>,
) {
    loop {
        tokio::select! {
            _ = swarm.select_next_some() => {}
            asked = opens.recv() => match asked {
                Some((protocol, reply)) => swarm.behaviour_mut().open(peer, protocol, reply),
                None => return,
            },
        }
    }
}

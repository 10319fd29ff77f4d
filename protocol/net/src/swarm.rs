//! The one builder of swarms: TCP with Noise and Yamux, QUIC, DNS, and the sub-behaviours by the roles of
//! the configuration.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;

use futures::{AsyncRead, AsyncWrite};
use libp2p::connection_limits::ConnectionLimits;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::upgrade::Version;
use libp2p::metrics::{BandwidthTransport, Metrics, Registry};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    Multiaddr, PeerId, Swarm, Transport, autonat, connection_limits, core, dcutr, dns, identify, identity,
    mdns, memory_connection_limits, noise, ping, quic, relay, request_response, tcp, upnp, yamux,
};
use tokio::sync::{mpsc, watch};

use crate::behaviour::Behaviour;
use crate::config::{Identity, NetConfig, RelayRole};
use crate::driver::{Channels, Driver, Listening};
use crate::error::NetError;
use crate::event::NetEvents;
use crate::handle::NetHandle;
use crate::names::Names;
use crate::peer::agent_of_a_new_life;
use crate::rejoin::Ways;
use crate::rpc::ControlCodec;
use crate::slices::Slice;
use crate::streams::Incoming;
use crate::{arrivals, discovery, dnsaddr, inbound, limits, rejoin, streams};

/// Starts a swarm and its driver task on the current tokio runtime. Returns once every configured address is
/// listened on. The swarm ends with [`NetHandle::shutdown`] or when the last handle is dropped.
///
/// # Errors
/// `Start` when no swarm could be built, `Listen` when an address is taken or not of this machine.
pub async fn start(config: NetConfig) -> Result<(NetHandle, NetEvents), NetError> {
    start_with_metrics(config, None).await
}

/// As [`start`], with libp2p's own metrics registered.
///
/// # Errors
/// As [`start`].
pub async fn start_with_metrics(
    config: NetConfig,
    mut registry: Option<&mut Registry>,
) -> Result<(NetHandle, NetEvents), NetError> {
    let keypair = keypair(&config.identity)?;
    let names = Names::new(&config.network, config.version);
    let (mut swarm, incoming) = build(&config, &keypair, &names, registry.as_deref_mut())?;
    let pending = listen(&mut swarm, &config.listen)?;
    for addr in &config.external {
        swarm.add_external_address(addr.clone());
    }
    let (command_sender, commands) = mpsc::channel(limits::COMMANDS);
    let (event_sender, events) = mpsc::channel(limits::EVENTS);
    let (listening_sender, listening) = watch::channel(Listening { pending, ..Listening::default() });
    let handle =
        NetHandle::new(&config, keypair.public().to_peer_id(), names.clone(), command_sender, listening);
    tokio::spawn(inbound::accept(names.clone(), incoming, handle.acceptor(event_sender.clone())));
    let channels = Channels { commands, events: event_sender, listening: listening_sender };
    let metrics = registry.map(Metrics::new);
    tokio::spawn(Driver::new(&config, swarm, names, metrics, channels).run());
    handle.listening().await?;
    if config.company == 0 {
        handle.join_bootstrap(config.bootstrap);
    } else {
        let named: Vec<_> = config.bootstrap.into_iter().chain(config.known).collect();
        let ways = Ways::new(config.company, &named);
        tokio::spawn(rejoin::stay(Arc::downgrade(&handle.inner), handle.local_node(), ways));
    }
    Ok((handle, events))
}

fn keypair(identity: &Identity) -> Result<identity::Keypair, NetError> {
    match identity {
        Identity::Fresh => Ok(identity::Keypair::generate_ed25519()),
        // libp2p zeroes the copy that it is given.
        Identity::Key(key) => identity::Keypair::ed25519_from_bytes(key.seed().to_vec())
            .map_err(|error| NetError::Start { why: error.to_string() }),
    }
}

type Built = (Swarm<Behaviour>, mpsc::Receiver<Incoming>);

fn build(
    config: &NetConfig,
    keypair: &identity::Keypair,
    names: &Names,
    registry: Option<&mut Registry>,
) -> Result<Built, NetError> {
    let relayed = config.reach.dial_relays.then(|| relay::client::new(keypair.public().to_peer_id()));
    let (relays, relayed) = relayed.unzip();
    let transport = transport(keypair, dnsaddr::settings(config.resolver), relays, registry)?;
    let (behaviour, incoming) = behaviour(config, keypair, names, relayed)?;
    let buffer = const { NonZeroUsize::new(32).expect("invariant: not zero") };
    let swarm_config = libp2p::swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(limits::IDLE_CONNECTION)
        .with_max_negotiating_inbound_streams(limits::NEGOTIATING_INBOUND)
        .with_notify_handler_buffer_size(buffer)
        .with_per_connection_event_buffer_size(buffer.get())
        // A protocol that is proposed alone is spoken at once, without waiting for the answer: one round trip less.
        .with_substream_upgrade_protocol_override(Version::V1Lazy)
        .with_smart_dial();
    let swarm = Swarm::new(transport, behaviour, keypair.public().to_peer_id(), swarm_config);
    Ok((swarm, incoming))
}

type Boxed = core::transport::Boxed<(PeerId, StreamMuxerBox)>;

/// QUIC and TCP, names resolved by these settings.
fn transport(
    keypair: &identity::Keypair,
    names: dnsaddr::Settings,
    relays: Option<relay::client::Transport>,
    registry: Option<&mut Registry>,
) -> Result<Boxed, NetError> {
    let (config, options) = names;
    let named = dns::tokio::Transport::custom(unnamed(keypair)?, config, options).boxed();
    let all = match relays {
        None => named,
        Some(relays) => {
            secured(relays, keypair)?.or_transport(named).map(|either, _| either.into_inner()).boxed()
        }
    };
    Ok(match registry {
        None => all,
        Some(registry) => BandwidthTransport::new(all, registry)
            .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
            .boxed(),
    })
}

/// A transport of bytes with Noise and Yamux on top.
fn secured<T>(transport: T, keypair: &identity::Keypair) -> Result<Boxed, NetError>
where
    T: Transport + Send + Unpin + 'static,
    T::Output: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    T::Error: Send + Sync + 'static,
    T::Dial: Send,
    T::ListenerUpgrade: Send,
{
    let noise = noise::Config::new(keypair).map_err(|error| NetError::Start { why: error.to_string() })?;
    let mut yamux = yamux::Config::default();
    yamux.set_max_num_streams(limits::MUXER_STREAMS);
    let secured = transport.upgrade(Version::V1Lazy).authenticate(noise).multiplex(yamux);
    let timed = secured.timeout(limits::DIAL_TIMEOUT);
    Ok(timed.map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer))).boxed())
}

fn unnamed(keypair: &identity::Keypair) -> Result<Boxed, NetError> {
    let tcp = secured(tcp::tokio::Transport::new(tcp::Config::default().nodelay(true)), keypair)?;
    let mut config = quic::Config::new(keypair);
    config.max_idle_timeout = limits::QUIC_IDLE.as_millis() as u32;
    config.keep_alive_interval = limits::QUIC_KEEP_ALIVE;
    config.max_concurrent_stream_limit = limits::MUXER_STREAMS as u32;
    let quic = quic::tokio::Transport::new(config).map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    Ok(quic.or_transport(tcp).map(|either, _| either.into_inner()).boxed())
}

fn behaviour(
    config: &NetConfig,
    keypair: &identity::Keypair,
    names: &Names,
    relayed: Option<relay::client::Behaviour>,
) -> Result<(Behaviour, mpsc::Receiver<Incoming>), NetError> {
    let (local, reach) = (keypair.public().to_peer_id(), config.reach);
    let connections = ConnectionLimits::default()
        .with_max_pending_incoming(Some(limits::CONNECTIONS_PENDING_IN))
        .with_max_pending_outgoing(Some(limits::CONNECTIONS_PENDING_OUT))
        .with_max_established_incoming(Some(config.max_connections_in))
        .with_max_established_outgoing(Some(limits::CONNECTIONS_OUT))
        .with_max_established_per_peer(Some(limits::CONNECTIONS_PER_PEER));
    let identify = identify::Config::new(names.identify.clone(), keypair.public())
        .with_agent_version(agent_of_a_new_life(&config.agent))
        .with_push_listen_addr_updates(true);
    let control = request_response::Config::default()
        .with_request_timeout(limits::RPC_TIMEOUT)
        .with_max_concurrent_streams(limits::RPC_STREAMS_PER_CONNECTION);
    let protocols = [(names.control.clone(), request_response::ProtocolSupport::Full)];
    let (streams, incoming) = streams::Behaviour::new(inbound::offers(names));
    let gossip =
        if config.gossip { Some(discovery::gossip(keypair, &names.topic_of(&Slice::ALL))?) } else { None };
    let mdns = if config.mdns { Some(lan(local)?) } else { None };
    let behaviour = Behaviour {
        blocked: libp2p::allow_block_list::Behaviour::default(),
        connections: connection_limits::Behaviour::new(connections),
        arrivals: arrivals::Behaviour::new(limits::CONNECTIONS_PENDING_PER_NETWORK),
        memory: memory_connection_limits::Behaviour::with_max_bytes(config.max_memory),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(config.ping_interval)),
        control: request_response::Behaviour::with_codec(ControlCodec, protocols, control),
        streams,
        kad: Toggle::from(discovery::kad(config.kad, local, names.kad.clone())),
        gossip: Toggle::from(gossip),
        mdns: Toggle::from(mdns),
        relayed: Toggle::from(relayed),
        punch: Toggle::from(reach.dial_relays.then(|| dcutr::Behaviour::new(local))),
        relay: Toggle::from(carrier(config, local)),
        probe: Toggle::from(reach.probe.then(autonat::v2::client::Behaviour::default)),
        answer_probes: Toggle::from(reach.answer_probes.then(autonat::v2::server::Behaviour::default)),
        upnp: Toggle::from(reach.upnp.then(upnp::tokio::Behaviour::default)),
    };
    Ok((behaviour, incoming))
}

/// The relay, which takes nobody until the driver knows that this process is reached.
fn carrier(config: &NetConfig, local: PeerId) -> Option<relay::Behaviour> {
    if config.reach.relay == RelayRole::Off {
        return None;
    }
    let mut relay = relay::Behaviour::new(
        local,
        relay::Config {
            max_reservations: limits::RESERVATIONS,
            max_reservations_per_peer: limits::RESERVATIONS_PER_PEER,
            reservation_duration: limits::RESERVATION_TIME,
            max_circuits: limits::CIRCUITS,
            max_circuits_per_peer: limits::CIRCUITS_PER_PEER,
            max_circuit_duration: config.circuits.time,
            max_circuit_bytes: config.circuits.bytes,
            ..relay::Config::default()
        },
    );
    relay.set_status(Some(relay::Status::Disable));
    Some(relay)
}

fn lan(local: PeerId) -> Result<mdns::tokio::Behaviour, NetError> {
    mdns::tokio::Behaviour::new(mdns::Config::default(), local)
        .map_err(|error| NetError::Start { why: format!("mdns: {error}") })
}

/// Starts to listen; how many listeners will tell their addresses.
fn listen(swarm: &mut Swarm<Behaviour>, addrs: &[Multiaddr]) -> Result<usize, NetError> {
    let failed = |addr: &Multiaddr, error: &(dyn std::error::Error + 'static)| NetError::Listen {
        addr: addr.clone(),
        why: root_cause(error),
    };
    // All before the first is taken: a plain bind of `::` takes the port of `0.0.0.0` too.
    for addr in addrs {
        check_free(addr).map_err(|error| failed(addr, &error))?;
    }
    for addr in addrs {
        swarm.listen_on(addr.clone()).map_err(|error| failed(addr, &error))?;
    }
    Ok(addrs.len())
}

/// libp2p listens on TCP ports with `SO_REUSEPORT`, so that a second process would share a taken port and get
/// half of its connections. A plain bind refuses it.
fn check_free(addr: &Multiaddr) -> std::io::Result<()> {
    let mut parts = addr.iter();
    let ip: IpAddr = match parts.next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        _ => return Ok(()),
    };
    match parts.next() {
        Some(Protocol::Tcp(port)) if port != 0 => std::net::TcpListener::bind((ip, port)).map(drop),
        _ => Ok(()),
    }
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

//! What the swarm tells the driver, and what becomes of it.

use std::sync::Arc;

use libp2p::core::ConnectedPoint;
use libp2p::core::transport::{ListenerId, PortUse};
use libp2p::metrics::Recorder;
use libp2p::request_response::{self, Message, OutboundFailure};
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, gossipsub, identify, mdns, ping};

use super::{Driver, RequestFailure, dial_error, own_port_in_use};
use crate::behaviour::BehaviourEvent;
use crate::discovery::{Advert, Ticket, is_global};
use crate::event::NetEvent;
use crate::limits;
use crate::peer::{self, PeerInfo, is_relayed};
use crate::rpc::{self, Reply, Responder, WireRequest, WireResponse};

impl Driver {
    pub(super) fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        if let Some(metrics) = &self.metrics {
            metrics.record(&event);
        }
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour_event(event),
            SwarmEvent::ConnectionEstablished {
                peer_id, connection_id, endpoint, num_established, ..
            } => {
                self.on_connected(peer_id, connection_id, &endpoint, num_established.get());
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. } => {
                tracing::debug!(peer = %peer_id, cause = ?cause, "disconnected");
                let meet_anew = self.book.disconnected(&peer_id);
                self.identifying.remove(&peer_id);
                if let Some(node) = peer::node_id(&peer_id) {
                    self.tell(NetEvent::Disconnected { node });
                }
                if meet_anew && let Err(error) = self.dial_known(peer_id) {
                    tracing::debug!(peer = %peer_id, %error, "not_met_anew");
                }
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.on_dial_failed(connection_id, peer_id, &error);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                tracing::debug!(from = %send_back_addr, %error, "incoming_connection_failed");
            }
            SwarmEvent::NewListenAddr { address, listener_id } => {
                self.on_place(listener_id);
                self.on_listening(address);
            }
            SwarmEvent::ExternalAddrConfirmed { address } => self.on_own_address(address, true),
            SwarmEvent::ExternalAddrExpired { address } => self.on_own_address(address, false),
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.channels.listening.send_modify(|state| state.addrs.retain(|addr| *addr != address));
            }
            SwarmEvent::ListenerClosed { addresses, reason, listener_id } => {
                self.on_listener_closed(&addresses, &format!("{reason:?}"), listener_id);
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "listener_failed"),
            _ => {}
        }
    }

    fn on_behaviour_event(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Control(event) => self.on_control(event),
            BehaviourEvent::Identify(event) => {
                if let Some(metrics) = &self.metrics {
                    metrics.record(&event);
                }
                if let identify::Event::Received { peer_id, info, .. } = event {
                    self.on_identified(peer_id, info);
                }
            }
            BehaviourEvent::Ping(event) => {
                if let Some(metrics) = &self.metrics {
                    metrics.record(&event);
                }
                let ping::Event { peer, result, .. } = event;
                if let Ok(round_trip) = result {
                    self.book.pinged(&peer, round_trip);
                }
            }
            BehaviourEvent::Gossip(event) => {
                if let Some(metrics) = &self.metrics {
                    metrics.record(&event);
                }
                self.on_gossip(event);
            }
            BehaviourEvent::Kad(event) => {
                if let Some(metrics) = &self.metrics {
                    metrics.record(&event);
                }
                self.on_kad(event);
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => {
                for (peer, addr) in found {
                    self.on_found(peer, addr);
                }
            }
            BehaviourEvent::Mdns(mdns::Event::Expired(_)) => {}
            BehaviourEvent::Probe(event) => self.on_probed(event),
            BehaviourEvent::Punch(event) => self.on_punched(&event),
            BehaviourEvent::Upnp(event) => self.on_upnp(&event),
            BehaviourEvent::Relayed(event) => tracing::debug!(?event, "relayed"),
            BehaviourEvent::Relay(event) => tracing::debug!(?event, "relay"),
            BehaviourEvent::AnswerProbes(event) => tracing::trace!(?event, "probe_answered"),
            BehaviourEvent::Blocked(never) => match never {},
            BehaviourEvent::Connections(never)
            | BehaviourEvent::Arrivals(never)
            | BehaviourEvent::Memory(never)
            | BehaviourEvent::Streams(never) => match never {},
        }
    }

    fn on_connected(&mut self, peer: PeerId, id: ConnectionId, endpoint: &ConnectedPoint, established: u32) {
        self.dialed.remove(&id);
        let remote = endpoint.get_remote_address().clone();
        self.book.connected(peer, remote.clone(), endpoint.is_dialer());
        if !endpoint.is_relayed() {
            self.on_direct(&peer);
        }
        let Some(node) = peer::node_id(&peer) else { return };
        for reply in self.connecting.remove(&peer).unwrap_or_default() {
            let _ = reply.send(Ok(node));
        }
        if let Some((_, reply)) = self.dialing.remove(&id) {
            let _ = reply.send(Ok(node));
        }
        if established == 1 {
            self.tell(NetEvent::Connected { node, addr: remote });
        }
    }

    fn on_dial_failed(&mut self, id: ConnectionId, peer: Option<PeerId>, error: &DialError) {
        if let Some((addr, reply)) = self.dialing.remove(&id) {
            let _ = reply.send(Err(dial_error(&addr.to_string(), error)));
        }
        let Some(peer) = peer.filter(|peer| !self.swarm.is_connected(peer)) else {
            self.dialed.remove(&id);
            return;
        };
        let Some(node) = peer::node_id(&peer) else { return };
        // A dial to some address only, by a sub-behaviour, says nothing about the others.
        let of_all = self.dialed.remove(&id);
        let wanted = self.connecting.contains_key(&peer);
        if of_all.is_none() && wanted && self.dial_known(peer).is_ok() {
            return;
        }
        let clashed = matches!(of_all, Some((_, PortUse::Reuse))) && own_port_in_use(error);
        if clashed && wanted && self.dial_known_from(peer, PortUse::New).is_ok() {
            return;
        }
        for reply in self.connecting.remove(&peer).unwrap_or_default() {
            let _ = reply.send(Err(dial_error(&node.to_string(), error)));
        }
    }

    fn on_listening(&mut self, addr: Multiaddr) {
        let mut last = false;
        self.channels.listening.send_modify(|state| {
            // How many a relay names is its own word.
            if state.addrs.len() < limits::LISTEN_ADDRESSES && !state.addrs.contains(&addr) {
                state.addrs.push(addr.clone());
            }
            last = state.pending == 1;
            state.pending = state.pending.saturating_sub(1);
        });
        self.tell(NetEvent::Listening { addr });
        if last {
            self.all_listen();
        }
    }

    fn on_listener_closed(&mut self, addresses: &[Multiaddr], reason: &str, listener: ListenerId) {
        self.channels.listening.send_modify(|state| {
            state.addrs.retain(|addr| !addresses.contains(addr));
        });
        if self.on_place_lost(listener) {
            tracing::debug!(?addresses, reason, "relay_listener_closed");
            addresses.iter().for_each(|addr| self.tell(NetEvent::NotListening { addr: addr.clone() }));
            return;
        }
        tracing::warn!(?addresses, reason, "listener_closed");
        self.channels.listening.send_modify(|state| {
            state.pending = state.pending.saturating_sub(usize::from(addresses.is_empty()));
        });
    }

    fn on_identified(&mut self, peer: PeerId, mut told: identify::Info) {
        let Some(node) = peer::node_id(&peer) else { return };
        told.protocols.truncate(limits::PROTOCOLS_PER_PEER);
        told.listen_addrs.truncate(limits::ADDRESSES_PER_PEER);
        // Its private addresses are of use only if it is as near as they say.
        let near = self.book.remote(&peer).is_some_and(|remote| !is_global(remote) && !is_relayed(remote));
        let usable = told.listen_addrs.iter().filter(|addr| near || is_global(addr));
        let usable: Vec<Multiaddr> = usable.cloned().collect();
        if told.protocols.contains(&self.names.kad)
            && let Some(kad) = self.swarm.behaviour_mut().kad.as_mut()
        {
            for addr in &usable {
                kad.add_address(&peer, addr.clone());
            }
        }
        self.on_maybe_relay(peer, &told, &usable);
        self.book.learn(peer, usable);
        let (agent, life) = peer::agent_and_life(&told.agent_version);
        if self.book.lives(peer, life) {
            // Connections of the life before may look alive for a while, and what this side said on them, its gossip
            // topics above all, the peer has never heard: with all of them gone, both sides begin again.
            tracing::debug!(peer = %peer, "came_back_unnoticed");
            // An error means that there is no connection any more.
            let _ = self.swarm.disconnect_peer_id(peer);
            return;
        }
        let (versions, other_network) = self.names.versions(&told.protocols);
        let info = PeerInfo {
            node,
            agent: agent.to_owned(),
            protocol_version: told.protocol_version,
            versions,
            other_network,
            is_node: told.protocols.contains(&self.names.kad),
            listen_addrs: told.listen_addrs,
            observed_addr: told.observed_addr,
            round_trip: None,
        };
        self.book.identified(peer, info.clone());
        for reply in self.identifying.remove(&peer).unwrap_or_default() {
            let _ = reply.send(info.clone());
        }
        let ours = self.names.version;
        if !info.versions.is_empty() && !info.versions.contains(&ours) {
            tracing::info!(peer = %peer, speaks = ?info.versions, ours, "other_version");
            self.tell(NetEvent::OtherVersion { node, speaks: info.versions.clone(), ours });
        }
        self.tell(NetEvent::Identified(Box::new(info)));
    }

    fn on_control(&mut self, event: request_response::Event<WireRequest, WireResponse>) {
        match event {
            request_response::Event::Message { peer, message, .. } => match message {
                Message::Request { request, channel, .. } => self.on_request(peer, request, channel),
                Message::Response { request_id, response } => {
                    if let Some(reply) = self.requests.remove(&request_id) {
                        let _ = reply.send(Ok(response));
                    }
                }
            },
            request_response::Event::OutboundFailure { request_id, error, .. } => {
                if let Some(reply) = self.requests.remove(&request_id) {
                    let _ = reply.send(Err(request_failure(&error)));
                }
            }
            request_response::Event::InboundFailure { peer, error, .. } => {
                tracing::debug!(peer = %peer, %error, "inbound_request_failed");
            }
            request_response::Event::ResponseSent { .. } => {}
        }
    }

    fn on_request(
        &mut self,
        peer: PeerId,
        request: WireRequest,
        channel: request_response::ResponseChannel<WireResponse>,
    ) {
        let Some(node) = peer::node_id(&peer) else { return };
        let refusal = match request {
            Ok(request) => {
                let places = self.inbound_per_peer.try_take(&peer);
                match places.zip(Arc::clone(&self.inbound).try_acquire_owned().ok()) {
                    Some((of_peer, of_all)) => {
                        let answers = self.answers.0.clone();
                        let inner = Reply { channel, answers, permits: [of_peer, of_all] };
                        let responder = Responder { inner: Some(inner) };
                        let addr = self.book.remote(&peer).cloned();
                        self.tell(NetEvent::Request { node, addr, request, responder });
                        return;
                    }
                    None => rpc::busy(),
                }
            }
            Err(fault) => rpc::fault(&fault),
        };
        // An error means that the peer no longer waits.
        let _ = self.swarm.behaviour_mut().control.send_response(channel, Ok(Box::new(refusal)));
    }

    fn on_gossip(&mut self, event: gossipsub::Event) {
        let gossipsub::Event::Message { propagation_source, message_id, message } = event else { return };
        let publisher = message.source.as_ref().and_then(peer::node_id);
        let (Some(publisher), Some(from)) = (publisher, peer::node_id(&propagation_source)) else { return };
        let acceptance = if message.data.len() > limits::ADVERT_BYTES {
            gossipsub::MessageAcceptance::Reject
        } else if let Ok(permit) = Arc::clone(&self.adverts).try_acquire_owned() {
            let verdicts = self.verdicts.0.clone();
            let ticket = Ticket { id: message_id, source: propagation_source, verdicts, permit };
            let advert = Advert { publisher, from, bytes: message.data, ticket: Some(ticket) };
            // Dropped when the owner does not keep up, which ignores it.
            self.tell(NetEvent::Advert(advert));
            return;
        } else {
            gossipsub::MessageAcceptance::Ignore
        };
        if let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() {
            gossip.report_message_validation_result(&message_id, &propagation_source, acceptance);
        }
    }

    fn on_found(&mut self, peer: PeerId, addr: Multiaddr) {
        self.book.learn(peer, [addr.clone()]);
        if let Some(node) = peer::node_id(&peer) {
            self.tell(NetEvent::Found { node, addr });
        }
    }
}

fn request_failure(error: &OutboundFailure) -> RequestFailure {
    match error {
        OutboundFailure::UnsupportedProtocols => RequestFailure::Unsupported,
        OutboundFailure::Io(error) if peer::is_unspoken(error) => RequestFailure::Unsupported,
        OutboundFailure::Timeout => RequestFailure::TimedOut,
        other => RequestFailure::Lost(other.to_string()),
    }
}

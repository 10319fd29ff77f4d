//! One connection's share of the stream behaviour: queues opens, hands accepted streams on, says `Busy`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use futures::future::{self, BoxFuture};
use futures::stream::{FuturesUnordered, StreamExt};
use futures::{AsyncWriteExt, FutureExt};
use libp2p::core::upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo};
use libp2p::swarm::handler::{
    ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
};
use libp2p::swarm::{
    ConnectionHandler, ConnectionHandlerEvent, Stream, StreamUpgradeError, SubstreamProtocol,
};
use libp2p::{PeerId, StreamProtocol};

use super::{Inbound, Incoming, Open, OpenError, Opened};
use crate::limits;

/// The handler of one connection.
pub struct Handler {
    peer: PeerId,
    relayed: bool,
    inbound: Arc<Inbound>,
    /// Opens that wait for their turn; bounded by [`limits::QUEUED_OPENS`].
    queued: VecDeque<Open>,
    /// Opens under negotiation; at most [`limits::NEGOTIATING_STREAMS`].
    negotiating: usize,
    /// `Busy` answers under way; at most [`limits::BUSY_ANSWERS`].
    answers: FuturesUnordered<BoxFuture<'static, ()>>,
    waker: Option<Waker>,
}

impl Handler {
    pub(super) fn new(peer: PeerId, relayed: bool, inbound: Arc<Inbound>) -> Self {
        Self {
            peer,
            relayed,
            inbound,
            queued: VecDeque::new(),
            negotiating: 0,
            answers: FuturesUnordered::new(),
            waker: None,
        }
    }

    fn accept(&mut self, stream: Stream, protocol: StreamProtocol) {
        let permits = self
            .inbound
            .per_peer
            .try_take(&self.peer)
            .zip(Arc::clone(&self.inbound.total).try_acquire_owned().ok());
        let Some((of_peer, of_total)) = permits else {
            self.say_busy(stream, &protocol);
            return;
        };
        let (peer, relayed) = (self.peer, self.relayed);
        let incoming = Incoming { peer, protocol, relayed, stream, permits: [of_peer, of_total] };
        // Only a dropped receiver can refuse it, at shutdown; dropping the stream then resets it.
        let _ = self.inbound.accepted.try_send(incoming);
    }

    fn say_busy(&mut self, mut stream: Stream, protocol: &StreamProtocol) {
        if self.answers.len() >= limits::BUSY_ANSWERS {
            tracing::debug!(peer = %self.peer, limit = limits::BUSY_ANSWERS, "stream_reset");
            return;
        }
        stream.ignore_for_keep_alive();
        let offer = self.inbound.offers.iter().find(|offer| offer.protocol == *protocol);
        let busy = offer.map(|offer| offer.busy.clone()).unwrap_or_default();
        let answer = async move {
            let write = async {
                stream.write_all(&busy).await?;
                stream.close().await
            };
            // A peer that does not take its answer in time loses it with the stream.
            let _ = tokio::time::timeout(limits::BUSY_TIMEOUT, write).await;
        };
        self.answers.push(answer.boxed());
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Open;
    type ToBehaviour = Infallible;
    type InboundProtocol = Names;
    type OutboundProtocol = Names;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Open;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        let names = self.inbound.offers.iter().map(|offer| offer.protocol.clone()).collect();
        SubstreamProtocol::new(Names(names), ())
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Open, Infallible>> {
        while let Poll::Ready(Some(())) = self.answers.poll_next_unpin(cx) {}
        while self.negotiating < limits::NEGOTIATING_STREAMS {
            let Some(open) = self.queued.pop_front() else { break };
            if open.reply.is_closed() {
                continue;
            }
            self.negotiating += 1;
            let protocol = Names(vec![open.protocol.clone()]);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: SubstreamProtocol::new(protocol, open).with_timeout(limits::HELLO_TIMEOUT),
            });
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, open: Open) {
        if self.queued.len() >= limits::QUEUED_OPENS {
            let _ = open.reply.send(Err(OpenError::QueueFull { limit: limits::QUEUED_OPENS }));
            return;
        }
        self.queued.push_back(open);
        self.wake();
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Self::InboundProtocol, Self::OutboundProtocol, (), Open>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, .. }) => {
                self.accept(protocol.0, protocol.1);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, info }) => {
                self.negotiating = self.negotiating.saturating_sub(1);
                // A caller that has gone drops the stream, which resets it.
                let opened = Opened { stream: protocol.0, relayed: info.relayed };
                let _ = info.reply.send(Ok(opened));
                self.wake();
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                self.negotiating = self.negotiating.saturating_sub(1);
                let _ = info.reply.send(Err(open_error(error)));
                self.wake();
            }
            _ => {}
        }
    }
}

/// Agrees on one of these names and hands the stream over as it is.
#[derive(Debug)]
pub struct Names(Vec<StreamProtocol>);

impl UpgradeInfo for Names {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.clone().into_iter()
    }
}

impl InboundUpgrade<Stream> for Names {
    type Output = (Stream, StreamProtocol);
    type Error = Infallible;
    type Future = future::Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: Stream, name: StreamProtocol) -> Self::Future {
        future::ready(Ok((stream, name)))
    }
}

impl OutboundUpgrade<Stream> for Names {
    type Output = (Stream, StreamProtocol);
    type Error = Infallible;
    type Future = future::Ready<Result<Self::Output, Infallible>>;

    fn upgrade_outbound(self, stream: Stream, name: StreamProtocol) -> Self::Future {
        future::ready(Ok((stream, name)))
    }
}

fn open_error(error: StreamUpgradeError<Infallible>) -> OpenError {
    match error {
        StreamUpgradeError::Timeout => {
            OpenError::TimedOut { limit_ms: limits::HELLO_TIMEOUT.as_millis() as u64 }
        }
        StreamUpgradeError::NegotiationFailed => OpenError::Unsupported,
        StreamUpgradeError::Io(error) => OpenError::Broken { why: error.to_string() },
        StreamUpgradeError::Apply(never) => match never {},
    }
}

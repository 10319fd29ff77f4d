//! What becomes of accepted streams: each gets a task, as many as there are permits.

use std::sync::Arc;

use kinoflock_protocol::NodeId;
use kinoflock_protocol::frame;
use kinoflock_protocol::progress::{ProgressFrame, ProgressOpen};
use kinoflock_protocol::rpc::{BlobReply, RpcError, unsupported_version};
use libp2p::swarm::Stream;
use tokio::sync::mpsc;

use crate::blobs::serve::Server;
use crate::event::NetEvent;
use crate::framed::{FrameFault, close, message_frame, read_message, write_all};
use crate::names::Names;
use crate::streams::{Incoming, Offer};
use crate::{limits, peer, progress};

/// What serving a stream needs.
#[derive(Debug, Clone)]
pub(crate) struct Acceptor {
    pub(crate) events: mpsc::Sender<NetEvent>,
    pub(crate) server: Arc<Server>,
}

/// The stream protocols that we accept, each with its way to say `Busy`.
pub(crate) fn offers(names: &Names) -> Vec<Offer> {
    let retry_after = limits::RETRY_AFTER;
    let fits = "invariant: a short frame is within its limit";
    let progress = message_frame(&ProgressFrame::Busy { retry_after }).expect(fits);
    let blobs = message_frame(&BlobReply::Busy { retry_after }).expect(fits);
    vec![
        Offer { protocol: names.progress.clone(), busy: progress },
        Offer { protocol: names.blobs.clone(), busy: blobs },
    ]
}

/// Gives each accepted stream its task until the swarm ends. The tasks are bounded by the permits that the
/// streams hold.
pub(crate) async fn accept(names: Names, mut incoming: mpsc::Receiver<Incoming>, acceptor: Acceptor) {
    while let Some(Incoming { peer, protocol, relayed, stream, permits }) = incoming.recv().await {
        let Some(node) = peer::node_id(&peer) else { continue };
        let acceptor = acceptor.clone();
        let is_blobs = protocol == names.blobs;
        tokio::spawn(async move {
            let served = if is_blobs {
                acceptor.server.serve(stream).await
            } else {
                acceptor.progress(node, stream, relayed).await
            };
            if let Err(fault) = served {
                tracing::debug!(peer = %node, %protocol, %fault, "inbound_stream_failed");
            }
            drop(permits);
        });
    }
}

impl Acceptor {
    async fn progress(&self, node: NodeId, mut stream: Stream, relayed: bool) -> Result<(), FrameFault> {
        let open: ProgressOpen = match read_message(&mut stream, limits::HELLO_TIMEOUT).await {
            Ok(Some(open)) => open,
            Ok(None) => return Ok(()),
            Err(fault) => return refuse_version(stream, fault).await,
        };
        progress::serve(&self.events, node, stream, open, relayed).await
    }
}

/// Tells the opener which version we speak, if that is what was wrong; gives the fault back.
pub(crate) async fn refuse_version(mut stream: Stream, fault: FrameFault) -> Result<(), FrameFault> {
    if let FrameFault::Message(RpcError::UnsupportedVersion { sent, .. }) = &fault {
        let report = unsupported_version(*sent);
        write_all(&mut stream, &frame::frame(&report, report.len())?).await?;
        close(&mut stream).await;
    }
    Err(fault)
}

//! A clip whose maker is reached over a relay only: relays carry no clip, so it comes sealed over a public node.
//!
//! The maker sees that its requester comes over a relay and puts a sealed copy with a node that both reach. It is asked
//! where, while a direct connection may still come about; whichever is first.

use std::time::{Duration, Instant};

use kinoflock_net::Multiaddr;
use kinoflock_net::multiaddr::Protocol;
use kinoflock_net::peer::{is_relayed, node_of};
use kinoflock_protocol::NodeId;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::query::QueryAction;
use kinoflock_protocol::rpc::{Request, Response};

use super::{Client, Event, Events, SessionError};
use crate::store::JobRecord;
use crate::ticket::parse_addresses;

/// How long the maker is asked for a mirror.
const MIRROR_WITHIN: Duration = Duration::from_secs(60);
/// Pause between two questions, in which a direct connection may come about.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Client {
    /// Fetches a clip over a mirror. False where its maker is reached directly, or names no mirror in time.
    pub(super) async fn fetch_mirrored(
        &self,
        record: &JobRecord,
        clip: &BlobRef,
        events: &Events,
    ) -> Result<bool, SessionError> {
        let until = Instant::now() + MIRROR_WITHIN;
        loop {
            if self.net.direct(record.node, LOOK_EVERY).await? {
                return Ok(false);
            }
            for holder in self.mirrors(record).await {
                let addresses = self.addresses_of_mirror(record, &holder);
                let Ok(true) = self.ask_mirror(record, holder, addresses).await else { continue };
                let record = self.store.job(&record.job)?;
                events.tell(Event::Mirrored { node: holder }).await;
                match self.fetch_sealed(&record, clip, events).await {
                    Ok(true) => return Ok(true),
                    Ok(false) => {}
                    Err(error) => {
                        tracing::debug!(node = %holder.short(), %error, "a mirror did not give the clip");
                        self.drop_holder(&record, &holder)?;
                    }
                }
            }
            if Instant::now() >= until {
                return Ok(false);
            }
        }
    }

    /// The nodes that hold sealed copies by the maker's word. To ask makes it put one there.
    async fn mirrors(&self, record: &JobRecord) -> Vec<NodeId> {
        let Ok(query) = self.query(record, QueryAction::Status) else { return Vec::new() };
        match self.net.request(record.node, Request::Status(query)).await {
            Ok(Response::Status(status)) => status.replicas.iter().copied().collect(),
            Ok(_) | Err(_) => Vec::new(),
        }
    }

    /// Where a mirror may be reached: met before, or the relay over which the maker is.
    fn addresses_of_mirror(&self, record: &JobRecord, holder: &NodeId) -> Vec<Multiaddr> {
        let met = self.store.met(&self.network).into_iter().find(|met| met.node == *holder);
        let mut addresses = met.map(|met| parse_addresses(&met.addresses)).unwrap_or_default();
        let relayed = parse_addresses(&record.addresses).into_iter().filter(is_relayed);
        let relays = relayed
            .map(|addr| addr.iter().take_while(|part| *part != Protocol::P2pCircuit).collect::<Multiaddr>());
        addresses.extend(relays.filter(|addr| node_of(addr) == Some(*holder)));
        addresses
    }
}

//! Which adverts are heard and where the own ones go; and who serves what, told and asked in the DHT.

use std::collections::BTreeSet;

use kinoflock_protocol::{BlobId, NodeId};
use libp2p::gossipsub::TopicHash;
use libp2p::kad::{
    self, GetProvidersOk, InboundRequest, QueryId, QueryResult, RecordKey, store::RecordStore,
};

use super::{Driver, Reply};
use crate::discovery::forgers;
use crate::error::NetError;
use crate::slices::{MAX_DEPTH, Slice};
use crate::{limits, peer};

/// The slices of this process.
#[derive(Debug)]
pub(super) struct Slices {
    /// Where the own adverts go.
    pub(super) told: Slice,
    /// Whose adverts are heard.
    heard: BTreeSet<Slice>,
}

impl Default for Slices {
    fn default() -> Self {
        Self { told: Slice::ALL, heard: BTreeSet::from([Slice::ALL]) }
    }
}

/// Somebody who waits for the nodes that provide a key.
#[derive(Debug)]
pub(super) struct Seeking {
    reply: Reply<Vec<NodeId>>,
    found: Vec<NodeId>,
}

impl Driver {
    pub(super) fn set_slices(&mut self, told: Slice, heard: BTreeSet<Slice>) -> Result<(), NetError> {
        let off = NetError::RoleOff { role: "gossip" };
        let topics = |slices: &BTreeSet<Slice>, but: &BTreeSet<Slice>| -> Vec<_> {
            slices.difference(but).map(|slice| self.names.topic_of(slice)).collect()
        };
        let (new, old) = (topics(&heard, &self.slices.heard), topics(&self.slices.heard, &heard));
        let gossip = self.swarm.behaviour_mut().gossip.as_mut().ok_or(off)?;
        for topic in new {
            let set = gossip.set_topic_params(topic.clone(), forgers());
            set.map_err(|why| NetError::Start { why: why.to_owned() })?;
            gossip.subscribe(&topic).map_err(|error| NetError::Start { why: error.to_string() })?;
        }
        for topic in old {
            gossip.unsubscribe(&topic);
        }
        self.slices = Slices { told, heard };
        let own = *self.swarm.local_peer_id();
        if let Some(kad) = self.swarm.behaviour_mut().kad.as_mut() {
            // The walk to the own key meets those of the same slice.
            kad.get_closest_peers(own);
        }
        Ok(())
    }

    /// The deepest slice of every peer that listens to adverts.
    pub(super) fn depths(&self) -> Vec<u8> {
        let Some(gossip) = self.swarm.behaviour().gossip.as_ref() else { return Vec::new() };
        let slices = |topics: Vec<&TopicHash>| {
            topics
                .into_iter()
                .filter_map(|topic| self.names.slice_of(topic.as_str()))
                .map(|s| s.depth())
                .max()
        };
        gossip
            .all_peers()
            .filter_map(|(_, topics)| slices(topics))
            .map(|depth| depth.min(MAX_DEPTH))
            .collect()
    }

    /// Tells the DHT that this process has what the key means, from now on, or no longer.
    pub(super) fn provide(&mut self, key: &BlobId, on: bool) -> Result<(), NetError> {
        let kad = self.swarm.behaviour_mut().kad.as_mut().ok_or(NetError::RoleOff { role: "kad" })?;
        let key = RecordKey::new(key.as_bytes());
        if !on {
            kad.stop_providing(&key);
            return Ok(());
        }
        let full = |_| NetError::TooMany { what: "keys in the DHT", limit: limits::PROVIDED_KEYS };
        kad.start_providing(key).map(drop).map_err(full)
    }

    pub(super) fn seek(&mut self, key: &BlobId, reply: Reply<Vec<NodeId>>) {
        self.seeking.retain(|_, seeking| !seeking.reply.is_closed());
        // Dropping the reply says that there is no answer.
        let Some(kad) = self.swarm.behaviour_mut().kad.as_mut() else { return };
        if self.seeking.len() < limits::WAITERS {
            let query = kad.get_providers(RecordKey::new(key.as_bytes()));
            self.seeking.insert(query, Seeking { reply, found: Vec::new() });
        }
    }

    pub(super) fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::InboundRequest { request: InboundRequest::AddProvider { record: Some(record) } } => {
                let Some(kad) = self.swarm.behaviour_mut().kad.as_mut() else { return };
                // The store bounds how many it takes; one that it has no room for is known to others.
                if let Err(error) = kad.store_mut().add_provider(record) {
                    tracing::debug!(%error, "a provider was not noted");
                }
            }
            kad::Event::OutboundQueryProgressed {
                id,
                result: QueryResult::GetProviders(result),
                step,
                ..
            } => {
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = result {
                    self.found_providers(id, providers.iter().filter_map(peer::node_id));
                }
                if step.last {
                    self.end_seeking(&id);
                }
            }
            _ => {}
        }
    }

    fn found_providers(&mut self, id: QueryId, providers: impl Iterator<Item = NodeId>) {
        let Some(seeking) = self.seeking.get_mut(&id) else { return };
        for node in providers {
            if seeking.found.len() < limits::PROVIDERS && !seeking.found.contains(&node) {
                seeking.found.push(node);
            }
        }
        if seeking.found.len() == limits::PROVIDERS
            && let Some(mut query) =
                self.swarm.behaviour_mut().kad.as_mut().and_then(|kad| kad.query_mut(&id))
        {
            query.finish();
        }
    }

    fn end_seeking(&mut self, id: &QueryId) {
        if let Some(seeking) = self.seeking.remove(id) {
            let _ = seeking.reply.send(seeking.found);
        }
    }
}

//! What only a job's requester may ask for: its status, its progress, its previews, its end.

use serde::{Deserialize, Serialize};

use crate::envelope::{Envelope, Kind, Message};
use crate::id::{JobId, NetworkId, NodeId, Nonce, PublicKey};
use crate::limits::{MAX_CLOCK_SKEW_MS, QUERY_LIFE_MS};
use crate::order::{OrderError, check_times};
use crate::units::{Millis, UnixMillis};

/// A signed question about, or command to, a job at one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobQuery {
    /// Which job.
    pub job: JobId,
    /// What is asked.
    pub action: QueryAction,
    /// Which node is asked.
    pub node: NodeId,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// Random.
    pub nonce: Nonce,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueryAction {
    /// How does it stand?
    Status,
    /// Stop it.
    Cancel,
    /// Tell its events.
    Progress,
    /// Tell its events, with previews.
    Previews,
    /// What do you hold for it?
    Held,
    /// Forget it: clip, latents, checkpoints, prompt. The receipt stays.
    Forget,
}

impl Message for JobQuery {
    const KIND: Kind = Kind::JobQuery;
    const VERSION: u8 = 1;
    const MAX_BODY: usize = 256;
}

/// A query that was checked against the node and the time; whether its signer owns the job, the node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ValidQuery {
    /// Who asks.
    pub signer: PublicKey,
    /// What is asked.
    pub query: JobQuery,
}

impl ValidQuery {
    /// Checks a signed query. `now` is the node's clock.
    pub fn parse(
        envelope: &Envelope,
        network: &NetworkId,
        now: UnixMillis,
        node: &NodeId,
    ) -> Result<Self, OrderError> {
        let opened = envelope.open::<JobQuery>(network)?;
        let query = opened.value;
        if query.node != *node {
            return Err(OrderError::OrderForAnotherNode { addressed: query.node, here: *node });
        }
        let expires_at = query.issued_at.plus(Millis(QUERY_LIFE_MS + MAX_CLOCK_SKEW_MS));
        check_times("query", query.issued_at, expires_at, now)?;
        Ok(Self { signer: opened.signer, query })
    }
}

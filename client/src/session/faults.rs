//! Which errors are a node's fault. What befalls it is not: a full disk, a deadline that passed, an owner who takes the
//! card back.

use std::time::Duration;

use kinoflock_protocol::capacity::NodeState;
use kinoflock_protocol::rpc::{Request, Response};

use super::{Client, SessionError};
use crate::route::experience::Fault;
use crate::route::read_advert;
use crate::store::JobRecord;

/// Time in which a node must tell whether it still takes jobs.
const ADVERT_WITHIN: Duration = Duration::from_secs(3);
/// Codes of failures that are nobody's fault, or the artist's own: their inputs did not arrive.
const BEFALLEN: [&str; 7] =
    ["inputs", "inputs_missing", "deadline", "interrupted", "disk_full", "store_full", "out_of_memory"];

/// What a node did wrong, if this error is for another node to mend. A job that can never succeed is not.
pub(super) fn fault_of(error: &SessionError) -> Option<Fault> {
    match error {
        SessionError::Failed { retryable: true, .. } => Some(Fault::Failed),
        SessionError::Lost { .. } => Some(Fault::Forgot),
        SessionError::Stalled { .. } => Some(Fault::Stalled),
        SessionError::Disputed { .. } => Some(Fault::WrongClip),
        _ => None,
    }
}

impl Client {
    /// Notes that a node lost a job, if that counts against it.
    pub(super) async fn blame(&self, record: &JobRecord, error: &SessionError) {
        let is_befallen = match error {
            SessionError::Failed { code, .. } => BEFALLEN.contains(&code.as_str()),
            SessionError::Stalled { .. } => self.takes_no_jobs(record).await,
            _ => false,
        };
        let now = crate::now();
        let mut seen = self.store.experience(&record.node);
        if is_befallen {
            seen.set_aside(now);
        } else {
            seen.fault(fault_of(error).unwrap_or(Fault::OutOfReach), now);
        }
        self.keep_experience(&record.node, &seen);
    }

    /// Whether its operator paused or drains the node: then what waits there stands still, and that is their right.
    async fn takes_no_jobs(&self, record: &JobRecord) -> bool {
        let asked = self.net.request_within(record.node, Request::Capacity, ADVERT_WITHIN).await;
        let Ok(Response::Capacity(advert)) = asked else { return false };
        let told = read_advert(&advert, &self.network);
        told.is_ok_and(|(node, capacity)| node == record.node && capacity.state != NodeState::Open)
    }
}

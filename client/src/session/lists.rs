//! Signed lists: fetched from nodes that hold them, the newest edition kept; their nodes are further ways in, their models
//! have names.
//!
//! Who hands an edition over does not matter: it is signed by the list's publisher, for this network, in time, with a
//! greater sequence number than the one before, or it is not taken.

use std::time::Duration;

use futures::future::join_all;
use kinoflock_protocol::list::{Edition, ListError, ListName, ListedModel};
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::{Envelope, Millis, ModelId, NodeId};

use super::find::Found;
use super::{Client, SessionError};
use crate::ticket::{Way, address_of};

/// Nodes that are asked for a list.
const ASKED: usize = 8;
/// Time for a node to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long nobody is asked again for a list that is here.
const FRESH: Millis = Millis(60 * 60 * 1000);

/// A model as a list knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The name that the list's publisher gave it.
    pub list: String,
    /// What it says of the model.
    pub model: ListedModel,
}

impl Client {
    /// Takes an edition, if it is newer than the one that is kept. Tells whether it was.
    ///
    /// # Errors
    /// When it is no edition of this list, or the disk refuses.
    pub fn take_edition(&self, name: &ListName, edition: &Envelope) -> Result<bool, SessionError> {
        let given = Edition::read(edition, &self.network, name, crate::now())?.sequence();
        let mut is_newer = false;
        self.store.update_list(name, |record| {
            let held = record.edition.as_ref().and_then(|held| self.read_edition(name, held).ok());
            is_newer = held.is_none_or(|held| held.sequence() < given);
            if is_newer {
                record.edition = Some(edition.clone());
            }
        })?;
        Ok(is_newer)
    }

    fn read_edition(&self, name: &ListName, edition: &Envelope) -> Result<Edition, ListError> {
        Edition::read(edition, &self.network, name, crate::now())
    }

    /// The newest edition that is here, while it may be believed.
    #[must_use]
    pub fn edition(&self, name: &ListName) -> Option<Edition> {
        let edition = self.store.list(name)?.edition?;
        self.read_edition(name, &edition).ok()
    }

    /// The ways that the lists lead to.
    pub(super) fn listed_ways(&self) -> Vec<Way> {
        let mut ways = Vec::new();
        for edition in self.lists.iter().filter_map(|name| self.edition(name)) {
            let Edition::Nodes(list) = edition else { continue };
            ways.extend(list.nodes.iter().map(address_of).map(|(node, addrs)| Way::Node(node, addrs)));
            ways.extend(list.addresses.iter().filter_map(|addr| addr.parse().ok()).map(Way::Address));
        }
        ways
    }

    /// What the lists say of a model.
    #[must_use]
    pub fn listings(&self, model: &ModelId) -> Vec<Listing> {
        let editions = self.lists.iter().filter_map(|name| self.edition(name));
        let models = editions.filter_map(|edition| match edition {
            Edition::Models(list) => Some(list),
            Edition::Nodes(_) => None,
        });
        let listing = |list: kinoflock_protocol::list::ModelList| {
            let said = list.models.iter().find(|listed| listed.model == *model).cloned()?;
            Some(Listing { list: list.name.to_string(), model: said })
        };
        models.filter_map(listing).collect()
    }

    /// Asks the nodes that were found for the lists that were not asked for lately. Tells whether there is news.
    pub(super) async fn refresh_lists(&self, found: &[Found]) -> Result<bool, SessionError> {
        let due = |name: &&ListName| {
            self.edition(name).is_none()
                || self.store.list(name).is_none_or(|kept| kept.asked_at.plus(FRESH) < crate::now())
        };
        let due: Vec<ListName> = self.lists.iter().filter(due).copied().collect();
        let mut news = false;
        for name in due {
            let asked = found.iter().take(ASKED).map(|found| self.ask_for_list(found.candidate.node, name));
            for edition in join_all(asked).await.into_iter().flatten() {
                match self.take_edition(&name, &edition) {
                    Ok(is_newer) => news |= is_newer,
                    Err(SessionError::Store(error)) => return Err(error.into()),
                    Err(error) => tracing::debug!(list = %name, %error, "an edition was refused"),
                }
            }
            self.store.update_list(&name, |kept| kept.asked_at = crate::now())?;
        }
        Ok(news)
    }

    async fn ask_for_list(&self, node: NodeId, name: ListName) -> Option<Envelope> {
        match self.net.request_within(node, Request::List(name), ANSWER_WITHIN).await {
            Ok(Response::List(edition)) => Some(edition),
            _ => None,
        }
    }

    /// Hands an edition to nodes; tells which took it, and why the others did not.
    pub async fn publish_edition(
        &self,
        edition: &Envelope,
        found: &[Found],
    ) -> Vec<(NodeId, Result<(), String>)> {
        let handing = found.iter().map(|found| found.candidate.node).map(|node| async move {
            let request = Request::Publish(edition.clone());
            let told = match self.net.request_within(node, request, ANSWER_WITHIN).await {
                Ok(Response::Acknowledged) => Ok(()),
                Ok(Response::Error { text, .. }) => Err(text.to_string()),
                Ok(other) => Err(format!("it answered {}", other.name())),
                Err(error) => Err(error.to_string()),
            };
            (node, told)
        });
        join_all(handing).await
    }
}

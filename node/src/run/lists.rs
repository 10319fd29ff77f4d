//! Signed lists that this node subscribes to: fetched from peers that have them, kept over restarts, handed on to whoever
//! asks.
//!
//! Of each list the newest edition is held: signed by the list's publisher for this network, in time, with a greater
//! sequence number than the one before. Who brings it does not matter.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kinoflock_client::ticket::address_of;
use kinoflock_net::NetHandle;
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{NetworkId, NodeId};
use kinoflock_protocol::limits::MAX_ENVELOPE;
use kinoflock_protocol::list::{Edition, ListError, ListName};
use kinoflock_protocol::rpc::{Request, Response};

use super::{Daemon, Note, unix_now};

/// Name of the folder in the state folder.
const FOLDER: &str = "lists";
/// Nodes that are asked at each sweep whether they have newer editions.
const ASKED: usize = 3;

/// Why an edition is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("it is no signed list")]
    NoList,
    #[error("this node does not subscribe to {0}")]
    NotSubscribed(ListName),
    #[error(transparent)]
    Invalid(#[from] ListError),
    #[error("edition {given} is not newer than {held}, which is held")]
    Older { given: u64, held: u64 },
}

impl Refused {
    fn code(&self) -> &'static str {
        match self {
            Self::NoList => "no_list",
            Self::NotSubscribed(_) => "not_subscribed",
            Self::Invalid(error) => error.code(),
            Self::Older { .. } => "older",
        }
    }
}

/// The lists that are subscribed to; each with its newest edition, once there is one.
#[derive(Debug)]
pub(super) struct Lists {
    folder: PathBuf,
    lists: BTreeMap<ListName, Option<Held>>,
}

#[derive(Debug)]
struct Held {
    envelope: Envelope,
    edition: Edition,
}

impl Lists {
    /// What an earlier run kept of these lists. What cannot be read or believed any more is passed over.
    pub(super) fn open(state: &Path, network: &NetworkId, names: &[ListName]) -> Self {
        let folder = state.join(FOLDER);
        let mut lists = Self { lists: names.iter().map(|name| (*name, None)).collect(), folder };
        for name in names {
            let path = lists.path(name);
            let small = std::fs::metadata(&path).is_ok_and(|data| data.len() <= MAX_ENVELOPE as u64);
            let bytes = small.then(|| std::fs::read(&path).ok()).flatten();
            if let Some(envelope) = bytes.and_then(|bytes| Envelope::decode(&bytes).ok()) {
                let _ = lists.take(envelope, network);
            }
        }
        lists
    }

    fn path(&self, name: &ListName) -> PathBuf {
        self.folder.join(name.to_string())
    }

    /// Takes an edition if it is newer than the one that is held.
    fn take(&mut self, envelope: Envelope, network: &NetworkId) -> Result<ListName, Refused> {
        let name = ListName::of(&envelope).ok_or(Refused::NoList)?;
        let place = self.lists.get_mut(&name).ok_or(Refused::NotSubscribed(name))?;
        let edition = Edition::read(&envelope, network, &name, unix_now())?;
        if let Some(held) = place {
            let (given, held) = (edition.sequence(), held.edition.sequence());
            if given <= held {
                return Err(Refused::Older { given, held });
            }
        }
        *place = Some(Held { envelope, edition });
        Ok(name)
    }
}

impl Daemon {
    /// The newest edition that is held, while it may be believed.
    pub(super) fn list(&self, name: &ListName) -> Response {
        let held = self.lists.lists.get(name).and_then(Option::as_ref);
        match held.filter(|held| held.edition.expires_at() > unix_now()) {
            Some(held) => Response::List(held.envelope.clone()),
            None => Response::error("list_unknown", "this node holds no such list"),
        }
    }

    /// An edition that somebody brings.
    pub(super) fn take_published(&mut self, envelope: Envelope) -> Response {
        match self.take_list(envelope) {
            // Whoever brings what is here already has done no wrong.
            Ok(()) => Response::Acknowledged,
            Err(Refused::Older { given, held }) if given == held => Response::Acknowledged,
            Err(refused) => Response::error(refused.code(), &refused.to_string()),
        }
    }

    fn take_list(&mut self, envelope: Envelope) -> Result<(), Refused> {
        let bytes = envelope.encode();
        let name = self.lists.take(envelope, &self.network).inspect_err(|refused| {
            tracing::debug!(%refused, "list_refused");
        })?;
        let (path, turn) = (self.lists.path(&name), self.lists_turn.clone());
        tokio::spawn(async move {
            let _one_writer = turn.lock().await;
            let kept = tokio::task::spawn_blocking(move || keep(&path, &bytes)).await;
            if let Err(error) = kept.map_err(std::io::Error::other).flatten() {
                tracing::warn!(%error, "a list could not be kept; it is fetched again after a restart");
            }
        });
        tracing::info!(list = %name, "list_taken");
        self.learn_listed(&name);
        Ok(())
    }

    /// Nodes of a list are dialed where company is missing.
    fn learn_listed(&self, name: &ListName) {
        let held = self.lists.lists.get(name).and_then(Option::as_ref);
        let Some(Held { edition: Edition::Nodes(list), .. }) = held else { return };
        let nodes: Vec<_> = list.nodes.iter().map(address_of).collect();
        let net = self.net.clone();
        tokio::spawn(async move {
            for (node, addresses) in nodes {
                // An error means that the network has ended.
                let _ = net.add_addresses(node, addresses).await;
            }
        });
    }

    /// What an earlier run kept leads to nodes.
    pub(super) fn learn_all_listed(&self) {
        self.lists.lists.keys().for_each(|name| self.learn_listed(name));
    }

    /// Asks a node that has come for the lists.
    pub(super) fn ask_for_lists(&self, node: NodeId) {
        if self.lists.lists.is_empty() {
            return;
        }
        let (net, names) = (self.net.clone(), self.lists.lists.keys().copied().collect());
        self.spawn(async move { Note::Lists { editions: fetch(&net, node, names).await } });
    }

    /// Asks some of the nodes that are known for newer editions.
    pub(super) fn ask_around_for_lists(&self) {
        let mut nodes: Vec<NodeId> = self.adverts.live().map(|(node, _)| node).collect();
        let turn = (unix_now().0 / 1000) as usize;
        if !nodes.is_empty() {
            let first = turn % nodes.len();
            nodes.rotate_left(first);
        }
        nodes.into_iter().take(ASKED).for_each(|node| self.ask_for_lists(node));
    }

    pub(super) fn handle_lists(&mut self, editions: Vec<Envelope>) {
        for edition in editions {
            // What is wrong with it was logged; another node may have a better one.
            let _ = self.take_list(edition);
        }
    }
}

async fn fetch(net: &NetHandle, node: NodeId, names: Vec<ListName>) -> Vec<Envelope> {
    let mut editions = Vec::new();
    for name in names {
        match net.request(node, Request::List(name)).await {
            Ok(Response::List(envelope)) => editions.push(envelope),
            Ok(_) => {}
            Err(_) => return editions,
        }
    }
    editions
}

/// Writes the file whole or not at all.
fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let part = path.with_extension("part");
    std::fs::write(&part, bytes)?;
    std::fs::rename(&part, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kinoflock_protocol::codec::{List, Text};
    use kinoflock_protocol::id::Keypair;
    use kinoflock_protocol::list::{ListKind, NodeList};
    use kinoflock_protocol::units::Millis;

    use super::*;

    fn publisher() -> Keypair {
        Keypair::from_seed(&[5; 32])
    }

    fn network() -> NetworkId {
        NetworkId::named("test")
    }

    fn edition(key: &Keypair, network: &NetworkId, sequence: u64, life: Millis) -> Envelope {
        let list = NodeList {
            name: Text::new("reef").unwrap(),
            sequence,
            issued_at: unix_now(),
            expires_at: unix_now().plus(life),
            nodes: List::default(),
            addresses: List::default(),
        };
        Envelope::seal(key, network, &list).unwrap()
    }

    #[test]
    fn only_newer_editions_of_the_publisher_for_this_network_are_taken_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let name = ListName { publisher: publisher().public(), kind: ListKind::Nodes };
        let mut lists = Lists::open(folder.path(), &network(), &[name]);
        let day = Millis(86_400_000);
        let mut take = |envelope| lists.take(envelope, &network());
        assert_eq!(take(edition(&publisher(), &network(), 5, day)).unwrap(), name);
        for sequence in [4, 5] {
            let older = take(edition(&publisher(), &network(), sequence, day));
            assert!(matches!(older, Err(Refused::Older { held: 5, .. })), "{older:?}");
        }
        let foreign = take(edition(&publisher(), &NetworkId::named("other"), 6, day));
        assert!(matches!(foreign, Err(Refused::Invalid(_))), "{foreign:?}");
        let another = take(edition(&Keypair::from_seed(&[6; 32]), &network(), 6, day));
        assert!(matches!(another, Err(Refused::NotSubscribed(_))), "{another:?}");
        let mut forged = edition(&Keypair::from_seed(&[6; 32]), &network(), 6, day);
        forged.signer = publisher().public();
        assert!(matches!(take(forged), Err(Refused::Invalid(_))));
        let over = take(edition(&publisher(), &network(), 6, Millis(0)));
        assert!(matches!(over, Err(Refused::Invalid(ListError::Expired { .. }))), "{over:?}");
        let newer = edition(&publisher(), &network(), 7, day);
        take(newer.clone()).unwrap();
        keep(&lists.path(&name), &newer.encode()).unwrap();
        let again = Lists::open(folder.path(), &network(), &[name]);
        assert_eq!(again.lists[&name].as_ref().unwrap().edition.sequence(), 7);
    }
}

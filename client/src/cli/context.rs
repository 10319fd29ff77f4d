//! What every command needs: configuration, store, key, network, output.

use std::collections::BTreeSet;
use std::path::PathBuf;

use kinoflock_net::Multiaddr;
use kinoflock_protocol::list::ListName;
use kinoflock_protocol::{CollectiveId, Keypair, NodeId};

use super::args::{Common, Where};
use super::failure::Failure;
use crate::config::{Config, environment};
use crate::keys;
use crate::output::Output;
use crate::session::{Client, ClientOptions};
use crate::store::Store;
use crate::ticket::Way;

/// What every command needs.
pub(super) struct Context<'a> {
    pub(super) config: Config,
    pub(super) out: &'a Output,
}

impl<'a> Context<'a> {
    pub(super) fn load(common: &Common, out: &'a Output) -> Result<Self, Failure> {
        let mut config = Config::load(common.config.as_deref(), &environment())?;
        let over = |place: &mut PathBuf, flag: &Option<PathBuf>| {
            if let Some(flag) = flag {
                place.clone_from(flag);
            }
        };
        over(&mut config.store, &common.store);
        over(&mut config.key, &common.key);
        Ok(Self { config, out })
    }

    pub(super) fn store(&self) -> Result<Store, Failure> {
        Ok(Store::open(&self.config.store)?)
    }

    /// The artist's key; made on its first use.
    pub(super) fn key(&self) -> Result<Keypair, Failure> {
        let (key, made) = keys::load_or_create(&self.config.key)?;
        if made {
            let path = self.config.key.display();
            self.out.words(&format!(
                "made your key at {path}; to be able to restore it, write down the words of: kinoflock key backup"
            ));
        }
        Ok(key)
    }

    pub(super) async fn client(&self) -> Result<Client, Failure> {
        // Key and store first: what is wrong with them should not wait for the network.
        let (key, store) = (self.key()?, self.store()?);
        let mut options = ClientOptions::new(self.config.network);
        options.mdns = self.config.mdns;
        options.resolver = self.config.resolver;
        options.collectives = self.collectives(&store)?;
        options.lists = self.lists(&store)?;
        Ok(Client::start(options, key, store).await?)
    }

    /// A client that only answers for a job that is known: it looks for nobody else.
    pub(super) async fn quiet_client(&self) -> Result<Client, Failure> {
        let (key, store) = (self.key()?, self.store()?);
        Ok(Client::start(ClientOptions::new(self.config.network), key, store).await?)
    }

    /// The ways to nodes, and whether they were named for this command alone.
    pub(super) fn ways(&self, client: &Client, at: &Where) -> Result<(Vec<Way>, bool), Failure> {
        let (ways, wrong) = client.known_ways(&self.config)?;
        if let Some(text) = &at.node {
            let way = match self.way(text)? {
                Way::Node(node, addresses) => Way::Node(node, addresses_of(node, addresses, &ways)),
                way => way,
            };
            return Ok((vec![way], true));
        }
        for (way, error) in wrong {
            self.out.words(&format!("{way}...: {error}"));
        }
        Ok((ways, false))
    }

    /// What was joined and what is configured for this network, as far as it can be read.
    pub(super) fn told_ways(&self, store: &Store) -> Result<Vec<Way>, Failure> {
        let texts = store.tickets()?;
        let ways = texts.iter().chain(&self.config.nodes).filter_map(|text| text.parse::<Way>().ok());
        Ok(ways.filter(|way| way.check_network(&self.config.network).is_ok()).collect())
    }

    /// The lists that the configuration names, and those that were added.
    pub(super) fn lists(&self, store: &Store) -> Result<Vec<ListName>, Failure> {
        let added = store.lists()?.into_iter().filter(|kept| kept.added);
        let added = added.filter_map(|kept| kept.name.parse::<ListName>().ok());
        let all: BTreeSet<ListName> = self.config.lists.iter().copied().chain(added).collect();
        Ok(all.into_iter().collect())
    }

    /// The collectives whose nodes come first: the configured one, else those of the tickets.
    pub(super) fn collectives(&self, store: &Store) -> Result<Vec<CollectiveId>, Failure> {
        if let Some(collective) = self.config.collective {
            return Ok(vec![collective]);
        }
        let ways = self.told_ways(store)?;
        let told: BTreeSet<_> = ways.iter().filter_map(Way::collective).collect();
        Ok(told.into_iter().collect())
    }

    pub(super) fn way(&self, text: &str) -> Result<Way, Failure> {
        let way: Way = text.parse()?;
        way.check_network(&self.config.network)?;
        Ok(way)
    }
}

/// A node's addresses, those that are known of it otherwise among them.
fn addresses_of(node: NodeId, mut addresses: Vec<Multiaddr>, known: &[Way]) -> Vec<Multiaddr> {
    let nodes = known.iter().filter_map(Way::nodes).flatten();
    for addr in nodes.filter(|(id, _)| *id == node).flat_map(|(_, known)| known) {
        if !addresses.contains(&addr) {
            addresses.push(addr);
        }
    }
    addresses
}

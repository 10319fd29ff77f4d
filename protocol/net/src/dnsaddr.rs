//! `/dnsaddr/NAME`: a list of nodes that is kept in DNS, so that whoever runs them can change it.
//!
//! The TXT records of `_dnsaddr.NAME` each hold `dnsaddr=` and an address, which may be another `/dnsaddr/...`. libp2p's
//! transport would stop at the first address that answers, and dial one after the other; here the whole list is looked up,
//! within bounds, so that all of its nodes are known and dialed side by side.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use tokio::time::timeout;

use crate::error::NetError;
use crate::limits;

/// How the records of a name are called.
const LABEL: &str = "_dnsaddr.";
/// How the text of a record begins.
const PREFIX: &str = "dnsaddr=";

/// Which server to ask, and how.
pub(crate) type Settings = (ResolverConfig, ResolverOpts);

/// The system's settings, or those for one server. Without `/etc/resolv.conf` (bare containers) names cannot be resolved,
/// but addresses by IP work.
pub(crate) fn settings(server: Option<SocketAddr>) -> Settings {
    if let Some(server) = server {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
            connection.port = server.port();
            connection
        });
        let server = NameServerConfig::new(server.ip(), true, connections.into());
        return (ResolverConfig::from_name_servers(vec![server]), ResolverOpts::default());
    }
    hickory_resolver::system_conf::read_system_conf().unwrap_or_else(|error| {
        tracing::warn!(%error, "no_resolver: only addresses by IP can be reached");
        (ResolverConfig::default(), ResolverOpts::default())
    })
}

/// Whether an address is such a list, with or without the node that is meant.
#[must_use]
pub fn is_dnsaddr(addr: &Multiaddr) -> bool {
    matches!(addr.iter().next(), Some(Protocol::Dnsaddr(_)))
}

/// Looks lists up.
#[derive(Debug)]
pub(crate) struct Lists(Option<TokioResolver>);

impl Lists {
    pub(crate) fn new((config, opts): Settings) -> Self {
        let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        Self(builder.with_options(opts).build().ok())
    }

    /// The addresses of a list, in the order of the records, those of lists within it after its own; an address that is no
    /// list is its own only one.
    pub(crate) async fn look_up(&self, addr: &Multiaddr) -> Result<Vec<Multiaddr>, NetError> {
        if !is_dnsaddr(addr) {
            return Ok(vec![addr.clone()]);
        }
        let failed = |why: String| NetError::Names { addr: addr.clone(), why };
        let Some(resolver) = &self.0 else { return Err(failed("this machine has no resolver".into())) };
        let late = |_| failed(format!("no answer within {} s", limits::DNSADDR_WAIT.as_secs()));
        let walked = timeout(limits::DNSADDR_WAIT, walk(addr, |name| records(resolver, name)));
        walked.await.map_err(late)?.map_err(failed)
    }
}

/// The texts of a name's records, or why there are none.
async fn records(resolver: &TokioResolver, name: String) -> Result<Vec<String>, String> {
    let found = resolver.txt_lookup(name).await.map_err(|error| error.to_string())?;
    let text = |data: &RData| match data {
        RData::TXT(text) => String::from_utf8(text.txt_data.concat()).ok(),
        _ => None,
    };
    Ok(found.answers().iter().filter_map(|record| text(&record.data)).collect())
}

/// Follows a list and those within it, each once.
async fn walk<F: Future<Output = Result<Vec<String>, String>>>(
    addr: &Multiaddr,
    mut records: impl FnMut(String) -> F,
) -> Result<Vec<Multiaddr>, String> {
    let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
    let mut waiting = VecDeque::from([addr.clone()]);
    let (mut lookups, mut why) = (0, None);
    while let Some(list) = waiting.pop_front() {
        let mut parts = list.iter();
        let Some(Protocol::Dnsaddr(name)) = parts.next() else { continue };
        if !seen.insert(list.clone()) {
            continue;
        }
        if lookups == limits::DNSADDR_LOOKUPS {
            why.get_or_insert(format!("it names more than {} lists", limits::DNSADDR_LOOKUPS));
            break;
        }
        lookups += 1;
        // Only those that lead to the node that is meant, if one is.
        let end: Multiaddr = parts.collect();
        let texts = match records(format!("{LABEL}{name}")).await {
            Ok(texts) => texts,
            Err(error) => {
                why.get_or_insert(error);
                continue;
            }
        };
        let addrs = texts.iter().filter_map(|text| text.strip_prefix(PREFIX)?.parse::<Multiaddr>().ok());
        for addr in addrs.filter(|addr| addr.ends_with(&end)) {
            if is_dnsaddr(&addr) {
                waiting.push_back(addr);
            } else if found.len() < limits::DNSADDR_ADDRESSES && !found.contains(&addr) {
                found.push(addr);
            }
        }
        waiting.truncate(limits::DNSADDR_LOOKUPS);
    }
    let none = || "its records name no address (each is TXT, dnsaddr=/ip4/.../p2p/NODE)".to_owned();
    if found.is_empty() { Err(why.unwrap_or_else(none)) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::cell::Cell;

    use super::*;

    fn addr(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    /// What a walk finds where each name has these records, and how many names were asked for.
    async fn walked(
        from: &str,
        zone: impl Fn(&str) -> Result<Vec<String>, String>,
    ) -> (Result<Vec<Multiaddr>, String>, usize) {
        let asked = Cell::new(0);
        let from = addr(from);
        let found = walk(&from, |name| {
            asked.set(asked.get() + 1);
            std::future::ready(zone(&name))
        });
        (found.await, asked.get())
    }

    #[tokio::test]
    async fn lists_within_lists_are_followed_and_what_is_no_address_is_passed_over() {
        let zone = |name: &str| match name {
            "_dnsaddr.one.example" => Ok(vec![
                "dnsaddr=/dnsaddr/two.example".to_owned(),
                "v=spf1 -all".to_owned(),
                "dnsaddr=nonsense".to_owned(),
                "dnsaddr=/ip4/198.18.0.1/tcp/1".to_owned(),
            ]),
            "_dnsaddr.two.example" => Ok(vec!["dnsaddr=/ip4/198.18.0.2/tcp/2".to_owned()]),
            _ => Err("no such name".to_owned()),
        };
        let (found, asked) = walked("/dnsaddr/one.example", zone).await;
        assert_eq!(found.unwrap(), [addr("/ip4/198.18.0.1/tcp/1"), addr("/ip4/198.18.0.2/tcp/2")]);
        assert_eq!(asked, 2);
        assert_eq!(walked("/dnsaddr/three.example", zone).await.0.unwrap_err(), "no such name");
    }

    #[tokio::test]
    async fn only_addresses_of_the_node_that_is_meant_are_taken() {
        let node = libp2p::PeerId::random();
        let wanted = format!("/ip4/198.18.0.2/tcp/1/p2p/{node}");
        let records = vec![
            format!("dnsaddr=/ip4/198.18.0.1/tcp/1/p2p/{}", libp2p::PeerId::random()),
            format!("dnsaddr={wanted}"),
        ];
        let zone = |_: &str| Ok(records.clone());
        let (found, _) = walked(&format!("/dnsaddr/one.example/p2p/{node}"), zone).await;
        assert_eq!(found.unwrap(), [addr(&wanted)]);
    }

    #[tokio::test]
    async fn circles_and_endless_lists_come_to_an_end() {
        let circle = |_: &str| Ok(vec!["dnsaddr=/dnsaddr/one.example".to_owned()]);
        let (found, asked) = walked("/dnsaddr/one.example", circle).await;
        assert!(found.unwrap_err().contains("name no address"));
        assert_eq!(asked, 1);
        let endless = |name: &str| Ok(vec![format!("dnsaddr=/dnsaddr/a{}", &name[LABEL.len()..]); 3]);
        let (found, asked) = walked("/dnsaddr/a.example", endless).await;
        assert!(found.unwrap_err().contains("more than"));
        assert_eq!(asked, limits::DNSADDR_LOOKUPS);
        let wide =
            |_: &str| Ok((1..1000).map(|port| format!("dnsaddr=/ip4/198.18.0.1/tcp/{port}")).collect());
        assert_eq!(walked("/dnsaddr/a.example", wide).await.0.unwrap().len(), limits::DNSADDR_ADDRESSES);
    }
}

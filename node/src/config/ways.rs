//! How the network is found: `network.bootstrap` with tickets, lists in DNS and addresses of nodes; `network.resolver`;
//! `network.lists`.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use kinoflock_protocol::NetworkId;
use kinoflock_protocol::limits::MAX_LISTS;
use kinoflock_protocol::list::ListName;
use kinoflock_protocol::names::{NODE_TICKET, NodeTicket};

use super::{ConfigError, ListenAddress, MAX_ADDRESSES, ids, invalid};

const KEY: &str = "network.bootstrap";

/// Every address that the entries lead to, each with its node or a list in DNS.
pub(super) fn check_bootstrap(network: &str, given: &[String]) -> Result<Vec<String>, ConfigError> {
    if given.len() > MAX_ADDRESSES {
        return Err(invalid(KEY, &format!("{} entries", given.len()), &format!("at most {MAX_ADDRESSES}")));
    }
    let mut all = Vec::new();
    for text in given.iter().map(|text| text.trim()) {
        let refused = |expected: &str| invalid(KEY, &text.chars().take(80).collect::<String>(), expected);
        if text.starts_with(NODE_TICKET) {
            let ticket: NodeTicket = text.parse().map_err(|error| refused(&format!("{error}")))?;
            if ticket.network != NetworkId::named(network) {
                return Err(refused(&format!(
                    "the ticket is for another network than '{network}' of network.id"
                )));
            }
            let addresses = ticket.nodes.iter().flat_map(|node| {
                let whole = move |addr: &str| format!("{addr}/p2p/{}", node.id);
                node.addresses.iter().map(move |addr| whole(addr.as_str()))
            });
            all.extend(addresses);
        } else if let Some(rest) = text.strip_prefix("/dnsaddr/") {
            let parts: Vec<&str> = rest.split('/').collect();
            let whole = match parts[..] {
                [host] => !host.is_empty(),
                [host, "p2p", node] => !host.is_empty() && node.parse::<kinoflock_protocol::NodeId>().is_ok(),
                _ => false,
            };
            if !whole {
                return Err(refused("a list in DNS is /dnsaddr/HOST or /dnsaddr/HOST/p2p/NODE"));
            }
            all.push(text.to_owned());
        } else {
            let address: ListenAddress = text.parse().map_err(|error| refused(&format!("{error}")))?;
            if address.peer().is_none() {
                return Err(refused("it must end in /p2p/NODE"));
            }
            all.push(text.to_owned());
        }
    }
    Ok(all)
}

pub(super) fn check_lists(given: &[String]) -> Result<Vec<ListName>, ConfigError> {
    let lists: BTreeSet<ListName> = ids("network.lists", given)?;
    if lists.len() > MAX_LISTS {
        return Err(invalid(
            "network.lists",
            &format!("{} lists", lists.len()),
            &format!("at most {MAX_LISTS}"),
        ));
    }
    Ok(lists.into_iter().collect())
}

pub(super) fn check_resolver(given: &str) -> Result<Option<SocketAddr>, ConfigError> {
    let expected = "it must be an address with a port, for example 192.0.2.53:53";
    let parsed = given.parse().map(Some).map_err(|_| invalid("network.resolver", given, expected));
    if given.is_empty() { Ok(None) } else { parsed }
}

//! `network.bootstrap`: tickets, lists in DNS, and addresses of nodes, as addresses that the network layer dials.

use kinoflock_protocol::NetworkId;
use kinoflock_protocol::names::{NODE_TICKET, NodeTicket};

use super::{ConfigError, ListenAddress, MAX_ADDRESSES, invalid};

const KEY: &str = "network.bootstrap";

/// Every address that the entries lead to, each with its node or a list in DNS.
pub(super) fn check(network: &str, given: &[String]) -> Result<Vec<String>, ConfigError> {
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

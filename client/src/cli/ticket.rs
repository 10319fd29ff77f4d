//! `kinoflock ticket`: the way in, passed on.

use serde::Serialize;

use super::context::Context;
use super::failure::{Exit, Failure};
use crate::ticket::{Way, node_ticket, parse_addresses};

#[derive(Serialize)]
pub(super) struct Told {
    pub(super) ticket: String,
}

/// Prints a ticket for nodes that this client knows: those it met first, the newest first, then those it was told of.
/// Nobody is asked.
pub(super) fn ticket(context: &Context<'_>) -> Result<(), Failure> {
    let (store, network) = (context.store()?, context.config.network);
    let met = store.met(&network).into_iter().map(|met| (met.node, parse_addresses(&met.addresses)));
    let told = context.told_ways(&store)?;
    let named = told.iter().filter_map(Way::nodes).flatten();
    let [collective] = context.collectives(&store)?[..] else {
        return print(node_ticket(network, met.chain(named), None), context);
    };
    print(node_ticket(network, met.chain(named), Some(collective)), context)
}

fn print(
    ticket: Option<kinoflock_protocol::names::NodeTicket>,
    context: &Context<'_>,
) -> Result<(), Failure> {
    let Some(ticket) = ticket else {
        let text = "no node is known yet; paste a ticket of somebody else first: kinoflock join TICKET";
        return Err(Failure::new(Exit::NoNode, "no_node", text));
    };
    let ticket = ticket.to_string();
    context.out.line(&ticket);
    context.out.words("whoever has it finds the way in: kinoflock join TICKET");
    context.out.record(&Told { ticket });
    Ok(())
}

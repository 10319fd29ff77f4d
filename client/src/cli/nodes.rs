//! `nodes`, `models`, `join`.

use std::collections::BTreeMap;

use kinoflock_protocol::capacity::{NodeState, SelfTest};
use kinoflock_protocol::list::ListedModel;
use kinoflock_protocol::{ModelId, NodeId};
use serde::Serialize;

use super::args::Where;
use super::context::Context;
use super::failure::{Exit, Failure};
use super::follow;
use crate::route::terms_sentence;
use crate::session::{Client, Found, Listing};
use crate::ticket::Way;

#[derive(Serialize)]
struct NodeRow<'a> {
    node: NodeId,
    name: &'a str,
    direct: bool,
    state: &'static str,
    models: Vec<String>,
    waiting_jobs: u32,
    wait_ms: u64,
    public_bps: u16,
    content_rules: bool,
    terms: &'a kinoflock_protocol::capacity::Terms,
    addresses: Vec<String>,
}

#[derive(Serialize)]
struct ModelRow {
    model: ModelId,
    name: String,
    architecture: String,
    nodes: usize,
    speed: u64,
    referenced: bool,
    lists: Vec<ListingRow>,
}

/// What a list says of a model.
#[derive(Serialize)]
struct ListingRow {
    list: String,
    name: String,
    architecture: String,
    licence: String,
    source: String,
}

#[derive(Serialize)]
struct Joined {
    event: &'static str,
    reached: usize,
}

pub(super) async fn nodes(at: &Where, context: &Context<'_>) -> Result<(), Failure> {
    for found in &find(at, context).await?.1 {
        let capacity = &found.candidate.capacity;
        let state = match capacity.state {
            NodeState::Open => "open",
            NodeState::Paused => "paused",
            NodeState::Draining => "draining",
        };
        let models: Vec<String> = capacity.models.iter().map(|offer| offer.name.to_string()).collect();
        let (node, name) = (found.candidate.node, capacity.name.as_str());
        context.out.line(format!("{node}  {name}").trim_end());
        let wait = capacity.queue.wait;
        let jobs = capacity.queue.jobs;
        context.out.line(&format!(
            "  {state}; {}; {}, about {wait} until a new one begins",
            if models.is_empty() { "no model now".to_owned() } else { models.join(", ") },
            counted(jobs as usize, "job"),
        ));
        context.out.line(&format!("  {}", terms_sentence(&capacity.terms)));
        if capacity.content_rules {
            context.out.line("  its operator has rules about content");
        }
        context.out.record(&NodeRow {
            node,
            name,
            direct: found.direct,
            state,
            models,
            waiting_jobs: jobs,
            wait_ms: wait.0,
            public_bps: capacity.serves.public_bps,
            content_rules: capacity.content_rules,
            terms: &capacity.terms,
            addresses: found.addresses.iter().map(ToString::to_string).collect(),
        });
    }
    Ok(())
}

pub(super) async fn models(at: &Where, context: &Context<'_>) -> Result<(), Failure> {
    let (client, found) = find(at, context).await?;
    let mut rows: BTreeMap<ModelId, ModelRow> = BTreeMap::new();
    for offer in found.iter().flat_map(|found| found.candidate.capacity.models.iter()) {
        let row = rows.entry(offer.model).or_insert_with(|| ModelRow {
            model: offer.model,
            name: offer.name.to_string(),
            architecture: offer.architecture.to_string(),
            nodes: 0,
            speed: 0,
            referenced: false,
            lists: client.listings(&offer.model).into_iter().map(ListingRow::from).collect(),
        });
        row.nodes += 1;
        row.speed = row.speed.max(offer.speed);
        row.referenced |= matches!(offer.self_test, SelfTest::Passed { .. });
    }
    if rows.is_empty() {
        context.out.words("the nodes that were found offer no model now");
    }
    for row in rows.values() {
        let tested = if row.referenced { "matches its card's fingerprint" } else { "unreferenced" };
        let (name, kind, nodes) = (&row.name, &row.architecture, counted(row.nodes, "node"));
        context.out.line(&format!("{name:<20} {kind:<14} {nodes:<9}  {tested}  {}", row.model));
        for ListingRow { list, name, licence, source, .. } in &row.lists {
            let licence = if licence.is_empty() { "licence not told" } else { licence };
            context.out.line(format!("  on the list {list:?} as {name}, {licence}  {source}").trim_end());
        }
        context.out.record(row);
    }
    Ok(())
}

pub(super) async fn join(text: &str, context: &Context<'_>) -> Result<(), Failure> {
    let way = context.way(text)?;
    if let Way::Node(node, _) = &way {
        let text = format!("{node} is a node's id, but not where it is; ask its operator for a ticket");
        return Err(Failure::usage(text));
    }
    let client = context.client().await?;
    client.store().insert_ticket(text.trim())?;
    let (events, told) = Client::events();
    let mut progress = context.out.progress();
    let ways = [way];
    let found = follow::show_while(client.find(&ways, &events), told, &mut progress).await;
    progress.clear();
    client.stop().await;
    let reached = match found {
        Ok(found) => found.len(),
        Err(failure) if failure.exit == Exit::NoNode => 0,
        Err(failure) => return Err(failure),
    };
    match reached {
        0 => context
            .out
            .words("remembered, but nobody there answers now; it is tried again with every command"),
        _ => context.out.words(&format!(
            "joined: {} known; make a clip with: kinoflock generate \"PROMPT\"",
            counted(reached, "node")
        )),
    }
    context.out.record(&Joined { event: "joined", reached });
    Ok(())
}

/// `1 node`, `2 nodes`.
fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

impl From<Listing> for ListingRow {
    fn from(listing: Listing) -> Self {
        let ListedModel { name, architecture, licence, source, .. } = listing.model;
        let [name, architecture, licence] = [name, architecture, licence].map(|text| text.to_string());
        Self { list: listing.list, name, architecture, licence, source: source.to_string() }
    }
}

/// The nodes, and the client that found them, which has ended its connections.
async fn find(at: &Where, context: &Context<'_>) -> Result<(Client, Vec<Found>), Failure> {
    let client = context.client().await?;
    let (events, told) = Client::events();
    let mut progress = context.out.progress();
    let (ways, pinned) = context.ways(&client, at)?;
    let finding = async {
        if pinned { client.find_named(&ways, &events).await } else { client.find(&ways, &events).await }
    };
    let found = follow::show_while(finding, told, &mut progress).await?;
    client.stop().await;
    Ok((client, found))
}

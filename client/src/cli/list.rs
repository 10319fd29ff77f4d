//! `kinoflock list`: lists that others sign, and one's own.

use std::path::Path;

use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::limits::{MAX_LISTED_MODELS, MAX_LISTED_NODES, MAX_LISTS};
use kinoflock_protocol::list::{Edition, ListKind, ListName, ListedModel, ModelList, NodeList};
use kinoflock_protocol::names::NodeAddress;
use kinoflock_protocol::{Envelope, Millis, ModelId};
use serde::{Deserialize, Serialize};

use super::args::{ListCommand, Sort, Where};
use super::context::Context;
use super::failure::Failure;
use super::follow;
use super::jobs::short_time;
use crate::session::Client;
use crate::ticket::{Way, address_of};

/// How long an edition is good for, if its file does not say.
const DAYS: u64 = 90;
/// Milliseconds of a day.
const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// Greatest file that is read, bytes.
const MAX_FILE: u64 = 256 * 1024;

/// A list as it is written down.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListFile {
    name: String,
    days: Option<u64>,
    #[serde(default)]
    nodes: Vec<String>,
    #[serde(default)]
    models: Vec<ModelEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelEntry {
    model: ModelId,
    name: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    licence: String,
    #[serde(default)]
    source: String,
}

#[derive(Serialize)]
struct Published {
    event: &'static str,
    list: String,
    sequence: String,
    taken_by: usize,
}

#[derive(Serialize)]
struct ListRow<'a> {
    list: &'a str,
    kind: &'static str,
    title: &'a str,
    held: bool,
    entries: usize,
}

pub(super) async fn run(command: ListCommand, context: &Context<'_>) -> Result<(), Failure> {
    match command {
        ListCommand::Publish { kind, file, node } => publish(kind, &file, &node, context).await,
        ListCommand::Add { name } => add(&name, context).await,
        ListCommand::Remove { name } => remove(&name, context),
        ListCommand::Show { name } => show(name.as_deref(), context),
    }
}

async fn publish(kind: Sort, file: &Path, at: &Where, context: &Context<'_>) -> Result<(), Failure> {
    let written = read(file)?;
    let store = context.store()?;
    let key = context.key()?;
    let kind = match kind {
        Sort::Nodes => ListKind::Nodes,
        Sort::Models => ListKind::Models,
    };
    let name = ListName { publisher: key.public(), kind };
    let now = crate::now();
    let before = store.list(&name).and_then(|kept| kept.edition);
    let before = before.and_then(|kept| Edition::read(&kept, &context.config.network, &name, now).ok());
    // By the clock, so that another machine with the same key goes on; and past what is here, whatever the clock says.
    let sequence = now.0.max(before.map_or(0, |kept| kept.sequence().saturating_add(1)));
    let edition = sign(&written, name, sequence, context)?;
    let client = context.client().await?;
    client.take_edition(&name, &edition)?;
    let (ways, pinned) = context.ways(&client, at)?;
    let (events, told) = Client::events();
    let mut progress = context.out.progress();
    let finding = async {
        if pinned { client.find_named(&ways, &events).await } else { client.find(&ways, &events).await }
    };
    let found = follow::show_while(finding, told, &mut progress).await.unwrap_or_default();
    progress.clear();
    let told = client.publish_edition(&edition, &found).await;
    client.stop().await;
    let taken_by = told.iter().filter(|(_, taken)| taken.is_ok()).count();
    for (node, why) in told.iter().filter_map(|(node, taken)| Some((node, taken.as_ref().err()?))) {
        context.out.words(&format!("node {} does not hold it: {why}", node.short()));
    }
    context.out.words(&match taken_by {
        0 => {
            "signed, but no node holds it yet: nodes hold what their network.lists names; publish again then"
                .to_owned()
        }
        1 => "1 node holds it and hands it on".to_owned(),
        count => format!("{count} nodes hold it and hand it on"),
    });
    context.out.words("whoever adds this name goes by your list: kinoflock list add NAME");
    context.out.line(&name.to_string());
    let (list, sequence) = (name.to_string(), sequence.to_string());
    context.out.record(&Published { event: "published", list, sequence, taken_by });
    Ok(())
}

fn read(file: &Path) -> Result<ListFile, Failure> {
    let failed = |error: &std::io::Error| Failure::file("read", file, error);
    let len = std::fs::metadata(file).map_err(|error| failed(&error))?.len();
    if len > MAX_FILE {
        return Err(Failure::usage(format!("{} has {len} bytes, the limit is {MAX_FILE}", file.display())));
    }
    let text = std::fs::read_to_string(file).map_err(|error| failed(&error))?;
    let wrong = |error: toml::de::Error| {
        Failure::usage(format!("in {}: {}", file.display(), error.to_string().trim()))
    };
    toml::from_str(&text).map_err(wrong)
}

fn sign(file: &ListFile, name: ListName, sequence: u64, context: &Context<'_>) -> Result<Envelope, Failure> {
    let issued_at = crate::now();
    let expires_at = issued_at.plus(Millis(file.days.unwrap_or(DAYS).saturating_mul(DAY_MS)));
    let title = text(&file.name)?;
    let (key, network) = (context.key()?, context.config.network);
    let sealed = match name.kind {
        ListKind::Nodes => {
            let (nodes, addresses) = nodes(&file.nodes, context)?;
            let list = NodeList { name: title, sequence, issued_at, expires_at, nodes, addresses };
            Envelope::seal(&key, &network, &list)
        }
        ListKind::Models => {
            let models = file.models.iter().map(listed).collect::<Result<Vec<_>, Failure>>()?;
            let models = List::<_, MAX_LISTED_MODELS>::new(models).map_err(too_long)?;
            Envelope::seal(
                &key,
                &network,
                &ModelList { name: title, sequence, issued_at, expires_at, models },
            )
        }
    };
    sealed.map_err(|error| Failure::usage(error.to_string()))
}

type Nodes = List<NodeAddress, MAX_LISTED_NODES>;
type Addresses =
    List<Text<{ kinoflock_protocol::limits::MAX_ADDRESS }>, { kinoflock_protocol::limits::MAX_ADDRESSES }>;

/// Tickets and addresses with a node become nodes, the others stay addresses.
fn nodes(texts: &[String], context: &Context<'_>) -> Result<(Nodes, Addresses), Failure> {
    let (mut nodes, mut addresses) = (Vec::new(), Vec::new());
    for written in texts {
        match context.way(written)? {
            Way::Address(addr) if Way::Address(addr.clone()).nodes().is_none() => {
                addresses.push(text(&addr.to_string())?);
            }
            Way::Ticket(ticket) => nodes.extend(ticket.nodes.iter().cloned()),
            way => {
                for (id, addrs) in way.nodes().unwrap_or_default() {
                    let addrs = addrs.iter().map(|addr| text(&addr.to_string()));
                    let addresses = List::new(addrs.collect::<Result<Vec<_>, _>>()?).map_err(too_long)?;
                    nodes.push(NodeAddress { id, addresses });
                }
            }
        }
    }
    Ok((List::new(nodes).map_err(too_long)?, List::new(addresses).map_err(too_long)?))
}

fn listed(entry: &ModelEntry) -> Result<ListedModel, Failure> {
    Ok(ListedModel {
        model: entry.model,
        name: text(&entry.name)?,
        architecture: text(&entry.architecture)?,
        licence: text(&entry.licence)?,
        source: text(&entry.source)?,
    })
}

fn text<const MAX: usize>(text: &str) -> Result<Text<MAX>, Failure> {
    Text::new(text).map_err(too_long)
}

fn too_long(error: kinoflock_protocol::codec::TooLong) -> Failure {
    Failure::usage(error.to_string())
}

fn name(text: &str) -> Result<ListName, Failure> {
    text.parse().map_err(|error: kinoflock_protocol::id::IdError| Failure::usage(error.to_string()))
}

async fn add(text: &str, context: &Context<'_>) -> Result<(), Failure> {
    let (name, store) = (name(text)?, context.store()?);
    let lists = context.lists(&store)?;
    if lists.len() >= MAX_LISTS && !lists.contains(&name) {
        return Err(Failure::usage(format!(
            "{MAX_LISTS} lists are the limit; remove one: kinoflock list remove NAME"
        )));
    }
    store.update_list(&name, |kept| kept.added = true)?;
    // One look at the network fetches it, if somebody who is there holds it.
    let client = context.client().await?;
    let (ways, _) = context.ways(&client, &Where::default())?;
    let (events, told) = Client::events();
    let mut progress = context.out.progress();
    let found = follow::show_while(client.find(&ways, &events), told, &mut progress).await;
    progress.clear();
    let edition = client.edition(&name);
    client.stop().await;
    match (edition, found) {
        (Some(edition), _) => context.out.words(&format!("added: {}", describe(&edition))),
        (None, Ok(_)) => {
            context.out.words("added, but no node that was found holds it; it is looked for again later")
        }
        (None, Err(_)) => context.out.words("added; it is fetched as soon as a node is found"),
    }
    show(Some(text), context)
}

fn remove(text: &str, context: &Context<'_>) -> Result<(), Failure> {
    let (name, store) = (name(text)?, context.store()?);
    if context.config.lists.contains(&name) {
        return Err(Failure::usage("the configuration names this list; take it out of lists = [...] there"));
    }
    let was_there = store.remove_list(&name)?;
    context.out.words(if was_there { "removed" } else { "it was not subscribed to" });
    Ok(())
}

fn show(wanted: Option<&str>, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let names = match wanted {
        Some(text) => vec![name(text)?],
        None => context.lists(&store)?,
    };
    if names.is_empty() {
        context.out.words("no list is subscribed to; add one by its name: kinoflock list add kflist1...");
    }
    for name in names {
        let kept = store.list(&name).and_then(|kept| kept.edition);
        let read = |kept: &Envelope| Edition::read(kept, &context.config.network, &name, crate::now()).ok();
        let edition = kept.as_ref().and_then(read);
        let said = edition.as_ref().map_or_else(|| "not here yet".to_owned(), describe);
        context.out.line(&format!("{name}  {said}"));
        if wanted.is_some() {
            edition.iter().for_each(|edition| entries(edition, context));
        }
        let (kind, list) = (if name.kind == ListKind::Nodes { "nodes" } else { "models" }, name.to_string());
        let title = edition.as_ref().map_or("", Edition::title);
        let (held, entries) = (edition.is_some(), edition.as_ref().map_or(0, count));
        context.out.record(&ListRow { list: &list, kind, title, held, entries });
    }
    Ok(())
}

fn entries(edition: &Edition, context: &Context<'_>) {
    match edition {
        Edition::Nodes(list) => {
            for node in list.nodes.iter() {
                let (id, addresses) = address_of(node);
                let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                context.out.line(&format!("  {id}  {}", addresses.join(" ")));
            }
            list.addresses.iter().for_each(|addr| context.out.line(&format!("  {addr}")));
        }
        Edition::Models(list) => {
            for model in list.models.iter() {
                let ListedModel { model, name, architecture, licence, source } = model;
                context.out.line(&format!("  {name:<20} {architecture:<14} {licence}  {source}  {model}"));
            }
        }
    }
}

fn count(edition: &Edition) -> usize {
    match edition {
        Edition::Nodes(list) => list.nodes.len() + list.addresses.len(),
        Edition::Models(list) => list.models.len(),
    }
}

fn describe(edition: &Edition) -> String {
    let what = match edition {
        Edition::Nodes(_) => "nodes",
        Edition::Models(_) => "models",
    };
    let until = short_time(edition.expires_at());
    format!("{:?}, {} {what}, good until {until}", edition.title(), count(edition))
}

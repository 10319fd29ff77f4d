//! `kinoflock adapter`: the artist's LoRA files, their signed cards, and `--lora`.

use std::io::Read;
use std::path::Path;

use kinoflock_protocol::card::{
    Author, Card, Consent, ConsentGiven, CreditShare, Licence, Subject, TrainingData, Upstream,
};
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{List, Text, TooLong};
use kinoflock_protocol::job::Adapter;
use kinoflock_protocol::limits::{MAX_BLOB_BYTES, MAX_ENVELOPE, WHOLE_BPS};
use kinoflock_protocol::{CardId, Envelope, Micro, RequesterId, ValidJob};
use serde::Serialize;

use super::args::{AdapterCommand, Add};
use super::context::Context;
use super::failure::{Exit, Failure};
use super::jobs::short_time;
use crate::provenance::{Cited, cited};
use crate::store::{AdapterRecord, Store};

/// Greatest header of a safetensors file that is read, bytes (16 MiB).
const MAX_HEADER: u64 = 16 << 20;
/// Greatest file with a signed card, bytes: its JSON form is several times as long.
const MAX_CARD_FILE: u64 = 8 * MAX_ENVELOPE as u64;

/// What is known of an adapter, for programs.
#[derive(Debug, Serialize)]
pub(super) struct AdapterFacts {
    /// Id of its weights.
    pub(super) adapter: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<String>,
    name: Option<String>,
    card: Option<CardId>,
    card_version: Option<u32>,
    authors: Vec<String>,
    licence: Option<String>,
    training_data: Option<String>,
    consent: Option<&'static str>,
    credit: Vec<Credit>,
    signed_by: Option<String>,
    summary: Option<String>,
}

/// A part of the credit.
#[derive(Debug, Serialize)]
struct Credit {
    name: String,
    percent: String,
}

pub(super) fn run(command: AdapterCommand, context: &Context<'_>) -> Result<(), Failure> {
    match command {
        AdapterCommand::Add(add) => self::add(&add, context),
        AdapterCommand::List => list(context),
        AdapterCommand::Show { adapter } => {
            let store = context.store()?;
            let record = store.find_adapter(&adapter)?;
            let facts = of_record(&record, &store, context)?;
            context.out.record(&facts);
            facts.lines().iter().for_each(|line| context.out.line(line));
            Ok(())
        }
        AdapterCommand::Card { adapter, output } => write_card(&adapter, &output, context),
        AdapterCommand::Remove { adapter } => remove(&adapter, context),
    }
}

fn add(add: &Add, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let weights = take_in(&add.file, &store)?;
    let before = store.adapter(&weights.id)?;
    let card = match (&add.card, says_something(add)) {
        (Some(file), _) => Some(read_card(file, &weights, context)?),
        (None, true) => Some(sign(add, &weights, before.as_ref(), &store, context)?),
        (None, false) => None,
    };
    let network = &context.config.network;
    let kept = before.as_ref().and_then(|record| record.card);
    let (card, named) = match &card {
        Some((envelope, card)) => {
            let id = CardId::of(envelope, network);
            store.insert_card(&id, envelope)?;
            (Some(id), Some(card.name.to_string()))
        }
        None => (kept, before.map(|record| record.name)),
    };
    let name = add.name.clone().or(named.filter(|name| !name.is_empty())).unwrap_or_else(|| stem(&add.file));
    let record = AdapterRecord { weights, name, added_at: crate::now(), card };
    store.insert_adapter(&record)?;
    let facts = of_record(&record, &store, context)?;
    context.out.words(&format!("added {}; use it with: --lora {}@1", facts.told(), record.name));
    if record.card.is_none() {
        context.out.words("it has no card: nobody will see who made it; say so with --author");
    }
    context.out.line(&weights.id.to_string());
    context.out.record(&facts);
    Ok(())
}

fn list(context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let records = store.adapters()?;
    if records.is_empty() {
        context.out.words("no adapters yet; take one in with: kinoflock adapter add FILE --author NAME");
    }
    for record in &records {
        let facts = of_record(record, &store, context)?;
        context.out.record(&facts);
        let (id, when, len) = (record.weights.id.short(), short_time(record.added_at), record.weights.len);
        context.out.line(&format!("{id}  {when}  {len:>10} bytes  {}", facts.told()));
    }
    Ok(())
}

fn write_card(adapter: &str, output: &Path, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let record = store.find_adapter(adapter)?;
    let card = record.card.map(|id| store.card(&id)).transpose()?.flatten();
    let card = card.ok_or_else(|| Failure::usage(format!("adapter {} has no card", record.name)))?;
    let json = serde_json::to_vec_pretty(&card).expect("invariant: wire types always encode");
    std::fs::write(output, json).map_err(|error| Failure::file("write", output, &error))?;
    context.out.words(
        "whoever has this file and the weights takes both in with: kinoflock adapter add FILE --card CARD",
    );
    context.out.line(&output.display().to_string());
    Ok(())
}

fn remove(adapter: &str, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let record = store.find_adapter(adapter)?;
    for entry in store.jobs()?.into_iter().filter(|entry| !entry.state.is_final()) {
        let job = store.job(&entry.job)?;
        let spec = ValidJob::parse_stored(&job.envelope, &job.network);
        if spec.is_ok_and(|job| job.spec().adapter_ids().contains(&record.weights.id)) {
            let job = entry.job.short();
            let text = format!("job {job} is under way with it; stop that first: kinoflock cancel {job}");
            return Err(Failure::new(Exit::Usage, "job_under_way", text));
        }
    }
    store.remove_adapter(&record.weights.id)?;
    context.out.words(&format!("removed adapter {}", record.name));
    Ok(())
}

/// What `--lora` asks for: files are taken in, ids and names are those of adapters that are here.
pub(super) fn asked(texts: &[String], context: &Context<'_>) -> Result<Vec<Adapter>, Failure> {
    if texts.is_empty() {
        return Ok(Vec::new());
    }
    let store = context.store()?;
    let each = |text: &String| {
        let (which, scale) = split(text)?;
        let file = Path::new(which);
        let record = if file.is_file() { of_file(file, &store)? } else { of_name(which, &store)? };
        context.out.words(&format!("with {} at {scale}", of_record(&record, &store, context)?.told()));
        Ok(Adapter { weights: record.weights, scale, card: record.card })
    };
    texts.iter().map(each).collect()
}

fn of_file(file: &Path, store: &Store) -> Result<AdapterRecord, Failure> {
    let weights = take_in(file, store)?;
    if let Some(record) = store.adapter(&weights.id)? {
        return Ok(record);
    }
    let record = AdapterRecord { weights, name: stem(file), added_at: crate::now(), card: None };
    store.insert_adapter(&record)?;
    Ok(record)
}

fn of_name(which: &str, store: &Store) -> Result<AdapterRecord, Failure> {
    let record = store.find_adapter(which).map_err(|error| {
        let is_path = which.contains(['.', '/', '\\']);
        let failure = Failure::from(error);
        if is_path { failure.and("and there is no file of that name") } else { failure }
    })?;
    if !store.has_blob(&record.weights.id) {
        let text = format!("the weights of adapter {} are gone; add its file again", record.name);
        return Err(Failure::new(Exit::Usage, "not_found", text));
    }
    Ok(record)
}

/// `WHICH@SCALE`, or `WHICH` for 1.
fn split(text: &str) -> Result<(&str, Micro), Failure> {
    match text.rsplit_once('@') {
        Some((which, scale)) if !which.is_empty() => {
            let scale = scale.parse::<Micro>();
            let scale =
                scale.map_err(|error| Failure::usage(format!("--lora {text}: its weight is {error}")))?;
            Ok((which, scale))
        }
        _ => Ok((text, Micro::ONE)),
    }
}

/// Copies a file into the store, if it looks like one.
fn take_in(file: &Path, store: &Store) -> Result<BlobRef, Failure> {
    let fault = |error: std::io::Error| Failure::file("read", file, &error);
    let mut opened = std::fs::File::open(file).map_err(fault)?;
    let given = opened.metadata().map_err(fault)?.len();
    let shown = file.display();
    if given > MAX_BLOB_BYTES {
        let text = format!("{shown} has {given} bytes, an adapter may have {MAX_BLOB_BYTES}");
        return Err(Failure::usage(text));
    }
    let no = |why: &str| Failure::usage(format!("{shown} is no safetensors file: {why}"));
    let mut length = [0; 8];
    opened.read_exact(&mut length).map_err(|_| no("it is too short"))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length > given {
        return Err(no(&format!("its header would have {length} bytes")));
    }
    let mut header = Vec::new();
    opened.take(length).read_to_end(&mut header).map_err(fault)?;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|error| no(&error.to_string()))?;
    if !header.keys().any(|key| key.contains("lora") || key.ends_with(".diff_b")) {
        return Err(Failure::usage(format!("{shown} holds no LoRA: none of its tensors is named as one")));
    }
    Ok(store.insert_file(file)?)
}

fn stem(file: &Path) -> String {
    file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether there is anything to put on a card.
fn says_something(add: &Add) -> bool {
    let texts = [&add.summary, &add.licence, &add.trained_on];
    !add.author.is_empty()
        || !add.credit.is_empty()
        || !add.base.is_empty()
        || add.consent.is_some()
        || texts.into_iter().any(Option::is_some)
}

/// A card that somebody else signed.
fn read_card(file: &Path, weights: &BlobRef, context: &Context<'_>) -> Result<(Envelope, Card), Failure> {
    let fault = |error: std::io::Error| Failure::file("read", file, &error);
    let shown = file.display();
    let given = std::fs::metadata(file).map_err(fault)?.len();
    if given > MAX_CARD_FILE {
        return Err(Failure::usage(format!("{shown} has {given} bytes, a card may have {MAX_CARD_FILE}")));
    }
    let bytes = std::fs::read(file).map_err(fault)?;
    let no = |why: String| {
        Failure::new(Exit::Verify, "card", format!("{shown} is no card of this adapter: {why}"))
    };
    let envelope: Envelope = serde_json::from_slice(&bytes).map_err(|error| no(error.to_string()))?;
    let card = envelope.open::<Card>(&context.config.network).map_err(|error| no(error.to_string()))?.value;
    card.check().map_err(|error| no(error.to_string()))?;
    if card.subject != Subject::Adapter(weights.id) {
        return Err(no(format!("it is about {:?}, the weights are {}", card.subject, weights.id)));
    }
    Ok((envelope, card))
}

/// A card by what the flags say, signed with the artist's key.
fn sign(
    add: &Add,
    weights: &BlobRef,
    before: Option<&AdapterRecord>,
    store: &Store,
    context: &Context<'_>,
) -> Result<(Envelope, Card), Failure> {
    let key = context.key()?;
    let artist = context.config.artist.as_deref();
    let authors: Vec<&str> = match add.author.is_empty() {
        true => artist.into_iter().collect(),
        false => add.author.iter().map(String::as_str).collect(),
    };
    if authors.is_empty() {
        return Err(Failure::usage("a card says who made the adapter: --author NAME is missing"));
    }
    let key_of = |name: &str| (artist == Some(name)).then(|| RequesterId::from(key.public()));
    let upstream: u16 = add.base.iter().map(|(_, bps)| *bps).fold(0, u16::saturating_add);
    let credit = match add.credit.is_empty() {
        true => evenly(&authors, WHOLE_BPS.saturating_sub(upstream)),
        false => add.credit.clone(),
    };
    let author = |name: &&str| {
        let (role, contact) = (text("role", "trained it")?, Text::default());
        Ok(Author { name: text("author", name)?, key: key_of(name), role, contact })
    };
    let share = |(name, bps): &(String, u16)| {
        let (key, role) = (key_of(name), Text::default());
        Ok(CreditShare { name: text("credit", name)?, key, role, bps: *bps })
    };
    let base = |(model, bps): &(kinoflock_protocol::ModelId, u16)| Upstream {
        subject: Subject::Model(*model),
        name: Text::default(),
        bps: *bps,
    };
    let (version, previous) = next_version(before, store, context)?;
    let said = |given: &Option<String>| given.clone().unwrap_or_default();
    let consent = add.consent.unwrap_or(ConsentGiven::Unknown);
    let card = Card {
        subject: Subject::Adapter(weights.id),
        name: text("name", add.name.as_deref().unwrap_or(&stem(&add.file)))?,
        summary: text("summary", &said(&add.summary))?,
        version,
        previous,
        issued_at: crate::now(),
        authors: listed(authors.iter().map(author).collect::<Result<_, Failure>>()?)?,
        licence: Licence {
            name: text("licence", &said(&add.licence))?,
            url: Text::default(),
            conditions: Text::default(),
        },
        training_data: TrainingData {
            disclosed: add.trained_on.is_some(),
            statement: text("trained-on", &said(&add.trained_on))?,
            sources: List::default(),
        },
        consent: Consent { given: consent, statement: Text::default() },
        shares: listed(credit.iter().map(share).collect::<Result<_, Failure>>()?)?,
        upstreams: listed(add.base.iter().map(base).collect())?,
        fingerprint: None,
    };
    card.check().map_err(|error| Failure::usage(error.to_string()))?;
    let envelope = Envelope::seal(&key, &context.config.network, &card)
        .map_err(|error| Failure::new(Exit::Other, error.code(), error.to_string()))?;
    Ok((envelope, card))
}

/// The number of a new card, and the one that it replaces.
fn next_version(
    before: Option<&AdapterRecord>,
    store: &Store,
    context: &Context<'_>,
) -> Result<(u32, Option<CardId>), Failure> {
    let Some(id) = before.and_then(|record| record.card) else { return Ok((1, None)) };
    let card = store.card(&id)?.and_then(|card| card.open::<Card>(&context.config.network).ok());
    Ok(card.map_or((1, None), |card| (card.value.version.saturating_add(1), Some(id))))
}

/// The same for everybody; what does not divide goes to the first.
fn evenly(names: &[&str], whole: u16) -> Vec<(String, u16)> {
    let count = names.len() as u16;
    let each = whole / count;
    let first = whole - each * (count - 1);
    names
        .iter()
        .enumerate()
        .map(|(i, name)| ((*name).to_owned(), if i == 0 { first } else { each }))
        .collect()
}

fn text<const MAX: usize>(what: &str, given: &str) -> Result<Text<MAX>, Failure> {
    let too_long = |TooLong { limit, given, .. }| {
        Failure::usage(format!("{what} of {given} bytes exceeds the limit of {limit} bytes"))
    };
    Text::new(given).map_err(too_long)
}

fn listed<T, const MAX: usize>(items: Vec<T>) -> Result<List<T, MAX>, Failure> {
    List::new(items).map_err(|TooLong { limit, given, .. }| {
        Failure::usage(format!("{given} names on a card exceed the limit of {limit}"))
    })
}

fn of_record(record: &AdapterRecord, store: &Store, context: &Context<'_>) -> Result<AdapterFacts, Failure> {
    let card = record.card.map(|id| store.card(&id)).transpose()?.flatten();
    let card = card.and_then(|envelope| cited(&envelope, &context.config.network).ok());
    let facts = AdapterFacts::of(record.weights.id.to_string(), card.as_ref());
    let name = Some(record.name.clone());
    Ok(AdapterFacts { name, bytes: Some(record.weights.len.to_string()), ..facts })
}

impl AdapterFacts {
    pub(super) fn of(adapter: String, cited: Option<&Cited>) -> Self {
        let card = cited.map(|cited| &cited.card);
        let percent = |bps: u16| Micro(i64::from(bps) * 10_000).to_string();
        let credit = card.into_iter().flat_map(|card| {
            let own = card.shares.iter().map(|share| (share.name.to_string(), share.bps));
            let base = card.upstreams.iter().map(|upstream| (subject(upstream), upstream.bps));
            own.chain(base).collect::<Vec<_>>()
        });
        let training = card.map(|card| match card.training_data.disclosed {
            true => card.training_data.statement.to_string(),
            false => "undisclosed".to_owned(),
        });
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        Self {
            adapter,
            scale: None,
            bytes: None,
            name: card.and_then(|card| some(card.name.to_string())),
            card: cited.map(|cited| cited.id),
            card_version: card.map(|card| card.version),
            authors: card
                .into_iter()
                .flat_map(|card| card.authors.iter().map(|a| a.name.to_string()))
                .collect(),
            licence: card.and_then(|card| some(card.licence.name.to_string())),
            training_data: training,
            consent: card.map(|card| consent(card.consent.given)),
            credit: credit.map(|(name, bps)| Credit { name, percent: percent(bps) }).collect(),
            signed_by: cited.map(|cited| cited.signer.to_string()),
            summary: card.and_then(|card| some(card.summary.to_string())),
        }
    }

    /// With the scale at which it acted.
    pub(super) fn at(self, scale: Micro) -> Self {
        Self { scale: Some(scale.to_string()), ..self }
    }

    /// In half a line.
    pub(super) fn told(&self) -> String {
        let name = self.name.as_deref().unwrap_or(&self.adapter);
        let by = match (self.authors.is_empty(), self.card) {
            (false, _) => format!(" by {}", self.authors.join(", ")),
            (true, _) => " without a card".to_owned(),
        };
        let licence = self.licence.as_ref().map(|licence| format!(", {licence}")).unwrap_or_default();
        format!("adapter {name}{by}{licence}")
    }

    /// Everything, for people.
    pub(super) fn lines(&self) -> Vec<String> {
        let entry = |name: &str, value: &str| format!("{name:<10} {value}");
        let scale = self.scale.as_ref().map(|scale| format!(" at {scale}")).unwrap_or_default();
        let mut lines = vec![entry("adapter", &format!("{}{scale}", self.adapter))];
        if self.card.is_none() {
            lines.push(entry("", "no card: nobody says who made it, from what, and under which licence"));
            return lines;
        }
        let credit: Vec<_> =
            self.credit.iter().map(|part| format!("{} {} %", part.name, part.percent)).collect();
        let training = match (&self.training_data, self.consent) {
            (Some(data), Some(consent)) => Some(format!("{data}; {consent}")),
            _ => None,
        };
        let all = [
            ("", self.name.clone()),
            ("  about", self.summary.clone()),
            ("  made by", Some(self.authors.join(", "))),
            ("  credit", Some(credit.join(", "))),
            ("  licence", Some(self.licence.clone().unwrap_or_else(|| "not told".to_owned()))),
            ("  trained", training),
            ("  card", self.card.map(|card| card.to_string())),
            ("  signed by", self.signed_by.clone()),
        ];
        lines.extend(all.into_iter().filter_map(|(name, value)| Some(entry(name, &value?))));
        lines
    }
}

fn subject(upstream: &Upstream) -> String {
    match (&upstream.subject, upstream.name.as_str()) {
        (_, name) if !name.is_empty() => name.to_owned(),
        (Subject::Model(id), _) => id.to_string(),
        (Subject::Adapter(id) | Subject::Dataset(id), _) => id.to_string(),
    }
}

fn consent(given: ConsentGiven) -> &'static str {
    match given {
        ConsentGiven::OwnWork => "own work",
        ConsentGiven::All => "all agreed",
        ConsentGiven::ByLicence => "by open licence or public domain",
        ConsentGiven::Some => "some agreed",
        ConsentGiven::None => "none was asked",
        ConsentGiven::Unknown => "whether anybody agreed is not told",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_adapter_is_asked_for_with_any_weight_or_none() {
        for (text, which, scale) in [
            ("fog", "fog", "1"),
            ("fog@0.8", "fog", "0.8"),
            ("a@b.safetensors@-1.5", "a@b.safetensors", "-1.5"),
        ] {
            let (found, weight) = split(text).unwrap();
            assert_eq!((found, weight.to_string().as_str()), (which, scale));
        }
        assert!(split("fog@loud").is_err());
    }

    #[test]
    fn credit_is_shared_evenly_and_whole() {
        let shares = evenly(&["a", "b", "c"], WHOLE_BPS);
        assert_eq!(shares.iter().map(|(_, bps)| *bps).collect::<Vec<_>>(), [3334, 3333, 3333]);
    }
}

//! `kinoflockd model show`: a model's manifest and card.

use std::process::ExitCode;

use kinoflock_protocol::card::{Card, ConsentGiven};
use kinoflock_protocol::id::ModelId;

use super::super::say;
use super::words::{entry, size};
use crate::models::known::{self, KnownModel};
use crate::models::{Model, ModelStore, licence, pull};
use crate::run::unix_now;

pub(super) fn run(store: &ModelStore, wanted: &str, json: bool) -> anyhow::Result<ExitCode> {
    match (store.find(wanted)?, known::find(wanted)) {
        (Some(model), _) => here(&model, json)?,
        (None, Some(known)) => listed(known, json)?,
        (None, None) => anyhow::bail!("{}", super::fetch::unknown(wanted)),
    }
    Ok(ExitCode::SUCCESS)
}

/// A model of the store.
fn here(model: &Model, json: bool) -> anyhow::Result<()> {
    let origin = pull::origin(model);
    if json {
        say::data(&serde_json::to_string_pretty(&serde_json::json!({
            "schema": 1,
            "name": model.name,
            "id": model.id.to_string(),
            "folder": model.dir,
            "origin": origin,
            "manifest": model.manifest,
            "card": model.card,
        }))?);
        return Ok(());
    }
    let manifest = &model.manifest;
    let (rules, defaults) = (&manifest.rules, &manifest.defaults);
    let mut lines = vec![
        model.name.clone(),
        entry("id", &model.id.to_string()),
        entry("architecture", &manifest.architecture),
        entry("folder", &model.dir.display().to_string()),
    ];
    if let Some(origin) = origin {
        lines.push(entry("pulled from", &format!("{} at {}", origin.repository, origin.commit)));
    }
    lines.push(entry(
        "makes",
        &format!(
            "{}x{}, {} frames at {} a second, {} steps, guidance {}, where a job does not say",
            defaults.width, defaults.height, defaults.frames, defaults.fps, defaults.steps, defaults.guidance
        ),
    ));
    lines.push(entry(
        "can make",
        &format!(
            "sides that are multiples of {}, {}k+{} frames, prompts of {} tokens",
            rules.size_multiple, rules.frames_multiple, rules.frames_offset, rules.max_prompt_tokens
        ),
    ));
    match &model.card {
        Some(card) => lines.extend(card_lines(card)),
        None => {
            lines.push(entry("card", "none: nobody says who made it, from what, and under which licence"))
        }
    }
    lines.push(entry("files", &format!("{}, {}", manifest.files.len(), size(manifest.total_len()))));
    for file in &manifest.files {
        lines.push(format!("    {:>9}  {}", size(file.len), file.path.as_str()));
        lines.push(format!("               blake3 {}", file.blake3.to_hex()));
    }
    say::data(&lines.join("\n"));
    Ok(())
}

/// A model of the list.
fn listed(known: &KnownModel, json: bool) -> anyhow::Result<()> {
    let card = known.card(ModelId::of(&[]), unix_now());
    if json {
        let mut card = serde_json::to_value(&card)?;
        // It has no id before its files are here.
        if let Some(card) = card.as_object_mut() {
            card.remove("subject");
            card.remove("issued_at");
        }
        say::data(&serde_json::to_string_pretty(&serde_json::json!({
            "schema": 1,
            "name": known.name,
            "id": null,
            "repository": known.repository,
            "revision": known.revision,
            "folders": known.folders,
            "checkpoint": known.checkpoint,
            "sha256": known.sha256,
            "hindrance": known.hindrance(),
            "card": card,
        }))?);
        return Ok(());
    }
    say::data(&card_text(known, &card));
    Ok(())
}

/// What the list says of a model that is not here.
fn card_text(known: &KnownModel, card: &Card) -> String {
    let mut lines = vec![known.name.clone()];
    let state = match known.hindrance() {
        Some(reason) => format!("not here, and not to be had: {reason}"),
        None => format!("not here; kinoflockd model pull {}", known.name),
    };
    lines.push(entry("state", &state));
    let files = match &known.checkpoint {
        Some(file) => format!("{file} and the folders {}", known.folders.join(", ")),
        None => format!("the folders {}, and model_index.json where there is one", known.folders.join(", ")),
    };
    lines.push(entry("published in", &format!("{} at {}", known.repository, known.revision)));
    lines.push(entry("files", &files));
    lines.push(entry("class", &known.class));
    lines.extend(card_lines(card));
    for (file, hash) in &known.sha256 {
        lines.push(format!("    {file}\n        sha256 {hash}"));
    }
    lines.join("\n")
}

/// A card for people.
pub(super) fn card_lines(card: &Card) -> Vec<String> {
    let authors: Vec<_> = card.authors.iter().map(|author| author.name.as_str()).collect();
    let mut lines = vec![entry("about", &card.summary), entry("made by", &authors.join(", "))];
    let terms = &card.licence;
    lines.push(entry("licence", &format!("{} {}", terms.name.as_str(), terms.url.as_str())));
    lines.push(entry("", &terms.conditions));
    let passed_on = if licence::is_open(&terms.name) {
        "yes: nodes may give each other the files"
    } else {
        "no: it goes from node to node under open licences only"
    };
    lines.push(entry("passed on", passed_on));
    let training = &card.training_data;
    let told = match (training.disclosed, training.statement.as_str()) {
        (false, "" | "undisclosed") => "undisclosed".to_owned(),
        (false, statement) => format!("undisclosed; {statement}"),
        (true, statement) => statement.to_owned(),
    };
    lines.push(entry("training data", &told));
    lines.push(entry(
        "consent",
        &format!("{} {}", consent(card.consent.given), card.consent.statement.as_str()),
    ));
    lines
}

fn consent(given: ConsentGiven) -> &'static str {
    match given {
        ConsentGiven::OwnWork => "own work.",
        ConsentGiven::All => "all agreed.",
        ConsentGiven::ByLicence => "by open licence or public domain.",
        ConsentGiven::Some => "some agreed.",
        ConsentGiven::None => "none was asked.",
        ConsentGiven::Unknown => "not told.",
    }
}

//! `kinoflockd model list --known`: what can be pulled by name.

use std::process::ExitCode;

use super::super::say;
use crate::models::known::{self, KnownModel};

/// Before a model that this release cannot run.
const NOT_RUN: &str = "-";
/// Behind a licence whose terms must be accepted.
const TERMS: &str = "*";

pub(super) fn list(json: bool) -> anyhow::Result<ExitCode> {
    if json {
        say::data(&serde_json::to_string_pretty(&serde_json::json!({ "schema": 1, "models": rows() }))?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for (family, models) in known::all().families() {
        let training = if family.disclosed { "told" } else { family.training.as_str() };
        text.push_str(&format!("{}, by {}; training data {training}\n", family.title, family.authors));
        text.push_str(&line(["", "name", "from", "size", "licence", "copies"]));
        models.iter().for_each(|model| text.push_str(&row(model)));
        text.push('\n');
    }
    text.push_str(
        "from    what clips are made from\n\
         size    parameters of the transformer, in billions\n\
         copies  whether the licence lets everybody pass on copies; nodes give each other\n\
        \x20       files of those with yes\n\
         *       its terms must be accepted\n",
    );
    if known::all().families().any(|(_, models)| models.iter().any(|model| model.hindrance().is_some())) {
        text.push_str(&format!("{NOT_RUN}       this release does not run it\n"));
    }
    say::data(&text);
    say::words("kinoflockd model show NAME tells more; kinoflockd model pull NAME fetches one");
    Ok(ExitCode::SUCCESS)
}

fn row(model: &KnownModel) -> String {
    let licence = model.licence();
    let mark = if model.hindrance().is_some() { NOT_RUN } else { "" };
    let terms = if licence.accept { TERMS } else { "" };
    line([
        mark,
        &model.name,
        model.makes.words(),
        &model.parameters.map_or_else(String::new, |billions| format!("{billions:.1} B")),
        &format!("{}{terms}", licence.name),
        licence.redistribution.words(),
    ])
}

fn line([mark, name, from, size, licence, copies]: [&str; 6]) -> String {
    format!("{mark:<1} {name:<24} {from:<5}  {size:>6}  {licence:<27} {copies}\n")
}

fn rows() -> Vec<serde_json::Value> {
    let families = known::all().families();
    let rows = families.flat_map(|(family, models)| models.into_iter().map(move |model| (family, model)));
    rows.map(|(family, model)| {
        let licence = model.licence();
        serde_json::json!({
            "name": model.name,
            "family": family.title,
            "authors": family.authors,
            "makes": model.makes.words(),
            "parameters_billions": model.parameters,
            "gigabytes": model.gigabytes,
            "repository": model.repository,
            "revision": model.revision,
            "folders": model.folders,
            "checkpoint": model.checkpoint,
            "sha256": model.sha256,
            "licence": licence.name,
            "licence_url": licence.url,
            "conditions": licence.conditions,
            "accept": licence.accept,
            "copies": licence.redistribution.words(),
            "training_data_disclosed": family.disclosed,
            "training_data": family.training,
            "hindrance": model.hindrance(),
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_fits_a_terminal() {
        for (_, models) in known::all().families() {
            for model in models {
                let row = row(model);
                assert!(row.trim_end().chars().count() <= 80, "{row}");
            }
        }
    }
}

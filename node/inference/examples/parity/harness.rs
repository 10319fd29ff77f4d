//! The comparison of a folder of goldens, for the example and for the ordinary test.

mod end_to_end;
mod golden;
mod network;
mod report;
mod text;

use std::path::Path;

pub(crate) use golden::{Case, Outputs, ReadCase};
pub(crate) use report::{Report, Row};

/// Runs every golden of a folder's manifest and compares every tensor.
pub(crate) fn check_folder(folder: &Path) -> Report {
    let mut report = Report::default();
    let cases = match golden::read_manifest(folder) {
        Ok(cases) => cases,
        Err(reason) => {
            report.push(Row::not_compared("manifest.json", "", reason));
            return report;
        }
    };
    if cases.is_empty() {
        report.push(Row::not_compared("manifest.json", "", "it names no golden".to_owned()));
    }
    for case in cases {
        check_case(case, &mut report);
    }
    report
}

fn check_case(case: ReadCase, report: &mut Report) {
    let case = match case {
        Ok(case) => case,
        Err((name, reason)) => {
            report.push(Row::not_compared(&name, "", reason));
            return;
        }
    };
    let outputs = compute(&case);
    match outputs {
        Ok(outputs) => case.compare(&outputs, report),
        Err(reason) => case.fail_all(&reason, report),
    }
}

/// Which part of the engine answers a golden: by its name, then by what it holds.
fn compute(case: &Case) -> Result<Outputs, String> {
    let name = case.name.as_str();
    let begins = |prefix: &str| name.starts_with(prefix);
    if begins("e2e") || case.params.get("pipeline").is_some() {
        end_to_end::run(case)
    } else if begins("rope") {
        network::rope(case)
    } else if begins("scheduler") {
        network::scheduler(case)
    } else if begins("tokenizer") {
        text::tokenizer(case)
    } else if begins("text_encoder") {
        text::encoder(case)
    } else if begins("prompt_embeds") {
        text::prompt_embeds(case)
    } else if begins("transformer") {
        network::transformer(case)
    } else if begins("vae_encode") {
        network::vae_encode(case)
    } else if begins("vae_decode") {
        network::vae_decode(case)
    } else {
        by_contents(case)
    }
}

fn by_contents(case: &Case) -> Result<Outputs, String> {
    let has = |key: &str| case.tensors.contains_key(key);
    if has("in.encoder_hidden_states") {
        network::transformer(case)
    } else if has("in.input_ids") {
        text::encoder(case)
    } else if has("in.z") {
        network::vae_decode(case)
    } else if has("in.x") {
        network::vae_encode(case)
    } else if case.params.get("combos").is_some() {
        network::scheduler(case)
    } else {
        Err("this kind of golden is not known".to_owned())
    }
}

//! The comparison of a folder of goldens, for the example and for the ordinary test.
//!
//! What several models have (tokenizer, T5, flow matching) is compared in [`common`]; everything else by the model's own
//! [`Adapter`], found by the pipeline's class.

mod cogvideox;
mod common;
mod golden;
mod ltx;
mod pyramid;
mod report;

use std::path::Path;

pub(crate) use golden::{Case, Outputs, ReadCase};
pub(crate) use report::{Report, Row};

/// A model's own goldens.
pub(crate) struct Adapter {
    /// How the pipeline's class in `model_index.json` begins, or `arch` in the manifest where there is no such file.
    pub(crate) names: &'static [&'static str],
    /// Computes a golden; `None` leaves it to [`common`].
    pub(crate) compute: fn(&Case, Kind) -> Result<Option<Outputs>, String>,
}

/// Every model's.
const ADAPTERS: &[Adapter] = &[ltx::ADAPTER, cogvideox::ADAPTER, pyramid::ADAPTER];

/// What a golden holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    EndToEnd,
    Rope,
    Scheduler,
    Tokenizer,
    TextEncoder,
    PromptEmbeds,
    Transformer,
    VaeEncode,
    VaeDecode,
    Other,
}

impl Kind {
    /// By the golden's name, then by what it holds.
    fn of(case: &Case) -> Self {
        const NAMES: &[(&str, Kind)] = &[
            ("e2e", Kind::EndToEnd),
            ("rope", Kind::Rope),
            ("rotary", Kind::Rope),
            ("scheduler", Kind::Scheduler),
            ("tokenizer", Kind::Tokenizer),
            ("text_encoder", Kind::TextEncoder),
            ("prompt_embeds", Kind::PromptEmbeds),
            ("transformer", Kind::Transformer),
            ("vae_encode", Kind::VaeEncode),
            ("vae_decode", Kind::VaeDecode),
        ];
        if case.params.contains_key("pipeline") {
            return Self::EndToEnd;
        }
        if let Some((_, kind)) = NAMES.iter().find(|(name, _)| case.name.starts_with(name)) {
            return *kind;
        }
        let has = |key: &str| case.tensors.contains_key(key);
        match () {
            () if has("in.encoder_hidden_states") => Self::Transformer,
            () if has("in.input_ids") => Self::TextEncoder,
            () if has("in.z") => Self::VaeDecode,
            () if has("in.x") => Self::VaeEncode,
            () => Self::Other,
        }
    }
}

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
    match compute(&case) {
        Ok(outputs) => case.compare(&outputs, report),
        Err(reason) => case.fail_all(&reason, report),
    }
}

/// The model's adapter answers a golden, or what all models have.
fn compute(case: &Case) -> Result<Outputs, String> {
    let kind = Kind::of(case);
    let model = case.model()?;
    let adapter = ADAPTERS.iter().find(|adapter| adapter.names.iter().any(|name| model.starts_with(name)));
    let adapter = adapter.ok_or_else(|| format!("no comparison is known for {model}"))?;
    match (adapter.compute)(case, kind)? {
        Some(outputs) => Ok(outputs),
        None => common::compute(case, kind),
    }
}

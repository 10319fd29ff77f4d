//! `kinoflockd model`: what this node can run.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;

use super::say;
use crate::config::Config;
use crate::models::{Model, ModelStore};

/// Commands about models.
#[derive(Debug, Subcommand)]
pub(super) enum ModelCommand {
    /// The models that are here.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take a model in from a folder in the published diffusers layout.
    Import {
        /// The folder that holds model_index.json.
        folder: PathBuf,
        /// The name by which artists ask for it; the folder's name if none is given.
        #[arg(long)]
        name: Option<String>,
    },
    /// Hash every file again and compare with the manifest.
    Verify {
        /// Only this model, by name or id.
        model: Option<String>,
    },
}

pub(super) fn run(command: ModelCommand, config: &Config) -> anyhow::Result<ExitCode> {
    let store = ModelStore::open(&config.storage.models, config.storage.models_limit)?;
    store.import_bundled()?;
    match command {
        ModelCommand::List { json } => list(&store.list()?, json),
        ModelCommand::Import { folder, name } => import(&store, &folder, name),
        ModelCommand::Verify { model } => verify(&store, model.as_deref()),
    }
}

fn list(models: &[Model], json: bool) -> anyhow::Result<ExitCode> {
    if json {
        let rows: Vec<_> = models
            .iter()
            .map(|model| {
                serde_json::json!({
                    "name": model.name,
                    "id": model.id.to_string(),
                    "architecture": &*model.manifest.architecture,
                    "bytes": model.manifest.total_len().to_string(),
                    "card": model.card.is_some(),
                })
            })
            .collect();
        say::data(&serde_json::to_string_pretty(&serde_json::json!({ "schema": 1, "models": rows }))?);
        return Ok(ExitCode::SUCCESS);
    }
    for model in models {
        let mib = model.manifest.total_len().div_ceil(1 << 20);
        let card = if model.card.is_some() { "with a card" } else { "without a card" };
        say::data(&format!(
            "{}  {}  {mib} MiB, {card}\n    {}",
            model.name, &*model.manifest.architecture, model.id
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn import(store: &ModelStore, folder: &std::path::Path, name: Option<String>) -> anyhow::Result<ExitCode> {
    let name = match name {
        Some(name) => name,
        None => {
            let whole = folder.canonicalize().with_context(|| format!("cannot open {}", folder.display()))?;
            let last = whole.file_name().and_then(|name| name.to_str()).map(str::to_owned);
            last.context("the folder has no name; give one with --name")?
        }
    };
    let model = store.import(folder, &name)?;
    say::data(&model.id.to_string());
    say::words(&format!("{} is here; a running daemon serves it after its next start", model.name));
    Ok(ExitCode::SUCCESS)
}

fn verify(store: &ModelStore, wanted: Option<&str>) -> anyhow::Result<ExitCode> {
    let models = store.list()?;
    let chosen: Vec<_> = models
        .iter()
        .filter(|model| wanted.is_none_or(|wanted| model.name == wanted || model.id.to_string() == wanted))
        .collect();
    if let (Some(wanted), true) = (wanted, chosen.is_empty()) {
        let known: Vec<_> = models.iter().map(|model| model.name.as_str()).collect();
        anyhow::bail!("no model {wanted:?} here; known are {}", known.join(", "));
    }
    let mut sound = true;
    for model in chosen {
        let faults = store.verify(model)?;
        sound &= faults.is_empty();
        if faults.is_empty() {
            say::data(&format!("{}: every file is as its manifest says", model.name));
        }
        for fault in faults {
            say::data(&format!("{}: {fault}", model.name));
        }
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

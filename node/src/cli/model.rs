//! `kinoflockd model`: what this node can run.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;

use super::say;
use crate::config::Config;
use crate::engine::bench;
use crate::engine::supervisor::{self, WorkerConfig};
use crate::models::{Model, ModelStore, embedded, selftest};

/// Commands about models.
#[derive(Debug, Subcommand)]
pub(super) enum ModelCommand {
    /// The models that are here.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take a model in from a folder as it is published.
    Import {
        /// The folder that holds model_index.json, or Pyramid Flow's parts.
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
    /// Run a model's fixed job on the first device and print the fingerprint for its card.
    ///
    /// Every node that imports the model together with the card compares its own result with it before it offers the
    /// model.
    Fingerprint {
        /// The model, by name or id.
        model: String,
        /// Greatest difference that another device may show; latents are around 1.
        #[arg(long, default_value_t = 0.05)]
        tolerance: f64,
    },
}

pub(super) fn run(command: ModelCommand, config: &Config) -> anyhow::Result<ExitCode> {
    let store = ModelStore::open(&config.storage.models, config.storage.models_limit)?;
    // A damaged bundled model would be made anew here, and verification have nothing to tell.
    if !matches!(command, ModelCommand::Verify { .. }) {
        store.import_bundled()?;
    }
    match command {
        ModelCommand::List { json } => list(&store.list()?, json),
        ModelCommand::Import { folder, name } => import(&store, &folder, name),
        ModelCommand::Verify { model } => verify(&store, model.as_deref()),
        ModelCommand::Fingerprint { model, tolerance } => fingerprint(&store, config, &model, tolerance),
    }
}

fn fingerprint(
    store: &ModelStore,
    config: &Config,
    wanted: &str,
    tolerance: f64,
) -> anyhow::Result<ExitCode> {
    let mut model = chosen(store, Some(wanted))?.remove(0);
    // What is measured must not depend on what an earlier card says.
    model.card = None;
    let device = config.devices.first().context("no device is configured; see [[device]]")?;
    let folder = tempfile::tempdir()?;
    let request = super::bench::fixed_job(&model, folder.path())?;
    let report = tokio::runtime::Runtime::new()?.block_on(async {
        let (engine, mut events) = supervisor::spawn(WorkerConfig::of_device(device, &config.engine)?);
        let made = bench::run_to_end(&engine, &mut events, request.clone(), |_| {}).await;
        engine.shutdown().await;
        made.map_err(|failure| anyhow::anyhow!("{} on {}: {}", model.name, device.name, failure.text))
    })?;
    let print = selftest::fingerprint(&request, &report, tolerance).context(
        "the result has numbers that are not finite: this device or format does not compute the model",
    )?;
    say::data(&serde_json::to_string_pretty(&print)?);
    Ok(ExitCode::SUCCESS)
}

/// The models of this name or id, or all.
fn chosen(store: &ModelStore, wanted: Option<&str>) -> anyhow::Result<Vec<Model>> {
    let models = store.list()?;
    let Some(wanted) = wanted else { return Ok(models) };
    let known: Vec<_> = models.iter().map(|model| model.name.clone()).collect();
    let chosen: Vec<_> =
        models.into_iter().filter(|model| model.name == wanted || model.id.to_string() == wanted).collect();
    anyhow::ensure!(!chosen.is_empty(), "no model {wanted:?} here; known are {}", known.join(", "));
    Ok(chosen)
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
    let mut sound = true;
    for model in chosen(store, wanted)? {
        let faults = store.verify(&model)?;
        sound &= faults.is_empty();
        if faults.is_empty() {
            say::data(&format!("{}: every file is as its manifest says", model.name));
        }
        for fault in &faults {
            say::data(&format!("{}: {fault}", model.name));
        }
        if !faults.is_empty() && model.name == embedded::NAME {
            say::words("the bundled model is made anew by the next start of: kinoflockd run");
        }
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

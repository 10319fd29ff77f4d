//! `kinoflockd model`: what this node can run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;

use super::{control, say};
use crate::admin::call;
use crate::config::Config;
use crate::engine::bench;
use crate::engine::supervisor::{self, WorkerConfig};
use crate::models::{Model, ModelStore, embedded, pull, selftest};

mod fetch;
mod known;
mod plan;
mod show;
mod words;

use words::size;

/// With fewer known holders than this a model is at risk of being lost.
const SAFE_HOLDERS: usize = 3;

/// Commands about models.
#[derive(Debug, Subcommand)]
pub(super) enum ModelCommand {
    /// The models that are here; while a daemon runs, how many nodes are known to hold each.
    List {
        /// The models that can be pulled by name instead, with licence and what is told of their training.
        #[arg(long)]
        known: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take a model in from a folder as it is published, or from LTX-Video's single file.
    ///
    /// Weights are safetensors in f32, f16, bf16 or 8 bits, or a GGUF file in the place of a part's safetensors.
    Import {
        /// The folder that holds model_index.json, or Pyramid Flow's parts; or a file of LTX-Video's transformer and VAE.
        #[arg(value_name = "FOLDER|FILE")]
        path: PathBuf,
        /// The name by which artists ask for it; the folder's or file's name if none is given.
        #[arg(long)]
        name: Option<String>,
        /// For a file: a model folder with text_encoder and tokenizer, which the file lacks.
        #[arg(long, value_name = "FOLDER")]
        text_encoder: Option<PathBuf>,
    },
    /// Fetch a known model from the hub where it is published, and take it in.
    ///
    /// What is here when it breaks off stays: the same command goes on from there. HF_ENDPOINT names another hub or a
    /// mirror, HF_TOKEN holds a token for models that want one.
    Pull(fetch::PullArgs),
    /// A model's manifest and card; of one that is not here, what the list of known models says.
    Show {
        /// The model, by name or id.
        model: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        plan: plan::PlanArgs,
    },
    /// Remove a model and its files, or what is here of one that was not pulled to its end.
    Remove {
        /// The model, by name or id.
        model: String,
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
    if let ModelCommand::List { known: true, json } = command {
        return known::list(json);
    }
    let store = ModelStore::open(&config.storage.models, config.storage.models_limit)?;
    // A damaged bundled model would be made anew here, and verification have nothing to tell.
    if !matches!(command, ModelCommand::Verify { .. }) {
        store.import_bundled()?;
    }
    match command {
        ModelCommand::List { json, .. } => list(&store, config, json),
        ModelCommand::Pull(args) => fetch::run(&args, &store, config),
        ModelCommand::Show { model, json, plan } if plan.is_wanted() => {
            plan::show(&chosen(&store, Some(&model))?[0], &plan, config, json)?;
            Ok(ExitCode::SUCCESS)
        }
        ModelCommand::Show { model, json, .. } => show::run(&store, &model, json),
        ModelCommand::Remove { model } => remove(&store, &model),
        ModelCommand::Import { path, name, text_encoder } => {
            import(&store, &path, name, text_encoder.as_deref())
        }
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

fn list(store: &ModelStore, config: &Config, json: bool) -> anyhow::Result<ExitCode> {
    let models = store.list()?;
    // Who else holds a model, a running daemon alone can find out.
    let counted = call::holders(&control::socket(config)).unwrap_or_default();
    let holders = |model: &Model| {
        let told = counted.iter().find(|told| told.model == model.id.to_string());
        // The bundled model is in every program.
        told.map(|told| told.holders).filter(|_| model.name != embedded::NAME)
    };
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
                    "holders": holders(model),
                    "at_risk": holders(model).map(|known| known < SAFE_HOLDERS),
                })
            })
            .collect();
        say::data(&serde_json::to_string_pretty(&serde_json::json!({ "schema": 1, "models": rows }))?);
        return Ok(ExitCode::SUCCESS);
    }
    for model in &models {
        let card = match &model.card {
            Some(card) => format!("licence {}", card.licence.name.as_str()),
            None => "without a card".to_owned(),
        };
        let held = match holders(model) {
            Some(1) => "\n    at risk: no other node is known to hold it".to_owned(),
            Some(known) if known < SAFE_HOLDERS => {
                format!("\n    at risk: {known} nodes are known to hold it")
            }
            Some(known) => format!("\n    {known} nodes are known to hold it"),
            None => String::new(),
        };
        say::data(&format!(
            "{}  {}  {}, {card}\n    {}{held}",
            model.name,
            &*model.manifest.architecture,
            size(model.manifest.total_len()),
            model.id
        ));
    }
    for (name, bytes) in pull::unfinished(store)? {
        say::words(&format!(
            "{name} is not here as a whole, {} are: kinoflockd model pull {name}",
            size(bytes)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(store: &ModelStore, wanted: &str) -> anyhow::Result<ExitCode> {
    let discarded = pull::discard(store, wanted)?;
    let model = match store.find(wanted)? {
        Some(model) => model,
        None if discarded => {
            say::words(&format!("what was here of {wanted} is gone"));
            return Ok(ExitCode::SUCCESS);
        }
        None => chosen(store, Some(wanted))?.remove(0),
    };
    anyhow::ensure!(
        model.name != embedded::NAME,
        "{} is in this program and would be here again at once",
        embedded::NAME
    );
    store.remove(&model)?;
    let gone = size(model.manifest.total_len());
    say::words(&format!(
        "{} is gone, {gone} are free; a daemon that runs has it until its next start",
        model.name
    ));
    Ok(ExitCode::SUCCESS)
}

fn import(
    store: &ModelStore,
    path: &Path,
    name: Option<String>,
    text_encoder: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    let is_file = path.is_file();
    let name = match name {
        Some(name) => name,
        None => {
            let whole = path.canonicalize().with_context(|| format!("cannot open {}", path.display()))?;
            let last = if is_file { whole.file_stem() } else { whole.file_name() };
            let last = last.and_then(|name| name.to_str()).map(str::to_owned);
            last.context("it has no name; give one with --name")?
        }
    };
    let model = match text_encoder {
        Some(beside) if is_file => store.import_file(path, beside, &name)?,
        None if is_file => anyhow::bail!(
            "{} is a file, and a model needs a text encoder too: give a model folder that has one with --text-encoder",
            path.display()
        ),
        Some(_) => anyhow::bail!("{} is a folder: --text-encoder is for a file", path.display()),
        None => store.import(path, &name)?,
    };
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

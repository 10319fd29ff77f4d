//! `kinoflockd model pull`: the question about the licence, and a bar that moves while the files come.

use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kinoflock_protocol::id::ModelId;

use super::super::{control, say};
use super::show::card_lines;
use super::words::size;
use crate::admin::call;
use crate::config::Config;
use crate::models::hub::Hub;
use crate::models::known::{self, KnownModel};
use crate::models::pull::{self, Event, Plan};
use crate::models::{Model, ModelStore};
use crate::run::unix_now;

/// Pause between two looks at how far the daemon is.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Flags of `model pull`.
#[derive(Debug, Args)]
pub(in crate::cli) struct PullArgs {
    /// The model's name, as in: kinoflockd model list --known.
    name: String,
    /// The model's licence was read and is accepted.
    #[arg(long)]
    accept_licence: bool,
    /// Have the running daemon fetch it from other nodes instead, by id or by the name under which they offer it; only
    /// models under open licences.
    #[arg(long, conflicts_with_all = ["accept_licence", "revision"])]
    from_peers: bool,
    /// Another branch or commit of its repository than the list names; known hashes are not compared then.
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
}

pub(super) fn run(args: &PullArgs, store: &ModelStore, config: &Config) -> anyhow::Result<ExitCode> {
    if args.from_peers {
        return from_peers(&args.name, config);
    }
    let known = known::find(&args.name).with_context(|| unknown(&args.name))?;
    if let Some(model) = store.find(&known.name)? {
        say::data(&model.id.to_string());
        say::words(&format!("{} is here already; to pull it anew, remove it first", model.name));
        return Ok(ExitCode::SUCCESS);
    }
    pull::check(known)?;
    let card = known.card(ModelId::of(&[]), unix_now());
    say::words(&card_lines(&card).join("\n"));
    accept(known, args.accept_licence)?;
    let hub = Hub::from_environment()?;
    let plan = Plan::new(&hub, known, args.revision.as_deref())?;
    let (total, had) = (plan.total(), plan.had(store));
    let here = if had > 0 { format!(", {} of them are here", size(had)) } else { String::new() };
    say::words(&format!(
        "{} files, {}{here}, from {}/{} at {}",
        plan.files.len(),
        size(total),
        hub.address(),
        known.repository,
        plan.commit
    ));
    if plan.gated {
        say::words("the hub wants its terms accepted on that page, and a token in HF_TOKEN");
    }
    let model = fetch(&hub, store, &plan)
        .context("what is here stays: the same command goes on from there")
        .map_err(turned)?;
    say::data(&model.id.to_string());
    say::words(&format!("{} is here; a running daemon serves it after its next start", model.name));
    Ok(ExitCode::SUCCESS)
}

/// Waits until the daemon has a model from other nodes. Interrupted, the daemon goes on.
fn from_peers(name: &str, config: &Config) -> anyhow::Result<ExitCode> {
    let socket = control::socket(config);
    call::keep(&socket, name)?;
    let bar = moving_bar(0);
    let mut told = String::new();
    loop {
        let report = call::status(&socket)?;
        let model = report.archive.into_iter().find(|model| model.name == name.trim());
        let model = model.context("the daemon was started again and does not know of it any more")?;
        if let Some(id) = model.model {
            if let Some(bar) = &bar {
                bar.finish_and_clear();
            }
            say::data(&id);
            say::words(&format!(
                "{name} is here and given to others; a device computes it after the daemon's next start"
            ));
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(bar) = &bar {
            bar.set_length(model.total);
            bar.set_position(model.done);
        }
        if model.text != told && !model.text.is_empty() {
            let text = format!("{}; the daemon tries again", model.text);
            match &bar {
                Some(bar) => bar.println(&text),
                None => say::words(&text),
            }
            told = model.text;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A bar on a terminal, none elsewhere.
fn moving_bar(bytes: u64) -> Option<ProgressBar> {
    std::io::stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template(
            "{msg:>28!} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
        );
        let style = style.expect("invariant: the template is well formed");
        ProgressBar::new(bytes).with_style(style)
    })
}

/// Says first what happened and then what to do.
fn turned(error: anyhow::Error) -> anyhow::Error {
    anyhow::anyhow!("{}; {error}", error.root_cause())
}

/// What is said about a name that is not known.
pub(super) fn unknown(name: &str) -> String {
    let near = known::near(name);
    let meant = if near.is_empty() { String::new() } else { format!("; like it are {}", near.join(", ")) };
    format!("no model {name:?} is known{meant}; see kinoflockd model list --known")
}

/// A licence with terms is accepted by a word of the operator, or not at all.
fn accept(known: &KnownModel, accepted: bool) -> anyhow::Result<()> {
    let licence = known.licence();
    if !licence.accept || accepted {
        return Ok(());
    }
    anyhow::ensure!(
        std::io::stdin().is_terminal() && std::io::stderr().is_terminal(),
        "{} is under the {}, whose terms you must accept: read {}, then give --accept-licence",
        known.name,
        licence.name,
        licence.url
    );
    let mut stderr = std::io::stderr();
    write!(stderr, "Have you read {} and do you accept it? yes or no [no]: ", licence.url)?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    let yes = matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes");
    anyhow::ensure!(yes, "the licence was not accepted; nothing was fetched");
    Ok(())
}

fn fetch(hub: &Hub, store: &ModelStore, plan: &Plan) -> Result<Model, pull::PullError> {
    let bar = moving_bar(plan.total());
    let mut tell = |event: Event<'_>| match (&bar, event) {
        (Some(bar), Event::File { file, had }) => {
            bar.set_message(tail(&file.path));
            bar.inc(had);
            // What was here says nothing about the speed.
            bar.reset_eta();
        }
        (None, Event::File { file, had }) => {
            let had = if had > 0 { format!(", {} are here", size(had)) } else { String::new() };
            say::words(&format!("{} ({}{had})", file.path, size(file.len)));
        }
        (Some(bar), Event::Bytes(more)) => {
            if more < 0 {
                bar.dec(more.unsigned_abs());
            } else {
                bar.inc(more.unsigned_abs());
            }
        }
        (bar, Event::Again { error, pause }) => {
            let text = format!("{error}; again in {} s", pause.as_secs());
            match bar {
                Some(bar) => bar.println(text),
                None => say::words(&text),
            }
        }
        (Some(bar), Event::Importing) => bar.set_message("hashing"),
        (None, Event::Importing) => say::words("all is here; hashing"),
        (None, Event::Bytes(_)) => {}
    };
    let pulled = pull::pull(hub, store, plan, pull::PAUSES, &mut tell);
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    pulled
}

/// The end of a path, which tells more than its beginning.
fn tail(path: &str) -> String {
    const MOST: usize = 28;
    let from = path.len().saturating_sub(MOST);
    path.get(from..).unwrap_or(path).to_owned()
}

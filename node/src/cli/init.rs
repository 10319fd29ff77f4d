//! `kinoflockd init`: the key, the configuration, and on a terminal the one question that only the operator can answer.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

use anyhow::Context;
use clap::Args;
use kinoflock_protocol::id::RequesterId;

use super::say;
use crate::config::{self, ConfigOverrides, Environment, FileConfig, Folders, Scope};
use crate::identity::{Identity, IdentityError};

/// Flags of `init`.
#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Whom to serve, instead of the question: own (only the keys in serve.own_keys) or public.
    #[arg(long, value_name = "own|public")]
    serve: Option<Whom>,
    /// Your artist's key (`kinoflock key show`): its jobs come first.
    #[arg(long, value_name = "KEY")]
    own_key: Vec<RequesterId>,
    /// Do nothing where there is a key and a configuration already, for start-up scripts.
    #[arg(long)]
    if_missing: bool,
}

/// Who may send jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Whom {
    /// Own keys only.
    Own,
    /// Own keys first, then everybody for a share.
    Public,
}

pub(super) fn run(args: &InitArgs, overrides: &ConfigOverrides) -> anyhow::Result<()> {
    let env = Environment::of_process();
    let scope = Scope::choose(&env, overrides.system, overrides.user);
    let folders = Folders::of(scope, &env).context("no home folder to put anything into: set HOME")?;
    let file = overrides.config.clone().unwrap_or_else(|| folders.config.clone());
    let state = overrides.state.clone().unwrap_or_else(|| folders.state.clone());

    let made = match Identity::create(&state) {
        Ok(identity) => {
            say::words(&format!("key made in {}: back it up, it is this node", state.display()));
            identity
        }
        Err(IdentityError::Exists { .. }) if args.if_missing || !file.exists() => Identity::load(&state)?,
        Err(error) => return Err(error.into()),
    };
    if file.exists() {
        anyhow::ensure!(args.if_missing, "{} exists; remove it first, or edit it", file.display());
    } else {
        let chosen = choose(args)?;
        write(&file, &config::template(&chosen, Some(&folders)))?;
        say::words(&format!("configuration written: {}", file.display()));
    }
    say::data(&made.node_id().to_string());
    say::words("next: kinoflockd doctor, then kinoflockd run");
    Ok(())
}

fn choose(args: &InitArgs) -> anyhow::Result<FileConfig> {
    let mut chosen = FileConfig::default();
    chosen.serve.own_keys = args.own_key.iter().map(ToString::to_string).collect();
    let whom = match args.serve {
        Some(whom) => whom,
        None if std::io::stdin().is_terminal() && std::io::stderr().is_terminal() => ask()?,
        None => Whom::Public,
    };
    chosen.serve.public = whom == Whom::Public;
    Ok(chosen)
}

fn ask() -> anyhow::Result<Whom> {
    say::words(
        "Whom shall this node serve?\n\
         \x20 1  your own jobs first, and everybody for 25 % of the work (the default)\n\
         \x20 2  your own jobs only",
    );
    loop {
        // The question is on stderr, like all words; stdout is for the node's id.
        let mut stderr = std::io::stderr();
        write!(stderr, "1 or 2 [1]: ")?;
        stderr.flush()?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        match answer.trim() {
            "" | "1" => return Ok(Whom::Public),
            "2" => return Ok(Whom::Own),
            other => say::words(&format!("{other:?} is neither 1 nor 2")),
        }
    }
}

fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

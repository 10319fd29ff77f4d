//! The command `kinoflock`: words in, files and words out. All work is the library's.

use std::process::ExitCode;

use clap::Parser;

mod adapter;
mod args;
mod audit;
mod batch;
mod clips;
mod context;
mod failure;
mod follow;
mod forget;
mod generate;
mod jobs;
mod keys;
mod latents;
mod list;
mod many;
mod nodes;
mod ops;
mod survey;
mod ticket;
mod touch;

pub use args::Cli;
use args::Command;
use context::Context;
pub use failure::{Exit, Failure};

use crate::output::Output;

/// Runs a command; gives the exit code.
pub async fn run(cli: Cli) -> u8 {
    let out = Output::new(cli.common.json, cli.common.quiet);
    init_logging(cli.common.verbose);
    match dispatch(cli, &out).await {
        Ok(()) => Exit::Ok as u8,
        Err(failure) => {
            failure.tell(&out);
            failure.exit as u8
        }
    }
}

/// Says that the process could not even begin.
#[must_use]
pub fn no_runtime(error: &std::io::Error) -> ExitCode {
    Output::new(false, false).error(&format!("cannot start: {error}"));
    ExitCode::from(Exit::Other as u8)
}

async fn dispatch(cli: Cli, out: &Output) -> Result<(), Failure> {
    let Cli { common, command } = cli;
    match command {
        Command::Completions { shell } => {
            completions(shell, out);
            Ok(())
        }
        command => {
            let context = Context::load(&common, out)?;
            with_context(command, &context).await
        }
    }
}

async fn with_context(command: Command, context: &Context<'_>) -> Result<(), Failure> {
    match command {
        Command::Generate(args) => generate::run(*args, context).await,
        Command::Ps { all } => jobs::ps(all, context),
        Command::Status { job } => jobs::status(&job, context).await,
        Command::Wait { job, timeout, save } => jobs::wait(&job, timeout, &save, context).await,
        Command::Cancel { job } => jobs::cancel(&job, context).await,
        Command::Ls => clips::ls(context),
        Command::Get { clip, save } => clips::get(&clip, &save, context).await,
        Command::Share { clip } => clips::share(&clip, context),
        Command::Rm { ids } => clips::rm(&ids, context),
        Command::Forget { clip } => forget::forget(&clip, context).await,
        Command::Audit { clip, by } => audit::run(&clip, by, context).await,
        Command::Show { what } => clips::show(&what, context),
        Command::Verify { file } => clips::verify(&file, context),
        Command::Nodes { node } => nodes::nodes(&node, context).await,
        Command::Models { node } => nodes::models(&node, context).await,
        Command::Join { ticket } => nodes::join(&ticket, context).await,
        Command::Ticket => ticket::ticket(context),
        Command::Adapter { command } => adapter::run(command, context),
        Command::Latents { command } => latents::run(command, context).await,
        Command::Ops => {
            ops::run(context);
            Ok(())
        }
        Command::List { command } => list::run(command, context).await,
        Command::Key { command } => keys::run(command, context),
        Command::Completions { .. } => Ok(()),
    }
}

fn completions(shell: clap_complete::Shell, out: &Output) {
    let mut script = Vec::new();
    let mut command = <Cli as clap::CommandFactory>::command();
    clap_complete::generate(shell, &mut command, "kinoflock", &mut script);
    out.bytes(&script);
}

/// Logs are for those who look for a fault: off, unless `-v` or `KINOFLOCK_LOG` says otherwise.
fn init_logging(verbose: u8) {
    let level = match verbose {
        0 => "off",
        1 => "kinoflock=debug,kinoflock_client=debug,kinoflock_net=debug",
        _ => "debug",
    };
    let filter = std::env::var("KINOFLOCK_LOG").unwrap_or_else(|_| level.to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_default();
    // A subscriber that is there already, as in tests, stays.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// Parses the command line of a test or of another program; errors are clap's.
///
/// # Errors
/// What clap finds wrong, with its help text.
pub fn parse<I: IntoIterator<Item = T>, T: Into<std::ffi::OsString> + Clone>(
    arguments: I,
) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(arguments)
}

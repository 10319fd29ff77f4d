//! The command `kinoflockd`: what an operator types, and how each command is answered.
//!
//! `run` is the daemon. `try` starts one as a child, in a folder of its own, and sends it a job. `status`, `pause`,
//! `resume`, `drain` and `ticket` ask the running daemon over its admin socket, because only `run` opens the store.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::admin::DeviceCommand;
use crate::config::{self, Config, ConfigOverrides, Environment};

mod bench;
mod control;
mod doctor;
mod init;
mod logging;
mod model;
mod say;
mod trial;

/// A node of Kinoflock: makes video on this machine for the people you choose.
#[derive(Debug, Parser)]
#[command(name = "kinoflockd", version, arg_required_else_help = true, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    overrides: OverrideArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

const EXAMPLES: &str = "\
Examples:
  kinoflockd try \"a red circle drifts left over a blue field\" -o clip.mp4
                                    make a clip here, nothing else needed
  kinoflockd init                   make this node's key and configuration
  kinoflockd run                    be a node
  kinoflockd ticket                 print what artists paste into `kinoflock join`
  kinoflockd pause --for 2h         have the card for yourself for two hours";

/// Flags that lie over the configuration; they may stand before or after the command.
#[derive(Debug, Default, Args)]
struct OverrideArgs {
    /// Configuration file.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The machine's folders: /etc/kinoflock, /var/lib/kinoflock, /run/kinoflock.
    #[arg(long, global = true, conflicts_with = "user")]
    system: bool,
    /// A person's folders, even for root.
    #[arg(long, global = true)]
    user: bool,
    /// Folder of key, queue, clips and receipts.
    #[arg(long, global = true, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Folder of model weights.
    #[arg(long, global = true, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Folder of the addresses file and the admin socket.
    #[arg(long, global = true, value_name = "DIR")]
    runtime: Option<PathBuf>,
    /// Any key of the configuration, such as network.mdns=false; may be given several times.
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the configuration as file, environment and flags together make it, and end.
    #[arg(long, global = true)]
    print_config: bool,
}

/// What an operator can ask for.
#[derive(Debug, Subcommand)]
enum Command {
    /// Make this node's key and a configuration in which every key is explained.
    Init(init::InitArgs),
    /// Be a node until SIGTERM or Ctrl-C.
    Run(RunArgs),
    /// Be an archive: hold models for the network and give them to nodes that ask, computing nothing.
    ///
    /// What is not here is fetched from other nodes, every piece verified, if its card's licence is open. It needs disk and
    /// no GPU. storage.keep in the configuration does the same on a node that computes.
    Keep(KeepArgs),
    /// Make a clip on this machine: a daemon of its own, a signed job over the network, a verified clip.
    Try(trial::TryArgs),
    /// What the running node is doing.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Models of this node.
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Measure this machine: seconds a step and a decode, and the speed to be advertised.
    Bench(bench::BenchArgs),
    /// Check what a node needs: folders, key, disk, ports, clock, worker, models.
    Doctor {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Start no further job; what waits keeps its place.
    Pause(ControlArgs),
    /// Start jobs again after `pause` or `drain`.
    Resume(ResumeArgs),
    /// Take no new jobs and start none; the running one is finished, what waits keeps its place.
    Drain(ControlArgs),
    /// Print a ticket: what an artist pastes into `kinoflock join`.
    Ticket,
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// The worker process; the daemon starts it.
    #[command(hide = true)]
    Worker,
}

/// Flags of `run`.
#[derive(Debug, Default, Args)]
struct RunArgs {
    /// Network to be on.
    #[arg(long, value_name = "NAME")]
    network: Option<String>,
    /// Listen here, such as /ip4/0.0.0.0/tcp/4820; may be given several times.
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<String>,
    /// Tell others this address too.
    #[arg(long, value_name = "ADDRESS")]
    external: Vec<String>,
    /// Connect to this node at the start.
    #[arg(long, value_name = "ADDRESS")]
    bootstrap: Vec<String>,
    /// Find nodes on the local network.
    #[arg(long, value_name = "true|false")]
    mdns: Option<bool>,
    /// Admin port, on loopback.
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<String>,
    /// Program to start as worker.
    #[arg(long, value_name = "PROGRAM")]
    worker: Option<PathBuf>,
}

/// Flags of `keep`.
#[derive(Debug, Args)]
struct KeepArgs {
    /// Models by id, or by the name under which others offer them.
    #[arg(required = true, value_name = "MODEL")]
    wanted: Vec<String>,
    #[command(flatten)]
    run: RunArgs,
}

/// Flags of `resume`.
#[derive(Debug, Args)]
struct ResumeArgs {
    /// Only this device, by name or number.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

impl From<ResumeArgs> for DeviceCommand {
    fn from(args: ResumeArgs) -> Self {
        Self { device: args.device, for_seconds: None }
    }
}

/// Flags of `pause` and `drain`.
#[derive(Debug, Args)]
struct ControlArgs {
    /// Only this device, by name or number.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Go on by itself after this time, such as 2h or 30min.
    #[arg(long = "for", value_name = "TIME", value_parser = parse_span)]
    span: Option<Duration>,
}

fn parse_span(text: &str) -> Result<Duration, String> {
    text.parse::<config::Span>().map(|span| span.duration()).map_err(|error| error.to_string())
}

impl From<ControlArgs> for DeviceCommand {
    fn from(args: ControlArgs) -> Self {
        Self { device: args.device, for_seconds: args.span.map(|span| span.as_secs().max(1)) }
    }
}

/// Runs the command line to its end.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.dispatch() {
        Ok(code) => code,
        Err(error) => {
            say::error(&error);
            ExitCode::FAILURE
        }
    }
}

impl Cli {
    fn dispatch(self) -> anyhow::Result<ExitCode> {
        let mut overrides = self.overrides.overrides();
        if let Some(Command::Worker) = self.command {
            return Ok(crate::engine::worker::main());
        }
        if let Some(Command::Run(run) | Command::Keep(KeepArgs { run, .. })) = &self.command {
            run.add_to(&mut overrides);
        }
        if self.overrides.print_config {
            say::data(&config::render(&load(&overrides)?));
            return Ok(ExitCode::SUCCESS);
        }
        let command =
            self.command.ok_or_else(|| anyhow::anyhow!("no command given; see kinoflockd --help"))?;
        answer(command, &overrides)
    }
}

fn answer(command: Command, overrides: &ConfigOverrides) -> anyhow::Result<ExitCode> {
    match command {
        Command::Init(args) => init::run(&args, overrides)?,
        Command::Run(_) => {
            let config = load(overrides)?;
            logging::start();
            crate::run::main(config)?;
        }
        Command::Keep(KeepArgs { wanted, .. }) => {
            let mut config = load(overrides)?;
            config.devices.clear();
            config.storage.keep.extend(wanted);
            logging::start();
            crate::run::main(config)?;
        }
        Command::Try(args) => return trial::run(&args),
        Command::Status { json } => control::status(&load(overrides)?, json)?,
        Command::Model(command) => return model::run(command, &load(overrides)?),
        Command::Bench(args) => bench::run(&args, &load(overrides)?)?,
        Command::Doctor { json } => return doctor::run(overrides, json),
        Command::Pause(args) => control::command(&load(overrides)?, "pause", &args.into())?,
        Command::Resume(args) => control::command(&load(overrides)?, "resume", &args.into())?,
        Command::Drain(args) => control::command(&load(overrides)?, "drain", &args.into())?,
        Command::Ticket => control::ticket(&load(overrides)?)?,
        Command::Completions { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command, "kinoflockd", &mut script);
            say::bytes(&script);
        }
        Command::Worker => {
            unreachable!("invariant: the worker is dispatched before the configuration is read")
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn load(overrides: &ConfigOverrides) -> Result<Config, config::ConfigError> {
    config::load(&Environment::of_process(), overrides)
}

impl OverrideArgs {
    fn overrides(&self) -> ConfigOverrides {
        ConfigOverrides {
            config: self.config.clone(),
            system: self.system,
            user: self.user,
            state: self.state.clone(),
            models: self.models.clone(),
            runtime: self.runtime.clone(),
            set: self.set.clone(),
            ..ConfigOverrides::default()
        }
    }
}

impl RunArgs {
    fn add_to(&self, overrides: &mut ConfigOverrides) {
        overrides.network.clone_from(&self.network);
        overrides.listen.clone_from(&self.listen);
        overrides.external.clone_from(&self.external);
        overrides.bootstrap.clone_from(&self.bootstrap);
        overrides.mdns = self.mdns;
        overrides.admin.clone_from(&self.admin);
        overrides.worker.clone_from(&self.worker);
    }
}

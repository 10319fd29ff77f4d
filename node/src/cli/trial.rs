//! `kinoflockd try`: the whole way of a job on one machine, for real.
//!
//! A daemon is started as a child, with a folder, a key and free ports of its own, without discovery. A client in this
//! process sends it a signed job over libp2p, follows it, fetches the clip, verifies it and writes it out. The daemon and
//! its folder are gone afterwards, whatever happened.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kinoflock_client::ask::Ask;
use kinoflock_client::local::LocalNode;
use kinoflock_client::provenance::{self, Statement};
use kinoflock_client::session::{Client, ClientOptions, Delivered, Event, Events};
use kinoflock_client::store::Store;
use kinoflock_client::ticket::Way;
use kinoflock_protocol::Keypair;
use kinoflock_protocol::id::NetworkId;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::say;
use crate::engine::frames;

/// The child's network: it speaks to nobody else.
const NETWORK: &str = "kinoflock-try";
/// Longest time from the start of the daemon to its first answer, self-test included.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// Pause between two looks at whether the daemon is ready.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest wait for the daemon's end.
const END_WITHIN: Duration = Duration::from_secs(10);

/// Flags of `try`.
#[derive(Debug, Args)]
pub(super) struct TryArgs {
    /// What is to be seen. The bundled model knows one coloured shape that drifts over a plain field.
    prompt: String,
    /// Where the clip goes.
    #[arg(short, long, value_name = "FILE", default_value = "clip.mp4")]
    output: PathBuf,
    /// The same seed makes the same clip; random if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Write every frame as a picture too: frame-0000.png and on.
    #[arg(long, value_name = "DIR")]
    frames_png: Option<PathBuf>,
    /// Write the first to the last frame side by side into one picture.
    #[arg(long, value_name = "FILE", hide = true)]
    strip_png: Option<PathBuf>,
    /// Denoising steps, instead of the model's own number.
    #[arg(long)]
    steps: Option<u32>,
    /// Use this model instead of the bundled one: a folder in the published diffusers layout.
    #[arg(long, value_name = "DIR")]
    model_dir: Option<PathBuf>,
    /// Keep the daemon's folder, and say where it is.
    #[arg(long)]
    keep: bool,
}

/// Frames in a strip.
const STRIP_FRAMES: usize = 5;

pub(super) fn run(args: &TryArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let made = runtime.block_on(make(args));
    runtime.shutdown_timeout(Duration::from_secs(1));
    made.map(|()| ExitCode::SUCCESS)
}

async fn make(args: &TryArgs) -> anyhow::Result<()> {
    let folder = own_folder(args.keep)?;
    let started = Instant::now();
    let mut daemon = Daemon::start(folder.path(), args.model_dir.as_deref())?;
    // Ctrl-C reaches the child as well; here it only has to end the wait, and everything is put away.
    let made = tokio::select! {
        made = through_daemon(args, folder.path(), &mut daemon) => made,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; nothing was written")),
    };
    let log = daemon.end().await;
    match made {
        Ok(delivered) => report(args, &delivered, started),
        Err(error) => {
            let tail: Vec<_> = log.lines().rev().take(12).collect();
            if !tail.is_empty() {
                let lines: Vec<_> = tail.into_iter().rev().collect();
                say::words(&format!("the daemon's last words:\n{}", lines.join("\n")));
            }
            Err(error)
        }
    }
}

async fn through_daemon(args: &TryArgs, folder: &Path, daemon: &mut Daemon) -> anyhow::Result<Delivered> {
    let bar = Bar::new();
    bar.say("starting a node of its own, and testing its model");
    let node = daemon.ready(folder).await?;
    let mut seed = zeroize_seed()?;
    let key = Keypair::from_seed(&seed);
    seed.fill(0);
    let store = Store::open(folder.join("client"))?;
    let options = ClientOptions::new(NetworkId::named(NETWORK));
    let client = Client::start(options, key, store).await?;
    let ask = Ask {
        prompt: args.prompt.clone(),
        seed: args.seed,
        steps: args.steps,
        model: None,
        ..Ask::default()
    };
    let (events, mut heard) = Client::events();
    let render = async {
        while let Some(event) = heard.recv().await {
            bar.show(&event);
        }
    };
    let work = async {
        let made = deliver(&client, &ask, &node, &events).await;
        drop(events);
        made
    };
    let (made, ()) = tokio::join!(work, render);
    bar.end();
    client.stop().await;
    made
}

async fn deliver(client: &Client, ask: &Ask, node: &LocalNode, events: &Events) -> anyhow::Result<Delivered> {
    let record = client.submit(ask, &[Way::local(node)], events).await?;
    Ok(client.follow(&record.job, &[], events).await?)
}

fn zeroize_seed() -> anyhow::Result<[u8; 32]> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).context("no random bytes from the system")?;
    Ok(seed)
}

fn report(args: &TryArgs, made: &Delivered, started: Instant) -> anyhow::Result<()> {
    let bare = std::fs::read(&made.path).with_context(|| format!("cannot read {}", made.path.display()))?;
    let record = &made.record;
    let statement = Statement {
        network: record.network,
        receipt: record.receipt.as_ref().context("the job's record has no receipt")?,
        answer: record.answer.as_ref(),
        job: &record.envelope,
        model_name: &record.model_name,
        with_prompt: false,
        cards: &[],
    };
    let file = provenance::export(&bare, &statement)?;
    write_whole(&args.output, &file)?;
    let pictures = frames::decode_mp4(&made.path);
    if let Some(folder) = &args.frames_png {
        let written =
            frames::write_pngs(pictures.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?, folder)?;
        say::words(&format!("{} frames in {}", written.len(), folder.display()));
    }
    if let Some(file) = &args.strip_png {
        let pictures = pictures.map_err(|error| anyhow::anyhow!("{error}"))?;
        frames::write_strip(&pictures, STRIP_FRAMES, file)?;
    }
    let receipt = made.receipt.receipt();
    say::data(&args.output.display().to_string());
    say::words(&format!(
        "{} frames of {}x{}, seed {}, in {:.1} s\n\
         made by   {} on this machine, with {}\n\
         model     {}\n\
         job       {}\n\
         look      open {} in a player or a browser\n\
         check     kinoflock verify {}",
        made.info.frames,
        made.info.width,
        made.info.height,
        receipt.seed,
        started.elapsed().as_secs_f64(),
        receipt.node,
        &*receipt.engine,
        receipt.model,
        receipt.job,
        args.output.display(),
        args.output.display(),
    ));
    Ok(())
}

fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut name = path.file_name().context("-o names no file")?.to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// A folder of our own that goes with us, unless it is to be kept.
fn own_folder(keep: bool) -> anyhow::Result<TempDir> {
    let mut folder = tempfile::Builder::new()
        .prefix("kinoflock-try-")
        .tempdir()
        .context("cannot make a folder for the daemon")?;
    if keep {
        folder.disable_cleanup(true);
        say::words(&format!("the daemon's folder is kept: {}", folder.path().display()));
    }
    Ok(folder)
}

/// The child.
struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    fn start(folder: &Path, model: Option<&Path>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("the system does not say where this program is")?;
        let log = folder.join("daemon.log");
        let file = std::fs::File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let within = |name: &str| folder.join(name);
        if let Some(model) = model {
            let store = crate::models::ModelStore::open(&within("models"), None)?;
            let name = model.file_name().and_then(|name| name.to_str()).unwrap_or("model");
            store.import(model, name)?;
        }
        let config = within("node.toml");
        std::fs::write(&config, "").with_context(|| format!("cannot write {}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("--config").arg(&config);
        for (flag, path) in
            [("--state", within("state")), ("--models", within("models")), ("--runtime", folder.into())]
        {
            command.arg(flag).arg(path);
        }
        if let Some(model) = model {
            let name = model.file_name().and_then(|name| name.to_str()).unwrap_or("model");
            command.arg("--set").arg(format!("policy.models={name}"));
        }
        command
            .args(["run", "--network", NETWORK, "--mdns", "false", "--admin", "127.0.0.1:0"])
            .args(["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--listen", "/ip4/127.0.0.1/tcp/0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .kill_on_drop(true);
        // What the operator's own daemon is told must not reach this one.
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KINOFLOCKD_"))
        {
            command.env_remove(name);
        }
        let child = command.spawn().context("the daemon could not be started")?;
        Ok(Self { child, log })
    }

    /// Waits until the daemon listens and its model has passed the self-test.
    async fn ready(&mut self, folder: &Path) -> anyhow::Result<LocalNode> {
        let socket = folder.join("admin.sock");
        let until = Instant::now() + READY_WITHIN;
        loop {
            if let Some(status) = self.child.try_wait()? {
                anyhow::bail!("the daemon ended at its start: {status}");
            }
            let asked = socket.clone();
            let report = tokio::task::spawn_blocking(move || crate::admin::call::status(&asked)).await?;
            if let (Ok(report), Some(node)) = (report, LocalNode::read(folder)) {
                let failed =
                    |model: &crate::admin::report::ModelReport| model.self_test.starts_with("failed");
                let models = || report.devices.iter().flat_map(|device| &device.models);
                if report.accepting.is_ok() {
                    return Ok(node);
                }
                if let Some(model) = models().find(|model| failed(model))
                    && models().all(failed)
                {
                    anyhow::bail!("the model {} {}", model.name, model.self_test);
                }
            }
            anyhow::ensure!(
                Instant::now() < until,
                "the daemon was not ready within {} s",
                READY_WITHIN.as_secs()
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Ends the daemon; gives what it said.
    async fn end(mut self) -> String {
        if let Some(pid) =
            self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw)
        {
            // One that is gone already needs no signal.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if tokio::time::timeout(END_WITHIN, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// Progress on stderr: a bar on a terminal, lines elsewhere.
struct Bar {
    bar: Option<ProgressBar>,
}

impl Bar {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {pos}/{len}");
            let bar = ProgressBar::new(1).with_style(style.expect("invariant: the template is well formed"));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar }
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => say::words(text),
        }
    }

    fn show(&self, event: &Event) {
        match (&self.bar, event) {
            (Some(bar), Event::Step { done, total, .. }) => {
                bar.set_length(u64::from(*total));
                bar.set_position(u64::from(*done));
                bar.set_message("drawing".to_owned());
            }
            (Some(bar), Event::Chosen { .. }) => bar.suspend(|| say::words(&event.to_string())),
            (_, Event::Preview { .. } | Event::Reached { .. }) => {}
            _ => self.say(&event.to_string()),
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

//! The commands that ask the running daemon.

use std::io::IsTerminal;
use std::path::PathBuf;

use super::say;
use crate::admin::report::{NOT_REACHABLE, Span};
use crate::admin::{DeviceCommand, call};
use crate::config::Config;

/// Where the running daemon of this configuration is asked.
pub(crate) fn socket(config: &Config) -> PathBuf {
    config.storage.runtime.join("admin.sock")
}

pub(super) fn status(config: &Config, json: bool) -> anyhow::Result<()> {
    let report = call::status(&socket(config))?;
    say::data(&if json { serde_json::to_string_pretty(&report)? } else { in_red(&report.to_string()) });
    Ok(())
}

/// The line that says that nobody reaches this node, red where colours are seen.
fn in_red(report: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if plain || !std::io::stdout().is_terminal() {
        return report.to_owned();
    }
    let red = |line: &str| match line.starts_with(NOT_REACHABLE) {
        true => format!("\u{1b}[31m{line}\u{1b}[0m"),
        false => line.to_owned(),
    };
    report.lines().map(red).collect::<Vec<_>>().join("\n")
}

pub(super) fn command(config: &Config, verb: &str, command: &DeviceCommand) -> anyhow::Result<()> {
    call::command(&socket(config), verb, command)?;
    say::words(&done(verb, command));
    Ok(())
}

/// What a command did, and how to take it back.
fn done(verb: &str, command: &DeviceCommand) -> String {
    let device = command.device.as_deref().unwrap_or("all devices");
    let resume = match &command.device {
        Some(device) => format!("kinoflockd resume --device {device}"),
        None => "kinoflockd resume".to_owned(),
    };
    let until = match command.for_seconds {
        Some(seconds) => format!("for {}, or until: {resume}", Span(seconds)),
        None => format!("until: {resume}"),
    };
    match (verb, command.for_seconds) {
        ("pause", Some(_)) => {
            format!(
                "paused {device} {until}\nthe running job goes on; what comes meanwhile is taken and waits"
            )
        }
        ("pause", None) => {
            format!(
                "paused {device} {until}\nthe running job goes on, what waits keeps its place, no new jobs are taken"
            )
        }
        ("drain", _) => {
            format!(
                "draining {device} {until}\nthe running job is finished, none is started or taken after it"
            )
        }
        _ => format!("resumed {device}"),
    }
}

pub(super) fn ticket(config: &Config) -> anyhow::Result<()> {
    say::data(&call::ticket(&socket(config))?);
    say::words("an artist pastes it: kinoflock join TICKET");
    Ok(())
}

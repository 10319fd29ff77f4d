//! The commands that ask the running daemon.

use std::path::PathBuf;

use super::say;
use crate::admin::{DeviceCommand, call};
use crate::config::Config;

/// Where the running daemon of this configuration is asked.
pub(crate) fn socket(config: &Config) -> PathBuf {
    config.storage.runtime.join("admin.sock")
}

pub(super) fn status(config: &Config, json: bool) -> anyhow::Result<()> {
    let report = call::status(&socket(config))?;
    say::data(&if json { serde_json::to_string_pretty(&report)? } else { report.to_string() });
    Ok(())
}

pub(super) fn command(config: &Config, verb: &str, command: &DeviceCommand) -> anyhow::Result<()> {
    call::command(&socket(config), verb, command)?;
    let device = command.device.as_deref().unwrap_or("all devices");
    match command.for_seconds {
        Some(seconds) => say::words(&format!("{verb}: {device}, for {seconds} s")),
        None => say::words(&format!("{verb}: {device}")),
    }
    Ok(())
}

pub(super) fn ticket(config: &Config) -> anyhow::Result<()> {
    say::data(&call::ticket(&socket(config))?);
    say::words("an artist pastes it: kinoflock join TICKET");
    Ok(())
}

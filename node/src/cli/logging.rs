//! Where the daemon's events go: stderr, as text or as JSON lines.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// What is logged unless `KINOFLOCKD_LOG` says otherwise.
const DEFAULT_FILTER: &str = "info,libp2p=warn,libp2p_kad=error,quinn=warn,netlink_proto=error";

/// Starts logging. `KINOFLOCKD_LOG` filters (as in `debug` or `info,kinoflock_node=trace`), `KINOFLOCKD_LOG_FORMAT=json`
/// chooses JSON lines.
pub(super) fn start() {
    let filter = std::env::var("KINOFLOCKD_LOG").unwrap_or_else(|_| DEFAULT_FILTER.to_owned());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        // What cannot be written, to a log on a full disk, would be told on the same stderr, and panic there.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    let started = if std::env::var("KINOFLOCKD_LOG_FORMAT").is_ok_and(|format| format == "json") {
        builder.json().try_init()
    } else {
        builder.try_init()
    };
    if let Err(error) = started {
        super::say::words(&format!("logging could not be started: {error}"));
    }
}

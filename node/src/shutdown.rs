//! How the daemon ends: the first SIGTERM or Ctrl-C drains, the second stops at once.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// No new jobs; the running one may finish within the configured limit.
    Drain,
    /// Stop now; the running job goes back to the queue on disk.
    Now,
}

/// Listens for SIGTERM and SIGINT, and keeps SIGXFSZ from ending the process.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Never read. While it is here, a write beyond a limit on file sizes is an error like that of a full disk; the
    /// system's default is to end the process.
    _file_too_large: Signal,
    asked: bool,
}

impl Signals {
    /// Takes the signals over from the system's default.
    ///
    /// # Errors
    /// What the system says if a handler cannot be set.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            _file_too_large: signal(SignalKind::from_raw(libc::SIGXFSZ))?,
            asked: false,
        })
    }

    /// Waits for the next signal: [`Shutdown::Drain`] the first time, [`Shutdown::Now`] from then on.
    /// Cancel-safe: a signal is never lost.
    pub async fn recv(&mut self) -> Shutdown {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        if std::mem::replace(&mut self.asked, true) { Shutdown::Now } else { Shutdown::Drain }
    }
}

/// Tells systemd (`Type=notify`) how the daemon is, where it listens for that; elsewhere it does nothing.
pub fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = std::os::unix::net::UnixDatagram::unbound().and_then(|socket| {
        use std::os::linux::net::SocketAddrExt;
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
        match bytes.split_first() {
            Some((b'@', name)) => {
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(state.as_bytes(), &address)
            }
            _ => socket.send_to(state.as_bytes(), &path),
        }
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd was not notified");
    }
}

//! The command line's side of the admin socket: one blocking HTTP/1.1 request over a Unix socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{DeviceCommand, HoldersReport, StatusReport};

/// Largest answer that the command line reads.
const ANSWER_LIMIT: u64 = 4 << 20;
/// Longest wait for the daemon, a little over its own bound.
const WAIT: Duration = Duration::from_secs(15);

/// Why the daemon could not be asked, or said no.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// Nothing listens on the socket.
    #[error("no daemon runs here (nothing answers at {}): start one with `kinoflockd run`", path.display())]
    NotRunning {
        /// The socket's path.
        path: PathBuf,
    },
    /// The socket belongs to somebody else.
    #[error("the daemon at {} belongs to another user: run this as that user, or with sudo", path.display())]
    Forbidden {
        /// The socket's path.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("the daemon's answer broke off: {0}")]
    Io(#[from] std::io::Error),
    /// What came back is no answer of ours.
    #[error("the daemon answered something unexpected: {0}")]
    Malformed(String),
    /// The daemon said no.
    #[error("{0}")]
    Refused(String),
}

/// The running daemon's status.
///
/// # Errors
/// [`CallError`] if no daemon answers.
pub fn status(socket: &Path) -> Result<StatusReport, CallError> {
    let body = call(socket, "GET", "/status")?;
    serde_json::from_str(&body).map_err(|error| CallError::Malformed(error.to_string()))
}

/// The running daemon's metrics, as text.
///
/// # Errors
/// [`CallError`] if no daemon answers.
pub fn metrics(socket: &Path) -> Result<String, CallError> {
    call(socket, "GET", "/metrics")
}

/// A ticket that leads to the running daemon.
///
/// # Errors
/// [`CallError`] if no daemon answers or it has no address to tell.
pub fn ticket(socket: &Path) -> Result<String, CallError> {
    Ok(call(socket, "GET", "/ticket")?.trim().to_owned())
}

/// `pause`, `resume` or `drain`.
///
/// # Errors
/// [`CallError`] if no daemon answers, or if it knows no such device.
pub fn command(socket: &Path, verb: &str, command: &DeviceCommand) -> Result<(), CallError> {
    let mut query = Vec::new();
    if let Some(device) = &command.device {
        query.push(format!("device={}", percent_encode(device)));
    }
    if let Some(seconds) = command.for_seconds {
        query.push(format!("for_seconds={seconds}"));
    }
    call(socket, "POST", &format!("/{verb}?{}", query.join("&"))).map(|_| ())
}

/// Has the running daemon fetch a model from other nodes and hold it.
///
/// # Errors
/// [`CallError`] if no daemon answers, or it has the model.
pub fn keep(socket: &Path, model: &str) -> Result<(), CallError> {
    call(socket, "POST", &format!("/keep?model={}", percent_encode(model))).map(|_| ())
}

/// How many nodes hold each model of the running daemon.
///
/// # Errors
/// [`CallError`] if no daemon answers.
pub fn holders(socket: &Path) -> Result<Vec<HoldersReport>, CallError> {
    let body = call(socket, "GET", "/holders")?;
    serde_json::from_str(&body).map_err(|error| CallError::Malformed(error.to_string()))
}

fn call(socket: &Path, method: &str, target: &str) -> Result<String, CallError> {
    let path = || socket.to_owned();
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => CallError::Forbidden { path: path() },
        _ => CallError::NotRunning { path: path() },
    })?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.set_write_timeout(Some(WAIT))?;
    // HTTP/1.0: the answer ends with the connection, so it is never chunked.
    write!(stream, "{method} {target} HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_LIMIT).read_to_string(&mut answer)?;
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| CallError::Malformed("no header".to_owned()))?;
    let code = head.split(' ').nth(1).unwrap_or_default();
    if code == "200" { Ok(body.to_owned()) } else { Err(CallError::Refused(body.trim().to_owned())) }
}

fn percent_encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

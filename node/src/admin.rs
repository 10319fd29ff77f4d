//! The admin interface: how the operator and his tools talk to the running daemon.
//!
//! Two doors to one set of routes. The Unix socket in the runtime folder (mode 0600) reads and commands: `status`,
//! `pause`, `resume`, `drain`, `ticket` of the command line go through it. The loopback port, if one is configured, only
//! reads: `/healthz`, `/readyz`, `/metrics`, `/status`. It refuses foreign `Host` names, so that a web page cannot
//! reach it by rebinding its own name to this machine.
//!
//! The routes hold no state: each question is an [`AdminRequest`] to the daemon's loop, answered over a oneshot.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

pub mod call;
pub mod report;

pub use report::{DeviceReport, HoldersReport, JobReport, StatusReport};

/// Admin requests that wait for the daemon's loop; one more waits in its connection.
pub const ADMIN_QUEUE: usize = 16;
/// Longest time the daemon's loop may take to answer an admin request.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What may be asked of the daemon's loop.
#[derive(Debug)]
pub enum AdminRequest {
    /// The whole status.
    Status(oneshot::Sender<StatusReport>),
    /// Stop starting jobs on a device (or on all), take new ones.
    Pause(DeviceCommand, oneshot::Sender<Result<(), String>>),
    /// Start jobs again.
    Resume(DeviceCommand, oneshot::Sender<Result<(), String>>),
    /// Take no new jobs, finish what is there.
    Drain(DeviceCommand, oneshot::Sender<Result<(), String>>),
    /// A ticket that leads here.
    Ticket(oneshot::Sender<Result<String, String>>),
    /// Fetch a model from other nodes and hold it.
    Keep(String, oneshot::Sender<Result<(), String>>),
    /// How many nodes hold each model of this one.
    Holders(oneshot::Sender<Vec<HoldersReport>>),
}

/// Which device, and for how long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceCommand {
    /// The device's name or its index from 0; all if absent.
    pub device: Option<String>,
    /// After so many seconds the device goes on by itself.
    pub for_seconds: Option<u64>,
}

/// Which model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelCommand {
    /// Its name or id.
    pub model: String,
}

/// What the routes share.
#[derive(Clone)]
pub struct Admin {
    requests: mpsc::Sender<AdminRequest>,
    registry: Arc<Registry>,
    ready: watch::Receiver<bool>,
}

/// Why the admin interface could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The socket's folder or the socket could not be made.
    #[error("admin socket {}: {source}", path.display())]
    Socket {
        /// Where it should have been.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The port could not be bound.
    #[error(
        "admin port {address}: {source}; stop the program that has it, or set admin.listen to another port (0 takes a free one)"
    )]
    Port {
        /// The address from the configuration.
        address: std::net::SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Admin {
    /// Routes that ask through `requests`, show `registry`, and say ready as `ready` does.
    #[must_use]
    pub fn new(
        requests: mpsc::Sender<AdminRequest>,
        registry: Arc<Registry>,
        ready: watch::Receiver<bool>,
    ) -> Self {
        Self { requests, registry, ready }
    }

    /// Serves reading and commanding on a Unix socket until `stop`; the socket's file goes with it.
    ///
    /// # Errors
    /// [`AdminError::Socket`] if the socket cannot be made.
    pub fn serve_socket(
        &self,
        path: &Path,
        stop: CancellationToken,
    ) -> Result<tokio::task::JoinHandle<()>, AdminError> {
        let error = |source| AdminError::Socket { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(error)?;
        }
        // The store's lock says that no second daemon runs, so a file left here is a dead one's.
        match std::fs::remove_file(path) {
            Ok(()) => {}
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(error(source)),
        }
        let listener = UnixListener::bind(path).map_err(error)?;
        let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(path, owner_only).map_err(error)?;
        let routes = self.reading().merge(self.commanding()).with_state(self.clone());
        let path = path.to_owned();
        Ok(tokio::spawn(async move {
            let served = axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned());
            if let Err(error) = served.await {
                tracing::warn!(%error, "admin socket ended");
            }
            let _gone_already = std::fs::remove_file(path);
        }))
    }

    /// Serves reading on a loopback port until `stop`. Returns the bound address.
    ///
    /// # Errors
    /// [`AdminError::Port`] if the port cannot be bound.
    pub async fn serve_port(
        &self,
        address: std::net::SocketAddr,
        stop: CancellationToken,
    ) -> Result<std::net::SocketAddr, AdminError> {
        let error = |source| AdminError::Port { address, source };
        let listener = TcpListener::bind(address).await.map_err(error)?;
        let bound = listener.local_addr().map_err(error)?;
        let routes = self.reading().layer(middleware::from_fn(loopback_host)).with_state(self.clone());
        tokio::spawn(async move {
            let served = axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned());
            if let Err(error) = served.await {
                tracing::warn!(%error, "admin port ended");
            }
        });
        Ok(bound)
    }

    fn reading(&self) -> Router<Self> {
        Router::new()
            .route("/healthz", get(async || "ok\n"))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .route("/status", get(status))
    }

    fn commanding(&self) -> Router<Self> {
        Router::new()
            .route("/pause", post(pause))
            .route("/resume", post(resume))
            .route("/drain", post(drain))
            .route("/ticket", get(ticket))
            .route("/keep", post(keep))
            .route("/holders", get(holders))
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> AdminRequest) -> Result<T, Response> {
        let busy = |what: &str| (StatusCode::SERVICE_UNAVAILABLE, format!("{what}\n")).into_response();
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.requests.send(request(reply)).await.map_err(|_| busy("the daemon is stopping"))?;
            answer.await.map_err(|_| busy("the daemon is stopping"))
        };
        match tokio::time::timeout(ANSWER_WITHIN, asked).await {
            Ok(answered) => answered,
            Err(_) => Err(busy("the daemon did not answer within 10 s")),
        }
    }
}

async fn loopback_host(headers: HeaderMap, request: Request, next: Next) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _port)| name);
    if matches!(name, "localhost" | "127.0.0.1" | "[::1]") {
        next.run(request).await
    } else {
        (StatusCode::FORBIDDEN, "this port answers to localhost only\n").into_response()
    }
}

async fn readyz(State(admin): State<Admin>) -> Response {
    if *admin.ready.borrow() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready: no model has passed its self-test yet, or draining\n")
            .into_response()
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    match crate::telemetry::encode(&admin.registry) {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn status(State(admin): State<Admin>) -> Response {
    match admin.ask(AdminRequest::Status).await {
        Ok(report) => Json(report).into_response(),
        Err(response) => response,
    }
}

async fn pause(State(admin): State<Admin>, Query(command): Query<DeviceCommand>) -> Response {
    done(admin.ask(|reply| AdminRequest::Pause(command, reply)).await)
}

async fn resume(State(admin): State<Admin>, Query(command): Query<DeviceCommand>) -> Response {
    done(admin.ask(|reply| AdminRequest::Resume(command, reply)).await)
}

async fn drain(State(admin): State<Admin>, Query(command): Query<DeviceCommand>) -> Response {
    done(admin.ask(|reply| AdminRequest::Drain(command, reply)).await)
}

async fn ticket(State(admin): State<Admin>) -> Response {
    match admin.ask(AdminRequest::Ticket).await {
        Ok(Ok(ticket)) => format!("{ticket}\n").into_response(),
        Ok(Err(reason)) => (StatusCode::CONFLICT, format!("{reason}\n")).into_response(),
        Err(response) => response,
    }
}

async fn keep(State(admin): State<Admin>, Query(command): Query<ModelCommand>) -> Response {
    done(admin.ask(|reply| AdminRequest::Keep(command.model, reply)).await)
}

async fn holders(State(admin): State<Admin>) -> Response {
    match admin.ask(AdminRequest::Holders).await {
        Ok(counted) => Json(counted).into_response(),
        Err(response) => response,
    }
}

fn done(answer: Result<Result<(), String>, Response>) -> Response {
    match answer {
        Ok(Ok(())) => "done\n".into_response(),
        Ok(Err(reason)) => (StatusCode::BAD_REQUEST, format!("{reason}\n")).into_response(),
        Err(response) => response,
    }
}

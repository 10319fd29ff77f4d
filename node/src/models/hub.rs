//! The hub where models are published: its listing of a repository's files, and their bytes from any place on.
//!
//! Redirects are followed here and not by the HTTP client, for three reasons: what the hub says of a file (its commit,
//! its hash) stands in the answer that redirects; the token is shown to the hub alone and never to the place where it
//! sends us; and nothing leads from an encrypted to an open connection.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use url::Url;

pub use self::hash::{FileHash, Hashing};

mod hash;

/// The hub, where the environment names no other.
pub const ENDPOINT: &str = "https://huggingface.co";
/// Most bytes of a listing.
const MAX_LISTING: u64 = 16 << 20;
/// Most files of a repository.
const MAX_FILES: usize = 8192;
/// Most redirects of one question.
const MAX_REDIRECTS: usize = 6;
/// Longest wait for a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(20);
/// Longest wait for the next bytes.
const READ_WITHIN: Duration = Duration::from_secs(60);

/// Why the hub gave nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// `HF_ENDPOINT` is no address of a hub.
    #[error("HF_ENDPOINT {given:?} is no address of a hub: {reason}")]
    Endpoint {
        /// What was given.
        given: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No answer, or one that broke off.
    #[error("{place} was not reached: {reason}")]
    Unreachable {
        /// Where the question went.
        place: String,
        /// What happened.
        reason: String,
    },
    /// The hub wants to know who asks, or refuses them.
    #[error(
        "{place} refuses with status {status}: {}",
        if *token { "the token does not open it; accept the model's terms on its page first" }
        else { "it wants a token; set HF_TOKEN, after accepting the model's terms on its page" }
    )]
    Denied {
        /// Where the question went.
        place: String,
        /// HTTP status.
        status: u16,
        /// Whether a token was shown.
        token: bool,
    },
    /// There is no such repository, revision or file.
    #[error("{place} is not there (status 404)")]
    NotFound {
        /// Where the question went.
        place: String,
    },
    /// Another status.
    #[error("{place} answers with status {status}")]
    Status {
        /// Where the question went.
        place: String,
        /// HTTP status.
        status: u16,
    },
    /// An answer that makes no sense.
    #[error("{place} gives an answer that cannot be used: {reason}")]
    Answer {
        /// Where the question went.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl HubError {
    /// Stable name for metrics.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Endpoint { .. } => "hub_endpoint",
            Self::Unreachable { .. } => "hub_unreachable",
            Self::Denied { .. } => "hub_denied",
            Self::NotFound { .. } => "hub_not_found",
            Self::Status { .. } => "hub_status",
            Self::Answer { .. } => "hub_answer",
        }
    }

    /// Whether the same question may be answered a little later.
    #[must_use]
    pub const fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }
}

/// A repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The commit, 40 hex digits.
    pub commit: String,
    /// Whether its terms must be accepted on its page.
    pub gated: bool,
    /// Every file.
    pub files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Path within the repository, with `/`.
    pub path: String,
    /// Length in bytes.
    pub len: u64,
    /// Its hash, if it is told.
    pub hash: Option<FileHash>,
}

/// A file that is coming.
pub struct Incoming {
    /// Its bytes.
    pub bytes: Box<dyn Read + Send + Sync>,
    /// The place in the file at which they begin.
    pub from: u64,
    /// Its hash, if the answer tells.
    pub hash: Option<FileHash>,
}

/// A hub.
#[derive(Debug, Clone)]
pub struct Hub {
    endpoint: Url,
    token: Option<String>,
    agent: ureq::Agent,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    gated: serde_json::Value,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// What the hub's own answers say of a file, over all redirects.
#[derive(Default)]
struct Told {
    commit: Option<String>,
    hash: Option<FileHash>,
}

impl Hub {
    /// The hub that `HF_ENDPOINT` names, with the token of `HF_TOKEN`, or of the file where the hub's own tools keep it.
    ///
    /// # Errors
    /// [`HubError::Endpoint`].
    pub fn from_environment() -> Result<Self, HubError> {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        Self::new(&endpoint, set("HF_TOKEN").or_else(|| kept_token(set)))
    }

    /// A hub at an address.
    ///
    /// # Errors
    /// [`HubError::Endpoint`].
    pub fn new(endpoint: &str, token: Option<String>) -> Result<Self, HubError> {
        let fault =
            |reason: &str| HubError::Endpoint { given: endpoint.to_owned(), reason: reason.to_owned() };
        let mut url = Url::parse(endpoint.trim()).map_err(|error| fault(&error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(fault("http:// or https:// and a host are wanted"));
        }
        if !url.path().ends_with('/') {
            let path = format!("{}/", url.path());
            url.set_path(&path);
        }
        let agent = ureq::AgentBuilder::new()
            .user_agent(concat!("kinoflockd/", env!("CARGO_PKG_VERSION")))
            .redirects(0)
            .timeout_connect(CONNECT_WITHIN)
            .timeout_read(READ_WITHIN)
            .timeout_write(READ_WITHIN)
            .build();
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        Ok(Self { endpoint: url, token, agent })
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> &str {
        self.endpoint.as_str().trim_end_matches('/')
    }

    /// The files of a repository at a revision.
    ///
    /// # Errors
    /// See [`HubError`].
    pub fn listing(&self, repository: &str, revision: &str) -> Result<Listing, HubError> {
        let mut url = self.at(&["api", "models"], repository, &["revision", revision], "");
        url.set_query(Some("blobs=true"));
        let place = place(&url);
        let fault = |reason: String| HubError::Answer { place: place.clone(), reason };
        let (response, _) = self.ask(url, None)?;
        let mut text = Vec::new();
        let read = response.into_reader().take(MAX_LISTING + 1).read_to_end(&mut text);
        read.map_err(|error| HubError::Unreachable { place: place.clone(), reason: error.to_string() })?;
        if text.len() as u64 > MAX_LISTING {
            return Err(fault(format!("the listing exceeds the limit of {MAX_LISTING} bytes")));
        }
        let answer: Answer = serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))?;
        if answer.sha.len() != 40 || !answer.sha.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(fault(format!("commit {:?} is not 40 hex digits", answer.sha)));
        }
        if answer.siblings.len() > MAX_FILES {
            return Err(fault(format!("{} files exceed the limit of {MAX_FILES}", answer.siblings.len())));
        }
        let gated = !matches!(answer.gated, serde_json::Value::Null | serde_json::Value::Bool(false));
        let files = answer.siblings.into_iter().filter_map(Sibling::file).collect();
        Ok(Listing { commit: answer.sha, gated, files })
    }

    /// A file's bytes from `from` on; from its beginning, where the hub will not begin elsewhere.
    ///
    /// # Errors
    /// See [`HubError`]; [`HubError::Answer`] too when it tells of another commit.
    pub fn open(&self, repository: &str, commit: &str, path: &str, from: u64) -> Result<Incoming, HubError> {
        let url = self.at(&[], repository, &["resolve", commit], path);
        let place = place(&url);
        let fault = |reason: String| HubError::Answer { place: place.clone(), reason };
        let (response, told) = self.ask(url, (from > 0).then_some(from))?;
        if let Some(other) = told.commit.filter(|told| told != commit) {
            return Err(fault(format!("commit {commit} was asked for, {other} came")));
        }
        let begins = match response.status() {
            206 => response.header("content-range").and_then(range_start),
            _ => Some(0),
        };
        let from = begins
            .filter(|begins| *begins == from || *begins == 0)
            .ok_or_else(|| fault(format!("bytes from {from} on were asked for, others came")))?;
        Ok(Incoming { bytes: response.into_reader(), from, hash: told.hash })
    }

    /// `before/OWNER/NAME/after/path` at the endpoint, each part escaped.
    fn at(&self, before: &[&str], repository: &str, after: &[&str], path: &str) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut parts) = url.path_segments_mut() {
            parts.pop_if_empty().extend(before).extend(repository.split('/')).extend(after);
            parts.extend(path.split('/').filter(|part| !part.is_empty()));
        }
        url
    }

    /// Asks, and follows redirects.
    fn ask(&self, mut url: Url, from: Option<u64>) -> Result<(ureq::Response, Told), HubError> {
        let mut told = Told::default();
        for _ in 0..MAX_REDIRECTS {
            let ours = url.origin() == self.endpoint.origin();
            let mut request = self.agent.request_url("GET", &url);
            if let Some(token) = self.token.as_ref().filter(|_| ours) {
                request = request.set("Authorization", &format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.set("Range", &format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| self.explain(&url, error))?;
            let moved = (300..400).contains(&response.status());
            if ours {
                told.hear(&response, moved);
            }
            if !moved {
                return Ok((response, told));
            }
            let to = response.header("location").and_then(|location| url.join(location).ok());
            let reason = match to {
                Some(to) if to.scheme() == "https" || to.scheme() == url.scheme() => {
                    url = to;
                    continue;
                }
                Some(to) => format!("it redirects from https to {}", to.scheme()),
                None => "it redirects to nowhere".to_owned(),
            };
            return Err(HubError::Answer { place: place(&url), reason });
        }
        let reason = format!("it redirects more than {MAX_REDIRECTS} times");
        Err(HubError::Answer { place: place(&url), reason })
    }

    fn explain(&self, url: &Url, error: ureq::Error) -> HubError {
        let place = place(url);
        match error {
            ureq::Error::Status(status @ (401 | 403), _) => {
                HubError::Denied { place, status, token: self.token.is_some() }
            }
            ureq::Error::Status(404, _) => HubError::NotFound { place },
            ureq::Error::Status(status, _) => HubError::Status { place, status },
            ureq::Error::Transport(transport) => {
                let kind = transport.kind();
                // The whole text holds the address with its query, in which a signature may stand.
                let reason =
                    transport.message().map_or_else(|| kind.to_string(), |text| format!("{kind}: {text}"));
                HubError::Unreachable { place, reason }
            }
        }
    }
}

impl Told {
    /// The first answer that says something is believed: later ones are about the place to which it sends.
    fn hear(&mut self, response: &ureq::Response, moved: bool) {
        let header = |name| response.header(name).map(str::to_owned);
        self.commit = self.commit.take().or_else(|| header("x-repo-commit"));
        let linked = header("x-linked-etag");
        // Without a link the tag is that of the file itself, once it comes.
        let tag = linked.or_else(|| header("etag").filter(|_| !moved));
        self.hash = self.hash.or_else(|| tag.and_then(|tag| FileHash::from_tag(&tag)));
    }
}

impl Sibling {
    fn file(self) -> Option<RemoteFile> {
        let lfs = self.lfs.as_ref();
        let len = lfs.and_then(|lfs| lfs.size).or(self.size)?;
        let sha256 = lfs.and_then(|lfs| lfs.sha256.as_deref()).and_then(FileHash::from_hex);
        // The blob id of a file in large storage is that of its pointer.
        let git = self.blob_id.as_deref().filter(|_| lfs.is_none()).and_then(FileHash::from_hex);
        Some(RemoteFile { path: self.rfilename, len, hash: sha256.or(git) })
    }
}

/// An address without its query, in which a signature may stand.
fn place(url: &Url) -> String {
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    format!("{}://{}{port}{}", url.scheme(), url.host_str().unwrap_or_default(), url.path())
}

/// `bytes START-END/LEN`
fn range_start(header: &str) -> Option<u64> {
    header.trim().strip_prefix("bytes")?.trim().split('-').next()?.parse().ok()
}

/// Where the hub's own tools keep the token.
fn kept_token(set: impl Fn(&str) -> Option<String>) -> Option<String> {
    let file = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| {
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| {
            directories::BaseDirs::new().map(|dirs| dirs.home_dir().join(".cache").join("huggingface"))
        })?;
        Some(home.join("token"))
    })?;
    std::fs::read_to_string(file).ok()
}

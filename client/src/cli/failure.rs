//! What a command ends with when it did not do what it was asked: an exit code, a name for programs, a line for people.

use kinoflock_net::{FetchError, NetError};
use serde::Serialize;

use crate::ask::AskError;
use crate::config::ConfigError;
use crate::keys::KeyError;
use crate::output::Output;
use crate::provenance::ProvenanceError;
use crate::route::advice::{Change, ReasonRecord};
use crate::session::SessionError;
use crate::store::StoreError;
use crate::ticket::WayError;

/// Exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Anything else.
    Other = 1,
    /// Wrong use.
    Usage = 2,
    /// Configuration, key or store.
    Config = 3,
    /// No node, or none that offers it.
    NoNode = 4,
    /// The job failed at its node.
    Failed = 5,
    /// Refused by a rule of the node.
    Refused = 6,
    /// Verification failed.
    Verify = 7,
    /// Took too long.
    Timeout = 8,
    /// Ctrl-C.
    Interrupted = 130,
}

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    pub(super) code: &'static str,
    pub(super) text: String,
    reasons: Vec<ReasonRecord>,
    changes: Vec<Change>,
}

#[derive(Serialize)]
struct Record<'a> {
    event: &'static str,
    code: &'static str,
    exit: u8,
    text: &'a str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    reasons: &'a [ReasonRecord],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    changes: &'a [Change],
}

impl Failure {
    /// A failure with its line for people.
    pub fn new(exit: Exit, code: &'static str, text: impl Into<String>) -> Self {
        Self { exit, code, text: text.into(), reasons: Vec::new(), changes: Vec::new() }
    }

    /// Wrong use.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "usage", text)
    }

    /// A file of the artist that cannot be read or written.
    pub fn file(action: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        let advice = match error.kind() {
            std::io::ErrorKind::StorageFull => "; the disk is full: free some space",
            _ => "",
        };
        Self::new(Exit::Other, "file", format!("cannot {action} {}: {error}{advice}", path.display()))
    }

    /// The same with a further word of advice.
    #[must_use]
    pub fn and(mut self, advice: &str) -> Self {
        self.text = format!("{}; {advice}", self.text);
        self
    }

    /// Tells it.
    pub fn tell(&self, out: &Output) {
        if !self.text.is_empty() {
            out.error(&self.text);
        }
        let Self { exit, code, text, reasons, changes } = self;
        out.record(&Record { event: "error", code, exit: *exit as u8, text, reasons, changes });
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        use SessionError as E;
        let exit = match &error {
            E::Net(error) => net_exit(error),
            E::Store(error) => store_exit(error),
            E::Ask(_) | E::SeveralModels { .. } => Exit::Usage,
            E::NoNode { .. } | E::NoModel { .. } | E::UnknownModel { .. } | E::NoManifest { .. } => {
                Exit::NoNode
            }
            E::NoTaker { reasons, .. } if reasons.iter().any(|declined| declined.why.is_policy()) => {
                Exit::Refused
            }
            E::NoTaker { .. } => Exit::NoNode,
            E::Refused { .. } => Exit::Refused,
            E::Failed { .. } | E::Cancelled { .. } | E::Lost { .. } => Exit::Failed,
            E::OutOfReach { .. } => Exit::Timeout,
            E::Disputed { .. } => Exit::Verify,
            E::Fetch { error: FetchError::AllFailed { holders, .. }, .. }
                if holders.iter().filter_map(|holder| holder.fault.as_ref()).any(is_wrong_content) =>
            {
                Exit::Verify
            }
            E::Fetch { .. } => Exit::NoNode,
            _ => Exit::Other,
        };
        let (reasons, changes) = (error.reasons(), error.changes());
        Self { reasons, changes, ..Self::new(exit, error.code(), error.to_string()) }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::new(store_exit(&error), error.code(), error.to_string())
    }
}

impl From<ProvenanceError> for Failure {
    fn from(error: ProvenanceError) -> Self {
        Self::new(Exit::Verify, error.code(), error.to_string())
    }
}

macro_rules! failure_from {
    ($($error:ty => $exit:expr,)*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::new($exit, error.code(), error.to_string())
            }
        }
    )*};
}
failure_from! {
    ConfigError => Exit::Config,
    KeyError => Exit::Config,
    WayError => Exit::Usage,
    AskError => Exit::Usage,
}

fn is_wrong_content(fault: &kinoflock_net::HolderFault) -> bool {
    fault.is_lie() || fault.is_damage()
}

fn store_exit(error: &StoreError) -> Exit {
    match error {
        StoreError::Newer { .. } | StoreError::NoVersion { .. } => Exit::Config,
        StoreError::NotFound { .. } | StoreError::Ambiguous { .. } => Exit::Usage,
        StoreError::Damaged { .. } => Exit::Verify,
        _ => Exit::Other,
    }
}

fn net_exit(error: &NetError) -> Exit {
    match error {
        NetError::TimedOut { .. } => Exit::Timeout,
        NetError::Refused { .. } => Exit::Refused,
        NetError::Dial { .. }
        | NetError::Names { .. }
        | NetError::NoAddress { .. }
        | NetError::ConnectionLost { .. }
        | NetError::PeerSpeaks { .. }
        | NetError::OtherNetwork { .. }
        | NetError::NotKinoflock { .. }
        | NetError::NotOffered { .. }
        | NetError::Busy { .. } => Exit::NoNode,
        _ => Exit::Other,
    }
}

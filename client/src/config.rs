//! The client's configuration: defaults, then the TOML file, then `KINOFLOCK_*`, then flags.
//!
//! An unknown key is refused with the nearest known name. Folders follow the XDG rules; `KINOFLOCK_HOME` moves
//! configuration, keys and store under one folder.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use kinoflock_protocol::id::IdError;
use kinoflock_protocol::limits::MAX_LISTS;
use kinoflock_protocol::list::ListName;
use kinoflock_protocol::names::PUBLIC_NETWORK;
use kinoflock_protocol::{CollectiveId, NetworkId};
use serde::{Deserialize, Serialize};

/// Percent of finished jobs that are audited where nothing else is said.
const AUDIT_SHARE: u8 = 5;
/// Percent of a whole.
const WHOLE: u8 = 100;

/// Every key of the configuration, with what it means; the source of the help text and of near names.
pub const KEYS: [(&str, &str); 13] = [
    ("network", "Name of the network, or its id (net1...)."),
    ("nodes", "Nodes to begin with: addresses or tickets."),
    (
        "collective",
        "Collective (coll1...) whose nodes are asked first; without it, those of the tickets that you joined by.",
    ),
    ("lists", "Signed lists (kflist1...) to go by: their nodes are ways in, their models have names."),
    ("model", "Model to use when none is named."),
    ("resolver", "DNS server to ask, as ADDRESS:PORT; without it, the system's."),
    ("mdns", "Whether to look for nodes on the local network."),
    ("local", "Whether to ask the daemon on this machine first."),
    ("store", "Folder of jobs and clips."),
    ("key", "File of the artist's key."),
    ("artist", "Name that clips are to carry."),
    ("licence", "Licence that clips are to carry."),
    ("audit_share", "Percent of finished jobs that another node audits, 0 to 100."),
];

/// Why the configuration is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is no TOML, or a value is of another sort.
    #[error("in {origin}: {reason}")]
    Value {
        /// The file or the environment variable.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// A key that is not known.
    #[error("in {origin}: unknown key {given:?}{}", near(nearest))]
    UnknownKey {
        /// The file or `the environment`.
        origin: String,
        /// The key.
        given: String,
        /// The nearest known one, if any is near.
        nearest: Option<String>,
    },
    /// No home folder.
    #[error("no home folder is known: set KINOFLOCK_HOME to a folder for keys and clips")]
    NoHome,
}

impl ConfigError {
    /// Stable name for `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "config_read",
            Self::Value { .. } => "config_value",
            Self::UnknownKey { .. } => "config_unknown_key",
            Self::NoHome => "config_no_home",
        }
    }
}

/// The file's content; everything may be absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileConfig {
    network: Option<String>,
    nodes: Option<Vec<String>>,
    collective: Option<CollectiveId>,
    lists: Option<Vec<String>>,
    model: Option<String>,
    resolver: Option<SocketAddr>,
    mdns: Option<bool>,
    local: Option<bool>,
    store: Option<PathBuf>,
    key: Option<PathBuf>,
    artist: Option<String>,
    licence: Option<String>,
    audit_share: Option<u8>,
}

/// What the client goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Which network.
    pub network: NetworkId,
    /// Nodes to begin with: addresses or tickets.
    pub nodes: Vec<String>,
    /// Collective whose nodes are asked first.
    pub collective: Option<CollectiveId>,
    /// Signed lists to go by.
    pub lists: Vec<ListName>,
    /// Model to use when none is named.
    pub model: Option<String>,
    /// DNS server to ask; the system's if none is named.
    pub resolver: Option<SocketAddr>,
    /// Whether to look for nodes on the local network.
    pub mdns: bool,
    /// Whether to ask the daemon on this machine first.
    pub local: bool,
    /// Folder of jobs and clips.
    pub store: PathBuf,
    /// File of the artist's key.
    pub key: PathBuf,
    /// Name that clips are to carry.
    pub artist: Option<String>,
    /// Licence that clips are to carry.
    pub licence: Option<String>,
    /// Percent of finished jobs that another node audits.
    pub audit_share: u8,
}

/// Environment variables by name.
pub type Environment = std::collections::BTreeMap<String, String>;

impl Config {
    /// Reads the configuration: `file` if one is named (it must be there then), else the usual place.
    ///
    /// # Errors
    /// When a file or variable is wrong, or no home folder is known.
    pub fn load(file: Option<&Path>, env: &Environment) -> Result<Self, ConfigError> {
        let folders = Folders::of(env)?;
        let named = file.map(Path::to_owned).or_else(|| env.get("KINOFLOCK_CONFIG").map(PathBuf::from));
        let path = named.clone().unwrap_or_else(|| folders.config.join("config.toml"));
        let values = match std::fs::read_to_string(&path) {
            Ok(text) => parse(&text, &path.display().to_string())?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
                FileConfig::default()
            }
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        let values = overlay(values, env)?;
        let network = values.network.as_deref().unwrap_or(PUBLIC_NETWORK);
        Ok(Self {
            network: parse_network(network),
            nodes: values.nodes.unwrap_or_default(),
            collective: values.collective,
            // None by default: the project has published no list of its own yet.
            lists: parse_lists(&values.lists.unwrap_or_default())?,
            model: values.model,
            resolver: values.resolver,
            mdns: values.mdns.unwrap_or(true),
            local: values.local.unwrap_or(true),
            store: values.store.unwrap_or_else(|| folders.data.join("client")),
            key: values.key.unwrap_or_else(|| folders.data.join("keys").join("artist.key")),
            artist: values.artist,
            licence: values.licence,
            audit_share: checked_share(
                values.audit_share.unwrap_or(AUDIT_SHARE),
                &path.display().to_string(),
            )?,
        })
    }
}

/// The network of a name or of an id.
#[must_use]
pub fn parse_network(text: &str) -> NetworkId {
    text.parse().unwrap_or_else(|_| NetworkId::named(text))
}

/// The variables of this process, and those only that are text.
#[must_use]
pub fn environment() -> Environment {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

struct Folders {
    config: PathBuf,
    data: PathBuf,
}

impl Folders {
    fn of(env: &Environment) -> Result<Self, ConfigError> {
        if let Some(home) = env.get("KINOFLOCK_HOME").filter(|home| !home.is_empty()) {
            let home = PathBuf::from(home);
            return Ok(Self { config: home.clone(), data: home });
        }
        let base = directories::BaseDirs::new().ok_or(ConfigError::NoHome)?;
        Ok(Self { config: base.config_dir().join("kinoflock"), data: base.data_dir().join("kinoflock") })
    }
}

fn parse(text: &str, origin: &str) -> Result<FileConfig, ConfigError> {
    let value = |error: toml::de::Error| ConfigError::Value {
        origin: origin.to_owned(),
        reason: error.to_string().trim().to_owned(),
    };
    let table: toml::Table = text.parse().map_err(value)?;
    if let Some(given) = table.keys().find(|key| !KEYS.iter().any(|(known, _)| known == key)) {
        return Err(unknown(origin, given, given));
    }
    toml::from_str(text).map_err(value)
}

fn overlay(mut values: FileConfig, env: &Environment) -> Result<FileConfig, ConfigError> {
    for (name, value) in env {
        let Some(key) = name.strip_prefix("KINOFLOCK_").map(str::to_ascii_lowercase) else { continue };
        let text = Some(value.clone());
        match key.as_str() {
            "network" => values.network = text,
            "nodes" => values.nodes = Some(several(value)),
            "lists" => values.lists = Some(several(value)),
            "collective" => {
                values.collective = Some(value.parse().map_err(|error: IdError| wrong(name, &error))?);
            }
            "resolver" => {
                let expected =
                    |_| wrong(name, &format!("{value:?} is no ADDRESS:PORT, such as 192.0.2.53:53"));
                values.resolver = Some(value.parse().map_err(expected)?);
            }
            "model" => values.model = text,
            "mdns" => values.mdns = Some(flag(name, value)?),
            "local" => values.local = Some(flag(name, value)?),
            "store" => values.store = Some(value.into()),
            "key" => values.key = Some(value.into()),
            "artist" => values.artist = text,
            "licence" => values.licence = text,
            "audit_share" => values.audit_share = Some(percent(name, value)?),
            "home" | "config" | "log" | "node" => {}
            // Other programs may have names of their own; only what looks mistyped is refused.
            other if nearest(other).is_some() => return Err(unknown("the environment", name, other)),
            _ => {}
        }
    }
    Ok(values)
}

/// Values that stand in one variable.
fn several(value: &str) -> Vec<String> {
    value.split([',', ' ']).map(str::to_owned).filter(|one| !one.is_empty()).collect()
}

fn parse_lists(given: &[String]) -> Result<Vec<ListName>, ConfigError> {
    if given.len() > MAX_LISTS {
        return Err(wrong("lists", &format!("{} lists exceed the limit of {MAX_LISTS}", given.len())));
    }
    let parse = |text: &String| text.parse().map_err(|error: IdError| wrong("lists", &error));
    given.iter().map(parse).collect()
}

fn wrong(name: &str, reason: &impl std::fmt::Display) -> ConfigError {
    ConfigError::Value { origin: name.to_owned(), reason: reason.to_string() }
}

fn percent(name: &str, value: &str) -> Result<u8, ConfigError> {
    let reason = || format!("{value:?} is no whole number of percent, 0 to {WHOLE}");
    let given = value.trim().parse().ok().filter(|percent| *percent <= WHOLE);
    given.ok_or_else(|| ConfigError::Value { origin: name.to_owned(), reason: reason() })
}

fn checked_share(percent: u8, origin: &str) -> Result<u8, ConfigError> {
    if percent <= WHOLE {
        return Ok(percent);
    }
    let reason = format!("audit_share = {percent} is more than the limit of {WHOLE} percent");
    Err(ConfigError::Value { origin: origin.to_owned(), reason })
}

fn flag(name: &str, value: &str) -> Result<bool, ConfigError> {
    match value {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(wrong(name, &format!("{value:?} is neither true nor false"))),
    }
}

fn unknown(origin: &str, given: &str, key: &str) -> ConfigError {
    let nearest = nearest(key).map(|near| match given.strip_prefix("KINOFLOCK_") {
        Some(_) => format!("KINOFLOCK_{}", near.to_ascii_uppercase()),
        None => near.to_owned(),
    });
    ConfigError::UnknownKey { origin: origin.to_owned(), given: given.to_owned(), nearest }
}

/// The known key that differs from this one in few letters.
fn nearest(key: &str) -> Option<&'static str> {
    let distance = |known: &str| strsim::damerau_levenshtein(known, key);
    let (known, _) = KEYS.iter().min_by_key(|(known, _)| distance(known))?;
    (distance(known) <= known.len().div_ceil(3)).then_some(known)
}

fn near(nearest: &Option<String>) -> String {
    match nearest {
        Some(name) => format!("; did you mean {name:?}?"),
        None => format!("; known are {}", KEYS.map(|(key, _)| key).join(", ")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn env(vars: &[(&str, &str)]) -> Environment {
        vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn environment_goes_over_the_file_and_the_file_over_defaults() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        std::fs::write(folder.path().join("config.toml"), "mdns = false\nmodel = \"motif\"\n").unwrap();
        let config = Config::load(None, &env(&[("KINOFLOCK_HOME", home)])).unwrap();
        assert_eq!((config.mdns, config.model.as_deref()), (false, Some("motif")));
        assert_eq!(config.network, NetworkId::named(PUBLIC_NETWORK));
        assert_eq!(config.store, folder.path().join("client"));
        let vars = [("KINOFLOCK_HOME", home), ("KINOFLOCK_MODEL", "other"), ("KINOFLOCK_NODES", "a:1,b:2")];
        let config = Config::load(None, &env(&vars)).unwrap();
        assert_eq!(config.model.as_deref(), Some("other"));
        assert_eq!(config.nodes, ["a:1", "b:2"]);
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        std::fs::write(&file, "netwrok = \"x\"").unwrap();
        let vars = env(&[("KINOFLOCK_HOME", folder.path().to_str().unwrap())]);
        let error = Config::load(None, &vars).unwrap_err().to_string();
        assert!(error.contains("did you mean \"network\"?"), "{error}");
        std::fs::write(&file, "mdns = \"maybe\"").unwrap();
        assert_eq!(Config::load(None, &vars).unwrap_err().code(), "config_value");
        std::fs::remove_file(&file).unwrap();
        let vars = env(&[("KINOFLOCK_HOME", "/nowhere"), ("KINOFLOCK_MODLE", "x")]);
        let error = Config::load(None, &vars).unwrap_err().to_string();
        assert!(error.contains("did you mean \"KINOFLOCK_MODEL\"?"), "{error}");
        assert!(Config::load(Some(&file), &vars).is_err(), "a named file must be there");
    }
}

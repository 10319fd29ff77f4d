//! The daemon's configuration: file, then `KINOFLOCKD_*`, then flags, into one checked value.
//!
//! - [`load`] is the way in: it finds the file (or takes none), lays environment and [`ConfigOverrides`] over it, and
//!   parses the result into [`Config`], whose types cannot hold what was refused.
//! - [`render`] is `--print-config` (the merged file form), [`template`] is what `init` writes: every key with its
//!   default and its explanation.
//! - Every error names the key, where it was said (file and line, variable, flag), the given value, and what is taken.
//!
//! Keys live in [`file`], their explanations in [`docs`], defaults are named functions beside the former.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use kinoflock_protocol::id::{CollectiveId, RequesterId};
use kinoflock_protocol::list::ListName;

pub use self::address::{AddressError, ListenAddress};
pub use self::device::{DeviceConfig, DeviceKind, Dtype, Limits, Offloading};
pub use self::file::FileConfig;
pub use self::overrides::ConfigOverrides;
pub use self::paths::{Environment, Folders, Scope};
pub use self::storage::Storage;
pub use self::template::{render, template};
pub use self::units::{ByteSize, Ceiling, MemoryLimit, Span, UnitError};

mod address;
mod device;
pub mod docs;
pub mod file;
mod layers;
mod overrides;
mod paths;
mod storage;
mod template;
mod units;
mod ways;

/// Most listen, external or bootstrap addresses, each.
pub const MAX_ADDRESSES: usize = 64;

/// Most `[[device]]` sections.
pub const MAX_DEVICES: usize = 64;

/// Most models of `storage.keep`.
pub const MAX_KEPT: usize = 64;

/// Shortest lease in milliseconds: below it a slow link loses every quote.
const MIN_LEASE_MS: u64 = 1_000;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {}: {source}; write one with: kinoflockd init", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{place}: {message}")]
    Syntax {
        /// File and line.
        place: String,
        /// What the parser says.
        message: String,
    },
    /// A key, section or variable that does not exist.
    #[error("{place}: unknown key '{key}'; the nearest known is '{nearest}'")]
    UnknownKey {
        /// The unknown name.
        key: String,
        /// File and line, variable or flag.
        place: String,
        /// The known name most like it.
        nearest: String,
    },
    /// A value of the wrong type.
    #[error("{place}: {key}: {message}")]
    Value {
        /// The key.
        key: String,
        /// File and line, variable or flag.
        place: String,
        /// What was given and what was expected.
        message: String,
    },
    /// A value of the right type that cannot be used.
    #[error("{key}: '{given}' cannot be used: {expected}")]
    Invalid {
        /// The key.
        key: String,
        /// What was given.
        given: String,
        /// The limit, or what is taken instead.
        expected: String,
    },
    /// A `--set` without `=`.
    #[error("--set {given}: write it as section.key=value")]
    Set {
        /// What was given.
        given: String,
    },
    /// No home folder to put anything into.
    #[error("neither HOME nor XDG folders are set: set HOME, or name the folders with --config and --state")]
    NoHome,
}

impl ConfigError {
    /// A short stable name for metrics and `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "config_read",
            Self::Syntax { .. } => "config_syntax",
            Self::UnknownKey { .. } => "config_unknown_key",
            Self::Value { .. } => "config_value",
            Self::Invalid { .. } => "config_invalid",
            Self::Set { .. } => "config_set",
            Self::NoHome => "config_no_home",
        }
    }
}

/// The checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Whose daemon this is.
    pub scope: Scope,
    /// The file it came from, if there was one.
    pub source: Option<PathBuf>,
    /// What all layers together say, for [`render`].
    pub merged: FileConfig,
    /// Shown to people; `None` when empty.
    pub name: Option<String>,
    /// Addresses and ceilings.
    pub network: Network,
    /// Whom to serve.
    pub serve: Serve,
    /// What to run, and how much of it.
    pub policy: PolicyConfig,
    /// What this node promises.
    pub terms: Terms,
    /// Bounds of the queue and of leases.
    pub queue: QueueConfig,
    /// Jobs watched for artists who are away.
    pub custody: Custody,
    /// Audits for others.
    pub audits: AuditsConfig,
    /// Folders and disk limits.
    pub storage: Storage,
    /// Deadlines of the worker's phases.
    pub engine: EngineConfig,
    /// Where the admin port listens. Always loopback.
    pub admin: SocketAddr,
    /// How long running jobs may finish after SIGTERM.
    pub drain: Duration,
    /// The devices, with distinct names; none on an archive, which computes nothing.
    pub devices: Vec<DeviceConfig>,
}

/// `[network]`, checked.
#[derive(Debug, Clone)]
pub struct Network {
    /// The network's name; `NetworkId` is made of it.
    pub id: String,
    /// At least one.
    pub listen: Vec<ListenAddress>,
    /// Announced beside the listen addresses.
    pub external: Vec<ListenAddress>,
    /// Each with the node's `/p2p/` part, or a `/dnsaddr/`.
    pub bootstrap: Vec<String>,
    /// The DNS server to ask; the system's if none is named.
    pub resolver: Option<SocketAddr>,
    /// Lists that are held, at most [`kinoflock_protocol::limits::MAX_LISTS`].
    pub lists: Vec<ListName>,
    /// Discovery on the local network.
    pub mdns: bool,
    /// Relays: being one, and being reached over one.
    pub relay: Relay,
    /// Whether the router is asked to forward ports.
    pub upnp: bool,
    /// Most nodes of a slice of the network, whose adverts are heard.
    pub slice: usize,
    /// Bytes a second; `None` for no ceiling.
    pub upload: Option<u64>,
    /// Bytes a second; `None` for no ceiling.
    pub download: Option<u64>,
}

/// `network.relay`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Relay {
    /// As AutoNAT finds: a relay where others get in, a guest of relays where they do not.
    #[default]
    Auto,
    /// A relay.
    On,
    /// Neither.
    Off,
}

impl FromStr for Relay {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            given => Err(invalid("network.relay", given, "auto, on or off")),
        }
    }
}

/// `[serve]`, checked.
#[derive(Debug, Clone, Default)]
pub struct Serve {
    /// Whose jobs come first.
    pub own_keys: BTreeSet<RequesterId>,
    /// Whose members come next.
    pub collectives: BTreeSet<CollectiveId>,
    /// Whether the public is served at all.
    pub public: bool,
    /// Percent of the work kept for the public, 0 to 100.
    pub public_share: u8,
}

/// `[policy]`, checked.
#[derive(Debug, Clone, Default)]
pub struct PolicyConfig {
    /// Names or ids; empty for every model.
    pub models: Vec<String>,
    /// Sizes and counts.
    pub limits: Limits,
    /// Most work in a job, TFLOP.
    pub max_work: Option<u64>,
    /// Most bytes of a job's adapters; 0 takes none.
    pub adapter_bytes: u64,
    /// When not empty, only these.
    pub allow: BTreeSet<RequesterId>,
    /// Never these.
    pub deny: BTreeSet<RequesterId>,
    /// Most live jobs of one requester.
    pub queued_jobs: Option<u32>,
    /// Most work of one requester in 24 hours, TFLOP.
    pub work_per_day: Option<u64>,
    /// Most unacknowledged bytes of one requester.
    pub unacknowledged: Option<u64>,
    /// The operator's veto.
    pub hook: Option<HookConfig>,
}

/// The operator's veto command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookConfig {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Whether it reads prompts; the advert says so.
    pub sees_prompt: bool,
    /// Silence for longer refuses the job.
    pub timeout: Duration,
}

/// `[terms]`, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// How long clips and prompts stay after acknowledgement.
    pub keep_acknowledged: Duration,
    /// How long they stay at most.
    pub keep_at_most: Duration,
}

/// `[custody]`, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Custody {
    /// Most jobs watched at once.
    pub jobs: usize,
    /// Silence of a watched job's node after which it is handed on.
    pub after: Duration,
}

/// `[audits]`, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditsConfig {
    /// Whether jobs of other nodes are audited.
    pub for_others: bool,
    /// Most audits that wait.
    pub queue: usize,
}

/// `[queue]`, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// Most jobs waiting.
    pub jobs: u32,
    /// Of which from one prefix of the public.
    pub jobs_per_prefix: u32,
    /// How long a lease lives.
    pub lease: Duration,
    /// Most leases open.
    pub leases: u32,
    /// Of which from one prefix.
    pub leases_per_prefix: u32,
    /// Of which for one requester.
    pub leases_per_requester: u32,
    /// How long a job keeps its place without its inputs.
    pub input_wait: Duration,
}

/// `[engine]`, checked. The worker program stands in each device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Shortest deadline of a phase.
    pub phase_deadline: Duration,
    /// Times the measured time.
    pub phase_factor: u32,
    /// In steps; `None` for no checkpoints.
    pub checkpoint_every: Option<u32>,
}

/// Reads, overlays and checks the configuration.
///
/// The file is `overrides.config`, else `KINOFLOCKD_CONFIG`, else the default place; only in the last case may it be
/// absent, and defaults hold.
///
/// # Errors
/// See [`ConfigError`]: each is one line that says what is wrong where.
pub fn load(env: &Environment, overrides: &ConfigOverrides) -> Result<Config, ConfigError> {
    let scope = Scope::choose(env, overrides.system, overrides.user);
    let folders = Folders::of(scope, env);
    let named = overrides.config.clone().or_else(|| env.vars.get("KINOFLOCKD_CONFIG").map(PathBuf::from));
    let must_exist = named.is_some();
    let path = named.or_else(|| folders.as_ref().map(|folders| folders.config.clone()));
    let (file, source) = match path {
        Some(path) => read(path, must_exist)?,
        None => (FileConfig::default(), None),
    };
    let merged = layers::overlay(file, env, overrides)?;
    check(merged, scope, source, folders.as_ref())
}

fn read(path: PathBuf, must_exist: bool) -> Result<(FileConfig, Option<PathBuf>), ConfigError> {
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok((layers::parse_file(&path, &text)?, Some(path))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {
            Ok((FileConfig::default(), None))
        }
        Err(source) => Err(ConfigError::Read { path, source }),
    }
}

fn check(
    merged: FileConfig,
    scope: Scope,
    source: Option<PathBuf>,
    folders: Option<&Folders>,
) -> Result<Config, ConfigError> {
    let name = merged.node.name.trim();
    Ok(Config {
        scope,
        source,
        name: (!name.is_empty()).then(|| name.to_owned()),
        network: check_network(&merged.network)?,
        serve: check_serve(&merged.serve)?,
        policy: check_policy(&merged.policy)?,
        terms: check_terms(&merged.terms)?,
        queue: check_queue(&merged.queue)?,
        audits: AuditsConfig { for_others: merged.audits.for_others, queue: merged.audits.queue as usize },
        custody: Custody { jobs: merged.custody.jobs as usize, after: merged.custody.after.duration() },
        storage: storage::check_storage(&merged.storage, folders)?,
        engine: check_engine(&merged.engine)?,
        admin: check_admin(&merged.admin)?,
        drain: merged.shutdown.drain.duration(),
        devices: device::check_all(&merged)?,
        merged,
    })
}

fn check_network(section: &file::NetworkSection) -> Result<Network, ConfigError> {
    let id = section.id.trim();
    if id.is_empty() {
        return Err(invalid("network.id", "", "a network has a name of at least one character"));
    }
    let listen = addresses("network.listen", &section.listen)?;
    if listen.is_empty() {
        return Err(invalid(
            "network.listen",
            "[]",
            "at least one address is needed, for example \"/ip4/0.0.0.0/tcp/4820\"",
        ));
    }
    Ok(Network {
        id: id.to_owned(),
        listen,
        external: addresses("network.external", &section.external)?,
        bootstrap: ways::check_bootstrap(id, &section.bootstrap)?,
        resolver: ways::check_resolver(&section.resolver)?,
        lists: ways::check_lists(&section.lists)?,
        mdns: section.mdns,
        relay: section.relay.parse()?,
        upnp: section.upnp,
        slice: match section.slice {
            0 => return Err(invalid("network.slice", "0", "at least 1; 128 is the default")),
            most => most as usize,
        },
        upload: positive("network.upload", section.upload.0.map(|size| size.0))?,
        download: positive("network.download", section.download.0.map(|size| size.0))?,
    })
}

fn check_serve(section: &file::ServeSection) -> Result<Serve, ConfigError> {
    if section.public_share > 100 {
        let given = section.public_share.to_string();
        return Err(invalid("serve.public_share", &given, "it must be a percentage, 0 to 100"));
    }
    Ok(Serve {
        own_keys: ids("serve.own_keys", &section.own_keys)?,
        collectives: ids("serve.collectives", &section.collectives)?,
        public: section.public,
        public_share: section.public_share,
    })
}

fn check_policy(section: &file::PolicySection) -> Result<PolicyConfig, ConfigError> {
    let hook = match section.hook.split_first() {
        Some((program, args)) => Some(HookConfig {
            program: PathBuf::from(program),
            args: args.to_vec(),
            sees_prompt: section.hook_sees_prompt,
            timeout: section.hook_timeout.duration(),
        }),
        None if section.hook_sees_prompt => {
            return Err(invalid("policy.hook_sees_prompt", "true", "it needs a command in policy.hook"));
        }
        None => None,
    };
    Ok(PolicyConfig {
        models: section.models.clone(),
        limits: Limits {
            width: positive("policy.max_width", section.max_width.0)?,
            height: positive("policy.max_height", section.max_height.0)?,
            frames: positive("policy.max_frames", section.max_frames.0)?,
            steps: positive("policy.max_steps", section.max_steps.0)?,
        },
        max_work: positive("policy.max_work", section.max_work.0)?,
        adapter_bytes: section.adapter_bytes.0,
        allow: ids("policy.allow", &section.allow)?,
        deny: ids("policy.deny", &section.deny)?,
        queued_jobs: positive("policy.queued_jobs", section.queued_jobs.0)?,
        work_per_day: positive("policy.work_per_day", section.work_per_day.0)?,
        unacknowledged: positive("policy.unacknowledged", section.unacknowledged.0.map(|size| size.0))?,
        hook,
    })
}

fn check_terms(section: &file::TermsSection) -> Result<Terms, ConfigError> {
    if section.keep_acknowledged > section.keep_at_most {
        let given = section.keep_acknowledged.to_string();
        let expected = format!("at most terms.keep_at_most, {}", section.keep_at_most);
        return Err(invalid("terms.keep_acknowledged", &given, &expected));
    }
    Ok(Terms {
        keep_acknowledged: section.keep_acknowledged.duration(),
        keep_at_most: section.keep_at_most.duration(),
    })
}

fn check_queue(section: &file::QueueSection) -> Result<QueueConfig, ConfigError> {
    if section.lease.0 < MIN_LEASE_MS {
        return Err(invalid("queue.lease", &section.lease.to_string(), "at least 1 s"));
    }
    Ok(QueueConfig {
        jobs: at_least_one("queue.jobs", section.jobs)?,
        jobs_per_prefix: at_least_one("queue.jobs_per_prefix", section.jobs_per_prefix)?,
        lease: section.lease.duration(),
        leases: at_least_one("queue.leases", section.leases)?,
        leases_per_prefix: at_least_one("queue.leases_per_prefix", section.leases_per_prefix)?,
        leases_per_requester: at_least_one("queue.leases_per_requester", section.leases_per_requester)?,
        input_wait: section.input_wait.duration(),
    })
}

fn check_engine(section: &file::EngineSection) -> Result<EngineConfig, ConfigError> {
    Ok(EngineConfig {
        phase_deadline: section.phase_deadline.duration(),
        phase_factor: at_least_one("engine.phase_factor", section.phase_factor)?,
        checkpoint_every: (section.checkpoint_every > 0).then_some(section.checkpoint_every),
    })
}

fn check_admin(section: &file::AdminSection) -> Result<SocketAddr, ConfigError> {
    let expected = "it must be a loopback address with a port, for example 127.0.0.1:4821";
    let address: SocketAddr =
        section.listen.parse().map_err(|_| invalid("admin.listen", &section.listen, expected))?;
    // The admin port pauses, drains and imports without a password: only this machine may reach it.
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err(invalid("admin.listen", &section.listen, expected))
    }
}

fn addresses(key: &str, given: &[String]) -> Result<Vec<ListenAddress>, ConfigError> {
    if given.len() > MAX_ADDRESSES {
        let count = format!("{} addresses", given.len());
        return Err(invalid(key, &count, &format!("at most {MAX_ADDRESSES}")));
    }
    given.iter().map(|text| text.parse().map_err(|error| invalid(key, text, &format!("{error}")))).collect()
}

fn ids<T>(key: &str, given: &[String]) -> Result<BTreeSet<T>, ConfigError>
where
    T: FromStr + Ord,
    T::Err: fmt::Display,
{
    given
        .iter()
        .map(|text| text.trim().parse().map_err(|error: T::Err| invalid(key, text, &error.to_string())))
        .collect()
}

/// A limit of zero would refuse everything; who wants that says so with `serve.public` or an empty device list.
fn positive<T: Copy + PartialEq + Default>(key: &str, limit: Option<T>) -> Result<Option<T>, ConfigError> {
    match limit {
        Some(limit) if limit == T::default() => Err(invalid(key, "0", "at least 1, or \"unlimited\"")),
        limit => Ok(limit),
    }
}

fn at_least_one(key: &str, given: u32) -> Result<u32, ConfigError> {
    if given == 0 { Err(invalid(key, "0", "at least 1")) } else { Ok(given) }
}

fn invalid(key: &str, given: &str, expected: &str) -> ConfigError {
    ConfigError::Invalid { key: key.to_owned(), given: given.to_owned(), expected: expected.to_owned() }
}

//! The configuration as it is written: one struct per TOML section, each default a named function.
//!
//! Nothing here is checked beyond its type; [`Config`](super::Config) is the checked form. Every field has a line in
//! [`DOCS`](super::docs::DOCS), which a test holds to.

use serde::{Deserialize, Serialize};

use super::units::{ByteSize, Ceiling, MemoryLimit, Span};

/// The whole file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FileConfig {
    /// Who this node says it is.
    pub node: NodeSection,
    /// Addresses and ceilings.
    pub network: NetworkSection,
    /// Whom to serve.
    pub serve: ServeSection,
    /// What to run, and how much of it.
    pub policy: PolicySection,
    /// What this node promises about what it sees.
    pub terms: TermsSection,
    /// Bounds of the queue and of leases.
    pub queue: QueueSection,
    /// Jobs watched for artists who are away.
    pub custody: CustodySection,
    /// Jobs of other nodes that this one audits.
    pub audits: AuditsSection,
    /// Folders and disk limits.
    pub storage: StorageSection,
    /// The worker process and its deadlines.
    pub engine: EngineSection,
    /// The operator's HTTP port.
    pub admin: AdminSection,
    /// What happens on SIGTERM.
    pub shutdown: ShutdownSection,
    /// One worker per section.
    pub device: Vec<DeviceSection>,
}

/// `[node]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct NodeSection {
    pub name: String,
}

/// `[network]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct NetworkSection {
    pub id: String,
    pub listen: Vec<String>,
    pub external: Vec<String>,
    pub bootstrap: Vec<String>,
    pub resolver: String,
    pub lists: Vec<String>,
    pub mdns: bool,
    pub relay: String,
    pub upnp: bool,
    pub slice: u32,
    pub upload: Ceiling<ByteSize>,
    pub download: Ceiling<ByteSize>,
}

/// `[serve]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct ServeSection {
    pub own_keys: Vec<String>,
    pub collectives: Vec<String>,
    pub public: bool,
    pub public_share: u8,
}

/// `[policy]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct PolicySection {
    pub models: Vec<String>,
    pub max_width: Ceiling<u32>,
    pub max_height: Ceiling<u32>,
    pub max_frames: Ceiling<u32>,
    pub max_steps: Ceiling<u32>,
    pub max_work: Ceiling<u64>,
    pub adapter_bytes: ByteSize,
    pub allow: Vec<String>,
    pub deny: Vec<String>,
    pub queued_jobs: Ceiling<u32>,
    pub work_per_day: Ceiling<u64>,
    pub unacknowledged: Ceiling<ByteSize>,
    pub hook: Vec<String>,
    pub hook_sees_prompt: bool,
    pub hook_timeout: Span,
}

/// `[custody]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct CustodySection {
    pub jobs: u32,
    pub after: Span,
}

/// `[audits]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct AuditsSection {
    pub for_others: bool,
    pub queue: u32,
}

/// `[terms]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct TermsSection {
    pub keep_acknowledged: Span,
    pub keep_at_most: Span,
}

/// `[queue]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct QueueSection {
    pub jobs: u32,
    pub jobs_per_prefix: u32,
    pub lease: Span,
    pub leases: u32,
    pub leases_per_prefix: u32,
    pub leases_per_requester: u32,
    pub input_wait: Span,
}

/// `[storage]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct StorageSection {
    pub state: String,
    pub models: String,
    pub runtime: String,
    pub models_limit: Ceiling<ByteSize>,
    pub clips_limit: ByteSize,
    pub replicas_limit: ByteSize,
    pub audit_limit: ByteSize,
    pub audit_keep: Span,
    pub adapters_limit: ByteSize,
    pub share_models: bool,
    pub keep: Vec<String>,
}

/// `[engine]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct EngineSection {
    pub worker: String,
    pub worker_args: Vec<String>,
    pub phase_deadline: Span,
    pub phase_factor: u32,
    pub checkpoint_every: u32,
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct AdminSection {
    pub listen: String,
}

/// `[shutdown]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct ShutdownSection {
    pub drain: Span,
}

/// `[[device]]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is explained in docs.rs, which the template prints")]
pub struct DeviceSection {
    pub name: String,
    pub kind: String,
    pub threads: u32,
    pub dtype: String,
    pub merge_adapters: bool,
    pub memory_limit: MemoryLimit,
    pub offload: String,
    pub models: Vec<String>,
    pub max_width: Ceiling<u32>,
    pub max_height: Ceiling<u32>,
    pub max_frames: Ceiling<u32>,
    pub max_steps: Ceiling<u32>,
    pub worker: String,
    pub worker_args: Vec<String>,
}

impl Default for NetworkSection {
    fn default() -> Self {
        Self {
            id: default_network_id(),
            listen: default_listen(),
            external: Vec::new(),
            bootstrap: Vec::new(),
            resolver: String::new(),
            // None yet: the project has published no list of its own.
            lists: Vec::new(),
            mdns: true,
            relay: default_relay(),
            upnp: true,
            slice: default_slice(),
            upload: Ceiling::UNLIMITED,
            download: Ceiling::UNLIMITED,
        }
    }
}

impl Default for ServeSection {
    fn default() -> Self {
        Self {
            own_keys: Vec::new(),
            collectives: Vec::new(),
            public: true,
            public_share: default_public_share(),
        }
    }
}

impl Default for PolicySection {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            max_width: Ceiling::UNLIMITED,
            max_height: Ceiling::UNLIMITED,
            max_frames: Ceiling::UNLIMITED,
            max_steps: Ceiling::UNLIMITED,
            max_work: Ceiling::UNLIMITED,
            adapter_bytes: default_adapter_bytes(),
            allow: Vec::new(),
            deny: Vec::new(),
            queued_jobs: default_queued_jobs(),
            work_per_day: Ceiling::UNLIMITED,
            unacknowledged: default_unacknowledged(),
            hook: Vec::new(),
            hook_sees_prompt: false,
            hook_timeout: default_hook_timeout(),
        }
    }
}

impl Default for TermsSection {
    fn default() -> Self {
        Self { keep_acknowledged: default_keep_acknowledged(), keep_at_most: default_keep_at_most() }
    }
}

impl Default for QueueSection {
    fn default() -> Self {
        Self {
            jobs: default_queue_jobs(),
            jobs_per_prefix: default_jobs_per_prefix(),
            lease: default_lease(),
            leases: default_leases(),
            leases_per_prefix: default_leases_per_prefix(),
            leases_per_requester: default_leases_per_requester(),
            input_wait: default_input_wait(),
        }
    }
}

impl Default for CustodySection {
    fn default() -> Self {
        Self { jobs: default_custody_jobs(), after: default_custody_after() }
    }
}

impl Default for AuditsSection {
    fn default() -> Self {
        Self { for_others: true, queue: default_audits_queue() }
    }
}

impl Default for StorageSection {
    fn default() -> Self {
        Self {
            state: String::new(),
            models: String::new(),
            runtime: String::new(),
            models_limit: Ceiling::UNLIMITED,
            clips_limit: default_clips_limit(),
            replicas_limit: default_replicas_limit(),
            audit_limit: default_audit_limit(),
            audit_keep: default_audit_keep(),
            adapters_limit: default_adapters_limit(),
            share_models: true,
            keep: Vec::new(),
        }
    }
}

impl Default for EngineSection {
    fn default() -> Self {
        Self {
            worker: String::new(),
            worker_args: Vec::new(),
            phase_deadline: default_phase_deadline(),
            phase_factor: default_phase_factor(),
            checkpoint_every: default_checkpoint_every(),
        }
    }
}

impl Default for AdminSection {
    fn default() -> Self {
        Self { listen: default_admin_listen() }
    }
}

impl Default for ShutdownSection {
    fn default() -> Self {
        Self { drain: default_drain() }
    }
}

impl Default for DeviceSection {
    fn default() -> Self {
        Self {
            name: String::new(),
            kind: default_device_kind(),
            threads: 0,
            dtype: default_dtype(),
            merge_adapters: false,
            memory_limit: MemoryLimit::Auto,
            offload: default_offload(),
            models: Vec::new(),
            max_width: Ceiling::UNLIMITED,
            max_height: Ceiling::UNLIMITED,
            max_frames: Ceiling::UNLIMITED,
            max_steps: Ceiling::UNLIMITED,
            worker: String::new(),
            worker_args: Vec::new(),
        }
    }
}

fn default_relay() -> String {
    "auto".to_owned()
}

fn default_network_id() -> String {
    "kinoflock".to_owned()
}

/// Both transports, both address families, one port that a firewall rule can name.
fn default_listen() -> Vec<String> {
    ["/ip4/0.0.0.0/udp/4820/quic-v1", "/ip4/0.0.0.0/tcp/4820", "/ip6/::/udp/4820/quic-v1", "/ip6/::/tcp/4820"]
        .map(str::to_owned)
        .to_vec()
}

/// A quarter of the work, so that nobody needs permission to make something.
const fn default_public_share() -> u8 {
    25
}

/// A LoRA of a large model has some hundred megabytes.
const fn default_adapter_bytes() -> ByteSize {
    ByteSize::gib(1)
}

const fn default_queued_jobs() -> Ceiling<u32> {
    Ceiling::at(4)
}

const fn default_unacknowledged() -> Ceiling<ByteSize> {
    Ceiling::at(ByteSize::gib(2))
}

const fn default_hook_timeout() -> Span {
    Span::seconds(5)
}

const fn default_keep_acknowledged() -> Span {
    Span::seconds(0)
}

const fn default_keep_at_most() -> Span {
    Span::seconds(7 * 24 * 3600)
}

const fn default_queue_jobs() -> u32 {
    256
}

const fn default_jobs_per_prefix() -> u32 {
    16
}

const fn default_lease() -> Span {
    Span::seconds(15)
}

const fn default_leases() -> u32 {
    256
}

const fn default_leases_per_prefix() -> u32 {
    8
}

const fn default_leases_per_requester() -> u32 {
    2
}

const fn default_input_wait() -> Span {
    Span::seconds(600)
}

const fn default_custody_jobs() -> u32 {
    256
}

const fn default_custody_after() -> Span {
    Span::seconds(60)
}

const fn default_audits_queue() -> u32 {
    16
}

const fn default_clips_limit() -> ByteSize {
    ByteSize::gib(20)
}

const fn default_replicas_limit() -> ByteSize {
    ByteSize::gib(5)
}

const fn default_slice() -> u32 {
    128
}

const fn default_audit_limit() -> ByteSize {
    ByteSize::gib(2)
}

const fn default_adapters_limit() -> ByteSize {
    ByteSize::gib(2)
}

const fn default_audit_keep() -> Span {
    Span::seconds(2 * 24 * 3600)
}

const fn default_phase_deadline() -> Span {
    Span::seconds(30)
}

const fn default_phase_factor() -> u32 {
    5
}

const fn default_checkpoint_every() -> u32 {
    8
}

fn default_admin_listen() -> String {
    "127.0.0.1:4821".to_owned()
}

/// Below the 120 s that the systemd unit grants before it kills.
const fn default_drain() -> Span {
    Span::seconds(90)
}

fn default_device_kind() -> String {
    "cpu".to_owned()
}

fn default_offload() -> String {
    "auto".to_owned()
}

fn default_dtype() -> String {
    "auto".to_owned()
}

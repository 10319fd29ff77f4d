//! What each key of the configuration means, in the order in which the template prints them.

/// A key of the file and its explanation. Lines of the text become comment lines.
pub struct KeyDoc {
    /// The key with its section, `network.listen`.
    pub key: &'static str,
    /// What it does, its unit and its special values.
    pub text: &'static str,
}

/// What each section is for.
pub const SECTIONS: &[KeyDoc] = &[
    doc("node", "Who this node says it is."),
    doc("network", "Where this node is reached, and whom it asks for others."),
    doc("serve", "Whom to serve: own jobs first, own collectives next, and a share for everybody."),
    doc(
        "policy",
        "What this node runs and how much of it. Every refusal tells the artist the rule and its limit.",
    ),
    doc("terms", "What this node promises about what it sees. Signed into its advert."),
    doc("queue", "Bounds of the queue and of leases (a lease is the few seconds that a quote holds)."),
    doc(
        "custody",
        "Jobs of other nodes that this one watches while their artists are away: it holds the signed jobs, and could read them.",
    ),
    doc(
        "audits",
        "Jobs of other nodes of which this one computes a step anew, when their artists ask it to. It reads their prompts.",
    ),
    doc("storage", "Folders and disk limits. An empty folder means the default that is shown beside it."),
    doc("engine", "The worker process that owns a device, and how long it may take."),
    doc("admin", "The operator's HTTP port: /healthz, /readyz, /metrics, /status."),
    doc("shutdown", "What happens on SIGTERM. A second signal stops at once."),
    doc("device", "One worker process per [[device]] section. Without any, the CPU is the one device."),
];

/// Every key, in file order.
pub const DOCS: &[KeyDoc] = &[
    doc("node.name", "Shown to people beside the key; empty for none. Nothing is decided by it."),
    doc("network.id", "Nodes of different network ids do not speak to each other."),
    doc("network.listen", "Multiaddresses to listen on. Port 0 lets the system choose."),
    doc(
        "network.external",
        "Addresses others reach this node by, when they differ (a forwarded port, a DNS name).",
    ),
    doc(
        "network.bootstrap",
        "Nodes to ask for others: tickets (kfnode1...), lists in DNS (/dnsaddr/HOST, the TXT records of _dnsaddr.HOST), or\n\
         multiaddresses ending in /p2p/NODE.",
    ),
    doc("network.resolver", "DNS server to ask, as ADDRESS:PORT; empty for the system's."),
    doc(
        "network.lists",
        "Signed lists (kflist1...) to hold and to hand on to whoever asks; the nodes of a list are ways into the network.",
    ),
    doc("network.mdns", "Find and be found on the local network."),
    doc(
        "network.relay",
        "auto: be reached over relays while no port of this node is open to others, and carry their connections while\n\
         one is (4 MiB and an hour for each, no clips). on: carry them whatever was found out. off: neither.",
    ),
    doc("network.upnp", "Ask the router to forward the ports of network.listen."),
    doc(
        "network.slice",
        "In a network of more nodes than this, adverts stay in parts of about this many, so that what this node hears\n\
         does not grow with the network.",
    ),
    doc("network.upload", "Most bytes sent per second, for example \"2 MiB\"; or \"unlimited\"."),
    doc("network.download", "Most bytes received per second; or \"unlimited\"."),
    doc("serve.own_keys", "Requester keys (kf1...) whose jobs come first: yours."),
    doc("serve.collectives", "Collectives whose members come next; this release knows no memberships yet."),
    doc("serve.public", "Serve requesters without a membership."),
    doc("serve.public_share", "Percent of the work kept for the public while others wait, 0 to 100."),
    doc("policy.models", "Models to serve, by name or id; empty for every model that passed its self-test."),
    doc(
        "policy.max_width",
        "Widest clip in pixels; or \"unlimited\" (what the model and the device can do).",
    ),
    doc("policy.max_height", "Highest clip in pixels; or \"unlimited\"."),
    doc("policy.max_frames", "Most frames in a clip; or \"unlimited\"."),
    doc("policy.max_steps", "Most denoising steps; or \"unlimited\"."),
    doc("policy.max_work", "Most work in one job, in TFLOP; or \"unlimited\"."),
    doc(
        "policy.adapter_bytes",
        "Most bytes of adapters (LoRA) in one job, which its artist brings; \"0 B\" runs models without any.",
    ),
    doc("policy.allow", "When not empty: only these requester keys are served (own keys always are)."),
    doc("policy.deny", "Requester keys that are never served."),
    doc(
        "policy.queued_jobs",
        "Most jobs that one requester may have waiting or running here; or \"unlimited\".",
    ),
    doc("policy.work_per_day", "Most work for one requester in 24 hours, in TFLOP; or \"unlimited\"."),
    doc(
        "policy.unacknowledged",
        "Most bytes of clips that one requester may leave here unfetched; or \"unlimited\".",
    ),
    doc(
        "policy.hook",
        "A command that may refuse a job: the program and its arguments. It gets the job's facts as JSON on stdin\n\
         and allows by exit code 0; otherwise its first line of output is the reason that the artist sees.",
    ),
    doc(
        "policy.hook_sees_prompt",
        "Give the prompt to the hook too. The advert then says \"has content rules\", and artists may go elsewhere.",
    ),
    doc("policy.hook_timeout", "A hook that takes longer refuses the job."),
    doc(
        "terms.keep_acknowledged",
        "How long clips, latents and prompts stay after the requester acknowledged them.",
    ),
    doc("terms.keep_at_most", "How long they stay when nobody fetches them."),
    doc("queue.jobs", "Most jobs waiting. A quarter of them is kept for own keys and collectives."),
    doc("queue.jobs_per_prefix", "Most waiting jobs of the public from one network prefix (/24, /56)."),
    doc("queue.lease", "How long a quote holds its promise."),
    doc("queue.leases", "Most leases open at once."),
    doc("queue.leases_per_prefix", "Most leases open from one network prefix."),
    doc("queue.leases_per_requester", "Most leases open for one requester."),
    doc("queue.input_wait", "How long a job keeps its place while its inputs are fetched."),
    doc("custody.jobs", "Most jobs watched at once; 0 for none."),
    doc("custody.after", "A watched job whose node has been silent for so long is handed on."),
    doc(
        "audits.for_others",
        "Audit for requesters whom [policy] serves, with models served here, while no job waits. An audit costs one step and\n\
         one decode; a job that comes meanwhile waits for its end.",
    ),
    doc("audits.queue", "Most audits that wait."),
    doc("storage.state", "Key, queue, clips and receipts."),
    doc("storage.models", "Model folders."),
    doc("storage.runtime", "The file that tells clients on this machine where the daemon listens."),
    doc("storage.models_limit", "Most disk for models; or \"unlimited\"."),
    doc(
        "storage.clips_limit",
        "Most disk for clips and latents made here. When full of unfetched ones: StoreFull. The public's may fill three quarters.",
    ),
    doc(
        "storage.replicas_limit",
        "Most disk for sealed clips kept for others, who alone can open them. 0 keeps none.",
    ),
    doc(
        "storage.audit_limit",
        "Most disk for the sealed latents of each step, kept where a job asks for a commitment to its steps; the\n\
         oldest make room. A job whose latents are gone can be audited no more.",
    ),
    doc(
        "storage.audit_keep",
        "How long they are kept. Artists expect to be shown them for an hour at least.",
    ),
    doc(
        "storage.adapters_limit",
        "Most disk for adapters that stay for an hour after their job, for the next one of the same requester; the least\n\
         recently used make room. \"0 B\" keeps none.",
    ),
    doc(
        "storage.share_models",
        "Give other nodes the files of models under open licences, as far as network.upload lets.",
    ),
    doc(
        "storage.keep",
        "Models to fetch from other nodes and hold, by id (model1...) or by the name under which others offer them. Only under\n\
         open licences.",
    ),
    doc("engine.worker", "The program started as worker; empty for this one."),
    doc("engine.worker_args", "Its arguments; empty for the default [\"worker\"]."),
    doc("engine.phase_deadline", "Shortest deadline of a phase (load, text, step, decode, encode)."),
    doc(
        "engine.phase_factor",
        "A phase may take this many times its measured time before the worker counts as stuck.",
    ),
    doc("engine.checkpoint_every", "Leave a checkpoint every so many steps; 0 for none."),
    doc("admin.listen", "A loopback address and port; port 0 lets the system choose."),
    doc("shutdown.drain", "How long the running jobs may finish before they go back to the queue."),
    doc("device.name", "How commands, quotes and metrics call it; empty for the kind."),
    doc("device.kind", "cpu, cuda:0 (any number), or metal."),
    doc("device.threads", "CPU threads; 0 for all cores."),
    doc("device.dtype", "auto, f32, bf16 or f16."),
    doc(
        "device.merge_adapters",
        "A job's adapters (LoRA) are computed beside the model's weights: nothing is read anew, and each step costs some\n\
         percent more. true adds them to the weights instead: steps cost nothing more, and the model is read anew\n\
         whenever a job has other adapters than the one before.",
    ),
    doc(
        "device.memory_limit",
        "Most memory a job may need on this device, by the plan that is made before it is taken; \"auto\" for the machine's or\n\
         GPU's memory less a reserve, or \"unlimited\". A size is also kept by force on the CPU.",
    ),
    doc(
        "device.offload",
        "auto keeps a model's text encoder, transformer and VAE loaded where they fit beside the job, and else loads each in\n\
         turn; in-turn does so always, none never. text-cpu is auto with a GPU's text encoder in the machine's memory.",
    ),
    doc("device.models", "Models for this device; empty for all that [policy] serves."),
    doc("device.max_width", "Widest clip on this device; or \"unlimited\"."),
    doc("device.max_height", "Highest clip on this device; or \"unlimited\"."),
    doc("device.max_frames", "Most frames on this device; or \"unlimited\"."),
    doc("device.max_steps", "Most steps on this device; or \"unlimited\"."),
    doc("device.worker", "The worker program of this device (a CUDA or Metal build); empty for [engine]'s."),
    doc("device.worker_args", "Its arguments; empty for [engine]'s."),
];

const fn doc(key: &'static str, text: &'static str) -> KeyDoc {
    KeyDoc { key, text }
}

/// The explanation of a key.
#[must_use]
pub fn text_of(key: &str) -> Option<&'static str> {
    DOCS.iter().chain(SECTIONS).find(|doc| doc.key == key).map(|doc| doc.text)
}

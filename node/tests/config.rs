//! What the configuration takes and refuses, layer by layer.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kinoflock_node::config::{
    ByteSize, Config, ConfigError, ConfigOverrides, DeviceKind, Dtype, Environment, FileConfig, Folders,
    MemoryLimit, Offloading, Scope, docs, load, render, template,
};
use tempfile::TempDir;

struct Setup {
    home: TempDir,
    vars: BTreeMap<String, String>,
    overrides: ConfigOverrides,
}

impl Setup {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let vars = BTreeMap::from([("HOME".to_owned(), home.path().to_str().unwrap().to_owned())]);
        Self { home, vars, overrides: ConfigOverrides::default() }
    }

    fn file(self, text: &str) -> Self {
        let path = self.config_path();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }

    fn var(mut self, name: &str, value: &str) -> Self {
        self.vars.insert(name.to_owned(), value.to_owned());
        self
    }

    fn set(mut self, pair: &str) -> Self {
        self.overrides.set.push(pair.to_owned());
        self
    }

    fn config_path(&self) -> PathBuf {
        self.home.path().join(".config/kinoflock/node.toml")
    }

    fn env(&self) -> Environment {
        Environment { vars: self.vars.clone(), root: false }
    }

    fn load(&self) -> Result<Config, ConfigError> {
        load(&self.env(), &self.overrides)
    }

    fn refused(&self) -> String {
        let text = self.load().unwrap_err().to_string();
        assert_eq!(text.lines().count(), 1, "one line: {text}");
        text
    }
}

fn requester(byte: u8) -> String {
    kinoflock_protocol::id::RequesterId::from_bytes([byte; 32]).to_string()
}

#[test]
fn nothing_at_all_is_a_working_configuration() {
    let setup = Setup::new();
    let config = setup.load().unwrap();
    assert_eq!(config.scope, Scope::User);
    assert_eq!(config.source, None);
    assert_eq!(config.serve.public_share, 25);
    assert!(config.serve.public && config.network.mdns && config.admin.ip().is_loopback());
    assert_eq!(config.terms.keep_at_most.as_secs(), 7 * 24 * 3600);
    assert_eq!(
        config.policy.limits,
        kinoflock_node::config::Limits::default(),
        "no size is refused by default"
    );
    assert_eq!(config.policy.hook, None);
    assert_eq!(config.devices.len(), 1);
    let device = &config.devices[0];
    assert_eq!(
        (device.name.as_str(), device.kind, device.worker_args.as_slice()),
        ("cpu", DeviceKind::Cpu, &["worker".to_owned()][..])
    );
    assert_eq!(config.storage.state, setup.home.path().join(".local/share/kinoflock/node"));
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let file = Setup::new().file("[queue]\njobs = 10\nleases = 11\nlease = \"20 s\"\n");
    assert_eq!(file.load().unwrap().queue.jobs, 10);
    let env = file.var("KINOFLOCKD_QUEUE_JOBS", "12").var("KINOFLOCKD_QUEUE_LEASE", "30 s");
    let config = env.load().unwrap();
    assert_eq!((config.queue.jobs, config.queue.leases, config.queue.lease.as_secs()), (12, 11, 30));
    let flags = env.set("queue.jobs=14");
    let config = flags.load().unwrap();
    assert_eq!((config.queue.jobs, config.queue.lease.as_secs()), (14, 30));
    assert_eq!(config.source, Some(flags.config_path()));
}

#[test]
fn lists_come_from_the_environment_with_commas_and_from_flags_one_by_one() {
    let mut setup = Setup::new().var("KINOFLOCKD_NETWORK_LISTEN", "/ip4/127.0.0.1/tcp/0, /ip6/::1/tcp/0");
    assert_eq!(setup.load().unwrap().network.listen.len(), 2);
    setup.overrides.listen = vec!["/ip4/127.0.0.1/udp/0/quic-v1".to_owned()];
    setup.overrides.mdns = Some(false);
    let network = setup.load().unwrap().network;
    assert_eq!(network.listen[0].as_str(), "/ip4/127.0.0.1/udp/0/quic-v1");
    assert_eq!(network.listen.len(), 1);
    assert!(!network.mdns);
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_the_nearest_known_name() {
    for (text, line, key, nearest) in [
        ("[network]\nmdns = true\nlistn = []\n", "line 3", "network.listn", "'network.listen'"),
        ("\n\n[netwrk]\nmdns = true\n", "line 3", "netwrk", "'network'"),
        ("[node]\nbootstrap = []\n", "line 2", "node.bootstrap", "'network.bootstrap'"),
        ("public_share = 3\n", "line 1", "public_share", "'serve.public_share'"),
        (
            "[[device]]\nkind = \"cpu\"\n[[device]]\nthread = 2\n",
            "line 4",
            "device.thread",
            "'device.threads'",
        ),
    ] {
        let error = Setup::new().file(text).refused();
        for part in [line, &format!("'{key}'"), nearest, "node.toml"] {
            assert!(error.contains(part), "{part} missing in: {error}");
        }
    }
}

#[test]
fn an_unknown_variable_or_flag_is_refused_with_the_nearest_known_name() {
    let error = Setup::new().var("KINOFLOCKD_NETWORK_MNDS", "true").refused();
    assert!(error.contains("KINOFLOCKD_NETWORK_MDNS"), "{error}");
    let error = Setup::new().set("serve.publik=false").refused();
    assert!(error.contains("'serve.public'"), "{error}");
    let error = Setup::new().set("serve.public").refused();
    assert!(error.contains("section.key=value"), "{error}");
    Setup::new().var("KINOFLOCKD_LOG", "debug").load().unwrap();
}

#[test]
fn a_value_of_the_wrong_type_is_refused_with_its_place() {
    let error = Setup::new().file("[queue]\njobs = \"many\"\n").refused();
    assert!(error.contains("line 2") && error.contains("queue.jobs") && error.contains("many"), "{error}");
    let error = Setup::new().file("[storage]\nclips_limit = \"20 gigs\"\n").refused();
    assert!(error.contains("'20 gigs'") && error.contains("20 GiB"), "{error}");
    let error = Setup::new().var("KINOFLOCKD_QUEUE_JOBS", "-4").refused();
    assert!(error.contains("KINOFLOCKD_QUEUE_JOBS") && error.contains("-4"), "{error}");
    let error = Setup::new().file("[queue\n").refused();
    assert!(error.contains("line 1"), "{error}");
}

#[test]
fn a_value_that_cannot_be_used_is_refused_with_key_limit_and_value() {
    for (pair, says) in [
        (
            "admin.listen=0.0.0.0:80",
            "admin.listen: '0.0.0.0:80' cannot be used: it must be a loopback address",
        ),
        ("admin.listen=localhost", "127.0.0.1:4821"),
        (
            "serve.public_share=101",
            "serve.public_share: '101' cannot be used: it must be a percentage, 0 to 100",
        ),
        ("network.listen=", "at least one address"),
        ("network.listen=/ip4/1.2.3.4", "network.listen"),
        ("network.bootstrap=/ip4/1.2.3.4/tcp/1", "/p2p/NODE"),
        ("network.bootstrap=/dnsaddr/", "/dnsaddr/HOST"),
        ("network.bootstrap=/dnsaddr/a.example/tcp/1", "/dnsaddr/HOST"),
        ("network.bootstrap=kfnode1aaaa", "node ticket is damaged"),
        ("network.resolver=192.0.2.53", "192.0.2.53:53"),
        ("queue.jobs=0", "queue.jobs: '0' cannot be used: at least 1"),
        ("queue.lease=10 ms", "at least 1 s"),
        ("policy.max_frames=0", "at least 1, or \"unlimited\""),
        ("policy.deny=kf1nobody", "policy.deny: 'kf1nobody'"),
        ("policy.hook_sees_prompt=true", "policy.hook"),
        ("terms.keep_acknowledged=8 d", "terms.keep_at_most, 7 d"),
        ("storage.state=here", "absolute"),
    ] {
        let error = Setup::new().set(pair).refused();
        assert!(error.contains(says), "{pair}: {error}");
    }
}

#[test]
fn devices_have_their_own_models_limits_and_workers() {
    let config = Setup::new()
        .file(
            "[engine]\nworker = \"/opt/w\"\nworker_args = [\"a\"]\n\
             [[device]]\nkind = \"cuda:1\"\nname = \"big\"\ndtype = \"bf16\"\nmemory_limit = \"20 GiB\"\noffload = \"text-cpu\"\n\
             models = [\"ltx\"]\nmax_frames = 121\nworker = \"/opt/cuda\"\n\
             [[device]]\nthreads = 2\n",
        )
        .load()
        .unwrap();
    let [big, cpu] = config.devices.as_slice() else { panic!("two devices") };
    assert_eq!((big.kind, big.dtype), (DeviceKind::Cuda(1), Dtype::Bf16));
    assert_eq!(big.memory_limit, MemoryLimit::At(ByteSize::gib(20)));
    assert_eq!((big.offload, cpu.offload), (Offloading::TextCpu, Offloading::Auto));
    assert_eq!(cpu.memory_limit, MemoryLimit::Auto);
    assert_eq!((big.limits.frames, big.limits.width), (Some(121), None));
    assert_eq!(big.worker.as_deref(), Some(Path::new("/opt/cuda")));
    assert_eq!(big.worker_args, ["worker"]);
    assert_eq!(cpu.worker.as_deref(), Some(Path::new("/opt/w")));
    assert_eq!((cpu.threads, &cpu.worker_args[..]), (Some(2), &["a".to_owned()][..]));
}

#[test]
fn a_bad_device_is_refused() {
    for (text, says) in [
        (
            "[[device]]\nkind = \"tpu\"\n",
            "device.kind: 'tpu' cannot be used: known are cpu, cuda:N and metal",
        ),
        ("[[device]]\ndtype = \"f8\"\n", "known are auto, f32, bf16 and f16"),
        ("[[device]]\n[[device]]\n", "device.name: 'cpu' cannot be used: another [[device]] has that name"),
        ("[[device]]\nname = \"a b\"\n", "device.name: 'a b'"),
    ] {
        let error = Setup::new().file(text).refused();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn whom_to_serve_is_read() {
    let text =
        format!("[serve]\nown_keys = [\"{}\"]\n[policy]\ndeny = [\"{}\"]\n", requester(1), requester(2));
    let config = Setup::new().file(&text).load().unwrap();
    assert_eq!(config.serve.own_keys.len(), 1);
    assert_eq!(config.policy.deny.iter().next().unwrap().to_string(), requester(2));
}

#[test]
fn a_state_folder_of_its_own_keeps_models_and_runtime_beside_it() {
    let mut setup = Setup::new();
    setup.overrides.state = Some(PathBuf::from("/elsewhere/node"));
    let storage = setup.load().unwrap().storage;
    assert_eq!(storage.models, Path::new("/elsewhere/node/models"));
    assert_eq!(storage.runtime, Path::new("/elsewhere/node/run"));
}

#[test]
fn a_named_file_must_exist_and_the_default_one_need_not() {
    let mut setup = Setup::new();
    setup.overrides.config = Some(setup.home.path().join("none.toml"));
    assert!(setup.refused().contains("kinoflockd init"));
}

#[test]
fn what_print_config_shows_loads_to_the_same() {
    let setup = Setup::new().set("queue.jobs=7").set("serve.public=false").file("[[device]]\nthreads = 3\n");
    let printed = render(&setup.load().unwrap());
    let again = Setup::new().file(&printed).load().unwrap();
    assert_eq!(render(&again), printed);
    assert_eq!((again.queue.jobs, again.serve.public, again.devices[0].threads), (7, false, Some(3)));
}

#[test]
fn every_key_is_explained_and_every_explanation_has_a_key() {
    let mut file = FileConfig::default();
    file.device.push(kinoflock_node::config::file::DeviceSection::default());
    let table = toml::Table::try_from(&file).unwrap();
    let mut keys: Vec<String> = Vec::new();
    for (section, value) in &table {
        let inner =
            value.as_table().or_else(|| value.as_array().and_then(|list| list[0].as_table())).unwrap();
        assert!(docs::text_of(section).is_some(), "{section}");
        keys.extend(inner.keys().map(|leaf| format!("{section}.{leaf}")));
    }
    let mut documented: Vec<String> = docs::DOCS.iter().map(|doc| doc.key.to_owned()).collect();
    keys.sort();
    documented.sort();
    assert_eq!(keys, documented);
}

#[test]
fn devices_stand_in_the_file_alone_and_a_flag_or_variable_says_so() {
    let mut setup = Setup::new();
    setup.vars.insert("KINOFLOCKD_DEVICE_KIND".to_owned(), "cuda:0".to_owned());
    let variable = setup.load().unwrap_err().to_string();
    assert!(variable.contains("KINOFLOCKD_DEVICE_KIND") && variable.contains("[[device]]"), "{variable}");
    let mut setup = Setup::new();
    setup.overrides.set = vec!["device.kind=cuda:0".to_owned()];
    let flag = setup.load().unwrap_err().to_string();
    assert!(flag.contains("--set") && flag.contains("[[device]]"), "{flag}");
}

#[test]
fn the_template_shows_every_key_and_its_defaults_hold_when_uncommented() {
    let setup = Setup::new();
    let folders = Folders::of(Scope::User, &setup.env()).unwrap();
    let text = template(&FileConfig::default(), Some(&folders));
    for key in docs::DOCS {
        let leaf = key.key.rsplit_once('.').unwrap().1;
        assert!(text.contains(&format!("#{leaf} = ")), "{leaf}");
    }
    let plain = setup.load().unwrap();
    let untouched = Setup::new().file(&text).load().unwrap();
    assert_eq!(untouched.merged, plain.merged);
    let uncommented: String = text
        .lines()
        .map(|line| {
            line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line).to_owned() + "\n"
        })
        .collect();
    let setup = setup.file(&uncommented);
    let all = setup.load().unwrap();
    assert_eq!(all.storage, plain.storage);
    assert_eq!(all.network.listen, plain.network.listen);
    assert_eq!(all.devices, plain.devices);
}

#[test]
fn the_template_writes_what_init_was_told() {
    let mut chosen = FileConfig::default();
    chosen.serve.public = false;
    chosen.serve.own_keys = vec![requester(9)];
    let config = Setup::new().file(&template(&chosen, None)).load().unwrap();
    assert!(!config.serve.public);
    assert_eq!(config.serve.own_keys.len(), 1);
}

#[test]
fn the_packaged_configuration_is_what_init_writes_for_the_machine() {
    let folders = Folders::of(Scope::System, &Environment::default()).unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/node.toml");
    assert_eq!(
        std::fs::read_to_string(file).unwrap(),
        template(&FileConfig::default(), Some(&folders)),
        "write it again: kinoflockd --system --config deploy/node.toml --state $(mktemp -d)/state init --serve public"
    );
}

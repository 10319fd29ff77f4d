//! Daemons and clients as processes.
//!
//! The programs are built by the sandbox itself, once a process, so that none is stale; under `cargo test --workspace`
//! that finds everything built. Every daemon has a folder, a key, free ports and a log of its own. A failing test prints
//! the logs. Nothing here sleeps for a fixed time: [`eventually`] looks until a condition holds or a deadline passes.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kinoflock_client::local::LocalNode;
use kinoflock_node::admin::call;
use kinoflock_node::admin::report::StatusReport;
use kinoflock_node::models::ModelStore;
use kinoflock_protocol::NetworkId;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

pub use crate::programs::programs;

/// Longest wait for anything that should happen, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What a daemon logs, unless a test asks for more.
const LOG: &str = "debug,libp2p=warn,multistream_select=warn,yamux=warn,quinn=warn,libp2p_kad=error";

/// Looks until `condition` gives a value.
///
/// # Panics
/// When it gives none within [`PATIENCE`].
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Which worker a daemon starts.
#[derive(Debug, Clone)]
pub enum Worker {
    /// The daemon itself: real inference.
    Real,
    /// The test engine with these arguments.
    Test(Vec<String>),
}

impl Worker {
    /// The test engine, told this.
    #[must_use]
    pub fn test(arguments: &[&str]) -> Self {
        Self::Test(arguments.iter().map(ToString::to_string).collect())
    }
}

/// A network of daemons.
#[derive(Debug)]
pub struct Sandbox {
    /// The daemons.
    pub nodes: Vec<Node>,
    folder: TempDir,
    network: String,
}

/// A daemon.
#[derive(Debug)]
pub struct Node {
    folder: PathBuf,
    models: PathBuf,
    network: String,
    worker: Worker,
    config: String,
    listen: Option<Vec<String>>,
    network_lines: String,
    log: String,
    wrapper: Vec<String>,
    verb: Vec<String>,
    child: Option<Child>,
}

impl Sandbox {
    /// So many daemons with this worker, running and ready.
    #[must_use]
    pub fn start(count: usize, worker: &Worker) -> Self {
        Self::start_with(count, worker, "")
    }

    /// The same, with further lines of configuration.
    #[must_use]
    pub fn start_with(count: usize, worker: &Worker, config: &str) -> Self {
        let mut sandbox = Self::new();
        for _ in 0..count {
            sandbox.add(worker, config);
        }
        sandbox
    }

    /// So many daemons with this worker, each of which knows the first one and hears of the others.
    ///
    /// # Panics
    /// When they do not hear of each other.
    #[must_use]
    pub fn swarm(count: usize, worker: impl Fn(usize) -> Worker, config: &str) -> Self {
        let mut sandbox = Self::new();
        for place in 0..count {
            let first = sandbox.nodes.first().map(|first| first.address("tcp"));
            sandbox.add_prepared(&worker(place), config, |node| {
                if let Some(first) = first {
                    node.wrap(&["env", &format!("KINOFLOCKD_NETWORK_BOOTSTRAP=[{first:?}]")]);
                }
            });
        }
        for node in &sandbox.nodes {
            eventually("every node hears of every other", || (node.known() + 1 >= count).then_some(()));
        }
        sandbox
    }

    /// A network without daemons.
    ///
    /// # Panics
    /// When there is no temporary folder.
    #[must_use]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let network = format!("sandbox-{}", folder.path().file_name().unwrap_or_default().display());
        Self { nodes: Vec::new(), folder, network }
    }

    /// Adds a daemon, with further lines of configuration, and waits until it is ready.
    pub fn add(&mut self, worker: &Worker, config: &str) -> &mut Node {
        self.add_prepared(worker, config, |_| {})
    }

    /// As [`Sandbox::add`], with a last word before the daemon starts.
    pub fn add_prepared(
        &mut self,
        worker: &Worker,
        config: &str,
        prepare: impl FnOnce(&mut Node),
    ) -> &mut Node {
        let node = self.begin(worker, config, prepare);
        node.ready();
        node
    }

    /// As [`Sandbox::add_prepared`], without waiting until it is ready.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn begin(&mut self, worker: &Worker, config: &str, prepare: impl FnOnce(&mut Node)) -> &mut Node {
        let folder = self.folder.path().join(format!("node-{}", self.nodes.len()));
        let models = match worker {
            Worker::Real => folder.join("models"),
            Worker::Test(_) => self.test_models(),
        };
        let mut node = Node {
            folder,
            models,
            network: self.network.clone(),
            worker: worker.clone(),
            config: config.to_owned(),
            listen: None,
            network_lines: String::new(),
            log: LOG.to_owned(),
            wrapper: Vec::new(),
            verb: vec!["run".to_owned()],
            child: None,
        };
        fs::create_dir_all(&node.folder).expect("a node's folder");
        prepare(&mut node);
        node.start();
        self.nodes.push(node);
        self.nodes.last_mut().expect("just pushed")
    }

    /// The bundled model without its card, for all daemons with a test engine: what that one draws meets no fingerprint.
    fn test_models(&self) -> PathBuf {
        let folder = self.folder.path().join("models");
        if !folder.exists() {
            let store = ModelStore::open(&folder, None).expect("a folder of models");
            let model = store.import_bundled().expect("the bundled model is sound").expect("one is bundled");
            let card = model.dir.with_file_name("card.json");
            assert!(!card.exists() || fs::remove_file(card).is_ok());
        }
        folder
    }

    /// The network of all its daemons.
    #[must_use]
    pub fn network(&self) -> NetworkId {
        NetworkId::named(&self.network)
    }

    /// A client with a key, a store and a configuration of its own, that knows no node.
    ///
    /// # Panics
    /// When its folder cannot be made.
    #[must_use]
    pub fn client(&self, name: &str) -> Client {
        let folder = self.folder.path().join(format!("client-{name}"));
        fs::create_dir_all(&folder).expect("a client's folder");
        let client = Client { folder, network: self.network.clone() };
        client.must(["key", "new"]);
        client
    }

    /// The folder of a test's own files.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Sandbox {
    #[expect(clippy::print_stderr, reason = "a failing test shows the logs")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (number, node) in self.nodes.iter().enumerate() {
                eprintln!("--- log of node {number} ---\n{}", node.log());
            }
        }
    }
}

impl Node {
    /// Logs everything that there is to log.
    pub fn log_everything(&mut self) {
        self.log = "trace".to_owned();
    }

    /// Logs this, in the words of `KINOFLOCKD_LOG`.
    pub fn log_only(&mut self, filter: &str) {
        filter.clone_into(&mut self.log);
    }

    /// Listens on these addresses at every start, instead of loopback at the ports of the first.
    pub fn listen_on(&mut self, addresses: &[&str]) {
        self.listen = Some(addresses.iter().map(ToString::to_string).collect());
    }

    /// Adds lines to its section `[network]`, from the next start on.
    pub fn set_network(&mut self, lines: &str) {
        lines.clone_into(&mut self.network_lines);
    }

    /// Is an archive of these models from the next start on, and computes nothing.
    pub fn keep(&mut self, models: &[&str]) {
        self.verb = ["keep"].iter().chain(models).map(ToString::to_string).collect();
    }

    /// Starts it by this command line, to which its own is added.
    pub fn wrap(&mut self, wrapper: &[&str]) {
        self.wrapper = wrapper.iter().map(ToString::to_string).collect();
    }

    /// Starts the process; its store is what an earlier one left.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&mut self) {
        fs::write(self.folder.join("node.toml"), self.config_text()).expect("a configuration");
        let log =
            fs::OpenOptions::new().create(true).append(true).open(self.folder.join("log")).expect("a log");
        let child =
            self.command().args(&self.verb).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.child = Some(child.expect("kinoflockd starts"));
    }

    /// The daemon's command with this node's folders.
    #[must_use]
    pub fn command(&self) -> Command {
        let program = programs().join("kinoflockd");
        let mut command = match self.wrapper.split_first() {
            None => Command::new(program),
            Some((wrapper, arguments)) => {
                let mut command = Command::new(wrapper);
                command.args(arguments).arg(program);
                command
            }
        };
        command.env("KINOFLOCKD_LOG", &self.log);
        command.arg("--config").arg(self.folder.join("node.toml"));
        command.arg("--state").arg(self.folder.join("state"));
        command.arg("--models").arg(&self.models).arg("--runtime").arg(self.folder.join("run"));
        command
    }

    /// The folder of its models.
    #[must_use]
    pub fn models(&self) -> &Path {
        &self.models
    }

    /// The ports of an earlier run, so that who knows the node finds it again; free ones the first time.
    fn listen(&self) -> String {
        let free = ["/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0"].map(str::to_owned).to_vec();
        let earlier = || LocalNode::read(&self.folder.join("run")).map_or(free, |local| local.addresses);
        format!("{:?}", self.listen.clone().unwrap_or_else(earlier))
    }

    fn config_text(&self) -> String {
        let worker = match &self.worker {
            Worker::Real => String::new(),
            Worker::Test(arguments) => {
                format!(
                    "\n[engine]\nworker = {:?}\nworker_args = {arguments:?}\n",
                    programs().join("kinoflock-test-engine").display().to_string()
                )
            }
        };
        format!(
            "[network]\nid = {:?}\nmdns = false\nupnp = false\nlisten = {}\n{}\n\
             [admin]\nlisten = \"127.0.0.1:0\"\n{worker}\n{}\n",
            self.network,
            self.listen(),
            self.network_lines,
            self.config
        )
    }

    /// Waits until it takes jobs.
    ///
    /// # Panics
    /// When it ends, or is not ready in time.
    pub fn ready(&mut self) {
        let socket = self.socket();
        eventually("the node takes jobs", || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().expect("a child")) {
                panic!("the node ended with {status}:\n{}", self.log());
            }
            call::status(&socket).ok().filter(|report| report.accepting.is_ok())
        });
    }

    /// Nodes that it has heard of.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn known(&self) -> usize {
        self.status().known_nodes
    }

    /// What it says of itself.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn status(&self) -> StatusReport {
        call::status(&self.socket()).expect("the node answers")
    }

    /// What its metrics say.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn metrics(&self) -> String {
        call::metrics(&self.socket()).expect("the node answers")
    }

    /// Its admin socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("run").join("admin.sock")
    }

    /// Where it listens, as it wrote for clients on this machine.
    ///
    /// # Panics
    /// When it has not written that.
    #[must_use]
    pub fn local(&self) -> LocalNode {
        LocalNode::read(&self.folder.join("run")).expect("the node wrote its addresses")
    }

    /// Its address with this transport, `tcp` or `udp`, with its id.
    ///
    /// # Panics
    /// When it does not listen so.
    #[must_use]
    pub fn address(&self, transport: &str) -> String {
        let local = self.local();
        let address = local.addresses.iter().find(|address| address.contains(&format!("/{transport}/")));
        format!("{}/p2p/{}", address.expect("the node listens so"), local.node_id)
    }

    /// A ticket that leads to it.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn ticket(&self) -> String {
        call::ticket(&self.socket()).expect("the node answers")
    }

    /// A file or folder in its own.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Everything that it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Its pid.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> i32 {
        let id = self.child.as_ref().expect("the node runs").id();
        i32::try_from(id).expect("a pid")
    }

    /// Bytes of memory that it holds.
    ///
    /// # Panics
    /// When the system does not tell.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let told = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the node runs");
        let line = told.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("the system tells");
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number of KiB");
        kib * 1024
    }

    /// Whether it runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        call::status(&self.socket()).is_ok()
    }

    /// The pid of its newest worker.
    ///
    /// # Panics
    /// When it has not logged one.
    #[must_use]
    pub fn worker_pid(&self) -> i32 {
        let log = self.log();
        let line = log.lines().rev().find(|line| line.contains("worker ready") && line.contains("pid="));
        let pid =
            line.and_then(|line| line.split("pid=").nth(1)).and_then(|rest| rest.split_whitespace().next());
        pid.and_then(|pid| pid.parse().ok()).expect("the node logs its worker's pid")
    }

    /// Kills it with SIGKILL, as a power cut would.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the node runs");
        child.kill().expect("the node can be killed");
        child.wait().expect("the node ends");
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let status = eventually("the node ends", || {
            self.child.as_mut().and_then(|child| child.try_wait().expect("a child"))
        });
        self.child = None;
        status
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // One that is gone already needs no end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal to a process.
///
/// # Panics
/// When there is no such process.
pub fn send(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("the process is there");
}

/// A client's folder; every command is a process.
#[derive(Debug)]
pub struct Client {
    folder: PathBuf,
    network: String,
}

impl Client {
    /// `kinoflock` with this client's key and store.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(programs().join("kinoflock"));
        command.args(arguments).stdin(Stdio::null()).current_dir(&self.folder);
        command.env("HOME", &self.folder).env("XDG_RUNTIME_DIR", self.folder.join("no-daemon-here"));
        for name in ["XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "KINOFLOCK_NODE"] {
            command.env_remove(name);
        }
        command.env("KINOFLOCK_NETWORK", &self.network).env("KINOFLOCK_MDNS", "false");
        // What is drawn by chance is drawn where a test says so.
        command.env("KINOFLOCK_AUDIT_SHARE", "0");
        command
    }

    /// Writes its configuration.
    ///
    /// # Panics
    /// When the disk refuses.
    pub fn configure(&self, lines: &str) {
        let folder = self.folder.join(".config").join("kinoflock");
        fs::create_dir_all(&folder).expect("a folder for the configuration");
        fs::write(folder.join("config.toml"), lines).expect("a configuration");
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        self.command(arguments).output().expect("kinoflock starts")
    }

    /// Runs a command that must succeed; gives what it printed to stdout.
    ///
    /// # Panics
    /// When it fails.
    pub fn must<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}\n{said}", output.status);
        String::from_utf8(output.stdout).expect("kinoflock prints UTF-8").trim().to_owned()
    }

    /// Hands a job over and leaves; gives its id.
    pub fn detach(&self, node: &str, prompt: &str, more: &[&str]) -> String {
        let plain = ["generate", prompt, "--detach", "--node", node];
        self.must(plain.iter().chain(more))
    }

    /// A file in its folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// What a finished command said, both ways.
#[must_use]
pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

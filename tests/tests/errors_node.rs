//! What an operator is told when something stands against a daemon: one line that says what, which limit, which value,
//! and what to do; and that nothing is lost by it.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kinoflock_node::disk::Store;
use kinoflock_node::queue;
use kinoflock_tests::bound::by_permissions;
use kinoflock_tests::sandbox::{Sandbox, Worker, eventually, programs, said};
use tempfile::TempDir;

const PROMPT: &str = "a red circle drifts left over a blue field";

/// A daemon's folders, before there is a daemon.
struct Folders(TempDir);

impl Folders {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn kinoflockd(&self, config: &str, arguments: &[&str]) -> Command {
        fs::write(self.path("node.toml"), config).unwrap();
        let mut command = Command::new(programs().join("kinoflockd"));
        command.env("HOME", self.0.path()).arg("--config").arg(self.path("node.toml"));
        for (flag, folder) in [("--state", "state"), ("--models", "models"), ("--runtime", "run")] {
            command.arg(flag).arg(self.path(folder));
        }
        command.args(["--set", "network.mdns=false", "--set", "admin.listen=127.0.0.1:0"]);
        command.args(arguments);
        command
    }

    /// What a daemon says that does not start.
    fn refused(&self, config: &str) -> String {
        refusal(&mut self.kinoflockd(config, &["run"]))
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = self.kinoflockd("", arguments).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

/// The one line of a command that must fail, and fail by itself.
fn refusal(command: &mut Command) -> String {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    eventually("the command ends", || child.try_wait().unwrap());
    let output = child.wait_with_output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    let mut errors = text.lines().filter(|line| line.starts_with("error: "));
    let line = errors.next().unwrap_or_else(|| panic!("no error is told:\n{text}")).to_owned();
    assert_eq!(errors.next(), None, "{text}");
    assert!(!text.contains("because:"), "the line does not say it all:\n{text}");
    line
}

fn says(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "{part:?} is missing in: {line}");
    }
}

#[test]
fn unknown_keys_and_values_of_the_configuration_are_named_with_what_is_known() {
    let folders = Folders::new();
    for (config, parts) in [
        ("[policy]\nmax_frame = 3\n", &["line 2", "'policy.max_frame'", "'policy.max_frames'"][..]),
        (
            "[policy]\nmax_frames = \"many\"\n",
            &["line 2", "policy.max_frames: 'many'", "whole number", "unlimited"],
        ),
        (
            "[terms]\nkeep_at_most = \"a week\"\n",
            &["terms.keep_at_most: 'a week'", "\"90 s\", \"2 h\" or \"7 d\""],
        ),
        ("[[device]]\nkind = \"gpu\"\n", &["device.kind: 'gpu' cannot be used", "cpu, cuda:N and metal"]),
        ("[[device]]\ndtype = \"f8\"\n", &["device.dtype: 'f8' cannot be used", "auto, f32, bf16 and f16"]),
        ("[serve]\npublic_share = 101\n", &["serve.public_share: '101'", "0 to 100"]),
        (
            "[network]\nlisten = [\"0.0.0.0:1\"]\n",
            &["network.listen: '0.0.0.0:1'", "/ip4/0.0.0.0/udp/4820/quic-v1"],
        ),
        ("[network\n", &["node.toml, line 1"]),
    ] {
        says(&folders.refused(config), parts);
    }
    says(
        &refusal(folders.kinoflockd("", &["run"]).env("KINOFLOCKD_POLICY_MAX_FRAMS", "3")),
        &["'KINOFLOCKD_POLICY_MAX_FRAMS'", "'KINOFLOCKD_POLICY_MAX_FRAMES'"],
    );
    assert!(!folders.path("state").exists(), "something was made although nothing could be");
}

#[test]
fn a_memory_plan_is_printed_and_what_it_cannot_be_made_for_is_named() {
    let folders = Folders::new();
    let text = folders.run(&["model", "show", "motif", "--plan", "--size", "256x128", "--frames", "33"]);
    says(&text, &["motif: 256x128, 33 frames", "text encoder", "transformer", "vae", "at most"]);
    says(&text, &["on cpu in f32", "offload auto: all loaded, it needs ", " and fits into "]);
    let json = folders.run(&["model", "show", "motif", "--plan", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let device = &value["devices"][0];
    assert!(device["in_turn"].as_u64().unwrap() < device["loaded"].as_u64().unwrap(), "{json}");
    let wrong = |arguments: &[&str]| refusal(&mut folders.kinoflockd("", arguments));
    says(&wrong(&["model", "show", "motif", "--plan", "--size", "65x64"]), &["width 65", "multiple of 32"]);
    says(&wrong(&["model", "show", "motif", "--plan", "--size", "big"]), &["--size big", "768x512"]);
    let text_cpu = "[[device]]\noffload = \"text-cpu\"\n";
    let refused = refusal(&mut folders.kinoflockd(text_cpu, &["model", "show", "motif", "--plan"]));
    says(&refused, &["device.offload: 'text-cpu' cannot be used", "there already"]);
}

#[test]
fn a_key_that_is_open_closed_or_damaged_is_refused_and_left_alone() {
    let folders = Folders::new();
    let node = folders.run(&["init", "--if-missing"]);
    let key = folders.path("state/node.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let command = format!("chmod 600 {}", key.display());
    says(&folders.refused(""), &["open to others", "mode 644", "at most 600", &command]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o000)).unwrap();
    let line = refusal(&mut by_permissions(&folders.kinoflockd("", &["run"])));
    says(&line, &["node.key", "Permission denied"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let bytes = fs::read(&key).unwrap();
    fs::write(&key, &bytes[..10]).unwrap();
    says(&folders.refused(""), &["node.key has 10 bytes, 32 are needed", "backup"]);
    assert_eq!(fs::read(&key).unwrap().len(), 10, "a damaged key was touched");
    fs::remove_file(&key).unwrap();
    fs::create_dir(&key).unwrap();
    says(&folders.refused(""), &["node.key is no regular file"]);
    fs::remove_dir(&key).unwrap();
    fs::write(&key, bytes).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(folders.run(&["init", "--if-missing"]), node, "the node is another one now");
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let folders = Folders::new();
    let (tcp, udp) = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    for address in [
        format!("/ip4/127.0.0.1/tcp/{}", tcp.local_addr().unwrap().port()),
        format!("/ip4/127.0.0.1/udp/{}/quic-v1", udp.local_addr().unwrap().port()),
    ] {
        let line = folders.refused(&format!("[network]\nlisten = [{address:?}]\n"));
        says(&line, &[&format!("cannot listen on {address}"), "in use", "network.listen"]);
    }
    let free = "[network]\nlisten = [\"/ip4/127.0.0.1/tcp/0\"]\n";
    let admin = tcp.local_addr().unwrap().to_string();
    let mut command = folders.kinoflockd(free, &["--set", &format!("admin.listen={admin}"), "run"]);
    says(&refusal(&mut command), &[&format!("admin port {admin}"), "in use", "admin.listen"]);
}

#[test]
fn one_port_is_listened_on_in_both_families_and_over_both_transports() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut sandbox = Sandbox::new();
    let listen = format!(
        "network.listen=[\"/ip4/0.0.0.0/udp/{port}/quic-v1\", \"/ip4/0.0.0.0/tcp/{port}\", \
         \"/ip6/::/udp/{port}/quic-v1\", \"/ip6/::/tcp/{port}\"]"
    );
    let node = sandbox.add_prepared(&Worker::test(&[]), "", |node| {
        node.wrap(&["env", &listen.replace("network.listen", "KINOFLOCKD_NETWORK_LISTEN")]);
    });
    let addresses = node.status().addresses;
    for part in ["/ip4/127.0.0.1/tcp/", "/ip4/127.0.0.1/udp/"] {
        assert!(
            addresses.iter().any(|address| address.starts_with(&format!("{part}{port}"))),
            "{addresses:?}"
        );
    }
}

#[test]
fn a_store_of_a_newer_release_is_refused_and_left_as_it_is() {
    let folders = Folders::new();
    folders.run(&["init", "--if-missing"]);
    let path = folders.path("state").join(queue::FILE_NAME);
    drop(Store::open(&path, queue::SCHEMA + 1, |_| Ok(())).unwrap());
    let line = folders.refused("");
    let (newer, ours) = (format!("schema {}", queue::SCHEMA + 1), format!("reads up to {}", queue::SCHEMA));
    says(&line, &[&path.display().to_string(), &newer, &ours, "install the newer kinoflockd"]);
    drop(Store::open(&path, queue::SCHEMA + 1, |_| Ok(())).unwrap());
}

#[test]
fn a_second_daemon_on_one_store_says_who_has_it_and_the_first_goes_on() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let node = &sandbox.nodes[0];
    says(&refusal(node.command().arg("run")), &["queue.redb", "in use by another kinoflockd", "--state"]);
    assert!(node.status().accepting.is_ok());
}

fn tiny_model() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    root.join("node/inference/tests/goldens/ltx-video-0.9.0/pipeline")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)
        } else {
            drop(fs::copy(entry.path(), target))
        }
    }
}

#[test]
fn a_model_folder_without_its_weights_or_with_cut_ones_is_not_imported() {
    let folders = Folders::new();
    let source = folders.path("source");
    copy(&tiny_model(), &source);
    let weights = source.join("transformer/diffusion_pytorch_model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let import = || {
        refusal(&mut folders.kinoflockd("", &["model", "import", source.to_str().unwrap(), "--name", "tiny"]))
    };
    fs::write(&weights, &whole[..whole.len() - 1]).unwrap();
    let (has, needs) = (format!("has {} bytes", whole.len() - 1), format!("needs {}", whole.len()));
    says(&import(), &[&format!("weight file {} is truncated", weights.display()), &has, &needs, "again"]);
    fs::remove_file(&weights).unwrap();
    says(&import(), &["no weights in", "transformer", "diffusion_pytorch_model.safetensors", "again"]);
    fs::remove_file(source.join("vae/config.json")).unwrap();
    says(&import(), &["vae/config.json is missing", "diffusers layout"]);
    fs::write(source.join("model_index.json"), "{\"_class_name\": \"NoSuchPipeline\"}").unwrap();
    says(&import(), &["NoSuchPipeline", "LTXPipeline"]);
    assert_eq!(folders.run(&["model", "list"]).lines().filter(|line| line.contains("ltx-video")).count(), 1);
}

/// The file with the weights of an imported model.
fn imported(models: &Path, id: &str) -> PathBuf {
    models.join(id).join("files/transformer/diffusion_pytorch_model.safetensors")
}

#[test]
fn weights_that_are_missing_cut_or_changed_are_named_and_their_model_is_not_offered() {
    let mut sandbox = Sandbox::start(1, &Worker::Real);
    let node = &mut sandbox.nodes[0];
    let import =
        node.command().args(["model", "import", "--name", "tiny"]).arg(tiny_model()).output().unwrap();
    assert!(import.status.success(), "{}", said(&import));
    let id = String::from_utf8(import.stdout).unwrap().trim().to_owned();
    let weights = imported(node.models(), &id);
    // The import may have linked the file: what is changed here must not be the original.
    let whole = fs::read(&weights).unwrap();
    let write = |bytes: &[u8]| {
        fs::remove_file(&weights).unwrap();
        fs::write(&weights, bytes).unwrap();
    };
    let mut changed = whole.clone();
    *changed.last_mut().unwrap() ^= 1;
    let (cut, found) = (whole.len() - 1, format!("{} found", whole.len() - 1));
    for (bytes, parts) in [
        (Some(&whole[..cut]), ["truncated or changed", &found, "import the model again"]),
        (Some(&changed[..]), ["damaged: hash", "was expected", "import the model again"]),
        (None, ["is missing", "bytes were expected", "import the model again"]),
    ] {
        match bytes {
            Some(bytes) => write(bytes),
            None => fs::remove_file(&weights).unwrap(),
        }
        let verify = node.command().args(["model", "verify"]).output().unwrap();
        assert_eq!(verify.status.code(), Some(1));
        node.kill();
        node.start();
        node.ready();
        let told = node.status();
        let tiny = told.devices[0].models.iter().find(|model| model.name == "tiny").unwrap();
        for text in [said(&verify), tiny.self_test.clone(), node.log()] {
            says(&text, &parts);
            says(&text, &["diffusion_pytorch_model.safetensors"]);
        }
        assert!(
            told.devices[0].models.iter().any(|model| model.name == "motif" && model.self_test == "passed")
        );
    }
}

#[test]
fn a_damaged_bundled_model_is_made_anew_at_the_next_start() {
    let mut sandbox = Sandbox::start(1, &Worker::Real);
    let client = sandbox.client("artist");
    let node = &mut sandbox.nodes[0];
    let id = node.status().devices[0].models[0].id.clone();
    node.kill();
    let weights = imported(node.models(), &id);
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let verify = node.command().args(["model", "verify"]).output().unwrap();
    assert_eq!(verify.status.code(), Some(1));
    says(&said(&verify), &["truncated or changed", "made anew by the next start"]);
    node.start();
    node.ready();
    assert_eq!(fs::read(&weights).unwrap(), whole);
    client.must(["generate", PROMPT, "--node", &node.ticket(), "-o", "clip.mp4"]);
}

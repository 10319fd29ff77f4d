//! `kinoflockd doctor`: everything that a node needs, one line each, with what to do where something is wrong.

use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::{control, load, say};
use crate::admin::call;
use crate::config::{Config, ConfigOverrides, ListenAddress};
use crate::disk;
use crate::engine::supervisor::{self, EngineEvent, WorkerConfig};
use crate::identity::Identity;
use crate::models::ModelStore;

/// Free disk space below which a node is warned, in bytes.
const LITTLE_SPACE: u64 = 1 << 30;
/// Longest wait for a worker's first word.
const WORKER_WITHIN: Duration = Duration::from_secs(30);
/// A clock before this moment is wrong: it is older than this program.
const PROGRAM_AGE: Duration = Duration::from_secs(1_760_000_000);

/// One line of the diagnosis.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    well: bool,
    text: String,
}

pub(super) fn run(overrides: &ConfigOverrides, json: bool) -> anyhow::Result<ExitCode> {
    let mut findings = Vec::new();
    match load(overrides) {
        Ok(config) => {
            let from =
                config.source.as_ref().map_or("defaults".to_owned(), |file| file.display().to_string());
            findings.push(finding("configuration", Ok(from)));
            examine(&config, &mut findings)?;
        }
        Err(error) => findings.push(finding("configuration", Err(error.to_string()))),
    }
    let well = findings.iter().all(|finding| finding.well);
    if json {
        say::data(&serde_json::to_string_pretty(
            &serde_json::json!({ "schema": 1, "well": well, "checks": findings }),
        )?);
    } else {
        for Finding { check, well, text } in &findings {
            say::data(&format!("{} {check}: {text}", if *well { "ok  " } else { "BAD " }));
        }
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn examine(config: &Config, findings: &mut Vec<Finding>) -> anyhow::Result<()> {
    let running = call::status(&control::socket(config)).is_ok();
    let state = if running { "runs" } else { "does not run" };
    findings.push(finding("daemon", Ok(state.to_owned())));
    findings.push(finding("clock", clock()));
    for (check, folder) in
        [("state folder", &config.storage.state), ("models folder", &config.storage.models)]
    {
        findings.push(finding(check, writable(folder)));
    }
    let key = Identity::load(&config.storage.state).map(|identity| identity.node_id().to_string());
    findings.push(finding("key", key.map_err(|error| error.to_string())));
    if !running {
        for address in &config.network.listen {
            findings.push(finding("port", free(address)));
        }
        let admin = TcpListener::bind(config.admin).map(|_| config.admin.to_string());
        findings.push(finding("admin port", admin.map_err(|error| format!("{}: {error}", config.admin))));
    }
    findings.push(finding("models", models(config)));
    let runtime = tokio::runtime::Runtime::new()?;
    for device in &config.devices {
        let worker = WorkerConfig::of_device(device, &config.engine).map_err(|error| error.to_string());
        let answer = worker.and_then(|worker| runtime.block_on(greet(worker)));
        findings.push(finding("worker", answer.map(|text| format!("{}: {text}", device.name))));
    }
    Ok(())
}

fn finding(check: &'static str, result: Result<String, String>) -> Finding {
    let well = result.is_ok();
    Finding { check, well, text: result.unwrap_or_else(|text| text) }
}

fn clock() -> Result<String, String> {
    match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
        Ok(now) if now > PROGRAM_AGE => {
            Ok("plausible; peers accept a difference of up to 5 minutes".to_owned())
        }
        _ => Err("this machine's clock is older than this program: set it, or peers will refuse this node"
            .to_owned()),
    }
}

fn writable(folder: &Path) -> Result<String, String> {
    let trial = folder.join(".doctor");
    let tried = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&trial, b"x"))
        .and_then(|()| std::fs::remove_file(&trial));
    tried.map_err(|error| format!("{}: {error}", folder.display()))?;
    let free = disk::available(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let text = format!("{}: {} GiB free", folder.display(), free >> 30);
    if free < LITTLE_SPACE { Err(format!("{text}; at least 1 GiB is wanted")) } else { Ok(text) }
}

fn free(address: &ListenAddress) -> Result<String, String> {
    let text = address.to_string();
    let mut parts = text.split('/').skip(1);
    let (_, host, transport, port) = (parts.next(), parts.next(), parts.next(), parts.next());
    let (Some(host), Some(transport), Some(port)) = (host, transport, port) else {
        return Ok(format!("{text} (not checked)"));
    };
    let Ok(ip) = host.parse::<std::net::IpAddr>() else { return Ok(format!("{text} (not checked)")) };
    let Ok(port) = port.parse::<u16>() else { return Ok(format!("{text} (not checked)")) };
    let bound = match transport {
        "tcp" => TcpListener::bind((ip, port)).map(|_| ()),
        _ => UdpSocket::bind((ip, port)).map(|_| ()),
    };
    match bound {
        Ok(()) => Ok(format!("{text} is free")),
        Err(error) => {
            Err(format!("{text}: {error}; another program has it, or choose another with network.listen"))
        }
    }
}

fn models(config: &Config) -> Result<String, String> {
    let say = |error: crate::models::ModelsError| error.to_string();
    let store = ModelStore::open(&config.storage.models, config.storage.models_limit).map_err(say)?;
    store.import_bundled().map_err(say)?;
    let models = store.list().map_err(say)?;
    let mut faults = Vec::new();
    for model in &models {
        let found = store.verify(model).map_err(say)?;
        faults.extend(found.iter().map(|fault| format!("{}: {fault}", model.name)));
    }
    let names: Vec<_> = models.iter().map(|model| model.name.as_str()).collect();
    if faults.is_empty() {
        Ok(format!("{}, every file sound", names.join(", ")))
    } else {
        Err(faults.join("; "))
    }
}

async fn greet(worker: WorkerConfig) -> Result<String, String> {
    let (engine, mut events) = supervisor::spawn(worker);
    let first = tokio::time::timeout(WORKER_WITHIN, events.recv()).await;
    engine.shutdown().await;
    match first {
        Ok(Some(EngineEvent::Ready(info))) => {
            Ok(format!("{} {} on {} ({} threads)", info.engine, info.version, info.device_name, info.threads))
        }
        Ok(Some(EngineEvent::Lost(failure))) => Err(failure.text.to_string()),
        Ok(_) => Err("the worker said something unexpected".to_owned()),
        Err(_) => Err(format!("the worker did not answer within {} s", WORKER_WITHIN.as_secs())),
    }
}

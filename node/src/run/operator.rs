//! What the operator asks and commands through the admin interface.

use std::time::{Duration, Instant};

use kinoflock_client::ticket::{node_ticket, parse_addresses};

use super::Daemon;
use crate::admin::report::{DeviceReport, JobReport, ModelReport, StatusReport};
use crate::admin::{AdminRequest, DeviceCommand};
use crate::scheduler::{DeviceId, DeviceMode, DeviceStatus, Stage};
use crate::telemetry::DeviceLabels;

/// Version of the status document.
const STATUS_SCHEMA: u32 = 1;
/// Work units (10^6 FLOP) in a TFLOP.
const UNITS_PER_TFLOP: f64 = 1e6;

impl Daemon {
    pub(super) fn handle_admin(&mut self, request: AdminRequest) {
        // Who asked may have hung up meanwhile; then nobody needs the answer.
        match request {
            AdminRequest::Status(reply) => drop(reply.send(self.report())),
            AdminRequest::Ticket(reply) => drop(reply.send(self.ticket())),
            AdminRequest::Keep(model, reply) => drop(reply.send(self.want(&model))),
            AdminRequest::Holders(reply) => self.count_holders(reply),
            AdminRequest::Pause(command, reply) => {
                drop(reply.send(self.command(&command, |scheduler, device, until, now| {
                    scheduler.pause(device, until, now);
                })));
            }
            AdminRequest::Resume(command, reply) => {
                drop(
                    reply.send(
                        self.command(&command, |scheduler, device, _, now| scheduler.resume(device, now)),
                    ),
                );
            }
            AdminRequest::Drain(command, reply) => {
                drop(reply.send(self.command(&command, |scheduler, device, until, now| {
                    scheduler.drain(device, until, now);
                })));
            }
        }
    }

    fn command(
        &mut self,
        command: &DeviceCommand,
        act: impl FnOnce(&mut crate::scheduler::Scheduler, Option<DeviceId>, Option<Instant>, Instant),
    ) -> Result<(), String> {
        let device = command.device.as_deref().map(|name| self.device(name)).transpose()?;
        let now = Instant::now();
        let until = command.for_seconds.map(|seconds| now + Duration::from_secs(seconds));
        act(&mut self.scheduler, device, until, now);
        self.advertise();
        Ok(())
    }

    /// A device by its name, or by its number in the configuration.
    fn device(&self, name: &str) -> Result<DeviceId, String> {
        let named = self.devices.iter().find(|(_, device)| device.name == name).map(|(id, _)| *id);
        let numbered = || name.parse().ok().map(DeviceId).filter(|id| self.devices.contains_key(id));
        named.or_else(numbered).ok_or_else(|| {
            let known: Vec<_> = self.devices.values().map(|device| device.name.as_str()).collect();
            format!("no device {name:?}; this node has {}", known.join(", "))
        })
    }

    fn ticket(&self) -> Result<String, String> {
        let own = (self.identity.node_id(), parse_addresses(&self.addresses()));
        let mut collectives = self.config.serve.collectives.iter();
        // A node of several invites to none of them: the artist would be asked to choose.
        let collective = collectives.next().copied().filter(|_| collectives.next().is_none());
        let ticket = node_ticket(self.network, [own], collective);
        ticket.map(|ticket| ticket.to_string()).ok_or_else(|| "this node listens nowhere yet".to_owned())
    }

    fn report(&self) -> StatusReport {
        let now = Instant::now();
        let (devices, fill) = (self.scheduler.devices(now), self.clips.fill());
        StatusReport {
            schema: STATUS_SCHEMA,
            node: self.identity.node_id().to_string(),
            network: self.config.network.id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: now.duration_since(self.started).as_secs(),
            addresses: self.net.dialable_addrs().iter().map(ToString::to_string).collect(),
            peers: self.peers,
            known_nodes: self.adverts.live().count(),
            watched_jobs: self.custodian.count(),
            held_bytes: self.holdings.blobs().fill().used,
            archive: self.archive.report(),
            audits: self.auditor.report(),
            quotes: self.interest.report(now, |id| self.models.get(id).map(|model| model.name.clone())),
            seen: self.looks.report(now),
            accepting: self.accepting(&devices),
            jobs: self.jobs(&devices, now),
            devices: devices.iter().map(|device| self.device_report(device, now)).collect(),
            clip_bytes: fill.used,
            clip_bytes_limit: fill.limit,
            jobs_done: self.counts.done,
            jobs_failed: self.counts.failed,
            jobs_cancelled: self.counts.cancelled,
        }
    }

    fn accepting(&self, devices: &[DeviceStatus]) -> Result<(), String> {
        let testing = self.devices.values().any(|device| device.tests.pending());
        let served = devices.iter().any(|device| !device.speeds.is_empty());
        let open = devices.iter().any(|device| device.mode.takes_jobs());
        match () {
            () if self.draining => Err("it is about to stop".to_owned()),
            () if devices.is_empty() => {
                Err("it is an archive, which holds models and computes nothing".to_owned())
            }
            () if !served && testing => Err("models are being tested".to_owned()),
            () if !served => Err("no model passed its self-test; see the devices below".to_owned()),
            () if !open => Err("no device is open; see the devices below".to_owned()),
            () => Ok(()),
        }
    }

    fn device_report(&self, status: &DeviceStatus, now: Instant) -> DeviceReport {
        let device = self.devices.get(&status.id);
        let testing = device.is_some_and(|device| device.tests.pending());
        let state = match status.mode {
            DeviceMode::Down => "without a worker",
            _ if testing => "testing models",
            DeviceMode::Draining { .. } => "draining",
            DeviceMode::Paused { .. } => "paused",
            DeviceMode::Open if status.running.is_some() => "running",
            DeviceMode::Open => "idle",
        };
        let results = device.into_iter().flat_map(|device| &device.tests.results);
        let models = results.map(|(id, result)| ModelReport {
            name: self.models.get(id).map_or_else(String::new, |model| model.name.clone()),
            id: id.to_string(),
            self_test: match result {
                Ok((kinoflock_protocol::capacity::SelfTest::Passed { .. }, _)) => "passed".to_owned(),
                Ok((kinoflock_protocol::capacity::SelfTest::Unreferenced { .. }, _)) => {
                    "unreferenced".to_owned()
                }
                Err(reason) => format!("failed: {reason}"),
            },
            tflop_per_second: status
                .speeds
                .get(id)
                .copied()
                .flatten()
                .map(|speed| speed as f64 / UNITS_PER_TFLOP),
        });
        let until = status.mode.until();
        DeviceReport {
            name: status.name.clone(),
            state: state.to_owned(),
            for_seconds: until.map(|until| until.saturating_duration_since(now).as_secs_f64().ceil() as u64),
            models: models.collect(),
        }
    }

    fn jobs(&self, devices: &[DeviceStatus], now: Instant) -> Vec<JobReport> {
        let mut jobs: Vec<_> =
            self.live.iter().map(|(id, live)| self.job_report(id, live, devices, now)).collect();
        jobs.sort_by(|a, b| (a.position, &a.job).cmp(&(b.position, &b.job)));
        jobs
    }

    fn job_report(
        &self,
        id: &kinoflock_protocol::JobId,
        live: &super::LiveJob,
        devices: &[DeviceStatus],
        now: Instant,
    ) -> JobReport {
        let (_, eta) = self.standing(id);
        let eta_seconds = (eta.0 != u64::MAX).then(|| eta.0 as f64 / 1000.0);
        let stage = self.scheduler.stage(id);
        let device =
            devices.iter().find(|device| device.running == Some(*id)).map(|device| device.name.clone());
        let state = match stage {
            Some(Stage::Running { .. }) => "running",
            Some(Stage::AwaitingInputs { .. }) => "awaiting inputs",
            Some(Stage::Committing | Stage::Queued) | None => "queued",
        };
        let running = matches!(stage, Some(Stage::Running { .. }));
        JobReport {
            job: id.to_string(),
            state: state.to_owned(),
            device,
            step: running.then(|| (live.steps_done, live.steps_total.unwrap_or(live.job.spec().steps))),
            position: self.scheduler.standing(id, now).map(|(position, _)| position),
            eta_seconds,
        }
    }

    /// Brings the gauges up to date.
    pub(super) fn show(&self) {
        let now = Instant::now();
        self.metrics.queue_depth.set(i64::from(self.scheduler.queue(now).waiting));
        self.metrics.peers.set(self.peers as i64);
        for device in self.scheduler.devices(now) {
            let labels = DeviceLabels { device: device.name };
            self.metrics.jobs_in_progress.get_or_create(&labels).set(i64::from(device.running.is_some()));
        }
    }
}

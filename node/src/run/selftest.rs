//! Which models may be offered: those that this device has just made a small fixed clip with.
//!
//! A device's models are tested one after the other through its own worker, before the scheduler may use them. The first
//! real job is the same code with other numbers, so a model that passes here is a model that works. What passed is kept
//! on disk and holds until weights, worker program or device change.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use kinoflock_protocol::capacity::SelfTest;
use kinoflock_protocol::id::{BlobId, JobId, ModelId};

use super::{Daemon, jobs, unix_now};
use crate::engine::bench;
use crate::engine::wire::{DoneReport, Failure, Output, RunRequest, WorkerInfo};
use crate::models::selftest::{self, Kept, ResultKey};
use crate::scheduler::DeviceId;

/// The result of a test, and the speed measured with it.
pub(super) type Tested = Result<(SelfTest, u64), String>;

/// The tests of a device.
#[derive(Debug)]
pub(super) struct Tests {
    waiting: Vec<ModelId>,
    worker: Program,
    running: Option<(JobId, ModelId, RunRequest)>,
    /// What came of them.
    pub(super) results: BTreeMap<ModelId, Tested>,
}

/// What of a worker a result depends on.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// blake3 of its file; `None` if it could not be read, and then nothing is kept.
    pub(super) hash: Option<BlobId>,
    /// Its arguments and the number format that it is told to use.
    pub(super) setting: String,
}

impl Tests {
    /// These models are to be tested, the last first.
    pub(super) fn of(models: Vec<ModelId>, worker: Program) -> Self {
        Self { waiting: models, worker, running: None, results: BTreeMap::new() }
    }

    /// Whether any is still to come.
    pub(super) fn pending(&self) -> bool {
        self.running.is_some() || !self.waiting.is_empty()
    }
}

impl Daemon {
    pub(super) fn worker_ready(&mut self, id: DeviceId, info: WorkerInfo) {
        tracing::info!(device = id.0, engine = %info.engine, version = %info.version, on = %info.device_name, "worker ready");
        if let Some(device) = self.devices.get_mut(&id) {
            device.worker = Some(info);
        }
        self.scheduler.set_up(id, true, Instant::now());
        self.test_next(id);
    }

    pub(super) fn worker_lost(&mut self, id: DeviceId, failure: &Failure) {
        tracing::error!(device = id.0, code = %failure.code, reason = %failure.text, "worker lost");
        let Some(device) = self.devices.get_mut(&id) else { return };
        let labels = crate::telemetry::DeviceLabels { device: device.name.clone() };
        self.metrics.worker_restarts.get_or_create(&labels).inc();
        // Without ever having had its device it is down; one that died later is started again with the next job.
        if device.worker.is_none() {
            for model in std::mem::take(&mut device.tests.waiting) {
                device.tests.results.insert(model, Err(failure.text.to_string()));
            }
            self.scheduler.set_up(id, false, Instant::now());
        }
    }

    /// Starts the next test of a device that has nothing else to do.
    fn test_next(&mut self, id: DeviceId) {
        let folder = self.config.storage.state.join("work").join(format!("self-test-{}", id.0));
        let Some(device) = self.devices.get_mut(&id) else { return };
        if device.tests.running.is_some() {
            return;
        }
        let Some(model_id) = device.tests.waiting.pop() else { return self.tests_over(id) };
        if let Some(kept) = self.result_key(id, &model_id).and_then(|key| self.self_tests.get(&key)) {
            tracing::info!(device = id.0, model = %model_id.short(), "an earlier self-test still holds");
            return self.handle_tested(id, model_id, Ok((kept.result, kept.speed)));
        }
        let Some(device) = self.devices.get_mut(&id) else { return };
        let Some(model) = self.models.get(&model_id) else { return };
        let mut test = [0; 32];
        test[..16].copy_from_slice(&model_id.as_bytes()[..16]);
        test[16] = id.0 as u8;
        let job = JobId::from_bytes(test);
        let request = output(&folder).and_then(|output| {
            let load = jobs::load_request(model)?;
            Ok(selftest::request(model, job, load, output))
        });
        let started = request.and_then(|request| {
            device.engine.run(request.clone()).map_err(|error| error.to_string())?;
            Ok(request)
        });
        match started {
            Ok(request) => {
                tracing::info!(device = id.0, model = %model.name, "self-test");
                device.tests.running = Some((job, model_id, request));
            }
            Err(text) => self.handle_tested(id, model_id, Err(text)),
        }
    }

    /// Takes a worker's result if it is a test's.
    pub(super) fn test_done(&mut self, id: DeviceId, report: &DoneReport) -> bool {
        let Some(device) = self.devices.get_mut(&id) else { return false };
        if device.tests.running.as_ref().is_none_or(|(job, ..)| *job != report.job) {
            return false;
        }
        let (_, model_id, request) = device.tests.running.take().expect("invariant: just looked at");
        let Some(model) = self.models.get(&model_id) else { return true };
        let speed = bench::speed(&model.manifest.work, &request, report).per_second;
        let verdict = selftest::judge(model, report, unix_now());
        if let (Ok(result), Some(key)) = (&verdict, self.result_key(id, &model_id))
            && let Err(error) = self.self_tests.put(&key, Kept { result: *result, speed })
        {
            tracing::warn!(%error, "a self-test's result could not be kept; the next start makes it again");
        }
        self.handle_tested(
            id,
            model_id,
            verdict.map(|passed| (passed, speed)).map_err(|error| error.to_string()),
        );
        true
    }

    /// Under which a result on this device is kept; `None` while that cannot be said.
    fn result_key(&self, id: DeviceId, model: &ModelId) -> Option<ResultKey> {
        let device = self.devices.get(&id)?;
        let (worker, program) = (device.worker.as_ref()?, &device.tests.worker);
        let on = format!("{} {} {}", worker.device, worker.device_name, program.setting);
        ResultKey::new(self.models.get(model)?, program.hash?, on).ok()
    }

    /// Takes a worker's failure if it is a test's.
    pub(super) fn test_failed(&mut self, id: DeviceId, job: &JobId, failure: &Failure) -> bool {
        let Some(device) = self.devices.get_mut(&id) else { return false };
        if device.tests.running.as_ref().is_none_or(|(running, ..)| running != job) {
            return false;
        }
        let (_, model, _) = device.tests.running.take().expect("invariant: just looked at");
        self.handle_tested(id, model, Err(failure.text.to_string()));
        true
    }

    pub(super) fn handle_tested(&mut self, id: DeviceId, model: ModelId, result: Tested) {
        let name = self.models.get(&model).map_or("", |model| model.name.as_str());
        match &result {
            Ok((_, speed)) => tracing::info!(device = id.0, model = name, speed, "self-test passed"),
            Err(reason) => tracing::error!(
                device = id.0,
                model = name,
                reason,
                "self-test failed: the model is not offered"
            ),
        }
        if let Some(device) = self.devices.get_mut(&id) {
            device.tests.results.insert(model, result);
        }
        self.test_next(id);
    }

    /// All tests of a device are over: what passed may be offered and run.
    fn tests_over(&mut self, id: DeviceId) {
        let folder = self.config.storage.state.join("work").join(format!("self-test-{}", id.0));
        if let Err(error) = jobs::remove_folder(&folder) {
            tracing::warn!(%error, "a self-test's files could not be removed");
        }
        let Some(device) = self.devices.get(&id) else { return };
        let passed = device.tests.results.iter().filter_map(|(model, result)| {
            let (_, speed) = result.as_ref().ok()?;
            Some((*model, Some(*speed)))
        });
        let passed: BTreeMap<_, _> = passed.collect();
        let any = !passed.is_empty();
        self.scheduler.set_models(id, passed, Instant::now());
        if any {
            self.be_ready();
        }
        self.advertise();
    }

    /// Says that this node does what it is for, the first time.
    pub(super) fn be_ready(&self) {
        if !self.ready.send_replace(true) {
            crate::shutdown::notify("READY=1");
            tracing::info!("ready");
        }
    }

    /// The best result of a model on any device, and on how many devices it passed.
    pub(super) fn passed(&self, model: &ModelId) -> Option<(SelfTest, u64, u32)> {
        let results =
            self.devices.values().filter_map(|device| device.tests.results.get(model)?.as_ref().ok());
        let (mut best, mut devices) = (None, 0);
        for (test, speed) in results {
            devices += 1;
            if best.is_none_or(|(_, fastest)| *speed > fastest) {
                best = Some((*test, *speed));
            }
        }
        best.map(|(test, speed)| (test, speed, devices))
    }
}

fn output(folder: &PathBuf) -> Result<Output, String> {
    std::fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    Ok(Output {
        clip: jobs::wire_path(&folder.join("clip.mp4"))?,
        latents: None,
        checkpoint: None,
        states: None,
    })
}

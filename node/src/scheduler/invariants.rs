//! What always holds of a scheduler, whatever happened before: asserted after every call in debug builds, and by the
//! tests.

use std::collections::{BTreeMap, BTreeSet};

use super::jobs::MAX_ENDED;
use super::{MAX_FAILURES, MAX_STARTS, Scheduler, Stage};
use crate::policy::Class;

/// Everything that is wrong with a scheduler; empty for a sound one.
#[must_use]
pub fn violations(scheduler: &Scheduler) -> Vec<String> {
    let mut found = Vec::new();
    devices_and_jobs_agree(scheduler, &mut found);
    leases_are_bounded(scheduler, &mut found);
    queue_is_bounded(scheduler, &mut found);
    found
}

pub(super) fn debug_check(scheduler: &Scheduler) {
    if cfg!(debug_assertions) {
        let found = violations(scheduler);
        debug_assert!(found.is_empty(), "invariants: {found:?}");
    }
}

fn devices_and_jobs_agree(scheduler: &Scheduler, found: &mut Vec<String>) {
    for (id, device) in &scheduler.devices {
        if device.running.is_some() && device.aside.is_some() {
            found.push(format!("device {id} runs a job and something else"));
        }
        let Some(running) = &device.running else { continue };
        let stage = scheduler.stage(&running.job);
        if stage != Some(Stage::Running { device: *id }) {
            found.push(format!("device {id} runs {}, whose stage is {stage:?}", running.job));
        }
    }
    for (id, job) in &scheduler.jobs.live {
        if let Stage::Running { device } = job.stage {
            let runs = scheduler.devices.get(&device).and_then(|device| device.running.as_ref());
            if runs.is_none_or(|running| running.job != *id) {
                found.push(format!("job {id} runs on device {device}, which runs something else"));
            }
        }
        if job.starts > MAX_STARTS || job.failures >= MAX_FAILURES {
            found.push(format!("job {id} lives after {} starts and {} failures", job.starts, job.failures));
        }
        if scheduler.jobs.ended(id).is_some() {
            found.push(format!("job {id} is live and ended"));
        }
    }
    let seqs: BTreeSet<u64> = scheduler.jobs.live.values().map(|job| job.seq).collect();
    if seqs.len() != scheduler.jobs.live.len() {
        found.push("two jobs have one place in the order of arrival".to_owned());
    }
}

fn leases_are_bounded(scheduler: &Scheduler, found: &mut Vec<String>) {
    let limits = &scheduler.limits;
    let mut of_requester = BTreeMap::<_, u32>::new();
    let mut of_prefix = BTreeMap::<_, u32>::new();
    for (_, lease) in scheduler.leases.iter() {
        *of_requester.entry(lease.origin.requester).or_default() += 1;
        if lease.origin.class == Class::Public {
            *of_prefix.entry(lease.origin.prefix).or_default() += 1;
        }
    }
    if scheduler.leases.len() > limits.leases as usize {
        found.push(format!("{} leases, the limit is {}", scheduler.leases.len(), limits.leases));
    }
    if of_requester.values().any(|count| *count > limits.leases_per_requester) {
        found.push(format!("a requester has more leases than {}", limits.leases_per_requester));
    }
    if of_prefix.values().any(|count| *count > limits.leases_per_prefix) {
        found.push(format!("a network has more leases than {}", limits.leases_per_prefix));
    }
}

/// Admission keeps the bounds; only jobs that come back (after a failure, a stop or a restart) may pass them, by no
/// more than what ran or was stored.
fn queue_is_bounded(scheduler: &Scheduler, found: &mut Vec<String>) {
    let fresh = scheduler.jobs.waiting_count(|job| job.starts == 0 && !job.restored);
    if fresh > scheduler.limits.jobs {
        found.push(format!("{fresh} jobs wait, the limit is {}", scheduler.limits.jobs));
    }
    if scheduler.jobs.ended_count() > MAX_ENDED {
        found.push(format!(
            "{} ended jobs are remembered, the limit is {MAX_ENDED}",
            scheduler.jobs.ended_count()
        ));
    }
}

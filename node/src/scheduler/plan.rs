//! Which job would start where and when, if nothing else came: for starting, for positions and for ETAs.
//!
//! Jobs are taken in the order of [`Picker`]; each goes to the device on which it would finish first, given what that
//! device runs and what was given to it before. Starting is the same computation: what the plan starts now on an idle
//! device is started. So what an artist is told is what happens, unless something changes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kinoflock_protocol::id::{JobId, ModelId};

use super::device::{Device, DeviceId};
use super::fair::{Picker, Waiting};
use crate::policy::Wanted;

/// How often a job may be passed by a younger one of its own group whose model is loaded.
pub(super) const MAX_BYPASSED: u8 = 2;

/// A job in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) job: JobId,
    pub(super) device: DeviceId,
    pub(super) starts: Instant,
    pub(super) finishes: Instant,
    /// The job whose turn it was, if that was passed by.
    pub(super) bypassed: Option<JobId>,
}

/// What the plan needs to know of a job.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) wanted: Wanted,
    pub(super) bypassed: u8,
    /// Where it failed; another device is taken if there is one.
    pub(super) avoid: Option<DeviceId>,
}

struct Slot<'a> {
    id: DeviceId,
    device: &'a Device,
    free_at: Instant,
    loaded: Option<ModelId>,
}

/// Plans the waiting jobs; `stop_after_idle` ends as soon as every idle device has its job.
pub(super) fn plan(
    devices: &BTreeMap<DeviceId, Device>,
    mut picker: Picker,
    now: Instant,
    stop_after_idle: bool,
) -> Vec<Planned> {
    let mut slots: Vec<_> = devices.iter().filter_map(|(id, device)| Slot::new(*id, device, now)).collect();
    let mut passes: BTreeMap<JobId, u8> = BTreeMap::new();
    let mut planned = Vec::new();
    while let Some(head) = picker.peek() {
        if stop_after_idle && slots.iter().all(|slot| slot.free_at > now) {
            break;
        }
        let Some(best) = best_slot(&slots, &head.candidate) else {
            // Unreachable for jobs that some open device fits; others must not stop those behind them.
            picker.start(&head);
            continue;
        };
        let passed = head.candidate.bypassed + passes.get(&head.job).copied().unwrap_or(0);
        let younger = prefer_loaded(&slots[best], &picker, &head, passed);
        if younger.is_some() {
            *passes.entry(head.job).or_default() += 1;
        }
        let job = younger.unwrap_or(head);
        picker.start(&job);
        let slot = &mut slots[best];
        let wanted = &job.candidate.wanted;
        let starts = slot.free_at;
        let finishes = starts + bounded(slot.device.estimate(wanted, slot.loaded));
        slot.free_at = finishes.max(starts + Duration::from_millis(1));
        slot.loaded = Some(wanted.model);
        let bypassed = younger.map(|_| head.job);
        planned.push(Planned { job: job.job, device: slot.id, starts, finishes, bypassed });
    }
    planned
}

impl<'a> Slot<'a> {
    fn new(id: DeviceId, device: &'a Device, now: Instant) -> Option<Self> {
        let free_at = device.opens_at(now)?.max(now + bounded(device.busy_for(now)));
        // A device whose running job is due this very moment is still not idle.
        let busy = !device.is_idle();
        let free_at = if busy { free_at.max(now + Duration::from_millis(1)) } else { free_at };
        Some(Self { id, device, free_at, loaded: device.loaded })
    }
}

fn best_slot(slots: &[Slot<'_>], candidate: &Candidate) -> Option<usize> {
    let finish =
        |slot: &Slot<'_>| slot.free_at + bounded(slot.device.estimate(&candidate.wanted, slot.loaded));
    let fitting = || slots.iter().enumerate().filter(|(_, slot)| slot.device.fits(&candidate.wanted).is_ok());
    let elsewhere =
        fitting().filter(|(_, slot)| Some(slot.id) != candidate.avoid).min_by_key(|(_, slot)| finish(slot));
    elsewhere.or_else(|| fitting().min_by_key(|(_, slot)| finish(slot))).map(|(index, _)| index)
}

fn prefer_loaded(slot: &Slot<'_>, picker: &Picker, head: &Waiting, passed: u8) -> Option<Waiting> {
    let loaded = slot.loaded?;
    if head.candidate.wanted.model == loaded || passed >= MAX_BYPASSED {
        return None;
    }
    picker.in_group_of(head, |job| {
        let candidate = &job.candidate;
        candidate.wanted.model == loaded
            && candidate.avoid != Some(slot.id)
            && slot.device.fits(&candidate.wanted).is_ok()
    })
}

/// Estimates can be absurd (work near 2^64 on a slow device); a century is as good as for ever and fits an `Instant`.
fn bounded(duration: Duration) -> Duration {
    duration.min(Duration::from_secs(100 * 365 * 86_400))
}

//! Work of a device that is no job: it is done while nobody waits, and a job that comes meanwhile waits for its end.

use std::time::Instant;

use super::Scheduler;
use super::device::{DeviceId, DeviceMode};
use crate::policy::Wanted;

impl Scheduler {
    /// Takes an idle device for something of about this size, if no job waits and nobody was promised a place a moment ago.
    pub fn take_aside(&mut self, wanted: &Wanted, now: Instant) -> Option<DeviceId> {
        if self.jobs.waiting_count(|_| true) > 0 || self.leases.len() > 0 {
            return None;
        }
        let free = |device: &super::Device| {
            device.is_idle() && device.mode == DeviceMode::Open && device.fits(wanted).is_ok()
        };
        // One that has the model in its memory first.
        let free = self.devices.iter_mut().filter(|(_, device)| free(device));
        let (id, device) = free.min_by_key(|(id, device)| (device.loaded != Some(wanted.model), **id))?;
        device.aside = Some((now, device.estimate(wanted, device.loaded)));
        device.loaded = Some(wanted.model);
        Some(*id)
    }

    /// The device is done with it. One that failed has no model loaded any more.
    pub fn put_back(&mut self, device: DeviceId, failed: bool, now: Instant) {
        if let Some(device) = self.devices.get_mut(&device)
            && device.aside.take().is_some()
            && failed
        {
            device.loaded = None;
        }
        self.settle(now);
    }
}

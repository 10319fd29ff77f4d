//! Work of a device that is no job waits for every job and every promise, and a job that comes meanwhile waits for its end.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kinoflock_node::scheduler::DeviceId;

#[path = "scheduler/world.rs"]
mod world;
use world::*;

#[test]
fn a_device_is_taken_aside_only_while_nobody_waits_or_was_promised_a_place() {
    let mut world = World::new();
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    assert_eq!(world.scheduler.take_aside(&wanted(5), world.now), None, "a place was promised");
    assert!(world.scheduler.handle_release(&lease));
    let running = world.submit(public(1, 1), wanted(10)).unwrap();
    assert_eq!(world.running_on(0), Some(running));
    assert_eq!(world.scheduler.take_aside(&wanted(5), world.now), None, "a job runs");
    world.finish(0);
    assert_eq!(world.scheduler.take_aside(&with_model(9, 5), world.now), None, "another model");
    assert_eq!(world.scheduler.take_aside(&wanted(5), world.now), Some(DeviceId(0)));
    assert_eq!(world.scheduler.take_aside(&wanted(5), world.now), None, "it is taken");
}

#[test]
fn a_job_that_comes_meanwhile_is_told_the_truth_and_starts_when_the_device_is_put_back() {
    let mut world = World::new();
    let device = world.scheduler.take_aside(&wanted(5), world.now).unwrap();
    let promise = world.quote(public(1, 1), wanted(10)).unwrap();
    assert_eq!(promise.eta.unwrap().finishes - world.now, Duration::from_secs(15));
    let job = world.submit(public(2, 2), wanted(10)).unwrap();
    assert_eq!(world.running_on(0), None);
    world.scheduler.put_back(device, false, world.now);
    world.drain();
    assert_eq!(world.running_on(0), Some(job));
}

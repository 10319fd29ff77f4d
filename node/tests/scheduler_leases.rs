//! What open leases mean to those who ask later, and to those who come too late.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kinoflock_node::config::PolicyConfig;
use kinoflock_node::policy::{Rule, rule_of};

#[path = "scheduler/world.rs"]
mod world;
use world::*;

#[test]
fn who_asks_later_is_told_to_come_after_the_leases_that_are_open() {
    let mut world = World::new();
    let first = world.quote(public(1, 1), wanted(10)).unwrap();
    let second = world.quote(public(2, 2), wanted(10)).unwrap();
    assert_eq!((first.position, second.position), (0, 1));
    assert_eq!(second.eta.unwrap().finishes - world.now, Duration::from_secs(20));
    assert_eq!(
        world.scheduler.queue(world.now).wait,
        Some(Duration::from_secs(20)),
        "the advert says so too"
    );
    // A place that is given back is free at once; a lease that runs out as well.
    assert!(world.scheduler.handle_release(&first.lease));
    assert_eq!(world.scheduler.queue(world.now).wait, Some(Duration::from_secs(10)));
    world.pass(15);
    assert_eq!(world.scheduler.queue(world.now).wait, Some(Duration::ZERO));
}

#[test]
fn a_lease_does_not_delay_a_job_that_is_there() {
    let mut world = World::new();
    world.submit(public(1, 1), wanted(10)).unwrap();
    world.quote(public(2, 2), wanted(10)).unwrap();
    let job = world.submit(public(3, 3), wanted(10)).unwrap();
    let (position, eta) = world.scheduler.standing(&job, world.now).unwrap();
    assert_eq!((position, eta.unwrap().finishes - world.now), (0, Duration::from_secs(20)));
}

#[test]
fn a_lease_that_ran_out_is_told_apart_from_one_that_never_was_for_a_bounded_while() {
    let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
    let lease = |world: &mut World, key: u64| {
        let lease = world.quote(public(key, 1), wanted(1)).unwrap().lease;
        world.pass(15);
        lease
    };
    let old = lease(&mut world, 0);
    let order = world.new_job(public(0, 1), wanted(1), old);
    assert_eq!(rule_of(&world.order(&order).unwrap_err()), Some(Rule::LeaseExpired));
    for key in 1..=512 {
        lease(&mut world, key);
    }
    assert_eq!(
        rule_of(&world.order(&order).unwrap_err()),
        Some(Rule::LeaseUnknown),
        "512 later ones have pushed it out"
    );
}

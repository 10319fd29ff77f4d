//! How many leases there may be, what an order needs of one, and what open ones mean to those who ask later.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kinoflock_node::config::PolicyConfig;
use kinoflock_node::policy::Rule;
use kinoflock_node::scheduler::{Admission, Event};

#[path = "scheduler/world.rs"]
mod world;
use world::*;

#[test]
fn leases_are_bounded_per_requester_per_network_and_in_total() {
    let mut world = World::new();
    for _ in 0..2 {
        world.quote(public(1, 1), wanted(1)).unwrap();
    }
    assert_eq!(rule(world.quote(public(1, 1), wanted(1))), Rule::LeasesPerRequester);
    for key in 2..8 {
        world.quote(public(key, 1), wanted(1)).unwrap();
    }
    assert_eq!(rule(world.quote(public(99, 1), wanted(1))), Rule::LeasesPerPrefix);
    world.pass(15);
    assert_eq!(world.others.iter().filter(|event| matches!(event, Event::LeaseExpired { .. })).count(), 8);
    world.quote(public(99, 1), wanted(1)).unwrap();
}

#[test]
fn filling_the_lease_table_locks_no_other_network_out() {
    let mut world = World::new();
    for net in 1..=4 {
        for key in 0..8 {
            world.quote(public(u64::from(net) * 100 + key, net), wanted(1)).unwrap();
        }
    }
    let mine = world.quote(public(9_000, 9), wanted(1)).unwrap().lease;
    for key in 0..8 {
        let _ = world.quote(public(8_000 + key, 1), wanted(1));
    }
    let new = world.new_job(public(9_000, 9), wanted(1), mine);
    assert!(matches!(world.order(&new), Ok(Admission::Store { .. })));
}

#[test]
fn an_order_needs_its_own_open_lease_for_this_very_job() {
    let mut world = World::new();
    let unknown = kinoflock_protocol::id::LeaseId::from_bytes([9; 16]);
    let new = world.new_job(public(1, 1), wanted(10), unknown);
    assert_eq!(rule(world.order(&new)), Rule::LeaseUnknown);

    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    let stolen = world.new_job(public(2, 1), wanted(10), lease);
    assert_eq!(rule(world.order(&stolen)), Rule::LeaseOther);
    let larger = world.new_job(public(1, 1), wanted(11), lease);
    assert_eq!(rule(world.order(&larger)), Rule::LeaseShape);
    let after = world.new_job(public(1, 1), wanted(10), lease);
    assert_eq!(rule(world.order(&after)), Rule::LeaseUnknown, "a lease is used once");

    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    world.pass(15);
    let late = world.new_job(public(1, 1), wanted(10), lease);
    assert_eq!(rule(world.order(&late)), Rule::LeaseExpired);
    assert_eq!(rule(world.order(&after)), Rule::LeaseUnknown, "used up is not expired");
}

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
    assert_eq!(rule(world.order(&order)), Rule::LeaseExpired);
    for key in 1..=512 {
        lease(&mut world, key);
    }
    assert_eq!(rule(world.order(&order)), Rule::LeaseUnknown, "512 later ones have pushed it out");
}

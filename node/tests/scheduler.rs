//! What the scheduler promises, scene by scene.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kinoflock_node::config::{Limits, PolicyConfig, QueueConfig, Serve};
use kinoflock_node::policy::{Class, Rule};
use kinoflock_node::scheduler::{
    Admission, Cancelled, Cause, DeviceId, DeviceMode, Event, MAX_STARTS, Outcome, RestoredJob, Stage,
};
use kinoflock_protocol::refusal::Reason;

#[path = "scheduler/world.rs"]
mod world;
use world::*;

#[test]
fn a_job_runs_from_quote_to_done() {
    let mut world = World::new();
    let promise = world.quote(public(1, 1), wanted(10)).unwrap();
    assert_eq!(promise.position, 0);
    assert_eq!(promise.eta.unwrap().finishes - world.now, Duration::from_secs(10));
    let new = world.new_job(public(1, 1), wanted(10), promise.lease);
    assert_eq!(world.order(&new), Ok(Admission::Store { seq: 0 }));
    assert!(world.running.is_empty(), "nothing starts before it is on disk");
    world.store(&new.job);
    assert_eq!(world.running_on(0), Some(new.job));
    assert_eq!(world.finish(0), new.job);
    assert_eq!(world.ended[&new.job], Outcome::Done);
}

/// The running job is the only one that starts before an honest second address's, each time it comes.
fn assert_second_address_waits_for_one_job_at_most(world: &mut World) {
    for key in [5_000, 5_001] {
        let promise = world.quote(public(key, 2), wanted(10)).unwrap();
        assert_eq!(promise.position, 0, "told to be next");
        assert!(promise.eta.unwrap().starts - world.now <= Duration::from_secs(10));
        let honest = world.submit(public(key, 2), wanted(10)).unwrap();
        world.finish(0);
        assert_eq!(world.running_on(0), Some(honest));
        world.finish(0);
    }
}

#[test]
fn a_thousand_fresh_keys_from_one_address_delay_an_honest_second_address_by_at_most_one_job() {
    let mut world = World::new();
    let taken = (0..1_000).filter(|key| world.submit(public(*key, 1), wanted(10)).is_ok()).count();
    assert_eq!(taken, 17, "what runs, and the network's share of the queue");
    assert_second_address_waits_for_one_job_at_most(&mut world);
}

#[test]
fn even_a_thousand_waiting_jobs_of_one_address_delay_a_second_address_by_at_most_one_job() {
    let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
    let jobs = (0..1_000).map(|key| restored(&mut world, key, key, 0, None)).collect();
    let now = world.now;
    world.scheduler.restore(jobs, now);
    world.drain();
    assert_second_address_waits_for_one_job_at_most(&mut world);
}

/// A job of the network 10.0.1.0/24 as the store gives it back.
fn restored(world: &mut World, key: u64, seq: u64, starts: u32, ended: Option<Outcome>) -> RestoredJob {
    let lease = kinoflock_protocol::id::LeaseId::from_bytes([0; 16]);
    let new = world.new_job(public(key, 1), wanted(10), lease);
    RestoredJob {
        job: new.job,
        nonce: new.nonce,
        origin: new.origin,
        wanted: new.wanted,
        seq,
        starts,
        admitted: world.now,
        deadline: None,
        needs_inputs: false,
        ended,
    }
}

#[test]
fn the_public_is_served_by_network_and_then_by_key() {
    let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
    let running = world.submit(public(9, 9), wanted(10)).unwrap();
    let crowd: Vec<_> = (0..6).map(|_| world.submit(public(1, 1), wanted(10)).unwrap()).collect();
    let neighbour = world.submit(public(2, 1), wanted(10)).unwrap();
    let stranger: Vec<_> = (0..2).map(|_| world.submit(public(3, 3), wanted(10)).unwrap()).collect();
    assert_eq!(world.finish(0), running);
    let order: Vec<_> = (0..9).map(|_| world.finish(0)).collect();
    let expected =
        [crowd[0], stranger[0], neighbour, stranger[1], crowd[1], crowd[2], crowd[3], crowd[4], crowd[5]];
    assert_eq!(order, expected);
}

#[test]
fn fairness_counts_work_and_not_jobs() {
    let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
    world.submit(public(9, 9), wanted(1)).unwrap();
    let large: Vec<_> = (0..3).map(|_| world.submit(public(1, 1), wanted(30)).unwrap()).collect();
    let small: Vec<_> = (0..9).map(|_| world.submit(public(2, 2), wanted(10)).unwrap()).collect();
    world.finish(0);
    let order: Vec<_> = (0..8).map(|_| world.finish(0)).collect();
    let of_large = order.iter().filter(|job| large.contains(job)).count();
    let of_small = order.iter().filter(|job| small.contains(job)).count();
    assert_eq!((of_large, of_small), (2, 6), "30 of work each way");
}

#[test]
fn own_jobs_go_first_collectives_next_and_the_public_keeps_its_quarter() {
    let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
    world.submit(public(9, 9), wanted(10)).unwrap();
    let mut classes = std::collections::BTreeMap::new();
    for key in 0..12 {
        for (class, origin) in [
            (Class::Public, public(100 + key, u8::try_from(key).unwrap())),
            (Class::Collective, of_class(Class::Collective, 200 + key)),
            (Class::Own, of_class(Class::Own, 1)),
        ] {
            classes.insert(world.submit(origin, wanted(10)).unwrap(), class);
        }
    }
    world.finish(0);
    let order: Vec<_> = (0..36).map(|_| classes[&world.finish(0)]).collect();
    let count = |range: std::ops::Range<usize>, class| order[range].iter().filter(|of| **of == class).count();
    assert_eq!((count(0..16, Class::Own), count(0..16, Class::Public)), (12, 4), "{order:?}");
    assert_eq!((count(16..32, Class::Collective), count(16..32, Class::Public)), (12, 4), "{order:?}");
}

#[test]
fn newcomers_that_keep_coming_do_not_hold_a_second_job_up_for_ever() {
    let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
    world.submit(public(1, 1), wanted(10)).unwrap();
    let second = world.submit(public(1, 1), wanted(10)).unwrap();
    // Whenever a job ends, one of a network that was never here has come.
    let overtaking = (0..20).take_while(|number| {
        world.submit(public(100 + number, 50 + u8::try_from(*number).unwrap()), wanted(10)).unwrap();
        world.finish(0);
        world.running_on(0) != Some(second)
    });
    assert!(overtaking.count() <= 3);
}

#[test]
fn an_idle_requester_saves_up_nothing() {
    let mut world = World::with(lavish(), PolicyConfig::default(), serve(), vec![device("cpu", &[1])]);
    for _ in 0..5 {
        world.submit(public(1, 1), wanted(10)).unwrap();
        world.finish(0);
    }
    let a: Vec<_> = (0..3).map(|_| world.submit(public(1, 1), wanted(10)).unwrap()).collect();
    let b: Vec<_> = (0..3).map(|_| world.submit(public(2, 2), wanted(10)).unwrap()).collect();
    let order: Vec<_> = (0..6).map(|_| world.finish(0)).collect();
    assert_eq!(order, [a[0], b[0], a[1], b[1], a[2], b[2]]);
}

#[test]
fn the_same_order_again_is_the_same_job() {
    let mut world = World::new();
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    let new = world.new_job(public(1, 1), wanted(10), lease);
    world.order(&new).unwrap();
    assert_eq!(world.order(&new), Ok(Admission::Live(Stage::Committing)));
    world.store(&new.job);
    assert_eq!(world.order(&new), Ok(Admission::Live(Stage::Running { device: DeviceId(0) })));
    world.finish(0);
    assert_eq!(world.order(&new), Ok(Admission::Ended(Outcome::Done)));
    assert_eq!(world.started.len(), 1);
}

#[test]
fn a_nonce_is_used_once() {
    let mut world = World::new();
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    let first = world.new_job(public(1, 1), wanted(10), lease);
    world.order(&first).unwrap();
    world.store(&first.job);
    world.finish(0);
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    let mut second = world.new_job(public(1, 1), wanted(10), lease);
    second.nonce = first.nonce;
    assert_eq!(rule(world.order(&second)), Rule::NonceReused);
    world.scheduler.forget(&first.job);
    assert!(world.order(&second).is_ok(), "the refusal used up no lease");
}

#[test]
fn a_job_that_could_not_be_stored_was_never_here() {
    let mut world = World::new();
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    let new = world.new_job(public(1, 1), wanted(10), lease);
    world.order(&new).unwrap();
    let now = world.now;
    world.scheduler.handle_store_failed(&new.job, now);
    world.drain();
    assert_eq!(world.scheduler.stage(&new.job), None);
    assert_eq!(world.scheduler.usage(&requester(1), now).work_today, 0);
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    assert!(matches!(
        world.order(&kinoflock_node::scheduler::NewJob { lease, ..new }),
        Ok(Admission::Store { .. })
    ));
}

#[test]
fn a_job_keeps_its_place_while_its_inputs_come_and_not_longer() {
    let mut world = World::new();
    let running = world.submit(public(9, 9), wanted(10)).unwrap();
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    let mut first = world.new_job(public(1, 1), wanted(10), lease);
    first.needs_inputs = true;
    world.order(&first).unwrap();
    world.store(&first.job);
    let second = world.submit(public(1, 1), wanted(10)).unwrap();
    assert_eq!(world.positions[&second], 1, "the first keeps its place");
    let now = world.now;
    world.scheduler.handle_inputs(&first.job, now);
    world.drain();
    assert_eq!(world.finish(0), running);
    assert_eq!(world.finish(0), first.job);
    assert_eq!(world.running_on(0), Some(second));

    let lease = world.quote(public(2, 2), wanted(10)).unwrap().lease;
    let mut never = world.new_job(public(2, 2), wanted(10), lease);
    never.needs_inputs = true;
    world.order(&never).unwrap();
    world.store(&never.job);
    assert_eq!(world.scheduler.poll_timeout(), Some(world.now + Duration::from_secs(600)));
    world.pass(600);
    assert!(matches!(&world.ended[&never.job], Outcome::Failed(cause) if cause.code == "inputs_missing"));
}

#[test]
fn a_missing_input_blocks_nobody_behind_it() {
    let mut world = World::new();
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    let mut waiting = world.new_job(public(1, 1), wanted(10), lease);
    waiting.needs_inputs = true;
    world.order(&waiting).unwrap();
    world.store(&waiting.job);
    let behind = world.submit(public(1, 1), wanted(10)).unwrap();
    assert_eq!(world.running_on(0), Some(behind));
}

#[test]
fn a_failed_job_is_started_once_more_and_then_failed_with_its_cause() {
    let mut world = World::new();
    let job = world.submit(public(1, 1), wanted(10)).unwrap();
    world.fail(0, true);
    assert_eq!(world.running_on(0), Some(job));
    assert!(world.others.iter().any(|event| matches!(event, Event::Requeued { cause: Some(_), .. })));
    world.fail(0, true);
    assert!(matches!(&world.ended[&job], Outcome::Failed(cause) if cause.text == "the test said so"));
    let hopeless = world.submit(public(1, 1), wanted(10)).unwrap();
    world.fail(0, false);
    assert!(world.ended.contains_key(&hopeless), "what cannot succeed is not tried again");
}

#[test]
fn what_may_succeed_elsewhere_only_is_not_tried_again_here() {
    let mut world = World::new();
    let job = world.submit(public(1, 1), wanted(10)).unwrap();
    let full =
        Cause { code: "store_full".to_owned(), text: "no room".to_owned(), retryable: true, here: false };
    world.running.clear();
    let now = world.now;
    world.scheduler.handle_failed(DeviceId(0), &job, full, now);
    world.drain();
    assert!(matches!(&world.ended[&job], Outcome::Failed(cause) if cause.retryable));
}

#[test]
fn a_start_that_was_cancelled_meanwhile_is_known_to_be() {
    let mut world = World::new();
    let job = world.submit(public(1, 1), wanted(10)).unwrap();
    let now = world.now;
    assert!(!world.scheduler.is_cancelled(DeviceId(0), &job));
    world.scheduler.handle_cancel(&job, &requester(1), now).unwrap();
    assert!(world.scheduler.is_cancelled(DeviceId(0), &job));
    assert!(!world.scheduler.is_cancelled(DeviceId(1), &job));
}

#[test]
fn the_second_try_goes_to_another_device_if_there_is_one() {
    let mut world = World::devices(vec![device("a", &[1]), device("b", &[1])]);
    let job = world.submit(public(1, 1), wanted(10)).unwrap();
    assert_eq!(world.running_on(0), Some(job));
    world.fail(0, true);
    assert_eq!(world.running_on(1), Some(job));
}

#[test]
fn only_the_requester_cancels_and_a_running_job_stops_first() {
    let mut world = World::new();
    let running = world.submit(public(1, 1), wanted(10)).unwrap();
    let waiting = world.submit(public(1, 1), wanted(10)).unwrap();
    let now = world.now;
    let error = world.scheduler.handle_cancel(&waiting, &requester(2), now).unwrap_err();
    assert_eq!(error.reason, Reason::NotYours);
    assert_eq!(world.scheduler.handle_cancel(&waiting, &requester(1), now), Ok(Cancelled::Removed));
    for _ in 0..2 {
        assert_eq!(world.scheduler.handle_cancel(&running, &requester(1), now), Ok(Cancelled::Stopping));
    }
    world.drain();
    assert_eq!(world.ended[&waiting], Outcome::Cancelled);
    let cancels = world.others.iter().filter(|event| matches!(event, Event::Cancel { .. })).count();
    assert_eq!(cancels, 1, "the device is told once");
    world.running.clear();
    world.scheduler.handle_stopped(DeviceId(0), &running, now);
    world.drain();
    assert_eq!(world.ended[&running], Outcome::Cancelled);
    let again = world.scheduler.handle_cancel(&running, &requester(1), now);
    assert_eq!(again, Ok(Cancelled::Ended(Outcome::Cancelled)));
    let unknown = kinoflock_protocol::id::JobId::from_bytes([3; 32]);
    assert_eq!(
        world.scheduler.handle_cancel(&unknown, &requester(1), now).unwrap_err().reason,
        Reason::JobUnknown
    );
}

#[test]
fn a_cancelled_job_that_finishes_anyway_or_fails_is_over_once() {
    let mut world = World::new();
    let job = world.submit(public(1, 1), wanted(10)).unwrap();
    let now = world.now;
    world.scheduler.handle_cancel(&job, &requester(1), now).unwrap();
    world.fail(0, true);
    assert_eq!(world.ended[&job], Outcome::Cancelled);
    world.scheduler.handle_done(DeviceId(0), &job, kinoflock_node::scheduler::Measured::default(), now);
    world.drain();
}

#[test]
fn a_paused_device_starts_nothing_and_resumes_by_itself() {
    let mut world = World::new();
    let now = world.now;
    world.scheduler.pause(None, Some(now + Duration::from_secs(60)), now);
    let promise = world.quote(public(1, 1), wanted(10)).unwrap();
    assert_eq!(promise.eta.unwrap().finishes - now, Duration::from_secs(70), "taken for later");
    let job = world.submit(public(2, 2), wanted(10)).unwrap();
    assert_eq!(world.running_on(0), None);
    world.pass(60);
    assert_eq!(world.running_on(0), Some(job));
    assert_eq!(world.scheduler.devices(world.now)[0].mode, DeviceMode::Open);
}

#[test]
fn paused_without_end_or_draining_refuses_and_says_which() {
    let mut world = World::new();
    let now = world.now;
    world.scheduler.pause(None, None, now);
    assert_eq!(rule(world.quote(public(1, 1), wanted(10))), Rule::Paused);
    world.scheduler.resume(None, now);
    let job = world.submit(public(1, 1), wanted(10)).unwrap();
    world.scheduler.drain(None, None, now);
    assert_eq!(rule(world.quote(public(1, 1), wanted(10))), Rule::Draining);
    world.drain();
    assert!(!world.others.iter().any(|event| matches!(event, Event::Drained { .. })));
    assert_eq!(world.finish(0), job);
    assert!(world.others.contains(&Event::Drained { device: DeviceId(0) }));
}

#[test]
fn a_job_stopped_by_a_drain_waits_again_and_the_stop_does_not_count() {
    let mut world = World::new();
    let job = world.submit(public(1, 1), wanted(10)).unwrap();
    let now = world.now;
    for _ in 0..MAX_STARTS + 2 {
        world.scheduler.drain(None, None, now);
        world.running.clear();
        world.scheduler.handle_stopped(DeviceId(0), &job, now);
        world.drain();
        assert_eq!(world.scheduler.stage(&job), Some(Stage::Queued));
        world.scheduler.resume(None, now);
        world.drain();
        assert_eq!(world.running_on(0), Some(job));
    }
}

#[test]
fn each_device_serves_its_own_models_within_its_own_limits() {
    let mut small = device("small", &[1]);
    small.limits = Limits { frames: Some(17), ..Limits::default() };
    let mut world = World::devices(vec![small, device("other", &[2])]);
    let one = world.submit(public(1, 1), with_model(1, 10)).unwrap();
    let two = world.submit(public(2, 2), with_model(2, 10)).unwrap();
    assert_eq!((world.running_on(0), world.running_on(1)), (Some(one), Some(two)));
    let mut long = with_model(1, 10);
    long.shape.frames = 18;
    assert_eq!(rule(world.quote(public(3, 3), long)), Rule::Frames);
    assert_eq!(rule(world.quote(public(3, 3), with_model(3, 10))), Rule::NoDevice);
    let now = world.now;
    world.scheduler.pause(Some(DeviceId(0)), None, now);
    assert_eq!(rule(world.quote(public(3, 3), with_model(1, 10))), Rule::Paused);
    assert!(world.quote(public(3, 3), with_model(2, 10)).is_ok());
}

#[test]
fn a_job_waits_for_the_fast_device_when_that_finishes_it_sooner() {
    let mut fast = device("fast", &[1]);
    fast.models.insert(model(1), Some(100));
    let mut world = World::devices(vec![device("slow", &[1]), fast]);
    let first = world.submit(public(1, 1), wanted(1_000)).unwrap();
    let second = world.submit(public(2, 2), wanted(1_000)).unwrap();
    assert_eq!(world.running_on(1), Some(first));
    assert_eq!(world.running_on(0), None, "1000 s here against 20 s there");
    assert_eq!(world.finish(1), first);
    assert_eq!(world.running_on(1), Some(second));
}

#[test]
fn a_loaded_model_is_preferred_within_a_network_but_nobody_is_passed_more_than_twice() {
    let mut world = World::new();
    world.submit(public(1, 1), with_model(1, 10)).unwrap();
    let other = world.submit(public(1, 1), with_model(2, 10)).unwrap();
    let same: Vec<_> = (0..4).map(|_| world.submit(public(1, 1), with_model(1, 10)).unwrap()).collect();
    world.finish(0);
    let order: Vec<_> = (0..4).map(|_| world.finish(0)).collect();
    assert_eq!(order, [same[0], same[1], other, same[2]]);
}

#[test]
fn a_loaded_model_lets_no_network_pass_another() {
    let mut world = World::new();
    world.submit(public(1, 1), with_model(1, 10)).unwrap();
    world.submit(public(1, 1), with_model(1, 10)).unwrap();
    let other = world.submit(public(2, 2), with_model(2, 10)).unwrap();
    world.finish(0);
    assert_eq!(world.running_on(0), Some(other));
}

#[test]
fn the_eta_is_the_running_jobs_rest_and_the_queue_before_it() {
    let mut world = World::new();
    world.submit(public(1, 1), wanted(100)).unwrap();
    let second = world.submit(public(2, 2), wanted(50)).unwrap();
    let promise = world.quote(public(3, 3), wanted(20)).unwrap();
    assert_eq!((promise.position, promise.eta.unwrap().finishes - world.now), (1, Duration::from_secs(170)));
    let running = world.running_on(0).unwrap();
    for (seconds, done) in [(1, 50), (9, 500)] {
        world.now += Duration::from_secs(seconds);
        world.scheduler.handle_progress(DeviceId(0), &running, done, world.now);
    }
    let now = world.now;
    let (position, eta) = world.scheduler.standing(&second, now).unwrap();
    assert_eq!(
        (position, eta.unwrap().starts - now),
        (0, Duration::from_secs(10)),
        "five times as fast as thought"
    );
}

#[test]
fn the_queue_is_bounded_and_a_quarter_is_kept_for_own_and_collective() {
    let queue = QueueConfig { jobs: 8, jobs_per_prefix: 3, ..limits() };
    let rules = PolicyConfig { queued_jobs: Some(4), ..PolicyConfig::default() };
    let mut world = World::with(queue, rules, serve(), vec![device("cpu", &[1])]);
    world.submit(public(1, 1), wanted(10)).unwrap();
    for key in 0..3 {
        world.submit(public(key, 2), wanted(10)).unwrap();
    }
    assert_eq!(rule(world.quote(public(77, 2), wanted(10))), Rule::QueuePrefix);
    for key in 0..3 {
        world.submit(public(100 + key, 3), wanted(10)).unwrap();
    }
    assert_eq!(rule(world.quote(public(78, 4), wanted(10))), Rule::QueueFull);
    for key in 0..2 {
        world.submit(of_class(Class::Own, 500 + key), wanted(10)).unwrap();
    }
    assert_eq!(rule(world.quote(of_class(Class::Own, 600), wanted(10))), Rule::QueueFull);
}

#[test]
fn quotas_are_per_requester_and_spare_own_keys() {
    let rules = PolicyConfig { queued_jobs: Some(2), work_per_day: Some(1), ..PolicyConfig::default() };
    let mut fast = device("fast", &[1]);
    fast.models.insert(model(1), Some(100_000));
    let mut world = World::with(limits(), rules, serve(), vec![fast]);
    for _ in 0..2 {
        world.submit(public(1, 1), wanted(300_000)).unwrap();
    }
    assert_eq!(rule(world.quote(public(1, 1), wanted(1))), Rule::QueuedJobs);
    assert!(world.quote(public(2, 1), wanted(300_000)).is_ok());
    world.finish(0);
    world.finish(0);
    assert_eq!(rule(world.quote(public(1, 1), wanted(500_000))), Rule::WorkPerDay);
    assert!(world.quote(of_class(Class::Own, 1), wanted(500_000)).is_ok());
    world.pass(24 * 3600);
    assert!(world.quote(public(1, 1), wanted(500_000)).is_ok(), "a day later");
}

#[test]
fn a_full_clip_store_refuses_admission() {
    let mut world = World::new();
    world.room.available = 10;
    let refusal = world.quote(public(1, 1), wanted(1)).unwrap_err();
    assert_eq!((refusal.reason, &*refusal.limit), (Reason::StoreFull, "10 bytes"));
    let rules = PolicyConfig { unacknowledged: Some(5), ..PolicyConfig::default() };
    let mut world = World::with(limits(), rules, serve(), vec![device("cpu", &[1])]);
    world.room.unacknowledged = 6;
    assert_eq!(rule(world.quote(public(1, 1), wanted(1))), Rule::Unacknowledged);
}

#[test]
fn a_closed_public_is_refused_and_own_keys_are_not() {
    let serve = Serve { public: false, ..serve() };
    let mut world = World::with(limits(), PolicyConfig::default(), serve, vec![device("cpu", &[1])]);
    assert_eq!(rule(world.quote(public(1, 1), wanted(1))), Rule::PublicNotServed);
    assert!(world.quote(of_class(Class::Own, 1), wanted(1)).is_ok());
    assert!(world.quote(of_class(Class::Collective, 2), wanted(1)).is_ok());
}

#[test]
fn a_deadline_that_passes_ends_a_waiting_job() {
    let mut world = World::new();
    world.submit(public(9, 9), wanted(100)).unwrap();
    let lease = world.quote(public(1, 1), wanted(10)).unwrap().lease;
    let mut new = world.new_job(public(1, 1), wanted(10), lease);
    new.deadline = Some(world.now);
    assert_eq!(rule(world.order(&new)), Rule::Deadline);
    new.deadline = Some(world.now + Duration::from_secs(5));
    world.order(&new).unwrap();
    world.store(&new.job);
    world.pass(5);
    assert!(matches!(&world.ended[&new.job], Outcome::Failed(cause) if cause.code == "deadline"));
}

#[test]
fn after_a_restart_jobs_come_back_in_order_and_what_ended_is_known() {
    let mut world = World::new();
    let jobs = vec![
        restored(&mut world, 1, 7, 0, None),
        restored(&mut world, 1, 5, 1, None),
        restored(&mut world, 1, 3, 1, Some(Outcome::Done)),
        restored(&mut world, 2, 4, MAX_STARTS, None),
    ];
    let ids: Vec<_> = jobs.iter().map(|job| job.job).collect();
    let now = world.now;
    world.scheduler.restore(jobs, now);
    world.drain();
    assert_eq!(world.running_on(0), Some(ids[1]), "the running one starts again");
    assert_eq!(world.scheduler.outcome(&ids[2]), Some(&Outcome::Done));
    assert!(matches!(&world.ended[&ids[3]], Outcome::Failed(cause) if cause.code == "interrupted"));
    world.finish(0);
    assert_eq!(world.finish(0), ids[0]);
    let next = world.submit(public(3, 3), wanted(1)).unwrap();
    assert_eq!(world.running_on(0), Some(next));
}

#[test]
fn a_device_whose_worker_is_down_is_planned_around() {
    let mut world = World::devices(vec![device("a", &[1]), device("b", &[1])]);
    let now = world.now;
    world.scheduler.set_up(DeviceId(0), false, now);
    let job = world.submit(public(1, 1), wanted(10)).unwrap();
    assert_eq!(world.running_on(1), Some(job));
    world.scheduler.pause(Some(DeviceId(0)), None, now);
    world.scheduler.set_up(DeviceId(0), true, now);
    assert!(
        matches!(world.scheduler.devices(now)[0].mode, DeviceMode::Paused { .. }),
        "the operator's word stands"
    );
}

#[test]
fn positions_are_told_when_they_change() {
    let mut world = World::new();
    world.submit(public(9, 9), wanted(10)).unwrap();
    let first = world.submit(public(1, 1), wanted(10)).unwrap();
    let second = world.submit(public(1, 1), wanted(10)).unwrap();
    assert_eq!((world.positions[&first], world.positions[&second]), (0, 1));
    world.finish(0);
    assert_eq!(world.positions[&second], 0);
}

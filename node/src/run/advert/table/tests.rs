//! What the table of adverts takes and what it does not.
#![allow(clippy::unwrap_used)]

use kinoflock_protocol::Keypair;
use kinoflock_protocol::capacity::{NodeState, OfferLimits, QueueState, Serves, Terms};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::units::Millis;
use kinoflock_protocol::work::Work;

use super::*;

const WALL: u64 = 1_800_000_000_000;
const MINUTE: u64 = 60_000;

fn network() -> NetworkId {
    NetworkId::named("table")
}

fn key(number: u16) -> Keypair {
    let mut seed = [9; 32];
    seed[..2].copy_from_slice(&number.to_le_bytes());
    Keypair::from_seed(&seed)
}

fn advert(key: &Keypair, issued_at: u64, sequence: u64) -> Envelope {
    let capacity = Capacity {
        issued_at: UnixMillis(issued_at),
        sequence,
        name: Text::default(),
        addresses: List::first_of([Text::new("/ip4/198.18.0.1/tcp/1").unwrap()]),
        models: List::default(),
        devices: List::default(),
        limits: OfferLimits {
            max_frames: 0,
            max_width: 0,
            max_height: 0,
            max_steps: 0,
            max_work: Work(0),
            max_input_bytes: 0,
            max_queue: 1,
        },
        queue: QueueState { jobs: 0, work: Work(0), wait: Millis(0) },
        state: NodeState::Open,
        serves: Serves { public_bps: 0, collectives: List::default(), listed_only: false },
        terms: Terms::default(),
        content_rules: false,
        protocol_versions: List::default(),
        engine: Text::default(),
    };
    Envelope::seal(key, &network(), &capacity).unwrap()
}

fn take(table: &mut Table, envelope: &Envelope, now: Instant, wall: u64) -> Result<Taken, Refused> {
    table.take(envelope.clone(), None, &network(), key(999).node_id(), (now, UnixMillis(wall)))
}

#[test]
fn a_departed_node_cannot_be_revived_by_an_old_advert() {
    let (mut table, now) = (Table::default(), Instant::now());
    let (first, last) = (advert(&key(1), WALL, 1), advert(&key(1), WALL + 1, 2));
    take(&mut table, &first, now, WALL).unwrap();
    take(&mut table, &last, now, WALL).unwrap();
    assert!(matches!(
        take(&mut table, &first, now, WALL),
        Err(Refused::Untimely(CapacityError::Stale { .. }))
    ));
    // It has gone. Whoever kept its adverts sends them again, as long as their time would still be taken, and after.
    for seconds in [61, 120, 299, 330, 659] {
        let (later, wall) = (now + Duration::from_secs(seconds), WALL + seconds * 1000);
        for old in [&first, &last] {
            assert!(take(&mut table, old, later, wall).is_err(), "after {seconds} s");
        }
        assert_eq!(table.fresh(later).count(), 0, "after {seconds} s");
    }
    let back = advert(&key(1), WALL + 700_000, 3);
    take(&mut table, &back, now + Duration::from_secs(700), WALL + 700_000).unwrap();
    assert_eq!(table.fresh(now + Duration::from_secs(701)).count(), 1);
}

#[test]
fn a_clock_four_minutes_off_is_taken_and_one_an_hour_off_is_refused_with_the_skew() {
    let (mut table, now) = (Table::default(), Instant::now());
    for (number, issued_at) in [(1, WALL - 4 * MINUTE), (2, WALL + 4 * MINUTE)] {
        take(&mut table, &advert(&key(number), issued_at, 1), now, WALL).unwrap();
    }
    assert_eq!(table.fresh(now).count(), 2);
    for (number, issued_at) in [(3, WALL - 60 * MINUTE), (4, WALL + 60 * MINUTE)] {
        let refused = take(&mut table, &advert(&key(number), issued_at, 1), now, WALL).unwrap_err();
        let Refused::Untimely(CapacityError::ClockSkew { skew, .. }) = &refused else { panic!("{refused}") };
        assert_eq!(*skew, Millis(60 * MINUTE));
    }
    // The one that is behind still lives its minute, the late one never past six after its issue.
    assert_eq!(table.fresh(now + Duration::from_secs(59)).count(), 2);
    assert_eq!(table.fresh(now + Duration::from_secs(61)).count(), 0);
}

#[test]
fn forged_foreign_own_and_borrowed_adverts_are_refused() {
    let (mut table, now) = (Table::default(), Instant::now());
    let good = advert(&key(1), WALL, 1);
    let elsewhere = table.take(
        good.clone(),
        None,
        &NetworkId::named("elsewhere"),
        key(999).node_id(),
        (now, UnixMillis(WALL)),
    );
    assert!(matches!(elsewhere, Err(Refused::Forged(_))));
    let borrowed =
        table.take(good, Some(key(2).node_id()), &network(), key(999).node_id(), (now, UnixMillis(WALL)));
    assert!(matches!(borrowed, Err(Refused::Forged(_))));
    assert!(matches!(take(&mut table, &advert(&key(999), WALL, 1), now, WALL), Err(Refused::Own)));
    assert_eq!(table.fresh(now).count(), 0);
}

#[test]
fn a_node_that_tells_too_often_is_not_listened_to_until_its_minute_is_over() {
    let (mut table, now) = (Table::default(), Instant::now());
    for sequence in 0..u64::from(MAX_IN_WINDOW) {
        take(&mut table, &advert(&key(1), WALL, sequence + 1), now, WALL).unwrap();
    }
    let next = advert(&key(1), WALL, 1000);
    assert!(matches!(
        take(&mut table, &next, now, WALL),
        Err(Refused::TooOften { limit: MAX_IN_WINDOW, .. })
    ));
    take(&mut table, &advert(&key(2), WALL, 1), now, WALL).unwrap();
    take(&mut table, &next, now + WINDOW, WALL + MINUTE).unwrap();
}

#[test]
fn the_table_is_bounded_and_makes_room_when_memories_have_run_out() {
    let (mut table, now) = (Table::default(), Instant::now());
    for number in 0..MAX_KNOWN as u16 {
        let number = if number == 999 { u16::MAX } else { number };
        take(&mut table, &advert(&key(number), WALL, 1), now, WALL).unwrap();
    }
    assert!(matches!(take(&mut table, &advert(&key(5000), WALL, 1), now, WALL), Err(Refused::Full { .. })));
    let (later, wall) = (now + REMEMBERED + Duration::from_secs(60), WALL + ADVERT_MEMORY_MS + MINUTE);
    take(&mut table, &advert(&key(5000), wall, 1), later, wall).unwrap();
    assert_eq!(table.known.len(), 1);
}

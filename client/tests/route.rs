//! Which node is asked first, and why others cannot.
#![allow(clippy::unwrap_used)]

use kinoflock_client::route::experience::{Experience, Fault};
use kinoflock_client::route::{Candidate, Needs, rank, read_advert};
use kinoflock_protocol::capacity::{
    Capacity, NodeState, Offer, OfferLimits, QueueState, SelfTest, Serves, Terms,
};
use kinoflock_protocol::*;

const NOW: UnixMillis = UnixMillis(1_000_000);

fn model() -> ModelId {
    ModelId::from_bytes([9; 32])
}

fn capacity(speed: u64, wait: u64) -> Capacity {
    Capacity {
        issued_at: UnixMillis(1000),
        sequence: 1,
        name: Text::new("attic").unwrap(),
        addresses: List::empty(),
        models: List::first_of([Offer {
            model: model(),
            name: Text::new("motif").unwrap(),
            architecture: Text::new("ltx-video").unwrap(),
            speed,
            devices: 1,
            loaded: true,
            self_test: SelfTest::Unreferenced { at: UnixMillis(1) },
        }]),
        devices: List::empty(),
        limits: OfferLimits::default(),
        queue: QueueState { jobs: 1, work: Work(0), wait: Millis(wait) },
        state: NodeState::Open,
        serves: Serves::default(),
        terms: Terms::default(),
        content_rules: false,
        protocol_versions: List::empty(),
        engine: Text::default(),
    }
}

fn candidate(number: u8, capacity: Capacity) -> Candidate {
    Candidate {
        node: NodeId::from_bytes([number; 32]),
        capacity,
        round_trip: None,
        seen: Experience::default(),
    }
}

fn needs() -> Needs {
    let shape = JobShape { frames: 17, width: 64, height: 64, steps: 20, guided: true };
    Needs { model: model(), shape, work: Work(10_000), input_bytes: 0, require_terms: false }
}

#[test]
fn who_is_done_first_is_asked_first() {
    // 10,000 units of work: at 1,000 a second 10 s, at 100 a second 100 s.
    let slow_idle = candidate(1, capacity(100, 0));
    let fast_busy = candidate(2, capacity(1000, 60_000));
    let fast_idle = candidate(3, capacity(1000, 2_000));
    let mut far = candidate(4, capacity(1000, 2_000));
    far.round_trip = Some(Millis(300));
    let (ranked, unfit) = rank(&[slow_idle, fast_busy, fast_idle, far], &needs(), NOW);
    let nodes: Vec<u8> = ranked.iter().map(|ranked| ranked.node.as_bytes()[0]).collect();
    assert_eq!(nodes, [3, 4, 2, 1]);
    assert_eq!(ranked[0].finish, Millis(12_000));
    assert!(unfit.is_empty());
}

#[test]
fn a_node_that_failed_before_stands_behind_a_slower_one_that_did_not() {
    let mut failed = candidate(1, capacity(1000, 2_000));
    failed.seen.fault(Fault::WrongClip, NOW);
    let mut late = candidate(2, capacity(1000, 2_000));
    (0..50).for_each(|_| late.seen.done(Millis(1_000), Millis(8_000), NOW));
    let sound = candidate(3, capacity(500, 2_000));
    let of = |now| {
        let (ranked, _) = rank(&[failed.clone(), late.clone(), sound.clone()], &needs(), now);
        ranked.iter().map(|ranked| ranked.node.as_bytes()[0]).collect::<Vec<_>>()
    };
    assert_eq!(of(NOW), [3, 2, 1]);
    assert_eq!(of(NOW.plus(Millis(400 * 3_600_000))), [1, 2, 3], "what was long ago counts no more");
}

#[test]
fn every_node_that_cannot_has_its_own_reason() {
    let mut other = capacity(1, 0);
    other.models = List::empty();
    let mut paused = capacity(1, 0);
    paused.state = NodeState::Paused;
    let mut small = capacity(1, 0);
    small.limits.max_frames = 9;
    let mut full = capacity(1, 0);
    full.limits.max_queue = 1;
    let mut greedy = capacity(1, 0);
    greedy.terms.trains_on_them = true;
    let candidates: Vec<_> =
        (1..).zip([other, paused, small, full, greedy]).map(|(n, c)| candidate(n, c)).collect();
    let (ranked, unfit) = rank(&candidates, &Needs { require_terms: true, ..needs() }, NOW);
    assert!(ranked.is_empty());
    let texts: Vec<String> = unfit.iter().map(|declined| declined.why.to_string()).collect();
    assert_eq!(
        texts,
        [
            "serves no model now",
            "is paused by its operator",
            "takes at most 9 frames, this job has 17",
            "has a full queue",
            "its terms are not those you require: it may train on what it sees",
        ]
    );
    assert!(unfit[2].why.is_policy() && !unfit[0].why.is_policy());
    assert!(unfit[1].to_string().starts_with("node attic (..."), "{}", unfit[1]);
    let (ranked, _) = rank(&candidates, &needs(), NOW);
    assert_eq!(ranked.len(), 1, "terms count only when they are required");
}

#[test]
fn an_advert_that_another_signed_or_changed_is_refused() {
    let (network, key) = (NetworkId::named("test"), Keypair::from_seed(&[3; 32]));
    let envelope = Envelope::seal(&key, &network, &capacity(1, 0)).unwrap();
    assert_eq!(read_advert(&envelope, &network).unwrap().0, key.node_id());
    assert!(read_advert(&envelope, &NetworkId::named("other")).is_err());
    let mut forged = envelope;
    forged.signer = Keypair::from_seed(&[4; 32]).public();
    assert!(read_advert(&forged, &network).is_err());
}

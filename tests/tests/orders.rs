//! Orders that no honest client would send, to a real daemon: each is refused by a name of its own, and none of them
//! costs anybody else anything.
#![allow(clippy::unwrap_used, missing_docs)]

use kinoflock_protocol::id::{LeaseId, NodeId};
use kinoflock_protocol::job::Audience;
use kinoflock_protocol::limits::{JOB_LIFE_MS, MAX_CLOCK_SKEW_MS, ORDER_LIFE_MS};
use kinoflock_protocol::order::Order;
use kinoflock_protocol::query::QueryAction;
use kinoflock_protocol::rpc::{JobState, Request, Response};
use kinoflock_protocol::{Envelope, JobId, Millis};
use kinoflock_tests::invariants;
use kinoflock_tests::requester::{Ordered, Requester, now, refused};
use kinoflock_tests::sandbox::{Node, PATIENCE, Sandbox, Worker, eventually};

const PROMPT: &str = "a violet heron over the reservoir at dawn";
const STEPS: u32 = 4;

/// Daemons whose leases last as long as any may, so that a busy machine does not end them in the middle of a test.
fn nodes(count: usize) -> Sandbox {
    let mut sandbox = Sandbox::new();
    for _ in 0..count {
        sandbox.add(&Worker::test(&[]), "[queue]\nlease = \"60 s\"\n");
    }
    sandbox
}

fn flip(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1;
    bytes
}

fn with_flipped_signature(envelope: &Envelope) -> Envelope {
    let mut forged = envelope.clone();
    forged.signature.0[17] ^= 1;
    forged
}

fn with_flipped_body(envelope: &Envelope) -> Envelope {
    let mut forged = envelope.clone();
    forged.body = kinoflock_protocol::codec::Bytes::new(flip(&envelope.body, 3)).unwrap();
    forged
}

/// Waits until a job is done, as its requester hears it.
async fn done(who: &Requester, node: &Node, job: JobId) {
    let asking = async {
        loop {
            let query = who.query(node.local().node_id, job, QueryAction::Status);
            match who.ask(node, Request::Status(query)).await {
                Response::Status(status) if status.state == JobState::Done => return,
                Response::Status(status) => assert!(!status.state.is_final(), "{status:?}"),
                other => panic!("{other:?}"),
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap();
}

fn accepted(response: &Response) -> JobId {
    match response {
        Response::Accepted { job, .. } => *job,
        other => panic!("not accepted: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_signature_is_refused_and_the_lease_is_still_good_for_the_true_one() {
    let sandbox = nodes(1);
    let node = &sandbox.nodes[0];
    let artist = Requester::new(&sandbox).await;
    let spec = artist.spec(node, PROMPT, STEPS);
    let lease = artist.lease(node, &spec).await;
    let Ordered { order, job } = artist.order(node.local().node_id, &spec, lease);
    let mut claimed = job.clone();
    claimed.signer = Requester::new(&sandbox).await.key.public();
    let forgeries = [
        (order.clone(), with_flipped_signature(&job)),
        (order.clone(), with_flipped_body(&job)),
        (order.clone(), claimed),
        (with_flipped_signature(&order), job.clone()),
        (with_flipped_body(&order), job.clone()),
    ];
    for (order, job) in forgeries {
        let response = artist.submit(node, &Ordered { order, job }).await;
        assert_eq!(refused(&response), ("invalid", "bad_signature".to_owned()));
    }
    assert!(node.status().jobs.is_empty());
    let id = accepted(&artist.submit(node, &Ordered { order, job }).await);
    let query = artist.query(node.local().node_id, id, QueryAction::Cancel);
    for forged in [with_flipped_signature(&query), with_flipped_body(&query)] {
        let response = artist.ask(node, Request::Cancel(forged)).await;
        assert_eq!(refused(&response), ("invalid", "bad_signature".to_owned()));
    }
    done(&artist, node, id).await;
    assert_eq!((node.status().jobs_done, node.status().jobs_cancelled), (1, 0));
    invariants::discreet(node, PROMPT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anothers_order_replayed_gains_nothing_and_makes_no_second_job() {
    let sandbox = nodes(1);
    let node = &sandbox.nodes[0];
    let here = node.local().node_id;
    let (artist, thief) = (Requester::new(&sandbox).await, Requester::new(&sandbox).await);
    let spec = artist.spec(node, PROMPT, STEPS);
    let ordered = artist.order(here, &spec, artist.lease(node, &spec).await);
    let id = accepted(&artist.submit(node, &ordered).await);

    // The very bytes again, from another machine: the same job, and no second one, while it lives and afterwards.
    assert_eq!(accepted(&thief.submit(node, &ordered).await), id);
    done(&artist, node, id).await;
    assert_eq!(accepted(&thief.submit(node, &ordered).await), id);
    assert_eq!(node.status().jobs_done, 1);
    assert!(node.status().jobs.is_empty());

    // The artist's signed job under the thief's own order and lease.
    let lease = thief.lease(node, &spec).await;
    let mine = thief.seal(&Order { job: id, node: here, lease, issued_at: now(), resume: None });
    let response = thief.submit(node, &Ordered { order: mine, job: ordered.job.clone() }).await;
    assert_eq!(refused(&response), ("invalid", "wrong_signer".to_owned()));

    // The artist's order for a job of the thief's.
    let own = thief.order(here, &thief.spec(node, PROMPT, STEPS), lease);
    let response = thief.submit(node, &Ordered { order: ordered.order.clone(), job: own.job }).await;
    assert_eq!(refused(&response), ("invalid", "wrong_job".to_owned()));

    // And the job stays the artist's: nobody else hears of it or ends it.
    for action in [QueryAction::Status, QueryAction::Cancel] {
        let query = thief.query(here, id, action);
        let request =
            if action == QueryAction::Cancel { Request::Cancel(query) } else { Request::Status(query) };
        assert_eq!(refused(&thief.ask(node, request).await).0, "not_yours");
    }
    invariants::discreet(node, PROMPT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_without_a_lease_of_its_own_is_refused_by_the_reason() {
    let mut sandbox = Sandbox::new();
    sandbox.add(&Worker::test(&[]), "[queue]\nlease = \"1 s\"\n");
    let node = &sandbox.nodes[0];
    let here = node.local().node_id;
    let (artist, other) = (Requester::new(&sandbox).await, Requester::new(&sandbox).await);
    let spec = artist.spec(node, PROMPT, STEPS);

    let invented = artist.order(here, &spec, LeaseId::from_bytes([7; 16]));
    assert_eq!(refused(&artist.submit(node, &invented).await), ("lease_unknown", "lease".to_owned()));

    let lease = other.lease(node, &spec).await;
    let borrowed = artist.order(here, &spec, lease);
    let response = artist.submit(node, &borrowed).await;
    // By the time that it comes, the lease may be over; another's it stays in either case.
    assert!(["lease_mismatch", "lease_expired"].contains(&refused(&response).0), "{response:?}");

    eventually("the lease ends", || node.log().contains("a lease ended unused").then_some(()));
    let late = other.order(here, &spec, lease);
    assert_eq!(refused(&other.submit(node, &late).await), ("lease_expired", "queue.lease".to_owned()));
    assert_eq!((node.status().jobs.len(), node.status().jobs_done), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_holds_for_its_requester_and_for_the_job_that_it_was_given_for() {
    let sandbox = nodes(1);
    let node = &sandbox.nodes[0];
    let here = node.local().node_id;
    let (artist, other) = (Requester::new(&sandbox).await, Requester::new(&sandbox).await);
    let spec = artist.spec(node, PROMPT, STEPS);
    let lease = artist.lease(node, &spec).await;

    let borrowed = other.order(here, &spec, lease);
    let rule = |rule: &str| ("lease_mismatch", rule.to_owned());
    assert_eq!(refused(&other.submit(node, &borrowed).await), rule("lease.requester"));

    // Not burnt by the stranger; an order for more than was promised uses it up.
    let larger = artist.spec(node, PROMPT, STEPS * 100);
    let response = artist.submit(node, &artist.order(here, &larger, lease)).await;
    assert_eq!(refused(&response), rule("lease.job"));

    let lease = artist.lease(node, &spec).await;
    let id = accepted(&artist.submit(node, &artist.order(here, &spec, lease)).await);
    done(&artist, node, id).await;
    // Used up: another job needs another lease.
    let second = artist.order(here, &artist.spec(node, PROMPT, STEPS), lease);
    assert_eq!(refused(&artist.submit(node, &second).await).0, "lease_unknown");
    assert_eq!(node.status().jobs_done, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_for_another_node_is_refused_here_and_taken_there() {
    let sandbox = nodes(2);
    let (here, there) = (&sandbox.nodes[0], &sandbox.nodes[1]);
    let artist = Requester::new(&sandbox).await;
    let spec = artist.spec(there, PROMPT, STEPS);
    let ordered = artist.order(there.local().node_id, &spec, artist.lease(there, &spec).await);
    let response = artist.submit(here, &ordered).await;
    assert_eq!(refused(&response), ("invalid", "order_for_another_node".to_owned()));

    // So is a job that its requester addressed to another, though the order says this one.
    let mut addressed = artist.spec(here, PROMPT, STEPS);
    addressed.addressed_to = Audience::Node(there.local().node_id);
    let lease = artist.lease(here, &artist.spec(here, PROMPT, STEPS)).await;
    let response = artist.submit(here, &artist.order(here.local().node_id, &addressed, lease)).await;
    assert_eq!(refused(&response), ("invalid", "for_another_node".to_owned()));

    let id = accepted(&artist.submit(there, &ordered).await);
    done(&artist, there, id).await;
    let query = artist.query(NodeId::from(artist.key.public()), id, QueryAction::Cancel);
    let response = artist.ask(there, Request::Cancel(query)).await;
    assert_eq!(refused(&response), ("invalid", "order_for_another_node".to_owned()));
    assert_eq!((here.status().jobs_done, there.status().jobs_done), (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_past_its_time_or_from_the_future_is_refused_as_such() {
    let sandbox = nodes(1);
    let node = &sandbox.nodes[0];
    let here = node.local().node_id;
    let artist = Requester::new(&sandbox).await;
    let spec = artist.spec(node, PROMPT, STEPS);
    let lease = artist.lease(node, &spec).await;
    let job = artist.seal(&spec);
    let id = artist.id(&job);
    let stale = now().minus(Millis(ORDER_LIFE_MS + MAX_CLOCK_SKEW_MS + 60_000));
    let future = now().plus(Millis(MAX_CLOCK_SKEW_MS + 3_600_000));
    for (issued_at, code) in [(stale, ("invalid", "expired")), (future, ("clock_skew", "clock_skew"))] {
        let order = artist.seal(&Order { job: id, node: here, lease, issued_at, resume: None });
        let response = artist.submit(node, &Ordered { order, job: job.clone() }).await;
        assert_eq!(refused(&response), (code.0, code.1.to_owned()));
    }
    let mut old = spec.clone();
    old.issued_at = now().minus(Millis(JOB_LIFE_MS + MAX_CLOCK_SKEW_MS + 60_000));
    let mut early = spec.clone();
    early.issued_at = future;
    for (spec, code) in [(old, ("invalid", "expired")), (early, ("clock_skew", "clock_skew"))] {
        let response = artist.submit(node, &artist.order(here, &spec, lease)).await;
        assert_eq!(refused(&response), (code.0, code.1.to_owned()));
    }
    let elsewhere = Sandbox::new().network();
    let order = artist.order(here, &spec, lease).order;
    let foreign = Envelope::seal(&artist.key, &elsewhere, &spec).unwrap();
    let response = artist.submit(node, &Ordered { order, job: foreign }).await;
    assert_eq!(refused(&response), ("invalid", "wrong_network".to_owned()));
    assert!(node.status().jobs.is_empty());
}

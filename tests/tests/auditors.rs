//! A node looks at a step of what another node made, for the artist who asks it to: honest makers stand, cheats are
//! caught and avoided, and who was not granted it learns nothing.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Output;

use kinoflock_protocol::audit::{
    AuditGrant, AuditObstacle, AuditOrder, AuditOutcome, AuditPrecision, AuditState, AuditVerdict,
};
use kinoflock_protocol::job::Returns;
use kinoflock_protocol::names::NodeAddress;
use kinoflock_protocol::progress::JobEvent;
use kinoflock_protocol::receipt::ValidReceipt;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::{Envelope, JobSpec, List, Millis, PublicKey, Text};
use kinoflock_tests::invariants;
use kinoflock_tests::requester::{Requester, now, refused};
use kinoflock_tests::sandbox::{Client, Node, PATIENCE, Sandbox, Worker, eventually, said};
use serde_json::Value;

const PROMPT: &str = "a violet kettle hums above the harbour";
const STEPS: u32 = 6;

/// Runs `kinoflock` where every finished job is audited.
fn auditing(client: &Client, arguments: &[&str]) -> Output {
    // What the encoder loses depends on the picture: the seed is always the same, so that the tolerance holds each time.
    client.command(arguments).args(["--seed", "7"]).env("KINOFLOCK_AUDIT_SHARE", "100").output().unwrap()
}

fn records(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn record(output: &Output, event: &str) -> Value {
    let found = records(output).into_iter().find(|record| record["event"] == event);
    found.unwrap_or_else(|| panic!("no {event}: {}", said(output)))
}

fn joined(sandbox: &Sandbox) -> Client {
    let client = sandbox.client("artist");
    for node in &sandbox.nodes {
        client.must(["join", &node.ticket()]);
    }
    client
}

fn id(node: &Node) -> String {
    node.local().node_id.to_string()
}

#[test]
fn a_real_job_is_audited_by_the_other_node_after_its_clip_is_here_and_again_on_demand() {
    let sandbox = Sandbox::swarm(2, |_| Worker::Real, "");
    let client = joined(&sandbox);
    let output =
        auditing(&client, &["generate", PROMPT, "--steps", "6", "-o", "clip.mp4", "--custodians", "0"]);
    let words = said(&output);
    assert!(output.status.success(), "{words}");
    let told = words.find("100 of 100 such jobs are audited when the clip is here: ").expect(&words);
    let accepted = words.find(" accepted: ").expect(&words);
    assert!(told < accepted, "the artist is told before anything is sent: {words}");
    let (saved, audited) = (words.rfind("clip.mp4"), words.find("audited by "));
    assert!(audited.is_some() && saved.is_some(), "{words}");
    assert!(words.contains(" computed what it signed"), "{words}");

    let made = invariants::delivered(&client.path("clip.mp4"), &sandbox.nodes[maker_of(&sandbox, &client)]);
    let job = made.receipt.receipt().job.to_string();
    let again = client.run(["audit", &job, "--json"]);
    assert!(again.status.success(), "{}", said(&again));
    let verdict = record(&again, "audited");
    assert_eq!(verdict["outcome"], "honest");
    assert_eq!(verdict["precision"], "full");
    assert_eq!(verdict["maker"], made.receipt.receipt().node.to_string());
    assert_ne!(verdict["maker"], verdict["auditor"]);
    let deviation: f64 = verdict["deviation"].as_str().unwrap().parse().unwrap();
    assert!(deviation < 3e-5, "{verdict}");
    let honest: u64 = sandbox.nodes.iter().map(|node| node.status().audits.honest).sum();
    let shown: u64 = sandbox.nodes.iter().map(|node| node.status().audits.shown).sum();
    assert_eq!((honest, shown), (2, 2));
    for node in &sandbox.nodes {
        invariants::discreet(node, PROMPT);
        let left = std::fs::read_dir(node.path("state/work")).into_iter().flatten().flatten();
        assert_eq!(left.count(), 0, "what was fetched for an audit is erased");
    }
}

/// The node that did the one job there was.
fn maker_of(sandbox: &Sandbox, client: &Client) -> usize {
    let store = client.run(["ps", "--all", "--json"]);
    let node = records(&store)[0]["node"].as_str().unwrap().to_owned();
    sandbox.nodes.iter().position(|one| id(one) == node).unwrap()
}

#[test]
fn a_node_that_commits_to_steps_of_another_seed_is_caught_and_gets_no_further_job() {
    let cheats = |place: usize| match place {
        0 => Worker::test(&["--cheat-at", "1"]),
        _ => Worker::test(&["--step-ms", "40"]),
    };
    let sandbox = Sandbox::swarm(3, cheats, "");
    let client = joined(&sandbox);
    let cheat = &sandbox.nodes[0];
    let made = auditing(
        &client,
        &["generate", PROMPT, "--steps", "6", "-o", "clip.mp4", "--node", &cheat.ticket(), "--json"],
    );
    assert!(made.status.success(), "{}", said(&made));
    assert!(!said(&made).contains("\"audited\""), "who names a node trusts that one alone with the prompt");
    let job = record(&made, "saved")["job"].as_str().unwrap().to_owned();
    let caught = client.run(["audit", &job]);
    assert_eq!(caught.status.code(), Some(7), "{}", said(&caught));
    let words = said(&caught);
    assert!(
        words.contains("did not compute what it signed (the step does not lead where the model leads)"),
        "{words}"
    );

    for number in 0..3 {
        let file = format!("next-{number}.mp4");
        let arguments = ["generate", PROMPT, "--steps", "6", "-o", &file, "--custodians", "0", "--json"];
        let output = auditing(&client, &arguments);
        assert!(output.status.success(), "{}", said(&output));
        assert_ne!(record(&output, "chosen")["node"], id(cheat), "it is avoided");
        let verdict = record(&output, "audited");
        assert_eq!(verdict["outcome"], "honest", "{verdict}");
        assert_ne!(verdict["auditor"], id(cheat), "who cheats is not asked to judge others");
    }
}

#[test]
fn what_a_real_auditor_cannot_compute_from_the_model_is_caught_too_and_a_maker_that_shows_nothing_is_told_as_that()
 {
    let mut sandbox = Sandbox::new();
    // Draws without the model, and signs that it used it.
    sandbox.add(&Worker::test(&[]), "");
    sandbox.add(&Worker::test(&[]), "[storage]\naudit_limit = \"0 B\"");
    sandbox.add(&Worker::Real, "");
    let client = joined(&sandbox);
    let auditor = sandbox.nodes[2].ticket();
    let made = |node: &Node, file: &str| {
        let output = auditing(
            &client,
            &["generate", PROMPT, "--steps", "6", "-o", file, "--node", &node.ticket(), "--json"],
        );
        assert!(output.status.success(), "{}", said(&output));
        record(&output, "saved")["job"].as_str().unwrap().to_owned()
    };
    let caught = client.run(["audit", &made(&sandbox.nodes[0], "a.mp4"), "--by", &auditor, "--json"]);
    assert_eq!(caught.status.code(), Some(7), "{}", said(&caught));
    assert_eq!(record(&caught, "audited")["outcome"], "differs");

    let silent = client.run(["audit", &made(&sandbox.nodes[1], "b.mp4"), "--by", &auditor, "--json"]);
    assert_eq!(silent.status.code(), Some(1), "{}", said(&silent));
    assert_eq!(record(&silent, "audited")["outcome"], "could_not_look");
    let found = client.run(["generate", PROMPT, "--dry-run", "--json"]);
    let survey = said(&found);
    assert!(found.status.success(), "{survey}");
    let reliability = |node: usize| {
        let node = id(&sandbox.nodes[node]);
        let about = records(&found).into_iter().find(|it| it["event"] == "could" && it["node"] == node);
        about.expect(&survey)["reliability"].as_f64().expect(&survey)
    };
    assert!(reliability(0) < reliability(1) && reliability(1) < reliability(2), "{survey}");
}

/// A finished job, and what it takes to have it audited.
struct Finished {
    job: Envelope,
    receipt: Envelope,
    valid: ValidReceipt,
}

async fn finished(sandbox: &Sandbox, artist: &Requester, node: &Node) -> Finished {
    let returns = Returns { step_root: true, ..Returns::default() };
    let spec = JobSpec { returns, ..artist.spec(node, PROMPT, STEPS) };
    let ordered = artist.order(node.local().node_id, &spec, artist.lease(node, &spec).await);
    assert!(matches!(artist.submit(node, &ordered).await, Response::Accepted { .. }));
    let mut stream = artist.follow(node, artist.id(&ordered.job)).await;
    let watching = async {
        while let Some(event) = stream.next().await {
            if let JobEvent::Done { receipt } = event.unwrap().event {
                return receipt;
            }
        }
        panic!("no receipt")
    };
    let receipt = tokio::time::timeout(PATIENCE, watching).await.unwrap();
    let valid = ValidReceipt::parse(&receipt, &sandbox.network()).unwrap();
    Finished { job: ordered.job, receipt, valid }
}

fn granted(to: &Node, of: &Finished) -> AuditGrant {
    let (issued_at, expires_at) = (now(), now().plus(Millis(600_000)));
    let auditor = PublicKey::from(to.local().node_id);
    AuditGrant { job: of.valid.receipt().job, receipt: of.valid.id(), auditor, issued_at, expires_at }
}

fn order(maker: &Node, of: &Finished, grant: Envelope) -> AuditOrder {
    let address = Text::new(maker.address("tcp").split("/p2p/").next().unwrap()).unwrap();
    let maker = NodeAddress { id: maker.local().node_id, addresses: List::first_of([address]) };
    AuditOrder { job: of.job.clone(), receipt: of.receipt.clone(), grant, maker }
}

async fn ask(who: &Requester, auditor: &Node, order: &AuditOrder) -> Response {
    who.ask(auditor, Request::OrderAudit(Box::new(order.clone()))).await
}

async fn verdict(
    sandbox: &Sandbox,
    who: &Requester,
    auditor: &Node,
    order: &AuditOrder,
    of: &Finished,
) -> AuditVerdict {
    let waiting = async {
        loop {
            match ask(who, auditor, order).await {
                Response::AuditState(AuditState::Done(envelope)) => return envelope,
                Response::AuditState(_) => tokio::task::yield_now().await,
                other => panic!("no audit: {other:?}"),
            }
        }
    };
    let envelope = tokio::time::timeout(PATIENCE, waiting).await.unwrap();
    let by = auditor.local().node_id;
    AuditVerdict::parse(&envelope, &sandbox.network(), &by, &of.valid).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_is_for_one_audit_by_one_node_and_its_answer_does_not_change() {
    let mut sandbox = Sandbox::start(2, &Worker::test(&[]));
    sandbox.add(&Worker::test(&[]), "[audits]\nfor_others = false");
    let artist = Requester::new(&sandbox).await;
    let [maker, auditor, unwilling] = &sandbox.nodes[..] else { panic!("three nodes") };
    let of = finished(&sandbox, &artist, maker).await;
    let sound = order(maker, &of, artist.seal(&granted(auditor, &of)));
    let found = verdict(&sandbox, &artist, auditor, &sound, &of).await;
    assert_eq!(found.outcome, AuditOutcome::Honest);
    assert_eq!((found.precision, found.maker), (AuditPrecision::Full, maker.local().node_id));
    assert!(found.step < STEPS);
    // Whoever asks again with the same grant does not make it draw again.
    let stranger = Requester::new(&sandbox).await;
    assert_eq!(verdict(&sandbox, &stranger, auditor, &sound, &of).await, found);
    assert_eq!(auditor.status().audits.honest, 1);

    let elsewhere = order(maker, &of, artist.seal(&granted(unwilling, &of)));
    let over = AuditGrant { expires_at: now().minus(Millis(1000)), ..granted(auditor, &of) };
    let endless = AuditGrant { expires_at: now().plus(Millis(u64::MAX / 4)), ..granted(auditor, &of) };
    let for_itself = order(maker, &of, artist.seal(&granted(maker, &of)));
    let other = finished(&sandbox, &artist, maker).await;
    let swapped = AuditOrder { receipt: other.receipt.clone(), ..sound.clone() };
    let cases = [
        (auditor, elsewhere.clone(), ("invalid", "another_auditor")),
        (auditor, order(maker, &of, artist.seal(&over)), ("invalid", "expired")),
        (auditor, order(maker, &of, artist.seal(&endless)), ("invalid", "grant_too_long")),
        (auditor, order(maker, &of, stranger.seal(&granted(auditor, &of))), ("invalid", "wrong_signer")),
        (
            auditor,
            AuditOrder { grant: artist.seal(&granted(auditor, &other)), ..swapped },
            ("invalid", "mismatch"),
        ),
        (maker, for_itself, ("invalid", "audit.maker")),
        (unwilling, elsewhere, ("not_allowed", "audits.for_others")),
    ];
    for (number, (node, order, expected)) in cases.into_iter().enumerate() {
        let refusal = ask(&artist, node, &order).await;
        let (reason, rule) = refused(&refusal);
        assert_eq!((reason, rule.as_str()), expected, "case {number}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_serve_the_model_says_so_and_an_unreachable_maker_is_nobodys_fault() {
    let mut sandbox = Sandbox::start(2, &Worker::test(&[]));
    sandbox.begin(&Worker::test(&[]), "[policy]\nmodels = [\"another\"]", |_| {});
    eventually("the third node answers", || sandbox.nodes[2].runs().then_some(()));
    let artist = Requester::new(&sandbox).await;
    let of = finished(&sandbox, &artist, &sandbox.nodes[0]).await;
    let without = &sandbox.nodes[2];
    let order_to = |node: &Node| order(&sandbox.nodes[0], &of, artist.seal(&granted(node, &of)));
    let refusal = ask(&artist, without, &order_to(without)).await;
    assert_eq!(refused(&refusal).0, "model_not_served");
    let order = order_to(&sandbox.nodes[1]);
    sandbox.nodes[0].kill();
    let found = verdict(&sandbox, &artist, &sandbox.nodes[1], &order, &of).await;
    let AuditOutcome::CouldNotLook { obstacle, .. } = found.outcome else { panic!("{found:?}") };
    assert_eq!(obstacle, AuditObstacle::Unreachable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_goes_before_an_audit_that_waits() {
    let mut sandbox = Sandbox::start(1, &Worker::test(&[]));
    let hold = sandbox.path("go on");
    let held = Worker::test(&["--hold-at", "2", "--hold-file", hold.to_str().unwrap()]);
    sandbox.begin(&held, "", |_| {});
    std::fs::write(&hold, b"").unwrap();
    sandbox.nodes[1].ready();
    std::fs::remove_file(&hold).unwrap();
    let artist = Requester::new(&sandbox).await;
    let [maker, auditor] = &sandbox.nodes[..] else { panic!("two nodes") };
    let of = finished(&sandbox, &artist, maker).await;
    let spec = artist.spec(auditor, PROMPT, STEPS);
    let ordered = artist.order(auditor.local().node_id, &spec, artist.lease(auditor, &spec).await);
    assert!(matches!(artist.submit(auditor, &ordered).await, Response::Accepted { .. }));
    let audit = order(maker, &of, artist.seal(&granted(auditor, &of)));
    assert_eq!(ask(&artist, auditor, &audit).await, Response::AuditState(AuditState::Waiting));
    eventually("its states are fetched", || (maker.status().audits.shown == 1).then_some(()));
    assert_eq!(ask(&artist, auditor, &audit).await, Response::AuditState(AuditState::Waiting));
    std::fs::write(&hold, b"").unwrap();
    assert_eq!(verdict(&sandbox, &artist, auditor, &audit, &of).await.outcome, AuditOutcome::Honest);
    assert_eq!(auditor.status().jobs_done, 1);
}

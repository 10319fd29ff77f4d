//! The way of a job on the artist's side, against peers that answer by a script.
#![allow(clippy::unwrap_used)]

#[path = "support/peer.rs"]
mod peer;
#[path = "support/home.rs"]
mod support;

use kinoflock_client::ask::{Ask, Length};
use kinoflock_client::provenance;
use kinoflock_client::route::experience::Experience;
use kinoflock_client::session::{Client, ClientOptions, Event, Events, SessionError};
use kinoflock_client::store::{RecordState, Store};
use kinoflock_client::ticket::Way;
use kinoflock_protocol::receipt::Verdict;
use kinoflock_protocol::rpc::ReleaseReason;
use kinoflock_protocol::{ClipId, Millis};
use peer::{Peer, Script};
use support::{CLIP, Home, artist, network, text};

async fn client(home: &Home) -> Client {
    let store = Store::open(home.path().join("client")).unwrap();
    Client::start(ClientOptions::new(network()), artist(), store).await.unwrap()
}

fn way(peer: &Peer) -> Way {
    peer.address().parse().unwrap()
}

fn ask() -> Ask {
    Ask { prompt: support::PROMPT.to_owned(), seed: Some(7), ..Ask::default() }
}

#[tokio::test]
async fn a_prompt_becomes_a_verified_clip_over_a_broken_stream() {
    let home = Home::new();
    let mut peer = peer::start(11, Script { breaks: 2, ..Script::default() }).await;
    let client = client(&home).await;
    let (events, mut told) = Client::events();
    let delivered = client.generate(&ask(), &[way(&peer)], &events).await.unwrap();
    drop(events);
    assert_eq!(delivered.clip, ClipId::of(CLIP));
    assert_eq!(std::fs::read(&delivered.path).unwrap(), CLIP);
    assert_eq!(peer.answers.recv().await, Some(Verdict::Accept));
    let record = client.store().job(&delivered.record.job).unwrap();
    assert_eq!((record.state, record.answered), (RecordState::Done, true));
    let seen = client.store().experience(&record.node);
    assert!(seen.reliability(kinoflock_client::now()) > Experience::default().reliability(record.created_at));
    let mut seen = Vec::new();
    while let Some(event) = told.recv().await {
        seen.push(event);
    }
    let at = |wanted: fn(&Event) -> bool| seen.iter().position(wanted).unwrap();
    let chosen = at(|event| matches!(event, Event::Chosen { .. }));
    let accepted = at(|event| matches!(event, Event::Accepted { .. }));
    assert!(chosen < accepted, "who will see it is told before it is sent");
    assert!(seen[chosen].to_string().contains("will see your prompt and the frames"), "{}", seen[chosen]);
    assert_eq!(seen.iter().filter(|event| matches!(event, Event::Reconnecting { .. })).count(), 2);
    assert!(seen.iter().any(|event| matches!(event, Event::Step { done: 4, .. })));
    assert!(matches!(seen.last(), Some(Event::Answered)));
    // Again, by another process, with nobody to ask: everything is here.
    peer.handle.shutdown().await;
    let again = client.follow(&delivered.record.job, &[], &Events::none()).await.unwrap();
    assert_eq!(again.clip, delivered.clip);
}

#[tokio::test]
async fn a_receipt_for_something_else_is_disputed() {
    let home = Home::new();
    let mut peer = peer::start(12, Script { wrong_seed: true, ..Script::default() }).await;
    let client = client(&home).await;
    let error = client.generate(&ask(), &[way(&peer)], &Events::none()).await.unwrap_err();
    assert!(matches!(error, SessionError::Disputed { .. }), "{error}");
    assert!(error.to_string().contains("the receipt says seed 8, the job says 7"), "{error}");
    assert!(matches!(peer.answers.recv().await, Some(Verdict::Dispute { .. })));
    let node = peer.handle.local_node();
    assert!(client.store().experience(&node).is_avoided(kinoflock_client::now()), "it is remembered");
}

/// What becomes of a second job with a node that does as the script says.
async fn second_job_with(seed: u8, script: Script) -> SessionError {
    let home = Home::new();
    let peer = peer::start(seed, script).await;
    let client = client(&home).await;
    let first = client.generate(&ask(), &[way(&peer)], &Events::none()).await;
    if script.old_receipt {
        first.unwrap();
    }
    client.generate(&ask(), &[way(&peer)], &Events::none()).await.unwrap_err()
}

#[tokio::test]
async fn a_true_receipt_of_another_job_or_of_another_node_is_disputed() {
    let error = second_job_with(31, Script { old_receipt: true, ..Script::default() }).await;
    assert!(matches!(error, SessionError::Disputed { .. }), "{error}");
    let error = second_job_with(32, Script { borrowed_receipt: true, ..Script::default() }).await;
    assert!(matches!(error, SessionError::Disputed { .. }), "{error}");
}

#[tokio::test]
async fn a_node_that_answers_for_another_is_not_believed() {
    let error = second_job_with(33, Script { borrowed_advert: true, ..Script::default() }).await;
    assert!(error.to_string().contains("with the advert of"), "{error}");
    let error = second_job_with(34, Script { borrowed_quote: true, ..Script::default() }).await;
    assert!(matches!(&error, SessionError::NoTaker { .. }), "{error}");
    assert!(error.to_string().contains("signed by"), "{error}");
}

#[tokio::test]
async fn a_clip_of_another_shape_than_asked_is_disputed() {
    let home = Home::new();
    let mut peer = peer::start(13, Script::default()).await;
    let client = client(&home).await;
    let longer = Ask { length: Some(Length::Frames(25)), ..ask() };
    let error = client.generate(&longer, &[way(&peer)], &Events::none()).await.unwrap_err();
    assert!(error.to_string().contains("the clip has frames 17, the job asked for 25"), "{error}");
    assert!(matches!(peer.answers.recv().await, Some(Verdict::Dispute { .. })));
}

#[tokio::test]
async fn what_the_model_cannot_make_is_refused_here_with_the_nearest_that_it_can() {
    let home = Home::new();
    let peer = peer::start(14, Script::default()).await;
    let client = client(&home).await;
    let odd = Ask { length: Some(Length::Frames(20)), ..ask() };
    let error = client.submit(&odd, &[way(&peer)], &Events::none()).await.unwrap_err();
    assert!(error.to_string().contains("are 17 and 25") || error.to_string().contains("17"), "{error}");
    let odd = Ask { size: Some((70, 64)), ..ask() };
    let error = client.submit(&odd, &[way(&peer)], &Events::none()).await.unwrap_err();
    assert!(error.to_string().contains("64x64"), "{error}");
    let unknown = Ask { model: Some("motiv".to_owned()), ..ask() };
    let error = client.submit(&unknown, &[way(&peer)], &Events::none()).await.unwrap_err();
    assert!(error.to_string().contains("did you mean \"motif\"?"), "{error}");
    assert!(client.store().jobs().unwrap().is_empty(), "nothing was sent");
}

#[tokio::test]
async fn when_one_node_refuses_the_other_takes_it_and_when_all_do_each_reason_is_told() {
    let home = Home::new();
    let refusing = peer::start(15, Script { refuses: true, ..Script::default() }).await;
    let taking = peer::start(16, Script::default()).await;
    let client = client(&home).await;
    let ways = [way(&refusing), way(&taking)];
    let record = client.submit(&ask(), &ways, &Events::none()).await.unwrap();
    assert_eq!(record.node, taking.handle.local_node());
    let error = client.submit(&ask(), &ways[..1], &Events::none()).await.unwrap_err();
    assert!(error.to_string().contains("(rule max_frames): 17 is beyond the limit of 9"), "{error}");
    let mut command = home.command(&["generate", "x", "--node", &refusing.address()]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stderr));
}

/// Makes a clip with a first node, the quicker by its word, that does as `script` says, and a second one that is sound.
async fn handed_on(seed: u8, script: Script, stop_first: bool) -> (Peer, Peer, Vec<Event>) {
    let home = Home::new();
    let mut first = peer::start(seed, script).await;
    let second = peer::start(seed + 1, Script { eta_ms: 9000, ..Script::default() }).await;
    let client = client(&home).await;
    let (events, mut told) = Client::events();
    let ways = [way(&first), way(&second)];
    let record = client.submit(&ask(), &ways, &events).await.unwrap();
    assert_eq!(record.node, first.handle.local_node(), "it promised to be done sooner");
    if stop_first {
        first.handle.shutdown().await;
    }
    let delivered = client.follow(&record.job, &ways, &events).await.unwrap();
    assert_eq!(delivered.record.node, second.handle.local_node());
    assert_eq!((delivered.clip, delivered.record.job), (ClipId::of(CLIP), record.job), "the job is the same");
    let seen = client.store().experience(&record.node);
    assert!(seen.is_avoided(kinoflock_client::now()), "the first one is passed over for a while");
    let former = client.store().job(&record.job).unwrap().former;
    assert_eq!(former.iter().map(|former| former.node).collect::<Vec<_>>(), [record.node]);
    if !stop_first {
        assert_eq!(first.cancels.recv().await, Some(record.job), "it need not go on");
    }
    drop(events);
    let mut seen = Vec::new();
    while let Some(event) = told.recv().await {
        seen.push(event);
    }
    (first, second, seen)
}

fn moves(events: &[Event]) -> Vec<String> {
    events.iter().filter(|event| matches!(event, Event::Moved { .. })).map(ToString::to_string).collect()
}

#[tokio::test]
async fn a_job_that_fails_at_one_node_goes_to_another_and_one_line_says_so() {
    let (_, second, seen) = handed_on(21, Script { fails: true, ..Script::default() }, false).await;
    let moves = moves(&seen);
    assert_eq!(moves.len(), 1, "{moves:?}");
    let line = &moves[0];
    let taken = format!("(...{}) takes it from the beginning", second.handle.local_node().short());
    assert!(line.contains("device memory is full") && line.contains(&taken), "{line}");
    assert!(line.contains("will see your prompt and the frames"), "{line}");
}

#[tokio::test]
async fn a_job_that_failed_while_nobody_looked_goes_to_another_too() {
    let (_, _, seen) = handed_on(47, Script { failed: true, ..Script::default() }, false).await;
    let moves = moves(&seen);
    assert!(moves.len() == 1 && moves[0].contains("device memory is full"), "{moves:?}");
}

#[tokio::test]
async fn a_wrong_clip_is_disputed_and_the_job_done_by_another_node() {
    let (mut first, mut second, seen) =
        handed_on(23, Script { wrong_seed: true, ..Script::default() }, false).await;
    assert!(matches!(first.answers.recv().await, Some(Verdict::Dispute { .. })));
    assert_eq!(second.answers.recv().await, Some(Verdict::Accept), "one outcome is accepted");
    assert_eq!(moves(&seen).len(), 1);
}

#[tokio::test]
async fn a_job_whose_node_is_gone_goes_to_another_within_seconds() {
    let started = std::time::Instant::now();
    let (.., seen) = handed_on(25, Script { holds: true, ..Script::default() }, true).await;
    println!("handed on and done after {:?}", started.elapsed());
    assert_eq!(moves(&seen).len(), 1);
}

#[tokio::test]
async fn the_place_that_is_not_needed_is_given_back_with_its_reason() {
    let home = Home::new();
    let sooner = peer::start(27, Script::default()).await;
    let mut later = peer::start(28, Script { eta_ms: 41_000, ..Script::default() }).await;
    let client = client(&home).await;
    client.submit(&ask(), &[way(&sooner), way(&later)], &Events::none()).await.unwrap();
    let reason = later.releases.recv().await;
    // Both say when they would be done by clocks of their own, so a millisecond lies between them now and then.
    assert!(
        matches!(reason, Some(ReleaseReason::Sooner(Millis(39_900..=40_100)))),
        "one promised a second and the other 41: {reason:?}"
    );
}

#[tokio::test]
async fn a_job_for_one_named_node_goes_to_no_other() {
    let home = Home::new();
    let first = peer::start(29, Script { fails: true, ..Script::default() }).await;
    let other = peer::start(30, Script::default()).await;
    let client = client(&home).await;
    let pinned = Ask { pinned: true, ..ask() };
    let record = client.submit(&pinned, &[way(&first)], &Events::none()).await.unwrap();
    let error = client.follow(&record.job, &[way(&first), way(&other)], &Events::none()).await.unwrap_err();
    assert!(matches!(error, SessionError::Failed { .. }), "{error}");
}

#[tokio::test]
async fn a_node_that_moved_is_found_again_by_its_new_ticket() {
    let home = Home::new();
    let peer = peer::start(11, Script::default()).await;
    let client = client(&home).await;
    let record = client.submit(&ask(), &[way(&peer)], &Events::none()).await.unwrap();
    peer.handle.shutdown().await;
    let moved = peer::start(11, Script::default()).await;
    let gone = client.status(&record.job).await.unwrap_err();
    client.store().insert_ticket(&moved.address()).unwrap();
    let asked = client.status(&record.job).await.unwrap_err();
    assert!(matches!(gone, SessionError::Net(_)), "{gone:?}");
    assert!(matches!(asked, SessionError::Lost { .. }), "it was asked, and has forgotten: {asked:?}");
}

#[tokio::test]
async fn a_clock_that_is_an_hour_off_is_told_and_the_job_done_by_the_nodes_clock() {
    for ahead_ms in [3_600_000, -3_600_000] {
        let home = Home::new();
        let peer = peer::start(17, Script { ahead_ms, ..Script::default() }).await;
        let client = client(&home).await;
        let (events, mut told) = Client::events();
        client.submit(&ask(), &[way(&peer)], &events).await.unwrap();
        drop(events);
        let mut skew = None;
        while let Some(event) = told.recv().await {
            if let Event::ClockSkew { .. } = event {
                skew = Some(event.to_string());
            }
        }
        let skew = skew.unwrap();
        let which = if ahead_ms > 0 { "behind" } else { "ahead of" };
        assert!(skew.contains(which) && skew.contains("limit 5 min"), "{skew}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_saves_a_file_that_verifies_and_tells_of_failed_jobs() {
    let home = Home::new();
    std::fs::create_dir_all(home.path().join("keys")).unwrap();
    let good = peer::start(18, Script::default()).await;
    let run = |address: String, more: &'static [&'static str]| {
        let arguments =
            [&["generate", support::PROMPT, "--seed", "7", "--node", address.as_str()], more].concat();
        let mut command = home.command(&arguments);
        async move { tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap() }
    };
    kinoflock_client::keys::save(
        &home.path().join("keys").join("artist.key"),
        &kinoflock_client::keys::Seed::new([1; 32]),
    )
    .unwrap();
    let output = run(good.address(), &["-o", "clip.mp4"]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "clip.mp4\n", "data on standard output, words elsewhere");
    let words = text(&output.stderr);
    for line in ["will see your prompt and the frames", "seed 7", "step 4 of 4", "verified: 17 frames"] {
        assert!(words.contains(line), "{line:?} in {words}");
    }
    let file = std::fs::read(home.path().join("clip.mp4")).unwrap();
    assert_eq!(provenance::check(&file).unwrap().clip, ClipId::of(CLIP));

    let output = run(good.address(), &["--detach", "--json"]).await;
    let last = text(&output.stdout).lines().last().unwrap().to_owned();
    let record: serde_json::Value = serde_json::from_str(&last).unwrap();
    assert_eq!((record["schema"].as_u64(), record["event"].as_str()), (Some(1), Some("detached")));
    let job = record["job"].as_str().unwrap().to_owned();
    let mut wait = home.command(&["wait", &job[..16]]);
    let output = tokio::task::spawn_blocking(move || wait.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));

    let bad = peer::start(19, Script { fails: true, ..Script::default() }).await;
    let output = run(bad.address(), &[]).await;
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("(out_of_memory): device memory is full"),
        "{}",
        text(&output.stderr)
    );
}

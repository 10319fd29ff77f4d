//! Several nodes at once: a survey that sends nothing, and what is said when nobody takes a job.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "support/peer.rs"]
mod peer;
#[path = "support/home.rs"]
mod support;

use kinoflock_client::ask::Ask;
use kinoflock_client::route::experience::Fault;
use kinoflock_client::session::{Client, ClientOptions, Events, SessionError};
use kinoflock_client::store::Store;
use kinoflock_client::ticket::Way;
use kinoflock_protocol::Millis;
use kinoflock_protocol::rpc::ReleaseReason;
use peer::{Peer, Script};
use support::{Home, artist, network, text};

async fn client(home: &Home) -> Client {
    let store = Store::open(home.path().join("client")).unwrap();
    Client::start(ClientOptions::new(network()), artist(), store).await.unwrap()
}

fn ways(peers: &[&Peer]) -> Vec<Way> {
    peers.iter().map(|peer| peer.address().parse().unwrap()).collect()
}

fn ask() -> Ask {
    Ask { prompt: support::PROMPT.to_owned(), seed: Some(7), ..Ask::default() }
}

fn refusing() -> Script {
    Script { refuses: true, ..Script::default() }
}

#[tokio::test]
async fn a_survey_lists_who_could_by_what_is_to_be_expected_and_gives_every_place_back() {
    let home = Home::new();
    let mut late = peer::start(41, Script { eta_ms: 3000, ..Script::default() }).await;
    let mut true_to_its_word = peer::start(42, Script { eta_ms: 2500, ..Script::default() }).await;
    let mut wrong = peer::start(43, Script::default()).await;
    let no = peer::start(44, refusing()).await;
    let client = client(&home).await;
    let now = kinoflock_client::now();
    let mut seen = client.store().experience(&late.handle.local_node());
    (0..40).for_each(|_| seen.done(Millis(10_000), Millis(20_000), now));
    client.store().keep_experience(&late.handle.local_node(), &seen).unwrap();
    let mut seen = client.store().experience(&wrong.handle.local_node());
    seen.fault(Fault::WrongClip, now);
    client.store().keep_experience(&wrong.handle.local_node(), &seen).unwrap();

    let ways = ways(&[&late, &true_to_its_word, &wrong, &no]);
    let survey = client.survey(&ask(), &ways, &Events::none()).await.unwrap();
    let order: Vec<_> = survey.could.iter().map(|could| could.node).collect();
    let expected = [&true_to_its_word, &late, &wrong].map(|peer| peer.handle.local_node());
    assert_eq!(order, expected, "{:?}", survey.could);
    let [first, second, third] = &survey.could[..] else { panic!("three") };
    assert!(first.is_new && first.told == first.expected && !first.is_avoided);
    assert!(second.expected.0 > 5000 && second.told == Millis(3000), "{second:?}");
    assert!(second.jobs > 39.0 && second.reliability > 0.9 && !second.is_new);
    assert!(third.is_avoided && third.reliability < first.reliability);
    assert_eq!(first.compute, survey.work.millis_at(1000));
    assert_eq!((survey.declined.len(), survey.declined[0].node), (1, no.handle.local_node()));
    for peer in [&mut late, &mut true_to_its_word, &mut wrong] {
        assert_eq!(peer.releases.recv().await, Some(ReleaseReason::Cancelled));
    }
    assert!(client.store().jobs().unwrap().is_empty(), "nothing was handed over");
}

#[tokio::test]
async fn nodes_with_one_reason_are_told_together_with_what_would_help() {
    let home = Home::new();
    let peers = [peer::start(45, refusing()).await, peer::start(46, refusing()).await];
    let client = client(&home).await;
    let ways = ways(&[&peers[0], &peers[1]]);
    for error in [
        client.submit(&ask(), &ways, &Events::none()).await.unwrap_err(),
        client.survey(&ask(), &ways, &Events::none()).await.unwrap_err(),
    ] {
        assert!(matches!(error, SessionError::NoTaker { .. }), "{error}");
        let text = error.to_string();
        assert_eq!(text.matches("larger than this node takes").count(), 1, "{text}");
        assert!(text.contains("(2 nodes): larger than this node takes"), "{text}");
        let help = "what would help:\n  - with at most 9 frames instead of 17, 2 nodes could take it";
        assert!(text.contains(help), "{text}");
    }
    let alone = client.submit(&ask(), &ways[..1], &Events::none()).await.unwrap_err().to_string();
    assert_eq!(alone.lines().count(), 1, "one node's reason stays on the line: {alone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dry_run_of_the_command_is_a_table_for_people_and_records_for_programs() {
    let home = Home::new();
    let good = peer::start(47, Script::default()).await;
    let run = |address: String, more: &'static [&'static str]| {
        let arguments =
            [&["generate", support::PROMPT, "--dry-run", "--node", address.as_str()], more].concat();
        let mut command = home.command(&arguments);
        async move { tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap() }
    };
    let output = run(good.address(), &[]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let (table, words) = (text(&output.stdout), text(&output.stderr));
    let lines: Vec<_> = table.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("node"), "{table}");
    assert!(lines[1].starts_with("attic (...") && lines[1].contains("1.0 s"), "{table}");
    assert!(lines[1].ends_with("new to you"), "{table}");
    assert!(words.contains("17 frames of 64x64 in 4 steps with motif"), "{words}");
    assert!(words.contains("Neither your prompt nor any file was sent"), "{words}");

    let records = |output: &std::process::Output| -> Vec<serde_json::Value> {
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let output = run(good.address(), &["--json"]).await;
    let told = records(&output);
    let could = told.iter().find(|record| record["event"] == "could").unwrap();
    assert_eq!((could["told_ms"].as_u64(), could["is_new"].as_bool()), (Some(1000), Some(true)));
    let last = told.last().unwrap();
    assert_eq!((last["event"].as_str(), last["prompt_sent"].as_bool()), (Some("survey"), Some(false)));

    let bad = peer::start(48, refusing()).await;
    let output = run(bad.address(), &["--json"]).await;
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stderr));
    let error = records(&output).pop().unwrap();
    assert_eq!(error["reasons"][0]["rule"], "max_frames", "{error}");
    assert_eq!(
        (error["changes"][0]["change"].as_str(), error["changes"][0]["limit"].as_u64()),
        (Some("less"), Some(9))
    );
}

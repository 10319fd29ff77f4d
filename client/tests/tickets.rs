//! Tickets by the real command: joining by them, passing them on, and the collective that they invite to.
#![allow(clippy::unwrap_used, dead_code)]

#[path = "support/peer.rs"]
mod peer;
#[path = "support/home.rs"]
mod support;

use std::process::Output;

use kinoflock_client::ticket::{node_ticket, parse_addresses};
use kinoflock_protocol::names::NodeTicket;
use kinoflock_protocol::{CollectiveId, NetworkId};
use peer::{Peer, Script};
use support::{Home, network, text};

const COLLECTIVE: CollectiveId = CollectiveId::from_bytes([7; 32]);

fn ticket_for(peer: &Peer, network: NetworkId, collective: Option<CollectiveId>) -> String {
    let addresses = parse_addresses(&[peer.address()]);
    node_ticket(network, [(peer.handle.local_node(), addresses)], collective).unwrap().to_string()
}

async fn run(home: &Home, arguments: &[&str]) -> Output {
    let mut command = home.command(arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// The node that was given the job.
async fn chosen(home: &Home) -> String {
    let output = run(home, &["generate", support::PROMPT, "--seed", "7", "--detach", "--json"]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let records = text(&output.stdout);
    let records = records.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let chosen = records.into_iter().rfind(|record| record["event"] == "chosen").unwrap();
    chosen["node"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_collective_of_a_ticket_makes_its_nodes_first_though_others_are_sooner() {
    let home = Home::new();
    let own = Script { collective: Some(COLLECTIVE), eta_ms: 30_000, ..Script::default() };
    let (own, other) = (peer::start(61, own).await, peer::start(62, Script::default()).await);
    let names = (own.handle.local_node().to_string(), other.handle.local_node().to_string());
    let without = [ticket_for(&own, network(), None), ticket_for(&other, network(), None)];
    for ticket in &without {
        assert!(run(&home, &["join", ticket]).await.status.success());
    }
    assert_eq!(chosen(&home).await, names.1, "the sooner one");
    assert!(run(&home, &["join", &ticket_for(&own, network(), Some(COLLECTIVE))]).await.status.success());
    assert_eq!(chosen(&home).await, names.0, "the collective's");
    let elsewhere = CollectiveId::from_bytes([8; 32]);
    std::fs::write(home.path().join("config.toml"), format!("collective = \"{elsewhere}\"\n")).unwrap();
    assert_eq!(chosen(&home).await, names.1, "what is configured goes before what a ticket says");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artist_passes_the_way_in_on() {
    let home = Home::new();
    let output = home.kinoflock(&["ticket"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("kinoflock join TICKET"), "{}", text(&output.stderr));
    let peer = peer::start(63, Script::default()).await;
    assert!(run(&home, &["join", &ticket_for(&peer, network(), Some(COLLECTIVE))]).await.status.success());
    let output = home.kinoflock(&["ticket"]);
    let line = text(&output.stdout);
    let passed_on: NodeTicket = line.parse().unwrap();
    assert_eq!((passed_on.network, passed_on.collective), (network(), Some(COLLECTIVE)));
    let other = Home::new();
    for arguments in [&["nodes", "--node"][..], &["models", "--node"], &["join"]] {
        let output = run(&other, &[arguments, &[line.trim()]].concat()).await;
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    }
    assert!(text(&run(&other, &["nodes"]).await.stdout).contains(&peer.handle.local_node().to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_of_another_network_is_refused_wherever_a_node_is_named() {
    let home = Home::new();
    let peer = peer::start(64, Script::default()).await;
    let ticket = ticket_for(&peer, NetworkId::named("another"), None);
    for arguments in
        [&["generate", "x", "--node"][..], &["nodes", "--node"], &["models", "--node"], &["join"]]
    {
        let output = run(&home, &[arguments, &[&ticket]].concat()).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("leads to network"), "{}", text(&output.stderr));
    }
}

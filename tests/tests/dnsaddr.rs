//! Lists of nodes in DNS: node and artist find the network by a name, with a real name server on loopback.
#![allow(clippy::unwrap_used)]

use kinoflock_protocol::Keypair;
use kinoflock_tests::dns::NameServer;
use kinoflock_tests::sandbox::{Sandbox, Worker, eventually, said};

const PROMPT: &str = "a red kite over the dunes";

#[test]
fn a_node_and_an_artist_find_the_network_by_a_name() {
    let names = NameServer::start();
    let mut sandbox = Sandbox::new();
    let first = sandbox.add(&Worker::test(&[]), "").address("tcp");
    let gone = format!("/ip4/127.0.0.1/tcp/1/p2p/{}", Keypair::from_seed(&[3; 32]).node_id());
    names.list("net.example", [gone.as_str(), "/dnsaddr/more.example", "/dnsaddr/net.example"]);
    names.list("more.example", [&first]);
    let resolver = format!("resolver = \"{}\"\n", names.address);
    sandbox.add_prepared(&Worker::test(&[]), "", |node| {
        node.set_network(&format!("bootstrap = [\"/dnsaddr/net.example\"]\n{resolver}"));
    });
    for node in &sandbox.nodes {
        eventually("the two know each other", || (node.known() == 1).then_some(()));
    }
    let client = sandbox.client("artist");
    client.configure(&resolver);
    let nodes = client.must(["nodes", "--node", "/dnsaddr/net.example"]);
    assert!(nodes.contains(&sandbox.nodes[0].local().node_id.to_string()), "{nodes}");
    client.must(["join", "/dnsaddr/net.example"]);
    client.must(["generate", PROMPT, "-o", "clip.mp4", "--steps", "3"]);
}

#[test]
fn a_list_that_is_not_there_or_names_no_node_is_told() {
    let names = NameServer::start();
    names.list("empty.example", ["nonsense"]);
    let sandbox = Sandbox::new();
    let client = sandbox.client("artist");
    let resolver = format!("resolver = \"{}\"\n", names.address);
    client.configure(&resolver);
    for (host, why) in [("none.example", "cannot look up"), ("empty.example", "name no address")] {
        let output = client.run(["nodes", "--node", &format!("/dnsaddr/{host}")]);
        assert_eq!(output.status.code(), Some(4), "{}", said(&output));
        assert!(said(&output).contains(why), "{}", said(&output));
    }
}

//! A network that is larger than what one node is to hear: adverts stay in their slices, and a model that one node alone
//! serves is found from any other.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use kinoflock_net::Slice;
use kinoflock_protocol::capacity::Capacity;
use kinoflock_protocol::limits::MAX_NODES;
use kinoflock_protocol::rpc::{FindNodes, Request, Response};
use kinoflock_protocol::{ModelId, NodeId};
use kinoflock_tests::invariants;
use kinoflock_tests::requester::{Requester, model_of};
use kinoflock_tests::sandbox::{Node, Sandbox, Worker, eventually};

const NODES: usize = 12;
/// A slice must be too large for a minute, and adverts that were heard before live for another one.
const PATIENCE: Duration = Duration::from_secs(400);

/// The nodes that a node names for a model.
async fn named(
    artist: &Requester,
    node: &Node,
    model: ModelId,
    forward: bool,
    sandbox: &Sandbox,
) -> Vec<NodeId> {
    let question = FindNodes { model: Some(model), shape: None, limit: MAX_NODES as u32, forward };
    let Response::Nodes(adverts) = artist.ask(node, Request::FindNodes(question)).await else {
        return Vec::new();
    };
    let open = |advert: &kinoflock_protocol::Envelope| advert.open::<Capacity>(&sandbox.network()).unwrap();
    adverts.iter().map(|advert| NodeId::from(open(advert).signer)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_one_node_serves_is_found_though_its_adverts_do_not_reach_everybody() {
    let mut sandbox = Sandbox::new();
    let mut first = None;
    for number in 0..NODES {
        // All but the first serve nothing that exists.
        let config = if number == 0 { "" } else { "[policy]\nmodels = [\"no-such-model\"]\n" };
        sandbox.begin(&Worker::test(&[]), config, |node| {
            node.log_only("info");
            let bootstrap = first.iter().map(|address| format!("bootstrap = [\"{address}\"]\n"));
            node.set_network(&(bootstrap.collect::<String>() + "slice = 2"));
        });
        if number == 0 {
            sandbox.nodes[0].ready();
            first = Some(sandbox.nodes[0].address("udp"));
        }
    }
    for node in &sandbox.nodes {
        eventually("it tells where it is", || node.path("run/node.json").exists().then_some(()));
    }
    let (artist, began) = (Requester::new(&sandbox).await, Instant::now());
    let (model, maker) = (model_of(&sandbox.nodes[0]), sandbox.nodes[0].local().node_id);
    let elsewhere = |node: &&Node| Slice::of(&node.local().node_id, 1) != Slice::of(&maker, 1);
    let far = sandbox.nodes.iter().find(elsewhere).expect("of twelve one is in the other half");
    while !named(&artist, far, model, false, &sandbox).await.is_empty()
        || !far.log().contains("adverts stay in this slice")
    {
        assert!(began.elapsed() < PATIENCE, "the node of the other half still hears of it");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    while named(&artist, far, model, true, &sandbox).await != [maker] {
        assert!(began.elapsed() < PATIENCE, "the node of the other half does not find it");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let client = sandbox.client("artist");
    client.must(["join", &far.ticket()]);
    let model = model.to_string();
    client.must(["generate", "two cranes", "--model", &model, "--steps", "3", "-o", "clip.mp4"]);
    invariants::delivered(&client.path("clip.mp4"), &sandbox.nodes[0]);
}

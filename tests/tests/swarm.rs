//! Networks of three and of thirty: nodes come in any order, go, and come back elsewhere, and the others find them.
#![allow(clippy::unwrap_used)]

use std::net::{TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use kinoflock_node::identity::Identity;
use kinoflock_protocol::NodeId;
use kinoflock_protocol::capacity::Capacity;
use kinoflock_protocol::limits::MAX_NODES;
use kinoflock_protocol::rpc::{FindNodes, Request, Response};
use kinoflock_tests::invariants;
use kinoflock_tests::requester::Requester;
use kinoflock_tests::sandbox::{Client, Node, PATIENCE, Sandbox, Worker, said};

const PROMPT: &str = "three herons on one wire";
/// Within this the others must have found each other again, on a machine that has much else to do. What was measured is
/// printed; on an idle one it is two or three seconds.
const RECOVERY: Duration = Duration::from_secs(10);
const THIRTY: usize = 30;

/// A node's key and ports, chosen before it starts, so that others may be told of it.
struct Place {
    id: NodeId,
    ports: [u16; 2],
}

impl Place {
    fn of(sandbox: &Sandbox, number: usize) -> Self {
        let state = sandbox.path(&format!("node-{number}")).join("state");
        Self { id: Identity::load_or_create(&state).unwrap().node_id(), ports: free_ports() }
    }

    fn listen(&self) -> [String; 2] {
        let [udp, tcp] = self.ports;
        [format!("/ip4/127.0.0.1/udp/{udp}/quic-v1"), format!("/ip4/127.0.0.1/tcp/{tcp}")]
    }

    fn named(&self) -> String {
        format!("{:?}", format!("{}/p2p/{}", self.listen()[0], self.id))
    }

    /// Gives a node this place, and these others to begin with.
    fn give(&self, node: &mut Node, others: &[&Self]) {
        node.listen_on(&self.listen().each_ref().map(String::as_str));
        let others: Vec<_> = others.iter().map(|place| place.named()).collect();
        node.set_network(&format!("bootstrap = [{}]", others.join(", ")));
    }
}

/// Ports that nobody has, below those that systems give to whoever asks for any: no connection takes one meanwhile.
fn free_ports() -> [u16; 2] {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + (std::process::id() % 5_000) as u16;
    let mut free = (0..10_000).map(|_| first + NEXT.fetch_add(1, Ordering::Relaxed) % 7_000).filter(|port| {
        UdpSocket::bind(("127.0.0.1", *port)).is_ok() && TcpListener::bind(("127.0.0.1", *port)).is_ok()
    });
    [free.next().unwrap(), free.next().unwrap()]
}

/// Three nodes, each told of the two others, and each started when the earlier ones were running already.
fn three(sandbox: &mut Sandbox) -> [Place; 3] {
    let places = [0, 1, 2].map(|number| Place::of(sandbox, number));
    for place in &places {
        let others: Vec<_> = places.iter().filter(|other| other.id != place.id).collect();
        sandbox.add_prepared(&Worker::test(&[]), "", |node| {
            place.give(node, &others);
        });
    }
    places
}

/// The nodes that a node tells of, each with its first address.
async fn told(artist: &Requester, node: &Node, sandbox: &Sandbox) -> Vec<(NodeId, String)> {
    let question = FindNodes { model: None, shape: None, limit: MAX_NODES as u32, forward: false };
    let Response::Nodes(adverts) = artist.ask(node, Request::FindNodes(question)).await else {
        return Vec::new();
    };
    let told = adverts.iter().map(|advert| {
        let opened = advert.open::<Capacity>(&sandbox.network()).unwrap();
        (NodeId::from(opened.signer), opened.value.addresses[0].to_string())
    });
    told.collect()
}

/// Waits until each of these nodes tells of all of them where they are now; how long that took.
#[expect(clippy::print_stderr, reason = "what was measured is the result of the test")]
async fn found_each_other(sandbox: &Sandbox, nodes: &[usize], what: &str) -> Duration {
    let (artist, began) = (Requester::new(sandbox).await, Instant::now());
    for number in nodes {
        let node = &sandbox.nodes[*number];
        loop {
            let told = told(&artist, node, sandbox).await;
            let is_told = |other: &Node| {
                let local = other.local();
                told.iter().any(|(id, addr)| *id == local.node_id && local.addresses.contains(addr))
            };
            if nodes.iter().all(|other| is_told(&sandbox.nodes[*other])) {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "{what}: node {number} knows {told:?} only");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    eprintln!("{what}: found each other after {:?}", began.elapsed());
    began.elapsed()
}

/// A clip from any of these nodes, for somebody who was told of one of them.
fn clip_by_any(client: &Client, nodes: &[&Node]) {
    let output = client.run(["generate", PROMPT, "-o", "clip.mp4", "--steps", "3"]);
    assert!(output.status.success(), "{}", said(&output));
    let bytes = std::fs::read(client.path("clip.mp4")).unwrap();
    let maker = kinoflock_client::provenance::check(&bytes).unwrap().receipt.receipt().node;
    let maker = nodes.iter().find(|node| node.local().node_id == maker).expect("one of them made it");
    invariants::delivered(&client.path("clip.mp4"), maker);
    std::fs::remove_file(client.path("clip.mp4")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_three_nodes_any_one_may_go_and_come_back_elsewhere() {
    let mut sandbox = Sandbox::new();
    let places = three(&mut sandbox);
    found_each_other(&sandbox, &[0, 1, 2], "three that started one after the other").await;
    for gone in 0..3 {
        let (left, right) = ((gone + 1) % 3, (gone + 2) % 3);
        sandbox.nodes[gone].kill();
        let client = sandbox.client(&format!("artist-{gone}"));
        client.must(["join", &sandbox.nodes[left].ticket()]);
        clip_by_any(&client, &[&sandbox.nodes[left], &sandbox.nodes[right]]);
        let took = found_each_other(&sandbox, &[left, right], "the two that were left").await;
        assert!(took < RECOVERY, "{took:?}");
        // It comes back at other ports: what the others were told of it is wrong now.
        let elsewhere = Place { id: places[gone].id, ports: free_ports() };
        elsewhere.give(&mut sandbox.nodes[gone], &[&places[left], &places[right]]);
        sandbox.nodes[gone].start();
        sandbox.nodes[gone].ready();
        let took = found_each_other(&sandbox, &[0, 1, 2], "one that came back elsewhere").await;
        assert!(took < RECOVERY, "{took:?}");
        clip_by_any(&client, &[&sandbox.nodes[0], &sandbox.nodes[1], &sandbox.nodes[2]]);
    }
    sandbox.nodes.iter().for_each(|node| invariants::discreet(node, PROMPT));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_restart_at_once_find_each_other_by_those_they_met_before() {
    let mut sandbox = Sandbox::new();
    let places = three(&mut sandbox);
    found_each_other(&sandbox, &[0, 1, 2], "three").await;
    for number in [0, 1] {
        sandbox.nodes[number].kill();
        // Nobody is named to it any more.
        let elsewhere = Place { id: places[number].id, ports: free_ports() };
        elsewhere.give(&mut sandbox.nodes[number], &[]);
    }
    for number in [0, 1] {
        sandbox.nodes[number].start();
    }
    for number in [0, 1] {
        sandbox.nodes[number].ready();
    }
    let took = found_each_other(&sandbox, &[0, 1, 2], "two that restarted without anybody named").await;
    assert!(took < RECOVERY, "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_was_here_once_comes_back_without_the_node_it_was_told_of() {
    let mut sandbox = Sandbox::new();
    three(&mut sandbox);
    found_each_other(&sandbox, &[0, 1, 2], "three").await;
    let client = sandbox.client("artist");
    client.must(["join", &sandbox.nodes[0].ticket()]);
    clip_by_any(&client, &[&sandbox.nodes[0], &sandbox.nodes[1], &sandbox.nodes[2]]);
    sandbox.nodes[0].kill();
    clip_by_any(&client, &[&sandbox.nodes[1], &sandbox.nodes[2]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_nodes_know_each_other_and_a_client_finds_them_by_one() {
    let mut sandbox = Sandbox::new();
    let first = Place::of(&sandbox, 0);
    for number in 0..THIRTY {
        sandbox.begin(&Worker::test(&[]), "", |node| {
            node.log_only("warn");
            if number == 0 {
                first.give(node, &[]);
            } else {
                node.set_network(&format!("bootstrap = [{}]", first.named()));
            }
        });
    }
    sandbox.nodes.iter_mut().for_each(Node::ready);
    let knows = |node: &Node| {
        let metrics = node.metrics();
        let line = metrics.lines().find_map(|line| line.strip_prefix("kinoflock_known_nodes "));
        line.and_then(|count| count.parse::<usize>().ok()).unwrap_or(0)
    };
    let began = Instant::now();
    for node in &sandbox.nodes {
        while knows(node) < THIRTY - 1 {
            assert!(began.elapsed() < PATIENCE, "one knows {} only", knows(node));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let client = sandbox.client("artist");
    client.must(["join", &sandbox.nodes[THIRTY - 1].ticket()]);
    clip_by_any(&client, &sandbox.nodes.iter().collect::<Vec<_>>());
}

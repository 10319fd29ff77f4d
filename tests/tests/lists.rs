//! Signed lists with real processes: published by an artist, held by a node, gone by for another artist.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use kinoflock_client::keys;
use kinoflock_net::NetConfig;
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::list::{ListKind, ListName, NodeList};
use kinoflock_protocol::names::NodeTicket;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::{Envelope, Keypair, Millis, NetworkId, NodeId};
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually};

/// A client's own key.
fn key_of(client: &Client) -> Keypair {
    let path = client.path(".local").join("share").join("kinoflock").join("keys").join("artist.key");
    keys::load(&path).unwrap()
}

fn list_of(key: &Keypair, kind: ListKind) -> ListName {
    ListName { publisher: key.public(), kind }
}

/// A node that holds these lists, and knows nobody.
fn holder<'a>(sandbox: &'a mut Sandbox, lists: &[ListName]) -> &'a Node {
    let names: Vec<String> = lists.iter().map(ToString::to_string).collect();
    sandbox.add_prepared(&Worker::test(&[]), "", |node| node.set_network(&format!("lists = {names:?}\n")))
}

fn write(client: &Client, file: &str, text: &str) {
    std::fs::write(client.path(file), text).unwrap();
}

fn ids(told: &str) -> Vec<NodeId> {
    told.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

#[test]
fn with_a_lists_name_and_one_node_that_holds_it_an_artist_finds_the_listed_nodes_and_models() {
    let mut sandbox = Sandbox::new();
    let publisher = sandbox.client("publisher");
    let key = key_of(&publisher);
    let lists = [ListKind::Nodes, ListKind::Models].map(|kind| list_of(&key, kind));
    holder(&mut sandbox, &lists);
    // It knows nobody, and nobody knows it, but for the list.
    let alone = sandbox.add(&Worker::test(&[]), "").local().node_id;
    let (holder, other) = (&sandbox.nodes[0], &sandbox.nodes[1]);
    assert_eq!((holder.known(), other.known()), (0, 0));
    let models = publisher.must(["models", "--node", &other.ticket()]);
    let model = models.split_whitespace().last().unwrap();
    write(&publisher, "nodes.toml", &format!("name = \"reef\"\nnodes = [{:?}]\n", other.ticket()));
    let listed =
        format!("name = \"looked into\"\n[[models]]\nmodel = {model:?}\nname = \"Motif the small\"\n");
    write(
        &publisher,
        "models.toml",
        &format!("{listed}licence = \"CC0\"\nsource = \"https://reef.example\"\n"),
    );
    for (kind, list) in [("nodes", lists[0]), ("models", lists[1])] {
        let file = format!("{kind}.toml");
        let name = publisher.must(["list", "publish", "--kind", kind, &file, "--node", &holder.ticket()]);
        assert_eq!(name, list.to_string());
    }
    let artist = sandbox.client("artist");
    artist.must(["join", &holder.ticket()]);
    for list in &lists {
        artist.must(["list", "add", &list.to_string()]);
    }
    let found = ids(&artist.must(["nodes"]));
    assert!(found.contains(&alone), "{found:?}");
    let models = artist.must(["models"]);
    assert!(models.contains("\"looked into\" as Motif the small, CC0"), "{models}");
    let shown = artist.must(["list", "show", &lists[0].to_string()]);
    assert!(shown.contains("reef") && shown.contains(&alone.to_string()), "{shown}");
    // What a list says outlives the node that handed it over, and the subscription goes as it came.
    sandbox.nodes[0].kill();
    assert!(ids(&artist.must(["nodes"])).contains(&alone));
    artist.must(["list", "remove", &lists[0].to_string()]);
    assert!(!artist.must(["list", "show"]).contains(&lists[0].to_string()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_hand_lists_on_and_keep_them_and_are_led_to_nodes_by_them() {
    let mut sandbox = Sandbox::new();
    let publisher = sandbox.client("publisher");
    let list = list_of(&key_of(&publisher), ListKind::Nodes);
    let first = holder(&mut sandbox, &[list]).address("tcp");
    sandbox.add(&Worker::test(&[]), "");
    let other = &sandbox.nodes[1];
    write(&publisher, "nodes.toml", &format!("name = \"reef\"\nnodes = [{:?}]\n", other.ticket()));
    publisher.must([
        "list",
        "publish",
        "--kind",
        "nodes",
        "nodes.toml",
        "--node",
        &sandbox.nodes[0].ticket(),
    ]);
    eventually("the holder is led to the listed node", || (sandbox.nodes[0].known() == 1).then_some(()));
    sandbox.nodes[0].kill();
    sandbox.nodes[0].start();
    sandbox.nodes[0].ready();
    let second = format!("bootstrap = [{first:?}]\nlists = [\"{list}\"]\n");
    sandbox.add_prepared(&Worker::test(&[]), "", |node| node.set_network(&second));
    let path = sandbox.nodes[2].path("state").join("lists").join(list.to_string());
    eventually("the second holder has it from the first, which restarted", || path.exists().then_some(()));
    let (net, _events) = kinoflock_net::start(NetConfig::client(sandbox.network())).await.unwrap();
    let second = net.dial(sandbox.nodes[2].address("tcp").parse().unwrap()).await.unwrap();
    let told = net.request(second, Request::List(list)).await.unwrap();
    assert!(matches!(&told, Response::List(edition) if ListName::of(edition) == Some(list)), "{told:?}");
    net.shutdown().await;
}

/// An edition signed by this key.
fn edition(key: &Keypair, network: NetworkId, sequence: u64, listed: &Node) -> Envelope {
    let ticket: NodeTicket = listed.ticket().parse().unwrap();
    let now = kinoflock_client::now();
    let list = NodeList {
        name: Text::new("reef").unwrap(),
        sequence,
        issued_at: now,
        expires_at: now.plus(Millis(3_600_000)),
        nodes: List::first_of(ticket.nodes.iter().cloned()),
        addresses: List::default(),
    };
    Envelope::seal(key, &network, &list).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_older_or_foreign_list_is_refused_by_whoever_holds_it() {
    let mut sandbox = Sandbox::new();
    let key = Keypair::from_seed(&[31; 32]);
    let list = list_of(&key, ListKind::Nodes);
    holder(&mut sandbox, &[list]);
    let (node, network) = (&sandbox.nodes[0], sandbox.network());
    let net = kinoflock_net::start(NetConfig::client(network)).await.unwrap();
    let at = net.0.dial(node.address("tcp").parse().unwrap()).await.unwrap();
    let publish = async |edition: &Envelope| match net.0.request(at, Request::Publish(edition.clone())).await
    {
        Ok(Response::Acknowledged) => "taken".to_owned(),
        Ok(Response::Error { code, .. }) => code.to_string(),
        other => panic!("{other:?}"),
    };
    let held = async || match net.0.request(at, Request::List(list)).await {
        Ok(Response::List(edition)) => Some(edition),
        Ok(Response::Error { .. }) => None,
        other => panic!("{other:?}"),
    };
    assert_eq!(held().await, None);
    let fifth = edition(&key, network, 5, node);
    assert_eq!(publish(&fifth).await, "taken");
    assert_eq!(publish(&edition(&key, network, 4, node)).await, "older");
    let foreign = edition(&key, NetworkId::named("another"), 6, node);
    assert_ne!(publish(&foreign).await, "taken");
    let mut forged = edition(&Keypair::from_seed(&[32; 32]), network, 6, node);
    assert_eq!(publish(&forged).await, "not_subscribed");
    forged.signer = key.public();
    assert_ne!(publish(&forged).await, "taken");
    assert_eq!(held().await, Some(fifth), "the newest true edition");
    let sixth = edition(&key, network, 6, node);
    assert_eq!(publish(&sixth).await, "taken");
    assert_eq!(held().await, Some(sixth));
    let path = Path::new("lists").join(list.to_string());
    eventually("it is on disk", || node.path("state").join(&path).exists().then_some(()));
    net.0.shutdown().await;
}

//! Starting, dialing and ending.

use kinoflock_net::{NetConfig, NetError, NetEvent, start};
use kinoflock_protocol::Keypair;
use kinoflock_protocol::rpc::Request;

use crate::support::{Over, client_of, fresh_key, network, node, node_config, over_both, patient, peer};

over_both! {
    an_address_in_use_is_named => port_in_use;
    a_dial_to_the_wrong_node_says_who_is_there => wrong_node;
    a_port_where_nobody_listens_is_told => nobody_there;
    a_shutdown_is_seen_by_the_peer_and_ends_the_handle => shutdown;
    a_connection_that_was_lost_is_made_again_by_the_next_request => reconnected;
    a_node_that_came_back_before_its_end_was_seen_is_met_anew => came_back;
    a_blocked_node_is_not_connected_to => blocked;
}

async fn port_in_use(over: Over) {
    let first = node(over).await;
    let taken = first.net.listen_addrs()[0].clone();
    let second = start(NetConfig { listen: vec![taken.clone()], ..node_config(over) }).await;
    match second.map(|_| ()).unwrap_err() {
        NetError::Listen { addr, .. } => assert_eq!(addr, taken),
        other => panic!("got {other}"),
    }
}

async fn wrong_node(over: Over) {
    let node = node(over).await;
    let other = fresh_key().node_id();
    let client = peer(NetConfig::client(network())).await;
    let error = client.net.connect(other, node.net.listen_addrs()).await.unwrap_err();
    assert!(
        matches!(&error, NetError::Dial { why, .. } if why.contains(&node.id().to_string())),
        "got {error}"
    );
}

async fn nobody_there(over: Over) {
    let gone = node(over).await;
    let addr = gone.addr();
    gone.net.shutdown().await;
    let client = peer(NetConfig::client(network())).await;
    let error = patient(client.net.dial(addr)).await.unwrap_err();
    assert!(matches!(error, NetError::Dial { .. }), "got {error}");
    let error = client.net.request(fresh_key().node_id(), Request::Capacity).await.unwrap_err();
    assert!(matches!(error, NetError::NoAddress { .. }), "got {error}");
}

async fn shutdown(over: Over) {
    let node = node(over).await;
    let mut client = client_of(&node).await;
    node.net.shutdown().await;
    let gone = node.id();
    client
        .wait_for(|event| matches!(event, NetEvent::Disconnected { node } if node == gone).then_some(()))
        .await;
    let error = node.net.dial(node.net.dialable_addrs()[0].clone()).await.unwrap_err();
    assert!(matches!(error, NetError::Closed), "got {error}");
}

async fn reconnected(over: Over) {
    let node = node(over).await;
    let mut client = client_of(&node).await;
    let id = node.id();
    let _node = node.acknowledging();
    crate::support::acknowledged(&client.net, id).await;
    client.net.disconnect(id).await.unwrap();
    client.wait_for(|event| matches!(event, NetEvent::Disconnected { .. }).then_some(())).await;
    crate::support::acknowledged(&client.net, id).await;
}

async fn came_back(over: Over) {
    let mut other = node(over).await;
    let seed = *blake3::hash(format!("{over:?} comes back").as_bytes()).as_bytes();
    let life = |listen| NetConfig {
        listen,
        gossip: false,
        kad: kinoflock_net::KadRole::Off,
        ..NetConfig::node(Keypair::from_seed(&seed), network(), 0)
    };
    let before = peer(life(Vec::new())).await;
    before.net.dial(other.addr()).await.unwrap();
    let id = before.id();
    other
        .wait_for(|event| matches!(event, NetEvent::Identified(info) if info.node == id).then_some(()))
        .await;
    // The life before is not over as far as its connection tells.
    let after = peer(life(vec![over.listen()])).await;
    after.net.dial(other.addr()).await.unwrap();
    other
        .wait_for(|event| matches!(event, NetEvent::Disconnected { node } if node == id).then_some(()))
        .await;
    other
        .wait_for(|event| matches!(event, NetEvent::Connected { node, .. } if node == id).then_some(()))
        .await;
    let met = other.wait_for(|event| match event {
        NetEvent::Identified(info) if info.node == id => Some(info),
        _ => None,
    });
    assert_eq!(met.await.listen_addrs, after.net.listen_addrs());
    let _after = after.acknowledging();
    crate::support::acknowledged(&other.net, id).await;
}

async fn blocked(over: Over) {
    let node = node(over).await;
    let client = peer(NetConfig::client(network())).await;
    client.net.set_blocked(node.id(), true).await.unwrap();
    let error = client.net.dial(node.addr()).await.unwrap_err();
    assert!(matches!(error, NetError::Dial { .. }), "got {error}");
    client.net.set_blocked(node.id(), false).await.unwrap();
    client.net.dial(node.addr()).await.unwrap();
}

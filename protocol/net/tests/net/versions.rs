//! Two versions, two networks, and strangers: each is told what the other is.

use futures::{AsyncReadExt, AsyncWriteExt};
use kinoflock_net::{NetConfig, NetError, NetEvent};
use kinoflock_protocol::NetworkId;
use kinoflock_protocol::frame;
use kinoflock_protocol::limits::{MAX_CONTROL_FRAME, PROTOCOL_VERSION};
use kinoflock_protocol::names::Protocols;
use kinoflock_protocol::rpc::{Request, Response, decode_response};

use crate::support::{Over, Peer, Raw, network, node, node_config, over_both, peer, query};

over_both! {
    two_versions_tell_each_other_so => two_versions;
    another_network_is_named_as_such => two_networks;
    a_frame_of_another_version_is_answered_with_both_versions => frame_version;
    agent_and_versions_of_a_peer_are_exposed => exposed;
}

async fn two_versions(over: Over) {
    let newer = PROTOCOL_VERSION + 1;
    let mut old = node(over).await;
    let mut new = peer(NetConfig { version: newer, ..node_config(over) }).await;
    let (old_id, new_id) = (old.id(), new.id());
    old.net.dial(new.addr()).await.unwrap();
    let error = old.net.request(new_id, Request::Capacity).await.unwrap_err();
    assert!(
        matches!(&error, NetError::PeerSpeaks { speaks, ours, node }
            if speaks == &[newer] && *ours == PROTOCOL_VERSION && *node == new_id),
        "got {error}"
    );
    let error = new.net.request(old_id, Request::Capacity).await.unwrap_err();
    assert!(
        matches!(&error, NetError::PeerSpeaks { speaks, ours, .. }
            if speaks == &[PROTOCOL_VERSION] && *ours == newer),
        "got {error}"
    );
    let error = old.net.open_progress(new_id, query(new_id), 0).await.unwrap_err();
    assert!(matches!(error, NetError::PeerSpeaks { .. }), "got {error}");
    async fn told(peer: &mut Peer) -> (Vec<u8>, u8) {
        peer.wait_for(|event| match event {
            NetEvent::OtherVersion { speaks, ours, .. } => Some((speaks, ours)),
            _ => None,
        })
        .await
    }
    assert_eq!(told(&mut old).await, (vec![newer], PROTOCOL_VERSION));
    assert_eq!(told(&mut new).await, (vec![PROTOCOL_VERSION], newer));
}

async fn two_networks(over: Over) {
    let ours = node(over).await;
    let theirs = peer(NetConfig { network: NetworkId::named("another"), ..node_config(over) }).await;
    ours.net.dial(theirs.addr()).await.unwrap();
    let error = ours.net.request(theirs.id(), Request::Capacity).await.unwrap_err();
    assert!(matches!(error, NetError::OtherNetwork { .. }), "got {error}");
}

async fn frame_version(over: Over) {
    let node = node(over).await;
    let raw = Raw::connect(&node.addr()).await;
    let names = Protocols::of(&network());
    for protocol in [&names.control, &names.progress, &names.blobs] {
        let mut stream = raw.open(protocol).await.unwrap();
        stream.write_all(&frame::frame(&[9, 1, 2, 3], MAX_CONTROL_FRAME).unwrap()).await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let response = decode_response(&answer[4..]).unwrap();
        assert_eq!(
            response,
            Response::UnsupportedVersion { speaks: PROTOCOL_VERSION, sent: 9 },
            "{protocol}"
        );
    }
}

async fn exposed(over: Over) {
    let node = peer(NetConfig { agent: "kinoflockd/0.1.0".into(), ..node_config(over) }).await;
    let client = crate::support::client_of(&node).await;
    let info = client.net.peer_info(node.id()).await.unwrap();
    assert_eq!(info.agent, "kinoflockd/0.1.0");
    assert_eq!(info.versions, [PROTOCOL_VERSION]);
    assert_eq!(info.protocol_version, Protocols::of(&network()).identify);
    assert!(!info.other_network);
    assert!(!info.listen_addrs.is_empty());
}

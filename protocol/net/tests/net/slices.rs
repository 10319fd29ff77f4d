//! Adverts that stay in their slice, and the DHT that says who has something.

use std::collections::BTreeSet;

use kinoflock_net::discovery::{Published, Verdict};
use kinoflock_net::{Identity, KadRole, NetConfig, NetError, NetEvent, Slice};
use kinoflock_protocol::{BlobId, Keypair};

use crate::support::{Over, Peer, fresh_key, node, node_config, over_both, peer};

over_both! {
    adverts_reach_their_own_slice_and_no_other => own_slice;
    whoever_provides_a_key_is_found_by_those_who_never_met_it => providers;
    without_its_role_a_slice_or_a_key_is_refused => roles_off;
}

/// A key of one half of the network.
fn key_of_half(of: &Keypair, same: bool) -> Keypair {
    let half = Slice::of(&of.node_id(), 1);
    loop {
        let key = fresh_key();
        if (Slice::of(&key.node_id(), 1) == half) == same {
            return key;
        }
    }
}

async fn gossiper(over: Over, key: Keypair) -> Peer {
    peer(NetConfig { gossip: true, identity: Identity::Key(key), ..node_config(over) }).await
}

async fn publish(peer: &Peer, bytes: &[u8]) {
    while peer.net.publish_advert(bytes.to_vec()).await.unwrap() == Published::NobodyListens {
        tokio::task::yield_now().await;
    }
}

async fn next(peer: &mut Peer) -> Vec<u8> {
    let advert = peer.wait_for(|event| match event {
        NetEvent::Advert(advert) => Some(advert),
        _ => None,
    });
    let advert = advert.await;
    let bytes = advert.bytes.clone();
    advert.judge(Verdict::Accept);
    bytes
}

async fn own_slice(over: Over) {
    let key = fresh_key();
    let (same, other) = (key_of_half(&key, true), key_of_half(&key, false));
    let one = gossiper(over, key).await;
    let mut two = gossiper(over, same).await;
    let mut three = gossiper(over, other).await;
    two.net.dial(one.addr()).await.unwrap();
    three.net.dial(one.addr()).await.unwrap();
    three.net.dial(two.addr()).await.unwrap();
    for peer in [&one, &two] {
        let half = Slice::of(&peer.id(), 1);
        peer.net.set_slices(half, BTreeSet::from([half, Slice::ALL])).await.unwrap();
    }
    while three.net.depths().await.unwrap() != [1, 1] {
        tokio::task::yield_now().await;
    }
    publish(&one, b"for one half").await;
    assert_eq!(next(&mut two).await, b"for one half");
    // Those of a half still hear who tells everybody, and who tells everybody does not hear the half.
    publish(&three, b"for all").await;
    assert_eq!(next(&mut two).await, b"for all");
    for peer in [&one, &two] {
        peer.net.set_slices(Slice::ALL, BTreeSet::from([Slice::ALL])).await.unwrap();
    }
    publish(&one, b"for all again").await;
    assert_eq!(next(&mut three).await, b"for all again");
}

async fn providers(over: Over) {
    let full = |bootstrap| NetConfig { kad: KadRole::Server, bootstrap, ..node_config(over) };
    let hub = peer(full(Vec::new())).await;
    let one = peer(full(vec![hub.addr()])).await;
    let two = peer(full(vec![hub.addr()])).await;
    for peer in [&one, &two] {
        peer.net.dial(hub.addr()).await.unwrap();
        peer.net.peer_info(hub.id()).await.unwrap();
        hub.net.peer_info(peer.id()).await.unwrap();
    }
    let key = BlobId::from_bytes([3; 32]);
    assert_eq!(two.net.providers(key).await.unwrap(), []);
    one.net.provide(key, true).await.unwrap();
    while two.net.providers(key).await.unwrap() != [one.id()] {
        tokio::task::yield_now().await;
    }
}

async fn roles_off(over: Over) {
    let plain = node(over).await;
    let error = plain.net.set_slices(Slice::ALL, BTreeSet::new()).await.unwrap_err();
    assert!(matches!(error, NetError::RoleOff { role: "gossip" }), "got {error}");
    let error = plain.net.provide(BlobId::from_bytes([3; 32]), true).await.unwrap_err();
    assert!(matches!(error, NetError::RoleOff { role: "kad" }), "got {error}");
    assert_eq!(plain.net.providers(BlobId::from_bytes([3; 32])).await.unwrap(), []);
    assert_eq!(plain.net.depths().await.unwrap(), []);
}

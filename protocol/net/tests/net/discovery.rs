//! Adverts over gossip, and the toggles of the other ways to find peers.

use kinoflock_net::discovery::{Advert, Published, Verdict};
use kinoflock_net::{KadRole, NetConfig, NetError, NetEvent, limits};

use crate::support::{Over, Peer, node, node_config, over_both, peer, query};

over_both! {
    an_advert_reaches_others_only_after_each_has_accepted_it => hop_by_hop;
    who_forges_adverts_is_no_longer_listened_to => forger;
    an_advert_over_the_limit_is_refused_here => too_long;
    a_role_that_is_off_is_named => roles_off;
    nodes_with_every_role_on_find_each_other_through_a_third => all_roles;
}

async fn gossiper(over: Over) -> Peer {
    peer(NetConfig { gossip: true, ..node_config(over) }).await
}

async fn advert(peer: &mut Peer) -> Advert {
    peer.wait_for(|event| match event {
        NetEvent::Advert(advert) => Some(advert),
        _ => None,
    })
    .await
}

/// Publishes until somebody listens; gossip needs a moment to tell its subscriptions.
async fn publish(peer: &Peer, bytes: &[u8]) {
    let publishing = async {
        while peer.net.publish_advert(bytes.to_vec()).await.unwrap() == Published::NobodyListens {
            tokio::task::yield_now().await;
        }
    };
    crate::support::patient(publishing).await;
}

async fn hop_by_hop(over: Over) {
    let first = gossiper(over).await;
    let mut middle = gossiper(over).await;
    let mut last = gossiper(over).await;
    assert_eq!(first.net.publish_advert(vec![1]).await.unwrap(), Published::NobodyListens);
    middle.net.dial(first.addr()).await.unwrap();
    last.net.dial(middle.addr()).await.unwrap();
    // The middle one's advert reaches both, so that every link is known to gossip before the chain is tried.
    let sealed = query(first.id()).encode();
    publish(&last, b"from the last").await;
    let from_last = advert(&mut middle).await;
    assert_eq!((from_last.publisher, from_last.from), (last.id(), last.id()));
    from_last.judge(Verdict::Accept);
    publish(&first, b"ignored").await;
    let ignored = advert(&mut middle).await;
    assert_eq!(ignored.bytes, b"ignored");
    drop(ignored);
    publish(&first, b"forged").await;
    let forged = advert(&mut middle).await;
    assert_eq!(forged.bytes, b"forged");
    forged.judge(Verdict::Reject);
    publish(&first, &sealed).await;
    let good = advert(&mut middle).await;
    assert_eq!(good.bytes, sealed);
    good.judge(Verdict::Accept);
    let arrived = advert(&mut last).await;
    assert_eq!(arrived.bytes, sealed, "neither the ignored nor the forged one was forwarded");
    assert_eq!((arrived.publisher, arrived.from), (first.id(), middle.id()));
}

async fn forger(over: Over) {
    let mut honest = gossiper(over).await;
    let (forger, other) = (gossiper(over).await, gossiper(over).await);
    forger.net.dial(honest.addr()).await.unwrap();
    other.net.dial(honest.addr()).await.unwrap();
    for forged in 0..3_u8 {
        publish(&forger, &[b'f', forged]).await;
        advert(&mut honest).await.judge(Verdict::Reject);
    }
    // The driver takes verdicts and commands in a drawn order: after so many commands the verdicts have had their turn.
    for _ in 0..64 {
        honest.net.known_nodes().await.unwrap();
    }
    publish(&forger, b"never heard").await;
    publish(&other, b"heard").await;
    let next = advert(&mut honest).await;
    assert_eq!((next.bytes.as_slice(), next.publisher), (&b"heard"[..], other.id()));
}

async fn too_long(over: Over) {
    let alone = gossiper(over).await;
    let error = alone.net.publish_advert(vec![0; limits::ADVERT_BYTES + 1]).await.unwrap_err();
    assert!(matches!(error, NetError::TooLong { limit: limits::ADVERT_BYTES, .. }), "got {error}");
}

async fn roles_off(over: Over) {
    let plain = node(over).await;
    let error = plain.net.publish_advert(vec![0]).await.unwrap_err();
    assert!(matches!(error, NetError::RoleOff { role: "gossip" }), "got {error}");
    let error = plain.net.bootstrap().await.unwrap_err();
    assert!(matches!(error, NetError::RoleOff { role: "kad" }), "got {error}");
}

async fn all_roles(over: Over) {
    let full = |bootstrap| NetConfig {
        kad: KadRole::Server,
        gossip: true,
        mdns: true,
        bootstrap,
        ..node_config(over)
    };
    let hub = peer(full(Vec::new())).await;
    let one = peer(full(vec![hub.addr()])).await;
    let mut two = peer(full(vec![hub.addr()])).await;
    two.wait_for(|event| matches!(event, NetEvent::Identified(info) if info.node == hub.id()).then_some(()))
        .await;
    one.net.peer_info(hub.id()).await.ok();
    two.net.bootstrap().await.unwrap();
    let found = one.id();
    // The DHT's walk meets the third node and connects to it.
    two.wait_for(|event| matches!(event, NetEvent::Identified(info) if info.node == found).then_some(()))
        .await;
}

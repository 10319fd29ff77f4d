//! Ways over a relay: what goes over it, what waits for a direct connection, and places that come back.

use std::sync::Arc;
use std::time::Duration;

use kinoflock_net::blobs::MemoryBlobs;
use kinoflock_net::peer::is_relayed;
use kinoflock_net::{
    CircuitLimits, FetchError, FetchOptions, HolderFault, Identity, MemorySink, Multiaddr, NetConfig,
    NetError, NetEvent, NetHandle, Reach, RelayRole, Reserve, limits,
};
use kinoflock_protocol::codec::Bytes;
use kinoflock_protocol::progress::JobEvent;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::{BlobId, Keypair};

use crate::support::{
    Over, Peer, bytes, event, fresh_key, network, node_config, over_both, patient, peer, query,
};

over_both! {
    control_progress_and_small_blobs_go_over_a_relay_and_large_ones_do_not => relayed;
    over_a_relay_to_one_who_listens_a_direct_connection_comes_about => upgraded;
    a_place_at_a_relay_is_taken_again_after_it_was_away => taken_again;
    progress_goes_on_when_a_circuit_has_carried_its_bytes => circuit_ends;
    who_is_no_relay_gives_no_places => no_relay;
}

const LARGE: usize = 2 * limits::RELAYED_BLOB_BYTES as usize;

fn relay_config(over: Over, key: Keypair) -> NetConfig {
    let reach = Reach { relay: RelayRole::On, ..Reach::default() };
    NetConfig { identity: Identity::Key(key), reach, ..node_config(over) }
}

/// One whom nobody can dial: it listens nowhere but at the relay.
async fn hidden(over: Over, relay: &Peer) -> Peer {
    behind(NetConfig { listen: Vec::new(), ..node_config(over) }, relay).await
}

async fn behind(config: NetConfig, relay: &Peer) -> Peer {
    let reach = Reach { dial_relays: true, reserve: Reserve::Always, ..Reach::default() };
    peer(NetConfig { reach, bootstrap: vec![relay.addr()], ..config }).await
}

/// The address over the relay, as soon as there is one.
async fn circuit(node: &mut Peer) -> Multiaddr {
    node.wait_for(|event| match event {
        NetEvent::Listening { addr } if is_relayed(&addr) => Some(addr),
        _ => None,
    })
    .await
}

async fn client() -> NetHandle {
    peer(NetConfig::client(network())).await.net
}

fn serve(node: &Peer, len: usize, seed: u64) -> BlobId {
    let blobs = MemoryBlobs::new();
    let id = blobs.insert(bytes(len, seed)).unwrap();
    node.net.serve_blobs(Arc::new(blobs));
    id
}

async fn acknowledge(node: &mut Peer) {
    let responder = node.wait_for(|event| match event {
        NetEvent::Request { responder, .. } => Some(responder),
        _ => None,
    });
    responder.await.send(Response::Acknowledged).unwrap();
}

async fn relayed(over: Over) {
    let relay = peer(relay_config(over, fresh_key())).await;
    let mut node = hidden(over, &relay).await;
    let (addr, id) = (circuit(&mut node).await, node.id());
    assert!(node.net.dialable_addrs().contains(&addr), "{addr} is not told to others once");
    let client = client().await;
    assert_eq!(client.dial(addr).await.unwrap(), id);
    let asking = client.clone();
    let asked = tokio::spawn(async move { asking.request(id, Request::Capacity).await });
    acknowledge(&mut node).await;
    assert_eq!(asked.await.unwrap().unwrap(), Response::Acknowledged);

    let following = client.clone();
    let following = tokio::spawn(async move {
        let mut stream = following.open_progress(id, query(id), 0).await.unwrap();
        [stream.next().await.unwrap().unwrap(), stream.next().await.unwrap().unwrap()]
    });
    let sink = node.wait_for(|event| match event {
        NetEvent::Progress { sink, .. } => Some(sink),
        _ => None,
    });
    let sender = sink.await.accept();
    sender.send(event(0, JobEvent::Loading)).await.unwrap();
    let preview = JobEvent::Preview { step: 1, png: Bytes::new(vec![1; 64]).unwrap() };
    sender.send(event(1, preview)).await.unwrap();
    sender.send(event(2, JobEvent::Cancelled)).await.unwrap();
    assert_eq!(following.await.unwrap().map(|event| event.seq), [0, 2], "a preview went over the relay");

    let small = serve(&node, limits::RELAYED_BLOB_BYTES as usize, 1);
    client.fetch_blob(small, &[id], MemorySink::new(), FetchOptions::default()).await.unwrap();
    let large = serve(&node, LARGE, 2);
    let options = FetchOptions { direct_wait: Duration::from_millis(100), ..FetchOptions::default() };
    let error = client.fetch_blob(large, &[id], MemorySink::new(), options).await.unwrap_err();
    let FetchError::AllFailed { holders, .. } = &error else { panic!("got {error}") };
    let fault = holders[0].fault.clone().unwrap();
    assert!(
        matches!(fault, HolderFault::Net(NetError::OnlyRelayed { given, .. }) if given == LARGE as u64),
        "got {fault}"
    );
}

async fn upgraded(over: Over) {
    let relay = peer(relay_config(over, fresh_key())).await;
    let mut node = behind(node_config(over), &relay).await;
    let addr = circuit(&mut node).await;
    let large = serve(&node, LARGE, 3);
    let client = client().await;
    client.dial(addr).await.unwrap();
    let fetched = client.fetch_blob(large, &[node.id()], MemorySink::new(), FetchOptions::default()).await;
    assert_eq!(fetched.unwrap().1.len, LARGE as u64);
}

async fn taken_again(over: Over) {
    let key = fresh_key();
    let relay = peer(relay_config(over, key.clone())).await;
    let mut node = hidden(over, &relay).await;
    let addr = circuit(&mut node).await;
    let listen = relay.net.listen_addrs();
    relay.net.shutdown().await;
    let lost = node.wait_for(|event| match event {
        NetEvent::NotListening { addr } => Some(addr),
        _ => None,
    });
    assert_eq!(lost.await, addr);
    assert!(node.net.listen_addrs().is_empty());
    // QUIC gives its port back when its connections have been told.
    let restarted = patient(async {
        loop {
            let config = NetConfig { listen: listen.clone(), ..relay_config(over, key.clone()) };
            match kinoflock_net::start(config).await {
                Ok(started) => return started,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    });
    let _relay = restarted.await;
    assert_eq!(circuit(&mut node).await, addr);
    let client = client().await;
    assert_eq!(client.dial(addr).await.unwrap(), node.id());
}

async fn circuit_ends(over: Over) {
    const EVENTS: u64 = 4096;
    let circuits = CircuitLimits { bytes: 64 * 1024, ..CircuitLimits::default() };
    let relay = peer(NetConfig { circuits, ..relay_config(over, fresh_key()) }).await;
    let mut node = hidden(over, &relay).await;
    let (addr, id) = (circuit(&mut node).await, node.id());
    let telling = tokio::spawn(async move {
        let mut follows = 0;
        while let Some(event_of_net) = node.events.recv().await {
            let NetEvent::Progress { from_seq, sink, .. } = event_of_net else { continue };
            follows += 1;
            let sender = sink.accept();
            for seq in from_seq..EVENTS {
                let told = if seq + 1 == EVENTS { JobEvent::Cancelled } else { JobEvent::Loading };
                if sender.send(event(seq, told)).await.is_err() {
                    break;
                }
            }
        }
        follows
    });
    let client = client().await;
    client.dial(addr.clone()).await.unwrap();
    let mut next = 0;
    while next < EVENTS {
        client.connect(id, vec![addr.clone()]).await.unwrap();
        // The circuit may end while the question is on its way.
        let Ok(mut stream) = client.open_progress(id, query(id), next).await else { continue };
        while let Some(Ok(told)) = stream.next().await {
            assert_eq!(told.seq, next);
            next += 1;
        }
    }
    client.shutdown().await;
    relay.net.shutdown().await;
    telling.abort();
    let follows = telling.await;
    assert!(follows.is_err() || follows.unwrap() > 1);
}

async fn no_relay(over: Over) {
    let reach = Reach { relay: RelayRole::Auto, ..Reach::default() };
    let unproven = peer(NetConfig { reach, ..node_config(over) }).await;
    let node = hidden(over, &unproven).await;
    let info = patient(async {
        loop {
            if let Ok(info) = node.net.peer_info(unproven.id()).await {
                return info;
            }
        }
    });
    assert_eq!(info.await.node, unproven.id());
    assert!(node.net.listen_addrs().is_empty());
}

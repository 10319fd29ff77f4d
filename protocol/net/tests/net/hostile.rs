//! Peers that send garbage, half frames, oversized lengths, or next to nothing, while an honest one works.

use std::sync::Arc;

use futures::future::join_all;
use futures::{AsyncReadExt, AsyncWriteExt};
use kinoflock_net::blobs::MemoryBlobs;
use kinoflock_net::{FetchOptions, MemorySink, NetError, NetHandle};
use kinoflock_protocol::limits::CHUNK_BYTES;
use kinoflock_protocol::names::Protocols;
use kinoflock_protocol::{BlobId, NodeId};

use crate::support::{Over, Raw, acknowledged, bytes, client_of, network, node, over_both, peer};

over_both! {
    garbage_ends_its_stream_and_nothing_else => garbage;
    oversized_lengths_end_their_stream_at_once => oversized;
    slow_loris_streams_end_and_an_honest_peer_is_served_meanwhile => slow_loris;
    a_flood_of_opens_leaves_an_honest_peer_served => flood;
    a_peer_that_is_no_kinoflock_node_is_named_as_such => stranger;
}

fn protocols() -> [String; 3] {
    let names = Protocols::of(&network());
    [names.control, names.progress, names.blobs]
}

/// A node that answers and serves one blob, and an honest client of it.
async fn served(over: Over) -> (NetHandle, NetHandle, Vec<u8>) {
    let node = node(over).await;
    let content = bytes(2 * CHUNK_BYTES + 1, 1);
    let blobs = MemoryBlobs::new();
    blobs.insert(content.clone()).unwrap();
    node.net.serve_blobs(Arc::new(blobs));
    let client = client_of(&node).await;
    (node.acknowledging(), client.net, content)
}

async fn is_served(client: &NetHandle, node: NodeId, content: &[u8]) {
    acknowledged(client, node).await;
    let sink = MemorySink::new();
    let (sink, _) =
        client.fetch_blob(BlobId::of(content), &[node], sink, FetchOptions::default()).await.unwrap();
    assert_eq!(sink.into_bytes(), content);
}

/// Reads until the far side ends the stream; gives what it said. An abort is an end, too.
async fn until_end(stream: &mut libp2p::Stream) -> Vec<u8> {
    let mut said = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return said,
            Ok(read) => said.extend_from_slice(&buffer[..read]),
        }
    }
}

async fn garbage(over: Over) {
    let (node, client, content) = served(over).await;
    let mut raw = Raw::connect(&node.dialable_addrs()[0]).await;
    for (round, protocol) in protocols().iter().cycle().take(30).enumerate() {
        let mut stream = raw.open(protocol).await.unwrap();
        let mut noise = (100_u32).to_le_bytes().to_vec();
        noise.extend(bytes(100, round as u64));
        noise[4] = 1;
        stream.write_all(&noise).await.unwrap();
        stream.close().await.unwrap();
        until_end(&mut stream).await;
    }
    is_served(&client, node.local_node(), &content).await;
    assert!(raw.closed.try_recv().is_err(), "one bad stream does not cost the others theirs");
}

async fn oversized(over: Over) {
    let (node, client, content) = served(over).await;
    let raw = Raw::connect(&node.dialable_addrs()[0]).await;
    for protocol in protocols() {
        let mut stream = raw.open(&protocol).await.unwrap();
        stream.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        assert!(until_end(&mut stream).await.is_empty(), "{protocol}");
    }
    is_served(&client, node.local_node(), &content).await;
}

async fn slow_loris(over: Over) {
    let (node, client, content) = served(over).await;
    let raw = Raw::connect(&node.dialable_addrs()[0]).await;
    let mut slow = Vec::new();
    for protocol in protocols() {
        for sent in [&[][..], &[40, 0], &[40, 0, 0, 0, 1, 2, 3]] {
            let mut stream = raw.open(&protocol).await.unwrap();
            stream.write_all(sent).await.unwrap();
            stream.flush().await.unwrap();
            slow.push(stream);
        }
    }
    is_served(&client, node.local_node(), &content).await;
    // Each of them ends by itself, in the time that a frame may take.
    let ends = slow.iter_mut().map(until_end);
    assert!(join_all(ends).await.iter().all(Vec::is_empty));
    is_served(&client, node.local_node(), &content).await;
}

async fn flood(over: Over) {
    let (node, client, content) = served(over).await;
    let addr = node.dialable_addrs()[0].clone();
    let raws = join_all((0..3).map(|_| Raw::connect(&addr))).await;
    let protocols = protocols();
    let opens = raws.iter().flat_map(|raw| (0..400).map(move |at| (raw, at)));
    let opens = opens.map(|(raw, at)| raw.open(&protocols[at % 3]));
    let opening = join_all(opens);
    let working = async {
        for _ in 0..5 {
            is_served(&client, node.local_node(), &content).await;
        }
    };
    let (opened, ()) = tokio::join!(opening, working);
    assert!(opened.iter().filter(|stream| stream.is_ok()).count() >= 3 * 320);
    is_served(&client, node.local_node(), &content).await;
}

async fn stranger(over: Over) {
    use libp2p::{SwarmBuilder, identify, noise, swarm::SwarmEvent, tcp, yamux};
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_quic()
        .with_behaviour(|key| {
            let config = identify::Config::new("/other/1".into(), key.public());
            identify::Behaviour::new(config.with_agent_version("other/9".into()))
        })
        .unwrap()
        .build();
    swarm.listen_on(over.listen()).unwrap();
    let addr = loop {
        use futures::StreamExt;
        if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
            break address;
        }
    };
    tokio::spawn(async move {
        use futures::StreamExt;
        loop {
            swarm.select_next_some().await;
        }
    });
    let client = peer(kinoflock_net::NetConfig::client(network())).await;
    let error = client.net.request_at(addr, kinoflock_protocol::rpc::Request::Capacity).await.unwrap_err();
    assert!(matches!(&error, NetError::NotKinoflock { agent, .. } if agent == "other/9"), "got {error}");
}

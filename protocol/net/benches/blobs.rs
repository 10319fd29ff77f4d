//! A 64 MiB blob over loopback, verified MiB by MiB, over TCP and over QUIC:
//! `cargo bench -p kinoflock-net --bench blobs`.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kinoflock_net::blobs::MemoryBlobs;
use kinoflock_net::{FetchOptions, KadRole, MemorySink, NetConfig, NetHandle, start};
use kinoflock_protocol::{BlobId, Keypair, NetworkId};
use tokio::runtime::Runtime;

const LEN: usize = 64 * 1024 * 1024;

fn blobs(criterion: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let mut group = criterion.benchmark_group("blob_64_mib");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(LEN as u64));
    for (name, listen) in [("tcp", "/ip4/127.0.0.1/tcp/0"), ("quic", "/ip4/127.0.0.1/udp/0/quic-v1")] {
        let (holder, client, id) = runtime.block_on(pair(listen));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                runtime.block_on(async {
                    let holders = [holder.local_node()];
                    let options = FetchOptions::default();
                    let fetched = client.fetch_blob(id, &holders, MemorySink::new(), options).await;
                    black_box(fetched.unwrap().0.into_bytes())
                })
            });
        });
    }
    group.finish();
}

async fn pair(listen: &str) -> (NetHandle, NetHandle, BlobId) {
    let network = NetworkId::named("kinoflock-net-bench");
    let config = NetConfig {
        listen: vec![listen.parse().unwrap()],
        kad: KadRole::Off,
        gossip: false,
        ..NetConfig::node(Keypair::from_seed(&[3; 32]), network, 0)
    };
    let (holder, _) = start(config).await.unwrap();
    let blobs = MemoryBlobs::new();
    let content: Vec<u8> =
        (0..LEN as u32 / 4).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let id = blobs.insert(content).unwrap();
    holder.serve_blobs(Arc::new(blobs));
    let (client, _) = start(NetConfig::client(network)).await.unwrap();
    client.dial(holder.dialable_addrs()[0].clone()).await.unwrap();
    (holder, client, id)
}

criterion_group!(benches, blobs);
criterion_main!(benches);

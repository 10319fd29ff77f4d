//! What a node takes beside computing, with real processes on loopback, as a table:
//! `cargo bench --workspace --bench loopback`.
//!
//! Daemon and test engine are processes of the release build; those who ask are tasks of this one, with keys and
//! connections of their own. The numbers hold for a machine that does nothing else.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use kinoflock_net::blobs::MemoryBlobs;
use kinoflock_net::{FetchOptions, KadRole, MemorySink, NetConfig, NetHandle, start};
use kinoflock_protocol::progress::JobEvent;
use kinoflock_protocol::rpc::Response;
use kinoflock_protocol::{BlobId, JobSpec, Keypair, NetworkId};
use kinoflock_tests::requester::{Ordered, Requester};
use kinoflock_tests::sandbox::{Node, Sandbox, Worker};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Room for all that is asked here at once.
const ROOMY: &str = "[queue]\njobs = 2048\njobs_per_prefix = 2048\nlease = \"60 s\"\nleases = 2048\n\
                     leases_per_prefix = 2048\nleases_per_requester = 2048\n\
                     [policy]\nqueued_jobs = 2048\nunacknowledged = \"unlimited\"\n";
/// Connections over which many ask.
const CONNECTIONS: usize = 10;
/// Jobs that are timed for each number in flight.
const TIMED: usize = 400;
/// Jobs that are handed over to see how many a node admits.
const ADMITTED: usize = 500;
/// Each of them takes longer than all this.
const LONG_STEPS: u32 = 50;
const LONG_STEP_MS: &str = "500";
/// Orders under way at once meanwhile.
const ORDERS_AT_ONCE: usize = 32;
/// Bytes that are transferred at once.
const LEN: usize = 256 << 20;
/// Times that they are.
const TRANSFERS: usize = 5;
/// How long a node is left alone before its memory is looked at.
const IDLE: Duration = Duration::from_secs(20);

fn main() {
    println!("| what | | |\n|---|---|---|");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(transfer());
    let sandbox = Sandbox::start_with(1, &Worker::test(&[]), ROOMY);
    runtime.block_on(async {
        memory(&sandbox.nodes[0], "after its start").await;
        for in_flight in [1, 10, 100] {
            dispatch(&sandbox, in_flight).await;
        }
        memory(&sandbox.nodes[0], "after these jobs").await;
    });
    runtime.block_on(admission());
}

async fn requesters(sandbox: &Sandbox, count: usize) -> Vec<Requester> {
    stream::iter(0..count).then(|_| Requester::new(sandbox)).collect().await
}

async fn prepared(artist: &Requester, node: &Node, seed: u64, steps: u32) -> Ordered {
    let spec = JobSpec { seed, ..artist.spec(node, "a blue square drifts left", steps) };
    let lease = artist.lease(node, &spec).await;
    artist.order(node.local().node_id, &spec, lease)
}

/// From the order's sending to the first event of its progress, so many jobs being under way at once.
async fn dispatch(sandbox: &Sandbox, in_flight: usize) {
    let (node, artists) = (&sandbox.nodes[0], requesters(sandbox, in_flight.min(CONNECTIONS)).await);
    let one = |number: usize| {
        let artist = &artists[number % artists.len()];
        async move {
            let ordered = prepared(artist, node, number as u64, 1).await;
            let began = Instant::now();
            match artist.submit(node, &ordered).await {
                Response::Accepted { .. } => {}
                other => panic!("not accepted: {other:?}"),
            }
            let mut progress = artist.follow(node, artist.id(&ordered.job)).await;
            progress.next().await.unwrap().unwrap();
            let took = began.elapsed();
            while let Some(event) = progress.next().await {
                match event.unwrap().event {
                    JobEvent::Done { .. } => break,
                    JobEvent::Failed { text, .. } => panic!("{text}"),
                    _ => {}
                }
            }
            took
        }
    };
    // The first ones open connections and load the model.
    let mut told = stream::iter(0..TIMED + in_flight).map(one).buffered(in_flight).skip(in_flight);
    let mut times = Vec::new();
    while let Some(took) = told.next().await {
        times.push(took);
    }
    times.sort_unstable();
    let (median, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("| order to first progress, {in_flight} in flight | median {median:.1?} | p99 {p99:.1?} |");
}

/// Jobs a second that are on disk when they are accepted, while the device is busy with the first.
async fn admission() {
    let sandbox = Sandbox::start_with(1, &Worker::test(&["--step-ms", LONG_STEP_MS]), ROOMY);
    let (node, artists) = (&sandbox.nodes[0], requesters(&sandbox, CONNECTIONS).await);
    let prepare = |number: usize| prepared(&artists[number % artists.len()], node, number as u64, LONG_STEPS);
    let orders: Vec<_> = stream::iter(0..ADMITTED).map(prepare).buffered(ORDERS_AT_ONCE).collect().await;
    let began = Instant::now();
    let submit = |(number, ordered): (usize, &Ordered)| {
        let (artist, ordered) = (&artists[number % artists.len()], ordered.clone());
        async move { artist.submit(node, &ordered).await }
    };
    let answers: Vec<_> =
        stream::iter(orders.iter().enumerate()).map(submit).buffer_unordered(ORDERS_AT_ONCE).collect().await;
    let took = began.elapsed();
    let wrong = answers.iter().find(|answer| !matches!(answer, Response::Accepted { .. }));
    assert!(wrong.is_none(), "{wrong:?}");
    let rate = ADMITTED as f64 / took.as_secs_f64();
    println!("| jobs admitted durably by one node, {ORDERS_AT_ONCE} at once | {rate:.0}/s | of {ADMITTED} |");
}

async fn memory(node: &Node, when: &str) {
    tokio::time::sleep(IDLE).await;
    let mib = node.memory() as f64 / f64::from(1 << 20);
    println!(
        "| resident memory of an idle node, {when} | {mib:.1} MiB | {:.1} MB |",
        node.memory() as f64 / 1e6
    );
}

/// A verified blob beside as many bytes of plain TCP, in turns.
async fn transfer() {
    let content: Vec<u8> =
        (0..LEN as u32 / 4).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let content = Arc::new(content);
    let mut pairs = Vec::new();
    for listen in ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"] {
        pairs.push(pair(listen, &content).await);
    }
    let (mut plain, mut verified) = (Vec::new(), [Vec::new(), Vec::new()]);
    for _ in 0..TRANSFERS {
        plain.push(plain_tcp(&content).await);
        for ((holder, client, id), times) in pairs.iter().zip(&mut verified) {
            let began = Instant::now();
            let (sink, options) = (MemorySink::new(), FetchOptions::default());
            let fetched = client.fetch_blob(*id, &[holder.local_node()], sink, options).await.unwrap();
            times.push(began.elapsed());
            assert_eq!(fetched.0.into_bytes().len(), LEN);
        }
    }
    let [tcp, quic] = verified;
    for (name, times) in [("plain TCP", plain), ("verified, TCP", tcp), ("verified, QUIC", quic)] {
        let speed = |took: &Duration| LEN as f64 / 1e6 / took.as_secs_f64();
        let mut speeds: Vec<f64> = times.iter().map(speed).collect();
        speeds.sort_by(f64::total_cmp);
        let (median, best) = (speeds[speeds.len() / 2], speeds[speeds.len() - 1]);
        println!("| transfer, {name} | median {median:.0} MB/s | best {best:.0} MB/s |");
    }
}

async fn pair(listen: &str, content: &[u8]) -> (NetHandle, NetHandle, BlobId) {
    let network = NetworkId::named("loopback-bench");
    let config = NetConfig {
        listen: vec![listen.parse().unwrap()],
        kad: KadRole::Off,
        gossip: false,
        ..NetConfig::node(Keypair::from_seed(&[3; 32]), network, 0)
    };
    let (holder, _) = start(config).await.unwrap();
    let blobs = MemoryBlobs::new();
    let id = blobs.insert(content).unwrap();
    holder.serve_blobs(Arc::new(blobs));
    let (client, _) = start(NetConfig::client(network)).await.unwrap();
    client.dial(holder.dialable_addrs()[0].clone()).await.unwrap();
    (holder, client, id)
}

async fn plain_tcp(content: &Arc<Vec<u8>>) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (addr, content) = (listener.local_addr().unwrap(), Arc::clone(content));
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&content).await.unwrap();
    });
    let began = Instant::now();
    let (mut stream, mut taken) = (TcpStream::connect(addr).await.unwrap(), Vec::with_capacity(LEN));
    stream.read_to_end(&mut taken).await.unwrap();
    assert_eq!(taken.len(), LEN);
    began.elapsed()
}

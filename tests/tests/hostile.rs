//! Peers that send a real daemon garbage, half frames, oversized lengths, floods of streams, or next to nothing: an
//! honest artist's jobs are done meanwhile, and the daemon's memory stays bounded.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use futures::AsyncWriteExt;
use futures::future::join_all;
use kinoflock_protocol::names::Protocols;
use kinoflock_tests::invariants;
use kinoflock_tests::raw::{Raw, until_end};
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker};

const PROMPT: &str = "a violet heron over the reservoir at dawn";
/// What a daemon may hold beyond what it held before it was attacked.
const ROOM: u64 = 384 << 20;
/// Clips that the honest artist makes during an attack.
const CLIPS: usize = 3;
/// Most peers that attack at once.
const PEERS: usize = 4;

/// Bytes without a meaning, the same for the same number.
fn noise(len: usize, number: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn protocols(sandbox: &Sandbox) -> [String; 3] {
    let names = Protocols::of(&sandbox.network());
    [names.control, names.progress, names.blobs]
}

/// The honest artist at work: so many clips, one after the other, each of them delivered.
fn work(node: &Node, client: &Client) {
    let mut made = Vec::new();
    for number in 0..CLIPS {
        let (file, seed) = (format!("{number}.mp4"), number.to_string());
        let transport = ["tcp", "udp"][number % 2];
        let arguments =
            ["generate", PROMPT, "--node", &node.address(transport), "-o", &file, "--seed", &seed];
        client.must(arguments);
        made.push(invariants::delivered(&client.path(&file), node));
    }
    invariants::one_outcome_each(&made);
    invariants::one_chain(&made);
}

/// Attacks again and again while the artist works, and watches the daemon's memory.
fn while_attacked(node: &Node, client: &Client, attack: impl AsyncFn(usize)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let before = node.memory();
    let mut most = before;
    std::thread::scope(|scope| {
        let mut working = None;
        for round in 0.. {
            runtime.block_on(attack(round));
            most = most.max(node.memory());
            // The artist begins when the attack is under way.
            let working = working.get_or_insert_with(|| scope.spawn(|| work(node, client)));
            if working.is_finished() {
                break;
            }
        }
    });
    assert!(most < before + ROOM, "{before} bytes became {most}");
    assert!(node.status().accepting.is_ok());
    invariants::discreet(node, PROMPT);
}

/// A frame's header that promises so many bytes.
fn promise(len: u32) -> Vec<u8> {
    len.to_le_bytes().to_vec()
}

#[test]
fn garbage_half_frames_and_oversized_lengths_end_their_streams_and_nothing_else() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let protocols = protocols(&sandbox);
    while_attacked(node, &client, async |round| {
        let transport = ["tcp", "udp"][round % 2];
        let raw = Raw::connect(&node.address(transport)).await.unwrap();
        for (number, protocol) in protocols.iter().enumerate() {
            let mut framed = promise(200);
            framed.extend(noise(200, round * 3 + number));
            // The version that the node speaks, so that it is the message that is wrong.
            framed[4] = 1;
            let mut cut = promise(200);
            cut.extend(noise(20, round));
            for bytes in [framed, cut, noise(5_000, round), vec![0; 64], Vec::new()] {
                let Some(mut stream) = raw.say(protocol, &bytes).await else { continue };
                // It may have been reset already.
                let _ = stream.close().await;
                until_end(&mut stream).await;
            }
            let mut large = raw.say(protocol, &promise(u32::MAX)).await.unwrap();
            assert!(until_end(&mut large).await.is_empty(), "{protocol} answers an impossible length");
        }
        // All of it cost this connection nothing.
        assert!(raw.open(&protocols[0]).await.is_some());
    });
}

#[test]
fn floods_of_opens_leave_an_honest_artist_served() {
    const OPENS: usize = 400;
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let protocols = protocols(&sandbox);
    while_attacked(node, &client, async |round| {
        let address = node.address(["tcp", "udp"][round % 2]);
        let raws: Vec<_> =
            join_all((0..PEERS).map(|_| Raw::connect(&address))).await.into_iter().flatten().collect();
        let opens = raws.iter().flat_map(|raw| (0..OPENS).map(move |at| (raw, at)));
        let opened = join_all(opens.map(|(raw, at)| raw.open(&protocols[at % 3]))).await;
        // A flood that nobody felt would prove nothing.
        let held = opened.iter().flatten().count();
        assert!(held > OPENS / 2, "only {held} streams were open");
    });
}

#[test]
fn slow_streams_and_silent_sockets_hold_nobody_up() {
    /// Silent sockets that are opened in a round; each is held for the whole attack.
    const SOCKETS: usize = 100;
    /// Most that are held: more than a node has places for connections that do not get on.
    const MOST: usize = 300;
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let (protocols, port) = (protocols(&sandbox), tcp_port(node));
    let held = tokio::sync::Mutex::new((Vec::new(), Vec::new(), Vec::new()));
    while_attacked(node, &client, async |round| {
        let mut held = held.lock().await;
        let (raws, streams, sockets) = &mut *held;
        if raws.len() < PEERS {
            let raw = Raw::connect(&node.address(["tcp", "udp"][round % 2])).await.unwrap();
            for protocol in &protocols {
                for begun in [&[][..], &[40, 0], &[40, 0, 0, 0, 1, 2, 3]] {
                    streams.extend(raw.say(protocol, begun).await);
                }
            }
            raws.push(raw);
        }
        while sockets.len() < MOST.min((round + 1) * SOCKETS) {
            sockets.push(elsewhere(port).await);
        }
        // A byte each, so that none of them is idle; one that was hung up on takes none.
        for socket in sockets.iter_mut() {
            let _ = socket.write_all(&[0x13]);
        }
        for stream in streams.iter_mut() {
            let _ = tokio::time::timeout(Duration::from_millis(20), stream.write_all(&[0])).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    });
}

/// A connection from another network than the artist's.
async fn elsewhere(port: u16) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.9.9:0".parse().unwrap()).unwrap();
    let stream = socket.connect(([127, 0, 0, 1], port).into()).await.unwrap();
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

fn tcp_port(node: &Node) -> u16 {
    let address = node.address("tcp");
    address.split('/').nth(4).unwrap().parse().unwrap()
}

fn udp_port(node: &Node) -> u16 {
    let address = node.address("udp");
    address.split('/').nth(4).unwrap().parse().unwrap()
}

#[test]
fn raw_garbage_on_the_ports_themselves_is_hung_up_on() {
    let sandbox = Sandbox::start(1, &Worker::test(&[]));
    let (node, client) = (&sandbox.nodes[0], sandbox.client("artist"));
    let (tcp, udp) = (tcp_port(node), udp_port(node));
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    while_attacked(node, &client, async |round| {
        let hello = b"\x13/multistream/1.0.0\n";
        let openings: [Vec<u8>; 5] = [
            noise(64 * 1024, round),
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
            [&hello[..], &[0xff; 200]].concat(),
            [&hello[..], b"\x07/noise\n", &noise(70_000, round)].concat(),
            [&hello[..], b"\x07/noise\n", &[0xff, 0xff]].concat(),
        ];
        for bytes in openings {
            let mut socket = TcpStream::connect(("127.0.0.1", tcp)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            // It may hang up in the middle of it.
            let _ = socket.write_all(&bytes);
            let mut said = Vec::new();
            let _ = socket.take(4096).read_to_end(&mut said);
            assert!(said.len() < 4096, "it talks to garbage");
        }
        for number in 0..50 {
            datagrams.send_to(&noise(1_200, round * 50 + number), ("127.0.0.1", udp)).unwrap();
        }
    });
}
